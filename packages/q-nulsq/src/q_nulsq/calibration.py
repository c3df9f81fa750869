r"""The steps that training starts from.

Calibration is a phase of its own, before training and with the network in evaluation mode: see `q_core.calibrate`. An
observer here proposes a range, and any grid may cover it; those with `LloydMax` in their name place the steps of a
`StepGrid` one by one. The batches count together as `q_nulsq.batches` says. `q_core.MSEObserver` is the search for the
best equal steps on the data itself.

Spread is measured about zero, not about the mean: zero is a level and does not move. For data with a mean of zero, as
weights nearly have, the root mean square is the standard deviation.
"""

import abc
import math
import warnings
from collections.abc import Callable
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from q_core.errors import RangeError, SpecError
from q_core.grid import Grid, UniformGrid
from q_core.observer import GridFactory, HistogramObserver, RangeObserver
from q_core.rounding import NearestEven, NearestTowardZero, Rounding
from q_core.spec import QuantSpec
from q_nulsq.batches import ExactSum, MeanOfBatches, Over
from q_nulsq.grid import StepGrid
from q_nulsq.normal import lloyd_max_steps, mid_rise_step, uniform_step

_ROUNDS = 200  # of Lloyd's method; on 2048 bins most sides of a grid stand still after 50
_FLOOR = 1e-3  # least step, of the mean step of its side


class ClippingWarning(UserWarning):
    """Data below zero met a grid without levels there, and will all become zero."""


def warn_of_clipping(negative: int, elements: int, spec: QuantSpec, where: str = "the observer") -> None:
    """Tell which part of the data a grid without negative levels clips.

    Args:
        negative: Elements below zero.
        elements: All elements.
        spec: The codes of the grid.
        where: What saw the data, for the message.

    Raises:
        RangeError: Every element is below zero.

    Warns:
        ClippingWarning: Some are, and the codes have no level for them.
    """
    if spec.qmin < 0 or not negative:
        return
    share = f"{negative} of the {elements} elements ({negative / elements:.1%}) that {where} saw are negative"
    advice = f"codes {spec.qmin} to {spec.qmax} hold no negative real: use QuantSpec.signed({spec.bits})"
    if negative == elements:
        raise RangeError(f"{share}, all would be clipped to zero; {advice}")
    warnings.warn(f"{share} and will be clipped to zero; {advice}", ClippingWarning, stacklevel=2)


class NormObserver(RangeObserver, abc.ABC):
    """A range observer that decides from a norm of the data, combined over batches.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        over: What is made of the norms of several batches.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Note:
        `over=MeanOfBatches()` obeys every law of `q_core.testing.check_observer`. The others depend on how data are cut
        into batches by their very meaning, and waive the law `split`.
    """

    power: ClassVar[int]
    where = "the observer"  # for messages; `prepare` puts the path of the slot here

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        over: Over = MeanOfBatches(),
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, grid=grid, rounding=rounding)
        self.collected = over.collector(math.prod(shape), self.power)
        self.signs: Tensor
        self.register_buffer("signs", torch.zeros(2, dtype=torch.int64))  # negative elements, all elements

    def update(
        self, rows: Float[Tensor, "tiles elements"], low: Float[Tensor, "tiles 1"], high: Float[Tensor, "tiles 1"]
    ) -> None:
        """Add up the powers of the magnitudes, and count signs."""
        norm = torch.linalg.vector_norm(rows, self.power, dim=1, keepdim=True, dtype=torch.float64)
        self.collected.add(norm**self.power, rows.shape[1])
        self.signs[0] += (rows < 0).sum()
        self.signs[1] += rows.numel()

    def merge(self) -> None:
        """Combine the batches of all ranks."""
        super().merge()
        self.collected.merge()
        dist.all_reduce(self.signs, dist.ReduceOp.SUM)

    def grid(self) -> Grid:
        """Build the grid over the proposed range.

        Raises:
            StateError: Nothing was seen.
            DataError: A NaN or an infinity was seen.
            RangeError: All data are negative and the codes are not.
        """
        self._require_data()
        negative, elements = self.signs.tolist()
        warn_of_clipping(negative, elements, self.spec, self.where)
        return super().grid()


