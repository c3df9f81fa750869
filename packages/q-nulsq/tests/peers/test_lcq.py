"""Uniform codes between a learned compressor and its inverse."""

import math

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
from q_nulsq.peers.lcq import INTERVALS, LcqGrid, compress, expand
from q_nulsq.peers.normalization import WeightNormalization
from q_nulsq.positivity import Exponential, Softplus

from .derivatives import gradients

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def specs(bits):
    return [QuantSpec.unsigned(bits), QuantSpec.signed(bits, narrow=True)]


def thetas(seed, shape=(INTERVALS,), size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


class Companding:
    """The compressor of one row of theta, and the derivatives of both functions by it, in plain Python."""

    def __init__(self, theta):
        powers = [math.exp(t) for t in theta]
        self.parts = [power / sum(powers) for power in powers]
        self.count = len(theta)
        self.slopes = [self.count * part for part in self.parts]
        self.starts = [sum(self.parts[:i]) for i in range(self.count)]

    def piece(self, v):
        return min(int(v * self.count), self.count - 1)

    def piece_of_level(self, q):
        return max(i for i in range(self.count) if self.starts[i] <= q or i == 0)

    def compress(self, v):
        i = self.piece(v)
        return self.slopes[i] * (v - i / self.count) + self.starts[i]

    def expand(self, q):
        i = self.piece_of_level(q)
        return (q - self.starts[i]) / self.slopes[i] + i / self.count

    def by_theta(self, by_parts):
        """Chain a derivative by the parts through the softmax."""
        mean = sum(p * d for p, d in zip(self.parts, by_parts, strict=True))
        return [p * (d - mean) for p, d in zip(self.parts, by_parts, strict=True)]

    def element(self, x, alpha, s, signed):
        """Return level, and the derivatives by x, by alpha and by each theta."""
        v = x / alpha
        sign = -1 if v < 0 else 1
        if v > 1 or v < -signed:
            top = sign if sign > 0 or signed else 0
            return alpha * top, 0.0, float(top), [0.0] * self.count
        v = abs(v)
        q = round(s * self.compress(v)) / s
        i, j = self.piece(v), self.piece_of_level(q)
        z, ratio = self.expand(q), self.slopes[i] / self.slopes[j]
        # z = (g - b_j) / c_j + d_j with the derivative of g in place of that of q; c = K p and b_k = p_0 + .. + p_(k-1)
        d = [0.0] * self.count
        d[i] += self.count * (v - i / self.count) / self.slopes[j]
        d[j] -= self.count * (q - self.starts[j]) / self.slopes[j] ** 2
        for k in range(i):
            d[k] += 1 / self.slopes[j]
        for k in range(j):
            d[k] -= 1 / self.slopes[j]
        by_theta = [sign * alpha * each for each in self.by_theta(d)]
        return sign * alpha * z, ratio, sign * (z - ratio * v), by_theta


@given(seed=seeds, pieces=st.integers(1, 20), size=st.sampled_from([0.0, 0.3, 2.0]))
def test_expanding_undoes_compressing(seed, pieces, size):
    theta = thetas(seed, (2, pieces), size)
    v = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v[:, :3] = torch.tensor([0.0, 1.0, 0.5])
    # Slopes lie between e^-10 and e^10 here: what is rounded to 1e-16 grows by at most that, twice.
    slack = {"rtol": 0, "atol": 1e-15 * math.exp(2 * float(theta.abs().max()))}
    torch.testing.assert_close(expand(compress(v, theta), theta), v, **slack)
    torch.testing.assert_close(compress(expand(v, theta), theta), v, **slack)


@given(seed=seeds)
def test_the_compressor_is_increasing_from_zero_to_one(seed):
    theta = thetas(seed, (1, INTERVALS), 2.0)
    v = torch.linspace(0, 1, 1001, dtype=torch.float64).unsqueeze(0)
    for function in (compress, expand):
        y = function(v, theta)
        assert bool((y.diff() > 0).all())
        # Sums of 16 parts of 1, each rounded to 1e-16, over a slope of e^-16 at least.
        torch.testing.assert_close(y[:, [0, -1]], torch.tensor([[0.0, 1.0]]).double(), rtol=0, atol=1e-8)


def test_equal_slopes_compress_nothing_to_the_last_bit():
    v = torch.rand(3, 100)
    for function in (compress, expand):
        torch.testing.assert_close(function(v, torch.zeros(3, INTERVALS)), v, **exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_equal_slopes_it_is_a_uniform_grid(bits):
    for spec in specs(bits):
        # Whole numbers of 1/64 and a clip of qmax/8: ties are met, but a code k is known to k eps only, so that what is
        # next to a tie is left out. The ends are exact.
        x = torch.arange(-9 * spec.qmax, 9 * spec.qmax + 1).double() / 64
        clear = (x * 8 - (x * 8).floor() - 0.5).abs() > 1e-9
        x = x[clear]
        upstream = (torch.arange(len(x)).remainder(5) - 2).double()
        clip, scale = torch.tensor([spec.qmax / 8]).double(), torch.tensor([1 / 8]).double()
        grid = LcqGrid(clip, qmin=spec.qmin, qmax=spec.qmax)
        found = gradients(grid, x, upstream)
        expected = gradients(UniformGrid(scale, qmin=spec.qmin, qmax=spec.qmax, learnable=True), x, upstream)
        # A level is a quotient and a product away from k/8.
        torch.testing.assert_close(found["levels"], expected["levels"], rtol=1e-15, atol=0)
        torch.testing.assert_close(found["x"], expected["x"], rtol=1e-14, atol=0)
        # The clip is qmax scales; 4000 terms of at most 2, rounded to 2e-16 each.
        torch.testing.assert_close(found["clip"], expected["scale"] / spec.qmax, rtol=0, atol=1e-11)
        check_grid(grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [False, True])
def test_the_laws_hold_but_for_the_two_that_companding_breaks(bits, channels):
    shape = (3, 1) if channels else (1,)
    clip = torch.tensor([0.7, 3.0, 0.02])[: shape[0]].reshape(shape)
    for spec in specs(bits):
        theta = thetas(bits, (*shape, INTERVALS)).float()
        check_grid(LcqGrid(clip, qmin=spec.qmin, qmax=spec.qmax, theta=theta), waive=["nearest", "gradient"])


@pytest.mark.parametrize("positivity", [Softplus(), Exponential()])
def test_the_laws_hold_for_other_ways_to_be_positive(positivity):
    check_grid(LcqGrid(torch.tensor([1.7]), qmin=-7, qmax=7, positivity=positivity))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_levels_are_the_expanded_codes_and_the_thresholds_the_expanded_halves(bits):
    for spec in specs(bits):
        theta, alpha = thetas(bits, (1, INTERVALS)), 1.5
        grid = LcqGrid(torch.tensor([alpha], dtype=torch.float64), qmin=spec.qmin, qmax=spec.qmax, theta=theta)
        companding = Companding(theta[0].tolist())
        positive = [alpha * companding.expand(k / spec.qmax) for k in range(spec.qmax + 1)]
        negative = [-level for level in positive[:0:-1]] if spec.qmin else []
        # A few operations on numbers up to alpha.
        expected = torch.tensor([negative + positive], dtype=torch.float64)
        torch.testing.assert_close(grid.levels(), expected, rtol=0, atol=1e-14)
        halves = [alpha * companding.expand((k - 0.5) / spec.qmax) for k in range(1, spec.qmax + 1)]
        for sign in (1, -1) if spec.qmin else (1,):
            for shift, code in ((-1e-6, 0), (1e-6, 1)):
                codes = grid.quantize(
                    sign * (torch.tensor(halves, dtype=torch.float64) + shift), NearestEven()
                ).detach()
                torch.testing.assert_close(codes, sign * (torch.arange(spec.qmax) + code).double(), **exact)


@settings(max_examples=25)
@given(seed=seeds, bits=st.integers(2, 6), signed=st.booleans(), exponent=st.integers(-6, 6))
def test_values_and_gradients_are_the_chain_rule(seed, bits, signed, exponent):
    spec = specs(bits)[signed]
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    clip = (torch.rand(2, 1, **options) + 0.1) * 2.0**exponent
    theta = torch.randn(2, 1, INTERVALS, **options)
    x = clip * (3 * torch.rand(2, 23, **options) - 1.5)
    upstream = torch.randn(2, 23, **options)
    y, dx, da = (torch.zeros(2, 23, dtype=torch.float64) for _ in range(3))
    dt = torch.zeros(2, 1, INTERVALS, dtype=torch.float64)
    for row in range(2):
        companding = Companding(theta[row, 0].tolist())
        for column in range(23):
            element = companding.element(float(x[row, column]), float(clip[row]), spec.qmax, signed)
            y[row, column], dx[row, column], da[row, column] = element[:3]
            dt[row, 0] += torch.tensor(element[3], dtype=torch.float64) * upstream[row, column]
    found = gradients(LcqGrid(clip, qmin=spec.qmin, qmax=spec.qmax, theta=theta), x, upstream)
    # Slopes lie between 1/500 and 16: a ratio of 1e4 at most, of numbers rounded a few times to 1e-16.
    torch.testing.assert_close(found["x"], dx * upstream, rtol=1e-10, atol=0)
    torch.testing.assert_close(found["clip"], (da * upstream).sum(1, True), rtol=0, atol=1e-10)
    size = float(clip.max())
    torch.testing.assert_close(found["theta"], dt, rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(found["levels"], y, rtol=0, atol=1e-13 * size)


def test_the_gradient_is_that_of_the_function_with_the_residual_held():
    """Finite differences of g^-1(g(x / a) + constant): what straight-through means."""
    theta, alpha = thetas(3, (1, INTERVALS), 0.5), 1.3
    x = torch.linspace(0.02, 1.25, 40, dtype=torch.float64)
    grid = LcqGrid(torch.tensor([alpha], dtype=torch.float64), qmin=0, qmax=15, theta=theta)
    found = gradients(grid, x, torch.ones_like(x))

    def surrogate(a, t):
        rows = (x / a).unsqueeze(0)
        residual = grid.quantize(x, NearestEven()).detach() / 15 - compress((x / alpha).unsqueeze(0), theta)
        return float((a * expand(compress(rows, t) + residual, t)).sum())

    step = 1e-6
    for name, bump in (("clip", None), *(("theta", k) for k in (0, 5, 15))):
        moved = []
        for sign in (1, -1):
            t = theta.clone()
            if bump is not None:
                t[0, bump] += sign * step
            moved.append(surrogate(alpha + sign * step * (bump is None), t))
        slope = (moved[0] - moved[1]) / (2 * step)
        mine = float(found[name].flatten()[bump or 0])
        # Central differences: 1e-12 of curvature, 1e-15/1e-6 of rounding in each of 40 terms.
        torch.testing.assert_close(mine, slope, rtol=1e-6, atol=1e-6)


def test_leaving_the_ratio_of_slopes_out_is_another_gradient():
    """What a public re-implementation does; equal only while nothing is compressed."""
    x, ones = torch.linspace(0.02, 0.95, 39, dtype=torch.float64), torch.ones(39).double()
    for size, same in ((0.0, True), (1.0, False)):
        grid = LcqGrid(torch.ones(1).double(), qmin=-7, qmax=7, theta=thetas(1, (1, INTERVALS), size))
        found = gradients(grid, x, ones)
        dropped = (found["levels"] - x).sum()
        assert torch.allclose(found["x"], ones) is same
        assert math.isclose(float(found["clip"]), float(dropped), abs_tol=1e-12) is same


def test_a_step_of_gradient_descent_on_theta_lowers_the_error():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    grid = LcqGrid(torch.tensor([3.0]), qmin=-7, qmax=7)
    optimizer = torch.optim.SGD(grid.parameters(), lr=0.5)
    errors = []
    for _ in range(40):
        error = (grid.fake_quantize(x, NearestEven()) - x).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        grid.project()
    assert errors[-1] < 0.95 * errors[0]


def test_zero_has_the_slope_of_the_first_piece():
    grid = LcqGrid(torch.ones(1), qmin=-7, qmax=7, theta=thetas(0).float().reshape(1, -1))
    x = torch.tensor([0.0, -0.0])
    # Zero goes to the level 0, in the same piece.
    torch.testing.assert_close(gradients(grid, x, torch.ones(2))["x"], torch.ones(2), **exact)


def test_infinities_are_clipped_and_leave_finite_gradients():
    x = torch.tensor([-torch.inf, 0.2, torch.inf])
    found = gradients(LcqGrid(torch.ones(1), qmin=-3, qmax=3), x, torch.ones(3))
    torch.testing.assert_close(found["levels"][[0, 2]], torch.tensor([-1.0, 1.0]), **exact)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def test_slopes_that_underflow_leave_finite_numbers():
    theta = torch.zeros(1, INTERVALS)
    theta[0, 3] = 200.0
    x = torch.linspace(-1.5, 1.5, 31)
    found = gradients(LcqGrid(torch.ones(1), qmin=-3, qmax=3, theta=theta), x, torch.ones(31))
    assert bool(found["levels"].isfinite().all())


def test_published_weights_of_two_bits_have_three_levels_and_no_compressor():
    low, high = torch.tensor([-1.0]), torch.tensor([0.5])
    grid = LcqGrid.from_range(QuantSpec.signed(2, narrow=True), low, high)
    torch.testing.assert_close(grid.levels(), torch.tensor([[-1.0, 0.0, 1.0]]), **exact)
    assert tuple(grid.theta.shape) == (1, 1)
    # One part of a softmax is 1 whatever is in it.
    found = gradients(grid, torch.tensor([-0.6, 0.3, 0.7]), torch.ones(3))
    torch.testing.assert_close(found["theta"], torch.zeros(1, 1), **exact)
    assert tuple(LcqGrid.from_range(QuantSpec.unsigned(2), low, high).theta.shape) == (1, INTERVALS)
    assert tuple(LcqGrid.from_range(QuantSpec.unsigned(2), low, high, intervals=5).theta.shape) == (1, 5)


def test_the_start_is_the_range_or_a_published_constant():
    low, high = torch.tensor([[-3.0], [0.0]]), torch.tensor([[1.0], [0.0]])
    grid = LcqGrid.from_range(QuantSpec.signed(3, narrow=True), low, high)
    torch.testing.assert_close(grid.clip.detach(), torch.tensor([[3.0], [1.0]]), **exact)
    grid = LcqGrid.from_range(QuantSpec.unsigned(3), low, high, clip=8.0)
    torch.testing.assert_close(grid.clip.detach(), torch.full((2, 1), 8.0), **exact)
    assert (grid.qmin, grid.qmax, grid.tile_shape, tuple(grid.theta.shape)) == (0, 7, (2, 1), (2, 1, INTERVALS))


def test_limited_normalisation_is_the_same_grid_scaled_by_the_deviation():
    weight = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02 + 0.01
    transform, theta = WeightNormalization(), thetas(0, (1, INTERVALS))
    quantizer = Quantizer(LcqGrid(torch.tensor([3.0]).double(), qmin=-7, qmax=7, theta=theta), transform=transform)
    restored = transform.restore(quantizer(weight), weight).detach()
    deviation = weight.std().reshape(1) + 1e-5
    scaled = LcqGrid(3 * deviation, qmin=-7, qmax=7, theta=theta)
    # Both divide by 3 and by the deviation, in another order; away from ties the codes are the same.
    expected = scaled.fake_quantize(weight - weight.mean(), NearestEven()).detach()
    torch.testing.assert_close(restored, expected, rtol=1e-13, atol=0)


def test_frozen_it_is_the_same_grid_without_parameters():
    grid = LcqGrid(torch.tensor([[0.3], [1.9]]), qmin=-15, qmax=15, theta=thetas(0, (2, 1, INTERVALS)).float())
    frozen, x = grid.frozen(), torch.randn(2, 1000) * 2
    assert not list(frozen.parameters())
    assert sorted(frozen.state_dict()) == sorted(grid.state_dict()) == ["clip", "theta"]
    assert len(list(grid.parameters())) == 2
    for rounding in (NearestEven(), NearestTowardZero()):
        found = [each.fake_quantize(x, rounding).detach() for each in (grid, frozen)]
        torch.testing.assert_close(*found, **exact)


def test_another_rounding_takes_a_neighbour_and_has_the_same_slope_outside_of_its_choice():
    x = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64)
    grid = LcqGrid(torch.ones(1).double(), qmin=-7, qmax=7, theta=thetas(2, (1, INTERVALS)))
    found = gradients(grid, x, torch.ones_like(x), Stochastic())
    levels = grid.levels()[0]
    below = torch.searchsorted(levels, x.clamp(-1, 1), right=True).clamp(1, len(levels) - 1)
    taken = (found["levels"].unsqueeze(1) - torch.stack([levels[below - 1], levels[below]], 1)).abs().amin(1)
    # A level found again from its code is a few roundings of 1 away.
    torch.testing.assert_close(taken, torch.zeros_like(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(found["x"][x.abs() > 1], torch.zeros(16).double(), **exact)


def test_the_gradient_scale_multiplies_both():
    x, ones = torch.tensor([-3.0, 0.3, 9.0]), torch.ones(3)
    theta = thetas(0, (1, INTERVALS)).float()
    plain, scaled = (
        gradients(LcqGrid(torch.ones(1), qmin=-3, qmax=3, theta=theta, gradient_scale=factor), x, ones)
        for factor in (1.0, 0.25)
    )
    torch.testing.assert_close(scaled["clip"], plain["clip"] / 4, **exact)
    torch.testing.assert_close(scaled["theta"], plain["theta"] / 4, **exact)


def test_a_clip_that_was_pushed_below_zero_comes_back():
    grid = LcqGrid(torch.tensor([[0.5, 0.25]]), qmin=0, qmax=3)
    with torch.no_grad():
        grid.clip.copy_(torch.tensor([[-0.5, 0.25]]))
    grid.project()
    torch.testing.assert_close(grid.clip.detach(), torch.tensor([[0.0005, 0.25]]), **exact)


@pytest.mark.parametrize(("qmin", "qmax"), [(-4, 3), (0, 1), (0, 2), (0, 511), (-255, 255)])
def test_codes_that_the_method_does_not_define_are_refused(qmin, qmax):
    with pytest.raises(SpecError, match=f"codes {qmin} to {qmax}: LCQ is defined for"):
        LcqGrid(torch.ones(1), qmin=qmin, qmax=qmax)


def test_what_does_not_fit_is_refused():
    for spec in (QuantSpec.unsigned(1), QuantSpec.signed(4)):
        with pytest.raises(SpecError, match="LCQ is defined for"):
            LcqGrid.from_range(spec, torch.zeros(1), torch.ones(1))
    with pytest.raises(ShapeError, match=r"theta of shape \(16,\) with a clip of shape \(1,\)"):
        LcqGrid(torch.ones(1), qmin=0, qmax=3, theta=torch.zeros(16))
    with pytest.raises(RangeError, match="theta nan"):
        LcqGrid(torch.ones(1), qmin=0, qmax=3, theta=torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(RangeError, match="clip has 1 of 1"):
        LcqGrid(torch.zeros(1), qmin=0, qmax=3)
    with pytest.raises(RangeError, match="intervals=0"):
        LcqGrid.from_range(QuantSpec.unsigned(2), torch.zeros(1), torch.ones(1), intervals=0)
    with pytest.raises(RangeError, match=r"range -2.0 to -1.0 is negative"):
        LcqGrid.from_range(QuantSpec.unsigned(2), torch.tensor([-2.0]), torch.tensor([-1.0]))
