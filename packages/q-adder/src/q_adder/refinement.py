r"""What closes the gap at few bits: ranges that are searched for, and scales that learn.

At 3 bits and below the quantile that suits 8 bits is too wide: the rounding of everything costs more than the clamp of
a little. `search_ranges` picks the range of every layer by the error of its own output, `tune_ranges` by the output of
the whole network; neither needs labels. `trainable` turns a quantized model into one that can be trained, for
distillation or with labels.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from q_adder.channels import channel_rows, hooked, shifted
from q_adder.quantized import QuantAdderConv2d, QuantAdderLayer, QuantAdderLinear, TiedGrid, naming
from q_adder.ranges import is_least
from q_core.calibrate import evaluation, feed
from q_core.errors import DataError, MatchError, RangeError, StateError

COMMON = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1)
FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)


def _layers(model: nn.Module) -> dict[str, QuantAdderLayer]:
    kinds = (QuantAdderConv2d, QuantAdderLinear)
    found = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if not found:
        raise MatchError(f"a {type(model).__name__} has no quantized adder layer: call redistribute() first")
    return found


class _Trial:
    """The layers of a quantized model, whose scales and biases are put back unless they are kept."""

    def __init__(self, quantized: nn.Module) -> None:
        self.layers = _layers(quantized)
        learning = [path for path, layer in self.layers.items() if "scale" not in layer.tied._buffers]
        if learning:
            raise StateError(
                f"the scale of {learning[0]!r} learns: choose ranges first, and make the trainable() copy of the result"
            )
        self.scales = {path: layer.tied.scale.clone() for path, layer in self.layers.items()}
        self.biases = {path: _bias(layer).detach().clone() for path, layer in self.layers.items()}

    @torch.no_grad()
    def put(self, path: str, factor: float, shift: Tensor | float = 0.0) -> None:
        """Multiply the scale of a layer, as it was, by a factor, and add to its bias, as it was."""
        self.layers[path].tied.scale.copy_(self.scales[path] * factor)
        _bias(self.layers[path]).copy_(self.biases[path] + shift)

    def restore(self) -> None:
        """Put everything back."""
        for path in self.layers:
            self.put(path, 1.0)


def _bias(layer: QuantAdderLayer) -> Tensor:
    """Return the bias, which every quantized layer has."""
    bias: Tensor = layer.bias  # type: ignore[assignment]
    return bias


def _float_outputs(
    model: nn.Module, layers: Mapping[str, QuantAdderLayer], batch: Any, keep: Callable[[Tensor, nn.Module], Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """Run the float model; return its output and what `keep` makes of that of each layer."""
    kept: dict[str, Tensor] = {}

    def look(path: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        if path in kept:
            raise DataError(
                f"layer {path!r} runs twice in a pass, and its outputs cannot be told apart: leave it float"
            )
        kept[path] = keep(output, layer)

    with evaluation(model), hooked(model, layers, look):
        return feed(model, batch), kept


def search_ranges(
    quantized: nn.Module, model: nn.Module, batch: Any, *, factors: Sequence[float] = FACTORS
) -> dict[str, float]:
    """Choose the range of every layer by the error of its output, in place.

    Layers are treated in the order in which they run, each seeing the inputs that the treated ones before it make. The
    error is the mean square of the difference to the output of the float layer, after each channel has been given the
    float mean, because `correct_means` or a bias that learns will do that. Labels are not used.

    Args:
        quantized: A model made by `redistribute`. Scales and biases of its adder layers are changed.
        model: The float model it was made from.
        batch: One batch, as `q_core.calibrate` takes it; a few hundred images.
        factors: What the scale of a layer may be multiplied by.

    Returns:
        The factor of each layer.

    Raises:
        DataError: A layer runs more than once in a pass, and it cannot be told which output belongs to which call.
        MatchError: There is no quantized adder layer.
        RangeError: A factor is not positive.
        StateError: The scales learn already.
    """
    if not factors or min(factors) <= 0:
        raise RangeError(f"factors={tuple(factors)}: at least one is needed, and all must be positive")
    trial = _Trial(quantized)
    _, expected = _float_outputs(model, trial.layers, batch, lambda output, _: output)
    chosen: dict[str, float] = {}

    def choose(path: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        least, best, shift = math.inf, output, torch.zeros(())
        for factor in factors:
            trial.put(path, factor)
            output = layer.forward(inputs[0])
            gap = channel_rows(expected[path] - output, layer)
            error = float((gap - gap.mean(0)).square().mean())
            if error < least:
                least, best, shift, chosen[path] = error, output, gap.mean(0), factor
        if path not in chosen:
            raise DataError(f"the error of {path!r} is not a number for any factor: look at its outputs")
        trial.put(path, chosen[path], shift)
        return shifted(best, shift, layer)

    with ExitStack() as undo:
        undo.callback(trial.restore)
        with evaluation(quantized), hooked(quantized, trial.layers, choose):
            feed(quantized, batch)
        undo.pop_all()
    return chosen


def divergence(output: Float[Tensor, "*n classes"], expected: Float[Tensor, "*n classes"]) -> Float[Tensor, ""]:
    """Return the mean Kullback-Leibler divergence of the classes that logits give from those that were expected."""
    classes = expected.shape[-1]
    return F.kl_div(
        output.reshape(-1, classes).log_softmax(1),
        expected.reshape(-1, classes).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune_ranges` did.

    Attributes:
        factors: What the scale of each layer was multiplied by.
        before: Loss with the ranges as they were and the means corrected.
        after: Loss at the end, never above `before`.
        passes: Forward passes through the quantized model.
    """

    factors: Mapping[str, float]
    before: float
    after: float
    passes: int