@final
class LsqObserver(NormObserver):
    r"""The start of LSQ: a step of $2 \langle |x| \rangle / \sqrt{Q_p}$, with $Q_p$ the largest code.

    With 1 signed bit, whose largest code is 0, the smallest code takes its place.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        over: What is made of several batches; the paper takes the first alone.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Source:
        Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2.1. The released code of nuLSQ takes `LargestBatch`, its
        supplement speaks of the mean.
    """

    power = 1

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the ends of a grid with that step."""
        step = 2 * self.collected.norm() / math.sqrt(self.spec.qmax or -self.spec.qmin)
        return self.spec.qmin * step, self.spec.qmax * step


@final
class NormalizedMSEObserver(NormObserver):
    r"""The equal steps with the least squared error if the data were normal: root mean square times a constant.

    The constant is that of the codes of this grid, which have a level at zero, see `q_nulsq.normal.uniform_step`. For
    codes without a negative one, the data are taken for the output of a rectified linear unit: half of them are zero,
    and the standard deviation before it is $\sqrt{2 \langle x^2 \rangle}$.

    Args:
        spec: The codes of the grid.
        shape: Shape of the scale.
        over: What is made of several batches.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Source:
        Pham et al. 2021 (UniQ), IEEE Access 9, for the rule. Its constants for signed codes are those of a grid without
        a zero, and are not used here: 0.99569, 0.58602, 0.33520 for 2 to 4 bits instead of 1.04839, 0.60182, 0.33861.
    """

    power = 2

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the ends of a grid with that step."""
        step = _deviation(self.spec, self.collected.norm()) * uniform_step(-self.spec.qmin, self.spec.qmax)
        return self.spec.qmin * step, self.spec.qmax * step


@final
class MidRiseMSEObserver(NormObserver):
    r"""The equal steps with the least squared error on normal data, for a grid without a level at zero.

    The range goes from the lowest to the highest level of such a grid, as `q_nulsq.peers.uniq.UniqGrid` is.

    Args:
        spec: The codes of the grid, evenly many.
        shape: Shape of the scale.
        over: What is made of several batches.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Source:
        Pham et al. 2021 (UniQ), IEEE Access 9, initialisation; the constants are computed by
        `q_nulsq.normal.mid_rise_step`, and are the published ones.
    """

    power = 2

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the outermost levels."""
        steps = self.spec.qmax - self.spec.qmin
        end = self.collected.norm() * (mid_rise_step(steps + 1) * steps / 2)
        return -end, end


@final
class ThreeSigmaObserver(RangeObserver):
    r"""The start of LSQ+ for weights: a step of $\max(|\mu - 3\sigma|, |\mu + 3\sigma|) / 2^{b-1}$.

    Args:
        spec: The codes of the grid, signed.
        shape: Shape of the scale.
        grid: Builds the grid from `(spec, low, high)`.
        rounding: Makes the rounding that goes with the grid.

    Source:
        Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, section on initialisation.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        grid: GridFactory = UniformGrid.from_range,
        rounding: Callable[[], Rounding] = NearestEven,
    ) -> None:
        super().__init__(spec, shape, grid=grid, rounding=rounding)
        self.sum, self.squares = (ExactSum(math.prod(shape)) for _ in range(2))
        self.elements: Tensor
        self.register_buffer("elements", torch.zeros((), dtype=torch.int64))

    def update(
        self, rows: Float[Tensor, "tiles elements"], low: Float[Tensor, "tiles 1"], high: Float[Tensor, "tiles 1"]
    ) -> None:
        """Add up the values and their squares."""
        self.sum.add(rows.sum(1, keepdim=True, dtype=torch.float64))
        self.squares.add(torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).square())
        self.elements += rows.shape[1]

    def merge(self) -> None:
        """Combine the sums of all ranks."""
        super().merge()
        for total in (self.sum.digits, self.squares.digits, self.elements):
            dist.all_reduce(total, dist.ReduceOp.SUM)

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the ends of a grid with that step."""
        mean = self.sum.total() / self.elements
        deviation = (self.squares.total() / self.elements - mean.square()).clamp(min=0).sqrt()
        step = (mean.abs() + 3 * deviation) / 2 ** (self.spec.bits - 1)  # the larger of the two magnitudes
        return self.spec.qmin * step, self.spec.qmax * step


@final
class NormalLloydMaxObserver(NormObserver):
    """Steps with the least squared error if the data were normal, every step its own.

    Args:
        spec: The codes of the grid.
        shape: Shape of one step.
        over: What is made of several batches.
        grid: Builds a `StepGrid` from `(spec, low, high)`, whose steps are then placed.
        rounding: Makes the rounding that goes with the grid.

    Source:
        Lloyd 1982 and Max 1960, with zero held as a level, see `q_nulsq.normal.lloyd_max_steps`.
    """

    power = 2

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        over: Over = MeanOfBatches(),
        grid: GridFactory = StepGrid.from_range,
        rounding: Callable[[], Rounding] = NearestTowardZero,
    ) -> None:
        super().__init__(spec, shape, over=over, grid=grid, rounding=rounding)

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the outermost levels."""
        steps = self._steps()
        below = -self.spec.qmin
        return -steps[:, :below].sum(1, keepdim=True), steps[:, below:].sum(1, keepdim=True)

    def grid(self) -> Grid:
        """Build the grid, and place its steps.

        Raises:
            StateError: Nothing was seen.
            DataError: A NaN or an infinity was seen.
            RangeError: All data are negative and the codes are not.
            SpecError: The factory does not make a `StepGrid`.
        """
        return _place(super().grid(), self._steps())

    def _steps(self) -> Tensor:
        norm = self.collected.norm()
        deviation = torch.where(norm > 0, _deviation(self.spec, norm), torch.ones_like(norm))
        sides = [lloyd_max_steps(levels) for levels in (-self.spec.qmin, self.spec.qmax) if levels]
        return deviation * torch.tensor(sum(sides, ()), dtype=norm.dtype, device=norm.device)


