"""Speed beside the named peers, as ratios measured in one run.

    nox -s bench -- --suite quantizers [--threads N --environments DIR --only calibration|forward]

Every party runs in a process of its own, peers in an environment of their own with the versions below, with the same
network, the same images and the same number of threads. The parties are asked in turn, round after round. A row holds
the medians; its ratio is the ratio of the medians and its spread the smallest and largest ratio of one round. Rows are
appended to `benchmarks/results/speed/*.jsonl`. Timings of a busy machine are worthless: leave it alone meanwhile.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from job import BATCH, IMAGES, REPLY, SIDE

from q_core.cli.rows import append_jsonl, environment

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
PEERS = {"brevitas": "brevitas==0.13.4", "torchao": "torchao==0.18.0"}
SCRIPTS = {"brevitas": HERE / "peers" / "brevitas_ptq.py", "torchao": HERE / "peers" / "torchao_pt2e.py"}
FEW = 128  # images for Brevitas, whose search for each batch takes minutes over all of them
ROUNDS, ROUNDS_FEW, ROUNDS_FORWARD, WARMUP = 3, 2, 15, 2

Key = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One comparison.

    Attributes:
        benchmark: Name of the benchmark.
        case: What was run.
        ours_seconds: Median over the rounds.
        peer: What it is compared with.
        peer_seconds: Median over the rounds.
        ratio: `ours_seconds / peer_seconds`; below 1 we are faster.
        spread: Smallest and largest ratio of one round.
        threads: Threads of each party.
        commit: Commit of the source that ran.
        versions: Versions in our environment, and those in the peer's as `peer.name`.
        device: Processor.
        date: UTC, ISO 8601.
    """

    benchmark: str
    case: str
    ours_seconds: float
    peer: str
    peer_seconds: float
    ratio: float
    spread: tuple[float, float]
    threads: int
    commit: str | None
    versions: dict[str, str]
    device: str
    date: str


