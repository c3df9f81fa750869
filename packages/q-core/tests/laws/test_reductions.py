"""Each part at a neutral setting is its parent, and the learnable uniform grid is LSQ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core import (
    CodebookGrid,
    NearestEven,
    NearestTowardZero,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    QuantSpec,
    Stochastic,
    UniformGrid,
)

seeds = st.integers(0, 2**31)
EXACT = {"rtol": 0, "atol": 0}


def _data(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _over_range(x, granularity, bits=4):
    """A grid over the extremes of each tile, made without the helpers of the package."""
    spec = QuantSpec.signed(bits, symmetric=False, granularity=granularity)
    shape = granularity.scale_shape(tuple(x.shape))
    sizes = [size // tiles for size, tiles in zip(x.shape, shape, strict=True)]
    low, high = x, x
    for axis, size in enumerate(sizes):
        low = torch.stack([part.amin(axis) for part in low.split(size, axis)], axis)
        high = torch.stack([part.amax(axis) for part in high.split(size, axis)], axis)
    return UniformGrid.from_range(spec, low, high)


@given(seed=seeds, bits=st.integers(2, 8))
def test_a_codebook_of_equal_steps_is_the_uniform_grid_off_ties(seed, bits):
    uniform = UniformGrid(torch.tensor([0.25]), qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1)
    table = CodebookGrid(
        torch.linspace(uniform.qmin * 0.25, uniform.qmax * 0.25, 2**bits).reshape(1, -1), qmin=uniform.qmin
    )
    x = _data(seed, 9, 7) * 2 ** (bits - 3)
    u = x / 0.25
    clear = ((u - u.floor()) - 0.5).abs() > 1e-9
    for quantizer in (Quantizer(uniform), Quantizer(table)):
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        y.sum().backward()
        torch.testing.assert_close(y[clear], Quantizer(uniform)(x)[clear], **EXACT)
        # The ends in the table are exact in float32, so both grids agree on what lies outside.
        inside = (x >= uniform.qmin * 0.25) & (x <= uniform.qmax * 0.25)
        # The slope is a width divided by itself: one rounding.
        torch.testing.assert_close(leaf.grad, inside.double(), rtol=2.3e-16, atol=0)


@given(seed=seeds, bits=st.integers(2, 8))
def test_a_codebook_of_equal_steps_has_the_ties_of_the_uniform_grid_too(seed, bits):
    """A level is real zero here, so both count codes from the same place; half steps are exact."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    uniform = UniformGrid(torch.tensor([0.5]), qmin=low, qmax=high)
    table = CodebookGrid((torch.arange(low, high + 1) * 0.5).reshape(1, -1), qmin=low)
    ties = (torch.arange(low, high, dtype=torch.float64) + 0.5) * 0.5
    for rounding in (NearestEven(), NearestTowardZero()):
        torch.testing.assert_close(table.quantize(ties, rounding), uniform.quantize(ties, rounding), **EXACT)


@pytest.mark.parametrize("granularity", [PerGroup(63), PerBlock((1, 63)), PerBlock((1,))])
@given(seed=seeds)
def test_groups_as_long_as_a_row_are_channels(granularity, seed):
    x = _data(seed, 5, 63)
    assert granularity.scale_shape((5, 63)) == PerChannel(0).scale_shape((5, 63))
    groups, channels = Quantizer(_over_range(x, granularity)), Quantizer(_over_range(x, PerChannel(0)))
    torch.testing.assert_close(groups(x), channels(x), **EXACT)


@pytest.mark.parametrize("granularity", [PerBlock((3, 1, 7, 7)), PerBlock((3,)), PerBlock(())])
@given(seed=seeds)
def test_one_block_is_the_whole_tensor(granularity, seed):
    x = _data(seed, 3, 1, 7, 7)
    blocks, whole = Quantizer(_over_range(x, granularity)), Quantizer(_over_range(x, PerTensor()))
    torch.testing.assert_close(blocks(x), whole(x), **EXACT)


@given(seed=seeds)
def test_equal_scales_are_one_scale(seed):
    x = _data(seed, 6, 4)
    one = UniformGrid(torch.tensor([0.3]), qmin=-8, qmax=7)
    for shape in ((6, 1), (1, 4), (2, 2), (6, 4)):
        many = UniformGrid(torch.full(shape, 0.3), qmin=-8, qmax=7)
        torch.testing.assert_close(Quantizer(many)(x), Quantizer(one)(x), **EXACT)


@given(seed=seeds)
def test_stochastic_rounding_of_levels_is_nearest(seed):
    levels = UniformGrid(torch.tensor([0.25]), qmin=-8, qmax=7).levels().flatten()
    grid = CodebookGrid(levels.reshape(1, -1))
    torch.manual_seed(seed)
    torch.testing.assert_close(grid.fake_quantize(levels, Stochastic()), levels, **EXACT)


LSQ_GRIDS = [(-8, 7, 0), (0, 15, 0), (0, 255, 131), (-128, 127, -5), (0, 1, 0), (-1, 0, 0)]


