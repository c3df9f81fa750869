"""Levels, codes and construction of `StepGrid`: nearest level, symmetries, boundaries, files and dtypes."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import (
    CodebookGrid,
    MinMaxObserver,
    NearestEven,
    NearestTowardZero,
    PerChannel,
    QuantConv2d,
    Quantizer,
    QuantSpec,
    RangeError,
    Recipe,
    Rule,
    ShapeError,
    SpecError,
    Stochastic,
    UniformGrid,
    calibrate,
    pack,
    swap,
)
from q_core.testing import check_grid
from q_nulsq import Exponential, Projection, Softplus, StepGrid

from . import oracles
from .cases import SEEDS, TILINGS, Case, cases
from .test_gradients import middles, ulps_around

EXACT = {"rtol": 0, "atol": 0}
POSITIVITIES = [Projection(), Softplus(), Exponential()]
ROUNDINGS = [NearestEven(), NearestTowardZero()]
DTYPES = [torch.float32, torch.float64]


def small(below=2, above=1, **options):
    sides = [torch.tensor([[0.5, 1.0, 0.25, 2.0][:count]]) for count in (below, above)]
    return StepGrid(*(side if side.shape[-1] else None for side in sides), **options)


# Laws and identities


@pytest.mark.parametrize("positivity", POSITIVITIES)
@settings(max_examples=8)
@given(case=cases(), dtype=st.sampled_from(DTYPES), learnable=st.booleans())
def test_every_grid_of_steps_obeys_the_laws(positivity, case, dtype, learnable):
    # In float32 a step 1e-4 of the others may be lost beside a level that is the sum of 255 of them.
    case = case if dtype == torch.float64 else Case(case.tiling, case.below, case.above, 2.0, case.seed)
    grid = case.grid(dtype, positivity=positivity, learnable=learnable)
    check_grid(grid)
    check_grid(grid.frozen())


@given(case=cases())
def test_the_output_is_the_sum_of_weighted_step_functions(case):
    case = Case(((1,), (37,)), case.below, case.above, case.decades, case.seed)
    grid = case.grid()
    x = case.x(grid)
    below, above = (side[0].tolist() for side in grid.sides())
    expected = torch.tensor([oracles.output(value, below, above) for value in x.tolist()], dtype=torch.float64)
    # A sum of up to 255 steps, in another order.
    atol = 6e-14 * float(grid.levels().abs().max())
    torch.testing.assert_close(grid.fake_quantize(x, NearestTowardZero()).detach(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(case=cases())
def test_the_level_taken_is_the_nearest(rounding, case):
    grid = case.grid()
    x = case.x(grid)
    levels = grid.levels().reshape(*(size if size > 1 else 1 for size in grid.tile_shape), -1)
    if len(grid.tile_shape) != x.ndim or any(t not in (1, s) for t, s in zip(grid.tile_shape, x.shape, strict=True)):
        return  # groups do not broadcast; the laws cover them
    distances = (x.unsqueeze(-1) - levels).abs()
    found = (grid.fake_quantize(x, rounding).detach() - x).abs()
    torch.testing.assert_close(found, distances.amin(-1), **EXACT)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(case=cases())
def test_quantizing_twice_is_quantizing_once_and_codes_are_those_of_the_levels(rounding, case):
    grid = case.grid()
    once = grid.fake_quantize(case.x(grid), rounding).detach()
    torch.testing.assert_close(grid.fake_quantize(once, rounding).detach(), once, **EXACT)
    codes = grid.quantize(once, rounding).detach()
    torch.testing.assert_close(grid.dequantize(codes).detach(), once, **EXACT)


@given(case=cases())
def test_the_mirrored_grid_quantizes_the_mirrored_reals(case):
    """Ties toward zero know no sign: Q(-x; r, s) = -Q(x; s, r)."""
    grid = case.grid()
    below, above = case.steps()
    mirrored = StepGrid(above, below)
    x = torch.cat([case.x(grid).flatten(), middles(grid).flatten()]) if grid.steps.ndim == 2 else case.x(grid)
    found = mirrored.fake_quantize(-x, NearestTowardZero())
    torch.testing.assert_close(found.detach(), -grid.fake_quantize(x, NearestTowardZero()).detach(), **EXACT)


@given(case=cases(), exponent=st.integers(-30, 30))
def test_scaling_reals_and_steps_scales_the_levels(case, exponent):
    """By a power of two, which is exact; the gradient of the steps does not change at all."""
    factor = 2.0**exponent
    below, above = case.steps()
    grid = case.grid()
    scaled = StepGrid(*(None if side is None else side * factor for side in (below, above)))
    x = case.x(grid)
    results = []
    for each, reals in ((grid, x), (scaled, x * factor)):
        out = each.fake_quantize(reals, NearestTowardZero())
        results.append((out.detach(), *torch.autograd.grad(out, each.steps, case.upstream(x))))
    torch.testing.assert_close(results[1][0], results[0][0] * factor, **EXACT)
    torch.testing.assert_close(results[1][1], results[0][1], **EXACT)


@given(case=cases(decades=2.0))
def test_a_grid_per_channel_is_one_grid_for_each_channel(case):
    case = Case(TILINGS[2], case.below, case.above, case.decades, case.seed)
    grid = case.grid(torch.float32)
    x = case.x(grid)
    whole = grid.fake_quantize(x, NearestTowardZero()).detach()
    below, above = grid.sides()
    for channel in range(x.shape[0]):
        sides = [side[channel].reshape(1, -1) if side.shape[-1] else None for side in (below, above)]
        part = StepGrid(*sides).fake_quantize(x[channel], NearestTowardZero()).detach()
        torch.testing.assert_close(part, whole[channel], **EXACT)


# Boundaries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("below", "above"), [(0, 3), (4, 3), (2, 1), (1, 0)])
def test_at_every_knot_and_middle_and_the_floats_beside_them_the_level_is_exactly_the_nearest(below, above, dtype):
    """Fractions decide, which are not rounded. The steps are exact in binary, so a middle is a float."""
    grid = small(below, above).to(dtype)
    levels = [Fraction(level) for level in grid.levels()[0].tolist()]
    knots = torch.tensor([0.0, -0.0, *grid.levels()[0].tolist(), *middles(grid)[0].tolist()], dtype=dtype)
    x = ulps_around(knots, 1)
    expected = [
        min(levels, key=lambda level: (abs(Fraction(value) - level), abs(level))) for value in x.tolist()
    ]  # the second key: a tie goes toward zero
    out = grid.fake_quantize(x, NearestTowardZero()).detach()
    torch.testing.assert_close(out, torch.tensor([float(level) for level in expected], dtype=dtype), **EXACT)


@settings(max_examples=10)
@given(case=cases(decades=2.0), dtype=st.sampled_from(DTYPES))
def test_at_the_floats_around_every_threshold_of_any_grid_the_level_is_exactly_the_nearest(case, dtype):
    """Also where the middle of two levels is between two floats."""
    case = Case(TILINGS[0], min(case.below, 8), min(case.above, 8), case.decades, case.seed)
    grid = case.grid(dtype)
    levels = [Fraction(level) for level in grid.levels()[0].tolist()]
    x = ulps_around(middles(grid)[0], 3)
    expected = [min(levels, key=lambda level: (abs(Fraction(value) - level), abs(level))) for value in x.tolist()]
    out = grid.fake_quantize(x, NearestTowardZero()).detach()
    torch.testing.assert_close(out, torch.tensor([float(level) for level in expected], dtype=dtype), **EXACT)


def test_ties_to_even_go_to_the_even_code():
    grid = StepGrid(torch.full((1, 4), 0.5), torch.full((1, 3), 0.5))
    ties = torch.tensor([-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25])
    codes = grid.quantize(ties, NearestEven()).detach()
    torch.testing.assert_close(codes, torch.tensor([-4.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0]), **EXACT)


@pytest.mark.parametrize("rounding", [*ROUNDINGS, Stochastic()])
def test_infinities_go_to_the_ends_and_nan_stays(rounding):
    grid = small()
    out = grid.fake_quantize(torch.tensor([-torch.inf, torch.inf, torch.nan]), rounding).detach()
    torch.testing.assert_close(out, torch.tensor([-1.5, 0.5, torch.nan]), **EXACT, equal_nan=True)
    codes = grid.quantize(torch.tensor([-torch.inf, torch.inf, torch.nan]), rounding).detach()
    torch.testing.assert_close(codes, torch.tensor([-2.0, 1.0, torch.nan]), **EXACT, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (7, 11, 13)])
def test_one_grid_takes_tensors_of_any_shape(shape):
    x = torch.randn(shape)
    assert small().fake_quantize(x, NearestTowardZero()).shape == shape
    assert small().quantize(x, NearestEven()).shape == shape


def test_a_stochastic_rounding_is_right_on_average():
    grid, x = small(), torch.full((40_000,), 0.125)
    torch.testing.assert_close(grid.fake_quantize(x, Stochastic()).mean().item(), 0.125, rtol=0, atol=5 * 0.22 / 200)


# Deployment


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("positivity", POSITIVITIES)
@given(case=cases(decades=2.0), dtype=st.sampled_from(DTYPES))
def test_the_frozen_grid_takes_the_same_levels_at_every_float_around_a_threshold(positivity, rounding, case, dtype):
    case = Case(TILINGS[0], case.below, case.above, case.decades, case.seed)
    grid = case.grid(dtype, positivity=positivity)
    frozen = grid.frozen()
    assert isinstance(frozen, CodebookGrid)
    x = torch.cat([ulps_around(middles(grid)[0], 8), ulps_around(grid.levels()[0], 2), case.x(grid)])
    for reals in (x, x.to(torch.float64), x.to(torch.bfloat16), x.to(torch.float16)):
        torch.testing.assert_close(
            frozen.fake_quantize(reals, rounding), grid.fake_quantize(reals, rounding).detach(), **EXACT
        )
        torch.testing.assert_close(frozen.quantize(reals, rounding), grid.quantize(reals, rounding).detach(), **EXACT)


def test_a_packed_layer_computes_what_the_trained_one_did():
    layer = QuantConv2d(3, 5, 3)
    for name, shape in (("weight_quantizer", (5, 1, 1, 1)), ("input_quantizer", (1,))):
        grid = StepGrid(torch.rand(*shape, 2) * 0.2 + 0.02, torch.rand(*shape, 1) * 0.2 + 0.02)
        setattr(layer, name, Quantizer(grid, NearestTowardZero()))
    x = torch.randn(2, 3, 7, 5)
    with torch.no_grad():
        torch.testing.assert_close(pack(layer)(x), layer(x), **EXACT)


def test_levels_that_became_one_cannot_be_frozen():
    grid = small(0, 3)
    with torch.no_grad():
        grid.steps[0, 1] = -1.0
    with pytest.raises(RangeError, match=r"levels 0\.5 and 0\.5 of tile \(0,\).*project\(\)"):
        grid.frozen()
    grid.project()
    check_grid(grid.frozen())


# Construction


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_over_a_range_it_is_the_uniform_grid(bits, symmetric):
    negative, positive, zero = -torch.rand(5, 1), torch.rand(5, 1), torch.zeros(5, 1)
    signed = QuantSpec.signed(bits, symmetric=symmetric, granularity=PerChannel())
    unsigned = QuantSpec.unsigned(bits, symmetric=symmetric)
    top = positive if signed.qmax else zero
    for spec, low, high in ((signed, negative, top), (unsigned, zero, positive)):
        grid = StepGrid.from_range(spec, low, high)
        uniform = UniformGrid.from_range(QuantSpec(bits, spec.qmin, spec.qmax, symmetric=True), low, high)
        assert (grid.qmin, grid.qmax, grid.tile_shape) == (spec.qmin, spec.qmax, (5, 1))
        # k steps, added in float64, rounded once: what k times the scale is.
        torch.testing.assert_close(grid.levels(), uniform.levels(), **EXACT)


def test_a_range_of_zero_width_gets_steps_of_one():
    grid = StepGrid.from_range(QuantSpec.signed(2), torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(grid.levels(), torch.tensor([[-2.0, -1.0, 0.0, 1.0]]), **EXACT)


@pytest.mark.parametrize(
    ("spec", "low", "high", "message"),
    [
        (QuantSpec.unsigned(2), -2.0, -1.0, "range -2.0 to -1.0 is negative"),
        (QuantSpec.signed(1), 1.0, 2.0, "range 1.0 to 2.0 is positive"),
        (QuantSpec.signed(2), -torch.inf, 1.0, "not finite"),
        (QuantSpec.signed(2), 1.0, -1.0, "low 1.0 above high -1.0"),
    ],
)
def test_a_range_that_cannot_be_covered_is_refused(spec, low, high, message):
    with pytest.raises(RangeError, match=message):
        StepGrid.from_range(spec, torch.tensor([low]), torch.tensor([high]))


def test_it_is_built_from_levels_and_gives_them_back():
    table = torch.tensor([[-1.5, -0.5, 0.0, 1.0], [-3.0, -1.0, 0.0, 0.25]])
    grid = StepGrid.from_levels(table, qmin=-2)
    torch.testing.assert_close(grid.levels(), table, **EXACT)
    torch.testing.assert_close(grid.sides()[0], torch.tensor([[0.5, 1.0], [1.0, 2.0]]), **EXACT)
    torch.testing.assert_close(grid.sides()[1], torch.tensor([[1.0], [0.25]]), **EXACT)
    torch.testing.assert_close(grid.widths, table.diff(dim=-1), **EXACT)
    only_positive = StepGrid.from_levels(torch.tensor([[0.0, 0.5, 2.0]]), qmin=0)
    torch.testing.assert_close(only_positive.widths, torch.tensor([[0.5, 1.5]]), **EXACT)
    only_negative = StepGrid.from_levels(torch.tensor([[-2.0, -0.5, 0.0]]), qmin=-2)
    torch.testing.assert_close(only_negative.widths, torch.tensor([[1.5, 0.5]]), **EXACT)


@given(case=cases(decades=2.0))
def test_levels_of_any_grid_rebuild_it(case):
    grid = case.grid(torch.float32)
    again = StepGrid.from_levels(grid.levels(), qmin=grid.qmin)
    # A difference of two levels is rounded once, and so is their sum: two roundings of the larger.
    atol = 2 * 1.2e-7 * float(grid.levels().abs().max())
    torch.testing.assert_close(again.levels(), grid.levels(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("table", "qmin", "error", "message"),
    [
        ([[-1.0, 0.0, 1.0]], 0, RangeError, r"level -1\.0 at code 0"),
        ([[0.0, 1.0]], 1, SpecError, "qmin=1 with 2 levels"),
        ([[0.0, 1.0]], -2, SpecError, "qmin=-2 with 2 levels"),
        ([[0.0, 2.0, 1.0]], 0, RangeError, r"not finite and apart .*in ascending order"),
        ([[0.0, 1.0, 1.0]], 0, RangeError, r"not finite and apart .*in ascending order"),
        ([[0.0, 1.0, torch.nan]], 0, RangeError, r"not finite and apart .*in ascending order"),
    ],
)
def test_levels_that_are_no_grid_of_steps_are_refused(table, qmin, error, message):
    with pytest.raises(error, match=message):
        StepGrid.from_levels(torch.tensor(table), qmin=qmin)


@pytest.mark.parametrize(
    ("negative", "positive", "error", "message"),
    [
        (None, None, SpecError, "neither negative nor positive"),
        (None, torch.ones(3), ShapeError, r"steps of shape \(3,\).*\(1, 3\)"),
        (torch.ones(2, 1, 4), torch.ones(3, 1, 3), ShapeError, "all axes but the last"),
        (None, torch.ones(1, 0), SpecError, "1 levels: a grid has 2 to 256"),
        (torch.ones(1, 128), torch.ones(1, 128), SpecError, "257 levels"),
        (None, torch.tensor([[1.0, -0.5]]), RangeError, r"1 of 2 values.*-0\.5 at \(0, 1\)"),
        (None, torch.tensor([[1.0, 0.0]]), RangeError, r"the first is 0\.0"),
        (torch.tensor([[torch.inf]]), None, RangeError, "the first is inf"),
        (torch.tensor([[torch.nan]]), torch.ones(1, 1), RangeError, "the first is nan"),
        (None, torch.tensor([[1.0, 1e-9]]), RangeError, r"levels 1\.0 and 1\.0 of tile \(0,\).*float32"),
    ],
)
def test_steps_that_are_no_grid_are_refused(negative, positive, error, message):
    with pytest.raises(error, match=message):
        StepGrid(negative, positive)


def test_the_grid_owns_its_steps():
    given_steps = torch.ones(1, 3)
    grid = StepGrid(None, given_steps)
    given_steps.zero_()
    torch.testing.assert_close(grid.levels(), torch.tensor([[0.0, 1.0, 2.0, 3.0]]), **EXACT)


def test_observers_build_it_as_any_other_grid():
    recipe = Recipe(QuantSpec.signed(3, granularity=PerChannel()), MinMaxObserver, StepGrid.from_range)
    network, _ = swap(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3)), [Rule(".*", weight=recipe)])
    calibrate(network, [torch.randn(2, 3, 5, 5)], progress=False)
    grid = network[0].weight_quantizer.grid
    assert isinstance(grid, StepGrid)
    assert (grid.tile_shape, grid.qmin, grid.qmax) == ((5, 1, 1, 1), -4, 3)


# State and dtypes


def test_a_deep_copy_learns_apart_and_a_state_dict_carries_the_steps():
    grid = small()
    twin = copy.deepcopy(grid)
    with torch.no_grad():
        twin.steps.mul_(2)
    torch.testing.assert_close(twin.levels(), 2 * grid.levels(), **EXACT)
    assert list(grid.state_dict()) == ["steps"]
    grid.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin.levels(), grid.levels(), **EXACT)
    with pytest.raises(RuntimeError, match="size mismatch for steps"):
        small(1, 1).load_state_dict(grid.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_stay_float32_in_a_narrow_model_and_the_quantizer_gives_the_dtype_back(dtype):
    quantizer = Quantizer(small(), NearestTowardZero())
    x = torch.randn(64).to(dtype)
    expected = quantizer(x.float()).detach()
    quantizer.to(dtype)
    assert quantizer.grid.steps.dtype == torch.float32
    out = quantizer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.detach(), expected.to(dtype), **EXACT)
    out.sum().backward()
    assert quantizer.grid.steps.grad.dtype == torch.float32


def test_autocast_changes_nothing():
    grid, x = small(), torch.randn(64)
    with torch.autocast("cpu", torch.bfloat16):
        out = grid.fake_quantize(x, NearestTowardZero())
    torch.testing.assert_close(out, grid.fake_quantize(x, NearestTowardZero()), **EXACT)


def test_a_grid_that_does_not_learn_has_no_parameter():
    grid = small(learnable=False)
    assert not list(grid.parameters())
    x = torch.randn(9, requires_grad=True)
    grid.fake_quantize(x, NearestTowardZero()).sum().backward()
    assert x.grad is not None


def test_it_can_be_made_without_memory():
    grid = StepGrid(None, torch.ones(1, 3, device="meta"))
    assert grid.steps.is_meta
    assert grid.levels().shape == (1, 4)


def test_no_tensor_of_the_size_of_the_input_but_the_input_is_kept():
    grid, x = small(), torch.randn(1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        grid.fake_quantize(x, NearestTowardZero())
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


@given(seed=SEEDS)
def test_the_second_derivative_by_the_incoming_gradient_is_the_jacobian(seed):
    """The gradient is linear in what comes in, so a product from either side is the same number."""
    torch.manual_seed(seed)
    grid = small(2, 3).double()
    x = torch.randn(31, dtype=torch.float64)
    upstream = torch.randn(31, dtype=torch.float64, requires_grad=True)
    out = grid.fake_quantize(x, NearestTowardZero())
    (to_steps,) = torch.autograd.grad(out, grid.steps, upstream, create_graph=True)
    probe = torch.randn_like(to_steps)
    (back,) = torch.autograd.grad(to_steps, upstream, probe)
    # Sums of 31 products in either order.
    torch.testing.assert_close((back * upstream.detach()).sum(), (probe * to_steps.detach()).sum(), rtol=0, atol=1e-12)
