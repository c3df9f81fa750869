r"""The operators of rounding borders: schema, meaning in plain torch, shape rule and gradient.

`q_aquant::border_conv2d` convolves the patches of an input after it has quantized them with a border;
`q_aquant::border_quantize` quantizes an input with borders that belong to its channels. `..._grad` are their gradients.
Each is an `Operator`: faster kernels that another package offers take its place where they can, see `q_core.kernels`.

They compute what a `Quantizer` of a `UniformGrid` with one scale and a `LearnedBorder` or `FusedBorder` bounded by
`rectified`, inside a `Gradual` or not, computes on patches:

$$ \hat{x} = s\,(u + a\,(\lceil u - B \rceil - u)), \quad u = clip(x / s,\ q_{min} - z_0,\ q_{max} - z_0) $$

with the border $B$ of `q_aquant.border`, zero point $z_0$ and influence $a$. The gradient is straight-through: with $G$
that of $\hat{x}$ it is $G$ to $x$ inside the range, $-a\,s\,G$ to $B$, and $\hat{x} / s - u\,[x\text{ inside}]$ times
$G$ to $s$. A code between the ends is never sent beyond them, because $0 \leq B < 1$.

Arguments that all share:

- `grid`: [3], scale, zero point and influence in one tensor, so that nothing has to be read on the host. Only the scale
  gets a gradient.
- `codes`: `[qmin, qmax, low, high]`; the border's polynomial is in $(u - low) / (high - low)$.
- `geometry`: `[stride, stride, dilation, dilation, groups]`.

No unfolded tensor outlives its turn: patches are built for a few images at a time, and again in the backward pass.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from q_aquant.border import LARGEST, SLOPE
from q_core.kernels import Operator

_PANEL = 1 << 18
"""Elements of the unfolded tensor that are held at once, 1 MiB of float32: what stays in a cache beside the rest."""


def unfold_patches(
    x: Float[Tensor, "n c h w"], kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Float[Tensor, "n c k l"]:
    """Gather the windows of a padded input.

    Returns:
        [images, channels, kernel positions, output positions], both kinds of positions row by row.
    """
    columns = F.unfold(x, kernel_size, dilation=dilation, stride=stride)
    return columns.reshape(len(x), x.shape[1], kernel_size[0] * kernel_size[1], columns.shape[2])


def output_size(x: Tensor, weight: Tensor, geometry: list[int]) -> tuple[int, int]:
    """Return rows and columns of positions on a padded input."""
    rows, columns = (
        (x.shape[2 + a] - geometry[2 + a] * (weight.shape[2 + a] - 1) - 1) // geometry[a] + 1 for a in (0, 1)
    )
    return rows, columns


@dataclasses.dataclass
class _Found:
    """Everything about some quantized elements that the gradient wants to know; see `_quantized`."""

    inside: Tensor
    u: Tensor
    powers: list[Tensor]
    sigmoid: Tensor
    open: Tensor
    mean: Tensor | None
    level: Tensor
    value: Tensor


def _quantized(x: Tensor, grid: Tensor, coefficients: Tensor, fusion: Tensor | None, codes: list[float]) -> _Found:
    """Quantize elements [n, c, k, l] with coefficients [terms, c, k] and fusion weights [c, k] or None."""
    scale, zero, influence = grid
    smallest, largest, low, high = codes
    coordinate = x / scale
    u = torch.clamp(coordinate, smallest - zero, largest - zero)
    v = (u - low) / (high - low)
    terms = coefficients.unsqueeze(-1)
    z = terms[-1].expand_as(v)
    for term in terms[:-1].flip(0):
        z = torch.addcmul(term, z, v)
    sigmoid = torch.sigmoid(z)
    opened = 0.5 + SLOPE * (sigmoid - 0.5)
    border, mean = opened.clamp(0, LARGEST), None
    if fusion is not None:
        mean = (border * fusion.unsqueeze(-1)).mean(2, keepdim=True)
        border = mean.clamp(0, LARGEST)
    base = torch.floor(u)
    rounded = base + torch.ceil(u - base - border)
    inside = ~((coordinate < smallest - zero) | (coordinate > largest - zero))
    powers = [torch.ones_like(v), v, v * v] if len(terms) <= 3 else [v**power for power in range(len(terms))]
    level = torch.lerp(u, rounded, influence)
    return _Found(inside, u, powers[: len(terms)], sigmoid, opened, mean, level, level * scale)


def _quantized_grad(
    grad: Tensor, found: _Found, grid: Tensor, fusion: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to elements, scale, coefficients and fusion weights."""
    scale, _, influence = grid
    to_x = grad.masked_fill(~found.inside, 0)
    to_scale = (grad * (found.level - found.u.masked_fill(~found.inside, 0))).sum()
    to_border = grad * (-influence * scale)
    to_fusion = grad.new_empty(0)
    if fusion is not None and found.mean is not None:
        within = (found.mean >= 0) & (found.mean <= LARGEST)
        shared = to_border.sum(2, keepdim=True).masked_fill(~within, 0) / grad.shape[2]
        to_fusion = (shared * found.open.clamp(0, LARGEST)).sum((0, 3))
        to_border = shared * fusion.unsqueeze(-1)
    within = (found.open >= 0) & (found.open <= LARGEST)
    to_z = (to_border * (SLOPE * found.sigmoid * (1 - found.sigmoid))).masked_fill(~within, 0)
    to_coefficients = torch.stack([(to_z * power).sum((0, 3)) for power in found.powers])
    return to_x, to_scale.reshape(1), to_coefficients, to_fusion


