"""Histograms and order statistics against values counted by hand."""

import dataclasses
from fractions import Fraction

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from q_adder import adder2d
from q_adder.analysis import quantile_sweep, redistribution_histograms
from q_adder.ranges import quantile_index, released_quantile_index
from q_core import DataError, RangeError

SETTINGS = hypothesis.settings(deadline=None, max_examples=60)


def counted(values: torch.Tensor, ends: tuple[float, float], qmin: int, bits: int) -> list[int]:
    """Round each value on its own, in exact arithmetic, and count."""
    last = 2**bits - 1
    scale = (Fraction(ends[1]) - Fraction(ends[0])) / last
    codes = [min(max(round(Fraction(value) / scale), qmin), qmin + last) for value in values.flatten().tolist()]
    return [codes.count(code) for code in range(qmin, qmin + 2**bits)]


def test_a_layer_counted_by_hand():
    weight = torch.tensor([[-6.0, 0.0, 1.0], [2.0, 3.0, 9.0]])
    inputs = torch.tensor([0.0, 1.0, 1.0, 2.0, 4.0])
    found = redistribution_histograms(weight, inputs, low=0.0, high=3.0, bits=2, bins=3)
    after = found.redistributed
    assert (after.weight.qmin, after.weight.codes.tolist(), after.input.codes.tolist()) == (
        0,
        [2, 1, 1, 2],
        [1, 2, 1, 1],
    )
    assert after.weight.edges.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert (after.weight.counts.tolist(), after.input.counts.tolist()) == ([2, 1, 3], [1, 2, 2])
    assert (after.weight.occupied, after.weight.unused) == (4, 0.0)
    # -6 and 9 of the weights lie outside, 4 of the inputs; 3 lies on the end.
    assert (after.weight.clamped, after.input.clamped) == (2 / 6, 1 / 5)
    assert found.bias.tolist() == [-6.0, -6.0]
    assert torch.equal(found.narrow.weight.codes, after.weight.codes)
    # One range of [-9, 9]: a scale of 6, codes -2 to 1, zero among them; 3 is a tie between 0 and 1, and 0 is even.
    assert (found.wide.weight.qmin, found.wide.weight.codes.tolist()) == (-2, [0, 1, 4, 1])
    assert (found.wide.input.codes.tolist(), found.wide.input.unused) == ([0, 0, 4, 1], 0.5)
    assert (found.wide.weight.clamped, found.wide.input.clamped) == (0.0, 0.0)
    # Own ranges: [-6, 9] with a scale of 5, and [0, 4] with a scale of 4/3.
    assert (found.separate.weight.qmin, found.separate.weight.codes.tolist()) == (-1, [1, 3, 1, 1])
    assert (found.separate.input.qmin, found.separate.input.codes.tolist()) == (0, [1, 2, 1, 1])
    assert found.separate.weight.edges.tolist() == [-6.0, -1.0, 4.0, 9.0]


@SETTINGS
@hypothesis.given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    spread=st.floats(0.1, 30),
    ends=st.sampled_from([(0.0, 1.75), (-2.25, 2.25), (-0.375, 3.125), (0.625, 2.0)]),  # exact: -2.25 is a tie
)
def test_counts_are_complete_and_codes_are_those_of_single_values(seed, bits, spread, ends):
    generator = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=generator)
    inputs = torch.randn(2, 3, 4, 3, dtype=torch.float64, generator=generator)
    low, high = ends
    found = redistribution_histograms(weight, inputs, low=low, high=high, bits=bits, bins=17)
    for stage in (found.separate, found.wide, found.narrow, found.redistributed):
        for use, values in ((stage.weight, weight), (stage.input, inputs)):
            assert int(use.counts.sum()) == int(use.codes.sum()) == values.numel()
            assert (len(use.codes), len(use.edges)) == (2**bits, 18)
            assert use.occupied == sum(count > 0 for count in use.codes.tolist())
            assert (
                use.clamped
                == sum(not use.low <= value <= use.high for value in values.flatten().tolist()) / values.numel()
            )
    after = found.redistributed
    assert after.weight.codes.tolist() == counted(weight.clamp(low, high), (low, high), after.weight.qmin, bits)
    assert after.input.codes.tolist() == counted(inputs.clamp(low, high), (low, high), after.input.qmin, bits)


@SETTINGS
@hypothesis.given(high=st.floats(2**-10, 2**10, width=32))
def test_a_symmetric_range_of_four_bits_has_the_codes_of_the_paper(high):
    ends = torch.tensor([[-high, 0.0, high]], dtype=torch.float64)
    found = redistribution_histograms(ends, ends, low=-high, high=high)
    # -7.5 and 7.5 are ties: the even neighbours are -8 and 8, and 8 is beyond the last code.
    assert found.redistributed.weight.qmin == -8
    assert found.redistributed.weight.codes.nonzero().flatten().tolist() == [0, 8, 15]


@SETTINGS
@hypothesis.given(seed=st.integers(0, 2**31), ends=st.sampled_from([(0.0, 1.5), (-1.5, 1.5), (-0.5, 2.0)]))
def test_the_bias_is_what_the_lossless_clamp_owes(seed, ends):
    generator = torch.Generator().manual_seed(seed)
    low, high = ends
    weight = 4 * torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator)
    x = low + (high - low) * torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=generator)
    found = redistribution_histograms(weight, x, low=low, high=high)
    clamped = adder2d(x, weight.clamp(low, high), found.bias, padding=1)
    # Sums of 18 differences below 30: errors of 2^-53 relative to some 500.
    # Sums of float64 below a few thousand: some units in the last place.
    torch.testing.assert_close(clamped, adder2d(x, weight, padding=1), atol=1e-12, rtol=0)


