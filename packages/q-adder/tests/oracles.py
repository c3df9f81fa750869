"""Slow, obvious versions, written from the equations with loops over output positions."""

import torch
from torch import Tensor
from torch.nn import functional as F


def unchecked(function):
    """The function past its annotations, which refuse bad shapes by themselves where they are checked."""
    return getattr(function, "__wrapped__", function)


def windows(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]):
    """Yield each output position and the rows and columns of its window in a padded input."""
    rows = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (x.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride[0], j * stride[1]
            down = slice(top, top + dilation[0] * (kernel[0] - 1) + 1, dilation[0])
            right = slice(left, left + dilation[1] * (kernel[1] - 1) + 1, dilation[1])
            yield (i, j), (down, right)


def adder2d(x: Tensor, weight: Tensor, stride, padding, dilation, groups, exponent=1.0):
    """Y = -sum |X - W|^p, one window and kernel at a time."""
    padded = pad(x, padding)
    channels, outputs = weight.shape[1], weight.shape[0] // groups
    positions = list(windows(padded, tuple(weight.shape[2:]), stride, dilation))
    last = positions[-1][0]
    out = x.new_zeros(x.shape[0], weight.shape[0], last[0] + 1, last[1] + 1)
    for (i, j), (down, right) in positions:
        for o in range(weight.shape[0]):
            first = (o // outputs) * channels
            window = padded[:, first : first + channels, down, right]
            out[:, o, i, j] = -(window - weight[o]).abs().pow(exponent).sum((1, 2, 3))
    return out


def gradients(grad: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups):
    """dX = sum HardTanh(W - X) G and dW = sum (X - W) G, as published, one window and kernel at a time."""
    padded = pad(x, padding)
    channels, outputs = weight.shape[1], weight.shape[0] // groups
    dx, dw = torch.zeros_like(padded), torch.zeros_like(weight)
    for (i, j), (down, right) in windows(padded, tuple(weight.shape[2:]), stride, dilation):
        for o in range(weight.shape[0]):
            first = (o // outputs) * channels
            window = padded[:, first : first + channels, down, right]
            g = grad[:, o, i, j].reshape(-1, 1, 1, 1)
            dx[:, first : first + channels, down, right] += (weight[o] - window).clamp(-1, 1) * g
            dw[o] += ((window - weight[o]) * g).sum(0)
    height, width = x.shape[2:]
    return dx[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width], dw


def unfolded_gradients(grad: Tensor, x: Tensor, weight: Tensor, stride, padding):
    """dX = fold(clamp(W - X) G) and dW = sum (X - W) G on the whole cube [n, outputs, taps, positions]."""
    columns = F.unfold(x, weight.shape[2:], stride=stride, padding=padding).unsqueeze(1)
    difference = columns - weight.flatten(1)[None, :, :, None]
    incoming = grad.flatten(2).unsqueeze(2)
    slope = ((-difference).clamp(-1, 1) * incoming).sum(1)
    dx = F.fold(slope, x.shape[2:], weight.shape[2:], stride=stride, padding=padding)
    return dx, (difference * incoming).sum((0, 3)).reshape(weight.shape)


def pad(x: Tensor, padding: tuple[int, int]) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1], x.shape[2] + 2 * padding[0], x.shape[3] + 2 * padding[1])
    out[:, :, padding[0] : padding[0] + x.shape[2], padding[1] : padding[1] + x.shape[3]] = x
    return out


def code_distances(x: Tensor, weight: Tensor, stride, dilation, groups) -> Tensor:
    """D = sum |q_x - q_w| of padded integer codes in int64, one window and kernel at a time."""
    x, weight = x.to(torch.int64), weight.to(torch.int64)
    channels, outputs = weight.shape[1], weight.shape[0] // groups
    positions = list(windows(x, tuple(weight.shape[2:]), stride, dilation))
    last = positions[-1][0]
    out = x.new_zeros(x.shape[0], weight.shape[0], last[0] + 1, last[1] + 1)
    for (i, j), (down, right) in positions:
        for o in range(weight.shape[0]):
            first = (o // outputs) * channels
            out[:, o, i, j] = (x[:, first : first + channels, down, right] - weight[o]).abs().sum((1, 2, 3))
    return out


def rounded_codes(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Codes q = clip(round(x / scale) + zero), ties to even, with a scale and a zero point of one element."""
    wide = torch.promote_types(x.dtype, scale.dtype)
    return (torch.round(x.to(wide) / scale.to(wide)) + zero.to(wide)).clamp(low, high).to(torch.int64)
