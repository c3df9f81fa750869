"""Time of reconstruction on a GPU: ResNet-18 at 224, every unit, QDrop and AQuant.

    python benchmarks/speed/reconstruction_gpu.py [--steps 50 250] [--full] [--out FILE]

Never run yet: there was no GPU, so nothing here is measured, and no row is in the results. Weights and images are
random: 1,024 of these, batches of 32, W4A4 with 8 bits at both ends; activations are kept on the GPU. Every method runs
twice, with few and with more steps for each unit; the difference gives the time of a step, the rest what is done once a
unit, and 20,000 steps are put together of both. `--full` takes them all instead. TF32 is on.

Goals, on an H200: QDrop at most 2 minutes, AQuant at most 4. What is missing for them: the engine launches the kernels
of a step one by one, where a CUDA graph for each unit would replay them, and the border operators run in plain torch,
a panel that fits a cache of a CPU at a time, where a GPU wants one kernel that quantizes as it multiplies.
"""

import argparse
import copy
import dataclasses
import pathlib
import sys
import time
from typing import Any

import torch
import torchvision

from q_aquant.caches import GIB, OnDevice
from q_aquant.forms import ElementBorder
from q_aquant.learners import ActivationScales, Borders, WeightRounding
from q_aquant.placement import InputPlacement, OutputPlacement
from q_aquant.plan import Plan
from q_aquant.setup import Bits, Options, Setup
from q_core.cli.rows import append_jsonl, environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed" / "reconstruction-gpu.jsonl"
IMAGES, BATCH, SIDE, SEED, PUBLISHED = 1024, 32, 224, 0, 20_000
BUDGET = 24 * GIB  # inputs of both networks, output and the next input of the first unit take 3.1 GiB each
PLANS = {
    "QDrop": (Plan((WeightRounding(), ActivationScales()), mixing=0.5, drop=0.5), OutputPlacement(), 120.0),
    "AQuant": (
        Plan(
            (WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0)), ActivationScales(), Borders()),
            form=ElementBorder(),
            mixing=0.5,
        ),
        InputPlacement(),
        240.0,
    ),
}


@dataclasses.dataclass(frozen=True)
class GpuRow:
    """One run.

    Attributes:
        benchmark: `reconstruction-gpu`.
        case: The network, and how it is reconstructed.
        ours: The method.
        seconds: Of all units with the published number of steps.
        step_seconds: Of one step of all units.
        once_seconds: Of what is done once a unit, all units together; None where all steps were taken.
        extrapolated: Whether `seconds` is put together of both.
        target: Seconds that the goal allows, on an H200.
        peak_bytes: Of the memory that torch allocated on the GPU, at most.
        commit: Commit of the source that ran.
        versions: Versions of what matters.
        device: The GPU.
        date: UTC, ISO 8601.
    """

    benchmark: str
    case: str
    ours: str
    seconds: float
    step_seconds: float
    once_seconds: float | None
    extrapolated: bool
    target: float
    peak_bytes: int
    commit: str | None
    versions: dict[str, str]
    device: str
    date: str


class Run:
    """The network on the GPU, quantized once for each method."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        model = torchvision.models.resnet18(weights=None).eval().cuda()
        self.images = torch.randn(IMAGES, 3, SIDE, SIDE, device="cuda")
        options = Options(progress=False, batch_size=BATCH, storage=OnDevice(BUDGET))
        self.setup = Setup.of(model, self.images.split(BATCH), Bits(4, 4, 8), options)

    def seconds(self, method: str, iterations: int) -> float:
        """Reconstruct all units; the grids are searched before, and not timed."""
        plan, placement, _ = PLANS[method]
        twin = self.setup.quantize(self.setup.model, placement, weights=True, activations=True)[0]
        twin = copy.deepcopy(twin)
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.setup.learn(twin, dataclasses.replace(plan, iterations=iterations), "units")
        torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(50, 250), help="for each unit, in the two runs")
    parser.add_argument("--full", action="store_true", help="take all 20,000 steps")
    parser.add_argument("--methods", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device: this benchmark is for a GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run, (few, many) = Run(), arguments.steps
    for method in arguments.methods:
        run.seconds(method, 2)  # what is compiled or tuned at first use
        torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any]
        if arguments.full:
            whole = run.seconds(method, PUBLISHED)
            found = {"seconds": whole, "step_seconds": whole / PUBLISHED, "once_seconds": None}
        else:
            short, long = run.seconds(method, few), run.seconds(method, many)
            step = (long - short) / (many - few)
            once = short - few * step
            found = {"seconds": once + PUBLISHED * step, "step_seconds": step, "once_seconds": once}
        here = environment(["torchvision"])
        row = GpuRow(
            benchmark="reconstruction-gpu",
            case=f"ResNet-18 {SIDE}x{SIDE}, W4A4, {IMAGES} images, batch {BATCH}, {PUBLISHED:,} steps a unit",
            ours=method,
            **found,
            extrapolated=not arguments.full,
            target=PLANS[method][2],
            peak_bytes=torch.cuda.max_memory_allocated(),
            commit=here.commit,
            versions=here.versions,
            device=torch.cuda.get_device_name(),
            date=here.date,
        )
        append_jsonl(arguments.out, row)
        print(f"{method}: {row.seconds:.0f} s for {PUBLISHED:,} steps a unit; {row}", flush=True)


if __name__ == "__main__":
    main()
