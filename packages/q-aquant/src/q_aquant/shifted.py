r"""Convolutions of quantized patches without patches: a sum of 1x1 convolutions of shifted inputs.

The window of a kernel position, taken for all outputs at once, is the input shifted and strided. So

$$ conv = \sum_{i, j} conv_{1 \times 1}\big(W[:, :, i, j],\ Q_{ij}(shift_{ij}(x))\big) $$

with the quantizer $Q_{ij}$ of that kernel position. It takes as many products as before, holds one shifted input at a
time, and consists of standard operators, which every runtime has. Here it is in reals, `ShiftedConv2d`, and in
integers, `IntegerConv2d`. Both are for inference: no gradient flows to the input.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from q_aquant.border import LARGEST, FusedBorder, LearnedBorder, polynomial_border, round_above
from q_aquant.layers import PatchConv2d, pad_input
from q_aquant.packed import PackedPatchConv2d, adopt
from q_aquant.roundings import Gradual
from q_aquant.thresholds import ThresholdRounding, WarpedRounding, count_passed, one_scale
from q_core.checkpoint import describe, rebuild
from q_core.errors import FormatError, RangeError, ShapeError, StateError
from q_core.grid import UniformGrid
from q_core.layers import QuantConv2d, conv_arguments
from q_core.packed import PackedConv2d, PackedTensor, packed_form, stored
from q_core.quantizer import Quantizer
from q_core.rounding import NearestEven, Rounding


@final
class ShiftedConv2d(nn.Conv2d):
    """A `PatchConv2d` as a sum of 1x1 convolutions of its quantized and shifted input.

    It has the tensors of a `PackedPatchConv2d` under the same names, and is saved and loaded like one.
    """

    packed_weight: PackedTensor | None
    patch_quantizer: nn.Module

    @classmethod
    def from_patches(cls, layer: PatchConv2d | PackedPatchConv2d) -> "ShiftedConv2d":
        """Take a convolution of patches, packed or not, with any border, thresholds, or ordinary rounding.

        Args:
            layer: The layer. Not changed; tensors are shared.

        Raises:
            StateError: Its patches are not quantized, or with a rounding that looks at whole patches.
            ShapeError: The border was made for another layer.
            SpecError: The grid is not uniform with one scale.
        """
        packed = _packed(layer)
        quantizer = _quantizer(packed.patch_quantizer)
        check_positions(quantizer.rounding, layer)
        bare = adopt(cls(**conv_arguments(layer), device="meta"), packed, packed.packed_weight)
        bare.patch_quantizer = quantizer.frozen().train(layer.training)
        return bare

    def unpacked(self) -> "ShiftedConv2d":
        """Return the layer with its weight in reals, for an exporter that cannot express how codes are packed."""
        bare = adopt(ShiftedConv2d(**conv_arguments(self), device="meta"), self, None)
        if self.packed_weight is not None:
            bare.weight = nn.Parameter(self.packed_weight(torch.float32), requires_grad=False)
        bare.patch_quantizer = self.patch_quantizer
        return bare

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Add up the 1x1 convolutions of all kernel positions."""
        weight = self.weight if self.packed_weight is None else self.packed_weight(x.dtype)
        batch = pad_input(x if x.ndim == 4 else x.unsqueeze(0), self)
        grid, _ = _parts(self.patch_quantizer)
        out: Tensor | None = None
        for position, steps in enumerate(position_steps(batch, self.patch_quantizer, self)):
            row, column = divmod(position, self.kernel_size[1])
            levels = (steps * grid.scale.reshape(1)).to(x.dtype)
            part = F.conv2d(levels, weight[:, :, row : row + 1, column : column + 1], groups=self.groups)
            out = part if out is None else out + part
        if out is None:
            raise ShapeError("a kernel of no position")
        out = out if self.bias is None else out + self.bias.reshape(-1, 1, 1)
        return out if x.ndim == 4 else out.squeeze(0)


