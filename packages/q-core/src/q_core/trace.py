"""What one example shows of a model: which batch norm reads which layer, and which layers never run.

Running an example and watching it makes no assumption on names or on `forward`, and needs no graph of the model. What
is concluded from it is checked: a fold is compared with the original, and what does not run is reported.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from q_core.errors import DataError, StateError
from q_core.swap import owns_weight, replace_modules, share, swappable


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
        if type(module) in (nn.Conv2d, nn.Linear) and owns_weight(module):
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
    # The folded weights were rounded to the dtype of the model, which sets the error that is allowed. Every fold adds
    # one of its own, and the layers after it amplify it: 170 units of 2**-23 in all were seen behind 80 folds.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        expected, actual = (_output(each, example, torch.float64) for each in (model, folded))
        tolerance = max(1e-5, min(0.25, 8 * count * torch.finfo(dtype).eps))
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


def idle(model: nn.Module, example: Any) -> tuple[str, ...]:
    """List the modules that `swap` can replace but that one forward pass does not call.

    Either they lie on a branch that the example does not take, or their parent reads the weight without calling them,
    as some attention layers do; a quantizer in their slots would never run.

    Args:
        model: A model.
        example: One input, a tuple of positional inputs, or a mapping of keyword inputs.
    """
    candidates = swappable(model)
    called: set[int] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in candidates.values()
    ]
    try:
        with torch.no_grad():
            _call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(path for path, module in candidates.items() if id(module) not in called)
