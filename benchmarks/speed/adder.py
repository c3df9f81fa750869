"""Speed of adder layers beside what one would write in plain torch, as ratios measured in one run.

    nox -s bench -- --suite adder [--threads N ...] [--only layers|step] [--rounds N] [--out FILE]

Needs `q-kernels[cpu]` installed, because kernels are found through its entry points. All parties run in this process on
the same tensors and threads, in turn, round after round, after each was compared with the meaning of its operator on
these very tensors. A row holds the medians; its ratio is the ratio of the medians, and its spread the smallest and
largest ratio of one round. Memory is measured in a fresh process for each party.

What the parties are given:

- `torch.cdist` gets windows that are unfolded already, and only the call is timed; a second party unfolds them.
- *broadcast* is the layer as its formula reads, `-(windows - weight).abs().sum()`, the form of the released code. Where
  the cube of differences would take more than 1 GiB it is built for a part of the batch at a time.
- The operator on codes gets a padded input, as it requires; adder layers, `adder2d` and the convolution pad by
  themselves.
- The deployed layer starts from float activations: it quantizes them, computes on codes, and returns floats.

Timings of a busy machine are worthless: leave it alone meanwhile.
"""

import argparse
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
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from q_adder import AdderConv2d, AdderLearningRate, QuantAdderConv2d, TiedGrid, TiedSpec, adder2d, adder_weights, ops
from q_adder.models import resnet20
from q_core import pack
from q_core.cli.rows import append_jsonl, environment
from q_core.kernels import Operator, only

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed" / "adder.jsonl"
ROUNDS, ROUNDS_STEP, SAMPLE_SECONDS = 7, 3, 0.05
STEP_BATCH, STEPS_OF_MEMORY, SEED = 64, 2, 0
BITS = (2, 3, 4, 8)
CUBE = 1 << 28  # elements, 1 GiB: far beyond every cache, as the cube of a whole batch is
UNIT = 2.0**-24  # of rounding in float32, relative
STEP_ERROR = 1e-4  # relative length: some 1e-6 is rounding, one wrong tap of 576 is 4e-2

CDIST, UNFOLDED = "torch.cdist on unfolded windows", "unfold and torch.cdist"
BROADCAST, COMPILED = "unfold and broadcast", "unfold and broadcast, torch.compile"
CONVOLUTION = "float32 convolution"
TWIN = "convolutional twin"

# The largest ratio that each goal allows.
FLOAT_GOALS = {CDIST: 1 / 10, BROADCAST: 1 / 50}
CODE_GOALS = {(2, CDIST): 1 / 100, (2, CONVOLUTION): 1.0, (4, CDIST): 1 / 40, (8, CDIST): 1 / 25}
STEP_GOAL, MEMORY_GOAL = 1 / 10, 2.0

