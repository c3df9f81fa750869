r"""Quantized layers as they run on integers, whatever their levels are.

A real on any levels is a sum of thresholds that it passes, each times a step. With steps $s_k$ above zero and $r_k$
below it,

$$ Q(x) = \sum_k s_k\,[x > t_k] - \sum_k r_k\,[x \le t'_k] $$

and as a convolution is linear,

$$ w * Q(x) = \sum_k s_k\,(w * [x > t_k]) - \sum_k r_k\,(w * [x \le t'_k]) $$

The *planes* in brackets are zeros and ones. Where weights are integers times a scale, each convolution is one of
integers, exact in any order of addition. Where weights have a table of levels too, they are a sum of planes in the same
way, and each product counts the places where two planes both have a one. Steps that are all equal add up: on a uniform
grid one plane is enough, the codes minus the zero point. What is left in reals is one product and one sum for each pair
of planes and each output.

`deploy` gives the layers of a model this form. It is a definition for integer hardware and an independent check of
training, not the fastest way to compute on a CPU: the planes of a tensor of b bits are $2^b - 1$ tensors.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from q_core.checkpoint import describe, rebuild
from q_core.errors import DataError, FormatError, MatchError, QuantizationError, RangeError, SpecError, StateError
from q_core.grid import CodebookGrid, Grid, UniformGrid
from q_core.layers import QuantConv2d, QuantLinear, conv_arguments, linear_arguments
from q_core.packed import PackedConv2d, PackedLinear, PackedTensor, pack, stored
from q_core.quantizer import Quantizer
from q_core.swap import replace_modules

_EXACT = 1 << 24  # integers up to here are exact in float32
_LARGEST = (1 << 31) - 1  # of int32
_PANEL = 1 << 24  # elements held at once, 64 MiB in float32


@final
class ThermometerConv2d(nn.Conv2d):
    """A convolution of planes of small integers, which real factors put together. Made by `deploy`.

    It returns what the packed layer returns, but for the order in which few reals are added. Padding adds zeros to each
    plane, which is the real zero that is padded in training.

    Attributes:
        panel: About how many elements of planes and of their products are held at once. Results do not depend on it.
    """

    packed_weight: PackedTensor
    input_quantizer: nn.Module
    offsets: tuple[bool, bool]
    panel: int

    @classmethod
    def from_packed(cls, layer: PackedConv2d) -> "ThermometerConv2d":
        """Take the codes, the quantizer, the geometry and the bias of a packed convolution.

        Raises:
            StateError: The input is not quantized.
            SpecError: A grid or a rounding cannot be taken out of the sum.
            RangeError: A sum of integers can leave int32.
        """
        bare = cls(**conv_arguments(layer), device="meta")
        return _fill(bare, layer, layer.packed_weight, layer.input_quantizer, _offsets(layer))

    def counts(self, x: Float[Tensor, "*n c h w"]) -> Int32[Tensor, "p q *n o i j"]:
        """Return the integers: the convolution of each plane of the input with each plane of the weight.

        All of them are held at once.

        Args:
            x: Reals to quantize.

        Returns:
            Planes of the input in ascending order of their thresholds, then planes of the weight, then the output.

        Raises:
            DataError: The input holds a NaN.
        """
        return _counts(self, x)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Convolve the planes and add up, in the wider dtype of the input and the tables; without a gradient.

        An output is NaN where an element of its window is.
        """
        return _forward(self, x)

    def product(self, planes: Float[Tensor, "*n c h w"], kernels: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Convolve planes, one behind the other as images, with planes of the weight, one behind the other as outputs.

        Args:
            planes: [planes, *n, c, h, w].
            kernels: [planes, o, c, kh, kw].

        Returns:
            [planes of the input, planes of the weight, *n, o, i, j].
        """
        groups, lead = self.groups, planes.shape[:-3]
        outputs = kernels.shape[1]
        # Each group of channels has its outputs together: those of its first plane, then those of its second.
        table = kernels.reshape(len(kernels), groups, outputs // groups, *kernels.shape[2:])
        table = table.transpose(0, 1).flatten(0, 2)
        out: Tensor = self._conv_forward(planes.flatten(0, -4), table, None)
        size = out.shape[-2:]
        images = math.prod(lead[1:])
        apart = out.reshape(lead[0], images, groups, len(kernels), outputs // groups, *size).movedim(3, 1)
        return apart.reshape(lead[0], len(kernels), *lead[1:], outputs, *size)

    def extra_repr(self) -> str:
        """Show the geometry and the planes."""
        return f"{super().extra_repr()}, {_show(self)}"  # type: ignore[no-untyped-call]


@final
class ThermometerLinear(nn.Linear):
    """A linear layer on planes of small integers, which real factors put together. Made by `deploy`.

    It returns what the packed layer returns, but for the order in which few reals are added.

    Attributes:
        panel: About how many elements of planes and of their products are held at once. Results do not depend on it.
    """

    packed_weight: PackedTensor
    input_quantizer: nn.Module
    offsets: tuple[bool, bool]
    panel: int

    @classmethod
    def from_packed(cls, layer: PackedLinear) -> "ThermometerLinear":
        """Take the codes, the quantizer and the bias of a packed linear layer.

        Raises:
            StateError: The input is not quantized.
            SpecError: A grid or a rounding cannot be taken out of the sum.
            RangeError: A sum of integers can leave int32.
        """
        bare = cls(**linear_arguments(layer), device="meta")
        return _fill(bare, layer, layer.packed_weight, layer.input_quantizer, _offsets(layer))

    def counts(self, x: Float[Tensor, "*n c"]) -> Int32[Tensor, "p q *n o"]:
        """Return the integers: the product of each plane of the input with each plane of the weight.

        All of them are held at once.

        Args:
            x: Reals to quantize.

        Returns:
            Planes of the input in ascending order of their thresholds, then planes of the weight, then the output.

        Raises:
            DataError: The input holds a NaN.
        """
        return _counts(self, x)

    def forward(self, input: Float[Tensor, "*n c"]) -> Float[Tensor, "*n o"]:
        """Multiply the planes and add up, in the wider dtype of the input and the tables; without a gradient.

        An output is NaN where an element of its row is.
        """
        return _forward(self, input)

    def product(self, planes: Float[Tensor, "p *n c"], kernels: Float[Tensor, "q o c"]) -> Float[Tensor, "p q *n o"]:
        """Multiply planes with planes of the weight, one behind the other as outputs."""
        out = F.linear(planes, kernels.flatten(0, 1))
        return out.reshape(*out.shape[:-1], *kernels.shape[:2]).movedim(-2, 1)

    def extra_repr(self) -> str:
        """Show the geometry and the planes."""
        return f"{super().extra_repr()}, {_show(self)}"


ThermometerLayer = ThermometerConv2d | ThermometerLinear
_PackedLayer = PackedConv2d | PackedLinear
_Layer = TypeVar("_Layer", ThermometerConv2d, ThermometerLinear)


@dataclasses.dataclass(frozen=True)
class DeployedLayer:
    """What became of one quantized layer.

    Attributes:
        path: Path of the layer.
        kind: Name of its class, now.
        input_planes: Planes of its input, 0 where it was refused.
        weight_planes: Planes of its weight, 0 where it was refused.
        largest: Bound of the magnitude of its integers, 0 where it was refused.
        refused: Why it has no integers, and what to do; None where it has.
    """

    path: str
    kind: str
    input_planes: int = 0
    weight_planes: int = 0
    largest: int = 0
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class DeployReport:
    """What `deploy` did.

    Attributes:
        layers: Every quantized convolution and linear layer, in the order of registration.
    """

    layers: tuple[DeployedLayer, ...]

    @property
    def refused(self) -> tuple[DeployedLayer, ...]:
        """Layers that stay packed, or float in part."""
        return tuple(layer for layer in self.layers if layer.refused is not None)

    def __str__(self) -> str:
        """Tabulate one layer a line."""
        return "\n".join(f"{layer.path:40} {layer.kind:18} {_line(layer)}" for layer in self.layers)


def _line(layer: DeployedLayer) -> str:
    if layer.refused is not None:
        return f"refused: {layer.refused}"
    bits = layer.largest.bit_length() + 1
    return (
        f"{layer.input_planes} x {layer.weight_planes} products of integers up to {layer.largest}: {bits} bits with "
        "the sign"
    )


def deploy(model: nn.Module) -> tuple[nn.Module, DeployReport]:
    """Return a twin of a model whose quantized convolutions and linear layers run on integers.

    Args:
        model: A trained model, packed or not. Not changed.

    Returns:
        The twin, and what became of each layer. It is packed, so `q_core.save_packed` can write it, and a layer that
        has no integers stays as `q_core.pack` leaves it.

    Raises:
        MatchError: No convolution or linear layer is quantized.
        StateError: The model still holds observers.
    """
    twin = pack(model)
    replaced: dict[int, nn.Module] = {}
    report = []
    for path, layer in twin.named_modules():
        if not _is_quantized(layer):
            continue
        try:
            new = _form(layer)
        except QuantizationError as error:
            report.append(DeployedLayer(path, type(layer).__name__, refused=str(error)))
        else:
            replaced[id(layer)] = new
            planes = _plane_counts(new)
            report.append(DeployedLayer(path, type(new).__name__, *planes, _largest(new.packed_weight, _grid_of(new))))
    if not report:
        raise MatchError(
            f"no convolution or linear layer of the {type(model).__name__} is quantized: swap(), calibrate() and train "
            "it first"
        )
    return replace_modules(twin, replaced), DeployReport(tuple(report))


def _is_quantized(layer: nn.Module) -> bool:
    if isinstance(layer, QuantConv2d | QuantLinear):
        return isinstance(layer.input_quantizer, Quantizer)
    return isinstance(layer, _PackedLayer | ThermometerLayer)


def _form(layer: nn.Module) -> ThermometerLayer:
    if isinstance(layer, ThermometerLayer):
        return layer
    if isinstance(layer, PackedConv2d):
        return ThermometerConv2d.from_packed(layer)
    if isinstance(layer, PackedLinear):
        return ThermometerLinear.from_packed(layer)
    raise StateError("its weight stays float, which has no codes: quantize the weight too")


def _offsets(layer: _PackedLayer) -> tuple[bool, bool]:
    """Tell whether zero is no level of the input and of the weight, after checking that both have planes.

    Raises:
        StateError: The input is not quantized.
        SpecError: A grid or a rounding cannot be taken out of the sum.
        RangeError: A sum of integers can leave int32.
    """
    quantizer, weight = layer.input_quantizer, layer.packed_weight
    if not isinstance(quantizer, Quantizer):
        raise StateError(f"its input goes through a {type(quantizer).__name__}, which has no codes: quantize it too")
    grid, rounding = quantizer.grid, quantizer.rounding
    if not isinstance(grid, UniformGrid | CodebookGrid):
        raise SpecError(
            f"its input is on a {type(grid).__name__}: planes are defined for UniformGrid and CodebookGrid, which "
            "frozen() of most grids returns"
        )
    if math.prod(grid.tile_shape) != 1:
        raise SpecError(
            f"its input has levels of its own for each of {grid.tile_shape} tiles, and the steps of a sum must be the "
            "same for all its terms: quantize activations per tensor"
        )
    if rounding.ties_up(torch.ones(1)) is None:
        raise SpecError(
            f"its input is rounded by a {type(rounding).__name__}, which does not always take the nearest level, so "
            "there are no thresholds: use NearestEven or NearestTowardZero"
        )
    if math.prod(weight.grid.tile_shape) != 1 and not _per_output(weight):
        raise SpecError(
            f"its weight of shape {weight.shape} has levels for {weight.grid.tile_shape} tiles, and the steps of a sum "
            "must be the same for all its terms: use PerTensor() or PerChannel(0)"
        )
    largest = _largest(weight, grid)
    if largest > _LARGEST:
        raise RangeError(
            f"{math.prod(weight.shape[1:])} products of integers can add up to {largest}, beyond {_LARGEST} of int32: "
            "use fewer bits, or split the channels"
        )
    return _misses_zero(grid), _misses_zero(weight.grid)


def _per_output(weight: PackedTensor) -> bool:
    return weight.grid.tile_shape == (weight.shape[0],) + (1,) * (len(weight.shape) - 1)


def _misses_zero(grid: UniformGrid | CodebookGrid) -> bool:
    return isinstance(grid, CodebookGrid) and bool((grid.codebook != 0).all(-1).any())


def _largest(weight: PackedTensor, grid: UniformGrid | CodebookGrid) -> int:
    """Bound the magnitude of a sum of products of two planes."""
    return math.prod(weight.shape[1:]) * _reach(grid) * _reach(weight.grid)


def _reach(grid: UniformGrid | CodebookGrid) -> int:
    """Return the largest magnitude of an integer in a plane."""
    if isinstance(grid, CodebookGrid):
        return 1
    return max(-grid.qmin, grid.qmax) if grid.zero_point is None else grid.qmax - grid.qmin


def _fill(
    bare: _Layer, layer: nn.Module, weight: PackedTensor | None, quantizer: nn.Module, offsets: tuple[bool, bool]
) -> _Layer:
    del bare._parameters["weight"]
    bias = layer._parameters.get("bias")
    if bias is not None:
        bare.bias = nn.Parameter(bias.detach(), requires_grad=False)
    if weight is not None:
        bare.packed_weight = weight
    bare.input_quantizer, bare.offsets, bare.panel = quantizer, offsets, _PANEL
    return bare.train(layer.training)


# A tensor as a sum of planes. Each plane has a real factor, and for each of them one per tile.


@dataclasses.dataclass(frozen=True)
class _Planes:
    """A quantized tensor that can be cut into planes.

    Attributes:
        values: The tensor, as what `edges` can be compared with; in the one plane of a uniform grid, integers.
        factors: Real factors [planes, tiles].
        edges: What separates the planes [planes, tiles], None for a uniform grid.
        above: Whether the edge lies above zero [planes, tiles].
    """

    values: Tensor
    factors: Tensor
    edges: Tensor | None = None
    above: Tensor | None = None

    def __len__(self) -> int:
        return len(self.factors)

    def part(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return planes `first` to `last - 1`, with a NaN in each where the tensor has one."""
        values = self.values.unsqueeze(0)
        if self.edges is None or self.above is None:
            return values.to(dtype)
        shape = (-1, self.edges.shape[1], *[1] * (self.values.ndim - 1))
        passed = values > self.edges[first:last].reshape(shape)
        planes = (passed == self.above[first:last].reshape(shape)).to(dtype)
        return torch.where(values.isnan(), math.nan, planes)


def _planes(values: Tensor, edges: Tensor, levels: Tensor, offset: bool) -> _Planes:
    """Cut a tensor at edges [tiles, levels - 1] that separate levels [tiles, levels].

    Where zero is no level, the level nearest to it comes first, with a plane of ones.
    """
    zero = levels.abs().argmin(-1, keepdim=True)
    above = torch.arange(1, levels.shape[1], device=levels.device) > zero
    steps = levels.diff(dim=-1)
    factors = torch.where(above, steps, -steps)
    if offset:
        # Nothing lies above infinity, so that the plane of this edge, which counts as below zero, is all ones.
        edges = torch.cat([torch.full_like(edges[:, :1], math.inf), edges], 1)
        above = torch.cat([torch.zeros_like(above[:, :1]), above], 1)
        factors = torch.cat([levels.gather(1, zero), factors], 1)
    return _Planes(values, factors.T, edges.T, above.T)


def _input_planes(layer: ThermometerLayer, x: Tensor, wide: torch.dtype) -> _Planes:
    quantizer, grid = _quantizer_of(layer), _grid_of(layer)
    if quantizer.transform is not None:
        x = quantizer.transform(x)
    if isinstance(grid, UniformGrid):
        codes = grid.quantize(x, quantizer.rounding)
        zero = 0 if grid.zero_point is None else grid.zero_point.reshape(())
        return _Planes(codes - zero, grid.scale.reshape(1, 1).to(wide))
    edges = grid.thresholds(quantizer.rounding, x.dtype)
    if edges is None:
        raise SpecError(f"a {type(quantizer.rounding).__name__} does not always take the nearest level: deploy() again")
    levels = grid.codebook.reshape(1, -1).to(wide)
    return _planes(x.to(edges.dtype), edges.reshape(1, -1), levels, layer.offsets[0])


def _weight_planes(layer: ThermometerLayer, wide: torch.dtype) -> _Planes:
    weight = layer.packed_weight
    grid, codes = weight.grid, weight.codes()
    if isinstance(grid, UniformGrid):
        tiles = (-1, *[1] * (codes.ndim - 1))
        zero = 0 if grid.zero_point is None else grid.zero_point.reshape(tiles).to(torch.int32)
        return _Planes(codes - zero, grid.scale.reshape(1, -1).to(wide))
    levels = grid.codebook.flatten(0, -2).to(wide)
    # The number of a level is compared with those below it.
    edges = torch.arange(levels.shape[1] - 1, device=codes.device, dtype=wide).expand(len(levels), -1)
    return _planes((codes - grid.qmin).to(wide), edges, levels, layer.offsets[1])


def _quantizer_of(layer: ThermometerLayer) -> Quantizer:
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, Quantizer):
        raise StateError(f"the input goes through a {type(quantizer).__name__}, which has no codes: deploy() again")
    return quantizer


