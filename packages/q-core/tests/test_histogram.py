"""The streaming histogram counts what the loop counts, however the stream is cut and however far it spreads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core.histogram import StreamingHistogram

EXACT = {"rtol": 0, "atol": 0}
# Zeros of both signs, small whole numbers, which lie on edges of bins, and reals of very different sizes.
sizes = st.floats(2.0**-60, 2.0**60, width=32)
reals = st.one_of(st.sampled_from([0.0, -0.0]), st.integers(-70, 70).map(float), sizes, sizes.map(lambda x: -x))
streams = st.lists(reals, min_size=1, max_size=30)


def _update(histogram, rows):
    histogram.update(rows, rows.abs().amax(1, keepdim=True))


def _count(values, bins=32, dtype=torch.float32):
    histogram = StreamingHistogram(1, bins)
    _update(histogram, torch.tensor([values], dtype=dtype))
    return histogram


def _assert_equal(actual, expected):
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(values=streams, bins=st.sampled_from([16, 64, 2048]))
def test_counts_are_those_of_the_loop(oracles, dtype, values, bins):
    histogram = _count(values, bins, dtype)
    width, counts = oracles.histogram(values, bins)
    torch.testing.assert_close(histogram.width().item(), width, **EXACT)
    expected = torch.zeros(1, bins, dtype=torch.int64)
    for number, count in counts.items():
        expected[0, number + bins // 2] = count
    torch.testing.assert_close(histogram.counts, expected, **EXACT)


@given(values=streams, data=st.data())
def test_only_the_multiset_of_values_matters(values, data):
    shuffled = data.draw(st.permutations(values))
    histogram, start = StreamingHistogram(1, 32), 0
    while start < len(shuffled):
        size = data.draw(st.integers(1, len(shuffled) - start))
        _update(histogram, torch.tensor([shuffled[start : start + size]]))
        start += size
    _assert_equal(histogram, _count(values))


@given(first=streams, second=streams)
def test_rows_are_kept_apart(first, second):
    length = min(len(first), len(second))
    both = StreamingHistogram(2, 64)
    _update(both, torch.tensor([first[:length], second[:length]]))
    for row, values in enumerate((first[:length], second[:length])):
        alone = _count(values, 64)
        torch.testing.assert_close(both.counts[row], alone.counts[0], **EXACT)
        torch.testing.assert_close(both.exponent[row], alone.exponent[0], **EXACT)


@given(values=streams, bins=st.sampled_from([16, 2048]))
def test_a_bin_is_at_most_four_in_bins_of_the_largest_value_wide(values, bins):
    """The power of two above the largest is less than twice it, and half of the bins cover it."""
    largest = max(abs(value) for value in values)
    histogram = _count(values, bins)
    if largest >= 2.0**-100:
        assert float(histogram.width()) <= 4 * largest / bins
    assert int(histogram.counts.sum()) == len(values)


@given(values=streams)
def test_occupied_lists_what_the_counts_hold(values):
    histogram = StreamingHistogram(2, 64)
    _update(histogram, torch.tensor([values, [0.0] * len(values)]))
    middle, counts = histogram.occupied()
    assert middle.shape == counts.shape == (2, int(histogram.counts.count_nonzero(1).max()))
    for row in range(2):
        used = histogram.counts[row].nonzero().flatten()
        held = counts[row] > 0
        torch.testing.assert_close(counts[row][held].long(), histogram.counts[row][used], **EXACT)
        centers = middle[row][held].double() * histogram.width()[row]
        torch.testing.assert_close(centers, histogram.centers()[row][used], **EXACT)


def test_values_that_grow_from_batch_to_batch_are_merged_exactly():
    values = [(-1.7) ** k * 1e-9 for k in range(120)]
    histogram = StreamingHistogram(1, 128)
    for value in values:
        _update(histogram, torch.tensor([[value]]))
    _assert_equal(histogram, _count(values, 128))


@pytest.mark.parametrize("extreme", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_the_smallest_and_the_largest_floats_are_counted(extreme):
    histogram = _count([extreme, -extreme, 0.0], 64)
    assert int(histogram.counts.sum()) == 3
    assert int(histogram.counts[:, :32].sum()) == 1  # below zero
    used = histogram.counts[0].nonzero().flatten()
    held = histogram.centers()[0, used]
    # 1e-45 and 1e-38 lie inside the bins that touch zero, which are 2**-120 wide.
    assert float(held.abs().max()) <= extreme + float(histogram.width())


def test_float64_beyond_float32_is_counted():
    histogram = _count([1e300, -1e-300], 64, torch.float64)
    assert int(histogram.counts.sum()) == 2
    assert float(histogram.centers()[0, histogram.counts[0].nonzero().max()]) == pytest.approx(1e300, rel=2 / 32)


def test_a_power_of_two_opens_the_bin_above_it():
    """Bins hold their left edge: 8 needs bins up to 16, and -8 lies on the left edge of its bin."""
    histogram = _count([8.0, -8.0], 16)
    torch.testing.assert_close(histogram.width().item(), 2.0, **EXACT)
    torch.testing.assert_close(histogram.counts.nonzero()[:, 1], torch.tensor([8 - 4, 8 + 4]), **EXACT)


def test_zero_of_either_sign_opens_the_upper_half():
    assert int(_count([0.0, -0.0], 16).counts[0, 8]) == 2


def test_a_row_with_a_nonfinite_value_is_left_out_and_the_others_are_not():
    for value in (torch.nan, torch.inf, -torch.inf):
        histogram = StreamingHistogram(2, 16)
        _update(histogram, torch.tensor([[1.0, value, 2.0], [1.0, 2.0, 3.0]]))
        torch.testing.assert_close(histogram.counts.sum(1), torch.tensor([0, 3]), **EXACT)


def test_counts_are_exact_beyond_the_whole_numbers_of_float32():
    histogram = StreamingHistogram(1, 16)
    histogram.counts[0, 8] = 2**24
    _update(histogram, torch.zeros(1, 1))
    assert int(histogram.counts[0, 8]) == 2**24 + 1


@pytest.mark.parametrize("tiles", [1, 3])
def test_many_values_are_counted_in_pieces(tiles):
    rows = torch.randn(tiles, 300_001)
    histogram = StreamingHistogram(tiles, 64)
    _update(histogram, rows)
    torch.testing.assert_close(histogram.counts.sum(1), torch.full((tiles,), 300_001), **EXACT)
    for row in range(tiles):
        index = torch.floor(rows[row] / histogram.width()[row].float()).long() + 32
        torch.testing.assert_close(histogram.counts[row], index.bincount(minlength=64), **EXACT)


def test_the_state_has_a_fixed_size():
    histogram = StreamingHistogram(3, 32)
    before = {name: tensor.shape for name, tensor in histogram.state_dict().items()}
    for power in range(-20, 20):
        _update(histogram, torch.full((3, 5), 2.0**power))
    assert {name: tensor.shape for name, tensor in histogram.state_dict().items()} == before
