"""How a tensor that parameters tile is read as a matrix, and what may be read there.

A tensor is read in the order of its memory. Its axes fall into three parts there, [outer, tiles, inner]: those before
the tiles, the tiles, and the elements that lie together and share one. Where an inner part is long enough for a warp,
it is a row; where it is short, a row takes one element of each outer part, and neighbouring rows are neighbours in
memory. Either way the elements of a row share their parameters, and a warp reads memory without gaps.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from q_core import functional
from q_core.errors import BackendError, ShapeError

_WARP = 32
_LIMIT = 1 << 31  # rows are numbered in 32 bits; elements in 64
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}


@dataclasses.dataclass(frozen=True)
class Rows:
    """How a tensor is read.

    Attributes:
        order: Its axes as they follow each other in memory, the fastest last.
        size: Its sizes in that order.
        counts: How many tiles there are along each axis, in that order.
        outer: Elements of the axes before the tiles.
        tiles: Number of tiles.
        inner: Elements that lie together in one tile.
        short: Whether a row has one element of each outer part, or is an inner part.
    """

    order: tuple[int, ...]
    size: tuple[int, ...]
    counts: tuple[int, ...]
    outer: int
    tiles: int
    inner: int
    short: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return (self.tiles * self.inner, self.outer) if self.short else (self.outer * self.tiles, self.inner)

    @property
    def steps(self) -> tuple[int, int]:
        """Elements from one row to the next, and from one column to the next."""
        return (1, self.tiles * self.inner) if self.short else (self.inner, 1)

    @property
    def period(self) -> int:
        """After so many rows the parameters are the same again."""
        return self.tiles * self.inner if self.short else self.tiles

    def read(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the order of its memory; a copy only where it has gaps or another order."""
        return tensor.detach().permute(self.order).contiguous()

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Allocate a result, in the order of memory."""
        return torch.empty(self.size, dtype=dtype, device=like.device)

    def written(self, result: Tensor) -> Tensor:
        """Return a result with its axes as the caller counts them."""
        return result.permute([self.order.index(axis) for axis in range(len(self.order))])

    def spread(self, parameter: Tensor) -> Tensor:
        """Return [more, period], one column for each row of a period, of a parameter [*tiles, *more]."""
        parameter = parameter.detach()
        if self.tiles == 1:
            table = parameter.reshape(1, -1)
        else:
            axes = len(self.order)
            table = parameter.permute(*self.order, *range(axes, parameter.ndim)).reshape(self.tiles, -1)
        table = table.T
        return (table.repeat_interleave(self.inner, 1) if self.short else table).contiguous()

    def gathered(self, sums: Tensor) -> Tensor:
        """Add [chunks, more, rows] up to float64 [*tiles, more], tiles as the caller counts them."""
        total = sums.sum(0, dtype=torch.float64)
        if self.short:
            total = total.reshape(-1, self.tiles, self.inner).sum(2)
        else:
            total = total.reshape(-1, self.outer, self.tiles).sum(1)
        tiles = total.T.reshape(*self.counts, -1)
        return tiles.permute(*(self.order.index(axis) for axis in range(len(self.order))), -1)


def view_of(tensor: Tensor, tiles: tuple[int, ...]) -> Rows:
    """Return how to read a tensor that is not empty and has passed `refuses`.

    Raises:
        BackendError: It has not.
    """
    found = rows_of(tuple(tensor.shape), tensor.stride(), tiles)
    if isinstance(found, str):
        raise BackendError(f"a tensor of shape {tuple(tensor.shape)} in tiles of {tiles}: {found}; ask refuses() first")
    return found


@functools.lru_cache(maxsize=256)
def rows_of(size: tuple[int, ...], strides: tuple[int, ...], tiles: tuple[int, ...]) -> Rows | str:
    """Find how to read a tensor that is not empty, for the shape of a parameter that tiles it; or say why it cannot be.

    Args:
        size: Of the tensor.
        strides: Of the tensor.
        tiles: Shape of the parameter; one element tiles every tensor.
    """
    given = tiles if math.prod(tiles) > 1 else (1,) * len(size)
    # Where an axis of one element lies is of no importance, and its stride may be anything.
    order = sorted(range(len(size)), key=lambda axis: -strides[axis] if size[axis] > 1 else -math.inf)
    sizes, counts = [size[axis] for axis in order], [given[axis] for axis in order]
    parts = [part for count, length in zip(counts, sizes, strict=True) for part in ((count, 0), (length // count, 1))]
    parts = [(length, kind) for length, kind in parts if length > 1]
    tiled = [place for place, (_, kind) in enumerate(parts) if kind == 0]
    first, last = (tiled[0], tiled[-1] + 1) if tiled else (0, 0)
    if any(kind for _, kind in parts[first:last]):
        return "its tiles do not lie together in memory, other axes lie between them"
    outer, middle, inner = (math.prod(n for n, _ in part) for part in (parts[:first], parts[first:last], parts[last:]))
    short = inner < _WARP and outer > 1
    found = Rows(tuple(order), tuple(sizes), tuple(counts), outer, middle, inner, short)
    if found.matrix[0] >= _LIMIT:
        return f"it numbers rows in 31 bits, and there would be {found.matrix[0]}"
    return found


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program does.

    Attributes:
        rows: Rows of a tile, a power of 2.
        columns: Columns of a tile, a power of 2.
        chunks: Programs for each block of rows.
        steps: Tiles that a program takes, one after the other.
        blocks: Blocks of rows.
    """

    rows: int
    columns: int
    chunks: int
    steps: int
    blocks: int

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.blocks * self.chunks


