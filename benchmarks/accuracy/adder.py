"""Quantizing the published adder ResNet-20 without labels: every scheme, every part, on all 10,000 test images.

    nox -s accuracy -- --data DIR --suite adder [--resume]

Ranges come from 202 batches of 128 training images, cropped and flipped at random (the seed), as in the released
pipeline; means are corrected on the first 1,024 training images as they are. What is evaluated is the packed model,
which computes on integers. Rows are appended to `benchmarks/results/accuracy/adder.jsonl`; the tables in the
documentation are generated from that file.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from torch import nn

from images import load, normalize
from networks import ADDERS, correct
from q_adder import (
    ExactRange,
    InputRange,
    OneScale,
    OneSided,
    Published,
    Redistributed,
    Scheme,
    correct_means,
    redistribute,
    reestimate_batchnorm,
)
from q_adder import redistribution as parts
from q_adder.layers import AdderConv2d
from q_adder.ranges import order_statistic, released_statistic
from q_adder.refinement import search_ranges, tune_ranges
from q_core import bits_per_weight, pack
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256

NETWORK = "cifar10-adder-resnet20"
RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "accuracy" / "adder.jsonl"
ALPHA = 0.9997  # of the released code, which applies it twice
RANGE_BATCHES, BATCH, CALIBRATION_IMAGES, SEARCH_IMAGES, TUNING_IMAGES = 202, 128, 1024, 256, 512
REESTIMATION_BATCHES = 202


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table for each number of bits.

    Attributes:
        name: What it is called.
        scheme: How levels are chosen.
        bits: Bits of weights and activations.
        means: Whether means are corrected.
        search: Whether ranges are searched for.
        tune: How often the ranges of single layers are tuned by the output of the network, after a common factor; None
            leaves them alone.
        batchnorm: Whether batch norms are estimated anew.
        alpha: Fraction of inputs that is kept by the order statistic of the paper; None is the released rule.
        seeds: Of the crops and flips from which ranges come.
    """

    name: str
    scheme: Scheme
    bits: tuple[int, ...]
    means: bool = False
    search: bool = False
    tune: int | None = None
    batchnorm: bool = False
    alpha: float | None = None
    seeds: tuple[int, ...] = (0,)


