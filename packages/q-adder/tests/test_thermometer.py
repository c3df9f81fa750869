"""The identities behind integer adder layers, exact in integers; and the thermometer code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_adder.thermometer import thermometer

seeds = st.integers(0, 2**31)


def integers(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def distance(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every row of x to every row of the weight."""
    return (x.unsqueeze(1) - weight.unsqueeze(0)).abs().sum(-1)


@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.parametrize("dim", range(3))
def test_a_thermometer_is_as_many_ones_as_the_code_then_zeros(bits, dim):
    top = (1 << bits) - 1
    codes = integers(0, 0, top, 3, 4, 5).to(torch.uint8)
    out = thermometer(codes, bits, dim)
    assert out.dtype == torch.uint8
    columns = out.unflatten(dim, (top, codes.shape[dim]))
    expected = torch.stack([(codes > level).to(torch.uint8) for level in range(top)], dim)
    assert torch.equal(columns, expected)
    assert torch.equal(columns.sum(dim), codes.long())


@settings(max_examples=50)
@given(bits=st.integers(1, 4), seed=seeds)
def test_the_product_of_two_thermometers_is_the_lesser_code(bits, seed):
    top = (1 << bits) - 1
    x, weight = (integers(seed + i, 0, top, 3, 5) for i in (0, 1))
    left, right = (thermometer(codes.to(torch.uint8), bits, 1).long() for codes in (x, weight))
    lesser = torch.minimum(x.unsqueeze(1), weight).sum(-1)
    assert torch.equal(left @ right.T, lesser)
    assert torch.equal(distance(x, weight), x.sum(1, keepdim=True) + weight.sum(1) - 2 * left @ right.T)


@pytest.mark.parametrize("bits", range(1, 5))
def test_no_shorter_code_gives_the_lesser_of_two(bits):
    """The matrix min(i, j) of codes from 1 has determinant 1, so a product of fewer columns cannot be it."""
    codes = torch.arange(1, 1 << bits, dtype=torch.float64)
    # A determinant of integers below 16 by elimination: within 1e-9 of the integer 1.
    torch.testing.assert_close(torch.linalg.det(torch.minimum(codes[:, None], codes)).item(), 1.0, rtol=0, atol=1e-9)


@settings(max_examples=100)
@given(low=st.integers(-300, 0), width=st.integers(0, 300), spread=st.integers(0, 100_000), seed=seeds)
def test_the_clamp_of_weights_to_the_interval_of_the_inputs_is_lossless(low, width, spread, seed):
    """Any interval: [-r, r], [0, r] after a rectifier, [l, h]."""
    high = low + width
    x, weight = integers(seed, low, high, 6, 7), integers(seed + 1, low - spread, high + spread, 5, 7)
    clamped = weight.clamp(low, high)
    absorbed = ((low - weight).clamp(min=0) + (weight - high).clamp(min=0)).sum(1)
    assert torch.equal(distance(x, clamped) + absorbed, distance(x, weight))


@settings(max_examples=50)
@given(reach=st.integers(0, 255), beyond=st.integers(1, 100), seed=seeds)
def test_one_input_beyond_the_interval_breaks_it_by_twice_the_lesser_excess(reach, beyond, seed):
    x, weight = integers(seed, 0, reach, 1, 4), integers(seed + 1, -300, 600, 8, 4)
    x[0, 0] = reach + beyond
    clamped = weight.clamp(0, reach)
    found = distance(x, clamped) + (weight - clamped).abs().sum(1)
    excess = torch.minimum(x[0, 0] - reach, weight[:, 0] - reach).clamp(min=0)
    assert torch.equal(found - distance(x, weight), 2 * excess.unsqueeze(0))


@settings(max_examples=50)
@given(reach=st.integers(1, 255), seed=seeds)
def test_weights_outside_the_interval_are_plus_or_minus_one(reach, seed):
    """The ternary split: only weights inside need a distance, the others need a sum of inputs."""
    x, weight = integers(seed, 0, reach, 4, 9), integers(seed + 1, -2 * reach, 2 * reach, 5, 9)
    low, high = weight <= 0, weight >= reach
    inside = ~(low | high)
    interior = ((x.unsqueeze(1) - weight.unsqueeze(0)).abs() * inside).sum(-1)
    signs = low.long() - high.long()
    constant = (weight.abs() * (low | high)).sum(1)
    assert torch.equal(interior + x @ signs.T + constant, distance(x, weight))
