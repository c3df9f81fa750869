"""From a float model to one that trains at few bits.

A method is two parts, one for weights and one for activations. What all methods share is done by `prepare`: the same
copy of the model, the same convention for the first and the last layer, the same calibration. The returned model trains
in any loop: `q_nulsq.optim` has the groups of the optimizer. `q_nulsq.recipes` has the published methods.
"""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from q_core import layers
from q_core.calibrate import CalibrationReport, calibrate, evaluation, feed
from q_core.errors import DataError, MatchError, SpecError, StateError
from q_core.grid import UniformGrid
from q_core.methods import FLOAT_BITS, Quantized
from q_core.observer import GridFactory, HistogramObserver, MinMaxObserver, Observer
from q_core.quantizer import Quantizer
from q_core.rounding import NearestEven, Rounding
from q_core.spec import Granularity, PerChannel, PerTensor, QuantSpec
from q_core.swap import Recipe, Rule, swap, swappable
from q_nulsq.calibration import (
    LloydMaxObserver,
    NormalizedMSEObserver,
    NormObserver,
    warn_of_clipping,
)
from q_nulsq.optim import Counts, GradientScale, Unscaled

Codes = Callable[[int, bool, Granularity], QuantSpec]
"""Which codes there are: `(bits, signed, granularity) -> spec`."""


def zero_coded(bits: int, signed: bool, granularity: Granularity) -> QuantSpec:
    """All codes, signed or from 0, with real zero as code 0."""
    kind = QuantSpec.signed if signed else QuantSpec.unsigned
    return kind(bits, granularity=granularity, symmetric=True)


def narrow(bits: int, signed: bool, granularity: Granularity) -> QuantSpec:
    """Like `zero_coded`, but signed codes are the same on both sides of zero."""
    if signed:
        return QuantSpec.signed(bits, granularity=granularity, narrow=True)
    return zero_coded(bits, signed, granularity)


def shifted(bits: int, signed: bool, granularity: Granularity) -> QuantSpec:
    """Codes from 0 and a zero point, which suit data of any sign."""
    return QuantSpec.unsigned(bits, granularity=granularity)


@dataclasses.dataclass(frozen=True)
class Part:
    """How weights, or activations, are quantized.

    Attributes:
        grid: Builds the grid over a range.
        observer: Makes what proposes the range.
        rounding: Makes the rounding.
        granularity: Which elements share parameters.
        codes: Which codes there are.
        transform: Makes what is done to a tensor before, from the bits.
        negative: What takes the place of this part for activations that have negative values, where the method is
            defined for others only. None: this part itself.
    """

    grid: GridFactory
    observer: Callable[..., Observer] = NormalizedMSEObserver
    rounding: Callable[[], Rounding] = NearestEven
    granularity: Granularity = dataclasses.field(default_factory=PerTensor)
    codes: Codes = zero_coded
    transform: Callable[[int], nn.Module] | None = None
    negative: "Part | None" = None

    def recipe(self, bits: int, signed: bool) -> Recipe:
        """Return what to build in a slot."""
        if signed and self.negative is not None:
            return self.negative.recipe(bits, signed)
        transform = None if self.transform is None else partial(self.transform, bits)
        spec = self.codes(bits, signed, self.granularity)
        return Recipe(spec, self.observer, self.grid, self.rounding, transform)


@dataclasses.dataclass(frozen=True)
class Edge:
    """How the first and the last layer are quantized when they have more bits than the others.

    Attributes:
        weight: For their weights.
        activation: For their inputs.

    Source:
        Gongyo et al. 2024 (nuLSQ): 8 bits over the full range, nothing learned. The ranges here are those of the
        calibration data, and do not depend on the batch at hand; weights have one for each output channel.
    """

    weight: Part = Part(UniformGrid.from_range, MinMaxObserver, granularity=PerChannel(0))
    activation: Part = Part(UniformGrid.from_range, MinMaxObserver, codes=shifted)


