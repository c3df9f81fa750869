r"""From a trained network of b+1 bits to the start of one of b bits.

Two neighbouring steps become one, so every second level stays where training has put it. On a side of zero with an odd
number of steps one is left over at the top, and a policy says what becomes of it: `DropTop`, `FoldTop` or `RescaleTop`.
A uniform grid keeps its range: its scale is multiplied by $(2^{b+1} - 1)/(2^b - 1)$.
"""

import abc
import copy
import dataclasses
import functools
import math
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import layers
from q_core.errors import MatchError, SpecError
from q_core.grid import Grid, UniformGrid
from q_core.quantizer import Quantizer
from q_nulsq.grid import StepGrid
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.peers.pact import PactGrid

_Grid = TypeVar("_Grid", bound=Grid)


class TopStep(abc.ABC):
    """What becomes of the outermost of an odd number of steps."""

    def merge(self, steps: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Add up pairs of neighbouring steps, from zero outward.

        Args:
            steps: The steps on one side of zero, that next to zero first.

        Returns:
            Half as many steps, rounded down; none from a single one, whatever the policy.
        """
        half = steps.shape[-1] // 2
        pairs = steps[..., 0 : 2 * half : 2] + steps[..., 1 : 2 * half : 2]
        return self.place(pairs, steps[..., 2 * half :]) if half and steps.shape[-1] % 2 else pairs

    @abc.abstractmethod
    def place(self, pairs: Float[Tensor, "... m"], top: Float[Tensor, "... 1"]) -> Float[Tensor, "... m"]:
        """Put what is left over into the pairs, or not."""


@final
@dataclasses.dataclass(frozen=True)
class DropTop(TopStep):
    """Forget it: all levels stay in place, and the range shrinks by one step.

    Source:
        The released code of nuLSQ of 2023; the supplement, section D-III, does not say.
    """

    def place(self, pairs: Float[Tensor, "... m"], top: Float[Tensor, "... 1"]) -> Float[Tensor, "... m"]:
        """Return the pairs."""
        return pairs


@final
@dataclasses.dataclass(frozen=True)
class FoldTop(TopStep):
    """Add it to the last pair: the range stays and the highest level but one has a wide cell above it."""

    def place(self, pairs: Float[Tensor, "... m"], top: Float[Tensor, "... 1"]) -> Float[Tensor, "... m"]:
        """Return the pairs, of which the last is a triple."""
        return torch.cat([pairs[..., :-1], pairs[..., -1:] + top], -1)


@final
@dataclasses.dataclass(frozen=True)
class RescaleTop(TopStep):
    """Stretch all pairs alike until they cover the range; equal steps stay equal, as with a uniform grid."""

    def place(self, pairs: Float[Tensor, "... m"], top: Float[Tensor, "... 1"]) -> Float[Tensor, "... m"]:
        """Return the pairs, stretched."""
        covered = pairs.sum(-1, keepdim=True)
        return pairs * ((covered + top) / covered)


@functools.singledispatch
def merged(grid: Grid, top: TopStep) -> Grid:
    """Return the grid of one bit less that a grid of b+1 bits is the start for. The grid given is not changed.

    Register a grid of your own with `merged.register`.

    Args:
        grid: A grid of 2 bits or more.
        top: What becomes of an odd top step, where the grid has steps.

    Raises:
        SpecError: The type of the grid has no such rule, or it has 1 bit.
    """
    raise SpecError(f"a {type(grid).__name__} has no rule for one bit less: prepare() the float model at those bits")


@merged.register
def _steps(grid: StepGrid, top: TopStep) -> StepGrid:
    _codes(grid)
    negative, positive = (top.merge(side) for side in grid.sides())
    new = StepGrid(
        negative, positive, positivity=copy.deepcopy(grid.positivity), learnable=isinstance(grid.steps, nn.Parameter)
    )
    return _scaled(new, grid)


@merged.register
def _uniform(grid: UniformGrid, top: TopStep) -> UniformGrid:
    (qmin, qmax), scale, zero = _codes(grid), grid.scale.detach() * _stretch(grid), grid.zero_point
    if zero is not None:
        zero = (qmin + torch.round((zero - grid.qmin) / _stretch(grid))).clamp(qmin, qmax)
    return _scaled(UniformGrid(scale, zero, qmin=qmin, qmax=qmax, learnable=grid.scale.requires_grad), grid)


@merged.register
def _clipped(grid: PactGrid, top: TopStep) -> PactGrid:
    _, qmax = _codes(grid)
    positivity, learnable = copy.deepcopy(grid.positivity), isinstance(grid.alpha, nn.Parameter)
    alpha = positivity.steps(grid.alpha.detach())
    return _scaled(PactGrid(alpha, qmax=qmax, positivity=positivity, learnable=learnable), grid)


@merged.register
def _shifted(grid: LsqPlusGrid, top: TopStep) -> LsqPlusGrid:
    qmin, qmax = _codes(grid)
    positivity, learnable = copy.deepcopy(grid.positivity), isinstance(grid.scale, nn.Parameter)
    scale = positivity.steps(grid.scale.detach())
    low, wide = grid.offset.detach() + scale * grid.qmin, scale * _stretch(grid)
    new = LsqPlusGrid(wide, low - wide * qmin, qmin=qmin, qmax=qmax, positivity=positivity, learnable=learnable)
    return _scaled(new, grid)


def lower_bits(model: nn.Module, bits: int, *, activation: TopStep | None, weight: TopStep | None) -> nn.Module:
    """Return a copy of a quantized model in which quantizers of `bits` + 1 bits have become such of `bits`.

    Quantizers with other bits, as in the first and the last layer, are copied as they are.

    Args:
        model: A model with quantizers in its slots. Not changed.
        bits: Bits of the new quantizers.
        activation: What becomes of the top step of activations; None leaves their quantizers alone.
        weight: The same for weights. nuLSQ published the merge for activations only.

    Returns:
        A new model that shares nothing with the old one, in its mode.

    Raises:
        MatchError: There is nothing to merge.
        SpecError: A grid has no rule for one bit less; the note names its slot.
    """
    twin = copy.deepcopy(model)
    made: dict[int, Quantizer] = {}
    found: set[int] = set()
    for path, parent in list(twin.named_modules()):
        for name, child, parameter in layers.slots(parent):
            top = activation if parameter is None else weight
            if not isinstance(child, Quantizer) or top is None:
                continue
            found.add(child.grid.bits)
            if child.grid.bits == bits + 1:
                if id(child) not in made:  # tied weights have one quantizer
                    try:
                        made[id(child)] = _merged_quantizer(child, top)
                    except SpecError as error:
                        error.add_note(f"while merging the levels of {path}.{name}")
                        raise
                parent._modules[name] = made[id(child)]
    if not made:
        has = f"those to merge have {sorted(found)} bits" if found else "there is no quantizer to merge"
        raise MatchError(f"nothing with {bits + 1} bits to be merged to {bits}: {has}")
    return twin


def _merged_quantizer(old: Quantizer, top: TopStep) -> Quantizer:
    return Quantizer(merged(old.grid, top), old.rounding, old.transform).train(old.training)


def _codes(grid: Grid) -> tuple[int, int]:
    """Return the codes of one bit less."""
    bits = grid.bits - 1
    if not bits or grid.qmax - grid.qmin + 1 != 2 ** (bits + 1):
        raise SpecError(
            f"codes {grid.qmin} to {grid.qmax} cannot be halved: a grid that is to lose a bit has 4, 8, ... 256 codes"
        )
    qmin = -((-grid.qmin) // 2)
    return qmin, qmin + 2**bits - 1


def _stretch(grid: Grid) -> float:
    steps = grid.qmax - grid.qmin
    return steps / (steps // 2)


def _scaled(new: _Grid, old: Grid) -> _Grid:
    """Keep the rule by which the gradient was scaled, which knows the largest code."""
    scale = float(getattr(old, "gradient_scale", 1.0))
    if scale != 1.0:
        new.gradient_scale = scale * math.sqrt((old.qmax or -old.qmin) / (new.qmax or -new.qmin))  # type: ignore[assignment]
    return new
