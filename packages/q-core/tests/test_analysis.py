"""Errors per layer and histograms of what enters the quantizers."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import q_core
from q_core import Quantizer, QuantLinear, Rule, UniformGrid
from q_core.analysis import compare, distributions
from q_core.swap import share, wrap_units


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return layer


def integer_grid(layer: nn.Linear) -> QuantLinear:
    """Quantize the input to the integers -8 to 7, and leave the weight."""
    quantized = QuantLinear.from_float(layer)
    quantized.input_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-8, qmax=7))
    return quantized


class Branches(nn.Module):
    """Odd sizes, batch norms, an in-place activation function, an addition, a concatenation and a linear layer."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.add = q_core.QuantAdd()
        self.cat = q_core.QuantConcat()
        self.fc = nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.conv2(x))
        z = self.cat(self.add(x, y), y)
        return self.fc(z.mean((2, 3)))


def images() -> torch.Tensor:
    return torch.randn(6, 3, 7, 5)


def quantized_branches(weight_bits: int, activation_bits: int, inplace: bool = True):
    torch.manual_seed(1)
    model, batch = Branches(inplace).eval(), images()
    quantized = q_core.nearest(
        model,
        [batch],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edge_bits=1,
        observer=q_core.MinMaxObserver,
    )
    return q_core.fold_batchnorm(model, batch), quantized.model, batch


