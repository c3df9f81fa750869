"""What tiles a tensor, spread over it, and sums of its tiles: one axis after the other."""

import math

import torch
from torch import Tensor


def spread(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    if parameter.numel() == 1:
        return parameter.reshape(1)
    for axis, size in enumerate(shape):
        parameter = parameter.repeat_interleave(size // parameter.shape[axis], axis)
    return parameter


def tiled(terms: Tensor, tiles: tuple[int, ...]) -> Tensor:
    if math.prod(tiles) == 1:
        return terms.sum().reshape(tiles)
    for axis, count in enumerate(tiles):
        terms = torch.stack([part.sum(axis) for part in terms.tensor_split(count, axis)], axis)
    return terms
