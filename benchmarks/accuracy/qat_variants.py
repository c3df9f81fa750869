"""What `qat.py` compares: every method from the same start, and what the algebra of grids allows beside them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from q_core import PerChannel
from q_core.methods import Quantized
from q_nulsq import recipes
from q_nulsq.calibration import LsqObserver
from q_nulsq.optim import ByFeatures, Unscaled
from q_nulsq.preparation import Part
from q_nulsq.progressive import DropTop, FoldTop, RescaleTop, TopStep

NETWORK = "cifar10-resnet20"
BITS, SEEDS = (2, 3, 4), (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table for each number of bits.

    Attributes:
        name: What it is called.
        method: Makes the quantized model.
        bits: Of weights and activations.
        seeds: Of images and their order.
        distill: Whether the float network teaches too.
        from_more: Policy of the top step where the first half of the steps trains a network of one bit more, whose
            steps are then merged.
        step_optimizer: Makes the optimizer of what quantizers learn.
        networks: Names of the networks.
    """

    name: str
    method: Callable[..., Quantized]
    bits: tuple[int, ...] = BITS
    seeds: tuple[int, ...] = (0,)
    distill: bool = False
    from_more: TopStep | None = None
    step_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    networks: tuple[str, ...] = (NETWORK,)


def plain_lsq(*arguments: Any, **options: Any) -> Quantized:
    """LSQ with the start and the optimizer of the others: nothing differs from nuLSQ but the steps."""
    same = {"weight": recipes.LSQ, "activation": recipes.LSQ, "gradient_scale": Unscaled()}
    return recipes.lsq(*arguments, **(same | options))


def per_channel(part: Part) -> Part:
    """One row of steps for each output channel."""
    return dataclasses.replace(part, granularity=PerChannel(0))


BOTH = (NETWORK, "cifar100-resnet20v")
SGD = partial(torch.optim.SGD, momentum=0.9)
VARIANTS = (
    Variant("LSQ", plain_lsq, seeds=SEEDS, networks=BOTH),
    Variant("nuLSQ-A", recipes.nulsq_a, seeds=SEEDS, networks=BOTH),
    Variant("nuLSQ-W", recipes.nulsq_w, seeds=SEEDS, networks=BOTH),
    Variant("nuLSQ-WA", recipes.nulsq_wa, seeds=SEEDS, networks=BOTH),
    Variant("LSQ+", recipes.lsq_plus),
    Variant("PACT", recipes.pact),
    Variant("DoReFa", recipes.dorefa),
    Variant("APoT", recipes.apot),
    Variant("LCQ", recipes.lcq),
    Variant("LQ-Nets", recipes.lq_nets),
    Variant("UniQ", recipes.uniq),
    Variant("N2UQ", recipes.n2uq),
    # What the supplement compares.
    Variant(
        "nuLSQ-A from the start of LSQ",
        partial(recipes.nulsq_a, activation=dataclasses.replace(recipes.NULSQ, observer=LsqObserver)),
    ),
    Variant(
        "nuLSQ-A, SGD on steps",
        partial(recipes.nulsq_a, gradient_scale=ByFeatures()),
        step_optimizer=SGD,
    ),
    *(
        Variant(f"nuLSQ-A from one bit more, {name}", recipes.nulsq_a, (2, 3), from_more=policy)
        for name, policy in (("top dropped", DropTop()), ("top folded", FoldTop()), ("rescaled", RescaleTop()))
    ),
    # What no paper has tried.
    Variant("nuLSQ-A from Lloyd-Max", partial(recipes.nulsq_a, activation=recipes.LLOYD_MAX)),
    Variant(
        "nuLSQ-WA from Lloyd-Max",
        partial(recipes.nulsq_wa, weight=recipes.LLOYD_MAX, activation=recipes.LLOYD_MAX),
    ),
    Variant("LSQ, weights per channel", partial(plain_lsq, weight=per_channel(recipes.LSQ))),
    Variant("nuLSQ-WA, weights per channel", partial(recipes.nulsq_wa, weight=per_channel(recipes.NULSQ))),
    Variant("LSQ, distilled", plain_lsq, distill=True),
    Variant("nuLSQ-A, distilled", recipes.nulsq_a, distill=True),
    Variant(
        "nuLSQ-WA from Lloyd-Max, weights per channel, distilled",
        partial(recipes.nulsq_wa, weight=per_channel(recipes.LLOYD_MAX), activation=recipes.LLOYD_MAX),
        distill=True,
    ),
)
