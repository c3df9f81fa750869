"""The operators are what torch expects of one; every layer compiles as one graph with its gradients and exports."""

import io

import pytest
import torch
from torch import nn

from q_adder import AdderConv2d, AdderLinear, ops

pytestmark = [
    pytest.mark.compile,
    # Both are torch's own: Dynamo when it traces any autograd.Function, Inductor when it is imported.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    # And this of opcheck, which looks at the gradients of what it made itself.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

ARGUMENTS = ([2, 1], [1, 2], 2)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("exponent", [1.0, 1.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_on_reals_pass_opcheck(exponent, layout):
    x = torch.randn(2, 4, 7, 6).to(memory_format=layout).requires_grad_()
    weight = torch.randn(4, 2, 3, 2).to(memory_format=layout).requires_grad_()
    torch.library.opcheck(ops.distance_conv2d, (x, weight, *ARGUMENTS, exponent))
    grad = torch.randn_like(ops.distance_conv2d(x, weight, *ARGUMENTS, exponent)).to(memory_format=layout)
    detached = (grad.detach(), x.detach(), weight.detach(), *ARGUMENTS, exponent)
    torch.library.opcheck(ops.distance_conv2d_input_grad, detached)
    torch.library.opcheck(ops.distance_conv2d_weight_grad, detached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operators_on_reals_pass_opcheck_in_other_dtypes(dtype):
    x, weight = torch.randn(2, 4, 7, 6, dtype=dtype), torch.randn(4, 2, 3, 2, dtype=dtype)
    grad = torch.randn_like(ops.distance_conv2d(x, weight, *ARGUMENTS, 1.0))
    for op, arguments in (
        (ops.distance_conv2d, (x, weight)),
        (ops.distance_conv2d_input_grad, (grad, x, weight)),
        (ops.distance_conv2d_weight_grad, (grad, x, weight)),
    ):
        torch.library.opcheck(op, (*arguments, *ARGUMENTS, 1.0))


def test_the_operators_on_codes_pass_opcheck():
    x = torch.randint(0, 16, (2, 4, 7, 6), dtype=torch.uint8)
    weight = torch.randint(0, 16, (4, 2, 3, 2), dtype=torch.uint8)
    torch.library.opcheck(ops.code_distance_conv2d, (x, weight, *ARGUMENTS, 4))
    scale, zero = torch.tensor([0.25]), torch.tensor([3.0])
    levels = ((x - 3.0) * scale).requires_grad_()
    kernels = ((weight - 3.0) * scale).requires_grad_()
    torch.library.opcheck(ops.tied_distance_conv2d, (levels, kernels, scale, zero, 4, *ARGUMENTS))


def test_the_operators_on_rows_pass_opcheck():
    a, b = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    torch.library.opcheck(ops.distance_matmul, (a, b))
    torch.library.opcheck(ops.distance_matmul_grad, (torch.randn(3, 5, 6), a.detach(), b.detach()))


def network():
    torch.manual_seed(1)
    layers = AdderConv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", bias=True), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*layers, AdderConv2d(6, 6, 3, groups=2, padding=1), nn.Flatten(), AdderLinear(96, 3)).eval()


def results(function, model, x):
    out = function(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))]


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_compiles_as_one_graph_with_its_gradients(dynamic):
    model, x = network(), torch.randn(3, 4, 8, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_equal(results(compiled, model, x), results(model, model, x))


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_a_layer_compiles_with_code_generation(exponent):
    model, x = AdderConv2d(4, 6, 3, padding=1, exponent=exponent), torch.randn(2, 4, 6, 6, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    assert_equal(results(compiled, model, x), results(model, model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_compiles_as_one_graph_under_autocast(dtype):
    model, x = network(), torch.randn(3, 4, 8, 8).to(dtype).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(x.float())  # outside, so that a graph of no autocast lies in the cache
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = results(compiled, model, x), results(model, model, x)
    assert actual[0].dtype == plain.dtype == torch.float32
    assert_equal(actual, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_survives_a_file(strict):
    model, x = network(), torch.randn(2, 4, 8, 8)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for images in (x, torch.randn(5, 4, 8, 8)):
        assert torch.equal(loaded(images), model(images))
    assert "q_adder.distance_conv2d" in str(exported.graph)
