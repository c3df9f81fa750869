r"""Sums of absolute differences of windows and kernels, and their gradient to the input, in float32.

Both are a product of matrices in which something else than a product happens to a pair, forward an absolute difference,
backward a slope. The unfolded input is never built: where the elements of a window lie is the sum of where the window
begins, which depends on the position, and of an offset of the tap, which a table has. With such a table a stride, a
dilation and groups are no cases of their own.

The lanes of a warp take neighbouring positions and the same output, because neighbouring positions are neighbours in
memory. Taps go by in fours, in a fixed order.

The gradient gathers: a pixel asks every window that sees it. Pixels a stride apart are seen by the same taps, and a
launch works on one lattice of them. Its slope is, for finite numbers,

$$ \mathrm{clamp}(w - x, -1, 1) = 2\,\mathrm{clamp}(\tfrac{w}{2} + (\tfrac12 - \tfrac{x}{2}), 0, 1) - 1 $$

where the clamp is a modifier of the addition (`FADD.SAT`), the doubling is left for the end, and the sum of what is
subtracted has one addition for each position and tap. So a pair takes two instructions, as it does forward.
"""

# Triton does not allow annotations of its functions, but of constants; those are written in capitals. `no_type_check`
# keeps the checks of the tests out.
# ruff: noqa: ANN001, ANN201, N803, PLR0913
from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _quarters(tile):
    """Take a tile with 4 columns apart."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
@no_type_check
def _bases(position, rows, columns, image_step, row_step, column_step):
    """Where the windows of some positions begin."""
    row, column = position // columns, position % columns
    return (row // rows) * image_step + (row % rows) * row_step + column * column_step


@triton.jit
@no_type_check
def _tap_tiles(x_at, weight_at, taps_at, base, here, output, there, step, taps):
    """Load what 4 taps see of some positions, and the weights of some outputs there; zeros where there is no tap."""
    tap = step + tl.arange(0, 4)
    exists = tap < taps
    offset = tl.load(taps_at + tap, mask=exists, other=0)
    seen = tl.load(x_at + base[:, None] + offset[None, :], mask=here[:, None] & exists[None, :], other=0.0)
    weight = tl.load(
        weight_at + output[:, None] * taps + tap[None, :], mask=there[:, None] & exists[None, :], other=0.0
    )
    return seen.to(tl.float32), weight.to(tl.float32)


@triton.jit
@no_type_check
def distance(
    x_at,
    weight_at,
    taps_at,
    out_at,
    positions,
    rows,
    columns,
    outputs,
    taps,
    x_image,
    x_row,
    x_column,
    x_group,
    out_image,
    out_row,
    out_column,
    out_channel,
    POSITIONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Write minus the sum of absolute differences of every window and every kernel of a group."""
    blocks = tl.cdiv(outputs, OUTPUTS)
    program, group = tl.program_id(0), tl.program_id(1)
    position = (program // blocks) * POSITIONS + tl.arange(0, POSITIONS)
    output = (program % blocks) * OUTPUTS + tl.arange(0, OUTPUTS)
    here, there = position < positions, output < outputs
    base = _bases(position, rows, columns, x_image, x_row, x_column) + group * x_group
    kernel = group * outputs + output
    total = tl.zeros([OUTPUTS, POSITIONS], tl.float32)
    for step in range(0, taps, 4):
        seen, weight = _tap_tiles(x_at, weight_at, taps_at, base, here, kernel, there, step, taps)
        x0, x1, x2, x3 = _quarters(seen)
        w0, w1, w2, w3 = _quarters(weight)
        total -= tl.abs(x0[None, :] - w0[:, None])
        total -= tl.abs(x1[None, :] - w1[:, None])
        total -= tl.abs(x2[None, :] - w2[:, None])
        total -= tl.abs(x3[None, :] - w3[:, None])
    at = kernel[:, None] * out_channel + _bases(position, rows, columns, out_image, out_row, out_column)[None, :]
    tl.store(out_at + at, total.to(out_at.dtype.element_ty), mask=there[:, None] & here[None, :])


@triton.jit
@no_type_check
def input_grad(
    grad_at,
    weight_at,
    taps_at,
    x_at,
    poison_at,
    out_at,
    positions,
    rows,
    columns,
    outputs,
    taps,
    grad_image,
    grad_row,
    grad_column,
    grad_group,
    x_image,
    x_row,
    x_column,
    x_channel,
    out_image,
    out_row,
    out_column,
    out_channel,
    POSITIONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Write the gradient to the pixels of one lattice and group; its outputs are the channels of the input.

    The result lies as the input does. It has steps of its own all the same: where a compiler knows that addresses are
    equal it keeps them in registers through the loop, and then there are too few for the sums.
    """
    blocks = tl.cdiv(outputs, OUTPUTS)
    program, group = tl.program_id(0), tl.program_id(1)
    position = (program // blocks) * POSITIONS + tl.arange(0, POSITIONS)
    output = (program % blocks) * OUTPUTS + tl.arange(0, OUTPUTS)
    here, there = position < positions, output < outputs
    both = there[:, None] & here[None, :]
    base = _bases(position, rows, columns, grad_image, grad_row, grad_column) + group * grad_group
    channel = group * outputs + output
    pixel = channel[:, None] * x_channel + _bases(position, rows, columns, x_image, x_row, x_column)[None, :]
    half = 0.5 - 0.5 * tl.load(x_at + pixel, mask=both, other=0.0).to(tl.float32)
    total = tl.zeros([OUTPUTS, POSITIONS], tl.float32)
    plain = tl.zeros([POSITIONS, 4], tl.float32)
    for step in range(0, taps, 4):
        grad, weight = _tap_tiles(grad_at, weight_at, taps_at, base, here, channel, there, step, taps)
        plain += grad
        g0, g1, g2, g3 = _quarters(grad)
        w0, w1, w2, w3 = _quarters(weight * 0.5)
        total = tl.fma(g0[None, :], tl.clamp(half + w0[:, None], 0.0, 1.0), total)
        total = tl.fma(g1[None, :], tl.clamp(half + w1[:, None], 0.0, 1.0), total)
        total = tl.fma(g2[None, :], tl.clamp(half + w2[:, None], 0.0, 1.0), total)
        total = tl.fma(g3[None, :], tl.clamp(half + w3[:, None], 0.0, 1.0), total)
    # What the clamp makes of a NaN is a number: it is put back, of the pixel or of the weights of the channel.
    poison = tl.load(poison_at + channel, mask=there, other=0.0)
    result = 2.0 * total - tl.sum(plain, 1)[None, :] + poison[:, None]
    result = tl.where(half == half, result, half)
    at = channel[:, None] * out_channel + _bases(position, rows, columns, out_image, out_row, out_column)[None, :]
    tl.store(out_at + at, result.to(out_at.dtype.element_ty), mask=both)
