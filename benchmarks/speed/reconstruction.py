"""Speed of reconstruction on ResNet-20: QDrop and AQuant beside straightforward ports, and beside each other.

    nox -s bench -- --suite reconstruction [--data DIR] [--threads N ...] [--rounds N] [--only time|memory] [--out FILE]

Needs `q-kernels[cpu]` installed, because kernels are found through its entry points. All parties learn every unit of
one network from the very same grids, which are searched once and not timed: 1,024 images, batches of 32, W2A2 with 8
bits at both ends. With `--data` network and images are the real ones, else random ones of the same shapes.

What the ports are. They are written from the published recipe, in operations of torch one after the other: each unit's
inputs and targets come from whole passes of both networks over the images; quantizers are compositions of elementary
operations; masks are `torch.rand_like`; weights and scales have an optimizer each. They do less than is usual where
that is to their advantage: weights and biases, which do not learn, ask for no gradient, and nothing is ever judged on
held-out images, which ours does ten times a unit. The port of AQuant unfolds every input and quantizes the columns.

What is measured. Every party runs twice, with few and with more steps for each unit. The difference is the time of
steps, the rest that of what is done once a unit: passes over the images, and looks. Totals for other numbers of steps
are put together of both and say so. A row holds the medians over rounds; its ratio is the ratio of the medians, and its
spread the smallest and largest ratio of one round. Nothing is timed before a port was found to start from our outputs,
and to come as far in as many steps. Memory is what a whole run adds to the resident memory of a fresh process.

Timings of a busy machine are worthless: leave it alone meanwhile.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any, NoReturn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar import resnet20
from q_aquant import ops
from q_aquant.forms import ChannelBorder, ElementBorder, Form, WindowBorder
from q_aquant.learners import ActivationScales, Borders, WeightRounding
from q_aquant.placement import InputPlacement, OutputPlacement
from q_aquant.plan import Plan, pace
from q_aquant.setup import Bits, Options, Setup
from q_core.cli.rows import append_jsonl, environment
from q_core.layers import QuantConv2d
from q_core.quantizer import Quantizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed" / "reconstruction.jsonl"
NETWORK, IMAGES, FEW_IMAGES, BATCH, SEED = "cifar10-resnet20", 1024, 64, 32, 0
BITS = Bits(2, 2, 8)
STEPS, ROUNDS, CHECKED = (10, 50), 3, 60
PUBLISHED, OURS_ON_CPU = 20_000, 500  # steps for each unit: of the papers, and of our tables of accuracy
LEARNED = 0.3  # the last part of the steps, whose average loss is compared
APART = 1.1  # so far the average over units of the ratios of the losses may be from 1: masks and batches differ

QDROP, QDROP_INPUT = "QDrop at outputs", "QDrop at inputs"
PORT, PORT_INPUT, PORT_AQUANT = "port of QDrop at outputs", "port of QDrop at inputs", "unfolding port of AQuant"
ELEMENT, WINDOW, CHANNEL = "AQuant", "AQuant, fused", "AQuant, position-shared"
FORMS: dict[str, Form] = {ELEMENT: ElementBorder(), WINDOW: WindowBorder(), CHANNEL: ChannelBorder()}
OURS = (QDROP, QDROP_INPUT, *FORMS)
PORTS = (PORT, PORT_INPUT, PORT_AQUANT)
SAME = {PORT: QDROP, PORT_INPUT: QDROP_INPUT, PORT_AQUANT: ELEMENT}

# Ours, the peer, and the largest ratio that the goal allows.
STEPS_COMPARED = (
    (QDROP, PORT, 1 / 2),
    (QDROP_INPUT, PORT_INPUT, 1 / 2),
    (ELEMENT, QDROP_INPUT, 4.0),
    (WINDOW, QDROP_INPUT, 2.0),
    (CHANNEL, QDROP_INPUT, 2.0),
    (ELEMENT, PORT_AQUANT, None),
    (ELEMENT, PORT_INPUT, None),
    (WINDOW, PORT_INPUT, None),
    (CHANNEL, PORT_INPUT, None),
)
RUNS_COMPARED = ((QDROP, PORT, 1 / 2), (QDROP_INPUT, PORT_INPUT, 1 / 2), (ELEMENT, PORT_AQUANT, None))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What every row has; the first fields are those of the other speed rows.

    Attributes:
        benchmark: `reconstruction-step`, `-once`, `-run` or `-memory`.
        case: The network, and how it is reconstructed.
        ours: What ran of ours.
        peer: What it is compared with; it may be another method of ours.
        ratio: Ours over the peer's; below 1 we are faster, or smaller.
        spread: Smallest and largest ratio of one round.
        target: Largest ratio that the goal allows, None where there is no goal.
        met: Whether it is met.
        extrapolated: Whether it is put together of the time of a step and that of what is done once.
        images: Which images and which network: `random`, or their name.
        threads: Threads of each party.
        commit: Commit of the source that ran.
        versions: Versions of what matters.
        device: Processor.
        date: UTC, ISO 8601.
    """

    benchmark: str
    case: str
    ours: str
    peer: str
    ratio: float
    spread: tuple[float, float]
    target: float | None
    met: bool | None
    extrapolated: bool
    images: str
    threads: int
    commit: str | None
    versions: dict[str, str]
    device: str
    date: str


