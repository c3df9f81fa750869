import copy

import pytest
import torch
from torch import nn

from q_adder import AdderConv2d, Interval, OneSided, Published, Symmetric, redistribute
from q_adder.refinement import divergence, search_ranges, trainable, tune_ranges
from q_core import DataError, MatchError, RangeError, StateError, load_packed, pack, save_packed


def network():
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        AdderConv2d(6, 8, 3),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        AdderConv2d(8, 5, 3),
    ]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in (layers[2], layers[5]):
            layer.weight *= 4  # wider than the inputs, as in a trained network
    model(torch.randn(64, 3, 12, 12))  # statistics for the batch norm
    return model.eval()


@pytest.fixture
def quantized():
    model, batch = network(), torch.randn(32, 3, 12, 12)
    return model, batch, redistribute(model, [batch], weight_bits=2, activation_bits=2, progress=False).model


def error(model, quantized, batch):
    with torch.no_grad():
        return float((model(batch) - quantized(batch)).square().mean())


def test_searched_ranges_lower_the_error_of_the_output(quantized):
    model, batch, twin = quantized
    before = error(model, twin, batch)
    factors = search_ranges(twin, model, batch)
    assert set(factors) == {"2", "5"}
    assert error(model, twin, batch) < before


def test_with_one_factor_of_one_nothing_but_the_means_changes(quantized):
    model, batch, twin = quantized
    scales = [module.tied.scale.clone() for module in twin.modules() if hasattr(module, "tied")]
    assert search_ranges(twin, model, batch, factors=(1.0,)) == {"2": 1.0, "5": 1.0}
    assert scales == [module.tied.scale for module in twin.modules() if hasattr(module, "tied")]


def test_the_search_gives_every_channel_the_mean_of_the_float_model(quantized):
    model, batch, twin = quantized
    search_ranges(twin, model, batch)
    with torch.no_grad():
        # Sums of 54 and 72 differences below 20 in float32: 1e-4 is some ten units in the last place.
        torch.testing.assert_close(twin(batch).mean((0, 2, 3)), model(batch).mean((0, 2, 3)), atol=1e-4, rtol=0)


def test_the_float_model_is_not_changed(quantized):
    model, batch, twin = quantized
    before = copy.deepcopy(model.state_dict())
    search_ranges(twin, model, batch)
    trained = trainable(twin)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(batch).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def squared(output, expected):
    return (output - expected).square().mean()


def test_tuned_ranges_are_never_worse_by_the_loss_that_tuned_them(quantized):
    model, batch, twin = quantized
    tuning = tune_ranges(twin, model, batch, loss=squared, progress=False)
    assert tuning.after < tuning.before
    # The loss of the model as it is left: the same sums in another order, in float32.
    assert error(model, twin, batch) == pytest.approx(tuning.after, rel=1e-3)
    assert tuning.passes == 1 + 6 + 2 * 2 + 1


def test_without_candidates_tuning_corrects_means_and_nothing_else(quantized):
    model, batch, twin = quantized
    other = redistribute(model, [batch], weight_bits=2, activation_bits=2, progress=False).model
    tuning = tune_ranges(twin, model, batch, common=(), rounds=0, loss=squared, progress=False)
    assert tuning.before == tuning.after
    assert tuning.factors == {"2": 1.0, "5": 1.0}
    with torch.no_grad():
        # The means were corrected before, so a second correction moves the outputs by rounding alone.
        torch.testing.assert_close(twin(batch), other(batch), atol=1e-3, rtol=0)


def test_a_candidate_that_is_better_is_found(quantized):
    model, batch, twin = quantized
    search_ranges(twin, model, batch)
    layer = twin.get_submodule("5")
    right = layer.tied.scale.clone()
    layer.tied.scale *= 4
    tuning = tune_ranges(twin, model, batch, common=(), moves=(0.25, 2.0), loss=squared, progress=False)
    assert tuning.factors["5"] == 0.25
    torch.testing.assert_close(layer.tied.scale, right)


