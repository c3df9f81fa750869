"""Activations clipped at a learned level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import NearestEven, NearestTowardZero, QuantSpec, RangeError, ShapeError, SpecError, UniformGrid
from q_core.testing import check_grid
from q_nulsq.peers.pact import PactGrid
from q_nulsq.positivity import Exponential, Projection, Softplus

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def gradients(grid, x, upstream, rounding=None):
    leaf = x.clone().requires_grad_()
    levels = grid.fake_quantize(leaf, rounding or NearestEven())
    return (levels.detach(), *torch.autograd.grad((levels * upstream).sum(), [leaf, *grid.parameters()]))


@settings(deadline=None, max_examples=12)
@given(bits=st.integers(1, 8), seed=seeds, wide=st.booleans(), channels=st.booleans())
def test_the_laws_hold_for_all_widths_and_both_granularities(bits, seed, wide, channels):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    alpha = torch.rand((3, 1) if channels else (1,), generator=generator, dtype=dtype) * 10 + 0.05
    check_grid(PactGrid(alpha, qmax=2**bits - 1))


@pytest.mark.parametrize("positivity", [Projection(), Softplus(), Exponential()])
def test_the_laws_hold_for_every_way_to_be_positive(positivity):
    check_grid(PactGrid(torch.tensor([6.0]), qmax=7, positivity=positivity))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, bits=st.integers(1, 8), exponent=st.integers(-10, 10), other=st.booleans())
def test_values_and_gradients_are_the_printed_ones(seed, bits, exponent, other):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    alpha = (torch.rand(2, 1, **options) + 0.1) * 2.0**exponent
    x = alpha * (torch.rand(2, 31, **options) * 2 - 0.5)
    upstream = torch.randn(2, 31, **options)
    n, y, dx = 2**bits - 1, torch.zeros_like(x), torch.zeros_like(x)
    da = torch.zeros(2, 1, dtype=torch.float64)
    for row in range(2):
        end = float(alpha[row])
        for column in range(31):
            real = float(x[row, column])
            y[row, column] = end / n * round(n * min(max(real, 0.0), end) / end)
            dx[row, column] = upstream[row, column] if 0 <= real <= end else 0.0
            da[row] += upstream[row, column] if real >= end else 0.0
    grid = PactGrid(alpha, qmax=n)
    # No two codes are a tie here, so that the roundings agree.
    found = gradients(grid, x, upstream, NearestTowardZero() if other else None)
    torch.testing.assert_close(found[0], y, rtol=1e-14, atol=0)  # two roundings more or less
    torch.testing.assert_close(found[1], dx, rtol=1e-15, atol=0)  # for the other rounding, times and over the scale
    torch.testing.assert_close(found[2], da, rtol=0, atol=1e-13)  # 31 numbers below 6 in another order


def test_what_equals_alpha_has_reached_it_and_is_inside():
    x = torch.tensor([-1.0, 0.0, 3.0, 5.999, 6.0, 6.001, 100.0])
    _, dx, alpha = gradients(PactGrid(torch.tensor([6.0]), qmax=3), x, torch.ones(7))
    torch.testing.assert_close(dx, torch.tensor([0.0, 1, 1, 1, 1, 0, 0]), **exact)
    torch.testing.assert_close(alpha, torch.tensor([3.0]), **exact)


@given(end=st.floats(0.0078125, 100, width=32), bits=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_no_element_is_lost_between_inside_and_clipped(end, bits):
    """Alpha divided by the number of steps and multiplied again may differ from alpha in the last digit."""
    grid = PactGrid(torch.tensor([end]), qmax=2**bits - 1)
    for x in (grid.levels()[0, -1:], torch.tensor([end])):
        for near in (x, x.nextafter(torch.tensor(0.0)), x.nextafter(torch.tensor(torch.inf))):
            _, dx, alpha = gradients(grid, near, torch.ones(1))
            assert float(dx) == 1 or float(alpha) == 1


def test_nothing_inside_the_range_moves_alpha():
    x = torch.rand(1000)
    *_, alpha = gradients(PactGrid(torch.tensor([1.5]), qmax=3), x, torch.randn(1000))
    torch.testing.assert_close(alpha, torch.zeros(1), **exact)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_levels_are_those_of_a_uniform_grid_to_the_last_bit(bits):
    alpha = torch.tensor([[6.0], [2.5]])
    grid = PactGrid(alpha, qmax=2**bits - 1)
    uniform = UniformGrid(alpha / grid.qmax, qmin=0, qmax=grid.qmax)
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 4
    for frozen in (uniform, grid.frozen()):
        assert type(frozen) is UniformGrid
        torch.testing.assert_close(
            grid.fake_quantize(x, NearestEven()).detach(), frozen.fake_quantize(x, NearestEven()), **exact
        )
        torch.testing.assert_close(grid.quantize(x, NearestEven()), frozen.quantize(x, NearestEven()), **exact)


def test_the_gradient_scale_multiplies_that_of_alpha_alone():
    x = torch.tensor([0.5, 7.0, 8.0])
    grid = PactGrid(torch.tensor([6.0]), qmax=3, gradient_scale=0.25)
    _, dx, alpha = gradients(grid, x, torch.ones(3))
    torch.testing.assert_close((dx, alpha), (torch.tensor([1.0, 0, 0]), torch.tensor([0.5])), **exact)


def test_a_range_gives_the_level_of_clipping():
    low, high = torch.tensor([[-0.5], [0.0]]), torch.tensor([[4.5], [0.0]])
    grid = PactGrid.from_range(QuantSpec.unsigned(2), low, high)
    torch.testing.assert_close(grid.alpha.detach(), torch.tensor([[4.5], [1.0]]), **exact)
    torch.testing.assert_close(grid.levels()[0, 0], torch.tensor([0.0, 1.5, 3.0, 4.5]), **exact)


def test_an_alpha_that_was_pushed_below_zero_comes_back():
    grid = PactGrid(torch.tensor([2.0]), qmax=3)
    with torch.no_grad():
        grid.alpha.neg_()
    assert grid.fake_quantize(torch.tensor([1.0]), NearestEven()).isfinite().all()
    grid.project()
    torch.testing.assert_close(grid.alpha.detach(), torch.tensor([0.002]), **exact)


def test_a_grid_that_does_not_learn_has_no_parameters():
    grid = PactGrid(torch.ones(1), qmax=3, learnable=False)
    assert not list(grid.parameters())
    check_grid(grid)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="PACT with codes -2 to 1: it clips activations at zero"):
        PactGrid.from_range(QuantSpec.signed(2), -torch.ones(1), torch.ones(1))
    with pytest.raises(SpecError, match="qmax must be positive"):
        PactGrid(torch.ones(1), qmax=0)
    with pytest.raises(RangeError, match="all of it would be clipped"):
        PactGrid.from_range(QuantSpec.unsigned(2), -torch.ones(1), -torch.ones(1) / 2)
    with pytest.raises(RangeError, match="alpha has 1 of 1 values"):
        PactGrid(torch.zeros(1), qmax=3)
    with pytest.raises(ShapeError, match="one alpha per tensor"):
        PactGrid(torch.tensor(1.0), qmax=3)
