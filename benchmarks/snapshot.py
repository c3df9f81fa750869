"""A training state in one file of plain tensors: safetensors, with the rest of the state as JSON in its header."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from q_core.checkpoint import write_atomically
from q_core.errors import FormatError

_KEY = "state"


def save(path: pathlib.Path, state: Mapping[str, Any]) -> None:
    """Write a nested state of tensors, numbers and words; what was there before stays until all is written."""
    tensors: dict[str, Tensor] = {}
    header = {_KEY: json.dumps(_taken(state, "", tensors))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read what `save` wrote; a tuple has become a list.

    Raises:
        FormatError: The file is damaged, or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return _given(header, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} is damaged, or no snapshot ({type(error).__name__}: {error}): bring it back from a copy, or "
            "remove it to start anew"
        ) from error


def _taken(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a nested state aside, so that the rest is JSON."""
    if isinstance(state, Tensor):
        key = f"{len(tensors)}{path}"  # paths alone may be equal, as keys have dots
        tensors[key] = state.detach().contiguous().clone()
        return {"tensor": key}
    if isinstance(state, Mapping):
        return {"pairs": [[key, _taken(value, f"{path}.{key}", tensors)] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"items": [_taken(value, f"{path}.{place}", tensors) for place, value in enumerate(state)]}
    return {"value": state}


def _given(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_taken`."""
    if "tensor" in state:
        return tensors[state["tensor"]]
    if "pairs" in state:
        return {key: _given(value, tensors) for key, value in state["pairs"]}
    if "items" in state:
        return [_given(value, tensors) for value in state["items"]]
    return state["value"]
