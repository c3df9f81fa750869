r"""Adder layers whose inputs and kernels share their levels.

$|x - w|$ has no scale that could be taken out of the sum unless both operands have the same, so the scale belongs to
the layer: one `TiedGrid` gives the levels of both. Kernels may be split into groups with a scale each; the input is
then quantized once per group.

The value of a quantized layer is computed on integer codes, which is what its packed form in `q_adder.integer` does, so
the two agree bit for bit. Its gradient is that of the adder operator on the quantized reals, straight through the
rounding.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from q_adder import ops
from q_adder.functional import as_rows, check_windows, pad, uncast
from q_adder.layers import AdderConv2d, AdderLinear
from q_core import functional as core
from q_core.analysis import Entering, entering
from q_core.errors import QuantizationError, RangeError, ShapeError, SpecError
from q_core.layers import conv_arguments, linear_arguments
from q_core.module import PreciseModule


@dataclasses.dataclass(frozen=True)
class TiedSpec:
    """Codes of a layer whose inputs and weights share a scale.

    Attributes:
        bits: Bits of a code of the input and of the weight, 2 to 8.
        weight_step: 1 puts weights on the levels of the input. 2 puts them on every other level, on both sides of zero:
            signed weights of the same number of bits beside unsigned inputs, as published.

    Raises:
        SpecError: Bits that are not a whole number from 2 to 8, or another step.
    """

    bits: int
    weight_step: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SpecError(f"bits={self.bits!r}: an adder layer is quantized to 2 to 8 bits, a whole number")
        if self.weight_step not in (1, 2):
            raise SpecError(f"weight_step={self.weight_step}: weights lie on every level (1) or on every other (2)")

    @property
    def top(self) -> int:
        """Largest code of the input; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def farthest(self) -> int:
        """Largest difference between a code of the input and one of the weight."""
        # On every other level the least code of a weight is -2**(bits - 1), twice as far from zero.
        return self.top if self.weight_step == 1 else self.top + (1 << self.bits)


