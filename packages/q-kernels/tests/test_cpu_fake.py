"""Fake quantization on a CPU, against its meaning in plain torch."""

import concurrent.futures
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_core import ops
from q_core.kernels import Operator, only
from q_kernels.cpu import fake, memory

from .tiles import spread, tiled

LEVELS, GRADIENTS = fake.fake_quantize[0], fake.fake_quantize_grad[0]
VALUES, SLOPES = ops.FAKE_QUANTIZE.reference.run, ops.FAKE_QUANTIZE_GRAD.reference.run
HALF_ULP = 2.0**-24  # of float32, relative
EXACT = {"rtol": 0, "atol": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor and what tiles it."""

    shape: tuple[int, ...]
    tiles: tuple[int, ...]
    affine: bool = False
    masked: bool = False
    seed: int = 0

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, int, int, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        qmin, qmax = (0, 15) if self.affine else (-8, 7)
        x = torch.randn(self.shape, generator=generator) * 3
        scale = torch.rand(self.tiles, generator=generator) + 0.1
        zero = torch.randint(0, 16, self.tiles, generator=generator).float() if self.affine else None
        where = torch.rand(self.shape, generator=generator) < 0.5 if self.masked else None
        return x, scale, zero, qmin, qmax, where

    def incoming(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed + 1))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scales over any axes; short runs, long runs and rows of scales."""
    tiles = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shape = [count * draw(st.sampled_from([1, 2, 3, 5, 17])) for count in tiles]
    if draw(st.booleans()):
        tiles = [1] * draw(st.integers(1, 3))
    return Case(tuple(shape), tuple(tiles), draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 99)))


FORMS = [
    Case((7,), (1,)),
    Case((3, 40_001), (1, 1)),  # several blocks, the last one short
    Case((6, 5, 3, 3), (6, 1, 1, 1)),
    Case((6, 3, 3, 9, 9), (6, 1, 1, 1, 1)),
    Case((4, 6, 9, 9), (1, 6, 1, 1)),
    Case((3, 40_000), (3, 1)),
    Case((40, 96), (40, 3)),  # groups
    Case((8, 96), (4, 3)),  # blocks on two axes
    Case((1000, 24), (1, 24)),  # rows of scales, folded
    Case((999, 13), (1, 13)),
    Case((96, 700), (1, 700)),
    Case((5, 4, 6), (1, 4, 3)),
    Case((5, 4, 6), (5, 1, 3)),
]


def check(case: Case, arguments: tuple, grad: Tensor) -> None:
    x, scale, zero, qmin, qmax, where = arguments
    assert LEVELS.refuses(*arguments) is None
    y, expected = LEVELS.run(*arguments), VALUES(*arguments)
    torch.testing.assert_close(y, expected, **EXACT)
    assert torch.equal(y.signbit(), expected.signbit())
    assert GRADIENTS.refuses(grad, *arguments, True) is None
    by_x, by_scale = GRADIENTS.run(grad, *arguments, True)
    torch.testing.assert_close(by_x, SLOPES(grad, *arguments, True)[0], **EXACT)
    # The coordinates in float32 decide what is inside, so only the terms and their sum are exact here.
    u = (x.float() / spread(scale, case.shape)).double()
    low, high = (end - (0 if zero is None else spread(zero, case.shape).double()) for end in (qmin, qmax))
    outside, nearest = (u < low) | (u > high), u.clamp(low, high).round()
    terms = grad.double() * (nearest - u.masked_fill(outside, 0))
    terms = terms if where is None else terms.masked_fill(~where, 0)
    exact, size = (tiled(tensor, case.tiles) for tensor in (terms, terms.abs()))
    # A rounding of the residual, which nothing cancels in, one of the product, one of every sum in a lane of a block,
    # where a lane adds an element in 16 at least of 16384, or all rows of a block; one at the end.
    steps = 4 + min(memory.BLOCK, x.numel())
    torch.testing.assert_close(by_scale.double(), exact, rtol=0, atol=steps * HALF_ULP * float(size.max()) + 1e-30)


@given(cases())
def test_levels_agree_bit_for_bit_and_gradients_with_float64(case: Case) -> None:
    check(case, case.arguments(), case.incoming())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_agrees(form: Case, affine: bool, masked: bool) -> None:
    case = dataclasses.replace(form, affine=affine, masked=masked)
    check(case, case.arguments(), case.incoming())


