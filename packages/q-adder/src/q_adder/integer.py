r"""Adder layers as they run in deployment: packed codes, integer distances, one multiplication per output.

`q_core.pack` turns the layers of `q_adder.quantized` into these. Both compute $-\Delta\,(D + e) + b$ with the integer
distance D of the codes, so they agree bit for bit. How D is computed depends on the bits, the shape and the machine;
`explain` tells.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from q_adder import ops
from q_adder.functional import as_rows, check_windows, pad, uncast
from q_adder.layers import AdderConv2d, AdderLinear, AdderMatmul
from q_adder.quantized import (
    QuantAdderConv2d,
    QuantAdderLayer,
    QuantAdderLinear,
    QuantAdderMatmul,
    TiedGrid,
    TiedSpec,
    as_line,
    from_line,
    naming,
)
from q_core import functional as core
from q_core.calibrate import evaluation, feed
from q_core.checkpoint import describe, rebuild
from q_core.errors import FormatError, MatchError
from q_core.layers import conv_arguments, linear_arguments
from q_core.module import PreciseModule
from q_core.packed import packed_form, stored
from q_core.packing import pack_codes, packed_words, unpack_codes


@final
class PackedKernels(PreciseModule):
    """The kernels of an adder layer as packed codes, with what is added to each output.

    Args:
        words: Codes packed into 32-bit words, see `q_core.packing`.
        shape: Shape of the kernels [outputs, inputs, kh, kw].
        tied: The levels, not learnable.
        offset: Added to the integer distance of each output, int32 [outputs].
        constant: Added to each output, in reals [outputs].
    """

    def __init__(self, words: Tensor, shape: tuple[int, ...], tied: TiedGrid, offset: Tensor, constant: Tensor) -> None:
        super().__init__()
        self.shape, self.tied = shape, tied
        for name, buffer in (("words", words), ("offset", offset), ("constant", constant)):
            self.register_buffer(name, buffer)
        self.words: Tensor
        self.offset: Tensor
        self.constant: Tensor
        self.codes: Tensor
        self.register_buffer("codes", self._unpacked(), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    @classmethod
    def from_layer(cls, layer: QuantAdderLayer) -> "PackedKernels":
        """Quantize and pack the kernels of a layer."""
        with torch.no_grad():
            weight, tied = layer.weight, layer.tied
            levels = ops.codes_of(tied.weight(weight), *tied.per_kernel(weight.ndim))
            codes, offset = ops.split_codes(levels, tied.spec.bits)
            words = pack_codes(codes.to(torch.int32), bits=tied.spec.bits, qmin=0)
            four = tuple(weight.shape) + (1,) * (4 - weight.ndim)
            return cls(words, four, _frozen(tied), offset, layer.constant().clone())

    def _unpacked(self) -> Tensor:
        if self.words.is_meta:
            return torch.empty(self.shape, dtype=torch.uint8, device="meta")
        count = math.prod(self.shape)
        codes = unpack_codes(self.words, bits=self.tied.spec.bits, count=count, qmin=0)
        return codes.to(torch.uint8).reshape(self.shape)

    def forward(
        self, x: Shaped[Tensor, "n c h w"], stride: list[int], dilation: list[int], groups: int
    ) -> Float[Tensor, "n o i j"]:
        """Return minus the distance of a padded input, with the constant.

        Args:
            x: Padded input, reals.
            stride: Two steps, in pixels.
            dilation: Two spacings of the taps, in pixels.
            groups: Groups of channels that do not see each other.

        Returns:
            Distances in the wider dtype of the input and the scale.

        Raises:
            DataError: The input holds a NaN.
        """
        check_windows(x, self.codes, (dilation[0], dilation[1]), groups)
        tied, parts = self.tied, []
        kernels = zip(tied.split(self.codes, groups), tied.split(self.offset, groups), strict=True)
        for group, (codes, offset) in enumerate(kernels):
            pixels = input_codes(x, tied, group)
            distance = ops.code_distance_conv2d(pixels, codes, stride, dilation, groups, tied.spec.bits)
            parts.append(ops.dequantized(distance, offset, tied.scale[group].reshape(1)))
        out = tied.join(parts, groups)
        out = out.to(torch.promote_types(x.dtype, out.dtype))
        return out + self.constant.to(out.dtype).reshape(-1, 1, 1)

    def stored_bits(self) -> int:
        """Count the bits that codes, scales, zero points, groups and offsets take; the constant counts as a bias."""
        return sum(
            buffer.numel() * buffer.element_size() * 8
            for name, buffer in self.named_buffers()
            if name not in ("codes", "constant")
        )


def _refresh(kernels: PackedKernels, _: Any) -> None:
    kernels.codes = kernels._unpacked()


def input_codes(x: Float[Tensor, "*shape"], tied: TiedGrid, group: int) -> UInt8[Tensor, "*shape"]:
    """Quantize an input to the codes of one group of kernels.

    Raises:
        DataError: The input holds a NaN.
    """
    shape = (1,) * x.ndim
    scale, zero = tied.scale[group].reshape(shape), tied.zero_point[group].reshape(shape)
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    codes = core.quantize(wide, scale, zero, qmin=0, qmax=tied.spec.top, rounding=torch.round)
    out: Tensor = ops.as_bytes(codes)
    return out


@final
class IntegerAdderConv2d(nn.Conv2d):
    """An adder convolution on integer codes. Made by `q_core.pack`; the arguments are those of `torch.nn.Conv2d`."""

    kernels: PackedKernels
    path: str

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, kernels: PackedKernels, path: str = "") -> "IntegerAdderConv2d":
        """Take the geometry of a layer."""
        return _fill(cls(**conv_arguments(layer) | {"bias": False}, device="meta"), layer, kernels, path)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Return what the quantized layer returns, from integers.

        Raises:
            DataError: The input holds a NaN.
        """
        with naming(self.path), torch.no_grad():
            x = uncast(x)
            padded = pad(x.unsqueeze(0) if x.ndim == 3 else x, self)
            out: Tensor = self.kernels(padded, list(self.stride), list(self.dilation), self.groups).to(x.dtype)
            return out.squeeze(0) if x.ndim == 3 else out


