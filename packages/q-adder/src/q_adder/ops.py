r"""The adder operators: schema, meaning in plain torch, shape rule and gradient.

`q_adder::distance_conv2d` is the forward pass; `..._input_grad` and `..._weight_grad` are its gradients;
`q_adder::code_distance_conv2d` is the distance of integer codes. All work on an input that is padded already, because a
padded zero is a real tap: it contributes $-|W|$.

Each is an `Operator`: faster kernels that another package offers take its place where they can, see `q_core.kernels`.
The meanings never build the cube of positions x outputs x taps. They unfold a panel of positions at a time, so the peak
memory is that of inputs, outputs and one panel.

At exponent 1 the gradients are the published ones, not the derivative of the absolute value: $X - W$ to the weight and
$\mathrm{HardTanh}(W - X)$ to the input (Chen et al. 2020, arXiv:1912.13200, eq. 5 and 6). Above 1 they are the
derivative. They exist backwards only: a published gradient is no derivative, so forward mode is refused.

Layers and functions call the operators through `differentiable`, which `torch.func.grad` and `torch.func.vjp` can see
through.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from q_adder import thermometer
from q_core.errors import BackendError, DataError
from q_core.kernels import Operator

_PANEL = 1 << 21  # elements of a panel: 8 MiB in float32, within the last-level cache of a server


def output_size(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Return the number of output positions along one axis of a padded input."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    # A sum of hundreds of absolute differences loses all meaning in 8 or 11 bits of significand.
    return torch.promote_types(dtype, torch.float32)


def _panels(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int
) -> Iterator[tuple[tuple[slice, slice, slice], int, Tensor, tuple[slice, slice]]]:
    """Cut the work into panels: some rows of one image, or several images where they are small.

    Yields:
        The index of the output block (images, channels, rows), the group, the unfolded panel [taps, images x positions]
        in the working dtype, and the index of the input block (channels, rows) that it reads.
    """
    inputs, outputs = x.shape[1] // groups, weight.shape[0] // groups
    kernel = (weight.shape[2], weight.shape[3])
    rows, columns = (output_size(x.shape[2 + a], kernel[a], stride[a], dilation[a]) for a in (0, 1))
    row = max(1, inputs * kernel[0] * kernel[1] * columns)
    step = max(1, min(rows, _PANEL // row))
    together = max(1, _PANEL // (row * step)) if step == rows else 1
    reach = dilation[0] * (kernel[0] - 1) + 1
    for first in range(0, x.shape[0], together):
        images = slice(first, min(x.shape[0], first + together))
        for group in range(groups):
            channels = slice(group * inputs, (group + 1) * inputs)
            for top in range(0, rows, step):
                bottom = min(rows, top + step)
                span = slice(top * stride[0], (bottom - 1) * stride[0] + reach)
                window = x[images, channels, span].to(_work_dtype(x.dtype))
                unfolded = F.unfold(window, kernel, dilation=tuple(dilation), stride=tuple(stride))
                panel = unfolded.transpose(0, 1).flatten(1)  # of one image a view
                block = (images, slice(group * outputs, (group + 1) * outputs), slice(top, bottom))
                yield block, group, panel, (channels, span)


def _table(weight: Tensor, groups: int) -> Tensor:
    """Kernels as [group, output, tap] in the working dtype."""
    return weight.to(_work_dtype(weight.dtype)).reshape(groups, weight.shape[0] // groups, -1)


_functions: dict[Any, type[torch.autograd.Function]] = {}


def differentiable(operator: Any, *arguments: Any) -> Tensor:
    """Call an operator of this module so that `torch.func` can differentiate it.

    An operator of `torch.library` alone cannot be differentiated by `torch.func`, and drops the tangents of forward
    mode without a word.

    Args:
        operator: `distance_conv2d`, `distance_matmul`, `tied_distance_conv2d` or `tied_distance_matmul`, or one that
            computes a gradient of these.
        *arguments: Its arguments.

    Raises:
        BackendError: An argument carries a tangent of forward mode.
    """
    # A compiler takes the operator itself into its graph, where it can see the gradient.
    call = operator if torch.compiler.is_compiling() else _functions[operator].apply
    out: Tensor = call(*arguments)
    return out


def _give_gradient(operator: Any, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Register the gradient of an operator, with `torch.library` and for `differentiable`."""
    operator.register_autograd(backward, setup_context=save)
    _see_through(operator, backward, save)