def _grid_of(layer: ThermometerLayer) -> UniformGrid | CodebookGrid:
    grid: Grid = _quantizer_of(layer).grid
    if not isinstance(grid, UniformGrid | CodebookGrid):
        raise StateError(f"the input is on a {type(grid).__name__}, which has no planes: deploy() again")
    return grid


def _plane_counts(layer: ThermometerLayer) -> tuple[int, int]:
    grids = (_grid_of(layer), layer.packed_weight.grid)
    first, second = (
        1 if isinstance(grid, UniformGrid) else grid.qmax - grid.qmin + offset
        for grid, offset in zip(grids, layer.offsets, strict=True)
    )
    return first, second


def _show(layer: ThermometerLayer) -> str:
    first, second = _plane_counts(layer)
    return f"{first} planes of the input, {second} of the weight"


def _integers(layer: ThermometerLayer, planes: Tensor, kernels: Tensor) -> Tensor:
    # A convolution by a transform (Winograd, Fourier) has an error, of less than 1/2; a direct one has none to round.
    return layer.product(planes, kernels).round()


def _exact_dtype(layer: ThermometerLayer) -> torch.dtype:
    """Return the narrower of the dtypes in which every sum of integers is exact, in any order."""
    return torch.float32 if _largest(layer.packed_weight, _grid_of(layer)) <= _EXACT else torch.float64