@pytest.mark.parametrize("tiles", [(1,), (1, 32), (64, 1)])
@pytest.mark.parametrize("zero", [None, 0.0, 5.0])
def test_ties_ends_and_signs_of_zero_agree(tiles: tuple[int, ...], zero: float | None) -> None:
    x = ((torch.arange(2048) - 1024) / 32).reshape(64, 32)  # quarters of a code, which are exact
    point = None if zero is None else torch.full(tiles, zero)
    check(Case((64, 32), tiles), (x, torch.full(tiles, 0.125), point, -4, 11, None), torch.ones(64, 32))
    check(Case((64, 32), tiles), (x * -0.0, torch.full(tiles, 0.125), point, -4, 11, None), torch.ones(64, 32))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tiles", [(1,), (1, 40), (40, 1)])
def test_numbers_that_are_none_and_infinite_ones_agree(tiles: tuple[int, ...], masked: bool) -> None:
    case = Case((40, 40), tiles, masked=masked)
    arguments, grad = case.arguments(), case.incoming()
    x = arguments[0]
    x[3, 4], x[7, 30], x[22, 8] = torch.nan, torch.inf, -torch.inf
    grad[5, 5], grad[6, 6] = torch.inf, torch.nan
    torch.testing.assert_close(LEVELS.run(*arguments), VALUES(*arguments), **EXACT, equal_nan=True)
    found, expected = GRADIENTS.run(grad, *arguments, True), SLOPES(grad, *arguments, True)
    torch.testing.assert_close(found[0], expected[0], **EXACT, equal_nan=True)
    assert torch.equal(found[1].isnan(), expected[1].isnan())
    assert torch.equal(found[1].isinf(), expected[1].isinf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS[:6], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, form: Case) -> None:
    x, *rest = form.arguments()
    x, grad = x.to(dtype), form.incoming()
    y = LEVELS.run(x, *rest)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, LEVELS.run(x.float(), *rest), **EXACT)
    by_x, by_scale = GRADIENTS.run(grad, x, *rest, True)
    wide = GRADIENTS.run(grad, x.float(), *rest, True)
    torch.testing.assert_close(by_x, wide[0].to(dtype), **EXACT)
    torch.testing.assert_close(by_scale, wide[1], **EXACT)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "off the boundary of a vector": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape),
    "expanded": lambda t: t[:1, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("tiles", [(1,), (1, 6, 1, 1), (4, 1, 1, 1), (2, 3, 1, 4), (4, 6, 10, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_tensors_does_not_matter(layout: str, tiles: tuple[int, ...]) -> None:
    case = Case((4, 6, 10, 8), tiles, affine=True, masked=True)
    x, *rest, where = case.arguments()
    x, where, grad = (LAYOUTS[layout](tensor) for tensor in (x, where, case.incoming()))
    check(case, (x, *rest, where), grad)
    check(case, (x.contiguous(), *rest, where), grad)
    check(case, (x, *rest, where.contiguous()), grad.contiguous())


def test_results_lie_in_memory_as_the_input_does() -> None:
    x = torch.randn(4, 6, 10, 8).to(memory_format=torch.channels_last)
    arguments = (x, torch.rand(1, 6, 1, 1) + 0.1, None, -8, 7, None)
    for result in (LEVELS.run(*arguments), GRADIENTS.run(torch.randn(4, 6, 10, 8), *arguments, True)[0]):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_left_as_they_are() -> None:
    case = Case((40, 96), (40, 3), affine=True, masked=True)
    arguments, grad = case.arguments(), case.incoming()
    tensors = [grad, *(argument for argument in arguments if isinstance(argument, Tensor))]
    before = [tensor.clone() for tensor in tensors]
    results = [LEVELS.run(*arguments), *GRADIENTS.run(grad, *arguments, True)]
    for result in results:
        result.zero_()  # nor do results share their memory
    torch.testing.assert_close(tensors, before, **EXACT)


@pytest.mark.parametrize(("shape", "tiles"), [((0,), (1,)), ((0, 4), (1, 4)), ((3, 0), (3, 1))])
def test_empty_tensors_work(shape: tuple[int, ...], tiles: tuple[int, ...]) -> None:
    arguments = Case(shape, tiles).arguments()
    assert LEVELS.refuses(*arguments) is None
    assert LEVELS.run(*arguments).shape == shape
    by_x, by_scale = GRADIENTS.run(torch.ones(shape), *arguments, True)
    assert by_x.shape == shape
    torch.testing.assert_close(by_scale, torch.zeros(tiles), **EXACT)


def test_a_number_without_axes_works() -> None:
    arguments = (torch.tensor(0.7), torch.full((1,), 0.5), None, -8, 7, None)
    assert LEVELS.refuses(*arguments) is None
    torch.testing.assert_close(LEVELS.run(*arguments), torch.tensor(0.5), **EXACT)
    by_x, by_scale = GRADIENTS.run(torch.tensor(2.0), *arguments, True)
    torch.testing.assert_close(by_x, torch.tensor(2.0), **EXACT)
    torch.testing.assert_close(by_scale, torch.tensor([2.0]) * (1 - torch.tensor([0.7]) / 0.5), **EXACT)


def test_a_scale_that_does_not_learn_has_no_gradient() -> None:
    case = FORMS[2]
    by_x, by_scale = GRADIENTS.run(case.incoming(), *case.arguments(), False)
    assert by_scale is None
    torch.testing.assert_close(by_x, GRADIENTS.run(case.incoming(), *case.arguments(), True)[0], **EXACT)


def everything(case: Case) -> list[Tensor]:
    arguments = case.arguments()
    return [LEVELS.run(*arguments), *GRADIENTS.run(case.incoming(), *arguments, True)]


LARGE = [Case((7, 100_003), (1,)), Case((64, 64, 11, 13), (1, 64, 1, 1)), Case((9000, 96), (1, 96))]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_number_of_threads_does_not_change_a_bit(case: Case) -> None:
    alone = everything(case)
    torch.set_num_threads(3)
    try:
        together = everything(case)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, **EXACT)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    several = [dataclasses.replace(FORMS[index % len(FORMS)], seed=index) for index in range(24)]
    alone = [everything(case) for case in several]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(everything, several))
    torch.testing.assert_close(together, alone, **EXACT)


def test_kernels_refuse_what_they_cannot_do() -> None:
    x, scale, zero, qmin, qmax, _ = FORMS[2].arguments()
    rest = (zero, qmin, qmax)
    assert "torch.float64" in str(LEVELS.refuses(x.double(), scale, *rest, None))
    assert "torch.float64" in str(LEVELS.refuses(x, scale.double(), *rest, None))
    assert "torch.bfloat16" in str(LEVELS.refuses(x, scale.bfloat16(), *rest, None))
    assert "torch.float64" in str(LEVELS.refuses(x, scale, scale.double(), qmin, qmax, None))
    assert "meta" in str(LEVELS.refuses(x.to("meta"), scale, *rest, None))
    assert "plain memory" in str(LEVELS.refuses(x.to_sparse(), scale, *rest, None))
    assert "plain memory" in str(LEVELS.refuses(torch.complex(x, x).conj().imag, scale, *rest, None))
    assert "not torch.uint8 of" in str(LEVELS.refuses(x, scale, *rest, torch.ones(x.shape, dtype=torch.uint8)))
    assert "not torch.bool of (6,)" in str(LEVELS.refuses(x, scale, *rest, torch.ones(6, dtype=torch.bool)))
    assert "that of the scales" in str(LEVELS.refuses(x, scale, torch.zeros(1), qmin, qmax, None))
    assert "not a multiple of 4" in str(LEVELS.refuses(x, torch.ones(4, 1, 1, 1), *rest, None))
    assert "(2,) is not that" in str(GRADIENTS.refuses(torch.ones(2), x, scale, *rest, None, True))
    assert "torch.float64" in str(GRADIENTS.refuses(x.double(), x, scale, *rest, None, True))
    seen = []
    torch.vmap(lambda row: seen.append(LEVELS.refuses(row, torch.ones(1), *rest, None)) or row)(x)
    assert "torch.func" in str(seen[0])


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators with these kernels, whatever is installed."""
    for name, kernels in (("FAKE_QUANTIZE", fake.fake_quantize), ("FAKE_QUANTIZE_GRAD", fake.fake_quantize_grad)):
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, Operator(operator.name, operator.reference.run, kernels))


@pytest.mark.usefixtures("operators")
def test_training_by_way_of_the_operator_is_that_of_its_meaning() -> None:
    """Through autograd, in both directions, as a grid calls it."""
    x, scale, *_ = FORMS[4].arguments()
    found = []
    for name in ("cpu-fused", "reference"):
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        with only(name):
            y = ops.fake_quantize(*leaves, qmin=-8, qmax=7)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(found[0][:2], found[1][:2], **EXACT)
    # Sums of 324 terms: levels below 9 twice times a residual below 8, in another order.
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=324 * 2 * 9 * 8 * 4 * HALF_ULP)


@pytest.mark.usefixtures("operators")
def test_second_derivatives_and_transformations_leave_the_kernel_out() -> None:
    """One needs operations that autograd knows, the others hold tensors without memory."""
    x, scale = torch.tensor([[0.3, 9.0], [-0.7, 1.2]], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    y = ops.fake_quantize(x, scale, qmin=-4, qmax=3)
    (by_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(by_x.sum(), x)
    torch.testing.assert_close(second, torch.tensor([[2.0, 0.0], [2.0, 2.0]]), **EXACT)

    def loss(row: Tensor) -> Tensor:
        return ops.fake_quantize(row, scale.detach(), qmin=-4, qmax=3).square().sum()

    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x.detach()), by_x.detach(), **EXACT)
    torch.testing.assert_close(torch.vmap(loss)(x.detach()), y.detach().square().sum(1), **EXACT)
