r"""What closes the gap at few bits: ranges that are searched for, and scales that learn.

At 3 bits and below the quantile that suits 8 bits is too wide: the rounding of everything costs more than the clamp of
a little. `search_ranges` picks the range of every layer by the error of its output. `trainable` turns a quantized
model into one that can be trained, for distillation or with labels.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from q_adder.quantized import QuantAdderConv2d, QuantAdderLayer, QuantAdderLinear, TiedGrid, naming
from q_core.calibrate import evaluation, feed
from q_core.errors import DataError, MatchError, RangeError

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)


def _layers(model: nn.Module) -> dict[str, QuantAdderLayer]:
    kinds = (QuantAdderConv2d, QuantAdderLinear)
    found = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if not found:
        raise MatchError(f"a {type(model).__name__} has no quantized adder layer: call redistribute() first")
    return found


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
    """
    if not factors or min(factors) <= 0:
        raise RangeError(f"factors={tuple(factors)}: at least one is needed, and all must be positive")
    layers = _layers(quantized)
    expected: dict[str, Tensor] = {}
    chosen: dict[str, float] = {}

    def expect(path: str, _: nn.Module, inputs: Any, output: Tensor) -> None:
        if path in expected:
            raise DataError(f"layer {path!r} runs twice in a pass: its range cannot be searched for; leave it out")
        expected[path] = output

    def choose(path: str, layer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        start, best, least = layer.tied.scale.clone(), (1.0, torch.empty(0)), float("inf")
        for factor in factors:
            layer.tied.scale.copy_(start * factor)
            output = layer.forward(inputs[0])
            error = _centred(expected[path] - output, layer).square().mean()
            if float(error) < least:
                least, best = float(error), (factor, output)
        factor, output = best
        layer.tied.scale.copy_(start * factor)
        chosen[path] = factor
        shift = _channels(expected[path] - output, layer).mean(0)
        layer.bias.add_(shift.to(layer.bias.dtype))
        return output + (shift.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else shift).to(output.dtype)

    for root, look in ((model, expect), (quantized, choose)):
        with evaluation(root), ExitStack() as stack:
            for path in layers:
                hook = partial(look, path)
                stack.callback(root.get_submodule(path).register_forward_hook(hook).remove)
            feed(root, batch)
    return chosen


def _channels(values: Tensor, layer: nn.Module) -> Tensor:
    last = values.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else values
    return last.reshape(-1, last.shape[-1])


def _centred(values: Tensor, layer: nn.Module) -> Tensor:
    rows = _channels(values, layer)
    return rows - rows.mean(0)


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

    Add `AdderLearningRate` to an optimizer that trains from scratch; to distil into a trained model an ordinary rate
    for weights is enough. The clamp of the kernels and the constant that makes up for it follow the scale by
    themselves.

    Args:
        quantized: A model made by `redistribute`. Neither it nor the float model it shares tensors with is changed.

    Returns:
        The copy, in training mode.

    Raises:
        MatchError: There is no quantized adder layer.
    """
    _layers(quantized)
    model = copy.deepcopy(quantized)
    for path, layer in _layers(model).items():
        tied = layer.tied
        with naming(path):
            layer.tied = TiedGrid(tied.spec, tied.scale, tied.zero_point, tied.group_of, learnable=True)
            parametrize.register_parametrization(layer.tied, "scale", _Relative(tied.scale))
    return model.train()