def test_one_layer_has_the_error_computed_by_hand() -> None:
    layer = linear([[1.0, 0.0], [0.0, 1.0]])
    # Output (0.4, 1), quantized (0, 1): signal 1.16, noise 0.16.
    (error,) = compare(layer, integer_grid(layer), torch.tensor([[0.4, 1.0]]))
    expected = 10 * math.log10(1.16 / 0.16)
    assert (error.path, error.kind) == ("", "QuantLinear")
    # 0.4 is a float32 number, whose relative error of 2^-25 enters the noise twice: 10 / ln(10) * 2^-24 * 2.
    torch.testing.assert_close(error.local, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(error.accumulated, expected, atol=1e-6, rtol=0)


def test_second_layer_is_fed_the_float_input_locally_and_the_quantized_one_in_the_network() -> None:
    model = nn.Sequential(linear([[0.5]]), linear([[3.0]]))
    quantized = nn.Sequential(*(integer_grid(layer) for layer in model))
    first, second = compare(model, quantized, torch.tensor([[2.75]]))
    # Float: 2.75 -> 1.375 -> 4.125. First layer on round(2.75) = 3: 1.5.
    assert first.path == "0"
    torch.testing.assert_close(first.local, 20 * math.log10(1.375 / 0.125))
    torch.testing.assert_close(first.accumulated, first.local)
    # Second layer locally: round(1.375) = 1 -> 3. In the network: round(1.5) = 2, ties to even, -> 6.
    assert second.path == "1"
    torch.testing.assert_close(second.local, 20 * math.log10(4.125 / 1.125))
    torch.testing.assert_close(second.accumulated, 20 * math.log10(4.125 / 1.875))


def test_calls_of_one_layer_are_summed_as_energies() -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.layer(10 * x)

    layer = linear([[1.0]])
    (error,) = compare(Twice(layer), Twice(integer_grid(layer)), torch.tensor([[0.25]]))
    # Outputs 0.25 and 2.5, quantized 0 and 2.
    expected = 10 * math.log10((0.25**2 + 2.5**2) / (0.25**2 + 0.5**2))
    torch.testing.assert_close(error.local, expected)
    torch.testing.assert_close(error.accumulated, expected)


def test_a_model_on_its_own_grid_has_infinite_ratio() -> None:
    model = nn.Sequential(linear([[1.0, -2.0], [0.5, 0.25]]), nn.ReLU())
    quantized = nn.Sequential(integer_grid(model[0]), nn.ReLU())
    (error,) = compare(model, quantized, torch.tensor([[3.0, -5.0], [0.0, 7.0]]))
    assert error.local == error.accumulated == math.inf


def test_noise_without_signal_is_minus_infinity() -> None:
    layer = linear([[1.0, 1.0]])
    # The float outputs cancel: 0.4 - 0.4 = 0; quantized with a scale for each input they do not.
    quantized = QuantLinear.from_float(layer)
    quantized.input_quantizer = Quantizer(UniformGrid(torch.tensor([[1.0, 0.1]]), qmin=-8, qmax=7))
    (error,) = compare(layer, quantized, torch.tensor([[0.4, -0.4]]))
    assert error.local == -math.inf


def test_layers_come_in_the_order_of_execution() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model, batch = Reversed(), torch.randn(4, 3)
    errors = compare(model, q_core.nearest(model, [batch], edge_bits=4).model, batch)
    assert [error.path for error in errors] == ["first", "second"]


def test_first_layer_has_equal_errors_and_more_bits_help_every_layer() -> None:
    results = {}
    for bits in (3, 5, 8):
        folded, quantized, batch = quantized_branches(bits, bits)
        results[bits] = compare(folded, quantized, batch)
    assert [error.path for error in results[8]] == ["conv1", "conv2", "add", "cat", "fc"]
    for errors in results.values():
        assert errors[0].local == errors[0].accumulated
    for few, some, many in zip(results[3], results[5], results[8], strict=True):
        assert few.local < some.local < many.local
        assert few.accumulated < some.accumulated < many.accumulated
    # 8 bits: the step is at most 1/100 of the deviation, so the noise is below 1/120000 of the signal, times a handful
    # of terms that add up: well above 30 dB.
    assert min(error.accumulated for error in results[8]) > 30


def test_a_packed_model_has_the_errors_of_the_model_it_was_packed_from() -> None:
    folded, quantized, batch = quantized_branches(4, 4)
    for left, right in zip(
        compare(folded, quantized, batch), compare(folded, q_core.pack(quantized), batch), strict=True
    ):
        assert (left.path, left.local, left.accumulated) == (right.path, right.local, right.accumulated)


def test_an_in_place_activation_function_does_not_hide_the_output() -> None:
    left = compare(*quantized_branches(4, 4, inplace=True))
    right = compare(*quantized_branches(4, 4, inplace=False))
    assert left == right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared(dtype: torch.dtype) -> None:
    folded, quantized, batch = quantized_branches(8, 8)
    errors = compare(folded.to(dtype), quantized.to(dtype), batch.to(dtype))
    # bfloat16 rounds every operation to 8 bits, so that both models differ by about that of 8-bit quantization.
    assert all(error.accumulated > 20 for error in errors)


def test_folded_batch_norms_are_compared_with_folded_ones_only() -> None:
    _, quantized, batch = quantized_branches(8, 8)
    with pytest.raises(q_core.StateError, match=r"1 batch norms .*\(bn1\).*fold_batchnorm"):
        compare(Branches().eval(), quantized, batch)


def test_observers_are_refused() -> None:
    model = linear([[1.0]])
    twin, _ = q_core.swap(model, [Rule("", q_core.Recipe(q_core.QuantSpec.signed(4)))])
    for call in (lambda: compare(model, twin, torch.ones(1, 1)), lambda: distributions(twin, torch.ones(1, 1))):
        with pytest.raises(q_core.StateError, match=r"still holds 1 observers .*weight_quantizer.*calibrate"):
            call()


def test_a_float_model_without_the_layer_is_refused() -> None:
    _, quantized, batch = quantized_branches(8, 8)
    with pytest.raises(q_core.MatchError, match=r"layer 'conv1' .*Sequential"):
        compare(nn.Sequential(nn.Conv2d(3, 5, 3)), quantized, batch)


def test_models_that_call_a_layer_differently_often_are_refused() -> None:
    class Times(nn.Module):
        def __init__(self, layer: nn.Module, times: int) -> None:
            super().__init__()
            self.layer, self.times = layer, times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = self.layer(x)
            return x

    layer = linear([[1.0]])
    for exact, quantized in ((1, 2), (2, 1)):
        with pytest.raises(q_core.StateError, match=f"'layer' ran {quantized} times in the quantized .*and {exact}"):
            compare(Times(layer, exact), Times(integer_grid(layer), quantized), torch.ones(1, 1))


def test_a_model_without_slots_is_refused() -> None:
    layer = linear([[1.0]])
    with pytest.raises(q_core.StateError, match="swap it first"):
        compare(layer, layer, torch.ones(1, 1))
    with pytest.raises(q_core.StateError, match="no quantizer of the Linear ran"):
        distributions(layer, torch.ones(1, 1))


def test_modes_hooks_and_statistics_are_as_before() -> None:
    folded, quantized, batch = quantized_branches(4, 4)
    folded.train()
    quantized.train()
    quantized.conv2.eval()
    before = [[module.training for module in model.modules()] for model in (folded, quantized)]
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in (folded, quantized)]
    compare(folded, quantized, batch)
    distributions(quantized, batch)
    with pytest.raises(RuntimeError):
        compare(folded, quantized, torch.randn(1, 2, 7, 5))
    with pytest.raises(RuntimeError):
        distributions(quantized, torch.randn(1, 2, 7, 5))
    assert [[module.training for module in model.modules()] for model in (folded, quantized)] == before
    for model, state in zip((folded, quantized), states, strict=True):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, state[key], atol=0, rtol=0)  # not touched at all