@final
class LloydMaxObserver(HistogramObserver):
    """Steps with the least squared error on the data seen, every step its own and zero held as a level.

    Lloyd's method on a histogram, from two starts: the steps of the normal distribution, and equal steps up to the
    largest magnitude. The better result is taken, on each side of zero by itself. A level lies within a bin of where
    the data would put it, so more than 4 bits want more bins. A step is at least 1/1000 of the mean step of its side.

    Args:
        spec: The codes of the grid.
        shape: Shape of one step.
        bins: Bins of the histogram, a power of two.
        grid: Builds a `StepGrid` from `(spec, low, high)`, whose steps are then placed.
        rounding: Makes the rounding that goes with the grid.

    Raises:
        RangeError: `bins` is not a power of two from 16.

    Source:
        Lloyd 1982, "Least squares quantization in PCM".
    """

    where = "the observer"  # for messages; `prepare` puts the path of the slot here

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...] = (1,),
        *,
        bins: int = 2048,
        grid: GridFactory = StepGrid.from_range,
        rounding: Callable[[], Rounding] = NearestTowardZero,
    ) -> None:
        super().__init__(spec, shape, bins=bins, grid=grid, rounding=rounding)

    def range(self) -> tuple[Float[Tensor, "tiles 1"], Float[Tensor, "tiles 1"]]:
        """Return the outermost levels."""
        return self._ends(self._steps())

    def grid(self) -> Grid:
        """Build the grid, and place its steps.

        Raises:
            StateError: Nothing was seen.
            DataError: A NaN or an infinity was seen.
            RangeError: All data are negative and the codes are not.
            SpecError: The factory does not make a `StepGrid`.
        """
        self._require_data()
        counts = self.histogram.counts
        warn_of_clipping(int(counts[:, : self.histogram.bins // 2].sum()), int(counts.sum()), self.spec, self.where)
        steps = self._steps()
        low, high = (end.reshape(self.shape).to(torch.float32) for end in self._ends(steps))
        return _place(self.make_grid(self.spec, low, high), steps)

    def _ends(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        below = -self.spec.qmin
        return -steps[:, :below].sum(1, keepdim=True), steps[:, below:].sum(1, keepdim=True)

    def _steps(self) -> Tensor:
        half = self.histogram.bins // 2
        counts, width = self.histogram.counts.to(torch.float64), self.histogram.width()
        magnitude = self.histogram.centers()[:, half:]
        mean_square = (counts * self.histogram.centers().square()).sum(1, keepdim=True) / counts.sum(1, keepdim=True)
        # What fits into one bin about zero is zero, as a histogram sees it.
        dead = (self.low == 0) & (self.high == 0)
        deviation = torch.where(dead, 1.0, _deviation(self.spec, mean_square.sqrt()))
        sides = []
        for levels, numbers, largest in (
            (-self.spec.qmin, counts[:, :half].flip(1), -self.low),
            (self.spec.qmax, counts[:, half:], self.high),
        ):
            if levels:
                # A side without data takes its range from the other one.
                largest = torch.where(largest > 0, largest, deviation * sum(lloyd_max_steps(levels)))
                sides.append(_lloyd(_Side(magnitude, numbers, largest + width), deviation, levels))
        return torch.cat(sides, 1)


class _Side:
    """The data on one side of zero: numbers of elements at magnitudes, and their running sums."""

    def __init__(self, magnitude: Tensor, numbers: Tensor, largest: Tensor) -> None:
        start = numbers.new_zeros(numbers.shape[0], 1)
        self.magnitude, self.largest = magnitude.contiguous(), largest
        self.mass = torch.cat([start, numbers.cumsum(1)], 1)
        self.moment = torch.cat([start, (numbers * magnitude).cumsum(1)], 1)

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mass, moment, and lower and upper edge of the cell of each level."""
        before = torch.cat([torch.zeros_like(levels[:, :1]), levels[:, :-1]], 1)
        lower = (before + levels) / 2
        upper = torch.cat([lower[:, 1:], torch.maximum(lower[:, -1:], self.largest)], 1)
        inner = torch.searchsorted(self.magnitude, lower)
        outer = torch.cat([inner[:, 1:], torch.full_like(inner[:, :1], self.magnitude.shape[1])], 1)
        mass, moment = (sums.gather(1, outer) - sums.gather(1, inner) for sums in (self.mass, self.moment))
        return mass, moment, lower, upper


def _lloyd(side: _Side, deviation: Tensor, levels: int) -> Tensor:
    """Return the steps of the best levels found, one row for each tile."""
    index = torch.arange(1, levels + 1, dtype=deviation.dtype, device=deviation.device)
    normal = torch.tensor(lloyd_max_steps(levels), dtype=deviation.dtype, device=deviation.device).cumsum(0)
    results = []
    for start in (deviation * normal, side.largest * index / levels):
        found = start
        for _ in range(_ROUNDS):
            mass, moment, lower, upper = side.cells(found)
            # A level without data moves to the middle of its cell, and so toward its neighbours that have some.
            moved = torch.where(mass > 0, moment / mass.clamp(min=1), (lower + upper) / 2)
            if torch.equal(moved, found):
                break
            found = moved
        mass, moment, _, _ = side.cells(found)
        results.append((found, (found * (found * mass - 2 * moment)).sum(1, keepdim=True)))
    (first, error), (second, other) = results
    steps = torch.where(error <= other, first, second).diff(dim=1, prepend=torch.zeros_like(deviation))
    return torch.maximum(steps, _FLOOR * steps.mean(1, keepdim=True))


def _deviation(spec: QuantSpec, root_mean_square: Tensor) -> Tensor:
    """Return the standard deviation of the normal distribution that the data are taken for."""
    return root_mean_square if spec.qmin < 0 else math.sqrt(2) * root_mean_square


def _place(grid: Grid, steps: Tensor) -> Grid:
    """Give a grid of steps the values of its steps, one row for each tile."""
    if not isinstance(grid, StepGrid):
        raise SpecError(
            f"a {type(grid).__name__} has no steps to place: give this observer a factory of StepGrid, or another "
            "observer"
        )
    with torch.no_grad():
        raw = grid.positivity.raw(steps.reshape(grid.steps.shape).to(grid.steps))
        grid.steps.copy_(raw)
    return grid