def test_wide_weights_waste_the_codes_of_the_activations():
    weight, inputs = torch.linspace(-50, 50, 400).reshape(4, 100), torch.linspace(0, 2, 1000)
    found = redistribution_histograms(weight, inputs, low=0.0, high=2.0)
    assert found.separate.input.occupied == found.redistributed.input.occupied == 16
    assert found.wide.input.occupied == 1
    assert found.wide.input.unused == 15 / 16
    assert 0.97 < found.narrow.weight.clamped < 0.99


def test_a_constant_tensor_takes_one_code():
    zeros = redistribution_histograms(torch.zeros(2, 3), torch.zeros(4), low=0.0, high=1.0, bits=3)
    for stage in (zeros.separate, zeros.wide, zeros.narrow, zeros.redistributed):
        assert (stage.weight.occupied, stage.input.occupied) == (1, 1)
    assert zeros.bias.tolist() == [0.0, 0.0]


def test_narrow_dtypes_are_counted_as_the_values_they_hold():
    weight, inputs = torch.randn(4, 9).to(torch.bfloat16), torch.rand(50).to(torch.float16)
    found = redistribution_histograms(weight, inputs, low=0.0, high=0.7)
    wide = redistribution_histograms(weight.double(), inputs.double(), low=0.0, high=0.7)
    assert torch.equal(found.redistributed.weight.codes, wide.redistributed.weight.codes)
    assert torch.equal(found.wide.input.counts, wide.wide.input.counts)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"low": 1.0, "high": 1.0}, RangeError, "low=1.0, high=1.0: the range must be finite"),
        ({"high": float("inf")}, RangeError, "high=inf"),
        ({"bits": 9}, RangeError, "bits=9: supported are 1 to 8"),
        ({"bins": 0}, RangeError, "bins=0"),
        ({"inputs": torch.zeros(0)}, DataError, r"inputs of shape \(0,\) holds no values"),
        ({"weight": torch.tensor([[1.0, float("nan")]])}, DataError, "1 of 2 weight are NaN or infinite"),
    ],
)
def test_histograms_of_what_is_no_distribution_are_refused(options, error, words):
    given = {"weight": torch.ones(2, 2), "inputs": torch.ones(3), "low": 0.0, "high": 1.0}
    with pytest.raises(error, match=words):
        redistribution_histograms(**(given | options))


# Order statistics ------------------------------------------------------------------------------------------------


def test_order_statistics_of_a_thousand_values_by_hand():
    values = torch.arange(-1000.0, 0.0)[torch.randperm(1000)]  # magnitudes 1 to 1000: the one at index i is i + 1
    low, middle, all_of_them = quantile_sweep(values, [0.5, 0.99, 1.0])
    # 0.5 * 999 = 499.5 is a tie, and 500 is even; released: (500 - 1) * 0.5 = 249.5, cut to 249.
    assert dataclasses.astuple(low) == (0.5, 501.0, 0.499, 250.0, 0.75)
    # 0.99 * 999 = 989.01; released: (990 - 1) * 0.99 = 979.11.
    assert dataclasses.astuple(middle) == (0.99, 990.0, 0.01, 980.0, 0.02)
    assert dataclasses.astuple(all_of_them) == (1.0, 1000.0, 0.0, 1000.0, 0.0)


@SETTINGS
@hypothesis.given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200),
    alphas=st.lists(st.floats(0, 1, exclude_min=True), max_size=5),
)
def test_each_entry_is_the_order_statistic_of_its_formula(values, alphas):
    ascending, n = sorted(map(abs, values)), len(values)
    entries = quantile_sweep(torch.tensor(values, dtype=torch.float32), iter(alphas))
    assert [entry.alpha for entry in entries] == alphas
    for entry in entries:
        assert entry.range == ascending[round(entry.alpha * (n - 1))]
        assert entry.released_range == ascending[int((round(n * entry.alpha) - 1) * entry.alpha)]
        assert entry.clipped == sum(value > entry.range for value in ascending) / n
        assert entry.released_clipped == sum(value > entry.released_range for value in ascending) / n
        assert entry.released_range <= entry.range


def test_the_released_code_applies_alpha_twice():
    n = 10**7
    assert quantile_index(n, 0.9997) == 9_996_999
    assert abs(released_quantile_index(n, 0.9997) - 0.9997**2 * n) < 2


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0000001, float("nan")])
def test_alpha_outside_its_interval_is_refused(alpha):
    with pytest.raises(RangeError, match=f"alpha={alpha}: it must be above 0 and at most 1"):
        quantile_sweep(torch.ones(3), [0.5, alpha])
    with pytest.raises(RangeError, match="alpha="):
        released_quantile_index(3, alpha)


def test_order_statistics_of_nothing_and_of_nan_are_refused():
    with pytest.raises(DataError, match=r"values of shape \(2, 0\) holds no values"):
        quantile_sweep(torch.zeros(2, 0), [0.5])
    with pytest.raises(DataError, match="no values to take an order statistic of"):
        quantile_index(0, 0.5)
    with pytest.raises(DataError, match="2 of 3 values are NaN or infinite"):
        quantile_sweep(torch.tensor([float("nan"), 1.0, float("-inf")]), [0.5])
