"""The adder operator against loops over its equations, for every geometry, layout and dtype."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from q_adder import adder2d, adder_linear, adder_matmul
from q_core import BackendError, RangeError, ShapeError, SpecError

from . import oracles

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "cut out": lambda x: F.pad(x, (2, 1, 1, 3))[..., 1:-3, 2:-1],
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "backwards": lambda x: x.flip(0, 3).contiguous().flip(0, 3),
}


@st.composite
def geometries(draw, dtype=torch.float64):
    groups = draw(st.integers(1, 3))
    kernel, stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(3))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
    size = [max(1, reach[a] - 2 * padding[a]) + draw(st.integers(0, 6)) for a in (0, 1)]
    batch, inputs, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = 2 * torch.randn(batch, inputs * groups, *size, dtype=torch.float64, generator=generator)
    weight = 2 * torch.randn(outputs * groups, inputs, *kernel, dtype=torch.float64, generator=generator)
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x.to(dtype))
    return x, weight.to(dtype), {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


# Sums of a few hundred float64 numbers below 20, so 1e-12 is some units in the last place of the largest.
EXACT = {"atol": 1e-12, "rtol": 1e-12}


# Forward ---------------------------------------------------------------------------------------------------------


@settings(max_examples=250)
@given(case=geometries())
def test_forward_is_the_sum_of_absolute_differences_for_every_geometry(case):
    x, weight, geometry = case
    torch.testing.assert_close(adder2d(x, weight, **geometry), oracles.adder2d(x, weight, **geometry), **EXACT)


@settings(max_examples=100)
@given(case=geometries(torch.float32))
def test_forward_in_float32_loses_no_more_than_its_additions(case):
    x, weight, geometry = case
    expected = oracles.adder2d(x.double(), weight.double(), **geometry)
    # Terms of one sign: a relative rounding of 2^-24 for the difference and for each of at most 27 additions.
    torch.testing.assert_close(adder2d(x, weight, **geometry).double(), expected, rtol=28 * 2**-24, atol=0)


def test_padded_zeros_are_taps():
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    out = adder2d(torch.zeros(1, 2, 4, 5, dtype=torch.float64), weight, padding=2)
    expected = -weight.abs().sum((1, 2, 3)).reshape(1, 3, 1, 1).expand(1, 3, 6, 7)
    torch.testing.assert_close(out, expected, **EXACT)


def test_one_number_stands_for_both_axes():
    x, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3)
    expected = adder2d(x, weight, stride=(2, 2), padding=(1, 1), dilation=(2, 2), groups=2)
    assert torch.equal(adder2d(x, weight, stride=2, padding=1, dilation=2, groups=2), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's convolution
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 1), (2, 5)])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_padding_by_name_is_that_of_a_convolution(padding, kernel, dilation):
    x, weight = torch.randn(2, 3, 9, 10, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    out = adder2d(x, weight, padding=padding, dilation=dilation, exponent=2.0)
    squares = F.conv2d(x.square(), torch.ones_like(weight), padding=padding, dilation=dilation)
    product = F.conv2d(x, weight, padding=padding, dilation=dilation)
    expected = 2 * product - squares - weight.square().sum((1, 2, 3)).reshape(1, -1, 1, 1)
    torch.testing.assert_close(out, expected, **EXACT)
    options = {"padding": padding, "dilation": dilation}
    assert torch.equal(adder2d(x[0], weight, **options), adder2d(x, weight, **options)[0])


def test_bias_is_added_to_each_output():
    x, weight, bias = torch.randn(2, 3, 5, 4), torch.randn(4, 3, 3, 3), torch.randn(4)
    assert torch.equal(adder2d(x, weight, bias), adder2d(x, weight) + bias.reshape(1, 4, 1, 1))
    rows, table = torch.randn(5, 7), torch.randn(4, 7)
    assert torch.equal(adder_linear(rows, table, bias), adder_linear(rows, table) + bias)


def test_one_image_needs_no_batch():
    x, weight, bias = torch.randn(4, 7, 6), torch.randn(6, 2, 3, 2), torch.randn(6)
    options = {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2}
    assert torch.equal(adder2d(x, weight, bias, **options), adder2d(x.unsqueeze(0), weight, bias, **options)[0])


def test_an_empty_batch_gives_an_empty_result_and_no_gradient():
    x, weight = torch.randn(0, 4, 7, 6, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    out = adder2d(x, weight, stride=2)
    assert out.shape == (0, 6, 3, 2)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 3, 7)])
def test_linear_is_the_distance_to_each_row(shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    difference = x.unsqueeze(-2) - weight
    out = adder_linear(x, weight)
    torch.testing.assert_close(out, -difference.abs().sum(-1), **EXACT)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (x, weight), grad)
    incoming = grad.unsqueeze(-1)
    dx = ((-difference).clamp(-1, 1) * incoming).sum(-2)
    dw = (difference * incoming).reshape(-1, 4, 7).sum(0)
    torch.testing.assert_close(actual, (dx.detach(), dw.detach()), **EXACT)


def test_linear_without_rows_gives_none_and_no_gradient():
    x, weight = torch.randn(0, 3, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    out = adder_linear(x, weight, torch.randn(4))
    assert out.shape == (0, 3, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# Dtypes ----------------------------------------------------------------------------------------------------------


NARROW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("weight_dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_inputs_sum_in_float32(dtype, weight_dtype):
    x, weight = torch.randn(1, 64, 5, 5).to(dtype), torch.randn(8, 64, 3, 3).to(weight_dtype)
    bias = torch.randn(8).to(weight_dtype)
    out = adder2d(x, weight, bias, padding=1)
    assert out.dtype == dtype
    expected = adder2d(x.double(), weight.double(), bias.double(), padding=1)
    # Roundings to the narrow dtype, of the sum and of the sum with the bias; the 577 of float32 are a tenth of one.
    torch.testing.assert_close(out.double(), expected, rtol=1.1 * torch.finfo(dtype).eps, atol=0)
    assert adder_linear(x.flatten(1), torch.randn(3, 1600).to(weight_dtype)).dtype == dtype


@pytest.mark.parametrize("weight_dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_gradients_sum_in_float32(dtype, weight_dtype):
    """In the narrow dtype the two parts of the weight gradient would cancel to nothing but rounding errors."""
    x, weight = 4 + torch.randn(4, 8, 9, 9), 4 + torch.randn(16, 8, 3, 3)
    x, weight = x.to(dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()
    out = adder2d(x, weight)
    grad = torch.rand(out.shape).to(dtype)
    dx, dw = torch.autograd.grad(out, (x, weight), grad)
    assert (dx.dtype, dw.dtype) == (dtype, weight_dtype)
    wide = oracles.unfolded_gradients(grad.double(), x.detach().double(), weight.detach().double(), 1, 0)
    # Rounded once to the dtype of each operand. Before that, the 196 products below 8 that make a weight gradient lose
    # 2^-24 of the 1600 they add up to with each addition, 144 products below 1 that of 72.
    torch.testing.assert_close(dx.double(), wide[0], rtol=torch.finfo(dtype).eps, atol=144 * 72 * 2**-24)
    torch.testing.assert_close(dw.double(), wide[1], rtol=torch.finfo(weight_dtype).eps, atol=196 * 1600 * 2**-24)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_beside_float64_all_is_computed_in_float64(dtype, weight_dtype):
    x = torch.randn(2, 3, 5, 5).to(dtype).requires_grad_()
    weight = torch.randn(4, 3, 3, 3).to(weight_dtype).requires_grad_()
    out = adder2d(x, weight)
    assert out.dtype == dtype
    assert torch.equal(out, adder2d(x.double(), weight.double()).to(dtype))
    dx, dw = torch.autograd.grad(out.sum(), (x, weight))
    assert (dx.dtype, dw.dtype) == (dtype, weight_dtype)


def far_from_zero(dtype):
    """Rows around whose distance of -2000 bfloat16 has a number every 8 or 16."""
    x, weight = torch.rand(4, 256, 3, 3), torch.rand(8, 256, 3, 3) + 0.87
    return x.to(dtype), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_autocast_computes_and_returns_float32(dtype, exponent):
    x, weight = far_from_zero(dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = adder2d(x.float(), weight, exponent=exponent)
    assert out.dtype == torch.float32
    assert exponent > 1 or -2100 < float(out.detach().mean()) < -1900
    expected = [out, *torch.autograd.grad(out.square().sum(), (x, weight))]
    with torch.autocast("cpu", torch.bfloat16):
        out = adder2d(x, weight, exponent=exponent)
        actual = [out, *torch.autograd.grad(out.square().sum(), (x, weight))]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_autocast_narrows_no_other_operator(dtype):
    x, weight = far_from_zero(dtype)
    rows, table = x.flatten(1), weight.flatten(1)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = adder2d(x, weight), adder_linear(rows, table), adder_matmul(rows, table.to(dtype))
    expected = (
        adder2d(x.to(wide), weight),
        adder_linear(rows.to(wide), table),
        adder_matmul(rows.to(wide), table.to(dtype)),
    )
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == wide
        assert torch.equal(one, other)


def test_a_narrow_result_loses_what_tells_outputs_apart_and_float16_ends():
    """Why autocast returns float32: what the documentation says of models that are cast as a whole."""
    x, weight = far_from_zero(torch.float32)
    exact = adder2d(x, weight)
    narrow = adder2d(x.bfloat16(), weight).float()
    assert bool((narrow % 8 == 0).all())
    # A rounding to multiples of 8, spread evenly, has the deviation 8 / sqrt(12) = 2.3.
    assert float((narrow - exact).std()) > 2
    assert bool((adder2d(40 * x.half(), 40 * weight) == -math.inf).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_the_outputs_that_see_it_and_no_others(value):
    x = torch.randn(2, 2, 6, 6)
    x[1, 0, 2, 3] = value
    out = adder2d(x, torch.randn(3, 2, 3, 3))
    expected = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    expected[1, :, 0:3, 1:4] = True
    assert torch.equal(~out.isfinite(), expected)
    assert torch.equal(out.isnan(), expected & math.isnan(value))


# Gradients -------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(case=geometries())
def test_gradients_are_the_published_ones_for_every_geometry(case):
    x, weight, geometry = case
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = adder2d(x, weight, **geometry)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (x, weight), grad)
    expected = oracles.gradients(grad, x.detach(), weight.detach(), **geometry)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (2, 0, 1), ((2, 1), (0, 2), (5, 2))])
def test_gradients_are_those_of_the_unfolded_cube(stride, padding, kernel):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(3, 5, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, *kernel, dtype=torch.float64, requires_grad=True)
    out = adder2d(x, weight, stride=stride, padding=padding)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (x, weight), grad)
    expected = oracles.unfolded_gradients(grad, x.detach(), weight.detach(), stride, padding)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(("stride", "padding"), [(2, 1), (3, 0)])
def test_stride_2_reaches_every_input(stride, padding):
    """Public kernels tested the bound before dividing by the stride, which lost 75 % of the positions."""
    x = torch.rand(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.full((4, 2, 3, 3), 5.0, dtype=torch.float64)
    adder2d(x, weight, stride=stride, padding=padding).sum().backward()
    # Every weight is more than 1 above every input, so each of the four kernels adds 1 for each window of the pixel.
    geometry = {"kernel_size": 3, "stride": stride, "padding": padding}
    windows = F.fold(F.unfold(torch.ones(1, 1, 9, 9, dtype=torch.float64), **geometry), (9, 9), **geometry)
    assert int((x.grad == 0).sum()) == 0
    assert torch.equal(x.grad, 4 * windows.expand(1, 2, 9, 9))


@pytest.mark.parametrize(
    ("difference", "slope"),
    [(-3.0, -1.0), (-1.0, -1.0), (-0.75, -0.75), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1.25, 1.0), (1e30, 1.0)],
)
def test_the_slope_to_the_input_is_cut_at_one_and_the_one_to_the_weight_is_not(difference, slope):
    x, weight = torch.zeros(1, 1, 1, 1, requires_grad=True), torch.full((1, 1, 1, 1), difference, requires_grad=True)
    adder2d(x, weight).backward(torch.full((1, 1, 1, 1), 2.0))
    assert x.grad.item() == 2 * slope
    assert weight.grad.item() == -2 * torch.tensor(difference).item()


@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_each_gradient_can_be_had_alone(wanted):
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(6, 2, 3, 3)
    both = adder2d(x.requires_grad_(), weight.requires_grad_(), groups=2)
    expected = dict(zip(("input", "weight"), torch.autograd.grad(both.sum(), (x, weight)), strict=True))
    leaf, other = (x, weight) if wanted == "input" else (weight, x)
    other.requires_grad_(False)
    (actual,) = torch.autograd.grad(adder2d(x, weight, groups=2).sum(), leaf)
    assert torch.equal(actual, expected[wanted])


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(1, 1, 3, 3, requires_grad=True), torch.randn(1, 1, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(adder2d(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="adder operators have no second derivative"):
        dx.sum().backward()


def test_functional_gradients_are_those_of_backward():
    x, weight = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 3)

    def loss(x, weight):
        return adder2d(x, weight, stride=2, padding=1, groups=2).square().sum()

    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.func.grad(loss, (0, 1))(x, weight), expected))
    value, pullback = torch.func.vjp(loss, x, weight)
    assert all(map(torch.equal, pullback(torch.ones_like(value)), expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch.vmap runs one sample at a time
def test_gradients_of_single_samples_add_up_to_that_of_the_batch():
    x, weight = torch.randn(3, 2, 5, 5), torch.randn(4, 2, 3, 3)

    def loss(weight, image):
        return adder2d(image, weight).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    # Three gradients of some hundreds, added in another order in float32.
    torch.testing.assert_close(each.sum(0), torch.func.grad(loss)(weight, x), rtol=1e-5, atol=1e-3)


def test_rows_have_functional_gradients_too():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    expected = torch.autograd.grad(adder_matmul(*leaves).square().sum(), leaves)
    assert all(
        map(torch.equal, torch.func.grad(lambda a, b: adder_matmul(a, b).square().sum(), (0, 1))(a, b), expected)
    )


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch, at its first dual tensor
def test_forward_mode_is_refused_instead_of_a_tangent_of_zero():
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    with pytest.raises(BackendError, match="adder operators have no forward mode"):
        torch.func.jvp(lambda x: adder2d(x, weight), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(BackendError, match="no forward mode"):
        adder2d(x, torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight)))
    with pytest.raises(BackendError, match="no forward mode"):
        torch.func.jvp(lambda a: adder_matmul(a, a), (torch.randn(3, 4),), (torch.ones(3, 4),))


# Exponent --------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(case=geometries(), exponent=st.floats(1.0, 2.0))
def test_forward_is_the_sum_of_powers_for_every_exponent(case, exponent):
    x, weight, geometry = case
    expected = oracles.adder2d(x, weight, **geometry, exponent=exponent)
    # The reference takes a root of the sum and undoes it: one more rounding, twice its size in the power.
    torch.testing.assert_close(adder2d(x, weight, **geometry, exponent=exponent), expected, **EXACT)


@pytest.mark.parametrize("exponent", [1.25, 1.5, 2.0])
def test_above_exponent_one_the_gradient_is_the_derivative(exponent):
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return adder2d(x, weight, stride=(2, 1), padding=1, dilation=(1, 2), groups=2, exponent=exponent)

    assert torch.autograd.gradcheck(function, (x, weight))


def test_at_exponent_two_it_is_a_convolution():
    x, weight = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    squares = F.conv2d(x.square(), torch.ones_like(weight[:1])) + weight.square().sum((1, 2, 3)).reshape(1, -1, 1, 1)
    expected = 2 * F.conv2d(x, weight) - squares
    actual = adder2d(x, weight, exponent=2.0)
    torch.testing.assert_close(actual, expected, **EXACT)
    grad = torch.randn_like(actual)
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    torch.testing.assert_close(torch.autograd.grad(actual, (x, weight), grad), wanted, **EXACT)


def test_a_kernel_equal_to_its_window_has_no_gradient_at_any_exponent():
    for exponent in (1.0, 1.5, 2.0):
        x, weight = torch.ones(1, 2, 3, 3, requires_grad=True), torch.ones(4, 2, 3, 3, requires_grad=True)
        out = adder2d(x, weight, exponent=exponent)
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(x.grad, torch.zeros_like(x))
        assert torch.equal(weight.grad, torch.zeros_like(weight))


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weight", "options", "error", "words"),
    [
        (
            (1, 4, 5, 5),
            (3, 3, 3, 3),
            {},
            ShapeError,
            "kernels with 3 channels in 1 groups on an input with 4: expected 4",
        ),
        ((1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}, ShapeError, "groups=2 with 4 input and 3 output channels"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"groups": 0}, ShapeError, "groups=0"),
        ((1, 4, 2, 2), (3, 4, 3, 3), {}, ShapeError, "window of 3 pixels on a padded input of 2"),
        ((1, 4, 9, 5), (3, 4, 3, 3), {"dilation": (1, 4), "padding": (0, 1)}, ShapeError, "window of 9 pixels"),
        ((1, 4, 0, 5), (3, 4, 1, 1), {}, ShapeError, "window of 1 pixels on a padded input of 0"),
        ((4, 5), (3, 4, 3, 3), {}, ShapeError, r"input of shape \(4, 5\)"),
        ((2, 1, 4, 5, 5), (3, 4, 3, 3), {}, ShapeError, r"input of shape \(2, 1, 4, 5, 5\)"),
        ((1, 4, 5, 5), (3, 4, 3), {}, ShapeError, r"kernels of shape \(3, 4, 3\)"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"bias": torch.zeros(1)}, ShapeError, r"bias of shape \(1,\) for 3 outputs"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"exponent": 0.5}, RangeError, "exponent=0.5"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"exponent": math.nan}, RangeError, "exponent=nan"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"stride": (1, 0)}, RangeError, r"stride=\(1, 0\): it must be at least 1"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"padding": -1}, RangeError, r"padding=\(-1, -1\): it must be at least 0"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"dilation": 0}, RangeError, r"dilation=\(0, 0\): it must be at least 1"),
        (
            (1, 4, 5, 5),
            (3, 4, 3, 3),
            {"stride": (1, 2, 3)},
            SpecError,
            r"stride=\(1, 2, 3\): expected one whole number",
        ),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"stride": 1.5}, SpecError, r"stride=1\.5: expected one whole number"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"dilation": (1, 1.0)}, SpecError, r"dilation=\(1, 1\.0\): expected"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"padding": (1,)}, SpecError, r"padding=\(1,\): expected"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"padding": "full"}, SpecError, r"padding='full': expected .*\"same\" or"),
        ((1, 4, 5, 5), (3, 4, 3, 3), {"padding": "same", "stride": 2}, SpecError, r"only at stride 1"),
        ((1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2.0}, SpecError, r"groups=2\.0: it must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_values(x, weight, options, error, words):
    with pytest.raises(error, match=words):
        oracles.unchecked(adder2d)(torch.zeros(x), torch.zeros(weight), **options)


def test_codes_are_refused_by_the_operator_on_reals():
    codes, weight = torch.zeros(1, 2, 3, 3, dtype=torch.uint8), torch.zeros(3, 2, 1, 1)
    with pytest.raises(BackendError, match=r"adder2d: input of torch\.uint8"):
        oracles.unchecked(adder2d)(codes, weight)
    with pytest.raises(BackendError, match=r"adder_linear: weight of torch\.int64"):
        oracles.unchecked(adder_linear)(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_of_8_bits_are_refused(dtype):
    x, weight = torch.zeros(1, 2, 3, 3), torch.zeros(3, 2, 1, 1)
    with pytest.raises(BackendError, match=r"adder2d: input of torch\.float8_.*16 bits or more, convert"):
        adder2d(x.to(dtype), weight)
    with pytest.raises(BackendError, match=r"adder_linear: weight of torch\.float8_"):
        adder_linear(x[0, 0], x[0, 0].to(dtype))
    with pytest.raises(BackendError, match=r"adder_matmul: second of torch\.int64"):
        oracles.unchecked(adder_matmul)(x[0], x[0].long())


def test_squares_of_distances_of_close_rows_are_exact():
    """By way of a product of matrices, two rows of length 1e4 would be up to 10 apart where the truth is 0.04."""
    x = 100 + torch.randn(1, 64, 6, 6)
    weight = x[0, :, :5, 0].T.reshape(5, 64, 1, 1).repeat(6, 1, 1, 1) + 0.025
    exact = oracles.adder2d(x.double(), weight.double(), (1, 1), (0, 0), (1, 1), 1, 2.0)
    # 64 roundings of sums of one sign, a root and its square.
    torch.testing.assert_close(adder2d(x, weight, exponent=2.0).double(), exact, rtol=80 * 2**-24, atol=0)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ShapeError, match="input with 3 features, weight with 4"):
        oracles.unchecked(adder_linear)(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ShapeError, match=r"bias of shape \(4,\) for 5 outputs"):
        oracles.unchecked(adder_linear)(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4))
