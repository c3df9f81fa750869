"""Speed of learned steps beside the published form, torch's learned scale, and LSQ, as ratios measured in one run.

    nox -s bench -- --suite nulsq [--threads N ...] [--only quantize|step] [--rounds N] [--out FILE]

Needs `q-kernels[cpu]` installed, because kernels are found through its entry points. All parties run in this process on
the same tensors and threads, in turn, round after round, after each was compared with the others on these very tensors.
A row holds the medians; its ratio is the ratio of the medians, and its spread the smallest and largest ratio of one
round.

What is measured:

- *quantize*: one tensor forward and backward, to the gradients of the tensor and of the steps. Ours is a whole grid,
  from the parameter to its gradient, with the table of levels that it makes anew each time. The port of the published
  form is in `peers/nulsq_published.py`. `torch._fake_quantize_learnable_per_tensor_affine` knows equal steps alone; it
  is compared with both of our grids at equal steps, and has another gradient half a step beyond either end.
- *saved*: bytes that autograd keeps for the backward pass beyond the tensor itself, per element.
- *step*: one step of training of ResNet-20, forward, loss, backward and both optimizers, with the weights and the
  inputs of every convolution and linear layer quantized.

Timings of a busy machine are worthless: leave it alone meanwhile.
"""

import argparse
import copy
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from peers.nulsq_published import Published, PublishedSteps
from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar import resnet20
from q_core import ops
from q_core.cli.rows import append_jsonl, environment
from q_core.grid import Grid, UniformGrid
from q_core.quantizer import Quantizer
from q_core.rounding import NearestEven, NearestTowardZero, Rounding
from q_nulsq import StepGrid, prepare, recipes
from q_nulsq.optim import parameter_groups, project_after

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed" / "nulsq.jsonl"
ROUNDS, ROUNDS_STEP, SAMPLE_SECONDS, SEED, BATCH = 7, 5, 0.05, 0, 64
BITS = (2, 3, 4)
UNIT = 2.0**-24  # of rounding in float32, relative
APART = 1e-5  # so many elements may lie so near to a threshold that two ways to compute it put them on two sides

STEPS, EQUAL = "StepGrid", "UniformGrid"
PUBLISHED, LEARNABLE = "port of the published form", "torch._fake_quantize_learnable_per_tensor_affine"
NULSQ, LSQ = "nuLSQ-WA", "LSQ"

# The largest ratio, and the most bytes per element, that each goal allows.
PUBLISHED_GOAL, LEARNABLE_GOAL, STEP_GOAL, SAVED_GOAL = 1 / 5, 1.0, 1.15, 1.0

