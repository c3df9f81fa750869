"""Statistics in, a grid out.

An observer sits in the slot where a quantizer will be. It lets data pass unchanged, keeps statistics of fixed size, and
proposes a grid when asked. All of its state exists from the start, so its `state_dict` loads strictly at any time.
Range observers (`MinMaxObserver`, `MovingAverageObserver`, `PercentileObserver`, `MSEObserver`, `EntropyObserver`)
propose a range of reals and leave it to a grid factory to cover it.
"""

import abc
import math
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

from q_core import functional
from q_core.errors import DataError, RangeError, StateError
from q_core.grid import Grid, UniformGrid
from q_core.histogram import StreamingHistogram
from q_core.module import PreciseModule
from q_core.quantizer import Quantizer
from q_core.rounding import NearestEven, Rounding
from q_core.spec import QuantSpec

GridFactory = Callable[[QuantSpec, Tensor, Tensor], Grid]
"""Builds the grid that covers a range: `(spec, low, high) -> grid`, as `UniformGrid.from_range` does."""

_ACTIVATION_BINS = 2048
_CANDIDATES = 100
_BLOCK = 1 << 17  # errors evaluated at once, so that they stay in cache


class Observer(PreciseModule, abc.ABC):
    """Collects statistics of the tensors that pass, and proposes a grid.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale, one entry per tile. One element means per tensor.
        rounding: Makes the rounding that goes with the grid.

    Attributes:
        low: Smallest real seen, per tile, float64.
        high: Largest real seen, per tile, float64.
        nonfinite: Number of updates that held a NaN or an infinity.
        transform: What the quantizer does to a tensor before; statistics are of the transformed one.
    """

    def __init__(
        self, spec: QuantSpec, shape: tuple[int, ...] = (1,), *, rounding: Callable[[], Rounding] = NearestEven
    ) -> None:
        super().__init__()
        self.spec, self.shape, self.make_rounding = spec, shape, rounding
        self.transform: nn.Module | None
        self.register_module("transform", None)
        self.low: Tensor
        self.high: Tensor
        self.nonfinite: Tensor
        tiles = math.prod(shape)
        self.register_buffer("low", torch.full((tiles, 1), math.inf, dtype=torch.float64))
        self.register_buffer("high", torch.full((tiles, 1), -math.inf, dtype=torch.float64))
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Update the statistics with `x` and return it unchanged.

        Raises:
            StateError: `x` is on another device than the statistics.
        """
        if x.device != self.low.device:
            raise StateError(
                f"the observer is on {self.low.device} and the tensor it sees on {x.device}: move the swapped model "
                "and its batches to one device before calibrate()"
            )
        with torch.no_grad():
            if x.numel():
                seen = x.detach() if self.transform is None else self.transform(x.detach())
                rows = functional.to_tiles(seen, self.shape)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)  # faster than aminmax with a dim
                self.nonfinite += (~(low.isfinite() & high.isfinite())).any()
                self.low.copy_(torch.minimum(self.low, low))
                self.high.copy_(torch.maximum(self.high, high))
                self.update(rows, low, high)
        return x

    @abc.abstractmethod
    def update(
        self, rows: Float[Tensor, "tiles elements"], low: Float[Tensor, "tiles 1"], high: Float[Tensor, "tiles 1"]
    ) -> None:
        """Take in one tensor, given as one row per tile with the extremes of each row.

        No Python branch may depend on a value, so that the model with its observers compiles as one graph.
        """

    @abc.abstractmethod
    def grid(self) -> Grid:
        """Propose a grid from what was seen.

        Raises:
            StateError: Nothing was seen.
            DataError: A NaN or an infinity was seen.
        """

    def begin(self, world_size: int) -> None:
        """Prepare for a pass in which this process sees one batch in `world_size`."""

    def merge(self) -> None:
        """Combine the statistics of all ranks of the default process group, in place."""
        dist.all_reduce(self.low, dist.ReduceOp.MIN)
        dist.all_reduce(self.high, dist.ReduceOp.MAX)
        dist.all_reduce(self.nonfinite, dist.ReduceOp.SUM)

    def quantizer(self) -> Quantizer:
        """Propose a quantizer: the grid, and the rounding and the transform it was asked for."""
        return Quantizer(self.grid(), self.make_rounding(), self.transform)

    @property
    def seen(self) -> bool:
        """Whether any value was seen."""
        return bool((self.low <= self.high).all())

    def dead_tiles(self) -> list[int]:
        """List the tiles that saw nothing but zero; their scale is 1 and their codes are zero."""
        return ((self.low == 0) & (self.high == 0)).flatten().nonzero().flatten().tolist()

    def _require_data(self) -> None:
        if bool(self.nonfinite):
            raise DataError(
                f"{int(self.nonfinite)} of the tensors seen held a NaN or an infinity: clean the data, or let "
                "calibrate() leave such batches out with on_nonfinite='skip'"
            )
        if not self.seen:
            raise StateError("the observer has seen no data: run calibrate() with at least one non-empty batch")


class RangeObserver(Observer, abc.ABC):
    """An observer that proposes a range and lets a factory build the grid over it.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, rounding=rounding)
        self.make_grid = grid

    @abc.abstractmethod
    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the smallest and the largest real that the grid should hold, in float64."""

    def grid(self) -> Grid:
        """Build the grid over the proposed range.

        Raises:
            StateError: Nothing was seen.
            DataError: A NaN or an infinity was seen.
        """
        self._require_data()
        low, high = (bound.reshape(self.shape).to(torch.float32) for bound in self.range())
        return self.make_grid(self.spec, low, high)


@final
class MinMaxObserver(RangeObserver):
    """The full range of everything seen."""

    def update(
        self, rows: Float[Tensor, "tiles elements"], low: Float[Tensor, "tiles 1"], high: Float[Tensor, "tiles 1"]
    ) -> None:
        """Keep nothing beyond the extremes."""

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the extremes."""
        return self.low, self.high


