"""Weights that others have published, in the networks of this package."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from q_adder.models.resnet import CifarResNet, resnet20
from q_core.errors import FormatError

_PREFIX = "module."  # left behind by torch.nn.DataParallel
_COUNTER = ".num_batches_tracked"  # files without it are complete: nothing here reads it
_SHOWN = 5


def load_published_resnet20(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> CifarResNet:
    """Build the adder ResNet-20 with the weights of a file in the layout of the released one.

    In that layout the weight of an adder layer ends in `.adder` instead of `.weight`, and every key may begin with
    `module.`. The number of classes is that of the file. Keys and shapes are compared before anything is loaded.

    Args:
        source: Path of a safetensors file, or a state dict. For a `.pth` file, pass
            `torch.load(path, map_location="cpu", weights_only=True)`.

    Returns:
        The network, in evaluation mode, float32, on the CPU. It expects images normalised as it was trained; the
        released one was trained with mean (.4914, .4822, .4465) and deviation (.2023, .1994, .2010).

    Raises:
        FormatError: The file is no safetensors file; keys are missing, unexpected, given twice, or of another shape; or
            a value is not a finite real number.

    Source:
        Layout of the network released with Chen et al. 2020, arXiv:1912.13200.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = _renamed(source if isinstance(source, Mapping) else _read(Path(source)), name)
    head = tensors.get("fc.weight")
    model = resnet20(classes=head.shape[0] if head is not None and head.dim() == 4 else 10)
    expected = model.state_dict()
    problems = _differences(tensors, expected)
    if problems:
        raise FormatError(
            f"{name} is no published adder ResNet-20: {'; '.join(problems)}. Keys may begin with {_PREFIX!r}, and "
            "adder weights end in '.adder' or '.weight'"
        )
    model.load_state_dict({**expected, **tensors})
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(
            f"{path} is no safetensors file ({error}): for a .pth file pass the state dict that "
            "torch.load(path, weights_only=True) returns"
        ) from error


def _renamed(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Give every tensor the key it has in this package."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        ours = key.removeprefix(_PREFIX)
        if ours.endswith(".adder"):
            ours = f"{ours.removesuffix('.adder')}.weight"
        if ours in renamed:
            raise FormatError(f"{name} holds {ours} twice, the second time as {key}: remove one of them")
        renamed[ours] = tensor
    return renamed


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Describe every way in which keys, shapes and values are not what the network needs."""
    missing = [key for key in expected if key not in tensors and not key.endswith(_COUNTER)]
    unexpected = [key for key in tensors if key not in expected]
    common = [key for key in expected if key in tensors]
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if tensors[key].shape != expected[key].shape
    ]
    broken = [
        f"{key} ({tensors[key].dtype})"
        for key in common
        if not key.endswith(_COUNTER) and not (tensors[key].is_floating_point() and bool(tensors[key].isfinite().all()))
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("not finite reals", broken))
    return [f"{len(found)} {kind}: {_some(found)}" for kind, found in kinds if found]


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
