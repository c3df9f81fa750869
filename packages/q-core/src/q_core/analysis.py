"""Where a quantized model loses accuracy, layer by layer.

Two errors tell different stories. The *local* error of a layer is what its own quantizers cost: it is fed the input of
the float layer. The *accumulated* error is what arrives at its output in the running network, with everything that
was quantized before it. A layer with a bad local error is to be given more bits; one with a bad accumulated error only
hands on what it received. `distributions` shows the cause: the tensors that enter the quantizers, and the levels that
are there to hold them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q_core import functional, layers
from q_core.calibrate import evaluation, feed
from q_core.errors import MatchError, StateError
from q_core.grid import Grid
from q_core.observer import Observer
from q_core.packed import packed_form, stored
from q_core.quantizer import Quantizer
from q_core.swap import plain_path

Feed = Callable[[nn.Module, Any], Any]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Batch norms, which a method may fold into the layers before them."""

Entering = tuple[str, Tensor, Tensor]
"""A name such as `"weight"`, the values that enter a quantizer, and its levels in ascending order."""


@functools.singledispatch
def entering(layer: nn.Module, x: Tensor) -> list[Entering]:
    """Return what enters the quantizers of a layer of another package that has no slots, for input values x, flattened.

    A package with quantized layers of its own registers a function for each of their types, and `distributions` finds
    them.
    """
    return []


_NOTHING_ENTERS = entering.dispatch(object)


