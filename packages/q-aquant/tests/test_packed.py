"""Layers with borders in their packed form, and on disk: bit for bit what they were."""

import json
import math
import pathlib
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from q_aquant.border import BOUNDS, Bound, FusedBorder, LearnedBorder, rectified
from q_aquant.drop import Draws, RandomDrop
from q_aquant.layers import PatchConv2d
from q_aquant.packed import PackedPatchConv2d, border_bits
from q_aquant.roundings import FixedRounding, Gradual, LearnedRounding
from q_core import (
    FormatError,
    NearestEven,
    PackedConv2d,
    PackedLinear,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    QuantUnit,
    Rounding,
    StateError,
    UniformGrid,
    bits_per_weight,
    load_packed,
    pack,
    save_packed,
)
from q_core.analysis import compare, distributions

QMAX, ZERO = 15, 6
EXACT = {"rtol": 0, "atol": 0}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 3, "out_channels": 5, "kernel_size": 3},
    "one position": {"in_channels": 7, "out_channels": 2, "kernel_size": 1, "bias": False},
    "odd": {"in_channels": 3, "out_channels": 2, "kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)},
    "grouped": {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "dilation": (1, 2)},
    "depthwise": {"in_channels": 5, "out_channels": 5, "kernel_size": 3, "groups": 5, "padding": 1, "bias": False},
    "same": {"in_channels": 2, "out_channels": 3, "kernel_size": (3, 5), "padding": "same"},
    "reflect": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def activations(rounding: Rounding | None = None) -> Quantizer:
    grid = UniformGrid(torch.full((1,), 0.31), torch.full((1,), float(ZERO)), qmin=0, qmax=QMAX)
    return Quantizer(grid, rounding)


def border(*index: int, bound: Bound = rectified, degree: int = 2) -> LearnedBorder:
    return LearnedBorder(torch.randn(degree + 1, *index), low=float(-ZERO), high=float(QMAX - ZERO), bound=bound)


def fixed(weight: Tensor, *, zero_point: bool = True) -> Quantizer:
    """Quantize a weight to 3 bits, each element up or down at random."""
    shape = (len(weight), *[1] * (weight.ndim - 1))
    scale = 0.05 + 0.1 * torch.rand(shape)
    zero = torch.randint(0, 8, shape).float() if zero_point else None
    grid = UniformGrid(scale, zero, qmin=0 if zero_point else -4, qmax=7 if zero_point else 3)
    return Quantizer(grid, FixedRounding(torch.rand(weight.shape) < 0.5))


def on_patches(layer: nn.Conv2d, rounding: Rounding, weight: Quantizer | None = None) -> PatchConv2d:
    quantized = QuantConv2d.from_float(layer)
    if weight is not None:
        quantized.weight_quantizer = weight
    return PatchConv2d.from_quantized(quantized, activations(rounding)).eval()


def element(layer: nn.Conv2d, **options: Any) -> LearnedBorder:
    return border(layer.in_channels, math.prod(layer.kernel_size), 1, **options)


def fused(layer: nn.Conv2d) -> FusedBorder:
    index = layer.in_channels, math.prod(layer.kernel_size)
    return FusedBorder(element(layer), 0.5 + torch.rand(index))


def assert_round_trip(model: nn.Module, skeleton: nn.Module, path: pathlib.Path, x: Tensor) -> nn.Module:
    """Pack, save and load, and require the outputs of the model at every step."""
    with torch.no_grad():
        expected = model.eval()(x)
        packed = pack(model)
        torch.testing.assert_close(packed(x), expected, **EXACT)
        loaded = load_packed(save_packed(packed, path), skeleton)
        torch.testing.assert_close(loaded(x), expected, **EXACT)
        torch.testing.assert_close(loaded.state_dict(), packed.state_dict(), **EXACT)
        for other in (model, packed, loaded):  # any of them is a skeleton
            torch.testing.assert_close(load_packed(path, other)(x), expected, **EXACT)
    assert save_packed(loaded, path.with_name("again")).read_bytes() == path.read_bytes()
    return loaded


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.safetensors"


# Convolutions of patches


@pytest.mark.parametrize("make", [element, fused])
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_of_patches_comes_back(options: dict[str, Any], make: Any, path: pathlib.Path) -> None:
    layer = nn.Conv2d(**options)
    x = 2 * torch.randn(3, layer.in_channels, 9, 7)
    loaded = assert_round_trip(on_patches(layer, make(layer), fixed(layer.weight)), nn.Conv2d(**options), path, x)
    assert isinstance(loaded, PackedPatchConv2d)
    assert not hasattr(loaded, "weight")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x[0]), loaded(x)[0], **EXACT)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_bound_and_degree_come_back(bound: Bound, degree: int, path: pathlib.Path) -> None:
    layer = nn.Conv2d(2, 3, 3)
    model = on_patches(layer, element(layer, bound=bound, degree=degree), fixed(layer.weight, zero_point=False))
    loaded = assert_round_trip(model, nn.Conv2d(2, 3, 3), path, torch.randn(2, 2, 5, 5))
    rounding = loaded.patch_quantizer.rounding
    assert (rounding.bound, rounding.degree, rounding.low, rounding.high) == (bound, degree, -ZERO, QMAX - ZERO)


