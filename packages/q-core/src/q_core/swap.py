"""From a float model to one with observers in its slots.

`swap` never changes the model it is given. It returns a new tree of modules that shares every tensor with the old one,
so the float model stays at hand as the reference and the twin costs no memory. Rules name modules by their path; a rule
that matches nothing is an error, and a report says what was swapped and what stays float.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from q_core import layers
from q_core.errors import MatchError, QuantizationError, SpecError
from q_core.grid import UniformGrid
from q_core.layers import QuantAdd, QuantConcat, QuantConv2d, QuantLinear, QuantUnit
from q_core.observer import GridFactory, MinMaxObserver, Observer
from q_core.rounding import NearestEven, Rounding
from q_core.spec import QuantSpec

_OUTPUT = f"output{layers.SLOT_SUFFIX}"
LayerTable = Mapping[type[nn.Module], Callable[[Any], nn.Module]]

DEFAULT_LAYERS: LayerTable = {
    nn.Conv2d: QuantConv2d.from_float,
    nn.Linear: QuantLinear.from_float,
    QuantConv2d: lambda layer: layer,
    QuantLinear: lambda layer: layer,
    QuantAdd: lambda layer: layer,
    QuantConcat: lambda layer: layer,
    QuantUnit: lambda layer: layer,
}
"""What `swap` knows how to replace: an exact type, and the function that makes the layer with slots."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to build in one slot.

    Attributes:
        spec: The codes and the granularity.
        observer: Makes the observer: a class, or a `functools.partial` of one with its options.
        grid: Builds the grid over the range that the observer proposes.
        rounding: Makes the rounding.
        transform: Makes what is done to a tensor before it is quantized, and the observer sees what it gives; None for
            nothing.
    """

    spec: QuantSpec
    observer: Callable[..., Observer] = MinMaxObserver
    grid: GridFactory = UniformGrid.from_range
    rounding: Callable[[], Rounding] = NearestEven
    transform: Callable[[], nn.Module] | None = None

    def build(self, shape: tuple[int, ...]) -> Observer:
        """Make the observer for a tensor of shape `shape`."""
        observer = self.observer(
            self.spec, self.spec.granularity.scale_shape(shape), grid=self.grid, rounding=self.rounding
        )
        observer.transform = None if self.transform is None else self.transform()
        return observer


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Which modules get which recipes.

    Attributes:
        pattern: Regular expression that must match the whole path of a module, such as `layer1\..*`.
        weight: Recipe for the slots that see a parameter; None keeps them float.
        input: Recipe for the slots that see an activation; None keeps them float.
        reason: What the report says of modules that the rule keeps float, having no recipe.
        output: Recipe for the slot that sees the output of a `QuantUnit`; None keeps it float.

    Raises:
        SpecError: The pattern is not a regular expression.
    """

    pattern: str
    weight: Recipe | None = None
    input: Recipe | None = None
    reason: str = "a rule keeps it float"
    output: Recipe | None = None

    def __post_init__(self) -> None:
        """Check the pattern."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise SpecError(f"pattern {self.pattern!r} is not a regular expression: {error}; see re.escape") from error


@dataclasses.dataclass(frozen=True)
class SwappedLayer:
    """One module that was given observers.

    Attributes:
        path: Path of the module.
        kind: Name of its class.
        weight: The codes of its parameters, None if they stay float.
        input: The codes of its activations, None if they stay float.
        output: The codes of its output, None if it stays float.
    """

    path: str
    kind: str
    weight: QuantSpec | None
    input: QuantSpec | None
    output: QuantSpec | None = None


@dataclasses.dataclass(frozen=True)
class FloatLayer:
    """One module that stays float.

    Attributes:
        path: Path of the module.
        kind: Name of its class.
        reason: Why.
    """

    path: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What `swap` did.

    Operators written as functions (`x + y`, `torch.cat`) are not modules: they stay float and cannot be listed.

    Attributes:
        swapped: Modules with observers.
        stays_float: Modules with parameters of their own that were left alone.
    """

    swapped: tuple[SwappedLayer, ...]
    stays_float: tuple[FloatLayer, ...]

    def __str__(self) -> str:
        """Tabulate one module a line."""
        rows = [
            f"{layer.path:40} {layer.kind:14} {_bits(layer.weight)}{_bits(layer.input, 'A')}"
            + (_bits(layer.output, "O") if layer.output else "")
            for layer in self.swapped
        ]
        rows += [f"{layer.path:40} {layer.kind:14} float: {layer.reason}" for layer in self.stays_float]
        return "\n".join(rows)