def _panels(x: Tensor, weight: Tensor, geometry: list[int]) -> Iterator[slice]:
    """Cut the batch into slices of a few images."""
    rows, columns = output_size(x, weight, geometry)
    images = max(1, _PANEL // max(1, x.shape[1] * weight.shape[2:].numel() * rows * columns))
    for first in range(0, len(x), images):
        yield slice(first, first + images)


def _patches(x: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    stride, dilation = (geometry[0], geometry[1]), (geometry[2], geometry[3])
    return unfold_patches(x, (weight.shape[2], weight.shape[3]), stride, dilation)


@torch.library.custom_op("q_aquant::border_conv2d", mutates_args=())
def border_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> Tensor:
    """Convolve the patches of a padded input, quantized with a border for every channel and kernel position.

    Args:
        x: Padded input [n, c, h, w].
        weight: Kernels [o, c / groups, kh, kw].
        bias: [o], or None.
        grid: Scale, zero point, influence.
        coefficients: Of the border [degree + 1, c, kh * kw].
        fusion: Weights that fuse the borders of a channel [c, kh * kw]; None leaves them as they are.
        codes: Smallest and largest code, ends of the border's range.
        geometry: Strides, dilations, groups.

    Returns:
        [n, o, rows, columns].
    """
    result: Tensor = CONV(x, weight, bias, grid, coefficients, fusion, codes, geometry)
    return result


def _conv_meaning(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> Tensor:
    groups = geometry[4]
    out = _output_like(x, weight, geometry)
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    for part in _panels(x, weight, geometry):
        patches = _quantized(_patches(x[part], weight, geometry), grid, coefficients, fusion, codes).value
        grouped = patches.reshape(len(patches), groups, -1, patches.shape[3])
        out[part] = (matrix @ grouped).reshape(out[part].shape)
    return out if bias is None else out.add_(bias.reshape(-1, 1, 1))


CONV = Operator("q_aquant.border_conv2d", _conv_meaning)


def _output_like(x: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *output_size(x, weight, geometry))


@border_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> Tensor:
    return _output_like(x, weight, geometry)


@torch.library.custom_op("q_aquant::border_conv2d_grad", mutates_args=())
def border_conv2d_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `border_conv2d` to input, weight, scale, coefficients and fusion weights.

    The last is of no element where there are none. The arguments are those of `border_conv2d`.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = CONV_GRAD(
        grad, x, weight, grid, coefficients, fusion, codes, geometry
    )
    return result


def _conv_grad_meaning(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, kernel = geometry[4], (weight.shape[2], weight.shape[3])
    stride, dilation = (geometry[0], geometry[1]), (geometry[2], geometry[3])
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    to_x, to_matrix = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(matrix)
    to_scale, to_coefficients = grid.new_zeros(1), torch.zeros_like(coefficients)
    to_fusion = grid.new_zeros(0) if fusion is None else torch.zeros_like(fusion)
    for part in _panels(x, weight, geometry):
        found = _quantized(_patches(x[part], weight, geometry), grid, coefficients, fusion, codes)
        grouped = found.value.reshape(len(found.value), groups, -1, found.value.shape[3])
        incoming = grad[part].reshape(len(grouped), groups, -1, grouped.shape[3])
        to_matrix += (incoming @ grouped.transpose(2, 3)).sum(0)
        to_patches = (matrix.transpose(1, 2) @ incoming).reshape(found.value.shape)
        to_elements, *others = _quantized_grad(to_patches, found, grid, fusion)
        to_x[part] = F.fold(to_elements.flatten(1, 2), x.shape[2:], kernel, dilation=dilation, stride=stride)
        for total, other in zip((to_scale, to_coefficients, to_fusion), others, strict=True):
            total += other
    return to_x, to_matrix.reshape(weight.shape), to_scale, to_coefficients, to_fusion


CONV_GRAD = Operator("q_aquant.border_conv2d_grad", _conv_grad_meaning)


@border_conv2d_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: Tensor,
    coefficients: Tensor,
    fusion: Tensor | None,
    codes: list[float],
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_fusion = grid.new_empty(0) if fusion is None else fusion.new_empty(fusion.shape)
    to_x, to_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    return to_x, to_weight, grid.new_empty(1), coefficients.new_empty(coefficients.shape), to_fusion


def _conv_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, grid, coefficients, fusion, ctx.codes, ctx.geometry = inputs
    ctx.save_for_backward(x, weight, grid, coefficients, fusion)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, grid, coefficients, fusion = ctx.saved_tensors
    to_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    if not any(ctx.needs_input_grad[place] for place in (0, 1, 3, 4, 5)):
        return (None, None, to_bias, *[None] * 5)
    to_x, to_weight, to_scale, to_coefficients, to_fusion = border_conv2d_grad(
        grad.contiguous(), x, weight, grid, coefficients, fusion, ctx.codes, ctx.geometry
    )
    to_grid = F.pad(to_scale, (0, 2))
    return to_x, to_weight, to_bias, to_grid, to_coefficients, None if fusion is None else to_fusion, None, None


border_conv2d.register_autograd(_conv_backward, setup_context=_conv_save)


@torch.library.custom_op("q_aquant::border_quantize", mutates_args=())
def border_quantize(x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]) -> Tensor:
    """Quantize an input with a border for every channel.

    Args:
        x: [n, c, ...].
        grid: Scale, zero point, influence.
        coefficients: Of the border [degree + 1, c].
        codes: Smallest and largest code, ends of the border's range.

    Returns:
        The shape of `x`, without gaps.
    """
    result: Tensor = QUANTIZE(x, grid, coefficients, codes)
    return result


def _as_patches(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 1, x.shape[2:].numel())


def _quantize_meaning(x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]) -> Tensor:
    found = _quantized(_as_patches(x), grid, coefficients.unsqueeze(2), None, codes)
    return found.value.reshape(x.shape)


QUANTIZE = Operator("q_aquant.border_quantize", _quantize_meaning)


@border_quantize.register_fake
def _(x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("q_aquant::border_quantize_grad", mutates_args=())
def border_quantize_grad(
    grad: Tensor, x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `border_quantize` to input, scale and coefficients."""
    result: tuple[Tensor, Tensor, Tensor] = QUANTIZE_GRAD(grad, x, grid, coefficients, codes)
    return result


def _quantize_grad_meaning(
    grad: Tensor, x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    found = _quantized(_as_patches(x), grid, coefficients.unsqueeze(2), None, codes)
    to_x, to_scale, to_coefficients, _ = _quantized_grad(_as_patches(grad), found, grid, None)
    return to_x.reshape(x.shape), to_scale, to_coefficients.squeeze(2)


QUANTIZE_GRAD = Operator("q_aquant.border_quantize_grad", _quantize_grad_meaning)


@border_quantize_grad.register_fake
def _(grad: Tensor, x: Tensor, grid: Tensor, coefficients: Tensor, codes: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), grid.new_empty(1), coefficients.new_empty(coefficients.shape)


def _quantize_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grid, coefficients, ctx.codes = inputs
    ctx.save_for_backward(x, grid, coefficients)


def _quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, grid, coefficients = ctx.saved_tensors
    to_x, to_scale, to_coefficients = border_quantize_grad(grad.contiguous(), x, grid, coefficients, ctx.codes)
    return to_x, F.pad(to_scale, (0, 2)), to_coefficients, None


border_quantize.register_autograd(_quantize_backward, setup_context=_quantize_save)