Party = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What every row has; the first fields are those of the other speed rows.

    Attributes:
        benchmark: `adder-forward`, `adder-codes`, `adder-layer`, `adder-step` or `adder-memory`.
        case: The shape, or the network.
        ours: What ran of ours.
        bits: Bits of the codes, None for floats.
        kernel: Implementation that ran.
        chosen: Whether it ran because it was chosen, and not because it was asked for.
        peer: What it is compared with.
        ratio: Ours over the peer's; below 1 we are faster, or smaller.
        spread: Smallest and largest ratio of one round.
        target: Largest ratio that the goal allows, None where there is no goal.
        met: Whether it is met.
        threads: Threads of each party.
        commit: Commit of the source that ran.
        versions: Versions of what matters.
        device: Processor.
        date: UTC, ISO 8601.
    """

    benchmark: str
    case: str
    ours: str
    bits: int | None
    kernel: str
    chosen: bool
    peer: str
    ratio: float
    spread: tuple[float, float]
    target: float | None
    met: bool | None
    threads: int
    commit: str | None
    versions: dict[str, str]
    device: str
    date: str


@dataclasses.dataclass(frozen=True)
class TimeRow(Comparison):
    """A comparison of times.

    Attributes:
        ours_seconds: Median over the rounds.
        peer_seconds: Median over the rounds.
        pairs: Absolute differences that are summed: taps x outputs x output positions. 0 for a network.
    """

    ours_seconds: float
    peer_seconds: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class MemoryRow(Comparison):
    """A comparison of peak memory.

    Attributes:
        ours_bytes: What the largest step added to the resident memory of the process.
        peer_bytes: Likewise.
    """

    ours_bytes: int
    peer_bytes: int


@dataclasses.dataclass(frozen=True)
class Ours:
    """One party of ours, as a row names it."""

    benchmark: str
    name: str
    kernel: str
    bits: int | None = None
    chosen: bool = True


class Report:
    """Turns measurements into rows, appends and prints them."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def times(
        self, ours: Ours, case: str, left: list[float], peer: str, right: list[float], target: float | None, pairs: int
    ) -> None:
        """Append a comparison of times."""
        mine, theirs = statistics.median(left), statistics.median(right)
        ratios = [a / b for a, b in zip(left, right, strict=True)]
        shared = self._shared(ours, case, peer, mine / theirs, ratios, target)
        rounded = {"ours_seconds": float(f"{mine:.4g}"), "peer_seconds": float(f"{theirs:.4g}")}
        append_jsonl(self.path, TimeRow(**shared, **rounded, pairs=pairs))
        name = (
            f"{ours.benchmark.removeprefix('adder-')} {ours.name} ({ours.kernel}{'' if ours.chosen else ', by name'})"
        )
        print(
            f"  {name} | {peer}: {1e3 * mine:.3f} ms against {1e3 * theirs:.3f} ms, {theirs / mine:.2f} times as fast "
            f"({1 / max(ratios):.2f} to {1 / min(ratios):.2f}){self._verdict(shared)}",
            flush=True,
        )

    def memory(self, ours: Ours, case: str, mine: int, peer: str, theirs: int, target: float | None) -> None:
        """Append a comparison of peak memory."""
        shared = self._shared(ours, case, peer, mine / theirs, [mine / theirs], target)
        append_jsonl(self.path, MemoryRow(**shared, ours_bytes=mine, peer_bytes=theirs))
        print(
            f"  {ours.name}, memory | {peer}: {mine / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB, "
            f"ratio {mine / theirs:.2f}{self._verdict(shared)}",
            flush=True,
        )

    def _shared(
        self, ours: Ours, case: str, peer: str, ratio: float, ratios: list[float], target: float | None
    ) -> dict[str, Any]:
        here = environment(["numba", "llvmlite"])
        return {
            "benchmark": ours.benchmark,
            "case": case,
            "ours": ours.name,
            "bits": ours.bits,
            "kernel": ours.kernel,
            "chosen": ours.chosen,
            "peer": peer,
            "ratio": float(f"{ratio:.4g}"),
            "spread": (float(f"{min(ratios):.4g}"), float(f"{max(ratios):.4g}")),
            "target": target,
            "met": None if target is None else ratio <= target,
            "threads": torch.get_num_threads(),
            "commit": here.commit,
            "versions": here.versions,
            "device": here.device,
            "date": here.date,
        }

    def _verdict(self, shared: dict[str, Any]) -> str:
        if shared["target"] is None:
            return ""
        return f"; goal {shared['target']:.3g} {'met' if shared['met'] else 'MISSED'}"


def measure(parties: dict[str, Party], rounds: int) -> dict[str, list[float]]:
    """Time every party once a round, in turn, each long enough for the clock; seconds of one call."""
    calls, times = {}, {name: [] for name in parties}
    for name, party in parties.items():
        first = seconds(party, 1)
        again = seconds(party, 1) if first < 1 else first
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / again))
    for _ in range(rounds):
        for name, party in parties.items():
            times[name].append(seconds(party, calls[name]))
    return times


