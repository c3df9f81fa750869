"""The arithmetic against loops over elements, and its gradients against what the docstrings say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_core import (
    NearestTowardZero,
    ShapeError,
    dequantize,
    floor_ste,
    quantize,
    round_ste,
    scale_gradient,
    straight_through,
)
from q_core.functional import broadcast_scale, closed_clamp, from_tiles, to_tiles

EXACT = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**31)


@st.composite
def tiled_shapes(draw):
    """The shape of a tensor of up to four axes, and the shape of a scale that tiles it."""
    tiles = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes = [count * draw(st.integers(1, 3)) for count in tiles]
    return tuple(sizes), tuple(tiles)


def _numbered(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def test_straight_through_takes_the_value_of_one_and_the_gradient_of_the_other():
    value, surrogate = torch.tensor([3.0, -1.0], requires_grad=True), torch.tensor([5.0, 7.0], requires_grad=True)
    result = straight_through(value, surrogate)
    torch.testing.assert_close(result, torch.tensor([3.0, -1.0]), **EXACT)
    (result * torch.tensor([2.0, 9.0])).sum().backward()
    assert value.grad is None
    torch.testing.assert_close(surrogate.grad, torch.tensor([2.0, 9.0]), **EXACT)


def test_straight_through_is_exact_where_adding_and_subtracting_is_not():
    """x + (value - x) loses the value next to a large x."""
    value, surrogate = torch.tensor([1.0]), torch.tensor([1e20], requires_grad=True)
    torch.testing.assert_close(straight_through(value, surrogate), value, **EXACT)


def test_straight_through_works_under_vmap():
    value, surrogate = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(torch.vmap(straight_through)(value, surrogate), value, **EXACT)


@pytest.mark.parametrize(("function", "expected"), [(round_ste, torch.round), (floor_ste, torch.floor)])
def test_steps_round_forward_and_pass_the_gradient(function, expected):
    x = torch.tensor([-2.5, -0.5, -0.2, 0.5, 1.5, 2.7], requires_grad=True)
    y = function(x)
    torch.testing.assert_close(y, expected(x), **EXACT)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.ones(6), **EXACT)


@pytest.mark.parametrize("tensors", [False, True])
def test_the_ends_of_a_closed_range_are_inside(tensors):
    """torch.clamp changed its mind about the ends in 2.14, and half of all codes of one bit lie there."""
    low, high = (torch.tensor([-1.0]), torch.tensor([2.0])) if tensors else (-1, 2)
    x = torch.tensor([-3.0, -1.0, 0.5, 2.0, 2.5, torch.inf], requires_grad=True)
    y = closed_clamp(x, low, high)
    torch.testing.assert_close(y, torch.tensor([-1.0, -1.0, 0.5, 2.0, 2.0, 2.0]), **EXACT)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0]), **EXACT)
    assert bool(closed_clamp(torch.tensor([torch.nan]), low, high).isnan())


def test_the_ends_of_a_closed_range_get_the_gradient_of_what_lies_beyond():
    """As a learnable zero point needs it, which moves both ends."""
    x = torch.tensor([[-3.0, 0.5], [7.0, 8.0]])
    low, high = torch.tensor([[-1.0], [0.0]], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    upstream = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    (closed_clamp(x, low, high) * upstream).sum().backward()
    torch.testing.assert_close(low.grad, torch.tensor([[2.0], [0.0]]), **EXACT)
    torch.testing.assert_close(high.grad, torch.tensor([12.0]), **EXACT)


@pytest.mark.parametrize("bounds", [(-1, 1), (torch.full((1,), -1.0), torch.ones(1))], ids=["numbers", "tensors"])
def test_a_closed_clamp_works_under_vmap(bounds):
    x = torch.randn(3, 5)
    result = torch.vmap(lambda row: closed_clamp(row, *bounds))(x)
    torch.testing.assert_close(result, x.clamp(-1, 1), **EXACT)


@pytest.mark.parametrize("factor", [0.0, 0.125, 1.0, -3.0])
def test_scale_gradient_changes_the_gradient_alone(factor):
    x = torch.tensor([1e-30, -2.0, 1e30], requires_grad=True)
    y = scale_gradient(x, factor)
    torch.testing.assert_close(y, x, **EXACT)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), factor), **EXACT)


def test_a_gradient_scale_of_one_costs_nothing():
    x = torch.ones(1, requires_grad=True)
    assert scale_gradient(x, 1.0) is x


@given(case=tiled_shapes())
def test_a_scale_is_broadcast_as_the_loop_does(oracles, case):
    shape, tile_shape = case
    scale = _numbered(tile_shape)
    actual = broadcast_scale(scale, shape).expand(shape)
    expected = torch.empty(shape, dtype=torch.float64)
    for index in oracles.indices(shape):
        expected[index] = scale[oracles.tile_of(index, shape, tile_shape)]
    torch.testing.assert_close(actual, expected, **EXACT)


@given(case=tiled_shapes())
def test_tiles_are_gathered_as_the_loop_does(oracles, case):
    shape, tile_shape = case
    x = _numbered(shape)
    expected = torch.tensor(list(oracles.tiles(x, tile_shape).values()), dtype=torch.float64)
    torch.testing.assert_close(to_tiles(x, tile_shape), expected, **EXACT)


@given(case=tiled_shapes())
def test_tiles_are_put_back_where_they_were(case):
    shape, tile_shape = case
    x = _numbered(shape)
    torch.testing.assert_close(from_tiles(to_tiles(x, tile_shape), tile_shape, shape), x, **EXACT)


@pytest.mark.parametrize("tile_shape", [(1,), (1, 1), (1, 1, 1)])
def test_one_tile_tiles_every_tensor(tile_shape):
    for shape in ((), (7,), (3, 5), (2, 3, 1, 5)):
        x = _numbered(shape)
        assert to_tiles(x, tile_shape).shape == (1, x.numel())
        torch.testing.assert_close(from_tiles(to_tiles(x, tile_shape), tile_shape, shape), x, **EXACT)
        assert broadcast_scale(torch.ones(tile_shape), shape).expand(shape).shape == shape


def test_a_scale_per_channel_is_broadcast_without_a_copy():
    scale = torch.rand(5, 1, 1, 1)
    assert broadcast_scale(scale, (5, 3, 3, 3)).data_ptr() == scale.data_ptr()


@pytest.mark.parametrize(
    ("tile_shape", "shape", "message"),
    [
        ((4, 3), (4, 8), r"axis 1 has 8 elements, not a multiple of 3"),
        ((4,), (4, 8), r"it has 1 axes, the tensor 2; a scale for the whole tensor has 1 element"),
        ((8, 1), (4, 8), r"axis 0 has 4 elements, not a multiple of 8"),
        ((0, 1), (4, 8), r"axis 0 has 4 elements, not a multiple of 0"),
    ],
)
def test_a_scale_that_does_not_tile_is_refused_with_both_shapes(tile_shape, shape, message):
    start = r"scale of shape \(.*\) does not tile a tensor of shape \(4, 8\): "
    for call in (
        lambda: broadcast_scale(torch.ones(tile_shape), shape),
        lambda: to_tiles(torch.ones(shape), tile_shape),
        lambda: quantize(torch.ones(shape), torch.ones(tile_shape), qmin=0, qmax=3),
        lambda: dequantize(torch.ones(shape), torch.ones(tile_shape)),
    ):
        with pytest.raises(ShapeError, match=start + message):
            call()


@st.composite
def uniform_cases(draw):
    shape, tile_shape = draw(tiled_shapes())
    bits = draw(st.integers(1, 8))
    qmin = draw(st.sampled_from([0, -(2 ** (bits - 1))]))
    return shape, tile_shape, qmin, qmin + 2**bits - 1, draw(st.booleans()), draw(seeds)


@given(case=uniform_cases())
def test_codes_and_reals_are_those_of_the_loop(oracles, case):
    shape, tile_shape, qmin, qmax, affine, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (qmax - qmin) / 3
    scale = torch.rand(tile_shape, generator=generator, dtype=torch.float64) + 0.05
    zero = torch.randint(qmin, qmax + 1, tile_shape, generator=generator).double() if affine else None
    codes = quantize(x, scale, zero, qmin=qmin, qmax=qmax)
    expected = torch.empty_like(x)
    for index in oracles.indices(shape):
        tile = oracles.tile_of(index, shape, tile_shape)
        zero_point = float(zero[tile]) if affine else 0.0
        expected[index] = oracles.quantize(float(x[index]), float(scale[tile]), zero_point, qmin, qmax)
    torch.testing.assert_close(codes, expected, **EXACT)
    reals = dequantize(codes, scale, zero)
    for index in oracles.indices(shape):
        tile = oracles.tile_of(index, shape, tile_shape)
        zero_point = float(zero[tile]) if affine else 0.0
        expected[index] = oracles.dequantize(float(codes[index]), float(scale[tile]), zero_point)
    torch.testing.assert_close(reals, expected, **EXACT)


def test_the_zero_point_is_added_after_rounding_as_onnx_does():
    """1.5 + 1 is 2.5: rounding after adding would give 2, rounding before gives 2 + 1."""
    codes = quantize(torch.tensor([1.5]), torch.ones(1), torch.ones(1), qmin=0, qmax=15)
    torch.testing.assert_close(codes, torch.tensor([3.0]), **EXACT)


def test_a_tie_rule_sees_the_sign_of_the_real_whatever_the_zero_point():
    ties = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    codes = quantize(ties, torch.ones(1), torch.full((1,), 7.0), qmin=0, qmax=15, rounding=NearestTowardZero())
    torch.testing.assert_close(codes - 7, torch.tensor([-1.0, 0.0, 0.0, 1.0]), **EXACT)


def test_infinity_saturates_and_nan_stays():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    codes = quantize(x, torch.ones(1), torch.full((1,), 3.0), qmin=0, qmax=15)
    torch.testing.assert_close(codes, torch.tensor([15.0, 0.0, torch.nan]), **EXACT, equal_nan=True)


def test_the_gradient_of_codes_is_one_over_the_scale_inside():
    x = torch.tensor([-9.0, -1.0, 0.3, 3.0, 9.0], requires_grad=True)
    quantize(x, torch.tensor([0.5]), qmin=-8, qmax=7).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0]), **EXACT)


def test_empty_tensors_pass():
    empty = torch.ones(0, 4)
    assert quantize(empty, torch.ones(1), qmin=0, qmax=3).shape == (0, 4)
    assert quantize(empty, torch.ones(1, 4), qmin=0, qmax=3).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_runs_in_the_wider_dtype_of_data_and_scale(dtype):
    for shape in ((), (1,), (2, 3)):
        codes = quantize(torch.ones(shape, dtype=dtype), torch.ones(1), qmin=0, qmax=3)
        assert codes.dtype == torch.promote_types(dtype, torch.float32)