@final
class TiedGrid(PreciseModule):
    r"""Levels that the input and the kernels of one layer share: $\Delta\,(q - z)$ with codes q of both.

    The state dict names the bits and the weight step under `kind`, and a state of other codes is refused when it is
    loaded, because its scale would fit in shape and mean something else. A state that does not name them, of an earlier
    release or of a packed model, whose file describes them, is taken as it is.

    Args:
        spec: The codes.
        scale: Width of one code $\Delta$ of each group of kernels, [groups].
        zero_point: Code of real zero of each group, integral, in `[0, 2**bits - 1]`, [groups].
        group_of: Group of each kernel, [outputs]; empty for a layer without kernels.
        learnable: Whether the scale is a parameter.

    Raises:
        ShapeError: The tensors do not fit one another.
        RangeError: A scale that is not positive and finite, a zero point that is not a code, a group that is not there,
            or one without kernels.

    Attributes:
        sizes: Number of kernels in each group: plain integers, so that the shapes of a compiled graph are known.
        kind: Bits and weight step, int32 [2]; None in a packed layer.
    """

    def __init__(
        self,
        spec: TiedSpec,
        scale: Float[Tensor, " groups"],
        zero_point: Float[Tensor, " groups"],
        group_of: Int[Tensor, " outputs"],
        *,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if scale.ndim != 1 or scale.shape != zero_point.shape or group_of.ndim != 1:
            raise ShapeError(
                f"scale {tuple(scale.shape)}, zero point {tuple(zero_point.shape)}, groups of kernels "
                f"{tuple(group_of.shape)}: expected one scale and one zero point per group, one group per kernel"
            )
        if not scale.is_meta:
            _check_values(spec, scale, zero_point, group_of)
        self.spec = spec
        wide = scale.detach().to(torch.promote_types(scale.dtype, torch.float32)).clone()
        self.scale: Tensor
        if learnable:
            self.scale = nn.Parameter(wide)
        else:
            self.register_buffer("scale", wide)
        self.zero_point: Tensor
        self.register_buffer("zero_point", zero_point.detach().to(wide.dtype).clone())
        self.group_of: Tensor
        self.register_buffer("group_of", group_of.detach().clone())
        self.kind: Tensor | None
        kind = torch.tensor([spec.bits, spec.weight_step], dtype=torch.int32, device=scale.device)
        self.register_buffer("kind", kind)
        self.sizes = _sizes(self)
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        # The last of the rest collects errors, which torch raises together when all modules are through.
        if self.kind is not None:
            given = state.setdefault(f"{prefix}kind", self.kind)
            own = [self.spec.bits, self.spec.weight_step]
            if not given.is_meta and given.tolist() != own:
                rest[-1].append(
                    f"{prefix.rstrip('.') or 'the levels'}: the state has [bits, weight step] = {given.tolist()}, the "
                    f"layer {own}: load it into a model that was quantized to the same bits by the same scheme"
                )
                return
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def groups(self) -> int:
        """Number of groups of kernels."""
        return len(self.scale)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest level of the input of each group, [groups]."""
        return -self.zero_point * self.scale, (self.spec.top - self.zero_point) * self.scale

    def input(self, x: Float[Tensor, "*shape"], group: int) -> Float[Tensor, "*shape"]:
        """Return the levels that represent the input in the eyes of one group, in float32 or wider.

        Gradient:
            Straight-through: to `x` 1 inside the closed range and 0 outside; to the scale the rounding error inside,
            the end code outside.
        """
        shape = (1,) * x.ndim
        scale, zero = self.scale[group].reshape(shape), self.zero_point[group].reshape(shape)
        return _levels(x, scale, zero, 0, self.spec.top, 1)

    def weight(self, weight: Float[Tensor, "outputs *taps"]) -> Float[Tensor, "outputs *taps"]:
        """Return the levels that represent the kernels.

        Gradient:
            To the weight 1 inside the closed range, 0 outside. None to the scale: the adder operator gives weights
            `x - w` instead of a sign, which says nothing about the scale, and what a wider range adds to the distance
            of a clamped weight the constant takes away. A scale learns from the input.
        """
        step = self.spec.weight_step
        low, high = (0, self.spec.top) if step == 1 else (-(1 << (self.spec.bits - 1)), (1 << (self.spec.bits - 1)) - 1)
        scale, zero = self.per_kernel(weight.ndim)
        return _levels(weight, scale, zero, low, high, step)

    def per_kernel(self, ndim: int) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of each kernel, detached, of a shape that tiles `ndim` axes."""
        shape = (-1, *[1] * (ndim - 1))
        return self.scale.detach()[self.group_of].reshape(shape), self.zero_point[self.group_of].reshape(shape)

    def split(self, kernels: Shaped[Tensor, "outputs *taps"], groups: int) -> Sequence[Tensor]:
        """Take the kernels apart by their group, one tensor for each.

        Where channels come in groups too, a part holds all kernels, because each belongs to its place; `join` takes
        from every part what is its own.

        Args:
            kernels: Anything with one entry for each kernel.
            groups: Groups of channels that do not see each other.
        """
        if self.groups == 1 or groups > 1:
            return [kernels] * self.groups
        return torch.split(kernels[self.group_of.argsort(stable=True)], list(self.sizes))

    def join(self, parts: list[Tensor], groups: int) -> Float[Tensor, "n o i j"]:
        """Put the outputs of the parts that `split` made in the order of the kernels."""
        if len(parts) == 1:
            return parts[0]
        if groups > 1:
            which = self.group_of.reshape(1, 1, -1, 1, 1).expand(1, *parts[0].shape)
            return torch.stack(parts).gather(0, which)[0]
        return torch.cat(parts, 1)[:, self.group_of.argsort(stable=True).argsort()]

    def absorbed(self, weight: Float[Tensor, "outputs *taps"]) -> Float[Tensor, " outputs"]:
        r"""Return what the lossless clamp of each kernel takes from its distance: $\sum (l - w)_+ + (w - h)_+$.

        An input in $[l, h]$ is nearer to a weight beyond an end by exactly what the end is nearer, whatever the input.
        On every other level the kernel is clamped to $[-h, h]$.

        Gradient:
            None: that of a clamped weight would be the bias's, and that of the scale cancels, see `weight`.
        """
        weight = weight.detach()
        low, high = (end.detach() for end in self.range())
        if self.spec.weight_step == 2:
            low = -high
        shape = (-1, *[1] * (weight.ndim - 1))
        low, high = low[self.group_of].reshape(shape), high[self.group_of].reshape(shape)
        wide = weight.to(torch.promote_types(weight.dtype, low.dtype))
        return (F.relu(low - wide) + F.relu(wide - high)).flatten(1).sum(1)

    def extra_repr(self) -> str:
        """Show the codes and the groups."""
        step = "" if self.spec.weight_step == 1 else ", weights on every other level"
        return f"{self.spec.bits} bits, {self.groups} groups of kernels{step}"


def _levels(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, step: int) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    # On every other level there are codes on both sides of zero, and code 0 is real zero.
    scale, origin = (scale, zero) if step == 1 else (scale * step, None)
    codes = core.quantize(wide, scale, origin, qmin=low, qmax=high, rounding=core.round_ste)
    return core.dequantize(codes, scale, origin)


def _sizes(tied: TiedGrid) -> tuple[int, ...]:
    if tied.group_of.is_meta:
        return ()
    return tuple(torch.bincount(tied.group_of, minlength=tied.groups).tolist())


def _recount(tied: TiedGrid, _: Any) -> None:
    tied.sizes = _sizes(tied)


def _check_values(spec: TiedSpec, scale: Tensor, zero_point: Tensor, group_of: Tensor) -> None:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise RangeError(f"scale {scale.tolist()}: every scale must be positive and finite")
    whole = (zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= spec.top)
    if not bool(whole.all()):
        raise RangeError(f"zero point {zero_point.tolist()}: it must be a code, 0 to {spec.top}")
    if len(group_of) and not 0 <= int(group_of.min()) <= int(group_of.max()) < len(scale):
        raise RangeError(f"groups {int(group_of.min())} to {int(group_of.max())} of kernels with {len(scale)} scales")
    empty = sorted(set(range(len(scale))) - set(group_of.tolist())) if len(group_of) else []
    if empty:
        raise RangeError(f"group {empty[0]} of {len(scale)} has a scale but no kernel: leave it out")


def check_sum(path: str, taps: int, spec: TiedSpec) -> None:
    """Check that the distance of one window fits in 32 bits.

    Raises:
        RangeError: It may not.
    """
    largest = taps * spec.farthest
    if largest >= 1 << 31:
        raise RangeError(
            f"{path or 'the layer'} sums {taps} differences of {spec.bits}-bit codes, up to {largest}: more than a "
            "32-bit integer holds; use fewer bits, or split the layer"
        )


def tied_distance(
    x: Float[Tensor, "n c h w"],
    weight: Float[Tensor, "o k kh kw"],
    tied: TiedGrid,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Float[Tensor, "n o i j"]:
    """Return minus the distance of a padded float input and float kernels, both quantized, without any bias.

    Args:
        x: Padded input. The padding of zeros is real zero, which is a level.
        weight: Kernels.
        tied: The levels.
        stride: Two steps, in pixels.
        dilation: Two spacings of the taps, in pixels.
        groups: Groups of channels that do not see each other.

    Returns:
        Distances in the wider dtype of the input and the scale.

    Raises:
        DataError: The input holds a NaN.
    """
    parts = []
    for group, kernels in enumerate(tied.split(tied.weight(weight), groups)):
        scale, zero = tied.scale[group].detach().reshape(1), tied.zero_point[group].reshape(1)
        arguments = (scale, zero, tied.spec.bits, stride, dilation, groups)
        parts.append(ops.differentiable(ops.tied_distance_conv2d, tied.input(x, group), kernels, *arguments))
    return tied.join(parts, groups)


@final
class QuantAdderConv2d(nn.Conv2d):
    """An adder convolution with quantized inputs and kernels.

    Takes the arguments of `torch.nn.Conv2d`. The weight stays as it was in float: the clamp to the range of the levels
    and the constant that makes up for it are computed from the scale, so they follow when the scale or the weight
    learns.

    Inputs beyond the range are clamped to its ends: those of a layer with one-sided levels, calibrated on inputs that
    are never negative, to zero if they are negative later. Nothing is raised then.

    It returns the dtype of its input, float32 instead of a narrower one under autocast, as `AdderConv2d` does.

    Attributes:
        tied: The levels.
        path: Where the layer lies in its model, for messages.
    """

    tied: TiedGrid

    def __init__(self, *args: Any, tied: TiedGrid, path: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tied, self.path = tied, path
        _check_layer(path, self.weight, tied)

    @classmethod
    def from_float(cls, layer: AdderConv2d, tied: TiedGrid, *, path: str = "") -> "QuantAdderConv2d":
        """Wrap the weight of a float layer, with a bias of its own that starts as the layer's, or as zero."""
        _check_exponent(path, layer.exponent)
        arguments = conv_arguments(layer) | {"bias": True}
        return _adopt(cls(**arguments, tied=tied, path=path, device="meta"), layer)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Return minus the distance of the quantized input and kernels, plus what the clamp took, plus the bias.

        Raises:
            DataError: The input holds a NaN. An infinity is clamped like any value beyond the range.
            ShapeError: The input does not fit the layer.
        """
        with naming(self.path):
            x = uncast(x)
            padded = pad(x.unsqueeze(0) if x.ndim == 3 else x, self)
            check_windows(padded, self.weight, (self.dilation[0], self.dilation[1]), self.groups)
            geometry = (list(self.stride), list(self.dilation), self.groups)
            out = tied_distance(padded, self.weight, self.tied, *geometry)
            # The constant is added in the wide dtype: the packed form does the same.
            out = (out + self.constant().to(out.dtype).reshape(-1, 1, 1)).to(x.dtype)
            return out.squeeze(0) if x.ndim == 3 else out

    def constant(self) -> Float[Tensor, " o"]:
        """Return what is added to each channel: the bias, less what the clamp took from the distance."""
        return _constant(self.bias, self.tied.absorbed(self.weight))


@final
class QuantAdderLinear(nn.Linear):
    """An adder linear layer with quantized inputs and weights; see `QuantAdderConv2d`."""

    tied: TiedGrid

    def __init__(self, *args: Any, tied: TiedGrid, path: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tied, self.path = tied, path
        _check_layer(path, self.weight, tied)

    @classmethod
    def from_float(cls, layer: AdderLinear, tied: TiedGrid, *, path: str = "") -> "QuantAdderLinear":
        """Wrap the weight of a float layer, with a bias of its own that starts as the layer's, or as zero."""
        _check_exponent(path, layer.exponent)
        arguments = linear_arguments(layer) | {"bias": True}
        return _adopt(cls(**arguments, tied=tied, path=path, device="meta"), layer)

    def forward(self, input: Float[Tensor, "*n k"]) -> Float[Tensor, "*n o"]:
        """Return minus the distance of the quantized rows, plus what the clamp took, plus the bias.

        Raises:
            DataError: The input holds a NaN. An infinity is clamped like any value beyond the range.
            ShapeError: The input does not fit the layer.
        """
        with naming(self.path):
            input = uncast(input)
            line, kernels = as_line(input), self.weight[:, :, None, None]
            check_windows(line, kernels, (1, 1), 1)
            out = tied_distance(line, kernels, self.tied, [1, 1], [1, 1], 1)
            out = out + self.constant().to(out.dtype).reshape(-1, 1, 1)
            return from_line(out, input).to(input.dtype)

    def constant(self) -> Float[Tensor, " o"]:
        """Return what is added to each output: the bias, less what the clamp took from the distance."""
        return _constant(self.bias, self.tied.absorbed(self.weight))


@final
class QuantAdderMatmul(nn.Module):
    """The distances of the rows of two activations, both quantized to the same levels.

    There are no kernels, so nothing can be clamped without loss and there is no bias: both operands are clamped to the
    range of the levels.

    Args:
        tied: The levels, of one group without kernels.
        path: Where the layer lies in its model, for messages.

    Raises:
        ShapeError: The levels are those of kernels.
    """

    tied: TiedGrid

    def __init__(self, tied: TiedGrid, *, path: str = "") -> None:
        super().__init__()
        if tied.groups != 1 or len(tied.group_of):
            raise ShapeError(
                f"{path or 'the layer'} has no kernels: expected one scale and no groups of kernels, got {tied.groups} "
                f"scales and groups for {len(tied.group_of)}"
            )
        self.tied, self.path = tied, path

    def forward(self, a: Float[Tensor, "*b n k"], b: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b n m"]:
        """Return minus the distance between every quantized row of `a` and every quantized row of `b`.

        Raises:
            DataError: An operand holds a NaN.
            RangeError: The rows are so long that a distance may not fit in 32 bits.
            ShapeError: The rows differ in length, or the batch dimensions differ.

        Gradient:
            That of `q_adder.functional.adder_matmul` on the quantized reals, straight through the rounding.
        """
        with naming(self.path):
            rows = as_rows(a, b)
            check_sum(self.path, a.shape[-1], self.tied.spec)
            scale, zero = self.tied.scale.detach(), self.tied.zero_point
            levels = [self.tied.input(operand, 0) for operand in rows]
            out = ops.differentiable(ops.tied_distance_matmul, *levels, scale, zero, self.tied.spec.bits)
            return out.reshape(*a.shape[:-1], b.shape[-2]).to(rows[0].dtype)


QuantAdderLayer = QuantAdderConv2d | QuantAdderLinear


def as_line(rows: Shaped[Tensor, "*n k"]) -> Shaped[Tensor, "n k 1 m"]:
    """Lay rows out as the pixels of one image in one line; no row is no image."""
    if math.prod(rows.shape[:-1]) == 0:
        return rows.reshape(0, rows.shape[-1], 1, 1)
    return rows.reshape(-1, rows.shape[-1]).T.reshape(1, rows.shape[-1], 1, -1)


def from_line(line: Float[Tensor, "n o 1 m"], rows: Shaped[Tensor, "*n k"]) -> Float[Tensor, "*n o"]:
    """Undo `as_line` for the outputs of a layer."""
    return line.reshape(line.shape[1], -1).T.reshape(*rows.shape[:-1], line.shape[1])


class naming:  # noqa: N801 - a context manager, read as a word
    """Name the layer in every error that leaves the block."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Add the path to an error of ours."""
        if self.path and isinstance(error, QuantizationError):
            error.add_note(f"in the layer {self.path}")


def _constant(bias: Tensor | None, absorbed: Tensor) -> Tensor:
    return -absorbed if bias is None else bias - absorbed


def _check_layer(path: str, weight: Tensor, tied: TiedGrid) -> None:
    if len(tied.group_of) != len(weight):
        raise ShapeError(
            f"{path or 'the layer'} has {len(weight)} kernels, and groups are given for {len(tied.group_of)}"
        )
    check_sum(path, math.prod(weight.shape[1:]), tied.spec)


def _check_exponent(path: str, exponent: float) -> None:
    if exponent != 1.0:
        raise SpecError(
            f"{path or 'the layer'} has the exponent {exponent}: only sums of absolute differences can be quantized; "
            "finish annealing first, anneal_exponent(model, 1.0)"
        )


_Layer = TypeVar("_Layer", QuantAdderConv2d, QuantAdderLinear)


def _adopt(bare: _Layer, layer: nn.Module) -> _Layer:
    """Give a layer built without memory the weight and the mode of the float layer, and a bias of its own."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias = layer._parameters.get("bias")
    bare.register_parameter("weight", weight)  # type: ignore[arg-type]
    start = weight.new_zeros(len(weight)) if bias is None else bias
    bare.bias = nn.Parameter(start.detach().clone())
    bare.tied.to(weight.device)
    return bare.train(layer.training)


@entering.register(QuantAdderConv2d)
@entering.register(QuantAdderLinear)
def _(layer: QuantAdderConv2d | QuantAdderLinear, x: Tensor) -> list[Entering]:
    """The input, and the kernels after the clamp that costs nothing, in the eyes of each group."""
    found: list[Entering] = []
    tied = layer.tied
    for group, (low, high) in enumerate(zip(*tied.range(), strict=True)):
        suffix = f" of group {group}" if tied.groups > 1 else ""
        kernels = layer.weight[tied.group_of == group]
        levels = low + tied.scale[group] * torch.arange(tied.spec.top + 1, device=low.device)
        if tied.spec.weight_step == 1:
            weight_levels = levels
        else:
            half = 1 << (tied.spec.bits - 1)
            low, weight_levels = -high, 2 * tied.scale[group] * torch.arange(-half, half, device=low.device)
        found.append((f"input{suffix}", x, levels))
        found.append((f"clamped weight{suffix}", kernels.clamp(low, high), weight_levels))
    return found
