"""From observers to quantizers, by running data.

`calibrate` streams: it holds one batch at a time and statistics of fixed size, so memory does not grow with the
number of batches. Either every observer becomes a quantizer, or an error leaves the model as it was.
"""

import collections
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm.auto import tqdm

from q_core import layers
from q_core.errors import DataError, QuantizationError, SpecError, StateError
from q_core.grid import UniformGrid
from q_core.observer import Observer
from q_core.quantizer import Quantizer

_BIAS_RANGE = 2**30  # codes of a 32-bit bias: half the range is left for the accumulated products


@dataclasses.dataclass(frozen=True)
class _Slot:
    path: str
    parent: nn.Module
    name: str
    observer: Observer
    parameter: Tensor | None

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.name] = module


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` saw.

    Attributes:
        batches: Batches that entered the statistics, of all ranks. 0 when no activation is quantized.
        skipped: Index of each batch that was left out because of non-finite values.
        dead: For each slot with tiles that saw only zero, their indices. Their scale is 1.
        widened: Weight slots in which a scale was raised so that the bias of the layer fits in 32 bits.
        reused: Layers that ran more than once in a forward pass, and how often.
    """

    batches: int
    skipped: tuple[int, ...]
    dead: Mapping[str, tuple[int, ...]]
    widened: tuple[str, ...]
    reused: Mapping[str, int]


def feed(model: Callable[..., Any], batch: Any) -> Any:
    """Run one batch: a tensor as it is, a mapping as keywords, the first entry of a list or tuple.

    A list or tuple is taken for `(images, labels)`, as `DataLoader` yields it.

    Raises:
        DataError: The batch is none of these.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)) and batch:
        return model(batch[0])
    raise DataError(
        f"batch of type {type(batch).__name__}: a tensor, a mapping, or a list that starts with the input "
        "is understood; for anything else pass forward="
    )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] = feed,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    on_reuse: Literal["raise", "merge"] = "raise",
    progress: bool = True,
) -> CalibrationReport:
    """Run data through the observers of a model and put quantizers in their place.

    Parameters are observed once, activations while the network runs in evaluation mode with everything else in float.
    Each module's mode is restored afterwards. Under an initialised `torch.distributed` process group the statistics
    of all ranks are merged, and every rank gets the same quantizers as one process that sees all the batches; when one
    rank fails, all do.

    Args:
        model: A model made by `swap`. Changed in place.
        batches: Calibration data; labels are not used. On several ranks, this rank's share. Not read when no activation
            is quantized.
        forward: Runs one batch: `(model, batch) -> anything`.
        on_nonfinite: What a NaN or infinity does: `"raise"`, or `"skip"` the whole batch and report it.
        on_reuse: What a layer does that runs more than once in a forward pass: `"raise"`, or `"merge"` its inputs
            into one set of statistics and so one scale.
        progress: Whether to show a progress bar, on rank 0; it is silent anyway when the output is no terminal.

    Returns:
        What was seen.

    Raises:
        StateError: No observer, a layer that never ran, or one that ran more than once; or another rank failed.
        DataError: No batch, or a non-finite value; the message names the first layer and the batch.
        SpecError: `on_nonfinite` or `on_reuse` is none of the choices.
        QuantizationError: An observer refuses its statistics; the note names the slot.
    """
    _check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
    _check_choice("on_reuse", on_reuse, ("raise", "merge"))
    found = _observers(model)
    if not found:
        raise StateError("the model holds no observer: call swap() first, or the model is calibrated already")
    parameters = [slot for slot in found if slot.parameter is not None]
    activations = [slot for slot in found if slot.parameter is None]
    run = _Run(model, activations, forward, on_nonfinite, on_reuse)
    with _together(found):
        stream = _nonempty(batches) if activations else iter(())
    with ExitStack() as undo:
        undo.callback(_put_back, [(slot, copy.deepcopy(slot.observer.state_dict())) for slot in found])
        with _together(found):
            _observe_parameters(parameters)
            for slot in parameters:
                slot.put(nn.Identity())
            with evaluation(model):
                count, skipped = run.observe(stream, _length(batches), progress) if activations else (0, [])
        count = _merge(activations, count)
        made, dead = _make_quantizers(found)
        widened = _widen_for_bias(found, made)
        undo.pop_all()
    for slot in found:
        slot.put(made[id(slot.observer)].train(slot.observer.training))
    return CalibrationReport(count, tuple(skipped), dead, tuple(widened), run.reused)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Turn a freshly swapped model into the calibrated one whose `state_dict` was saved, in place.

    Args:
        model: A model made by `swap` with the same rules, not calibrated.
        state: The `state_dict` of the calibrated model.

    Raises:
        StateError: The model holds no observer, or the state does not fit it; nothing is changed then.
    """
    found = _observers(model)
    if not found:
        raise StateError("the model holds no observer: call swap() first")
    made: dict[int, nn.Module] = {}
    for slot in found:
        if id(slot.observer) not in made:
            # Any data makes a grid of the right type and shape; its values are then overwritten.
            stand_in = copy.deepcopy(slot.observer)
            stand_in(torch.linspace(0, 1, 2, device=stand_in.low.device).repeat(stand_in.shape))
            made[id(slot.observer)] = stand_in.quantizer().train(slot.observer.training)
    with ExitStack() as undo:
        undo.callback(_put_back, [(slot, slot.observer.state_dict()) for slot in found])
        for slot in found:
            slot.put(made[id(slot.observer)])
        _check_state(model.state_dict(), state)
        undo.pop_all()
    # A state that torch made carries the version of each module's layout, which some modules insist on.
    complete = model.state_dict()
    complete.update(_copies(model, state))
    model.load_state_dict(complete, strict=True, assign=True)


def _copies(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the state in the dtype of the model, one copy for all names of a tensor.

    The copies replace the tensors of the model: writing into them would write into the float model, which shares them.
    """
    copies: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, current in model.state_dict(keep_vars=True).items():
        if id(current) not in copies:
            given = state[name].detach()
            device = given.device if current.is_meta else current.device
            new = given.to(device=device, dtype=current.dtype, copy=True)
            is_parameter = isinstance(current, nn.Parameter)
            copies[id(current)] = nn.Parameter(new, requires_grad=current.requires_grad) if is_parameter else new
        named[name] = copies[id(current)]
    return named


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))}")


def _check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    # load_state_dict copies what fits before it complains about the rest, so everything is checked first.
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    misshapen = sorted(key for key in expected.keys() & given.keys() if expected[key].shape != given[key].shape)
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if keys:
            raise StateError(
                f"the state has {len(keys)} entries that are {what} ({', '.join(keys[:4])}): swap with the rules that "
                "the saved model was swapped with"
            )


def _put_back(saved: list[tuple[_Slot, dict[str, Any]]]) -> None:
    for slot, state in saved:
        slot.observer.load_state_dict(state)
        slot.put(slot.observer)


def _observers(model: nn.Module) -> list[_Slot]:
    return [
        _Slot(f"{path}.{name}" if path else name, parent, name, child, parameter)
        for path, parent in model.named_modules()
        for name, child, parameter in layers.slots(parent)
        if isinstance(child, Observer)
    ]


def _nonempty(batches: Iterable[Any]) -> Iterator[Any]:
    """Fetch the first batch now, so that an empty loader is refused before anything is touched."""
    iterator = iter(batches)
    try:
        first = [next(iterator)]
    except StopIteration:
        raise DataError("the calibration data holds no batch: give at least one") from None

    def chain() -> Iterator[Any]:
        yield first.pop()  # and keep no hold of it, as itertools.chain would
        yield from iterator

    return chain()


def _length(batches: Iterable[Any]) -> int | None:
    """Return the number of batches if it is known; only the progress bar wants it, so no failure matters."""
    try:
        return operator.length_hint(batches) or None
    except Exception:
        return None


@contextmanager
def _together(slots: list[_Slot]) -> Iterator[None]:
    """Let every rank fail when one does, instead of waiting for it in the next collective until a timeout."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if _distributed():
        failed = torch.tensor(int(failure is not None), device=slots[0].observer.low.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed and failure is None:
            raise StateError("calibration failed on another rank: its message tells why")
    if failure is not None:
        raise failure


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients, and restore the mode of every single module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _observe_parameters(slots: list[_Slot]) -> None:
    done: set[int] = set()
    for slot in slots:
        if id(slot.observer) not in done and slot.parameter is not None:
            done.add(id(slot.observer))
            slot.observer(slot.parameter)
            if slot.observer.nonfinite:
                bad = int((~slot.parameter.isfinite()).sum())
                raise DataError(
                    f"{slot.path.removesuffix(layers.SLOT_SUFFIX)} holds {bad} non-finite of {slot.parameter.numel()} "
                    "values: load sound weights"
                )


class _Run:
    """The pass over the data: counts calls, and catches what must not enter the statistics."""

    def __init__(
        self,
        model: nn.Module,
        slots: list[_Slot],
        forward: Callable[[nn.Module, Any], Any],
        on_nonfinite: Literal["raise", "skip"],
        on_reuse: Literal["raise", "merge"],
    ) -> None:
        self.model, self.slots, self.forward = model, slots, forward
        self.on_nonfinite, self.on_reuse = on_nonfinite, on_reuse
        self.reused: dict[str, int] = {}
        self.running = ""
        self._layers = {id(slot.parent): slot.path.rpartition(".")[0] for slot in slots}

    def observe(self, stream: Iterator[Any], length: int | None, progress: bool) -> tuple[int, list[int]]:
        world = dist.get_world_size() if _distributed() else 1
        for slot in self.slots:
            slot.observer.begin(world)
        skip = self.on_nonfinite == "skip"
        count = 0
        skipped: list[int] = []
        shown = progress and not (_distributed() and dist.get_rank())
        with tqdm(total=length, desc="calibrate", unit="batch", disable=None if shown else True) as bar:
            # Neither enumerate nor tqdm wraps the stream: both hold a batch while the next one is fetched.
            for batch in stream:
                saved = [copy.deepcopy(slot.observer.state_dict()) for slot in self.slots] if skip else []
                index = count + len(skipped)
                self._one(index, batch)
                if not self._nonfinite():
                    count += 1
                elif not skip:
                    raise DataError(self._locate(index, batch))
                else:
                    for slot, state in zip(self.slots, saved, strict=True):
                        slot.observer.load_state_dict(state)
                    skipped.append(index)
                del batch
                bar.update()
        if not count:
            raise DataError(f"all {len(skipped)} batches held non-finite values: nothing is left to calibrate with")
        self._check_all_ran()
        return count, skipped

    def _one(self, index: int, batch: Any) -> None:
        calls: collections.Counter[int] = collections.Counter()

        def enter(module: nn.Module, _: Any) -> None:
            calls[id(module)] += 1
            self.running = self._layers[id(module)]

        parents = {id(slot.parent): slot.parent for slot in self.slots}
        handles = [module.register_forward_pre_hook(enter) for module in parents.values()]
        try:
            self.forward(self.model, batch)
        except QuantizationError as error:
            error.add_note(f"while calibrating {self.running or 'the model'} with batch {index}")
            raise
        finally:
            for handle in handles:
                handle.remove()
        for key, times in calls.items():
            if times > 1:
                path = self._layers[key]
                self.reused[path] = max(times, self.reused.get(path, 0))
        if self.reused and self.on_reuse == "raise":
            path, times = next(iter(self.reused.items()))
            raise StateError(
                f"layer {path!r} ran {times} times in one forward pass, so its inputs would share one scale: give each "
                "call a layer of its own, or accept one scale with on_reuse='merge'"
            )

    def _nonfinite(self) -> bool:
        return bool(self.slots) and bool(torch.stack([slot.observer.nonfinite.cpu() for slot in self.slots]).any())

    def _locate(self, index: int, batch: Any) -> str:
        """Run the bad batch again to find the first layer, in the order of execution, that it reaches."""
        found: list[tuple[str, int, int]] = []

        def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                bad = int((~inputs[0].isfinite()).sum())
                if bad:
                    found.append((path, bad, inputs[0].numel()))

            return hook

        handles = [slot.observer.register_forward_pre_hook(look(slot.path)) for slot in self.slots]
        try:
            self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            return f"batch {index} held non-finite values, but not when it ran again: the model is not deterministic"
        path, bad, total = found[0]
        return (
            f"batch {index} has {bad} non-finite of {total} values at {path.removesuffix(layers.SLOT_SUFFIX)}: "
            "clean the data, or leave such batches out with on_nonfinite='skip'"
        )

    def _check_all_ran(self) -> None:
        idle = sorted({self._layers[id(slot.parent)] for slot in self.slots if not slot.observer.seen})
        if idle and not _distributed():
            raise StateError(
                f"{len(idle)} layers saw no data ({', '.join(idle[:4])}): feed batches that reach them, or keep them "
                "float with a rule without recipes"
            )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _merge(slots: list[_Slot], count: int) -> int:
    if not _distributed():
        return count
    total = torch.tensor(count, device=slots[0].observer.low.device if slots else "cpu")
    dist.all_reduce(total, dist.ReduceOp.SUM)
    for observer in {id(slot.observer): slot.observer for slot in slots}.values():
        observer.merge()
    return int(total)


def _make_quantizers(slots: list[_Slot]) -> tuple[dict[int, Quantizer], dict[str, tuple[int, ...]]]:
    made: dict[int, Quantizer] = {}
    dead: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        if id(slot.observer) not in made:
            try:
                made[id(slot.observer)] = slot.observer.quantizer()
            except QuantizationError as error:
                error.add_note(f"while making the quantizer of {slot.path}")
                raise
        if tiles := slot.observer.dead_tiles():
            dead[slot.path] = tuple(tiles)
    return made, dead


def _widen_for_bias(slots: list[_Slot], made: dict[int, Quantizer]) -> list[str]:
    """Raise weight scales so small that an integer bias of scale `s_x * s_w` would overflow 32 bits.

    The coarser weights of such a channel move its output by less than 2**-22 of its bias per tap, for 8-bit inputs. The
    activation scale is left alone, because all channels share it.
    """
    widened = []
    by_layer: dict[int, dict[str, _Slot]] = collections.defaultdict(dict)
    for slot in slots:
        by_layer[id(slot.parent)][slot.name] = slot
    for entry in by_layer.values():
        if not {"weight_quantizer", "input_quantizer"} <= entry.keys():
            continue
        slot = entry["weight_quantizer"]
        bias = slot.parent._parameters.get("bias")
        weight, activation = made[id(slot.observer)].grid, made[id(entry["input_quantizer"].observer)].grid
        if bias is None or not isinstance(weight, UniformGrid) or not isinstance(activation, UniformGrid):
            continue
        floor = bias.detach().abs().to(weight.scale) / (activation.scale.detach().min() * _BIAS_RANGE)
        # Tiles may span several output channels, all of them or a block: the one with the largest bias decides.
        shape = weight.scale.shape
        floor = floor.reshape(shape[0], -1).amax(1).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        if bool((weight.scale < floor).any()):
            with torch.no_grad():
                weight.scale.clamp_(min=floor)
            widened.append(slot.path)
    return widened
