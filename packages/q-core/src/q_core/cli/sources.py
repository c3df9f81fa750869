"""Where the command finds a model, its weights, images and a method.

A model is a name of torchvision or a function in a Python file; images are folders, a data set of torchvision, or again
a function; a method is one that an installed package registers, or a function. torchvision is imported only when asked
for. A Python file that is named is run: it is the user's own.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from q_core import methods
from q_core.errors import BackendError, DataError, FormatError, MatchError, SpecError
from q_core.methods import Quantized

METHODS = "q_core.methods"
TORCHVISION = "torchvision:"

Channels = tuple[float, float, float]

NORMALISATION: dict[str, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the red, green and blue of the training images, in units of the largest value."""


@dataclasses.dataclass(frozen=True)
class Images:
    """What to calibrate with and what to measure on.

    Attributes:
        name: Name of the evaluation images.
        calibration: Batches for the methods.
        evaluation: Batches `(images, labels)`.
        settings: How the images were prepared.
    """

    name: str
    calibration: Iterable[Any]
    evaluation: Iterable[Any]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How images become tensors and batches.

    Attributes:
        samples: Images to calibrate with, drawn without replacement.
        batch_size: Images in a batch.
        seed: Seed of the draw.
        workers: Processes that read images beside the main one.
        normalisation: Mean and standard deviation per channel; None means those of the data set.
        resize: Pixels of the shorter side of an image from a folder.
        crop: Pixels of either side of its central cut-out.
    """

    samples: int
    batch_size: int
    seed: int
    workers: int
    normalisation: tuple[Channels, Channels] | None
    resize: int
    crop: int


def method(name: str) -> tuple[Callable[..., Quantized], tuple[str, ...]]:
    """Find a method among those that installed packages register under the entry-point group `q_core.methods`.

    Args:
        name: Its name there, or `FILE.py:FUNCTION` for a function with the signature of `q_core.nearest`.

    Returns:
        The method, and the distribution it comes from, if it comes from one.

    Raises:
        MatchError: No installed package has this method; there is no such file or function.
    """
    if ":" in name:
        return _function(name, "--method"), ()
    found = {entry.name: entry for entry in metadata.entry_points(group=METHODS)}
    if name in found:
        package = found[name].dist
        return found[name].load(), (package.name,) if package else ()
    # Run from a source tree that is on the path but not installed, this package has no entry points: its own method is
    # then known by import, those of other packages are not known at all.
    if name == "nearest":
        return methods.nearest, ()
    known = sorted({"nearest", *found})
    raise MatchError(f"method {name!r} is not installed; installed are {', '.join(known)}{_hint(name, known)}")


def model(source: str, weights: Path | None) -> nn.Module:
    """Build a model and load its weights.

    Args:
        source: `torchvision:NAME`, or `FILE.py:FUNCTION` where the function takes no arguments and returns a module.
        weights: A file for `load_state_dict`; None keeps what the function returned.

    Raises:
        SpecError: The source is neither, or a torchvision model has no weights.
        MatchError: There is no such model, file or function.
        FormatError: The weights cannot be read or do not fit.
        BackendError: torchvision is needed and absent.
    """
    if source.startswith(TORCHVISION):
        if weights is None:
            raise SpecError(f"--model {source} has random weights: give a file of trained ones with --weights")
        built = _torchvision_model(source.removeprefix(TORCHVISION))
    else:
        built = _function(source, "--model")()
        if not isinstance(built, nn.Module):
            raise SpecError(f"--model {source} returned a {type(built).__name__}: a torch.nn.Module is expected")
    if weights is not None:
        _load(built, weights)
    return built.eval()


def function_images(source: str, preparation: Preparation) -> Images:
    """Take batches from `FILE.py:FUNCTION`, a function that returns `(calibration_batches, evaluation_batches)`.

    Raises:
        SpecError: The source is no function in a file, or does not return a pair.
        MatchError: There is no such file or function.
        DataError: A batch holds no tensor.
    """
    pair = _function(source, "--data")()
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise SpecError(
            f"--data {source} returned a {type(pair).__name__}: expected (calibration_batches, evaluation_batches)"
        )
    calibration = list(_first_samples(pair[0], preparation.samples))
    evaluation = list(pair[1]) if isinstance(pair[1], Iterator) else pair[1]
    settings = {"calibration_samples": sum(_size(batch) for batch in calibration)}
    return Images(Path(source).name, calibration, evaluation, settings)


def folder_images(calibration: Path, evaluation: Path, preparation: Preparation) -> Images:
    """Read images from folders with one subfolder per class, prepared as for ImageNet.

    The label of an evaluation image is the position of its subfolder in alphabetical order, so the folder must hold
    every class of the network. Calibration needs no labels, and its folder may hold fewer.

    Raises:
        MatchError: A folder is absent.
        DataError: A folder holds no image.
        BackendError: torchvision is absent.
    """
    torchvision = _torchvision()
    mean, std = preparation.normalisation or NORMALISATION["imagenet"]
    transforms = torchvision.transforms
    transform = transforms.Compose(
        [
            transforms.Resize(preparation.resize),
            transforms.CenterCrop(preparation.crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    def read(folder: Path, option: str) -> Any:
        if not folder.is_dir():
            raise MatchError(f"{option} {folder}: there is no such folder")
        try:
            return torchvision.datasets.ImageFolder(str(folder), transform=transform)
        except FileNotFoundError as error:
            raise DataError(f"{option} {folder}: {error}; a folder of images per class is expected") from error

    train, test = read(calibration, "--calib"), read(evaluation, "--eval")
    text = f"resize {preparation.resize}, centre crop {preparation.crop}, mean {mean}, std {std}"
    return _images(evaluation.name, train, test, preparation, f"{text}, {len(test.classes)} classes")


def cifar_images(name: str, folder: Path, download: bool, preparation: Preparation) -> Images:
    """Read CIFAR-10 or CIFAR-100: calibrate with training images, evaluate on the test images.

    Args:
        name: `"cifar10"` or `"cifar100"`.
        folder: Where torchvision keeps the data set.
        download: Whether to fetch it if it is not there.
        preparation: How images become batches.

    Raises:
        DataError: The data set is not in the folder.
        BackendError: torchvision is absent.
    """
    torchvision = _torchvision()
    mean, std = preparation.normalisation or NORMALISATION[name]
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        train, test = (kind(str(folder), train=part, transform=transform, download=download) for part in (True, False))
    except RuntimeError as error:
        raise DataError(f"--data {name}: {error}; --data-dir names its folder, --download fetches it there") from error
    return _images(name, train, test, preparation, f"mean {mean}, std {std}")


def _images(name: str, train: Dataset[Any], test: Dataset[Any], preparation: Preparation, transform: str) -> Images:
    count = len(train)  # type: ignore[arg-type]
    # A folder is sorted by class, so the first images would be of one class: draw.
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(preparation.seed))[: preparation.samples]
    part = Subset(train, sorted(drawn.tolist()))

    def batches(data: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(data, batch_size=preparation.batch_size, num_workers=preparation.workers)

    settings = {"calibration_samples": len(part), "transform": transform}
    return Images(name, batches(part), batches(test), settings)


def _first_samples(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """Pass whole batches on until they hold as many samples as asked for."""
    count = 0
    for batch in batches:
        if count >= samples:
            return
        count += _size(batch)
        yield batch


def _size(batch: Any) -> int:
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    if not isinstance(first, Tensor):
        raise DataError(f"calibration batch of type {type(batch).__name__} starts with no tensor")
    return len(first)


def _torchvision() -> Any:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        # Beside a torch of another build its compiled operators fail to register, with a RuntimeError.
        raise BackendError(
            f"torchvision cannot be imported ({error}): install the ordinary pair with pip install torch torchvision, "
            "or give a Python file to --model and --data"
        ) from error
    return torchvision


def _torchvision_model(name: str) -> nn.Module:
    models = _torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        example = f"it has {len(known)}, such as resnet18"
        raise MatchError(f"torchvision has no classifier {name!r}; {example}{_hint(name, known)}")
    built: nn.Module = models.get_model(name, weights=None)
    return built


def _load(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise MatchError(f"--weights {path}: there is no such file")
    state = _read_state(path)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FormatError(f"--weights {path} do not fit the model: {error}") from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise FormatError(f"--weights {path} is not a sound safetensors file: {error}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the reader raises on a foreign file is not documented
        raise FormatError(
            f"--weights {path} cannot be read as plain tensors: {str(error).splitlines()[0]}; save the state_dict of "
            "the model as a safetensors file"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(f"--weights {path} holds a {type(loaded).__name__}: a state_dict of tensors is expected")
    return state


def _function(source: str, option: str) -> Callable[..., Any]:
    file, separator, name = source.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise SpecError(f"{option} {source}: expected FILE.py:FUNCTION" + _OTHERS[option])
    path = Path(file).resolve()
    if not path.is_file():
        raise MatchError(f"{option} {source}: there is no file {file}")
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise MatchError(f"{option} {source}: {path.name} has no function {name!r}{_hint(name, known)}")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _beside(path):
            return function(*args, **kwargs)

    return call


_OTHERS = {
    "--model": ", or torchvision:NAME such as torchvision:resnet18",
    "--data": ", cifar10 or cifar100",
    "--method": ", or the name of an installed method",
}


def _module(path: Path) -> Any:
    # A name of its own, so that it does not hide an installed module; registered, because dataclasses look it up.
    name = f"_q_quantize_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MatchError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _beside(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let a file import its neighbours, as it could if Python ran it."""
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.path.remove(str(path.parent))


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