def test_a_float_weight_stays_a_parameter(path: pathlib.Path) -> None:
    layer, skeleton = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    skeleton.weight.requires_grad_(False)
    loaded = assert_round_trip(on_patches(layer, fused(layer)), skeleton, path, torch.randn(2, 2, 5, 5))
    assert not loaded.weight.requires_grad
    assert bits_per_weight(loaded) == 32
    assert load_packed(path, layer).weight.requires_grad


def test_an_empty_patch_slot_stays_empty(path: pathlib.Path) -> None:
    layer = nn.Conv2d(2, 3, 3)
    model = PatchConv2d.from_quantized(QuantConv2d.from_float(layer), nn.Identity())
    model.weight_quantizer = fixed(layer.weight)
    loaded = assert_round_trip(model, nn.Conv2d(2, 3, 3), path, torch.randn(2, 2, 5, 5))
    assert isinstance(loaded.patch_quantizer, nn.Identity)


def test_the_packed_layer_takes_nothing_from_the_model(path: pathlib.Path) -> None:
    layer = nn.Conv2d(2, 3, 3)
    model = on_patches(layer, fused(layer), fixed(layer.weight))
    packed = pack(model)
    assert isinstance(model.weight_quantizer, Quantizer)
    assert all(parameter.requires_grad for parameter in model.patch_quantizer.rounding.parameters())
    with torch.no_grad():
        model.patch_quantizer.rounding.weights.zero_()
    assert bool((packed.patch_quantizer.rounding.weights > 0).all())


def test_a_learned_decision_is_in_the_codes_and_nowhere_else(path: pathlib.Path) -> None:
    layer = nn.Conv2d(2, 3, 3)
    quantizer = fixed(layer.weight)
    packed = pack(on_patches(layer, fused(layer), quantizer))
    torch.testing.assert_close(packed.packed_weight.codes(), quantizer.codes(layer.weight), **EXACT)
    save_packed(packed, path)
    assert set(load_file(path)) == {
        "bias",
        "packed_weight.words",
        "packed_weight.grid.scale",
        "packed_weight.grid.zero_point",
        "patch_quantizer.grid.scale",
        "patch_quantizer.grid.zero_point",
        "patch_quantizer.rounding.weights",
        "patch_quantizer.rounding.elements.coefficients",
    }


# Whole networks


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu()) + x).relu()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Block(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x).relu()).mean((2, 3)))


def reconstructed(network: Network) -> nn.Module:
    """Quantize a network in every way: shared borders, borders of elements, a linear layer, and a unit."""
    stem, conv2 = (QuantConv2d.from_float(layer) for layer in (network.stem, network.block.conv2))
    stem.input_quantizer, stem.weight_quantizer = activations(border(3, 1, 1)), fixed(stem.weight)
    conv2.input_quantizer, conv2.weight_quantizer = activations(border(4, 1, 1)), fixed(conv2.weight)
    head = QuantLinear.from_float(network.head)
    head.input_quantizer, head.weight_quantizer = activations(border(4)), fixed(head.weight)
    block = Block(4)
    block.conv1 = on_patches(network.block.conv1, fused(network.block.conv1), fixed(network.block.conv1.weight))
    block.conv2 = conv2
    model = Network()
    model.stem, model.head, model.block = stem, head, QuantUnit(block)
    model.block.input_quantizer = activations()
    model.block.output_quantizer = activations(border(4, 1, 1))
    return model.eval()


def test_a_network_with_borders_of_every_kind_comes_back(path: pathlib.Path) -> None:
    network, x = Network(), torch.randn(4, 3, 8, 9)
    loaded = assert_round_trip(reconstructed(network), Network(), path, x)
    assert isinstance(loaded.stem, PackedConv2d)
    assert isinstance(loaded.block.body.conv1, PackedPatchConv2d)
    assert isinstance(loaded.head, PackedLinear)
    assert type(loaded.block.input_quantizer.rounding) is NearestEven
    assert type(loaded.block.output_quantizer.rounding) is LearnedBorder
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["q-pack"])["description"]
    assert description["wrapped"] == ["block"]
    assert description["own"] == {"block.body.conv1": {"form": "q_aquant.packed.PackedPatchConv2d", "packed": True}}
    assert description["quantizers"]["head.input_quantizer"]["rounding"] == "q_aquant.border.LearnedBorder"