def _wide(layer: ThermometerLayer, x: Tensor) -> torch.dtype:
    dtype = x.dtype
    for grid in (_grid_of(layer), layer.packed_weight.grid):
        table = grid.scale if isinstance(grid, UniformGrid) else grid.codebook
        dtype = torch.promote_types(dtype, table.dtype)
    return dtype


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    # It would run the product in 16 bits. Where there is none to turn off, an exported graph is one without a context.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _counts(layer: ThermometerLayer, x: Tensor) -> Tensor:
    with torch.no_grad(), _without_autocast(x.device.type):
        wide, exact = _wide(layer, x), _exact_dtype(layer)
        inputs, weights = _input_planes(layer, x, wide), _weight_planes(layer, wide)
        counts = _integers(layer, inputs.part(0, len(inputs), exact), weights.part(0, len(weights), exact))
        if bool(counts.isnan().any()):
            raise DataError(f"input of shape {tuple(x.shape)} holds a NaN, which no integer stands for")
        return counts.to(torch.int32)


def _forward(layer: ThermometerLayer, x: Tensor) -> Tensor:
    with torch.no_grad(), _without_autocast(x.device.type):
        wide, exact = _wide(layer, x), _exact_dtype(layer)
        inputs, weights = _input_planes(layer, x, wide), _weight_planes(layer, wide)
        channel = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        out: Tensor | None = None
        for factors, sums in _sums(layer, inputs, weights, exact, wide):
            term = factors.reshape(channel) * sums
            out = term if out is None else out + term
        result = torch.as_tensor(out)
        if layer.bias is not None:
            result = result + layer.bias.to(wide).reshape(channel)
        return result.to(x.dtype)


