"""Where borders start, or stay, without gradient descent.

A `Start` sets the borders of one unit from the activations that enter it, before anything learns. With nothing to learn
it is a method by itself, of a few passes over the images.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor, nn

from q_aquant.border import FusedBorder, LearnedBorder
from q_aquant.closed_form import PropagatedError, border_coefficients, closed_form_border, positions_as_outputs
from q_core.errors import RangeError
from q_core.grid import UniformGrid
from q_core.layers import slots
from q_core.quantizer import Quantizer
from q_core.swap import plain_path


@dataclasses.dataclass(frozen=True)
class Sight:
    """What a start sees of a unit.

    Attributes:
        original: The float unit.
        inputs: Gives batches of the input of the unit in the quantized and in the float network, anew with each call.
        error: Returns the error of a unit on images that were held out.
    """

    original: nn.Module
    inputs: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    error: Callable[[nn.Module], float]


class Start(abc.ABC):
    """A way to set borders."""

    @abc.abstractmethod
    def put(self, unit: nn.Module, sight: Sight) -> None:
        """Set the borders of a unit, in place.

        Args:
            unit: Quantized, with borders.
            sight: What there is to see.
        """


@final
@dataclasses.dataclass(frozen=True)
class ClosedForm(Start):
    r"""The border that makes the error of each product least, layer by layer: see `q_aquant.closed_form`.

    Each layer sees the error that is left with the borders of the layers before it. The formula treats every element
    by itself; how much of the way to go, the images that were held out decide, for every layer, none of it included.

    Attributes:
        shares: Parts of the way from one half to the border of the formula that are tried, above 0 and at most 1.
        propagated: Whether the error of the layers before counts, or that of the weights alone.

    Raises:
        RangeError: A share outside its range, or none.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 7, for several outputs; the choice of a share is ours.
    """

    shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    propagated: bool = True

    def __post_init__(self) -> None:
        """Check the shares."""
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise RangeError(f"shares={self.shares}: give at least one, each above 0 and at most 1")

    @torch.no_grad()
    def put(self, unit: nn.Module, sight: Sight) -> None:
        """Set one layer after the other."""
        best = sight.error(unit)
        for bordered in _in_order(unit, sight):
            coefficients = bordered.border.coefficients
            kept, found = coefficients.clone(), self._coefficients(bordered, unit, sight)
            for share in self.shares:
                coefficients.copy_(share * found)
                error = sight.error(unit)
                if error < best:
                    best, kept = error, coefficients.clone()
            coefficients.copy_(kept)

    def _coefficients(self, bordered: "_Bordered", unit: nn.Module, sight: Sight) -> Tensor:
        layer, border = bordered.layer, bordered.border
        weight, used = layer.weight, bordered.quantized_weight()
        convolution = isinstance(layer, nn.Conv2d)
        if convolution and border.coefficients.shape[2] == 1:
            weight, used = positions_as_outputs(weight), positions_as_outputs(used)
        error = self._propagated(bordered, unit, sight) if self.propagated else None
        polynomial = closed_form_border(
            weight,
            used,
            low=border.low,
            high=border.high,
            groups=layer.groups if isinstance(layer, nn.Conv2d) else 1,
            propagated=error,
            degree=border.degree,
        )
        return border_coefficients(polynomial).to(border.coefficients)

    def _propagated(self, bordered: "_Bordered", unit: nn.Module, sight: Sight) -> Tensor:
        layer, border = bordered.layer, bordered.border
        sums = PropagatedError(
            layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features,
            scale=bordered.grid.scale.reshape(1),
            low=border.low,
            high=border.high,
            degree=min(2, border.degree),
            axis=1 if isinstance(layer, nn.Conv2d) else -1,
        )
        for quantized, original in sight.inputs():
            sums.add(
                _input_of(layer, unit, quantized),
                _input_of(sight.original.get_submodule(bordered.path), sight.original, original),
            )
        return sums.regression()


@dataclasses.dataclass(frozen=True)
class _Bordered:
    """A layer with a border.

    Attributes:
        path: Where its twin is in the float unit.
        layer: The layer.
        grid: Of its activations.
        border: Its border, or that of the elements where they are fused.
    """

    path: str
    layer: nn.Conv2d | nn.Linear
    grid: UniformGrid
    border: LearnedBorder

    def quantized_weight(self) -> Tensor:
        """Return the weight as it enters the product."""
        weight = self.layer.weight
        slot = next((child for _, child, parameter in slots(self.layer) if parameter is weight), nn.Identity())
        used: Tensor = slot(weight)
        return used


def _in_order(unit: nn.Module, sight: Sight) -> list[_Bordered]:
    """Find the layers with borders, in the order in which they run."""
    found = {path: bordered for path, layer in unit.named_modules() if (bordered := _bordered(unit, path, layer))}
    ran: list[str] = []
    handles = [
        bordered.layer.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
        for path, bordered in found.items()
    ]
    try:
        quantized, _ = next(sight.inputs())
        unit(quantized[:1])
    finally:
        for handle in handles:
            handle.remove()
    return [found[path] for path in dict.fromkeys(ran)]


def _bordered(unit: nn.Module, path: str, layer: nn.Module) -> _Bordered | None:
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return None
    for _, quantizer, parameter in slots(layer):
        if parameter is None and isinstance(quantizer, Quantizer) and isinstance(quantizer.grid, UniformGrid):
            border = quantizer.rounding
            border = border.elements if isinstance(border, FusedBorder) else border
            if isinstance(border, LearnedBorder):
                return _Bordered(plain_path(unit, path), layer, quantizer.grid, border)
    return None


def _input_of(layer: nn.Module, unit: nn.Module, x: Tensor) -> Tensor:
    taken: list[Tensor] = []
    # A copy, because what runs next may overwrite it.
    handle = layer.register_forward_pre_hook(lambda _, args: taken.append(args[0].clone()))
    try:
        unit(x)
    finally:
        handle.remove()
    return taken[0]
