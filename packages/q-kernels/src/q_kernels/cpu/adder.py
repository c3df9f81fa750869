"""The operators of adder layers on a CPU.

The meaning of each is in `q_adder.ops`; the arguments are the same. All take an input that is padded already.
"""

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from q_core.kernels import Kernel
from q_kernels.cpu import windows
from q_kernels.cpu.vector import BITS, BYTES, COUNTS, FEATURES, FLOATS, SLOPES, WIDE, Tile

# Measured on one core of a Xeon of the fourth generation, with all its instructions, with those of AVX2, and with SSE2
# alone: float32 distances and their gradient in pairs (tap, position, output) a second, the others in words of codes.
_FLOATS_RATE, _SLOPES_RATE, _BYTES_RATE, _BITS_RATE = (
    (36e9, 30e9, 23e9, 20e9 if COUNTS else 6e9)
    if WIDE
    else (28e9, 14e9, 16e9, 6e9)
    if "avx2" in FEATURES
    else (12e9, 7e9, 1.8e9, 2e9)
)

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def _size(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> tuple[int, int]:
    rows, columns = ((x.shape[a] - dilation[a - 2] * (weight.shape[a] - 1) - 1) // stride[a - 2] + 1 for a in (2, 3))
    return rows, columns


def _refuses(
    dtypes: set[torch.dtype],
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    groups: int,
    *more: Tensor,
) -> str | None:
    """Say what is wrong with the tensors. What passes is read and written at addresses that nothing else checks."""
    other = sorted({str(tensor.dtype) for tensor in (x, weight, *more) if tensor.dtype not in dtypes})
    if other:
        return f"it computes on {' and '.join(sorted(map(str, dtypes)))}, and would lose digits of {', '.join(other)}"
    devices = sorted({str(tensor.device) for tensor in (x, weight, *more) if tensor.device.type != "cpu"})
    if devices:
        return f"it runs on a CPU, a tensor is on {', '.join(devices)}"
    shapes = [tuple(tensor.shape) for tensor in (x, weight, *more)]
    fit = all(len(shape) == 4 for shape in shapes) and x.shape[1] == weight.shape[1] * groups
    if fit and weight.shape[0] % groups == 0 and min(_size(x, weight, stride, dilation)) > 0:
        outputs = (x.shape[0], weight.shape[0], *_size(x, weight, stride, dilation))
        if all(shape == outputs for shape in shapes[2:]):
            return None
    return f"tensors of {', '.join(map(str, shapes))} do not fit in {groups} groups"


def _refuses_distance(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> str | None:
    if exponent != 1.0:
        return f"it takes absolute differences to the power 1, not {exponent}"
    return _refuses(_DTYPES, x, weight, stride, dilation, groups)


def _refuses_input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> str | None:
    if exponent != 1.0:
        return f"it takes the slopes of absolute differences to the power 1, not {exponent}"
    reason = _refuses(_DTYPES, x, weight, stride, dilation, groups, grad)
    if reason is None and not bool(weight.isfinite().all()):
        return "it takes slopes of finite weights, and some are not finite"
    return reason


def _refuses_bytes(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> str | None:
    largest = ((1 << bits) - 1) * math.prod(weight.shape[1:])
    if largest >= 1 << 31:
        return f"a window sums up to {largest}, and its results are 32-bit integers"
    return _refuses({torch.uint8}, x, weight, stride, dilation, groups)


def _refuses_bits(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> str | None:
    if _field(bits) >= 64:
        return f"the thermometer of a {bits}-bit code has {_field(bits)} places, a word holds 63"
    return _refuses_bytes(x, weight, stride, dilation, groups, bits)


def _seen(x: Tensor, weight: Tensor, stride: list[int]) -> tuple[Tensor, list[int]]:
    """Leave out the rows and columns that a kernel of one tap never sees, and return the stride over the others."""
    steps = [stride[a] if weight.shape[2 + a] == 1 else 1 for a in (0, 1)]
    return x[:, :, :: steps[0], :: steps[1]], [stride[0] // steps[0], stride[1] // steps[1]]


def _convolve(
    tile: Tile,
    planes: Tensor,
    table: Tensor,
    kernel: torch.Size,
    stride: list[int],
    dilation: list[int],
    target: Tensor,
) -> None:
    """Write all groups; `planes` are the lattices of [n, groups * planes, h, w], `table` is [groups, outputs, taps]."""
    inputs = planes.shape[1] // math.prod(stride) // table.shape[0]
    down, right = (np.arange(kernel[a]) * dilation[a] for a in (0, 1))
    windows.run(tile, planes, windows.offsets(inputs, down, right, stride, planes.shape[2:]), table, target)


def _distance(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[0], *_size(x, weight, stride, dilation))
    x, stride = _seen(x.detach(), weight, stride)
    table = weight.detach().float().reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
    _convolve(FLOATS, windows.lattices(x.float(), stride), table, weight.shape[2:], stride, dilation, out)
    return out.to(x.dtype)


def _input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    """Gather, instead of scattering into the windows: every input pixel asks which windows it lies in.

    Pixels that are a stride apart lie in windows of the same taps, so every lattice of the input is a correlation of
    its own with the taps that reach it.
    """
    outputs = weight.shape[0] // groups
    source = windows.lattices(x.detach().float(), stride)
    size, phases = source.shape[2:], math.prod(stride)
    # Pixel i of a lattice looks up to `reach` windows back, the last one at most at window `size`.
    reach = [-(-dilation[a] * (weight.shape[2 + a] - 1) // stride[a]) for a in (0, 1)]
    extra = [max(0, size[a] - grad.shape[2 + a]) for a in (0, 1)]
    padded = F.pad(grad.detach().float(), (reach[1], extra[1], reach[0], extra[0])).contiguous()
    target = torch.zeros_like(source) if phases > 1 else torch.empty_like(source)  # a lattice may lie in no window
    table = weight.detach().float().reshape(groups, outputs, *weight.shape[1:]).transpose(1, 2)
    for phase, place in enumerate(itertools.product(range(stride[0]), range(stride[1]))):
        hits = [_hits(weight.shape[2 + a], dilation[a], stride[a], place[a]) for a in (0, 1)]
        if len(hits[0]) and len(hits[1]):
            back = [reach[a] + (place[a] - hits[a] * dilation[a]) // stride[a] for a in (0, 1)]
            taps = windows.offsets(outputs, back[0], back[1], [1, 1], padded.shape[2:])
            kernels = table[:, :, :, hits[0]][..., hits[1]].reshape(groups, weight.shape[1], len(taps))
            windows.run(SLOPES, padded, taps, kernels, target, source, phase, phases)
    return windows.joined(target, stride, x.shape[2:]).to(x.dtype)


def _hits(taps: int, dilation: int, stride: int, phase: int) -> Any:
    """Taps that reach the pixels at `phase` of the stride."""
    every = np.arange(taps)
    return every[(phase - every * dilation) % stride == 0]


def _words(codes: Tensor, field: int, thermometer: bool) -> Tensor:
    """Pack channels into words: [n, channels, pixels] uint8 to [n, words, pixels] int64."""
    per_word = 64 // field
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), codes.shape[2], dtype=torch.int64)
    arguments = (codes.numpy(), per_word, field, thermometer, words.numpy().view(np.uint64))
    work = functools.partial(windows.pack_words, *arguments)
    windows.in_threads(lambda first, last: work((first, last)), codes.shape[0], codes.numel())
    return words


def _code_distance(
    tile: Tile, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> Tensor:
    thermometer = tile is BITS
    field = _field(bits) if thermometer else 8
    out = torch.empty(x.shape[0], weight.shape[0], *_size(x, weight, stride, dilation), dtype=torch.int32)
    x, stride = _seen(x, weight, stride)
    parts = windows.lattices(x, stride)
    # The channels of a group share words; those of two groups do not.
    pixels = math.prod(stride) * math.prod(parts.shape[2:])
    words = _words(parts.reshape(x.shape[0] * groups, x.shape[1] // groups, pixels), field, thermometer)
    planes = words.reshape(x.shape[0], groups * words.shape[1] * math.prod(stride), *parts.shape[2:])
    table = _words(weight.flatten(2).contiguous(), field, thermometer)
    table = table.reshape(groups, weight.shape[0] // groups, math.prod(table.shape[1:]))
    _convolve(tile, planes, table, weight.shape[2:], stride, dilation, out)
    return out


def _field(bits: int) -> int:
    """Bits of a thermometer."""
    return (1 << bits) - 1


def _rate(words_per_second: float, weight: Tensor, groups: int, field: int) -> float:
    """Return pairs a second, where a channel takes `field` bits of a word.

    A panel costs as much to fill as eight more outputs, and a tile to begin and to end as much as five more taps.
    """
    words = -(-weight.shape[1] // (64 // field))
    taps, outputs = max(1, words * math.prod(weight.shape[2:])), weight.shape[0] // groups
    codes_per_word = weight.shape[1] / max(1, words)
    return words_per_second * codes_per_word * taps / (taps + 5) * outputs / (outputs + 8)


distance_conv2d = (Kernel("cpu-simd", _refuses_distance, lambda *_: _FLOATS_RATE, _distance),)
distance_conv2d_input_grad = (Kernel("cpu-simd", _refuses_input_grad, lambda *_: _SLOPES_RATE, _input_grad),)
code_distance_conv2d = (
    Kernel(
        "cpu-sad",
        _refuses_bytes,
        lambda x, weight, stride, dilation, groups, bits: _rate(_BYTES_RATE, weight, groups, 8),
        functools.partial(_code_distance, BYTES),
    ),
    Kernel(
        "cpu-popcount",
        _refuses_bits,
        lambda x, weight, stride, dilation, groups, bits: _rate(_BITS_RATE, weight, groups, _field(bits)),
        functools.partial(_code_distance, BITS),
    ),
)
