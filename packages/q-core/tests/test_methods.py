"""Rounding to nearest, the baseline of all other methods."""

import re
from functools import partial
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_core import (
    DataError,
    MatchError,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerGroup,
    PerTensor,
    QuantAdd,
    QuantConcat,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    Recipe,
    bits_per_weight,
    calibrate,
    fold_batchnorm,
    nearest,
    pack,
    swap,
)
from q_core.methods import edge_rules, first_batch

from .networks import Inception, Residual, TwoInputs, assert_bit_equal, images, recipes, trained, untouched


def bits_of(quantized: Any) -> dict[str, tuple[int, int]]:
    def bits(spec: QuantSpec | None) -> int:
        return 32 if spec is None else spec.bits

    return {layer.path: (bits(layer.weight), bits(layer.input)) for layer in quantized.swap.swapped}


# nearest


def test_nearest_is_folding_swapping_and_calibrating() -> None:
    """A published method is an alias over the parts."""
    model, batches = trained(Residual()), images()
    quantized = nearest(model, batches, weight_bits=4, activation_bits=6, edge_bits=1, observer=MinMaxObserver)
    folded = fold_batchnorm(model, batches[0])
    twin, _ = swap(
        folded, edge_rules(folded, weight=lambda b: recipes(b)[0], input=lambda b: recipes(8, b)[1], bits=(4, 6, 1))
    )
    calibrate(twin, batches)
    assert_bit_equal(quantized.model.state_dict(), twin.state_dict())
    assert quantized.calibration.batches == 3


def test_the_first_and_the_last_layer_have_bits_of_their_own() -> None:
    model, batches = trained(Residual()), images()
    assert bits_of(nearest(model, batches, weight_bits=2, activation_bits=4)) == {
        "stem": (8, 8),
        "depthwise": (2, 4),
        "shortcut": (2, 4),
        "add": (32, 4),
        "fc": (8, 8),
    }
    assert bits_of(nearest(model, batches, weight_bits=2, activation_bits=4, edge_bits=3))["fc"] == (3, 4)
    assert bits_of(nearest(model, batches, weight_bits=2, activation_bits=4, edge_bits=32))["depthwise"] == (2, 4)
    assert "fc" not in bits_of(nearest(model, batches, weight_bits=2, activation_bits=4, edge_bits=32))


