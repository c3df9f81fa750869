"""A-rounding against a loop written from the paper, and its laws."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from q_aquant.flips import AdjustedRounding, AdjustedVectorRounding
from q_aquant.layers import PatchConv2d
from q_core.errors import ShapeError, SpecError
from q_core.grid import UniformGrid
from q_core.quantizer import Quantizer

EXACT = {"atol": 0.0, "rtol": 0.0}
SLACK = 1e-12
"""Sums of at most 200 errors below 1 in float64: 200 * 2**-53 and some."""


def loop(u: Tensor, low: float, high: float) -> tuple[list[list[float]], list[float]]:
    """Round one window [c, k] step by step; also return the error sums of the channels after the second step."""
    window = [[min(max(value, low), high) for value in row] for row in u.tolist()]
    codes = [[float(round(value)) for value in row] for row in window]

    def error(i: int, j: int) -> float:
        return codes[i][j] - window[i][j]

    sums, candidates = [], []
    for i, row in enumerate(window):
        total = sum(error(i, j) for j in range(len(row)))
        sign = math.copysign(1.0, total)
        flips = round(abs(total))
        able = [j for j in range(len(row)) if error(i, j) * sign > 0]
        order = sorted(able, key=lambda j: -abs(error(i, j)))  # stable: equal errors in the order of positions
        for j in order[:flips]:
            codes[i][j] -= sign
        sums.append(sum(error(i, j) for j in range(len(row))))
        if total == 0:
            continue
        if flips >= abs(total):
            candidates.append((i, order[flips - 1], sign))
        else:
            candidates.append((i, order[flips], -sign))
    whole = sum(sums)
    helpful = [(i, j, step) for i, j, step in candidates if step * whole < 0]
    helpful.sort(key=lambda candidate: -abs(error(candidate[0], candidate[1])))
    for i, j, step in helpful[: round(abs(whole))]:
        codes[i][j] += step
    return codes, sums


def by_loop(u: Tensor, low: float, high: float) -> Tensor:
    windows = u.permute(0, 3, 1, 2).flatten(0, 1)
    codes = torch.tensor([loop(window, low, high)[0] for window in windows], dtype=u.dtype)
    return codes.unflatten(0, (u.shape[0], u.shape[3])).permute(0, 2, 3, 1)


@st.composite
def patches(draw: st.DrawFn) -> tuple[Tensor, float, float]:
    shape = [draw(st.integers(1, most)) for most in (3, 9, 12, 4)]
    low = draw(st.sampled_from([0.0, -2.0, -8.0]))
    high = low + draw(st.sampled_from([1, 3, 15]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["spread", "beyond", "dyadic", "one side", "half"]))
    if kind == "half":
        return torch.floor(u * (high - low)) + low + 0.5, low, high
    if kind == "one side":  # every error of one sign: as many flips as there can be
        return torch.floor(u * (high - low)) + low + 0.5 - 0.1 * u.frac(), low, high
    if kind == "dyadic":  # sums without rounding, so that ties are ties for everybody
        return torch.round(u * (high - low) * 16) / 16 + low, low, high
    margin = 2.0 if kind == "beyond" else 0.0
    return u * (high - low + 2 * margin) + low - margin, low, high


@hypothesis.settings(max_examples=100)
@hypothesis.given(patches())
def test_equals_a_loop_written_from_the_paper(case: tuple[Tensor, float, float]) -> None:
    u, low, high = case
    torch.testing.assert_close(AdjustedRounding(low=low, high=high)(u), by_loop(u, low, high), **EXACT)


@hypothesis.settings(max_examples=100)
@hypothesis.given(patches())
def test_errors_of_a_channel_sum_to_one_at_most_and_those_of_a_window_to_one_half(
    case: tuple[Tensor, float, float],
) -> None:
    u, low, high = case
    error = AdjustedRounding(low=low, high=high)(u) - u.clamp(low, high)
    assert error.sum(2).abs().max() <= 1 + SLACK
    assert error.sum((1, 2)).abs().max() <= 0.5 + SLACK


@hypothesis.given(patches())
def test_errors_of_a_channel_alone_sum_to_one_half_at_most(case: tuple[Tensor, float, float]) -> None:
    u, low, high = case
    alone = u.flatten(0, 1).unsqueeze(1)
    error = AdjustedRounding(low=low, high=high)(alone) - alone.clamp(low, high)
    assert error.sum(2).abs().max() <= 0.5 + SLACK


@hypothesis.given(patches())
def test_the_window_changes_each_channel_by_one_flip_at_most(case: tuple[Tensor, float, float]) -> None:
    u, low, high = case
    rounding = AdjustedRounding(low=low, high=high)
    apart = rounding(u.flatten(0, 1).unsqueeze(1)).reshape(u.shape)
    assert (rounding(u) - apart).abs().sum(2).max() <= 1


@hypothesis.given(patches())
def test_every_code_is_a_neighbour_in_the_range_and_levels_stay(case: tuple[Tensor, float, float]) -> None:
    u, low, high = case
    codes, bounded = AdjustedRounding(low=low, high=high)(u), u.clamp(low, high)
    assert codes.min() >= low
    assert codes.max() <= high
    assert bool((codes == codes.round()).all())
    assert (codes - bounded).abs().max() < 1
    level = bounded == bounded.round()
    torch.testing.assert_close(codes[level], bounded[level], **EXACT)


@hypothesis.given(patches(), st.integers(0, 2**31))
def test_order_of_channels_and_positions_does_not_matter_without_ties(
    case: tuple[Tensor, float, float], seed: int
) -> None:
    shape, low, high = case[0].shape, case[1], case[2]
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    channels = torch.randperm(shape[1], generator=generator)
    positions = torch.randperm(shape[2], generator=generator)
    rounding = AdjustedRounding(low=low, high=high)
    moved = rounding(u[:, channels][:, :, positions])
    torch.testing.assert_close(moved, rounding(u)[:, channels][:, :, positions], **EXACT)


@hypothesis.given(patches())
def test_a_linear_layer_is_a_window_of_one_position(case: tuple[Tensor, float, float]) -> None:
    u, low, high = case
    vectors = u.flatten(2).transpose(1, 2)  # [n, vectors, features]
    expected = AdjustedRounding(low=low, high=high)(vectors.flatten(0, 1)[:, :, None, None])
    found = AdjustedVectorRounding(low=low, high=high)(vectors)
    torch.testing.assert_close(found, expected.reshape(vectors.shape), **EXACT)


def test_one_position_flips_only_for_the_sum_of_the_window() -> None:
    u = torch.tensor([0.4, 0.3, 0.45, 1.2, 2.0]).reshape(1, 5, 1, 1)  # errors -0.4 -0.3 -0.45 -0.2 0: -1.35, one flip
    codes = AdjustedRounding(low=0.0, high=3.0)(u)
    torch.testing.assert_close(codes.flatten(), torch.tensor([0.0, 0, 1, 1, 2]), **EXACT)


def test_an_overshot_channel_takes_its_last_flip_back() -> None:
    # Channel 0: errors -0.45 -0.4 0.15 0: -0.7, one flip up leaves 0.3. Channel 1: errors 0.4 and 0: no flip, 0.4.
    # Together 0.7: one flip down. Taking back the flip of channel 0 (distance 0.55) costs less than that of channel 1.
    u = torch.tensor([[0.45, 0.4, 0.85, 1.0], [1.6, 1.0, 1.0, 1.0]]).reshape(1, 2, 4, 1)
    codes = AdjustedRounding(low=0.0, high=3.0)(u)
    torch.testing.assert_close(codes.reshape(2, 4), torch.tensor([[0.0, 0, 1, 1], [2, 1, 1, 1]]), **EXACT)


def test_a_channel_that_flips_made_exact_may_take_its_last_flip_back() -> None:
    # Channel 0: errors 0.375 0.375 0.25: 1, one flip down leaves 0. Channels 1 and 2: -0.375 each. Together -0.75: one
    # flip up, and channel 0 has the candidate with the largest error, 0.625.
    u = torch.tensor([[1.625, 1.625, 1.75], [0.375, 1, 1], [0.375, 1, 1]]).reshape(1, 3, 3, 1)
    codes = AdjustedRounding(low=0.0, high=3.0)(u)
    torch.testing.assert_close(codes.reshape(3, 3), torch.tensor([[2.0, 2, 2], [0, 1, 1], [0, 1, 1]]), **EXACT)
    torch.testing.assert_close(codes, by_loop(u, 0.0, 3.0), **EXACT)


def test_many_positions_are_ranked_beyond_eight_bits() -> None:
    u = torch.full((1, 1, 300, 1), 0.49)  # 147 of 300 go up
    codes = AdjustedRounding(low=0.0, high=3.0)(u)
    torch.testing.assert_close(codes.sum(), torch.tensor(147.0), **EXACT)
    torch.testing.assert_close(codes[0, 0, :147, 0], torch.ones(147), **EXACT)


def test_gradient_is_one_inside() -> None:
    u = (torch.rand(2, 3, 9, 5) * 3).requires_grad_()
    weight = torch.randn(2, 3, 9, 5)
    (AdjustedRounding(low=0.0, high=3.0)(u) * weight).sum().backward()
    torch.testing.assert_close(u.grad, weight, **EXACT)
    rows = (torch.rand(4, 7) * 3).requires_grad_()
    AdjustedVectorRounding(low=0.0, high=3.0)(rows).sum().backward()
    torch.testing.assert_close(rows.grad, torch.ones(4, 7), **EXACT)


@pytest.mark.parametrize("zero_point", [None, 5.0])
def test_a_convolution_with_it_keeps_the_sum_of_each_window_to_half_a_step(zero_point: float | None) -> None:
    layer = PatchConv2d(3, 1, 3, padding=1, stride=2, bias=False)
    nn.init.ones_(layer.weight)
    zero = 0.0 if zero_point is None else zero_point
    scale = torch.full((1, 1, 1, 1), 0.25)
    grid = UniformGrid(scale, None if zero_point is None else torch.full_like(scale, zero), qmin=0, qmax=15)
    layer.patch_quantizer = Quantizer(grid, AdjustedRounding(low=-zero, high=15 - zero))
    x = (torch.rand(3, 3, 7, 6) * 15 - zero) * 0.25
    plain = nn.functional.conv2d(x, layer.weight, padding=1, stride=2)
    with torch.no_grad():
        # 27 products of magnitude below 4 in float32: 27 * 4 * 2**-24 and a scale that is a power of two.
        assert (layer(x) - plain).abs().max() <= 0.125 + 1e-5


def test_images_do_not_depend_on_one_another() -> None:
    u = torch.rand(5, 4, 9, 6) * 3
    rounding = AdjustedRounding(low=0.0, high=3.0)
    torch.testing.assert_close(torch.cat([rounding(part) for part in u.split(2)]), rounding(u), **EXACT)


def test_nothing_is_rounded_of_nothing() -> None:
    assert AdjustedRounding(low=0.0, high=3.0)(torch.zeros(0, 4, 9, 6)).shape == (0, 4, 9, 6)
    assert AdjustedVectorRounding(low=0.0, high=3.0)(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("kind", [AdjustedRounding, AdjustedVectorRounding])
def test_a_range_that_is_none_is_refused(kind: type[AdjustedRounding | AdjustedVectorRounding]) -> None:
    with pytest.raises(SpecError, match="low must be below high"):
        kind(low=3.0, high=3.0)
    with pytest.raises(SpecError, match="integers"):
        kind(low=0.5, high=3.0)


def test_other_axes_are_refused() -> None:
    with pytest.raises(ShapeError, match="AdjustedVectorRounding"):
        AdjustedRounding(low=0.0, high=3.0)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="last axis"):
        AdjustedVectorRounding(low=0.0, high=3.0)(torch.zeros(()))
