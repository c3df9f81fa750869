"""Deployment form: integer codes in plain buffers.

`pack` turns a quantized model into one whose weights are 32-bit words of packed codes next to a scale or a codebook,
and whose activation quantizers are frozen. Every tensor is dense and of a native dtype, so any file format can hold it.
The packed layers here compute in plain torch and define what a faster kernel must equal.
"""

import functools
import math
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import layers
from q_core.errors import QuantizationError, StateError
from q_core.grid import CodebookGrid, Grid, UniformGrid
from q_core.layers import QuantConv2d, QuantLinear
from q_core.module import PreciseModule
from q_core.observer import Observer
from q_core.packing import pack_codes, unpack_codes
from q_core.quantizer import Quantizer
from q_core.swap import replace_modules, share


@final
class PackedTensor(PreciseModule):
    """A quantized tensor as packed codes and the grid they belong to.

    Args:
        words: Packed codes, see `q_core.packing`.
        shape: Shape of the tensor.
        grid: A frozen grid.
        channels_last: Whether the reals lie in memory in the order of `torch.channels_last`. A convolution chooses its
            algorithm by that, and another algorithm adds in another order.
    """

    def __init__(
        self,
        words: Tensor,
        shape: tuple[int, ...],
        grid: UniformGrid | CodebookGrid,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.grid, self.channels_last = shape, grid, channels_last
        self.words: Tensor
        self.register_buffer("words", words)

    @classmethod
    def from_quantizer(cls, tensor: Tensor, quantizer: Quantizer) -> "PackedTensor":
        """Quantize and pack a tensor."""
        grid = _storable(quantizer.grid)
        words = pack_codes(quantizer.codes(tensor.detach()), bits=grid.bits, qmin=grid.qmin)
        with torch.no_grad():
            channels_last = _is_channels_last(quantizer(tensor))
        return cls(words, tuple(tensor.shape), grid, channels_last=channels_last)

    def codes(self) -> Tensor:
        """Unpack the codes, int32, in the shape of the tensor."""
        return unpack_codes(self.words, bits=self.grid.bits, count=math.prod(self.shape), qmin=self.grid.qmin).reshape(
            self.shape
        )

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor as reals of the given dtype."""
        # The wider of the two dtypes, as a quantizer computes: the same product, bit for bit.
        wide = torch.promote_types(dtype, self._table().dtype)
        reals = self.grid.dequantize(self.codes().to(wide)).to(dtype)
        return reals.clone(memory_format=torch.channels_last) if self.channels_last else reals

    def _table(self) -> Tensor:
        return self.grid.scale if isinstance(self.grid, UniformGrid) else self.grid.codebook

    def stored_bits(self) -> int:
        """Count the bits that codes, scales, zero points and codebooks take."""
        return sum(buffer.numel() * buffer.element_size() * 8 for buffer in self.buffers())


@final
class PackedConv2d(nn.Conv2d):
    """A convolution whose weight is stored as packed codes.

    Made by `pack`; the arguments are those of `torch.nn.Conv2d`.
    """

    packed_weight: PackedTensor
    input_quantizer: nn.Module

    @classmethod
    def from_float(cls, layer: nn.Conv2d, weight: PackedTensor, input_quantizer: nn.Module) -> "PackedConv2d":
        """Take the geometry and the bias of a convolution."""
        return _fill(cls(**layers.conv_arguments(layer), device="meta"), layer, weight, input_quantizer)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Convolve the quantized input with the unpacked weight."""
        out: Tensor = self._conv_forward(self.input_quantizer(x), self.packed_weight(x.dtype), self.bias)
        return out


@final
class PackedLinear(nn.Linear):
    """A linear layer whose weight is stored as packed codes.

    Made by `pack`; the arguments are those of `torch.nn.Linear`.
    """

    packed_weight: PackedTensor
    input_quantizer: nn.Module

    @classmethod
    def from_float(cls, layer: nn.Linear, weight: PackedTensor, input_quantizer: nn.Module) -> "PackedLinear":
        """Take the geometry and the bias of a linear layer."""
        return _fill(cls(**layers.linear_arguments(layer), device="meta"), layer, weight, input_quantizer)

    def forward(self, input: Float[Tensor, "*n k"]) -> Float[Tensor, "*n o"]:
        """Multiply the quantized input by the unpacked weight."""
        return nn.functional.linear(self.input_quantizer(input), self.packed_weight(input.dtype), self.bias)


@functools.singledispatch
def packed_form(module: nn.Module) -> nn.Module | None:
    """Return the deployment form of a quantized module of another package, or None if it has none.

    A package with quantized layers of its own registers a function for each of their types; see also `stored` and, in
    `q_core.checkpoint`, `describe` and `rebuild`.
    """
    return None


@functools.singledispatch
def stored(module: nn.Module) -> tuple[int, int] | None:
    """Return the stored bits of a packed module of another package and its number of weights, or None."""
    return None


PackedLayer = PackedConv2d | PackedLinear
_PackedLayer = TypeVar("_PackedLayer", PackedConv2d, PackedLinear)


def pack(model: nn.Module) -> nn.Module:
    """Return a twin with packed weights and frozen activation quantizers.

    Args:
        model: A calibrated model. Not changed.

    Returns:
        A model with the same outputs, bit for bit when gradients are off: torch may add in another order where a weight
        requires one. Layers whose weight stays float keep it.

    Raises:
        StateError: The model still holds observers.
    """
    waiting = [path for path, module in model.named_modules() if isinstance(module, Observer)]
    if waiting:
        raise StateError(
            f"model still holds {len(waiting)} observers ({', '.join(waiting[:4])}): call calibrate() before pack()"
        )
    twin = share(model)
    tensors: dict[tuple[int, int], PackedTensor] = {}
    frozen: dict[int, Quantizer] = {}
    replaced: dict[int, nn.Module] = {}
    for path, module in list(twin.named_modules()):
        for name, child, parameter in layers.slots(module):
            if parameter is None and isinstance(child, Quantizer):
                setattr(module, name, frozen.setdefault(id(child), child.frozen().train(child.training)))
        if isinstance(module, (QuantConv2d, QuantLinear)) and isinstance(module.weight_quantizer, Quantizer):
            key = (id(module.weight), id(module.weight_quantizer))
            if key not in tensors:
                tensors[key] = PackedTensor.from_quantizer(module.weight, module.weight_quantizer)
            replaced[id(module)] = pack_layer(module, tensors[key], module.input_quantizer)
        elif (form := _own_form(path, module)) is not None:
            replaced[id(module)] = form
    return replace_modules(twin, replaced)


def _own_form(path: str, module: nn.Module) -> nn.Module | None:
    try:
        return packed_form(module)
    except QuantizationError as error:
        error.add_note(f"while packing {path or 'the model itself'}")
        raise


def pack_layer(layer: nn.Module, weight: PackedTensor, input_quantizer: nn.Module) -> PackedLayer:
    """Return the packed form of a convolution or linear layer.

    Raises:
        StateError: The layer is neither.
    """
    if isinstance(layer, nn.Conv2d):
        return PackedConv2d.from_float(layer, weight, input_quantizer)
    if isinstance(layer, nn.Linear):
        return PackedLinear.from_float(layer, weight, input_quantizer)
    raise StateError(f"layer of type {type(layer).__name__} has no packed form: convolution and linear layers have one")


def bits_per_weight(model: nn.Module) -> float:
    """Return the stored bits per weight of the convolution and linear layers, scales and codebooks included.

    Weights that stay float count with the bits of their dtype. Biases are not counted.

    Args:
        model: A packed or a float model.

    Raises:
        StateError: The model has no convolution or linear layer.
    """
    total = weights = 0
    seen: set[int] = set()
    for module in model.modules():
        if (own := stored(module)) is not None:
            (size, count), key = own, id(module)
        elif isinstance(module, (PackedConv2d, PackedLinear)):
            tensor = module.packed_weight
            size, count, key = tensor.stored_bits(), math.prod(tensor.shape), id(tensor)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            size, count, key = (
                module.weight.numel() * module.weight.element_size() * 8,
                module.weight.numel(),
                id(module.weight),
            )
        else:
            continue
        if key not in seen:
            seen.add(key)
            total, weights = total + size, weights + count
    if not weights:
        raise StateError("the model has no convolution or linear layer to count")
    return total / weights


def _is_channels_last(tensor: Tensor) -> bool:
    # By the strides: a kernel of 1 by 1 is contiguous in either order, and the convolution still tells them apart.
    if tensor.ndim != 4:
        return False
    strides = (
        torch.empty(tensor.shape, device="meta", memory_format=order).stride()
        for order in (torch.contiguous_format, torch.channels_last)
    )
    return [tensor.stride() == each for each in strides] == [False, True]


def _storable(grid: Grid) -> UniformGrid | CodebookGrid:
    frozen = grid.frozen()
    if isinstance(frozen, (UniformGrid, CodebookGrid)):
        return frozen
    return CodebookGrid(frozen.levels(), qmin=frozen.qmin)


def _fill(bare: _PackedLayer, layer: nn.Module, weight: PackedTensor, input_quantizer: nn.Module) -> _PackedLayer:
    del bare._parameters["weight"]
    bias = layer._parameters.get("bias")
    if bias is not None:
        bare.bias = nn.Parameter(bias.detach(), requires_grad=False)
    bare.packed_weight, bare.input_quantizer = weight, input_quantizer
    return bare.train(layer.training)