Party = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What every row has; the first fields are those of the other speed rows.

    Attributes:
        benchmark: `nulsq-quantize`, `nulsq-saved` or `nulsq-step`.
        case: The tensor, or the network.
        ours: What ran of ours.
        bits: Bits of the codes.
        kernel: Implementation that ran.
        peer: What it is compared with; in a step, it may be ours too.
        target: Largest ratio, or most bytes for each element, that the goal allows; None where there is no goal.
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
    bits: int
    kernel: str
    peer: str
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
        ratio: Ours over the peer's; below 1 we are faster.
        spread: Smallest and largest ratio of one round.
        ours_seconds: Median over the rounds.
        peer_seconds: Median over the rounds.
    """

    ratio: float
    spread: tuple[float, float]
    ours_seconds: float
    peer_seconds: float


@dataclasses.dataclass(frozen=True)
class SavedRow(Comparison):
    """A comparison of what is kept for the backward pass beyond the tensor itself.

    Attributes:
        ours_bytes: For each element.
        peer_bytes: Likewise.
    """

    ours_bytes: float
    peer_bytes: float


@dataclasses.dataclass(frozen=True)
class Ours:
    """One party of ours, as a row names it."""

    benchmark: str
    name: str
    bits: int
    kernel: str


class Report:
    """Turns measurements into rows, appends and prints them."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def times(
        self, ours: Ours, case: str, left: list[float], peer: str, right: list[float], target: float | None
    ) -> None:
        """Append a comparison of times."""
        mine, theirs = statistics.median(left), statistics.median(right)
        ratios = [a / b for a, b in zip(left, right, strict=True)]
        row = TimeRow(
            **self._shared(ours, case, peer, mine / theirs, target),
            ratio=float(f"{mine / theirs:.4g}"),
            spread=(float(f"{min(ratios):.4g}"), float(f"{max(ratios):.4g}")),
            ours_seconds=float(f"{mine:.4g}"),
            peer_seconds=float(f"{theirs:.4g}"),
        )
        append_jsonl(self.path, row)
        print(
            f"  {ours.name}, {ours.bits} bits ({ours.kernel}) | {peer}: {1e3 * mine:.3f} ms against {1e3 * theirs:.3f} "
            f"ms, ratio {row.ratio:.3f} ({row.spread[0]:.3f} to {row.spread[1]:.3f}){_verdict(row)}",
            flush=True,
        )

    def saved(self, ours: Ours, case: str, mine: float, peer: str, theirs: float) -> None:
        """Append a comparison of what is kept."""
        row = SavedRow(
            **self._shared(ours, case, peer, mine, SAVED_GOAL),
            ours_bytes=float(f"{mine:.4g}"),
            peer_bytes=float(f"{theirs:.4g}"),
        )
        append_jsonl(self.path, row)
        print(
            f"  {ours.name}, {ours.bits} bits ({ours.kernel}), saved beyond the tensor | {peer}: {mine:.3g} bytes an "
            f"element against {theirs:.3g}{_verdict(row)}",
            flush=True,
        )

    def _shared(self, ours: Ours, case: str, peer: str, value: float, target: float | None) -> dict[str, Any]:
        here = environment(["numba", "llvmlite"])
        return {
            "benchmark": ours.benchmark,
            "case": case,
            "ours": ours.name,
            "bits": ours.bits,
            "kernel": ours.kernel,
            "peer": peer,
            "target": target,
            "met": None if target is None else value <= target,
            "threads": torch.get_num_threads(),
            "commit": here.commit,
            "versions": here.versions,
            "device": here.device,
            "date": here.date,
        }


def _verdict(row: Comparison) -> str:
    return "" if row.target is None else f"; goal {row.target:.3g} {'met' if row.met else 'MISSED'}"


def measure(parties: dict[str, Party], rounds: int) -> dict[str, list[float]]:
    """Time every party once a round, in turn, each long enough for the clock; seconds of one call."""
    calls, times = {}, {name: [] for name in parties}
    for name, party in parties.items():
        party()
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / seconds(party, 1)))
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


# One tensor.


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor of ResNet-20: an activation behind a rectifier, or a weight."""

    shape: tuple[int, ...]
    signed: bool

    def __str__(self) -> str:
        """Name it."""
        return f"{'weight' if self.signed else 'activation'} {'x'.join(map(str, self.shape))}"

    def tensor(self) -> Tensor:
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(SEED))
        return values if self.signed else values.relu()

    def codes(self, bits: int) -> tuple[int, int]:
        return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if self.signed else (0, (1 << bits) - 1)


CASES = (
    Case((64, 16, 32, 32), signed=False),
    Case((64, 32, 16, 16), signed=False),
    Case((64, 64, 8, 8), signed=False),
    Case((16, 16, 3, 3), signed=True),
    Case((64, 64, 3, 3), signed=True),
)


class Differentiated:
    """One party on one tensor: a call is the forward and the backward pass, and returns what comes of them."""

    def __init__(self, function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> None:
        self.function, self.x = function, x.clone().requires_grad_()
        self.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + 1))
        self.parameters = parameters

    def __call__(self) -> tuple[Tensor, ...]:
        out = self.function(self.x)
        return (out, *torch.autograd.grad(out, [self.x, *self.parameters], self.grad))

    def saved(self) -> float:
        """Bytes that autograd keeps beyond the tensor, for each of its elements."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() != self.x.untyped_storage().data_ptr():
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.function(self.x)
        del out
        return sum(kept.values()) / self.x.numel()


def of_grid(grid: Grid, rounding: Rounding, x: Tensor) -> Differentiated:
    return Differentiated(Quantizer(grid, rounding), x, list(grid.parameters()))


def of_published(grid: StepGrid, x: Tensor) -> Differentiated:
    module = PublishedSteps(grid.steps.flatten(), -grid.qmin)
    return Differentiated(lambda x: Published.apply(x, module.steps, module.below), x, [module.steps])


