"""The gradient is that of the surrogate, equal steps are LSQ, and the residual says it all."""

import pytest
import torch
from hypothesis import given

from q_core import NearestEven, NearestTowardZero, Rounding, UniformGrid, functional
from q_nulsq import Exponential, Projection, Softplus, StepGrid

from . import oracles
from .cases import Case, cases

EXACT = {"rtol": 0, "atol": 0}


class PlainTowardZero(Rounding):
    """Rounds as `NearestTowardZero` does, but does not tell, so that the grid has to ask it for every element."""

    def forward(self, u):
        return functional.straight_through(torch.copysign(torch.ceil(u.abs() - 0.5), u), u)


def gradients(grid, x, upstream, rounding=None):
    leaf = x.clone().requires_grad_()
    out = grid.fake_quantize(leaf, rounding or NearestTowardZero())
    return out.detach(), *torch.autograd.grad(out, [leaf, grid.steps], upstream)


def by_surrogate(case, grid, x, upstream):
    """Value and gradients of the oracle, tile by tile."""
    tiles = grid.tile_shape
    rows, parts = functional.to_tiles(x, tiles), functional.to_tiles(upstream, tiles)
    below, above = (side.reshape(rows.shape[0], side.shape[-1]) for side in grid.sides())
    found = []
    for row, part, *sides in zip(rows, parts, below, above, strict=True):
        leaves = [tensor.clone().requires_grad_() for tensor in (row, *sides)]
        out = oracles.surrogate(*leaves)
        grads = torch.autograd.grad(out, leaves, part, allow_unused=True)
        found.append([out.detach(), grads[0], torch.cat([g for g in grads[1:] if g is not None])])
    out, to_x, to_steps = (torch.stack(parts) for parts in zip(*found, strict=True))
    shape = tuple(x.shape)
    return (
        functional.from_tiles(out, tiles, shape),
        functional.from_tiles(to_x, tiles, shape),
        to_steps.reshape(grid.steps.shape),
    )


def assert_as_surrogate(case, grid, x, upstream, rounding=None):
    out, to_x, to_steps = gradients(grid, x, upstream, rounding)
    expected_out, expected_to_x, expected_to_steps = by_surrogate(case, grid, x, upstream)
    # A level is a sum of up to 255 steps, each addition rounded: 255 * 1.1e-16 of the largest.
    largest = float(grid.levels().abs().max())
    torch.testing.assert_close(out, expected_out, rtol=0, atol=6e-14 * largest)
    torch.testing.assert_close(to_x, expected_to_x, rtol=0, atol=1e-13)
    # The residual carries that error over to the gradient, divided by the smallest step, once for each of 65 elements
    # with an upstream of 5 at most.
    smallest = float(grid.widths.min())
    torch.testing.assert_close(to_steps, expected_to_steps, rtol=1e-12, atol=65 * 5 * 6e-14 * (1 + largest / smallest))


@given(case=cases())
def test_value_and_gradients_are_those_of_the_surrogate(case):
    grid = case.grid()
    x = case.x(grid)
    assert_as_surrogate(case, grid, x, case.upstream(x))


@given(case=cases(decades=2.0))
def test_a_rounding_that_is_asked_for_every_element_has_the_same_gradient(case):
    grid = case.grid()
    x = case.x(grid)
    assert_as_surrogate(case, grid, x, case.upstream(x), PlainTowardZero())


@given(case=cases())
def test_finite_differences_of_the_surrogate_with_frozen_residuals_are_the_gradient(case):
    """Not of Q itself, whose derivative is 0 almost everywhere."""
    case = Case(((1,), (37,)), case.below, case.above, min(case.decades, 1.0), case.seed)
    grid = case.grid()
    x = case.x(grid)
    upstream = case.upstream(x)
    _, _, to_steps = gradients(grid, x, upstream)
    low, high = grid.levels()[0, 0], grid.levels()[0, -1]
    steps = grid.steps.detach().clone()
    residual = oracle_residuals(grid, x)

    def frozen(moved):
        below, above = moved[: -grid.qmin], moved[-grid.qmin :]
        ends = torch.where(x > high, above.sum(), torch.where(x < low, -below.sum(), x))
        return ((ends + residual @ moved) * upstream).sum()

    h = 1e-6
    for k in range(steps.shape[1]):
        shift = torch.zeros_like(steps[0])
        shift[k] = h
        difference = (frozen(steps[0] + shift) - frozen(steps[0] - shift)) / (2 * h)
        # The function is linear in the steps, so what is left is rounding: 1e-15 of sums of 40 over h.
        torch.testing.assert_close(to_steps[0, k], difference, rtol=1e-6, atol=1e-6)


