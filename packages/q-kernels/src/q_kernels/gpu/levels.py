"""Fake quantization to a few levels on a GPU: one pass over memory forward, and one backward.

The meaning is in `q_core.ops`; the arguments are the same. Values are those of the meaning, bit for bit.

A number is compared with every threshold, and what each width gets is a sum of its own: no search, no index that is
kept, no scattering. The levels, the thresholds and the sums of a program stay in registers, of which there are enough
for 16 levels. The sums have two stages, as in `q_kernels.gpu.fake`.
"""

import torch
from torch import Tensor

from q_core.kernels import Kernel
from q_kernels.gpu import views
from q_kernels.gpu.views import Rows

# Never measured: there was no GPU. Above that of plain torch, which searches, gathers and scatters.
_RATE = 1.0

_MOST = 16  # levels
_WARPS = 4


def _refuses(x: Tensor, levels: Tensor, between: tuple[Tensor, ...], grads: tuple[Tensor, ...] = ()) -> str | None:
    if not levels.ndim or not 2 <= levels.shape[-1] <= _MOST:
        return f"it takes 2 to {_MOST} levels, along the last axis, not a table of shape {tuple(levels.shape)}"
    wanted = (*levels.shape[:-1], levels.shape[-1] - 1)
    for table in between:
        if tuple(table.shape) != wanted:
            return f"between levels of shape {tuple(levels.shape)} there are {wanted} others, not {tuple(table.shape)}"
    return views.refuses(x, (levels, *between), tuple(levels.shape[:-1]), grads=grads)


def _refuses_levels(x: Tensor, levels: Tensor, thresholds: Tensor) -> str | None:
    return _refuses(x, levels, (thresholds,))


def _refuses_gradients(
    grad: Tensor, x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor, learns: bool
) -> str | None:
    return _refuses(x, levels, (widths, thresholds), (grad,))


def _levels(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    if not x.numel():
        return torch.empty(x.shape, device=x.device)
    from q_kernels.gpu.jit import levels as jit

    view = views.view_of(x, tuple(levels.shape[:-1]))
    tile = views.tile(view, _elements(view, levels.shape[-1], sums=False), sums=False)
    out = view.empty(x, torch.float32)
    with views.launching(x):
        jit.levels[(tile.programs,)](
            view.read(x),
            view.spread(levels),
            view.spread(thresholds),
            out,
            **views.numbers(view, tile),
            LEVELS=levels.shape[-1],
            num_warps=_WARPS,
        )
    return view.written(out)


def _gradients(
    grad: Tensor, x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not x.numel():
        return torch.empty_like(x), *((torch.zeros_like(levels), torch.zeros_like(widths)) if learns else (None, None))
    from q_kernels.gpu.jit import levels as jit

    count = levels.shape[-1]
    view = views.view_of(x, tuple(levels.shape[:-1]))
    tile = views.tile(view, _elements(view, count, sums=learns), sums=learns)
    out = view.empty(x, x.dtype)
    sums = torch.empty(tile.chunks, count + 1, view.matrix[0], device=x.device) if learns else out
    with views.launching(x):
        jit.gradients[(tile.programs,)](
            view.read(grad),
            view.read(x),
            view.spread(levels),
            view.spread(thresholds),
            out,
            sums,
            **views.numbers(view, tile),
            LEVELS=count,
            LEARNS=learns,
            num_warps=_WARPS,
        )
    if not learns:
        return view.written(out), None, None
    total = view.gathered(sums)
    ends = (total[..., :1], total.new_zeros(*total.shape[:-1], count - 2), total[..., 1:2])
    grad_levels = torch.cat(ends, -1).reshape(levels.shape)
    shares = levels.detach().double().diff() / widths.detach()
    grad_widths = total[..., 2:].reshape(widths.shape) * shares
    return view.written(out), grad_levels.float(), grad_widths.float()


def _elements(view: Rows, count: int, *, sums: bool) -> int:
    """Choose the elements of a tile, so that tables and sums fit in the registers of a thread.

    A thread of a tile has as many sums for each width as elements; and where neighbouring elements have tables of their
    own, as many tables.
    """
    if not sums or count <= 4:
        return 1024
    return 256 if view.short and count > 8 else 512


fake_quantize_levels = (Kernel("gpu-fused", _refuses_levels, lambda *_: _RATE, _levels),)
fake_quantize_levels_grad = (Kernel("gpu-fused", _refuses_gradients, lambda *_: _RATE, _gradients),)
