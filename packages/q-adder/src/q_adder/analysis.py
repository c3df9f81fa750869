r"""What the tensors of an adder layer look like before and after redistribution.

Histograms and used codes of one layer's weight and input under separate ranges, under one shared range, and after the
lossless clamp; and the range that each order statistic would keep.
"""

import dataclasses
from collections.abc import Iterable
from fractions import Fraction
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from q_adder.ranges import quantile_index, released_quantile_index
from q_core.errors import DataError, RangeError


@final
@dataclasses.dataclass(frozen=True)
class TensorUse:
    """The values of one tensor, and the codes of a uniform grid that they use.

    Attributes:
        counts: Values in each bin.
        edges: Edges of the bins, float64, one more than the bins.
        low: Lower end of the range of the grid.
        high: Upper end of the range of the grid.
        qmin: Smallest code.
        codes: Values that take each code, from the smallest code up.
        clamped: Fraction of the values outside the range, 0-1; they take an outermost code.
    """

    counts: Int64[Tensor, " bins"]
    edges: Float[Tensor, " edges"]
    low: float
    high: float
    qmin: int
    codes: Int64[Tensor, " codes"]
    clamped: float

    @property
    def occupied(self) -> int:
        """Codes that at least one value takes."""
        return int((self.codes > 0).sum())

    @property
    def unused(self) -> float:
        """Fraction of the codes that no value takes, 0-1."""
        return 1 - self.occupied / len(self.codes)


@final
@dataclasses.dataclass(frozen=True)
class Stage:
    """Weight and input of one layer under one choice of ranges.

    Attributes:
        weight: The kernels.
        input: The activations that enter the layer.
    """

    weight: TensorUse
    input: TensorUse


@final
@dataclasses.dataclass(frozen=True)
class RedistributionHistograms:
    """One layer before and after redistribution, as in figure 1 of the paper.

    Attributes:
        separate: Each tensor with its own range. What a convolution could use, and an adder layer cannot.
        wide: One range for both that holds every value, symmetric: codes are wasted on the narrower tensor.
        narrow: The range of the activations for both, without a bias: weights outside are clamped, which changes
            outputs.
        redistributed: The same range and codes, after weights and activations were moved into the range. What was cut
            off the weights is in `bias`, so that it is not lost.
        bias: What the lossless clamp adds to each output channel, float64; never positive.
    """

    separate: Stage
    wide: Stage
    narrow: Stage
    redistributed: Stage
    bias: Float[Tensor, " outputs"]


def redistribution_histograms(
    weight: Float[Tensor, "outputs *taps"],
    inputs: Float[Tensor, "*shape"],
    *,
    low: float,
    high: float,
    bits: int = 4,
    bins: int = 64,
) -> RedistributionHistograms:
    r"""Histogram one layer before and after redistribution.

    The grid on $[l, h]$ has the scale $\Delta = (h - l) / (2^b - 1)$ and the codes $\lfloor l/\Delta \rceil$ to
    $\lfloor l/\Delta \rceil + 2^b - 1$, ties to even, so that zero is a level: 0 to 15 on $[0, r]$, and -8 to 7 on
    $[-r, r]$ with $b = 4$, as in the paper. All histograms of a stage have the same edges.

    Args:
        weight: Kernels of one layer, output channels first.
        inputs: Activations that enter it, of any shape.
        low: Lower end of the range after redistribution: 0 behind a ReLU, `-high` for a symmetric range.
        high: Upper end, such as a range of `quantile_sweep`.
        bits: Width of the codes, 1 to 8.
        bins: Bins of each histogram.

    Returns:
        Counts and codes of weight and input in each stage.

    Raises:
        RangeError: `low` not below `high`, `bits` outside 1 to 8, or no bins.
        DataError: No values, or a NaN or an infinity among them.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, section A.6 and figure 1; the interval is ours.
    """
    if not float("-inf") < low < high < float("inf"):
        raise RangeError(f"low={low}, high={high}: the range must be finite, with low below high")
    if not 1 <= bits <= 8:
        raise RangeError(f"bits={bits}: supported are 1 to 8")
    if bins < 1:
        raise RangeError(f"bins={bins}: at least 1 is needed")
    # float64 on the CPU: bins and codes then do not depend on the dtype and device of a value.
    w, x = _finite(weight, "weight"), _finite(inputs, "inputs")
    reach = float(torch.stack([w.abs().max(), x.abs().max()]).max())
    extremes = torch.stack([w.min(), w.max(), x.min(), x.max(), w.new_tensor(low), w.new_tensor(high)])
    edges = torch.linspace(float(extremes.min()), float(extremes.max()), bins + 1, dtype=torch.float64)

    def use(values: Tensor, ends: tuple[float, float], limits: Tensor) -> TensorUse:
        qmin, codes = _codes(values, *ends, bits)
        counts = torch.histogram(values.clamp(limits[0], limits[-1]), limits).hist.to(torch.int64)
        outside = (values < ends[0]) | (values > ends[1])
        return TensorUse(counts, limits, *ends, qmin, codes, float(outside.to(torch.float64).mean()))

    def stage(ends: tuple[float, float], limits: Tensor) -> Stage:
        return Stage(use(w, ends, limits), use(x, ends, limits))

    own = [(float(values.min()), float(values.max())) for values in (w, x)]
    excess = (w - w.clamp(low, high)).abs().reshape(weight.shape[0], -1)
    return RedistributionHistograms(
        separate=Stage(use(w, own[0], edges), use(x, own[1], edges)),
        wide=stage((-reach, reach), edges),
        narrow=stage((low, high), edges),
        redistributed=stage((low, high), torch.linspace(low, high, bins + 1, dtype=torch.float64)),
        bias=-excess.sum(1),
    )


