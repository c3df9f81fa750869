"""Speed of the GPU kernels beside named peers, as rates and as percent of what the GPU could do.

    python benchmarks/speed/gpu.py [--out FILE] [--only fake|adder]

Never run yet: there was no GPU, so nothing here is measured, and no row is in the results. It runs from a checkout,
with torch 2.11 or newer and the Triton that torch brings, and with nothing installed: the sources are put on the path.

For each case: first the result is compared with its meaning in float64 or bit for bit, and no time is taken of a kernel
that is wrong. Then it and its peers are recorded as CUDA graphs, each over as many copies of its inputs as the
second-level cache cannot hold, and replayed in turn; a figure is the median of the replays, and all is done twice. The
limit is that of `q_kernels.limits` with the bandwidth of a copy that is measured in the same run, and with the clock
that the driver reports as the highest. A goal is the least percentage of the limit.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "packages" / "q-core" / "src"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "packages" / "q-kernels" / "src"))

import torch
from torch import Tensor
from torch.nn import functional as F

from q_core import functional, ops
from q_kernels import limits
from q_kernels.gpu import adder, fake, levels
from q_kernels.limits import Gpu, Limit

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed" / "gpu.jsonl"
REPLAYS, REPEATS, SEED = 15, 2, 0
UNIT = 2.0**-24  # of rounding in float32, relative
FAKE_GOAL, ADDER_GOAL = 85.0, 75.0  # percent of the limit

Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class GpuRow:
    """One party of one case.

    Attributes:
        benchmark: `gpu-fake` or `gpu-adder`.
        case: What is computed, on what.
        party: Kernel or peer.
        seconds: Medians of the two repeats, of one call, in a cold cache.
        rate: Elements or pairs a second, in the faster repeat.
        percent: Of the limit; only of what has the arithmetic that the limit counts.
        bound: Whether the limit is one of arithmetic or of memory.
        goal: Least percentage that the goal allows, on an H200.
        clocks: Of the multiprocessors, in MHz, before and after.
        copy: Bytes a second of a copy, measured in this run.
        commit: Commit of the source that ran.
        versions: Versions of what matters.
        device: The GPU.
        date: UTC, ISO 8601.
    """

    benchmark: str
    case: str
    party: str
    seconds: list[float]
    rate: float
    percent: float | None
    bound: str
    goal: float | None
    clocks: list[int]
    copy: float
    commit: str
    versions: dict[str, str]
    device: str
    date: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to compute.

    Attributes:
        benchmark: `gpu-fake` or `gpu-adder`.
        name: What is computed, on what.
        make: Makes one set of inputs, new ones each time.
        check: Raises where the result of the kernel is wrong.
        parties: By name; the first is ours.
        work: Elements or pairs.
        limit: For this GPU.
        goal: Percent.
    """

    benchmark: str
    name: str
    make: Callable[[], tuple[Any, ...]]
    check: Callable[[tuple[Any, ...]], None]
    parties: dict[str, Run]
    work: int
    limit: Callable[[Gpu], Limit]
    goal: float


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device="cuda").to(dtype)


def near(found: Tensor, exact: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=atol)


def fake_cases() -> Iterator[Case]:
    rows, columns = 4096, 8192
    for dtype in (torch.float32, torch.bfloat16):
        for tiles in ((1, 1), (rows, 1), (1, columns)):
            yield from uniform(rows, columns, dtype, tiles)
    for count in (4, 16):
        for dtype in (torch.float32, torch.bfloat16):
            yield from tables(rows, columns, dtype, count)


