"""Fake quantization on a GPU, uniform and to a few levels, run by Triton's interpreter against its meaning."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from q_core import functional, ops
from q_core.kernels import Operator
from q_kernels.gpu import fake, levels

from .tiles import spread, tiled
from .triton_needed import interpreted

pytest.importorskip("triton")
pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of infinities that are meant
]

UNIFORM, UNIFORM_GRAD = fake.fake_quantize[0].run, fake.fake_quantize_grad[0].run
LEVELS, LEVELS_GRAD = levels.fake_quantize_levels[0].run, levels.fake_quantize_levels_grad[0].run
VALUES, SLOPES = ops.FAKE_QUANTIZE.reference.run, ops.FAKE_QUANTIZE_GRAD.reference.run
TABLE_VALUES, TABLE_SLOPES = ops.FAKE_QUANTIZE_LEVELS.reference.run, ops.FAKE_QUANTIZE_LEVELS_GRAD.reference.run
HALF_ULP = 2.0**-24  # of float32, relative
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor and what tiles it."""

    shape: tuple[int, ...]
    tiles: tuple[int, ...]
    affine: bool = False
    masked: bool = False
    count: int = 4
    seed: int = 0

    def draw(self, more: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + more)

    def x(self) -> Tensor:
        return torch.randn(self.shape, generator=self.draw(0)) * 3

    def incoming(self) -> Tensor:
        return torch.randn(self.shape, generator=self.draw(1))

    def uniform(self) -> tuple[Tensor, Tensor | None, int, int, Tensor | None]:
        generator = self.draw(2)
        qmin, qmax = (0, 15) if self.affine else (-128, 127) if self.masked else (-8, 7)
        scale = torch.rand(self.tiles, generator=generator) + 0.1
        zero = torch.randint(0, 16, self.tiles, generator=generator).float() if self.affine else None
        where = torch.rand(self.shape, generator=generator) < 0.5 if self.masked else None
        return scale, zero, qmin, qmax, where

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        widths = (torch.rand(*self.tiles, self.count - 1, generator=self.draw(3)) + 0.1) * 8 / self.count
        table = torch.cat([torch.zeros(*self.tiles, 1), widths.cumsum(-1)], -1) - 2.5
        return table, table.diff(), functional.middles(table)


FORMS = [
    Case((7,), (1,)),
    Case((1021,), (1,)),  # a prime below a tile
    Case((3, 1361), (1, 1)),  # several tiles, the last one short
    Case((6, 5, 3, 3), (6, 1, 1, 1)),
    Case((4, 6, 9, 9), (1, 6, 1, 1)),
    Case((40, 96), (40, 3)),  # groups
    Case((97, 24), (1, 24)),  # one scale for each column
    Case((31, 13), (1, 13)),
    Case((3, 5, 4, 2), (1, 5, 1, 1)),  # short runs, side by side
    Case((5, 4, 6), (1, 4, 3)),
]


def close(found: Tensor, terms: Tensor, tiles: tuple[int, ...], error: float) -> None:
    """Compare sums with the exact ones; `error` bounds that of a term, for a term of size 1."""
    exact, size = tiled(terms, tiles), tiled(terms.abs(), tiles)
    steps = error / HALF_ULP + 2 + terms.numel() // size.numel()  # one rounding for each addition, at most
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=steps * HALF_ULP * float(size.max()) + 1e-30)


def check_uniform(case: Case, x: Tensor, rest: tuple, grad: Tensor) -> None:
    scale, zero, qmin, qmax, where = rest
    y, expected = UNIFORM(x, *rest), VALUES(x, *rest)
    torch.testing.assert_close(y, expected, **EXACT)
    assert torch.equal(y.signbit(), expected.signbit())
    by_x, by_scale = UNIFORM_GRAD(grad, x, *rest, True)
    torch.testing.assert_close(by_x, SLOPES(grad, x, *rest, True)[0], **EXACT)
    # The coordinates in float32 decide what is inside, so only the terms and their sum are exact here.
    u = (x.float() / spread(scale, case.shape)).double()
    low, high = (end - (0 if zero is None else spread(zero, case.shape).double()) for end in (qmin, qmax))
    outside, nearest = (u < low) | (u > high), u.clamp(low, high).round()
    terms = grad.double() * (nearest - u.masked_fill(outside, 0))
    close(by_scale, terms if where is None else terms.masked_fill(~where, 0), case.tiles, 2 * HALF_ULP)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_uniform_values_agree_bit_for_bit_and_sums_with_float64(form: Case, affine: bool, masked: bool) -> None:
    case = dataclasses.replace(form, affine=affine, masked=masked)
    check_uniform(case, case.x(), case.uniform(), case.incoming())


