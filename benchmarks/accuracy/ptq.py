"""Rounding to nearest on pretrained CIFAR networks: what observer and granularity alone are worth.

    nox -s accuracy -- --data DIR [--networks NAME ...] [--resume]

Every network is quantized at five settings, with three observers, with one weight scale per tensor and per channel,
from 1,024 training images without labels, and evaluated on all 10,000 test images. Rows are appended to
`benchmarks/results/accuracy/ptq.jsonl`; the table in the documentation is generated from that file.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from torch import Tensor, nn

from networks import NETWORKS, Pretrained, correct
from q_core import (
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannel,
    PerTensor,
    bits_per_weight,
    nearest,
    pack,
)
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "accuracy" / "ptq.jsonl"
BITS = ((8, 8), (6, 6), (4, 4), (3, 3), (2, 4))
OBSERVERS = {"min-max": MinMaxObserver, "percentile": PercentileObserver, "mse": MSEObserver}
GRANULARITIES = {"tensor": PerTensor(), "channel": PerChannel(0)}
CALIBRATION_IMAGES, EDGE_BITS, SEED, BATCH = 1024, 8, 0, 128

Cell = tuple[str, int, int, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--resume", action="store_true", help="leave out cells whose row is in the results already")
    arguments = parser.parse_args()
    done = recorded() if arguments.resume else set()
    for name in arguments.networks:
        Session(name, arguments.data).run(done)


def recorded() -> set[Cell]:
    """Cells whose row is in the results."""
    if not RESULTS.exists():
        return set()
    return {cell(json.loads(line)) for line in RESULTS.read_text().splitlines()}


def cell(row: dict[str, Any]) -> Cell:
    settings = row["settings"]
    observer, granularity = settings.get("observer", ""), settings.get("weight_granularity", "")
    return row["network"], row["weight_bits"], row["activation_bits"], observer, granularity


class Session:
    """One network with its images, and the rows measured on it."""

    def __init__(self, name: str, data: pathlib.Path) -> None:
        self.name = name
        self.network: Pretrained = NETWORKS[name]
        self.model: nn.Module = self.network.load(data, name)
        self.images, self.labels = self.network.test(data)
        self.calibration: tuple[Tensor, ...] = self.network.calibration(data, CALIBRATION_IMAGES, SEED).split(BATCH)
        self.checkpoint = state_sha256(self.model)

    def run(self, done: set[Cell]) -> None:
        hits = correct(self.model, self.images, self.labels)
        print(
            f"{self.name}: float {hits} of {len(self.labels)} correct, its source says {self.network.correct}",
            flush=True,
        )
        if hits != self.network.correct:
            raise SystemExit(f"{self.name}: the float network does not reproduce its published accuracy")
        if (self.name, 32, 32, "", "") not in done:
            self.record("float", (32, 32), hits, {}, ("everything",))
        for bits, observer, granularity in itertools.product(BITS, OBSERVERS, GRANULARITIES):
            if (self.name, *bits, observer, granularity) not in done:
                self.quantize(bits, observer, granularity)

    def quantize(self, bits: tuple[int, int], observer: str, granularity: str) -> None:
        start = time.perf_counter()
        result = nearest(
            self.model,
            self.calibration,
            weight_bits=bits[0],
            activation_bits=bits[1],
            edge_bits=EDGE_BITS,
            observer=OBSERVERS[observer],
            weight_granularity=GRANULARITIES[granularity],
            progress=False,
        )
        settings: dict[str, Any] = {
            "observer": observer,
            "weight_granularity": granularity,
            "activation_granularity": "tensor",
            "edge_bits": EDGE_BITS,
            "calibration_images": CALIBRATION_IMAGES,
            "placement": "layer inputs",
            "calibration_seconds": round(time.perf_counter() - start, 2),
            "bits_per_weight": round(bits_per_weight(pack(result.model)), 3),
        }
        hits = correct(result.model, self.images, self.labels)
        self.record("nearest", bits, hits, settings, float_parts(result.model, result.swap))
        value = 100 * hits / len(self.labels)
        print(f"{self.name} W{bits[0]}A{bits[1]} {observer:10} per {granularity:7} {value:6.2f} %", flush=True)

    def record(
        self, method: str, bits: tuple[int, int], hits: int, settings: dict[str, Any], floats: tuple[str, ...]
    ) -> None:
        row = AccuracyRow(
            network=self.name,
            dataset=f"{self.network.dataset} test",
            method=method,
            weight_bits=bits[0],
            activation_bits=bits[1],
            seed=SEED,
            metric=TOP1,
            value=100 * hits / len(self.labels),
            samples=len(self.labels),
            stays_float=floats,
            settings=settings,
            command=f"nox -s accuracy -- --data DIR --networks {self.name}",
            checkpoint_sha256=self.checkpoint,
            **dataclasses.asdict(environment()),
        )
        append_jsonl(RESULTS, row)


if __name__ == "__main__":
    main()
