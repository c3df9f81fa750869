"""Fake quantization to any levels on a CPU: one pass over memory forward, and one backward.

The meaning is in `q_core.ops`; the arguments are the same. Values are those of the meaning, bit for bit.

Among few levels a number is compared with every threshold, and what each width gets is a sum of its own: no branch, no
table that elements are scattered to, so that all of it happens in the lanes of vectors. Among many levels a search
without branches finds the index of each element, and then its terms are added one by one.

The sums of a block are those of float32, of which every lane has its own, and blocks are added in float64. Neither
depends on the number of threads.

numba compiles the functions under `no_type_check`, which keeps the checks of the tests out of them.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from q_core.kernels import Kernel
from q_kernels.cpu import memory, sweeps, windows
from q_kernels.cpu.memory import BLOCK, Plan
from q_kernels.cpu.registers import LANES, POSITIONS

Array = Any

# Elements a second among 8 levels, measured on one core of a Xeon of the fourth generation.
_RATE, _GRADIENT_RATE = 2.5e9, 1.6e9

_FEW = 64  # levels: among more a search takes less time than to compare with every threshold
_PIECE = 1 << 10  # elements that are searched for together: they stay in the first cache
_WIDE = 256  # columns that are worked on together, which do so with the levels of each

# An element takes as much time as so many of the differences that `in_threads` counts, and for every level one more.
_PAIRS = 16

_jit = numba.njit(nogil=True, error_model="numpy")
# Here the terms of a sum may change places, as they do in the lanes of a vector.
_jit_sums = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})


@_jit
@no_type_check
def _search(x: Array, thresholds: Array, index: Array) -> None:
    """Count the thresholds below each element of a piece; there is one less than a power of 2, infinite where unused.

    No element is above an infinite one, so that no index is larger than the number of those used.
    """
    for i in range(x.shape[0]):
        index[i] = 0
    step = np.uint32((thresholds.shape[0] + 1) // 2)
    while step:
        for i in range(x.shape[0]):
            further = index[i] + step
            index[i] = further if x[i] > thresholds[np.uint64(further - np.uint32(1))] else index[i]
        step >>= np.uint32(1)


@_jit
@no_type_check
def _take(x: Array, levels: Array, index: Array, out: Array) -> None:
    for i in range(x.shape[0]):
        out[i] = levels[np.uint64(index[i])] if x[i] == x[i] else x[i]


@_jit_sums
@no_type_check
def _terms(grad: Array, x: Array, terms: Array, lowest: Any, highest: Any, out: Array) -> Any:
    """Write the gradient of `x`, and the terms of the widths in the place of the nearest levels.

    Returns what the lowest level gets, what the highest gets, and the sum of the terms of NaNs.
    """
    nothing = np.float32(0)
    below, above, lost = nothing, nothing, nothing
    for i in range(x.shape[0]):
        under, over = x[i] < lowest, x[i] > highest
        below += grad[i] if under else nothing
        above += grad[i] if over else nothing
        out[i] = nothing if under | over else grad[i]
        terms[i] = nothing if under | over else grad[i] * (terms[i] - x[i])
        lost += nothing if x[i] == x[i] else terms[i]
    return below, above, lost


@_jit
@no_type_check
def _pass(grad: Array, x: Array, lowest: Any, highest: Any, out: Array) -> None:
    for i in range(x.shape[0]):
        value = grad[i]
        out[i] = np.float32(0) if (x[i] < lowest) | (x[i] > highest) else value


@_jit
@no_type_check
def _scatter(x: Array, terms: Array, levels: Array, index: Array, sums: Array) -> None:
    last = levels.shape[0] - 2
    for i in range(x.shape[0]):
        if x[i] == x[i]:
            nearest = np.int64(index[i])
            cell = nearest if x[i] > levels[nearest] else nearest - 1
            sums[min(max(cell, 0), last)] += terms[i]


@_jit
@no_type_check
def _padded(numbers: Array, filler: Any, scratch: Array) -> None:
    scratch[: numbers.shape[0]] = numbers
    scratch[numbers.shape[0] :] = filler


@_jit
@no_type_check
def _levels_of_rows(x: Array, which: Array, tables: Any, out: Array, units: Any) -> None:
    levels, thresholds, _ = tables
    parts, cells = (x.shape[1] + BLOCK - 1) // BLOCK, levels.shape[1] - 1
    scratch = np.empty(POSITIONS, np.float32)
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        start, stop = part * BLOCK, min((part + 1) * BLOCK, x.shape[1])
        table, between = levels[which[row]], thresholds[which[row]]
        addresses = (table.ctypes.data, between.ctypes.data)
        source, target = x[row, start:stop], out[row, start:stop]
        blocks = (stop - start) // POSITIONS
        sweeps.nearest(source.ctypes.data, addresses, cells, blocks, target.ctypes.data)
        rest = stop - start - blocks * POSITIONS
        if rest:
            _padded(source[blocks * POSITIONS :], table[0], scratch)
            sweeps.nearest(scratch.ctypes.data, addresses, cells, 1, scratch.ctypes.data)
            target[blocks * POSITIONS :] = scratch[:rest]


@_jit
@no_type_check
def _gradients_of_rows(
    grad: Array, x: Array, which: Array, tables: Any, learns: bool, out: Array, sums: Array, units: Any
) -> None:
    levels, thresholds, _ = tables
    parts, cells = sums.shape[0], levels.shape[1] - 1
    scratch, lanes = np.empty((2, POSITIONS), np.float32), np.empty((cells + 2, LANES), np.float32)
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        start, stop = part * BLOCK, min((part + 1) * BLOCK, x.shape[1])
        table, between = levels[which[row]], thresholds[which[row]]
        addresses = (table.ctypes.data, between.ctypes.data)
        upper, source, target = grad[row, start:stop], x[row, start:stop], out[row, start:stop]
        if not learns:
            _pass(upper, source, table[0], table[cells], target)
            continue
        lanes[:] = 0
        blocks = (stop - start) // POSITIONS
        sweeps.gradients(
            upper.ctypes.data,
            source.ctypes.data,
            addresses,
            cells,
            blocks,
            target.ctypes.data,
            lanes.ctypes.data,
        )
        rest = stop - start - blocks * POSITIONS
        if rest:
            # The lowest level has no residual: what fills the block adds zeros.
            _padded(upper[blocks * POSITIONS :], np.float32(0), scratch[0])
            _padded(source[blocks * POSITIONS :], table[0], scratch[1])
            first, second = scratch[0].ctypes.data, scratch[1].ctypes.data
            sweeps.gradients(first, second, addresses, cells, 1, first, lanes.ctypes.data)
            target[blocks * POSITIONS :] = scratch[0, :rest]
        for place in range(cells + 2):
            for lane in range(LANES):
                sums[part, row, place] += lanes[place, lane]


@_jit
@no_type_check
def _levels_by_search(x: Array, which: Array, tables: Any, out: Array, units: Any) -> None:
    levels, thresholds, _ = tables
    parts = (x.shape[1] + BLOCK - 1) // BLOCK
    index = np.empty(_PIECE, np.uint32)
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        own = which[row]
        for start in range(part * BLOCK, min((part + 1) * BLOCK, x.shape[1]), _PIECE):
            stop = min(start + _PIECE, x.shape[1])
            _search(x[row, start:stop], thresholds[own], index)
            _take(x[row, start:stop], levels[own], index, out[row, start:stop])


@_jit
@no_type_check
def _gradients_by_search(
    grad: Array, x: Array, which: Array, tables: Any, learns: bool, out: Array, sums: Array, units: Any
) -> None:
    levels, thresholds, _ = tables
    parts, last = sums.shape[0], levels.shape[1] - 1
    index, buffer = np.empty(_PIECE, np.uint32), np.empty(_PIECE, np.float32)
    for unit in range(units[0], units[1]):
        row, part = divmod(unit, parts)
        table, total = levels[which[row]], sums[part, row]
        for start in range(part * BLOCK, min((part + 1) * BLOCK, x.shape[1]), _PIECE):
            stop = min(start + _PIECE, x.shape[1])
            upper, source, target = grad[row, start:stop], x[row, start:stop], out[row, start:stop]
            if not learns:
                _pass(upper, source, table[0], table[last], target)
                continue
            terms = buffer[: stop - start]
            _search(source, thresholds[which[row]], index)
            _take(source, table, index, terms)
            below, above, lost = _terms(upper, source, terms, table[0], table[last], target)
            total[0] += below
            total[1] += above
            total[last + 1] += lost
            _scatter(source, terms, table, index, total[2:])


@_jit
@no_type_check
def _compare_columns(x: Array, levels: Array, thresholds: Array, start: int, out: Array) -> None:
    """Write the nearest levels where every element has levels of its own, those of the columns from `start` on."""
    stop = start + x.shape[0]
    lowest = levels[0, start:stop]
    for i in range(x.shape[0]):
        level = lowest[i]  # to load what is not needed is allowed, but not by a compiler
        out[i] = level if x[i] == x[i] else x[i]
    for k in range(levels.shape[0] - 1):
        threshold, upper = thresholds[k, start:stop], levels[k + 1, start:stop]
        for i in range(x.shape[0]):
            level, lower = upper[i], out[i]
            out[i] = level if x[i] > threshold[i] else lower


@_jit
@no_type_check
def _levels_of_columns(x: Array, tables: Any, rows: int, out: Array, units: Any) -> None:
    levels, thresholds, _ = tables
    chunks = (x.shape[1] + _WIDE - 1) // _WIDE
    for unit in range(units[0], units[1]):
        block, chunk = divmod(unit, chunks)
        start, stop = chunk * _WIDE, min((chunk + 1) * _WIDE, x.shape[1])
        for row in range(block * rows, min((block + 1) * rows, x.shape[0])):
            _compare_columns(x[row, start:stop], levels, thresholds, start, out[row, start:stop])


@_jit
@no_type_check
def _gradients_of_columns(
    grad: Array, x: Array, tables: Any, rows: int, learns: bool, out: Array, sums: Array, units: Any
) -> None:
    levels, thresholds, bounds = tables
    chunks, last, nothing = (x.shape[1] + _WIDE - 1) // _WIDE, levels.shape[0] - 1, np.float32(0)
    buffer = np.empty(_WIDE, np.float32)
    for unit in range(units[0], units[1]):
        block, chunk = divmod(unit, chunks)
        start, stop = chunk * _WIDE, min((chunk + 1) * _WIDE, x.shape[1])
        lowest, highest, terms = levels[0, start:stop], levels[last, start:stop], buffer[: stop - start]
        for row in range(block * rows, min((block + 1) * rows, x.shape[0])):
            upper, source, target = grad[row, start:stop], x[row, start:stop], out[row, start:stop]
            for i in range(stop - start):
                value, outside = upper[i], (source[i] < lowest[i]) | (source[i] > highest[i])
                target[i] = nothing if outside else value
            if not learns:
                continue
            _compare_columns(source, levels, thresholds, start, terms)
            below, above = sums[block, 0, start:stop], sums[block, 1, start:stop]
            lost = sums[block, last + 1, start:stop]
            for i in range(stop - start):
                value, under, over = upper[i], source[i] < lowest[i], source[i] > highest[i]
                term = value * (terms[i] - source[i])
                term = nothing if under | over else term
                terms[i] = term
                below[i] += value if under else nothing
                above[i] += value if over else nothing
                lost[i] += nothing if source[i] == source[i] else term
            for k in range(last):
                low, high, total = bounds[k, start:stop], bounds[k + 1, start:stop], sums[block, k + 2, start:stop]
                for i in range(stop - start):
                    term, inside = terms[i], (source[i] <= high[i]) & (not source[i] <= low[i])
                    total[i] += term if inside else nothing


def _tables(plan: Plan, levels: Tensor, thresholds: Tensor, few: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    """Return for every row or column which tile it is of, and for every tile the levels, thresholds and bounds.

    The terms of a width are those of the elements between its bounds, the upper one among them: the levels, but
    infinite for the first and the last width. Only columns have them.
    """
    # Such small tables are a matter of calls, and a call of numpy takes less time than one of torch.
    count = levels.shape[-1]
    table = np.ascontiguousarray(levels.detach().reshape(-1, count).numpy())
    edges = np.ascontiguousarray(thresholds.detach().reshape(-1, count - 1).numpy())
    if not few:
        padded = np.full((table.shape[0], (1 << (count - 1).bit_length()) - 1), np.inf, np.float32)
        padded[:, : count - 1] = edges
        edges = padded
    if plan.shape == (1,):
        return np.zeros(1, np.int64), (table, edges, table)
    which = plan.spread(torch.arange(table.shape[0])).numpy()
    if not (plan.columns and few):
        return which, (table, edges, table)
    table, edges = (np.ascontiguousarray(each[which].T) for each in (table, edges))
    bounds = table.copy()
    bounds[0], bounds[-1] = -np.inf, np.inf
    return which, (table, edges, bounds)


def _rows(plan: Plan, levels: int) -> int:
    """How many rows of columns with levels of their own make a block: so many that the sums are few beside them."""
    return max(1, BLOCK // min(plan.matrix[1], _WIDE), 4 * levels)


def _work(x: Tensor, levels: int) -> int:
    return x.numel() * (_PAIRS + min(levels, _FEW))


def _levels(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    if not x.numel():
        return torch.empty(x.shape)
    count = levels.shape[-1]
    few = count <= _FEW
    plan = memory.plan(tuple(x.shape), x.stride(), tuple(levels.shape[:-1]))
    which, tables = _tables(plan, levels, thresholds, few)
    out = torch.empty(plan.matrix)
    source, target = plan.read(x, torch.float32), out.numpy()
    if plan.columns and few:
        rows = _rows(plan, count)
        units = -(-source.shape[0] // rows) * -(-source.shape[1] // _WIDE)
        windows.in_threads(lambda *part: _levels_of_columns(source, tables, rows, target, part), units, _work(x, count))
    else:
        if plan.columns:
            source, target = source.T, target.T
        loop = _levels_of_rows if few else _levels_by_search
        units = source.shape[0] * -(-source.shape[1] // BLOCK)
        windows.in_threads(lambda *part: loop(source, which, tables, target, part), units, _work(x, count))
    return plan.written(out)


def _gradients(
    grad: Tensor, x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not x.numel():
        return torch.empty_like(x), *((torch.zeros_like(levels), torch.zeros_like(widths)) if learns else (None, None))
    count = levels.shape[-1]
    few = count <= _FEW
    plan = memory.plan(tuple(x.shape), x.stride(), tuple(levels.shape[:-1]))
    which, tables = _tables(plan, levels, thresholds, few)
    out = torch.empty(plan.matrix)
    upper, source, target = plan.read(grad, torch.float32), plan.read(x, torch.float32), out.numpy()
    # Of what is below the range, above it, and between the levels of each width.
    if plan.columns and few:
        rows = _rows(plan, count)
        blocks = -(-source.shape[0] // rows)
        sums = torch.zeros(blocks, count + 1, source.shape[1])
        windows.in_threads(
            lambda *part: _gradients_of_columns(upper, source, tables, rows, learns, target, sums.numpy(), part),
            blocks * -(-source.shape[1] // _WIDE),
            _work(x, count),
        )
        sums = sums.transpose(1, 2)
    else:
        if plan.columns:
            upper, source, target = upper.T, source.T, target.T
        loop = _gradients_of_rows if few else _gradients_by_search
        blocks = -(-source.shape[1] // BLOCK)
        sums = torch.zeros(blocks, source.shape[0], count + 1, dtype=torch.float64)
        windows.in_threads(
            lambda *part: loop(upper, source, which, tables, learns, target, sums.numpy(), part),
            blocks * source.shape[0],
            _work(x, count),
        )
    grad_x = plan.written(out).to(x.dtype)
    if not learns:
        return grad_x, None, None
    total = plan.gathered(sums)
    grad_levels = np.zeros((total.shape[0], count), np.float32)
    grad_levels[:, 0], grad_levels[:, -1] = total.numpy()[:, 0], total.numpy()[:, 1]
    grad_widths = total[:, 2:].reshape(widths.shape) / widths.detach()
    return grad_x, torch.from_numpy(grad_levels).reshape(levels.shape), grad_widths.float()


def _refuses(x: Tensor, levels: Tensor, between: tuple[Tensor, ...], grads: tuple[Tensor, ...] = ()) -> str | None:
    if not levels.ndim or levels.shape[-1] < 2:
        return f"it takes 2 levels and more, along the last axis, not a table of shape {tuple(levels.shape)}"
    wanted = (*levels.shape[:-1], levels.shape[-1] - 1)
    for table in between:
        if tuple(table.shape) != wanted:
            return f"between levels of shape {tuple(levels.shape)} there are {wanted} others, not {tuple(table.shape)}"
    return memory.refuses(x, (levels, *between), tuple(levels.shape[:-1]), grads=grads)


def _refuses_levels(x: Tensor, levels: Tensor, thresholds: Tensor) -> str | None:
    return _refuses(x, levels, (thresholds,))


def _refuses_gradients(
    grad: Tensor, x: Tensor, levels: Tensor, widths: Tensor, thresholds: Tensor, learns: bool
) -> str | None:
    return _refuses(x, levels, (widths, thresholds), (grad,))


fake_quantize_levels = (Kernel("cpu-fused", _refuses_levels, lambda *_: _RATE, _levels),)
fake_quantize_levels_grad = (Kernel("cpu-fused", _refuses_gradients, lambda *_: _GRADIENT_RATE, _gradients),)
