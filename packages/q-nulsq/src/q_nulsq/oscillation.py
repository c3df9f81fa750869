r"""Weights that jump between two levels: a penalty against it, a measure of it, and a stop to it.

With straight-through gradients a weight that would best lie between two levels is pushed over the threshold, back, and
over it again, for as long as it trains. `oscillation_damping` is a term of the loss that draws weights to the middle of
their cells. `OscillationTracker` counts how often each weight turns round, and can hold those that do so too often at
the level where they are more of the time.

Source: Nagel et al. 2022, "Overcoming oscillations in quantization-aware training", arXiv:2203.11086, sections on
oscillation dampening and on iterative weight freezing.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from q_core import functional
from q_core.errors import MatchError, RangeError, SpecError, StateError
from q_core.layers import SLOT_SUFFIX, slots
from q_core.quantizer import Quantizer


def weight_damping(weight: Float[Tensor, "*shape"], quantizer: Quantizer) -> Float[Tensor, ""]:
    r"""Return $\sum (\mathrm{clip}(w) - \mathrm{sg}[Q(w)])^2$ of one weight, with the clip to the range of the levels.

    Args:
        weight: A weight.
        quantizer: That of the weight. Where it transforms the weight first, the sum is of what it rounds.

    Returns:
        A scalar, in the squared units of the weight, in float32 or wider.

    Gradient:
        To the weight: `2 (w - Q(w))` inside the closed range, 0 outside. To the grid: none.

    Source:
        Nagel et al. 2022, arXiv:2203.11086, section on oscillation dampening.
    """
    x = weight if quantizer.transform is None else quantizer.transform(weight)
    grid = quantizer.grid
    with torch.no_grad():
        level = functional.to_tiles(grid.fake_quantize(x, quantizer.rounding), grid.tile_shape)
        table = grid.levels().reshape(level.shape[0], -1).to(level.dtype)
    rows = functional.to_tiles(x, grid.tile_shape).to(level.dtype)
    return (functional.closed_clamp(rows, table[:, :1], table[:, -1:]) - level).square().sum()


def oscillation_damping(model: nn.Module) -> Float[Tensor, ""]:
    """Return the sum of `weight_damping` over all weights with a quantizer; multiply it, and add it to the loss.

    The paper lets the factor grow over the training along a cosine, from 0.

    Args:
        model: A model whose observers have become quantizers.

    Raises:
        MatchError: No weight of the model has a quantizer.

    Source:
        Nagel et al. 2022, arXiv:2203.11086, section on oscillation dampening.
    """
    parts = [weight_damping(slot.weight, slot.quantizer) for slot in _weights(model)]
    # Layers may lie on several devices; the sum lies where the first one does.
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@final
class OscillationTracker:
    r"""Measures how often weights turn round, after each step of the optimizer, and can freeze those that do.

    A weight *turns round* in a step that changes its code in the direction opposite to that of the change before. With
    $o_t$ whether it did, the frequency is $f_t = m\, o_t + (1 - m)\, f_{t-1}$. A weight whose frequency exceeds
    `threshold` is frozen, at the code that is nearest to the moving average of its codes: each step puts it back to the
    level of that code, wherever the levels have moved. Weights are written in place.

    Args:
        model: A model whose observers have become quantizers. Its weights are tracked from their codes at this time.
        momentum: $m$, in (0, 1]: 0.01 looks back about 100 steps.
        threshold: Frequency beyond which a weight is frozen, in turns a step. None: none is frozen, and those that
            were are let go.

    Attributes:
        threshold: As given; assign to it to let it fall as the training goes on.

    Raises:
        MatchError: No weight of the model has a quantizer.
        RangeError: `momentum` outside (0, 1].
        SpecError: A weight to be frozen is transformed before it is quantized.

    Source:
        Nagel et al. 2022, arXiv:2203.11086, section on iterative weight freezing, algorithm 1.
    """

    def __init__(self, model: nn.Module, *, momentum: float = 0.01, threshold: float | None = None) -> None:
        if not 0 < momentum <= 1:
            raise RangeError(f"momentum={momentum}: it must be above 0 and at most 1")
        self.momentum, self.threshold = momentum, threshold
        self._records = {slot.path: _Record.of(slot) for slot in _weights(model)}
        if threshold is not None:
            for record in self._records.values():
                record.check()

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Call `step` after each step of the optimizer, until the handle is removed."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """Look at the codes, and put frozen weights back. Does not wait for the device."""
        for record in self._records.values():
            record.observe(self.momentum)
            if self.threshold is not None:
                record.freeze(self.threshold)

    def frequencies(self) -> dict[str, Float[Tensor, "..."]]:
        """Return, by the path of each weight, how often its elements turn round, in turns a step."""
        return {path: record.frequency.clone() for path, record in self._records.items()}

    def frozen(self) -> dict[str, Tensor]:
        """Return, by the path of each weight, which of its elements are frozen."""
        return {path: record.frozen.clone() for path, record in self._records.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that a resumed training must know, by the path of each weight."""
        return {path: record.state() for path, record in self._records.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            StateError: It is the state of another model.
        """
        if set(state) != set(self._records):
            differing = sorted(set(state) ^ set(self._records))
            raise StateError(
                f"the state is of {len(state)} weights and the tracker of {len(self._records)}, and they differ in "
                f"{differing[0]}: make the tracker for the model that the state was saved with"
            )
        for path, record in self._records.items():
            mine, given = record.state(), state[path]
            if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in given.items()}:
                raise StateError(f"the state of {path} does not fit its shape {tuple(record.frequency.shape)}")
            for name, tensor in mine.items():
                tensor.copy_(given[name])


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight and its quantizer."""

    path: str
    weight: Tensor
    quantizer: Quantizer


@dataclasses.dataclass(frozen=True)
class _Record:
    """What is known of the elements of one weight; every tensor has its shape and is changed in place."""

    slot: _Weight
    codes: Tensor  # after the last step
    direction: Tensor  # of the last change, -1 or 1, and 0 before the first one
    frequency: Tensor
    average: Tensor  # of the codes
    frozen: Tensor

    @classmethod
    def of(cls, slot: _Weight) -> "_Record":
        codes = slot.quantizer.codes(slot.weight.detach()).to(torch.int16)  # 8 bits, signed or not
        average = codes.to(torch.float32)
        return cls(
            slot,
            codes,
            torch.zeros_like(codes, dtype=torch.int8),
            torch.zeros_like(average),
            average,
            torch.zeros_like(codes, dtype=torch.bool),
        )

    def state(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}

    def observe(self, momentum: float) -> None:
        found = self.slot.quantizer.codes(self.slot.weight.detach()).to(torch.int16)
        found = torch.where(self.frozen, self.codes, found)
        change = (found - self.codes).sign().to(torch.int8)
        turned = (change * self.direction) < 0
        self.frequency.lerp_(turned.to(self.frequency.dtype), momentum)
        self.average.lerp_(found.to(self.average.dtype), momentum)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        self.codes.copy_(found)

    def check(self) -> None:
        transform = self.slot.quantizer.transform
        if transform is not None:
            raise SpecError(
                f"{self.slot.path} is transformed by a {type(transform).__name__} before it is quantized, so a level "
                "is no value of the weight and it cannot be frozen: use threshold=None, or oscillation_damping"
            )

    def freeze(self, threshold: float) -> None:
        self.check()
        new = (self.frequency > threshold) & ~self.frozen
        self.codes.copy_(torch.where(new, self.average.round().to(torch.int16), self.codes))
        self.frozen.logical_or_(new)
        weight = self.slot.weight
        level = self.slot.quantizer.grid.dequantize(self.codes.to(self.average.dtype)).to(weight.dtype)
        weight.copy_(torch.where(self.frozen, level, weight))


def _weights(model: nn.Module) -> list[_Weight]:
    found = list({id(slot.weight): slot for slot in reversed(list(_slots(model)))}.values())[::-1]
    if not found:
        raise MatchError(
            f"no weight of this {type(model).__name__} has a quantizer: swap() and calibrate() the model first"
        )
    return found


def _slots(model: nn.Module) -> Iterator[_Weight]:
    for path, module in model.named_modules():
        for name, child, parameter in slots(module):
            if parameter is not None and isinstance(child, Quantizer):
                own = name.removesuffix(SLOT_SUFFIX)
                yield _Weight(f"{path}.{own}" if path else own, parameter, child)
