"""The operators of borders, against loops over windows and taps and against quantizers on patches."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from q_aquant import ops
from q_aquant.border import FusedBorder, LearnedBorder, rectified, steep
from q_aquant.layers import PatchConv2d, _Border
from q_aquant.roundings import Gradual
from q_core import Quantizer, UniformGrid
from q_core.kernels import only

LARGEST = 1 - 2.0**-20


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution of quantized patches."""

    x: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    zero: float | None = None
    qmin: int = 0
    influence: float | None = None
    fused: bool = False
    terms: int = 3
    dtype: torch.dtype = torch.float64

    @property
    def qmax(self) -> int:
        return self.qmin + 7

    @property
    def ends(self) -> tuple[float, float]:
        return self.qmin - (self.zero or 0.0), self.qmax - (self.zero or 0.0)

    def layer(self, factor: float = 0.3, index: tuple[int, ...] | None = None) -> PatchConv2d:
        layer = PatchConv2d(
            self.x[1], self.outputs, self.kernel, self.stride, self.padding, self.dilation, self.groups
        ).to(self.dtype)
        zero = None if self.zero is None else torch.tensor([self.zero], dtype=self.dtype)
        scale = torch.tensor([0.31], dtype=self.dtype)
        grid = UniformGrid(scale, zero, qmin=self.qmin, qmax=self.qmax, learnable=True, gradient_scale=factor)
        shape = layer.patch_shape() if index is None else index
        low, high = self.ends
        rounding = LearnedBorder(torch.randn(self.terms, *shape, dtype=self.dtype) * 0.6, low=low, high=high)
        if self.fused:
            rounding = FusedBorder(rounding, 1 + torch.randn(*shape[:2], dtype=self.dtype) / 3)
        if self.influence is not None:
            rounding = Gradual(rounding, self.influence)
        layer.patch_quantizer = Quantizer(grid, rounding)
        return layer

    def input(self) -> Tensor:
        return torch.randn(self.x, dtype=self.dtype)


CASES = [
    Case((2, 3, 6, 5), 4),
    Case((2, 3, 6, 5), 4, influence=0.5, zero=3.0),
    Case((1, 2, 5, 6), 3, influence=1.0, fused=True),
    Case((2, 4, 7, 6), 6, (3, 2), (2, 1), (2, 0), (1, 2), 2, influence=0.3, qmin=-4),
    Case((2, 4, 7, 6), 6, (2, 3), (1, 3), (0, 1), (2, 1), 2, influence=0.8, fused=True, zero=-1.0, qmin=-4),
    Case((3, 3, 5, 5), 3, groups=3, influence=0.0, terms=2),
    Case((2, 5, 4, 4), 2, (1, 1), padding=(0, 0), terms=1),
    Case((2, 5, 4, 4), 2, (1, 1), (2, 2), (0, 0), fused=True, terms=2),
    Case((1, 1, 1, 1), 1, zero=7.0),
]
both = pytest.mark.parametrize("case", CASES, ids=str)


def parts(layer: PatchConv2d) -> tuple[UniformGrid, LearnedBorder, Tensor | None, float]:
    rounding = layer.patch_quantizer.rounding
    influence = 1.0
    if isinstance(rounding, Gradual):
        influence, rounding = float(rounding.influence), rounding.rounding
    if isinstance(rounding, FusedBorder):
        return layer.patch_quantizer.grid, rounding.elements, rounding.weights, influence
    return layer.patch_quantizer.grid, rounding, None, influence


@dataclasses.dataclass
class Slow:
    """Loops over windows, channels and taps, in Python floats, written from the formulas."""

    y: Tensor
    x: Tensor
    weight: Tensor
    scale: float
    coefficients: Tensor
    fusion: Tensor