def prepare(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight: Part | None,
    activation: Part | None,
    weight_bits: int = 4,
    activation_bits: int = 4,
    edge_bits: int = 8,
    edge: Edge = Edge(),
    gradient_scale: GradientScale = Unscaled(),
    **calibration: Any,
) -> Quantized:
    """Give a copy of a float model quantizers to be trained.

    Batch norms are not folded and do not move. Whether the grid of an activation is signed is decided by what its
    layer sees in the first batch, on any rank. Layers that the first batch does not call stay float.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight: How weights are quantized; None keeps them float.
        activation: How the inputs of layers are quantized; None keeps them float.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the inputs of layers, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last convolution or linear layer.
        edge: How those are quantized, if `edge_bits` is more than the bits of the others.
        gradient_scale: The rule for the size of the gradients of learned parameters in grids.
        **calibration: Further options of `q_core.calibrate`, such as `progress` and `on_reuse`.

    Returns:
        The copy with quantizers, in the mode of the model, and the reports.

    Raises:
        DataError: There is no batch, or it holds values that are not finite.
        MatchError: No convolution or linear layer runs.
        SpecError: Bits outside of what a part is defined for; the note names the layer.
        RangeError: An activation without signed codes saw negative values only.

    Warns:
        ClippingWarning: An activation without signed codes saw negative values.
    """
    copied = deepcopy(model)
    glance = _look(copied, batches, calibration.get("forward", feed))
    choice = _Choice(weight, activation, edge, (weight_bits, activation_bits, edge_bits))
    twin, report = swap(copied, choice.rules(copied, glance.seen))
    if not report.swapped:
        return Quantized(twin, report, CalibrationReport(0, (), {}, (), {}))
    observers = {
        f"{path}.{name}": child for path, parent in twin.named_modules() for name, child, _ in layers.slots(parent)
    }
    for path, observer in observers.items():
        if isinstance(observer, NormObserver | LloydMaxObserver):
            observer.where = path
    calibrated = calibrate(twin, glance.batches, **calibration)
    for path, observer in observers.items():
        if isinstance(observer, HistogramObserver) and not isinstance(observer, LloydMaxObserver):
            _check_sign(path, observer)
    _scale_gradients(twin, glance.seen, gradient_scale)
    return Quantized(twin, report, calibrated)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the first batch brings to one layer."""

    signed: bool
    counts: Counts


@dataclasses.dataclass(frozen=True)
class _Choice:
    weight: Part | None
    activation: Part | None
    edge: Edge
    bits: tuple[int, int, int]

    def rules(self, model: nn.Module, seen: dict[str, _Seen]) -> list[Rule]:
        paths = swappable(model)
        weighted = [
            path for path, module in paths.items() if path in seen and isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        if not weighted:
            raise MatchError(
                f"a {type(model).__name__} calls no convolution or linear layer that can be quantized: its weights are "
                "read otherwise, or there is none"
            )
        ends = {weighted[0], weighted[-1]}
        weight_bits, _, edge_bits = self.bits
        # One recipe for all weights, since layers that share a weight share what has the same recipe.
        weights: dict[bool, Recipe | None] = {}
        for path in weighted:
            if (at_edge := path in ends) not in weights:
                least = edge_bits if at_edge else 0
                with _noted(f"while choosing the codes of the weight of {path}"):
                    weights[at_edge] = self._recipe(self.weight, self.edge.weight, weight_bits, least, True)
        return [self._rule(path, seen.get(path), weights.get(path in ends), path in ends) for path in paths]

    def _rule(self, path: str, seen: _Seen | None, weight: Recipe | None, at_edge: bool) -> Rule:
        pattern, (_, bits, edge_bits) = re.escape(path), self.bits
        if seen is None:
            return Rule(pattern, reason="the first batch does not call it")
        with _noted(f"while choosing the codes of the input of {path}"):
            inputs = self._recipe(self.activation, self.edge.activation, bits, edge_bits if at_edge else 0, seen.signed)
        return Rule(pattern, weight, inputs)

    @staticmethod
    def _recipe(part: Part | None, edge: Part, bits: int, least: int, signed: bool) -> Recipe | None:
        if part is None or max(bits, least) == FLOAT_BITS:
            return None
        return edge.recipe(least, signed) if least > bits else part.recipe(bits, signed)


@contextlib.contextmanager
def _noted(note: str) -> Iterator[None]:
    try:
        yield
    except SpecError as error:
        error.add_note(note)
        raise


def _first(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Look at the first batch without losing it."""
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError("the calibration data holds no batch: give at least one") from None
    return first, itertools.chain([first], iterator) if iterator is batches else batches


def _look(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> "_Glance":
    """Run the first batch, and bring together what all ranks see; one fails if another does, and none waits for it."""
    paths = swappable(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    facts = torch.zeros(len(paths) + 1, 5, dtype=torch.int64, device=device)  # the last row: whether this rank failed
    failure = None
    try:
        first, batches = _first(batches)
        _watch(model, first, forward, list(paths.values()), facts)
    except Exception as error:
        failure = error
        facts[-1] = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(facts, dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    *rows, failed = facts.tolist()
    if failed[0]:
        raise StateError("the first batch failed on another rank: its message tells why")
    found = {
        path: _Seen(bool(negative), Counts(elements, features, channels))
        for path, (ran, negative, elements, features, channels) in zip(paths, rows, strict=True)
        if ran
    }
    return _Glance(found, batches)


@dataclasses.dataclass(frozen=True)
class _Glance:
    """What the first batch brings to each layer that it reaches, and all batches, that one among them."""

    seen: dict[str, _Seen]
    batches: Iterable[Any]


def _watch(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    watched: list[nn.Module],
    facts: Tensor,
) -> None:
    """Write down for each layer whether it runs, whether it sees negative values, and how much it sees."""

    def watch(row: Tensor, layer: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for x in (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)):
                row[0] = 1
                row[1] |= (x < 0).any()
                channels = x.shape[1] if isinstance(layer, nn.Conv2d) and x.ndim == 4 else x.shape[-1]
                counts = torch.tensor([x.numel(), x.numel() // max(1, x.shape[0]), channels], device=row.device)
                row[2:] = torch.maximum(row[2:], counts)

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(row, layer) for row, layer in zip(facts[:-1], watched, strict=True)]
    try:
        with evaluation(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _check_sign(path: str, observer: HistogramObserver) -> None:
    """Warn where the observers of q_core, which do not know of grids without a zero point, have met negative data."""
    if observer.spec.symmetric:
        counts = observer.histogram.counts
        negative = int(counts[:, : observer.histogram.bins // 2].sum())
        warn_of_clipping(negative, int(counts.sum()), observer.spec, path)


def _scale_gradients(model: nn.Module, seen: dict[str, _Seen], rule: GradientScale) -> None:
    for path, parent in model.named_modules():
        for _, child, parameter in layers.slots(parent):
            if isinstance(child, Quantizer) and next(child.grid.parameters(), None) is not None:
                tiles = math.prod(child.grid.tile_shape)
                given = seen[path].counts if parameter is None else Counts(*[parameter.numel()] * 3)
                counts = Counts(*(max(1, count // tiles) for count in dataclasses.astuple(given)))
                setattr(child.grid, "gradient_scale", rule.factor(counts, child.grid))  # noqa: B010 - no base has it
