"""Pure tensor arithmetic of quantization: no state, no modules, no options.

Two ideas live here. *Granularity is the shape of the scale*: a scale of shape `(4, 1)` tiles a tensor of
shape `(4, 8)` into four tiles of shape `(1, 8)`, and no function needs an axis argument.
*Straight-through*: a step function has no useful derivative, so the value of one tensor is paired with
the gradient of another (Bengio et al. 2013, arXiv:1308.3432).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from q_core.errors import ShapeError


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        # A fresh view: returning the input object itself would alias it in the graph.
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(value: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the value of one tensor and the gradient of another.

    Args:
        value: What the result equals, bit for bit.
        surrogate: What the result is differentiated as. Same shape as `value`.

    Returns:
        A tensor equal to `value`.

    Gradient:
        1 to `surrogate`, none to `value`.
    """
    result: Tensor = _StraightThrough.apply(value.detach(), surrogate)  # type: ignore[no-untyped-call]
    return result


def round_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest integer, ties to even.

    Gradient:
        1 everywhere (straight-through) instead of 0.
    """
    return straight_through(torch.round(x), x)


def floor_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round down to an integer.

    Gradient:
        1 everywhere (straight-through) instead of 0.
    """
    return straight_through(torch.floor(x), x)


class _ClosedClamp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
        return torch.clamp(x, low, high)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any, Any], output: Tensor) -> None:
        x, low, high = inputs
        tensors = isinstance(low, Tensor)
        ctx.save_for_backward(x, *((low, high) if tensors else ()))
        ctx.bounds = None if tensors else (low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, *tensors = ctx.saved_tensors
        low, high = tensors or ctx.bounds
        below, above = x < low, x > high
        to_low = grad.masked_fill(~below, 0).sum_to_size(low.shape) if ctx.needs_input_grad[1] else None
        to_high = grad.masked_fill(~above, 0).sum_to_size(high.shape) if ctx.needs_input_grad[2] else None
        return grad.masked_fill(below | above, 0), to_low, to_high


def closed_clamp(
    x: Float[Tensor, "*shape"], low: Float[Tensor, "..."] | int, high: Float[Tensor, "..."] | int
) -> Float[Tensor, "*shape"]:
    """Clamp to a closed range: what lies on an end is inside.

    `torch.clamp` is no substitute. Up to torch 2.13 its derivative at an end is 1, from 2.14 on it is 0 or 1/2; and
    after rounding, half a cell of the reals lies exactly on an end.

    Args:
        x: Any tensor.
        low: Lower end; a tensor broadcasts to `x`.
        high: Upper end, a tensor exactly if `low` is one.

    Returns:
        A tensor of the shape of `x`.

    Gradient:
        To `x`: 1 inside the closed range, 0 outside. To an end: 1 from what lies beyond it.
    """
    result: Tensor = _ClosedClamp.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result


def scale_gradient(x: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """Return `x` unchanged and multiply its gradient by `factor`.

    Args:
        x: Any tensor, usually a learnable scale.
        factor: Dimensionless multiplier of the gradient.

    Gradient:
        `factor` instead of 1.

    Source:
        Esser et al. 2020, arXiv:1902.08153, section 2.2.
    """
    return x if factor == 1.0 else straight_through(x, x * factor)


def check_tiling(tile_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Check that a scale of shape `tile_shape` tiles a tensor of shape `shape`.

    Raises:
        ShapeError: The number of axes differs, or an axis of the tensor is not a multiple of the scale's.
    """
    if len(tile_shape) != len(shape):
        raise ShapeError(
            f"scale of shape {tuple(tile_shape)} does not tile a tensor of shape {tuple(shape)}: it has "
            f"{len(tile_shape)} axes, the tensor {len(shape)}; a scale for the whole tensor has 1 element"
        )
    for axis, (tiles, size) in enumerate(zip(tile_shape, shape, strict=True)):
        if tiles == 0 or size % tiles:
            raise ShapeError(
                f"scale of shape {tuple(tile_shape)} does not tile a tensor of shape {tuple(shape)}: "
                f"axis {axis} has {size} elements, not a multiple of {tiles}"
            )


def broadcast_scale(scale: Shaped[Tensor, "..."], shape: tuple[int, ...]) -> Shaped[Tensor, "..."]:
    """Reshape a scale so that it broadcasts against a tensor of shape `shape`.

    A scale with one element tiles every tensor. Otherwise it has as many axes as the tensor, and each axis of
    the tensor is a multiple of the scale's: `(1, 1)` per tensor, `(C, 1)` per channel, `(C, K/g)` per group,
    `(M/a, N/b)` per block.

    Args:
        scale: One value per tile.
        shape: Shape of the tensor to be quantized.

    Returns:
        The scale, of a shape that broadcasts to `shape`; a view wherever no axis is split in groups.

    Raises:
        ShapeError: `scale` does not tile `shape`.
    """
    if scale.numel() == 1:
        return scale.reshape(1) if shape else scale.reshape(())
    check_tiling(tuple(scale.shape), shape)
    for axis, size in enumerate(shape):
        tiles = scale.shape[axis]
        if tiles not in (1, size):
            repeats = [-1] * (scale.ndim + 1)
            repeats[axis + 1] = size // tiles
            scale = scale.unsqueeze(axis + 1).expand(repeats).flatten(axis, axis + 1)
    return scale


def to_tiles(x: Shaped[Tensor, "*shape"], tile_shape: tuple[int, ...]) -> Shaped[Tensor, "tiles elements"]:
    """Gather the elements that share one scale into a row.

    Args:
        x: A tensor that a scale of shape `tile_shape` tiles.
        tile_shape: Shape of the scale.

    Returns:
        One row per tile, in the order of the flattened scale.

    Raises:
        ShapeError: `tile_shape` does not tile `x`.
    """
    split, order = _tiling(tuple(x.shape), tile_shape)
    tiles = 1
    for size in tile_shape:
        tiles *= size
    if tiles == 1:
        return x.reshape(1, -1)
    return x.reshape(split).permute(order).reshape(tiles, x.numel() // tiles)


def from_tiles(
    rows: Shaped[Tensor, "tiles elements"], tile_shape: tuple[int, ...], shape: tuple[int, ...]
) -> Shaped[Tensor, "..."]:
    """Undo `to_tiles`.

    Args:
        rows: One row per tile.
        tile_shape: Shape of the scale.
        shape: Shape of the tensor to rebuild.

    Returns:
        A tensor of shape `shape`.
    """
    split, order = _tiling(shape, tile_shape)
    if rows.shape[0] == 1:
        return rows.reshape(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows.reshape([split[axis] for axis in order]).permute(inverse).reshape(shape)


def sum_tiles(x: Float[Tensor, "*shape"], tile_shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Add the elements that share one scale.

    Args:
        x: A tensor that a scale of shape `tile_shape` tiles.
        tile_shape: Shape of the scale.

    Returns:
        One sum per tile, of shape `tile_shape`.

    Raises:
        ShapeError: `tile_shape` does not tile `x`.
    """
    split, order = _tiling(tuple(x.shape), tile_shape)
    if all(size == 1 for size in tile_shape):
        return x.sum().reshape(tile_shape)
    return x.reshape(split).sum(order[len(tile_shape) :])


def _tiling(shape: tuple[int, ...], tile_shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Split every axis in (tiles, elements per tile), and list the tile axes before the element axes."""
    if all(size == 1 for size in tile_shape):
        return list(shape), list(range(len(shape)))
    check_tiling(tile_shape, shape)
    split = [part for tiles, size in zip(tile_shape, shape, strict=True) for part in (tiles, size // tiles)]
    return split, [*range(0, len(split), 2), *range(1, len(split), 2)]


def quantize(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."] | None = None,
    *,
    qmin: int,
    qmax: int,
    rounding: Callable[[Tensor], Tensor] = round_ste,
) -> Float[Tensor, "*shape"]:
    r"""Map reals to codes on a uniform grid.

    $$ q = \mathrm{clamp}(\lfloor u \rceil + z,\ q_{min},\ q_{max}), \quad
       u = \mathrm{clamp}(x/s,\ q_{min}-z,\ q_{max}-z) $$

    The code coordinate `x / scale` is clamped before it is rounded, so a real counts as outside as soon as it
    passes the outermost level. Clamping after rounding, as PyTorch's learnable fake-quantize does, counts the
    half step outside either end as inside. The zero point is added after rounding, as ONNX `QuantizeLinear`
    does, so a tie rule that depends on the sign is about the sign of `x`.

    Args:
        x: Reals to quantize, in the units of the layer.
        scale: Real width of one code. Positive. Tiles `x` (see `broadcast_scale`).
        zero_point: Code of real zero. Integral. Shape of `scale`. None means 0.
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.
        rounding: Chooses between the two neighbouring codes.

    Returns:
        Codes in `[qmin, qmax]`, integral in value when `rounding` is, in the wider dtype of `x` and `scale`.

    Raises:
        ShapeError: `scale` does not tile `x`.

    Gradient:
        1/scale to `x` inside the closed range, 0 outside; to `scale` the residual of Esser et al., eq. 3.

    Source:
        Jacob et al. 2018, arXiv:1712.05877, eq. 1; Esser et al. 2020, arXiv:1902.08153, eq. 1 and 3.
    """
    shape = tuple(x.shape)
    coordinate = x / broadcast_scale(scale, shape)
    if zero_point is None:
        return closed_clamp(rounding(closed_clamp(coordinate, qmin, qmax)), qmin, qmax)
    zero = broadcast_scale(zero_point, shape)
    return closed_clamp(rounding(closed_clamp(coordinate, qmin - zero, qmax - zero)) + zero, qmin, qmax)


def dequantize(
    codes: Float[Tensor, "*shape"], scale: Float[Tensor, "..."], zero_point: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "*shape"]:
    r"""Map codes to reals on a uniform grid: $\hat{x} = s\,(q - z)$.

    Args:
        codes: Codes, integral in value.
        scale: Real width of one code. Tiles `codes`.
        zero_point: Code of real zero. Shape of `scale`. None means 0.

    Returns:
        Reals of the shape of `codes`.

    Raises:
        ShapeError: `scale` does not tile `codes`.

    Source:
        Jacob et al. 2018, arXiv:1712.05877, eq. 1.
    """
    shape = tuple(codes.shape)
    shifted = codes if zero_point is None else codes - broadcast_scale(zero_point, shape)
    return shifted * broadcast_scale(scale, shape)


def middles(levels: Float[Tensor, "... n"], ties_up: Bool[Tensor, "... n-1"] | None = None) -> Float[Tensor, "... n-1"]:
    """Return the reals that separate the nearest levels: the level nearest to `x` has as many below it as `x` has.

    Below means strictly below, so a real in the middle of two levels goes to the lower one. Where its tie is to go up,
    the middle is moved down to the next number of its dtype; and a middle that no number of the dtype is goes to the
    one below it. So the answer is right for every number, to the last digit. Training, packed models and kernels
    compare with the same numbers, and all of them take the same level.

    Args:
        levels: Levels in ascending order along the last axis.
        ties_up: For each middle, whether a real on it goes to the upper level. None: nowhere.

    Returns:
        The middles, in the dtype of the levels.

    Source:
        The rounding error of the sum: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    left, right = 0.5 * levels[..., :-1], 0.5 * levels[..., 1:]  # halves first: the sum of two levels may overflow
    middle = left + right
    part = middle - left
    error = (left - (middle - part)) + (right - part)
    down = error < 0 if ties_up is None else (error < 0) | ((error == 0) & ties_up)
    return torch.where(down, torch.nextafter(middle, torch.full_like(middle, -math.inf)), middle)
