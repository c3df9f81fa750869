"""Each published method as a short alias: two parts, one for weights and one for activations.

Every alias takes other parts in their place, and all of them go through `q_nulsq.preparation.prepare`.

Methods that normalise weights (DoReFa and PACT, APoT, LCQ, N2UQ) change the size of what a layer returns, and rely on a
batch norm behind it. Estimate the batch norms anew with `torch.optim.swa_utils.update_bn` before such a model is
judged without training.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from q_core.grid import UniformGrid
from q_core.methods import Quantized
from q_core.observer import MinMaxObserver, MSEObserver
from q_core.rounding import NearestTowardZero
from q_core.spec import PerChannel
from q_nulsq.calibration import (
    LloydMaxObserver,
    LsqObserver,
    MidRiseMSEObserver,
    ThreeSigmaObserver,
)
from q_nulsq.grid import StepGrid
from q_nulsq.optim import ByFeatures
from q_nulsq.peers.apot import ApotGrid
from q_nulsq.peers.dorefa import DorefaGrid, TanhNormalization, dorefa_activation
from q_nulsq.peers.lcq import LcqGrid
from q_nulsq.peers.lq_nets import LqNetsGrid
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.peers.n2uq import N2uqGrid, N2uqWeightGrid
from q_nulsq.peers.normalization import MeanMagnitude, WeightNormalization
from q_nulsq.peers.pact import PactGrid
from q_nulsq.peers.uniq import UniqGrid
from q_nulsq.preparation import Part, narrow, prepare, shifted


def _by_tanh(bits: int) -> nn.Module:
    return TanhNormalization()


def _by_deviation(bits: int) -> nn.Module:
    return WeightNormalization()


LSQ = Part(partial(UniformGrid.from_range, learnable=True))
"""Equal steps with a learned scale, from the best for normal data."""

LSQ_PUBLISHED = dataclasses.replace(LSQ, observer=LsqObserver)
"""The same from the start of the paper."""

NULSQ = Part(StepGrid.from_range, rounding=NearestTowardZero)
"""Every step learned, from equal ones."""

LLOYD_MAX = dataclasses.replace(NULSQ, observer=LloydMaxObserver)
"""Every step learned, from those that suit the data best."""

DOREFA_WEIGHT = Part(DorefaGrid.from_range, MinMaxObserver, transform=_by_tanh)
"""Weights through tanh, which PACT shares."""

NORMALIZED_CLIP = 3.0
"""Where APoT and LCQ start to clip normalised weights."""

ACTIVATION_CLIP = 8.0
"""Where APoT and LCQ start to clip activations on CIFAR; on ImageNet APoT starts at 6."""


def nulsq_a(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Activations on learned steps, weights on equal ones; arguments as `prepare`.

    Source:
        Gongyo et al. 2024 (nuLSQ), ACCV; supplement, section C, for the start from the best equal steps.
    """
    parts: dict[str, Any] = {"weight": LSQ, "activation": NULSQ} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def nulsq_w(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Weights on learned steps, activations on equal ones; arguments as `prepare`.

    Source:
        Gongyo et al. 2024 (nuLSQ), ACCV; supplement, section C, for the start from the best equal steps.
    """
    parts: dict[str, Any] = {"weight": NULSQ, "activation": LSQ} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def nulsq_wa(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Weights and activations on learned steps; arguments as `prepare`.

    Source:
        Gongyo et al. 2024 (nuLSQ), ACCV; supplement, section C, for the start from the best equal steps.
    """
    parts: dict[str, Any] = {"weight": NULSQ, "activation": NULSQ} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def lsq(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    r"""Equal steps with a learned scale for both; arguments as `prepare`.

    The gradient of the scale is multiplied by $1/\sqrt{N Q_p}$ with N the weights, or the features, of a layer.

    Source:
        Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2.
    """
    parts: dict[str, Any] = {
        "weight": LSQ_PUBLISHED,
        "activation": LSQ_PUBLISHED,
        "gradient_scale": ByFeatures(),
    } | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def lsq_plus(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Activations with a learned offset, weights as LSQ from three standard deviations; arguments as `prepare`.

    Source:
        Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576; activations start from the least squared error.
    """
    fit = Part(LsqPlusGrid.from_range, partial(MSEObserver, p=2.0), codes=shifted)
    three = dataclasses.replace(LSQ, observer=ThreeSigmaObserver)
    parts: dict[str, Any] = {"weight": three, "activation": fit, "gradient_scale": ByFeatures()} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def pact(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Activations clipped at a learned level, weights as DoReFa; arguments as `prepare`.

    The level starts where equal steps are best, not at a constant. Negative activations are quantized as by LSQ.

    Source:
        Choi et al. 2018 (PACT), arXiv:1805.06085.
    """
    parts: dict[str, Any] = {"weight": DOREFA_WEIGHT, "activation": Part(PactGrid.from_range, negative=LSQ)} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def dorefa(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Activations clipped to [0, 1], weights through tanh, nothing learned in a grid; arguments as `prepare`.

    Negative activations are quantized as by LSQ.

    Source:
        Zhou et al. 2016 (DoReFa-Net), arXiv:1606.06160.
    """
    parts: dict[str, Any] = {
        "weight": DOREFA_WEIGHT,
        "activation": Part(dorefa_activation, negative=LSQ),
    } | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def apot(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Sums of powers of two with a learned clip for both, weights normalised; arguments as `prepare`.

    Source:
        Li et al. 2020 (APoT), arXiv:1909.13144; clips start at 3 and 8 as in the public code for CIFAR.
    """
    clip = {"weight": NORMALIZED_CLIP, "activation": ACTIVATION_CLIP}
    parts: dict[str, Any] = {
        side: Part(partial(ApotGrid.from_range, clip=at), codes=narrow) for side, at in clip.items()
    }
    parts["weight"] = dataclasses.replace(parts["weight"], transform=_by_deviation)
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **(parts | options))


def lcq(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Equal codes behind a learned compressor for both, weights normalised; arguments as `prepare`.

    Source:
        Yamamoto 2021 (LCQ), CVPR; clips start at 3 and 8, compressors as the identity.
    """
    clip = {"weight": NORMALIZED_CLIP, "activation": ACTIVATION_CLIP}
    parts: dict[str, Any] = {
        side: Part(partial(LcqGrid.from_range, clip=at), codes=narrow) for side, at in clip.items()
    }
    parts["weight"] = dataclasses.replace(parts["weight"], transform=_by_deviation)
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **(parts | options))


def lq_nets(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Levels that are sums of numbers fitted to the data, per channel for weights; arguments as `prepare`.

    The basis starts where equal steps are best.

    Source:
        Zhang et al. 2018 (LQ-Nets), ECCV.
    """
    kernels = Part(LqNetsGrid.from_range, MidRiseMSEObserver, granularity=PerChannel(0))
    parts: dict[str, Any] = {"weight": kernels, "activation": Part(LqNetsGrid.from_range)} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def uniq(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Weights on equal steps without a zero, activations as LSQ; arguments as `prepare`.

    Source:
        Pham et al. 2021 (UniQ), IEEE Access 9: both start from the best equal steps for normal data.
    """
    parts: dict[str, Any] = {"weight": Part(UniqGrid.from_range, MidRiseMSEObserver), "activation": LSQ} | options
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **parts)


def n2uq(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 4, activation_bits: int = 4, **options: Any
) -> Quantized:
    """Activations with learned thresholds and equally spaced levels, weights normalised; arguments as `prepare`.

    Negative activations are quantized as by LSQ.

    Source:
        Liu et al. 2022 (N2UQ), CVPR, arXiv:2111.14826.
    """
    inputs = Part(N2uqGrid.from_range, rounding=NearestTowardZero, negative=LSQ)
    parts: dict[str, Any] = {
        "weight": Part(N2uqWeightGrid.from_range, MinMaxObserver, transform=MeanMagnitude),
        "activation": inputs,
    }
    return prepare(model, batches, weight_bits=weight_bits, activation_bits=activation_bits, **(parts | options))