def tune_ranges(
    quantized: nn.Module,
    model: nn.Module,
    batch: Any,
    *,
    common: Sequence[float] = COMMON,
    moves: Sequence[float] = (0.85, 1.15),
    rounds: int = 1,
    loss: Callable[[Any, Any], Tensor] = divergence,
    progress: bool = True,
) -> Tuning:
    """Choose the ranges of all layers by the output of the network, in place.

    First one factor for all layers, then, layer by layer, whether a little less or more is better: coordinate descent
    that needs forward passes only. In every pass the mean output of each channel is corrected on the way, as
    `correct_means` does, so ranges are compared as they will be used. Labels are not used.

    The error of a layer's own output is no substitute at 2 bits: a clamp puts the same error into all channels of a
    position, which adds little to that error and much to what the next layers see.

    Args:
        quantized: A model made by `redistribute`. Scales and biases of its adder layers are changed.
        model: The float model it was made from.
        batch: One batch, as `q_core.calibrate` takes it; some hundred images.
        common: Factors to try on all layers together; 1 is tried in any case.
        moves: Factors to try on one layer at a time.
        rounds: How often to go through the layers; 0 keeps a common factor.
        loss: From the outputs of the quantized and of the float model to a number, smaller where they agree.
        progress: Whether to show a progress bar.

    Returns:
        What was done. The model is at least as good, by that loss on that batch, as before.

    Raises:
        DataError: The loss is not a finite number.
        MatchError: There is no quantized adder layer.
        RangeError: A factor is not positive.
        StateError: The scales learn already.
    """
    for name, values in (("common", common), ("moves", moves)):
        if any(value <= 0 for value in values):
            raise RangeError(f"{name}={tuple(values)}: all factors must be positive")
    search = _Search(quantized, model, batch, loss)
    total = len(set(common) | {1.0}) + rounds * len(search.trial.layers) * len(moves)
    with (
        ExitStack() as undo,
        tqdm(total=total, desc="tune ranges", unit="pass", disable=None if progress else True) as bar,
    ):
        undo.callback(search.trial.restore)
        every = dict.fromkeys(search.trial.layers, 1.0)
        best, before = every, search.loss_of(every)
        least = before
        bar.update()
        for trial in [dict.fromkeys(every, factor) for factor in common if factor != 1.0]:
            value = search.loss_of(trial)
            bar.update()
            if value < least:
                best, least = trial, value
        for path in list(every) * rounds:
            # From the same place both ways; the better one is kept.
            for trial in [best | {path: best[path] * move} for move in moves]:
                value = search.loss_of(trial)
                bar.update()
                if value < least:
                    best, least = trial, value
        search.settle(best)
        undo.pop_all()
    return Tuning(best, before, least, search.passes)


