"""Fake quantization to a uniform grid: forward, and both gradients.

Everything is computed in float32. A division is rounded as IEEE 754 says, because a code next to a tie depends on its
last bit; the `/` of Triton is not.
"""

# Triton does not allow annotations of its functions, but of constants; those are written in capitals. `no_type_check`
# keeps the checks of the tests out.
# ruff: noqa: ANN001, ANN201, N803, PLR0913
from typing import no_type_check

import triton
import triton.language as tl

# Numbers that are 1, or multiples of 16, make no faster code here, and each would be a kernel of its own.
kernel = triton.jit(do_not_specialize=["tiles", "chunks", "steps"])


@triton.jit
@no_type_check
def place(rows, columns, row_step, column_step, row, column):
    """Where the elements of a tile lie, and which of them there are."""
    at = row.to(tl.int64)[:, None] * row_step + column.to(tl.int64)[None, :] * column_step
    return at, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
@no_type_check
def nearest(u, low, high):
    """Clamp and round, ties to even; a NaN stays one.

    From 2^23 on the numbers of float32 are integers, so that to add 2^23 to a smaller magnitude rounds it. The sign is
    put back as a bit, for the sake of -0. All of it runs at the full rate; the conversion that rounds has an eighth of
    it.
    """
    inner = tl.where(u < low, low, u)
    inner = tl.where(inner > high, high, inner)
    size = tl.abs(inner)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    sign = inner.to(tl.int32, bitcast=True) & -2147483648
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _range(scales, zeros, qmin, qmax, row, there, tiles, ZERO: tl.constexpr):
    """Scale, zero point and the ends of the code coordinate of each row."""
    scale = tl.load(scales + row % tiles, mask=there, other=1.0)[:, None]
    zero = tl.zeros_like(scale)
    if ZERO:
        zero = tl.load(zeros + row % tiles, mask=there, other=0.0)[:, None]
    return scale, zero, qmin - zero, qmax - zero


@kernel
@no_type_check
def levels(
    x_at,
    mask_at,
    scales,
    zeros,
    out_at,
    qmin,
    qmax,
    rows,
    columns,
    row_step,
    column_step,
    tiles,
    chunks,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ZERO: tl.constexpr,
    MASK: tl.constexpr,
):
    """Write the nearest levels."""
    program = tl.program_id(0)
    row = (program // chunks) * ROWS + tl.arange(0, ROWS)
    scale, zero, low, high = _range(scales, zeros, qmin, qmax, row, row < rows, tiles, ZERO)
    first = (program % chunks).to(tl.int64) * steps * COLUMNS
    for step in range(steps):
        column = first + step * COLUMNS + tl.arange(0, COLUMNS)
        at, inside = place(rows, columns, row_step, column_step, row, column)
        x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
        code = nearest(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), low, high)
        if ZERO:
            code += zero
            code = tl.where(code < qmin, qmin, code)
            code = tl.where(code > qmax, qmax, code) - zero
        level = code * scale
        if MASK:
            level = tl.where(tl.load(mask_at + at, mask=inside, other=0) != 0, level, x)
        tl.store(out_at + at, level, mask=inside)


@kernel
@no_type_check
def gradients(
    grad_at,
    x_at,
    mask_at,
    scales,
    zeros,
    out_at,
    sums_at,
    qmin,
    qmax,
    rows,
    columns,
    row_step,
    column_step,
    tiles,
    chunks,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ZERO: tl.constexpr,
    MASK: tl.constexpr,
    LEARNS: tl.constexpr,
):
    """Write the gradient to `x`, and where the scale learns its sum over the columns of this program."""
    program = tl.program_id(0)
    row = (program // chunks) * ROWS + tl.arange(0, ROWS)
    scale, _, low, high = _range(scales, zeros, qmin, qmax, row, row < rows, tiles, ZERO)
    first = (program % chunks).to(tl.int64) * steps * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        column = first + step * COLUMNS + tl.arange(0, COLUMNS)
        at, inside = place(rows, columns, row_step, column_step, row, column)
        upper = tl.load(grad_at + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
        outside = (u < low) | (u > high)  # a NaN is inside, and stays one
        stopped = outside
        if MASK:
            chosen = tl.load(mask_at + at, mask=inside, other=0) != 0
            stopped = outside & chosen
        tl.store(out_at + at, tl.where(stopped, 0.0, upper).to(out_at.dtype.element_ty), mask=inside)
        if LEARNS:
            term = upper * (nearest(u, low, high) - tl.where(outside, 0.0, u))
            if MASK:
                term = tl.where(chosen, term, 0.0)
            total += term
    if LEARNS:
        sums = tl.sum(total, 1)
        tl.store(sums_at + (program % chunks).to(tl.int64) * rows + row, sums, mask=row < rows)
