"""Layers with slots."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_core import (
    MinMaxObserver,
    PerChannel,
    QuantAdd,
    QuantConcat,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    QuantSpec,
    QuantUnit,
    SpecError,
    UniformGrid,
)
from q_core.layers import conv_arguments, linear_arguments, slots

from .networks import GEOMETRIES, assert_bit_equal


def quantizer(scale: Tensor, qmin: int = -4, qmax: int = 3, zero_point: Tensor | None = None) -> Quantizer:
    return Quantizer(UniformGrid(scale, zero_point, qmin=qmin, qmax=qmax))


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("batched", [True, False])
def test_a_convolution_with_empty_slots_is_the_float_one(options: dict[str, Any], batched: bool) -> None:
    layer = nn.Conv2d(**options)
    quantized = QuantConv2d.from_float(layer)
    x = torch.randn(2, layer.in_channels, 9, 7)
    x = x if batched else x[0]
    assert_bit_equal(quantized(x), layer(x))
    assert conv_arguments(quantized) == conv_arguments(layer)
    assert quantized.extra_repr() == layer.extra_repr()


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_sees_quantized_operands(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(**options)
    quantized = QuantConv2d.from_float(layer)
    quantized.weight_quantizer = quantizer(torch.full((layer.out_channels, 1, 1, 1), 0.1))
    quantized.input_quantizer = quantizer(torch.tensor([0.3]), 0, 15, torch.tensor([7.0]))
    reference = copy.deepcopy(layer)
    reference.weight.data = quantized.weight_quantizer(layer.weight.data)
    x = torch.randn(2, layer.in_channels, 9, 7)
    with torch.no_grad():
        assert_bit_equal(quantized(x), reference(quantized.input_quantizer(x)))


def test_a_padded_zero_is_an_exact_zero() -> None:
    """With a zero point the code of zero is not 0: padding after quantization keeps it a real zero."""
    layer = QuantConv2d(1, 1, 3, padding=1, bias=False)
    layer.weight.data.fill_(1)
    layer.input_quantizer = quantizer(torch.tensor([0.5]), 0, 7, torch.tensor([3.0]))
    assert_bit_equal(layer(torch.zeros(1, 1, 1, 1)), torch.zeros(1, 1, 1, 1))
    assert_bit_equal(layer(torch.full((1, 1, 1, 1), 1.1)), torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5)])
def test_a_linear_layer_sees_quantized_operands(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 3, bias=bias)
    quantized = QuantLinear.from_float(layer)
    x = torch.randn(shape)
    assert_bit_equal(quantized(x), layer(x))
    assert linear_arguments(quantized) == linear_arguments(layer)
    quantized.weight_quantizer = quantizer(torch.full((3, 1), 0.1))
    quantized.input_quantizer = quantizer(torch.tensor([0.3]))
    with torch.no_grad():
        expected = nn.functional.linear(
            quantized.input_quantizer(x), quantized.weight_quantizer(layer.weight), layer.bias
        )
        assert_bit_equal(quantized(x), expected)


@pytest.mark.parametrize(("layer", "kind"), [(nn.Conv2d(3, 4, 3), QuantConv2d), (nn.Linear(3, 4), QuantLinear)])
def test_from_float_wraps_the_very_tensors(layer: nn.Module, kind: Any) -> None:
    layer.weight.requires_grad_(False)
    quantized = kind.from_float(layer.eval())
    assert quantized.weight is layer.weight
    assert quantized.bias is layer.bias
    assert not quantized.training
    assert list(quantized.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_from_float_keeps_the_dtype(dtype: torch.dtype) -> None:
    for layer in (nn.Conv2d(3, 4, 3, dtype=dtype), nn.Linear(3, 4, dtype=dtype)):
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        assert kind.from_float(layer).weight.dtype == dtype


def test_quantized_layers_can_be_written_by_hand() -> None:
    """The constructors are those of torch, so an architecture can name them itself."""
    assert QuantConv2d(3, 4, 3, padding=1, bias=False, dtype=torch.float64).weight.dtype == torch.float64
    assert QuantLinear(3, 4, bias=False).bias is None
    with pytest.raises(TypeError):
        QuantLinear(3)


def test_gradients_pass_straight_through_to_every_tensor() -> None:
    layer = QuantLinear(2, 2)
    layer.weight.data.copy_(torch.tensor([[0.11, -0.22], [0.04, 9.0]]))  # the last lies outside its grid
    layer.weight_quantizer = quantizer(torch.tensor([[0.1], [0.1]]))
    layer.input_quantizer = quantizer(torch.tensor([1.0]))
    x = torch.tensor([[1.2, -50.0]], requires_grad=True)
    layer(x).sum().backward()
    # Inside the range the derivative is that of the product with the other, quantized, operand; outside it is 0.
    assert_bit_equal(layer.weight.grad, torch.tensor([[1.0, -4.0], [1.0, 0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[0.1, 0.0]]), rtol=2**-22, atol=0)  # 0.1 + 0 in float32
    assert_bit_equal(layer.bias.grad, torch.ones(2))


def test_a_sum_quantizes_either_side() -> None:
    add = QuantAdd()
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    assert_bit_equal(add(left, right), left + right)
    add.left_quantizer = quantizer(torch.tensor([0.5]))
    assert_bit_equal(add(left, right), add.left_quantizer(left) + right)
    add.right_quantizer = quantizer(torch.tensor([0.1]))
    assert_bit_equal(add(left, right), add.left_quantizer(left) + add.right_quantizer(right))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_concatenation_quantizes_its_parts_with_one_grid(dim: int) -> None:
    cat = QuantConcat(dim)
    parts = [torch.randn(3, 3) for _ in range(3)]
    assert_bit_equal(cat(*parts), torch.cat(parts, dim))
    assert_bit_equal(cat(parts[0]), parts[0])
    cat.input_quantizer = quantizer(torch.tensor([0.3]))
    assert_bit_equal(cat(*parts), torch.cat([cat.input_quantizer(part) for part in parts], dim))


def test_slots_are_found_by_their_names() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.weight_quantizer = nn.Identity()
            self.key_quantizer = nn.Identity()
            self.quantizer = nn.Identity()
            self.other = nn.Linear(2, 2)

    layer = Custom()
    found = list(slots(layer))
    assert [(name, parameter is None) for name, _, parameter in found] == [
        ("weight_quantizer", False),
        ("key_quantizer", True),
    ]
    assert found[0][2] is layer.weight
    assert list(slots(nn.Linear(2, 2))) == []


def test_a_module_in_two_slots_is_listed_for_both() -> None:
    add = QuantAdd()
    add.left_quantizer = add.right_quantizer = quantizer(torch.tensor([0.1]))
    assert [name for name, _, _ in slots(add)] == ["left_quantizer", "right_quantizer"]
    add.left_quantizer = None
    assert [name for name, _, _ in slots(add)] == ["right_quantizer"]


def test_the_shape_of_a_scale_per_channel_comes_from_the_layer() -> None:
    per_channel = QuantSpec.unsigned(8, granularity=PerChannel(1))
    for layer, x in ((QuantConv2d(3, 4, 1), torch.randn(2, 3, 5, 5)), (QuantLinear(3, 4), torch.randn(2, 3))):
        shape = per_channel.granularity.scale_shape(layer.input_shape())
        assert shape[1] == 3
        layer.input_quantizer = MinMaxObserver(per_channel, shape)
        layer(x)
        assert layer.input_quantizer.grid().scale.shape == shape


class Block(nn.Module):
    """A residual block whose skip path reads its input, with a second input and an option."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0, *, negate: bool = False) -> Tensor:
        out = (self.linear(x) + x + shift).relu()
        return -out if negate else out


