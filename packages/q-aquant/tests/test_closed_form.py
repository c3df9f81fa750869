"""The closed-form border against brute force, and its regression against polyfit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from q_aquant.border import LearnedBorder, rectified, steep
from q_aquant.closed_form import (
    PropagatedError,
    border_coefficients,
    closed_form_border,
    positions_as_outputs,
    weight_terms,
)
from q_core.errors import DataError, RangeError, ShapeError, SpecError

ROUNDOFF = {"atol": 1e-12, "rtol": 1e-12}
"""A dozen operations in float64 on numbers of about 1."""


def evaluate(polynomial: Tensor, v: Tensor) -> Tensor:
    return sum((coefficient * v**power for power, coefficient in enumerate(polynomial)), torch.zeros_like(v))


def least_error_is_up(weight: Tensor, change: Tensor, u: Tensor, error: Tensor) -> Tensor:
    """For each sample, whether the upper code gives the smaller sum of squared errors (eq. 6) over all outputs."""
    squares = []
    for code in (torch.floor(u), torch.floor(u) + 1):
        product = (weight + change)[:, None] * (code - u) + change[:, None] * u + weight[:, None] * error
        squares.append(product.square().sum(0))
    return squares[1] < squares[0]


@pytest.mark.parametrize("outputs", [1, 5])
def test_it_takes_the_neighbour_with_the_least_error(outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    for _ in range(200):
        weight = torch.randn(outputs, generator=generator, dtype=torch.float64)
        change = 0.3 * torch.randn(outputs, generator=generator, dtype=torch.float64)
        u = 3 * torch.rand(400, generator=generator, dtype=torch.float64)
        error = torch.randn(1, 1, generator=generator, dtype=torch.float64)
        border = closed_form_border(
            weight.reshape(outputs, 1), (weight + change).reshape(outputs, 1), low=0.0, high=3.0, propagated=error
        )
        found = u - torch.floor(u) > evaluate(border[:, 0], u / 3)
        assert bool((found == least_error_is_up(weight, change, u, error[0])).all())


def test_one_output_is_equation_seven() -> None:
    weight, used = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    border = closed_form_border(weight, used, low=-1.0, high=2.0, propagated=torch.tensor([[0.3]], dtype=torch.float64))
    u = torch.linspace(-1, 2, 13).double()
    expected = -0.2 / 0.5 * u + 0.7 / 0.5 * 0.3 + 0.5
    torch.testing.assert_close(evaluate(border[:, 0], (u + 1) / 3), expected, **ROUNDOFF)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_terms_of_a_grouped_convolution_are_taken_over_the_outputs_of_its_group(groups: int) -> None:
    weight = torch.randn(12, 6 // groups, 3, 2).double()
    used = weight + 0.1 * torch.randn_like(weight)
    rho, rest = weight_terms(weight, used, groups=groups)
    assert rho.shape == rest.shape == (6, 6, 1)
    for channel in range(6):
        group, inner = divmod(channel, 6 // groups)
        mine = slice(group * 12 // groups, (group + 1) * 12 // groups)
        for position in range(6):
            row, column = divmod(position, 2)
            new, old = used[mine, inner, row, column], weight[mine, inner, row, column]
            expected = (new * (new - old)).sum() / (new * new).sum()
            torch.testing.assert_close(rho[channel, position, 0], expected, **ROUNDOFF)
    torch.testing.assert_close(rest, 1 - rho, **ROUNDOFF)


def test_an_input_that_nothing_uses_keeps_the_border_one_half() -> None:
    weight = torch.tensor([[0.3, 0.1], [0.2, -0.1]])
    used = weight * torch.tensor([1.0, 0.0])
    border = closed_form_border(weight, used, low=0.0, high=3.0, propagated=torch.ones(3, 2))
    torch.testing.assert_close(border[:, 1], torch.tensor([0.5, 0, 0]), atol=0.0, rtol=0.0)


def test_a_border_for_all_positions_sees_every_position_as_an_output() -> None:
    weight = torch.randn(4, 3, 3, 2).double()
    used = weight + 0.1 * torch.randn_like(weight)
    for groups in (1, 2):
        rho, _ = weight_terms(positions_as_outputs(weight), positions_as_outputs(used), groups=groups)
        numerator = (used * (used - weight)).sum((2, 3)).unflatten(0, (groups, -1)).sum(1).flatten()
        denominator = (used * used).sum((2, 3)).unflatten(0, (groups, -1)).sum(1).flatten()
        torch.testing.assert_close(rho, (numerator / denominator).reshape(-1, 1, 1), **ROUNDOFF)


def test_exact_weights_and_inputs_give_the_border_one_half() -> None:
    weight = torch.randn(4, 3, 3, 3)
    coefficients = border_coefficients(closed_form_border(weight, weight, low=0.0, high=3.0))
    torch.testing.assert_close(coefficients, torch.zeros(3, 3, 9, 1), atol=0.0, rtol=0.0)


@pytest.mark.parametrize(("bound", "limit"), [(rectified, 0.026), (steep, 0.12)])
def test_coefficients_give_back_the_border_to_first_order(bound: object, limit: float) -> None:
    border = torch.zeros(3, 5).double()
    border[0], border[1] = torch.tensor([0.5, 0.2, 0.0, 1.5, -1]), torch.tensor([0.0, 0.5, 1.0, -2.0, 3.0])
    made = LearnedBorder(border_coefficients(border), low=0.0, high=4.0, bound=bound)
    u = torch.linspace(0, 4, 101).double().unsqueeze(1).expand(-1, 5)
    difference = made.border(u) - evaluate(border[:, None], u / 4).clamp(0, 1)
    assert difference.abs().max() < limit
    assert difference[:, 0].abs().max() == 0


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_regression_equals_polyfit(degree: int) -> None:
    noised = torch.rand(4, 3, 5, 6).double() * 1.2 - 0.1
    exact = noised + 0.2 * torch.randn_like(noised) + noised**2
    scale = torch.full((1, 1, 1, 1), 0.25).double()
    sums = PropagatedError(3, scale=scale, low=0.0, high=3.0, degree=degree)
    for part in range(0, 4, 2):
        sums.add(noised[part : part + 2], exact[part : part + 2])
    fit = sums.regression()
    for channel in range(3):
        u, error = noised[:, channel].flatten() * 4, (noised - exact)[:, channel].flatten() * 4
        inside = (u > 0) & (u < 3)
        expected = np.polynomial.polynomial.polyfit((u / 3)[inside].numpy(), error[inside].numpy(), degree)
        # Normal equations square the condition of the fit, below 1e4 here: 1e8 times the 1e-16 of float64.
        torch.testing.assert_close(fit[:, channel], torch.from_numpy(expected), atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(sums.count[channel], inside.sum().double(), atol=0.0, rtol=0.0)


def test_features_of_a_linear_layer_are_the_last_axis_and_scales_may_differ() -> None:
    noised, exact = torch.rand(7, 5, 2).double(), torch.rand(7, 5, 2).double()
    scale = torch.tensor([0.5, 0.25]).double()
    last = PropagatedError(2, scale=scale, low=0.0, high=3.0, axis=-1)
    last.add(noised, exact)
    for feature in range(2):
        alone = PropagatedError(1, scale=scale[feature], low=0.0, high=3.0)
        alone.add(noised[..., feature].reshape(-1, 1), exact[..., feature].reshape(-1, 1))
        # The same normal equations, summed in another order.
        torch.testing.assert_close(last.regression()[:, feature], alone.regression()[:, 0], atol=1e-9, rtol=1e-9)


def test_a_channel_without_data_or_with_one_value_still_has_a_fit() -> None:
    sums = PropagatedError(2, scale=torch.ones(1), low=0.0, high=4.0)
    torch.testing.assert_close(sums.regression(), torch.zeros(3, 2).double(), atol=0.0, rtol=0.0)
    noised = torch.tensor([[0.0, 2.0], [5.0, 2.0], [-1.0, 2.0]])  # the first channel is at or beyond the ends
    sums.add(noised, noised - torch.tensor([1.0, 0.3]))
    fit = sums.regression()
    torch.testing.assert_close(fit[:, 0], torch.zeros(3).double(), atol=0.0, rtol=0.0)
    # 2.0 - 0.3 in float32.
    torch.testing.assert_close(evaluate(fit[:, 1], torch.tensor(0.5).double()).item(), 0.3, atol=1e-6, rtol=0.0)


def test_grouped_layers_and_learned_borders_take_the_result_as_it_is() -> None:
    weight = torch.randn(8, 2, 3, 3)
    used = weight + 0.1 * torch.randn_like(weight)
    sums = PropagatedError(4, scale=torch.full((1, 1, 1, 1), 0.5), low=-2.0, high=1.0, degree=1)
    x = torch.randn(3, 4, 6, 6)
    sums.add(x, x + 0.1 * torch.randn_like(x))
    for degree in (1, 2):
        border = closed_form_border(
            weight, used, low=-2.0, high=1.0, groups=2, propagated=sums.regression(), degree=degree
        )
        rounding = LearnedBorder(border_coefficients(border), low=-2.0, high=1.0)
        assert rounding.coefficients.shape == (degree + 1, 4, 9, 1)
        assert rounding.coefficients.dtype == torch.float32
        u = torch.rand(2, 4, 9, 5) * 3 - 2
        assert bool(((rounding(u) - u).abs() <= 1).all())


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.randn(4, 3, 3, 3)
    with pytest.raises(ShapeError, match="both of one convolution"):
        weight_terms(torch.randn(4, 3, 2), torch.randn(4, 3, 2))
    with pytest.raises(ShapeError, match="divide the outputs"):
        weight_terms(weight, weight, groups=3)
    with pytest.raises(SpecError, match="low must be below high"):
        closed_form_border(weight, weight, low=1.0, high=1.0)
    with pytest.raises(RangeError, match="degree=1"):
        closed_form_border(weight, weight, low=0.0, high=1.0, degree=1, propagated=torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="3 channels"):
        closed_form_border(weight, weight, low=0.0, high=1.0, propagated=torch.zeros(3, 4))
    with pytest.raises(RangeError, match="degree=-1"):
        PropagatedError(3, scale=torch.ones(1), low=0.0, high=1.0, degree=-1)
    sums = PropagatedError(3, scale=torch.ones(1), low=0.0, high=1.0)
    with pytest.raises(ShapeError, match="3 channels on axis 1"):
        sums.add(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(DataError, match="not finite"):
        sums.add(torch.full((2, 3), 0.5), torch.full((2, 3), torch.nan))