@final
class MovingAverageObserver(RangeObserver):
    r"""An exponential moving average of the extremes of each batch.

    With momentum $c$ the average after $n$ batches is $\sum_i (1-c)^{n-1-i} b_i / \sum_i (1-c)^{n-1-i}$,
    without a bias toward the first batch.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        momentum: Weight of a new batch, in (0, 1]. 1 keeps the last batch only.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Raises:
        RangeError: `momentum` outside (0, 1].

    Note:
        On several ranks the batches count in the order rank 0, rank 1, ..., rank 0, ..., which is the order of a
        `DistributedSampler` without shuffling. All ranks must see equally many batches.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        momentum: float = 0.01,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, grid=grid, rounding=rounding)
        if not 0 < momentum <= 1:
            raise RangeError(f"momentum={momentum}: it must be above 0 and at most 1")
        self.momentum = momentum
        self.sums: Tensor
        self.decay: Tensor
        self.batches: Tensor
        # Decayed sums of low, high and 1: their ratios are the averages.
        self.register_buffer("sums", torch.zeros(3, math.prod(shape), 1, dtype=torch.float64))
        self.register_buffer("decay", torch.full((), 1 - momentum, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def begin(self, world_size: int) -> None:
        """Let one step of this rank decay the average by `world_size` batches."""
        self.decay.fill_((1 - self.momentum) ** world_size)

    def update(
        self, rows: Float[Tensor, "tiles elements"], low: Float[Tensor, "tiles 1"], high: Float[Tensor, "tiles 1"]
    ) -> None:
        """Decay the sums and add the extremes of this batch."""
        self.sums.copy_(self.sums * self.decay + torch.stack([low, high, torch.ones_like(low)]))
        self.batches += 1

    def merge(self) -> None:
        """Combine ranks as one process would that sees their batches in turn.

        Raises:
            StateError: The ranks saw different numbers of batches.
        """
        super().merge()
        fewest, most = self.batches.clone(), self.batches.clone()
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if fewest != most:
            raise StateError(
                f"ranks saw {int(fewest)} to {int(most)} batches: a moving average needs equally many on each; "
                "drop the last incomplete round, or use MinMaxObserver"
            )
        behind = dist.get_world_size() - 1 - dist.get_rank()
        self.sums *= (1 - self.momentum) ** behind
        dist.all_reduce(self.sums, dist.ReduceOp.SUM)

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the averages."""
        return self.sums[0] / self.sums[2], self.sums[1] / self.sums[2]