ONE_SIDED = OneSided()
SEEDS = (0, 1, 2)
SWEEP = (0.9985, 0.9990, 0.9995, 1.0)  # of table 3 of the supplement
VARIANTS = (
    Variant("one-sided", ONE_SIDED, (8, 6, 5, 4, 3, 2), seeds=SEEDS),
    Variant("one-sided, means", ONE_SIDED, (8, 6, 5, 4, 3, 2), means=True, seeds=SEEDS),
    Variant("one-sided, four groups, means", OneSided(groups=4), (4, 3), means=True),
    Variant("one-sided, batch norm", ONE_SIDED, (4, 3, 2), batchnorm=True),
    Variant("one-sided, search", ONE_SIDED, (8, 6, 5, 4, 3, 2), search=True),
    Variant("one-sided, search, means", ONE_SIDED, (8, 6, 5, 4, 3, 2), means=True, search=True),
    Variant("one-sided, common factor, means", ONE_SIDED, (4, 3, 2), means=True, tune=0),
    Variant("one-sided, tuned ranges, means", ONE_SIDED, (4, 3, 2), means=True, tune=2),
    Variant("published", Published(), (8, 6, 5, 4)),
    Variant("published, batch norm", Published(), (8, 6, 5, 4, 3), batchnorm=True),
    Variant("published, means", Published(), (4, 3), means=True),
    Variant("published without clamp", Published(clamp=False), (8, 4)),
    Variant("published without clamp, batch norm", Published(clamp=False), (4,), batchnorm=True),
    Variant("one scale over weights", OneScale(), (8, 4)),
    Variant("one scale over weights, batch norm", OneScale(), (8, 4), batchnorm=True),
    Variant("one scale over inputs", OneScale(cover_weights=False), (8, 4)),
    *(Variant("one-sided, means, alpha", ONE_SIDED, (4, 3), means=True, alpha=alpha) for alpha in SWEEP),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--resume", action="store_true", help="leave out cells whose row is in the results already")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    arguments = parser.parse_args()
    session = Session(arguments.data, recorded() if arguments.resume else set())
    session.check_float()
    # The first seed of everything before the second of anything, for those who stop early.
    for seed, variant in itertools.product(SEEDS, VARIANTS):
        for bits in variant.bits if seed in variant.seeds and arguments.only in variant.name else ():
            session.run(variant, bits, seed)


Cell = tuple[str, int, float | None, int]


def recorded() -> set[Cell]:
    """Cells whose row is in the results."""
    if not RESULTS.exists():
        return set()
    rows = [row for line in RESULTS.read_text().splitlines() if (row := json.loads(line))["network"] == NETWORK]
    return {
        (row["settings"].get("variant"), row["weight_bits"], row["settings"].get("alpha"), row["seed"]) for row in rows
    }


class Session:
    """The network with its images and the ranges of its inputs, and the rows measured on it."""

    def __init__(self, data: pathlib.Path, done: set[Cell]) -> None:
        self.network, self.data, self.done = ADDERS[NETWORK], data, done
        self.model: nn.Module = self.network.load(data, NETWORK)
        self.images, self.labels = self.network.test(data)
        training = normalize(load(data, "cifar10-train-1")[0][:CALIBRATION_IMAGES], *self.network.moments)
        # As one batch, so that every layer is corrected by the means of all images.
        self.calibration = [training]
        self.checkpoint = state_sha256(self.model)

    def check_float(self) -> None:
        hits = correct(self.model, self.images, self.labels)
        print(f"{NETWORK}: float {hits} of {len(self.labels)} correct, published {self.network.correct}", flush=True)
        if hits != self.network.correct:
            raise SystemExit("the float network does not reproduce its published accuracy")
        if ("float", 32, None, 0) not in self.done:
            self.record(Variant("float", ONE_SIDED, (32,)), 32, 0, hits, {}, ("everything",))

    @functools.cache  # noqa: B019 - one session a process
    def ranges(self, alpha: float | None, seed: int) -> dict[str, InputRange]:
        """Observe the inputs of every adder layer."""
        make: Callable[[], InputRange] = (
            functools.partial(ExactRange, ALPHA, released_statistic)
            if alpha is None
            else functools.partial(ExactRange, alpha, order_statistic)
        )
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, AdderConv2d)}
        batches = self.network.augmented(self.data, RANGE_BATCHES, BATCH, seed)
        return parts.observe_inputs(self.model, batches, layers, make)

    def quantize(self, variant: Variant, bits: int, seed: int) -> Redistributed:
        result = redistribute(
            self.model,
            self.calibration,
            weight_bits=bits,
            activation_bits=bits,
            scheme=variant.scheme,
            input_range=self.ranges(variant.alpha, seed),
            mean_correction=False,
            progress=False,
        )
        if variant.search:
            search_ranges(result.model, self.model, self.calibration[0][:SEARCH_IMAGES])
        if variant.tune is not None:
            images = self.calibration[0][:TUNING_IMAGES]
            tune_ranges(result.model, self.model, images, rounds=variant.tune, progress=False)
        if variant.means:
            correct_means(result.model, self.model, self.calibration)
        if variant.batchnorm:
            batches = self.network.augmented(self.data, REESTIMATION_BATCHES, BATCH, seed + 100)
            reestimate_batchnorm(result.model, batches, REESTIMATION_BATCHES)
        return result

    def run(self, variant: Variant, bits: int, seed: int) -> None:
        if (variant.name, bits, variant.alpha, seed) in self.done:
            return
        start = time.perf_counter()
        result = self.quantize(variant, bits, seed)
        packed = pack(result.model)
        settings: dict[str, Any] = {
            "scheme": repr(variant.scheme),
            "means": variant.means,
            "search": variant.search,
            "tune": variant.tune,
            "batchnorm": REESTIMATION_BATCHES if variant.batchnorm else 0,
            "alpha": variant.alpha,
            "range_batches": RANGE_BATCHES,
            "calibration_images": CALIBRATION_IMAGES if variant.means else 0,
            "calibration_seconds": round(time.perf_counter() - start, 2),
            "bits_per_weight": round(bits_per_weight(packed), 3),
            "layers_where_groups_differ": sum(len(layer.scales) > 1 for layer in result.layers),
        }
        hits = correct(packed, self.images, self.labels)
        self.record(variant, bits, seed, hits, settings, float_parts(result.model, result.swap))
        alpha = "" if variant.alpha is None else f" {variant.alpha}"
        print(
            f"W{bits}A{bits} seed {seed} {variant.name + alpha:40} {100 * hits / len(self.labels):6.2f} %", flush=True
        )

    def record(
        self, variant: Variant, bits: int, seed: int, hits: int, settings: dict[str, Any], floats: tuple[str, ...]
    ) -> None:
        row = AccuracyRow(
            network=NETWORK,
            dataset=f"{self.network.dataset} test",
            method="float" if bits == 32 else "redistribute",
            weight_bits=bits,
            activation_bits=bits,
            seed=seed,
            metric=TOP1,
            value=100 * hits / len(self.labels),
            samples=len(self.labels),
            stays_float=floats,
            settings=settings | {"variant": variant.name},
            command="nox -s accuracy -- --data DIR --suite adder",
            checkpoint_sha256=self.checkpoint,
            **dataclasses.asdict(environment()),
        )
        append_jsonl(RESULTS, row)


if __name__ == "__main__":
    main()