def slow(case: Case, layer: PatchConv2d, x: Tensor, grad: Tensor) -> Slow:
    grid, rounding, fusion, a = parts(layer)
    b = rounding.coefficients.detach().squeeze(-1).tolist()
    s, z0, k = float(grid.scale.detach()), case.zero or 0.0, math.prod(case.kernel)
    low, high = case.ends
    alpha = [[1.0] * k for _ in range(case.x[1])] if fusion is None else fusion.tolist()
    p = case.padding
    weight = layer.weight.detach()
    padded = F.pad(x, (p[1], p[1], p[0], p[0]))
    y, to_x, to_weight = torch.zeros_like(grad), torch.zeros_like(padded), torch.zeros_like(weight)
    to_scale, to_b, to_alpha = 0.0, torch.zeros(len(b), case.x[1], k, dtype=x.dtype), torch.zeros(case.x[1], k)
    to_alpha = to_alpha.to(x.dtype)
    inputs, outputs = case.x[1] // case.groups, case.outputs // case.groups
    for n, c, i, j in itertools.product(range(len(x)), range(case.x[1]), range(y.shape[2]), range(y.shape[3])):
        places = [
            (i * case.stride[0] + t * case.dilation[0], j * case.stride[1] + r * case.dilation[1])
            for t, r in itertools.product(range(case.kernel[0]), range(case.kernel[1]))
        ]
        reals = [float(padded[n, c, t, r]) / s for t, r in places]
        u = [min(max(real, low), high) for real in reals]
        v = [(value - low) / (high - low) for value in u]
        sigma = [1 / (1 + math.exp(-sum(b[d][c][t] * v[t] ** d for d in range(len(b))))) for t in range(k)]
        unclipped = [0.5 + 2.5 * (value - 0.5) for value in sigma]
        single = [min(max(value, 0.0), LARGEST) for value in unclipped]
        mean = sum(alpha[c][t] * single[t] for t in range(k)) / k
        border = single if fusion is None else [min(max(mean, 0.0), LARGEST)] * k
        code = [u[t] + a * (math.ceil(u[t] - border[t]) - u[t]) + z0 for t in range(k)]
        q = [min(max(value, case.qmin), case.qmax) - z0 for value in code]
        group = c // inputs
        to_border = [0.0] * k
        for t, (row, column) in enumerate(places):
            wide = t // case.kernel[1], t % case.kernel[1]
            to_q = 0.0
            for o in range(group * outputs, (group + 1) * outputs):
                w = float(weight[o, c % inputs, wide[0], wide[1]])
                y[n, o, i, j] += w * s * q[t]
                to_weight[o, c % inputs, wide[0], wide[1]] += float(grad[n, o, i, j]) * s * q[t]
                to_q += float(grad[n, o, i, j]) * w
            inside = case.qmin <= code[t] <= case.qmax
            to_x[n, c, row, column] += to_q * inside * (low <= reals[t] <= high)
            to_scale += to_q * (q[t] - inside * (low <= reals[t] <= high) * u[t])
            to_border[t] = -a * s * to_q * inside
        if fusion is not None:
            shared = sum(to_border) * (0 <= mean <= LARGEST) / k
            for t in range(k):
                to_alpha[c, t] += shared * single[t]
                to_border[t] = shared * alpha[c][t]
        for t in range(k):
            to_z = to_border[t] * 2.5 * sigma[t] * (1 - sigma[t]) * (0 <= unclipped[t] <= LARGEST)
            for d in range(len(b)):
                to_b[d, c, t] += to_z * v[t] ** d
    y += layer.bias.detach().reshape(-1, 1, 1)
    to_x = to_x[:, :, p[0] : p[0] + x.shape[2], p[1] : p[1] + x.shape[3]]
    return Slow(y, to_x, to_weight, to_scale, to_b.unsqueeze(-1), to_alpha)


