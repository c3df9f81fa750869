r"""Fake quantization in one step, where training and reconstruction spend their time.

The meaning is `dequantize(quantize(x))` with the nearest code. That composition is ten passes over the tensor and keeps
six tensors of its size for the backward pass; an operator keeps `x` alone and computes the rest again. The operators
are found by their names, `q_core.fake_quantize` and `q_core.fake_quantize_grad` for a uniform grid,
`q_core.fake_quantize_levels` and `q_core.fake_quantize_levels_grad` for any levels, see `q_core.kernels`.

On a uniform grid, with $u = x/s$, $n = q_{min} - z$ and $p = q_{max} - z$, the gradients are

$$
\frac{\partial \hat x}{\partial x} = [n \le u \le p], \qquad
\frac{\partial \hat x}{\partial s} =
\begin{cases} \lfloor u \rceil - u & n \le u \le p \\ n & u < n \\ p & u > p \end{cases}
$$

(Esser et al. 2020, arXiv:1902.08153, eq. 3), summed over the elements that share a scale. Any levels
$L_0 < \dots < L_m$, a distance $w_k$ apart, have the gradients of

$$
\tilde Q(x) = \mathrm{clamp}(x, L_0, L_m) + \sum_k w_k\, r_k(x), \qquad
r_k(x) = \begin{cases} (\hat x - x)/w_k & x \text{ between } L_{k-1} \text{ and } L_k \\ 0 & \text{else} \end{cases}
$$

with $r_k$ held constant: inside the range one distance alone learns, from the residual; outside, the end of the range.
With the distances of equal steps that is the gradient above.

There is no operator of torch.library, on purpose. A compiler and an exporter see the composition instead: the one fuses
it with its neighbours, and the graph of the other holds standard operators only, so that it can become ONNX and loads
without this package. An `autograd.Function` is enough for eager mode, and works under `torch.func`.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from q_core import functional
from q_core.kernels import Operator


def fake_quantize(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."] | None = None,
    *,
    qmin: int,
    qmax: int,
    where: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Map reals to the nearest levels of a uniform grid: `dequantize(quantize(x))` with ties to the even code.

    The backward pass keeps `x`, and `where` if there is one, and no other tensor of that size.

    Args:
        x: Reals to quantize, in the units of the layer.
        scale: Real width of one code. Positive. Tiles `x` (see `q_core.functional.broadcast_scale`).
        zero_point: Code of real zero. Integral. Shape of `scale`. None means 0.
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.
        where: Which elements to quantize; the others pass through. None means all.

    Returns:
        Levels, in the wider dtype of `x`, `scale` and `zero_point`.

    Raises:
        ShapeError: `scale` does not tile `x`.

    Gradient:
        To `x`: 1 inside the closed range and where nothing is quantized, else 0. To `scale`: the nearest code minus the
        code coordinate inside, the end of the range outside, 0 where nothing is quantized.

    Source:
        Jacob et al. 2018, arXiv:1712.05877, eq. 1; gradient Esser et al. 2020, arXiv:1902.08153, eq. 3; elements that
        pass: Wei et al. 2022 (QDrop), arXiv:2203.05740, eq. 8.
    """
    learns_zero = zero_point is not None and zero_point.requires_grad  # the operator has no gradient for it
    if learns_zero or _seen_as_parts(x, scale, *(() if zero_point is None else (zero_point,))):
        codes = functional.quantize(x, scale, zero_point, qmin=qmin, qmax=qmax)
        levels = functional.dequantize(codes, scale, zero_point)
        return levels if where is None else torch.where(where, levels, x)
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, where)  # type: ignore[no-untyped-call]
    return result


def _seen_as_parts(*tensors: Tensor) -> bool:
    """Whether somebody looks at the single operations."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    # Such as a tensor in shards, which knows how each operation of torch deals with it.
    return any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)


class _FakeQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, where: Tensor | None
    ) -> Tensor:
        levels: Tensor = FAKE_QUANTIZE(x, scale, zero_point, qmin, qmax, where)
        return levels

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, ctx.qmin, ctx.qmax, where = inputs
        ctx.save_for_backward(x, scale, zero_point, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, where = ctx.saved_tensors
        # What a kernel computes cannot be differentiated by the incoming gradient, which a second derivative needs.
        run = _gradient_meaning if torch.is_grad_enabled() else FAKE_QUANTIZE_GRAD
        learns = ctx.needs_input_grad[1]
        grad_x, grad_scale = run(grad, x, scale, zero_point, ctx.qmin, ctx.qmax, where, learns)
        return grad_x, grad_scale if learns else None, None, None, None, None


def _range(scale: Tensor, zero_point: Tensor | None, ends: tuple[int, int], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return scale and zero point, broadcast to a tensor of that shape, and the ends of the code coordinate."""
    scale = functional.broadcast_scale(scale, shape)
    if zero_point is None:
        return scale, None, *ends
    zero = functional.broadcast_scale(zero_point, shape)
    return scale, zero, ends[0] - zero, ends[1] - zero


