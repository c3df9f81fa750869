"""From a float model to one with observers in its slots.

`swap` never changes the model it is given. It returns a new tree of modules that shares every tensor with the old one,
so the float model stays at hand as the reference and the twin costs no memory. Rules name modules by their path; a rule
that matches nothing is an error, and a report says what was swapped and what stays float.
"""

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from q_core import layers
from q_core.errors import DataError, MatchError, QuantizationError, SpecError, StateError
from q_core.grid import UniformGrid
from q_core.layers import QuantAdd, QuantConcat, QuantConv2d, QuantLinear
from q_core.observer import GridFactory, MinMaxObserver, Observer
from q_core.rounding import NearestEven, Rounding
from q_core.spec import QuantSpec

LayerTable = Mapping[type[nn.Module], Callable[[Any], nn.Module]]

DEFAULT_LAYERS: LayerTable = {
    nn.Conv2d: QuantConv2d.from_float,
    nn.Linear: QuantLinear.from_float,
    QuantConv2d: lambda layer: layer,
    QuantLinear: lambda layer: layer,
    QuantAdd: lambda layer: layer,
    QuantConcat: lambda layer: layer,
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
    """

    spec: QuantSpec
    observer: Callable[..., Observer] = MinMaxObserver
    grid: GridFactory = UniformGrid.from_range
    rounding: Callable[[], Rounding] = NearestEven

    def build(self, shape: tuple[int, ...]) -> Observer:
        """Make the observer for a tensor of shape `shape`."""
        return self.observer(
            self.spec, self.spec.granularity.scale_shape(shape), grid=self.grid, rounding=self.rounding
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Which modules get which recipes.

    Attributes:
        pattern: Regular expression that must match the whole path of a module, such as `layer1\..*`.
        weight: Recipe for the slots that see a parameter; None keeps them float.
        input: Recipe for the slots that see an activation; None keeps them float.

    Raises:
        SpecError: The pattern is not a regular expression.
    """

    pattern: str
    weight: Recipe | None = None
    input: Recipe | None = None

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
    """

    path: str
    kind: str
    weight: QuantSpec | None
    input: QuantSpec | None


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
            f"{layer.path:40} {layer.kind:14} {_bits(layer.weight)}{_bits(layer.input, 'A')}" for layer in self.swapped
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
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)
        if rule is None or (rule.weight is None and rule.input is None):
            continue
        layer = twin.get_submodule(path)
        replaced[id(layer)] = new = table[type(layer)](layer)
        try:
            weight, activation = _fill(new, rule, observers, _device(twin, path))
        except QuantizationError as error:
            error.add_note(f"while swapping {path or 'the model itself'}")
            raise
        if weight is not None or activation is not None:
            swapped.append(SwappedLayer(path, type(layer).__name__, weight, activation))
    twin = replace_modules(twin, replaced)
    done = {layer.path for layer in swapped}
    return twin, SwapReport(tuple(swapped), tuple(_stays_float(model, done, table)))


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


def _owns_weight(module: nn.Module) -> bool:
    """Tell whether the weight, if there is one, is a parameter and not recomputed by a hook before each call."""
    return not isinstance(vars(module).get("weight"), Tensor)


def _bypassed(model: nn.Module) -> dict[int, str]:
    """Find the modules whose slots the network would go around, in silence, and say why."""
    reasons = {id(module): "a hook computes its weight" for module in model.modules() if not _owns_weight(module)}
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
) -> tuple[QuantSpec | None, QuantSpec | None]:
    weight_spec = input_spec = None
    for name, _, parameter in layers.slots(layer):
        if parameter is not None and rule.weight is not None:
            # Layers that share a parameter share its observer: tied weights are quantized once.
            key = (id(parameter), id(rule.weight))
            if key not in observers:
                observers[key] = rule.weight.build(tuple(parameter.shape)).to(device).train(layer.training)
            setattr(layer, name, observers[key])
            weight_spec = rule.weight.spec
        elif parameter is None and rule.input is not None:
            setattr(layer, name, rule.input.build(_input_shape(layer)).to(device).train(layer.training))
            input_spec = rule.input.spec
    return weight_spec, input_spec


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


def _stays_float(model: nn.Module, done: set[str], table: LayerTable) -> list[FloatLayer]:
    kept = []
    bypassed = _bypassed(model)
    for path, module in model.named_modules():
        if path in done:
            continue
        own = any(parameter is not None for parameter in module._parameters.values())
        if type(module) in table:
            kept.append(FloatLayer(path, type(module).__name__, bypassed.get(id(module), "no rule asks for it")))
        elif own:
            kept.append(FloatLayer(path, type(module).__name__, "this type cannot be swapped"))
    return kept


def fold_batchnorm(model: nn.Module, example: Any) -> nn.Module:
    """Return a twin in which batch norms are folded into the convolution or linear layer before them.

    Runs the example once to see which batch norm reads the very output of which layer, so names and `forward` do not
    matter. Then runs model and twin, in float64 where they can, and compares: a fold that would change the function is
    refused. Batch norms without affine parameters, and those of layers that share their weight or run twice, stay.

    Args:
        model: The float model. Not changed; its mode does not matter, the fold is of evaluation mode.
        example: One input, a tuple of positional inputs, or a mapping of keyword inputs.

    Returns:
        A twin in which folded batch norms are `nn.Identity`. Layers without a batch norm share their tensors.

    Raises:
        StateError: The folded model computes something else, for example because the output of a convolution is
            also used beside its batch norm; or its output holds no tensor to compare.
        DataError: The example holds no tensor.
    """
    if not _tensors(example):
        raise DataError(f"example of type {type(example).__name__} holds no tensor: pass an input of the model")
    twin = share(model).eval()
    pairs = _normalized_layers(twin, example)
    replaced: dict[int, nn.Module] = {}
    for layer, norm in pairs:
        if isinstance(layer, nn.Conv2d):
            replaced[id(layer)] = fuse_conv_bn_eval(layer, norm)
        else:
            replaced[id(layer)] = fuse_linear_bn_eval(layer, norm)
        replaced[id(norm)] = nn.Identity()
    folded = replace_modules(twin, replaced)
    if pairs:
        _check_equal(model, folded, example, len(pairs))
    for module, original in zip(folded.modules(), model.modules(), strict=True):
        module.training = original.training
    return folded


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


_Pair = tuple[nn.Conv2d | nn.Linear, nn.BatchNorm1d | nn.BatchNorm2d]


def _normalized_layers(model: nn.Module, example: Any) -> list[_Pair]:
    """Find the pairs in which a batch norm reads the very output of a convolution or linear layer."""
    producers: dict[int, tuple[nn.Conv2d | nn.Linear, int]] = {}
    outputs: list[Tensor] = []  # keeps the tensors alive, so that no id is used twice
    calls: dict[int, int] = {}
    pairs: list[_Pair] = []
    handles = []

    def produced(module: nn.Conv2d | nn.Linear, _: Any, output: Tensor) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        outputs.append(output)
        producers[id(output)] = module, output._version

    def consumed(module: nn.BatchNorm1d | nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        layer, version = producers.get(id(inputs[0]), (None, 0))
        # An activation in place leaves the object as it is and moves its version on. A linear layer has its channels
        # last: with more than two axes the batch norm looks at another axis.
        same_axis = isinstance(layer, nn.Conv2d) or inputs[0].ndim == 2
        if layer is not None and version == inputs[0]._version and same_axis:
            pairs.append((layer, module))

    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear) and _owns_weight(module):
            handles.append(module.register_forward_hook(produced))
        elif type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(consumed))
    try:
        with torch.no_grad():
            _call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    shared = _shared_parameters(model)
    return [
        (layer, norm)
        for layer, norm in pairs
        if calls[id(layer)] == calls[id(norm)] == 1 and id(layer.weight) not in shared and norm.affine
    ]


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module owns: folding one owner would break the tie."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _check_equal(model: nn.Module, folded: nn.Module, example: Any, count: int) -> None:
    # The folded weights were rounded to the dtype of the model, which sets the error that is allowed.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        expected, actual = (_output(each, example, torch.float64) for each in (model, folded))
        tolerance = max(1e-5, 8 * torch.finfo(dtype).eps)
    except Exception:
        # A forward that casts, a device without float64, no memory: compute as the model does. A fault of the model's
        # own comes up again here.
        expected, actual = (_output(each, example, None) for each in (model, folded))
        tolerance = min(0.25, 1024 * torch.finfo(dtype).eps)
    left, right = _tensors(expected), _tensors(actual)
    if not left:
        raise StateError(
            f"output of type {type(expected).__name__} holds no tensor, so the fold of {count} batch norms cannot be "
            "checked: fold a model that returns tensors, or quantize without folding"
        )
    error = max(map(_relative_error, left, right)) if len(left) == len(right) else math.inf
    if not error <= tolerance:
        raise StateError(
            f"folding {count} batch norms changes the output by {error:.2g} of its largest value, allowed is "
            f"{tolerance:.2g}: the output of a convolution is probably used beside its batch norm; quantize without "
            "folding"
        )


def _output(model: nn.Module, example: Any, dtype: torch.dtype | None) -> Any:
    def convert(value: Any) -> Any:
        # What is compared is the model, not the example: one with a NaN would hide every difference.
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype or value.dtype).nan_to_num(0.0, 0.0, 0.0) if real else value

    if isinstance(example, Mapping):
        example = {key: convert(value) for key, value in example.items()}
    else:
        example = tuple(map(convert, example)) if isinstance(example, tuple) else convert(example)
    copied = copy.deepcopy(share(model)).eval()
    with torch.no_grad():
        return _call(copied if dtype is None else copied.to(dtype), example)


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference over the largest finite magnitude; equal infinities and two NaN do not differ."""
    if expected.shape != actual.shape:
        return math.inf
    wide = torch.promote_types(expected.dtype, torch.float64)
    left, right = expected.to(wide).flatten(), actual.to(wide).flatten()
    differs = ~((left == right) | (left.isnan() & right.isnan()))
    if not bool(differs.any()):
        return 0.0
    largest = left[left.isfinite()].abs().max() if bool(left.isfinite().any()) else left.new_ones(())
    return float((left - right)[differs].abs().max() / largest.abs().clamp(min=1e-30))


def _tensors(output: Any) -> list[Tensor]:
    """List the tensors in nested mappings, lists, tuples and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, (list, tuple)) else []
