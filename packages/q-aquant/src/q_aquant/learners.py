"""What learns in a unit.

A `Learner` says what is to be learned; for one unit it makes a `Learning`, which holds the parameters, follows the
schedule and knows what it leaves behind. While something learns, a temporary module sits where the permanent one will
be; `settled` shows the unit as it will be, for an honest look at it in the middle of learning.
"""

import abc
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from q_aquant.drop import Draws, RandomDrop
from q_aquant.roundings import (
    Anchored,
    FixedCodes,
    FixedRounding,
    Gradual,
    LearnedRounding,
    SoftWeight,
    annealed_beta,
    gradual_influence,
    rounding_penalty,
)
from q_core.errors import RangeError, StateError
from q_core.functional import broadcast_scale
from q_core.grid import UniformGrid
from q_core.layers import slots
from q_core.quantizer import Quantizer

_LEAST_SCALE = 1e-8
"""Scales are kept at least this large; QDrop, as released, clamps at the same order."""


@dataclasses.dataclass(frozen=True)
class Temporary:
    """A module that sits somewhere for the time of learning.

    Attributes:
        owner: The module that has it as a child.
        name: The name of the child.
        module: The temporary module.
        permanent: Makes what takes its place.
    """

    owner: nn.Module
    name: str
    module: nn.Module
    permanent: Callable[[], nn.Module]