class HistogramObserver(RangeObserver, abc.ABC):
    """A range observer that decides from a streaming histogram.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        bins: Bins of the histogram of each tile, a power of two, at least 16.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Raises:
        RangeError: `bins` is not a power of two from 16.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        bins: int = _ACTIVATION_BINS,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, grid=grid, rounding=rounding)
        if bins < 16 or bins & (bins - 1):
            raise RangeError(f"bins={bins}: it must be a power of two, at least 16")
        self.histogram = StreamingHistogram(math.prod(shape), bins)

    def update(
        self, rows: Float[Tensor, "tiles elements"], low: Float[Tensor, "tiles 1"], high: Float[Tensor, "tiles 1"]
    ) -> None:
        """Count the values."""
        self.histogram.update(rows, torch.maximum(high, -low))

    def merge(self) -> None:
        """Bring all ranks to the widest bins, then add the counts."""
        super().merge()
        exponent = self.histogram.exponent.clone()
        dist.all_reduce(exponent, dist.ReduceOp.MAX)
        self.histogram.widen(exponent)
        dist.all_reduce(self.histogram.counts, dist.ReduceOp.SUM)

    def _cut(self, threshold: Float[Tensor, "tiles 1"]) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the part of the range seen that lies within the threshold, one real at least."""
        # A threshold is known to one bin only, so it may fall short of data that lie away from zero.
        return (-threshold).clamp(self.low, self.high), threshold.clamp(self.low, self.high)


@final
class PercentileObserver(HistogramObserver):
    """The range that holds a given fraction of the values, the rest being clipped.

    For a symmetric grid the fraction is of absolute values, otherwise half of the rest lies beyond either end. The
    position inside a bin is interpolated linearly, so the error is at most one bin: with 2048 bins 1/512 of the largest
    magnitude or less.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        fraction: Fraction of values inside the range, in (0, 1].
        bins: Bins of the histogram, a power of two.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Raises:
        RangeError: `fraction` outside (0, 1].
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        fraction: float = 0.9999,
        bins: int = _ACTIVATION_BINS,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, bins=bins, grid=grid, rounding=rounding)
        if not 0 < fraction <= 1:
            raise RangeError(f"fraction={fraction}: it must be above 0 and at most 1")
        self.fraction = fraction

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the interpolated quantiles, never beyond the extremes."""
        counts, width, half = self.histogram.counts, self.histogram.width(), self.histogram.bins // 2
        if self.spec.symmetric:
            folded = counts[:, half:] + counts[:, :half].flip(1)
            return self._cut(self._quantile(folded, self.fraction) * width)
        tail = (1 - self.fraction) / 2
        low = -self._quantile(counts.flip(1), 1 - tail) * width + half * width
        high = self._quantile(counts, 1 - tail) * width - half * width
        return low.clamp(self.low, self.high), high.clamp(self.low, self.high)

    @staticmethod
    def _quantile(counts: Tensor, fraction: float) -> Tensor:
        """Return the position, in bins from the left edge, below which `fraction` of the counts lie."""
        cumulative = counts.cumsum(1).to(torch.float64)
        target = cumulative[:, -1:] * fraction
        # A product that is whole but for rounding must not reach past a gap, into the next occupied bin.
        whole = target.round()
        target = torch.where((target - whole).abs() < 1e-9 * whole, whole, target)
        index = torch.searchsorted(cumulative, target).clamp(max=counts.shape[1] - 1)
        inside = counts.gather(1, index).clamp(min=1)
        return index + 1 - (cumulative.gather(1, index) - target) / inside