def _bits(spec: QuantSpec | None, letter: str = "W") -> str:
    return f"{letter}{spec.bits if spec else 32}"


def swap(
    model: nn.Module, rules: Sequence[Rule], *, table: LayerTable = DEFAULT_LAYERS
) -> tuple[nn.Module, SwapReport]:
    """Return a twin of the model with observers in the slots that the rules name.

    The first rule that matches a path decides. Modules that no rule matches stay float. The twin shares every
    parameter and buffer with `model`: to train it without training `model` too, swap a deep copy.

    Args:
        model: The float model. Not changed.
        rules: Tried in order.
        table: Which exact types can be swapped, and how.

    Returns:
        The twin, and what was swapped and what stays float.

    Raises:
        MatchError: A rule matches no module that can be swapped.
        QuantizationError: A recipe does not fit a layer; the note names it.
    """
    twin = share(model)
    paths = list(swappable(twin, table=table))
    _check_rules(rules, paths, twin)
    swapped: list[SwappedLayer] = []
    replaced: dict[int, nn.Module] = {}
    observers: dict[tuple[int, int], Observer] = {}
    for path in paths:
        rule = _rule_for(path, rules)
        if rule is None or not (rule.weight or rule.input or rule.output):
            continue
        layer = twin.get_submodule(path)
        replaced[id(layer)] = new = table[type(layer)](layer)
        try:
            filled = _fill(new, rule, observers, _device(twin, path))
        except QuantizationError as error:
            error.add_note(f"while swapping {path or 'the model itself'}")
            raise
        if filled:
            swapped.append(SwappedLayer(path, type(layer).__name__, *map(filled.get, ("weight", "input", "output"))))
    twin = replace_modules(twin, replaced)
    done = {layer.path for layer in swapped}
    return twin, SwapReport(tuple(swapped), tuple(_stays_float(model, done, rules, table)))


def _rule_for(path: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)


def swappable(model: nn.Module, *, table: LayerTable = DEFAULT_LAYERS) -> dict[str, nn.Module]:
    """Return the modules that `swap` can replace, by path in the order of registration."""
    bypassed = _bypassed(model)
    named = model.named_modules()
    return {path: module for path, module in named if type(module) in table and id(module) not in bypassed}


def share(model: nn.Module) -> nn.Module:
    """Copy the tree of modules, not the tensors: parameters and buffers are the same objects in both."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        # A weight that a hook computes (pruning, spectral norm) is a plain attribute, and deepcopy refuses its history.
        computed = [value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
        shared.update({id(value): value.detach() for value in computed})
    return copy.deepcopy(model, memo=shared)


def wrap_units(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Put parts of a model into units with empty slots, in place.

    Paths into a unit get a step `body`: what was `layer1.0.conv1` is `layer1.0.body.conv1` in a unit at `layer1.0`. A
    part that is registered more than once is in one unit everywhere. What is a unit already stays as it is.

    Args:
        model: The model.
        paths: Paths of the parts, as they are when those before them are wrapped: outer parts come first. The empty
            path is the model itself.

    Returns:
        The model, or the unit around it.

    Raises:
        MatchError: There is no such path.
    """
    for path in paths:
        try:
            body = model.get_submodule(path)
        except AttributeError as error:
            raise MatchError(f"module {path!r} is not in the model, so it cannot become a unit") from error
        if not isinstance(body, QuantUnit):
            model = replace_modules(model, {id(body): QuantUnit(body)})
    return model


def unwrap_units(model: nn.Module) -> nn.Module:
    """Put the bodies of all units in their places, in place.

    Returns:
        The model, or its body where it is a unit.
    """
    bodies: dict[int, nn.Module] = {}
    for unit in model.modules():
        body = unit
        while isinstance(body, QuantUnit):
            body = body.body
        if body is not unit:
            bodies[id(unit)] = body
    return replace_modules(model, bodies)