def _see_through(operator: Any, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Make an operator one that `differentiable` can call."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise BackendError(
                "adder operators have no forward mode: their published gradient is no derivative and goes backwards "
                "only; use backward(), torch.autograd.grad, torch.func.grad or torch.func.vjp"
            )

    _functions[operator] = Function


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise BackendError(
        "adder operators have no second derivative: their gradient is the published one, which is no derivative; "
        "differentiate once, without create_graph=True"
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


@torch.library.custom_op("q_adder::distance_conv2d", mutates_args=())
def distance_conv2d(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    """Return minus the sum of absolute differences, to the power `exponent`, of every window and every kernel.

    Args:
        x: Padded input [n, c, h, w].
        weight: Kernels [o, c / groups, kh, kw].
        stride: Two steps, in pixels.
        dilation: Two spacings of the taps, in pixels.
        groups: Groups of channels that do not see each other.
        exponent: 1 for the adder operator, up to 2 while it is annealed.
    """
    out: Tensor = DISTANCE(x, weight, stride, dilation, groups, exponent)
    return out


def _distance_meaning(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    out = _output_like(x, weight, stride, dilation)
    table = _table(weight, groups)
    for block, group, panel, _ in _panels(x, weight, stride, dilation, groups):
        # Squared distances by way of a matrix product would lose what rows that are close have in common.
        exactly = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(table[group], panel.T.contiguous(), p=exponent, compute_mode=exactly)
        if exponent != 1.0:
            distance = distance.pow(exponent)
        target = out[block].transpose(0, 1)
        target.copy_(distance.neg_().reshape(target.shape))
    return out


DISTANCE = Operator("q_adder.distance_conv2d", _distance_meaning)


def _output_like(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    rows, columns = (output_size(x.shape[2 + a], weight.shape[2 + a], stride[a], dilation[a]) for a in (0, 1))
    return x.new_empty(x.shape[0], weight.shape[0], rows, columns)


@distance_conv2d.register_fake
def _(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float) -> Tensor:
    return _output_like(x, weight, stride, dilation)


@torch.library.custom_op("q_adder::distance_conv2d_input_grad", mutates_args=())
def distance_conv2d_input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    """Return the gradient to the padded input: the sum over outputs of slope(w - x) times the incoming gradient.

    The slope is HardTanh at exponent 1 and `p |d|^(p-1) sign(d)` above. The arguments are those of `distance_conv2d`.
    """
    result: Tensor = INPUT_GRAD(grad, x, weight, stride, dilation, groups, exponent)
    return result


def _input_grad_meaning(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    result = torch.zeros(x.shape, dtype=_work_dtype(x.dtype), device=x.device)
    table = _table(weight, groups).unsqueeze(-1)
    kernel = (weight.shape[2], weight.shape[3])
    for block, group, panel, (channels, span) in _panels(x, weight, stride, dilation, groups):
        incoming = grad[block].to(result.dtype).transpose(0, 1).flatten(1)
        total, slope = torch.zeros_like(panel), torch.empty_like(panel)
        for output in range(incoming.shape[0]):
            torch.sub(table[group, output], panel, out=slope)
            total.addcmul_(_slope_(slope, exponent), incoming[output])
        size = (span.stop - span.start, x.shape[3])
        columns = total.reshape(len(total), block[0].stop - block[0].start, -1).transpose(0, 1)
        folded = F.fold(columns, size, kernel, dilation=tuple(dilation), stride=tuple(stride))
        result[block[0], channels, span] += folded
    return result.to(x.dtype)


INPUT_GRAD = Operator("q_adder.distance_conv2d_input_grad", _input_grad_meaning)


def _slope_(difference: Tensor, exponent: float) -> Tensor:
    if exponent == 1.0:
        return difference.clamp_(-1, 1)
    return torch.sign(difference).mul_(exponent).mul_(difference.abs_().pow_(exponent - 1))


@distance_conv2d_input_grad.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("q_adder::distance_conv2d_weight_grad", mutates_args=())
def distance_conv2d_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    r"""Return the gradient to the kernels.

    At exponent 1 it is $\sum (X - W)\,G$, at 2 twice that: a convolution weight gradient minus $W \sum G$, so no panel
    is needed. In between it is the derivative of the power. The arguments are those of `distance_conv2d`.
    """
    if exponent in (1.0, 2.0):
        # In a narrow dtype the two terms would cancel to nothing but their rounding errors.
        x, kernels, grad = (tensor.to(_work_dtype(tensor.dtype)) for tensor in (x, weight, grad))
        correlation: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x, list(weight.shape), grad, stride=stride, padding=0, dilation=dilation, groups=groups
        )
        total = exponent * (correlation - kernels * grad.sum((0, 2, 3)).reshape(-1, 1, 1, 1))
        return total.to(weight.dtype).contiguous()
    table = _table(weight, groups)
    total = torch.zeros_like(table)
    for block, group, panel, _ in _panels(x, weight, stride, dilation, groups):
        incoming = grad[block].to(table.dtype).transpose(0, 1).flatten(1)
        for output in range(incoming.shape[0]):
            slope = _slope_(panel - table[group, output].unsqueeze(-1), exponent)
            # Not a matrix product, which autocast would compute in a narrow dtype.
            total[group, output] += slope.mul_(incoming[output]).sum(1)
    return total.reshape(weight.shape).to(weight.dtype)


@distance_conv2d_weight_grad.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, exponent: float
) -> Tensor:
    return weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.stride, ctx.dilation, ctx.groups, ctx.exponent = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    arguments = (grad.contiguous(), x, weight, ctx.stride, ctx.dilation, ctx.groups, ctx.exponent)
    grad_x = differentiable(distance_conv2d_input_grad, *arguments) if ctx.needs_input_grad[0] else None
    grad_weight = differentiable(distance_conv2d_weight_grad, *arguments) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None, None, None


for _operator in (distance_conv2d_input_grad, distance_conv2d_weight_grad):
    _see_through(_operator, _no_second_derivative, _save_nothing)
_give_gradient(distance_conv2d, _backward, _save)


@torch.library.custom_op("q_adder::code_distance_conv2d", mutates_args=())
def code_distance_conv2d(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> Tensor:
    """Return the sum of absolute differences of the codes of every window and every kernel, exactly.

    Args:
        x: Codes of the padded input [n, c, h, w], uint8, below `2**bits`.
        weight: Codes of the kernels [o, c / groups, kh, kw], uint8, below `2**bits`.
        stride: Two steps, in pixels.
        dilation: Two spacings of the taps, in pixels.
        groups: Groups of channels that do not see each other.
        bits: Bits of a code, 1 to 8.

    Returns:
        Distances [n, o, i, j], int32.
    """
    out: Tensor = CODE_DISTANCE(x, weight, stride, dilation, groups, bits)
    return out


@code_distance_conv2d.register_fake
def _(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int) -> Tensor:
    return _output_like(x, weight, stride, dilation).to(torch.int32)


def _code_distance_meaning(
    x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int, bits: int
) -> Tensor:
    # Sums of integers are exact in a float until they need one more bit than its significand has.
    exact = weight.shape[1:].numel() * ((1 << bits) - 1) < 1 << 24
    dtype = torch.float32 if exact else torch.float64
    return _distance_meaning(x.to(dtype), weight.to(dtype), stride, dilation, groups, 1.0).neg_().to(torch.int32)


CODE_DISTANCE = Operator("q_adder.code_distance_conv2d", _code_distance_meaning, thermometer.KERNELS)


@torch.library.custom_op("q_adder::tied_distance_conv2d", mutates_args=())
def tied_distance_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return minus the distance of quantized inputs and kernels that share a scale, computed on their integer codes.

    Args:
        x: Padded input whose values are levels: `scale` times `q - zero_point` with codes q from 0 to `2**bits - 1`.
        weight: Kernels whose values are `scale` times any integer.
        scale: Real width of one code, one element.
        zero_point: Code of real zero, integral, one element.
        bits: Bits of the codes of the input, 1 to 8.
        stride: Two steps, in pixels.
        dilation: Two spacings of the taps, in pixels.
        groups: Groups of channels that do not see each other.

    Returns:
        `-scale` times the integer distance, in the dtype of `x`: what the packed layer computes, bit for bit.

    Raises:
        DataError: The input holds a NaN.

    Gradient:
        That of `distance_conv2d` on the reals.
    """
    codes = _as_bytes(codes_of(x, scale, zero_point))
    kernels, offset = split_codes(codes_of(weight, scale, zero_point), bits)
    distance: Tensor = CODE_DISTANCE(codes, kernels, stride, dilation, groups, bits)
    return dequantized(distance, offset, scale).to(x.dtype)


def codes_of(levels: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the codes of reals that are levels already, as integers in float32 or wider."""
    wide = torch.promote_types(levels.dtype, scale.dtype)
    return torch.round(levels.to(wide) / scale).add_(zero_point)


@torch.library.custom_op("q_adder::as_bytes", mutates_args=())
def as_bytes(codes: Tensor) -> Tensor:
    """Turn integers from 0 to 255 in a floating-point dtype into bytes.

    Raises:
        DataError: A code is not a number, because what was quantized is not.
    """
    return _as_bytes(codes)


@as_bytes.register_fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.uint8)


def _as_bytes(codes: Tensor) -> Tensor:
    if bool(codes.sum().isnan()):
        bad = int(codes.isnan().sum())
        raise DataError(
            f"{bad} of {codes.numel()} inputs are NaN, for which there is no code: find where they come from"
        )
    return codes.to(torch.uint8)


def split_codes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Split weight codes into what lies among the codes of the input, and what is left over.

    The distance of a code beyond the range to any code inside it is that of the end of the range plus a constant.

    Args:
        codes: Integers, any range.
        bits: Bits of the codes of the input.

    Returns:
        Codes in `[0, 2**bits - 1]`, uint8, and what is left over, summed over each kernel, int32 [outputs].
    """
    inside = codes.clamp(0, (1 << bits) - 1)
    return inside.to(torch.uint8), (codes - inside).abs().flatten(1).sum(1).to(torch.int32)


def dequantized(distance: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """Return `-scale * (distance + offset)` with one offset per channel; the one place that does."""
    shape = (1, -1, *[1] * (distance.ndim - 2))
    return (distance + offset.reshape(shape)).to(scale.dtype) * -scale


@tied_distance_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return _output_like(x, weight, stride, dilation)


def _tied_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, _, ctx.stride, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(x, weight)


def _tied_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    arguments = (grad.contiguous(), x, weight, ctx.stride, ctx.dilation, ctx.groups, 1.0)
    grad_x = differentiable(distance_conv2d_input_grad, *arguments) if ctx.needs_input_grad[0] else None
    grad_weight = differentiable(distance_conv2d_weight_grad, *arguments) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None, None, None, None, None


_give_gradient(tied_distance_conv2d, _tied_backward, _tied_save)


@torch.library.custom_op("q_adder::distance_matmul", mutates_args=())
def distance_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return minus the l1 distance of every row of `a` and every row of `b`, batch by batch.

    It is `distance_conv2d` with 1x1 kernels and one group per batch, so the kernels offered for that operator serve it.

    Args:
        a: Rows [batch, n, k].
        b: Rows [batch, m, k], in the dtype of `a`.

    Returns:
        Distances [batch, n, m].
    """
    if not (a.numel() and b.numel()):
        return a.new_zeros(a.shape[0], a.shape[1], b.shape[1])
    # Rows of `a` as kernels and rows of `b` as positions: the result then lies as it should, row by row.
    out: Tensor = DISTANCE(_positions(b), _kernels(a), [1, 1], [1, 1], a.shape[0], 1.0)
    return out.reshape(a.shape[0], a.shape[1], b.shape[1])


def _positions(rows: Tensor) -> Tensor:
    """Rows [batch, n, k] as one image [1, batch x k, n, 1]."""
    return rows.transpose(1, 2).reshape(1, -1, rows.shape[1], 1)


def _kernels(rows: Tensor) -> Tensor:
    """Rows [batch, n, k] as 1x1 kernels [batch x n, k, 1, 1]."""
    return rows.reshape(-1, rows.shape[2], 1, 1)


@distance_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[1])


@torch.library.custom_op("q_adder::distance_matmul_grad", mutates_args=())
def distance_matmul_grad(grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Return the gradient of `distance_matmul` to `a`: $\sum_m \mathrm{HardTanh}(b_m - a_n)\,G_{nm}$.

    The distance does not change when its operands change places, so the gradient to `b` is this with both places and
    the incoming gradient swapped.

    Args:
        grad: Incoming gradient [batch, n, m].
        a: Rows [batch, n, k].
        b: Rows [batch, m, k].
    """
    if not grad.numel() or not a.numel():
        return a.new_zeros(a.shape)
    incoming = grad.transpose(1, 2).reshape(1, -1, a.shape[1], 1)
    result: Tensor = INPUT_GRAD(incoming, _positions(a), _kernels(b), [1, 1], [1, 1], a.shape[0], 1.0)
    return result.reshape(a.shape[0], a.shape[2], a.shape[1]).transpose(1, 2).contiguous()


@distance_matmul_grad.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    wanted, swapped = ctx.needs_input_grad, grad.transpose(1, 2).contiguous()
    grad_a = differentiable(distance_matmul_grad, grad, a, b) if wanted[0] else None
    grad_b = differentiable(distance_matmul_grad, swapped, b, a) if wanted[1] else None
    return grad_a, grad_b


_see_through(distance_matmul_grad, _no_second_derivative, _save_nothing)
_give_gradient(distance_matmul, _matmul_backward, _save_operands)


@torch.library.custom_op("q_adder::code_distance_matmul", mutates_args=())
def code_distance_matmul(a: Tensor, b: Tensor, bits: int) -> Tensor:
    """Return the sum of absolute differences of the codes of every row of `a` and every row of `b`, exactly.

    It is `code_distance_conv2d` with 1x1 kernels and one group per batch.

    Args:
        a: Codes [batch, n, k], uint8, below `2**bits`.
        b: Codes [batch, m, k], uint8, below `2**bits`.
        bits: Bits of a code, 1 to 8.

    Returns:
        Distances [batch, n, m], int32.
    """
    return _code_distance_rows(a, b, bits)


def _code_distance_rows(a: Tensor, b: Tensor, bits: int) -> Tensor:
    if not (a.numel() and b.numel()):
        return a.new_zeros(a.shape[0], a.shape[1], b.shape[1], dtype=torch.int32)
    out: Tensor = CODE_DISTANCE(_positions(b), _kernels(a), [1, 1], [1, 1], a.shape[0], bits)
    return out.reshape(a.shape[0], a.shape[1], b.shape[1])


@code_distance_matmul.register_fake
def _(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[1], dtype=torch.int32)


@torch.library.custom_op("q_adder::tied_distance_matmul", mutates_args=())
def tied_distance_matmul(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return minus the distance of every row of `a` and every row of `b`, computed on their integer codes.

    Args:
        a: Rows [batch, n, k] whose values are levels, as in `tied_distance_conv2d`.
        b: Rows [batch, m, k] on the same levels, in the dtype of `a`.
        scale: Real width of one code, one element.
        zero_point: Code of real zero, integral, one element.
        bits: Bits of the codes, 1 to 8.

    Returns:
        `-scale` times the integer distances [batch, n, m], in the dtype of `a`.

    Raises:
        DataError: An operand holds a NaN.

    Gradient:
        That of `distance_matmul` on the reals.
    """
    codes = [_as_bytes(codes_of(rows, scale, zero_point)) for rows in (a, b)]
    distance = _code_distance_rows(codes[0], codes[1], bits)
    return rows_dequantized(distance, scale).to(a.dtype)


def rows_dequantized(distance: Tensor, scale: Tensor) -> Tensor:
    """Return `-scale * distance` for the distances of rows, which have no offsets."""
    return dequantized(distance, torch.zeros_like(scale, dtype=torch.int32), scale)


@tied_distance_matmul.register_fake
def _(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[1])


def _save_levels(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _tied_matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_matmul_backward(ctx, grad), None, None, None)


_give_gradient(tied_distance_matmul, _tied_matmul_backward, _save_levels)
