"""The operators of adder layers on a GPU: distances, and their gradient to the input.

The meaning of each is in `q_adder.ops`; the arguments are the same. Both take an input that is padded already. Sums are
in float32, in the order of the taps, whatever the dtype of the tensors. The slope of the gradient is rounded to a unit
of half the magnitude of the input, not of the difference: its error is at most `2**-23 * max(1, abs(x))`.
"""

import functools
import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from q_core.kernels import Kernel
from q_kernels.gpu import views

# Never measured: there was no GPU. Above that of plain torch, which unfolds the input and reads it once an output.
_RATE = 1.0

_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_LIMIT = 1 << 31  # of elements: a tile holds offsets in 32 bits, because those in 64 would not fit in registers
_GROUPS = 1 << 16  # along the second axis of a grid


def _size(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> tuple[int, int]:
    rows, columns = ((x.shape[a] - dilation[a - 2] * (weight.shape[a] - 1) - 1) // stride[a - 2] + 1 for a in (2, 3))
    return rows, columns


def forms(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float, *more: Tensor
) -> str | None:
    """Say what is wrong with dtypes, shapes and sizes, wherever the tensors are; `more` are incoming gradients."""
    if exponent != 1.0:
        return f"it takes absolute differences to the power 1, not {exponent}"
    other = sorted({str(tensor.dtype) for tensor in (x, weight, *more) if tensor.dtype not in _FLOATS})
    if other:
        return f"it computes in float32, and would not do justice to {', '.join(other)}"
    shapes = [tuple(tensor.shape) for tensor in (x, weight, *more)]
    fit = all(len(shape) == 4 for shape in shapes) and x.shape[1] == weight.shape[1] * groups
    if not fit or weight.shape[0] % groups or min(_size(x, weight, stride, dilation)) <= 0:
        return f"tensors of {', '.join(map(str, shapes))} do not fit in {groups} groups"
    outputs = (x.shape[0], weight.shape[0], *_size(x, weight, stride, dilation))
    if any(shape != outputs for shape in shapes[2:]):
        return f"gradients of {', '.join(map(str, shapes[2:]))} are not those of outputs of {outputs}"
    # The gradient is padded by the reach of a kernel on every side, at most to three times the input.
    largest = max(x.numel(), math.prod(outputs), weight.numel(), 9 * math.prod(outputs) if more else 0)
    if largest >= _LIMIT:
        return f"it counts elements in 31 bits, and there may be {largest}"
    return f"it takes fewer than {_GROUPS} groups, not {groups}" if groups >= _GROUPS else None


def _refuses_distance(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> str | None:
    return views.on_device((x, weight)) or forms(x, weight, stride, dilation, groups, exponent)


def _refuses_input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> str | None:
    return views.on_device((grad, x, weight)) or forms(x, weight, stride, dilation, groups, exponent, grad)


def _forward_tile(outputs: int) -> tuple[int, int, int]:
    """Choose positions and outputs of a tile, and warps: 32 pairs of a thread at a time.

    With 64 a compiler of Triton 3.7 takes a fifth fewer instructions beside the sums, and that of 3.6 has too few
    registers for it.
    """
    return (128, 32, 4) if outputs <= 32 else (64, 64, 4) if outputs <= 64 else (64, 128, 8)


def _backward_tile(outputs: int) -> tuple[int, int, int]:
    """Choose the same for the gradient, which also holds an input for each pair: 16 pairs of a thread at a time."""
    return (64, 32, 4) if outputs <= 32 else (64, 64, 8)


@functools.lru_cache(maxsize=256)
def _offsets(steps: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Add up one step of every axis, for all combinations, the last axis fastest.

    A table is sent to the GPU once: a copy in every call would have to wait, and could not become part of a graph.
    """
    total = torch.zeros(1, dtype=torch.int64)
    for axis in steps:
        total = (total[:, None] + torch.tensor(axis, dtype=torch.int64)).reshape(-1)
    return total.to(torch.int32).to(device)


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 and without gaps.

    It takes one pass over memory. In the loop it would take as much time as the sums: a tile lies there in as many
    copies as threads need it, and each would widen its own.
    """
    return tensor.detach().float().contiguous()


def _every(count: int, step: int) -> tuple[int, ...]:
    return tuple(index * step for index in range(count))


def _distance(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    from q_kernels.gpu.jit import adder as jit

    rows, columns = _size(x, weight, stride, dilation)
    out = torch.empty(x.shape[0], weight.shape[0], rows, columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    source, outputs = _wide(x), weight.shape[0] // groups
    image, channel, line = source[0].numel(), source[0, 0].numel(), source.shape[3]
    steps = (
        _every(weight.shape[1], channel),
        _every(weight.shape[2], dilation[0] * line),
        _every(weight.shape[3], dilation[1]),
    )
    positions = x.shape[0] * rows * columns
    high, wide, warps = _forward_tile(outputs)
    with views.launching(x):
        jit.distance[(-(-positions // high) * -(-outputs // wide), groups)](
            source,
            _wide(weight),
            _offsets(steps, x.device),
            out,
            positions=positions,
            rows=rows,
            columns=columns,
            outputs=outputs,
            taps=weight[0].numel(),
            x_image=image,
            x_row=stride[0] * line,
            x_column=stride[1],
            x_group=weight.shape[1] * channel,
            out_image=out[0].numel(),
            out_row=columns,
            out_column=1,
            out_channel=rows * columns,
            POSITIONS=high,
            OUTPUTS=wide,
            num_warps=warps,
        )
    return out


def _input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    """Gather, instead of scattering into the windows; see `q_kernels.gpu.jit.adder`."""
    from q_kernels.gpu.jit import adder as jit

    phases = math.prod(stride)
    out = (torch.zeros_like if phases > 1 else torch.empty_like)(x, memory_format=torch.contiguous_format)
    if not out.numel() or not grad.numel():
        return out.zero_()
    source, outputs, inputs = _wide(x), weight.shape[0] // groups, weight.shape[1]
    # Pixel i of a lattice looks up to `reach` windows back, the last one at most at window `size`.
    size = [-(-x.shape[2 + a] // stride[a]) for a in (0, 1)]
    reach = [-(-dilation[a] * (weight.shape[2 + a] - 1) // stride[a]) for a in (0, 1)]
    extra = [max(0, size[a] - grad.shape[2 + a]) for a in (0, 1)]
    padded = F.pad(_wide(grad), (reach[1], extra[1], reach[0], extra[0]))
    table = _wide(weight).reshape(groups, outputs, *weight.shape[1:]).transpose(1, 2)
    poison = torch.where(table.isnan(), math.nan, 0.0).sum((2, 3, 4), dtype=torch.float32).reshape(-1)
    channel, line = x.shape[2] * x.shape[3], x.shape[3]
    high, wide, warps = _backward_tile(inputs)
    for place in itertools.product(range(stride[0]), range(stride[1])):
        rows, columns = (-(-(x.shape[2 + a] - place[a]) // stride[a]) for a in (0, 1))
        hits = [_hits(weight.shape[2 + a], dilation[a], stride[a], place[a]) for a in (0, 1)]
        if not (hits[0] and hits[1] and rows > 0 and columns > 0):
            continue
        back = [[reach[a] + (place[a] - k * dilation[a]) // stride[a] for k in hits[a]] for a in (0, 1)]
        steps = (
            _every(outputs, padded[0, 0].numel()),
            tuple(padded.shape[3] * windows for windows in back[0]),
            tuple(back[1]),
        )
        chosen = table[:, :, :, hits[0].start :: hits[0].step, hits[1].start :: hits[1].step]
        kernels = chosen.reshape(groups * inputs, -1).contiguous()
        first = place[0] * line + place[1]
        positions = x.shape[0] * rows * columns
        with views.launching(x):
            jit.input_grad[(-(-positions // high) * -(-inputs // wide), groups)](
                padded,
                kernels,
                _offsets(steps, x.device),
                source.view(-1)[first:],
                poison,
                out.view(-1)[first:],
                positions=positions,
                rows=rows,
                columns=columns,
                outputs=inputs,
                taps=kernels.shape[1],
                grad_image=padded[0].numel(),
                grad_row=padded.shape[3],
                grad_column=1,
                grad_group=outputs * padded[0, 0].numel(),
                x_image=source[0].numel(),
                x_row=stride[0] * line,
                x_column=stride[1],
                x_channel=channel,
                out_image=source[0].numel(),
                out_row=stride[0] * line,
                out_column=stride[1],
                out_channel=channel,
                POSITIONS=high,
                OUTPUTS=wide,
                num_warps=warps,
            )
    return out


def _hits(taps: int, dilation: int, stride: int, phase: int) -> range:
    """Taps that reach the pixels at `phase` of the stride."""
    found = [tap for tap in range(taps) if (phase - tap * dilation) % stride == 0]
    return range(found[0], taps, stride // math.gcd(dilation, stride)) if found else range(0)


distance_conv2d = (Kernel("gpu-tiled", _refuses_distance, lambda *_: _RATE, _distance),)
distance_conv2d_input_grad = (Kernel("gpu-tiled", _refuses_input_grad, lambda *_: _RATE, _input_grad),)
