"""From a float model and batches to images, units and quantizers that round to nearest: where every method starts."""

import dataclasses
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from q_aquant.journal import Journal, digest
from q_aquant.placement import Placement
from q_aquant.plan import Calibration, Plan, UnitLog
from q_aquant.reconstruct import reconstruct
from q_aquant.units import Units, find_layers, find_units
from q_core import MSEObserver, PerChannel, QuantSpec, Recipe, UniformGrid
from q_core.calibrate import CalibrationReport, calibrate, feed
from q_core.errors import DataError
from q_core.methods import FLOAT_BITS, edge_rules
from q_core.observer import Observer
from q_core.swap import SwapReport, swap
from q_core.trace import fold_batchnorm, idle

_BATCH = 128
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits of weights and activations, and the least of both in the first and the last layer."""

    weight: int
    activation: int
    edge: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What the methods have in common.

    Attributes:
        blocks: What is reconstructed at once: types of modules or paths; None finds the blocks.
        seed: Of everything random.
        held_out: Images, of those given, that judge and do not teach; None takes one in eight.
        batch_size: Images in a step.
        looks: How often a unit is judged while it learns.
        journal: Folder for finished units; a run that is started again with the same folder goes on.
        storage: Where activations are kept; host memory when None.
        progress: Whether to show progress bars.
    """

    blocks: Sequence[type[nn.Module]] | Sequence[str] | None = None
    seed: int = 0
    held_out: int | None = None
    batch_size: int = 32
    looks: int = 10
    journal: str | os.PathLike[str] | None = None
    storage: Any = None
    progress: bool = True


def with_options(method: _Method) -> _Method:
    """Show the fields of `Options` in the signature of a method that hands its `**options` on to them.

    By the signature the command `q-quantize` knows what a method takes, and `help` shows it.
    """
    common = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(Options)
    ]
    signature = inspect.signature(method)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    method.__signature__ = signature.replace(parameters=[*own, *common])  # type: ignore[attr-defined]
    return method


@dataclasses.dataclass(frozen=True)
class Setup:
    """A float model, its images and its units, before anything is quantized.

    Attributes:
        model: The float model with batch norms folded.
        images: All calibration images.
        units: What is reconstructed at once.
        bits: Of what is to be quantized.
        options: What the methods have in common.
    """

    model: nn.Module
    images: Tensor
    units: Units
    bits: Bits
    options: Options

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Any], bits: Bits, options: Options, *, layerwise: bool = False
    ) -> "Setup":
        """Fold batch norms, gather the images and find the units.

        Raises:
            DataError: There is no image, or a batch that does not begin with a tensor of images.
        """
        images = gather(batches)
        folded = fold_batchnorm(model, images[:2]).eval()
        # A few images: what runs, and in what order, does not depend on their number.
        find = partial(find_layers, folded, images[:2]) if layerwise else partial(find_units, folded, images[:2])
        units = find() if layerwise else find(blocks=options.blocks)
        return cls(folded, images, units, bits, options)

    def quantize(
        self, twin: nn.Module, placement: Placement, *, weights: bool, activations: bool
    ) -> tuple[nn.Module, SwapReport, CalibrationReport]:
        """Give a twin of the model quantizers for its weights, its activations or both, rounding to nearest."""
        rules = edge_rules(
            twin,
            weight=_weight_recipe if weights else _nothing,
            input=_input_recipe if activations else _nothing,
            bits=(self.bits.weight, self.bits.activation, self.bits.edge),
            skip=idle(self.model, self.images[:2]),
        )
        swapped, report = swap(twin, rules)
        if activations:
            swapped = placement.apply(swapped, self.units, partial(_observer, bits=self.bits.activation))
        if not report.swapped:
            return swapped, report, CalibrationReport(0, (), {}, (), {})
        batches = torch.split(self.images, _BATCH)
        return swapped, report, calibrate(swapped, batches, progress=self.options.progress)

    def whole(self) -> "Setup":
        """Return the same with the whole network as the only unit."""
        return dataclasses.replace(self, units=find_units(self.model, self.images[:2], blocks=("",)))

    def learn(self, quantized: nn.Module, plan: Plan, stage: str) -> tuple[nn.Module, tuple[UnitLog, ...]]:
        """Reconstruct a quantized model by a plan."""
        options = self.options
        held_out = len(self.images) // 8 if options.held_out is None else options.held_out
        storage = {} if options.storage is None else {"storage": options.storage}
        calibration = Calibration(self.images, held_out, seed=options.seed, **storage)
        plan = dataclasses.replace(plan, batch_size=options.batch_size, looks=options.looks)
        journal = None
        if options.journal is not None:
            journal = Journal(Path(options.journal) / stage, self._facts(quantized, plan, held_out))
        return reconstruct(
            self.model, quantized, self.units, plan, calibration, journal=journal, progress=options.progress
        )

    def _facts(self, quantized: nn.Module, plan: Plan, held_out: int) -> dict[str, Any]:
        return {
            "version": _version("q-aquant"),
            "q_core": _version("q-core"),
            "torch": torch.__version__,
            "model": digest(dict(self.model.state_dict())),
            # What is learned here starts from: the grids, where they are, and what a stage before has learned.
            "start": digest(dict(quantized.state_dict())),
            "modules": hashlib.sha256(_without_addresses(repr(quantized)).encode()).hexdigest(),
            "images": digest({"images": self.images}),
            "units": [unit.path for unit in self.units],
            "bits": dataclasses.asdict(self.bits),
            "plan": _without_addresses(repr(plan)),
            "held_out": held_out,
            "seed": self.options.seed,
        }


def _without_addresses(text: str) -> str:
    """Leave out where a function lies in memory, which is no fact about the run."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree that is on the path but not installed
        return "0+source"


def gather(batches: Iterable[Any]) -> Tensor:
    """Put the images of all batches into one tensor.

    Raises:
        DataError: There is no batch, or one whose input is not a tensor.
    """
    found: list[Tensor] = []

    def take(*inputs: Any, **named: Any) -> None:
        if named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise DataError(
                f"a batch with {len(inputs)} positional and {len(named)} named inputs: reconstruction takes "
                "networks of one tensor"
            )
        found.append(inputs[0])

    for batch in batches:
        feed(take, batch)
    if not found:
        raise DataError("the calibration data holds no batch: give at least one")
    return torch.cat(found)


def _weight_recipe(bits: int) -> Recipe | None:
    spec = partial(QuantSpec.signed, symmetric=False, granularity=PerChannel(0))
    return None if bits == FLOAT_BITS else Recipe(spec(bits), observer=MSEObserver)


def _input_recipe(bits: int) -> Recipe | None:
    if bits == FLOAT_BITS:
        return None
    return Recipe(QuantSpec.unsigned(bits), observer=MSEObserver, grid=_LEARNABLE)


_LEARNABLE: Callable[..., UniformGrid] = partial(UniformGrid.from_range, learnable=True)


def _nothing(bits: int) -> None:
    return None


def _observer(own: int | None, *, bits: int) -> Observer | None:
    recipe = _input_recipe(bits if own is None else own)
    return None if recipe is None else recipe.build((1,))