def _meaning(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, where: Tensor | None) -> Tensor:
    step, zero, low, high = _range(scale, zero_point, (qmin, qmax), tuple(x.shape))
    # Only the first two may widen the dtype; what follows reuses the memory.
    levels = torch.clamp(x / step, low, high).round_()
    if zero is not None:
        levels.add_(zero).clamp_(qmin, qmax).sub_(zero)
    levels.mul_(step)
    return levels if where is None else torch.where(where, levels, x)


def _gradient_meaning(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    where: Tensor | None,
    learns: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients to `x` and, where it learns, to the scale, in their dtypes."""
    with torch.no_grad():
        step, _, low, high = _range(scale, zero_point, (qmin, qmax), tuple(x.shape))
        coordinate = x / step
        outside = (coordinate < low) | (coordinate > high)  # a NaN is inside, and stays one
        residual = None
        if learns:
            residual = torch.clamp(coordinate, low, high).round_().sub_(coordinate.masked_fill(outside, 0))
        del coordinate
        if where is not None:
            outside = outside & where
    grad_x = grad.masked_fill(outside, 0).to(x.dtype)
    if residual is None:
        return grad_x, None
    parts = grad * residual
    if where is not None:
        parts = parts.masked_fill(~where, 0)
    return grad_x, functional.sum_tiles(parts, tuple(scale.shape)).to(scale.dtype)


def fake_quantize_levels(
    x: Float[Tensor, "*shape"],
    levels: Float[Tensor, "*tiles n"],
    widths: Float[Tensor, "*tiles n-1"],
    thresholds: Float[Tensor, "*tiles n-1"],
) -> Float[Tensor, "*shape"]:
    r"""Map reals to the nearest of any levels.

    The backward pass keeps `x` and the tables, and no other tensor of the size of `x`.

    Args:
        x: Reals to quantize.
        levels: Levels in ascending order along the last axis; the axes before it tile `x`.
        widths: Distances between neighbouring levels, positive. Their values are those of `levels.diff()`; apart from
            that they only say where the gradient goes, and a grid that learns distances gives its own.
        thresholds: What separates the levels, see `q_core.functional.middles`. They get no gradient.

    Returns:
        Levels, in the wider dtype of `x` and the tables.

    Raises:
        ShapeError: `levels` does not tile `x`.

    Gradient:
        To `x`: 1 inside the closed range of the levels, else 0. To the lowest and the highest level: that of the
        elements beyond them. To a width: the level minus `x`, divided by the width, of the elements between its two
        levels. That is nuLSQ's gradient where the widths are its steps, and where they are `levels.diff()` the same
        straight-through gradient for any other way to make levels.

    Source:
        Gongyo et al. 2024 (nuLSQ), supplement, eq. 5, 10 and 12; see the module for the form in which they are used.
    """
    if _seen_as_parts(x, levels, widths):
        return _levels_in_parts(x, levels, widths, thresholds)
    result: Tensor = _FakeQuantizeLevels.apply(x, levels, widths, thresholds)  # type: ignore[no-untyped-call]
    return result


_FEW = 16  # so many comparisons a compiler fuses into one pass; a search among more is faster


def _levels_in_parts(x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor) -> Tensor:
    rows, table = _rows(x, levels)
    edges = thresholds.detach().reshape(table.shape[0], -1).to(table.dtype)
    index = _compared(rows.detach(), edges)
    nearest = _keep_nan(table.detach().gather(1, index), rows.detach())
    inner = functional.closed_clamp(rows, table[:, :1], table[:, -1:])
    cell = _cell(index, nearest, inner.detach(), table.shape[1])
    width = widths.reshape(table.shape[0], -1).to(table.dtype).gather(1, cell)
    residual = ((nearest - inner) / width).detach()
    out = functional.straight_through(nearest, inner + width * residual)
    return functional.from_tiles(out, tuple(levels.shape[:-1]), tuple(x.shape))


def _compared(rows: Tensor, edges: Tensor) -> Tensor:
    """Count the edges strictly below each element."""
    if edges.shape[1] > _FEW:
        return torch.searchsorted(edges.contiguous(), rows.contiguous())
    index = torch.zeros_like(rows, dtype=torch.int64)
    for edge in edges.unbind(1):
        index = index + (rows > edge.unsqueeze(1))
    return index


def _rows(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the elements that share a table as rows, and the tables, in their wider dtype."""
    rows = functional.to_tiles(x, tuple(levels.shape[:-1]))
    wide = torch.promote_types(x.dtype, levels.dtype)
    return rows.to(wide), levels.reshape(-1, levels.shape[-1]).to(wide)


def _keep_nan(levels: Tensor, x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, levels)


def _cell(index: Tensor, nearest: Tensor, x: Tensor, levels: int) -> Tensor:
    """Number the width that lies between the two levels around each element."""
    return torch.where(x > nearest, index, index - 1).clamp(0, levels - 2)


class _FakeQuantizeLevels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor) -> Tensor:
        nearest: Tensor = FAKE_QUANTIZE_LEVELS(x, levels, thresholds)
        return nearest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, levels, widths, thresholds = ctx.saved_tensors
        run = _levels_gradient if torch.is_grad_enabled() else FAKE_QUANTIZE_LEVELS_GRAD
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_x, grad_levels, grad_widths = run(grad, x, levels, widths, thresholds, learns)
        return grad_x, grad_levels, grad_widths, None