@dataclasses.dataclass(frozen=True)
class TimeRow(Comparison):
    """A comparison of times, summed over all units.

    Attributes:
        ours_seconds: Median over the rounds.
        peer_seconds: Median over the rounds.
    """

    ours_seconds: float
    peer_seconds: float


@dataclasses.dataclass(frozen=True)
class MemoryRow(Comparison):
    """A comparison of peak memory.

    Attributes:
        ours_bytes: What a whole run added to the resident memory of the process at most.
        peer_bytes: Likewise.
    """

    ours_bytes: int
    peer_bytes: int


# The ports.


class PortActivation(nn.Module):
    """Quantizes to the nearest code with a step that learns; the composition as papers write it."""

    def __init__(self, quantizer: Quantizer, border: tuple[int, ...] | None = None) -> None:
        super().__init__()
        grid = quantizer.grid
        self.step = nn.Parameter(grid.scale.detach().reshape(1).clone())
        self.zero, self.low, self.high = float(grid.zero_point), grid.qmin, grid.qmax
        self.quantized = 1.0  # probability that an element is
        self.influence = 1.0
        self.coefficients = None if border is None else nn.Parameter(torch.zeros(3, *border))

    def forward(self, x: Tensor) -> Tensor:
        u = x / self.step
        if self.coefficients is None:
            codes = torch.clamp(u + (torch.round(u) - u).detach() + self.zero, self.low, self.high)
        else:
            codes = self._bordered(u) + self.zero
        levels = (codes - self.zero) * self.step
        if self.quantized < 1:
            levels = torch.where(torch.rand_like(x) < self.quantized, levels, x)
        return levels

    def _bordered(self, u: Tensor) -> Tensor:
        low, high = self.low - self.zero, self.high - self.zero
        place = (torch.clamp(u.detach(), low, high) - low) / (high - low)
        b0, b1, b2 = self.coefficients  # type: ignore[misc]
        z = b2 * place**2 + b1 * place + b0
        border = torch.clamp(0.5 + 2.5 * (torch.sigmoid(z) - 0.5), 0, 1 - 2**-20)
        moved = torch.clamp(u, low, high) - border
        rounded = moved + (torch.ceil(moved) - moved).detach()
        return torch.clamp(torch.clamp(u, low, high) * (1 - self.influence) + self.influence * rounded, low, high)


