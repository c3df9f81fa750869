"""Forms in which a learned border can be deployed, for one layer or for all layers of a model.

A *deployment form* takes a layer with a border and returns one with the same codes that needs less of its runtime, or
says why it cannot: `by_thresholds` needs comparisons, `by_warp` an element-wise function before a stock quantizer,
`by_shifts` standard operators instead of patches, `in_integers` is the definition of an integer kernel. They go one
after the other: thresholds, then shifts, is a network of comparisons and 1x1 convolutions.
"""

import dataclasses
from collections.abc import Callable

from torch import nn

from q_aquant.border import FusedBorder, LearnedBorder
from q_aquant.layers import PatchConv2d
from q_aquant.packed import PackedPatchConv2d
from q_aquant.roundings import Gradual
from q_aquant.shifted import IntegerConv2d, ShiftedConv2d
from q_aquant.thresholds import ThresholdRounding, WarpedRounding
from q_core import layers
from q_core.errors import MatchError, QuantizationError, StateError
from q_core.layers import QuantConv2d, QuantLinear
from q_core.packed import PackedConv2d, PackedLinear
from q_core.quantizer import Quantizer
from q_core.rounding import Rounding
from q_core.swap import replace_modules, share

DeployForm = Callable[[nn.Module], nn.Module]
"""Turns a layer with a border into one with the same codes, the original unchanged; raises where it cannot."""

_WITH_SLOTS = (QuantConv2d, QuantLinear, PackedConv2d, PackedLinear, PatchConv2d, PackedPatchConv2d, ShiftedConv2d)
_BORDERS = (LearnedBorder, FusedBorder, ThresholdRounding, WarpedRounding)


@dataclasses.dataclass(frozen=True)
class DeployedLayer:
    """What became of one layer with a border.

    Attributes:
        path: Path of the layer.
        kind: Name of its class, now.
        rounding: Name of the class of its rounding, now.
        refused: Why the form cannot have its codes, and what to do; None where it has been applied.
    """

    path: str
    kind: str
    rounding: str
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class DeployReport:
    """What `deploy` did.

    Attributes:
        layers: Every layer with a border, in the order of registration.
    """

    layers: tuple[DeployedLayer, ...]

    @property
    def refused(self) -> tuple[DeployedLayer, ...]:
        """Layers that are as they were."""
        return tuple(layer for layer in self.layers if layer.refused is not None)

    def __str__(self) -> str:
        """Tabulate one layer a line."""
        return "\n".join(
            f"{layer.path:40} {layer.kind:18} {layer.rounding:18}"
            + (f" refused: {layer.refused}" if layer.refused else "")
            for layer in self.layers
        )


def deploy(model: nn.Module, form: DeployForm) -> tuple[nn.Module, DeployReport]:
    """Return a twin of a model whose layers with a border have another form.

    Args:
        model: A reconstructed model, packed or not. Not changed; the twin shares its tensors.
        form: `by_thresholds`, `by_warp`, `by_shifts`, `in_integers`, or a function of your own.

    Returns:
        The twin, and what became of each layer. A layer that the form refuses is what it was.

    Raises:
        MatchError: No layer has a border.
    """
    twin = share(model)
    found = {path: module for path, module in twin.named_modules() if _has_border(module)}
    if not found:
        raise MatchError(f"no layer of the {type(model).__name__} has a border: reconstruct it with aquant() first")
    replaced: dict[int, nn.Module] = {}
    report = []
    for path, layer in found.items():
        refused = None
        try:
            new = form(layer)
        except QuantizationError as error:
            new, refused = layer, str(error)
        replaced[id(layer)] = new
        report.append(DeployedLayer(path, type(new).__name__, _rounding_name(new), refused))
    return replace_modules(twin, replaced), DeployReport(tuple(report))


def by_thresholds(layer: nn.Module) -> nn.Module:
    """Replace the border of each element by a threshold for each level, see `ThresholdRounding`.

    Raises:
        StateError: The border is not one of a single element, or still learning.
        RangeError: A border crosses a level more than once.
        SpecError: Nothing is known of the slope of its bound.
    """
    return _with_rounding(layer, ThresholdRounding, ThresholdRounding.of)


def by_warp(layer: nn.Module) -> nn.Module:
    """Replace the border by a function before ordinary rounding, see `WarpedRounding`.

    Raises:
        StateError: The border is not one of a single element, or still learning.
    """
    return _with_rounding(layer, WarpedRounding, WarpedRounding)


def by_shifts(layer: nn.Module) -> nn.Module:
    """Replace a convolution of patches by a sum of 1x1 convolutions, see `ShiftedConv2d`.

    Raises:
        StateError: The layer has no patches, or a rounding that looks at whole ones, or still learns.
    """
    if isinstance(layer, ShiftedConv2d):
        return layer
    if not isinstance(layer, PatchConv2d | PackedPatchConv2d):
        raise StateError(
            f"a {type(layer).__name__} quantizes its input once, so there is nothing to shift: it runs wherever its "
            "rounding does; deploy it by thresholds or by a warp"
        )
    return ShiftedConv2d.from_patches(layer)


def in_integers(layer: nn.Module) -> nn.Module:
    """Replace a convolution by one that accumulates integers, see `IntegerConv2d`.

    Raises:
        StateError: The layer is no convolution, has a float weight, or a rounding that looks at whole patches.
        SpecError: A grid cannot be taken out of the sum.
        RangeError: The sum can leave int32.
    """
    if not isinstance(layer, QuantConv2d | PackedConv2d | PatchConv2d | PackedPatchConv2d | ShiftedConv2d):
        raise StateError(f"a {type(layer).__name__} is no convolution: integers are defined for those; leave it packed")
    return IntegerConv2d.from_layer(layer)


def _with_rounding(layer: nn.Module, kind: type[Rounding], make: Callable[[LearnedBorder], Rounding]) -> nn.Module:
    """Put another rounding in the place of every border of a layer."""
    new = share(layer)
    for name, slot, parameter in list(layers.slots(layer)):
        if parameter is not None or not _holds_border(slot):
            continue
        if not isinstance(slot, Quantizer) or isinstance(slot.rounding, Gradual):
            inside = slot.rounding if isinstance(slot, Quantizer) else slot
            raise StateError(f"{name} holds a {type(inside).__name__}, which is there for learning: finish it first")
        rounding = slot.rounding
        if isinstance(rounding, FusedBorder):
            raise StateError(
                f"{name} has a fused border, which depends on the whole window and not on one element: deploy it by "
                "shifted convolutions"
            )
        if isinstance(rounding, LearnedBorder):
            made = make(rounding).frozen()
            setattr(new, name, Quantizer(slot.grid.frozen(), made).train(slot.training))
        elif not isinstance(rounding, kind):
            raise StateError(f"{name} has a {type(rounding).__name__}: its border is gone; start from the learned one")
    return new


def _has_border(module: nn.Module) -> bool:
    slots = [slot for _, slot, parameter in layers.slots(module) if parameter is None]
    return isinstance(module, _WITH_SLOTS) and any(map(_holds_border, slots))


def _holds_border(slot: nn.Module) -> bool:
    return any(isinstance(module, _BORDERS) for module in slot.modules())


def _rounding_name(layer: nn.Module) -> str:
    names = [
        type(slot.rounding).__name__
        for _, slot, parameter in layers.slots(layer)
        if parameter is None and isinstance(slot, Quantizer)
    ]
    return ", ".join(names) or "none"
