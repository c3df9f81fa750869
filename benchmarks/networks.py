"""The pretrained CIFAR networks of the accuracy sessions: weights, normalisation, and the accuracy they must show."""

import dataclasses
import pathlib
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from images import load, normalize
from models.cifar import resnet20, resnet20v, resnet56

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with published weights.

    Attributes:
        dataset: `cifar10` or `cifar100`.
        build: Makes the network.
        moments: Mean and standard deviation per channel of its training.
        correct: Test images of 10,000 that the float network classifies correctly.
        train: Split from which calibration images are drawn.
    """

    dataset: str
    build: Callable[[], nn.Module]
    moments: tuple[tuple[float, ...], tuple[float, ...]]
    correct: int
    train: str

    def load(self, directory: pathlib.Path, name: str) -> nn.Module:
        """Build the network with its weights, in evaluation mode."""
        model = self.build()
        model.load_state_dict(load_file(directory / "networks" / f"{name}.safetensors"), strict=True)
        return model.eval()

    def test(self, directory: pathlib.Path) -> tuple[Tensor, Tensor]:
        """Return the normalised test images and their labels. For reporting only."""
        images, labels = load(directory, f"{self.dataset}-test")
        return normalize(images, *self.moments), torch.from_numpy(labels)

    def calibration(self, directory: pathlib.Path, count: int, seed: int) -> Tensor:
        """Return `count` normalised training images, drawn without labels and without replacement."""
        images, _ = load(directory, self.train)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        return normalize(images[chosen.numpy()], *self.moments)


NETWORKS = {
    "cifar10-resnet20": Pretrained("cifar10", resnet20, IMAGENET, 9173, "cifar10-train-1"),
    "cifar10-resnet56": Pretrained("cifar10", resnet56, IMAGENET, 9339, "cifar10-train-1"),
    "cifar100-resnet20v": Pretrained("cifar100", resnet20v, CIFAR100, 6969, "cifar100-train-balanced-10k"),
}


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> int:
    """Count the images that the model classifies correctly."""
    hits = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        hits += int((model(x).argmax(1) == y).sum())
    return hits
