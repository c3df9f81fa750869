"""A published method is a short alias over the parts. Here: rounding to nearest, the baseline of all others.

Every method has the signature of `nearest` and registers under the entry-point group `q_core.methods`, by which the
command `q-quantize` finds it. A method in another package needs no change here.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from q_core.calibrate import CalibrationReport, calibrate, feed
from q_core.errors import DataError, MatchError
from q_core.observer import MSEObserver, Observer
from q_core.spec import Granularity, PerChannel, PerTensor, QuantSpec
from q_core.swap import Recipe, Rule, SwapReport, swap, swappable
from q_core.trace import fold_batchnorm, idle

FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a method returns.

    Attributes:
        model: The quantized model, in evaluation mode.
        swap: What was swapped and what stays float.
        calibration: What was seen.
    """

    model: nn.Module
    swap: SwapReport
    calibration: CalibrationReport


def edge_rules(
    model: nn.Module,
    *,
    weight: Callable[[int], Recipe | None],
    input: Callable[[int], Recipe | None],
    bits: tuple[int, int, int],
    skip: Sequence[str] = (),
) -> list[Rule]:
    """Write rules that give the first and the last layer bits of their own.

    First and last are meant in the order in which the model registers its convolution and linear layers.

    Args:
        model: The float model.
        weight: Makes the recipe of a weight from its bits.
        input: Makes the recipe of an activation from its bits.
        bits: Bits of the weights and of the activations of the inner layers, and of both in the first and last layer.
        skip: Paths of layers that stay float because they do not run, see `q_core.trace.idle`.

    Raises:
        MatchError: The model has no layer that can be swapped.
        SpecError: Bits that `weight` or `input` refuses.
    """
    paths = {path: module for path, module in swappable(model).items() if path not in skip}
    weighted = [path for path, module in paths.items() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if not weighted:
        raise MatchError(f"a {type(model).__name__} has no convolution or linear layer that can be quantized")
    inner_weight, inner_input, edge = bits
    # Made even where no rule needs them, so that bits are refused whatever the number of layers.
    inner = Rule(".*", weight(inner_weight), input(inner_input))
    weight(edge), input(edge)
    edges = dict.fromkeys([weighted[0], weighted[-1]])
    rules = [Rule("|".join(map(re.escape, edges)), weight(max(edge, inner_weight)), input(max(edge, inner_input)))]
    if skip:
        rules.insert(0, Rule("|".join(map(re.escape, skip)), reason="the first batch does not call it"))
    return [*rules, inner] if len(paths) > len(edges) else rules


def nearest(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    edge_bits: int = 8,
    observer: Callable[..., Observer] = MSEObserver,
    weight_observer: Callable[..., Observer] | None = None,
    weight_granularity: Granularity = PerChannel(0),
    progress: bool = True,
    **calibration: Any,
) -> Quantized:
    """Quantize a model by rounding to the nearest level.

    Folds batch norms, gives weights a symmetric signed grid and layer inputs an unsigned grid with a zero point per
    tensor, and calibrates. 32 bits mean float. Layers that the first batch does not call stay float, and the
    report says so.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the layer inputs, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer, the convention of the low-bit literature.
        observer: Makes the observers of activations.
        weight_observer: Makes the observers of weights; `observer` when None.
        weight_granularity: Which weights share a scale.
        progress: Whether to show a progress bar.
        **calibration: Further options of `calibrate`, such as `on_nonfinite` and `on_reuse`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There is no batch.
        SpecError: Bits that are neither 1 to 8 nor 32.
        StateError: As `calibrate` and `fold_batchnorm`.

    Source:
        Jacob et al. 2018, arXiv:1712.05877; 8-bit first and last layer as in Li et al. 2021 (BRECQ), section 4.
    """
    example, batches = first_batch(batches)
    folded = fold_batchnorm(model, example).eval()

    def weight_recipe(bits: int) -> Recipe | None:
        spec = partial(QuantSpec.signed, granularity=weight_granularity)
        return None if bits == FLOAT_BITS else Recipe(spec(bits), observer=weight_observer or observer)

    def input_recipe(bits: int) -> Recipe | None:
        return (
            None if bits == FLOAT_BITS else Recipe(QuantSpec.unsigned(bits, granularity=PerTensor()), observer=observer)
        )

    bits = (weight_bits, activation_bits, edge_bits)
    rules = edge_rules(folded, weight=weight_recipe, input=input_recipe, bits=bits, skip=idle(folded, example))
    twin, report = swap(folded, rules)
    if not report.swapped:  # all bits are 32
        return Quantized(twin, report, CalibrationReport(0, (), {}, (), {}))
    return Quantized(twin, report, calibrate(twin, batches, progress=progress, **calibration))


def first_batch(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Look at the input of the first batch without losing it.

    Returns:
        The input of the first batch, as `fold_batchnorm` takes it, and an iterable over all batches.

    Raises:
        DataError: There is no batch, or one that `calibrate` would not understand.
    """
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError("the calibration data holds no batch: give at least one") from None
    return feed(_input, first), itertools.chain([first], iterator) if iterator is batches else batches


def _input(*inputs: Any, **named: Any) -> Any:
    """Return what a model is called with, as an example for `fold_batchnorm`."""
    return named or (inputs[0] if isinstance(inputs[0], Tensor) else inputs)
