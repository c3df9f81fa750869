"""Learned thresholds, equally spaced levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import (
    NearestEven,
    NearestTowardZero,
    Quantizer,
    QuantSpec,
    RangeError,
    ShapeError,
    SpecError,
    Stochastic,
    UniformGrid,
)
from q_core.testing import check_grid
from q_nulsq.peers.n2uq import N2uqGrid, N2uqWeightGrid
from q_nulsq.peers.normalization import MeanMagnitude
from q_nulsq.positivity import Exponential, Softplus

from .derivatives import gradients

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)
BY_DESIGN = ["levels", "idempotence", "nearest", "gradient"]


def grids(seed, bits, tiles=(1,), dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    draws = {"generator": generator, "dtype": torch.float64}
    steps = (torch.rand((*tiles, 2**bits - 1), **draws) + 0.1).to(dtype)
    start = (0.3 * torch.randn(tiles, **draws)).to(dtype)
    before, after = ((torch.rand(tiles, **draws) + 0.5).to(dtype) for _ in range(2))
    return N2uqGrid(steps, start, input_scale=before, output_scale=after, **options)


def element(x, start, steps, before, after):
    """Return the level, and the derivatives by x, start, each step and both scales, from the formulas."""
    count, u = len(steps), x * before
    interval = 2 / count
    knots = [start + sum(steps[:i]) for i in range(count + 1)]
    code = sum(u > knots[i] + steps[i] / 2 for i in range(count))
    by_steps = [0.0] * count
    slope = 0.0
    if knots[0] <= u <= knots[-1]:
        piece = min(sum(u >= knot for knot in knots) - 1, count - 1)
        slope = 1 / steps[piece]
        by_steps[piece] = -(u - knots[piece]) * slope**2
        for j in range(piece):
            by_steps[j] = -slope
    out = after * interval
    level = code * out
    return level, slope * before * out, -slope * out, [d * out for d in by_steps], slope * x * out, code * interval


@settings(max_examples=40)
@given(seed=seeds, bits=st.integers(1, 4))
def test_values_and_gradients_are_the_generalised_estimator(seed, bits):
    grid = grids(seed, bits, (2, 1))
    generator = torch.Generator().manual_seed(seed + 1)
    x = 1.5 * (2**bits) * (torch.rand(2, 19, generator=generator, dtype=torch.float64) - 0.25)
    upstream = torch.randn(2, 19, generator=generator, dtype=torch.float64)
    expected = {name: torch.zeros_like(parameter) for name, parameter in grid.named_parameters()}
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    for row in range(2):
        parts = [grid.start, grid.input_scale, grid.output_scale]
        start, before, after = (float(part.detach()[row]) for part in parts)
        for column in range(19):
            up = float(upstream[row, column])
            level, by_x, by_start, by_steps, by_before, by_after = element(
                float(x[row, column]), start, grid.steps[row, 0].tolist(), before, after
            )
            y[row, column], dx[row, column] = level, by_x * up
            expected["start"].data[row] += by_start * up
            expected["steps"].data[row, 0] += torch.tensor(by_steps, dtype=torch.float64) * up
            expected["input_scale"].data[row] += by_before * up
            expected["output_scale"].data[row] += by_after * up
    found = gradients(grid, x, upstream, NearestTowardZero())
    # Steps are 0.1 at least, so slopes 10 and their squares 100 at most, times x up to 18 and sums of 19 terms.
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(found["x"], dx, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["levels"], y, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tiles", [(1,), (3, 1)])
def test_the_laws_hold_but_for_those_that_say_where_a_level_lies(bits, tiles):
    check_grid(grids(bits, bits, tiles, torch.float32), waive=BY_DESIGN)


@pytest.mark.parametrize("positivity", [Softplus(), Exponential()])
def test_the_laws_hold_for_other_ways_to_be_positive(positivity):
    check_grid(grids(0, 3, dtype=torch.float32, positivity=positivity), waive=BY_DESIGN)


@pytest.mark.parametrize("law", BY_DESIGN)
def test_what_is_waived_is_broken(law):
    grid = N2uqGrid(torch.tensor([[0.1, 0.1, 3.0]]))
    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        check_grid(grid, waive=[other for other in BY_DESIGN if other != law])


def test_a_real_on_a_threshold_goes_down_as_published():
    # Whole numbers of 1/8: thresholds at 1/4, 1 and 2.
    grid = N2uqGrid(torch.tensor([[0.5, 1.0, 1.0]]))
    torch.testing.assert_close(grid.thresholds(), torch.tensor([[0.25, 1.0, 2.0]]), **exact)
    up = torch.nextafter(grid.thresholds()[0], torch.tensor(torch.inf))
    codes = grid.quantize(torch.cat([grid.thresholds()[0], up]), NearestTowardZero()).detach()
    torch.testing.assert_close(codes, torch.tensor([0.0, 1, 2, 1, 2, 3]), **exact)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_with_equal_steps_it_is_a_uniform_grid(bits):
    qmax = 2**bits - 1
    x = torch.linspace(-0.5, 1.5 * qmax / 8, 997, dtype=torch.float64)
    upstream = (torch.arange(997).remainder(5) - 2).double()
    high = torch.tensor([qmax / 8], dtype=torch.float64)
    grid = N2uqGrid.from_range(QuantSpec.unsigned(bits), torch.zeros(1), high)
    uniform = UniformGrid(torch.tensor([1 / 8]).double(), qmin=0, qmax=qmax, learnable=True)
    found, expected = gradients(grid, x, upstream), gradients(uniform, x, upstream)
    # Scales of 2/high and high/2 and steps of 2/qmax: a few roundings of numbers of size 1, and knots are sums of 255.
    torch.testing.assert_close(found["levels"], expected["levels"], rtol=1e-13, atol=0)
    torch.testing.assert_close(found["x"], expected["x"], rtol=1e-13, atol=0)


def test_the_generalised_estimator_is_steeper_where_steps_are_small():
    grid = N2uqGrid(torch.tensor([[0.25, 1.0, 2.0]]))
    x = torch.tensor([-0.1, 0.1, 0.5, 2.0, 3.3])
    found = gradients(grid, x, torch.ones(5))["x"]
    # The interval of 2/3 over the step, one quotient and one product.
    torch.testing.assert_close(found, torch.tensor([0.0, 8 / 3, 2 / 3, 1 / 3, 0.0]), rtol=2e-7, atol=0)


def test_a_gradient_step_moves_thresholds_and_lowers_the_error():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).abs()
    grid = N2uqGrid.from_range(QuantSpec.unsigned(2), torch.zeros(1), x.max().reshape(1))
    optimizer = torch.optim.SGD(grid.parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        error = (grid.fake_quantize(x, NearestTowardZero()) - x).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        grid.project()
    assert errors[-1] < 0.95 * errors[0]
    assert float(grid.steps.detach().std()) > 0.01


def test_infinities_are_clipped_and_leave_finite_gradients():
    x = torch.tensor([-torch.inf, 0.2, torch.inf])
    found = gradients(grids(0, 2, dtype=torch.float32), x, torch.ones(3))
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    torch.testing.assert_close(found["x"][[0, 2]], torch.zeros(2), **exact)


def test_frozen_it_is_the_same_grid_without_parameters():
    grid = grids(0, 3, (2, 1), torch.float32)
    frozen, x = grid.frozen(), torch.randn(2, 1000) * 3
    assert not list(frozen.parameters())
    assert sorted(frozen.state_dict()) == sorted(grid.state_dict())
    for rounding in (NearestEven(), NearestTowardZero()):
        found = [each.fake_quantize(x, rounding).detach() for each in (grid, frozen)]
        torch.testing.assert_close(*found, **exact)


def test_another_rounding_takes_a_neighbouring_code_and_has_the_same_slope():
    grid, x = grids(0, 3), torch.linspace(-1, 6, 71, dtype=torch.float64)
    nearest, other = (gradients(grid, x, torch.ones_like(x), rounding) for rounding in (NearestEven(), Stochastic()))
    torch.testing.assert_close(other["x"], nearest["x"], **exact)
    codes = [grid.quantize(x, rounding).detach() for rounding in (NearestEven(), Stochastic())]
    assert float((codes[0] - codes[1]).abs().max()) == 1


def test_steps_and_scales_that_were_pushed_below_zero_come_back():
    grid = N2uqGrid(torch.tensor([[0.5, 1.0, 1.5]]))
    with torch.no_grad():
        grid.steps[0, 0] = -0.5
        grid.input_scale.fill_(-2.0)
    grid.project()
    # 1e-3 of the mean magnitude, 3 / 3.
    torch.testing.assert_close(grid.steps.detach(), torch.tensor([[0.001, 1.0, 1.5]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(grid.input_scale.detach(), torch.tensor([0.002]), rtol=1e-6, atol=0)


def test_the_gradient_scale_multiplies_all():
    x = torch.tensor([-3.0, 0.3, 1.1, 9.0])
    plain, scaled = (
        gradients(grids(0, 2, dtype=torch.float32, gradient_scale=factor), x, torch.ones(4)) for factor in (1.0, 0.25)
    )
    for name in ("steps", "start", "input_scale", "output_scale"):
        torch.testing.assert_close(scaled[name], plain[name] / 4, **exact)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_weight_grid_has_no_zero_and_reaches_one(bits):
    grid = N2uqWeightGrid(bits, (1, 1))
    check_grid(grid, waive=["gradient"])
    count = 2**bits - 1
    # 2k / (2^b - 1) - 1 in float32.
    expected = torch.tensor([[[2 * k / count - 1 for k in range(count + 1)]]])
    torch.testing.assert_close(grid.levels(), expected, rtol=0, atol=1.2e-7)


def test_the_weights_are_the_papers():
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = QuantSpec.signed(3)
    grid = N2uqWeightGrid.from_range(spec, torch.tensor([[[[-3.0]]]]), torch.tensor([[[[2.0]]]]))
    quantizer = Quantizer(grid, transform=MeanMagnitude(3))
    mean = weight.abs().mean((1, 2, 3), keepdim=True)
    normal = 2 ** (3 - 1) / (2**3 - 1) * weight / mean
    expected = 2 * (torch.round(7 * ((normal + 1) / 2).clamp(0, 1)) / 7 - 1 / 2)
    # The levels are float32.
    torch.testing.assert_close(quantizer(weight), expected, rtol=0, atol=1.2e-7)
    leaf = weight.clone().requires_grad_()
    (found,) = torch.autograd.grad(quantizer(leaf).sum(), leaf)
    # The divisor is held constant, and nothing is cut off.
    torch.testing.assert_close(found, (4 / 7 / mean).expand_as(weight), rtol=1e-14, atol=0)


def test_codes_are_used_equally_often_where_magnitudes_are_uniform():
    weight = torch.linspace(-1, 1, 4001, dtype=torch.float64).unsqueeze(0)
    quantizer = Quantizer(N2uqWeightGrid(2, (1, 1)), transform=MeanMagnitude(2))
    counts = torch.bincount(quantizer.codes(weight).flatten() + 2)
    # Up to the ends of 4001 samples.
    torch.testing.assert_close(counts / 4001, torch.full((4,), 0.25), rtol=0, atol=0.001)


@pytest.mark.parametrize("spec", [QuantSpec.signed(3), QuantSpec(3, 0, 5, True)])
def test_codes_that_the_thresholds_do_not_have_are_refused(spec):
    with pytest.raises(SpecError, match="the thresholds of N2UQ are defined for"):
        N2uqGrid.from_range(spec, torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("spec", [QuantSpec.signed(3, narrow=True), QuantSpec.unsigned(3)])
def test_codes_that_the_weights_do_not_have_are_refused(spec):
    with pytest.raises(SpecError, match="N2UQ's weights are defined for"):
        N2uqWeightGrid.from_range(spec, torch.zeros(1), torch.ones(1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"steps of shape \(3,\): they need"):
        N2uqGrid(torch.ones(3))
    for count in (2, 511):
        with pytest.raises(SpecError, match=f"{count} steps: supported are"):
            N2uqGrid(torch.ones(1, count))
    with pytest.raises(RangeError, match="steps has 1 of 3"):
        N2uqGrid(torch.tensor([[1.0, -1.0, 1.0]]))
    with pytest.raises(ShapeError, match=r"start of shape \(2,\)"):
        N2uqGrid(torch.ones(1, 3), torch.zeros(2))
    with pytest.raises(RangeError, match="start inf"):
        N2uqGrid(torch.ones(1, 3), torch.tensor([torch.inf]))
    with pytest.raises(RangeError, match="output_scale has 1 of 1"):
        N2uqGrid(torch.ones(1, 3), output_scale=torch.zeros(1))
    with pytest.raises(RangeError, match="is negative"):
        N2uqGrid.from_range(QuantSpec.unsigned(2), torch.tensor([-2.0]), torch.tensor([-1.0]))
    with pytest.raises(SpecError, match="bits=9"):
        N2uqWeightGrid(9)
    with pytest.raises(ShapeError, match="the levels are the same for all"):
        N2uqWeightGrid(2, (3, 1))