def test_histograms_hold_every_value_and_the_levels_of_the_grid() -> None:
    _, quantized, batch = quantized_branches(3, 4)
    found = {(entry.path, entry.tensor): entry for entry in distributions(quantized, batch, bins=21)}
    # The layers run in this order, each quantizing its input first.
    assert list(found)[:4] == [("conv1", "input"), ("conv1", "weight"), ("conv2", "input"), ("conv2", "weight")]
    assert ("add", "left") in found
    assert ("add", "right") in found
    assert ("cat", "input") in found
    entry = found["conv1", "input"]
    assert int(entry.counts.sum()) == batch.numel()
    assert len(entry.counts) == 21
    assert entry.tiles == 1
    torch.testing.assert_close(entry.levels, quantized.conv1.input_quantizer.grid.levels().double().flatten())
    assert float(entry.edges[0]) <= min(float(batch.min()), float(entry.levels[0]))
    assert float(entry.edges[-1]) >= max(float(batch.max()), float(entry.levels[-1]))
    weight = found["conv2", "weight"]
    assert int(weight.counts.sum()) == quantized.conv2.weight.numel()
    assert weight.tiles == 5
    # Each channel is divided by its largest |level|, that of code -4.
    torch.testing.assert_close(weight.levels, torch.arange(-4, 4, dtype=torch.float64) / 4)


def test_clipped_is_what_lies_beyond_half_a_cell() -> None:
    quantized = integer_grid(linear([[1.0] * 5]))
    # The levels are -8 to 7: 7.5 and -8.5 still round to one, 7.6 and -9 are out of reach.
    (entry,) = distributions(quantized, torch.tensor([[7.5, -8.5, 7.6, -9.0, 0.0]]))
    assert entry.clipped == 2 / 5


def test_a_weight_that_two_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    batch = torch.randn(4, 3)
    quantized = q_core.nearest(model, [batch], edge_bits=4).model
    weights = [entry for entry in distributions(quantized, batch) if entry.tensor == "weight"]
    assert [entry.path for entry in weights] == ["0"]
    assert int(weights[0].counts.sum()) == 9


@hypothesis.given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    scale=st.floats(0.015625, 8, width=32),
)
def test_every_value_is_in_a_bin(values: list[float], scale: float) -> None:
    quantized = integer_grid(linear([[1.0]]))
    quantized.input_quantizer = Quantizer(UniformGrid(torch.tensor([scale]), qmin=0, qmax=3))
    (entry,) = distributions(quantized, torch.tensor(values).unsqueeze(1), bins=7)
    assert int(entry.counts.sum()) == len(values)
    assert bool((entry.edges.diff() > 0).all())
    beyond = sum(value < -scale / 2 or value > 3.5 * scale for value in values)
    assert entry.clipped == beyond / len(values)


def test_layers_in_a_unit_are_compared_with_those_of_the_float_model() -> None:
    exact, quantized, batch = quantized_branches(4, 4)
    plain = compare(exact, quantized, batch)
    wrapped = wrap_units(share(quantized), ["conv1", "relu", "bn1"])
    found = {error.path: error for error in compare(exact, wrapped, batch)}
    for error in plain:
        path = "conv1.body" if error.path == "conv1" else error.path
        assert (found[path].local, found[path].accumulated) == (error.local, error.accumulated)
    # With empty slots a unit is its body; the batch norm was folded, and nothing happens to what passes.
    assert (found["conv1"].kind, found["conv1"].local) == ("QuantUnit", found["conv1.body"].local)
    assert found["relu"].local == math.inf
    assert set(found) == {"conv1", "conv1.body", "relu", "bn1", "conv2", "add", "cat", "fc"}
    both = {error.path: error for error in compare(wrap_units(share(exact), ["conv1", "fc"]), wrapped, batch)}
    assert both == found


def test_batch_norms_in_units_are_found_in_the_float_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    twin, _ = q_core.swap(
        wrap_units(share(model), ["1"]), [Rule("0|1", input=q_core.Recipe(q_core.QuantSpec.signed(8)))]
    )
    q_core.calibrate(twin, [images()])
    assert [error.path for error in compare(model, twin, images())] == ["0", "1"]


def test_what_enters_the_quantizers_of_a_unit_is_shown() -> None:
    unit = wrap_units(integer_grid(linear([[1.0]])), [""])
    unit.output_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-2, qmax=1))
    entries = distributions(unit, torch.tensor([[2.75], [-1.0]]))
    assert [(entry.path, entry.tensor) for entry in entries] == [("body", "input"), ("", "output")]
    assert entries[1].clipped == 0.5
