"""What the grids refuse, how they are built over a range, and their values against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from q_core import (
    CodebookGrid,
    Grid,
    NearestEven,
    NearestTowardZero,
    QuantSpec,
    RangeError,
    ShapeError,
    SpecError,
    UniformGrid,
)

EXACT = {"rtol": 0, "atol": 0}
NEAREST = NearestEven()
seeds = st.integers(0, 2**31)


def _randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=seeds, bits=st.integers(1, 8), affine=st.booleans())
def test_a_uniform_grid_has_the_levels_of_the_loop(oracles, seed, bits, affine):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = _randn(seed, 3, 1).abs() + 0.01
    zero = torch.tensor([[float(qmin)], [0.0], [float(qmax)]], dtype=torch.float64) if affine else None
    levels = UniformGrid(scale, zero, qmin=qmin, qmax=qmax).levels()
    assert levels.shape == (3, 1, 2**bits)
    for row in range(3):
        zero_point = float(zero[row]) if affine else 0.0
        expected = [oracles.dequantize(code, float(scale[row]), zero_point) for code in range(qmin, qmax + 1)]
        torch.testing.assert_close(levels[row, 0], torch.tensor(expected, dtype=torch.float64), **EXACT)


@given(seed=seeds, count=st.integers(2, 20))
def test_a_codebook_takes_the_nearest_level_of_the_loop(oracles, seed, count):
    levels = _randn(seed, 2, 1, count).sort().values
    x = _randn(seed + 1, 2, 31) * 2
    grid = CodebookGrid(levels, qmin=-3)
    codes, reals = grid.quantize(x, NEAREST), grid.fake_quantize(x, NEAREST)
    for row, column in oracles.indices((2, 31)):
        nearest = oracles.nearest_level(float(x[row, column]), levels[row, 0].tolist())
        assert int(codes[row, column]) == nearest - 3
        torch.testing.assert_close(reals[row, column], levels[row, 0, nearest], **EXACT)


def test_the_tie_of_a_codebook_is_counted_from_the_level_next_to_zero():
    """Levels 1, 2, 3: the one next to zero is 1, coordinate 0; 1.5 and 2.5 are ties at 1/2 and 3/2."""
    grid, x = CodebookGrid(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([1.5, 2.5])
    torch.testing.assert_close(grid.fake_quantize(x, NEAREST), torch.tensor([1.0, 3.0]), **EXACT)
    torch.testing.assert_close(grid.fake_quantize(x, NearestTowardZero()), torch.tensor([1.0, 2.0]), **EXACT)


def test_a_real_zero_without_a_level_goes_to_the_level_next_to_it():
    grid = CodebookGrid(torch.tensor([[-2.0, -1.0, 3.0]]))
    torch.testing.assert_close(grid.fake_quantize(torch.zeros(1), NEAREST), torch.tensor([-1.0]), **EXACT)


def test_infinity_goes_to_the_last_level():
    for grid in (CodebookGrid(torch.tensor([[-2.0, 0.5, 3.0]])), UniformGrid(torch.ones(1), qmin=-2, qmax=3)):
        result = grid.fake_quantize(torch.tensor([torch.inf, -torch.inf]), NEAREST)
        torch.testing.assert_close(result, torch.tensor([3.0, -2.0]), **EXACT)


def test_a_code_beyond_a_codebook_reads_its_last_level():
    grid = CodebookGrid(torch.tensor([[-2.0, 0.5, 3.0]]), qmin=-1)
    torch.testing.assert_close(grid.dequantize(torch.tensor([-9.0, 9.0])), torch.tensor([-2.0, 3.0]), **EXACT)


RANGES = [
    # spec, low, high, scale, zero point
    (QuantSpec.signed(4), -8.0, 3.0, 1.0, None),
    (QuantSpec.signed(4), -1.0, 14.0, 2.0, None),
    (QuantSpec.signed(4, narrow=True), -7.0, 3.0, 1.0, None),
    (QuantSpec.unsigned(4), 0.0, 15.0, 1.0, 0.0),
    (QuantSpec.unsigned(4), 5.0, 15.0, 1.0, 0.0),
    (QuantSpec.unsigned(4), -15.0, -5.0, 1.0, 15.0),
    (QuantSpec.unsigned(4), -5.0, 10.0, 1.0, 5.0),
    (QuantSpec.signed(4, symmetric=False), -5.0, 10.0, 1.0, -3.0),
    (QuantSpec.unsigned(2, symmetric=True), -1.0, 6.0, 2.0, None),
    (QuantSpec.unsigned(1), 0.0, 3.0, 3.0, 0.0),
    (QuantSpec.unsigned(1), -3.0, 0.0, 3.0, 1.0),
    (QuantSpec.signed(1), -3.0, 0.0, 3.0, None),
    (QuantSpec.signed(1), -3.0, 9.0, 3.0, None),
    (QuantSpec.signed(1, symmetric=False), 0.0, 3.0, 3.0, -1.0),
    (QuantSpec.signed(4), 0.0, 0.0, 1.0, None),
    (QuantSpec.unsigned(4), 0.0, 0.0, 1.0, 0.0),
    (QuantSpec.unsigned(4), -0.0, 1e-44, 1.0, 0.0),
]


@pytest.mark.parametrize(("spec", "low", "high", "scale", "zero_point"), RANGES)
def test_a_grid_just_covers_a_range(spec, low, high, scale, zero_point):
    grid = UniformGrid.from_range(spec, torch.tensor([low]), torch.tensor([high]))
    torch.testing.assert_close(grid.scale, torch.tensor([scale]), **EXACT)
    if zero_point is None:
        assert grid.zero_point is None
    else:
        torch.testing.assert_close(grid.zero_point, torch.tensor([zero_point]), **EXACT)
    # Real zero is a level, so padding and dead channels are exact.
    torch.testing.assert_close(grid.fake_quantize(torch.zeros(1), NEAREST), torch.zeros(1), **EXACT)


@pytest.mark.parametrize(
    ("spec", "low", "high", "message"),
    [
        (QuantSpec.signed(4), -1.0, torch.inf, "range -1.0 to inf is not finite"),
        (QuantSpec.signed(4), torch.nan, 1.0, "is not finite"),
        (QuantSpec.signed(4), 2.0, 1.0, "range with low 2.0 above high 1.0"),
        (QuantSpec.unsigned(4, symmetric=True), -2.0, -1.0, "is negative, but codes 0 to 15 .* use QuantSpec.signed"),
        (QuantSpec.unsigned(4, symmetric=True), -2.0, 0.0, "is negative"),
        (QuantSpec.signed(1), 1.0, 2.0, "range 1.0 to 2.0 is positive, but codes -1 to 0 .* use 2 bits"),
        (QuantSpec.signed(1), 0.0, 2.0, "is positive"),
    ],
)
def test_a_range_that_no_grid_covers_is_refused(spec, low, high, message):
    with pytest.raises(RangeError, match=message):
        UniformGrid.from_range(spec, torch.tensor([low]), torch.tensor([high]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [QuantSpec.signed(8), QuantSpec.unsigned(8)])
def test_a_range_in_half_precision_gives_the_scale_of_float32(dtype, spec):
    low, high = torch.tensor([-1.25], dtype=dtype), torch.tensor([3.5], dtype=dtype)
    narrow, wide = UniformGrid.from_range(spec, low, high), UniformGrid.from_range(spec, low.float(), high.float())
    torch.testing.assert_close(narrow.state_dict(), wide.state_dict(), **EXACT)


def test_a_learnable_grid_is_built_over_a_range_too():
    grid = UniformGrid.from_range(
        QuantSpec.signed(4), torch.tensor([-8.0]), torch.tensor([7.0]), learnable=True, gradient_scale=0.25
    )
    assert isinstance(grid.scale, nn.Parameter)
    grid.fake_quantize(torch.tensor([100.0]), NEAREST).sum().backward()
    torch.testing.assert_close(grid.scale.grad, torch.tensor([7 * 0.25]), **EXACT)


@pytest.mark.parametrize(
    ("scale", "zero_point", "codes", "error", "message"),
    [
        ([0.1], None, (3, 3), SpecError, "codes 3 to 3: qmin must be below qmax"),
        ([0.1], None, (3, 0), SpecError, "codes 3 to 0"),
        (0.1, None, (0, 3), ShapeError, r"scale of shape \(\): give it at least one axis, \(1,\) for one scale"),
        ([0.1, 0.0], None, (0, 3), RangeError, "scale has 1 of 2 values that are not positive .* first is 0.0"),
        ([-1.0], None, (0, 3), RangeError, "the first is -1.0"),
        ([torch.nan], None, (0, 3), RangeError, "the first is nan"),
        ([torch.inf], None, (0, 3), RangeError, "the first is inf"),
        ([0.1], [0.0, 1.0], (0, 3), ShapeError, r"zero_point of shape \(2,\) with a scale of shape \(1,\)"),
        ([0.1], [0.5], (0, 3), RangeError, "zero_point 0.5: it must be an integer from 0 to 3"),
        ([0.1], [4.0], (0, 3), RangeError, "zero_point 4.0"),
        ([0.1], [-1.0], (0, 3), RangeError, "zero_point -1.0"),
        ([0.1], [torch.nan], (0, 3), RangeError, "zero_point nan"),
    ],
)
def test_a_uniform_grid_refuses_what_is_no_grid(scale, zero_point, codes, error, message):
    zero_point = None if zero_point is None else torch.tensor(zero_point)
    with pytest.raises(error, match=message):
        UniformGrid(torch.tensor(scale), zero_point, qmin=codes[0], qmax=codes[1])


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        ([0.0, 1.0], ShapeError, r"codebook of shape \(2,\): it needs the axes of the tiles .* \(1, 2\) for one table"),
        ([[1.0]], SpecError, "a grid has at least 2 levels"),
        ([[0.0, 0.0]], RangeError, "not finite and strictly increasing along its last axis: sort it"),
        ([[1.0, 0.0]], RangeError, "not finite and strictly increasing"),
        ([[0.0, torch.inf]], RangeError, "not finite"),
        ([[0.0, torch.nan]], RangeError, "not finite"),
        ([[0.0, 1.0], [1.0, 0.0]], RangeError, "strictly increasing"),
    ],
)
def test_a_codebook_refuses_what_is_no_grid(codebook, error, message):
    with pytest.raises(error, match=message):
        CodebookGrid(torch.tensor(codebook))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_widened_to_float32_or_better(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    grid = UniformGrid(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype), qmin=0, qmax=3)
    assert grid.scale.dtype == grid.zero_point.dtype == wide
    assert CodebookGrid(torch.tensor([[0.0, 1.0]], dtype=dtype)).codebook.dtype == wide


@pytest.mark.parametrize("learnable", [True, False])
def test_a_grid_owns_its_tensors(learnable):
    """Training one grid must not move another that was made from the same tensor."""
    scale, table = torch.ones(1), torch.tensor([[0.0, 1.0]])
    grids = [UniformGrid(scale, qmin=0, qmax=3, learnable=learnable), CodebookGrid(table)]
    grids += [grid.frozen() for grid in grids]
    before = [grid.levels().clone() for grid in grids]
    with torch.no_grad():
        scale.fill_(5)
        table.fill_(5)
        grids[0].scale.mul_(3)
    torch.testing.assert_close([grid.levels() for grid in grids[1:]], before[1:], **EXACT)
    torch.testing.assert_close(grids[0].levels(), before[0] * 3, **EXACT)


def test_grids_are_built_without_data_on_the_meta_device():
    """A skeleton to load a state into has no values to check."""
    scale = torch.empty(3, 1, device="meta")
    assert UniformGrid(scale, scale, qmin=0, qmax=3).scale.is_meta
    assert CodebookGrid(torch.empty(1, 4, device="meta")).codebook.is_meta


class Doubling(Grid):
    """The two methods that a grid must have, and no more."""

    qmin, qmax = 0, 4

    def quantize(self, x, rounding):
        u = CodebookGrid(self.levels()).quantize(x, rounding)
        return u

    def dequantize(self, codes):
        return torch.exp2(codes) - 1


def test_a_grid_of_ones_own_gets_its_table_and_its_frozen_form():
    grid = Doubling()
    torch.testing.assert_close(grid.levels(), torch.tensor([[0.0, 1.0, 3.0, 7.0, 15.0]]), **EXACT)
    frozen = grid.frozen()
    assert isinstance(frozen, CodebookGrid)
    assert (frozen.qmin, frozen.qmax) == (0, 4)
    x = torch.rand(63) * 20
    torch.testing.assert_close(frozen.fake_quantize(x, NEAREST), grid.fake_quantize(x, NEAREST), **EXACT)


@pytest.mark.parametrize(("qmin", "qmax", "bits"), [(0, 1, 1), (-1, 1, 2), (0, 3, 2), (0, 4, 3), (-128, 127, 8)])
def test_bits_number_the_codes(qmin, qmax, bits):
    assert UniformGrid(torch.ones(1), qmin=qmin, qmax=qmax).bits == bits
    assert CodebookGrid(torch.arange(float(qmax - qmin + 1)).reshape(1, -1), qmin=qmin).bits == bits


def test_a_frozen_grid_does_not_learn_and_keeps_its_zero_point():
    grid = UniformGrid(torch.full((3, 1), 0.1), torch.full((3, 1), 2.0), qmin=0, qmax=3, learnable=True)
    frozen = grid.frozen()
    assert not list(frozen.parameters())
    torch.testing.assert_close(frozen.state_dict(), {k: v.detach() for k, v in grid.state_dict().items()}, **EXACT)


def test_a_grid_shows_its_codes_and_granularity():
    grid = UniformGrid(torch.ones(3, 1), torch.ones(3, 1), qmin=0, qmax=3)
    assert repr(grid) == "UniformGrid(codes 0 to 3, scale (3, 1), zero_point)"
    assert repr(CodebookGrid(torch.tensor([[0.0, 1.0]]), qmin=-1)) == "CodebookGrid(codes -1 to 0, codebook (1, 2))"


def test_a_tensor_that_the_grid_does_not_tile_is_refused():
    for grid in (UniformGrid(torch.ones(3, 1), qmin=0, qmax=3), CodebookGrid(torch.arange(6.0).reshape(3, 1, 2))):
        with pytest.raises(ShapeError, match=r"scale of shape \(3, 1\) does not tile a tensor of shape \(4, 5\)"):
            grid.fake_quantize(torch.ones(4, 5), NEAREST)


@pytest.mark.parametrize("value", [-0.5, 0.0, torch.nan, torch.inf])
def test_a_state_with_a_scale_that_is_none_is_refused_by_name(value: float) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), UniformGrid(torch.ones(2, 1), qmin=-2, qmax=1, learnable=True))
    state = {"1.scale": torch.tensor([[1.0], [value]])}
    with pytest.raises(RangeError, match=r"^1\.scale of the state has 1 of 2 values that are not positive and finite"):
        model.load_state_dict(state)
    torch.testing.assert_close(model[1].scale.detach(), torch.ones(2, 1), **EXACT)
    model.load_state_dict({"1.scale": torch.full((2, 1), 0.5)})
    torch.testing.assert_close(model[1].scale.detach(), torch.full((2, 1), 0.5), **EXACT)


@pytest.mark.parametrize("table", [[0.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0.0, torch.nan, 1.0]])
def test_a_state_with_levels_out_of_order_is_refused_by_name(table: list[float]) -> None:
    model = torch.nn.Sequential(CodebookGrid(torch.tensor([[0.0, 1.0, 2.0]])))
    with pytest.raises(RangeError, match=r"^0\.codebook of the state, of shape \(1, 3\) is not finite and strictly"):
        model.load_state_dict({"0.codebook": torch.tensor([table])})
    torch.testing.assert_close(model[0].codebook, torch.tensor([[0.0, 1.0, 2.0]]), **EXACT)
