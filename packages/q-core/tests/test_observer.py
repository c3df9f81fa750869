"""The choices of the observers against slow searches over the raw data."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import (
    CodebookGrid,
    DataError,
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    NearestEven,
    PercentileObserver,
    QuantSpec,
    RangeError,
    StateError,
    UniformGrid,
)

EXACT = {"rtol": 0, "atol": 0}
OBSERVERS = [MinMaxObserver, MovingAverageObserver, PercentileObserver, MSEObserver, EntropyObserver]
HISTOGRAMS = [PercentileObserver, MSEObserver, EntropyObserver]
seeds = st.integers(0, 2**31)

DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "skewed": lambda n: torch.randn(n, dtype=torch.float64).exp() - 1.5,
    "rectified": lambda n: torch.randn(n, dtype=torch.float64).relu(),
    "uniform": lambda n: torch.rand(n, dtype=torch.float64),
    "exponential": lambda n: -torch.rand(n, dtype=torch.float64).log(),
    "heavy": lambda n: torch.randn(n, dtype=torch.float64) / torch.rand(n, dtype=torch.float64).clamp(min=0.05),
    "negative": lambda n: -torch.rand(n, dtype=torch.float64),
}


def _observed(observer, x):
    observer(x)
    return observer


def _exact_norm(x, scale, zero_point, spec, p):
    """The p-norm of the error, per element, from the equation alone."""
    codes = (x / scale + zero_point).round().clamp(spec.qmin, spec.qmax)
    return float((scale * (codes - zero_point) - x).abs().pow(p).mean() ** (1 / p))


def _grid_norm(grid, x, p):
    zero_point = 0.0 if grid.zero_point is None else float(grid.zero_point)
    scale = float(grid.scale)
    codes = (x / scale + zero_point).round().clamp(grid.qmin, grid.qmax)
    return float((scale * (codes - zero_point) - x).abs().pow(p).mean() ** (1 / p))


def _best_norm(oracles, x, spec, p, candidates):
    pairs = oracles.mse_candidates(float(x.min()), float(x.max()), spec.qmin, spec.qmax, spec.symmetric, candidates)
    return min(_exact_norm(x, scale, zero_point, spec, p) for scale, zero_point in pairs)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_range_of_least_error_is_within_two_percent_of_the_exact_search(oracles, name, bits):
    """On smooth data the histogram errs to second order.

    Let w be the width of a bin and s the scale. Over a bin, |e|^p exceeds its middle value by
    p (p - 1) / 2 |e|^(p-2) w^2 / 12; averaged over a cell that is the fraction p (p + 1) / 6 (w / s)^2, 1.36 (w / s)^2
    for p = 2.4. The best scale of 4 bits or fewer spans 10 bins or more: the loss is wrong by at most 1.4 percent,
    and that only if the error of the chosen range has the other sign than that of the best.
    """
    for spec in (QuantSpec.signed(bits), QuantSpec.unsigned(bits)):
        x = DISTRIBUTIONS[name](20_000)
        observer = _observed(MSEObserver(spec), x)
        grid = observer.grid()
        assert float(grid.scale) >= 10 * float(observer.histogram.width())
        chosen, best = _grid_norm(grid, x, 2.4) ** 2.4, _best_norm(oracles, x, spec, 2.4, 100) ** 2.4
        assert chosen <= 1.02 * best


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    bits=st.integers(1, 8),
    p=st.sampled_from([1.0, 2.0, 2.4, 4.0]),
    symmetric=st.booleans(),
)
def test_the_range_of_least_error_is_bounded_on_any_data(oracles, values, bits, p, symmetric):
    """The distance to the nearest level changes by no more than the real does.

    So by Minkowski the norm of the errors of the data and that of the middles of their bins differ by at most the norm
    of (data - middles), for the chosen range as for the best.
    """
    x = torch.tensor(values, dtype=torch.float64)
    spec = QuantSpec.signed(bits, symmetric=symmetric)
    if symmetric and bits == 1:
        x = -x.abs()
    observer = _observed(MSEObserver(spec, p=p, candidates=20, bins=128), x)
    width = float(observer.histogram.width())
    middles = (torch.floor(x / width) + 0.5) * width
    moved = float((x - middles).abs().pow(p).mean() ** (1 / p))
    if x.any():
        chosen, best = _grid_norm(observer.grid(), x, p), _best_norm(oracles, x, spec, p, 20)
        # The search itself runs in float32 on coordinates of up to 256 codes: 256 * 6e-8 of a scale, in each norm.
        slack = 4 * 256 * 6e-8 * float(observer.grid().scale)
        assert chosen <= best + 2 * moved + slack + 1e-6 * best


@pytest.mark.parametrize("spec", [QuantSpec.signed(4), QuantSpec.unsigned(4), QuantSpec.unsigned(8)])
@pytest.mark.parametrize("exponent", [-90, -40, 40, 90])
def test_the_range_of_least_error_does_not_depend_on_the_unit(spec, exponent):
    x = torch.randn(500)
    plain, scaled = (_observed(MSEObserver(spec), x * unit).grid() for unit in (1.0, 2.0**exponent))
    torch.testing.assert_close(scaled.scale, plain.scale * 2.0**exponent, **EXACT)
    torch.testing.assert_close(scaled.zero_point, plain.zero_point, **EXACT)


@pytest.mark.parametrize("spec", [QuantSpec.signed(4), QuantSpec.unsigned(3), QuantSpec.unsigned(8)])
def test_dead_channels_have_scale_one_beside_live_ones(spec):
    x = torch.randn(5, 200)
    x[[1, 4]] = 0
    for make in OBSERVERS:
        observer = _observed(make(spec, (5, 1)), x)
        grid = observer.grid()
        assert observer.dead_tiles() == [1, 4]
        torch.testing.assert_close(grid.scale[[1, 4]], torch.ones(2, 1), **EXACT)
        assert (grid.scale[[0, 2, 3]] < 1).all()
        torch.testing.assert_close(grid.fake_quantize(x, NearestEven())[[1, 4]], torch.zeros(2, 200), **EXACT)


@pytest.mark.parametrize("make", OBSERVERS)
@pytest.mark.parametrize("spec", [QuantSpec.signed(4), QuantSpec.unsigned(4), QuantSpec.unsigned(8)])
def test_a_channel_is_served_as_if_it_were_alone(make, spec):
    x = torch.randn(3, 300) * torch.tensor([[1e-3], [1.0], [70.0]])
    together = _observed(make(spec, (3, 1)), x).grid()
    for row in range(3):
        alone = _observed(make(spec), x[row]).grid()
        torch.testing.assert_close(together.scale[row], alone.scale, **EXACT)
        if not spec.symmetric:
            torch.testing.assert_close(together.zero_point[row], alone.zero_point, **EXACT)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.999, 1.0])
def test_a_percentile_is_the_order_statistic_within_one_bin(oracles, name, fraction):
    x = DISTRIBUTIONS[name](2001)
    for symmetric in (True, False):
        observer = PercentileObserver(QuantSpec.signed(8, symmetric=symmetric), fraction=fraction, bins=256)
        low, high = (float(bound) for bound in _observed(observer, x).range())
        if symmetric:
            bound = oracles.order_statistic(x.abs().tolist(), fraction)
            expected = max(-bound, float(x.min())), min(bound, float(x.max()))
        else:
            part = 1 - (1 - fraction) / 2
            expected = -oracles.order_statistic((-x).tolist(), part), oracles.order_statistic(x.tolist(), part)
        width = float(observer.histogram.width())
        assert abs(low - expected[0]) <= width
        assert abs(high - expected[1]) <= width
        assert float(x.min()) <= low <= high <= float(x.max())


def test_a_percentile_of_all_values_is_the_full_range():
    x = torch.randn(63)
    for spec in (QuantSpec.signed(8), QuantSpec.unsigned(8)):
        full, all_of_it = MinMaxObserver(spec), PercentileObserver(spec, fraction=1.0)
        torch.testing.assert_close(_observed(all_of_it, x).range(), _observed(full, x).range(), **EXACT)


@pytest.mark.parametrize("fraction", [0.55, 0.9, 0.99])
def test_a_percentile_does_not_jump_over_a_gap(fraction):
    """100 * 0.55 is 55.00000000000001: taken literally it asks for the 56th value, an outlier."""
    inside = round(100 * fraction)
    x = torch.cat([torch.linspace(0.1, 1, inside), torch.full((100 - inside,), 1000.0)])
    observer = _observed(PercentileObserver(QuantSpec.signed(8), fraction=fraction), x)
    # Within the bin of 1, that is 1000 / 512 or less.
    assert float(observer.range()[1]) < 1 + 1000 / 512


@pytest.mark.parametrize("make", OBSERVERS)
@pytest.mark.parametrize("value", [3.0, 3.001, -3.001, 6.0, 1e-20, 0.0])
@pytest.mark.parametrize("spec", [QuantSpec.signed(4), QuantSpec.unsigned(4)])
def test_constant_data_give_a_grid_that_holds_the_constant(make, value, spec):
    grid = _observed(make(spec), torch.full((9,), value)).grid()
    result = float(grid.fake_quantize(torch.tensor([value]), NearestEven()))
    # A grid of 4 bits holds it to half a scale, and no scale is wider than the constant or 1 where it is zero.
    assert abs(result - value) <= abs(value) / 7


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_a_low_percentile_of_data_away_from_zero_is_a_range(fraction):
    """The bound is known to a bin only, and may fall short of the least magnitude."""
    for sign in (1, -1):
        x = sign * torch.linspace(3.2, 3.3, 9)
        for symmetric in (True, False):
            spec = QuantSpec.signed(8, symmetric=symmetric)
            low, high = _observed(PercentileObserver(spec, fraction=fraction, bins=16), x).range()
            assert float(x.min()) <= float(low) <= float(high) <= float(x.max())


def _sparse(n):
    return torch.cat([torch.randn(n, dtype=torch.float64), torch.tensor([9.0], dtype=torch.float64)])


ENTROPY_DATA = {
    **{name: partial(make, 500) for name, make in DISTRIBUTIONS.items()},
    "sparse": partial(_sparse, 20),
    "two values": lambda: torch.tensor([1.0] * 100 + [-7.0] * 3, dtype=torch.float64),
    "saturated": lambda: (torch.randn(300, dtype=torch.float64) * 4).clamp(0, 6),
    "away from zero": lambda: torch.rand(300, dtype=torch.float64) + 5,
}


@pytest.mark.parametrize("name", ENTROPY_DATA)
@pytest.mark.parametrize("spec", [QuantSpec.signed(3), QuantSpec.unsigned(3), QuantSpec.unsigned(4)])
def test_the_entropy_threshold_has_the_least_divergence_of_the_loop(oracles, name, spec):
    x = ENTROPY_DATA[name]()
    observer = _observed(EntropyObserver(spec, candidates=50, bins=128), x)
    pairs = oracles.entropy_divergences(x.tolist(), 128, 50, spec.qmin, spec.qmax, spec.symmetric)
    least = min(divergence for _, divergence in pairs)
    assert math.isfinite(least)
    # Some 128 terms of either sign, each a few roundings of float64 of a number around 1.
    good = [threshold for threshold, divergence in pairs if divergence <= least + 1e-12]
    seen = float(x.min()), float(x.max())
    ranges = [tuple(min(max(bound, seen[0]), seen[1]) for bound in (-threshold, threshold)) for threshold in good]
    assert tuple(float(bound) for bound in observer.range()) in ranges


def test_of_equal_divergences_the_widest_range_is_taken():
    """Two values lie on two levels however wide the range, so nothing need be clipped."""
    x = torch.cat([torch.ones(1000), torch.full((10,), 100.0)])
    assert float(_observed(EntropyObserver(QuantSpec.unsigned(4)), x).range()[1]) == 100.0


def test_the_full_range_always_has_a_finite_divergence():
    """However sparse: 6 is the left edge of a bin, and the range up to 6 holds what lies on it."""
    x = torch.tensor([0.1, 0.7, 2.3, 6.0, 6.0])
    assert float(_observed(EntropyObserver(QuantSpec.unsigned(4)), x).range()[1]) == 6.0


def test_the_extremes_are_those_of_the_data_whatever_the_dtype():
    x = torch.randn(3, 5, 2).to(torch.bfloat16)
    observer = _observed(MinMaxObserver(QuantSpec.unsigned(8), (3, 1, 1)), x)
    torch.testing.assert_close(observer.low.flatten(), x.double().amin((1, 2)), **EXACT)
    torch.testing.assert_close(observer.high.flatten(), x.double().amax((1, 2)), **EXACT)
    assert observer.low.dtype == torch.float64


@pytest.mark.parametrize("make", OBSERVERS)
def test_an_observer_returns_the_very_tensor_and_keeps_no_graph(make):
    x = torch.randn(9, requires_grad=True)
    observer = make(QuantSpec.signed(4))
    assert observer(x) is x
    assert not any(tensor.requires_grad for tensor in observer.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("make", OBSERVERS)
def test_empty_tensors_are_not_data(make):
    observer = _observed(make(QuantSpec.signed(4)), torch.empty(0, 3))
    assert not observer.seen
    with pytest.raises(StateError, match=r"the observer has seen no data: run calibrate\(\)"):
        observer.grid()


@pytest.mark.parametrize("make", OBSERVERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_grid_of_nonfinite_data_is_refused_by_name(make, value):
    observer = _observed(make(QuantSpec.signed(4)), torch.tensor([1.0, value]))
    with pytest.raises(DataError, match="1 of the tensors seen held a NaN or an infinity"):
        observer.grid()


@pytest.mark.parametrize("make", HISTOGRAMS)
@pytest.mark.parametrize("bins", [0, 8, 48, 100])
def test_bins_that_are_no_power_of_two_are_refused(make, bins):
    with pytest.raises(RangeError, match=f"bins={bins}: it must be a power of two, at least 16"):
        make(QuantSpec.signed(4), bins=bins)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(MovingAverageObserver, momentum=0.0), "momentum=0.0: it must be above 0 and at most 1"),
        (partial(MovingAverageObserver, momentum=1.5), "momentum=1.5"),
        (partial(PercentileObserver, fraction=0.0), "fraction=0.0: it must be above 0 and at most 1"),
        (partial(PercentileObserver, fraction=99.9), "fraction=99.9"),
        (partial(MSEObserver, p=0.0), "p=0.0, candidates=100: p must be positive"),
        (partial(MSEObserver, candidates=0), "p=2.4, candidates=0"),
        (partial(EntropyObserver, candidates=0), "candidates=0: it must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RangeError, match=message):
        make(QuantSpec.signed(4))


def test_a_momentum_of_one_keeps_the_last_batch_only():
    observer = MovingAverageObserver(QuantSpec.signed(4), momentum=1.0)
    for batch in (torch.tensor([-9.0, 9.0]), torch.tensor([-1.0, 2.0])):
        observer(batch)
    torch.testing.assert_close([float(bound) for bound in observer.range()], [-1.0, 2.0], **EXACT)


@given(seed=seeds, momentum=st.floats(0.01, 1.0), batches=st.integers(1, 9))
def test_a_moving_average_is_the_weighted_sum_of_its_formula(seed, momentum, batches):
    generator = torch.Generator().manual_seed(seed)
    lows = torch.rand(batches, generator=generator, dtype=torch.float64) - 2
    observer = MovingAverageObserver(QuantSpec.signed(4), momentum=momentum)
    for low in lows:
        observer(torch.stack([low, torch.zeros_like(low)]))
    weights = [(1 - momentum) ** (batches - 1 - index) for index in range(batches)]
    expected = sum(weight * float(low) for weight, low in zip(weights, lows, strict=True)) / sum(weights)
    # 9 products and sums of numbers of one sign, one rounding each, above and below the line.
    torch.testing.assert_close(float(observer.range()[0]), expected, rtol=40 * 2.3e-16, atol=0)


def test_a_grid_factory_of_ones_own_is_used():
    def doubled(spec, low, high):
        return CodebookGrid(torch.stack([2 * low, 0 * low, 2 * high], dim=-1), qmin=-1)

    grid = _observed(
        MinMaxObserver(QuantSpec.signed(2), (2, 1), grid=doubled), torch.tensor([[-1.0, 3.0], [-2.0, 1.0]])
    ).grid()
    torch.testing.assert_close(grid.levels()[:, 0], torch.tensor([[-2.0, 0.0, 6.0], [-4.0, 0.0, 2.0]]), **EXACT)


def test_min_max_builds_the_grid_over_the_extremes():
    x = torch.tensor([-1.5, 0.5, 3.0])
    grid = _observed(MinMaxObserver(QuantSpec.unsigned(2)), x).grid()
    expected = UniformGrid.from_range(QuantSpec.unsigned(2), torch.tensor([-1.5]), torch.tensor([3.0]))
    torch.testing.assert_close(grid.state_dict(), expected.state_dict(), **EXACT)
