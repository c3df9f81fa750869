r"""Post-training quantization of adder networks by redistribution.

Weights of a trained adder network spread several times wider than its activations, and one scale has to serve both.
Three parts make that work, and each can be used alone: kernels of similar range form groups with a scale each
(`cluster_kernels`); a weight beyond the range of the inputs is clamped to its end without any loss (`clamp_weights`);
and a few outliers among the inputs are given up (`q_adder.ranges`). A `Scheme` of `q_adder.schemes` puts them together
for one layer, `redistribute` for a model.

Source:
    Nie et al. 2022, Redistribution of Weights and Activations for AdderNet Quantization. The one-sided form follows
    from the same argument for inputs that are never negative.
"""

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from q_adder.channels import channel_rows, hooked, shifted
from q_adder.integer import IntegerAdderConv2d, IntegerAdderLinear, IntegerAdderMatmul
from q_adder.layers import AdderConv2d, AdderLinear, AdderMatmul
from q_adder.quantized import (
    QuantAdderConv2d,
    QuantAdderLayer,
    QuantAdderLinear,
    QuantAdderMatmul,
    TiedSpec,
    naming,
)
from q_adder.ranges import ExactRange, InputRange, is_least
from q_adder.schemes import Fit, OneSided, Scheme, Symmetric
from q_core import MSEObserver, PerChannel, QuantSpec, Recipe, Rule, swap
from q_core.calibrate import CalibrationReport, calibrate, evaluation, feed
from q_core.errors import BackendError, DataError, MatchError, RangeError, SpecError, StateError
from q_core.methods import FLOAT_BITS, Quantized
from q_core.swap import DEFAULT_LAYERS, FloatLayer, SwappedLayer, SwapReport, replace_modules, share