class _Search:
    """Evaluates factors for the scales of all layers, each with one pass through the quantized model."""

    def __init__(self, quantized: nn.Module, model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]) -> None:
        self.quantized, self.batch, self.loss = quantized, batch, loss
        self.trial = _Trial(quantized)
        self.passes = 0
        self.shifts: dict[str, Tensor] = {}
        self.expected, self.means = _float_outputs(
            model, self.trial.layers, batch, lambda output, layer: channel_rows(output, layer).mean(0)
        )

    def _correct(self, path: str, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        self.shifts[path] = self.means[path] - channel_rows(output, layer).mean(0)
        return shifted(output, self.shifts[path], layer)

    def loss_of(self, factors: Mapping[str, float]) -> float:
        """Run with some factors and leave the scales there."""
        for path, factor in factors.items():
            self.trial.put(path, factor)
        with evaluation(self.quantized), hooked(self.quantized, factors, self._correct):
            output = feed(self.quantized, self.batch)
            value = float(self.loss(output, self.expected))
        self.passes += 1
        if not math.isfinite(value):
            raise DataError(f"the loss of the quantized model is {value}: look at its outputs and at those in float")
        return value

    def settle(self, factors: Mapping[str, float]) -> None:
        """Keep some factors, and the corrections of means that belong to them."""
        self.loss_of(factors)
        for path, factor in factors.items():
            self.trial.put(path, factor, self.shifts[path])


class _Relative(nn.Module):
    """A positive tensor as its start times the exponential of what is learned."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer("start", start.detach().clone())

    def forward(self, logarithm: Tensor) -> Tensor:
        """Return the tensor."""
        return self.start * logarithm.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return what has to be learned for the value; zero, and not nearly, for the start."""
        return (value / self.start).log()


def trainable(quantized: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that can be trained: its own parameters, and scales that learn.

    A scale is learned as the logarithm of its ratio to where it starts, so it cannot become negative, and a learning
    rate means the same in every layer: the relative change of a step.

    The copy shares nothing with the model it was made of, as that does with its float model. Its state dict has other
    keys: for each scale `tied.parametrizations.scale.original`, which is learned, and `...scale.0.start`, from which it
    started. It loads into another copy that `trainable` made, of a model quantized in the same way; not into what
    `redistribute` returns. What is finished is packed.

    Add `AdderLearningRate` to an optimizer that trains from scratch; to distil into a trained model an ordinary rate
    for weights is enough. The clamp of the kernels and the constant that makes up for it follow the scale by
    themselves.

    Args:
        quantized: A model made by `redistribute`. Neither it nor the float model it shares tensors with is changed.

    Returns:
        The copy, in training mode.

    Raises:
        MatchError: There is no quantized adder layer.
        StateError: The inputs of a layer were all but zero when its range was chosen. A ratio leads away from such a
            range only in thousands of steps, and a clamp so narrow lets no gradient through to the layers before it.
    """
    for path, layer in _layers(quantized).items():
        if is_least(*layer.tied.range()):
            raise StateError(
                f"the inputs of {path!r} were all but zero when its range was chosen, and its scale would not learn "
                "another one: choose ranges on data that reach the layer, train the float network until they do, or "
                f"set get_submodule({path!r}).tied.scale to what you expect"
            )
    model = copy.deepcopy(quantized)
    for path, layer in _layers(model).items():
        tied = layer.tied
        with naming(path):
            layer.tied = TiedGrid(tied.spec, tied.scale, tied.zero_point, tied.group_of, learnable=True)
            parametrize.register_parametrization(layer.tied, "scale", _Relative(tied.scale))
    return model.train()
