"""The pretrained CIFAR networks of the accuracy sessions: weights, normalisation, and the accuracy they must show."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from images import load, normalize
from models.cifar import resnet20, resnet20v, resnet56

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with published weights.

    Attributes:
        dataset: `cifar10` or `cifar100`.
        read: Makes the network with the weights of a file.
        moments: Mean and standard deviation per channel of its training.
        correct: Test images of 10,000 that the float network classifies correctly.
        train: Split from which calibration images are drawn.
    """

    dataset: str
    read: Callable[[pathlib.Path], nn.Module]
    moments: tuple[tuple[float, ...], tuple[float, ...]]
    correct: int
    train: str

    def load(self, directory: pathlib.Path, name: str) -> nn.Module:
        """Build the network with its weights, in evaluation mode."""
        return self.read(directory / "networks" / f"{name}.safetensors").eval()

    def test(self, directory: pathlib.Path) -> tuple[Tensor, Tensor]:
        """Return the normalised test images and their labels. For reporting only."""
        images, labels = load(directory, f"{self.dataset}-test")
        return normalize(images, *self.moments), torch.from_numpy(labels)

    def augmented(self, directory: pathlib.Path, batches: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Yield batches of training images in their order, cropped at random with 4 pixels of padding, and flipped."""
        generator = torch.Generator().manual_seed(seed)
        parts = -(-batches * batch // 10_000)
        images = np.concatenate([load(directory, f"{self.dataset}-train-{part + 1}")[0] for part in range(parts)])
        padded = np.pad(images[: batches * batch], ((0, 0), (4, 4), (4, 4), (0, 0)))
        for start in range(0, len(padded), batch):
            part = torch.from_numpy(padded[start : start + batch])
            yield normalize(crop(part, generator).numpy(), *self.moments)

    def calibration(self, directory: pathlib.Path, count: int, seed: int, copies: int = 1) -> Tensor:
        """Return `count` normalised training images, drawn without labels and without replacement.

        With more than one copy, all but the last eighth of the images come as many times, the further copies cropped at
        random with 4 pixels of padding and flipped. The last eighth, which judges, stays last and as it is: hold out
        `count // 8`.
        """
        images, _ = load(directory, self.train)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        drawn = images[chosen.numpy()]
        teaching = drawn[: count - count // 8]
        padded = torch.from_numpy(np.pad(teaching, ((0, 0), (4, 4), (4, 4), (0, 0))))
        generator = torch.Generator().manual_seed(seed + 1)
        further = [crop(padded, generator).numpy() for _ in range(copies - 1)]
        return normalize(np.concatenate([*further, drawn]), *self.moments)


def crop(padded: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a window of 32 by 32 out of each image [n, 40, 40, 3] at random, and mirror half of them."""
    count = len(padded)
    place = torch.randint(0, padded.shape[1] - 31, (2, count), generator=generator)
    columns = torch.arange(32).expand(count, 32)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows = place[0][:, None] + torch.arange(32)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], (place[1][:, None] + columns)[:, None, :]]


def _strictly(build: Callable[[], nn.Module]) -> Callable[[pathlib.Path], nn.Module]:
    def read(path: pathlib.Path) -> nn.Module:
        model = build()
        model.load_state_dict(load_file(path), strict=True)
        return model

    return read


def _adder(path: pathlib.Path) -> nn.Module:
    from q_adder.models import load_published_resnet20  # of a package that not every user of this file has

    return load_published_resnet20(path)


NETWORKS = {
    "cifar10-resnet20": Pretrained("cifar10", _strictly(resnet20), IMAGENET, 9173, "cifar10-train-1"),
    "cifar10-resnet56": Pretrained("cifar10", _strictly(resnet56), IMAGENET, 9339, "cifar10-train-1"),
    "cifar100-resnet20v": Pretrained("cifar100", _strictly(resnet20v), CIFAR100, 6969, "cifar100-train-balanced-10k"),
}
ADDERS = {
    "cifar10-adder-resnet20": Pretrained("cifar10", _adder, CIFAR10, 9182, "cifar10-train-1"),
}


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> int:
    """Count the images that the model classifies correctly."""
    hits = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        hits += int((model(x).argmax(1) == y).sum())
    return hits
