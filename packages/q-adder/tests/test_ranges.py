"""Ranges of inputs: the stated element of the sorted magnitudes, and how far a histogram is from it."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_adder import ExactRange, StreamingRange
from q_adder.ranges import order_statistic, released_statistic
from q_core import DataError, RangeError, SpecError, StateError

KINDS = [ExactRange, functools.partial(ExactRange, statistic=released_statistic), StreamingRange]

alphas = st.one_of(st.just(1.0), st.floats(0.9, 1), st.floats(0.001, 1))
# Few distinct values, many of them zero, as behind a rectifier; and reals.
values = st.one_of(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=60),
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60),
)
signed = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60)


def expected(magnitudes, alpha):
    """Element round(alpha (n - 1)) of the sorted list, as the supplement has it."""
    return sorted(magnitudes)[round(alpha * (len(magnitudes) - 1))]


@settings(max_examples=200)
@given(magnitudes=values, alpha=alphas)
def test_the_order_statistic_is_that_element_of_the_sorted_magnitudes(magnitudes, alpha):
    assert order_statistic(torch.tensor(magnitudes), alpha) == expected(magnitudes, alpha)


@settings(max_examples=200)
@given(magnitudes=values, alpha=alphas)
def test_the_released_statistic_is_the_element_that_the_released_code_takes(magnitudes, alpha):
    n = len(magnitudes)
    index = int((round(n * alpha) - 1) * alpha)
    # For less than one value that code would count from the end of the list, which is not what it means.
    assert released_statistic(torch.tensor(magnitudes), alpha) == sorted(magnitudes)[max(index, 0)]


@pytest.mark.parametrize("alpha", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("statistic", [order_statistic, released_statistic])
def test_of_one_value_that_value_is_kept(statistic, alpha):
    assert statistic(torch.tensor([2.5]), alpha) == 2.5


def test_the_released_code_keeps_about_the_square_of_alpha():
    magnitudes = torch.arange(100_000.0)
    assert order_statistic(magnitudes, 0.9997) == 99_969
    assert released_statistic(magnitudes, 0.9997) == 99_939
    assert abs(released_statistic(magnitudes, 0.9997) - order_statistic(magnitudes, 0.9997**2)) <= 1


@settings(max_examples=100)
@given(batches=st.lists(values, min_size=1, max_size=4), alpha=alphas)
def test_the_exact_range_is_the_largest_of_any_batch(batches, alpha):
    seen = ExactRange(alpha)
    for batch in batches:
        seen.update(torch.tensor(batch))
    assert seen.magnitude() == max(expected(batch, alpha) for batch in batches)
    assert seen.interval() == (0, seen.magnitude())
    assert (seen.low, seen.high) == (min(map(min, batches)), max(map(max, batches)))


@settings(max_examples=100)
@given(batch=signed, alpha=alphas)
def test_what_is_left_out_of_signed_inputs_is_split_between_the_ends(batch, alpha):
    seen = ExactRange(alpha)
    seen.update(torch.tensor(batch))
    half = 1 - (1 - alpha) / 2
    low, high = seen.interval()
    if min(batch) < 0:
        assert high == max(0, expected(batch, half))
        assert low == min(0, -expected([-x for x in batch], half))
    assert seen.magnitude() == expected([abs(x) for x in batch], alpha)
    assert low <= 0 <= high


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_batches_does_not_matter(kind):
    batches = [torch.randn(50) * scale for scale in (1, 3, 0.1, 0)]
    found = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        seen = kind(0.9)
        for index in order:
            seen.update(batches[index])
        found.add((seen.magnitude(), *seen.interval()))
    assert len(found) == 1


@settings(max_examples=200)
@given(
    batches=st.lists(st.one_of(values, signed), min_size=1, max_size=4), alpha=alphas, bins=st.sampled_from([8, 256])
)
def test_the_streaming_range_is_above_that_of_all_data_by_a_bin_at_most(batches, alpha, bins):
    streaming, exact = StreamingRange(alpha, bins), ExactRange(alpha)
    for batch in batches:
        streaming.update(torch.tensor(batch))
    everything = torch.tensor([x for batch in batches for x in batch])
    exact.update(everything)
    bound = streaming.error_bound()
    assert 0 <= streaming.magnitude() - exact.magnitude() <= bound
    (low, high), (exact_low, exact_high) = streaming.interval(), exact.interval()
    assert 0 <= high - exact_high <= bound
    assert 0 <= exact_low - low <= bound
    largest = float(everything.abs().max())
    assert streaming.magnitude() <= largest
    # Below 2**-120 the bins get no narrower.
    assert bound <= max(4 * largest / bins, 2.0**-119)


@settings(max_examples=50)
@given(batch=signed, alpha=alphas, cut=st.integers(0, 60))
def test_the_streaming_range_does_not_see_how_the_data_was_cut(batch, alpha, cut):
    whole, parts = StreamingRange(alpha, 64), StreamingRange(alpha, 64)
    whole.update(torch.tensor(batch))
    for part in (batch[:cut], batch[cut:]):
        parts.update(torch.tensor(part, dtype=torch.float32))
    assert (whole.magnitude(), *whole.interval()) == (parts.magnitude(), *parts.interval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_any_dtype_and_shape_are_taken(kind, dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    seen, flat = kind(0.95), kind(0.95)
    seen.update(x)
    flat.update(x.flatten().to(torch.promote_types(dtype, torch.float32)))
    assert (seen.magnitude(), *seen.interval()) == (flat.magnitude(), *flat.interval())


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0001, 2.0, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fraction_that_is_kept_is_a_fraction(kind, alpha):
    with pytest.raises(RangeError, match=rf"alpha={alpha}: the fraction of inputs that is kept must be in \(0, 1\]"):
        kind(alpha)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_finite_are_refused_and_change_nothing(kind, bad):
    seen = kind(0.9)
    seen.update(torch.rand(10))
    before = (seen.low, seen.high, seen.magnitude(), *seen.interval())
    with pytest.raises(DataError, match=r"2 of 5 inputs are not finite"):
        seen.update(torch.tensor([1.0, bad, 900.0, bad, 2.0]))
    assert before == (seen.low, seen.high, seen.magnitude(), *seen.interval())


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_nothing_is_refused(kind):
    seen = kind()
    seen.update(torch.zeros(0))
    for ask in (seen.magnitude, seen.interval):
        with pytest.raises(StateError, match="the layer saw no input"):
            ask()


@pytest.mark.parametrize("bins", [0, 1, 100, -4])
def test_a_histogram_has_a_power_of_two_of_bins(bins):
    with pytest.raises(SpecError, match=rf"bins={bins}: a streaming histogram has a power of two"):
        StreamingRange(bins=bins)


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_zeros_is_zero(kind):
    seen = kind()
    seen.update(torch.zeros(7))
    # The histogram is a bin of 2**-120 wide of the mark, at most.
    assert 0 <= seen.magnitude() <= 2.0**-119