def test_a_unit_with_empty_slots_is_its_body() -> None:
    block = Block().eval()
    unit = QuantUnit(block)
    x = torch.randn(5, 3)
    assert not unit.training
    assert_bit_equal(unit(x), block(x))
    assert_bit_equal(unit(x, 2.0, negate=True), block(x, 2.0, negate=True))
    assert [name for name, _, parameter in slots(unit)] == ["input_quantizer", "output_quantizer"]
    assert set(unit.state_dict()) == {"body.linear.weight", "body.linear.bias"}


def test_a_unit_quantizes_what_every_branch_reads_and_what_the_block_returns() -> None:
    block = Block()
    unit = QuantUnit(block)
    x, shift = torch.randn(5, 3), torch.randn(5, 3)
    unit.input_quantizer = quantizer(torch.tensor([0.5]))
    assert_bit_equal(unit(x, shift), block(unit.input_quantizer(x), shift))
    unit.output_quantizer = quantizer(torch.tensor([0.3]))
    assert_bit_equal(unit(x, shift=shift), unit.output_quantizer(block(unit.input_quantizer(x), shift)))


def test_a_unit_refuses_a_body_that_returns_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(SpecError, match="a Pair in a unit returned a tuple: a unit quantizes one tensor"):
        QuantUnit(Pair())(torch.ones(2))
