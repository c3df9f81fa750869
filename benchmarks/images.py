"""Real images for the accuracy sessions: CIFAR-10 and CIFAR-100 as uint8 arrays, checked against their hashes.

Two layouts are understood: lossless mosaics with a `manifest.json` (10,000 images in one 100 x 100 picture), and what
torchvision's `CIFAR10(root, download=True)` leaves behind.
"""

import hashlib
import json
import pathlib

import numpy as np
import torch
from torch import Tensor

_SIDE, _PER_ROW = 32, 100


def load(directory: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images [n, 32, 32, 3] uint8 and labels [n] of a split such as `cifar10-test` or `cifar10-train-1`."""
    if (directory / "cifar" / "manifest.json").exists():
        return _mosaic(directory / "cifar", name)
    return _torchvision(directory, name)


def _mosaic(folder: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    picture = np.asarray(Image.open(folder / f"{name}.webp").convert("RGB"))
    rows = picture.shape[0] // _SIDE
    images = picture.reshape(rows, _SIDE, _PER_ROW, _SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, _SIDE, _SIDE, 3)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    expected = json.loads((folder / "manifest.json").read_text())[name]["sha256_pixels"]
    if digest != expected:
        raise SystemExit(f"{name}: the decoded images have SHA-256 {digest}, the manifest says {expected}")
    return images, np.load(folder / f"{name}.labels.npy").astype(np.int64)


def _torchvision(root: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets

    dataset, split, *part = name.split("-")
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    data = kind(root, train=split == "train", download=False)
    start = (int(part[0]) - 1) * 10_000 if part and part[0].isdigit() else 0
    images, labels = data.data, np.asarray(data.targets)
    return images[start : start + 10_000], labels[start : start + 10_000]


def normalize(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 images [n, 32, 32, 3] into float32 [n, 3, 32, 32] as torchvision's ToTensor and Normalize do."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(torch.float32) / 255
    shape = (1, 3, 1, 1)
    return ((tensor - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)).contiguous()
