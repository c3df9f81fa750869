"""What the field found after AQuant, one part at a time on top of it, judged on training images nobody learned from.

    nox -s accuracy -- --data DIR --suite reconstruction-past [--iterations N] [--resume]

The base is AQuant with its quadratic border at two bits. Each variant changes one part of it: where borders start, what
else learns, what a unit is fitted to, how much is a unit, how many views of the images there are, what follows the last
unit. A part that helps here, on both seeds, is worth a row among the test images; the others are on record. The judges
are the 10,000 images of the second training split; the float network has been trained on them, so their level is too
high and only differences count. Rows are appended to `benchmarks/results/accuracy/reconstruction-past.jsonl`.
"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import torch

# First of ours: it puts the folder of the next ones on the path.
from reconstruction import BATCH, CALIBRATION_IMAGES, EDGE_BITS, ITERATIONS, recorded
from torch import Tensor, nn

from images import load, normalize
from networks import NETWORKS, Pretrained, correct
from q_aquant import ActivationScales, Borders, InputPlacement, Plan, WeightRounding
from q_aquant.forms import ElementBorder
from q_aquant.learners import WeightScales
from q_aquant.losses import DivergenceLoss, PredictionDifference
from q_aquant.plan import pace
from q_aquant.setup import Bits, Options, Setup
from q_aquant.starts import ClosedForm
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "accuracy" / "reconstruction-past.jsonl"
NETWORK, JUDGES, SEEDS, BITS = "cifar10-resnet20", "cifar10-train-2", (0, 1), 2
WEIGHTS = WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0))
LEARNERS = (WEIGHTS, ActivationScales(), Borders())
STAGES = ("layer1", "layer2", "layer3")
VIEWS = 4


@dataclasses.dataclass(frozen=True)
class Variant:
    """One change to AQuant.

    Attributes:
        name: What it is called.
        changes: Fields of the plan with other values.
        blocks: What is a unit; None finds the blocks.
        views: How often each image that teaches comes, the further times cropped and flipped.
        distilled: Steps after the last unit in which the whole network learns to give the float network's classes.
        of_iterations: Steps of a unit, as a multiple of those of the base: a unit of several blocks takes as many as
            its blocks would have taken.
    """

    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    blocks: tuple[str, ...] | None = None
    views: int = 1
    distilled: int = 0
    of_iterations: int = 1


VARIANTS = (
    Variant("AQuant, quadratic"),
    Variant("borders start from the closed form", {"start": ClosedForm()}),
    Variant("scales of weights learn too", {"learners": (WeightScales(lr=1e-4), *LEARNERS)}),
    Variant("prediction difference, weight 1", {"loss": PredictionDifference(weight=1.0)}),
    Variant("prediction difference, weight 10", {"loss": PredictionDifference(weight=10.0)}),
    Variant("a stage is a unit", blocks=STAGES, of_iterations=3),
    Variant("four views of each image", views=VIEWS),
    Variant("distilled at the end", distilled=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="steps for each unit; 20000 as published")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--resume", action="store_true", help="leave out cells whose row is in the results already")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    arguments = parser.parse_args()
    done = recorded(arguments.out) if arguments.resume else set()
    session = Session(arguments.data, arguments.out, arguments.iterations)
    for seed in arguments.seeds:
        for variant in VARIANTS:
            cell = (NETWORK, variant.name, BITS, BITS, arguments.iterations, seed)
            if arguments.only in variant.name and cell not in done:
                session.run(variant, seed)


class Session:
    """The network with the images that judge."""

    def __init__(self, data: pathlib.Path, out: pathlib.Path, iterations: int) -> None:
        self.data, self.out, self.iterations = data, out, iterations
        self.network: Pretrained = NETWORKS[NETWORK]
        self.model: nn.Module = self.network.load(data, NETWORK)
        images, labels = load(data, JUDGES)
        self.images: Tensor = normalize(images, *self.network.moments)
        self.labels = torch.from_numpy(labels)
        self.checkpoint = state_sha256(self.model)

    def run(self, variant: Variant, seed: int) -> None:
        images = self.network.calibration(self.data, CALIBRATION_IMAGES, seed, variant.views)
        options = Options(seed=seed, blocks=variant.blocks, held_out=CALIBRATION_IMAGES // 8, progress=False)
        iterations = self.iterations * variant.of_iterations
        base = Plan(LEARNERS, form=ElementBorder(), mixing=0.5, iterations=iterations, pace=pace(self.iterations))
        start = time.perf_counter()
        setup = Setup.of(self.model, images.split(BATCH), Bits(BITS, BITS, EDGE_BITS), options)
        twin, report, _ = setup.quantize(setup.model, InputPlacement(), weights=True, activations=True)
        twin, logs = setup.learn(twin, dataclasses.replace(base, **variant.changes), "units")
        if variant.distilled:
            twin, more = setup.whole().learn(twin, self.distillation(variant.distilled), "network")
            logs += more
        seconds = time.perf_counter() - start
        hits = correct(twin, self.images, self.labels)
        row = AccuracyRow(
            network=NETWORK,
            dataset=JUDGES,
            method=variant.name,
            weight_bits=BITS,
            activation_bits=BITS,
            seed=seed,
            metric=TOP1,
            value=100 * hits / len(self.labels),
            samples=len(self.labels),
            stays_float=float_parts(twin, report),
            settings={
                "method": variant.name,
                "past": True,
                "placement": "input",
                "iterations": self.iterations,
                "edge_bits": EDGE_BITS,
                "calibration_images": CALIBRATION_IMAGES,
                "units": len(logs),
                "units_kept": sum(log.error < log.start for log in logs),
                "seconds": round(seconds, 1),
            },
            command=f"nox -s accuracy -- --data DIR --suite reconstruction-past --iterations {self.iterations}",
            checkpoint_sha256=self.checkpoint,
            **dataclasses.asdict(environment()),
        )
        append_jsonl(self.out, row)
        print(f"seed {seed} {variant.name:36} {row.value:6.2f} %, {seconds:.0f} s", flush=True)

    def distillation(self, factor: int) -> Plan:
        """Learn roundings, borders and scales of the whole network together, from the float network's classes."""
        weights = WeightRounding(lr=3e-3, penalty=2e-3, beta=(16.0, 2.0))
        learners = (weights, ActivationScales(), Borders(warmup=None))
        steps = factor * self.iterations
        return Plan(learners, loss=DivergenceLoss(4.0), iterations=steps, pace=pace(self.iterations) * 2 / 3)


if __name__ == "__main__":
    main()
