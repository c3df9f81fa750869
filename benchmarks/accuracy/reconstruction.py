"""Reconstruction without labels: nearest, A-rounding, AdaRound, BRECQ, QDrop and every form of AQuant, side by side.

    nox -s accuracy -- --data DIR --suite reconstruction [--iterations N] [--only TEXT] [--resume]

Every method sees the same 1,024 training images of a seed, without labels, one in eight of them held out to judge
units, and takes the same number of steps for each unit. First and last layer have 8 bits. What is evaluated on all
10,000 test images is the quantized model. Where activations are quantized is part of every row: a method at another
placement is another method. Rows are appended to `benchmarks/results/accuracy/reconstruction.jsonl`; the tables in the
documentation are generated from that file.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from torch import Tensor, nn

from networks import NETWORKS, Pretrained, correct
from q_aquant import (
    ActivationScales,
    Plan,
    WeightRounding,
    a_rounding,
    adaround,
    aquant,
    aquant_closed_form,
    brecq,
    qdrop,
    rounding,
)
from q_aquant.forms import ChannelBorder, ElementBorder, WindowBorder
from q_aquant.methods import one_stage
from q_aquant.placement import InputPlacement, OutputPlacement
from q_aquant.plan import pace
from q_aquant.setup import Bits
from q_core import bits_per_weight, pack
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256
from q_core.methods import Quantized

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "accuracy" / "reconstruction.jsonl"
CALIBRATION_IMAGES, EDGE_BITS, BATCH, ITERATIONS = 1024, 8, 128, 500
Method = Callable[..., Quantized]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table for each number of bits.

    Attributes:
        name: What it is called.
        method: Makes the quantized model.
        placement: Where activations are quantized.
        learns: Whether it takes steps.
        views: How often each image that teaches comes, the further times cropped and flipped.
    """

    name: str
    method: Method
    placement: str
    learns: bool = True
    views: int = 1

    def fits(self, bits: tuple[int, int]) -> bool:
        """Whether it is worth a row: A-rounding is about activations alone, the others need something to learn."""
        if self.views > 1:
            return bits == (2, 2)
        return bits[0] == 32 if self.name == "A-rounding" else bits[0] < 32 or self.name not in WEIGHTS_ONLY


WEIGHTS_ONLY = ("AdaRound",)


def without_borders(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int, activation_bits: int, edge_bits: int, **options: Any
) -> Quantized:
    """AQuant's recipe, placement and learning rates, but nearest rounding: what its borders are to be compared with."""
    iterations = options.pop("iterations")
    learners = (WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0)), ActivationScales())
    plan = Plan(learners, mixing=0.5, iterations=iterations, pace=pace(iterations))
    bits = Bits(weight_bits, activation_bits, edge_bits)
    return one_stage(model, batches, bits, plan, InputPlacement(), **options)


VARIANTS = (
    Variant("nearest", rounding, "input", learns=False),
    Variant("A-rounding", a_rounding, "input", learns=False),
    Variant("AdaRound", adaround, "output"),
    Variant("BRECQ", brecq, "output"),
    Variant("QDrop", partial(qdrop, placement=OutputPlacement()), "output"),
    Variant("QDrop at inputs", partial(qdrop, placement=InputPlacement()), "input"),
    Variant("AQuant without borders", without_borders, "input"),
    Variant("AQuant, closed form", aquant_closed_form, "input", learns=False),
    Variant("AQuant, linear", partial(aquant, form=ElementBorder(degree=1)), "input"),
    Variant("AQuant, quadratic", partial(aquant, form=ElementBorder()), "input"),
    Variant("AQuant, fused", partial(aquant, form=WindowBorder()), "input"),
    Variant("AQuant, position-shared", partial(aquant, form=ChannelBorder()), "input"),
    # What helped of what came after AQuant, see reconstruction_past.py, and the same for those it is compared with.
    Variant("QDrop at inputs, four views", partial(qdrop, placement=InputPlacement()), "input", views=4),
    Variant("AQuant without borders, four views", without_borders, "input", views=4),
    Variant("AQuant, quadratic, four views", partial(aquant, form=ElementBorder()), "input", views=4),
)
MAIN = [
    *(("cifar10-resnet20", bits, VARIANTS, (0, 1, 2)) for bits in ((2, 2), (3, 3), (32, 2))),
]
BEST = (
    "nearest",
    "QDrop",
    "QDrop at inputs",
    "AQuant without borders",
    "AQuant, quadratic",
    "AQuant, position-shared",
)
FURTHER = [
    *(("cifar10-resnet20", bits, VARIANTS, (0,)) for bits in ((4, 4), (2, 4), (32, 4))),
    *((network, (2, 2), VARIANTS, (0, 1, 2)) for network in ("cifar100-resnet20v", "cifar10-resnet56")),
]


