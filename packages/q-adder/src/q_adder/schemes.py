r"""How the levels of one adder layer are chosen: the parts of redistribution, and the schemes made of them.

Kernels of similar range form groups with a scale each (`cluster_kernels`), and a weight beyond the range of the inputs
is clamped to its end without any loss (`clamp_weights`). A `Scheme` puts them together for one layer.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from q_adder.quantized import TiedGrid, TiedSpec
from q_adder.ranges import LEAST_RANGE, InputRange
from q_core.errors import RangeError, SpecError


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Groups of kernels of similar range.

    Attributes:
        group_of: Group of each kernel, [outputs]; groups are numbered by rising range.
        ranges: Largest magnitude of a weight in each group, [groups].
    """

    group_of: Tensor
    ranges: Tensor


def cluster_kernels(statistic: Float[Tensor, " outputs"], groups: int, *, seed: int = 0) -> Clusters:
    """Group kernels by a statistic of each, with k-means.

    Args:
        statistic: What is clustered, the largest magnitude of the weights of each kernel.
        groups: Number of groups. Fewer come out where there are fewer distinct values.
        seed: Seed of the k-means++ starts.

    Raises:
        RangeError: No group, or more groups than kernels.
        SpecError: A number of groups that is not whole.

    Source:
        Nie et al. 2022; k-means of scikit-learn with its published defaults and ten starts.
    """
    if not isinstance(groups, int):
        raise SpecError(f"groups={groups!r}: it must be a whole number of groups of kernels")
    if not 1 <= groups <= len(statistic):
        raise RangeError(
            f"groups={groups} with {len(statistic)} kernels: there must be at least 1 and at most one each"
        )
    # Sorted, so that the starts, and with them the groups, do not depend on the order of the kernels.
    values, order = statistic.detach().double().cpu().sort()
    if groups == 1:
        return Clusters(torch.zeros(len(values), dtype=torch.int64), values[-1:].float())
    from sklearn.cluster import KMeans

    distinct = min(groups, len(torch.unique(values)))
    means = KMeans(distinct, n_init=10, random_state=seed).fit(values.reshape(-1, 1).numpy())
    # Groups on a line are intervals: the label changes where the next one, with a larger range, begins.
    labels = torch.from_numpy(means.labels_).to(torch.int64)
    begins = torch.cat([torch.zeros(1, dtype=torch.bool), labels[1:] != labels[:-1]])
    ends = torch.cat([begins[1:], torch.ones(1, dtype=torch.bool)])
    group_of = torch.empty_like(labels).scatter_(0, order, begins.cumsum(0))
    return Clusters(group_of, values[ends].float())


def clamp_weights(
    weight: Float[Tensor, "outputs *taps"],
    bias: Float[Tensor, " outputs"] | None,
    low: float | Float[Tensor, " outputs"],
    high: float | Float[Tensor, " outputs"],
) -> tuple[Float[Tensor, "outputs *taps"], Float[Tensor, " outputs"]]:
    r"""Clamp kernels to an interval, without changing the output for inputs in it.

    For $x \in [l, h]$ and $w > h$ it holds that $|x - w| = |x - h| + (w - h)$, and likewise below, so the clamp takes a
    constant from each distance, which the bias gives back.

    Args:
        weight: Kernels.
        bias: Bias of the layer; None is zero.
        low: Least input, for all kernels or for each; 0 after a rectifier.
        high: Largest input.

    Returns:
        New kernels and a new bias; the arguments are not changed.

    Raises:
        RangeError: An interval whose end lies below its start.

    Source:
        Nie et al. 2022, section 3.2, there for the interval from -r to r.
    """
    shape = (-1, *[1] * (weight.ndim - 1))
    ends = [torch.as_tensor(end, dtype=weight.dtype, device=weight.device).reshape(shape) for end in (low, high)]
    if bool((ends[0] > ends[1]).any()):
        raise RangeError(f"interval from {low} to {high}: its start must not lie beyond its end")
    clamped = weight.clamp(ends[0], ends[1])
    taken = (weight - clamped).abs().flatten(1).sum(1)
    return clamped, -taken if bias is None else bias - taken


@dataclasses.dataclass(frozen=True)
class Fit:
    """How one layer is quantized.

    Attributes:
        tied: The levels.
        weight: Weight of the quantized layer: the float layer's own where the clamp is lossless, else a new one.
        requested: Groups of kernels asked for.
    """

    tied: TiedGrid
    weight: Tensor
    requested: int = 1