class PortWeight(nn.Module):
    """Rounds weights to nearest, softly while they learn, or as they have learned."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        grid = quantizer.grid
        self.step, self.zero = grid.scale.detach().clone(), grid.zero_point.clone()
        self.low, self.high = grid.qmin, grid.qmax
        inside = torch.clamp(weight.detach() / self.step, self.low - self.zero, self.high - self.zero)
        share = (inside - inside.floor()).clamp(max=1 - 2**-20)
        self.logit = nn.Parameter(-torch.log(1.2 / (share + 0.1) - 1))
        self.rounding = "nearest"

    def share(self) -> Tensor:
        return torch.clamp(1.2 * torch.sigmoid(self.logit) - 0.1, 0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        codes = weight / self.step
        if self.rounding == "nearest":
            codes = torch.round(codes)
        elif self.rounding == "soft":
            codes = torch.floor(codes) + self.share()
        else:
            codes = torch.floor(codes) + (self.logit >= 0)
        return (torch.clamp(codes + self.zero, self.low, self.high) - self.zero) * self.step


class UnfoldConv2d(nn.Module):
    """A convolution that quantizes the columns of its unfolded input."""

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.stride, self.padding, self.kernel = layer.stride[0], int(layer.padding[0]), layer.kernel_size  # type: ignore[arg-type]
        self.weight_quantizer = layer.weight_quantizer
        self.input_quantizer: nn.Module = PortActivation(
            layer.input_quantizer, (layer.in_channels * math.prod(layer.kernel_size), 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        columns = self.input_quantizer(F.unfold(x, self.kernel, **self.geometry))
        out = self.weight_quantizer(self.weight).flatten(1) @ columns + self.bias[:, None]
        side = (x.shape[2] + 2 * self.padding - self.kernel[0]) // self.stride + 1
        return out.unflatten(2, (side, -1))


def ported(quantized: nn.Module, borders: bool) -> nn.Module:
    """Copy a quantized network with the quantizers of the ports in the places of ours."""
    twin = copy.deepcopy(quantized)
    twin.requires_grad_(False)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Quantizer):
                weight = name == "weight_quantizer"
                setattr(module, name, PortWeight(child, module.weight) if weight else child)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            few = isinstance(child, QuantConv2d) and isinstance(child.input_quantizer, Quantizer)
            if borders and few and child.input_quantizer.grid.bits < 8:  # type: ignore[union-attr]
                setattr(module, name, UnfoldConv2d(child))  # type: ignore[arg-type]
            elif isinstance(child, Quantizer):
                setattr(module, name, PortActivation(child))
    return twin


class Reached(BaseException):
    """Ends a pass at a unit."""


def through(model: nn.Module, path: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run a network from its images to a unit, and gather what enters and leaves it."""
    entered, left = [], []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> NoReturn:
        entered.append(inputs[0])
        left.append(output)
        raise Reached

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        for batch in images.split(BATCH):
            with contextlib.suppress(Reached):
                model(batch)
    handle.remove()
    return torch.cat(entered), torch.cat(left)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Constants of a method: learning rates of weights, steps and borders; penalty, its exponent; inner drop."""

    weights: float
    steps: float
    borders: float
    penalty: float
    beta: float
    quantized: float


RECIPES = {False: Recipe(1e-3, 4e-5, 0.0, 0.01, 20.0, 0.5), True: Recipe(3e-3, 4e-5, 1e-3, 0.05, 16.0, 1.0)}


def port(model: nn.Module, twin: nn.Module, paths: Iterable[str], images: Tensor, iterations: int) -> list[float]:
    """Reconstruct unit by unit; return the average loss of the last steps of each."""
    torch.manual_seed(SEED)
    borders = any(isinstance(module, UnfoldConv2d) for module in twin.modules())
    recipe, factor = RECIPES[borders], pace(CHECKED)
    found = []
    for path in paths:
        unit = twin.get_submodule(path)
        quantized, _ = through(twin, path, images)
        original, target = through(model, path, images)
        weights = [module for module in unit.modules() if isinstance(module, PortWeight)]
        activations = [module for module in unit.modules() if isinstance(module, PortActivation)]
        for weight in weights:
            weight.rounding = "soft"
        for activation in activations:
            activation.quantized = recipe.quantized
        groups = [{"params": [weight.logit for weight in weights], "lr": recipe.weights * factor}]
        polynomials = [each.coefficients for each in activations if each.coefficients is not None]
        if polynomials:
            groups.append({"params": polynomials, "lr": recipe.borders * factor})
        first = torch.optim.Adam(groups)
        second = torch.optim.Adam([each.step for each in activations], lr=recipe.steps * factor)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(second, iterations)
        losses = []
        for iteration in range(iterations):
            over = max(0.0, (iteration / iterations - 0.2) / 0.8)
            for activation in activations:
                activation.influence = over if activation.coefficients is not None else 1.0
            rows = torch.randperm(len(images))[:BATCH]
            entering, wanted = quantized[rows], target[rows]
            mixed = torch.where(torch.rand_like(entering) < 0.5, entering, original[rows])
            first.zero_grad()
            second.zero_grad()
            loss = (unit(mixed) - wanted).abs().pow(2).sum(1).mean()
            losses.append(loss.item())
            if iteration / iterations >= 0.2:
                beta = recipe.beta + (2 - recipe.beta) * over
                for weight in weights:
                    loss = loss + recipe.penalty * (1 - ((weight.share() - 0.5).abs() * 2).pow(beta)).sum()
            loss.backward()
            first.step()
            second.step()
            falling.step()
        for weight in weights:
            weight.rounding = "hard"
        for activation in activations:
            activation.quantized = activation.influence = 1.0
        last = losses[-max(1, round(LEARNED * len(losses))) :]
        found.append(sum(last) / len(last))
    return found


# Ours, and what is measured.


class Bench:
    """One network with its images, quantized once for each placement: what every party starts from."""

    def __init__(self, data: pathlib.Path | None, count: int = IMAGES) -> None:
        if data is None:
            torch.manual_seed(SEED)
            model, self.images = resnet20().eval(), torch.randn(count, 3, 32, 32)
            self.source = "random"
        else:
            from networks import NETWORKS

            model = NETWORKS[NETWORK].load(data, NETWORK)
            self.images = NETWORKS[NETWORK].calibration(data, count, SEED)
            self.source = NETWORK
        self.setup = Setup.of(model, self.images.split(128), BITS, Options(progress=False, batch_size=BATCH))
        self.twins = {
            place: self.setup.quantize(self.setup.model, place, weights=True, activations=True)[0]
            for place in (OutputPlacement(), InputPlacement())
        }

    def start(self, party: str) -> nn.Module:
        """Return a fresh quantized network for a party."""
        twin = self.twins[OutputPlacement() if party in (QDROP, PORT) else InputPlacement()]
        return ported(twin, party == PORT_AQUANT) if party in PORTS else copy.deepcopy(twin)

    def run(self, party: str, iterations: int) -> tuple[float, list[float]]:
        """Reconstruct all units; return the seconds it took, and the average loss of the last steps of each unit."""
        twin = self.start(party)
        began = time.perf_counter()
        if party in PORTS:
            losses = port(self.setup.model, twin, [unit.path for unit in self.setup.units], self.images, iterations)
            return time.perf_counter() - began, losses
        _, logs = self.setup.learn(twin, dataclasses.replace(plan(party), iterations=iterations), "units")
        seconds = time.perf_counter() - began
        cut = [log.path for log in logs if log.outcome.startswith("stopped")]
        if cut:
            sys.exit(f"{party}: {', '.join(cut)} stopped learning, so its time says nothing")
        last = [log.looks[-max(1, round(LEARNED * len(log.looks))) :] for log in logs]
        return seconds, [statistics.fmean(look.loss for look in looks) for looks in last]


def plan(party: str) -> Plan:
    """Return the recipe of a party of ours, with the learning rates of the checked number of steps throughout."""
    if party in FORMS:
        learners = (WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0)), ActivationScales(), Borders())
        return Plan(learners, form=FORMS[party], mixing=0.5, pace=pace(CHECKED))
    return Plan((WeightRounding(), ActivationScales()), mixing=0.5, drop=0.5, pace=pace(CHECKED))


def check(bench: Bench) -> None:
    """See that the ports start from our outputs and come as far as we do."""
    for name in PORTS:
        ours, theirs = (bench.start(party).eval() for party in (SAME[name], name))
        # A border of one half sends ties down, nearest rounding to the even code: a handful of codes.
        with torch.no_grad():
            ours_out, theirs_out = ours(bench.images[:BATCH]), theirs(bench.images[:BATCH])
        off = float((ours_out - theirs_out).norm() / ours_out.norm())
        if not off < 0.05:
            sys.exit(f"{name}: before anything learns its output is off by {off:.1e} of the length of ours")
        losses = [bench.run(party, CHECKED)[1] for party in (SAME[name], name)]
        ratios = [mine / theirs for mine, theirs in zip(*losses, strict=True)]
        apart = math.exp(statistics.fmean(map(math.log, ratios)))
        print(
            f"  {SAME[name]} | {name}: losses of the last of {CHECKED} steps, ours over theirs: {apart:.3f} on average "
            f"({min(ratios):.3f} to {max(ratios):.3f}); outputs at the start apart by {off:.1e}",
            flush=True,
        )
        if not 1 / APART < apart < APART:
            sys.exit(f"{name}: its losses are not those of ours, so nothing is timed")


class Report:
    """Turns measurements into rows, appends and prints them."""

    def __init__(self, path: pathlib.Path, source: str) -> None:
        self.path, self.source = path, source

    def times(
        self,
        kind: str,
        ours: str,
        left: list[float],
        peer: str,
        right: list[float],
        target: float | None,
        *,
        more: str = "",
        extrapolated: bool = False,
    ) -> None:
        """Append a comparison of times."""
        mine, theirs = statistics.median(left), statistics.median(right)
        ratios = [a / b for a, b in zip(left, right, strict=True)]
        shared = self._shared(f"reconstruction-{kind}", more, ours, peer, mine / theirs, ratios, target, extrapolated)
        row = TimeRow(**shared, ours_seconds=float(f"{mine:.4g}"), peer_seconds=float(f"{theirs:.4g}"))
        append_jsonl(self.path, row)
        print(
            f"  {kind}{more}: {ours} | {peer}: {mine:.3g} s against {theirs:.3g} s, ratio {mine / theirs:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}){_verdict(row)}",
            flush=True,
        )

    def memory(self, ours: str, mine: int, peer: str, theirs: int) -> None:
        """Append a comparison of peak memory."""
        shared = self._shared("reconstruction-memory", "", ours, peer, mine / theirs, [mine / theirs], None, False)
        append_jsonl(self.path, MemoryRow(**shared, ours_bytes=mine, peer_bytes=theirs))
        print(f"  memory: {ours} | {peer}: {mine / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB", flush=True)

    def _shared(
        self,
        benchmark: str,
        more: str,
        ours: str,
        peer: str,
        ratio: float,
        ratios: list[float],
        target: float | None,
        extrapolated: bool,
    ) -> dict[str, Any]:
        here = environment(["numba", "llvmlite"])
        return {
            "benchmark": benchmark,
            "case": f"ResNet-20, W2A2, {IMAGES} images, batch {BATCH}, all units{more}",
            "ours": ours,
            "peer": peer,
            "ratio": float(f"{ratio:.4g}"),
            "spread": (float(f"{min(ratios):.4g}"), float(f"{max(ratios):.4g}")),
            "target": target,
            "met": None if target is None else ratio <= target,
            "extrapolated": extrapolated,
            "images": self.source,
            "threads": torch.get_num_threads(),
            "commit": here.commit,
            "versions": here.versions,
            "device": here.device,
            "date": here.date,
        }


def _verdict(row: Comparison) -> str:
    return "" if row.target is None else f"; goal {row.target:.3g} {'met' if row.met else 'MISSED'}"


def timed(report: Report, bench: Bench, steps: tuple[int, int], rounds: int) -> None:
    """Measure a step and what is done once, of every party in turn, round after round."""
    step: dict[str, list[float]] = {party: [] for party in (*OURS, *PORTS)}
    once: dict[str, list[float]] = {party: [] for party in step}
    few, many = steps
    for _ in range(rounds):
        for party in step:
            short, long = (bench.run(party, count)[0] for count in (few, many))
            step[party].append((long - short) / (many - few))
            once[party].append(short - few * step[party][-1])
            print(f"    {party}: {step[party][-1]:.3f} s a step of all units, {once[party][-1]:.2f} s once", flush=True)
    for ours, peer, target in STEPS_COMPARED:
        report.times("step", ours, step[ours], peer, step[peer], target)
    for ours, peer, _ in RUNS_COMPARED:
        report.times("once", ours, once[ours], peer, once[peer], None)
    for count in (OURS_ON_CPU, PUBLISHED):
        runs = {
            party: [a + count * b for a, b in zip(once[party], step[party], strict=True)] for party in (*OURS, *PORTS)
        }
        for ours, peer, target in RUNS_COMPARED:
            more = f", {count:,} steps a unit"
            report.times("run", ours, runs[ours], peer, runs[peer], target, more=more, extrapolated=True)


def peak_of(party: str, data: pathlib.Path | None) -> int:
    """Measure in a fresh process what a run adds to the resident memory.

    Blocks of 64 KiB and more go back to the system as soon as they are free, so that the peak is what is alive at
    once, and not what the allocator has not given back.
    """
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, __file__, "--peak", party, "--threads", str(torch.get_num_threads())]
    command += [] if data is None else ["--data", str(data)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{party}: the process that measures its memory ended with {done.returncode}:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak(party: str, data: pathlib.Path | None) -> None:
    """Print what a run of two steps for each unit adds to the resident memory at most, in bytes; on Linux.

    A run on a few images comes first: it compiles what is compiled.
    """
    Bench(data, FEW_IMAGES).run(party, 1)
    bench = Bench(data)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the largest so far becomes the present one
    before = largest_resident()
    bench.run(party, 2)
    print(largest_resident() - before)


def largest_resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder with cifar/ and networks/; random ones without it")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of each party, one run each")
    parser.add_argument("--only", choices=["time", "memory"], help="run one part")
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="for each unit, in the two runs of a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--peak", choices=[*OURS, *PORTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads[0])
    if arguments.peak:
        peak(arguments.peak, arguments.data)
        return
    if not ops.CONV.kernels:
        sys.exit("no fast kernel of the border operators is installed: pip install -e 'packages/q-kernels[cpu]'")
    print(f"load average before the run: {os.getloadavg()[0]:.2f}", flush=True)
    bench = functools.cache(lambda: Bench(arguments.data))
    source = "random" if arguments.data is None else NETWORK
    report = Report(arguments.out, source)
    if arguments.only != "memory":
        check(bench())
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        if arguments.only != "memory":
            print(f"{threads} threads", flush=True)
            timed(report, bench(), tuple(arguments.steps), arguments.rounds)
        if arguments.only != "time":
            memory = {party: peak_of(party, arguments.data) for party in (*OURS, *PORTS)}
            compared: list[tuple[str, str]] = [(ours, peer) for peer, ours in SAME.items()]
            compared += [(form, QDROP_INPUT) for form in FORMS]
            for ours, peer in compared:
                report.memory(ours, memory[ours], peer, memory[peer])
    print(f"rows appended to {arguments.out}")


if __name__ == "__main__":
    main()
