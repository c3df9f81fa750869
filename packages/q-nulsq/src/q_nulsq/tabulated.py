"""A grid whose levels are computed from a few parameters: what the peers have in common.

Such a grid says what its levels are and how far apart they lie, as differentiable tables of a few numbers. Everything
else follows: the nearest level, the straight-through gradient, the way to deployment, and the fast kernels.
"""

import abc

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from q_core import functional
from q_core.errors import SpecError
from q_core.grid import Grid
from q_core.ops import fake_quantize_levels
from q_core.rounding import Rounding


class TabulatedGrid(Grid, abc.ABC):
    """A grid that tabulates its levels anew whenever it is used.

    Gradient:
        To `x`: 1 inside the closed range of levels, 0 outside. To the tables: as `q_core.ops.fake_quantize_levels`
        says, and from there to the parameters whatever `table` lets through. A rounding with a gradient of its own is
        differentiated as it is.
    """

    @abc.abstractmethod
    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return the levels in ascending order, and the positive distances between neighbours, differentiable.

        The gradient of what is clipped goes to the outermost levels, that of what is rounded to the distances. A
        parameter that gives several distances, as one scale does, passes the sum of theirs on.
        """

    def zero(self, levels: Float[Tensor, "*tiles n"]) -> Int[Tensor, "*tiles 1"]:
        """Return the number of the level that is 0 in the code coordinate: the one nearest to real zero.

        It matters for ties alone, and is the rule of `q_core.CodebookGrid`, so that freezing moves no tie.
        """
        return levels.abs().argmin(dim=-1, keepdim=True)

    @property
    @abc.abstractmethod
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the tables without their last axis."""

    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes; the derivative is one over the width of the cell."""
        cells = _Cells(self, x)
        found = cells.coordinate(rounding)
        if (edges := cells.edges(rounding)) is not None:
            counted = torch.searchsorted(edges, cells.rows.detach().contiguous()).to(found.dtype)
            found = functional.straight_through(torch.where(cells.rows.isnan(), cells.rows.detach(), counted), found)
        return functional.from_tiles(found + self.qmin, self.tile_shape, tuple(x.shape))

    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Look the codes up in the table."""
        levels, _ = self.table()
        rows = functional.to_tiles(codes, self.tile_shape)
        index = (rows.detach() - self.qmin).round().long().clamp(0, self.qmax - self.qmin)
        found = levels.reshape(-1, levels.shape[-1]).gather(1, index)
        return functional.from_tiles(found, self.tile_shape, tuple(codes.shape))

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to levels; to the nearest in one step, which keeps `x` alone for the backward pass."""
        levels, widths = (part.to(torch.promote_types(x.dtype, part.dtype)) for part in self.table())
        if (edges := _middles(levels.detach(), self.zero(levels.detach()), rounding)) is not None:
            return fake_quantize_levels(x, levels, widths, edges)
        return functional.from_tiles(_Cells(self, x).levels(rounding), self.tile_shape, tuple(x.shape))

    def levels(self) -> Shaped[Tensor, "... levels"]:
        """Return the table of levels, apart from the graph."""
        return self.table()[0].detach()


class MidRiseGrid(TabulatedGrid, abc.ABC):
    """A grid of evenly many levels, symmetric about a zero that is not among them.

    The code coordinate is 0 at the smallest positive level, as in a `q_core.CodebookGrid` of the same levels. With 2
    bits or more and `NearestEven`, real zero goes there and every other tie where rounding of the number of the level
    sends it, as the papers have it.

    Args:
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.

    Raises:
        SpecError: The number of codes is odd, so that zero would be a level.
    """

    def __init__(self, qmin: int, qmax: int) -> None:
        super().__init__()
        if qmin >= qmax or (qmax - qmin) % 2 == 0:
            raise SpecError(
                f"codes {qmin} to {qmax}: without a level at zero their number must be even; "
                "use QuantSpec.signed without narrow"
            )
        self.qmin, self.qmax = qmin, qmax

    def zero(self, levels: Float[Tensor, "*tiles n"]) -> Int[Tensor, "*tiles 1"]:
        """Return the number of the smallest positive level."""
        count = levels.shape[-1]
        return torch.full((*levels.shape[:-1], 1), count // 2, device=levels.device)

    def odd(self, like: Tensor) -> Float[Tensor, " n"]:
        """Return the odd numbers that the levels are multiples of: `-3, -1, 1, 3` for 4 codes."""
        end = self.qmax - self.qmin
        return torch.arange(-end, end + 1, 2, dtype=like.dtype, device=like.device)


class _Cells:
    """Where each element of a tensor lies in its row of levels."""

    def __init__(self, grid: TabulatedGrid, x: Tensor) -> None:
        levels, widths = grid.table()
        rows = functional.to_tiles(x, grid.tile_shape)
        wide = torch.promote_types(x.dtype, levels.dtype)
        self.rows = rows.to(wide)
        self.table = levels.reshape(-1, levels.shape[-1]).to(wide)
        self.zero = grid.zero(self.table.detach())
        inner = functional.closed_clamp(self.rows, self.table[:, :1], self.table[:, -1:])
        known = self.table.detach()
        cell = torch.searchsorted(known, inner.detach().contiguous(), right=True) - 1
        cell = cell.clamp(0, self.table.shape[1] - 2)
        self.cell, self.inner = cell.to(wide), inner
        self.left, self.right = known.gather(1, cell), known.gather(1, cell + 1)
        # The value of the difference, so that a level lies on a whole coordinate to the last digit.
        width = widths.reshape(-1, widths.shape[-1]).to(wide).gather(1, cell)
        self.width = functional.straight_through(self.right - self.left, width)
        self.fraction = (inner - self.table.gather(1, cell)) / self.width

    def coordinate(self, rounding: Rounding) -> Tensor:
        """Return the number of the level that the rounding takes."""
        rounded: Tensor = rounding(self.cell - self.zero + self.fraction)
        return functional.closed_clamp(rounded + self.zero, 0, self.table.shape[1] - 1)

    def levels(self, rounding: Rounding) -> Tensor:
        """Return the level that the rounding takes, with a gradient of 1 where the rounding has one of 1."""
        weight = self.coordinate(rounding) - self.cell
        value = torch.lerp(self.left, self.right, weight.detach())
        return functional.straight_through(value, self.inner + self.width * (weight - self.fraction))

    def edges(self, rounding: Rounding) -> Tensor | None:
        """Return what separates the levels, if the rounding always takes the nearest."""
        return _middles(self.table.detach(), self.zero, rounding)


def _middles(levels: Tensor, zero: Tensor, rounding: Rounding) -> Tensor | None:
    codes = torch.arange(1, levels.shape[-1], device=levels.device) - zero
    up = rounding.ties_up(codes.to(levels.dtype))
    return None if up is None else functional.middles(levels, up)