def uniform(rows: int, columns: int, dtype: torch.dtype, tiles: tuple[int, int]) -> Iterator[Case]:
    elements, width = rows * columns, dtype.itemsize
    name = f"uniform, {rows}x{columns}, {str(dtype).removeprefix('torch.')}, scale {tiles[0]}x{tiles[1]}"
    ends = (None, -8, 7, None)
    forward, backward = fake.fake_quantize[0].run, fake.fake_quantize_grad[0].run
    meaning, slopes = ops.FAKE_QUANTIZE.reference.run, ops.FAKE_QUANTIZE_GRAD.reference.run

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.rand(tiles, device="cuda") + 0.1
        return normal(rows, columns), normal(rows, columns, dtype=dtype), scale

    def check_forward(args: tuple[Any, ...]) -> None:
        assert torch.equal(forward(*args[1:], *ends), meaning(*args[1:], *ends))

    def check_backward(args: tuple[Any, ...]) -> None:
        grad, x, scale = args
        found, expected = backward(*args, *ends, True), slopes(*args, *ends, True)
        assert torch.equal(found[0], expected[0])
        u = (x.float() / scale).double()
        terms = grad.double() * (u.clamp(-8, 7).round() - u.masked_fill((u < -8) | (u > 7), 0))
        near(found[1], functional.sum_tiles(terms, tiles), elements // scale.numel() * UNIT * 40)

    def learnable(x: Tensor, scale: Tensor) -> Any:
        zero = torch.zeros_like(scale.reshape(-1))
        if scale.numel() == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale.reshape(1), zero, -8, 7, 1.0)
        axis = 0 if tiles[0] > 1 else 1
        return torch._fake_quantize_learnable_per_channel_affine(x, scale.reshape(-1), zero, axis, -8, 7, 1.0)

    compiled = torch.compile(meaning, dynamic=False)
    peers: dict[str, Run] = {
        "gpu-fused": lambda grad, x, scale: forward(x, scale, *ends),
        "the meaning": lambda grad, x, scale: meaning(x, scale, *ends),
        "the meaning, torch.compile": lambda grad, x, scale: compiled(x, scale, *ends),
    }
    # torch's learned scale is float32 only; and one for a tensor waits for the host, which no graph can hold.
    if dtype == torch.float32 and tiles != (1, 1):
        peers["torch._fake_quantize_learnable"] = lambda grad, x, scale: learnable(x, scale)
    yield Case(
        "gpu-fake",
        f"{name}, forward",
        inputs,
        check_forward,
        peers,
        elements,
        lambda gpu: limits.fake_quantize(gpu, elements, width),
        FAKE_GOAL,
    )
    compiled_slopes = torch.compile(slopes, dynamic=False)
    yield Case(
        "gpu-fake",
        f"{name}, backward",
        inputs,
        check_backward,
        {
            "gpu-fused": lambda *args: backward(*args, *ends, True),
            "the meaning": lambda *args: slopes(*args, *ends, True),
            "the meaning, torch.compile": lambda *args: compiled_slopes(*args, *ends, True),
        },
        elements,
        lambda gpu: limits.fake_quantize_grad(gpu, elements, width),
        FAKE_GOAL,
    )


def tables(rows: int, columns: int, dtype: torch.dtype, count: int) -> Iterator[Case]:
    elements, width = rows * columns, dtype.itemsize
    name = f"{count - 1} steps, {rows}x{columns}, {str(dtype).removeprefix('torch.')}"
    forward, backward = levels.fake_quantize_levels[0].run, levels.fake_quantize_levels_grad[0].run
    meaning, slopes = ops.FAKE_QUANTIZE_LEVELS.reference.run, ops.FAKE_QUANTIZE_LEVELS_GRAD.reference.run

    def inputs() -> tuple[Tensor, ...]:
        widths = (torch.rand(1, 1, count - 1, device="cuda") + 0.5) * 4 / count
        table = torch.cat([torch.zeros_like(widths[..., :1]), widths.cumsum(-1)], -1) - 2
        return normal(rows, columns), normal(rows, columns, dtype=dtype), table, table.diff(), functional.middles(table)

    def check_forward(args: tuple[Any, ...]) -> None:
        _, x, table, _, thresholds = args
        assert torch.equal(forward(x, table, thresholds), meaning(x, table, thresholds))

    def check_backward(args: tuple[Any, ...]) -> None:
        found, expected = backward(*args, True), slopes(*args, True)
        assert torch.equal(found[0], expected[0])
        for mine, exact in zip(found[1:], expected[1:], strict=True):  # the meaning adds in float64
            near(mine, exact, elements * UNIT * 40)

    yield Case(
        "gpu-fake",
        f"{name}, forward",
        inputs,
        check_forward,
        {
            "gpu-fused": lambda grad, x, table, widths, edges: forward(x, table, edges),
            "the meaning": lambda grad, x, table, widths, edges: meaning(x, table, edges),
        },
        elements,
        lambda gpu: limits.fake_quantize_levels(gpu, elements, width, count),
        FAKE_GOAL,
    )
    yield Case(
        "gpu-fake",
        f"{name}, backward",
        inputs,
        check_backward,
        {"gpu-fused": lambda *args: backward(*args, True), "the meaning": lambda *args: slopes(*args, True)},
        elements,
        lambda gpu: limits.fake_quantize_levels_grad(gpu, elements, width, count),
        FAKE_GOAL,
    )


