"""A histogram of a stream whose range is not known in advance.

Bins are one power of two wide and lie on the lattice of that power, so a coarser histogram is an exact sum of bins of
a finer one. When a value falls outside, the bins are merged in pairs until it fits. The final histogram therefore
depends on the multiset of values alone: not on how the stream was cut into batches, nor on which rank saw which part.
Memory is `tiles x bins` counters, whatever the length of the stream.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

_FLOOR = -120  # 2**-120 is far below any activation, and its inverse is still finite in float32
_CHUNK = 1 << 18  # elements handled at once: small enough to stay in cache, and to count exactly in float32


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
            rows: The values of each tile. Non-finite values are not counted.
            magnitude: Largest absolute value of each row.
        """
        self.widen(self._exponent_for(magnitude))
        inverse = torch.exp2(-self.exponent.to(rows.dtype))
        for part in rows.split(max(1, _CHUNK // rows.shape[0]), dim=1):
            self.counts += self._count(torch.floor(part * inverse))

    def _count(self, index: Tensor) -> Tensor:
        half = self.bins // 2
        if index.shape[0] == 1:
            return torch.histc(index, self.bins, -half, half).to(torch.int64).unsqueeze(0)
        rows = index.shape[0]
        offset = torch.arange(rows, device=index.device).unsqueeze(1) * self.bins + half
        flat = (index.nan_to_num().clamp(-half, half - 1).to(torch.int64) + offset).flatten()
        return torch.bincount(flat, minlength=rows * self.bins).reshape(rows, self.bins)

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
        return torch.where(magnitude > 0, needed.clamp(_FLOOR, 127), torch.full_like(needed, _FLOOR))

    def width(self) -> Float[Tensor, "tiles 1"]:
        """Return the real width of a bin of each row."""
        return torch.exp2(self.exponent.to(torch.float64))

    def centers(self) -> Float[Tensor, "tiles bins"]:
        """Return the real in the middle of each bin."""
        position = torch.arange(self.bins, device=self.counts.device, dtype=torch.float64) - self.bins // 2 + 0.5
        return position * self.width()