AdderLayer = AdderConv2d | AdderLinear
_DONE = QuantAdderLayer | QuantAdderMatmul | IntegerAdderConv2d | IntegerAdderLinear | IntegerAdderMatmul


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        path: Path of the layer.
        scales: Scale of each group of kernels.
        zero_point: Code of real zero.
        groups_asked: Groups of kernels asked for.
        reach: Range of its inputs.
        clamped: Fraction of its weights that the lossless clamp moved.
        shift: Largest change of a bias by the correction of the mean; 0 where there was none.
        dead: Whether its inputs were all but zero, so that its range is the least one and says nothing about inputs
            that may come.
    """

    path: str
    scales: tuple[float, ...]
    zero_point: int
    groups_asked: int
    reach: tuple[float, float]
    clamped: float
    shift: float = 0.0
    dead: bool = False

    @property
    def grouping_is_idle(self) -> bool:
        """Whether several groups were asked for and all have the same scale."""
        return self.groups_asked > 1 and len(self.scales) == 1


@dataclasses.dataclass(frozen=True)
class Redistributed(Quantized):
    """What `redistribute` returns.

    Attributes:
        layers: What happened to each adder layer.
    """

    layers: tuple[LayerReport, ...] = ()

    def __str__(self) -> str:
        """Tabulate one layer a line, and say which are dead and where grouping changed nothing."""
        rows = [
            f"{layer.path:32} inputs {layer.reach[0]:8.3f} to {layer.reach[1]:8.3f}  scales "
            f"{', '.join(f'{scale:.4g}' for scale in layer.scales):30} clamped {100 * layer.clamped:5.1f} %"
            for layer in self.layers
        ]
        rows += [f"{layer.path} is dead: its inputs were all but zero" for layer in self.layers if layer.dead]
        idle = sum(layer.grouping_is_idle for layer in self.layers)
        if idle:
            rows.append(
                f"grouping changed nothing in {idle} of {len(self.layers)} layers: "
                "the range of the inputs decides every group"
            )
        return "\n".join(rows)


def redistribute(  # noqa: PLR0913 - the parts of the method, each with a default
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    edge_bits: int = FLOAT_BITS,
    scheme: Scheme | Mapping[str, Scheme] | None = None,
    input_range: Callable[[], InputRange] | InputRange | Mapping[str, InputRange] = ExactRange,
    mean_correction: bool = True,
    reestimate_batches: int = 0,
    progress: bool = True,
) -> Redistributed:
    """Quantize the adder layers of a model after training.

    Distances of two activations (`AdderMatmul`) are quantized too: both operands to the range of both, without the
    parts that are about kernels.

    The result shares its tensors with the float model, all but biases and levels of adder layers, so that a network is
    not in memory twice. What changes them in place afterwards changes both: `result.model.double()`, an optimizer over
    `result.model.parameters()`, batch norms in training mode. Before any of it take a copy: `trainable(result.model)`
    to train it, else `copy.deepcopy(result.model)`.

    Args:
        model: The float model. Not changed, and its tensors are shared, see above.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used. It is read several times: an
            iterator is kept in memory.
        weight_bits: Bits of the codes of kernels, 2 to 8.
        activation_bits: Bits of the codes of inputs; the same, because both share their levels.
        edge_bits: Bits of ordinary convolution and linear layers, 2 to 8; 32 leaves them float, as published.
        scheme: How levels are chosen: for all layers with kernels, or by path. None, and whatever is not named, takes
            `OneSided` where the inputs of a layer are never negative and `Symmetric` elsewhere.
        input_range: The statistic of the inputs: one that has seen nothing, such as `ExactRange(0.999)`, of which each
            layer gets a copy; or what makes one; or the statistics themselves by path, as `observe_inputs` returns
            them, to observe once and quantize often.
        mean_correction: Whether the bias of each channel is set so that its mean output is that of the float model.
        reestimate_batches: Batches from which batch norms estimate their statistics anew, in training mode, after all
            else; the published pipeline takes 202 and leaves the means alone. 0 leaves batch norms as they are.
        progress: Whether to show a progress bar.

    Returns:
        The quantized model, in evaluation mode, and the reports.

    Raises:
        DataError: There is no batch, or one holds a NaN, or a weight or bias of an adder layer does.
        BackendError: The weight of a layer is on the meta device; the note names the layer.
        MatchError: The model has no float adder layer, or `scheme` names a path that is none.
        RangeError: A scheme does not suit a layer, and the note names it; or a negative number of batches.
        SpecError: Bits that adder layers do not have, or that differ; a `scheme` or `input_range` that is none.
        StateError: A layer saw no input, or its weight is computed by weight norm, pruning or the like; the note names
            it. Or `input_range` has seen inputs before.

    Source:
        Nie et al. 2022, with the clamp in its one-sided form and a correction of means in place of new batch norms.
    """
    spec = _check_bits(weight_bits, activation_bits, edge_bits)
    if reestimate_batches < 0:
        raise RangeError(f"reestimate_batches={reestimate_batches}: it is a number of batches, 0 for none")
    floats = _floats(model)
    _check_scheme(scheme, floats)
    _check_input_range(input_range)
    data = _Data(batches, progress)
    ranges = _ranges(model, data, floats, input_range)
    fits: dict[str, Fit] = {}
    for path, layer in floats.items():
        with naming(path):
            fits[path] = _fit(_scheme(scheme, path, layer, ranges[path]), layer, ranges[path], spec.bits)
    twin = _exchange(model, floats, fits)
    edge, calibration = _edges(twin, data, edge_bits)
    twin = edge[0] if edge else twin
    kernels = tuple(path for path, layer in floats.items() if not isinstance(layer, AdderMatmul))
    shifts = correct_means(twin, model, data, paths=kernels) if mean_correction and kernels else {}
    if reestimate_batches:
        reestimate_batchnorm(twin, data, reestimate_batches)
    reports = [_report(path, floats[path], fits[path], ranges[path], shifts.get(path, 0.0)) for path in floats]
    kept = edge[1] if edge else SwapReport((), ())
    return Redistributed(twin.eval(), _swap_report(model, floats, spec.bits, kept), calibration, tuple(reports))


def _check_bits(weight_bits: Any, activation_bits: Any, edge_bits: Any) -> TiedSpec:
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits), ("edge_bits", edge_bits)):
        if not isinstance(bits, int):
            raise SpecError(f"{name}={bits!r}: it must be a whole number of bits")
    if weight_bits != activation_bits:
        raise SpecError(
            f"weight_bits={weight_bits}, activation_bits={activation_bits}: kernels and inputs of an adder layer share "
            "their levels, so they have the same bits"
        )
    if edge_bits != FLOAT_BITS and not 2 <= edge_bits <= 8:
        raise SpecError(f"edge_bits={edge_bits}: ordinary layers take 2 to 8 bits, or {FLOAT_BITS} to stay float")
    return TiedSpec(weight_bits)


def _floats(model: nn.Module) -> dict[str, nn.Module]:
    """Return the float adder layers by path, once they are found fit to be quantized."""
    kinds = AdderLayer | AdderMatmul
    floats: dict[str, nn.Module] = {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}
    if not floats:
        done = [path for path, module in model.named_modules() if isinstance(module, _DONE)]
        if done:
            raise MatchError(
                f"the adder layers of this {type(model).__name__} are quantized already, {done[0]!r} to begin with: "
                "pass the float model it was made from"
            )
        raise MatchError(f"a {type(model).__name__} has no adder layer: use q_core.nearest for ordinary layers")
    for path, layer in floats.items():
        with naming(path):
            _check_tensors(layer)
    return floats


def _check_tensors(layer: nn.Module) -> None:
    if isinstance(layer, AdderMatmul):
        return
    if layer._parameters.get("weight") is None:
        raise StateError(
            "the weight is computed from other tensors, by weight norm, pruning or another parametrization: make it an "
            "ordinary parameter first, with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') or the "
            "remove function of what was applied"
        )
    for name, tensor in layer._parameters.items():
        if tensor is None:
            continue
        if tensor.is_meta:
            raise BackendError(f"the {name} is on the meta device, where there are no values: load the model first")
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise DataError(
                f"{bad} of {tensor.numel()} values of the {name} are NaN or infinite: find where training diverged, or "
                "load a sound checkpoint"
            )


def _check_scheme(scheme: Any, floats: Mapping[str, nn.Module]) -> None:
    named = scheme if isinstance(scheme, Mapping) else {}
    strangers = sorted(named.keys() - floats.keys())
    if strangers:
        known = ", ".join(list(floats)[:4]) + (" …" if len(floats) > 4 else "")
        raise MatchError(f"scheme names {strangers[0]!r}, which is no adder layer; there are {len(floats)}: {known}")
    for path, one in named.items() if isinstance(scheme, Mapping) else [("", scheme)]:
        if not (isinstance(one, Scheme) or (one is None and not path)):
            where = f" for {path!r}" if path else ""
            call = f": write {one.__name__}()" if isinstance(one, type) and issubclass(one, Scheme) else ""
            raise SpecError(
                f"scheme={one!r}{where} is no scheme{call}; it takes OneSided(), Symmetric(), Interval(), Published(), "
                "OneScale() or a Scheme of your own, a mapping from paths to these, or None for all layers"
            )


def _scheme(scheme: Scheme | Mapping[str, Scheme] | None, path: str, layer: nn.Module, inputs: InputRange) -> Scheme:
    if isinstance(scheme, Mapping) and path in scheme:
        return scheme[path]
    if isinstance(scheme, Scheme) and not isinstance(layer, AdderMatmul):
        return scheme
    return Symmetric() if inputs.low < 0 else OneSided()


def _fit(scheme: Scheme, layer: nn.Module, inputs: InputRange, bits: int) -> Fit:
    if isinstance(layer, AdderMatmul):
        return Fit(scheme.between(inputs, bits), torch.empty(0))
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return scheme.fit(weight, inputs, bits)


class _Data:
    """Batches that can be read again and again."""

    def __init__(self, batches: Iterable[Any], progress: bool) -> None:
        self.batches = list(batches) if iter(batches) is batches else batches
        self.progress = progress

    def __iter__(self) -> Iterator[Any]:
        empty = True
        # None is silent where there is no terminal.
        for batch in tqdm(self.batches, desc="redistribute", leave=False, disable=None if self.progress else True):
            empty = False
            yield batch
        if empty:
            raise DataError("the calibration data holds no batch: give at least one")


def _ranges(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, nn.Module],
    given: Callable[[], InputRange] | InputRange | Mapping[str, InputRange],
) -> Mapping[str, InputRange]:
    if not isinstance(given, Mapping):
        return observe_inputs(model, data, layers, given)
    missing = sorted(layers.keys() - given.keys())
    if missing:
        raise MatchError(f"input_range has no statistic for {missing[0]!r}: observe_inputs() all {len(layers)} layers")
    return given


def observe_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    input_range: Callable[[], InputRange] | InputRange = ExactRange,
) -> dict[str, InputRange]:
    """Collect the statistics of the inputs of some layers, in evaluation mode.

    The operands of a layer that takes several enter one after the other, so that every one of them is kept to the
    fraction that is asked for.

    Args:
        model: The model. Not changed.
        batches: Data, as `q_core.calibrate` takes it.
        layers: Layers of the model by path.
        input_range: Makes the statistic of one layer, or one that has seen nothing, to be copied for each.

    Returns:
        The statistic of each layer.

    Raises:
        DataError: An input holds a NaN or an infinity; the note names the layer.
        SpecError: `input_range` is no statistic and makes none.
        StateError: It has seen inputs.
    """
    _check_input_range(input_range)
    ranges: dict[str, InputRange] = {}
    for path in layers:
        with naming(path):
            ranges[path] = _new_range(input_range)

    def look(path: str, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        with naming(path):
            for operand in (*inputs, *named.values()):
                ranges[path].update(operand)

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(look, path), with_kwargs=True).remove)
        stack.enter_context(evaluation(model))
        for batch in batches:
            feed(model, batch)
    return ranges


def _new_range(given: Any) -> InputRange:
    """Make the statistic of one layer, by a call or as a copy."""
    if isinstance(given, InputRange):
        return copy.deepcopy(given)
    made = given()
    _check_range(made, f"{made!r}, made by a call")
    return made  # type: ignore[no-any-return]


def _check_input_range(given: Any) -> None:
    """Check what statistics are to be made of, before any data is read."""
    if isinstance(given, Mapping):
        for path, statistic in given.items():
            _check_range(statistic, f"{statistic!r} for {path!r}")
    elif not callable(given):
        _check_range(given, repr(given))
        if given.low <= given.high:
            raise StateError(
                "input_range has seen inputs, and every layer starts from none: give a new one, or a mapping from "
                "paths to statistics, as observe_inputs() returns it"
            )


def _check_range(statistic: Any, shown: str) -> None:
    if not isinstance(statistic, InputRange):
        raise SpecError(
            f"input_range gives {shown}: it takes a statistic such as ExactRange(0.999) or StreamingRange(), what "
            "makes one, or a mapping from paths to statistics"
        )


def _exchange(model: nn.Module, floats: Mapping[str, nn.Module], fits: Mapping[str, Fit]) -> nn.Module:
    """Return a twin of the model with quantized adder layers."""
    twin = share(model)
    device = next((parameter.device for parameter in twin.parameters()), torch.device("cpu"))
    new: dict[int, nn.Module] = {}
    for path in floats:
        layer = twin.get_submodule(path)
        with naming(path):
            new[id(layer)] = _quantized(layer, fits[path], path, device)
    return replace_modules(twin, new)


def _quantized(layer: nn.Module, fit: Fit, path: str, device: torch.device) -> nn.Module:
    made: QuantAdderLayer
    if isinstance(layer, AdderConv2d):
        made = QuantAdderConv2d.from_float(layer, fit.tied, path=path)
    elif isinstance(layer, AdderLinear):
        made = QuantAdderLinear.from_float(layer, fit.tied, path=path)
    else:
        return QuantAdderMatmul(fit.tied, path=path).to(device).train(layer.training)
    if fit.weight is not layer.weight:
        made.weight = nn.Parameter(fit.weight.detach().clone())
    return made


@dataclasses.dataclass
class _Mean:
    """The mean output of each channel of one layer, over everything that was seen."""

    total: Tensor
    count: int

    @classmethod
    def of(cls, output: Tensor, layer: nn.Module) -> "_Mean":
        """Take the mean of one batch."""
        rows = channel_rows(output, layer)
        return cls(rows.sum(0, dtype=torch.float64), len(rows))

    def __add__(self, other: "_Mean") -> "_Mean":
        return _Mean(self.total + other.total, self.count + other.count)

    def value(self) -> Tensor:
        return self.total / self.count


def correct_means(
    quantized: nn.Module, model: nn.Module, batches: Iterable[Any], *, paths: tuple[str, ...] | None = None
) -> dict[str, float]:
    """Set the biases of quantized adder layers so that every channel has the mean output of the float model.

    The data is read once; every batch runs through the float model and then through the quantized one. There, every
    layer is corrected at once by what was seen so far, so that the layers behind it see inputs that are corrected
    already. Labels are not used and batch norms are not touched.

    Args:
        quantized: The quantized model. Its biases are changed.
        model: The float model it was made from.
        batches: Data, as `q_core.calibrate` takes it.
        paths: Layers to correct, all quantized adder layers when None.

    Returns:
        The largest change of a bias of each layer.
    """
    kinds = (QuantAdderConv2d, QuantAdderLinear)
    if paths is None:
        paths = tuple(path for path, module in quantized.named_modules() if isinstance(module, kinds))
    # The outputs of the float model wait for those of the quantized one, so that equal data is compared with equal
    # data, also while a batch is under way and where a layer runs more than once.
    waiting: dict[str, list[_Mean]] = {path: [] for path in paths}
    expected: dict[str, _Mean] = {}
    found: dict[str, _Mean] = {}

    def expect(path: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        waiting[path].append(_Mean.of(output, layer))

    def correct(path: str, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        for means, mean in ((expected, waiting[path].pop(0)), (found, _Mean.of(output, layer))):
            means[path] = means[path] + mean if path in means else mean
        return shifted(output, shift(path), layer)

    def shift(path: str) -> Tensor:
        return expected[path].value() - found[path].value()

    with evaluation(model), evaluation(quantized), ExitStack() as hooks:
        for root, look in ((model, expect), (quantized, correct)):
            hooks.enter_context(hooked(root, paths, look))
        for batch in batches:
            feed(model, batch)
            feed(quantized, batch)
    for path in found:
        with torch.no_grad():
            bias: Tensor = quantized.get_submodule(path).bias  # type: ignore[assignment]
            bias.add_(shift(path).to(bias.dtype))
    return {path: float(shift(path).abs().max()) for path in found}


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any], count: int, momentum: float = 0.1) -> None:
    """Let batch norms estimate their statistics anew from some batches, as the published pipeline does.

    The running statistics are replaced, not written into, because a quantized model shares them with its float model.

    Args:
        model: A quantized model; its batch norms get new statistics.
        batches: Data, as `q_core.calibrate` takes it; read from the start again where there is too little.
        count: Batches.
        momentum: Weight of each new batch in the running statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    saved = [norm.momentum for norm in norms]
    try:
        with evaluation(model):
            for norm in norms:
                for name, buffer in norm._buffers.items():
                    norm._buffers[name] = None if buffer is None else buffer.clone()
                norm.train()
                norm.momentum = momentum
            for batch in itertools.islice(_forever(batches), count):
                feed(model, batch)
    finally:
        for norm, value in zip(norms, saved, strict=True):
            norm.momentum = value


