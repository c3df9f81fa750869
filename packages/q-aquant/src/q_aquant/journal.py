"""What a run has finished, on disk, so that it goes on after an interruption as if there had been none.

Every finished unit is a file of its own, written at once or not at all. A manifest says of which run the files are; a
run with another model, other images, another plan or another version is refused.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from q_core.checkpoint import write_atomically
from q_core.errors import FormatError, StateError

_MANIFEST, _ENTRY, _VERSION = "manifest.json", "unit", 1


@final
class Journal:
    """The finished units of one run, in a folder.

    Args:
        folder: Where the files are; made if there is none.
        facts: What identifies the run, as plain values: hashes of the model and of the images, the plan, the versions.

    Raises:
        StateError: The folder is of another run; the message names what differs.
        FormatError: The manifest cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.facts = {"journal": _VERSION, **facts}
        manifest = self.folder / _MANIFEST
        text = json.dumps(self.facts, sort_keys=True, indent=1)
        if not manifest.exists():
            if left := next(self.folder.glob("unit-*.safetensors"), None):
                raise StateError(
                    f"{self.folder} holds {left.name} but no {_MANIFEST}, so nobody knows of which run it is: give "
                    "this run another folder, or delete that one"
                )
            write_atomically(manifest, lambda path: Path(path).write_text(text, encoding="utf-8"))
            return
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise FormatError(
                f"{manifest} cannot be read: {error}; give the run another folder, or delete this one"
            ) from error
        wanted = json.loads(text)
        names = sorted(wanted.keys() | found.keys()) if isinstance(found, dict) else []
        differs = [name for name in names if wanted.get(name) != found.get(name)]
        if differs or not isinstance(found, dict):
            shown = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in differs[:3])
            raise StateError(
                f"{self.folder} holds the units of another run: {shown or 'no manifest of a run'}. Give this run "
                "another folder, or delete that one"
            )

    def read(self, number: int, path: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what was written of a unit, or None if it was not finished.

        Raises:
            FormatError: The file is damaged, or of another unit.
        """
        file = self._file(number)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                entry = json.loads((opened.metadata() or {})[_ENTRY])
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            log = dict(entry["log"])
            sound = entry["sha256"] == _seal(state, path, log) and entry["path"] == path
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{file} is damaged: {error}; delete it, and the unit {path} is learned again") from error
        if not sound:
            raise FormatError(
                f"{file} is damaged, or of another unit than {path}: delete it, and the unit is learned again"
            )
        return log, {name: tensor for name, tensor in state.items() if name}

    def write(self, number: int, path: str, log: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Write a finished unit.

        Args:
            number: Its place in the order of execution.
            path: Its path in the model.
            log: What became of it, as plain values.
            state: What it learned; empty if it stayed as it was.
        """
        tensors = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in state.items()}
        entry = {"path": path, "log": log, "sha256": _seal(tensors, path, log)}
        metadata = {_ENTRY: json.dumps(entry, sort_keys=True)}
        write_atomically(self._file(number), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def _file(self, number: int) -> Path:
        return self.folder / f"unit-{number:04d}.safetensors"


def _seal(tensors: dict[str, Tensor], path: str, log: dict[str, Any]) -> str:
    """Return the SHA-256 of everything that is written of a unit."""
    said = json.dumps([path, log], sort_keys=True)
    return hashlib.sha256(f"{digest(tensors)} {said}".encode()).hexdigest()


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