def plain_path(model: nn.Module, path: str) -> str:
    """Return the path that a module has where nothing is wrapped in a unit."""
    names, module = [], model
    for name in path.split(".") if path else ():
        if not (isinstance(module, QuantUnit) and name == "body"):
            names.append(name)
        module = module.get_submodule(name)
    return ".".join(names)


def replace_submodule(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at `path`, in place.

    Raises:
        MatchError: There is no such path.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        model.get_submodule(path)
    except AttributeError as error:
        raise MatchError(f"module {path!r} is not in the model") from error
    parent._modules[name] = new


def replace_modules(root: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules wherever they are registered, in place, so that shared modules stay shared.

    Args:
        root: The tree.
        replaced: The new module for the `id` of an old one.

    Returns:
        The root, or what replaces it.
    """
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if id(child) in replaced:
                parent._modules[name] = replaced[id(child)]
    return replaced.get(id(root), root)


def owns_weight(module: nn.Module) -> bool:
    """Tell whether the weight, if there is one, is a parameter and not recomputed by a hook before each call."""
    return not isinstance(vars(module).get("weight"), Tensor)


def _bypassed(model: nn.Module) -> dict[int, str]:
    """Find the modules whose slots the network would go around, in silence, and say why."""
    reasons = {id(module): "a hook computes its weight" for module in model.modules() if not owns_weight(module)}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path, taken in evaluation without gradients, hands the weights of its layers to one function.
            reason = "a fused encoder layer reads its weight without calling it"
            reasons |= dict.fromkeys(map(id, module.children()), reason)
    return reasons


def _device(root: nn.Module, path: str) -> torch.device:
    """Return where a module computes: the device of the first parameter in it, or in the nearest module around it."""
    parameter = next(root.get_submodule(path).parameters(), None)
    if parameter is None and path:
        return _device(root, path.rpartition(".")[0])
    # Statistics and grids are checked by value, which the meta device has none of.
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def _fill(
    layer: nn.Module, rule: Rule, observers: dict[tuple[int, int], Observer], device: torch.device
) -> dict[str, QuantSpec]:
    """Put observers in the slots of a layer, and return the codes of what each recipe of the rule was used for."""
    specs: dict[str, QuantSpec] = {}
    for name, _, parameter in layers.slots(layer):
        if parameter is not None and rule.weight is not None:
            # Layers that share a parameter share its observer: tied weights are quantized once.
            key = (id(parameter), id(rule.weight))
            if key not in observers:
                observers[key] = rule.weight.build(tuple(parameter.shape)).to(device).train(layer.training)
            setattr(layer, name, observers[key])
            specs["weight"] = rule.weight.spec
        elif parameter is None:
            sees = "output" if name == _OUTPUT else "input"
            recipe = rule.output if sees == "output" else rule.input
            if recipe is not None:
                setattr(layer, name, recipe.build(_input_shape(layer)).to(device).train(layer.training))
                specs[sees] = recipe.spec
    return specs


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    shape = getattr(layer, "input_shape", None)
    return shape() if shape is not None else (1,)


def _check_rules(rules: Sequence[Rule], paths: list[str], twin: nn.Module) -> None:
    for rule in rules:
        if not any(re.fullmatch(rule.pattern, path) for path in paths):
            near = difflib.get_close_matches(rule.pattern.replace("\\", ""), paths, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"the model is a {type(twin).__name__}"
            known = ", ".join(paths[:4]) + (f" … {paths[-1]}" if len(paths) > 4 else "")
            raise MatchError(
                f"rule {rule.pattern!r} matched no module that can be swapped; there are {len(paths)}: "
                f"{known or 'none'} ({hint})"
            )


def _stays_float(model: nn.Module, done: set[str], rules: Sequence[Rule], table: LayerTable) -> list[FloatLayer]:
    kept = []
    bypassed = _bypassed(model)
    for path, module in model.named_modules():
        if path in done:
            continue
        own = any(parameter is not None for parameter in module._parameters.values())
        if type(module) in table:
            rule = _rule_for(path, rules)
            reason = bypassed.get(id(module), rule.reason if rule else "no rule asks for it")
            kept.append(FloatLayer(path, type(module).__name__, reason))
        elif own:
            kept.append(FloatLayer(path, type(module).__name__, "this type cannot be swapped"))
    return kept