def oracle_residuals(grid, x):
    """Return sg[H_k - t_k] for each element and step, with the sign of the side."""
    below, above = (side[0].tolist() for side in grid.sides())
    low, high = float(grid.levels()[0, 0]), float(grid.levels()[0, -1])
    rows = [
        oracles.jacobian(value, below, above) if low <= value <= high else [0.0] * grid.steps.shape[1]
        for value in x.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("positivity", [Projection(), Softplus(), Exponential()])
@given(case=cases(decades=2.0))
def test_a_positivity_multiplies_the_gradient_by_its_own(positivity, case):
    grid, plain = case.grid(positivity=positivity), case.grid()
    with torch.no_grad():  # the inverse of a softplus is not exact; start from the same steps
        plain.steps.copy_(positivity.steps(grid.steps))
    x = case.x(plain)
    upstream = case.upstream(x)
    out, to_x, to_raw = gradients(grid, x, upstream)
    expected_out, expected_to_x, to_steps = gradients(plain, x, upstream)
    torch.testing.assert_close(out, expected_out, **EXACT)
    torch.testing.assert_close(to_x, expected_to_x, **EXACT)
    raw = grid.steps.detach().clone().requires_grad_()
    (own,) = torch.autograd.grad(positivity.steps(raw), raw, to_steps)
    # The same product, taken at another place of the chain: a few roundings.
    torch.testing.assert_close(to_raw, own, rtol=1e-12, atol=1e-14)


def test_the_gradient_scale_multiplies_the_gradient_of_the_steps_alone():
    case = Case(((5, 1, 1, 1), (5, 3, 3, 1)), 4, 3, 1.0, 0)
    x = case.x(case.grid())
    upstream = case.upstream(x)
    out, to_x, to_steps = gradients(case.grid(), x, upstream)
    scaled = gradients(case.grid(gradient_scale=0.125), x, upstream)
    torch.testing.assert_close(scaled, (out, to_x, to_steps * 0.125), **EXACT)


def lsq(case, scale, rounding, x, upstream):
    grid = UniformGrid(scale, qmin=-case.below, qmax=case.above, learnable=True)
    leaf = x.clone().requires_grad_()
    out = grid.fake_quantize(leaf, rounding)
    return out.detach(), *torch.autograd.grad(out, [leaf, grid.scale], upstream)


@given(case=cases())
def test_equal_steps_reduce_to_lsq(case):
    """Off odd half steps; also beyond the ends, where LSQ's gradient is -Qn and Qp and that of each step 1."""
    scale = 10.0 ** (torch.rand(case.tiling[0], generator=case.generator(), dtype=torch.float64) * 4 - 2)
    side = [scale.unsqueeze(-1).expand(*scale.shape, count) for count in (case.below, case.above)]
    grid = StepGrid(*(each if each.shape[-1] else None for each in side))
    x = case.x(grid)
    upstream = case.upstream(x)
    for rounding in (NearestEven(), NearestTowardZero()):
        out, to_x, to_steps = gradients(grid, x, upstream, rounding)
        expected_out, expected_to_x, to_scale = lsq(case, scale, NearestEven(), x, upstream)
        # k * scale, and the sum of k scales: 255 roundings of 1.1e-16.
        torch.testing.assert_close(out, expected_out, rtol=6e-14, atol=0)
        torch.testing.assert_close(to_x, expected_to_x, **EXACT)
        # One rounding of k for each of 65 elements with an upstream of 5 at most: 65 * 5 * 255 * 2.2e-16.
        torch.testing.assert_close(to_steps.sum(-1), to_scale, rtol=1e-12, atol=2e-11)


@pytest.mark.parametrize(("below", "above"), [(0, 3), (0, 15), (2, 1), (8, 7), (7, 7)])
def test_with_ties_to_even_equal_steps_are_lsq_everywhere(below, above):
    """Steps and reals are exact in binary, so ties are ties in either form."""
    scale = torch.tensor([0.25])
    grid = StepGrid(*(scale.expand(1, n) if n else None for n in (below, above)))
    x = torch.arange(-8 * 20, 8 * 20 + 1) / 32  # every eighth of a step
    upstream = torch.ones_like(x)
    out, to_x, to_steps = gradients(grid, x, upstream, NearestEven())
    case = Case(((1,), (1,)), below, above, 0.0, 0)
    expected_out, expected_to_x, to_scale = lsq(case, scale, NearestEven(), x, upstream)
    torch.testing.assert_close((out, to_x, to_steps.sum(-1)), (expected_out, expected_to_x, to_scale), **EXACT)


def test_ties_toward_zero_differ_from_lsq_at_odd_half_steps_alone():
    """One and a half steps: LSQ takes the even code 2, nuLSQ the one nearer to zero."""
    grid = StepGrid(torch.full((1, 4), 0.5), torch.full((1, 3), 0.5))
    x = torch.arange(-64, 65) / 32
    nulsq = grid.fake_quantize(x, NearestTowardZero()).detach()
    even = UniformGrid(torch.tensor([0.5]), qmin=-4, qmax=3).fake_quantize(x, NearestEven())
    odd_ties = ((x.abs() == 0.75) | (x.abs() == 1.75)) & (x < 1.5)
    torch.testing.assert_close(nulsq != even, odd_ties, **EXACT)
    torch.testing.assert_close(nulsq[odd_ties].abs(), even[odd_ties].abs() - 0.5, **EXACT)


@given(case=cases())
def test_inside_the_range_one_step_learns_and_its_gradient_is_the_residual(case):
    """With a tile for each element, the gradient of the steps is the Jacobian."""
    case = Case(((1,), (37,)), case.below, case.above, case.decades, case.seed)
    x = case.x(case.grid()).unsqueeze(1)
    below, above = (side.expand(37, -1, -1) for side in case.grid().sides())
    grid = StepGrid(below if case.below else None, above if case.above else None)
    out, to_x, jacobian = gradients(grid, x, torch.ones_like(x))
    inside = to_x[:, 0] == 1
    products = (grid.steps.detach() * jacobian).squeeze(1)
    # A quotient times its divisor is the dividend but for two roundings.
    torch.testing.assert_close(products[inside].sum(1), (out - x)[inside, 0], rtol=4e-16, atol=0)
    assert bool(((jacobian != 0).sum(-1)[inside] <= 1).all())
    # A level is rounded, so a residual may be half a step and a rounding of the largest level.
    slack = 2.3e-16 * grid.levels().abs().amax(-1, keepdim=True) / grid.steps.detach()
    assert bool((jacobian.abs() <= 0.5 + slack)[inside].all())
    beyond = torch.cat([-(x < 0).expand(-1, case.below).double(), (x > 0).expand(-1, case.above).double()], 1)
    torch.testing.assert_close(jacobian[~inside].squeeze(1), beyond[~inside], **EXACT)


@given(case=cases())
def test_forward_and_backward_take_the_same_side_at_every_threshold(case):
    """Eight floats either side of each threshold, in float32: the residual belongs to the level that was taken."""
    case = Case(((1,), (1,)), case.below, case.above, min(case.decades, 2.0), case.seed)
    steps = case.grid(torch.float32)
    x = ulps_around(middles(steps)[0], 8).unsqueeze(1)
    count = x.shape[0]
    below, above = (side.expand(count, -1, -1) for side in steps.sides())
    grid = StepGrid(below if case.below else None, above if case.above else None)
    out, _, jacobian = gradients(grid, x, torch.ones_like(x))
    residual = (grid.steps.detach() * jacobian).sum((-1, -2))
    # Equal but for the rounding of a quotient; a wrong side would be off by a step.
    torch.testing.assert_close(residual, (out - x).squeeze(1), rtol=2.4e-7, atol=0)


def middles(grid):
    levels = grid.levels()
    return (levels[..., :-1].double() + levels[..., 1:].double()).div(2).to(levels.dtype)


def ulps_around(values, count):
    """Return each value with as many floats on either side of it."""
    rings = [values]
    for target in (-torch.inf, torch.inf):
        moved = values
        for _ in range(count):
            moved = torch.nextafter(moved, torch.full_like(moved, target))
            rings.append(moved)
    return torch.cat(rings)


def test_nan_and_infinity_are_told_apart_in_the_gradient():
    grid = StepGrid(torch.full((1, 2), 0.5), torch.full((1, 1), 0.5))
    x = torch.tensor([-torch.inf, torch.inf])
    out, to_x, to_steps = gradients(grid, x, torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 0.5]), **EXACT)
    torch.testing.assert_close(to_x, torch.zeros(2), **EXACT)
    torch.testing.assert_close(to_steps, torch.tensor([[-2.0, -2.0, 3.0]]), **EXACT)
    _, _, to_steps = gradients(grid, torch.tensor([torch.nan, 0.1]), torch.ones(2))
    assert not bool(to_steps.isfinite().all())  # a NaN is not lost on the way to the steps


def test_an_empty_tensor_has_an_empty_result_and_no_gradient():
    grid = StepGrid(torch.full((1, 2), 0.5), torch.full((1, 1), 0.5))
    out, to_x, to_steps = gradients(grid, torch.empty(0, 3), torch.empty(0, 3))
    assert out.shape == to_x.shape == (0, 3)
    torch.testing.assert_close(to_steps, torch.zeros(1, 3), **EXACT)
