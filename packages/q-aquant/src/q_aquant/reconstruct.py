"""Fit a quantized network to its float original, unit by unit.

A unit sees what the quantized network before it really hands on, and is fitted to what the float network makes of the
original images. Units are learned in the order of execution, each on a copy that takes the place of the unit only if it
is better than rounding to nearest on images that were held out. Everything random comes from the seed and the number
of the unit, so a run that was killed goes on as if nothing had happened.
"""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm.auto import tqdm

from q_aquant.caches import Cache, collect, run_unit
from q_aquant.drop import Draws, mix
from q_aquant.forms import Form, ordinary
from q_aquant.journal import Journal
from q_aquant.layers import PatchConv2d
from q_aquant.learners import (
    Learning,
    Temporary,
    drop_inside,
    falling,
    quantizers,
    settle,
    settled,
    soft_weights,
)
from q_aquant.losses import Loss
from q_aquant.plan import Calibration, Look, Plan, UnitLog
from q_aquant.starts import Sight
from q_aquant.tails import UnitTail
from q_aquant.units import Unit, Units
from q_core.calibrate import evaluation
from q_core.errors import DataError, QuantizationError, SpecError
from q_core.swap import replace_modules

_log = logging.getLogger(__name__)
_BATCH = 128  # images that go through a network at once where nothing is learned


def reconstruct(
    model: nn.Module,
    quantized: nn.Module,
    units: Units,
    plan: Plan,
    calibration: Calibration,
    *,
    journal: Journal | None = None,
    progress: bool = True,
) -> tuple[nn.Module, tuple[UnitLog, ...]]:
    """Learn every unit in turn.

    With `torch.distributed` initialised, every rank holds all images and takes its part of each batch; all ranks end
    with the same model, which is that of one process but for the order of sums.

    Args:
        model: The float model, batch norms folded. Not changed.
        quantized: Its calibrated twin, rounding to nearest. Changed: units are replaced in it.
        units: What is learned at once, see `q_aquant.units`.
        plan: How.
        calibration: The images.
        journal: Where finished units are kept, to go on after an interruption; None keeps nothing.
        progress: Whether to show a progress bar.

    Returns:
        The quantized model, and a log of each unit.

    Raises:
        DataError: Fewer images teach than are in a batch, or none judges.
        StateError: The journal is of another run.
    """
    _check(calibration, plan)
    logs = []
    engine = _Engine(model, quantized, plan, calibration)
    with evaluation(model), evaluation(quantized), ExitStack() as stack:
        stack.callback(engine.close)
        bar = stack.enter_context(tqdm(units, desc="reconstruct", unit="unit", disable=None if progress else True))
        for number, unit in enumerate(bar):
            bar.set_postfix_str(unit.path)
            try:
                logs.append(engine.unit(number, unit, journal))
            except QuantizationError as error:
                error.add_note(f"while reconstructing {unit.path}")
                raise
            _log.info("%s: %s, held-out error %.4g from %.4g", unit.path, *_outcome(logs[-1]))
    return finished(engine.quantized), tuple(logs)


def _outcome(log: UnitLog) -> tuple[str, float, float]:
    return log.outcome, log.error, log.start


def _check(calibration: Calibration, plan: Plan) -> None:
    world = _world()[1]
    if calibration.teaching < plan.batch_size:
        raise DataError(
            f"{calibration.teaching} images teach ({len(calibration.images)} given, {calibration.held_out} held out), "
            f"fewer than the {plan.batch_size} of a batch: give more images or a smaller batch_size"
        )
    if calibration.held_out < 0 or plan.batch_size % world:
        raise SpecError(
            f"held_out={calibration.held_out}, batch_size={plan.batch_size} on {world} ranks: held_out is at least 0, "
            "and the ranks share a batch evenly"
        )


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclasses.dataclass
class _Activations:
    """What enters and leaves a unit."""

    quantized: Cache
    original: Cache
    target: Cache


