"""Which elements of an activation share a border, and where a layer applies it.

A `Form` turns a layer that rounds its input to nearest into one with a border. The border of every element of the
unfolded input needs a layer of its own, `PatchConv2d`; one shared by all kernel positions sits in the ordinary slot.
"""

import abc
import copy
import dataclasses
from typing import final

from torch import nn

from q_aquant.border import Bound, FusedBorder, LearnedBorder, rectified, unclipped
from q_aquant.flips import AdjustedRounding, AdjustedVectorRounding
from q_aquant.layers import PatchConv2d
from q_core.errors import StateError
from q_core.grid import UniformGrid
from q_core.layers import QuantConv2d, QuantLinear, conv_arguments
from q_core.quantizer import Quantizer
from q_core.rounding import Rounding

_MOST_BITS = 7
"""Layers with more bits keep nearest rounding: the first and the last, where a border has nothing to gain."""


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """A way to share borders, all of which start at one half.

    Attributes:
        degree: Of the polynomial of each border.
        bound: Turns the value of the polynomial into a border.
        depthwise_degree: Of depthwise convolutions, whose borders are many beside few weights; `degree` when None.
    """

    degree: int = 2
    bound: Bound = rectified
    depthwise_degree: int | None = None

    @abc.abstractmethod
    def convolution(self, layer: QuantConv2d, low: float, high: float) -> nn.Module:
        """Return the layer with its border, the original unchanged."""

    def apply(self, layer: nn.Module) -> nn.Module | None:
        """Return the layer with its border, or None where it has no activation quantizer of few bits.

        The new layer shares weights with the old one, and has a grid of its own.

        Raises:
            StateError: The activations are on a grid per channel, or one that is not uniform.
        """
        if not isinstance(layer, QuantConv2d | QuantLinear) or not isinstance(layer.input_quantizer, Quantizer):
            return None
        grid = layer.input_quantizer.grid
        if not isinstance(grid, UniformGrid) or grid.scale.numel() != 1:
            raise StateError(
                f"activations on a {type(grid).__name__} of tiles {grid.tile_shape}: a border needs a uniform grid "
                "with one scale for the whole tensor"
            )
        if grid.bits > _MOST_BITS:
            return None
        low, high = code_range(grid)
        if isinstance(layer, QuantConv2d):
            return self.convolution(layer, low, high)
        twin = QuantLinear.from_float(layer)
        twin.weight_quantizer = layer.weight_quantizer
        twin.input_quantizer = Quantizer(copy.deepcopy(grid), self.linear(layer, low, high))
        return twin

    def linear(self, layer: QuantLinear, low: float, high: float) -> Rounding:
        """Return the rounding of the input of a linear layer: a border for every feature."""
        return self.border((layer.in_features,), low, high)

    def border(
        self, index: tuple[int, ...], low: float, high: float, *, layer: QuantConv2d | None = None
    ) -> LearnedBorder:
        """Make a border of one half."""
        depthwise = layer is not None and layer.groups == layer.in_channels > 1
        degree = self.depthwise_degree if depthwise and self.depthwise_degree is not None else self.degree
        return LearnedBorder.nearest(index, low=low, high=high, degree=degree, bound=self.bound)


@final
@dataclasses.dataclass(frozen=True)
class ElementBorder(Form):
    """A border for every channel and kernel position.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 8; degree 1 is its linear border.
    """

    def convolution(self, layer: QuantConv2d, low: float, high: float) -> nn.Module:
        """Return a layer that quantizes patches."""
        return _on_patches(layer, self.border(_index(layer), low, high, layer=layer))


@final
@dataclasses.dataclass(frozen=True)
class WindowBorder(Form):
    """One border for the window of each channel, fused from the borders of its elements.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 9.
    """

    def convolution(self, layer: QuantConv2d, low: float, high: float) -> nn.Module:
        """Return a layer that quantizes patches; where there is one position there is nothing to fuse."""
        if layer.kernel_size == (1, 1):
            return ElementBorder(self.degree, self.bound, self.depthwise_degree).convolution(layer, low, high)
        return _on_patches(layer, FusedBorder(self.border(_index(layer), low, high, layer=layer)))


@final
@dataclasses.dataclass(frozen=True)
class ChannelBorder(Form):
    """One border for each channel, shared by all kernel positions: the input is quantized once, as ever.

    Once it has learned it is an ordinary layer, see `ordinary`, and runs on every kernel for convolutions.
    """

    def convolution(self, layer: QuantConv2d, low: float, high: float) -> nn.Module:
        """Return a layer that quantizes patches, all positions alike."""
        return _on_patches(layer, self.border((layer.in_channels, 1, 1), low, high, layer=layer))


@final
@dataclasses.dataclass(frozen=True)
class AdjustedForm(Form):
    """A-rounding of every window; `degree` and `bound` have no meaning here, because nothing is learned.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, appendix A.
    """

    def convolution(self, layer: QuantConv2d, low: float, high: float) -> nn.Module:
        """Return a layer that rounds its patches so that their errors cancel."""
        return _on_patches(layer, AdjustedRounding(low=low, high=high))

    def linear(self, layer: QuantLinear, low: float, high: float) -> Rounding:
        """Return the rounding of the input of a linear layer."""
        return AdjustedVectorRounding(low=low, high=high)


def code_range(grid: UniformGrid) -> tuple[float, float]:
    """Return the code coordinates of the smallest and the largest level of a grid with one scale."""
    zero = 0.0 if grid.zero_point is None else float(grid.zero_point)
    return grid.qmin - zero, grid.qmax - zero


def ordinary(layer: PatchConv2d) -> QuantConv2d | None:
    """Return the layer that quantizes its input once, if that is the same: if all kernel positions share a border.

    Args:
        layer: Shares its weights with the result.

    Returns:
        An ordinary layer, or None where positions differ, or where a padded zero would not stay zero.
    """
    quantizer = layer.patch_quantizer
    if not isinstance(quantizer, Quantizer) or not isinstance(quantizer.rounding, LearnedBorder):
        return None
    border = quantizer.rounding
    if border.coefficients.ndim != 4 or border.coefficients.shape[2] != 1 or border.bound is unclipped:
        return None
    twin = QuantConv2d(**conv_arguments(layer), device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        twin.register_parameter(name, parameter)
    twin.weight_quantizer, twin.input_quantizer = layer.weight_quantizer, quantizer
    return twin.train(layer.training)


def _index(layer: nn.Conv2d) -> tuple[int, int, int]:
    return layer.in_channels, layer.kernel_size[0] * layer.kernel_size[1], 1


def _on_patches(layer: QuantConv2d, rounding: Rounding) -> PatchConv2d:
    # The grid may learn together with the border, and the old layer must stay what it was.
    grid = copy.deepcopy(layer.input_quantizer.grid)
    return PatchConv2d.from_quantized(layer, Quantizer(grid, rounding))  # type: ignore[arg-type]
