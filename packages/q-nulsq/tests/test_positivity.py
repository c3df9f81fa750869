"""Steps stay positive under any optimizer, and levels in their order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from q_core import NearestTowardZero, RangeError
from q_nulsq import Exponential, Projection, Softplus, StepGrid
from q_nulsq.positivity import Positivity

from .cases import SEEDS

EXACT = {"rtol": 0, "atol": 0}
POSITIVITIES = [Projection(), Softplus(), Exponential()]


@pytest.mark.parametrize("positivity", POSITIVITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_is_the_inverse_of_steps(positivity, dtype):
    steps = torch.logspace(-6, 6, 97, dtype=dtype)
    eps = torch.finfo(dtype).eps
    # The logarithm of a step is up to 14 in size; its rounding is the relative error of the exponential.
    torch.testing.assert_close(positivity.steps(positivity.raw(steps)), steps, rtol=16 * eps, atol=0)


@pytest.mark.parametrize("positivity", POSITIVITIES)
@given(raw=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9))
def test_steps_are_positive_whatever_the_parameter(positivity, raw):
    steps = positivity.steps(torch.tensor(raw))
    assert bool((steps > 0).all())
    assert bool((1 / steps[steps.isfinite()]).isfinite().all())


@pytest.mark.parametrize("positivity", POSITIVITIES)
def test_a_nan_is_not_hidden(positivity):
    raw = torch.tensor([[0.5, torch.nan, 1.0]])
    assert positivity.steps(raw).isnan().tolist() == [[False, True, False]]
    positivity.project(raw)
    assert bool(raw[0, 1].isnan())


@pytest.mark.parametrize("positivity", [Softplus(), Exponential()])
def test_the_gradient_is_the_derivative(positivity):
    raw = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(positivity.steps, raw)
    steps = positivity.steps(raw)
    (slope,) = torch.autograd.grad(steps.sum(), raw)
    expected = steps if isinstance(positivity, Exponential) else -torch.expm1(-steps)
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-12, atol=0)  # two forms of one function


def test_a_projected_step_has_a_gradient_of_one_even_where_it_is_lost():
    raw = torch.tensor([[-2.0, 0.0, 3.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(Projection().steps(raw).sum(), raw)
    torch.testing.assert_close(slope, torch.ones(1, 3), **EXACT)


def test_projection_raises_each_step_to_a_part_of_the_mean_of_its_tile():
    raw = torch.tensor([[-0.5, 0.0, 1.5], [0.0, 1.0, 2.0], [-1.0, -2.0, -3.0]])
    Projection(0.25).project(raw)
    # Means of magnitudes: 2/3, 1 and 2.
    expected = torch.tensor([[1 / 6, 1 / 6, 1.5], [0.25, 1.0, 2.0], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(raw, expected, rtol=3e-7, atol=0)  # the mean is rounded, and its part


@given(seed=SEEDS)
def test_steps_that_are_large_enough_are_left_alone(seed):
    raw = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) + 0.01
    before = raw.clone()
    Projection().project(raw)
    torch.testing.assert_close(raw, before, **EXACT)


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.0, float("nan")])
def test_a_floor_that_is_no_part_is_refused(floor):
    with pytest.raises(RangeError, match=f"floor={floor}"):
        Projection(floor)


def test_a_negative_step_costs_two_levels_and_moves_none_past_another():
    """Between the update and the projection, and where nobody projects."""
    grid = StepGrid(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.5, 1.0, 0.25]]))
    with torch.no_grad():
        grid.steps[0, 1], grid.steps[0, 3] = -3.0, 0.0
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(grid.levels(), torch.tensor([[-0.5, -0.5, 0.0, 0.5, 0.5, 0.75]]), **EXACT)
    torch.testing.assert_close(grid.widths, torch.tensor([[tiny, 0.5, 0.5, tiny, 0.25]]), **EXACT)
    x = torch.linspace(-2, 2, 101, requires_grad=True)
    out = grid.fake_quantize(x, NearestTowardZero())
    out.sum().backward()
    assert bool((out.diff() >= 0).all())
    assert bool(grid.steps.grad.isfinite().all() & x.grad.isfinite().all())
    # What lies beyond the range pushes a lost step as it pushes the others.
    torch.testing.assert_close(grid.steps.grad[0, 3], (x > 0.75).sum().float(), **EXACT)
    grid.project()
    assert bool((grid.widths > 0).all())
    assert bool((grid.levels().diff(dim=-1) > 0).all())
    assert int(grid.raised) == 2


class NoWaiting(TorchDispatchMode):
    """Refuses every operator that would fetch a number from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("positivity", POSITIVITIES)
def test_nothing_in_forward_backward_or_projection_waits_for_the_device(positivity):
    grid = StepGrid(torch.rand(3, 1, 2) + 0.1, torch.rand(3, 1, 3) + 0.1, positivity=positivity)
    with NoWaiting():
        grid.fake_quantize(torch.randn(3, 5), NearestTowardZero()).sum().backward()
        grid.project()


def _random_updates(grid, optimizer, updates, generator):
    """Yield after each update with a random gradient; now and then it pulls one way for a while."""
    pull = torch.zeros_like(grid.steps)
    for index in range(updates):
        if index % 100 == 0:
            pull = torch.randn(grid.steps.shape, generator=generator)
        grid.steps.grad = torch.randn(grid.steps.shape, generator=generator) + pull
        optimizer.step()
        grid.project()
        yield index


@pytest.mark.parametrize("positivity", POSITIVITIES)
def test_ten_thousand_random_updates_keep_the_levels_in_order(positivity):
    """Of 50 tiles in 200 updates each; AdamW with a rate that would carry a step below zero in a few of them."""
    generator = torch.Generator().manual_seed(0)
    below, above = (torch.rand(50, 1, count, generator=generator) + 0.1 for count in (4, 3))
    grid = StepGrid(below, above, positivity=positivity)
    optimizer = torch.optim.AdamW(grid.parameters(), lr=0.05, weight_decay=0.01)
    lost = 0
    for _ in _random_updates(grid, optimizer, 200, generator):
        assert bool((grid.levels().diff(dim=-1) > 0).all())
        lost = int(grid.raised)
    if isinstance(positivity, Projection):
        assert lost > 1000  # the floor was needed
    else:
        assert lost == 0
    x = torch.randn(50, 20, generator=generator)
    assert bool(grid.fake_quantize(x, NearestTowardZero()).isfinite().all())


def test_real_gradients_keep_the_levels_in_order_too():
    """A large rate on the gradients of data, 300 updates of one tile."""
    generator = torch.Generator().manual_seed(0)
    grid = StepGrid(None, torch.full((1, 7), 0.3))
    optimizer = torch.optim.AdamW(grid.parameters(), lr=0.02)
    for index in range(300):
        x = torch.randn(64, generator=generator).relu() * (1 + index % 7)
        upstream = torch.randn(64, generator=generator)
        optimizer.zero_grad()
        grid.fake_quantize(x, NearestTowardZero()).backward(upstream)
        optimizer.step()
        grid.project()
        assert bool((grid.levels().diff() > 0).all())


def test_one_of_your_own_needs_two_functions():
    class Square(Positivity):
        def raw(self, steps):
            return steps.sqrt()

        def steps(self, raw):
            return raw.square()

    grid = StepGrid(None, torch.full((1, 3), 0.25), positivity=Square())
    torch.testing.assert_close(grid.levels(), torch.tensor([[0.0, 0.25, 0.5, 0.75]]), **EXACT)
    grid.project()
    assert int(grid.raised) == 0