@dataclasses.dataclass(frozen=True)
class LayerError:
    r"""Error of one layer as signal-to-quantization-noise ratio, $10 \log_{10}(\sum y^2 / \sum (y - \hat{y})^2)$.

    Attributes:
        path: Path of the layer.
        kind: Name of its class in the quantized model.
        local: SQNR in dB of the quantized layer fed the input of the float layer; infinite when equal.
        accumulated: SQNR in dB of the layer's output within the quantized network; infinite when equal.
    """

    path: str
    kind: str
    local: float
    accumulated: float


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A histogram of what enters one quantizer, and the levels of its grid.

    Where a tensor has more than one scale, each value and level is divided by the largest |level| of its tile, so that
    all tiles share one axis on which the levels reach to 1. The levels are then the mean over the tiles, which for a
    uniform grid without zero point are those of every tile.

    Attributes:
        path: Path of the layer.
        tensor: What is quantized: the name of its slot without the suffix, such as `"weight"` or `"input"`.
        counts: Values in each bin.
        edges: Edges of the bins, float64, one more than the bins.
        levels: Levels of the grid, ascending, float64.
        tiles: Number of scales. 1 means that edges and levels are in the units of the layer.
        clipped: Fraction of values more than half a cell beyond an outermost level, 0-1.
    """

    path: str
    tensor: str
    counts: Int64[Tensor, " bins"]
    edges: Float[Tensor, " edges"]
    levels: Float[Tensor, " levels"]
    tiles: int
    clipped: float


def compare(
    float_model: nn.Module, quantized_model: nn.Module, batch: Any, *, forward: Feed = feed
) -> list[LayerError]:
    """Measure the local and the accumulated error of every layer with slots, or with a packed form of its own.

    Runs each model once in evaluation mode, with hooks that are removed and modes that are restored. Memory is that of
    the outputs of these layers for one batch. A `QuantUnit` is measured as a whole, beside the layers in it.

    Batch norms are folded into the layers of a quantized model, which changes what those layers put out. So the float
    model to compare with is the folded one, `fold_batchnorm(model, example)`; another one is refused.

    Args:
        float_model: The float model with the batch norms of the quantized one. Not changed.
        quantized_model: A calibrated or a packed model. Not changed.
        batch: One batch, as `calibrate` takes it.
        forward: Runs one batch: `(model, batch) -> anything`.

    Returns:
        One entry per layer, in the order in which the float model first runs them.

    Raises:
        StateError: The quantized model holds observers, other batch norms than the float model, or no layer with
            slots that runs; or a layer runs more often in one of the models than in the other.
        MatchError: The float model has no module at the path of a layer.
    """
    _require_calibrated(quantized_model)
    _require_same_norms(float_model, quantized_model)
    exact = _by_plain_path(float_model)
    probes = [
        _Probe(path, _counterpart(exact, plain_path(quantized_model, path), float_model), module)
        for path, module in quantized_model.named_modules()
        if _is_quantized(module)
    ]
    order: list[_Probe] = []
    with evaluation(float_model), evaluation(quantized_model):
        with _hooks(probe.on_float(order) for probe in probes):
            forward(float_model, batch)
        with _hooks(probe.on_quantized() for probe in order):
            forward(quantized_model, batch)
    if not order:
        raise StateError(f"no layer of the {type(quantized_model).__name__} that could be quantized ran: swap it first")
    return [probe.result() for probe in order]


def distributions(
    quantized_model: nn.Module, batch: Any, *, bins: int = 64, forward: Feed = feed
) -> list[Distribution]:
    """Histogram what enters each quantizer when the quantized network runs one batch.

    Args:
        quantized_model: A calibrated model, not packed: the codes of a packed weight have no distribution to show.
            Not changed.
        batch: One batch, as `calibrate` takes it.
        bins: Bins of each histogram, spaced equally over the data and the levels.
        forward: Runs one batch: `(model, batch) -> anything`.

    Returns:
        One entry per quantizer, in the order in which they first run.

    Raises:
        StateError: The model holds observers, or no quantizer that runs.
    """
    _require_calibrated(quantized_model)
    owners: dict[int, tuple[str, str, bool]] = {}
    quantizers: dict[int, Quantizer] = {}
    for path, module in quantized_model.named_modules():
        for name, child, parameter in layers.slots(module):
            if isinstance(child, Quantizer) and id(child) not in quantizers:
                quantizers[id(child)] = child
                owners[id(child)] = (path, name.removesuffix(layers.SLOT_SUFFIX), parameter is not None)
    own = {
        id(module): (path, module)
        for path, module in quantized_model.named_modules()
        if entering.dispatch(type(module)) is not _NOTHING_ENTERS
    }
    seen: dict[int, list[Tensor]] = {}

    def record(quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # A parameter is the same at every call, and counts once even if two layers share it.
        is_parameter = id(quantizer) in owners and owners[id(quantizer)][2]
        if not is_parameter or id(quantizer) not in seen:
            seen.setdefault(id(quantizer), []).append(inputs[0].detach().clone())

    watched = [*quantizers.values(), *(module for _, module in own.values())]
    with evaluation(quantized_model), _hooks(module.register_forward_pre_hook(record) for module in watched):
        forward(quantized_model, batch)
    if not seen:
        raise StateError(f"no quantizer of the {type(quantized_model).__name__} ran: swap and calibrate it first")
    found: list[Distribution] = []
    for key, parts in seen.items():
        if key in own:
            path, layer = own[key]
            entries = entering(layer, torch.cat([part.flatten() for part in parts]))
            found += [_histogram(path, name, _wide(x), _wide(levels), bins) for name, x, levels in entries]
        else:
            found.append(_distribution(*owners[key][:2], quantizers[key].grid, parts, bins))
    return found


def _is_quantized(module: nn.Module) -> bool:
    own = any(of.dispatch(type(module)) is not of.dispatch(object) for of in (packed_form, stored))
    return own or next(layers.slots(module), None) is not None


def _wide(values: Tensor) -> Tensor:
    """One row of float64."""
    return values.detach().to("cpu", torch.float64).reshape(1, -1)


@dataclasses.dataclass
class _Noise:
    """Energies of a signal and of its error, summed in float64 over calls."""

    signal: float = 0.0
    noise: float = 0.0
    calls: int = 0

    def add(self, exact: Any, approximate: Any) -> None:
        if not isinstance(exact, Tensor) or not isinstance(approximate, Tensor):
            raise StateError(f"a layer with slots returned a {type(exact).__name__}: only a tensor can be compared")
        wide = exact.detach().to(torch.float64)
        self.signal += float(wide.square().sum())
        self.noise += float((wide - approximate.detach().to(torch.float64)).square().sum())
        self.calls += 1

    def decibel(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclasses.dataclass
class _Probe:
    """One layer in both models, and what was measured of it."""

    path: str
    exact: nn.Module
    quantized: nn.Module
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    local: _Noise = dataclasses.field(default_factory=_Noise)
    accumulated: _Noise = dataclasses.field(default_factory=_Noise)

    def on_float(self, order: list["_Probe"]) -> RemovableHandle:
        """Keep each output of the float layer, and feed its input to the quantized one."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.outputs:
                order.append(self)
            # forward, not the call: the hooks of the quantized layer are not for this. And before the copy is kept.
            self.local.add(output, self.quantized.forward(*args, **kwargs))
            # A copy, because an in-place activation function may overwrite the output as soon as the layer returns.
            self.outputs.append(output.detach().clone())

        return self.exact.register_forward_hook(hook, with_kwargs=True)

    def on_quantized(self) -> RemovableHandle:
        """Hold each output of the quantized layer against the kept one."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if self.accumulated.calls < len(self.outputs):
                self.accumulated.add(self.outputs[self.accumulated.calls], output)
            else:
                self.accumulated.calls += 1

        return self.quantized.register_forward_hook(hook)

    def result(self) -> LayerError:
        if self.accumulated.calls != len(self.outputs):
            raise StateError(
                f"layer {self.path!r} ran {self.accumulated.calls} times in the quantized model and "
                f"{len(self.outputs)} times in the float model: compare models with the same forward"
            )
        kind = type(self.quantized).__name__
        return LayerError(self.path, kind, self.local.decibel(), self.accumulated.decibel())


def _distribution(path: str, tensor: str, grid: Grid, parts: list[Tensor], bins: int) -> Distribution:
    rows = torch.cat([functional.to_tiles(part, grid.tile_shape) for part in parts], dim=1).to("cpu", torch.float64)
    levels = grid.levels().detach().to("cpu", torch.float64)
    return _histogram(path, tensor, rows, levels.reshape(-1, levels.shape[-1]), bins)


def _histogram(path: str, tensor: str, rows: Tensor, levels: Tensor, bins: int) -> Distribution:
    """Count values [tiles, n] that are held by levels [tiles, levels]."""
    first, last = levels[:, :1], levels[:, -1:]
    # A real within half a cell of an outermost level is rounded to it like any other.
    beyond = (rows < first - (levels[:, 1:2] - first) / 2) | (rows > last + (last - levels[:, -2:-1]) / 2)
    if len(levels) > 1:
        unit = levels.abs().amax(1, keepdim=True)
        rows, levels = rows / unit, levels / unit
    levels = levels.mean(0)
    low, high = (float(torch.stack([rows.min(), levels[0]]).min()), float(torch.stack([rows.max(), levels[-1]]).max()))
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    # torch.histogram wants the same dtype for edges and data, and counts in it; float64 counts exactly to 2**53.
    counts = torch.histogram(rows.flatten(), edges).hist.to(torch.int64)
    return Distribution(path, tensor, counts, edges, levels, len(rows), float(beyond.to(torch.float64).mean()))


@contextmanager
def _hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks on leaving. The handles may come from a generator that registers them."""
    with ExitStack() as undo:
        for handle in handles:
            undo.callback(handle.remove)
        yield


