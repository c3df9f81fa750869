"""Fake quantization to any levels on a CPU, against its meaning in plain torch."""

import concurrent.futures
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_core import functional, ops
from q_core.kernels import Operator, only
from q_kernels.cpu import levels, memory

from .tiles import spread, tiled

LEVELS, GRADIENTS = levels.fake_quantize_levels[0], levels.fake_quantize_levels_grad[0]
VALUES, SLOPES = ops.FAKE_QUANTIZE_LEVELS.reference.run, ops.FAKE_QUANTIZE_LEVELS_GRAD.reference.run
HALF_ULP = 2.0**-24  # of float32, relative
EXACT = {"rtol": 0, "atol": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor and the tables that tile it."""

    shape: tuple[int, ...]
    tiles: tuple[int, ...]
    count: int = 4
    seed: int = 0

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 2)
        widths = (torch.rand(*self.tiles, self.count - 1, generator=generator) + 0.1) * 8 / self.count
        return tables(torch.cat([torch.zeros(*self.tiles, 1), widths.cumsum(-1)], -1) - 2.5)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)) * 2
        return x, *self.tables()

    def incoming(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed + 1))


def tables(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return table, table.diff(), functional.middles(table)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tables over any axes; short runs, long runs and rows of tables; few levels and many."""
    tiles = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shape = [count * draw(st.sampled_from([1, 2, 3, 5, 17])) for count in tiles]
    if draw(st.booleans()):
        tiles = [1] * draw(st.integers(1, 3))
    return Case(tuple(shape), tuple(tiles), draw(st.sampled_from(COUNTS)), draw(st.integers(0, 99)))


COUNTS = [2, 3, 4, 5, 8, 16, 64, 65, 130]

FORMS = [
    Case((7,), (1,)),
    Case((3, 40_001), (1, 1)),  # several blocks, the last one short
    Case((6, 5, 3, 3), (6, 1, 1, 1)),
    Case((6, 3, 3, 9, 9), (6, 1, 1, 1, 1)),
    Case((4, 6, 9, 9), (1, 6, 1, 1)),
    Case((3, 40_000), (3, 1)),
    Case((40, 96), (40, 3)),  # groups
    Case((8, 96), (4, 3)),  # blocks on two axes
    Case((1000, 24), (1, 24)),  # rows of tables, folded
    Case((999, 13), (1, 13)),
    Case((700, 300), (1, 300)),  # several parts of a row, and several blocks of rows
    Case((5, 4, 6), (1, 4, 3)),
    Case((5, 4, 6), (5, 1, 3)),
]


def check(case: Case, arguments: tuple[Tensor, Tensor, Tensor, Tensor], grad: Tensor) -> None:
    x, table, widths, thresholds = arguments
    assert LEVELS.refuses(x, table, thresholds) is None
    y, expected = LEVELS.run(x, table, thresholds), VALUES(x, table, thresholds)
    torch.testing.assert_close(y, expected, **EXACT)
    assert torch.equal(y.signbit(), expected.signbit())
    assert GRADIENTS.refuses(grad, *arguments, True) is None
    by_x, by_levels, by_widths = GRADIENTS.run(grad, *arguments, True)
    torch.testing.assert_close(by_x, SLOPES(grad, *arguments, True)[0], **EXACT)
    # One of the residual, in which nothing cancels, one of the product, one of every sum in a lane of a block, where a
    # lane adds an element in 8 at least of 16384, or all rows of a block; and the last.
    steps = 4 + min(memory.BLOCK, x.numel())
    ends, cells = exact(case, arguments, grad)
    for found, (terms, size) in zip(
        (by_levels[..., 0], by_levels[..., -1], *(by_widths * widths).unbind(-1)), (*ends, *cells), strict=True
    ):
        # Beside them, to divide by the width and to multiply by it again here.
        atol = (steps + 2) * HALF_ULP * float(size.max()) + 1e-30
        torch.testing.assert_close(found.double(), terms, rtol=0, atol=atol)
    torch.testing.assert_close(by_levels[..., 1:-1], torch.zeros_like(by_levels[..., 1:-1]), **EXACT)


Sums = list[tuple[Tensor, Tensor]]


def exact(case: Case, arguments: tuple[Tensor, Tensor, Tensor, Tensor], grad: Tensor) -> tuple[Sums, Sums]:
    """Sums of terms, and of their magnitudes, in float64: of what lies beyond each end, and of every width."""
    x, table, _, thresholds = arguments
    wide, upper = x.double(), grad.double()
    bound = [spread(level, case.shape).double() for level in table.unbind(-1)]
    residual = VALUES(x, table, thresholds).double() - wide
    where = [(wide < bound[0], upper), (wide > bound[-1], upper)]
    where += [
        ((wide > bound[k]) & (wide <= bound[k + 1]), upper * residual)
        for k in range(case.count - 1)  # on a level the residual is 0, so that it does not matter whose it is
    ]
    sums = []
    for mask, terms in where:
        masked = terms.masked_fill(~mask, 0)
        sums.append((tiled(masked, case.tiles), tiled(masked.abs(), case.tiles)))
    return sums[:2], sums[2:]


@given(cases())
def test_levels_agree_bit_for_bit_and_gradients_with_float64(case: Case) -> None:
    check(case, case.arguments(), case.incoming())


@pytest.mark.parametrize("count", [2, 4, 7, 16, 64, 70])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_agrees(form: Case, count: int) -> None:
    case = dataclasses.replace(form, count=count)
    check(case, case.arguments(), case.incoming())


@pytest.mark.parametrize("tiles", [(1,), (1, 40), (40, 1)])
@pytest.mark.parametrize("count", [*range(2, 20), 31, 32, 33, 63, 64, 65, 66, 127, 128, 129])
def test_every_number_of_levels_agrees(count: int, tiles: tuple[int, ...]) -> None:
    case = Case((40, 40), tiles, count)
    check(case, case.arguments(), case.incoming())


@pytest.mark.parametrize("tiles", [(1,), (1, 256), (8, 1)])
@pytest.mark.parametrize("ties", [None, "up", "even"])
@pytest.mark.parametrize("count", [2, 5, 16, 70])
def test_levels_middles_and_their_neighbours_agree(count: int, ties: str | None, tiles: tuple[int, ...]) -> None:
    """Every level and every threshold, and the numbers next to them."""
    table = (torch.arange(count) - 2.0) * 0.25
    up = None if ties is None else torch.ones(count - 1, dtype=torch.bool)
    if ties == "even":
        up = torch.arange(count - 1) % 2 == 0
    thresholds = functional.middles(table, up)
    x = torch.cat([table, thresholds, functional.middles(table), torch.tensor([0.0, -0.0, 1e-45, 1e30, -1e30])])
    x = torch.cat([x, *(torch.nextafter(x, torch.full_like(x, way)) for way in (math.inf, -math.inf))])
    x = x.repeat(1 + 2048 // len(x))[:2048].reshape(8, 256)
    each = [parameter.expand(*tiles, -1) for parameter in (table, table.diff(), thresholds)]
    check(Case((8, 256), tiles, count), (x, *each), torch.ones(8, 256))


def test_neighbouring_numbers_are_told_apart() -> None:
    """Levels as near to one another as float32 has them, where a middle is no number of its own."""
    start = torch.tensor([1.0, 1.0, -1.0]).reshape(3, 1)
    table = start + torch.arange(9) * 2.0**-23
    x = (start + torch.arange(-4, 14) * 2.0**-24).float()
    check(Case((3, 18), (3, 1), 9), (x, *tables(table.reshape(3, 1, 9))), torch.ones(3, 18))


def test_a_width_of_zero_takes_nothing() -> None:
    """Two levels that are one; the meaning divides by zero as well."""
    table = torch.tensor([[-1.0, 0.0, 0.0, 2.0]])
    arguments = (torch.randn(5, 100), *tables(table))
    torch.testing.assert_close(LEVELS.run(*arguments[:2], arguments[3]), VALUES(*arguments[:2], arguments[3]), **EXACT)
    found, expected = (run(torch.ones(5, 100), *arguments, True)[2] for run in (GRADIENTS.run, SLOPES))
    assert found[0, 1].isnan()
    assert expected[0, 1].isnan()
    # Some 500 terms below 1, in another order, divided by widths of 1 and 2.
    torch.testing.assert_close(found, expected, rtol=0, atol=500 * 500 * HALF_ULP, equal_nan=True)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16, 70])