def adder_cases() -> Iterator[Case]:
    for images, channels, side, outputs, kernel in ((32, 128, 28, 128, 3), (32, 64, 56, 64, 3), (256, 16, 32, 16, 3)):
        yield from layers(images, channels, side, outputs, kernel)


def layers(images: int, channels: int, side: int, outputs: int, kernel: int) -> Iterator[Case]:
    name = f"{images}, {channels}, {side}x{side}, {outputs}, {kernel}x{kernel}"
    padded = side + kernel - 1
    pairs = images * side * side * outputs * channels * kernel * kernel
    weights = outputs * channels * kernel * kernel
    moved = 4 * (images * (channels * padded * padded + outputs * side * side) + weights)
    forward, backward = adder.distance_conv2d[0].run, adder.distance_conv2d_input_grad[0].run
    how = ([1, 1], [1, 1], 1, 1.0)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        x, weight = normal(images, channels, padded, padded), normal(outputs, channels, kernel, kernel)
        return normal(images, outputs, side, side), x, weight

    def unfolded(x: Tensor) -> Tensor:
        return F.unfold(x, kernel).transpose(1, 2).reshape(-1, channels * kernel * kernel)

    def check_forward(args: tuple[Any, ...]) -> None:
        _, x, weight = args
        exact = torch.cdist(unfolded(x[:1]).double(), weight.flatten(1).double(), p=1).T.reshape(1, outputs, side, side)
        found = -forward(x[:1], weight, *how)
        torch.testing.assert_close(found.double(), exact, rtol=UNIT * (2 + weight[0].numel()), atol=0)
        whole = -forward(x, weight, *how)
        assert torch.equal(whole[:1], found)
        assert bool(whole.isfinite().all())

    def check_backward(args: tuple[Any, ...]) -> None:
        grad, x, weight = (tensor[:1] if place < 2 else tensor for place, tensor in enumerate(args))
        panel, table = unfolded(x).double(), weight.flatten(1).double()
        upper = grad.double().reshape(outputs, -1)
        total = torch.zeros_like(panel)
        for output in range(outputs):
            total += (table[output] - panel).clamp(-1, 1) * upper[output][:, None]
        exact = F.fold(total.T.unsqueeze(0), (padded, padded), kernel)
        size = float(grad.abs().sum(1).max()) * kernel * kernel
        near(backward(grad, x, weight, *how), exact, UNIT * size * (4 + float(x.abs().max()) + 3 * outputs))

    def by_cdist(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.cdist(unfolded(x), weight.flatten(1), p=1)

    yield Case(
        "gpu-adder",
        f"{name}, forward",
        inputs,
        check_forward,
        {
            "gpu-tiled": lambda grad, x, weight: forward(x, weight, *how),
            "unfold, torch.cdist": by_cdist,
            "torch.conv2d, float32: another operator of the same shape": lambda grad, x, weight: F.conv2d(x, weight),
        },
        pairs,
        lambda gpu: limits.distance(gpu, pairs, moved),
        ADDER_GOAL,
    )
    yield Case(
        "gpu-adder",
        f"{name}, gradient to the input",
        inputs,
        check_backward,
        {"gpu-tiled": lambda *args: backward(*args, *how)},
        pairs,
        lambda gpu: limits.distance(gpu, pairs, moved + 4 * images * channels * padded * padded),
        ADDER_GOAL,
    )


def recorded(run: Run, inputs: Sequence[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    """Record one call for each set of inputs; what a call allocates is freed before the next."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in inputs[:2]:
            run(*args)  # what is compiled or tuned at first use
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in inputs:
            run(*args)
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay, on the clock of the GPU."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def copies(make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sets of inputs, so many that one is out of the cache before its turn comes again."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first if isinstance(tensor, Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(max(2, -(-3 * cache // size))))]


def copied() -> float:
    """Bytes a second of a copy of 1 GiB, read and written."""
    source = torch.empty(1 << 28, device="cuda").normal_()
    target = torch.empty_like(source)
    graph = recorded(lambda: target.copy_(source), [()] * 3)
    return 3 * 2 * (1 << 30) / statistics.median(replayed(graph) for _ in range(REPLAYS))


def driver(field: str) -> list[int]:
    """What the driver reports of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [int(part) for part in answer.replace(",", " ").split() if part.isdigit()]


def machine(copy: float) -> Gpu:
    properties, clocks = torch.cuda.get_device_properties(0), driver("clocks.max.sm")
    known = next((gpu for part, gpu in limits.KNOWN.items() if part in properties.name), None)
    if not clocks and known is None:
        sys.exit(f"nvidia-smi does not say the clock of {properties.name}, and it is none of {', '.join(limits.KNOWN)}")
    clock = clocks[0] * 1e6 if clocks else known.clock
    floats = known.floats if known else (64 if (properties.major, properties.minor) == (8, 0) else 128)
    return Gpu(properties.multi_processor_count, clock, copy, floats=floats)


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def measure(case: Case, gpu: Gpu, out: pathlib.Path) -> None:
    """Check, then time every party in turn, twice; append one row for each."""
    torch.manual_seed(SEED)
    inputs = copies(case.make)
    case.check(inputs[0])
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for party, run in case.parties.items():
        try:
            graphs[party] = recorded(run, inputs)
        except Exception as error:  # a peer may not compile or not be recorded: said, and left out
            if party == next(iter(case.parties)):
                raise
            print(f"{case.name}: {party} is left out: {error}", flush=True)
            torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {party: [] for party in graphs}
    before = driver("clocks.sm")
    for _ in range(REPEATS):
        samples: dict[str, list[float]] = {party: [] for party in graphs}
        for _ in range(REPLAYS):
            for party, graph in graphs.items():
                samples[party].append(replayed(graph) / len(inputs))
        for party, times in samples.items():
            seconds[party].append(statistics.median(times))
    after = driver("clocks.sm")
    limit = case.limit(gpu)
    for place, (party, times) in enumerate(seconds.items()):
        own = place == 0
        row = GpuRow(
            benchmark=case.benchmark,
            case=case.name,
            party=party,
            seconds=times,
            rate=case.work / min(times),
            percent=limit.percent(min(times)) if own else None,
            bound=limit.bound,
            goal=case.goal if own else None,
            clocks=[*before, *after],
            copy=gpu.bandwidth,
            commit=commit(),
            versions={"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)},
            device=torch.cuda.get_device_name(),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        share = f", {row.percent:.0f} % of the limit ({row.bound})" if row.percent is not None else ""
        print(f"{case.name}: {party}: {min(times) * 1e6:.1f} us, {row.rate / 1e9:.1f} G/s{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("fake", "adder"), help="leave the others out")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device: this benchmark is for a GPU")
    gpu = machine(copied())
    print(f"{torch.cuda.get_device_name()}: {gpu}", flush=True)
    for name, cases in (("fake", fake_cases), ("adder", adder_cases)):
        if arguments.only in (None, name):
            for case in cases():
                measure(case, gpu, arguments.out)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