def _levels_meaning(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    rows, table = _rows(x, levels)
    edges = thresholds.reshape(table.shape[0], -1).to(table.dtype).contiguous()
    nearest = _keep_nan(table.gather(1, torch.searchsorted(edges, rows.contiguous())), rows)
    return functional.from_tiles(nearest, tuple(levels.shape[:-1]), tuple(x.shape))


def _levels_gradient(
    grad: Tensor, x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients to `x` and, where they learn, to the levels and to the widths, in their dtypes.

    Of the levels, only the first and the last have a gradient.
    """
    tiles = tuple(levels.shape[:-1])
    with torch.no_grad():
        rows, table = _rows(x, levels)
        below, above = rows < table[:, :1], rows > table[:, -1:]
    upstream = functional.to_tiles(grad, tiles)
    inside = upstream.masked_fill(below | above, 0)
    grad_x = functional.from_tiles(inside, tiles, tuple(x.shape)).to(x.dtype)
    if not learns:
        return grad_x, None, None
    with torch.no_grad():
        edges = thresholds.reshape(table.shape[0], -1).to(table.dtype).contiguous()
        index = torch.searchsorted(edges, rows.contiguous())
        nearest = _keep_nan(table.gather(1, index), rows)
        cell = _cell(index, nearest, rows, table.shape[1])
        residual = (nearest - rows).masked_fill(below | above, 0)
    # Many terms go to few sums one after the other, so they are added in float64.
    terms = inside.double() * residual
    sums = torch.zeros(widths.reshape(table.shape[0], -1).shape, dtype=torch.float64, device=x.device)
    sums = sums.scatter_add(1, cell, terms).reshape(widths.shape)
    wide = upstream.double()
    ends = [wide.masked_fill(~beyond, 0).sum(1, keepdim=True) for beyond in (below, above)]
    middle = wide.new_zeros(table.shape[0], table.shape[1] - 2)
    grad_levels = torch.cat([ends[0], middle, ends[1]], 1).reshape(levels.shape)
    return grad_x, grad_levels.to(levels.dtype), (sums / widths).to(widths.dtype)


FAKE_QUANTIZE = Operator("q_core.fake_quantize", _meaning)
FAKE_QUANTIZE_GRAD = Operator("q_core.fake_quantize_grad", _gradient_meaning)
FAKE_QUANTIZE_LEVELS = Operator("q_core.fake_quantize_levels", _levels_meaning)
FAKE_QUANTIZE_LEVELS_GRAD = Operator("q_core.fake_quantize_levels_grad", _levels_gradient)