@final
class IntegerAdderLinear(nn.Linear):
    """An adder linear layer on integer codes. Made by `q_core.pack`; the arguments are those of `torch.nn.Linear`."""

    kernels: PackedKernels
    path: str

    @classmethod
    def from_layer(cls, layer: nn.Linear, kernels: PackedKernels, path: str = "") -> "IntegerAdderLinear":
        """Take the geometry of a layer."""
        return _fill(cls(**linear_arguments(layer) | {"bias": False}, device="meta"), layer, kernels, path)

    def forward(self, input: Float[Tensor, "*n k"]) -> Float[Tensor, "*n o"]:
        """Return what the quantized layer returns, from integers.

        Raises:
            DataError: The input holds a NaN.
        """
        with naming(self.path), torch.no_grad():
            input = uncast(input)
            out = self.kernels(as_line(input), [1, 1], [1, 1], 1)
            return from_line(out, input).to(input.dtype)


@final
class IntegerAdderMatmul(nn.Module):
    """The distances of the rows of two activations on integer codes. Made by `q_core.pack`.

    Args:
        tied: The levels, not learnable.
        path: Where the layer lies in its model, for messages.
    """

    tied: TiedGrid

    def __init__(self, tied: TiedGrid, path: str = "") -> None:
        super().__init__()
        self.tied, self.path = tied, path

    def forward(self, a: Float[Tensor, "*b n k"], b: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b n m"]:
        """Return what the quantized layer returns, from integers.

        Raises:
            DataError: An operand holds a NaN.
            ShapeError: The rows differ in length, or the batch dimensions differ.
        """
        with naming(self.path), torch.no_grad():
            rows = as_rows(a, b)
            codes = [input_codes(operand, self.tied, 0) for operand in rows]
            distance = ops.code_distance_matmul(codes[0], codes[1], self.tied.spec.bits)
            out: Tensor = ops.rows_dequantized(distance, self.tied.scale)
            return out.reshape(*a.shape[:-1], b.shape[-2]).to(rows[0].dtype)


IntegerAdderLayer = IntegerAdderConv2d | IntegerAdderLinear


_Layer = TypeVar("_Layer", IntegerAdderConv2d, IntegerAdderLinear)


def _fill(bare: _Layer, layer: nn.Module, kernels: PackedKernels, path: str) -> _Layer:
    del bare._parameters["weight"]
    bare.kernels, bare.path = kernels, path
    return bare.train(layer.training)


@packed_form.register
def _(module: QuantAdderConv2d) -> nn.Module:
    return IntegerAdderConv2d.from_layer(module, PackedKernels.from_layer(module), module.path)


@packed_form.register
def _(module: QuantAdderLinear) -> nn.Module:
    return IntegerAdderLinear.from_layer(module, PackedKernels.from_layer(module), module.path)


@packed_form.register
def _(module: QuantAdderMatmul) -> nn.Module:
    return IntegerAdderMatmul(_frozen(module.tied), module.path).train(module.training)


def _frozen(tied: TiedGrid) -> TiedGrid:
    return _described_elsewhere(TiedGrid(tied.spec, tied.scale, tied.zero_point, tied.group_of))


def _described_elsewhere(tied: TiedGrid) -> TiedGrid:
    tied.kind = None  # see `describe`; the tensors of a file stay what they were
    return tied


@describe.register(IntegerAdderConv2d)
@describe.register(IntegerAdderLinear)
def _(module: IntegerAdderLayer) -> dict[str, Any]:
    kernels = module.kernels
    return {
        "shape": list(kernels.shape),
        "bits": kernels.tied.spec.bits,
        "weight_step": kernels.tied.spec.weight_step,
        "groups": kernels.tied.groups,
        "path": module.path,
    }


@describe.register
def _(module: IntegerAdderMatmul) -> dict[str, Any]:
    return {"bits": module.tied.spec.bits, "path": module.path}


@stored.register(IntegerAdderConv2d)
@stored.register(IntegerAdderLinear)
def _(module: IntegerAdderLayer) -> tuple[int, int]:
    return module.kernels.stored_bits(), math.prod(module.kernels.shape)


@stored.register
def _(module: IntegerAdderMatmul) -> tuple[int, int]:
    return sum(buffer.numel() * buffer.element_size() * 8 for buffer in module.buffers()), 0


def _described(entry: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> PackedKernels:
    """Make kernels without memory, to be filled from a file."""
    if tuple(entry["shape"]) != shape:
        raise FormatError(f"the layer has kernels of shape {shape}, the file ones of shape {tuple(entry['shape'])}")
    spec = TiedSpec(entry["bits"], entry["weight_step"])
    tied = _bare(spec, entry["groups"], shape[0])
    with torch.device("meta"):
        words = torch.zeros(packed_words(math.prod(shape), spec.bits), dtype=torch.int32)
        constant = torch.zeros(shape[0], dtype=torch.promote_types(dtype, torch.float32))
        return PackedKernels(words, shape, tied, torch.zeros(shape[0], dtype=torch.int32), constant)


def _bare(spec: TiedSpec, groups: int, outputs: int) -> TiedGrid:
    with torch.device("meta"):
        ones = torch.ones(groups)
        return _described_elsewhere(TiedGrid(spec, ones, ones, torch.zeros(outputs, dtype=torch.int64)))


@rebuild.register
def _(layer: AdderConv2d, entry: dict[str, Any]) -> nn.Module:
    kernels = _described(entry, tuple(layer.weight.shape), layer.weight.dtype)
    return IntegerAdderConv2d.from_layer(layer, kernels, entry["path"])


@rebuild.register
def _(layer: AdderLinear, entry: dict[str, Any]) -> nn.Module:
    kernels = _described(entry, (*layer.weight.shape, 1, 1), layer.weight.dtype)
    return IntegerAdderLinear.from_layer(layer, kernels, entry["path"])


@rebuild.register
def _(layer: AdderMatmul, entry: dict[str, Any]) -> nn.Module:
    return IntegerAdderMatmul(_bare(TiedSpec(entry["bits"]), 1, 0), entry["path"])


def explain(model: nn.Module, example: Any) -> dict[str, str]:
    """Tell how each adder layer computes its distance on this machine, and why.

    Args:
        model: A model with adder layers: quantized or packed ones compute with integers, float ones with reals. Not
            changed.
        example: A batch as `redistribute` takes it; the choice depends on its shape.

    Returns:
        For the path of each layer, one line for each implementation. For a float layer a line before says that it is.

    Raises:
        MatchError: The model has no adder layer.
    """
    found: dict[str, str] = {}

    def look(path: str, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        operands = (*inputs, *named.values())
        x, kernels, *geometry = _problem(layer, *operands)
        reals = isinstance(layer, AdderConv2d | AdderLinear | AdderMatmul)
        dtype = operands[0].dtype if reals else torch.uint8
        tensors = (torch.empty(shape, dtype=dtype, device=operands[0].device) for shape in (x, kernels))
        if reals:
            text = ops.DISTANCE.explain(*tensors, *geometry, getattr(layer, "exponent", 1.0))
            found[path] = f"float, a distance of reals: redistribute() quantizes it\n{text}"
        else:
            tied: TiedGrid = layer.kernels.tied if isinstance(layer, IntegerAdderLayer) else layer.tied
            found[path] = ops.CODE_DISTANCE.explain(*tensors, *geometry, tied.spec.bits)

    quantized = QuantAdderLayer | QuantAdderMatmul | IntegerAdderLayer | IntegerAdderMatmul
    kinds = quantized | AdderConv2d | AdderLinear | AdderMatmul
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]
    if not layers:
        raise MatchError(f"a {type(model).__name__} has no adder layer: there is nothing to explain")
    hooks = [module.register_forward_hook(functools.partial(look, path), with_kwargs=True) for path, module in layers]
    try:
        with evaluation(model):
            feed(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _problem(layer: Any, *inputs: Tensor) -> tuple[Any, ...]:
    """Return the shapes of the padded input and of the kernels of one layer, stride, dilation and groups."""
    x = inputs[0]
    if isinstance(layer, AdderMatmul | QuantAdderMatmul | IntegerAdderMatmul):
        batch = math.prod(x.shape[:-2])
        width = x.shape[-1]
        return (1, batch * width, inputs[1].shape[-2], 1), (batch * x.shape[-2], width, 1, 1), [1, 1], [1, 1], batch
    shape = layer.kernels.shape if isinstance(layer, IntegerAdderLayer) else tuple(layer.weight.shape)
    if isinstance(layer, nn.Conv2d):
        padded = pad(x.unsqueeze(0) if x.ndim == 3 else x, layer)
        return padded.shape, shape, list(layer.stride), list(layer.dilation), layer.groups
    return as_line(x).shape, (*shape[:2], 1, 1), [1, 1], [1, 1], 1


def level_distance_conv2d(
    x: Float[Tensor, "n c h w"],
    codes: UInt8[Tensor, "o k kh kw"],
    levels: Float[Tensor, " levels"],
    *,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Float[Tensor, "n o i j"]:
    r"""Return minus the distance of a real-valued input and kernels on L levels, as one convolution.

    It has L times the channels, one of which is the same for all outputs.

    $$ |x - w| = |x - l_0| + \sum_{t=1}^{L-1} [w \ge l_t]\,(|x - l_t| - |x - l_{t-1}|) $$

    The levels need not be uniform, and nothing but the kernels is quantized.

    Args:
        x: Padded input, any reals.
        codes: Code of each weight, below L. One beyond counts as L - 1, which is not checked: that would wait for the
            device and end a compiled graph.
        levels: Levels in ascending order.
        stride: Two steps, in pixels.
        dilation: Two spacings of the taps, in pixels.
        groups: Groups of channels that do not see each other.

    Returns:
        Distances, in the dtype of `x`, float32 instead of a narrower one under autocast.
    """
    x = uncast(x)
    steps = (x.unsqueeze(2) - levels.reshape(1, 1, -1, 1, 1)).abs()
    planes = torch.cat([steps[:, :, :1], steps.diff(dim=2)], 2).flatten(1, 2)
    reached = codes.unsqueeze(2) >= torch.arange(len(levels), device=x.device).reshape(1, 1, -1, 1, 1)
    kernels = reached.flatten(1, 2).to(x.dtype)
    # Autocast would narrow the planes again.
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return -F.conv2d(planes, kernels, stride=stride, dilation=dilation, groups=groups)