@pytest.mark.parametrize(("qmin", "qmax", "zero"), LSQ_GRIDS)
@pytest.mark.parametrize("factor", [1.0, 0.03])
@given(seed=seeds)
def test_the_learnable_uniform_grid_has_the_gradients_of_lsq(oracles, qmin, qmax, zero, factor, seed):
    x = _data(seed, 31) * (qmax - qmin)
    scale = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1)
    grid = UniformGrid(
        torch.tensor([scale], dtype=torch.float64),
        torch.tensor([float(zero)]) if zero else None,
        qmin=qmin,
        qmax=qmax,
        learnable=True,
        gradient_scale=factor,
    )
    upstream = _data(seed + 1, 31)
    leaf = x.clone().requires_grad_()
    (grid.fake_quantize(leaf, NearestEven()) * upstream).sum().backward()
    by_x, by_scale = zip(*(oracles.lsq_gradients(v, scale, zero, qmin, qmax) for v in x.tolist()), strict=True)
    # x / s is rounded once here and once in the oracle, at most 2 ulp of a coordinate below 600; 31 terms are added.
    tolerance = 31 * 600 * 2 * 2.3e-16
    torch.testing.assert_close(leaf.grad, torch.tensor(by_x, dtype=torch.float64) * upstream, rtol=4.5e-16, atol=0)
    expected = (torch.tensor(by_scale, dtype=torch.float64) * upstream).sum().reshape(1) * factor
    torch.testing.assert_close(grid.scale.grad, expected, rtol=1e-14, atol=tolerance)


def test_the_ends_of_the_range_count_as_inside():
    """Esser et al. leave the ends to the outside; here the closed range is inside, one convention for all grids."""
    grid = UniformGrid(torch.tensor([0.5], dtype=torch.float64), qmin=-8, qmax=7, learnable=True)
    table = CodebookGrid(grid.levels(), qmin=-8)
    for end in (-4.0, 3.5):
        outward = torch.tensor(end, dtype=torch.float64).nextafter(torch.tensor(10 * end, dtype=torch.float64))
        for value, by_x, by_scale in ((end, 1.0, 0.0), (float(outward), 0.0, end / 0.5)):
            leaf = torch.tensor([value], dtype=torch.float64, requires_grad=True)
            by = torch.autograd.grad(grid.fake_quantize(leaf, NearestEven()), [leaf, grid.scale])
            torch.testing.assert_close(by[0].item(), by_x, **EXACT)
            torch.testing.assert_close(by[1].item(), by_scale, **EXACT)
            (by_table,) = torch.autograd.grad(table.fake_quantize(leaf, NearestEven()), leaf)
            torch.testing.assert_close(by_table.item(), by_x, **EXACT)


def _torch_gradients(x, scale, qmin, qmax):
    leaf, step = x.clone().requires_grad_(), torch.tensor([scale], requires_grad=True)
    y = torch._fake_quantize_learnable_per_tensor_affine(leaf, step, torch.zeros(1), qmin, qmax, 1.0)
    y.sum().backward()
    return y.detach(), leaf.grad, step.grad


def _our_gradients(x, scale, qmin, qmax):
    grid = UniformGrid(torch.tensor([scale]), qmin=qmin, qmax=qmax, learnable=True)
    leaf = x.clone().requires_grad_()
    y = grid.fake_quantize(leaf, NearestEven())
    y.sum().backward()
    return y.detach(), leaf.grad, grid.scale.grad


@given(u=st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=9))
def test_torchs_learnable_fake_quantize_agrees_off_ties_and_off_the_half_step_outside(u):
    u = torch.tensor(u)
    # torch multiplies by 1/s, here x is divided by s: away from ties and ends both round alike.
    near_tie = ((u - u.floor()) - 0.5).abs() < 1e-4
    half_step = ((u > 7 - 1e-4) & (u < 7.5 + 1e-4)) | ((u < -8 + 1e-4) & (u > -8.5 - 1e-4))
    x = torch.where(near_tie | half_step, 0.25, u) * 0.3
    theirs, ours = _torch_gradients(x, 0.3, -8, 7), _our_gradients(x, 0.3, -8, 7)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1.2e-7, atol=0)  # one rounding of float32
    torch.testing.assert_close(ours[1], theirs[1], rtol=1.2e-7, atol=0)  # 1 is s * (1/s), rounded once
    # At most 9 terms; each coordinate is below 13 and has been rounded 4 times: 9 * 13 * 4 * 6e-8.
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=2.8e-5)


@pytest.mark.parametrize("u", [7.01, 7.25, 7.49, -8.01, -8.25, -8.49])
def test_torchs_learnable_fake_quantize_differs_in_the_half_step_outside_the_range(u):
    """It clamps after rounding, so what rounds to the last code counts as inside; Esser et al., eq. 3, say outside."""
    x = torch.tensor([u])
    theirs, ours = _torch_gradients(x, 1.0, -8, 7), _our_gradients(x, 1.0, -8, 7)
    end = 7.0 if u > 0 else -8.0
    torch.testing.assert_close(ours[0], theirs[0], **EXACT)
    torch.testing.assert_close((ours[1].item(), theirs[1].item()), (0.0, 1.0), **EXACT)
    torch.testing.assert_close(ours[2].item(), end, **EXACT)
    torch.testing.assert_close(theirs[2], torch.tensor([end]) - x, **EXACT)
