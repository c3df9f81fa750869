"""The rule gives each adder weight a gradient of one length, whatever happened to the loss before the step."""

import copy
import math

import pytest
import torch
from torch import nn

from q_adder import AdderConv2d, AdderLearningRate, AdderLinear, adder_weights
from q_core import MatchError, RangeError, StateError


def network(dtype=torch.float64):
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3, bias=False), AdderConv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU()
    return nn.Sequential(*layers, AdderConv2d(5, 2, 3), nn.Flatten(), AdderLinear(2, 3)).to(dtype)


ADDERS = (1, 4, 6)
BATCH = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
# Sums of the same few hundred float64 terms in another order, on updates below 10.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def sgd(model, eta=0.2, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    return optimizer, AdderLearningRate(optimizer, adder_weights(model), eta=eta)


def step(model, parts, scale=1.0):
    """One step of SGD on the given parts of a batch, accumulated, with the loss scaled and the gradients unscaled."""
    optimizer, _ = sgd(model)
    for part in parts:
        (model(part).square().sum() * scale).backward()
    for parameter in model.parameters():
        parameter.grad /= scale
    optimizer.step()
    return parameters(model)


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("eta", [0.2, 1.5])
def test_the_gradient_of_an_adder_weight_has_length_eta_root_k(eta):
    model = network()
    optimizer, _ = sgd(model, eta)
    model(BATCH).square().sum().backward()
    before = [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
    optimizer.step()
    adders = {id(model[index].weight) for index in ADDERS}
    for parameter, grad in zip(model.parameters(), before, strict=True):
        length = torch.linalg.vector_norm(grad)
        expected = grad * (eta * math.sqrt(grad.numel()) / length) if id(parameter) in adders else grad
        torch.testing.assert_close(parameter.grad, expected, **CLOSE)


def test_the_step_is_the_learning_rate_times_that_length():
    model = network()
    before = model[1].weight.detach().clone()
    step(model, [BATCH])
    moved = torch.linalg.vector_norm(model[1].weight.detach() - before)
    expected = torch.tensor(0.1 * 0.2 * math.sqrt(before.numel()), dtype=torch.float64)
    torch.testing.assert_close(moved, expected, **CLOSE)


@pytest.mark.parametrize("scale", [2.0**-40, 1024.0, 2.0**60])
def test_the_update_does_not_depend_on_the_loss_scale(scale):
    torch.testing.assert_close(step(network(), [BATCH], scale), step(network(), [BATCH]), **CLOSE)


@pytest.mark.parametrize("size", [1, 3])
def test_the_update_does_not_depend_on_accumulation(size):
    whole, parts = network().eval(), network().eval()  # batch statistics would differ between the parts
    torch.testing.assert_close(step(parts, BATCH.split(size)), step(whole, [BATCH]), **CLOSE)


@pytest.mark.parametrize("exponent", [-140, -100, -40, 40, 100, 126])
def test_gradients_of_any_size_that_float32_holds_get_the_same_length(exponent):
    """Their squares leave float32 on either side, which must not end in no step or in a step without bound."""
    model = AdderConv2d(3, 2, 3)
    optimizer, _ = sgd(model)
    model.weight.grad = torch.ones_like(model.weight) * 2.0**exponent
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, torch.full_like(model.weight, 0.2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_changes_no_update(fused, unscaled):
    """A fused optimizer divides by the scale inside its kernel, after the rule; others get unscaled gradients."""
    expected = step(network(torch.float32).eval(), [BATCH.float()])
    model = network(torch.float32).eval()
    optimizer, _ = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(BATCH.float()).square().sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    # The scale is a power of two, so only the order of products differs: some roundings of numbers below 4.
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=8 * 2**-22)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_changes_no_weight(fused):
    model = network(torch.float32)
    optimizer, _ = sgd(model, fused=fused)
    before = parameters(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(BATCH.float()).square().sum()).backward()
    model[1].weight.grad[0, 0, 0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(one, other) for one, other in zip(parameters(model), before, strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("named", [False, True])
def test_a_step_with_a_closure_follows_the_rule(optimizer, named):
    """The gradient does not exist before the closure has run, so the rule must come after it."""
    one, other = network(), network()
    for model in (one, other):
        rule = optimizer(model.parameters(), lr=0.1)
        AdderLearningRate(rule, adder_weights(model))

        def closure(model=model, rule=rule):
            rule.zero_grad()
            loss = model(BATCH).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            if model is one:
                closure()
                rule.step()
            else:
                loss = rule.step(closure=closure) if named else rule.step(closure)
                assert loss.item() > 0
    torch.testing.assert_close(parameters(other), parameters(one), rtol=0, atol=0)


def test_a_scheduler_keeps_the_rule():
    model = network()
    optimizer, _ = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for _ in range(2):
        optimizer.zero_grad()
        model(BATCH).square().sum().backward()
        optimizer.step()
        scheduler.step()
        length = torch.linalg.vector_norm(model[1].weight.grad) / math.sqrt(model[1].weight.numel())
        torch.testing.assert_close(length.item(), 0.2, **CLOSE)


def test_the_state_of_the_optimizer_is_that_without_the_rule():
    model = network()
    optimizer, _ = sgd(model, momentum=0.9)
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert optimizer.state_dict().keys() == bare.state_dict().keys()
    bare.load_state_dict(optimizer.state_dict())


def test_a_gradient_of_zero_stays_zero():
    model = network()
    optimizer, _ = sgd(model)
    before = model[1].weight.detach().clone()
    model[1].weight.grad = torch.zeros_like(model[1].weight)
    optimizer.step()  # the others have no gradient
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_seen_everywhere(value):
    """One NaN among thousands of small numbers is easily lost; no NaN at all would hide that the loss has gone."""
    model = network()
    optimizer, _ = sgd(model)
    model(BATCH).square().sum().backward()
    model[1].weight.grad[0, 0, 0, 0] = value
    optimizer.step()
    assert bool(model[1].weight.grad.isnan().all())
    assert not bool(model[4].weight.grad.isnan().any())


def test_a_removed_rule_leaves_gradients_alone():
    model = network()
    optimizer, rule = sgd(model)
    rule.remove()
    model(BATCH).square().sum().backward()
    before = model[1].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[1].weight.grad, before)


def test_a_weight_that_two_layers_share_is_listed_once():
    first, second = AdderLinear(3, 3), AdderLinear(3, 3)
    second.weight = first.weight
    assert adder_weights(nn.Sequential(first, nn.Linear(3, 3), second)) == [first.weight]


def test_weights_outside_the_optimizer_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(StateError, match="3 of 3 adder weights are not in the optimizer"):
        AdderLearningRate(optimizer, adder_weights(model))
    with pytest.raises(StateError, match="0 of 0 adder weights"):
        AdderLearningRate(optimizer, [])
    with pytest.raises(MatchError, match="Sequential has no adder layer"):
        adder_weights(nn.Sequential(nn.Linear(1, 1)))


def test_frozen_weights_are_passed_over():
    model = network()
    model[4].weight.requires_grad_(False)
    weights = adder_weights(model)
    assert [id(weight) for weight in weights] == [id(model[index].weight) for index in (1, 6)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rule = AdderLearningRate(torch.optim.SGD(trained, lr=0.1), [*weights, model[4].weight])
    assert rule.weights == weights
    for index in (1, 6):
        model[index].weight.requires_grad_(False)
    with pytest.raises(MatchError, match="all 3 adder layers are frozen, '1' to begin with"):
        adder_weights(model)


def test_a_weight_outside_the_optimizer_is_told_by_its_shape():
    model = network()
    optimizer = torch.optim.SGD([model[1].weight, model[6].weight], lr=0.1)
    with pytest.raises(StateError, match=r"1 of 3 adder weights are not in the optimizer, one of shape \(2, 5, 3, 3\)"):
        AdderLearningRate(optimizer, adder_weights(model))


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_weight_that_is_computed_is_refused_by_the_name_of_its_layer(normed):
    model = network()
    normed(model[4])
    with pytest.raises(StateError, match="the weight of 4 is computed from other tensors, by weight norm"):
        adder_weights(model)


def test_a_second_rule_for_a_weight_of_an_optimizer_is_refused():
    model = network()
    optimizer, rule = sgd(model)
    with pytest.raises(StateError, match="3 of 3 adder weights have a rule in this optimizer already"):
        AdderLearningRate(optimizer, adder_weights(model))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(
        StateError, match=r"2 of 2 adder weights have a rule .* which loading a state does not take off"
    ):
        AdderLearningRate(optimizer, adder_weights(model)[1:], eta=0.1)
    rule.remove()
    rule.remove()
    first, *rest = adder_weights(model)
    rules = AdderLearningRate(optimizer, [first], eta=0.1), AdderLearningRate(optimizer, rest)  # one eta each
    model(BATCH).square().sum().backward()
    optimizer.step()
    for weight, eta in ((first, 0.1), *((weight, 0.2) for weight in rest)):
        length = torch.linalg.vector_norm(weight.grad) / math.sqrt(weight.numel())
        torch.testing.assert_close(length.item(), eta, **CLOSE)
    assert len(rules) == 2
    AdderLearningRate(torch.optim.SGD(model.parameters(), lr=0.1), adder_weights(model))  # another optimizer


@pytest.mark.parametrize("eta", [0.0, -0.2, math.inf, math.nan])
def test_lengths_that_no_update_has_are_refused(eta):
    model = network()
    with pytest.raises(RangeError, match=f"eta={eta}"):
        sgd(model, eta)