class Worker:
    """A process that times one case for each line it is sent."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.versions: dict[str, str] = self._answer()["versions"]

    def ask(self, case: str, count: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case} {count}\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(REPLY):
                answer: dict[str, Any] = json.loads(line.removeprefix(REPLY))
                return answer
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()} before it answered")


@contextmanager
def worker(python: pathlib.Path | str, script: pathlib.Path, threads: int) -> Iterator[Worker]:
    """Start a worker and wait until it is ready; end it afterwards."""
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [str(python), "-W", "ignore", str(script), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


def install(peer: str, folder: pathlib.Path) -> pathlib.Path:
    """Make the environment of a peer unless it is there, and return its Python."""
    place = folder / PEERS[peer].replace("==", "-")
    python = place / "bin" / "python"
    if not python.exists():
        print(f"installing {PEERS[peer]} in {place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *TORCH, PEERS[peer]], check=True)
    return python


class Report:
    """Turns timings into rows."""

    def __init__(self, benchmark: str, threads: int) -> None:
        self.benchmark, self.threads = benchmark, threads
        self.times: dict[Key, list[float]] = {}

    def measure(self, parties: dict[str, Worker], order: Iterable[Key], rounds: int) -> None:
        """Ask for every timing once a round."""
        keys = list(order)
        for index in range(rounds):
            for key in keys:
                party, case, count = key
                value = parties[party].ask(case, count)
                self.times.setdefault(key, []).append(value)
                if value > 1:
                    print(f"  round {index + 1}: {party} {case}, {count} images: {value:.2f} s", flush=True)

    def row(self, case: str, ours: Key, peer: str, other: Key, versions: dict[str, str]) -> None:
        """Append a row, and print it."""
        left, right = self.times[ours], self.times[other]
        ratios = [mine / theirs for mine, theirs in zip(left, right, strict=True)]
        here = environment(["torchvision"])
        row = SpeedRow(
            benchmark=self.benchmark,
            case=case,
            ours_seconds=round(statistics.median(left), 4),
            peer=peer,
            peer_seconds=round(statistics.median(right), 4),
            ratio=round(statistics.median(left) / statistics.median(right), 4),
            spread=(round(min(ratios), 4), round(max(ratios), 4)),
            threads=self.threads,
            commit=here.commit,
            versions=here.versions | {f"peer.{name}": version for name, version in versions.items()},
            device=here.device,
            date=here.date,
        )
        append_jsonl(RESULTS / f"{self.benchmark}.jsonl", row)
        low, high = row.spread
        print(
            f"{case} | {peer}: {row.ours_seconds:.3f} s against {row.peer_seconds:.3f} s, ratio {row.ratio:.3f} "
            f"({low:.3f} to {high:.3f})",
            flush=True,
        )


def calibration(threads: int, folder: pathlib.Path) -> None:
    """Calibrate beside a float forward pass over the same images, and beside the peers."""
    report = Report("calibration", threads)
    with ExitStack() as stack:
        parties = {"ours": stack.enter_context(worker(sys.executable, HERE / "calibrate.py", threads))}
        for peer in PEERS:
            parties[peer] = stack.enter_context(worker(install(peer, folder), SCRIPTS[peer], threads))
        for each in parties.values():
            each.ask("float", BATCH)
        parties["ours"].ask("w8a8", BATCH)
        parties["torchao"].ask("w8a8", BATCH)
        all_images = [
            ("ours", "float", IMAGES),
            ("ours", "w8a8", IMAGES),
            ("torchao", "w8a8", IMAGES),
            ("torchao", "float", IMAGES),
            ("ours", "w4a4", IMAGES),
            ("ours", "weights", IMAGES),
        ]
        few_images = [
            ("ours", "w8a8", FEW),
            ("brevitas", "w8a8", FEW),
            ("ours", "w4a4", FEW),
            ("brevitas", "w4a4", FEW),
            ("brevitas", "w8a8-percentile", FEW),
            ("brevitas", "float", FEW),
        ]
        report.measure(parties, all_images, ROUNDS)
        report.measure(parties, few_images, ROUNDS_FEW)
        versions = {name: each.versions for name, each in parties.items()}
    for case in ("w8a8", "w4a4"):
        report.row(job(case, IMAGES), ("ours", case, IMAGES), "float forward", ("ours", "float", IMAGES), {})
    report.row(
        job("w8a8", IMAGES),
        ("ours", "w8a8", IMAGES),
        "torchao PT2E, x86 quantizer, histogram observers, min-max weights",
        ("torchao", "w8a8", IMAGES),
        versions["torchao"],
    )
    for case, peer in (("w8a8", "w8a8"), ("w4a4", "w4a4"), ("w8a8", "w8a8-percentile")):
        statistic = "percentile activations, MSE weights" if "percentile" in peer else "MSE activations and weights"
        report.row(
            job(case, FEW),
            ("ours", case, FEW),
            f"Brevitas layerwise, {statistic}",
            ("brevitas", peer, FEW),
            versions["brevitas"],
        )
    breakdown(report)


def job(case: str, count: int) -> str:
    return f"ResNet-18 {SIDE}x{SIDE}, {case.upper()}, MSE observers, {count} images, batch {BATCH}"


def breakdown(report: Report) -> None:
    """Print where the time goes; no rows, because there is no peer to these."""

    def median(*key: Any) -> float:
        return statistics.median(report.times[key])

    plain, weights = median("ours", "float", IMAGES), median("ours", "weights", IMAGES)
    print(f"float forward {1e3 * plain / IMAGES:.2f} ms an image, weights {weights:.2f} s once")
    for case in ("w8a8", "w4a4"):
        rest = median("ours", case, IMAGES) - weights - plain
        print(f"{case}: observing activations {1e3 * rest / IMAGES:.2f} ms an image")
    for peer, count in (("torchao", IMAGES), ("brevitas", FEW)):
        own = median(peer, "w8a8", count) / median(peer, "float", count)
        print(f"{peer}: w8a8 takes {own:.2f} times its own float forward")


def forward(threads: int) -> None:
    """Run the calibrated network beside the float one, eager and compiled."""
    report = Report("forward", threads)
    cases = ("float", "quantized", "float-compiled", "quantized-compiled")
    with worker(sys.executable, HERE / "forward.py", threads) as ours:
        for case in cases * WARMUP:
            ours.ask(case, BATCH)
        report.measure({"ours": ours}, [("ours", case, BATCH) for case in cases], ROUNDS_FORWARD)
    for suffix, name in (("", "eager"), ("-compiled", "torch.compile")):
        report.row(
            f"ResNet-18 {SIDE}x{SIDE}, W4A4 fake-quantized forward, {name}, batch {BATCH}",
            ("ours", f"quantized{suffix}", BATCH),
            f"float forward, {name}",
            ("ours", f"float{suffix}", BATCH),
            {},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of each party")
    parser.add_argument("--environments", type=pathlib.Path, default=ROOT / ".cache" / "bench", help="for the peers")
    parser.add_argument("--only", choices=["calibration", "forward"], help="run one benchmark")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"load average before the run: {os.getloadavg()[0]:.2f}", flush=True)
    if arguments.only != "calibration":
        forward(arguments.threads)
    if arguments.only != "forward":
        calibration(arguments.threads, arguments.environments)
    print(f"rows appended to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