def results(layer: PatchConv2d, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def generic(layer: PatchConv2d, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The quantizer on patches, by itself: what sits in a sequence is no quantizer that the operators stand for."""
    quantizer = layer.patch_quantizer
    layer.patch_quantizer = nn.Sequential(quantizer)
    try:
        found = results(layer, x, grad)
    finally:
        layer.patch_quantizer = quantizer
    return {name.replace("patch_quantizer.0", "patch_quantizer"): value for name, value in found.items()}


def output_like(layer: PatchConv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.randn_like(layer(x))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol * size, msg=lambda m, n=name: f"{n}: {m}")


# float64: a few hundred terms of order 1, each with a few roundings of 2**-53.
DOUBLE = {"rtol": 0.0, "atol": 1e-12}


@both
def test_operators_are_what_loops_compute(case: Case) -> None:
    layer, x = case.layer(factor=1.0), case.input()
    grad = output_like(layer, x)
    found, expected = results(layer, x, grad), slow(case, layer, x, grad)
    grid, rounding, fusion, _ = parts(layer)
    actual = [found["y"], found["x"], layer.weight.grad, grid.scale.grad, rounding.coefficients.grad]
    scale = torch.tensor([expected.scale], dtype=x.dtype)
    wanted = [expected.y, expected.x, expected.weight, scale, expected.coefficients]
    if fusion is not None:
        actual, wanted = [*actual, fusion.grad], [*wanted, expected.fusion]
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, **DOUBLE)


@both
def test_operators_take_the_place_of_the_quantizer_on_patches(case: Case) -> None:
    layer, x = case.layer(), case.input()
    grad = output_like(layer, x)
    assert_same(results(layer, x, grad), generic(layer, x, grad), **DOUBLE)


@both
def test_float32_differs_by_rounding_errors(case: Case) -> None:
    case = dataclasses.replace(case, dtype=torch.float32)
    layer, x = case.layer(), case.input()
    grad = output_like(layer, x)
    # Sums of at most a few hundred products, each off by some units of 2**-24; no element is that close to a border.
    assert_same(results(layer, x, grad), generic(layer, x, grad), rtol=0.0, atol=2e-5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [max(1, dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a]) for a in (0, 1)]
    size = [draw(st.integers(least[a], least[a] + 6)) for a in (0, 1)]
    qmin = draw(st.sampled_from([0, -4, -7]))
    return Case(
        (draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), size[0], size[1]),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        zero=draw(st.sampled_from([None, float(qmin), float(qmin + 3), float(qmin + 7)])),
        qmin=qmin,
        influence=draw(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])),
        fused=draw(st.booleans()),
        terms=draw(st.integers(1, 3)),
    )


@given(cases(), st.integers(0, 99))
def test_any_convolution_is_that_of_the_quantizer_on_patches(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = case.layer(), case.input()
    assert _Border.of(layer.patch_quantizer) is not None
    grad = output_like(layer, x)
    assert_same(results(layer, x, grad), generic(layer, x, grad), **DOUBLE)


@pytest.mark.parametrize("index", [(3, 1, 1), (1, 9, 1), (1, 1, 1), (1,), (9, 1)])
def test_borders_that_are_shared_are_the_same_border(index: tuple[int, ...]) -> None:
    case = Case((2, 3, 6, 5), 4, influence=0.5)
    layer, x = case.layer(index=index), case.input()
    grad = output_like(layer, x)
    assert_same(results(layer, x, grad), generic(layer, x, grad), **DOUBLE)


def test_a_border_without_bias_and_of_one_image_works() -> None:
    layer, x = Case((1, 3, 6, 5), 4).layer(), torch.randn(3, 6, 5, dtype=torch.float64)
    layer.bias = None
    grad = output_like(layer, x)
    assert_same(results(layer, x, grad), generic(layer, x, grad), **DOUBLE)


@pytest.mark.parametrize("fused", [False, True])
def test_layout_of_the_input_does_not_matter(fused: bool) -> None:
    layer, x = Case((2, 3, 6, 5), 4, fused=fused).layer(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    grad = output_like(layer, x)
    expected = results(layer, x, grad)
    layouts = (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3))
    for other in layouts:
        assert_same(results(layer, other, grad.to(memory_format=torch.channels_last)), expected, **DOUBLE)


@pytest.mark.parametrize("shape", [(0, 3, 6, 5), (0, 3, 1, 1)])
def test_no_images_have_no_output_and_no_gradient(shape: tuple[int, int, int, int]) -> None:
    case = Case(shape, 4)
    layer, x = case.layer(), case.input()
    found = results(layer, x, output_like(layer, x))
    assert found["y"].shape == (0, 4, *shape[2:])
    assert all(not value.any() for value in found.values())


@both
def test_numbers_that_are_none_reach_the_windows_that_see_them(case: Case) -> None:
    layer, x = case.layer(), case.input()
    x[0, 0, 0, 0] = torch.nan
    grad = output_like(layer, x)
    found, expected = results(layer, x, grad), generic(layer, x, grad)
    for name in ("y", "x", "weight"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


def test_zero_stays_zero_whatever_the_border() -> None:
    x = torch.zeros(1, 2, 3, 3)
    for value in (-9.0, 0.0, 9.0):
        coefficients = torch.full((1, 2), value)
        y = ops.border_quantize(x, torch.tensor([0.3, 2.0, 1.0]), coefficients, [0.0, 7.0, -2.0, 5.0])
        torch.testing.assert_close(y, x, rtol=0, atol=0)


def test_influence_is_read_when_the_layer_runs() -> None:
    layer, x = Case((2, 3, 6, 5), 4, influence=0.0).layer(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    y = layer(x)
    layer.patch_quantizer.rounding.set_influence(1.0)
    grad = output_like(layer, x)
    assert not torch.equal(layer(x), y)
    assert_same(results(layer, x, grad), generic(layer, x, grad), **DOUBLE)


@pytest.mark.parametrize("change", ["bound", "degree", "hook", "channels", "sequence", "rounding"])
def test_other_quantizers_are_left_alone(change: str) -> None:
    layer, x = Case((2, 3, 6, 5), 4).layer(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    quantizer = layer.patch_quantizer
    calls = []
    if change == "bound":
        quantizer.rounding.bound = steep
    if change == "degree":
        quantizer.rounding = LearnedBorder.nearest((3, 9, 1), low=0.0, high=7.0, degree=3, bound=rectified).double()
    if change == "hook":
        quantizer.rounding.register_forward_hook(lambda *_: calls.append(1))
    if change == "channels":
        quantizer.grid.scale = nn.Parameter(torch.full((1, 3, 1, 1), 0.3, dtype=torch.float64))
    if change == "sequence":
        layer.patch_quantizer = nn.Sequential(quantizer)
    if change == "rounding":
        quantizer.rounding = Quantizer(quantizer.grid).rounding
    assert _Border.of(layer.patch_quantizer) is None
    layer(x)
    assert bool(calls) == (change == "hook")


def test_other_dtypes_are_left_alone() -> None:
    layer = dataclasses.replace(CASES[0], dtype=torch.float32).layer()
    border = _Border.of(layer.patch_quantizer)
    x = torch.randn(2, 3, 6, 5)
    assert border.fits(x, layer.weight, layer.bias)
    assert not border.fits(x.double(), layer.weight, layer.bias)
    assert not border.fits(x.bfloat16(), layer.weight.bfloat16(), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not border.fits(x, layer.weight, layer.bias)


def test_what_does_not_fit_raises_what_the_border_raises() -> None:
    layer = Case((2, 3, 6, 5), 4).layer(index=(5, 9, 1))
    with pytest.raises(ValueError, match="make one for this layer"):
        layer(torch.randn(2, 3, 6, 5, dtype=torch.float64))


ARGUMENTS = [[0.0, 7.0, 0.0, 7.0], [2, 1, 1, 1, 1]]


def arguments(*, fused: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    x, weight, bias = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    grid, coefficients = torch.tensor([0.3, 0.0, 0.5]), torch.randn(3, 3, 9)
    tensors = [x, weight, bias, grid, coefficients, torch.randn(3, 9) if fused else None]
    return [None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in tensors]


# Warnings of torch about its own functions, and of opcheck, which looks at the gradients of what it made itself.
checked = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def with_marks(function):
    for mark in (pytest.mark.compile, *checked):
        function = mark(function)
    return function


@with_marks
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_pass_opcheck(fused: bool, dtype: torch.dtype) -> None:
    inputs = arguments(fused=fused, dtype=dtype)
    torch.library.opcheck(ops.border_conv2d, (*inputs, *ARGUMENTS))
    x, weight, _, grid, coefficients, fusion = (None if t is None else t.detach() for t in inputs)
    grad = torch.randn(2, 4, 2, 3, dtype=dtype)
    torch.library.opcheck(ops.border_conv2d_grad, (grad, x, weight, grid, coefficients, fusion, *ARGUMENTS))
    if not fused:
        shared = coefficients[:, :, 0].clone()
        inputs = [tensor.clone().requires_grad_() for tensor in (x, grid, shared)]
        torch.library.opcheck(ops.border_quantize, (*inputs, ARGUMENTS[0]))
        torch.library.opcheck(ops.border_quantize_grad, (x, x, grid, shared, ARGUMENTS[0]))


@with_marks
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3], CASES[6]], ids=str)
def test_layers_compile_as_one_graph_with_their_gradients(case: Case) -> None:
    case = dataclasses.replace(case, dtype=torch.float32)
    layer, x = case.layer(), case.input()
    grad = output_like(layer, x)
    expected = results(layer, x, grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    layer.zero_grad()
    y.backward(grad)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    del expected["x"]
    # The same operators on the same numbers; what is around them is the same as well.
    assert_same({"y": y.detach(), **found}, expected, rtol=0.0, atol=1e-6)


def test_gradients_pass_through_the_reference_where_it_is_asked_for() -> None:
    case = dataclasses.replace(CASES[1], dtype=torch.float32)
    layer, x = case.layer(), case.input()
    grad = output_like(layer, x)
    with only("reference"):
        found = results(layer, x, grad)
    # See test_float32_differs_by_rounding_errors.
    assert_same(found, results(layer, x, grad), rtol=0.0, atol=2e-5)


def test_exported_graphs_hold_standard_operators() -> None:
    layer = dataclasses.replace(CASES[0], dtype=torch.float32).layer().eval().requires_grad_(False)
    program = torch.export.export(layer, (torch.randn(2, 3, 6, 5),))
    assert not any("q_aquant" in str(node.target) for node in program.graph.nodes)