def cells() -> Iterator[tuple[str, tuple[int, int], Variant, int]]:
    """List the cells, the first seed of everything before the second of anything."""
    for seed in (0, 1, 2):
        for network, bits, variants, seeds in [*MAIN, *FURTHER]:
            for variant in variants if seed in seeds else ():
                if variant.fits(bits) and ((network == "cifar10-resnet20" and bits in _MAIN) or variant.name in BEST):
                    yield network, bits, variant, seed


_MAIN = {bits for _, bits, _, _ in MAIN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="steps for each unit; 20000 as published")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--bits", help="only these, such as W2A2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="leave out cells whose row is in the results already")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    arguments = parser.parse_args()
    done = recorded(arguments.out) if arguments.resume else set()
    sessions: dict[str, Session] = {}
    for network, bits, variant, seed in cells():
        name = f"W{bits[0]}A{bits[1]}"
        wanted = network in arguments.networks and arguments.only in variant.name and seed in arguments.seeds
        if not wanted or arguments.bits not in (None, name):
            continue
        if network not in sessions:
            sessions[network] = Session(network, arguments.data, arguments.out, arguments.iterations)
        if sessions[network].cell(variant, bits, seed) not in done:
            sessions[network].run(variant, bits, seed)


Cell = tuple[str, str | None, int, int, int | None, int]


def recorded(path: pathlib.Path) -> set[Cell]:
    """Cells whose row is in the results."""
    if not path.exists():
        return set()
    return {cell_of(json.loads(line)) for line in path.read_text().splitlines()}


def cell_of(row: dict[str, Any]) -> Cell:
    """Name the cell of a row."""
    settings = row["settings"]
    bits = row["weight_bits"], row["activation_bits"]
    return row["network"], settings.get("method"), *bits, settings.get("iterations"), row["seed"]


class Session:
    """One network with its images, and the rows measured on it."""

    def __init__(self, name: str, data: pathlib.Path, out: pathlib.Path, iterations: int) -> None:
        self.name, self.data, self.out, self.iterations = name, data, out, iterations
        self.network: Pretrained = NETWORKS[name]
        self.model: nn.Module = self.network.load(data, name)
        self.images, self.labels = self.network.test(data)
        self.checkpoint = state_sha256(self.model)
        hits = correct(self.model, self.images, self.labels)
        print(f"{name}: float {hits} of {len(self.labels)} correct, its source says {self.network.correct}", flush=True)
        if hits != self.network.correct:
            raise SystemExit(f"{name}: the float network does not reproduce its published accuracy")

    def cell(self, variant: Variant, bits: tuple[int, int], seed: int) -> Cell:
        return self.name, variant.name, *bits, self.iterations if variant.learns else None, seed

    def batches(self, seed: int, views: int) -> Iterable[Tensor]:
        return self.network.calibration(self.data, CALIBRATION_IMAGES, seed, views).split(BATCH)

    def run(self, variant: Variant, bits: tuple[int, int], seed: int) -> None:
        start = time.perf_counter()
        options: dict[str, Any] = {"iterations": self.iterations, "seed": seed} if variant.learns else {}
        if variant.views > 1:  # the last eighth of the images judges, as it is
            options["held_out"] = CALIBRATION_IMAGES // 8
        result = variant.method(
            self.model,
            self.batches(seed, variant.views),
            weight_bits=bits[0],
            activation_bits=bits[1],
            edge_bits=EDGE_BITS,
            progress=False,
            **options,
        )
        seconds = time.perf_counter() - start
        logs = getattr(result, "logs", ())
        settings: dict[str, Any] = {
            "method": variant.name,
            "placement": variant.placement,
            "iterations": self.iterations if variant.learns else None,
            "rates": f"published times {pace(self.iterations):.3g}" if variant.learns else None,
            "edge_bits": EDGE_BITS,
            "calibration_images": CALIBRATION_IMAGES,
            "views": variant.views,
            "held_out": CALIBRATION_IMAGES // 8 if variant.learns else 0,
            "units": len(logs),
            "units_kept": sum(log.error < log.start for log in logs),
            "seconds": round(seconds, 1),
            "bits_per_weight": round(bits_per_weight(pack(result.model)), 3) if bits[0] < 32 else 32,
        }
        hits = correct(result.model, self.images, self.labels)
        row = AccuracyRow(
            network=self.name,
            dataset=f"{self.network.dataset} test",
            method=variant.name,
            weight_bits=bits[0],
            activation_bits=bits[1],
            seed=seed,
            metric=TOP1,
            value=100 * hits / len(self.labels),
            samples=len(self.labels),
            stays_float=float_parts(result.model, result.swap),
            settings=settings,
            command=f"nox -s accuracy -- --data DIR --suite reconstruction --iterations {self.iterations}",
            checkpoint_sha256=self.checkpoint,
            **dataclasses.asdict(environment()),
        )
        append_jsonl(self.out, row)
        print(
            f"{self.name} W{bits[0]}A{bits[1]} seed {seed} {variant.name:24} {row.value:6.2f} %  "
            f"{settings['units_kept']} of {len(logs)} units kept, {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
