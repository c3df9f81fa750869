"""Where steps start: constants, observers, and what several batches or ranks make of them."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import q_core
from q_core import MSEObserver, PerChannel, QuantSpec, RangeError, Recipe, Rule, SpecError, StateError, UniformGrid
from q_core.testing import check_observer
from q_nulsq import Exponential, StepGrid
from q_nulsq.batches import ExactSum, LargestBatch, MeanOfBatches, Over, PercentileOfBatches
from q_nulsq.calibration import (
    ClippingWarning,
    LloydMaxObserver,
    LsqObserver,
    MidRiseMSEObserver,
    NormalizedMSEObserver,
    NormalLloydMaxObserver,
    ThreeSigmaObserver,
    warn_of_clipping,
)
from q_nulsq.normal import lloyd_max_steps, mid_rise_step, uniform_step

UNSIGNED = partial(QuantSpec.unsigned, symmetric=True)
ALL = (
    LsqObserver,
    NormalizedMSEObserver,
    MidRiseMSEObserver,
    ThreeSigmaObserver,
    NormalLloydMaxObserver,
    LloydMaxObserver,
)
SIGNED_STEPS = {2: 1.04839, 3: 0.60182, 4: 0.33861}
UNSIGNED_STEPS = {2: 0.65077, 3: 0.35341, 4: 0.19325, 8: 0.016529}
LLOYD_MAX = {
    2: (0.764568, 0.959580),
    3: (0.560577, 0.627570, 0.845222),
    4: (0.443639, 0.475157, 0.557596, 0.778272),
    7: (0.273857, 0.280907, 0.296371, 0.323744, 0.371178, 0.460418, 0.674394),
    8: (0.242995, 0.247888, 0.258405, 0.276310, 0.305300, 0.353546, 0.442528, 0.653791),
    15: (
        0.136018,
        0.136858,
        0.138584,
        0.141274,
        0.145057,
        0.150125,
        0.156783,
        0.165489,
        0.176935,
        0.192242,
        0.213354,
        0.243892,
        0.291543,
        0.376192,
        0.573193,
    ),
}


def half_normal_error(levels: torch.Tensor) -> float:
    """Squared error of rounding the positive side of a normal distribution to zero and these levels."""
    x = torch.linspace(0, 12, 240_001, dtype=torch.float64)
    table = torch.cat([torch.zeros(1, dtype=torch.float64), levels])
    nearest = table[torch.searchsorted((table[1:] + table[:-1]) / 2, x)]
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid((x - nearest).square() * density, x))


def steps_up(count: int, step: float) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) * step


def test_best_equal_steps_are_those_of_the_table() -> None:
    # The table is printed with five decimals, or five digits; its value for 8 bits is 0.85e-6 above the optimum.
    for bits, step in SIGNED_STEPS.items():
        torch.testing.assert_close(uniform_step(2 ** (bits - 1), 2 ** (bits - 1) - 1), step, atol=5e-6, rtol=0)
    for bits, step in UNSIGNED_STEPS.items():
        torch.testing.assert_close(uniform_step(0, 2**bits - 1), step, atol=5e-6 if bits < 8 else 1e-6, rtol=0)


def test_steps_without_a_zero_are_the_published_ones_of_uniq() -> None:
    published = {1: 1.59577, 2: 0.99569, 3: 0.58602, 4: 0.33520, 5: 0.18814, 8: 0.030762}
    for bits, step in published.items():
        torch.testing.assert_close(mid_rise_step(2**bits), step, atol=5e-6 if bits < 8 else 5e-7, rtol=0)
    assert mid_rise_step(4) < uniform_step(2, 1)  # so that taking one for the other is a transplant


@pytest.mark.parametrize("levels", LLOYD_MAX)
def test_pinned_lloyd_max_steps_are_those_of_the_table(levels: int) -> None:
    # Printed with six decimals; those of 15 levels were not iterated to the end, which the test below shows of ours.
    torch.testing.assert_close(lloyd_max_steps(levels), LLOYD_MAX[levels], atol=1e-5, rtol=0)


@pytest.mark.parametrize("levels", [1, 2, 5, 31, 128, 255])
def test_pinned_lloyd_max_levels_are_the_means_of_their_cells(levels: int) -> None:
    found = torch.tensor(lloyd_max_steps(levels), dtype=torch.float64).cumsum(0)
    assert bool((found.diff(prepend=found.new_zeros(1)) > 0).all())
    edges = torch.cat([found[:1] / 2, (found[1:] + found[:-1]) / 2, found.new_tensor([math.inf])])
    normal = torch.distributions.Normal(found.new_zeros(()), 1.0)
    mass = (1 - normal.cdf(edges[:-1])) - (1 - normal.cdf(edges[1:]))
    density = torch.exp(-0.5 * edges.square()) / math.sqrt(2 * math.pi)
    # 1 - cdf keeps 1e-16 in the tail, of which the narrowest cells hold 3e-5 (255 levels).
    torch.testing.assert_close((density[:-1] - density[1:]) / mass, found, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("count", "uniform", "pinned"), [(3, 0.02343, 0.02200), (7, 0.006445, 0.005369), (15, 0.001847, 0.001332)]
)
def test_errors_of_the_starts_are_those_of_the_table(count: int, uniform: float, pinned: float) -> None:
    # Printed with four digits; the integral has 1e-8.
    torch.testing.assert_close(half_normal_error(steps_up(count, uniform_step(0, count))), uniform, atol=0, rtol=3e-4)
    found = torch.tensor(lloyd_max_steps(count), dtype=torch.float64).cumsum(0)
    torch.testing.assert_close(half_normal_error(found), pinned, atol=0, rtol=3e-4)


@pytest.mark.parametrize("count", [1, 3, 31])
def test_no_other_equal_step_has_a_smaller_error(count: int) -> None:
    best = uniform_step(0, count)
    least = half_normal_error(steps_up(count, best))
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert half_normal_error(steps_up(count, factor * best)) > least


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_step(0, 0), "not both 0"),
        (lambda: uniform_step(-1, 3), "-1 levels below zero"),
        (lambda: mid_rise_step(3), "even number"),
        (lambda: lloyd_max_steps(0), "at least 1"),
        (lambda: PercentileOfBatches(0.0), "above 0"),
    ],
)
def test_impossible_numbers_are_refused(call, message) -> None:
    with pytest.raises(RangeError, match=message):
        call()


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 1, 1)])
@pytest.mark.parametrize("spec", [QuantSpec.signed(3), UNSIGNED(2), QuantSpec.signed(1), UNSIGNED(5)])
@pytest.mark.parametrize("kind", ALL)
def test_observers_obey_the_laws(kind, spec: QuantSpec, shape: tuple[int, ...]) -> None:
    check_observer(lambda: kind(spec, shape))


@pytest.mark.parametrize("over", [LargestBatch(), PercentileOfBatches(0.5), PercentileOfBatches(1.0)])
@pytest.mark.parametrize("kind", [LsqObserver, NormalizedMSEObserver, NormalLloydMaxObserver])
def test_observers_that_ask_how_data_are_cut_obey_all_other_laws(kind, over: Over) -> None:
    # What is largest among batches depends on the batches, by the meaning of the word.
    check_observer(lambda: kind(QuantSpec.signed(3), over=over), waive=["split"])


def scale_of(observer: q_core.Observer, *batches: torch.Tensor) -> float:
    for batch in batches:
        observer(batch)
    return float(observer.grid().scale.detach())


def test_lsq_starts_from_the_mean_magnitude() -> None:
    x = torch.tensor([1.0, -3.0, 0.5, 1.5])  # mean magnitude 1.5
    # Three roundings of float32: the end of the range, and its division by the code.
    tolerance = {"rtol": 3 * 2**-24, "atol": 0.0}
    torch.testing.assert_close(scale_of(LsqObserver(QuantSpec.signed(3)), x), 2 * 1.5 / math.sqrt(3), **tolerance)
    torch.testing.assert_close(scale_of(LsqObserver(UNSIGNED(2)), x.abs()), 2 * 1.5 / math.sqrt(3), **tolerance)
    # With one signed bit the largest code is 0, and the smallest takes its place.
    torch.testing.assert_close(scale_of(LsqObserver(QuantSpec.signed(1)), x), 3.0, **tolerance)


def test_lsq_plus_starts_from_three_deviations() -> None:
    x = torch.tensor([1.0, -3.0, 0.5, 1.5, -2.0])
    expected = (x.mean().abs() + 3 * x.std(correction=0)) / 4
    # The deviation in float32 here, in float64 there: a few roundings.
    torch.testing.assert_close(scale_of(ThreeSigmaObserver(QuantSpec.signed(3)), x), float(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_normalised_start_is_the_deviation_times_the_constant_of_this_grid(bits: int) -> None:
    x = torch.randn(4, 500) * 3
    x -= x.mean()
    signed = uniform_step(2 ** (bits - 1), 2 ** (bits - 1) - 1) * float(x.std(correction=0))
    # The mean of x is 1e-8 and not 0; the rest are roundings of float32.
    torch.testing.assert_close(scale_of(NormalizedMSEObserver(QuantSpec.signed(bits)), x), signed, rtol=1e-6, atol=0)
    cut = x.relu()
    unsigned = uniform_step(0, 2**bits - 1) * math.sqrt(2 * float(cut.double().square().mean()))
    torch.testing.assert_close(scale_of(NormalizedMSEObserver(UNSIGNED(bits)), cut), unsigned, rtol=1e-6, atol=0)


def test_batches_count_as_they_are_asked_to() -> None:
    batches = [torch.full((2,), 1.0), torch.full((6,), 3.0), torch.full((2,), 2.0)]
    spec = UNSIGNED(1)  # the step is twice the mean magnitude

    def step(over: Over) -> float:
        return scale_of(LsqObserver(spec, over=over), *batches) / 2

    # Every element counts the same; rounded to float32.
    torch.testing.assert_close(step(MeanOfBatches()), 2.4, rtol=2**-23, atol=0)
    assert step(LargestBatch()) == 3.0
    assert step(PercentileOfBatches(1.0)) == 3.0
    # One part in 1024 of the largest.
    torch.testing.assert_close(step(PercentileOfBatches(0.5)), 2.0, atol=3 / 1024, rtol=0)
    torch.testing.assert_close(step(PercentileOfBatches(1 / 3)), 1.0, atol=3 / 1024, rtol=0)


@given(
    st.lists(
        st.floats(min_value=-1e60, max_value=1e60, allow_subnormal=True).filter(lambda x: x == 0 or abs(x) > 1e-60),
        min_size=1,
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_an_exact_sum_does_not_ask_for_the_order(numbers: list[float], random) -> None:
    def added(order: list[float]) -> ExactSum:
        total = ExactSum(1)
        for number in order:
            total.add(torch.tensor([[number]], dtype=torch.float64))
        return total

    one, shuffled = added(numbers), numbers.copy()
    random.shuffle(shuffled)
    other = added(shuffled)
    assert torch.equal(one.digits, other.digits)
    # 16 products are added in float64. Nothing above 1e-60 loses digits below 2**-256, which is 1e-77.
    slack = 16 * 2**-52 * sum(map(abs, numbers)) + 30 * 2.0**-256
    torch.testing.assert_close(float(one.total()), math.fsum(numbers), atol=slack, rtol=0)


def test_signed_data_in_an_unsigned_grid_are_told_of_with_their_share() -> None:
    x = torch.tensor([-1.0, 2.0, 3.0, 4.0])
    for kind in (LsqObserver, NormalizedMSEObserver, NormalLloydMaxObserver, LloydMaxObserver):
        observer = kind(UNSIGNED(2))
        observer(x)
        with pytest.warns(ClippingWarning, match=r"1 of the 4 elements \(25.0%\) that the observer saw are negative"):
            observer.grid()
        fine = kind(QuantSpec.signed(2))
        fine(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fine.grid()


@pytest.mark.parametrize("kind", [LsqObserver, NormalizedMSEObserver, NormalLloydMaxObserver, LloydMaxObserver])
def test_data_that_would_all_be_clipped_are_refused(kind) -> None:
    observer = kind(UNSIGNED(2))
    observer(torch.tensor([-1.0, -2.0]))
    with pytest.raises(RangeError, match=r"2 of the 2 elements .*all would be clipped.*QuantSpec.signed\(2\)"):
        observer.grid()


def test_nothing_is_said_of_data_without_negatives() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_clipping(0, 10, UNSIGNED(2))
        warn_of_clipping(5, 10, QuantSpec.signed(2))


@pytest.mark.parametrize("spec", [QuantSpec.signed(2), QuantSpec.signed(3), UNSIGNED(2), UNSIGNED(3), UNSIGNED(4)])
def test_steps_of_the_data_are_those_of_the_distribution_they_come_from(spec: QuantSpec) -> None:
    # Quantiles in place of a random sample.
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).float() * 3
    x = x.relu() if spec.qmin == 0 else x
    observers = NormalLloydMaxObserver(spec), LloydMaxObserver(spec)
    grids = []
    for observer in observers:
        observer(x)
        grids.append(observer.grid())
    tables = [grid.levels() for grid in grids]
    # A bin is 1/512 of the largest magnitude, 13.4, or less, and the sample ends at 4.4 deviations.
    torch.testing.assert_close(tables[1], tables[0], atol=0.05, rtol=0)
    assert all(isinstance(grid, StepGrid) and (grid.levels()[..., -grid.qmin] == 0).all() for grid in grids)
    errors = [float((observer.quantizer()(x) - x).square().mean().detach()) for observer in observers]
    # Quantizing near the optimum: the error is flat there.
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("power", [1, 3, 5])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_of_the_data_beat_the_best_equal_ones(power: int, bits: int) -> None:
    x = torch.randn(3, 4001) ** power * torch.tensor([[1.0], [20.0], [0.01]])
    spec = QuantSpec.signed(bits)
    equal, free = MSEObserver(spec, (3, 1), p=2.0), LloydMaxObserver(spec, (3, 1))
    errors = []
    for observer in (equal, free):
        observer(x)
        errors.append((observer.quantizer()(x) - x).detach().square().mean(1))
    assert bool((errors[1] < errors[0]).all())


@pytest.mark.parametrize(
    "x",
    [
        torch.full((7,), 2.5),
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([-1.0, 1.0, 1e-6]),
        torch.cat([torch.zeros(1000), torch.tensor([1e4])]),
        -torch.rand(50),
        torch.tensor([3e-30, -1e-30]),
    ],
    ids=["one value", "two values", "ends", "outlier", "one side", "tiny"],
)
@pytest.mark.parametrize("kind", [NormalLloydMaxObserver, LloydMaxObserver])
def test_steps_stay_positive_whatever_the_data(kind, x: torch.Tensor) -> None:
    for bits in (1, 2, 3, 8):
        observer = kind(QuantSpec.signed(bits))
        observer(x)
        table = observer.grid().levels()
        assert bool((table.diff(dim=-1) > 0).all())
        assert bool(table.isfinite().all())


def test_placed_steps_keep_what_the_factory_was_told() -> None:
    factory = partial(StepGrid.from_range, positivity=Exponential(), gradient_scale=0.5, learnable=False)
    for kind in (NormalLloydMaxObserver, LloydMaxObserver):
        plain, told = kind(UNSIGNED(3)), kind(UNSIGNED(3), grid=factory)
        x = torch.rand(100) ** 2
        plain(x), told(x)
        grid = told.grid()
        assert isinstance(grid.positivity, Exponential)
        assert grid.gradient_scale == 0.5
        assert not list(grid.parameters())
        # exp(log(s)), rounded a few times.
        torch.testing.assert_close(grid.levels(), plain.grid().levels(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [NormalLloydMaxObserver, LloydMaxObserver])
def test_steps_cannot_be_placed_on_another_grid(kind) -> None:
    observer = kind(UNSIGNED(3), grid=UniformGrid.from_range)
    observer(torch.rand(9))
    with pytest.raises(SpecError, match="UniformGrid has no steps"):
        observer.grid()


@pytest.mark.parametrize("kind", ALL)
def test_a_calibrated_model_is_restored_without_data(kind) -> None:
    grid = StepGrid.from_range if "LloydMax" in kind.__name__ else partial(UniformGrid.from_range, learnable=True)
    recipes = (
        Recipe(QuantSpec.signed(3, granularity=PerChannel(0)), observer=kind, grid=grid),
        Recipe(UNSIGNED(4), observer=kind, grid=grid),
    )
    model = nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    twin, _ = q_core.swap(model, [Rule("1", *recipes)])
    with pytest.raises(StateError):
        twin[1].input_quantizer.grid()
    q_core.calibrate(twin, [torch.randn(4, 5), torch.randn(3, 5)], progress=False)
    fresh, _ = q_core.swap(model, [Rule("1", *recipes)])
    q_core.restore(fresh, twin.state_dict())
    x = torch.randn(6, 5)
    assert torch.equal(fresh(x), twin(x))


def test_levels_without_data_move_to_where_there_are_some() -> None:
    x = torch.linspace(0.9, 1.0, 3001)
    observer = LloydMaxObserver(UNSIGNED(3))
    observer(x)
    error = float((observer.quantizer()(x) - x).detach().square().mean())
    # Seven cells in a tenth have an error of (0.1/7)^2/12 = 1.7e-5, one cell, at the only level of either start that is
    # there, 8.3e-4. Lloyd's method finds a local optimum, and steps below 1/1000 of the mean are not allowed.
    assert error < 5e-5
