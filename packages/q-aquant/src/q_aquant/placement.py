"""Where activations are quantized: at the input of every layer, or once at the output of every unit.

QDrop and BRECQ quantize a tensor where it is made, so all that read it, the skip path too, read quantized values, and
its scale is fitted to its own error. AQuant quantizes it where a layer uses it, which fits the scale to the output of
that layer and leaves skip paths in float. The choice alone moves accuracy by points: it is part of every result.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import cast, final

from torch import nn

from q_aquant.units import Unit, Units
from q_core.layers import QuantUnit
from q_core.observer import Observer
from q_core.swap import wrap_units

MakeObserver = Callable[[int | None], Observer | None]
"""Makes the observer of an activation; takes its bits, or None for the bits of inner layers; None leaves it float."""


class Placement(abc.ABC):
    """Where activations are quantized."""

    @abc.abstractmethod
    def apply(self, quantized: nn.Module, units: Units, observer: MakeObserver) -> nn.Module:
        """Move the observers of activations, in place.

        Args:
            quantized: A swapped model with an observer at the input of every layer, not calibrated.
            units: Its units; paths inside a unit that is wrapped get `body` after the path of the unit.
            observer: Makes further observers.

        Returns:
            The model, or the unit around it where the whole model is one.
        """


@final
@dataclasses.dataclass(frozen=True)
class InputPlacement(Placement):
    """Every layer quantizes its own input.

    Attributes:
        skip_bits: Bits of the tensor that enters a unit of several layers, and with it its skip path; None leaves it
            float, as AQuant does.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, appendix B.
    """

    skip_bits: int | None = None

    def apply(self, quantized: nn.Module, units: Units, observer: MakeObserver) -> nn.Module:
        """Quantize the input of every unit of several layers as well, if asked to."""
        for unit in units if self.skip_bits is not None else ():
            made = observer(self.skip_bits)
            if len(unit.layers) > 1 and made is not None:
                quantized, wrapped = _wrapped(quantized, unit)
                wrapped.input_quantizer = made
        return quantized


@final
@dataclasses.dataclass(frozen=True)
class OutputPlacement(Placement):
    """A tensor between two units is quantized once, where it is made; layers inside quantize what they read.

    Where something lies between two units (a rectifier or a pooling written as a function), the second one quantizes
    its input as a whole.

    Source:
        Li et al. 2021 (BRECQ), arXiv:2102.05426; Wei et al. 2022 (QDrop), arXiv:2203.05740, as released.
    """

    def apply(self, quantized: nn.Module, units: Units, observer: MakeObserver) -> nn.Module:
        """Move the observers of the layers that read the tensor between two units."""
        before: Unit | None = None
        for unit in units:
            layers = [quantized.get_submodule(path) for path in unit.readers]
            observers = [getattr(layer, "input_quantizer", None) for layer in layers]
            made = next((each for each in observers if isinstance(each, Observer)), None)
            if made is not None and (unit.chained or len(unit.layers) > 1):
                for layer, each in zip(layers, observers, strict=True):
                    if isinstance(each, Observer):
                        setattr(layer, "input_quantizer", nn.Identity())  # noqa: B010 - mypy knows no such attribute
                if unit.chained and before is not None:
                    quantized, wrapped = _wrapped(quantized, before)
                    wrapped.output_quantizer = made
                else:
                    quantized, wrapped = _wrapped(quantized, unit)
                    wrapped.input_quantizer = made
            before = unit
        return quantized


def _wrapped(quantized: nn.Module, unit: Unit) -> tuple[nn.Module, QuantUnit]:
    quantized = wrap_units(quantized, [unit.path])
    module = quantized.get_submodule(unit.path)
    return quantized, cast(QuantUnit, module)
