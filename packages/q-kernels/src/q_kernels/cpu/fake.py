"""Fake quantization to a uniform grid on a CPU: one pass over memory forward, and one backward.

The meaning is in `q_core.ops`; the arguments are the same. Values are those of the meaning, bit for bit.

Work is cut into blocks that do not depend on the number of threads; each adds up the gradient of a scale in float32,
and the sums of the blocks are added in float64.

numba compiles the functions under `no_type_check`, which keeps the checks of the tests out of them. Without a mask it
compiles them anew, and leaves out what a mask costs.
"""

import math
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from q_core.kernels import Kernel
from q_kernels.cpu import memory, windows
from q_kernels.cpu.memory import BLOCK, Plan

Array = Any

# Elements a second, measured on one core of a Xeon of the fourth generation.
_RATE, _GRADIENT_RATE = 2.5e9, 1.8e9

_PAIRS = 16  # an element takes as much time as so many of the differences that `in_threads` counts

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
    parts = (x.shape[1] + BLOCK - 1) // BLOCK
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        start, stop = part * BLOCK, min((part + 1) * BLOCK, x.shape[1])
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
    rows = max(1, BLOCK // x.shape[1])
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
        start, stop = part * BLOCK, min((part + 1) * BLOCK, x.shape[1])
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
    rows, nothing = max(1, BLOCK // x.shape[1]), np.float32(0)
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


def _arguments(plan: Plan, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> tuple[Any, ...]:
    """Return the scales and the zero points of the rows or columns, and the ends of the range."""
    scales = plan.spread(scale)
    zeros = torch.full_like(scales, -0.0) if zero_point is None else plan.spread(zero_point)
    return scales.numpy(), zeros.numpy(), (np.float32(qmin), np.float32(qmax))


def _refuses(x: Tensor, scale: Tensor, zero_point: Tensor | None, where: Tensor | None, *more: Tensor) -> str | None:
    """Say what is wrong with the tensors."""
    parameters = (scale,) if zero_point is None else (scale, zero_point)
    reason = memory.refuses(x, parameters, tuple(scale.shape), grads=more, mask=where)
    if reason is None and zero_point is not None and zero_point.shape != scale.shape:
        return f"zero points of shape {tuple(zero_point.shape)} do not have that of the scales, {tuple(scale.shape)}"
    return reason


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
    plan = memory.plan(tuple(x.shape), x.stride(), tuple(scale.shape))
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
    plan = memory.plan(tuple(x.shape), x.stride(), tuple(scale.shape))
    out, sums = torch.empty(plan.matrix), torch.zeros(plan.blocks, math.prod(plan.shape))
    inputs = [plan.read(tensor, torch.float32) for tensor in (grad, x)]
    mask = None if where is None else plan.read(where, torch.bool)
    arrays = (*inputs, mask, *_arguments(plan, scale, zero_point, qmin, qmax), out.numpy(), sums.numpy())
    loop = _gradients_of_columns if plan.columns else _gradients_of_rows
    windows.in_threads(lambda *units: loop(*arrays, units), plan.units, x.numel() * _PAIRS)
    return plan.written(out).to(x.dtype), plan.gathered(sums).reshape(scale.shape).float() if learns else None


fake_quantize = (Kernel("cpu-fused", _refuses_levels, lambda *_: _RATE, _levels),)
fake_quantize_grad = (Kernel("cpu-fused", _refuses_gradients, lambda *_: _GRADIENT_RATE, _gradients),)
