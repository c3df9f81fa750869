r"""Fake quantization to a uniform grid in one step, where training and reconstruction spend their time.

The meaning is `dequantize(quantize(x))` with the nearest code. That composition is ten passes over the tensor and keeps
six tensors of its size for the backward pass; an operator keeps `x` alone and computes the rest again. The operators
are found by their names, `q_core.fake_quantize` and `q_core.fake_quantize_grad`, see `q_core.kernels`.

With $u = x/s$, $n = q_{min} - z$ and $p = q_{max} - z$ the gradients are

$$
\frac{\partial \hat x}{\partial x} = [n \le u \le p], \qquad
\frac{\partial \hat x}{\partial s} =
\begin{cases} \lfloor u \rceil - u & n \le u \le p \\ n & u < n \\ p & u > p \end{cases}
$$

(Esser et al. 2020, arXiv:1902.08153, eq. 3), summed over the elements that share a scale.

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
    if _seen_as_parts(x, scale, zero_point):
        codes = functional.quantize(x, scale, zero_point, qmin=qmin, qmax=qmax)
        levels = functional.dequantize(codes, scale, zero_point)
        return levels if where is None else torch.where(where, levels, x)
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, where)  # type: ignore[no-untyped-call]
    return result


def _seen_as_parts(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    """Whether somebody looks at the single operations, or needs a gradient that the operator does not compute."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    tensors = (x, scale) if zero_point is None else (x, scale, zero_point)
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return True  # such as a tensor in shards, which knows how each operation of torch deals with it
    return zero_point is not None and zero_point.requires_grad


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


FAKE_QUANTIZE = Operator("q_core.fake_quantize", _meaning)
FAKE_QUANTIZE_GRAD = Operator("q_core.fake_quantize_grad", _gradient_meaning)