@dataclasses.dataclass
class Learning:
    """What one learner does in one unit.

    Attributes:
        groups: Parameter groups of the optimizer; their learning rates are those of the start.
        temporaries: Modules that stand in for others meanwhile, outermost first.
        cosine: Whether the learning rate falls to zero along a half cosine, or stays.
    """

    groups: list[dict[str, Any]]
    temporaries: list[Temporary] = dataclasses.field(default_factory=list)
    cosine: bool = False

    def advance(self, progress: float) -> None:
        """Follow the schedule; `progress` is the fraction of the iterations that are over."""

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss, if anything is."""
        return None

    def keep_valid(self) -> None:
        """Put parameters back where they have a meaning, after a step of the optimizer."""


class Learner(abc.ABC):
    """Something that can be learned in a unit."""

    @abc.abstractmethod
    def begin(self, unit: nn.Module) -> Learning:
        """Put what learns into the unit, in place.

        What is there to learn depends on the unit: the list of parameters may be empty.
        """


def quantizers(unit: nn.Module) -> Iterator[tuple[nn.Module, str, Quantizer, Tensor | None]]:
    """List the quantizers in the slots of a unit.

    Yields:
        The owner of the slot, its name, the quantizer, and the parameter that it sees or None for an activation.
    """
    for module in unit.modules():
        for name, child, parameter in slots(module):
            if isinstance(child, Quantizer):
                yield module, name, child, parameter


@contextlib.contextmanager
def settled(temporaries: Sequence[Temporary]) -> Iterator[None]:
    """Show the unit as it will be, inside the block."""
    try:
        settle(temporaries)
        yield
    finally:
        for each in temporaries:
            setattr(each.owner, each.name, each.module)


def settle(temporaries: Sequence[Temporary]) -> None:
    """Put what was learned in the place of what learned it."""
    # The innermost first: what is around them puts back what it finds inside.
    for each in reversed(temporaries):
        setattr(each.owner, each.name, each.permanent())


@final
@dataclasses.dataclass(frozen=True)
class WeightRounding(Learner):
    """Learn for every weight whether it goes up or down, as AdaRound does.

    Where that was decided in an earlier stage, it goes on from half-way to the decision.

    Attributes:
        lr: Learning rate of Adam.
        penalty: Weight of the penalty on undecided weights, relative to the loss.
        beta: Exponent of the penalty at the start and at the end.
        warmup: Fraction of the iterations without a penalty.

    Source:
        Nagel et al. 2020 (AdaRound), arXiv:2004.10568, eq. 21 to 25; constants as BRECQ and QDrop release them.
    """

    lr: float = 1e-3
    penalty: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2

    def begin(self, unit: nn.Module) -> Learning:
        """Give every quantized weight a rounding that learns.

        Raises:
            StateError: The scales of the weights learned in an earlier stage, so that their codes stay.
        """
        roundings: list[LearnedRounding] = []
        temporaries = []
        for _, _, quantizer, weight in list(quantizers(unit)):
            if weight is None or not isinstance(quantizer.grid, UniformGrid):
                continue
            # Where the scale learns too, the rounding is inside what keeps the codes apart from it.
            anchored = isinstance(quantizer.rounding, Anchored)
            owner = quantizer.rounding if anchored else quantizer
            before = owner.rounding
            if isinstance(before, FixedCodes):
                raise StateError("the scales of weights have learned, and their codes stay: leave WeightRounding out")
            decided = before if isinstance(before, FixedRounding) else None
            rounding = LearnedRounding.of(_coordinate(weight, quantizer.grid), decided)
            setattr(owner, "rounding", rounding)  # noqa: B010 - mypy sees a module of any kind
            roundings.append(rounding)
            temporaries.append(Temporary(owner, "rounding", rounding, rounding.hardened))
        groups = [{"params": [rounding.logit for rounding in roundings], "lr": self.lr}] if roundings else []
        return _LearningWeights(groups, temporaries, roundings=roundings, part=self)


@dataclasses.dataclass
class _LearningWeights(Learning):
    roundings: list[LearnedRounding] = dataclasses.field(default_factory=list)
    part: WeightRounding = dataclasses.field(default_factory=WeightRounding)
    progress: float = 0.0

    def advance(self, progress: float) -> None:
        self.progress = progress

    def penalty(self) -> Tensor | None:
        if self.progress < self.part.warmup or not self.roundings:
            return None
        start, end = self.part.beta
        beta = annealed_beta(self.progress, start=start, end=end, warmup=self.part.warmup)
        return self.part.penalty * torch.stack([rounding_penalty(each.share(), beta) for each in self.roundings]).sum()


@final
@dataclasses.dataclass(frozen=True)
class WeightScales(Learner):
    r"""Learn the scales of weights while the codes stay, or learn apart from them.

    Which two levels a weight lies between is settled at the start: $\hat{w} = s\,(\lfloor w / s_0 \rfloor + h - z)$.
    Put it before `WeightRounding`, which then learns $h$; without it the codes are those the weights have.

    Attributes:
        lr: Learning rate of Adam at the start, relative to the mean scale of each weight; it falls to zero.

    Source:
        Jeon et al. 2023 (Genie), arXiv:2303.13109. There the rate is 1e-4 for all; relative to the scale is ours.
    """

    lr: float = 1e-3

    def begin(self, unit: nn.Module) -> Learning:
        """Give every quantized weight a scale that learns.

        Raises:
            StateError: The rounding of weights learns already.
        """
        temporaries: list[Temporary] = []
        scales: list[Tensor] = []
        for _, _, quantizer, weight in list(quantizers(unit)):
            if weight is None or not isinstance(quantizer.grid, UniformGrid):
                continue
            if isinstance(quantizer.rounding, LearnedRounding):
                raise StateError("the rounding of weights learns already: put WeightScales before WeightRounding")
            grid = quantizer.grid
            anchored = Anchored(quantizer.rounding, _coordinate(weight, grid))
            learnable = UniformGrid(grid.scale, grid.zero_point, qmin=grid.qmin, qmax=grid.qmax, learnable=True)
            temporaries.append(Temporary(quantizer, "grid", learnable, learnable.frozen))
            temporaries.append(Temporary(quantizer, "rounding", anchored, anchored.settled))
            quantizer.grid, quantizer.rounding = learnable, anchored
            scales.append(learnable.scale)
        groups: list[dict[str, Any]] = [{"params": [s], "lr": self.lr * float(s.detach().mean())} for s in scales]
        return _LearningScales(groups, temporaries, cosine=True, scales=scales)


@final
@dataclasses.dataclass(frozen=True)
class ActivationScales(Learner):
    """Learn the scales of activations, with a learning rate that falls to zero.

    Attributes:
        lr: Learning rate of Adam at the start.

    Source:
        Esser et al. 2020 (LSQ), arXiv:1902.08153; in reconstruction Wei et al. 2022 (QDrop), as released. The factor of
        LSQ on the gradient is left out: Adam does not see it.
    """

    lr: float = 4e-5

    def begin(self, unit: nn.Module) -> Learning:
        """Let the scales of activations learn, of all grids that were made learnable."""
        grids = {
            id(quantizer.grid): quantizer.grid
            for _, _, quantizer, parameter in quantizers(unit)
            if parameter is None and isinstance(quantizer.grid, UniformGrid)
        }
        scales = [grid.scale.requires_grad_() for grid in grids.values() if isinstance(grid.scale, nn.Parameter)]
        groups = [{"params": scales, "lr": self.lr}] if scales else []
        return _LearningScales(groups, cosine=True, scales=scales)


@dataclasses.dataclass
class _LearningScales(Learning):
    scales: list[Tensor] = dataclasses.field(default_factory=list)

    def keep_valid(self) -> None:
        with torch.no_grad():
            for scale in self.scales:
                scale.abs_().clamp_(min=_LEAST_SCALE)


@final
@dataclasses.dataclass(frozen=True)
class Borders(Learner):
    """Learn the rounding borders of activations.

    The layers have borders already (see `q_aquant.forms`); while they learn, rounding enters by degrees.

    Attributes:
        lr: Learning rate of Adam.
        warmup: Fraction of the iterations in which activations are not rounded; rounding then enters by degrees. None
            rounds from the start, for borders that have learned before.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, appendix B.
    """

    lr: float = 1e-3
    warmup: float | None = 0.2

    def begin(self, unit: nn.Module) -> Learning:
        """Let every border in the unit learn."""
        found = []
        for _, _, quantizer, parameter in quantizers(unit):
            learns = any(True for _ in quantizer.rounding.parameters())
            if parameter is None and learns and not isinstance(quantizer.rounding, LearnedRounding):
                found.append(quantizer)
        temporaries, parameters = [], []
        for quantizer in found:
            border = quantizer.rounding
            border.requires_grad_(True)
            parameters += list(border.parameters())
            if self.warmup is None:
                continue
            quantizer.rounding = gradual = Gradual(border)
            temporaries.append(Temporary(quantizer, "rounding", gradual, partial(_itself, border)))
        groups = [{"params": parameters, "lr": self.lr}] if parameters else []
        return _LearningBorders(groups, temporaries, warmup=self.warmup or 0.0)


@dataclasses.dataclass
class _LearningBorders(Learning):
    warmup: float = 0.2

    def advance(self, progress: float) -> None:
        for each in self.temporaries:
            if isinstance(each.module, Gradual):
                each.module.set_influence(gradual_influence(progress, warmup=self.warmup))


def drop_inside(unit: nn.Module, probability: float, draws: Draws) -> list[Temporary]:
    """Let every activation quantizer of the unit quantize each element with a probability only.

    Args:
        unit: Changed in place.
        probability: Of an element to be quantized, in (0, 1]. 1 leaves the unit alone.
        draws: Where the masks come from.

    Raises:
        RangeError: A probability outside (0, 1].

    Source:
        Wei et al. 2022 (QDrop), arXiv:2203.05740, as released: 0.5.
    """
    if not 0 < probability <= 1:
        raise RangeError(f"probability={probability}: it must be above 0 and at most 1")
    temporaries = []
    for owner, name, quantizer, parameter in list(quantizers(unit)) if probability < 1 else []:
        if parameter is None:
            drop = RandomDrop(quantizer, probability, draws)
            setattr(owner, name, drop)
            temporaries.append(Temporary(owner, name, drop, partial(_itself, quantizer)))
    return temporaries


def soft_weights(unit: nn.Module) -> list[Temporary]:
    """Find once what does not change about the weights of the unit of which nothing but the rounding learns.

    Args:
        unit: Changed in place, after the learners have begun.
    """
    temporaries = []
    for owner, name, quantizer, weight in list(quantizers(unit)):
        grid, rounding = quantizer.grid, quantizer.rounding
        learns = isinstance(rounding, LearnedRounding) and not any(p.requires_grad for p in grid.parameters())
        if weight is None or not learns:
            continue
        down = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        with torch.no_grad():
            lower, upper = (grid.fake_quantize(weight, FixedRounding(up)) for up in (down, ~down))
        soft = SoftWeight(quantizer, lower, upper)
        setattr(owner, name, soft)
        temporaries.append(Temporary(owner, name, soft, partial(_itself, quantizer)))
    return temporaries


def _itself(module: nn.Module) -> nn.Module:
    return module


def falling(progress: float) -> float:
    """Return the factor of a learning rate that falls to zero along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _coordinate(weight: Tensor, grid: UniformGrid) -> Tensor:
    """Return the code coordinate that the rounding will see."""
    with torch.no_grad():
        shape = tuple(weight.shape)
        wide = weight.to(torch.promote_types(weight.dtype, grid.scale.dtype))
        zero = 0 if grid.zero_point is None else broadcast_scale(grid.zero_point, shape)
        coordinate: Tensor = wide / broadcast_scale(grid.scale, shape)
        low, high = (torch.as_tensor(end - zero).to(coordinate) for end in (grid.qmin, grid.qmax))
        return torch.minimum(torch.maximum(coordinate, low), high)
