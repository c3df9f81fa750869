"""Weights brought to a common size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core import RangeError, SpecError
from q_nulsq.peers.normalization import MeanMagnitude, WeightNormalization

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def weight(seed, shape=(3, 5, 2), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.3 + 0.1


def test_the_mean_becomes_zero_and_the_deviation_one():
    normal = WeightNormalization(epsilon=1e-12)(weight(0))
    # 30 numbers of size 1 in float64, and an epsilon of 1e-12 beside a deviation of 0.3.
    torch.testing.assert_close(normal.mean(), torch.zeros(()).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(normal.std(), torch.ones(()).double(), rtol=0, atol=1e-11)


@given(seed=seeds)
def test_held_constant_the_statistics_leave_a_plain_quotient(seed):
    x, upstream = weight(seed).requires_grad_(), weight(seed + 1)
    module = WeightNormalization()
    (found,) = torch.autograd.grad(module(x), x, upstream)
    torch.testing.assert_close(found, upstream / (x.detach().std() + 1e-5), rtol=1e-15, atol=0)


@given(seed=seeds)
def test_through_the_statistics_the_gradient_is_that_of_the_formula(seed):
    x, upstream = weight(seed).requires_grad_(), weight(seed + 1)
    module = WeightNormalization(through_statistics=True)
    (found,) = torch.autograd.grad(module(x), x, upstream)
    mean, deviation = x.detach().mean(), x.detach().std()
    # d deviation / dx = (x - mean) / ((n - 1) deviation)
    normal = (x.detach() - mean) / (deviation + 1e-5)
    slope = (x.detach() - mean) / ((x.numel() - 1) * deviation)
    expected = (upstream - upstream.mean() - slope * (upstream * normal).sum()) / (deviation + 1e-5)
    # Sums of 30 terms of size 1 over 0.3, each rounded to 1e-16.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum(), torch.zeros(()).double(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("module", [WeightNormalization(), MeanMagnitude(3)])
def test_restored_weights_have_their_size_again(module):
    x = weight(0)
    restored = module.restore(module(x), x)
    lost = x.mean() if isinstance(module, WeightNormalization) else 0.0
    # One quotient and one product.
    torch.testing.assert_close(restored, x - lost, rtol=5e-16, atol=1e-16)


def test_equal_elements_and_one_element_become_zero():
    for shape in ((4, 3), (1,), (1, 1, 1)):
        normal = WeightNormalization()(torch.full(shape, 0.75))
        torch.testing.assert_close(normal, torch.zeros(shape), **exact)  # sums of 3/4 are exact


def test_the_mean_magnitude_is_taken_for_each_channel():
    x = weight(1, (3, 4, 2, 2))
    x[1] = 0
    found = MeanMagnitude(2)(x)
    # (2^2 - 1) / 2^(2 - 1) = 3/2
    for channel in (0, 2):
        torch.testing.assert_close(found[channel], x[channel] / (1.5 * x[channel].abs().mean()), rtol=4e-16, atol=0)
    torch.testing.assert_close(found[1], torch.zeros(4, 2, 2).double(), **exact)


@given(seed=seeds)
def test_the_mean_magnitude_may_have_a_gradient(seed):
    x, upstream = weight(seed, (2, 7)).requires_grad_(), weight(seed + 1, (2, 7))
    (held,) = torch.autograd.grad(MeanMagnitude(3)(x), x, upstream)
    (through,) = torch.autograd.grad(MeanMagnitude(3, through_statistics=True)(x), x, upstream)
    divisor = 7 / 4 * x.detach().abs().mean(1, keepdim=True)
    torch.testing.assert_close(held, upstream / divisor, rtol=1e-15, atol=0)
    # d divisor / dx = 7/4 sign(x) / n
    inner = (upstream * x.detach() / divisor**2).sum(1, keepdim=True)
    # Sums of 7 terms of size 1/divisor**2, which is below 1e4 here; each is rounded to 1e-16 of it.
    torch.testing.assert_close(
        through, upstream / divisor - inner * 7 / 4 * x.detach().sign() / 7, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("module", [WeightNormalization(), MeanMagnitude(3)])
def test_narrow_weights_are_normalised_in_float32(module):
    x = weight(2, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x), module(x.float()), **exact)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(RangeError, match="epsilon=0"):
        WeightNormalization(epsilon=0.0)
    for bits in (0, 9):
        with pytest.raises(SpecError, match=f"bits={bits}: supported are 1 to 8"):
            MeanMagnitude(bits)
