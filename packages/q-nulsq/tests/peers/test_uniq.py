"""Equal steps with no level at zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import NearestEven, QuantSpec, RangeError, ShapeError, SpecError, UniformGrid
from q_core.testing import check_grid
from q_nulsq.peers.uniq import UniqGrid
from q_nulsq.positivity import Exponential, Projection, Softplus

from .loops import mid_rise, over

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)


def signed(scale, bits, **options):
    return UniqGrid(scale, qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1, **options)


@settings(deadline=None, max_examples=12)
@given(bits=st.integers(1, 8), seed=seeds, wide=st.booleans(), channels=st.booleans())
def test_the_laws_hold_for_all_widths_and_both_granularities(bits, seed, wide, channels):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    check_grid(signed(torch.rand((3, 1) if channels else (1,), generator=generator, dtype=dtype) + 0.05, bits))


@pytest.mark.parametrize("positivity", [Projection(), Softplus(), Exponential()])
def test_the_laws_hold_for_every_way_to_be_positive(positivity):
    check_grid(signed(torch.tensor([0.3]), 3, positivity=positivity))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_levels_are_symmetric_and_none_is_zero(bits):
    levels = signed(torch.tensor([0.3]), bits).levels()
    torch.testing.assert_close(levels, -levels.flip(-1), **exact)
    assert levels.shape == (1, 2**bits)
    # Next to zero lies half a step, which float32 halves exactly.
    torch.testing.assert_close(levels.abs().min(), torch.tensor(0.3) / 2, **exact)


def test_the_three_bit_grid_is_the_printed_one():
    grid = signed(torch.tensor([0.5]), 3)
    torch.testing.assert_close(grid.levels(), torch.tensor([[-7, -5, -3, -1, 1, 3, 5, 7]]) / 4, **exact)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, bits=st.integers(1, 8), exponent=st.integers(-10, 10))
def test_values_and_gradients_are_the_printed_ones(seed, bits, exponent):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    scale = (torch.rand(2, 1, **options) + 0.1) * 2.0**exponent
    x = scale * (2**bits + 2) * (torch.rand(2, 31, **options) - 0.5)
    upstream = torch.randn(2, 31, **options)
    grid, leaf = signed(scale, bits), x.clone().requires_grad_()
    levels = grid.fake_quantize(leaf, NearestEven())
    found = torch.autograd.grad((levels * upstream).sum(), [leaf, grid.scale])
    y, dx, ds, _ = over(x, lambda real, row: mid_rise(real, float(scale[row]), 2**bits))
    torch.testing.assert_close(levels.detach(), y, rtol=1e-13, atol=1e-13 * 2.0**exponent)
    torch.testing.assert_close(found[0], dx * upstream, **exact)
    # The residual is known to 255 eps of a step, 31 times over, times an upstream below 6.
    torch.testing.assert_close(found[1], (ds * upstream).sum(1, True), rtol=0, atol=2e-11)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_it_is_lsq_half_a_step_to_the_side(bits):
    # Whole numbers of 1/64 with a scale of 1/2: ties and range ends are all met and nothing is rounded.
    half = 2 ** (bits - 1)
    x = torch.arange(-32 * (half + 2), 32 * (half + 2)) / 64
    upstream = (torch.arange(len(x)).remainder(5) - 2).float()
    lsq = UniformGrid(torch.tensor([0.5]), qmin=-half, qmax=half - 1, learnable=True)
    leaf = x.clone().requires_grad_()
    shifted = lsq.fake_quantize(leaf - lsq.scale / 2, NearestEven()) + lsq.scale / 2
    expected = (shifted.detach(), *torch.autograd.grad((shifted * upstream).sum(), [leaf, lsq.scale]))
    grid, leaf = signed(torch.tensor([0.5]), bits), x.clone().requires_grad_()
    levels = grid.fake_quantize(leaf, NearestEven())
    found = (levels.detach(), *torch.autograd.grad((levels * upstream).sum(), [leaf, grid.scale]))
    torch.testing.assert_close(found, expected, **exact)


def test_real_zero_goes_up_as_the_rounding_of_the_paper_sends_it():
    for bits in (2, 3, 4, 8):
        grid = signed(torch.tensor([0.5]), bits)
        torch.testing.assert_close(grid.quantize(torch.zeros(1), NearestEven()).detach(), torch.zeros(1), **exact)
        torch.testing.assert_close(grid.fake_quantize(torch.zeros(1), NearestEven()).detach(), torch.tensor([0.25]))


def test_a_range_ends_at_the_outermost_levels():
    low, high = torch.tensor([[-0.5], [-3.5], [0.0]]), torch.tensor([[1.75], [1.0], [0.0]])
    levels = UniqGrid.from_range(QuantSpec.signed(3), low, high).levels()[:, 0]
    torch.testing.assert_close(levels[:, -1], torch.tensor([1.75, 3.5, 3.5]), **exact)  # 3.5 steps of 1 where all is 0
    torch.testing.assert_close(levels[:, 0], -levels[:, -1], **exact)
    unsigned = UniqGrid.from_range(QuantSpec.unsigned(3), low, high)
    torch.testing.assert_close(unsigned.levels()[:, 0], levels, **exact)
    assert (unsigned.qmin, unsigned.qmax, unsigned.tile_shape) == (0, 7, (3, 1))


def test_a_scale_that_was_pushed_below_zero_comes_back():
    grid = signed(torch.tensor([0.5]), 2)
    with torch.no_grad():
        grid.scale.neg_()
    grid.project()
    torch.testing.assert_close(grid.scale.detach(), torch.tensor([0.0005]), **exact)


def test_a_grid_that_does_not_learn_has_no_parameters():
    grid = signed(torch.ones(1), 2, learnable=False)
    assert not list(grid.parameters())
    check_grid(grid)


def test_the_gradient_scale_multiplies_that_of_the_scale_alone():
    x = torch.tensor([-3.0, 0.3, 9.0], requires_grad=True)
    grid = signed(torch.ones(1), 2, gradient_scale=0.25)
    found = torch.autograd.grad(grid.fake_quantize(x, NearestEven()).sum(), [x, grid.scale])
    # -1.5 and 1.5 from outside, 0.5 - 0.3 from inside, which float32 knows to 2**-24.
    torch.testing.assert_close(found, (torch.tensor([0.0, 1, 0]), torch.tensor([0.05])), rtol=0, atol=1e-7)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="codes -1 to 1: without a level at zero their number must be even"):
        UniqGrid.from_range(QuantSpec.signed(2, narrow=True), -torch.ones(1), torch.ones(1))
    with pytest.raises(RangeError, match="not positive and finite, the first is -1"):
        signed(-torch.ones(1), 2)
    with pytest.raises(ShapeError, match="at least one axis"):
        signed(torch.tensor(1.0), 2)
    with pytest.raises(RangeError, match="above high"):
        UniqGrid.from_range(QuantSpec.signed(2), torch.ones(1), torch.zeros(1))