@pytest.mark.parametrize("tiles", [(1,), (1, 40), (40, 1)])
def test_numbers_that_are_none_and_infinite_ones_agree(tiles: tuple[int, ...], count: int) -> None:
    case = Case((40, 40), tiles, count)
    arguments, grad = case.arguments(), case.incoming()
    x = arguments[0]
    x[3, 4], x[7, 30], x[22, 8] = torch.nan, torch.inf, -torch.inf
    grad[5, 5], grad[6, 6], grad[7, 30], grad[22, 8] = torch.inf, torch.nan, torch.inf, torch.nan
    forward = (x, arguments[1], arguments[3])
    torch.testing.assert_close(LEVELS.run(*forward), VALUES(*forward), **EXACT, equal_nan=True)
    found, expected = GRADIENTS.run(grad, *arguments, True), SLOPES(grad, *arguments, True)
    torch.testing.assert_close(found[0], expected[0], **EXACT, equal_nan=True)
    for ours, meaning in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours.isnan(), meaning.isnan())
        assert torch.equal(ours.isinf(), meaning.isinf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS[:6], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, form: Case) -> None:
    x, *rest = form.arguments()
    x, grad = x.to(dtype), form.incoming()
    y = LEVELS.run(x, rest[0], rest[2])
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, VALUES(x, rest[0], rest[2]), **EXACT)
    narrow, wide = (GRADIENTS.run(grad, each, *rest, True) for each in (x, x.float()))
    torch.testing.assert_close(narrow[0], wide[0].to(dtype), **EXACT)
    torch.testing.assert_close(narrow[1:], wide[1:], **EXACT)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "off the boundary of a vector": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape),
    "expanded": lambda t: t[:1, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("count", [4, 70])
@pytest.mark.parametrize("tiles", [(1,), (1, 6, 1, 1), (4, 1, 1, 1), (2, 3, 1, 4), (4, 6, 10, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_tensors_does_not_matter(layout: str, tiles: tuple[int, ...], count: int) -> None:
    case = Case((4, 6, 10, 8), tiles, count)
    x, *rest = case.arguments()
    x, grad = (LAYOUTS[layout](tensor) for tensor in (x, case.incoming()))
    check(case, (x, *rest), grad)
    check(case, (x.contiguous(), *rest), grad)
    apart = [torch.stack([table, table], -1)[..., 0] for table in rest]
    check(case, (x, *apart), grad.contiguous())


def test_results_lie_in_memory_as_the_input_does() -> None:
    x, table, widths, thresholds = Case((4, 6, 10, 8), (1, 6, 1, 1)).arguments()
    x = x.to(memory_format=torch.channels_last)
    by_x = GRADIENTS.run(torch.randn(4, 6, 10, 8), x, table, widths, thresholds, True)[0]
    for result in (LEVELS.run(x, table, thresholds), by_x):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [4, 70])
def test_inputs_are_left_as_they_are(count: int) -> None:
    case = Case((40, 96), (40, 3), count)
    arguments, grad = case.arguments(), case.incoming()
    tensors = [grad, *arguments]
    before = [tensor.clone() for tensor in tensors]
    results = everything(case)
    for result in results:
        result.zero_()  # nor do results share their memory
    torch.testing.assert_close(tensors, before, **EXACT)


@pytest.mark.parametrize(("shape", "tiles"), [((0,), (1,)), ((0, 4), (1, 4)), ((3, 0), (3, 1))])
def test_empty_tensors_work(shape: tuple[int, ...], tiles: tuple[int, ...]) -> None:
    x, table, widths, thresholds = Case(shape, tiles).arguments()
    assert LEVELS.refuses(x, table, thresholds) is None
    assert LEVELS.run(x, table, thresholds).shape == shape
    found = GRADIENTS.run(torch.ones(shape), x, table, widths, thresholds, True)
    assert found[0].shape == shape
    torch.testing.assert_close(found[1:], (torch.zeros_like(table), torch.zeros_like(widths)), **EXACT)


def test_a_number_without_axes_works() -> None:
    x, parameters = torch.tensor(0.75), tables(torch.tensor([[0.0, 0.5, 1.5]]))
    assert LEVELS.refuses(x, parameters[0], parameters[2]) is None
    torch.testing.assert_close(LEVELS.run(x, parameters[0], parameters[2]), torch.tensor(0.5), **EXACT)
    found = GRADIENTS.run(torch.tensor(2.0), x, *parameters, True)
    # Twice the residual of -1/4, over a width of 1.
    expected = (torch.tensor(2.0), torch.zeros(1, 3), torch.tensor([[0.0, -0.5]]))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("form", [FORMS[2], FORMS[8]], ids=str)
def test_levels_that_do_not_learn_have_no_gradient(form: Case) -> None:
    by_x, *others = GRADIENTS.run(form.incoming(), *form.arguments(), False)
    assert others == [None, None]
    torch.testing.assert_close(by_x, GRADIENTS.run(form.incoming(), *form.arguments(), True)[0], **EXACT)


def everything(case: Case) -> list[Tensor]:
    x, table, widths, thresholds = case.arguments()
    return [LEVELS.run(x, table, thresholds), *GRADIENTS.run(case.incoming(), x, table, widths, thresholds, True)]


LARGE = [
    Case((7, 100_003), (1,), 16),
    Case((64, 64, 11, 13), (1, 64, 1, 1), 8),
    Case((9000, 96), (1, 96), 4),
    Case((500, 700), (1, 700), 5),
    Case((9000, 96), (1, 96), 70),
]


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
    several = [dataclasses.replace(FORMS[index % len(FORMS)], seed=index) for index in range(26)]
    alone = [everything(case) for case in several]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(everything, several))
    torch.testing.assert_close(together, alone, **EXACT)


def test_tables_that_make_no_sense_are_read_inside_their_bounds() -> None:
    """Not in order, not finite: the result says nothing, but is that of a table, and nothing else is written."""
    for count in (4, 70):
        x, table, widths, thresholds = Case((40, 40), (40, 1), count).arguments()
        for spoilt in (thresholds.flip(-1), torch.full_like(thresholds, torch.nan), -thresholds / 0):
            y = LEVELS.run(x, table, spoilt)
            assert bool((y.unsqueeze(-1) == table.reshape(40, 1, count)).any(-1).all())
            by_widths = GRADIENTS.run(x, x, table, widths, spoilt, True)[2]
            assert by_widths.shape == widths.shape


def test_kernels_refuse_what_they_cannot_do() -> None:
    x, table, widths, thresholds = FORMS[2].arguments()
    grad = FORMS[2].incoming()
    assert "torch.float64" in str(LEVELS.refuses(x.double(), table, thresholds))
    assert "torch.float64" in str(LEVELS.refuses(x, table.double(), thresholds))
    assert "torch.bfloat16" in str(LEVELS.refuses(x, table, thresholds.bfloat16()))
    assert "meta" in str(LEVELS.refuses(x.to("meta"), table, thresholds))
    assert "plain memory" in str(LEVELS.refuses(x.to_sparse(), table, thresholds))
    assert "plain memory" in str(LEVELS.refuses(x, torch.complex(table, table).conj().imag, thresholds))
    assert "not (6, 1, 1, 1, 4)" in str(LEVELS.refuses(x, table, table))
    assert "not (3,)" in str(LEVELS.refuses(x, table, thresholds[0, 0, 0, 0]))
    assert "not a multiple of 4" in str(LEVELS.refuses(x, torch.ones(4, 1, 1, 1, 4), torch.ones(4, 1, 1, 1, 3)))
    assert "has 1 axes" in str(LEVELS.refuses(x, torch.ones(6, 4), torch.ones(6, 3)))
    assert "2 levels and more" in str(LEVELS.refuses(x, torch.ones(1, 1), torch.ones(1, 0)))
    assert "2 levels and more" in str(LEVELS.refuses(x, torch.ones(()), torch.ones(())))
    assert "not (6, 1, 1, 1, 4)" in str(GRADIENTS.refuses(grad, x, table, table, thresholds, True))
    assert "(2,) is not that" in str(GRADIENTS.refuses(torch.ones(2), x, table, widths, thresholds, True))
    assert "torch.float64" in str(GRADIENTS.refuses(grad.double(), x, table, widths, thresholds, True))
    assert "torch.float64" in str(GRADIENTS.refuses(grad, x, table, widths.double(), thresholds, True))
    seen = []
    torch.vmap(lambda row: seen.append(LEVELS.refuses(row, table[:1, 0, 0, 0], thresholds[:1, 0, 0, 0])) or row)(x)
    assert "torch.func" in str(seen[0])


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators with these kernels, whatever is installed."""
    offered = {
        "FAKE_QUANTIZE_LEVELS": levels.fake_quantize_levels,
        "FAKE_QUANTIZE_LEVELS_GRAD": levels.fake_quantize_levels_grad,
    }
    for name, kernels in offered.items():
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, Operator(operator.name, operator.reference.run, kernels))


@pytest.mark.usefixtures("operators")
def test_training_by_way_of_the_operator_is_that_of_its_meaning() -> None:
    """Through autograd, in both directions, with steps that learn."""
    x, _, steps, _ = FORMS[4].arguments()
    found = []
    for name in ("cpu-fused", "reference"):
        leaves = [x.clone().requires_grad_(), steps.clone().requires_grad_()]
        table = torch.cat([torch.zeros_like(steps[..., :1]), leaves[1].cumsum(-1)], -1)
        with only(name):
            y = ops.fake_quantize_levels(leaves[0], table, leaves[1], functional.middles(table.detach()))
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(found[0][:2], found[1][:2], **EXACT)
    # Sums of 324 terms: levels below 8 twice, times at most half a width, or one, in another order.
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=324 * 324 * 2 * 8 * HALF_ULP)


@pytest.mark.usefixtures("operators")
def test_second_derivatives_and_transformations_leave_the_kernel_out() -> None:
    """One needs operations that autograd knows, the others hold tensors without memory."""
    x = torch.tensor([[0.3, 9.0], [-0.7, 1.2]], requires_grad=True)
    parameters = tables(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]))
    y = ops.fake_quantize_levels(x, *parameters)
    (by_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(by_x.sum(), x)
    torch.testing.assert_close(second, torch.tensor([[2.0, 0.0], [2.0, 2.0]]), **EXACT)

    def loss(row: Tensor) -> Tensor:
        return ops.fake_quantize_levels(row, *parameters).square().sum()

    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x.detach()), by_x.detach(), **EXACT)
    torch.testing.assert_close(torch.vmap(loss)(x.detach()), y.detach().square().sum(1), **EXACT)