def _sums(
    layer: ThermometerLayer, inputs: _Planes, weights: _Planes, exact: torch.dtype, wide: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each plane of the weight, its factors and what it gives with the input.

    The planes of the input are added one after the other, however many are held at once.
    """
    some, many = _panels(layer, inputs, weights)
    for first in range(0, len(weights), some):
        kernels = weights.part(first, first + some, exact)
        sums: Tensor | None = None
        for start in range(0, len(inputs), many):
            counts = _integers(layer, inputs.part(start, start + many, exact), kernels).to(wide)
            for factor, count in zip(inputs.factors[start : start + many, 0], counts, strict=True):
                sums = factor * count if sums is None else sums + factor * count
        yield from zip(weights.factors[first : first + some], torch.as_tensor(sums), strict=True)


def _panels(layer: ThermometerLayer, inputs: _Planes, weights: _Planes) -> tuple[int, int]:
    """Return how many planes of the weight and of the input are held at once."""
    if torch.compiler.is_compiling():
        return len(weights), len(inputs)  # the compiler plans the memory, for shapes that are not known here
    width = layer.in_channels * math.prod(layer.stride) if isinstance(layer, nn.Conv2d) else layer.in_features
    outputs = inputs.values.numel() // width * len(weights.values)
    some = min(len(weights), _fit(layer.panel, weights.values.numel(), outputs))
    return some, min(len(inputs), _fit(layer.panel, inputs.values.numel(), outputs * some))


def _fit(panel: int, *sizes: int) -> int:
    """Return how many planes fit where each takes the largest of some numbers of elements."""
    return max(1, panel // max(1, *sizes))


@describe.register(ThermometerConv2d)
@describe.register(ThermometerLinear)
def _(module: ThermometerLayer) -> dict[str, Any]:
    return {"offsets": list(module.offsets)}


@stored.register(ThermometerConv2d)
@stored.register(ThermometerLinear)
def _(module: ThermometerLayer) -> tuple[int, int]:
    return module.packed_weight.stored_bits(), math.prod(module.packed_weight.shape)


@rebuild.register(ThermometerConv2d)
def _(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    if not isinstance(layer, nn.Conv2d):
        raise FormatError(f"the layer is a {type(layer).__name__}, the file has a convolution of planes")
    return _described(ThermometerConv2d(**conv_arguments(layer), device="meta"), layer, entry)


@rebuild.register(ThermometerLinear)
def _(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    if not isinstance(layer, nn.Linear):
        raise FormatError(f"the layer is a {type(layer).__name__}, the file has a linear layer of planes")
    return _described(ThermometerLinear(**linear_arguments(layer), device="meta"), layer, entry)


def _described(bare: _Layer, layer: nn.Module, entry: dict[str, Any]) -> _Layer:
    first, second = entry["offsets"]
    return _fill(bare, layer, None, nn.Identity(), (bool(first), bool(second)))