def _codes(values: Tensor, low: float, high: float, bits: int) -> tuple[int, Tensor]:
    """Return the smallest code of the grid on [low, high], and how many values take each of its codes."""
    last = 2**bits - 1
    if not low < high:  # a tensor of one value, in its own range
        codes = torch.zeros(last + 1, dtype=torch.int64)
        codes[0] = values.numel()
        return 0, codes
    # Exact, and below exact for values and ends of float32, so that -7.5 is a tie on [-r, r].
    qmin = round(Fraction(low) * last / (Fraction(high) - Fraction(low)))
    coordinate = values.clamp(low, high) * last / (high - low)
    shifted = coordinate.round().clamp(qmin, qmin + last) - qmin
    return qmin, torch.bincount(shifted.to(torch.int64), minlength=last + 1)


def _finite(values: Tensor, name: str) -> Tensor:
    flat = values.detach().to("cpu", torch.float64).flatten()
    if not flat.numel():
        raise DataError(f"{name} of shape {tuple(values.shape)} holds no values: give at least one")
    if not bool(flat.isfinite().all()):
        bad = int((~flat.isfinite()).sum())
        raise DataError(f"{bad} of {flat.numel()} {name} are NaN or infinite: clean the data")
    return flat


@final
@dataclasses.dataclass(frozen=True)
class Quantile:
    """The range that one `alpha` keeps of a set of values.

    Attributes:
        alpha: Fraction of the magnitudes to keep, 0-1.
        range: The order statistic of the paper.
        clipped: Fraction of the magnitudes above it, 0-1.
        released_range: The order statistic of the released code.
        released_clipped: Fraction of the magnitudes above that, 0-1.
    """

    alpha: float
    range: float
    clipped: float
    released_range: float
    released_clipped: float


def quantile_sweep(values: Float[Tensor, "*shape"], alphas: Iterable[float]) -> tuple[Quantile, ...]:
    """Find the range that each `alpha` keeps, with one sort for all.

    Args:
        values: Activations, of any shape.
        alphas: Fractions of the magnitudes to keep, each above 0 and at most 1.

    Returns:
        One entry per `alpha`, in the order given.

    Raises:
        RangeError: An `alpha` outside (0, 1].
        DataError: No values, or a NaN or an infinity among them.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, section A.3 and table 3.
    """
    ascending = _finite(values, "values").abs().sort().values
    count = ascending.numel()

    def cut(index: int) -> tuple[float, float]:
        value = ascending[index]
        kept = int(torch.searchsorted(ascending, value, right=True))
        return float(value), (count - kept) / count

    return tuple(
        Quantile(alpha, *cut(quantile_index(count, alpha)), *cut(released_quantile_index(count, alpha)))
        for alpha in alphas
    )
