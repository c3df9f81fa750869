"""Losses of the prediction: their formulas, and where they are neutral."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from q_aquant import (
    ActivationScales,
    Calibration,
    DivergenceLoss,
    FisherLoss,
    Plan,
    PowerLoss,
    PredictionDifference,
    WeightRounding,
    find_units,
    reconstruct,
    rounding,
)
from q_aquant.losses import Loss, divergence
from q_aquant.tails import UnitTail
from q_core.errors import RangeError
from q_core.trace import fold_batchnorm

from .networks import images, net


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 2)])
def test_divergence_is_that_of_the_two_distributions_averaged_over_the_rest(shape, temperature) -> None:
    output, target = logits(*shape), logits(*shape, seed=1)
    p, q = (each / each.sum(1, keepdim=True) for each in ((target / temperature).exp(), (output / temperature).exp()))
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(output, target, temperature), expected, rtol=1e-12, atol=1e-15)  # float64
    loss = DivergenceLoss(temperature)
    torch.testing.assert_close(loss(output, target), temperature**2 * expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss.error(output.float(), target.float()), loss(output, target), rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), temperature=st.floats(0.1, 20))
def test_divergence_is_never_negative_and_zero_for_the_same_prediction(seed, shift, temperature) -> None:
    output, target = logits(4, 5, seed=seed), logits(4, 5, seed=seed + 1)
    # Sums of five terms of at most 50 / 0.1 in float64: 1e-12 is a hundred units in their last place.
    assert float(divergence(output, target, temperature)) >= -1e-12
    same = divergence(target + shift, target, temperature)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-10)


def test_a_high_temperature_compares_the_logits_themselves() -> None:
    output, target = logits(6, 5), logits(6, 5, seed=1)
    centred = (output - target) - (output - target).mean(1, keepdim=True)
    expected = centred.square().sum(1).mean() / (2 * 5)
    # The next term of the series is smaller by about the largest logit over the temperature.
    torch.testing.assert_close(DivergenceLoss(1e4)(output, target), expected, rtol=1e-3, atol=0)


def test_the_prediction_difference_adds_what_the_float_network_makes_of_the_output() -> None:
    model = fold_batchnorm(net(), images(2))
    units = find_units(model, images(2))
    tail = UnitTail(model, units[1], units[:1])
    output, target = torch.rand(5, 6, 8, 8), torch.rand(5, 6, 8, 8)
    loss = PredictionDifference(PowerLoss(2.4), weight=3.0, temperature=2.0)
    torch.testing.assert_close(loss(output, target), PowerLoss(2.4)(output, target), rtol=0, atol=0)
    found = loss.further(images(5), output, target, tail)
    behind = nn.Sequential(model.block2)
    p, q = (model.head(behind(x).mean((2, 3))) for x in (target, output))
    torch.testing.assert_close(found, 3.0 * divergence(q, p, 2.0), rtol=1e-6, atol=1e-9)  # float32 sums


def test_the_prediction_difference_is_neutral_at_weight_zero_and_where_nothing_differs() -> None:
    def never(*_):
        raise AssertionError("the network behind the unit ran")

    output, target = torch.rand(5, 6), torch.rand(5, 6)
    assert PredictionDifference(weight=0.0).further(images(5), output, target, never) is None
    same = PredictionDifference().further(images(5), target, target, lambda _, y: y)
    torch.testing.assert_close(same, torch.zeros(()), rtol=0, atol=1e-7)  # float32: the logarithm of a softmax


def test_the_gradient_of_the_prediction_difference_reaches_the_output_and_not_the_target() -> None:
    output, target = torch.rand(5, 6, requires_grad=True), torch.rand(5, 6, requires_grad=True)
    PredictionDifference(temperature=1.0, weight=2.0).further(images(5), output, target, lambda _, y: y).backward()
    # The gradient of KL(p || softmax(y)) with respect to y is softmax(y) - p, here averaged over five images.
    torch.testing.assert_close(output.grad, 2 * (output.softmax(1) - target.softmax(1)).detach() / 5)
    assert target.grad is None


def test_the_prediction_difference_takes_the_importance_of_the_loss_that_it_adds_to() -> None:
    target, output = torch.randn(3, 5), torch.randn(3, 5)
    loss = PredictionDifference(FisherLoss())
    weights = loss.importance(images(3), output, target, lambda _, y: y)
    torch.testing.assert_close(weights, FisherLoss().importance(images(3), output, target, lambda _, y: y))
    torch.testing.assert_close(loss(output, target, weights), FisherLoss()(output, target, weights))
    both = PredictionDifference(PredictionDifference(weight=1.0), weight=2.0)
    once = PredictionDifference(weight=3.0).further(images(3), output, target, lambda _, y: y)
    torch.testing.assert_close(both.further(images(3), output, target, lambda _, y: y), once)


def test_units_are_judged_by_the_squared_error_unless_a_loss_says_otherwise() -> None:
    output, target = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5)
    expected = (output - target).double().square().sum(1).mean()
    for loss in (PowerLoss(), PowerLoss(2.4), FisherLoss(), PredictionDifference()):
        assert loss.error(output, target).dtype == torch.float64
        torch.testing.assert_close(loss.error(output, target), expected, rtol=1e-6, atol=0)  # squares in float32


def test_values_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RangeError, match="weight=-1"):
        PredictionDifference(weight=-1.0)
    with pytest.raises(RangeError, match="temperature=0"):
        PredictionDifference(temperature=0.0)
    with pytest.raises(RangeError, match="temperature=-2"):
        DivergenceLoss(-2.0)


def run(loss: Loss):
    model = net()
    quantized = rounding(model, [images()], weight_bits=2, activation_bits=2, progress=False)
    plan = Plan((WeightRounding(), ActivationScales()), loss=loss, iterations=6, batch_size=8, looks=2)
    calibration = Calibration(images(), 8)
    folded = fold_batchnorm(model, images(2))
    return reconstruct(folded, quantized.model, quantized.units, plan, calibration, progress=False)


def test_the_prediction_difference_counts_in_every_step_of_a_unit() -> None:
    plain, plain_logs = run(PowerLoss())
    neutral, _ = run(PredictionDifference(weight=0.0))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(neutral.state_dict()[name], tensor, rtol=0, atol=0)
    _, logs = run(PredictionDifference(weight=1e5))
    # The first block; the stem before it has 8 bits, which no prediction feels.
    assert logs[1].looks[0].loss > 2 * plain_logs[1].looks[0].loss


def test_the_divergence_fits_the_unit_that_ends_with_the_logits() -> None:
    model = net()
    quantized = rounding(model, [images()], weight_bits=2, activation_bits=2, progress=False).model
    folded = fold_batchnorm(model, images(2))
    units = find_units(folded, images(2), blocks=("",))
    plan = Plan((WeightRounding(),), loss=DivergenceLoss(), iterations=6, batch_size=8, looks=2)
    found, (log,) = reconstruct(folded, quantized, units, plan, Calibration(images(), 8), progress=False)
    with torch.no_grad():
        expected = plan.loss.error(found(images()[40:]), folded(images()[40:]))
    # The mean of one batch, in float64 from float32 logits.
    assert log.error == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (4, 7), (6,)])
def test_the_squared_error_has_the_value_and_the_gradient_of_its_parts(shape) -> None:
    output = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(shape, dtype=torch.float64)
    channels = shape[1] if len(shape) > 1 else 1
    expected = (output - target).square().mean() * channels
    found = PowerLoss()(output, target)
    # A sum of up to 120 squares, and its root, in another order.
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(3 * loss, output)[0] for loss in (found, expected)]
    # Three products, each rounded once.
    torch.testing.assert_close(*gradients, rtol=1e-15, atol=0)


def test_the_squared_error_of_what_is_right_is_zero_and_pulls_nowhere() -> None:
    output = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = PowerLoss()(output, torch.ones(2, 3, 4, 4))
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(loss.detach(), torch.zeros(()), rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)
