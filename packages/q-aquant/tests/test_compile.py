"""What reconstruction leaves compiles as one graph and exports, with the same results."""

import pytest
import torch
from torch import nn

from q_aquant import ChannelBorder, ElementBorder, WindowBorder, a_rounding, aquant, qdrop
from q_core import pack

from .networks import images, net

pytestmark = [
    pytest.mark.compile,
    # Both are torch's own: Dynamo when it traces any autograd.Function, Inductor when it is imported.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

FEW = {"iterations": 12, "batch_size": 8, "looks": 3}
METHODS = {
    "aquant": (aquant, FEW),
    "linear": (aquant, FEW | {"form": ElementBorder(degree=1)}),
    "fused": (aquant, FEW | {"form": WindowBorder()}),
    "shared": (aquant, FEW | {"form": ChannelBorder()}),
    "qdrop": (qdrop, FEW),
    "a_rounding": (a_rounding, {}),
}
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def fresh():
    """Compile every case anew, within the limit of recompilations."""
    torch.compiler.reset()


def finished(name: str) -> nn.Module:
    method, options = METHODS[name]
    return method(net(), [images()], weight_bits=3, activation_bits=3, progress=False, **options).model


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_model_and_a_packed_one_are_one_graph(name):
    model, x = finished(name), images(5)
    for stage in (model, pack(model)):
        compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), stage(x), **EXACT)  # the same kernels in the same order


@pytest.mark.parametrize("name", ["aquant", "fused"])
def test_a_finished_model_is_one_graph_with_gradients(name):
    """A unit under reconstruction is differentiated by what it was given; so must be what it became."""
    model = finished(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for form in (model, compiled):
        x = images(5).requires_grad_()
        gradients.append(torch.autograd.grad(form(x).square().sum(), x)[0])
    # The order in which the backward pass adds may differ: one rounding of float32 for each of 72 terms below 1.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=72 * 6e-8)


def test_a_finished_model_is_one_graph_for_every_batch_size():
    """The second size makes the batch a symbol, and no further size compiles again."""
    model = finished("aquant")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 4, 7):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)), **EXACT)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_model_is_exported_with_its_codes_as_integers(name):
    packed, x = pack(finished(name)), images(5)
    exported = torch.export.export(packed, (x,))
    words = {key for key, tensor in exported.state_dict.items() if tensor.dtype == torch.int32}
    assert len(words) == 7  # the layers of the network
    assert all(key.endswith("packed_weight.words") for key in words)
    with torch.no_grad():
        found = exported.module()(x)
        # The graph holds standard operators, where the layers have one of their own that sums in another order: 72
        # products below 10 for each output, in six layers.
        torch.testing.assert_close(found, packed(x), rtol=0, atol=6 * 72 * 10 * 6e-8)
