"""A grid of steps compiles as one graph, forward and backward, with the same results."""

import copy

import pytest
import torch

from q_core import NearestEven, NearestTowardZero, Quantizer
from q_nulsq import Exponential, Projection, Softplus, StepGrid

pytestmark = [
    pytest.mark.compile,
    # Both are torch's own: Dynamo when it traces any autograd.Function, Inductor when it is imported.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

EXACT = {"rtol": 0, "atol": 0}
TILINGS = [((1,), (2, 3, 5, 1)), ((6, 1, 1, 1), (6, 3, 3, 3)), ((6, 3), (6, 9))]


def make(tiles, below, above, positivity):
    sides = [torch.rand(*tiles, count) * 0.5 + 0.05 for count in (below, above)]
    return StepGrid(*(side if side.shape[-1] else None for side in sides), positivity=positivity, gradient_scale=0.5)


def results(run, module, x):
    leaf = x.clone().requires_grad_()
    out = run(leaf)
    upstream = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaf, module.grid.steps], upstream)]


def assert_same(quantizer, x, backend):
    twin = copy.deepcopy(quantizer)
    torch.compiler.reset()  # each case is a graph of its own, and not one more version of the last
    found = results(torch.compile(twin, fullgraph=True, backend=backend), twin, x)
    expected = results(quantizer, quantizer, x)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    # The order of a sum of up to 162 terms of size 1 may differ.
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=162 * 6e-8)


@pytest.mark.parametrize(("tiles", "shape"), TILINGS)
@pytest.mark.parametrize("rounding", [NearestEven, NearestTowardZero])
def test_it_is_one_graph_forward_and_backward(tiles, shape, rounding):
    assert_same(Quantizer(make(tiles, 4, 3, Projection()), rounding()), torch.randn(shape), "aot_eager")


@pytest.mark.parametrize("positivity", [Softplus, Exponential])
def test_every_positivity_is_one_graph_forward_and_backward(positivity):
    assert_same(Quantizer(make((1,), 4, 3, positivity()), NearestTowardZero()), torch.randn(2, 3, 5), "aot_eager")


@pytest.mark.parametrize(("below", "above"), [(0, 3), (1, 0), (0, 255)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_one_graph_in_every_dtype_and_width(below, above, dtype):
    quantizer, x = Quantizer(make((1,), below, above, Projection()), NearestTowardZero()), torch.randn(7, 5).to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), quantizer(x).detach(), **EXACT)


def test_what_inductor_generates_takes_the_same_levels():
    quantizer = Quantizer(make((1,), 4, 3, Projection()), NearestTowardZero())
    assert_same(quantizer, torch.randn(2, 3, 5, 7), "inductor")


def test_projection_is_one_graph():
    grid = make((3, 1), 2, 1, Projection())
    with torch.no_grad():
        grid.steps[..., 0] = -1.0
    twin = copy.deepcopy(grid)
    torch.compiler.reset()
    torch.compile(twin.project, fullgraph=True, backend="aot_eager")()
    grid.project()
    torch.testing.assert_close(twin.steps, grid.steps, **EXACT)
    assert int(twin.raised) == int(grid.raised) == 3