def test_sums_and_concatenations_are_no_first_or_last_layer() -> None:
    """Whichever module is registered last: the linear layer makes the logits."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cat = QuantConcat()
            self.first, self.middle, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
            self.add = QuantAdd()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(self.cat(x))
            return self.last(self.add(y, self.middle(y)).mean((2, 3)))

    assert bits_of(nearest(Late(), images(), weight_bits=2, activation_bits=3)) == {
        "cat": (32, 3),
        "first": (8, 8),
        "middle": (2, 3),
        "last": (8, 8),
        "add": (32, 3),
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_a_network_of_edges_alone_has_edge_bits(layers: int) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    found = bits_of(nearest(model, [torch.randn(3, 4)], weight_bits=2, activation_bits=2))
    assert found == {str(index): (8, 8) for index in range(layers)}


def test_a_single_layer_can_be_the_model() -> None:
    assert bits_of(nearest(nn.Linear(3, 2), [torch.randn(4, 3)], weight_bits=2)) == {"": (8, 8)}


def test_32_bits_mean_float() -> None:
    model, batches = trained(Residual()), images()
    weights = nearest(model, batches, weight_bits=4, activation_bits=32)
    assert set(bits_of(weights).values()) == {(8, 32), (4, 32)}
    assert "add" not in bits_of(weights)
    activations = nearest(model, batches, weight_bits=32, activation_bits=4)
    assert bits_of(activations) == {
        "stem": (32, 8),
        "depthwise": (32, 4),
        "shortcut": (32, 4),
        "add": (32, 4),
        "fc": (32, 8),
    }
    assert bits_per_weight(pack(activations.model)) == 32


def test_options_reach_the_observers() -> None:
    model, batches = trained(Residual()), images()
    quantized = nearest(
        model,
        batches,
        observer=partial(PercentileObserver, fraction=0.9),
        weight_observer=partial(MSEObserver, candidates=4),
        weight_granularity=PerTensor(),
    ).model
    assert quantized.depthwise.weight_quantizer.grid.scale.shape == (1, 1, 1, 1)
    full = nearest(model, batches, observer=MinMaxObserver).model
    assert quantized.fc.input_quantizer.grid.scale < full.fc.input_quantizer.grid.scale
    grouped = nearest(
        nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), [torch.randn(4, 8)], weight_granularity=PerGroup(4)
    ).model
    assert grouped[0].weight_quantizer.grid.scale.shape == (4, 2)


def test_eight_bits_are_close_to_float() -> None:
    for network in (Residual, Inception):
        model, batches = trained(network()), images(8)
        x = batches[0]
        with torch.no_grad():
            expected, actual = model(x), nearest(model, batches).model(x)
        noise = (actual - expected).pow(2).mean()
        # 8 bits over the range of a bell curve give about 40 dB a quantizer; ten of them in a row cost 10 dB.
        assert 10 * torch.log10(expected.pow(2).mean() / noise) > 30


def test_more_bits_are_closer_to_float() -> None:
    model, batches = trained(Residual()), images(4)
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in batches])
        errors = []
        for bits in (2, 4, 6, 8):
            quantized = nearest(model, batches, weight_bits=bits, activation_bits=bits, edge_bits=bits).model
            errors.append(float((torch.cat([quantized(batch) for batch in batches]) - expected).pow(2).mean()))
    assert errors == sorted(errors, reverse=True)


def test_the_result_is_in_eval_mode_and_the_float_model_is_not_touched() -> None:
    model = trained(Residual()).train()
    with untouched(model):
        quantized = nearest(model, images())
    assert not any(module.training for module in quantized.model.modules())


def test_two_inputs_come_as_a_mapping() -> None:
    batch = {"mask": torch.randn(2, 2, 6, 6), "image": torch.randn(2, 3, 6, 6)}
    quantized = nearest(trained(TwoInputs()), [batch])
    assert isinstance(quantized.model.bn, nn.Identity)
    assert quantized.model(**batch).shape == (2, 4, 4, 4)


def test_an_iterator_loses_no_batch() -> None:
    model, batches = trained(Residual()), images(4)
    listed, once = nearest(model, batches), nearest(model, iter(batches))
    assert once.calibration.batches == 4
    assert_bit_equal(once.model.state_dict(), listed.model.state_dict())


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(MatchError, match="a ReLU has no convolution or linear layer"):
        nearest(nn.ReLU(), [torch.randn(2, 2)])
    with pytest.raises(MatchError, match="has no convolution or linear layer"):
        nearest(nn.Sequential(QuantConcat()), [torch.randn(2, 2)])


def test_nearest_is_registered_for_the_command() -> None:
    found = [entry for entry in metadata.entry_points(group="q_core.methods") if entry.name == "nearest"]
    if not found:
        pytest.skip("the package is on the path but not installed")
    assert found[0].load() is nearest


# edge_rules


def test_edge_rules_take_names_literally() -> None:
    """A name may hold what means something else in a regular expression."""
    names = ["a+b", "x(1)", "net.work", "z|y", "l[0]", "end$"]
    model = nn.Sequential()
    for name in names:
        model.add_module(name.replace(".", "_"), nn.Linear(2, 2))
    rules = edge_rules(model, weight=lambda b: recipes(b)[0], input=lambda b: recipes(8, b)[1], bits=(2, 2, 8))
    _, report = swap(model, rules)
    assert [layer.weight.bits for layer in report.swapped] == [8, 2, 2, 2, 2, 8]
    assert re.fullmatch(rules[0].pattern, "a+b")
    assert not re.fullmatch(rules[0].pattern, "aab")


def test_edge_rules_know_layers_written_by_hand() -> None:
    model = nn.Sequential(QuantConv2d(3, 4, 1), QuantAdd(), QuantLinear(4, 4), QuantLinear(4, 2))
    rules = edge_rules(model, weight=lambda b: recipes(b)[0], input=lambda b: recipes(8, b)[1], bits=(2, 3, 8))
    assert [rule.pattern for rule in rules] == ["0|3", ".*"]


def test_edge_rules_skip_what_cannot_be_swapped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    nn.utils.spectral_norm(model[0])
    rules = edge_rules(model, weight=lambda b: recipes(b)[0], input=lambda b: recipes(8, b)[1], bits=(2, 2, 8))
    assert rules[0].pattern == "1|2"
    swap(model, rules)


def test_edge_rules_ask_for_recipes_by_bits() -> None:
    asked: list[tuple[str, int]] = []

    def recipe(which: str, bits: int) -> Recipe:
        asked.append((which, bits))
        return recipes(min(bits, 8))[0]

    edge_rules(Residual(), weight=partial(recipe, "weight"), input=partial(recipe, "input"), bits=(2, 3, 6))
    assert {("weight", 2), ("weight", 6), ("input", 3), ("input", 6)} == set(asked)


# first_batch


def test_the_first_batch_is_looked_at_and_not_lost() -> None:
    batches = [(torch.randn(1, 2), 0), (torch.randn(1, 2), 1)]
    example, again = first_batch(batches)
    assert example is batches[0][0]
    assert again is batches
    example, again = first_batch(iter(batches))
    assert list(again) == batches
    mapping = {"x": torch.randn(1, 2)}
    assert first_batch([mapping])[0] == mapping
    nested = {"deep": torch.randn(1, 2)}
    assert first_batch([(nested, 1)])[0] == (nested,)  # positional, as calibrate runs it


def test_a_first_batch_that_calibrate_would_not_understand_is_refused() -> None:
    for batches, complaint in (([], "holds no batch"), ([3], "batch of type int"), ([()], "batch of type tuple")):
        with pytest.raises(DataError, match=complaint):
            first_batch(batches)


class ReadsTheWeight(torch.nn.Module):
    """An attention-like block that reads the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.read = torch.nn.Linear(6, 6)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.linear(self.first(x), self.read.weight, self.read.bias))


def test_a_layer_that_is_read_but_not_called_stays_float_and_is_reported() -> None:
    result = nearest(ReadsTheWeight(), [torch.randn(8, 6)], weight_bits=4, activation_bits=4, progress=False)
    assert [layer.path for layer in result.swap.swapped] == ["first", "last"]
    assert [(layer.path, layer.reason) for layer in result.swap.stays_float] == [
        ("read", "the first batch does not call it")
    ]


def test_nearest_hands_on_the_options_of_calibrate() -> None:
    batches = [torch.randn(8, 6), torch.full((8, 6), torch.nan)]
    result = nearest(ReadsTheWeight(), batches, on_nonfinite="skip", progress=False)
    assert result.calibration.skipped == (1,)


def test_thirty_two_bits_everywhere_is_the_float_network() -> None:
    model, batch = ReadsTheWeight(), torch.randn(8, 6)
    result = nearest(model, [batch], weight_bits=32, activation_bits=32, progress=False)
    assert torch.equal(result.model(batch), model(batch))
    assert len(result.swap.stays_float) == 3
