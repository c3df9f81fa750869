"""Slow, obvious versions: loops over output positions and taps, written from the equations.

Y[n, o, i, j] = sum over c, a, b of |X[n, c, i s + a d, j s + b d] - W[o, c, a, b]|
dX[n, c, u, v] = sum over o, a, b of HardTanh(W[o, c, a, b] - X[n, c, u, v]) G[n, o, i, j]

with u = i s + a d and v = j s + b d.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def output_size(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> list[int]:
    return [(x.shape[2 + a] - dilation[a] * (weight.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]


def windows(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int
) -> Iterator[tuple[tuple[slice, slice, int, int], tuple[slice, slice, slice, slice], Tensor]]:
    """Every output position of every group: where the outputs are, where the window is, the kernels [o, c, a, b]."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    rows, columns = output_size(x, weight, stride, dilation)
    for group, i, j in itertools.product(range(groups), range(rows), range(columns)):
        channels = slice(group * outputs, (group + 1) * outputs)
        window = (
            slice(None),
            slice(group * inputs, (group + 1) * inputs),
            slice(i * stride[0], i * stride[0] + dilation[0] * (weight.shape[2] - 1) + 1, dilation[0]),
            slice(j * stride[1], j * stride[1] + dilation[1] * (weight.shape[3] - 1) + 1, dilation[1]),
        )
        yield (slice(None), channels, i, j), window, weight[channels]


def distance(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """The distances, positive, in the dtype of the arguments."""
    out = x.new_zeros(len(x), len(weight), *output_size(x, weight, stride, dilation))
    for at, window, kernels in windows(x, weight, stride, dilation, groups):
        out[at] = (x[window].unsqueeze(1) - kernels).abs().sum((2, 3, 4))
    return out


def input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """The gradient, and the sum of the magnitudes of its terms, which its rounding error grows with."""
    total, size = torch.zeros_like(x), torch.zeros_like(x)
    for at, window, kernels in windows(x, weight, stride, dilation, groups):
        terms = (kernels - x[window].unsqueeze(1)).clamp(-1, 1) * grad[at][..., None, None, None]
        total[window] += terms.sum(1)
        size[window] += terms.abs().sum(1)
    return total, size
