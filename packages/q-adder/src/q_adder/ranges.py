r"""Ranges of the inputs of adder layers: statistics in, an interval out.

An adder layer wants a range that leaves out a stated fraction of the largest magnitudes, because one outlier would
widen the levels of inputs and kernels alike. Three statistics find it: the order statistic of the paper on every batch,
exactly; the one of the released code, which discards twice; and a streaming one with a stated bound.
"""

import abc
import math
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from q_core.errors import DataError, RangeError, SpecError, StateError
from q_core.histogram import StreamingHistogram

LEAST_RANGE = 1e-3
"""Range of a layer whose inputs are all but zero, as released."""


def quantile_index(count: int, alpha: float) -> int:
    r"""Return the place of the paper's order statistic among ascending magnitudes, $\lfloor \alpha(n-1) \rceil$.

    Args:
        count: Number of values, $n$.
        alpha: Fraction of the magnitudes to keep, above 0 and at most 1.

    Returns:
        An index from 0 to `count - 1`; ties to even.

    Raises:
        RangeError: `alpha` outside (0, 1].
        DataError: No values.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, section A.3.
    """
    _check_quantile(count, alpha)
    return round(alpha * (count - 1))


def released_quantile_index(count: int, alpha: float) -> int:
    r"""Return the place of the released code's order statistic, $\lfloor (\lfloor n\alpha \rceil - 1)\,\alpha \rfloor$.

    It applies `alpha` twice, so that the fraction kept is near $\alpha^2$: 0.9994 for 0.9997.

    Args:
        count: Number of values, $n$.
        alpha: Fraction of the magnitudes to keep, above 0 and at most 1.

    Returns:
        An index from 0 to `count - 1`.

    Raises:
        RangeError: `alpha` outside (0, 1].
        DataError: No values.

    Source:
        The code released with Nie et al. 2022, arXiv:2212.10200.
    """
    _check_quantile(count, alpha)
    return max(0, int((round(count * alpha) - 1) * alpha))


def _check_quantile(count: int, alpha: float) -> None:
    if count < 1:
        raise DataError("no values to take an order statistic of: give at least one")
    if not 0 < alpha <= 1:
        raise RangeError(f"alpha={alpha}: it must be above 0 and at most 1, where 1 keeps every value")


def order_statistic(magnitudes: Float[Tensor, " n"], alpha: float) -> Float[Tensor, ""]:
    r"""Return element $\lfloor \alpha (n - 1) \rceil$ of the sorted magnitudes, counted from 0.

    Args:
        magnitudes: At least one.
        alpha: Fraction that is kept, in (0, 1].

    Source:
        Nie et al. 2022, supplement, A.3.
    """
    return _sorted_at(magnitudes, quantile_index(magnitudes.numel(), alpha))


def released_statistic(magnitudes: Float[Tensor, " n"], alpha: float) -> Float[Tensor, ""]:
    """Return the element that the released code takes: it discards twice, so that about `alpha**2` is kept.

    Args:
        magnitudes: At least one.
        alpha: Fraction that is kept each time, in (0, 1].

    Source:
        The released implementation of Nie et al. 2022: `int((round(n * alpha) - 1) * alpha)`.
    """
    return _sorted_at(magnitudes, released_quantile_index(magnitudes.numel(), alpha))


def _sorted_at(magnitudes: Tensor, index: int) -> Tensor:
    # Not kthvalue: its time is quadratic where half of the values are the same zero, as after a rectifier.
    return magnitudes.topk(magnitudes.numel() - index, sorted=False).values.min()


def is_least(low: Float[Tensor, " groups"], high: Float[Tensor, " groups"]) -> bool:
    """Return whether a range is that of a layer whose inputs are all but zero, or near it.

    Args:
        low: Lower end of the range of each group of kernels.
        high: Upper end.
    """
    # Twice, because symmetric levels reach further below zero, and because ranges may have been tuned since.
    return bool((torch.maximum(-low, high) < 2 * LEAST_RANGE).any())


