"""The published methods, each a short alias over the parts.

They differ in the unit (layer or block), in what learns (rounding of weights, scales and borders of activations), in
where activations are quantized, in the input a unit sees and in the loss. Every default is the published constant;
where the paper and its released code differ, the docstring says which is taken. With fewer steps than published the
learning rates grow, see `q_aquant.plan.pace`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from q_aquant.forms import AdjustedForm, ElementBorder, Form
from q_aquant.learners import ActivationScales, Borders, WeightRounding
from q_aquant.losses import PowerLoss
from q_aquant.placement import InputPlacement, OutputPlacement, Placement
from q_aquant.plan import Plan, UnitLog, pace
from q_aquant.reconstruct import finished, with_borders
from q_aquant.setup import Bits, Options, Setup, with_options
from q_aquant.starts import ClosedForm
from q_aquant.units import Units
from q_core.methods import FLOAT_BITS, Quantized
from q_core.swap import SwapReport


@dataclasses.dataclass(frozen=True)
class Reconstructed(Quantized):
    """What a method of reconstruction returns.

    Attributes:
        units: What was reconstructed at once.
        placement: Where activations are quantized.
        logs: What became of each unit, one entry for each stage of the method.
    """

    units: Units
    placement: Placement
    logs: tuple[UnitLog, ...]


def one_stage(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Bits,
    plan: Plan,
    placement: Placement,
    **options: Any,
) -> Reconstructed:
    """Quantize weights and activations, then learn both together."""
    setup = Setup.of(model, batches, bits, Options(**options))
    twin, report, calibration = setup.quantize(setup.model, placement, weights=True, activations=True)
    twin, logs = setup.learn(twin, plan, "units")
    return Reconstructed(twin, report, calibration, setup.units, placement, logs)


def two_stages(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Bits,
    plans: tuple[Plan, Plan | None],
    *,
    layerwise: bool = False,
    **options: Any,
) -> Reconstructed:
    """Quantize and learn weights while activations are float, then quantize activations, and learn them if asked to."""
    setup = Setup.of(model, batches, bits, Options(**options), layerwise=layerwise)
    placement = OutputPlacement()
    twin, weights, _ = setup.quantize(setup.model, placement, weights=True, activations=False)
    twin, logs = setup.learn(twin, plans[0], "weights")
    twin, report, calibration = setup.quantize(twin, placement, weights=False, activations=True)
    if plans[1] is not None:
        twin, more = setup.learn(twin, plans[1], "activations")
        logs += more
    return Reconstructed(finished(twin), _joined(weights, report), calibration, setup.units, placement, logs)


@with_options
def rounding(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    edge_bits: int = 8,
    placement: Placement = InputPlacement(),
    **options: Any,
) -> Reconstructed:
    """Round weights and activations to nearest, on the grids that the other methods start from.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the activations, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer.
        placement: Where activations are quantized.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There is no image.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        Grids as Wei et al. 2022 (QDrop), arXiv:2203.05740, releases them: weights per channel with a zero point.
    """
    setup = Setup.of(model, batches, Bits(weight_bits, activation_bits, edge_bits), Options(**options))
    twin, report, calibration = setup.quantize(setup.model, placement, weights=True, activations=True)
    return Reconstructed(finished(twin), report, calibration, setup.units, placement, ())


@with_options
def adaround(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    edge_bits: int = 8,
    iterations: int = 20_000,
    **options: Any,
) -> Reconstructed:
    """Learn the rounding of weights layer by layer, then round activations to nearest.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the activations, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer.
        iterations: Steps for each layer.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There are fewer images than a batch.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        Nagel et al. 2020 (AdaRound), arXiv:2004.10568; exponents and input as BRECQ releases them.
    """
    plan = Plan((WeightRounding(),), iterations=iterations, pace=pace(iterations))
    bits = Bits(weight_bits, activation_bits, edge_bits)
    return two_stages(model, batches, bits, (plan, None), layerwise=True, **options)


@with_options
def brecq(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    edge_bits: int = 8,
    iterations: int = 20_000,
    activation_iterations: int | None = None,
    **options: Any,
) -> Reconstructed:
    """Learn the rounding of weights block by block with float activations, then the scales of activations.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the activations, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer.
        iterations: Steps for the weights of each block.
        activation_iterations: Steps for the scales of each block; a quarter of `iterations`, as published, when None.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There are fewer images than a batch.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        Li et al. 2021 (BRECQ), arXiv:2102.05426; squared error instead of the Fisher weight, as released.
    """
    weights = Plan((WeightRounding(),), iterations=iterations, pace=pace(iterations))
    steps = max(1, iterations // 4) if activation_iterations is None else activation_iterations
    scales = Plan((ActivationScales(lr=4e-4),), loss=PowerLoss(2.4), iterations=steps, pace=pace(steps, 5_000))
    bits = Bits(weight_bits, activation_bits, edge_bits)
    return two_stages(model, batches, bits, (weights, scales), **options)


@with_options
def qdrop(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    edge_bits: int = 8,
    iterations: int = 20_000,
    placement: Placement = OutputPlacement(),
    **options: Any,
) -> Reconstructed:
    """Learn weights and scales together, while half of the activations drop their quantization at random.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the activations, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer.
        iterations: Steps for each block.
        placement: Where activations are quantized; at outputs, as published, unless given.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There are fewer images than a batch.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        Wei et al. 2022 (QDrop), arXiv:2203.05740; learning rates and schedule as released.
    """
    learners = (WeightRounding(), ActivationScales())
    plan = Plan(learners, mixing=0.5, drop=0.5, iterations=iterations, pace=pace(iterations))
    bits = Bits(weight_bits, activation_bits, edge_bits)
    return one_stage(model, batches, bits, plan, placement, **options)


@with_options
def aquant(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    edge_bits: int = 8,
    iterations: int = 20_000,
    form: Form = ElementBorder(),
    **options: Any,
) -> Reconstructed:
    """Learn weights, scales and rounding borders together; every layer quantizes its own input.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the activations, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer; with 8 they round to nearest.
        iterations: Steps for each block.
        form: Which elements share a border; by default every element has a quadratic one of its own.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There are fewer images than a batch.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, sections 4 and 5 and appendix B and C.
    """
    weights = WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0))
    learners = (weights, ActivationScales(), Borders())
    plan = Plan(learners, form=form, mixing=0.5, iterations=iterations, pace=pace(iterations))
    bits = Bits(weight_bits, activation_bits, edge_bits)
    return one_stage(model, batches, bits, plan, InputPlacement(), **options)


@with_options
def aquant_closed_form(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    edge_bits: int = 8,
    form: Form = ElementBorder(),
    **options: Any,
) -> Reconstructed:
    """Round weights to nearest and activations by the borders of the formula; no step of gradient descent is taken.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32.
        activation_bits: Bits of the activations, 1 to 8, or 32.
        edge_bits: Least bits of the first and the last layer; with 8 they round to nearest.
        form: Which elements share a border; by default every element has a quadratic one of its own.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There are fewer images than a batch.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        See `q_aquant.starts.ClosedForm`.
    """
    plan = Plan((), form=form, start=ClosedForm())
    return one_stage(model, batches, Bits(weight_bits, activation_bits, edge_bits), plan, InputPlacement(), **options)


@with_options
def a_rounding(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = FLOAT_BITS,
    activation_bits: int = 4,
    edge_bits: int = 8,
    **options: Any,
) -> Reconstructed:
    """Round activations so that the errors in every window cancel; nothing is learned.

    Args:
        model: The float model. Not changed.
        batches: Calibration data, as `q_core.calibrate` takes it; labels are not used.
        weight_bits: Bits of the weights, 1 to 8, or 32 as published.
        activation_bits: Bits of the activations, 1 to 8.
        edge_bits: Least bits of the first and the last layer.
        **options: See `q_aquant.setup.Options`.

    Returns:
        The quantized model and the reports.

    Raises:
        DataError: There is no image.
        SpecError: Bits that are neither 1 to 8 nor 32.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, section 3 and appendix A.
    """
    result = rounding(
        model,
        batches,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        placement=InputPlacement(),
        **options,
    )
    return dataclasses.replace(result, model=with_borders(result.model, AdjustedForm()))


def _joined(weights: SwapReport, activations: SwapReport) -> SwapReport:
    """Put the bits of weights and of activations of a layer into one line."""
    inputs = {layer.path: layer.input for layer in activations.swapped}
    both = [dataclasses.replace(layer, input=inputs.get(layer.path)) for layer in weights.swapped]
    named = {layer.path for layer in weights.swapped}
    only = [layer for layer in activations.swapped if layer.path not in named]
    kept = [layer for layer in weights.stays_float if layer.path not in {other.path for other in only}]
    return SwapReport((*both, *only), tuple(kept))