@pytest.mark.parametrize("tiles", [(1, 1), (1, 32), (64, 1)])
@pytest.mark.parametrize("zero", [None, 0.0, 5.0])
def test_ties_ends_and_signs_of_zero_agree(tiles: tuple[int, ...], zero: float | None) -> None:
    x = ((torch.arange(2048) - 1024) / 32).reshape(64, 32)  # quarters of a code, which are exact
    point = None if zero is None else torch.full(tiles, zero)
    rest = (torch.full(tiles, 0.125), point, -4, 11, None)
    for signed in (x, x * -0.0):
        check_uniform(Case((64, 32), tiles), signed, rest, torch.ones(64, 32))


def test_codes_beyond_the_integers_of_float32_are_not_rounded_away() -> None:
    x = torch.tensor([1.0, -1.0, 0.5, 0.25]) * 2.0**31
    rest = (torch.full((1,), 4.0), None, -(2**30), 2**30 - 1, None)
    torch.testing.assert_close(UNIFORM(x, *rest), VALUES(x, *rest), **EXACT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tiles", [(1, 1), (1, 40), (40, 1)])
def test_numbers_that_are_none_and_infinite_ones_agree(tiles: tuple[int, ...], masked: bool) -> None:
    case = Case((40, 40), tiles, masked=masked)
    x, rest, grad = case.x(), case.uniform(), case.incoming()
    x[3, 4], x[7, 30], x[22, 8] = torch.nan, torch.inf, -torch.inf
    grad[5, 5], grad[6, 6] = torch.inf, torch.nan
    torch.testing.assert_close(UNIFORM(x, *rest), VALUES(x, *rest), **EXACT, equal_nan=True)
    found, expected = UNIFORM_GRAD(grad, x, *rest, True), SLOPES(grad, x, *rest, True)
    torch.testing.assert_close(found[0], expected[0], **EXACT, equal_nan=True)
    assert torch.equal(found[1].isnan(), expected[1].isnan())
    assert torch.equal(found[1].isinf(), expected[1].isinf())


def check_levels(case: Case, x: Tensor, tables: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> None:
    table, widths, thresholds = tables
    y, expected = LEVELS(x, table, thresholds), TABLE_VALUES(x, table, thresholds)
    torch.testing.assert_close(y, expected, **EXACT)
    assert torch.equal(y.signbit(), expected.signbit())
    by_x, by_levels, by_widths = LEVELS_GRAD(grad, x, table, widths, thresholds, True)
    torch.testing.assert_close(by_x, TABLE_SLOPES(grad, x, table, widths, thresholds, True)[0], **EXACT)
    wide, upper = x.double(), grad.double()
    bound = [spread(level, case.shape).double() for level in table.unbind(-1)]
    for place, beyond in ((0, wide < bound[0]), (-1, wide > bound[-1])):
        close(by_levels[..., place], upper.masked_fill(~beyond, 0), case.tiles, 0)
    residual = TABLE_VALUES(x, table, thresholds).double() - wide
    for k, width in enumerate(widths.unbind(-1)):
        span = spread(width, case.shape).double()
        inside = (wide > bound[k]) & (wide <= bound[k + 1])
        terms = (upper * residual / span).masked_fill(~inside, 0)
        # The way from one level to the next, x * slope + offset, has the errors of both products, of sizes |x| / w and
        # |a| / w, the one of the slope in each of them, and those of the sum and of what is subtracted from it. Every
        # element adds it, inside or not, times its gradient.
        size = float((((wide.abs() + bound[k].abs()) / span).clamp(max=1e9) * upper.abs()).sum())
        exact = tiled(terms, case.tiles)
        additions = terms.numel() // exact.numel()
        atol = HALF_ULP * (
            4 * size + 6 * float(upper.abs().sum()) + additions * float(tiled(terms.abs(), case.tiles).max())
        )
        torch.testing.assert_close(by_widths[..., k].double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(by_levels[..., 1:-1], torch.zeros_like(by_levels[..., 1:-1]), **EXACT)


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_among_levels_agree_bit_for_bit_and_sums_with_float64(form: Case, count: int) -> None:
    case = dataclasses.replace(form, count=count)
    check_levels(case, case.x(), case.tables(), case.incoming())


@pytest.mark.parametrize("count", [8, 9])
def test_numbers_on_levels_and_thresholds_agree(count: int) -> None:
    """Both ways to take a level: comparing, and flipping bits."""
    table = (torch.arange(count) - 3.0).reshape(1, count) / 2
    x = torch.cat([(torch.arange(128) - 64) / 16.0, torch.tensor([-0.0])])
    tables = (table, table.diff(), functional.middles(table))
    check_levels(Case((129,), (1,), count=count), x, tables, torch.ones(129))


@pytest.mark.parametrize("count", [2, 4, 16])
def test_a_nan_stays_one_and_reaches_the_last_width_alone(count: int) -> None:
    case = Case((40, 40), (40, 1), count=count)
    x, (table, widths, thresholds), grad = case.x(), case.tables(), case.incoming()
    x[3, 4], x[7, 30], x[22, 8] = torch.nan, torch.inf, -torch.inf
    torch.testing.assert_close(
        LEVELS(x, table, thresholds), TABLE_VALUES(x, table, thresholds), **EXACT, equal_nan=True
    )
    found = LEVELS_GRAD(grad, x, table, widths, thresholds, True)
    expected = TABLE_SLOPES(grad, x, table, widths, thresholds, True)
    torch.testing.assert_close(found[0], expected[0], **EXACT, equal_nan=True)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_an_incoming_nan_reaches_all_widths_of_its_tile() -> None:
    """The one difference from the meaning, where it reaches one width."""
    case = Case((4, 40), (4, 1))
    grad = case.incoming()
    grad[2, 5] = torch.nan
    table, widths, thresholds = case.tables()
    by_widths = LEVELS_GRAD(grad, case.x(), table, widths, thresholds, True)[2]
    assert torch.equal(by_widths.isnan().all(-1), torch.tensor([[False], [False], [True], [False]]))
    assert torch.equal(by_widths.isnan().any(-1), by_widths.isnan().all(-1))


@pytest.mark.parametrize("form", [FORMS[2], FORMS[4], FORMS[6]], ids=str)
def test_half_precision_is_computed_in_float32(form: Case) -> None:
    """float16; the interpreter cuts bfloat16 off where it should round, so of that only reading can be tested."""
    rest, tables, grad = form.uniform(), form.tables(), form.incoming()
    for dtype in (torch.float16, torch.bfloat16):
        x = form.x().to(dtype)
        for found, wide in (
            (UNIFORM(x, *rest), UNIFORM(x.float(), *rest)),
            (LEVELS(x, tables[0], tables[2]), LEVELS(x.float(), tables[0], tables[2])),
        ):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wide, **EXACT)
    x = form.x().half()
    for found, wide in (
        (UNIFORM_GRAD(grad, x, *rest, True), UNIFORM_GRAD(grad, x.float(), *rest, True)),
        (LEVELS_GRAD(grad, x, *tables, True), LEVELS_GRAD(grad, x.float(), *tables, True)),
    ):
        torch.testing.assert_close(found[0], wide[0].half(), **EXACT)
        torch.testing.assert_close(found[1:], wide[1:], **EXACT)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "off the boundary of a vector": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].reshape(t.shape),
    "expanded": lambda t: t[:1, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("tiles", [(1, 1, 1, 1), (1, 6, 1, 1), (4, 1, 1, 1), (4, 6, 10, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_tensors_does_not_matter(layout: str, tiles: tuple[int, ...]) -> None:
    case = Case((4, 6, 10, 8), tiles, affine=True, masked=True)
    scale, zero, qmin, qmax, where = case.uniform()
    x, where, grad = (LAYOUTS[layout](tensor) for tensor in (case.x(), where, case.incoming()))
    check_uniform(case, x, (scale, zero, qmin, qmax, where), grad)
    check_uniform(case, x.contiguous(), (scale, zero, qmin, qmax, where), grad)
    apart = tuple(torch.stack([table, table], -1)[..., 0] for table in case.tables())
    check_levels(case, x, apart, grad.contiguous())


def test_results_lie_in_memory_as_the_input_does() -> None:
    x = torch.randn(4, 6, 10, 8).to(memory_format=torch.channels_last)
    arguments = (x, torch.rand(1, 6, 1, 1) + 0.1, None, -8, 7, None)
    for result in (UNIFORM(*arguments), UNIFORM_GRAD(torch.randn(4, 6, 10, 8), *arguments, True)[0]):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "tiles"), [((0,), (1,)), ((0, 4), (1, 4)), ((3, 0), (3, 1))])
def test_empty_tensors_work(shape: tuple[int, ...], tiles: tuple[int, ...]) -> None:
    case = Case(shape, tiles)
    assert UNIFORM(case.x(), *case.uniform()).shape == shape
    by_x, by_scale = UNIFORM_GRAD(torch.ones(shape), case.x(), *case.uniform(), True)
    assert by_x.shape == shape
    torch.testing.assert_close(by_scale, torch.zeros(tiles), **EXACT)
    table, widths, thresholds = case.tables()
    assert LEVELS(case.x(), table, thresholds).shape == shape
    found = LEVELS_GRAD(torch.ones(shape), case.x(), table, widths, thresholds, True)
    torch.testing.assert_close(found[1:], (torch.zeros_like(table), torch.zeros_like(widths)), **EXACT)


def test_a_number_without_axes_works() -> None:
    arguments = (torch.tensor(0.7), torch.full((1,), 0.5), None, -8, 7, None)
    torch.testing.assert_close(UNIFORM(*arguments), torch.tensor(0.5), **EXACT)
    by_scale = UNIFORM_GRAD(torch.tensor(2.0), *arguments, True)[1]
    torch.testing.assert_close(by_scale, torch.tensor([2.0]) * (1 - torch.tensor([0.7]) / 0.5), **EXACT)


def test_what_does_not_learn_has_no_gradient() -> None:
    case = FORMS[3]
    by_x, by_scale = UNIFORM_GRAD(case.incoming(), case.x(), *case.uniform(), False)
    assert by_scale is None
    torch.testing.assert_close(by_x, SLOPES(case.incoming(), case.x(), *case.uniform(), False)[0], **EXACT)
    by_x, *others = LEVELS_GRAD(case.incoming(), case.x(), *case.tables(), False)
    assert others == [None, None]
    torch.testing.assert_close(by_x, TABLE_SLOPES(case.incoming(), case.x(), *case.tables(), False)[0], **EXACT)


def test_programs_of_several_steps_sum_up_what_one_of_each_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a large tensor has them, which an interpreter would take minutes for: here as if a GPU had 2 programs."""
    monkeypatch.setattr("q_kernels.gpu.views._PROGRAMS", 2)
    for form in (Case((1, 9001), (1, 1)), Case((203, 48), (1, 48)), Case((3, 2500), (3, 1), masked=True)):
        check_uniform(form, form.x(), form.uniform(), form.incoming())
        check_levels(form, form.x(), form.tables(), form.incoming())


def test_training_by_way_of_the_operators_is_that_of_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd; `refuses` would say that these tensors are on no GPU."""
    found = []
    for runs in ((UNIFORM, UNIFORM_GRAD), (VALUES, SLOPES)):
        for name, run in zip(("FAKE_QUANTIZE", "FAKE_QUANTIZE_GRAD"), runs, strict=True):
            monkeypatch.setattr(ops, name, Operator(f"q_test.{name}", run))
        x, scale = FORMS[3].x().requires_grad_(), torch.full((6, 1, 1, 1), 0.25, requires_grad=True)
        y = ops.fake_quantize(x, scale, qmin=-8, qmax=7)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, scale))])
    torch.testing.assert_close(found[0][:2], found[1][:2], **EXACT)
    # Sums of 45 terms, of levels up to 2 twice, times 8 codes at most, in another order.
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=45 * 45 * 2 * 2 * 8 * HALF_ULP)