def test_the_layers_of_a_network_with_borders_are_compared_and_shown() -> None:
    network, x = Network().eval(), torch.randn(4, 3, 8, 9)
    model = reconstructed(network)
    paths = ["stem", "block.body.conv1", "block.body.conv2", "block", "head"]
    assert [error.path for error in compare(network, model, x)] == paths
    assert [error.path for error in compare(network, pack(model), x)] == paths
    shown = {(entry.path, entry.tensor) for entry in distributions(model, x)}
    assert {("block.body.conv1", "patch"), ("block", "output"), ("block", "input")} <= shown


def test_bits_of_weights_and_of_borders_are_counted_apart() -> None:
    network = Network()
    packed = pack(reconstructed(network))
    weights = {"stem": 108, "conv1": 144, "conv2": 16, "head": 20}
    # 3 bits a code in whole words of 32, and a scale and a zero point of 32 bits for each output.
    stored = sum(32 * math.ceil(3 * count / 32) for count in weights.values()) + 64 * (4 + 4 + 4 + 5)
    assert bits_per_weight(packed) == stored / sum(weights.values())
    # Three coefficients for each of 3 + 4 + 4 + 4 channels and 4 * 9 elements, and a weight for each element.
    assert border_bits(packed) == 32 * (3 * 15 + 3 * 36 + 36)
    assert border_bits(network) == 0
    layer = PatchConv2d(2, 3, 3)
    shared = nn.Sequential(layer, layer)
    layer.patch_quantizer = activations(element(layer))
    assert border_bits(shared) == 32 * 3 * 18


# What is refused


@pytest.mark.parametrize(
    ("rounding", "complaint"),
    [
        (LearnedRounding(torch.zeros(1, 2, 5, 5)), "LearnedRounding.*tells no facts"),
        (Gradual(NearestEven()), "Gradual.*tells no facts"),
        (LearnedBorder.nearest((2, 1, 1), low=0.0, high=3.0, bound=nn.Sigmoid()), "LearnedBorder.*the bound Sigmoid"),
    ],
)
def test_a_rounding_in_the_middle_of_learning_is_refused_by_its_path(
    rounding: Rounding, complaint: str, path: pathlib.Path
) -> None:
    layer = QuantConv2d(2, 3, 3)
    layer.input_quantizer = activations(rounding)
    with pytest.raises(StateError, match=rf"0\.input_quantizer rounds with a {complaint}.*before save_packed\(\)"):
        save_packed(pack(nn.Sequential(layer)), path)
    assert not path.exists()


def test_what_drops_at_random_or_gives_no_codes_is_not_packed() -> None:
    dropping = PatchConv2d(2, 3, 3)
    dropping.patch_quantizer = RandomDrop(activations(), 0.5, Draws(torch.Generator()))
    with pytest.raises(StateError, match="drops quantization at random: finish the reconstruction") as caught:
        pack(nn.Sequential(dropping))
    assert caught.value.__notes__ == ["while packing 0.patch_quantizer"]
    odd = PatchConv2d(2, 3, 3)
    odd.weight_quantizer = nn.Tanh()
    with pytest.raises(StateError, match="weight_quantizer holds a Tanh: a packed weight needs the codes") as caught:
        pack(nn.Sequential(odd))
    assert caught.value.__notes__ == ["while packing 0"]


def test_a_convolution_of_patches_must_be_packed_before_it_is_saved(path: pathlib.Path) -> None:
    with pytest.raises(StateError, match=r"0 holds a PatchConv2d: call pack\(\) before save_packed\(\)"):
        save_packed(nn.Sequential(PatchConv2d(2, 3, 3)), path)


@pytest.mark.parametrize(
    ("skeleton", "complaint"),
    [
        (nn.Linear(2, 3), "the layer is a Linear, the file has a convolution of patches"),
        (nn.Conv2d(2, 4, 3), r"weight of shape \(4, 2, 3, 3\), the file one of shape \(3, 2, 3, 3\)"),
        (nn.Conv2d(2, 3, 3, stride=2), r"stride=\[2, 2\].* written with .*stride=\[1, 1\]"),
    ],
)
def test_another_architecture_is_refused(skeleton: nn.Module, complaint: str, path: pathlib.Path) -> None:
    layer = nn.Conv2d(2, 3, 3)
    save_packed(pack(on_patches(layer, element(layer), fixed(layer.weight))), path)
    with pytest.raises(FormatError, match=rf"(?s)does not fit a \w+: .*{complaint}"):
        load_packed(path, skeleton)
