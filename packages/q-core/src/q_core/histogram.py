"""A histogram of a stream whose range is not known in advance.

Bins are one power of two wide and lie on the lattice of that power, so a coarser histogram is an exact sum of bins of
a finer one. When a value falls outside, the bins are merged in pairs until it fits. The final histogram therefore
depends on the multiset of values alone: not on how the stream was cut into batches, nor on which rank saw which part.
(One exception is out of reach of real data: a negative value 2**120 times smaller than the largest may count as zero.)
Memory is `tiles x bins` counters, whatever the length of the stream.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

_FLOOR = -120  # 2**-120 is far below any activation, and its inverse is still finite in float32
_CHUNK = 1 << 17  # elements handled at once: with their 64-bit indices they stay in the cache of one core
_LANES = 8  # parts that a single row is cut into, so that several threads can count it


class StreamingHistogram(nn.Module):
    """Counts the values of a stream, per tile, in bins of a common power-of-two width.

    Args:
        tiles: Rows to keep apart.
        bins: Bins per row, a power of two. Half of them lie below zero.
    """

    def __init__(self, tiles: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.counts: Tensor
        self.exponent: Tensor
        self.register_buffer("counts", torch.zeros(tiles, bins, dtype=torch.int64))
        self.register_buffer("exponent", torch.full((tiles, 1), _FLOOR, dtype=torch.int64))

    def update(self, rows: Float[Tensor, "tiles elements"], magnitude: Float[Tensor, "tiles 1"]) -> None:
        """Add values.

        Args:
            rows: The values of each tile. A row that holds a NaN or an infinity is left out as a whole.
            magnitude: Largest absolute value of each row; not finite when the row holds such a value.
        """
        finite = magnitude.isfinite()
        self.widen(self._exponent_for(torch.where(finite, magnitude, torch.zeros_like(magnitude))))
        tiles, elements = rows.shape
        lanes = _LANES if tiles == 1 else 1
        even = elements - elements % lanes
        table = self.counts.new_zeros(tiles * lanes, self.bins)
        self._count(table, rows[:, :even].reshape(tiles * lanes, even // lanes), finite)
        if even < elements:
            self._count(table[:tiles], rows[:, even:], finite)
        # Codes below zero were wrapped around; rolling puts them before those from zero.
        self.counts += table.reshape(lanes, tiles, self.bins).sum(0).roll(self.bins // 2, 1)

    def _count(self, table: Tensor, rows: Tensor, finite: Tensor) -> None:
        """Add one to entry `floor(x / width) mod bins` of the table for each `x`."""
        inverse = torch.exp2(-self.exponent.to(rows.dtype)).expand(rows.shape[0], 1)
        one = finite.to(torch.int64).expand(rows.shape[0], 1)
        across = max(1, min(_CHUNK // _LANES, rows.shape[1]))
        down = max(1, _CHUNK // across)
        for row in range(0, rows.shape[0], down):
            block = slice(row, row + down)
            ones = one[block].repeat(1, across)
            for start in range(0, rows.shape[1], across):
                part = rows[block, start : start + across]
                # The mask keeps every index inside the table, also that of a NaN, which then adds zero.
                index = (part * inverse[block]).floor_().to(torch.int64).bitwise_and_(self.bins - 1)
                table[block].scatter_add_(1, index, ones[:, : part.shape[1]])

    def widen(self, exponent: Int64[Tensor, "tiles 1"]) -> None:
        """Merge bins until they are at least `2**exponent` wide."""
        target = torch.maximum(self.exponent, exponent)
        half = self.bins // 2
        position = torch.arange(self.bins, device=self.counts.device) - half
        shift = (target - self.exponent).clamp(max=62)
        merged = torch.zeros_like(self.counts).scatter_add(1, (position >> shift) + half, self.counts)
        self.counts.copy_(merged)
        self.exponent.copy_(target)

    def _exponent_for(self, magnitude: Tensor) -> Tensor:
        # magnitude < 2**k, and half the bins cover 2**(exponent) * bins / 2.
        k = torch.frexp(magnitude).exponent.to(torch.int64)
        needed = k - (self.bins // 2).bit_length() + 1
        return torch.where(magnitude > 0, needed.clamp(min=_FLOOR), torch.full_like(needed, _FLOOR))

    def width(self) -> Float[Tensor, "tiles 1"]:
        """Return the real width of a bin of each row."""
        return torch.exp2(self.exponent.to(torch.float64))

    def centers(self) -> Float[Tensor, "tiles bins"]:
        """Return the real in the middle of each bin."""
        position = torch.arange(self.bins, device=self.counts.device, dtype=torch.float64) - self.bins // 2 + 0.5
        return position * self.width()

    def occupied(self) -> tuple[Float[Tensor, "tiles used"], Float[Tensor, "tiles used"]]:
        """Return the middle of each bin that is not empty, in widths of a bin, and its count.

        A tile with fewer such bins than another is filled up with bin 0 and a count of zero. In a tile of few values
        most bins are empty, so this is what a search should run over.
        """
        tile, place = self.counts.nonzero(as_tuple=True)
        used = self.counts.count_nonzero(1)
        slot = torch.arange(tile.numel(), device=tile.device) - (used.cumsum(0) - used)[tile]
        counts = torch.zeros(used.numel(), int(used.max()), device=tile.device)
        middle = torch.full_like(counts, 0.5)
        counts[tile, slot] = self.counts[tile, place].to(counts.dtype)
        middle[tile, slot] = (place - self.bins // 2).to(counts.dtype) + 0.5
        return middle, counts
