"""What an example shows of a model: which modules run on what, where the data flow joins, what is handed on.

Everything is seen from outside, while the example runs: hooks tell which modules are called, and a dispatch mode which
operators read which tensors. So functions written between modules are seen as well, and no graph of the model is
needed. What cannot be seen is a path that the example does not take.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from q_core.calibrate import evaluation
from q_core.errors import DataError, MatchError, SpecError, StateError
from q_core.layers import slots
from q_core.swap import swappable

_JOINS = ("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::cat", "aten::stack")
"""Operators that end a fork. A product does not: it gates one path by another, as squeeze-and-excitation does."""


@dataclasses.dataclass
class _Call:
    """What the calls of one module had in common: how often, and why it cannot be a unit, if so."""

    count: int = 0
    problem: str = ""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What one example shows of a model: which modules run, on what, and where the data flow joins.

    Each storage remembers the layers that its values come from. An operator whose operands come from different layers
    joins paths. Storages are told apart by address; one that is used again is written anew by an operator.

    Attributes:
        paths: First path of every module, by its `id`.
        names: Module at every path.
        layers: Convolutions and linear layers that can be quantized.
        skipped: Paths of those the caller does not want.
        wanted: Paths of the others.
        order: Paths of the wanted ones in the order in which they ran; twice if they ran twice.
        first: When each module that ran was first entered.
        joins: For every join the modules around it, outermost first, and the layers on the paths that it joins.
    """

    def __init__(self, model: nn.Module, example: Any, skip: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.names = dict(model.named_modules(remove_duplicate=False))
        self.layers = _layers(model)
        self._members: dict[str, frozenset[int]] = {}
        self.skipped = {path for given in skip for path in self._below(given)}
        self.wanted = {path for path in self.layers if path not in self.skipped}
        self.order: list[str] = []
        self.calls: dict[str, _Call] = {}
        self.first: dict[str, int] = {}
        self.joins: list[tuple[tuple[str, ...], frozenset[str]]] = []
        self.images = _images(example)
        self._stack: list[str] = []
        self._origins: dict[int, frozenset[str]] = dict.fromkeys(_keys(example), frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        origins = [self._origins[key] for key in _keys((args, kwargs)) if key in self._origins]
        if len(origins) > 1 and func._schema.name in _JOINS:
            union, common = frozenset[str]().union(*origins), origins[0].intersection(*origins[1:])
            if union - common:
                self.joins.append((tuple(self._stack), union - common))
        out = func(*args, **(kwargs or {}))
        for key in _keys(out):
            if origins:
                self._origins[key] = frozenset[str]().union(*origins)
            else:
                self._origins.pop(key, None)
        return out

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a module runs."""
        path = self.paths[id(module)]
        self._stack.append(path)
        self.first.setdefault(path, len(self.first))
        call = self.calls.setdefault(path, _Call())
        call.count += 1
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            given = [type(each).__name__ for each in args] + [f"{name}=" for name in kwargs]
            call.problem = f"is called with ({', '.join(given)}), allowed is one tensor by position"
        elif self.images is not None and args[0].shape[:1] != (self.images,):
            call.problem = f"takes a tensor of shape {tuple(args[0].shape)} where the example has {self.images} images"
        if path in self.wanted:
            self.order.append(path)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a module ran."""
        path = self._stack.pop()
        call = self.calls[path]
        if not isinstance(output, Tensor):
            call.problem = f"returns a {type(output).__name__}, allowed is one tensor"
        elif self.images is not None and output.shape[:1] != (self.images,):
            call.problem = f"returns a tensor of shape {tuple(output.shape)} where the example has {self.images} images"
        if path in self.layers:
            # What a layer makes of constants, such as a bias of positions, comes from no path of the data.
            for key in set(_keys(output)) & self._origins.keys():
                self._origins[key] |= {path}

    def contains(self, outer: str, inner: str) -> bool:
        """Tell whether a module is, or is in, another one."""
        if outer not in self._members:
            self._members[outer] = frozenset(map(id, self.names[outer].modules()))
        return id(self.names[inner]) in self._members[outer]

    def layers_of(self, path: str) -> list[str]:
        """List the layers in a module, in the order of execution."""
        return [layer for layer in self.order if self.contains(path, layer)]

    def problem(self, path: str) -> str:
        """Say why a module cannot be a unit; empty if it can."""
        call = self.calls.get(path, _Call())
        if call.count != 1:
            return f"runs {call.count} times in one forward pass, allowed is once"
        inside = self.layers_of(path)
        again = next((layer for layer in inside if inside.count(layer) > 1), None)
        if again is not None:
            return f"runs its layer {again!r} {inside.count(again)} times in one forward pass, allowed is once"
        return call.problem

    def find(self, what: str, path: str) -> str:
        """Return the first path of the module at a path that the caller gave.

        Raises:
            MatchError: There is none.
        """
        if path not in self.names:
            near = difflib.get_close_matches(path, [each for each in self.names if each], n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else "see model.named_modules()"
            raise MatchError(f"{what}: no module is at {path!r} in a {type(self.model).__name__} ({hint})")
        first: str = self.paths[id(self.names[path])]
        return first

    def check(self, path: str, advice: str) -> None:
        """Refuse a module that cannot be a unit.

        Raises:
            StateError: It cannot.
        """
        if problem := self.problem(path):
            kind = type(self.names[path]).__name__
            raise StateError(f"unit {path or 'the model'!r}, a {kind}, {problem}: {advice}")

    def _below(self, path: str) -> list[str]:
        found = self.find("skip", path)
        return [layer for layer in self.layers if self.contains(found, layer)]


@dataclasses.dataclass
class Fact:
    """What holds of one unit: see `q_aquant.units.Unit`."""

    chained: bool
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()


class Look:
    """How the units of a model hang together: whether tensors are the very same, not merely equal."""

    def __init__(self, seen: Watch, units: Sequence[str]) -> None:
        self.seen, self.units = seen, frozenset(units)
        self.facts: dict[str, Fact] = {}
        self.order: dict[str, list[str]] = {}
        self.readers: dict[str, list[str]] = {}
        self._inside: tuple[str, tuple[Tensor, int]] | None = None
        self._last: tuple[Tensor, int] | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a unit or a layer runs."""
        path = self.seen.paths[id(module)]
        if path in self.units:
            x = args[0]
            self.facts[path] = Fact(_same(x, self._last), tuple(x.shape[1:]))
            self._inside = path, (x, _version(x))
            self._last = None  # lets the tensor go
            self.order[path], self.readers[path] = [], []
        if path in self.seen.wanted and self._inside is not None:
            unit, given = self._inside
            self.order[unit].append(path)
            if any(_same(each, given) for each in (*args, *kwargs.values())):
                self.readers[unit].append(path)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a unit or a layer ran."""
        path = self.seen.paths[id(module)]
        if path in self.units:
            self._inside = None
            self.facts[path].output_shape = tuple(output.shape[1:])
            self._last = output, _version(output)


def _same(x: Any, seen: tuple[Tensor, int] | None) -> bool:
    """Tell whether a tensor is the one seen before, and nothing was written into it since."""
    return seen is not None and x is seen[0] and _version(seen[0]) == seen[1]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def watch(model: nn.Module, example: Any, skip: Sequence[str]) -> Watch:
    """Run an example in evaluation mode and see what happens.

    Args:
        model: A model. Not changed.
        example: One input, a tuple of positional inputs, or a mapping of keyword inputs.
        skip: Paths of modules whose layers are not wanted.

    Raises:
        DataError: The example holds no tensor.
        MatchError: A path of `skip` is not in the model, or no wanted layer runs.
    """
    if not _tensors(example):
        raise DataError(f"example of type {type(example).__name__} holds no tensor: pass an input of the model")
    seen = Watch(model, example, strings("skip", skip))
    with evaluation(model), _hooked(model.modules(), seen), seen:
        _call(model, example)
    if not seen.order:
        raise MatchError(
            f"a {type(model).__name__} has no convolution or linear layer that runs and is not skipped: nothing can be "
            "reconstructed"
        )
    return seen


def look(seen: Watch, example: Any, units: Sequence[str]) -> "Look":
    """Run the example again and see how units hang together.

    Args:
        seen: The first run.
        example: The same as in the first run.
        units: Paths of modules that can be units and do not contain one another.
    """
    again = Look(seen, units)
    modules = [seen.names[path] for path in dict.fromkeys([*units, *seen.order])]
    with evaluation(seen.model), _hooked(modules, again):
        _call(seen.model, example)
    return again


def strings(name: str, given: Sequence[Any]) -> Sequence[Any]:
    """Refuse one string where several are meant, which would be taken for its letters.

    Raises:
        SpecError: It is one string.
    """
    if isinstance(given, str):
        raise SpecError(f"{name}={given!r} is one string: give a tuple, such as ({given!r},)")
    return given


@contextmanager
def _hooked(modules: Iterable[nn.Module], watch: Watch | Look) -> Iterator[None]:
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watch.leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _images(example: Any) -> int | None:
    first = _tensors(example)[0]
    return first.shape[0] if first.ndim else None


def _keys(value: Any) -> list[int]:
    """Addresses of the storages of the tensors in a value; sparse ones have none."""
    return [each.untyped_storage()._cdata for each in _tensors(value) if each.layout is torch.strided]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers that can be quantized, or are."""
    candidates = swappable(model)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and (path in candidates or any(True for _ in slots(module)))
    }
