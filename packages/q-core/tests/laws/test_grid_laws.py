"""Every grid of the package obeys the laws, whatever its codes, levels and granularity."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import q_core
from q_core import CodebookGrid, PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, UniformGrid
from q_core.testing import check_grid

# A shape and a granularity each; sizes are odd on purpose.
TILINGS = [
    ((7,), PerTensor()),
    ((3, 5, 1, 7), PerTensor()),
    ((5, 3, 3, 1), PerChannel(0)),
    ((1, 3, 5, 5), PerChannel(1)),
    ((7, 3), PerChannel(-1)),
    ((3, 63), PerGroup(9)),
    ((3, 6, 5), PerGroup(5, axis=2)),
    ((6, 9), PerBlock((2, 3))),
    ((3, 3, 1), PerBlock((1, 1))),
]
tilings = st.sampled_from(TILINGS)
tile_shapes = st.sampled_from([granularity.scale_shape(shape) for shape, granularity in TILINGS])
bit_widths = st.integers(1, 8)
seeds = st.integers(0, 2**31)


@st.composite
def specs(draw, granularity=None):
    granularity = PerTensor() if granularity is None else granularity
    bits, symmetric = draw(bit_widths), draw(st.booleans())
    if draw(st.booleans()):
        return QuantSpec.unsigned(bits, symmetric=symmetric, granularity=granularity)
    narrow = bits > 1 and draw(st.booleans())
    return QuantSpec.signed(bits, symmetric=symmetric, narrow=narrow, granularity=granularity)


@st.composite
def scales(draw, shape, dtype):
    exponents = torch.empty(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(seeds))
    exponents.uniform_(draw(st.floats(-60, 0)), draw(st.floats(0, 60)), generator=generator)
    return exponents.exp2().to(dtype)


# Grids are drawn as their arguments and built in the test: the type checks of a constructor draw random numbers, which
# Hypothesis forbids while it draws.
@st.composite
def uniform_grids(draw):
    shape, spec = draw(tile_shapes), draw(specs())
    scale = draw(scales(shape, draw(st.sampled_from([torch.float32, torch.float64]))))
    zero_point = None
    if not spec.symmetric:
        generator = torch.Generator().manual_seed(draw(seeds))
        zero_point = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator).to(scale.dtype)
    learnable, gradient_scale = draw(st.booleans()), draw(st.sampled_from([1.0, 0.1]))
    codes = {"qmin": spec.qmin, "qmax": spec.qmax}
    return partial(UniformGrid, scale, zero_point, **codes, learnable=learnable, gradient_scale=gradient_scale)


@st.composite
def codebook_grids(draw):
    """Levels with gaps of very different widths; zero is a level only by accident."""
    shape, count = draw(tile_shapes), draw(st.one_of(st.integers(2, 33), st.just(256)))
    generator = torch.Generator().manual_seed(draw(seeds))
    ratio = draw(st.floats(0, 6))
    gaps = torch.empty((*shape, count), dtype=torch.float64).uniform_(-ratio, ratio, generator=generator).exp2()
    levels = gaps.cumsum(-1) - gaps.sum(-1, keepdim=True) * draw(st.floats(-0.5, 1.5))
    levels = levels * 2.0 ** draw(st.integers(-20, 20))
    dtype, qmin = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(-200, 9))
    return partial(CodebookGrid, levels.to(dtype), qmin=qmin)


@settings(max_examples=60)
@given(make=uniform_grids())
def test_every_uniform_grid_obeys_the_laws(make):
    check_grid(make())


@given(tiling=tilings, data=st.data())
def test_every_grid_built_over_a_range_obeys_the_laws_on_the_data_it_was_built_for(tiling, data):
    shape, granularity = tiling
    spec = data.draw(specs(granularity))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0 ** data.draw(st.integers(-60, 60))
    if spec.symmetric:
        x = x.abs() if spec.qmin == 0 else -x.abs() if spec.qmax == 0 else x
    tile_shape = granularity.scale_shape(shape)
    rows = q_core.functional.to_tiles(x, tile_shape)
    grid = UniformGrid.from_range(spec, rows.amin(1).reshape(tile_shape), rows.amax(1).reshape(tile_shape))
    assert grid.tile_shape == tile_shape
    check_grid(grid, x)
    check_grid(grid)


@settings(max_examples=60)
@given(make=codebook_grids())
def test_every_codebook_grid_obeys_the_laws(make):
    check_grid(make())


@given(make=uniform_grids())
def test_the_table_of_a_uniform_grid_obeys_the_laws_and_keeps_its_codes(make):
    grid = make()
    table = CodebookGrid(grid.levels(), qmin=grid.qmin)
    check_grid(table)
    codes = torch.arange(grid.qmin, grid.qmax + 1).expand(grid.levels().shape)
    for row, code in zip(grid.levels().unbind(-1), codes.unbind(-1), strict=True):
        torch.testing.assert_close(table.quantize(row, q_core.NearestEven()), code.to(row.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("levels", [[-3.0, -1.0], [1.0, 2.0, 4.0], [-4.0, -2.0, -1.0, 1.0, 2.0, 4.0], [0.0, 1e-6, 1e6]])
def test_levels_on_one_side_of_zero_or_around_it_obey_the_laws(levels):
    check_grid(CodebookGrid(torch.tensor([levels])))


@given(seed=seeds, exponent=st.integers(-20, 20))
def test_a_float32_codebook_finds_the_nearest_level_to_the_last_digit(seed, exponent):
    """Everything in float32, one ulp either side of each midpoint: the hardest place to tell the nearest level."""
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.rand(256, generator=generator).add(1e-3).cumsum(0) - 60) * 2.0**exponent
    grid = CodebookGrid(levels.reshape(1, -1))
    middle = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([middle, middle.nextafter(levels[1:]), middle.nextafter(levels[:-1])])
    chosen = grid.fake_quantize(x, q_core.NearestEven()).double()
    error = (x.double() - chosen).abs()
    least = (x.double().unsqueeze(1) - levels.double()).abs().amin(1)
    # Differences of float32 numbers are exact in float64 here: their exponents lie within 29 of each other.
    torch.testing.assert_close(error, least, rtol=0, atol=0)
