"""Rows of evidence: one measured accuracy with everything needed to measure it again.

A row says what was measured, on what, with which settings, and what stayed float meanwhile, because a figure without
these cannot be compared with another. Rows are JSON objects, one a line in a file that is only ever appended to.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import q_core
from q_core.layers import SLOT_SUFFIX, QuantUnit, slots
from q_core.swap import SwapReport, plain_path

TOP1 = "top1_percent"
"""Metric of every classification row: correct images of all images, in percent."""

_UNSEEN = ("biases", "operators written as functions (additions, concatenations), pooling and activation functions")


@dataclasses.dataclass(frozen=True)
class AccuracyRow:
    """One accuracy, and how it came about.

    Attributes:
        network: Name of the architecture.
        dataset: Name of the images it was evaluated on.
        method: Name of the method, `"float"` for the model before quantization.
        weight_bits: Bits of the weights of the inner layers, 1 to 8, or 32 for float.
        activation_bits: Bits of the activations of the inner layers, 1 to 8, or 32 for float.
        seed: Seed of everything random.
        metric: What `value` is, such as `"top1_percent"`.
        value: The figure, in the unit that `metric` names.
        samples: Number of samples it was measured on.
        stays_float: What is computed in float, one entry each.
        settings: Options of the method, the data and the preprocessing; and sizes and times beside the accuracy.
        command: The command that makes this row again.
        checkpoint_sha256: `state_sha256` of the float model.
        commit: Commit of the source that ran, see `environment`.
        versions: Version of each package that matters.
        device: Processor and threads.
        date: Time of the measurement, UTC, ISO 8601.
    """

    network: str
    dataset: str
    method: str
    weight_bits: int
    activation_bits: int
    seed: int
    metric: str
    value: float
    samples: int
    stays_float: tuple[str, ...]
    settings: Mapping[str, Any]
    command: str
    checkpoint_sha256: str
    commit: str | None
    versions: Mapping[str, str]
    device: str
    date: str


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and when something was measured.

    Attributes:
        commit: Commit of the checkout that this package runs from, with `+changes` where a Python file differs from
            it; None where the package is installed or git is absent.
        versions: Version of each package that matters.
        device: Processor and threads.
        date: UTC, ISO 8601, to the second.
    """

    commit: str | None
    versions: dict[str, str]
    device: str
    date: str


def environment(packages: Sequence[str] = ()) -> Environment:
    """Describe this machine and this moment.

    Args:
        packages: Distributions whose versions matter beside Python, torch, numpy and this package.
    """
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "q_core": q_core.__version__,
    }
    versions |= {name: metadata.version(name) for name in packages}
    device = f"{_processor()}, {torch.get_num_threads()} threads"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Environment(source_commit(Path(__file__)), versions, device, date)


def append_jsonl(path: str | os.PathLike[str], row: object) -> None:
    """Append a dataclass as one line of JSON.

    Args:
        path: The file; it and its folder are made when absent.
        row: An instance of a dataclass, such as `AccuracyRow`.

    Raises:
        ValueError: The row holds a NaN or an infinity, which JSON cannot hold.
    """
    line = json.dumps(dataclasses.asdict(row), allow_nan=False)  # type: ignore[call-overload]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def state_sha256(model: nn.Module) -> str:
    r"""Return the SHA-256 of the weights of a model, whatever file they came from.

    The digest runs over the entries of the `state_dict` in the order of their names: for each, the text
    `"<name> <dtype> <shape>\n"` in UTF-8, such as `"fc.bias torch.float32 (10,)\n"`, then its elements in row-major
    order as little-endian bytes.

    Args:
        model: The float model.
    """
    digest = hashlib.sha256()
    state: dict[str, Tensor] = model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def float_parts(model: nn.Module, report: SwapReport) -> tuple[str, ...]:
    """List what a quantized model computes in float.

    Args:
        model: The quantized model.
        report: What was swapped.

    Returns:
        Modules that were left alone, slots that were left empty, and what no module shows. An empty slot of an input
        that the report gives bits to is not among them: the tensor is quantized where it is made.
    """
    parts = [f"{layer.path or 'the model'} ({layer.kind}): {layer.reason}" for layer in report.stays_float]
    places = _places(model)
    for layer in report.swapped:
        for name, child, parameter in slots(places[layer.path]):
            moved = parameter is None and layer.input is not None and name == f"input{SLOT_SUFFIX}"
            if isinstance(child, nn.Identity) and not moved:
                parts.append(f"{layer.path or 'the model'} ({layer.kind}): its {name.removesuffix(SLOT_SUFFIX)}")
    return (*parts, *_UNSEEN)


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """Name every module as it is, and as if no method had put units around parts after the report was made."""
    modules = dict(model.named_modules(remove_duplicate=False))
    bare = {plain_path(model, path): module for path, module in modules.items() if not isinstance(module, QuantUnit)}
    return modules | bare


def source_commit(file: Path) -> str | None:
    """Return the commit of the checkout that a file belongs to.

    Args:
        file: A source file.

    Returns:
        The commit, with `+changes` where a Python file of the checkout differs from it; None when the file is not
        under version control.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside a checkout of something else, so the file itself must be under version control.
    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    changed = git("status", "--porcelain", "--", ":(top)*.py")
    return f"{git('rev-parse', 'HEAD')}{'+changes' if changed else ''}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
