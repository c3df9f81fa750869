"""Weights squashed by tanh, activations clipped at 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import CodebookGrid, MinMaxObserver, NearestEven, Quantizer, QuantSpec, SpecError
from q_core.testing import check_grid
from q_nulsq.peers.dorefa import DorefaGrid, TanhNormalization, dorefa_activation

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def signed(bits):
    return DorefaGrid(qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1)


def q(r, bits):
    """The quantizer of the paper on [0, 1], for one real."""
    return round((2**bits - 1) * r) / (2**bits - 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_laws_hold(bits):
    check_grid(signed(bits))
    check_grid(dorefa_activation(QuantSpec.unsigned(bits), torch.zeros(1), torch.ones(1)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_levels_are_those_of_the_formula(bits):
    levels = signed(bits).levels()
    printed = torch.tensor([[2 * j / (2**bits - 1) - 1 for j in range(2**bits)]])
    torch.testing.assert_close(levels, printed, rtol=0, atol=1e-7)  # one rounding of a number up to 1
    torch.testing.assert_close(levels[:, [0, -1]], torch.tensor([[-1.0, 1.0]]), **exact)
    torch.testing.assert_close(levels, -levels.flip(-1), **exact)
    assert (levels != 0).all()


@settings(deadline=None, max_examples=40)
@given(seed=seeds, bits=st.integers(1, 8))
def test_a_weight_goes_where_the_formula_sends_it(seed, bits):
    w = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    largest = max(abs(math.tanh(float(each))) for each in w.flatten())
    expected = [2 * q(math.tanh(float(each)) / (2 * largest) + 0.5, bits) - 1 for each in w.flatten()]
    found = Quantizer(signed(bits), transform=TanhNormalization())(w)
    # The table is float32, so its levels are known to half a unit in the last place of a number up to 1.
    torch.testing.assert_close(found, torch.tensor(expected).double().reshape(3, 11), rtol=0, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(seed=seeds)
def test_the_transform_is_the_formula_and_its_derivative_the_numeric_one(seed):
    w = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    t = torch.tanh(w.detach())
    torch.testing.assert_close(TanhNormalization()(w).detach(), t / t.abs().max(), **exact)
    assert torch.autograd.gradcheck(TanhNormalization(), w)


@settings(deadline=None, max_examples=40)
@given(seed=seeds)
def test_the_derivative_is_the_documented_one(seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    g = torch.randn(7, generator=generator, dtype=torch.float64)
    t = TanhNormalization()(w)
    (found,) = torch.autograd.grad((t * g).sum(), w)
    with torch.no_grad():
        squashed = w.tanh()
        slope, largest, index = 1 - squashed**2, squashed.abs().max(), int(squashed.abs().argmax())
        expected = slope * g / largest
        expected[index] -= slope[index] * squashed[index].sign() * (g * t).sum() / largest
    # Sums of 7 numbers below 10, in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_equally_large_weights_share_the_gradient_of_the_maximum():
    w = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(TanhNormalization()(w)[2], w)
    slope, ratio = 1 - math.tanh(1) ** 2, math.tanh(0.5) / math.tanh(1) ** 2
    expected = [-slope * ratio / 2, slope * ratio / 2, (1 - math.tanh(0.5) ** 2) / math.tanh(1)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_rounding_alone_is_straight_through():
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    transform = TanhNormalization()
    (expected,) = torch.autograd.grad((transform(w) * g).sum(), w)
    (found,) = torch.autograd.grad((Quantizer(signed(2), transform=transform)(w) * g).sum(), w)
    # The largest weight lies on the last level to the last bit, so nothing is clipped and the two are one computation.
    torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_zeros_and_an_empty_weight_stay_what_they_are(dtype):
    for shape in ((3, 2), (0, 2)):
        w = torch.zeros(shape, dtype=dtype, requires_grad=True)
        t = TanhNormalization()(w)
        torch.testing.assert_close(t, torch.zeros(shape), **exact)
        (found,) = torch.autograd.grad(t.sum(), w)
        assert found.isfinite().all()


def test_real_zero_goes_up_as_the_rounding_of_the_paper_sends_it():
    for bits in (2, 3, 8):
        level = signed(bits).fake_quantize(torch.zeros(1), NearestEven())
        torch.testing.assert_close(level, torch.tensor([2 * q(0.5, bits) - 1]), rtol=0, atol=1e-7)  # 1 rounding


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_activations_are_clipped_to_one_and_rounded_to_equal_steps(bits):
    grid = dorefa_activation(QuantSpec.unsigned(bits), torch.tensor([-5.0]), torch.tensor([7.0]))
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).requires_grad_()
    levels = grid.fake_quantize(x, NearestEven())
    expected = torch.tensor([q(min(max(float(each), 0.0), 1.0), bits) for each in x.detach()])
    torch.testing.assert_close(levels.detach(), expected, rtol=0, atol=1e-7)  # one rounding of a number up to 1
    (found,) = torch.autograd.grad(levels.sum(), x)
    torch.testing.assert_close(found, ((x >= 0) & (x <= 1)).float(), **exact)
    assert not list(grid.parameters())


def test_a_range_changes_nothing_of_the_weights():
    grid = DorefaGrid.from_range(QuantSpec.signed(2), torch.tensor([-9.0]), torch.tensor([9.0]))
    torch.testing.assert_close(grid.levels(), torch.tensor([[-1.0, -1 / 3, 1 / 3, 1]]), **exact)
    assert not list(grid.parameters())
    assert type(grid.frozen()) is CodebookGrid


def test_an_observer_makes_it():
    observer = MinMaxObserver(QuantSpec.signed(3), (2, 1), grid=DorefaGrid.from_range)
    observer(torch.randn(2, 8))
    torch.testing.assert_close(observer.grid().levels(), signed(3).levels(), **exact)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="their number must be even"):
        DorefaGrid.from_range(QuantSpec.signed(3, narrow=True), torch.zeros(1), torch.ones(1))
    with pytest.raises(SpecError, match="DoReFa with codes -4 to 3"):
        dorefa_activation(QuantSpec.signed(3), torch.zeros(1), torch.ones(1))
