"""Fake quantization to a uniform grid on a CPU: one pass over memory forward, and one backward.

The meaning is in `q_core.ops`; the arguments are the same. Values are those of the meaning, bit for bit.

A tensor is read in the order of its memory, as a matrix in which either every row has one scale (one for the tensor,
one per channel of a weight, one per group) or every column (one per channel, where channels lie side by side). Work is
cut into blocks that do not depend on the number of threads; each adds up the gradient of a scale in float32, and the
sums of the blocks are added in float64.

numba compiles the functions under `no_type_check`, which keeps the checks of the tests out of them. Without a mask it
compiles them anew, and leaves out what a mask costs.
"""

import dataclasses
import functools
import math
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor, nn

from q_core import functional
from q_core.errors import ShapeError
from q_core.kernels import Kernel
from q_kernels.cpu import windows

Array = Any

# Elements a second, measured on one core of a Xeon of the fourth generation.
_RATE, _GRADIENT_RATE = 2.5e9, 1.8e9

_BLOCK = 1 << 14  # elements: what a block reads and writes stays in the second-level cache
_SHORT = 64  # runs of fewer elements with one scale are not worth a loop each
_PAIRS = 16  # an element takes as much time as so many of the differences that `in_threads` counts

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}

# A division by zero is an infinity, as in torch; the exception of Python would keep the loops from becoming vectors.
_jit = numba.njit(nogil=True, error_model="numpy")
# Here the terms of a sum may change places, as they do in the lanes of a vector.
_jit_sums = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})


@_jit
@no_type_check
def _nearest(u: Any, low: Any, high: Any) -> Any:
    inner = low if u < low else u  # a NaN stays one
    return np.rint(high if inner > high else inner)


@_jit
@no_type_check
def _level(x: Any, scale: Any, zero: Any, ends: Any) -> Any:
    code = _nearest(x / scale, ends[0] - zero, ends[1] - zero) + zero
    code = ends[0] if code < ends[0] else code
    code = ends[1] if code > ends[1] else code
    # A zero point of -0 stands for none: to add it and to subtract +0 keeps the sign of a zero.
    return (code - (zero + np.float32(0))) * scale


@_jit
@no_type_check
def _terms(grad: Any, x: Any, scale: Any, zero: Any, ends: Any) -> Any:
    """What one element gives to the gradient of `x` and to that of the scale."""
    u, nothing = x / scale, np.float32(0)
    low, high = ends[0] - zero, ends[1] - zero
    outside = (u < low) | (u > high)
    return nothing if outside else grad, grad * (_nearest(u, low, high) - (nothing if outside else u))


@_jit
@no_type_check
def _levels_of_rows(x: Array, mask: Any, scales: Array, zeros: Array, ends: Any, out: Array, units: Any) -> None:
    parts = (x.shape[1] + _BLOCK - 1) // _BLOCK
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        start, stop = part * _BLOCK, min((part + 1) * _BLOCK, x.shape[1])
        scale, zero = scales[row], zeros[row]
        source, target = x[row, start:stop], out[row, start:stop]
        if mask is None:
            for i in range(stop - start):
                target[i] = _level(source[i], scale, zero, ends)
        else:
            chosen = mask[row, start:stop]
            for i in range(stop - start):
                level = _level(source[i], scale, zero, ends)
                target[i] = level if chosen[i] else source[i]


