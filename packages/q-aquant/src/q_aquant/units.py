"""What is reconstructed at once: residual blocks where there are any, single layers elsewhere.

A unit is a module that takes one tensor, returns one tensor and runs once in a forward pass, so that it can be taken
out of the network and fitted alone. Which modules are blocks is seen by running an example: a block is the smallest
module around a fork of the data flow and the addition or concatenation that joins it again. Names, types and `forward`
do not matter, and no graph of the model is needed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

from torch import nn

from q_aquant.watch import Look, Watch, look, strings, watch
from q_core.errors import MatchError, SpecError, StateError
from q_core.layers import slots
from q_core.swap import swappable


@dataclasses.dataclass(frozen=True)
class Unit:
    """One module that is reconstructed at once.

    Attributes:
        path: Path of the module; empty for the whole model.
        kind: Name of its class.
        layers: Paths of its convolutions and linear layers, in the order of execution.
        readers: Those of them that read the very tensor that the unit is given.
        chained: Whether that tensor is the very one that the unit before it returned.
        weights: Number of weights in its layers.
        input_shape: Shape of its input for one image.
        output_shape: Shape of its output for one image.
    """

    path: str
    kind: str
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    chained: bool
    weights: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """One module that no unit reconstructs.

    Attributes:
        path: Path of the module.
        kind: Name of its class.
        reason: Why.
    """

    path: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Units(Sequence[Unit]):
    """The units of a model, in the order of execution.

    Attributes:
        units: They hold no layer in common.
        left_out: Layers of no unit.
    """

    units: tuple[Unit, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.units)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Unit, ...]: ...
    def __getitem__(self, index: int | slice) -> Unit | tuple[Unit, ...]:
        """Return a unit by its place, or several."""
        return self.units[index]

    def __str__(self) -> str:
        """Tabulate one unit a line, then what is left out."""
        rows = [
            f"{unit.path or '(the model)':40} {unit.kind:22} {len(unit.layers):3} layers {unit.weights:>11,} weights"
            for unit in self.units
        ]
        rows += [f"{each.path:40} {each.kind:22} left out: {each.reason}" for each in self.left_out]
        return "\n".join(rows)


def find_units(
    model: nn.Module,
    example: Any,
    *,
    blocks: Sequence[type[nn.Module] | str] | None = None,
    skip: Sequence[str] = (),
) -> Units:
    """Find the blocks of a model; every layer outside them becomes a unit with the module that wraps it alone.

    By itself it takes for a block the smallest module that holds a fork, all layers on its paths, and the addition or
    concatenation that joins them; and every other module of the same class, such as a residual block without a
    shortcut. A layer outside the blocks brings the modules around it that hold no other layer, such as its activation.

    Args:
        model: A float model, batch norms folded, or its quantized twin. Runs twice in evaluation mode; not changed.
        example: One input, a tuple of positional inputs, or a mapping of keyword inputs, with the images along the
            first axis. Two images tell more than one.
        blocks: Classes or paths of the blocks: every module of a class that holds a layer, of nested ones the
            outermost. Empty for no blocks; None finds them.
        skip: Paths of layers, or of modules with all their layers, that are left out.

    Returns:
        The units and what is left out.

    Raises:
        MatchError: A class or path of `blocks` or `skip` is not in the model, or nothing is left to reconstruct.
        SpecError: Blocks that contain one another, or one without a layer.
        StateError: A unit or a layer that runs twice, takes or returns anything but one tensor with the images along
            its first axis, shares a layer with another unit, or runs its layers in another order every time.
        DataError: The example holds no tensor.

    Source:
        Blocks as units: Li et al. 2021 (BRECQ), arXiv:2102.05426.
    """
    seen = watch(model, example, skip)
    chosen = _joined_blocks(seen) if blocks is None else _given_blocks(seen, blocks)
    covered = {layer for path in chosen for layer in seen.layers_of(path)}
    chosen += [_wrapper(seen, layer, chosen) for layer in seen.order if layer not in covered]
    return _finish(seen, example, chosen)


def find_layers(model: nn.Module, example: Any, *, skip: Sequence[str] = ()) -> Units:
    """Make every convolution and linear layer a unit.

    Args:
        model: A float model, batch norms folded, or its quantized twin. Runs twice in evaluation mode; not changed.
        example: As for `find_units`.
        skip: Paths of layers, or of modules with all their layers, that are left out.

    Raises:
        MatchError: As `find_units`.
        StateError: As `find_units`.
        DataError: As `find_units`.

    Source:
        Layers as units: Nagel et al. 2020 (AdaRound), arXiv:2004.10568.
    """
    seen = watch(model, example, skip)
    return _finish(seen, example, list(seen.order))


def _joined_blocks(seen: Watch) -> list[str]:
    """Find the smallest modules around a fork and its join, and the other modules of their classes."""
    around = [_around(seen, stack, layers) for stack, layers in seen.joins]
    found = [path for path in dict.fromkeys(around) if path and not seen.problem(path)]
    blocks = [path for path in found if not any(path != other and seen.contains(path, other) for other in found)]
    kinds = {type(seen.names[path]) for path in blocks}
    # A container of torch's own says nothing of what is in it.
    kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.nn.")}
    for path in seen.calls:
        alike = path and type(seen.names[path]) in kinds and seen.layers_of(path) and not seen.problem(path)
        if alike and not any(seen.contains(path, other) or seen.contains(other, path) for other in blocks):
            blocks.append(path)
    return blocks


def _around(seen: Watch, stack: tuple[str, ...], layers: frozenset[str]) -> str:
    """Return the innermost running module that holds all the layers, the empty path if it is the model."""
    holds = (path for path in reversed(stack) if all(seen.contains(path, layer) for layer in layers))
    return next(holds, "") if layers & seen.wanted else ""


def _given_blocks(seen: Watch, blocks: Sequence[type[nn.Module] | str]) -> list[str]:
    paths: list[str] = []
    for block in strings("blocks", blocks):
        if isinstance(block, str):
            path = seen.find("blocks", block)
            _check_apart(seen, block, path, paths)
            if not seen.layers_of(path):
                raise SpecError(
                    f"block {block!r} holds no layer that runs and can be quantized: leave it out of blocks"
                )
            paths.append(path)
        else:
            paths += _of_class(seen, block, paths)
    for path in paths:
        seen.check(path, "leave it out of blocks, and its layers become units of their own")
    return paths


def _of_class(seen: Watch, kind: type[nn.Module], before: list[str]) -> list[str]:
    found = [path for path in seen.calls if isinstance(seen.names[path], kind) and seen.layers_of(path)]
    if not found:
        raise MatchError(
            f"blocks: no {kind.__name__} with a layer that can be quantized runs in a {type(seen.model).__name__}: "
            "give the class of a module in model.modules(), or its path"
        )
    # Modules are called from the outside in, so the outermost comes first.
    chosen: list[str] = []
    for path in found:
        if not any(seen.contains(other, path) for other in [*before, *chosen]):
            _check_apart(seen, path, path, before)
            chosen.append(path)
    return chosen


def _check_apart(seen: Watch, name: str, path: str, others: list[str]) -> None:
    for other in others:
        if seen.contains(other, path) or seen.contains(path, other):
            raise SpecError(f"blocks {other!r} and {name!r} hold the same modules: give one of them")


def _wrapper(seen: Watch, layer: str, blocks: Sequence[str]) -> str:
    """Return the largest module, below the model, that holds this layer and no other; the layer comes first."""
    best = layer
    for path in seen.calls:
        larger = path and seen.contains(path, best) and seen.layers_of(path) == [layer]
        if larger and not seen.problem(path) and not any(seen.contains(path, block) for block in blocks):
            best = path
    return best


def _finish(seen: Watch, example: Any, chosen: Sequence[str]) -> Units:
    """Check the units, and run the example again to see how they hang together."""
    chosen = sorted(dict.fromkeys(chosen), key=lambda path: seen.first[path])
    for path in chosen:
        seen.check(path, f"give each call a module of its own, or leave it out with skip=({path!r},)")
    _check_parameters(seen, chosen)
    again = look(seen, example, chosen)
    units = [_unit(seen, again, path) for path in chosen]
    return Units(tuple(units), tuple(_left_out(seen, chosen)))


def _unit(seen: Watch, again: Look, path: str) -> Unit:
    layers = tuple(seen.layers_of(path))
    second = tuple(again.order.get(path, ()))
    if second != layers:
        raise StateError(
            f"the layers of unit {path!r} ran as {', '.join(layers)}, but in a second pass the unit itself ran "
            f"{', '.join(second) or 'none'}: it must run all of them, in one order; make the model deterministic, or "
            f"leave it out with skip=({path!r},)"
        )
    fact = again.facts[path]
    return Unit(
        path=path,
        kind=type(seen.names[path]).__name__,
        layers=layers,
        readers=tuple(again.readers[path]),
        chained=fact.chained,
        weights=sum(seen.layers[layer].get_parameter("weight").numel() for layer in layers),
        input_shape=fact.input_shape,
        output_shape=fact.output_shape,
    )


def _check_parameters(seen: Watch, chosen: Sequence[str]) -> None:
    owners: dict[int, tuple[str, str]] = {}
    for path in chosen:
        for layer in seen.layers_of(path):
            for parameter in seen.layers[layer].parameters(recurse=False):
                unit, other = owners.setdefault(id(parameter), (path, layer))
                if unit != path:
                    raise StateError(
                        f"units {unit!r} and {path!r} share a parameter of {other!r} and {layer!r}, which would be "
                        f"learned twice: give a block around both, or leave one out with skip=({layer!r},)"
                    )


def _left_out(seen: Watch, chosen: Sequence[str]) -> list[LeftOut]:
    found = []
    slotted = swappable(seen.model)
    for path, module in seen.model.named_modules():
        matrix = any(p is not None and p.numel() > max(p.shape, default=1) for p in module._parameters.values())
        if path in seen.layers:
            if path in seen.skipped:
                reason = "skipped on request"
            elif path not in seen.calls:
                reason = "the example does not call it, or its parent reads the weight itself"
            else:
                continue
        elif path in slotted or any(True for _ in slots(module)):
            if any(seen.contains(unit, path) for unit in chosen):
                continue
            reason = "not in a block, and no unit by itself: it keeps the quantizers of the calibration"
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            reason = "its type is unknown, or its weight is computed or read without calling it; it stays float"
        elif matrix:
            reason = "weights of its own that cannot be quantized; they stay float"
        else:
            continue
        found.append(LeftOut(path, type(module).__name__, reason))
    return found
