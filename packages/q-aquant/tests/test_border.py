"""Borders: exact levels stay, zero coefficients are nearest rounding, and gradients are as documented."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from q_aquant.border import BOUNDS, LARGEST, Bound, FusedBorder, LearnedBorder, rectified, steep, unclipped
from q_core import FormatError, NearestEven, Quantizer, RangeError, ShapeError, SpecError, StateError, UniformGrid
from q_core.testing import check_rounding

exact = {"rtol": 0, "atol": 0}
numbers = st.floats(-1e3, 1e3)
triples = st.tuples(numbers, numbers, numbers)
closed = pytest.mark.parametrize("bound", [rectified, steep])
ends = pytest.mark.parametrize(("low", "high"), [(0.0, 15.0), (-8.0, 7.0), (-3.0, 0.0), (0.0, 1.0), (0.0, 255.0)])


def border(values: tuple[float, ...], low: float = -8.0, high: float = 7.0, bound: Bound = rectified) -> LearnedBorder:
    """One border for all elements of a row."""
    return LearnedBorder(torch.tensor(values, dtype=torch.float64).unsqueeze(1), low=low, high=high, bound=bound)


def inside(low: float, high: float) -> Tensor:
    """Every level of a range and points between."""
    steps = int(high - low) * 40
    return torch.linspace(low, high, steps + 1, dtype=torch.float64)


# Levels stay


@closed
@ends
@given(values=triples)
def test_every_level_keeps_its_code(values: tuple[float, ...], low: float, high: float, bound: Bound) -> None:
    for dtype in (torch.float32, torch.float64):
        levels = torch.arange(low, high + 1, dtype=dtype)
        torch.testing.assert_close(border(values, low, high, bound).to(dtype)(levels).detach(), levels, **exact)


@given(values=st.lists(numbers, min_size=1, max_size=5), low=st.floats(-300, 0), width=st.floats(1, 300))
def test_real_zero_has_code_zero_whatever_was_learned(values: list[float], low: float, width: float) -> None:
    for bound in (rectified, steep):
        rounding = border(tuple(values), low, low + width, bound)
        torch.testing.assert_close(
            rounding(torch.zeros(1, dtype=torch.float64)).detach().abs(), torch.zeros(1).double(), **exact
        )


def test_without_a_clip_zero_moves_as_the_documentation_says() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for value, code in ((3.0, -1.0), (-3.0, 1.0)):
        torch.testing.assert_close(border((value,), bound=unclipped)(zero).detach(), zero + code, **exact)


@closed
@ends
@given(values=triples)
def test_a_border_obeys_the_laws_of_a_rounding(
    values: tuple[float, ...], low: float, high: float, bound: Bound
) -> None:
    check_rounding(border(values, low, high, bound), inside(low, high))


@ends
@pytest.mark.parametrize("bound", BOUNDS)
def test_zero_coefficients_are_nearest_rounding_away_from_ties(low: float, high: float, bound: Bound) -> None:
    u = inside(low, high)
    clear = (u - u.floor() - 0.5).abs() > 1e-9
    for degree in range(4):
        rounding = LearnedBorder.nearest((1,), low=low, high=high, degree=degree, bound=bound)
        assert rounding.degree == degree
        torch.testing.assert_close(rounding(u)[clear].detach(), NearestEven()(u)[clear], **exact)


def test_a_tie_goes_down() -> None:
    ties = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    found = LearnedBorder.nearest((1,), low=-8.0, high=7.0)(ties)
    torch.testing.assert_close(found.detach(), torch.floor(ties), **exact)


@pytest.mark.parametrize("bound", [rectified, steep])
@given(values=triples, u=st.lists(st.floats(-8, 7), min_size=1, max_size=30))
def test_an_element_goes_down_exactly_up_to_its_border(values: tuple[float, ...], u: list[float], bound: Bound) -> None:
    for dtype in (torch.float32, torch.float64):
        points = torch.tensor(u, dtype=dtype)
        rounding = border(values, bound=bound).to(dtype)
        fraction = points - points.floor()  # exact in any floating-point format
        # But for numbers just below an integer, whose distance to the one below is rounded up to 1.
        below_one = fraction < 1
        limit = rounding.border(points).detach()
        expected = torch.where(fraction <= limit, points.floor(), points.floor() + 1)
        torch.testing.assert_close(rounding(points).detach()[below_one], expected[below_one], **exact)
        assert bool(((limit >= 0) & (limit <= LARGEST)).all())


# The polynomial


def test_the_border_is_the_bounded_polynomial_of_the_position_in_the_range() -> None:
    values, u = (0.1, -0.4, 0.7), torch.tensor([-8.0, -0.5, 3.25, 7.0], dtype=torch.float64)
    for bound in BOUNDS:
        found = border(values, bound=bound).border(u)
        v = [(float(each) + 8) / 15 for each in u]
        z = torch.tensor([0.1 - 0.4 * each + 0.7 * each**2 for each in v], dtype=torch.float64)
        # A handful of operations on numbers below one, in another order.
        torch.testing.assert_close(found.detach(), bound(z), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("bound", "z", "expected"),
    [
        (rectified, 0.0, 0.5),
        (rectified, math.log(3), LARGEST),  # sigma = 3/4, so 0.5 + 2.5 / 4 is above 1
        (rectified, -math.log(3), 0.0),
        (rectified, math.log(11 / 9), 0.5 + 2.5 * 0.05),  # sigma = 0.55
        (unclipped, math.log(3), 1.125),
        (unclipped, -math.log(3), -0.125),
        (unclipped, 40.0, 1.75),
        (steep, 0.0, 0.5),
        (steep, math.log(3) / 2.5, 0.75),
        (steep, 40.0, LARGEST),
        (steep, -1000.0, 0.0),
    ],
)
def test_a_bound_has_the_value_computed_by_hand(bound: Bound, z: float, expected: float) -> None:
    found = bound(torch.tensor([z], dtype=torch.float64))
    # A logarithm, a sigmoid, a product and a sum.
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_rectified_border_reaches_its_ends_where_it_says() -> None:
    z = torch.tensor([-0.848, -0.847, 0.847, 0.848], dtype=torch.float64)
    assert (rectified(z) > 0).tolist() == [False, True, True, True]
    assert (rectified(z) < LARGEST).tolist() == [True, True, True, False]


def test_elements_have_borders_of_their_own() -> None:
    coefficients = torch.zeros(3, 2, 4, 1)
    coefficients[0, 1, 2] = -10  # always up
    coefficients[0, 0, 3] = 10  # hardly ever
    rounding = LearnedBorder(coefficients, low=0.0, high=3.0)
    found = rounding(torch.full((2, 2, 4, 5), 1.7)).detach()
    expected = torch.full((2, 2, 4, 5), 2.0)
    expected[:, 0, 3] = 1
    torch.testing.assert_close(found, expected, **exact)
    expected[...] = 1
    expected[:, 1, 2] = 2
    torch.testing.assert_close(rounding(torch.full((2, 2, 4, 5), 1.2)).detach(), expected, **exact)


# Gradients


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_gradient_is_one_to_the_element_and_minus_one_to_its_border(bound: Bound) -> None:
    u = torch.tensor([-7.3, 0.2, 1.6, 6.9], dtype=torch.float64, requires_grad=True)
    rounding = border((0.1, -0.2, 0.05), bound=bound)
    weights = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    found = torch.autograd.grad((rounding(u) * weights).sum(), [u, rounding.coefficients])
    torch.testing.assert_close(found[0], weights, **exact)
    (expected,) = torch.autograd.grad((rounding.border(u) * weights).sum(), rounding.coefficients)
    torch.testing.assert_close(found[1], -expected, **exact)
    assert bool((expected != 0).all())
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(rounding.border(u).sum(), u)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_gradient_of_the_border_is_that_of_its_polynomial(bound: Bound) -> None:
    u = torch.tensor([-6.0, 0.3, 4.0], dtype=torch.float64)
    coefficients = torch.tensor([[0.1], [-0.2], [0.05]], dtype=torch.float64, requires_grad=True)

    def of(values: Tensor) -> Tensor:
        rounding = LearnedBorder(values, low=-8.0, high=7.0, bound=bound)
        return torch.func.functional_call(_Border(rounding), {"rounding.coefficients": values}, (u,))

    assert torch.autograd.gradcheck(of, coefficients)


class _Border(torch.nn.Module):
    def __init__(self, rounding: LearnedBorder) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, u: Tensor) -> Tensor:
        return self.rounding.border(u)


def test_beyond_the_ends_a_rectified_border_no_longer_learns() -> None:
    for value in (5.0, -5.0):
        rounding = border((value,))
        (gradient,) = torch.autograd.grad(rounding(torch.tensor([0.3]).double()).sum(), rounding.coefficients)
        torch.testing.assert_close(gradient, torch.zeros(1, 1, dtype=torch.float64), **exact)


# Fusion


def fused(values: Tensor, weights: Tensor | None = None, bound: Bound = rectified) -> FusedBorder:
    return FusedBorder(LearnedBorder(values, low=0.0, high=15.0, bound=bound), weights)


@given(values=triples, u=st.lists(st.floats(0, 15), min_size=1, max_size=20))
def test_fusion_of_one_position_with_weight_one_is_the_plain_border(values: tuple[float, ...], u: list[float]) -> None:
    plain = LearnedBorder(torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1, 1), low=0.0, high=15.0)
    patches = torch.tensor(u, dtype=torch.float64).reshape(1, 1, 1, -1)
    torch.testing.assert_close(FusedBorder(plain)(patches).detach(), plain(patches).detach(), **exact)
    torch.testing.assert_close(FusedBorder(plain).border(patches).detach(), plain.border(patches).detach(), **exact)


def test_the_fused_border_is_the_weighted_mean_over_the_window() -> None:
    values = torch.randn(3, 2, 5, 1, dtype=torch.float64)
    weights = torch.rand(2, 5, dtype=torch.float64)
    patches = 15 * torch.rand(3, 2, 5, 7, dtype=torch.float64)
    rounding = fused(values, weights)
    single = rounding.elements.border(patches).detach()
    expected = torch.zeros(3, 2, 1, 7, dtype=torch.float64)
    for position in range(5):
        expected[:, :, 0] += weights[:, position, None] * single[:, :, position] / 5
    expected.clamp_(0, LARGEST)
    # Five terms below one, added in another order.
    torch.testing.assert_close(rounding.border(patches).detach(), expected, rtol=0, atol=1e-15)
    up = patches - patches.floor() > rounding.border(patches).detach()
    torch.testing.assert_close(rounding(patches).detach(), patches.floor() + up, **exact)


@given(
    values=st.lists(numbers, min_size=9, max_size=9),
    weights=st.lists(st.floats(-10, 10), min_size=3, max_size=3),
)
def test_a_fused_border_obeys_the_laws_of_a_rounding(values: list[float], weights: list[float]) -> None:
    coefficients = torch.tensor(values, dtype=torch.float64).reshape(3, 1, 3, 1)
    for bound in BOUNDS:  # the fused border is clipped, whatever the elements are
        rounding = fused(coefficients, torch.tensor(weights, dtype=torch.float64).reshape(1, 3), bound)
        check_rounding(rounding, inside(0.0, 15.0)[:600].reshape(2, 1, 3, -1))


def test_padding_keeps_code_zero_and_takes_part_in_the_mean() -> None:
    values = torch.zeros(1, 1, 3, 1)
    values[0, 0, 0] = -10  # the border of the first position is 0
    patches = torch.tensor([0.0, 0.4, 0.4]).reshape(1, 1, 3, 1)
    found = fused(values)(patches).detach().flatten()
    # The mean of 0, 1/2 and 1/2 is 1/3: what lies above goes up, the padded zero stays.
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1.0]), **exact)


def test_zero_coefficients_fuse_to_nearest_rounding() -> None:
    patches = inside(0.0, 15.0)[:600].reshape(2, 3, 4, -1)
    clear = (patches - patches.floor() - 0.5).abs() > 1e-9
    rounding = FusedBorder(LearnedBorder.nearest((3, 4, 1), low=0.0, high=15.0))
    torch.testing.assert_close(rounding(patches).detach()[clear], NearestEven()(patches)[clear], **exact)


def test_fusion_learns_its_weights() -> None:
    values = 0.1 * torch.randn(2, 1, 2, 1, dtype=torch.float64)
    rounding = fused(values)
    patches = torch.tensor([3.3, 7.9], dtype=torch.float64).reshape(1, 1, 2, 1).requires_grad_()
    found = torch.autograd.grad(rounding(patches).sum(), [patches, rounding.weights])
    torch.testing.assert_close(found[0], torch.ones_like(patches), **exact)
    # Both elements share the border, whose derivative to a weight is half the border of that position.
    single = rounding.elements.border(patches).detach().reshape(1, 2)
    torch.testing.assert_close(found[1], -2 * single / 2, rtol=1e-15, atol=0)  # one product in another order


# In a quantizer


@given(values=triples)
def test_zero_quantizes_to_zero_on_a_grid_with_a_zero_point(values: tuple[float, ...]) -> None:
    grid = UniformGrid(torch.tensor([0.3]).double(), torch.tensor([5.0]).double(), qmin=0, qmax=15)
    quantizer = Quantizer(grid, border(values, -5.0, 10.0))
    x = torch.tensor([0.0, -9.0, 9.0, 0.3], dtype=torch.float64)
    codes = quantizer.codes(x)
    assert codes[:3].tolist() == [5, 0, 15]
    torch.testing.assert_close(quantizer(x).detach()[0].abs(), torch.tensor(0.0).double(), **exact)


# Errors


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4, 5), (2, 4), (1, 3, 4, 5)])
def test_a_border_for_other_elements_is_refused(shape: tuple[int, ...]) -> None:
    rounding = LearnedBorder.nearest((2, 4, 1), low=0.0, high=3.0)
    with pytest.raises(ShapeError, match=r"border for elements of shape \(2, 4, 1\) got a tensor of shape"):
        rounding(torch.zeros(shape))


def test_a_border_without_a_range_or_coefficients_is_refused() -> None:
    with pytest.raises(SpecError, match=r"codes from 3\.0 to 3\.0: low must be below high"):
        LearnedBorder(torch.zeros(1, 1), low=3.0, high=3.0)
    for shape in ((), (0, 2)):
        with pytest.raises(ShapeError, match="the first axis holds b0, b1"):
            LearnedBorder(torch.zeros(shape), low=0.0, high=3.0)
    with pytest.raises(RangeError, match="degree=-1: it must be at least 0"):
        LearnedBorder.nearest((1,), low=0.0, high=3.0, degree=-1)


def test_fusion_of_anything_but_positions_is_refused() -> None:
    for index in ((3,), (3, 1, 2), (3, 4)):
        with pytest.raises(ShapeError, match=r"fusion needs one of shape \(channels, positions, 1\)"):
            FusedBorder(LearnedBorder.nearest(index, low=0.0, high=3.0))
    with pytest.raises(ShapeError, match=r"weights of shape \(4, 3\) with a border of shape \(3, 4\)"):
        FusedBorder(LearnedBorder.nearest((3, 4, 1), low=0.0, high=3.0), torch.ones(4, 3))


def test_coefficients_and_weights_are_copied() -> None:
    values, weights = torch.zeros(1, 1, 1, 1), torch.ones(1, 1)
    rounding = fused(values, weights)
    values.fill_(9)
    weights.fill_(9)
    assert float(rounding.elements.coefficients.detach()) == 0
    assert float(rounding.weights.detach()) == 1


# Facts


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_border_is_built_from_its_facts(bound: Bound) -> None:
    rounding = FusedBorder(LearnedBorder.nearest((2, 4, 1), low=-1.5, high=3.0, degree=1, bound=bound))
    assert rounding.facts() == {"border": {"shape": [2, 2, 4, 1], "low": -1.5, "high": 3.0, "bound": bound.__name__}}
    with torch.device("meta"):
        twin = FusedBorder.from_facts(rounding.facts())
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert twin.facts() == rounding.facts()
    assert twin.elements.bound is bound
    assert twin.weights.shape == rounding.weights.shape


def test_a_bound_of_ones_own_has_no_facts() -> None:
    rounding = LearnedBorder.nearest((1,), low=0.0, high=3.0, bound=torch.nn.Sigmoid())
    assert "Sigmoid" in repr(rounding)
    with pytest.raises(StateError, match="a file holds no code, so the bound Sigmoid cannot be one of rectified"):
        rounding.facts()
    with pytest.raises(FormatError, match="a border with the bound 'eval': known are rectified, unclipped, steep"):
        LearnedBorder.from_facts({"shape": [1, 1], "low": 0.0, "high": 3.0, "bound": "eval"})
