"""Roundings that learn, that have learned, and that enter by degrees."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_aquant.roundings import (
    GAMMA,
    ZETA,
    FixedRounding,
    Gradual,
    LearnedRounding,
    SoftWeight,
    annealed_beta,
    gradual_influence,
    rounding_penalty,
)
from q_core import NearestEven, Quantizer, RangeError, ShapeError, UniformGrid
from q_core.errors import SpecError
from q_core.testing import check_rounding

exact = {"rtol": 0, "atol": 0}
coordinates = st.lists(st.floats(-100, 100), min_size=1, max_size=30).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def clear_of_ends(u: Tensor) -> Tensor:
    """Keep a millionth away from integers and halves, where the sigmoid and its inverse decide by their last bit."""
    base = u.floor()
    fraction = (u - base).clamp(1e-6, 1 - 1e-6)
    return base + torch.where((fraction - 0.5).abs() < 1e-6, 0.5 + 1e-6, fraction)


# Fixed


@given(u=coordinates)
def test_a_fixed_rounding_obeys_the_laws_but_for_the_levels_it_was_not_made_for(u: Tensor) -> None:
    # It sends every element to the neighbour that was chosen; for an integer the upper neighbour is another integer.
    check_rounding(FixedRounding(torch.arange(len(u)) % 2 == 0), u, waive=["integers"])
    check_rounding(FixedRounding(torch.zeros(len(u), dtype=torch.bool)), u)


def test_each_element_goes_where_it_was_decided() -> None:
    up = torch.tensor([[True, False, True], [False, True, False]])
    u = torch.tensor([[0.1, 0.9, -0.1], [-0.1, 2.0, 2.0]])
    torch.testing.assert_close(FixedRounding(up)(u), torch.tensor([[1.0, 0.0, 0.0], [-1.0, 3.0, 2.0]]), **exact)


def test_the_decision_is_copied_and_saved() -> None:
    up = torch.tensor([True, False])
    rounding = FixedRounding(up)
    up[0] = False
    torch.testing.assert_close(rounding.state_dict(), {"up": torch.tensor([True, False])}, **exact)
    assert not list(rounding.parameters())


@pytest.mark.parametrize("rounding", [FixedRounding(torch.ones(2, 3) > 0), LearnedRounding(torch.zeros(2, 3))])
@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (1, 2, 3), (3,), ()])
def test_another_tensor_is_refused(rounding: FixedRounding | LearnedRounding, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ShapeError, match=rf"made for a tensor of shape \(2, 3\) got one of shape \({shape and shape[0]}"
    ):
        rounding(torch.zeros(shape))


# Learned


@given(u=coordinates)
def test_at_the_start_nothing_is_rounded(u: Tensor) -> None:
    # log(p / (1 - p)) and the sigmoid that undoes it are rounded at p and, through the slope, at the logit, which is at
    # most 2.4 in magnitude; a handful of eps, and u itself is rounded to eps(100).
    torch.testing.assert_close(LearnedRounding.of(u)(u).detach(), u, rtol=1e-15, atol=1e-14)


@given(u=coordinates)
def test_hardened_at_the_start_it_is_the_nearest(u: Tensor) -> None:
    u = clear_of_ends(u)
    torch.testing.assert_close(LearnedRounding.of(u).hardened()(u), NearestEven()(u), **exact)


def test_hardened_a_tie_goes_up() -> None:
    u = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    torch.testing.assert_close(LearnedRounding.of(u).hardened()(u), torch.ceil(u), **exact)


@given(u=coordinates, start=st.floats(0, 0.999))
def test_the_hardened_form_obeys_the_laws(u: Tensor, start: float) -> None:
    rounding = LearnedRounding(torch.full_like(u, start)).hardened()
    check_rounding(rounding, u, waive=["integers"])


@pytest.mark.parametrize(
    ("logit", "share"),
    [
        (0.0, 0.5),
        (100.0, 1.0),
        (-100.0, 0.0),
        (math.log(11), 1.0),  # 1.2 * 11 / 12 - 0.1 = 1: the stretched sigmoid reaches its end
        (-math.log(11), 0.0),
        (1.0, 1.2 / (1 + math.exp(-1)) - 0.1),
    ],
)
def test_the_share_is_a_sigmoid_that_reaches_its_ends(logit: float, share: float) -> None:
    rounding = LearnedRounding(torch.zeros(1, dtype=torch.float64))
    with torch.no_grad():
        rounding.logit.fill_(logit)
    # A sigmoid, a product and a sum, each rounded once.
    torch.testing.assert_close(
        rounding.share().detach(), torch.tensor([share], dtype=torch.float64), rtol=0, atol=1e-15
    )
    torch.testing.assert_close(
        rounding(torch.tensor([2.75], dtype=torch.float64)).detach(),
        torch.tensor([2 + share], dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize("fraction", [1.0, -0.1, math.nan])
def test_what_is_no_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(RangeError, match=r"it must be in \[0, 1\)"):
        LearnedRounding(torch.tensor([0.5, fraction]))


def test_the_gradient_of_the_logit_is_that_of_the_share_and_that_of_the_input_is_one() -> None:
    u = torch.tensor([0.3, 1.6, -0.8], dtype=torch.float64, requires_grad=True)
    rounding = LearnedRounding.of(u.detach())
    found = torch.autograd.grad(rounding(u).sum(), [u, rounding.logit])
    inner = torch.sigmoid(rounding.logit.detach())
    # One product more or less, in another order.
    torch.testing.assert_close(found, (torch.ones_like(u), 1.2 * inner * (1 - inner)), rtol=1e-14, atol=0)


def test_an_element_that_is_decided_stays() -> None:
    rounding = LearnedRounding(torch.zeros(2, dtype=torch.float64))
    with torch.no_grad():
        rounding.logit.copy_(torch.tensor([5.0, -5.0]))
    (gradient,) = torch.autograd.grad(rounding.share().sum(), rounding.logit)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), **exact)


def test_in_a_grid_the_soft_weight_is_the_weight_at_first() -> None:
    weight = torch.randn(4, 5, dtype=torch.float64)
    grid = UniformGrid(torch.full((4, 1), 0.1, dtype=torch.float64), qmin=-128, qmax=127)
    soft = grid.fake_quantize(weight, LearnedRounding.of(weight / 0.1))
    # The coordinate is below 50 and right to a few eps of it; a cell is 0.1 wide.
    torch.testing.assert_close(soft.detach(), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_just_below_an_integer_can_be_learned(dtype: torch.dtype) -> None:
    u = torch.tensor([-1e-30, 0.0, 1e-30, -1.0], dtype=dtype)
    soft = LearnedRounding.of(u)(u).detach()
    # The sigmoid stretched to 1.1 - 0.1 is right to a few eps.
    torch.testing.assert_close(soft, u, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_share_has_the_gradient_of_its_parts_and_a_clip_that_is_closed(dtype: torch.dtype) -> None:
    # Among others 101 logits around each end, a last place apart.
    near = torch.tensor(math.log(11), dtype=dtype) * (1 + torch.arange(-50, 51, dtype=dtype) * torch.finfo(dtype).eps)
    logit = torch.cat([torch.linspace(-4, 4, 1001, dtype=dtype), near, -near])
    rounding = LearnedRounding(torch.zeros_like(logit))
    with torch.no_grad():
        rounding.logit.copy_(logit)
    sigmoid = torch.sigmoid(logit)
    stretched = (ZETA - GAMMA) * sigmoid + GAMMA  # the difference is not 1.2 in float64
    inside = (stretched >= 0) & (stretched <= 1)
    assert bool((stretched == 1).any())
    (found,) = torch.autograd.grad(rounding.share().sum(), rounding.logit)
    assert torch.equal(found != 0, inside)
    # Products of numbers up to 1.2 in another order: a few roundings.
    torch.testing.assert_close(found, 1.2 * sigmoid * (1 - sigmoid) * inside, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_an_element_on_a_level_can_leave_it() -> None:
    # In float32, of which weights are, its share is exactly 0.
    rounding = LearnedRounding.of(torch.tensor([-2.0, 0.0, 3.0]))
    torch.testing.assert_close(rounding.share().detach(), torch.zeros(3), **exact)
    (found,) = torch.autograd.grad(rounding.share().sum(), rounding.logit)
    # 1.2 * 1/12 * 11/12, a sigmoid and three products away; the sigmoid multiplies the error of the logit by 2.2.
    torch.testing.assert_close(found, torch.full((3,), 11 / 120), rtol=8 * torch.finfo(torch.float32).eps, atol=0)


def test_a_soft_weight_takes_a_rounding_that_learns() -> None:
    grid = UniformGrid(torch.ones(1), qmin=-2, qmax=1)
    with pytest.raises(SpecError, match="a NearestEven in a soft weight: it takes a LearnedRounding"):
        SoftWeight(Quantizer(grid), torch.zeros(3), torch.ones(3))


# Penalty and schedule


def test_the_penalty_counts_who_is_undecided() -> None:
    share = torch.tensor([[0.0, 1.0, 0.5], [0.25, 0.75, 1.0]], dtype=torch.float64)
    # 0 for the decided, 1 for one half, 1 - 2^-beta for one and three quarters.
    for beta in (2.0, torch.tensor(2.0, dtype=torch.float64)):
        torch.testing.assert_close(rounding_penalty(share, beta), torch.tensor(2.5, dtype=torch.float64), **exact)
    torch.testing.assert_close(
        rounding_penalty(share, 20.0), torch.tensor(1 + 2 * (1 - 2.0**-20), dtype=torch.float64), **exact
    )


@given(share=st.lists(st.floats(0, 1), min_size=1, max_size=20), beta=st.floats(0.5, 30))
def test_the_penalty_is_symmetric_and_between_nobody_and_everybody(share: list[float], beta: float) -> None:
    h = torch.tensor(share, dtype=torch.float64)
    penalty = float(rounding_penalty(h, beta))
    assert 0 <= penalty <= len(share)
    # 1 - h is rounded to half an eps, which a power of 30 makes 30 eps, of each element.
    torch.testing.assert_close(float(rounding_penalty(1 - h, beta)), penalty, rtol=0, atol=1e-14 * len(share))


def test_the_penalty_drives_every_element_to_its_nearer_end() -> None:
    share = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rounding_penalty(share, 2.0), share)
    torch.testing.assert_close(gradient.sign(), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64), **exact)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 11.3, torch.tensor(11.3, dtype=torch.float64)])
def test_the_penalty_has_the_gradient_of_its_parts(beta: float | Tensor) -> None:
    share = torch.cat([torch.linspace(0, 1, 21, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)])
    (found,) = torch.autograd.grad(3 * rounding_penalty(share.requires_grad_(), beta), share)
    distance = 2 * share.detach() - 1
    expected = -6 * beta * distance.abs().pow(beta - 1) * distance.sign()
    # A power less one and a quotient: what the logarithm, of at most 40 in magnitude, loses in its last place.
    torch.testing.assert_close(found, torch.where(distance == 0, 0, expected), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("progress", "beta"), [(0.0, 20.0), (0.1, 20.0), (0.2, 20.0), (0.6, 11.0), (0.8, 6.5), (1.0, 2.0), (1.5, 2.0)]
)
def test_the_exponent_falls_after_the_warm_up(progress: float, beta: float) -> None:
    # Two quotients and a product in float64 of numbers up to 20.
    torch.testing.assert_close(annealed_beta(progress), beta, rtol=0, atol=1e-14)


def test_the_exponent_has_ends_and_a_warm_up_of_ones_own() -> None:
    assert annealed_beta(0.0, start=8.0, end=4.0, warmup=0.0) == 8
    assert annealed_beta(0.5, start=8.0, end=4.0, warmup=0.0) == 6
    assert annealed_beta(1.0, start=8.0, end=4.0, warmup=0.5) == 4


@pytest.mark.parametrize(("progress", "influence"), [(0.0, 0.0), (0.2, 0.0), (0.6, 0.5), (1.0, 1.0), (2.0, 1.0)])
def test_the_influence_rises_after_the_warm_up(progress: float, influence: float) -> None:
    # Two differences and a quotient in float64.
    torch.testing.assert_close(gradual_influence(progress), influence, rtol=0, atol=1e-15)


# Gradual


@given(u=coordinates)
def test_without_influence_nothing_is_rounded_and_with_all_of_it_everything_is(u: Tensor) -> None:
    torch.testing.assert_close(Gradual(NearestEven())(u), u, **exact)
    torch.testing.assert_close(Gradual(NearestEven(), 1.0)(u), NearestEven()(u), **exact)
    check_rounding(Gradual(NearestEven(), 1.0), u)


def test_half_way_it_is_half_way() -> None:
    rounding = Gradual(NearestEven())
    rounding.set_influence(0.5)
    torch.testing.assert_close(rounding(torch.tensor([0.25, 1.75])), torch.tensor([0.125, 1.875]), **exact)


def test_its_gradient_is_one_and_that_of_what_it_holds_is_scaled_by_the_influence() -> None:
    u = torch.tensor([0.3, 1.6], dtype=torch.float64, requires_grad=True)
    inner = LearnedRounding.of(u.detach())
    soft = torch.autograd.grad(inner(u).sum(), inner.logit)[0]
    gradients = torch.autograd.grad(Gradual(inner, 0.25)(u).sum(), [u, inner.logit])
    # The lerp adds up 1 - a and a, and multiplies once.
    torch.testing.assert_close(gradients, (torch.ones_like(u), 0.25 * soft), rtol=1e-15, atol=0)


@pytest.mark.parametrize("influence", [-0.1, 1.1, math.nan])
def test_an_influence_outside_its_range_is_refused(influence: float) -> None:
    with pytest.raises(RangeError, match=r"it must be in \[0, 1\]"):
        Gradual(NearestEven(), influence)


def test_the_influence_is_no_part_of_a_checkpoint() -> None:
    assert not Gradual(NearestEven(), 0.5).state_dict()


# Facts


def test_a_fixed_rounding_is_built_from_its_facts() -> None:
    rounding = FixedRounding(torch.tensor([[True, False, True]]))
    assert rounding.facts() == {"shape": [1, 3]}
    with torch.device("meta"):
        twin = FixedRounding.from_facts(rounding.facts())
    assert twin.up.is_meta
    assert (twin.up.shape, twin.up.dtype) == (rounding.up.shape, rounding.up.dtype)
