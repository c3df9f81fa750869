"""Packed models on disk: safetensors and JSON, checked and written atomically.

A file holds every tensor of a packed model once, and in its metadata a description of the packed layers and quantizers,
the ties between tensors, and a SHA-256 of the contents. No code is stored and none is run on loading: a rounding or a
layer of another package is named, and found among the types that the reader has imported. The architecture is not
stored either: it comes from the skeleton that the reader is given.
"""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from q_core import layers
from q_core.errors import FormatError, QuantizationError, StateError
from q_core.functional import check_tiling
from q_core.grid import CodebookGrid, Grid, UniformGrid
from q_core.layers import QuantConv2d, QuantLinear, QuantUnit
from q_core.observer import Observer
from q_core.packed import PackedTensor, pack_layer, packed_form
from q_core.packing import packed_words
from q_core.quantizer import Quantizer
from q_core.rounding import Rounding
from q_core.swap import DEFAULT_LAYERS, replace_modules, replace_submodule, share, unwrap_units, wrap_units

FORMAT, VERSION = "q-pack", 1
_NO_FORM = packed_form.dispatch(object)
_T = TypeVar("_T")
_MISFIT = (QuantizationError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What it raises to build something from a description that does not fit."""
_UNKNOWN = "which nothing that is imported defines: import the package it belongs to before load_packed()"


@functools.singledispatch
def describe(module: nn.Module) -> dict[str, Any] | None:
    """Return what the tensors do not tell of a packed module of another package, as plain values, or None.

    Every `PackedTensor` and every quantizer in it is described by this package.
    """
    return None


@functools.singledispatch
def rebuild(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """Return the packed form of a layer of the skeleton, without its tensors, from what `describe` said of it.

    It is found by the type of the layer in the float model. Where that is one that several packages replace, such as
    `nn.Conv2d`, register it for the type of the packed module instead, and files will name that type. Where a
    `PackedTensor` or a quantizer belongs, any module may stand: this package puts them in their places.

    Raises:
        FormatError: The type of the layer has no such form, or the entry does not fit it.
    """
    raise FormatError(
        f"a {type(layer).__name__} has no packed form of its own: import the package of the method that packed the "
        "file, and pass the float model"
    )


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a packed model to a safetensors file, atomically.

    Args:
        model: A model made by `pack`.
        path: Where to write. The file appears complete or not at all.

    Returns:
        The path.

    Raises:
        StateError: The model is not packed, or holds a grid, rounding or state that the format cannot describe.
    """
    _check_packed(model)
    packed: dict[str, Any] = {}
    quantizers: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedTensor):
            packed[name] = {
                "shape": list(module.shape),
                "channels_last": module.channels_last,
                "grid": _describe_grid(module.grid),
            }
        elif isinstance(module, Quantizer):
            if module.transform is not None:
                raise StateError(
                    f"{name} transforms its input with a {type(module.transform).__name__}, which the format cannot "
                    "hold: make it a layer of the model in front of the slot"
                )
            quantizers[name] = {"grid": _describe_grid(module.grid), **_describe_rounding(name, module.rounding)}
    own = dict(_describe_own(model))
    if not packed and not quantizers and not own:
        raise StateError("nothing in the model is packed: call pack() before save_packed()")
    tensors, aliases = _unique(model.state_dict(keep_vars=True))
    modules = list(model.named_modules(remove_duplicate=False))
    description = {
        "packed": packed,
        "quantizers": quantizers,
        "swapped": [name for name, module in modules if isinstance(module, (QuantConv2d, QuantLinear))],
        "identities": [name for name, module in modules if isinstance(module, nn.Identity) and not _is_slot(name)],
        "aliases": aliases,
        "structure": _structure(model),
    }
    # Only where there are any, so that a file without them is what it always was.
    description |= {key: value for key, value in (("own", own), ("wrapped", _wrapped(model))) if value}
    header = {"version": VERSION, "sha256": _digest(tensors, description), "description": description}
    # One entry: safetensors writes several in random order, and the same model must give the same bytes.
    metadata = {FORMAT: json.dumps(header, sort_keys=True)}
    target = Path(path)
    write_atomically(target, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return target


def load_packed(path: str | os.PathLike[str], skeleton: nn.Module) -> nn.Module:
    """Read a packed model.

    Args:
        path: A file written by `save_packed`.
        skeleton: A model of the same architecture, such as the float model it was made from. Not changed; its weights
            do not matter.

    Returns:
        The packed model, in evaluation mode, with the outputs of the one that was saved.

    Raises:
        FormatError: The file is not of this format or version, is damaged, or was made from a model of another
            architecture: other shapes, geometries or types of layers.
        OSError: The file cannot be opened; `FileNotFoundError` where there is none.
    """
    tensors, description = _read(Path(path))
    try:
        model = _rebuild(share(skeleton), description)
        _assign(model, tensors, description["aliases"])
        _check_structure(description["structure"], _structure(model))
    except _MISFIT as error:
        raise FormatError(
            f"{path} does not fit a {type(skeleton).__name__}: {error}; pass a model of the architecture that was "
            "packed"
        ) from error
    return model.eval()


def _check_packed(model: nn.Module) -> None:
    for path, module in model.named_modules():
        quantized = isinstance(module, (QuantConv2d, QuantLinear)) and isinstance(module.weight_quantizer, Quantizer)
        if quantized or isinstance(module, Observer) or packed_form.dispatch(type(module)) is not _NO_FORM:
            raise StateError(f"{path or 'the model'} holds a {type(module).__name__}: call pack() before save_packed()")


def _rebuild(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    """Give the skeleton the modules of the packed model, without their tensors."""
    for module in model.modules():
        for slot, child, _ in layers.slots(module):
            if isinstance(child, (Observer, Quantizer)):
                setattr(module, slot, nn.Identity())
    model = wrap_units(unwrap_units(model), description.get("wrapped", ()))
    for name in description["identities"]:
        folded = model.get_submodule(name)
        if not isinstance(folded, (nn.Identity, nn.BatchNorm1d, nn.BatchNorm2d)):
            raise FormatError(f"{name} is {type(folded).__name__}, where the file has a folded batch norm or nothing")
        replace_submodule(model, name, nn.Identity())
    new: dict[int, nn.Module] = {}
    loaded: dict[str, PackedTensor] = {}
    own = description.get("own", {})
    for name, entry in own.items():
        layer = model.get_submodule(name)
        if id(layer) not in new:
            new[id(layer)] = _rebuild_own(name, layer, entry)
    for name, entry in description["packed"].items():
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        _check_shape(owner, layer, entry)
        words = f"{name}.words"
        weight = loaded.setdefault(description["aliases"].get(words, words), _read_packed(entry))
        if owner in own:
            setattr(new[id(layer)], attribute, weight)
        else:
            new.setdefault(id(layer), pack_layer(layer, weight, nn.Identity()))
    for name in description["swapped"]:
        layer = model.get_submodule(name)
        new.setdefault(id(layer), DEFAULT_LAYERS[type(layer)](layer))
    model = replace_modules(model, new)
    for name, entry in description["quantizers"].items():
        replace_submodule(model, name, Quantizer(_read_grid(entry["grid"]), _read_rounding(name, entry)))
    return model


def _rebuild_own(name: str, layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    if "form" not in entry:
        return rebuild(layer, entry)
    kind = _find(entry["form"], rebuild.registry)
    if kind is None:
        raise FormatError(f"{name} was packed as a {entry['form']!r}, {_UNKNOWN}")
    packed: nn.Module = rebuild.dispatch(kind)(layer, entry)
    return packed


def _structure(model: nn.Module) -> dict[str, Any]:
    """Describe what the tensors do not tell: the type of every leaf, and the geometry of every convolution."""
    structure: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            arguments = layers.conv_arguments(module)
            # Through JSON a tuple comes back as a list. A fold adds the bias, whose tensor speaks for itself.
            structure[path] = {key: _plain(value) for key, value in arguments.items() if key != "bias"}
        elif not any(module.children()):
            structure[path] = type(module).__name__
    return structure


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_structure(saved: dict[str, Any], given: dict[str, Any]) -> None:
    for path in sorted(saved.keys() | given.keys()):
        if saved.get(path) != given.get(path):
            here, there = _show(given.get(path)), _show(saved.get(path))
            raise FormatError(f"{path or 'the model itself'} is {here}, the file was written with {there}")


def _show(entry: Any) -> str:
    if isinstance(entry, dict):
        return "a convolution with " + ", ".join(f"{key}={value}" for key, value in entry.items())
    return "absent" if entry is None else str(entry)


def _check_shape(name: str, layer: nn.Module, entry: dict[str, Any]) -> None:
    shape = tuple(entry["shape"])
    wanted: tuple[int, ...] = shape
    if isinstance(layer, nn.Conv2d):
        wanted = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    elif isinstance(layer, nn.Linear):
        wanted = (layer.out_features, layer.in_features)
    if shape != wanted:
        raise FormatError(f"{name or 'the layer'} has a weight of shape {wanted}, the file one of shape {shape}")
    if any(size != 1 for size in entry["grid"]["tiles"]):  # a scale of one element tiles every tensor
        check_tiling(tuple(entry["grid"]["tiles"]), shape)


def _assign(model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    """Put the tensors of the file in place of the model's, one for all names of a tensor."""
    named = tensors | {name: tensors[canonical] for name, canonical in aliases.items()}
    for name, module in model.named_modules():
        # A layer got a bias when its batch norm was folded.
        key = f"{name}.bias" if name else "bias"
        if key in named and module._parameters.get("bias", key) is None:
            module.bias = nn.Parameter(torch.empty_like(named[key]), requires_grad=False)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in named:
            tensor = named[name]
            named[name] = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    # A state that torch made carries the version of each module's layout, which some modules insist on.
    state = model.state_dict()
    state.clear()
    state.update(named)
    model.load_state_dict(state, strict=True, assign=True)


def write_atomically(target: Path, write: Any) -> None:
    """Let `write` fill a temporary file beside `target`, flush it to disk, then rename it.

    Args:
        target: The final path; its folder is made.
        write: Called with the temporary path.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _unique(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep every tensor once; a second name for the same tensor becomes an alias."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise StateError(f"state_dict entry {name!r} is a {type(tensor).__name__}: the format holds tensors only")
        canonical = first.setdefault(id(tensor), name)
        if canonical == name:
            tensors[name] = tensor.detach().contiguous().cpu().clone()
        else:
            aliases[name] = canonical
    return tensors, aliases


def _digest(tensors: dict[str, Tensor], description: Any) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise FormatError(f"{path} is not a sound safetensors file: {error}") from error
    if FORMAT not in metadata:
        raise FormatError(f"{path} has no {FORMAT!r} in its metadata: expected a file written by save_packed()")
    try:
        header = json.loads(metadata[FORMAT])
        version, sha256, description = header.get("version"), header.get("sha256"), header.get("description")
    except (ValueError, AttributeError) as error:
        raise FormatError(
            f"{path} is damaged: its {FORMAT!r} metadata cannot be read: {error}; copy it again"
        ) from error
    if version != VERSION:
        raise FormatError(f"{path} has version {version!r} of the format: this release reads {VERSION}")
    if not isinstance(description, dict) or _digest(tensors, description) != sha256:
        raise FormatError(f"{path} is damaged: its SHA-256 is not the one it was written with; copy it again")
    return tensors, description


def _is_slot(name: str) -> bool:
    return name.endswith(layers.SLOT_SUFFIX)


def _describe_grid(grid: Grid) -> dict[str, Any]:
    codes = {"qmin": grid.qmin, "qmax": grid.qmax, "tiles": list(grid.tile_shape)}
    if isinstance(grid, UniformGrid):
        return {"kind": "uniform", "zero_point": grid.zero_point is not None, **codes}
    if isinstance(grid, CodebookGrid):
        return {"kind": "codebook", **codes}
    raise StateError(f"grid of type {type(grid).__name__} is not frozen: call pack() before save_packed()")


def _describe_own(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if (entry := describe(module)) is not None:
            yield name, entry | ({"form": _type_name(type(module))} if type(module) in rebuild.registry else {})


def _wrapped(model: nn.Module) -> list[str]:
    """List the units, outer ones first."""
    units = {path: module for path, module in model.named_modules() if isinstance(module, QuantUnit)}
    bodies = {id(unit.body): path for path, unit in units.items()}
    for path, parent in model.named_modules():
        for child in parent._modules.values():
            if id(child) in bodies and path != bodies[id(child)]:
                raise StateError(
                    f"the body of the unit {bodies[id(child)]!r} is also in {path or 'the model'!r}, outside of that "
                    "unit, which the format cannot hold: register the unit in either place"
                )
    return list(units)


def _describe_rounding(name: str, rounding: Rounding) -> dict[str, Any]:
    kind = type(rounding)
    try:
        facts = json.loads(json.dumps(rounding.facts(), allow_nan=False))
        entry = {"rounding": _type_name(kind)} | ({"facts": facts} if facts else {})
        # Whoever cannot build it again must hear it now, not the reader of the file.
        twin = _read_rounding(name, entry)
        if type(twin) is not kind or _layout(twin) != _layout(rounding):
            raise StateError(f"from_facts() made a {type(twin).__name__} with tensors of shapes {_layout(twin)}")
    except _MISFIT as error:
        raise StateError(
            f"{name} rounds with a {kind.__name__}, which the format cannot hold: {error}; finish what it is there "
            "for, or quantize with another rounding, before save_packed()"
        ) from error
    return entry


def _layout(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _type_name(kind: type) -> str:
    """Name a type as a reader finds it among those that are imported; a rounding of this package by one word."""
    return kind.__name__ if kind.__module__ == Rounding.__module__ else f"{kind.__module__}.{kind.__qualname__}"


def _find(name: str, kinds: Iterable[type[_T]]) -> type[_T] | None:
    # The last of that name: what a notebook or a reloaded module defined before may still be alive.
    return next((kind for kind in reversed(list(kinds)) if _type_name(kind) == name), None)


def _roundings() -> list[type[Rounding]]:
    """List the types of roundings that are imported."""
    kinds = Rounding.__subclasses__()
    for kind in kinds:  # grows while it is walked
        kinds += kind.__subclasses__()
    return kinds


# What is read is described first and filled in later, so the placeholders take no memory: the file, not its
# description, decides how much is allocated.


def _read_grid(entry: dict[str, Any]) -> UniformGrid | CodebookGrid:
    tiles, qmin, qmax = tuple(entry["tiles"]), entry["qmin"], entry["qmax"]
    scale = torch.ones(tiles, device="meta")
    if entry["kind"] == "uniform":
        return UniformGrid(scale, scale if entry["zero_point"] else None, qmin=qmin, qmax=qmax)
    return CodebookGrid(scale.unsqueeze(-1).expand(*tiles, qmax - qmin + 1), qmin=qmin)


def _read_rounding(name: str, entry: dict[str, Any]) -> Rounding:
    kind = _find(entry["rounding"], _roundings())
    if kind is None:
        raise FormatError(f"{name} rounds with {entry['rounding']!r}, {_UNKNOWN}")
    with torch.device("meta"):
        return kind.from_facts(entry.get("facts", {})).frozen()


def _read_packed(entry: dict[str, Any]) -> PackedTensor:
    grid, shape = _read_grid(entry["grid"]), tuple(entry["shape"])
    words = torch.zeros(packed_words(math.prod(shape), grid.bits), dtype=torch.int32, device="meta")
    return PackedTensor(words, shape, grid, channels_last=entry["channels_last"])
