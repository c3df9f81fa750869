"""The loops around the tiles: panels of positions, in several threads.

A *panel* holds, for a few dozen output positions, the value that every tap sees there: [taps, positions]. It is filled
from the planes of the input just before it is used, stays in the cache, and serves all outputs, so that no unfolded
input is ever built.

Neighbouring positions are neighbours in memory, also under a stride: `lattices` takes the input apart first. A tap then
is one number, the offset from the corner of the window in elements, and filling a panel is copying runs of memory.

numba compiles the functions under `no_type_check`, which keeps the checks of the tests out of them.
"""

import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from q_kernels.cpu.vector import OUTPUTS, Tile, copy

Array = Any

# Fewer pairs than this are done before a thread has woken up.
_PAIRS_PER_THREAD = 1 << 20


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="q-kernels")


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork; the child makes its own.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_threads(work: Callable[[int, int], None], blocks: int, pairs: int) -> None:
    """Call `work(first, last)` on parts of `blocks` that do not overlap, in as many threads as torch uses at most.

    Args:
        work: Takes the first block and the one after the last.
        blocks: Blocks in all.
        pairs: Work of all blocks together, in differences.
    """
    threads = min(torch.get_num_threads(), blocks, 1 + pairs // _PAIRS_PER_THREAD)
    if threads <= 1:
        work(0, blocks)
        return
    edges = [blocks * part // threads for part in range(threads + 1)]
    for done in [_pool(threads).submit(work, *part) for part in itertools.pairwise(edges)]:
        done.result()


def lattices(planes: Tensor, stride: list[int]) -> Tensor:
    """Take planes apart into pixels that are a stride apart.

    Args:
        planes: [n, c, h, w].
        stride: Down and right, in pixels.

    Returns:
        [n, c * down * right, h / down, w / right], sizes rounded up and zeros where there is no pixel; without gaps.
    """
    down, right = stride
    if down == right == 1:
        return planes.contiguous()
    whole = F.pad(planes, (0, -planes.shape[3] % right, 0, -planes.shape[2] % down))
    split = whole.reshape(*whole.shape[:2], whole.shape[2] // down, down, whole.shape[3] // right, right)
    return split.permute(0, 1, 3, 5, 2, 4).flatten(1, 3).contiguous()


def joined(parts: Tensor, stride: list[int], size: Sequence[int]) -> Tensor:
    """Put lattices together again: the inverse of `lattices`, for planes of that size."""
    down, right = stride
    images, planes, height, width = parts.shape
    split = parts.reshape(images, planes // (down * right), down, right, height, width).permute(0, 1, 4, 2, 5, 3)
    whole = split.reshape(images, planes // (down * right), height * down, width * right)
    return whole[:, :, : size[0], : size[1]].contiguous()


def offsets(channels: int, down: Array, right: Array, stride: list[int], size: Sequence[int]) -> Array:
    """Find pixels in the lattices of some channels.

    Args:
        channels: How many, from the first on.
        down: Rows, an integer each.
        right: Columns, an integer each.
        stride: Of the lattices.
        size: Height and width of a lattice.

    Returns:
        The place of every (channel, row, column), in elements from the first of the image, int64.
    """
    channel = np.arange(channels, dtype=np.int64)[:, None, None]
    plane = (channel * stride[0] + down[:, None] % stride[0]) * stride[1] + right % stride[1]
    return ((plane * size[0] + down[:, None] // stride[0]) * size[1] + right // stride[1]).reshape(-1)


@numba.njit(nogil=True)
@no_type_check
def fill(source: Array, start: int, offsets: Array, first: int, count: int, shape: Any, panel: Array) -> None:
    """Fill a panel with `count` positions from `first` on, and the rest of it with zeros.

    Args:
        source: Planes [images, planes, height, width].
        start: First plane that counts.
        offsets: Where each tap looks: elements from the pixel of the position in that plane.
        first: Position, counted over images, rows and columns.
        count: Positions.
        shape: Rows and columns of positions of an image.
        panel: [taps, positions].
    """
    size = source.itemsize
    rows, columns = shape
    if source.shape[3] == columns:  # a row follows the other without a gap
        rows, columns = 1, rows * columns
    done = 0
    while done < count:
        image, place = divmod(first + done, rows * columns)
        row, column = divmod(place, columns)
        length = min(columns - column, count - done)
        pixel = ((image * source.shape[1] + start) * source.shape[2] + row) * source.shape[3] + column
        for tap in range(offsets.shape[0]):
            target = panel.ctypes.data + (tap * panel.shape[1] + done) * size
            copy(target, source.ctypes.data + (pixel + offsets[tap]) * size, length * size)
        done += length
    for tap in range(offsets.shape[0]):
        for position in range(count, panel.shape[1]):
            panel[tap, position] = 0


@numba.njit(nogil=True)
@no_type_check
def spill(results: Array, first: int, count: int, target: Array, start: int, planes: int, step: int) -> None:
    """Write results [outputs, positions] to `planes` planes of `target`, `step` apart from `start` on."""
    done, size = 0, results.itemsize
    while done < count:
        image, place = divmod(first + done, target.shape[2])
        length = min(target.shape[2] - place, count - done)
        for output in range(planes):
            plane = image * target.shape[1] + start + output * step
            goal = target.ctypes.data + (plane * target.shape[2] + place) * size
            copy(goal, results.ctypes.data + (output * results.shape[1] + done) * size, length * size)
        done += length


@functools.cache
def _loop(tile: Tile) -> Any:
    run, positions, element, result = tile.run, tile.positions, np.dtype(tile.element), np.dtype(tile.result)

    @numba.njit(nogil=True)
    @no_type_check
    def loop(
        source: Array, taps: Array, weights: Array, near: Array, own: Array, shape: Any, target: Array, plan: Any
    ) -> None:
        outputs, phase, step, first_block, last_block = plan
        groups, rows, count = weights.shape[0], weights.shape[1], taps.shape[0]
        images, planes, area = target.shape
        parts = (images * area + positions - 1) // positions
        panel = np.empty((count, positions), element)
        inputs = np.empty((own.shape[0], positions), element)
        results = np.empty((OUTPUTS, positions), result)
        for block in range(first_block, last_block):
            group, part = divmod(block, parts)
            first = part * positions
            length = min(positions, images * area - first)
            image, place = divmod(first, area)
            fill(source, group * (source.shape[1] // groups), taps, first, length, shape, panel)
            fill(near, group * (near.shape[1] // groups), own, first, length, shape, inputs)
            for output in range(0, outputs, OUTPUTS):
                table = weights.ctypes.data + (group * rows + output) * count * panel.itemsize
                beside = inputs.ctypes.data + output * positions * inputs.itemsize
                plane = (group * outputs + output) * step + phase
                if place + positions <= area and output + OUTPUTS <= outputs:
                    line = target.ctypes.data + ((image * planes + plane) * area + place) * results.itemsize
                    run(panel.ctypes.data, table, beside, count, line, step * area)
                else:
                    run(panel.ctypes.data, table, beside, count, results.ctypes.data, positions)
                    spill(results, first, length, target, plane, min(OUTPUTS, outputs - output), step)

    return loop


def run(
    tile: Tile,
    source: Tensor,
    taps: Array,
    weights: Tensor,
    target: Tensor,
    inputs: Tensor | None = None,
    phase: int = 0,
    phases: int = 1,
) -> None:
    """Write what a tile computes, for every group, position and row of weights, into `target`.

    Args:
        tile: What to compute.
        source: Planes [images, groups * planes, height, width] that the taps look at.
        taps: Where each tap looks, in elements from the pixel of a position in the first plane of the group, int64.
        weights: [groups, outputs, taps], in the element of the tile.
        target: [images, groups * outputs * phases, rows, columns] of positions.
        inputs: The inputs of the tile, where it takes any, in the shape of `target`.
        phase: Which of the `phases` planes of an output to write.
        phases: Planes of an output.
    """
    groups, outputs, _ = weights.shape
    missing = -outputs % OUTPUTS
    table = F.pad(weights, (0, 0, 0, missing)).contiguous()
    own, area = np.zeros(0, np.int64), math.prod(target.shape[2:])
    if inputs is not None:  # the rows of weights that were added take any input
        own = np.pad((np.arange(outputs, dtype=np.int64) * phases + phase) * area, (0, missing))
    near = source if inputs is None else inputs
    arrays = (
        source.numpy(),
        taps,
        table.numpy(),
        near.numpy(),
        own,
        tuple(target.shape[2:]),
        target.flatten(2).numpy(),
    )
    blocks = groups * -(-target.shape[0] * area // tile.positions)
    loop, pairs = _loop(tile), target.shape[0] * area * table.numel()
    in_threads(lambda first, last: loop(*arrays, (outputs, phase, phases, first, last)), blocks, pairs)


@numba.njit(nogil=True)
@no_type_check
def pack_words(codes: Array, per_word: int, bits: int, thermometer: bool, words: Array, images: Any) -> None:
    """Pack the codes of neighbouring channels into 64-bit words: [n, c, pixels] uint8 to [n, words, pixels].

    Args:
        codes: Codes.
        per_word: Channels of one word.
        bits: Bits of one channel in the word.
        thermometer: Whether code q becomes q ones, or stays a number.
        words: Where they go, zero at the start.
        images: First and last image.
    """
    one, pixels, chunk = np.uint64(1), codes.shape[2], 1024  # a chunk of words stays in the first cache
    for image in range(images[0], images[1]):
        for start in range(0, pixels, chunk):
            stop = min(start + chunk, pixels)
            for channel in range(codes.shape[1]):
                shift = np.uint64(bits * (channel % per_word))
                source = codes[image, channel, start:stop]
                target = words[image, channel // per_word, start:stop]
                if thermometer:
                    for index in range(stop - start):
                        target[index] |= ((one << np.uint64(source[index])) - one) << shift
                else:
                    for index in range(stop - start):
                        target[index] |= np.uint64(source[index]) << shift