def _require_calibrated(model: nn.Module) -> None:
    waiting = [path for path, module in model.named_modules() if isinstance(module, Observer)]
    if waiting:
        raise StateError(
            f"model still holds {len(waiting)} observers ({', '.join(waiting[:4])}): call calibrate() before comparing"
        )


def _require_same_norms(float_model: nn.Module, quantized_model: nn.Module) -> None:
    left, right = norm_paths(float_model), norm_paths(quantized_model)
    if left != right:
        differing = sorted(left ^ right)
        raise StateError(
            f"{len(differing)} batch norms are in only one of the models ({', '.join(differing[:4])}), so their layers "
            "cannot agree: compare with fold_batchnorm(float_model, example)"
        )


def norm_paths(model: nn.Module) -> set[str]:
    """Return the paths of the batch norms of a model, without the steps into units."""
    return {plain_path(model, path) for path, module in model.named_modules() if isinstance(module, NORMS)}


def _by_plain_path(model: nn.Module) -> dict[str, nn.Module]:
    """List modules by their paths without the steps into units; with empty slots a unit is as good as its body."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(plain_path(model, path), module)
    return found


def _counterpart(exact: dict[str, nn.Module], path: str, float_model: nn.Module) -> nn.Module:
    if path not in exact:
        raise MatchError(
            f"layer {path!r} of the quantized model is not in the {type(float_model).__name__}: compare with the float "
            "model that it was made from"
        )
    return exact[path]