def _forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def _edges(twin: nn.Module, data: _Data, bits: int) -> tuple[tuple[nn.Module, SwapReport] | None, CalibrationReport]:
    """Quantize ordinary convolution and linear layers to the nearest level, if asked to."""
    paths = [path for path, module in twin.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
    if bits == FLOAT_BITS or not paths:
        return None, CalibrationReport(0, (), {}, (), {})
    weight = Recipe(QuantSpec.signed(bits, granularity=PerChannel(0)), observer=MSEObserver)
    activation = Recipe(QuantSpec.unsigned(bits), observer=MSEObserver)
    swapped, report = swap(twin, [Rule("|".join(map(re.escape, paths)), weight, activation)])
    return (swapped, report), calibrate(swapped, data.batches, progress=data.progress)


def _report(path: str, layer: nn.Module, fit: Fit, inputs: InputRange, shift: float) -> LayerReport:
    clamped = 0.0
    if not isinstance(layer, AdderMatmul):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        low, high = fit.tied.range()
        if fit.tied.spec.weight_step == 2:
            low = -high
        shape = (-1, *[1] * (weight.ndim - 1))
        low, high = (end[fit.tied.group_of].reshape(shape) for end in (low, high))
        clamped = float(((weight < low) | (weight > high)).float().mean())
    return LayerReport(
        path=path,
        scales=tuple(fit.tied.scale.tolist()),
        zero_point=int(fit.tied.zero_point[0]),
        groups_asked=fit.requested,
        reach=(inputs.low, inputs.high),
        clamped=clamped,
        shift=shift,
        dead=is_least(*fit.tied.range()),
    )


def _swap_report(model: nn.Module, floats: Mapping[str, nn.Module], bits: int, edges: SwapReport) -> SwapReport:
    codes = QuantSpec.unsigned(bits)
    done = {layer.path: layer for layer in edges.swapped}
    for path, layer in floats.items():
        weight = None if isinstance(layer, AdderMatmul) else codes
        done[path] = SwappedLayer(path, type(layer).__name__, weight, codes)
    kept = []
    for path, module in model.named_modules():
        if path in done:
            continue
        if type(module) in (nn.Conv2d, nn.Linear):
            reason = f"an ordinary layer, and edge_bits={FLOAT_BITS}"
        elif type(module) in DEFAULT_LAYERS:
            reason = "joins activations, which redistribute leaves float"
        elif any(parameter is not None for parameter in module._parameters.values()):
            reason = "holds parameters, but is no adder, convolution or linear layer"
        else:
            continue
        kept.append(FloatLayer(path, type(module).__name__, reason))
    return SwapReport(tuple(done[path] for path, _ in model.named_modules() if path in done), tuple(kept))