def seconds(party: Party, calls: int) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    for _ in range(calls):
        party()
    return (time.perf_counter() - start) / calls


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer of a network."""

    network: str
    inputs: int
    outputs: int
    size: int
    batch: int
    kernel: int = 3
    stride: int = 1

    @property
    def case(self) -> str:
        channels = f"{self.inputs} to {self.outputs} channels, {self.size}x{self.size}"
        step = f", stride {self.stride}" if self.stride != 1 else ""
        return f"{self.network}: {channels}, {self.kernel}x{self.kernel}{step}, batch {self.batch}"

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.kernel // 2}

    @property
    def taps(self) -> int:
        return self.inputs * self.kernel**2

    @property
    def side(self) -> int:
        """Rows, or columns, of the output."""
        return (self.size - 1) // self.stride + 1

    @property
    def pairs(self) -> int:
        return self.taps * self.outputs * self.batch * self.side**2


SHAPES = (
    Shape("ResNet-20", 16, 16, 32, 16),
    Shape("ResNet-20", 32, 32, 16, 16),
    Shape("ResNet-20", 64, 64, 8, 16),
    Shape("ResNet-20", 16, 32, 32, 16, stride=2),
    Shape("ResNet-18", 64, 64, 56, 8),
    Shape("ResNet-18", 128, 128, 28, 8),
    Shape("ResNet-18", 256, 256, 14, 8),
    Shape("ResNet-50", 64, 256, 56, 8, kernel=1),
)


def unfold(x: Tensor, shape: Shape) -> Tensor:
    """Unfold the windows: [n, positions, taps], contiguous."""
    return F.unfold(x, shape.kernel, **shape.geometry).transpose(1, 2).contiguous()


def by_cdist(windows: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    distance = torch.cdist(windows.flatten(0, 1), weight.flatten(1), p=1)
    return -distance.reshape(shape.batch, shape.side, shape.side, -1).permute(0, 3, 1, 2)


def broadcast(x: Tensor, weight: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Minus the distance of every window and every kernel, as the formula reads."""
    windows = F.unfold(x, kernel, stride=stride, padding=padding)
    distance = (windows.unsqueeze(1) - weight.flatten(1)[:, :, None]).abs().sum(2)
    return -distance.unflatten(2, ((x.shape[2] + 2 * padding - kernel) // stride + 1, -1))


def by_parts(function: Callable[..., Tensor], x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    images = max(1, CUBE // (shape.pairs // shape.batch))
    geometry = (shape.kernel, shape.stride, shape.kernel // 2)
    return torch.cat([function(part, weight, *geometry) for part in x.split(images)])


def check(name: str, got: Tensor, meaning: Tensor, taps: int) -> None:
    """Compare floats with the meaning in float64.

    A sum of K non-negative terms, each rounded once, in any order, is off by at most K units of rounding.
    """
    torch.testing.assert_close(got.double(), meaning, rtol=(taps + 1) * UNIT, atol=0, msg=lambda m: f"{name}: {m}")


def float_parties(shape: Shape, x: Tensor, weight: Tensor, compiled: bool) -> dict[str, Party]:
    """The layer in float32, each party checked."""
    windows = unfold(x, shape)
    parties: dict[str, Party] = {
        "adder2d": lambda: adder2d(x, weight, **shape.geometry),
        CDIST: lambda: by_cdist(windows, weight, shape),
        UNFOLDED: lambda: by_cdist(unfold(x, shape), weight, shape),
        BROADCAST: lambda: by_parts(broadcast, x, weight, shape),
    }
    if compiled:
        torch._dynamo.reset()
        graph = torch.compile(broadcast, fullgraph=True, dynamic=False)
        parties[COMPILED] = lambda: graph(x, weight, shape.kernel, shape.stride, shape.kernel // 2)
    with only("reference"):
        meaning = adder2d(x.double(), weight.double(), **shape.geometry)
    for name, party in parties.items():
        check(name, party(), meaning, shape.taps)
    return parties | {CONVOLUTION: lambda: F.conv2d(x, weight, **shape.geometry)}


def code_parties(shape: Shape, x: Tensor, weight: Tensor, bits: int) -> dict[Ours, Party]:
    """The operator on codes, as chosen and every kernel by name, each equal to the meaning."""
    scale = x.max() / ((1 << bits) - 1)
    low, high = (values.div(scale).round().clamp(0, (1 << bits) - 1).to(torch.uint8) for values in (x, weight))
    arguments = (F.pad(low, [shape.kernel // 2] * 4), high, [shape.stride] * 2, [1, 1], 1, bits)
    operator = ops.CODE_DISTANCE
    meaning = operator.reference.run(*arguments)

    def run() -> Tensor:
        return ops.code_distance_conv2d(*arguments)

    def run_only(name: str) -> Tensor:
        with only(name):
            return run()

    chosen = operator.choose(*arguments).kernel.name
    parties: dict[Ours, Party] = {Ours("adder-codes", f"W{bits}A{bits}", chosen, bits): run}
    for kernel in operator.kernels:
        if kernel.refuses(*arguments) is None:
            ours = Ours("adder-codes", f"W{bits}A{bits}", kernel.name, bits, chosen=False)
            parties[ours] = functools.partial(run_only, kernel.name)
    for ours, party in parties.items():
        torch.testing.assert_close(party(), meaning, rtol=0, atol=0, msg=lambda m, o=ours: f"{o}: {m}")
    return parties


def layer_party(shape: Shape, x: Tensor, weight: Tensor, bits: int) -> dict[Ours, Party]:
    """The deployed layer, equal to the quantized layer in plain torch bit for bit."""
    layer = AdderConv2d(shape.inputs, shape.outputs, shape.kernel, **shape.geometry)
    layer.weight = nn.Parameter(weight)
    scale = (x.max() / ((1 << bits) - 1)).reshape(1)
    tied = TiedGrid(TiedSpec(bits), scale, torch.zeros(1), torch.zeros(shape.outputs, dtype=torch.int64))
    quantized = QuantAdderConv2d.from_float(layer, tied).eval()
    deployed = pack(nn.Sequential(quantized))[0]
    with only("reference"):
        meaning = quantized(x)
    torch.testing.assert_close(deployed(x), meaning, rtol=0, atol=0)
    codes = torch.empty(F.pad(x, [shape.kernel // 2] * 4).shape, dtype=torch.uint8)
    table = torch.empty(weight.shape, dtype=torch.uint8)
    chosen = ops.CODE_DISTANCE.choose(codes, table, [shape.stride] * 2, [1, 1], 1, bits).kernel.name
    return {Ours("adder-layer", f"W{bits}A{bits}", chosen, bits): lambda: deployed(x)}


def layers(report: Report, shapes: Sequence[Shape], rounds: int, compiled: bool) -> None:
    """Compare the forward pass of single layers."""
    for shape in shapes:
        print(f"{shape.case}, {torch.get_num_threads()} threads", flush=True)
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(shape.batch, shape.inputs, shape.size, shape.size, generator=generator).relu()
        weight = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel, generator=generator)
        with torch.no_grad():
            plain = float_parties(shape, x, weight, compiled)
            codes: dict[Ours, Party] = {}
            for bits in BITS:
                codes |= code_parties(shape, x, weight, bits) | layer_party(shape, x, weight, bits)
            times = measure({**plain, **codes}, rounds)  # type: ignore[dict-item]
        ours = Ours("adder-forward", "adder2d", _kernel_of_floats(ops.DISTANCE, x, weight, shape))
        for peer in list(plain)[1:]:
            report.times(ours, shape.case, times["adder2d"], peer, times[peer], FLOAT_GOALS.get(peer), shape.pairs)
        for ours in codes:
            for peer in (CDIST, CONVOLUTION):
                goal = CODE_GOALS.get((ours.bits or 0, peer)) if ours.benchmark == "adder-codes" else None
                target = goal if ours.chosen else None
                report.times(ours, shape.case, times[ours], peer, times[peer], target, shape.pairs)  # type: ignore[index]


def _kernel_of_floats(operator: Operator, x: Tensor, weight: Tensor, shape: Shape) -> str:
    padded = F.pad(x, [shape.kernel // 2] * 4)
    return operator.choose(padded, weight, [shape.stride] * 2, [1, 1], 1, 1.0).kernel.name


class Broadcast(torch.autograd.Function):
    """The distance of unfolded windows [taps, positions] and kernels [outputs, taps], with the published gradients."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(windows, weight)
        return -(windows.unsqueeze(0) - weight.unsqueeze(2)).abs().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        windows, weight = ctx.saved_tensors
        incoming = grad.unsqueeze(1)
        grad_weight = ((windows.unsqueeze(0) - weight.unsqueeze(2)) * incoming).sum(2)
        grad_windows = ((weight.unsqueeze(2) - windows.unsqueeze(0)).clamp(-1, 1) * incoming).sum(0)
        return grad_windows, grad_weight


class BroadcastConv2d(nn.Conv2d):
    """The adder layer written from its formulas, as far as the network needs it."""

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(x, self.kernel_size, stride=self.stride, padding=self.padding)
        out = Broadcast.apply(windows.transpose(0, 1).flatten(1), self.weight.flatten(1))
        side = (x.shape[2] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        return out.reshape(len(self.weight), len(x), side, side).transpose(0, 1)


class Step:
    """A network and what trains it: one call is one step on the same batch."""

    LAYERS: ClassVar[dict[str, type[nn.Conv2d]]] = {"ours": AdderConv2d, BROADCAST: BroadcastConv2d, TWIN: nn.Conv2d}

    def __init__(self, party: str, batch: int = STEP_BATCH) -> None:
        torch.manual_seed(SEED)
        conv = self.LAYERS[party]
        self.model = resnet20(conv=conv).train()
        self.images, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        if conv is AdderConv2d:
            AdderLearningRate(self.optimizer, adder_weights(self.model))
        elif conv is BroadcastConv2d:
            weights = [module.weight for module in self.model.modules() if isinstance(module, BroadcastConv2d)]
            AdderLearningRate(self.optimizer, weights)

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        return loss


def check_step(step: Step) -> None:
    """Compare every adder layer, in both directions, with its formulas on the tensors of a step.

    Layer by layer, because what rounding does to one of 20 layers grows in those that follow: it opens and closes
    rectifiers.
    """
    seen: dict[str, tuple[Tensor, ...]] = {}

    def forward(name: str, _: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen[name] = (inputs[0].detach().clone(), out.detach().clone())

    def backward(name: str, _: nn.Module, grad_x: tuple[Tensor, ...], grad: tuple[Tensor, ...]) -> None:
        seen[name] = (*seen[name], grad_x[0].clone(), grad[0].clone())

    found = {name: module for name, module in step.model.named_modules() if isinstance(module, AdderConv2d)}
    handles = []
    for name, layer in found.items():
        handles.append(layer.register_forward_hook(functools.partial(forward, name)))
        handles.append(layer.register_full_backward_hook(functools.partial(backward, name)))
    step.backward()
    for handle in handles:
        handle.remove()
    for name, layer in found.items():
        x, out, grad_x, grad = seen.pop(name)
        formula = BroadcastConv2d(
            *layer.weight.shape[1::-1], layer.kernel_size, layer.stride, layer.padding, bias=False
        )
        formula.weight.data = layer.weight.detach()
        result = formula(x.requires_grad_())
        result.backward(grad)
        for what, got, expected in (
            ("output", out, result),
            ("gradient of the input", grad_x, x.grad),
            ("gradient of the weight", layer.weight.grad, formula.weight.grad),
        ):
            off = float((got - expected).detach().norm() / expected.detach().norm())
            if not off <= STEP_ERROR:
                sys.exit(f"{name}: the {what} is off by {off:.1e} of its length: nothing is timed")


def steps(report: Report, rounds: int) -> None:
    """Compare one step of training of the whole network: forward, loss, backward, optimizer."""
    case = f"ResNet-20, one step of training, 32x32, batch {STEP_BATCH}"
    print(f"{case}, {torch.get_num_threads()} threads", flush=True)
    parties = {name: Step(name) for name in Step.LAYERS}
    check_step(parties["ours"])
    times = measure(parties, rounds)  # type: ignore[arg-type]
    layer = parties["ours"].model.get_submodule("layer1.0.conv1")
    padded = torch.zeros(STEP_BATCH, 16, 34, 34)
    kernel = ops.DISTANCE.choose(padded, layer.weight, [1, 1], [1, 1], 1, 1.0).kernel.name
    ours = Ours("adder-step", "training step", kernel)
    for peer, target in ((BROADCAST, STEP_GOAL), (TWIN, None)):
        report.times(ours, case, times["ours"], peer, times[peer], target, 0)
    memory = {name: peak_of(name) for name in Step.LAYERS}
    ours = dataclasses.replace(ours, benchmark="adder-memory")
    for peer, target in ((BROADCAST, None), (TWIN, MEMORY_GOAL)):
        report.memory(ours, case, memory["ours"], peer, memory[peer], target)


def peak_of(party: str) -> int:
    """Measure in a fresh process what a step adds to the resident memory.

    Blocks of 64 KiB and more go back to the system as soon as they are free, so that the peak is what is alive at
    once, and not what the allocator has not given back.
    """
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, __file__, "--peak", party, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{party}: the process that measures its memory ended with {done.returncode}:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak(party: str) -> None:
    """Print what whole steps add to the resident memory at most, in bytes; on Linux.

    A step on two images comes first. It compiles what is compiled, and makes the state of the optimizer, which is that
    of the twin as well.
    """
    Step(party, 2)()
    step = Step(party)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the largest so far becomes the present one
    before = largest_resident()
    for _ in range(STEPS_OF_MEMORY):
        step()
    print(largest_resident() - before)


def largest_resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of each party, one run each")
    parser.add_argument("--only", choices=["layers", "step"], help="run one part")
    parser.add_argument("--shapes", type=int, nargs="+", help="only these layers, by number from 0")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} for layers, {ROUNDS_STEP} for steps")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--peak", choices=Step.LAYERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        torch.set_num_threads(arguments.threads[0])
        peak(arguments.peak)
        return
    if not ops.DISTANCE.kernels:
        sys.exit("no fast kernel of the adder operators is installed: pip install -e 'packages/q-kernels[cpu]'")
    report = Report(arguments.out)
    print(f"load average before the run: {os.getloadavg()[0]:.2f}", flush=True)
    shapes = [SHAPES[index] for index in arguments.shapes or range(len(SHAPES))]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        if arguments.only != "step":
            layers(report, shapes, arguments.rounds or ROUNDS, not arguments.no_compile)
        if arguments.only != "layers":
            steps(report, arguments.rounds or ROUNDS_STEP)
    print(f"rows appended to {arguments.out}")


if __name__ == "__main__":
    main()