_PROGRAMS = 2048  # enough to keep every multiprocessor of a large GPU busy, and to balance them


def tile(view: Rows, elements: int, *, sums: bool) -> Tile:
    """Choose the tiles of a matrix. The choice depends on shapes alone, and so do the sums, to the last bit.

    Args:
        view: The matrix.
        elements: Elements of a tile, a power of 2.
        sums: Whether programs sum up over columns, so that few programs with many steps are better than many.
    """
    rows, columns = view.matrix
    if view.short:
        high = min(elements, 128, _power(rows))
        wide = min(elements // high, _power(columns))
    else:
        wide = min(elements, _power(columns))
        high = min(elements // wide, _power(rows))
    pieces, blocks = -(-columns // wide), -(-rows // high)
    steps = max(1, -(-pieces // max(1, _PROGRAMS // blocks))) if sums else 1
    return Tile(high, wide, -(-pieces // steps), steps, blocks)


def numbers(view: Rows, tile: Tile) -> dict[str, int]:
    """Return the arguments that describe a matrix and its tiles, by the names they have in every kernel."""
    (rows, columns), (row_step, column_step) = view.matrix, view.steps
    return {
        "rows": rows,
        "columns": columns,
        "row_step": row_step,
        "column_step": column_step,
        "tiles": view.period,
        "chunks": tile.chunks,
        "steps": tile.steps,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }


def _power(number: int) -> int:
    """Return the smallest power of 2 that is not smaller."""
    return 1 << (number - 1).bit_length()


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
    reason = on_device((x, *parameters, *grads, *(() if mask is None else (mask,))))
    return reason or forms(x, parameters, tiles, grads=grads, mask=mask)


def forms(
    x: Tensor,
    parameters: Sequence[Tensor],
    tiles: tuple[int, ...],
    *,
    grads: Sequence[Tensor] = (),
    mask: Tensor | None = None,
) -> str | None:
    """Say what is wrong with dtypes, shapes and layouts, wherever the tensors are; see `refuses`."""
    wide = [tensor.dtype for tensor in (x, *grads) if tensor.dtype not in _FLOATS]
    wide += [tensor.dtype for tensor in parameters if tensor.dtype != torch.float32]
    if wide:
        return f"it computes in float32, with parameters in float32, and would not do justice to {wide[0]}"
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
    view = rows_of(tuple(x.shape), x.stride(), tiles) if x.numel() else None
    return view if isinstance(view, str) else None


def on_device(tensors: Sequence[Tensor]) -> str | None:
    """Say why Triton cannot run on these tensors: where they are, what they are, which GPU, whether it is there."""
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it runs on an NVIDIA GPU, a tensor is on {tensor.device}"
        if tensor.device != tensors[0].device:
            return f"it runs on one GPU, tensors are on {tensors[0].device} and {tensor.device}"
        if not _in_memory(tensor):
            return "it reads plain memory, and a tensor is sparse, a subclass, a negative view or one of torch.func"
    return _machine(tensors[0].device.index or 0)


@functools.cache
def _machine(index: int) -> str | None:
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, and this torch is built for AMD's"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return (
            f"it is compiled and checked for compute capability 8.0 and higher, not for {capability[0]}.{capability[1]}"
        )
    return None


def launching(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the GPU of a tensor the one that kernels are launched on."""
    device: contextlib.AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return device


def _in_memory(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_neg():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