@final
class IntegerConv2d(nn.Conv2d):
    r"""A convolution with a border as integers alone, the definition of what a kernel for it must compute.

    With codes $q$ and zero points $Z$ of activations and weights it accumulates, in int32,

    $$ a_{p,o} = \sum_c (W_{o,c} - Z_o)(q_{p,c} - Z_x) = \sum_c W_{o,c}\,(q_{p,c} - Z_x) - Z_o \sum_c (q_{p,c} - Z_x) $$

    and returns $s_x s_o\,a + b$. The second sum is one number per pixel and group. Where all kernel positions share a
    border, it is a box filter of one quantized image, and the first sum a stock integer convolution of it; with a
    border for each position both must be taken from the codes of the patches.

    Attributes:
        patches: Whether the quantizer is one of patches, or of the input as a whole, before it is padded.
    """

    packed_weight: PackedTensor | None
    input_quantizer: nn.Module
    patches: bool

    @classmethod
    def from_layer(
        cls, layer: QuantConv2d | PackedConv2d | PatchConv2d | PackedPatchConv2d | ShiftedConv2d
    ) -> "IntegerConv2d":
        """Take a convolution whose weight and input are quantized, packed or not.

        Args:
            layer: The layer. Not changed; tensors are shared.

        Raises:
            StateError: The weight or the input is float, or a rounding looks at whole patches.
            SpecError: A grid is not uniform with one scale, for the weight one for each output.
            ShapeError: The border was made for another layer.
            RangeError: A sum of that many products can leave int32.
        """
        patches = not isinstance(layer, QuantConv2d | PackedConv2d)
        packed = _packed(layer)
        slot = packed.patch_quantizer if patches else packed.input_quantizer
        quantizer = _quantizer(slot if isinstance(slot, nn.Module) else nn.Identity())
        if patches:
            check_positions(quantizer.rounding, layer)
        weight = getattr(packed, "packed_weight", None)
        if not isinstance(weight, PackedTensor):
            raise StateError("the weight is float: integers need a quantized one")
        _check_integers(weight, one_scale(quantizer.grid))
        bare = adopt(cls(**conv_arguments(layer), device="meta"), packed, weight)
        bare.input_quantizer, bare.patches = quantizer.frozen().train(layer.training), patches
        return bare

    def accumulate(self, x: Float[Tensor, "*n c h w"]) -> Int32[Tensor, "*n o i j"]:
        """Return the integers that the output is made of.

        It multiplies int32 matrices, for which torch has no CUDA kernel.
        """
        batch, (weight, own) = x if x.ndim == 4 else x.unsqueeze(0), self._weight()
        codes, zero = weight.codes(), own.zero_point
        matrices = codes.reshape(self.groups, len(codes) // self.groups, -1, codes[0, 0].numel())
        acc: Tensor | int = 0
        total: Tensor | int = 0
        for position, steps in enumerate(self._steps(batch)):
            size = steps.shape[2:]
            grouped = steps.to(torch.int32).reshape(len(steps), self.groups, -1, size.numel())
            acc = acc + torch.matmul(matrices[:, :, :, position].contiguous(), grouped)
            total = total + grouped.sum(2, keepdim=True, dtype=torch.int32)
        if zero is not None:
            acc = acc - zero.to(torch.int32).expand(len(codes), 1, 1, 1).reshape(self.groups, -1, 1) * total
        out = torch.as_tensor(acc).reshape(len(batch), len(codes), *size)
        return out if x.ndim == 4 else out.squeeze(0)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Return the accumulated integers in reals, with the bias."""
        acc = self.accumulate(x)
        (_, own), (grid, _) = self._weight(), _parts(self.input_quantizer)
        scale = (own.scale.flatten() * grid.scale.flatten()).reshape(-1, 1, 1)
        out = acc.to(scale.dtype) * scale
        return (out if self.bias is None else out + self.bias.reshape(-1, 1, 1)).to(x.dtype)

    def _weight(self) -> tuple[PackedTensor, UniformGrid]:
        weight = self.packed_weight
        if weight is None or not isinstance(weight.grid, UniformGrid):
            raise StateError("the layer has no integers as a weight: make it with IntegerConv2d.from_layer")
        return weight, weight.grid

    def _steps(self, x: Tensor) -> Iterator[Tensor]:
        if self.patches:
            yield from position_steps(pad_input(x, self), self.input_quantizer, self)
            return
        grid, rounding = _parts(self.input_quantizer)
        with torch.no_grad():
            rounded = rounding(_coordinate(x, grid))
        steps = pad_input(_clamp_to_codes(rounded, grid), self)
        yield from windows(steps, self)


def windows(x: Float[Tensor, "n c h w"], layer: nn.Conv2d) -> Iterator[Float[Tensor, "n c i j"]]:
    """Yield what each kernel position sees of a padded input, row by row."""
    (high, wide), (down, across), (tall, broad) = layer.kernel_size, layer.stride, layer.dilation
    rows = (x.shape[2] - tall * (high - 1) - 1) // down + 1
    columns = (x.shape[3] - broad * (wide - 1) - 1) // across + 1
    for row in range(0, high * tall, tall):
        for column in range(0, wide * broad, broad):
            yield x[
                :, :, row : row + down * (rows - 1) + 1 : down, column : column + across * (columns - 1) + 1 : across
            ]


def position_steps(
    x: Float[Tensor, "n c h w"], quantizer: nn.Module, layer: nn.Conv2d
) -> Iterator[Float[Tensor, "n c i j"]]:
    """Yield, for each kernel position, the quantized window of a padded input: codes minus the zero point.

    Raises:
        StateError: The rounding is none that works position by position.
    """
    grid, rounding = _parts(quantizer)
    u = _coordinate(x, grid)
    for rounded in _rounded(u, rounding, layer):
        yield _clamp_to_codes(rounded, grid)


def _rounded(u: Tensor, rounding: Rounding, layer: nn.Conv2d) -> Iterator[Tensor]:
    """Round the window of each kernel position, in standard operators."""
    seen = enumerate(windows(u, layer))
    if isinstance(rounding, NearestEven):
        yield from (torch.round(window) for _, window in seen)
    elif isinstance(rounding, ThresholdRounding):
        for position, window in seen:
            yield count_passed(window, _at(rounding.thresholds, position), rounding.low)
    elif isinstance(rounding, WarpedRounding):
        for position, window in seen:
            yield torch.round(rounding.warped(window, _border(window, rounding.elements, position)))
    elif isinstance(rounding, LearnedBorder):
        for position, window in seen:
            yield round_above(window, _border(window, rounding, position))
    elif isinstance(rounding, FusedBorder):
        total: Tensor | int = 0
        for position, window in seen:
            total = total + _border(window, rounding.elements, position) * rounding.weights[:, position, None, None]
        border = torch.as_tensor(total / rounding.weights.shape[1]).clamp(0, LARGEST)
        yield from (round_above(window, border) for window in windows(u, layer))
    else:
        raise StateError(
            f"a {type(rounding).__name__} looks at whole patches: shifted convolutions have none; finish the "
            "reconstruction, or deploy a layer with a border"
        )


def _border(u: Tensor, border: LearnedBorder, position: int) -> Tensor:
    coefficients = _at(border.coefficients, position)
    return polynomial_border(u, coefficients, low=border.low, high=border.high, bound=border.bound)


def _at(tensor: Tensor, position: int) -> Tensor:
    """Take what belongs to one kernel position of parameters [lead, ..., c, k, 1], of which each axis may be 1."""
    whole = tensor.reshape(len(tensor), *[1] * (4 - tensor.ndim), *tensor.shape[1:])
    return whole[:, :, position if whole.shape[2] > 1 else 0].unsqueeze(3)


def _coordinate(x: Tensor, grid: UniformGrid) -> Tensor:
    zero = grid.scale.new_zeros(1) if grid.zero_point is None else grid.zero_point.reshape(1)
    return torch.clamp(x / grid.scale.reshape(1), grid.qmin - zero, grid.qmax - zero)


def _clamp_to_codes(rounded: Tensor, grid: UniformGrid) -> Tensor:
    zero = grid.scale.new_zeros(1) if grid.zero_point is None else grid.zero_point.reshape(1)
    return torch.clamp(rounded, grid.qmin - zero, grid.qmax - zero)


def check_positions(rounding: Rounding, layer: nn.Conv2d) -> None:
    """Check that a rounding of patches works position by position, and was made for a layer.

    Raises:
        StateError: It looks at whole patches, or is still learning.
        ShapeError: It was made for patches of another shape.
    """
    if isinstance(rounding, Gradual):
        raise StateError("the rounding still enters by degrees: finish the reconstruction before deployment")
    elements = rounding.elements if isinstance(rounding, FusedBorder | WarpedRounding) else rounding
    if isinstance(elements, LearnedBorder):
        index = tuple(elements.coefficients.shape[1:])
    elif isinstance(elements, ThresholdRounding):
        index = tuple(elements.thresholds.shape[1:])
    elif isinstance(elements, NearestEven):
        index = ()
    else:
        raise StateError(
            f"a {type(rounding).__name__} looks at whole patches: only borders, thresholds and ordinary rounding work "
            "position by position"
        )
    wanted = (layer.in_channels, layer.kernel_size[0] * layer.kernel_size[1], 1)
    padded = (1,) * (3 - len(index)) + index
    if len(padded) != 3 or any(size not in (1, there) for size, there in zip(padded, wanted, strict=True)):
        raise ShapeError(
            f"border for elements of shape {index} in a layer whose patches are of shape {wanted}: it was made for "
            "another layer"
        )


def _packed(layer: nn.Module) -> Any:
    """Return the packed form of a layer; one that is packed stays."""
    if isinstance(layer, QuantConv2d):
        if not isinstance(layer.weight_quantizer, Quantizer):
            return layer  # a float weight
        weight = PackedTensor.from_quantizer(layer.weight, layer.weight_quantizer)
        return PackedConv2d.from_float(layer, weight, layer.input_quantizer)
    return packed_form(layer) if isinstance(layer, PatchConv2d) else layer


def _quantizer(slot: nn.Module) -> Quantizer:
    if not isinstance(slot, Quantizer):
        raise StateError(f"the input goes through a {type(slot).__name__}: only a quantized one has codes")
    one_scale(slot.grid)
    return slot


def _parts(slot: nn.Module) -> tuple[UniformGrid, Rounding]:
    quantizer = _quantizer(slot)
    return one_scale(quantizer.grid), quantizer.rounding


def _check_integers(weight: PackedTensor, grid: UniformGrid) -> None:
    own = weight.grid
    outputs = (weight.shape[0], 1, 1, 1)
    if not isinstance(own, UniformGrid) or (own.scale.numel() != 1 and tuple(own.scale.shape) != outputs):
        raise StateError(
            f"a weight on a {type(own).__name__} of tiles {own.tile_shape}: integers need a uniform grid with one "
            f"scale, or one for each output, {outputs}"
        )
    step = max(grid.qmax - grid.qmin, 1)
    largest = max(abs(own.qmin), abs(own.qmax)) + (own.qmax - own.qmin if own.zero_point is not None else 0)
    terms = weight.shape[1] * weight.shape[2] * weight.shape[3]
    if terms * step * largest >= 2**31:
        raise RangeError(
            f"{terms} products of up to {step} by {largest} can leave int32: use fewer bits, or split the channels"
        )


@describe.register
def _(module: ShiftedConv2d) -> dict[str, Any]:
    return {"packed": module.packed_weight is not None}


@describe.register
def _(module: IntegerConv2d) -> dict[str, Any]:
    return {"packed": True, "patches": module.patches}


@stored.register
def _(module: ShiftedConv2d) -> tuple[int, int]:
    return _stored(module.packed_weight, module)


@stored.register
def _(module: IntegerConv2d) -> tuple[int, int]:
    return _stored(module.packed_weight, module)


def _stored(weight: PackedTensor | None, module: nn.Conv2d) -> tuple[int, int]:
    if weight is None:
        return module.weight.numel() * module.weight.element_size() * 8, module.weight.numel()
    return weight.stored_bits(), torch.Size(weight.shape).numel()


@rebuild.register(ShiftedConv2d)
def _(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    bare = ShiftedConv2d(**_arguments(layer), device="meta")
    bare = adopt(bare, layer, None)  # type: ignore[arg-type]
    bare.patch_quantizer = nn.Identity()
    if entry["packed"]:
        del bare._parameters["weight"]
    return bare


@rebuild.register(IntegerConv2d)
def _(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    bare = IntegerConv2d(**_arguments(layer), device="meta")
    bare = adopt(bare, layer, None)  # type: ignore[arg-type]
    bare.input_quantizer, bare.patches = nn.Identity(), entry["patches"]
    del bare._parameters["weight"]
    return bare


def _arguments(layer: nn.Module) -> dict[str, Any]:
    if not isinstance(layer, nn.Conv2d):
        raise FormatError(f"the layer is a {type(layer).__name__}, the file has a convolution")
    return conv_arguments(layer)
