"""The gradient of rounding, scaled by how far it was rounded."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import CodebookGrid, NearestEven, RangeError, UniformGrid
from q_core.testing import check_rounding
from q_nulsq.peers.dorefa import DorefaGrid
from q_nulsq.peers.ewgs import ElementwiseScaling
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.peers.pact import PactGrid
from q_nulsq.peers.uniq import UniqGrid

exact = {"rtol": 0, "atol": 0}
seeds = st.integers(0, 2**32 - 1)
wide = {"dtype": torch.float64}

GRIDS = {
    "uniform": lambda: UniformGrid(torch.full((1,), 0.3, **wide), qmin=-4, qmax=3, learnable=True),
    "lsq+": lambda: LsqPlusGrid(torch.full((1,), 0.3, **wide), torch.full((1,), -0.1, **wide), qmin=-4, qmax=3),
    "uniq": lambda: UniqGrid(torch.full((1,), 0.3, **wide), qmin=-4, qmax=3),
    "pact": lambda: PactGrid(torch.full((1,), 1.1, **wide), qmax=7),
    "dorefa": lambda: DorefaGrid(qmin=-4, qmax=3).double(),
    "codebook": lambda: CodebookGrid(torch.tensor([[-1.0, -0.4, 0.0, 0.1, 0.7]], **wide), qmin=-2),
}


def gradients(grid, x, upstream, rounding):
    leaf = x.clone().requires_grad_()
    levels = grid.fake_quantize(leaf, rounding)
    return (levels.detach(), *torch.autograd.grad((levels * upstream).sum(), [leaf, *grid.parameters()]))


def test_the_laws_hold_but_for_the_gradient_of_one():
    check_rounding(ElementwiseScaling(0.0))
    check_rounding(ElementwiseScaling(0.7), waive=["gradient"])


@settings(deadline=None, max_examples=60)
@given(seed=seeds, delta=st.floats(0, 3))
def test_the_gradient_is_the_printed_one(seed, delta):
    generator = torch.Generator().manual_seed(seed)
    u = (torch.randn(31, generator=generator, **wide) * 4).requires_grad_()
    g = torch.randn(31, generator=generator, **wide)
    g[:2] = 0
    codes = ElementwiseScaling(delta)(u)
    (found,) = torch.autograd.grad(codes, u, g)
    torch.testing.assert_close(codes.detach(), u.detach().round(), **exact)
    expected = []
    for real, upstream in zip(u.tolist(), g.tolist(), strict=True):
        sign = (upstream > 0) - (upstream < 0)
        expected.append(upstream * (1 + delta * sign * (real - round(real))))
    # A product and a sum in another order: two roundings of numbers below 20.
    torch.testing.assert_close(found, torch.tensor(expected, **wide), rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, bits=st.integers(1, 8), delta=st.floats(0, 1))
def test_measured_as_a_part_of_the_range_it_is_the_published_code(seed, bits, delta):
    """There the quantizer maps [0, 1] to itself and u - q is measured in that; the steps are divided out."""
    generator = torch.Generator().manual_seed(seed)
    steps = 2**bits - 1
    x = torch.rand(31, generator=generator, **wide).requires_grad_()
    g = torch.randn(31, generator=generator, **wide)
    quantized = ElementwiseScaling(delta / steps)(x * steps) / steps
    (found,) = torch.autograd.grad(quantized, x, g)
    expected = g * (1 + delta * g.sign() * (x - quantized).detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)  # a few roundings of numbers below 10


def test_what_is_farther_from_the_threshold_it_is_driven_to_moves_more():
    u = torch.tensor([1.6, 2.0, 2.4], requires_grad=True)
    (down,) = torch.autograd.grad(ElementwiseScaling(0.5)(u).sum(), u)
    (up,) = torch.autograd.grad(-ElementwiseScaling(0.5)(u).sum(), u)
    # Descent goes down where the gradient is positive: to the threshold at 1.5, from which 2.4 is farthest. The
    # fraction of a float32 number near 2 is known to 2**-23.
    torch.testing.assert_close(down, torch.tensor([0.8, 1.0, 1.2]), rtol=0, atol=2e-7)
    torch.testing.assert_close(up, -torch.tensor([1.2, 1.0, 0.8]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", GRIDS)
def test_with_no_scaling_it_is_straight_through_in_every_grid(name):
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(400, generator=generator, **wide), torch.randn(400, generator=generator, **wide)
    expected = gradients(GRIDS[name](), x, upstream, NearestEven())
    found = gradients(GRIDS[name](), x, upstream, ElementwiseScaling(0.0))
    # 400 terms below 20 in another order; no element is within an ulp of a tie.
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-11)


@pytest.mark.parametrize("name", GRIDS)
def test_in_every_grid_the_gradient_of_the_data_is_scaled_and_the_levels_are_not(name):
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(400, generator=generator, **wide), torch.randn(400, generator=generator, **wide)
    grid = GRIDS[name]()
    levels, dx, *_ = gradients(grid, x, upstream, ElementwiseScaling(0.5))
    plain, straight, *_ = gradients(grid, x, upstream, NearestEven())
    torch.testing.assert_close(levels, plain, rtol=0, atol=1e-15)  # computed by another formula
    table = grid.levels()[0]
    cell = (torch.searchsorted(table, x, right=True) - 1).clamp(0, len(table) - 2)
    moved = (x - plain) / (table[cell + 1] - table[cell])  # u - q, in codes
    torch.testing.assert_close(dx, straight * (1 + 0.5 * upstream.sign() * moved), rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, delta=st.floats(0, 1), name=st.sampled_from(["lsq+", "uniq"]))
def test_the_gradient_of_a_scale_is_that_of_the_composition(seed, delta, name):
    """Written out with the rounding as a function: what the tables give is the same."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(50, generator=generator, **wide), torch.randn(50, generator=generator, **wide)
    grid, rounding = GRIDS[name](), ElementwiseScaling(delta)
    shift = grid.offset if name == "lsq+" else grid.scale / 2
    low, high = (grid.scale * code + shift for code in (grid.qmin, grid.qmax))
    inner = torch.where(x < low, low, torch.where(x > high, high, x))
    composed = grid.scale * rounding((inner - shift) / grid.scale) + shift
    expected = torch.autograd.grad((composed * upstream).sum(), list(grid.parameters()))
    _, _, *found = gradients(grid, x, upstream, rounding)
    # 50 terms below 30, each rounded a few times.
    torch.testing.assert_close(tuple(found), expected, rtol=0, atol=1e-12)


def test_frozen_it_is_the_rounding_of_the_same_codes():
    frozen = ElementwiseScaling(0.5).frozen()
    assert type(frozen) is NearestEven
    u = torch.arange(-20, 20) / 4
    torch.testing.assert_close(frozen(u), ElementwiseScaling(0.5)(u), **exact)


def test_it_is_rebuilt_from_its_facts():
    again = ElementwiseScaling.from_facts(json.loads(json.dumps(ElementwiseScaling(0.25).facts())))
    assert again.delta == 0.25
    assert "delta 0.25" in repr(again)


@pytest.mark.parametrize("delta", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(delta):
    with pytest.raises(RangeError, match="0 is the straight-through gradient"):
        ElementwiseScaling(delta)