@final
class MSEObserver(HistogramObserver):
    r"""The range whose grid has the smallest mean of $|x - \hat{x}|^p$.

    Searches `candidates` ranges, equally spaced up to the full one. Data of one sign, and symmetric grids, need one
    dimension; otherwise each width is tried with every zero point (for more than 4 bits, with the 16 around the one
    of the full range). The loss is taken over a histogram; the range is always one of the candidates.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        p: Exponent of the error, above 0.
        candidates: Number of widths tried.
        bins: Bins of the histogram, a power of two.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Raises:
        RangeError: `p` is not positive, or `candidates` is below 1.

    Source:
        p = 2.4 and 100 candidates: Wei et al. 2022 (QDrop), arXiv:2203.05740, as released.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        p: float = 2.4,
        candidates: int = _CANDIDATES,
        bins: int = _ACTIVATION_BINS,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, bins=bins, grid=grid, rounding=rounding)
        if p <= 0 or candidates < 1:
            raise RangeError(f"p={p}, candidates={candidates}: p must be positive and candidates at least 1")
        self.p, self.candidates = p, candidates

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the best range found."""
        low, high = self._candidates(self.low.clamp(max=0), self.high.clamp(min=0))
        best = self._loss(low, high).argmin(1, keepdim=True)
        return low.gather(1, best), high.gather(1, best)

    def _candidates(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of all ranges to try, one row per tile."""
        fractions = torch.arange(1, self.candidates + 1, dtype=low.dtype, device=low.device) / self.candidates
        one_sided = bool(((low == 0) | (high == 0)).all())
        if self.spec.symmetric or one_sided:
            return low * fractions, high * fractions
        last = self.spec.qmax - self.spec.qmin
        full = (high - low) / last
        if last < 16:
            zeros = torch.arange(last + 1, dtype=low.dtype, device=low.device).expand(low.shape[0], -1)
        else:
            around = torch.arange(-8, 8, dtype=low.dtype, device=low.device)
            # A dead tile divides zero by one; all its candidates stay the empty range, whose scale is 1.
            middle = torch.round(-low / torch.where(full > 0, full, torch.ones_like(full)))
            zeros = (middle + around).clamp(0, last)
        scales = (full * fractions).unsqueeze(2)
        zeros = zeros.unsqueeze(1)
        return (-zeros * scales).flatten(1), ((last - zeros) * scales).flatten(1)

    def _loss(self, low: Tensor, high: Tensor) -> Tensor:
        r"""Return the loss of each candidate of each tile, up to a factor of the tile.

        Works in codes: $\sum_b n_b |x_b - \hat{x}_b|^p = s^p \sum_b n_b |u_b - q_b|^p$ with $u = x / s + z$.
        """
        grid = UniformGrid.from_range(self.spec, low.to(torch.float32), high.to(torch.float32))
        position, counts = self.histogram.occupied()
        ratio = (self.histogram.width() / grid.scale).to(torch.float32)
        loss = torch.empty_like(ratio)
        tiles, candidates = ratio.shape
        across = max(1, _BLOCK // max(1, position.shape[1]))
        down = max(1, across // candidates)
        for row in range(0, tiles, down):
            for column in range(0, candidates, across):
                block = slice(row, row + down), slice(column, column + across)
                u = position[block[0]].unsqueeze(1) * ratio[block].unsqueeze(2)
                if grid.zero_point is not None:
                    u += grid.zero_point[block].unsqueeze(2)
                error = u.clamp(grid.qmin, grid.qmax).round_().sub_(u).abs_()
                # 2**(p log2 e) is zero at zero, and several times faster than pow.
                power = error.log2_().mul_(self.p).exp2_()
                loss[block] = power.mul_(counts[block[0]].unsqueeze(1)).sum(2)
        relative = grid.scale / grid.scale.amax(1, keepdim=True)  # keeps the power away from overflow
        return loss * relative.pow(self.p)


@final
class EntropyObserver(HistogramObserver):
    r"""The clipping threshold with the smallest Kullback-Leibler divergence.

    For each of `candidates` thresholds $T$ on $|x|$, the reference distribution is the histogram with everything beyond
    $T$ added to its last bin; the quantized one spreads the mass of each level evenly over the occupied bins that
    round to it. The range is $[-T, T]$ cut to what was seen; of equally good thresholds the widest is taken.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        candidates: Number of thresholds tried, equally spaced up to the largest magnitude.
        bins: Bins of the histogram, a power of two.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Raises:
        RangeError: `candidates` is below 1.

    Source:
        Migacz 2017, "8-bit inference with TensorRT", GTC 2017, pages 25-38.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        candidates: int = _CANDIDATES,
        bins: int = _ACTIVATION_BINS,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, bins=bins, grid=grid, rounding=rounding)
        if candidates < 1:
            raise RangeError(f"candidates={candidates}: it must be at least 1")
        self.candidates = candidates

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the range cut at the best threshold."""
        magnitude = torch.maximum(self.high, -self.low)
        best = torch.full_like(magnitude, math.inf)
        chosen = magnitude.clone()
        for index in range(self.candidates):
            threshold = magnitude * ((index + 1) / self.candidates)
            divergence = self._divergence(threshold)
            better = divergence <= best
            best = torch.where(better, divergence, best)
            chosen = torch.where(better, threshold, chosen)
        return self._cut(chosen)

    def _divergence(self, threshold: Tensor) -> Tensor:
        centers, counts = self.histogram.centers(), self.histogram.counts.to(torch.float64)
        half_width = self.histogram.width() / 2
        # A bin holds its left edge, so the bin that starts at the threshold is inside: ReLU6 saturates at such an edge.
        inside = (centers - half_width <= threshold) & (centers + half_width > -threshold)
        clipped = torch.where(inside, counts, torch.zeros_like(counts))
        reference = clipped.clone()
        above = torch.where(~inside & (centers > 0), counts, 0.0).sum(1, keepdim=True)
        below = torch.where(~inside & (centers < 0), counts, 0.0).sum(1, keepdim=True)
        last = (inside.int() * torch.arange(inside.shape[1], device=inside.device)).argmax(1, keepdim=True)
        reference.scatter_add_(1, last, above)
        reference.scatter_add_(1, inside.int().argmax(1, keepdim=True), below)
        low, high = torch.maximum(-threshold, self.low), torch.minimum(threshold, self.high)
        grid = UniformGrid.from_range(self.spec, low.clamp(max=0), high.clamp(min=0))
        codes = grid.quantize(centers, NearestEven()).long() - grid.qmin
        levels = grid.qmax - grid.qmin + 1
        occupied = (clipped > 0).to(torch.float64)
        rows = counts.shape[0]
        mass = counts.new_zeros(rows, levels).scatter_add_(1, codes, clipped)
        members = counts.new_zeros(rows, levels).scatter_add_(1, codes, occupied)
        spread = (mass / members.clamp(min=1)).gather(1, codes) * occupied
        p = reference / reference.sum(1, keepdim=True).clamp(min=1)
        q = spread / spread.sum(1, keepdim=True).clamp(min=1)
        # Mass where the quantized distribution has none makes the divergence infinite.
        ratio = torch.where(p > 0, torch.log(p / q), torch.zeros_like(p))
        return (p * ratio).sum(1, keepdim=True)