class InputRange(abc.ABC):
    """Collects statistics of the inputs of one layer, over batches, and proposes a range.

    Args:
        alpha: Fraction of the values that is kept, in (0, 1].

    Raises:
        RangeError: `alpha` outside (0, 1].

    Attributes:
        low: Smallest value seen.
        high: Largest value seen.
    """

    def __init__(self, alpha: float) -> None:
        if not 0 < alpha <= 1:
            raise RangeError(f"alpha={alpha}: the fraction of inputs that is kept must be in (0, 1]; 0.9994 is usual")
        self.alpha, self.low, self.high = alpha, math.inf, -math.inf

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in one batch of inputs.

        Raises:
            DataError: It holds a NaN or an infinity.
        """
        if not x.numel():
            return
        values = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten()
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~values.isfinite()).sum())
            raise DataError(
                f"{bad} of {values.numel()} inputs are not finite: clean the data, or look for what diverges"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.add(values)

    @abc.abstractmethod
    def add(self, values: Float[Tensor, " n"]) -> None:
        """Take in finite values."""

    @abc.abstractmethod
    def kept(self) -> tuple[float, float, float]:
        """Return the magnitude up to which values are kept, and the lower and the upper end between which they are."""

    def magnitude(self) -> float:
        """Return the magnitude up to which inputs are kept.

        Raises:
            StateError: Nothing was seen.
        """
        return self._seen()[0]

    def interval(self) -> tuple[float, float]:
        """Return the ends between which inputs are kept; the fraction that is left out is split between them.

        Raises:
            StateError: Nothing was seen.
        """
        _, low, high = self._seen()
        return low, high

    def _seen(self) -> tuple[float, float, float]:
        if self.low > self.high:
            raise StateError("the layer saw no input: feed batches that reach it")
        return self.kept()


@final
class ExactRange(InputRange):
    """The largest order statistic of any batch.

    Memory is that of one batch. The result does not depend on the order of the batches, but on their size.

    Args:
        alpha: Fraction of the values that is kept.
        statistic: `order_statistic` of the paper, or `released_statistic`.
    """

    def __init__(self, alpha: float = 0.9994, statistic: "Statistic | None" = None) -> None:
        super().__init__(alpha)
        self.statistic = statistic or order_statistic
        self._ends = (0.0, math.inf, -math.inf)

    def add(self, values: Float[Tensor, " n"]) -> None:
        """Sort as far as needed."""
        # Both tails are asked for separately only where there are two.
        signed = bool(values.min() < 0)
        magnitude = float(self.statistic(values.abs() if signed else values, self.alpha))
        half = 1 - (1 - self.alpha) / 2
        low = -float(self.statistic(-values, half)) if signed else 0.0
        high = float(self.statistic(values, half)) if signed else magnitude
        most, least, top = self._ends
        self._ends = (max(most, magnitude), min(least, low), max(top, high))

    def kept(self) -> tuple[float, float, float]:
        """Return the extremes over batches; zero lies between the ends, whatever was seen."""
        magnitude, low, high = self._ends
        return magnitude, min(low, 0.0), max(high, 0.0)


@final
class StreamingRange(InputRange):
    """The quantile of all batches together, from a histogram of fixed size.

    The result depends neither on the order nor on the size of the batches. It is above the exact order statistic of all
    values by at most the width of a bin, see `error_bound`: at most 4 / `bins` of the largest magnitude.

    Args:
        alpha: Fraction of the values that is kept.
        bins: Bins of the histogram, a power of two.

    Raises:
        SpecError: Another number of bins.
    """

    def __init__(self, alpha: float = 0.9994, bins: int = 4096) -> None:
        super().__init__(alpha)
        if bins < 2 or bins & (bins - 1):
            raise SpecError(f"bins={bins}: a streaming histogram has a power of two, such as 4096")
        self._histogram = StreamingHistogram(1, bins)

    def add(self, values: Float[Tensor, " n"]) -> None:
        """Count."""
        row = values.unsqueeze(0)
        self._histogram.to(values.device).update(row, row.abs().amax(1, keepdim=True))

    def error_bound(self) -> float:
        """Return the width of a bin: an end of the range is further from zero than the exact one by at most that."""
        return float(self._histogram.width())

    def kept(self) -> tuple[float, float, float]:
        """Return the outer ends of the bins in which the order statistics lie."""
        below, above = self._histogram.counts[0].chunk(2)
        below = below.flip(0)
        if self.low >= 0:
            magnitude = self._end(above, self.alpha)
            return magnitude, 0.0, magnitude
        half = 1 - (1 - self.alpha) / 2
        return self._end(above + below, self.alpha), -self._tail(below, half), self._tail(above, half)

    def _tail(self, counts: Tensor, alpha: float) -> float:
        """Return the end of one tail, counting everything on the other side of zero as smaller."""
        other = int(self._histogram.counts.sum() - counts.sum())
        return self._end(torch.cat([counts.new_tensor([other]), counts]), alpha, -1)

    def _end(self, counts: Tensor, alpha: float, first: int = 0) -> float:
        rank = quantile_index(int(counts.sum()), alpha)
        place = int((counts.cumsum(0) > rank).nonzero()[0])
        end = max(0, first + place + 1) * float(self._histogram.width())
        return min(end, max(self.high, -self.low))


Statistic = Callable[[Tensor, float], Tensor]
"""From magnitudes and the fraction that is kept to the largest one that is kept."""