def of_learnable(grid: UniformGrid, x: Tensor) -> Differentiated:
    scale, zero = grid.scale.detach().clone().requires_grad_(), torch.zeros(1)

    def function(x: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, grid.qmin, grid.qmax, 1.0)

    return Differentiated(function, x, [scale])


def check(name: str, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], count: int) -> None:
    """Compare levels, gradients of the tensor, and the sum of those of the steps; see `APART`."""
    for what, left, right in zip(("level", "gradient"), ours, theirs, strict=False):
        off = (left - right).abs() > 16 * UNIT * (1 + left.abs())
        if int(off.sum()) > 1 + APART * off.numel():
            sys.exit(f"{name}: the {what} of {int(off.sum())} of {off.numel()} elements is another: nothing is timed")
    # Sums of as many terms as there are elements, each of which rounds, and an element or two in another cell.
    mine, other = (result[2].detach().double().reshape(-1) for result in (ours, theirs))
    if len(mine) != len(other):
        mine, other = mine.sum(), other.sum()
    limit = 4 + 4 * UNIT * count + 1e-4 * float(other.abs().max())
    if not bool(((mine - other).abs() <= limit).all()):
        sys.exit(f"{name}: the gradient of the steps is {mine} and not {other}: nothing is timed")


def grids(case: Case, bits: int, x: Tensor) -> tuple[StepGrid, StepGrid, UniformGrid]:
    """Learned steps that are not equal, equal ones, and the same with one scale."""
    qmin, qmax = case.codes(bits)
    step = float(x.abs().mean()) * 2 / math.sqrt(qmax)
    equal = torch.full((1, qmax - qmin), step)
    uneven = equal * torch.linspace(0.7, 1.3, qmax - qmin)
    learned, even = (
        StepGrid(steps[:, :-qmin] if qmin else None, steps[:, -qmin:] if qmin else steps) for steps in (uneven, equal)
    )
    return learned, even, UniformGrid(torch.full((1,), step), qmin=qmin, qmax=qmax, learnable=True)


def quantize(report: Report, rounds: int) -> None:
    """Compare forward and backward passes of single tensors, and what they keep."""
    for case in CASES:
        x = case.tensor()
        print(f"{case}, {torch.get_num_threads()} threads", flush=True)
        for bits in BITS:
            learned, even, uniform = grids(case, bits, x)
            parties = {
                STEPS: of_grid(learned, NearestTowardZero(), x),
                PUBLISHED: of_published(learned, x),
                f"{STEPS}, equal": of_grid(even, NearestEven(), x),
                EQUAL: of_grid(uniform, NearestEven(), x),
                LEARNABLE: of_learnable(uniform, x),
            }
            check(PUBLISHED, parties[STEPS](), parties[PUBLISHED](), x.numel())
            check(EQUAL, parties[f"{STEPS}, equal"](), parties[EQUAL](), x.numel())
            # Where it has the gradients of the others: not beyond the ends.
            low, high = even.levels()[0, 0], even.levels()[0, -1]
            within = x.clamp(low, high)
            check(
                LEARNABLE,
                of_grid(uniform, NearestEven(), within)(),
                of_learnable(uniform, within)(),
                x.numel(),
            )
            times = measure(parties, rounds)  # type: ignore[arg-type]
            kernel = kernel_of(learned, x)
            ours = Ours("nulsq-quantize", STEPS, bits, kernel)
            report.times(ours, str(case), times[STEPS], PUBLISHED, times[PUBLISHED], PUBLISHED_GOAL)
            for name in (f"{STEPS}, equal", EQUAL):
                ours = Ours("nulsq-quantize", name, bits, kernel)
                report.times(ours, str(case), times[name], LEARNABLE, times[LEARNABLE], LEARNABLE_GOAL)
            kept = {name: party.saved() for name, party in parties.items()}
            report.saved(Ours("nulsq-saved", STEPS, bits, kernel), str(case), kept[STEPS], PUBLISHED, kept[PUBLISHED])


def kernel_of(grid: StepGrid, x: Tensor) -> str:
    levels, widths = (table.detach() for table in grid.table())
    return ops.FAKE_QUANTIZE_LEVELS_GRAD.choose(x, x, levels, widths, widths, True).kernel.name


