"""Fake quantization to a uniform grid on a GPU: one pass over memory forward, and one backward.

The meaning is in `q_core.ops`; the arguments are the same. Values are those of the meaning, bit for bit.

The gradient of a scale is summed in two stages: each program adds up its part in float32, in a place of its own, and
the parts are added in float64. Which parts there are follows from the shape alone, so that neither the order of
programs nor the GPU changes a bit.
"""

import torch
from torch import Tensor

from q_core.kernels import Kernel
from q_kernels.gpu import views

# Never measured: there was no GPU. Above that of plain torch, which takes ten passes over memory for each of these.
_RATE = 1.0

_ELEMENTS = 1024  # of a tile: each of 128 threads has 8, two loads of 16 bytes in float32
_WARPS = 4


def _refuses(x: Tensor, scale: Tensor, zero_point: Tensor | None, where: Tensor | None, *more: Tensor) -> str | None:
    parameters = (scale,) if zero_point is None else (scale, zero_point)
    reason = views.refuses(x, parameters, tuple(scale.shape), grads=more, mask=where)
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
        return torch.empty(x.shape, device=x.device)
    from q_kernels.gpu.jit import fake as jit

    view = views.view_of(x, tuple(scale.shape))
    tile = views.tile(view, _ELEMENTS, sums=False)
    out = view.empty(x, torch.float32)
    scales = view.spread(scale)
    with views.launching(x):
        jit.levels[(tile.programs,)](
            view.read(x),
            out if where is None else view.read(where).view(torch.uint8),  # unused pointers still have to be pointers
            scales,
            scales if zero_point is None else view.spread(zero_point),
            out,
            float(qmin),
            float(qmax),
            **views.numbers(view, tile),
            ZERO=zero_point is not None,
            MASK=where is not None,
            num_warps=_WARPS,
        )
    return view.written(out)


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
    from q_kernels.gpu.jit import fake as jit

    view = views.view_of(x, tuple(scale.shape))
    tile = views.tile(view, _ELEMENTS, sums=learns)
    out = view.empty(x, x.dtype)
    sums = torch.empty(tile.chunks, 1, view.matrix[0], device=x.device) if learns else out
    scales = view.spread(scale)
    with views.launching(x):
        jit.gradients[(tile.programs,)](
            view.read(grad),
            view.read(x),
            out if where is None else view.read(where).view(torch.uint8),
            scales,
            scales if zero_point is None else view.spread(zero_point),
            out,
            sums,
            float(qmin),
            float(qmax),
            **views.numbers(view, tile),
            ZERO=zero_point is not None,
            MASK=where is not None,
            LEARNS=learns,
            num_warps=_WARPS,
        )
    return view.written(out), view.gathered(sums).reshape(scale.shape).float() if learns else None


fake_quantize = (Kernel("gpu-fused", _refuses_levels, lambda *_: _RATE, _levels),)
fake_quantize_grad = (Kernel("gpu-fused", _refuses_gradients, lambda *_: _RATE, _gradients),)
