"""How a tensor that parameters tile lies in memory, and what may be read there.

A tensor is read in the order of its memory, as a matrix in which either every row has one tile (one for the tensor, one
per channel of a weight, one per group) or every column (one per channel, where channels lie side by side). `refuses`
comes first: loops read and write what has passed it without looking.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from q_core import functional
from q_core.errors import ShapeError

Array = Any

BLOCK = 1 << 14
"""Elements of a block: what it reads and writes stays in the second-level cache."""

_SHORT = 64  # runs of fewer elements with one tile are not worth a loop each

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a tensor is read.

    Attributes:
        order: Its axes as they follow each other in memory, the fastest last; None where that is how they are counted.
        inverse: Where each axis is in that order.
        size: Its sizes in that order.
        tiles: How many tiles there are along each axis, as they are counted.
        shape: Of the tiles, repeated until there is one for every row, or for every column.
        groups: Shape that tiles `shape`; its elements are the tiles, in that order.
        columns: Whether every column has one tile, or every row.
    """

    order: tuple[int, ...] | None
    inverse: tuple[int, ...]
    size: tuple[int, ...]
    tiles: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[int, ...]
    columns: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        tiles = math.prod(self.shape)
        others = math.prod(self.size) // tiles
        return (others, tiles) if self.columns else (tiles, others)

    @property
    def blocks(self) -> int:
        """How many sums of each tile are kept apart."""
        rows, columns = self.matrix
        return -(-rows // max(1, BLOCK // columns)) if self.columns else -(-columns // BLOCK)

    @property
    def units(self) -> int:
        """Parts that threads can share."""
        return self.blocks if self.columns else self.blocks * self.matrix[0]

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Array:
        """Return the matrix; a copy only where the memory has another order, gaps, or another dtype."""
        ordered = tensor if self.order is None else tensor.permute(self.order)
        return ordered.detach().to(dtype).contiguous().reshape(self.matrix).numpy()

    def written(self, matrix: Tensor) -> Tensor:
        """Return a matrix as a tensor with the axes as they are counted."""
        tensor = matrix.reshape(self.size)
        return tensor if self.order is None else tensor.permute(self.inverse)

    def spread(self, parameter: Tensor) -> Tensor:
        """Return one value for each row or each column, of a parameter with one for each tile."""
        if self.shape == (1,):
            return parameter.detach().reshape(1)
        tiles = parameter.detach().reshape(self.tiles)
        grouped = (tiles if self.order is None else tiles.permute(self.order)).reshape(self.groups)
        return functional.broadcast_scale(grouped, self.shape).expand(self.shape).reshape(-1)

    def gathered(self, sums: Tensor) -> Tensor:
        """Add [blocks, rows or columns, *more] up to float64 [tiles, *more], tiles as they are counted."""
        total = sums.sum(0, dtype=torch.float64)
        more = total.shape[1:]
        if self.groups != self.shape:
            total = functional.sum_tiles(total.reshape(*self.shape, *more), (*self.groups, *more))
        if self.order is not None:
            axes = len(self.order)
            total = total.reshape(*(self.tiles[axis] for axis in self.order), *more)
            total = total.permute(*self.inverse, *range(axes, axes + len(more)))
        return total.reshape(-1, *more)


@functools.lru_cache(maxsize=256)
def plan(size: tuple[int, ...], strides: tuple[int, ...], tiles: tuple[int, ...]) -> Plan:
    """Plan for a tensor that is not empty, and for the shape of a parameter that tiles it."""
    # Where an axis of one element lies is of no importance, and its stride may be anything.
    order = sorted(range(len(size)), key=lambda axis: -strides[axis] if size[axis] > 1 else -math.inf)
    inverse = sorted(range(len(size)), key=order.__getitem__)
    given = tiles if math.prod(tiles) > 1 else (1,) * len(size)
    sizes, counts = [size[axis] for axis in order], [given[axis] for axis in order]
    tiled = [place for place, count in enumerate(counts) if count > 1]
    shape, groups, columns = [1], [1], False
    if tiled:
        first, last = tiled[0], tiled[-1]
        others, width = math.prod(sizes[:first]), math.prod(sizes[first:])
        columns = math.prod(sizes[last:]) // counts[last] < _SHORT and others > 1
        if columns:
            # Several short rows side by side are one long row.
            fold = math.gcd(others, 1 << max(0, (4 * _SHORT // width).bit_length() - 1))
            shape, groups = [fold, *sizes[first:]], [1, *counts[first:]]
        else:
            shape, groups = [*sizes[:last], counts[last]], counts[: last + 1]
    there = None if order == sorted(order) else tuple(order)
    return Plan(there, tuple(inverse), tuple(sizes), given, tuple(shape), tuple(groups), columns)


def refuses(
    x: Tensor,
    parameters: Sequence[Tensor],
    tiles: tuple[int, ...],
    *,
    grads: Sequence[Tensor] = (),
    mask: Tensor | None = None,
) -> str | None:
    """Say what is wrong with the tensors. What passes is read and written in its memory, which nothing else checks.

    Args:
        x: What is quantized.
        parameters: What has values for each tile; their shapes are for the caller to check.
        tiles: Shape that is to tile `x`.
        grads: Of the shape of `x`.
        mask: Likewise, bool.

    Returns:
        The reason, or None.
    """
    wide = [tensor.dtype for tensor in (x, *grads) if tensor.dtype not in _DTYPES]
    wide += [tensor.dtype for tensor in parameters if tensor.dtype != torch.float32]
    if wide:
        return f"it computes in float32, with parameters in float32, and would not do justice to {wide[0]}"
    for tensor in (x, *parameters, *grads, *(() if mask is None else (mask,))):
        if tensor.device.type != "cpu":
            return f"it runs on a CPU, a tensor is on {tensor.device}"
        if not _in_memory(tensor):
            return "it reads plain memory, and a tensor is sparse, a subclass, a negative view or one of torch.func"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape):
        return f"it takes a bool mask of shape {tuple(x.shape)}, not {mask.dtype} of {tuple(mask.shape)}"
    for tensor in grads:
        if tensor.shape != x.shape:
            return f"a gradient of shape {tuple(tensor.shape)} is not that of a tensor of shape {tuple(x.shape)}"
    if math.prod(tiles) != 1:
        try:
            functional.check_tiling(tiles, tuple(x.shape))
        except ShapeError as error:
            return str(error)
    return None


def _in_memory(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_neg():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