def test_divergence_is_zero_between_equals_and_positive_otherwise():
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert abs(float(divergence(logits, logits))) < 1e-12
    other = torch.randn(5, 7, dtype=torch.float64)
    by_hand = (logits.softmax(1) * (logits.log_softmax(1) - other.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(divergence(other, logits), by_hand)


def test_a_loss_that_is_no_number_is_refused(quantized):
    model, batch, twin = quantized
    before = copy.deepcopy(twin.state_dict())
    values = iter([1.0, 0.5, float("nan")])
    with pytest.raises(DataError, match="nan"):
        tune_ranges(twin, model, batch, loss=lambda *_: torch.tensor(next(values)), progress=False)
    assert all(torch.equal(before[key], value) for key, value in twin.state_dict().items())


def test_a_trainable_copy_learns_by_distillation(quantized):
    model, batch, twin = quantized
    trained = trainable(twin).eval()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.03)
    before = error(model, trained, batch)
    for _ in range(100):
        loss = (trained(batch) - model(batch).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(model, trained, batch) < 0.8 * before
    learned = [module.tied.scale for module in trained.modules() if hasattr(module, "tied")]
    fixed = [module.tied.scale for module in twin.modules() if hasattr(module, "tied")]
    assert all(not torch.equal(a, b) for a, b in zip(learned, fixed, strict=True))


def test_a_trainable_copy_starts_with_the_outputs_of_the_model(quantized):
    _, batch, twin = quantized
    with torch.no_grad():
        assert torch.equal(trainable(twin).eval()(batch), twin(batch))


def test_a_scale_stays_positive_however_large_the_step(quantized):
    _, batch, twin = quantized
    trained = trainable(twin)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e3)
    trained(batch).square().mean().backward()
    optimizer.step()
    scales = [module.tied.scale for module in trained.modules() if hasattr(module, "tied")]
    assert all(bool((scale >= 0).all()) for scale in scales)


def test_a_trained_model_packs_and_reloads(quantized, tmp_path):
    model, batch, twin = quantized
    trained = trainable(twin)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    trained(batch).square().mean().backward()
    optimizer.step()
    trained.eval()
    packed = pack(trained)
    save_packed(packed, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "model.safetensors", model)(batch), trained(batch))


@pytest.mark.parametrize("scheme", [OneSided(), Symmetric(), Interval(), Published()])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1])
def test_a_layer_that_is_dead_at_calibration_is_named_and_can_be_given_a_scale(scheme, factor):
    model, batch = network(), torch.randn(32, 3, 12, 12)
    with torch.no_grad():
        model[3].bias -= 1e3  # nothing passes the rectifier behind it
    result = redistribute(model, [batch], weight_bits=2, activation_bits=2, scheme={"5": scheme}, progress=False)
    assert [layer.dead for layer in result.layers] == [False, True]
    assert "\n5 is dead: its inputs were all but zero" in str(result)
    scale = result.model.get_submodule("5").tied.scale
    scale *= factor  # of a search, which cannot tell one range of a dead layer from another
    with pytest.raises(StateError, match=r"inputs of '5' were all but zero .* get_submodule\('5'\)\.tied\.scale"):
        trainable(result.model)
    scale.fill_(0.5)
    assert torch.equal(trainable(result.model).get_submodule("5").tied.scale, scale)


def test_the_state_of_a_trained_model_loads_into_another_copy(quantized):
    _, batch, twin = quantized
    trained, other = trainable(twin), trainable(twin)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01
    other.load_state_dict(trained.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(batch), trained.eval()(batch))


def test_what_is_not_quantized_is_refused():
    with pytest.raises(MatchError, match="redistribute"):
        search_ranges(network(), network(), torch.randn(1, 3, 12, 12))
    with pytest.raises(MatchError, match="redistribute"):
        trainable(network())


def test_ranges_of_scales_that_learn_are_not_chosen_in_vain(quantized):
    model, batch, twin = quantized
    for choose in (search_ranges, tune_ranges):
        with pytest.raises(StateError, match=r"scale of '2' learns"):
            choose(trainable(twin), model, batch)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = AdderConv2d(3, 3, 1)

    def forward(self, x):
        return self.layer(self.layer(x).relu())


@pytest.mark.parametrize("choose", [search_ranges, tune_ranges])
def test_a_layer_that_runs_twice_is_refused_and_nothing_is_changed(choose):
    model, batch = Twice().eval(), torch.randn(4, 3, 5, 5)
    twin = redistribute(model, [batch], weight_bits=3, activation_bits=3, progress=False).model
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(DataError, match="runs twice"):
        choose(twin, model, batch)
    assert all(torch.equal(before[key], value) for key, value in twin.state_dict().items())


def test_factors_that_are_not_positive_are_refused(quantized):
    model, batch, twin = quantized
    with pytest.raises(RangeError, match="factors"):
        search_ranges(twin, model, batch, factors=(0.5, 0.0))