class Scheme(abc.ABC):
    """Chooses the levels of a layer from its weight and the range of its inputs."""

    @abc.abstractmethod
    def fit(self, weight: Float[Tensor, "outputs *taps"], inputs: InputRange, bits: int) -> Fit:
        """Choose.

        Raises:
            RangeError: The scheme does not suit the inputs, or more groups than kernels.
        """

    def between(self, inputs: InputRange, bits: int) -> TiedGrid:
        """Choose the levels of the distances of two activations, where there are no kernels.

        Args:
            inputs: Of both operands.
            bits: Bits of a code.

        Raises:
            RangeError: The scheme does not suit the inputs.
            SpecError: The scheme is about kernels.
        """
        raise SpecError(
            f"{type(self).__name__} is about kernels, and the distances of two activations have none: use OneSided(), "
            "Symmetric() or Interval() there"
        )


def _from_zero(ranges: Tensor, group_of: Tensor, spec: TiedSpec) -> TiedGrid:
    """Levels from 0 to each range."""
    return TiedGrid(spec, ranges / spec.top, torch.zeros_like(ranges), group_of)


def _around_zero(ranges: Tensor, group_of: Tensor, spec: TiedSpec) -> TiedGrid:
    """Levels on both sides of zero; as there is an even number, there is one more below."""
    return TiedGrid(spec, 2 * ranges / spec.top, torch.full_like(ranges, (spec.top + 1) // 2), group_of)


def _within(low: float, high: float, group_of: Tensor, spec: TiedSpec) -> TiedGrid:
    """Levels between two ends, widened to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, LEAST_RANGE) / spec.top
    return TiedGrid(spec, _one(scale), _one(float(min(spec.top, round(-low / scale)))), group_of)


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


_NO_KERNELS = torch.zeros(0, dtype=torch.int64)


def _grouped(
    weight: Tensor, extent: Callable[[Tensor], Tensor], reach: float, groups: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cluster kernels by their range; each group covers its own range, but not more than the inputs have.

    Groups that end up with equal ranges are one. A group with nothing to cover takes the range of the inputs.

    Returns:
        Range of each group and group of each kernel.
    """
    clusters = cluster_kernels(extent(weight.detach().flatten(1)), groups, seed=seed)
    ranges = clusters.ranges.where(clusters.ranges > 0, reach if math.isfinite(reach) else 0.0)
    ranges = ranges.clamp(min=LEAST_RANGE, max=max(reach, LEAST_RANGE))
    distinct, index = torch.unique(ranges, return_inverse=True)
    return distinct, index[clusters.group_of]


def _covering(
    weight: Tensor, extent: Callable[[Tensor], Tensor], reach: float, groups: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Let one group cover the inputs, whatever its weights, and several as published, see `_grouped`.

    Returns:
        Range of each group and group of each kernel.
    """
    if groups == 1:
        return _one(max(reach, LEAST_RANGE)), _one_group(weight)
    return _grouped(weight, extent, reach, groups, seed)


@final
@dataclasses.dataclass(frozen=True)
class OneSided(Scheme):
    """For inputs that are never negative: kernels are clamped to where the inputs are, and both use unsigned codes.

    Weights at or below zero and weights beyond the range are represented without any error.

    Calibration refuses it where it sees a negative input. One that comes later is clamped to zero without a word, as
    any input beyond the range is clamped to its end.

    One group has the range of the inputs, also where weights span less: inputs beyond the weights still tell positions
    apart, and a clamp would lose what they say at any number of bits. Several groups each have the smaller of the
    ranges of their weights and of the inputs, as published; where a group spans much less than the inputs that costs
    more than its finer levels bring.

    Attributes:
        groups: Groups of kernels.
        seed: Seed of the grouping.

    Source:
        Derived here from Nie et al. 2022; the same idea underlies NN-AdderNet (DAC 2025).
    """

    groups: int = 1
    seed: int = 0

    def fit(self, weight: Float[Tensor, "outputs *taps"], inputs: InputRange, bits: int) -> Fit:
        """Choose levels from 0 to the range of the inputs."""
        _require_unsigned(inputs, type(self).__name__)
        reach = inputs.magnitude()
        ranges, group_of = _covering(weight, lambda rows: rows.amax(1), reach, self.groups, self.seed)
        return Fit(_from_zero(ranges, group_of, TiedSpec(bits)), weight, self.groups)

    def between(self, inputs: InputRange, bits: int) -> TiedGrid:
        """Choose levels from 0 to the range of both operands."""
        _require_unsigned(inputs, type(self).__name__)
        return _from_zero(_one(max(inputs.magnitude(), LEAST_RANGE)), _NO_KERNELS, TiedSpec(bits))


@final
@dataclasses.dataclass(frozen=True)
class Symmetric(Scheme):
    """For signed inputs: kernels and inputs are clamped to the same symmetric range.

    It is chosen as that of `OneSided` is.

    Attributes:
        groups: Groups of kernels.
        seed: Seed of the grouping.

    Source:
        Nie et al. 2022, figure 3.
    """

    groups: int = 1
    seed: int = 0

    def fit(self, weight: Float[Tensor, "outputs *taps"], inputs: InputRange, bits: int) -> Fit:
        """Choose levels on both sides of zero."""
        reach = inputs.magnitude()
        ranges, group_of = _covering(weight, lambda rows: rows.abs().amax(1), reach, self.groups, self.seed)
        return Fit(_around_zero(ranges, group_of, TiedSpec(bits)), weight, self.groups)

    def between(self, inputs: InputRange, bits: int) -> TiedGrid:
        """Choose levels on both sides of zero for both operands."""
        return _around_zero(_one(max(inputs.magnitude(), LEAST_RANGE)), _NO_KERNELS, TiedSpec(bits))


@final
@dataclasses.dataclass(frozen=True)
class Interval(Scheme):
    """For inputs in any interval: kernels are clamped to where the inputs are, and one zero point serves both."""

    def fit(self, weight: Float[Tensor, "outputs *taps"], inputs: InputRange, bits: int) -> Fit:
        """Choose levels between the ends of the inputs, widened to hold zero."""
        return Fit(_within(*inputs.interval(), _one_group(weight), TiedSpec(bits)), weight)

    def between(self, inputs: InputRange, bits: int) -> TiedGrid:
        """Choose levels between the ends of both operands, widened to hold zero."""
        return _within(*inputs.interval(), _NO_KERNELS, TiedSpec(bits))


@final
@dataclasses.dataclass(frozen=True)
class Published(Scheme):
    """The scheme of the paper as released: unsigned inputs, signed weights on every other level, four groups.

    Each group, also a single one, has the smaller of the ranges of its weights and of the inputs.

    A weight that is clamped to the negative end lies halfway between the two lowest codes. It gets the lowest, the even
    one. In float arithmetic in the released order, which clamps first, rounding errors decide that tie layer by layer.
    Either code has the same error for all inputs, a constant per channel that new batch norms or corrected means take
    away; without them accuracies below 8 bits depend on it, see the explanation of few bits in the documentation.

    Attributes:
        groups: Groups of kernels.
        seed: Seed of the grouping.
        clamp: Whether the range of a group stops at that of the inputs, with the lossless clamp, or is that of its
            weights.

    Source:
        Nie et al. 2022 and its released implementation, with the loop over groups completed.
    """

    groups: int = 4
    seed: int = 0
    clamp: bool = True

    def fit(self, weight: Float[Tensor, "outputs *taps"], inputs: InputRange, bits: int) -> Fit:
        """Choose levels from 0 to the smaller of the ranges of inputs and weights."""
        _require_unsigned(inputs, type(self).__name__)
        reach = inputs.magnitude() if self.clamp else math.inf
        ranges, group_of = _grouped(weight, lambda rows: rows.abs().amax(1), reach, self.groups, self.seed)
        return Fit(_from_zero(ranges, group_of, TiedSpec(bits, weight_step=2)), weight, self.groups)


@final
@dataclasses.dataclass(frozen=True)
class OneScale(Scheme):
    """The baseline: one symmetric scale for weights and inputs, no clamp without loss.

    Attributes:
        cover_weights: Whether the scale covers weights and inputs, or the inputs alone, cutting the weights.

    Source:
        Our reading of the shared scaling factor of Wang et al. 2021, arXiv:2101.10015, whose code is not public.
    """

    cover_weights: bool = True

    def fit(self, weight: Float[Tensor, "outputs *taps"], inputs: InputRange, bits: int) -> Fit:
        """Choose one symmetric range."""
        reach = inputs.magnitude()
        if self.cover_weights:
            reach = max(reach, float(weight.detach().abs().max()))
        tied = _around_zero(_one(max(reach, LEAST_RANGE)), _one_group(weight), TiedSpec(bits))
        low, high = tied.range()
        # Cut here, so that the layer finds nothing to make up for.
        return Fit(tied, weight.detach().clamp(float(low), float(high)))


def _one_group(weight: Tensor) -> Tensor:
    return torch.zeros(len(weight), dtype=torch.int64)


def _require_unsigned(inputs: InputRange, scheme: str) -> None:
    if inputs.low < 0:
        raise RangeError(
            f"{scheme} is for inputs that are never negative, and one of {inputs.low:.6g} was seen: use Symmetric() "
            "or Interval() for this layer"
        )
