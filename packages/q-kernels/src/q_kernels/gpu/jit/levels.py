r"""Fake quantization to a few levels: forward, and all gradients. The tables stay in registers.

The gradient to the width $w_k$ of the levels $a_k$ and $a_{k+1}$ with the threshold $t_k$ between them is, with the
incoming gradient $g$,

$$ \frac{1}{w_k} \sum_x g\,(\hat x - x)\,[a_k < x \le a_{k+1}]
   = \frac{a_{k+1} - a_k}{w_k} \sum_x g\,\left([x > t_k]
   - \mathrm{clamp}\left(\tfrac{x - a_k}{a_{k+1} - a_k}, 0, 1\right)\right) $$

because for an element outside the cell both numbers in brackets are 0, or both 1. So no element needs to know its cell,
and each pair of an element and a width takes four instructions: `FFMA.SAT`, `FSET`, `FADD`, `FFMA`. The price: an
incoming gradient that is infinite or NaN makes the gradients of all widths NaN, not only of its own.
"""

# Triton does not allow annotations of its functions, but of constants; those are written in capitals. `no_type_check`
# keeps the checks of the tests out.
# ruff: noqa: ANN001, ANN201, N803, PLR0913
from typing import no_type_check

import triton
import triton.language as tl

from q_kernels.gpu.jit.fake import kernel, place


@triton.jit
@no_type_check
def _table(numbers, row, there, tiles, COUNT: tl.constexpr):
    """One number for each row and place; in memory the rows of one place lie side by side.

    Rows that are not there get numbers in ascending order as well.
    """
    table = ()
    for k in tl.static_range(COUNT):
        table += (tl.load(numbers + k * tiles + row % tiles, mask=there, other=k)[:, None],)
    return table


@triton.jit
@no_type_check
def _nearest(x, table, thresholds, LEVELS: tl.constexpr):
    """Take the level above as many thresholds as the element is above; a NaN stays one.

    Among many levels a compiler would compare first and keep the outcomes in words, because predicates are few. There
    each threshold flips the bits in which its two levels differ.
    """
    level = tl.broadcast_to(table[0], x.shape)
    if LEVELS <= 8:
        for k in tl.static_range(LEVELS - 1):
            level = tl.where(x > thresholds[k], table[k + 1], level)
    else:
        bits = level.to(tl.int32, bitcast=True)
        for k in tl.static_range(LEVELS - 1):
            change = table[k].to(tl.int32, bitcast=True) ^ table[k + 1].to(tl.int32, bitcast=True)
            bits = bits ^ tl.where(x > thresholds[k], change, 0)
        level = bits.to(tl.float32, bitcast=True)
    return tl.where(x == x, level, x)


@kernel
@no_type_check
def levels(
    x_at,
    tables,
    edges,
    out_at,
    rows,
    columns,
    row_step,
    column_step,
    tiles,
    chunks,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Write the nearest levels."""
    program = tl.program_id(0)
    row = (program // chunks) * ROWS + tl.arange(0, ROWS)
    table = _table(tables, row, row < rows, tiles, LEVELS)
    thresholds = _table(edges, row, row < rows, tiles, LEVELS - 1)
    first = (program % chunks).to(tl.int64) * steps * COLUMNS
    for step in range(steps):
        column = first + step * COLUMNS + tl.arange(0, COLUMNS)
        at, inside = place(rows, columns, row_step, column_step, row, column)
        x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_at + at, _nearest(x, table, thresholds, LEVELS), mask=inside)


@kernel
@no_type_check
def gradients(
    grad_at,
    x_at,
    tables,
    edges,
    out_at,
    sums_at,
    rows,
    columns,
    row_step,
    column_step,
    tiles,
    chunks,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    LEARNS: tl.constexpr,
):
    """Write the gradient to `x`, and where the levels learn the sums over the columns of this program.

    The sums are, for each row, those of the gradients below the lowest level and above the highest, and for each width
    the one above, without the fraction before it.
    """
    program = tl.program_id(0)
    row = (program // chunks) * ROWS + tl.arange(0, ROWS)
    table = _table(tables, row, row < rows, tiles, LEVELS)
    thresholds = _table(edges, row, row < rows, tiles, LEVELS - 1)
    first = (program % chunks).to(tl.int64) * steps * COLUMNS
    # What makes the way from one level to the next run from 0 to 1.
    slopes, offsets = (), ()
    for k in tl.static_range(LEVELS - 1):
        slope = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), table[k + 1] - table[k])
        slopes += (slope,)
        offsets += (-table[k] * slope,)
    sums = ()
    for _ in tl.static_range(LEVELS + 1):
        sums += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for step in range(steps):
        column = first + step * COLUMNS + tl.arange(0, COLUMNS)
        at, inside = place(rows, columns, row_step, column_step, row, column)
        upper = tl.load(grad_at + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
        below, above = x < table[0], x > table[LEVELS - 1]
        passed = tl.where(below | above, 0.0, upper)
        tl.store(out_at + at, passed.to(out_at.dtype.element_ty), mask=inside)
        if LEARNS:
            more = (sums[0] + tl.where(below, upper, 0.0), sums[1] + tl.where(above, upper, 0.0))
            # A NaN belongs to the last width; on the lowest level every term is 0.
            lost = tl.where(x == x, 0.0, x)
            x = tl.where(x == x, x, table[0])
            for k in tl.static_range(LEVELS - 1):
                way = tl.clamp(tl.fma(x, slopes[k], offsets[k]), 0.0, 1.0)
                rounded = tl.where(x > thresholds[k], 1.0, 0.0)
                more += (tl.fma(upper, rounded - way, sums[k + 2]),)
            sums = more[:LEVELS] + (more[LEVELS] + lost,)  # noqa: RUF005  # Triton knows no star
    if LEARNS:
        base = sums_at + (program % chunks).to(tl.int64) * (LEVELS + 1) * rows + row
        for k in tl.static_range(LEVELS + 1):
            tl.store(base + k * rows, tl.sum(sums[k], 1), mask=row < rows)