@_jit
@no_type_check
def _levels_of_columns(x: Array, mask: Any, scales: Array, zeros: Array, ends: Any, out: Array, units: Any) -> None:
    rows = max(1, _BLOCK // x.shape[1])
    for row in range(units[0] * rows, min(units[1] * rows, x.shape[0])):
        source, target = x[row], out[row]
        if mask is None:
            for i in range(x.shape[1]):
                target[i] = _level(source[i], scales[i], zeros[i], ends)
        else:
            chosen = mask[row]
            for i in range(x.shape[1]):
                level = _level(source[i], scales[i], zeros[i], ends)
                target[i] = level if chosen[i] else source[i]


@_jit_sums
@no_type_check
def _gradients_of_rows(
    grad: Array, x: Array, mask: Any, scales: Array, zeros: Array, ends: Any, out: Array, sums: Array, units: Any
) -> None:
    parts, nothing = sums.shape[0], np.float32(0)
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        start, stop = part * _BLOCK, min((part + 1) * _BLOCK, x.shape[1])
        scale, zero = scales[row], zeros[row]
        upper, source, target = grad[row, start:stop], x[row, start:stop], out[row, start:stop]
        total = nothing
        if mask is None:
            for i in range(stop - start):
                target[i], term = _terms(upper[i], source[i], scale, zero, ends)
                total += term
        else:
            chosen = mask[row, start:stop]
            for i in range(stop - start):
                passed, term = _terms(upper[i], source[i], scale, zero, ends)
                target[i] = passed if chosen[i] else upper[i]
                total += term if chosen[i] else nothing
        sums[part, row] = total


@_jit_sums
@no_type_check
def _gradients_of_columns(
    grad: Array, x: Array, mask: Any, scales: Array, zeros: Array, ends: Any, out: Array, sums: Array, units: Any
) -> None:
    rows, nothing = max(1, _BLOCK // x.shape[1]), np.float32(0)
    for unit in range(units[0], units[1]):
        total = sums[unit]
        for row in range(unit * rows, min((unit + 1) * rows, x.shape[0])):
            upper, source, target = grad[row], x[row], out[row]
            if mask is None:
                for i in range(x.shape[1]):
                    target[i], term = _terms(upper[i], source[i], scales[i], zeros[i], ends)
                    total[i] += term
            else:
                chosen = mask[row]
                for i in range(x.shape[1]):
                    passed, term = _terms(upper[i], source[i], scales[i], zeros[i], ends)
                    target[i] = passed if chosen[i] else upper[i]
                    total[i] += term if chosen[i] else nothing


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a tensor is read.

    Attributes:
        order: Its axes as they follow each other in memory, the fastest last; None where that is how they are counted.
        inverse: Where each axis is in that order.
        size: Its sizes in that order.
        tiles: Shape of the scale, with as many axes, as they are counted.
        shape: Of the scales, repeated until there is one for every row, or for every column.
        groups: Shape of a scale that tiles `shape`; its elements are those of the scale, in that order.
        columns: Whether every column has one scale, or every row.
    """

    order: tuple[int, ...] | None
    inverse: tuple[int, ...]
    size: tuple[int, ...]
    tiles: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[int, ...]
    columns: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        scales = math.prod(self.shape)
        others = math.prod(self.size) // scales
        return (others, scales) if self.columns else (scales, others)

    @property
    def blocks(self) -> int:
        """How many sums of each scale are kept apart."""
        rows, columns = self.matrix
        return -(-rows // max(1, _BLOCK // columns)) if self.columns else -(-columns // _BLOCK)

    @property
    def units(self) -> int:
        """Parts that threads can share."""
        return self.blocks if self.columns else self.blocks * self.matrix[0]

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Array:
        """Return the matrix; a copy only where the memory has another order, gaps, or another dtype."""
        ordered = tensor if self.order is None else tensor.permute(self.order)
        return ordered.detach().to(dtype).contiguous().reshape(self.matrix).numpy()

    def written(self, matrix: Tensor) -> Tensor:
        """Return a matrix as a tensor with the axes as they are counted."""
        tensor = matrix.reshape(self.size)
        return tensor if self.order is None else tensor.permute(self.inverse)

    def spread(self, parameter: Tensor) -> Tensor:
        """Return one value for each row or each column."""
        if self.shape == (1,):
            return parameter.detach().reshape(1)
        tiles = parameter.detach().reshape(self.tiles)
        grouped = (tiles if self.order is None else tiles.permute(self.order)).reshape(self.groups)
        return functional.broadcast_scale(grouped, self.shape).expand(self.shape).reshape(-1)

    def gathered(self, sums: Tensor, shape: torch.Size) -> Tensor:
        """Add [blocks, rows or columns] up to one value per scale, of that shape."""
        total = sums.sum(0, dtype=torch.float64)
        if self.groups != self.shape:
            total = functional.sum_tiles(total.reshape(self.shape), self.groups)
        if self.order is not None:
            total = total.reshape([self.tiles[axis] for axis in self.order]).permute(self.inverse)
        return total.reshape(shape).float()


@functools.lru_cache(maxsize=256)
def _plan(size: tuple[int, ...], strides: tuple[int, ...], scale: tuple[int, ...]) -> _Plan:
    """Plan for a tensor that is not empty, and for the shape of a scale that tiles it."""
    # Where an axis of one element lies is of no importance, and its stride may be anything.
    order = sorted(range(len(size)), key=lambda axis: -strides[axis] if size[axis] > 1 else -math.inf)
    inverse = sorted(range(len(size)), key=order.__getitem__)
    given = scale if math.prod(scale) > 1 else (1,) * len(size)
    sizes, tiles = [size[axis] for axis in order], [given[axis] for axis in order]
    tiled = [place for place, count in enumerate(tiles) if count > 1]
    shape, groups, columns = [1], [1], False
    if tiled:
        first, last = tiled[0], tiled[-1]
        others, width = math.prod(sizes[:first]), math.prod(sizes[first:])
        columns = math.prod(sizes[last:]) // tiles[last] < _SHORT and others > 1
        if columns:
            # Several short rows side by side are one long row.
            fold = math.gcd(others, 1 << max(0, (4 * _SHORT // width).bit_length() - 1))
            shape, groups = [fold, *sizes[first:]], [1, *tiles[first:]]
        else:
            shape, groups = [*sizes[:last], tiles[last]], tiles[: last + 1]
    there = None if order == sorted(order) else tuple(order)
    return _Plan(there, tuple(inverse), tuple(sizes), given, tuple(shape), tuple(groups), columns)


def _arguments(plan: _Plan, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> tuple[Any, ...]:
    """Return the scales and the zero points of the rows or columns, and the ends of the range."""
    scales = plan.spread(scale)
    zeros = torch.full_like(scales, -0.0) if zero_point is None else plan.spread(zero_point)
    return scales.numpy(), zeros.numpy(), (np.float32(qmin), np.float32(qmax))


def _refuses(x: Tensor, scale: Tensor, zero_point: Tensor | None, where: Tensor | None, *more: Tensor) -> str | None:
    """Say what is wrong with the tensors. What passes is read and written in its memory, which nothing else checks."""
    parameters = (scale,) if zero_point is None else (scale, zero_point)
    wide = [tensor.dtype for tensor in (x, *more) if tensor.dtype not in _DTYPES]
    wide += [tensor.dtype for tensor in parameters if tensor.dtype != torch.float32]
    if wide:
        return f"it computes in float32, with scales in float32, and would not do justice to {wide[0]}"
    tensors = (x, *parameters, *more) if where is None else (x, *parameters, *more, where)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on a CPU, a tensor is on {tensor.device}"
        if not _in_memory(tensor):
            return "it reads plain memory, and a tensor is sparse, a subclass, a negative view or one of torch.func"
    if where is not None and (where.dtype != torch.bool or where.shape != x.shape):
        return f"it takes a bool mask of shape {tuple(x.shape)}, not {where.dtype} of {tuple(where.shape)}"
    for tensor in more:
        if tensor.shape != x.shape:
            return f"a gradient of shape {tuple(tensor.shape)} is not that of a tensor of shape {tuple(x.shape)}"
    for tensor in parameters:
        if tensor.numel() != 1:
            try:
                functional.check_tiling(tuple(tensor.shape), tuple(x.shape))
            except ShapeError as error:
                return str(error)
    return None


def _in_memory(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_neg():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _refuses_levels(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, where: Tensor | None
) -> str | None:
    return _refuses(x, scale, zero_point, where)


def _refuses_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    where: Tensor | None,
    learns: bool,
) -> str | None:
    return _refuses(x, scale, zero_point, where, grad)


def _levels(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, where: Tensor | None) -> Tensor:
    if not x.numel():
        return torch.empty(x.shape)
    plan = _plan(tuple(x.shape), x.stride(), tuple(scale.shape))
    out = torch.empty(plan.matrix)
    mask = None if where is None else plan.read(where, torch.bool)
    arrays = (plan.read(x, torch.float32), mask, *_arguments(plan, scale, zero_point, qmin, qmax), out.numpy())
    loop = _levels_of_columns if plan.columns else _levels_of_rows
    windows.in_threads(lambda *units: loop(*arrays, units), plan.units, x.numel() * _PAIRS)
    return plan.written(out)


def _gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    where: Tensor | None,
    learns: bool,
) -> tuple[Tensor, Tensor | None]:
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(scale) if learns else None
    plan = _plan(tuple(x.shape), x.stride(), tuple(scale.shape))
    out, sums = torch.empty(plan.matrix), torch.zeros(plan.blocks, math.prod(plan.shape))
    inputs = [plan.read(tensor, torch.float32) for tensor in (grad, x)]
    mask = None if where is None else plan.read(where, torch.bool)
    arrays = (*inputs, mask, *_arguments(plan, scale, zero_point, qmin, qmax), out.numpy(), sums.numpy())
    loop = _gradients_of_columns if plan.columns else _gradients_of_rows
    windows.in_threads(lambda *units: loop(*arrays, units), plan.units, x.numel() * _PAIRS)
    return plan.written(out).to(x.dtype), plan.gathered(sums, scale.shape) if learns else None


fake_quantize = (Kernel("cpu-fused", _refuses_levels, lambda *_: _RATE, _levels),)
fake_quantize_grad = (Kernel("cpu-fused", _refuses_gradients, lambda *_: _GRADIENT_RATE, _gradients),)
