"""Distances of the rows of two activations: value, gradients to both, memory, registration."""

import resource

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from q_adder import ops
from q_adder.functional import adder_linear, adder_matmul
from q_adder.layers import AdderMatmul
from q_core import ShapeError

# Sums of at most 20 differences below 20: 1e-12 is some ten units in the last place of a float64.
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@st.composite
def operands(draw):
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    n, m, k = (draw(st.integers(1, 7)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (2 * torch.randn(*batch, rows, k, dtype=torch.float64, generator=generator) for rows in (n, m))
    return a, b, torch.randn(*batch, n, m, dtype=torch.float64, generator=generator)


@settings(deadline=None, max_examples=100)
@given(case=operands())
def test_every_row_meets_every_row(case):
    a, b, _ = case
    expected = -(a.unsqueeze(-2) - b.unsqueeze(-3)).abs().sum(-1)
    torch.testing.assert_close(adder_matmul(a, b), expected, **EXACT)


@settings(deadline=None, max_examples=100)
@given(case=operands())
def test_both_operands_get_the_gradient_of_an_input(case):
    a, b, grad = case
    a, b = a.requires_grad_(), b.requires_grad_()
    actual = torch.autograd.grad(adder_matmul(a, b), (a, b), grad)
    slope = (b.detach().unsqueeze(-3) - a.detach().unsqueeze(-2)).clamp(-1, 1) * grad.unsqueeze(-1)
    torch.testing.assert_close(actual, (slope.sum(-2), -slope.sum(-3)), **EXACT)


@settings(deadline=None, max_examples=50)
@given(case=operands())
def test_changing_places_transposes_the_result(case):
    a, b, _ = case
    torch.testing.assert_close(adder_matmul(b, a), adder_matmul(a, b).mT, **EXACT)


def test_one_batch_is_a_linear_layer():
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.equal(adder_matmul(a, b), adder_linear(a, b))


def test_operands_need_not_be_contiguous():
    a, b = torch.randn(2, 6, 5).mT, torch.randn(6, 2, 4).permute(1, 2, 0)
    assert torch.equal(adder_matmul(a, b), adder_matmul(a.contiguous(), b.contiguous()))


def test_ties_get_no_gradient():
    a = torch.ones(1, 1, 2, requires_grad=True)
    adder_matmul(a, torch.ones(1, 1, 2)).sum().backward()
    assert torch.equal(a.grad, torch.zeros(1, 1, 2))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_empty_operands_give_zeros_and_no_gradient(shape):
    a = torch.randn(*shape, requires_grad=True)
    b = torch.randn(shape[0], 4, shape[2], requires_grad=True)
    out = adder_matmul(a, b)
    assert torch.equal(out, torch.zeros(shape[0], shape[1], 4))
    out.sum().backward()
    assert torch.equal(a.grad, torch.zeros(shape))
    assert torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    a, b = torch.randn(2, 5, 300).to(dtype), torch.randn(2, 4, 300).to(dtype)
    expected = adder_matmul(a.float(), b.float())
    # One rounding of the result, to 8 or 11 bits.
    torch.testing.assert_close(adder_matmul(a, b).float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_mixed_dtypes_promote():
    a, b = torch.randn(5, 3, dtype=torch.bfloat16), torch.randn(4, 3)
    assert torch.equal(adder_matmul(a, b), adder_matmul(a.float(), b))


@pytest.mark.parametrize(("left", "right"), [((2, 3, 4), (2, 5, 3)), ((2, 3, 4), (1, 5, 4)), ((3, 4), (2, 5, 4))])
def test_rows_and_batches_that_do_not_fit_are_refused(left, right):
    with pytest.raises(ShapeError, match="must be equal"):
        # Past the annotations, which refuse such shapes by themselves where they are checked.
        getattr(adder_matmul, "__wrapped__", adder_matmul)(torch.randn(left), torch.randn(right))


def test_operators_pass_opcheck():
    a, b = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    torch.library.opcheck(ops.distance_matmul, (a, b))
    torch.library.opcheck(ops.distance_matmul_grad, (torch.randn(3, 5, 6), a.detach(), b.detach()))


def test_memory_is_that_of_inputs_outputs_and_a_panel():
    """The cube would take 4 x 1024 x 1024 x 96 x 4 bytes = 1.6 GB, forward and again backward."""
    a, b = (torch.randn(4, 1024, 96, requires_grad=True) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = adder_matmul(a, b)
    out.backward(torch.ones_like(out))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    # Output, its gradient and the transposed copy are 50 MB, the operands and theirs 10; panels and slack are 150 more.
    assert grown < 210, f"peak memory grew by {grown:.0f} MB"


@pytest.mark.compile
def test_the_module_compiles_as_one_graph_with_its_gradients():
    layer = AdderMatmul()
    a, b = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(2))
    expected = layer(a, b)
    wanted = torch.autograd.grad(expected.square().sum(), (a, b))
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(a, b)
    assert torch.equal(actual, expected)
    for one, other in zip(torch.autograd.grad(actual.square().sum(), (a, b)), wanted, strict=True):
        assert torch.equal(one, other)