# A network.


class Step:
    """A network and what trains it: one call is one step on the same batch."""

    def __init__(self, party: str, bits: int, batch: int) -> None:
        torch.manual_seed(SEED)
        images, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        self.images, model = images, resnet20().eval()
        part = recipes.LSQ if party == LSQ else recipes.NULSQ  # both start from the best equal steps
        options: dict[str, Any] = {"weight_bits": bits, "activation_bits": bits, "edge_bits": bits, "progress": False}
        self.model = prepare(model, [images], weight=part, activation=part, **options).model
        if party == PUBLISHED:
            self.model = published(self.model)
        self.model.train()
        self.weights, self.steps = optimizers(self.model)

    def __call__(self) -> None:
        self.backward()
        self.weights.step()
        self.steps.step()

    def backward(self) -> Tensor:
        self.weights.zero_grad()
        self.steps.zero_grad()
        out: Tensor = self.model(self.images)
        F.cross_entropy(out, self.labels).backward()
        return out.detach()


def optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The published ones: SGD for weights, AdamW for what quantizers learn."""
    *others, steps = parameter_groups(model, lr=0.04, weight_decay=1e-4, step_lr=4e-4)
    of_ports = [module.steps for module in model.modules() if isinstance(module, PublishedSteps)]
    if of_ports:
        known = {id(parameter) for parameter in of_ports}
        for group in others:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
        steps["params"] = [*steps["params"], *of_ports]
    pair = torch.optim.SGD([group for group in others if group["params"]], momentum=0.9), torch.optim.AdamW([steps])
    project_after(pair[1], model)
    return pair


def published(model: nn.Module) -> nn.Module:
    """Copy a network with quantizers of the published form in the places of ours."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Quantizer) and isinstance(child.grid, StepGrid):
                setattr(module, name, PublishedSteps(child.grid.steps.flatten(), -child.grid.qmin))
    return twin


def check_steps(parties: dict[str, Step]) -> None:
    """See that all parties start from the same outputs.

    Steps are equal at the start, where all three are the same function, but for ties and for what rounding makes of a
    value next to a threshold, in one of 20 layers, which the others then see.
    """
    outputs = {name: step.backward() for name, step in parties.items()}
    for name, out in outputs.items():
        off = float((out - outputs[LSQ]).norm() / outputs[LSQ].norm())
        if not off < 0.05:
            sys.exit(f"{name}: before anything learns its output is off by {off:.1e} of the length of that of {LSQ}")


def steps(report: Report, rounds: int, batch: int) -> None:
    """Compare one step of training of the whole network."""
    case = f"ResNet-20, one step of training, all layers quantized, 32x32, batch {batch}"
    print(f"{case}, {torch.get_num_threads()} threads", flush=True)
    for bits in BITS:
        parties = {name: Step(name, bits, batch) for name in (NULSQ, LSQ, PUBLISHED)}
        check_steps(parties)
        times = measure(parties, rounds)  # type: ignore[arg-type]
        grid = next(module for module in parties[NULSQ].model.modules() if isinstance(module, StepGrid))
        ours = Ours("nulsq-step", NULSQ, bits, kernel_of(grid, torch.zeros(8)))
        for peer, target in ((LSQ, STEP_GOAL), (PUBLISHED, None)):
            report.times(ours, case, times[NULSQ], peer, times[peer], target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of each party, one run each")
    parser.add_argument("--only", choices=["quantize", "step"], help="run one part")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of one step of training")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} for tensors, {ROUNDS_STEP} for steps")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    arguments = parser.parse_args()
    if not ops.FAKE_QUANTIZE_LEVELS.kernels:
        sys.exit("no fast kernel of q_core.fake_quantize_levels is installed: pip install -e 'packages/q-kernels[cpu]'")
    print(f"load average before the run: {os.getloadavg()[0]:.2f}", flush=True)
    report = Report(arguments.out)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        if arguments.only != "step":
            quantize(report, arguments.rounds or ROUNDS)
        if arguments.only != "quantize":
            steps(report, arguments.rounds or ROUNDS_STEP, arguments.batch)
    print(f"rows appended to {arguments.out}")


if __name__ == "__main__":
    main()