class _Engine:
    """The state of a run: the two networks, and the activations at the end of the last unit."""

    def __init__(self, model: nn.Module, quantized: nn.Module, plan: Plan, calibration: Calibration) -> None:
        self.model, self.quantized, self.plan, self.calibration = model, quantized, plan, calibration
        self.rank, self.world = _world()
        self.last: tuple[Cache, Cache] | None = None
        self.open: list[Cache] = []
        self.before: list[Unit] = []

    def unit(self, number: int, unit: Unit, journal: Journal | None) -> UnitLog:
        """Learn one unit, or take it from the journal, and put it in its place."""
        start = time.perf_counter()
        kept = journal.read(number, unit.path) if journal else None
        original = self.quantized.get_submodule(unit.path)
        activations = self._activations(unit)
        if kept is not None:
            entry, state = kept
            learned = self._restored(original, state) if state else None
            log = _read_log(entry)
        else:
            learned, log = self._learn(number, unit, original, activations)
            log = dataclasses.replace(log, seconds=time.perf_counter() - start)
            if journal:
                journal.write(number, unit.path, dataclasses.asdict(log), learned_state(learned) if learned else {})
        if learned is not None:
            # Wherever it is registered: one module may have two names, as long as it runs once.
            self.quantized = replace_modules(self.quantized, {id(original): learned})
        self._hand_on(unit, activations)
        self.before.append(unit)
        return log

    def _restored(self, original: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        working = fork(original)
        working, _, temporaries = self._begin(self._formed(working), torch.Generator())
        settle(temporaries)
        working = finished(working)
        own = working.state_dict()
        own.update(state)
        working.load_state_dict(own)
        return working

    def _formed(self, working: nn.Module) -> nn.Module:
        return working if self.plan.form is None else with_borders(working, self.plan.form)

    def _begin(
        self, working: nn.Module, generator: torch.Generator
    ) -> tuple[nn.Module, list[Learning], list[Temporary]]:
        """Put everything that learns into a copy of a unit."""
        learnings = [learner.begin(working) for learner in self.plan.learners]
        temporaries = [each for learning in learnings for each in learning.temporaries]
        draws = Draws(generator, self.rank, self.world)
        # The outermost first: what drops, or is soft, sits around the quantizers whose roundings learn.
        around = drop_inside(working, self.plan.drop, draws) + soft_weights(working)
        return working, learnings, around + temporaries

    def _activations(self, unit: Unit) -> _Activations:
        images = self.calibration.images
        storage = self.calibration.storage
        if unit.chained and self.last is not None:
            quantized, original = self.last
        else:
            self._forget()
            order = memory_order(images, self.plan)
            original = self._keep(collect(self.model, images, unit.path, storage, memory_format=order))
            quantized = self._keep(collect(self.quantized, images, unit.path, storage, memory_format=order))
        target = self._keep(run_unit(self.model.get_submodule(unit.path), original, storage))
        return _Activations(quantized, original, target)

    def _hand_on(self, unit: Unit, activations: _Activations) -> None:
        quantized = self.quantized.get_submodule(unit.path)
        output = self._keep(run_unit(quantized, activations.quantized, self.calibration.storage))
        self.last = None
        for cache in (activations.quantized, activations.original):
            self._drop(cache)
        self.last = output, activations.target

    def _keep(self, cache: Cache) -> Cache:
        self.open.append(cache)
        return cache

    def _drop(self, cache: Cache) -> None:
        if cache in self.open:
            self.open.remove(cache)
            cache.close()

    def _forget(self) -> None:
        for cache in self.last or ():
            self._drop(cache)
        self.last = None

    def close(self) -> None:
        """Let go of every activation."""
        for cache in self.open:
            cache.close()
        self.open.clear()

    def _learn(
        self, number: int, unit: Unit, original: nn.Module, activations: _Activations
    ) -> tuple[nn.Module | None, UnitLog]:
        device = self.calibration.images.device
        generator = torch.Generator(device).manual_seed(_seed(self.calibration.seed, number))
        start = self._judge(original, activations)
        working = self._formed(fork(original))
        if self.plan.start is not None:
            self.plan.start.put(working, self._sight(unit, activations))
        working, learnings, temporaries = self._begin(working, generator)
        count = sum(p.numel() for learning in learnings for group in learning.groups for p in group["params"])
        log = UnitLog(unit.path, unit.kind, count, start, start, 0, (), 0.0, "nothing to learn")
        if not count and self.plan.start is None:
            return None, log
        course = _Course(self, unit, working, learnings, temporaries, activations, generator)
        if self.plan.start is not None:
            course.consider(0)
        outcome = "learned"
        if count:
            with torch.enable_grad():
                outcome = course.run()
        log = dataclasses.replace(log, looks=tuple(course.looks), outcome=outcome)
        if course.best is None or not course.best_error < start:
            kept = outcome if outcome != "learned" else "no better than nearest"
            return None, dataclasses.replace(log, outcome=kept)
        if outcome == "learned" and course.best_iteration == 0:
            log = dataclasses.replace(log, outcome="start kept")
        course.put_best()
        settle(temporaries)
        return finished(working), dataclasses.replace(log, error=course.best_error, best=course.best_iteration)

    def _sight(self, unit: Unit, activations: _Activations) -> Sight:
        def inputs() -> Iterator[tuple[Tensor, Tensor]]:
            for at in range(0, self.calibration.teaching, _BATCH):
                rows = torch.arange(at, min(at + _BATCH, self.calibration.teaching))
                yield activations.quantized.read(rows), activations.original.read(rows)

        return Sight(self.model.get_submodule(unit.path), inputs, lambda made: self._judge(made, activations))

    def _judge(self, unit: nn.Module, activations: _Activations) -> float:
        """Return the error on the images that judge."""
        total = 0.0
        judging = self.calibration.judging
        with torch.no_grad():
            for at in range(judging.start, judging.stop, _BATCH):
                rows = torch.arange(at, min(at + _BATCH, judging.stop))
                output = unit(activations.quantized.read(rows))
                total += float(self.plan.loss.error(output, activations.target.read(rows))) * len(rows)
        return total / len(judging)


class _Course:
    """The steps of one unit."""

    def __init__(
        self,
        engine: _Engine,
        unit: Unit,
        working: nn.Module,
        learnings: Sequence[Learning],
        temporaries: Sequence[Temporary],
        activations: _Activations,
        generator: torch.Generator,
    ) -> None:
        self.engine, self.unit, self.working = engine, unit, working
        self.learnings, self.temporaries, self.activations = learnings, temporaries, activations
        self.draws = Draws(generator, engine.rank, engine.world)
        self.groups = [(group, learning.cosine) for learning in learnings for group in learning.groups]
        self.parameters: list[nn.Parameter] = [p for group, _ in self.groups for p in group["params"]]
        self.looks: list[Look] = []
        self.best: list[Tensor] | None = None
        self.best_error, self.best_iteration = math.inf, 0
        self.tail = UnitTail(engine.model, unit, engine.before)
        # Most losses do not, and a batch of images is more than many a unit has at its input.
        self.looks_further = type(engine.plan.loss).further is not Loss.further

    def run(self) -> str:
        """Take all steps; return `learned`, or why they were stopped."""
        plan = self.engine.plan
        fused = self.draws.generator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam([dict(group) for group, _ in self.groups], fused=fused)
        rates = [group["lr"] * plan.pace for group, _ in self.groups]
        importance = self._importance()
        marks = {round((look + 1) * plan.iterations / plan.looks) for look in range(plan.looks)}
        losses: list[Tensor] = []
        for iteration, rows in enumerate(self._batches(plan.iterations)):
            progress = iteration / plan.iterations
            for learning in self.learnings:
                learning.advance(progress)
            for group, rate, (_, cosine) in zip(optimizer.param_groups, rates, self.groups, strict=True):
                group["lr"] = rate * (falling(progress) if cosine else 1.0)
            loss, penalty = self._step(optimizer, rows, importance)
            losses.append(loss)
            if iteration + 1 in marks:
                # Only here the host waits for the device.
                average = float(torch.stack(losses).mean())
                if not math.isfinite(average + float(penalty)):
                    return f"stopped: the loss was {average + float(penalty)} before step {iteration + 1}"
                self._look(iteration + 1, average, float(penalty))
                losses.clear()
        return "learned"

    def _step(self, optimizer: torch.optim.Optimizer, rows: Tensor, importance: Cache | None) -> tuple[Tensor, Tensor]:
        plan = self.engine.plan
        quantized, original = self.activations.quantized.read(rows), self.activations.original.read(rows)
        x = mix(quantized, original, plan.mixing, self.draws)
        weights = None if importance is None else importance.read(rows)
        output, target = self.working(x), self.activations.target.read(rows)
        loss = plan.loss(output, target, weights)
        if self.looks_further:
            images = self.engine.calibration.images
            further = plan.loss.further(images[rows.to(images.device)], output, target, self.tail)
            loss = loss if further is None else loss + further
        penalties = [value for learning in self.learnings if (value := learning.penalty()) is not None]
        penalty = torch.stack(penalties).sum() if penalties else torch.zeros_like(loss)
        # Asks for these gradients only: none is computed for weights and biases, which the float model shares.
        gradients = torch.autograd.grad(loss + penalty, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._reduce()
        optimizer.step()
        for learning in self.learnings:
            learning.keep_valid()
        return loss.detach(), penalty.detach()

    def _reduce(self) -> None:
        """Average the gradients over the ranks, each of which saw its part of the batch."""
        if self.engine.world > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.engine.world

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Draw batches of different images, and take the part of this rank."""
        size, rank, world = self.engine.plan.batch_size, self.engine.rank, self.engine.world
        device = self.draws.generator.device
        for _ in range(count):
            order = torch.randperm(self.engine.calibration.teaching, generator=self.draws.generator, device=device)
            part = size // world
            yield order[rank * part : (rank + 1) * part]

    def _importance(self) -> Cache | None:
        loss, images = self.engine.plan.loss, self.engine.calibration.images
        cache: Cache | None = None
        for at in range(0, len(images), _BATCH):
            rows = torch.arange(at, min(at + _BATCH, len(images)))
            with torch.no_grad(), settled(self.temporaries):
                output = self.working(self.activations.quantized.read(rows))
            weights = loss.importance(images[at : at + _BATCH], output, self.activations.target.read(rows), self.tail)
            if weights is None:
                return None
            if cache is None:
                storage = self.engine.calibration.storage
                cache = self.engine._keep(storage.allocate(len(images), tuple(weights.shape[1:]), weights.dtype))
            cache.write(at, weights)
        return cache

    def _look(self, iteration: int, loss: float, penalty: float) -> None:
        self.looks.append(Look(iteration, loss, penalty, self.consider(iteration)))

    def consider(self, iteration: int) -> float:
        """Judge the unit as it would be left, and keep its values if they are the best so far."""
        with settled(self.temporaries):
            error = self.engine._judge(self.working, self.activations)
        if error < self.best_error:
            self.best_error, self.best_iteration = error, iteration
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        return error

    def put_best(self) -> None:
        """Put the best values back into the parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best or [], strict=True):
                parameter.copy_(value)


def memory_order(images: Tensor, plan: Plan) -> torch.memory_format:
    """Return the order of memory in which activations are kept: that in which layers are fastest.

    Convolutions on a CPU want channels last, those with few channels by a factor of two. The operators of borders read
    and write the plain order, and copies from one to the other take back what is won. On a GPU nothing was measured.
    """
    if plan.form is not None or images.ndim != 4 or images.device.type != "cpu":
        return torch.preserve_format
    return torch.channels_last


def fork(unit: nn.Module) -> nn.Module:
    """Copy a unit with its quantizers, but share the weights and biases, which do not learn."""
    own = {id(tensor) for *_, quantizer, _ in quantizers(unit) for tensor in _tensors(quantizer)}
    shared = {id(tensor): tensor for tensor in _tensors(unit) if id(tensor) not in own}
    return copy.deepcopy(unit, memo=shared)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def with_borders(unit: nn.Module, form: Form) -> nn.Module:
    """Give every layer of a unit that has activations of few bits a border, in place; return the unit."""
    replaced = {id(layer): new for layer in unit.modules() if (new := form.apply(layer)) is not None}
    return replace_modules(unit, replaced)


def finished(unit: nn.Module) -> nn.Module:
    """Freeze what has learned, or could have, and return layers to the ordinary type where that is the same."""
    patched = [layer for layer in unit.modules() if isinstance(layer, PatchConv2d)]
    unit = replace_modules(unit, {id(layer): new for layer in patched if (new := ordinary(layer)) is not None})
    for *_, quantizer, _ in quantizers(unit):
        quantizer.requires_grad_(False)
    return unit


def learned_state(unit: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the quantizers of a unit, by their names in its state."""
    own = {id(tensor) for *_, quantizer, _ in quantizers(unit) for tensor in _tensors(quantizer)}
    return {name: tensor.detach() for name, tensor in unit.state_dict(keep_vars=True).items() if id(tensor) in own}


def _seed(seed: int, number: int) -> int:
    """Mix the seed of the run with the number of the unit."""
    return (seed * 1_000_003 + number * 7919 + 1) % (1 << 63)


def _read_log(entry: dict[str, Any]) -> UnitLog:
    return UnitLog(**{**entry, "looks": tuple(Look(**look) for look in entry["looks"])})
