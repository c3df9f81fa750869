r"""How a statistic of single batches becomes one of all of them, on one process or on many.

The statistic is a norm, $(\frac{1}{n} \sum |x|^p)^{1/p}$, from which initial steps are made. `MeanOfBatches` takes it
over all elements, `LargestBatch` takes the batch where it is largest, as the code of nuLSQ does, and
`PercentileOfBatches` lies between. Whichever it is, the result depends on the batches alone and not on their order or
on the rank that saw them, to the last bit.
"""

import abc
import dataclasses
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

from q_core.errors import RangeError
from q_core.histogram import StreamingHistogram
from q_core.module import PreciseModule

_PLACES, _DIGIT, _LOWEST = 16, 32, -256  # 16 digits of 32 bits, from 2**-256 to 2**256
_BINS = 4096


class Collector(PreciseModule, abc.ABC):
    """Takes in the sum of |x|**p of one batch after the other. All of its state exists from the start.

    Args:
        tiles: Rows to keep apart.
        power: The exponent p of the norm.
    """

    def __init__(self, tiles: int, power: int) -> None:
        super().__init__()
        self.tiles, self.power = tiles, power

    @abc.abstractmethod
    def add(self, total: Float[Tensor, "tiles 1"], elements: int) -> None:
        """Take in a batch.

        Args:
            total: Sum of |x|**p over the elements of each tile, float64.
            elements: Elements in each tile.
        """

    @abc.abstractmethod
    def merge(self) -> None:
        """Combine all ranks of the default process group, in place."""

    @abc.abstractmethod
    def norm(self) -> Float[Tensor, "tiles 1"]:
        """Return the norm over the batches, float64."""

    def _norm_of(self, total: Tensor, elements: int) -> Tensor:
        return (total / elements) ** (1 / self.power)


class Over(abc.ABC):
    """What is made of the norms of several batches."""

    @abc.abstractmethod
    def collector(self, tiles: int, power: int) -> Collector:
        """Make what takes in the batches."""


@final
@dataclasses.dataclass(frozen=True)
class MeanOfBatches(Over):
    """The norm over the elements of all batches: every element counts the same, however they were cut into batches."""

    def collector(self, tiles: int, power: int) -> Collector:
        """Make what takes in the batches."""
        return _Mean(tiles, power)


@final
@dataclasses.dataclass(frozen=True)
class LargestBatch(Over):
    """The largest norm of a batch; it grows with the number of batches and shrinks with their size."""

    def collector(self, tiles: int, power: int) -> Collector:
        """Make what takes in the batches."""
        return _Largest(tiles, power)


@final
@dataclasses.dataclass(frozen=True)
class PercentileOfBatches(Over):
    """The norm that a given fraction of the batches does not exceed, to one part in 1024 of the largest.

    Attributes:
        fraction: Fraction of the batches, in (0, 1]. 1 is the largest.

    Raises:
        RangeError: `fraction` outside (0, 1].
    """

    fraction: float = 0.99

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 < self.fraction <= 1:
            raise RangeError(f"fraction={self.fraction}: it must be above 0 and at most 1")

    def collector(self, tiles: int, power: int) -> Collector:
        """Make what takes in the batches."""
        return _Percentile(tiles, power, self.fraction)


@final
class ExactSum(nn.Module):
    """A sum of float64 numbers that does not depend on their order.

    Every number is written with digits of base 2**32, from 2**-256 to 2**256, and digits are added as integers. That is
    exact for up to 2**31 numbers; what a number has below 2**-256 is cut off.

    Args:
        rows: How many sums.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.digits: Tensor
        self.register_buffer("digits", torch.zeros(rows, _PLACES, dtype=torch.int64))

    def _units(self) -> Tensor:
        places = torch.arange(_PLACES, dtype=torch.float64, device=self.digits.device)
        return torch.exp2(places * _DIGIT + _LOWEST)

    def add(self, numbers: Float[Tensor, "rows 1"]) -> None:
        """Add a number to each row. One that is not finite, or 2**256 or more, adds nothing that makes sense."""
        digits = torch.remainder(torch.floor(numbers.abs() / self._units()), 2.0**_DIGIT)
        self.digits += (digits.nan_to_num() * numbers.sign().nan_to_num()).to(torch.int64)

    def total(self) -> Float[Tensor, "rows 1"]:
        """Return the sums, float64."""
        return (self.digits.to(torch.float64) * self._units()).sum(1, keepdim=True)


@final
class _Mean(Collector):
    def __init__(self, tiles: int, power: int) -> None:
        super().__init__(tiles, power)
        self.sum = ExactSum(tiles)
        self.elements: Tensor
        self.register_buffer("elements", torch.zeros((), dtype=torch.int64))

    def add(self, total: Float[Tensor, "tiles 1"], elements: int) -> None:
        self.sum.add(total)
        self.elements += elements

    def merge(self) -> None:
        dist.all_reduce(self.sum.digits, dist.ReduceOp.SUM)
        dist.all_reduce(self.elements, dist.ReduceOp.SUM)

    def norm(self) -> Float[Tensor, "tiles 1"]:
        return (self.sum.total() / self.elements) ** (1 / self.power)


@final
class _Largest(Collector):
    def __init__(self, tiles: int, power: int) -> None:
        super().__init__(tiles, power)
        self.largest: Tensor
        self.register_buffer("largest", torch.zeros(tiles, 1, dtype=torch.float64))

    def add(self, total: Float[Tensor, "tiles 1"], elements: int) -> None:
        self.largest.copy_(torch.maximum(self.largest, self._norm_of(total, elements)))

    def merge(self) -> None:
        dist.all_reduce(self.largest, dist.ReduceOp.MAX)

    def norm(self) -> Float[Tensor, "tiles 1"]:
        return self.largest


@final
class _Percentile(Collector):
    def __init__(self, tiles: int, power: int, fraction: float) -> None:
        super().__init__(tiles, power)
        self.fraction = fraction
        self.histogram = StreamingHistogram(tiles, _BINS)
        self.largest: Tensor
        self.register_buffer("largest", torch.zeros(tiles, 1, dtype=torch.float64))

    def add(self, total: Float[Tensor, "tiles 1"], elements: int) -> None:
        norm = self._norm_of(total, elements)
        self.histogram.update(norm, norm)
        self.largest.copy_(torch.maximum(self.largest, norm))

    def merge(self) -> None:
        exponent = self.histogram.exponent.clone()
        dist.all_reduce(exponent, dist.ReduceOp.MAX)
        self.histogram.widen(exponent)
        dist.all_reduce(self.histogram.counts, dist.ReduceOp.SUM)
        dist.all_reduce(self.largest, dist.ReduceOp.MAX)

    def norm(self) -> Float[Tensor, "tiles 1"]:
        below = self.histogram.counts.cumsum(1)
        # The smallest whole number of batches that is the fraction or more, but for the rounding of the product.
        wanted = torch.ceil(below[:, -1:] * self.fraction - 1e-9).clamp(min=1).to(below.dtype)
        bin_of = torch.searchsorted(below, wanted)
        return torch.minimum((bin_of + 1 - _BINS // 2) * self.histogram.width(), self.largest)
