"""The main job: from a float model and images to a table, a report and packed models.

The command `q-quantize` and the quickstart differ in where model and images come from; everything after that is
`run`. It prints what it does, and writes either all of its files or none.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from q_core.analysis import Distribution, LayerError, compare, distributions, norm_paths
from q_core.calibrate import evaluation, feed
from q_core.checkpoint import load_packed, save_packed
from q_core.cli.keywords import taken
from q_core.cli.report import MEASURED, Chapter, LayerView, TableRow, render_chapters
from q_core.cli.rows import TOP1, AccuracyRow, Environment, environment, float_parts, state_sha256
from q_core.errors import DataError, QuantizationError, SpecError, StateError
from q_core.methods import FLOAT_BITS, Quantized, first_batch
from q_core.packed import bits_per_weight, pack
from q_core.trace import fold_batchnorm

Say = Callable[[str], None]
"""Shows one line to the user."""

_ANALYSED_SAMPLES = 64


def say(line: str) -> None:
    """Write one line to standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One quantized row of the table.

    Attributes:
        name: Name of the method.
        method: Makes the quantized model; has the signature of `q_core.nearest`. One that takes a `seed` gets that of
            the job.
        weight_bits: Bits of the weights of the inner layers.
        activation_bits: Bits of the activations of the inner layers.
        options: Further keyword arguments of the method.
    """

    name: str
    method: Callable[..., Quantized]
    weight_bits: int
    activation_bits: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> str:
        """The bits as they are written: W4A8 is 4-bit weights and 8-bit activations."""
        return f"W{self.weight_bits}A{self.activation_bits}"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to quantize, how, and on what to measure it.

    Attributes:
        network: Name of the architecture.
        dataset: Name of the images.
        model: The float model. Not changed.
        calibration: Batches that the methods see, as `calibrate` takes them; read once per configuration.
        evaluation: Batches `(images, labels)`; read several times.
        configurations: The rows of the table, at least one.
        command: The command that makes this run again.
        seed: Seed of everything random; set anew before each method.
        settings: Facts for the rows: preprocessing, sample counts.
        packages: Further distributions whose versions matter.
    """

    network: str
    dataset: str
    model: nn.Module
    calibration: Iterable[Any]
    evaluation: Iterable[Any]
    configurations: tuple[Configuration, ...]
    command: str
    seed: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the data can be read more than once."""
        for name, batches in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            if isinstance(batches, Iterator):
                raise DataError(
                    f"{name} of type {type(batches).__name__} can be read only once: give a list or a DataLoader"
                )
        if not self.configurations:
            raise SpecError("a job of 0 configurations: give at least one")


def run(job: Job | Sequence[Job], out: str | os.PathLike[str], *, say: Say = say) -> list[AccuracyRow]:
    """Quantize, measure, pack, reload and report.

    Every packed model is written, loaded again, and evaluated on all images beside the model it was packed from; their
    logits must be equal bit for bit.

    Args:
        job: What to do; several jobs, each of another network, share one table and one report.
        out: Folder of the results: `results.json`, a list of rows, the float model first; `report.html`; and
            `model.safetensors`, or one `<method>-<bits>.safetensors` per configuration when there are several, after
            the name of the network when there are several jobs. Its files change only after everything has succeeded.
        say: Shows one line to the user.

    Returns:
        The rows, those of a job together, its float model first.

    Raises:
        DataError: There are no images, or a batch is not `(images, labels)`.
        SpecError: There is no job, or two jobs are of one network.
        StateError: The reloaded model has other logits than the packed one.
        QuantizationError: As the methods; the note names the configuration.
    """
    jobs = (job,) if isinstance(job, Job) else tuple(job)
    names = [one.network for one in jobs]
    if not jobs or len(set(names)) < len(names):
        raise SpecError(f"jobs of {', '.join(names) or 'no network'}: give at least one, each of a network of its own")
    with _staged(Path(out)) as folder:
        chapters = [_chapter(one, folder, f"{one.network}-" if len(jobs) > 1 else "", say) for one in jobs]
        results = [row for chapter in chapters for row in chapter.rows]
        (folder / "results.json").write_text(
            json.dumps([dataclasses.asdict(row) for row in results], indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (folder / "report.html").write_text(render_chapters(chapters), encoding="utf-8")
        written = sorted(path.name for path in folder.iterdir())
    say(_tabulate(chapters))
    say(f"wrote {', '.join(written)} to {out}")
    return results


def _chapter(job: Job, folder: Path, prefix: str, say: Say) -> Chapter:
    place = environment(job.packages)
    checkpoint = state_sha256(job.model)
    correct, samples = accuracy(job.model, job.evaluation)
    say(f"{'float':<16}evaluated {job.network} on {samples} images of {job.dataset}: {_percent(correct, samples)}")
    table = [_float_line(job, correct, samples)]
    rows = [_row(job, place, checkpoint, table[0], None, samples)]
    views: list[LayerView] = []
    for configuration in job.configurations:
        try:
            line, quantized = _measure(job, configuration, folder / f"{prefix}{_file_name(job, configuration)}", say)
        except QuantizationError as error:
            error.add_note(f"in {configuration.name} {configuration.bits}")
            raise
        table.append(line)
        rows.append(_row(job, place, checkpoint, line, quantized, samples))
        if configuration in _analysed(job):
            views.append(_view(job, configuration, quantized))
            say(f"{'':16}compared each layer with its float counterpart")
    return Chapter(rows, table, views)


def accuracy(model: nn.Module, batches: Iterable[Any]) -> tuple[int, int]:
    """Count the images whose largest logit is that of their label.

    Args:
        model: A classifier; run in evaluation mode, its own mode is restored.
        batches: Pairs `(images, labels)`.

    Returns:
        Correct images, all images.

    Raises:
        DataError: There are no images, or a batch is not a pair.
    """
    correct = samples = 0
    with evaluation(model):
        for images, labels in _pairs(batches):
            correct += int((feed(model, images).argmax(1) == labels).sum())
            samples += len(labels)
    return correct, samples


def _measure(job: Job, configuration: Configuration, file: Path, say: Say) -> tuple[TableRow, Quantized]:
    label = f"{configuration.name} {configuration.bits}"
    torch.manual_seed(job.seed)
    start = time.perf_counter()
    quantized = configuration.method(
        job.model,
        job.calibration,
        weight_bits=configuration.weight_bits,
        activation_bits=configuration.activation_bits,
        **_seed(job, configuration),
        **configuration.options,
    )
    seconds = time.perf_counter() - start
    seen = quantized.calibration
    say(f"{label:<15} swapped {len(quantized.swap.swapped)} layers, calibrated with {seen.batches} batches")
    for what, found in (("saw only zero in", seen.dead), ("widened the scale of", seen.widened)):
        if found:
            say(f"{'':16}{what} {', '.join(found)}")
    path = save_packed(pack(quantized.model), file)
    reloaded = load_packed(path, job.model)
    correct, samples = _same_logits(quantized.model, reloaded, job.evaluation, path.name)
    say(f"{'':16}packed to {path.stat().st_size:,} bytes, reloaded: the same logits on {samples} images, bit for bit")
    say(f"{'':16}{_percent(correct, samples)}")
    line = TableRow(
        method=configuration.name,
        weight_bits=configuration.weight_bits,
        activation_bits=configuration.activation_bits,
        accuracy=100 * correct / samples,
        bits_per_weight=bits_per_weight(reloaded),
        size=path.stat().st_size,
        seconds=seconds,
        options={key: _plain(value) for key, value in _effective(configuration).items()},
    )
    return line, quantized


def _same_logits(quantized: nn.Module, reloaded: nn.Module, batches: Iterable[Any], name: str) -> tuple[int, int]:
    correct = samples = 0
    with evaluation(quantized), evaluation(reloaded):
        for index, (images, labels) in enumerate(_pairs(batches)):
            expected, logits = feed(quantized, images), feed(reloaded, images)
            if not torch.equal(expected, logits):
                raise StateError(
                    f"the logits of {name} reloaded differ by up to {float((expected - logits).abs().max()):.3g} from "
                    f"those of the model it was packed from, in batch {index}: they must be equal; report this with "
                    "the network and the method"
                )
            correct += int((logits.argmax(1) == labels).sum())
            samples += len(labels)
    return correct, samples


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    empty = True
    for index, batch in enumerate(batches):
        if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise DataError(f"evaluation batch {index} is a {type(batch).__name__}: expected a pair (images, labels)")
        empty = False
        yield batch[0], batch[1]
    if empty:
        raise DataError("the evaluation data holds no batch: give at least one")


def _float_line(job: Job, correct: int, samples: int) -> TableRow:
    unique = {id(tensor): (name, tensor.detach()) for name, tensor in job.model.state_dict(keep_vars=True).items()}
    size = len(save({name: tensor.contiguous().clone() for name, tensor in unique.values()}))
    return TableRow(
        method="float",
        weight_bits=FLOAT_BITS,
        activation_bits=FLOAT_BITS,
        accuracy=100 * correct / samples,
        bits_per_weight=bits_per_weight(job.model),
        size=size,
        seconds=None,
    )


def _row(
    job: Job, place: Environment, checkpoint: str, line: TableRow, quantized: Quantized | None, samples: int
) -> AccuracyRow:
    measured = dict(zip(MEASURED, (line.bits_per_weight, line.size, line.seconds), strict=True))
    return AccuracyRow(
        network=job.network,
        dataset=job.dataset,
        method=line.method,
        weight_bits=line.weight_bits,
        activation_bits=line.activation_bits,
        seed=job.seed,
        metric=TOP1,
        value=line.accuracy,
        samples=samples,
        stays_float=("everything",) if quantized is None else float_parts(quantized.model, quantized.swap),
        settings={**job.settings, **line.options, **measured},
        command=job.command,
        checkpoint_sha256=checkpoint,
        **dataclasses.asdict(place),
    )


def _analysed(job: Job) -> tuple[Configuration, ...]:
    """The configuration with the fewest bits shows where a network breaks, the one with the most is its baseline."""

    def bits(configuration: Configuration) -> tuple[int, int]:
        return (configuration.weight_bits + configuration.activation_bits, configuration.weight_bits)

    return (max(job.configurations, key=bits), min(job.configurations, key=bits))


def _view(job: Job, configuration: Configuration, quantized: Quantized) -> LayerView:
    images, _ = next(_pairs(job.evaluation))
    images = images[:_ANALYSED_SAMPLES] if isinstance(images, Tensor) else images
    example, _ = first_batch(job.calibration)
    # A method may build layers that no float layer corresponds to, or that hold no quantizer to look into. The report
    # then says so in the place of the figure.
    errors: list[LayerError] = []
    histograms: list[Distribution] = []
    errors_problem = histograms_problem = ""
    try:
        errors = compare(_counterpart(job.model, quantized.model, example), quantized.model, images)
    except QuantizationError as error:
        errors_problem = str(error)
    try:
        histograms = distributions(quantized.model, images)
    except QuantizationError as error:
        histograms_problem = str(error)
    name = f"{configuration.name} {configuration.bits}"
    return LayerView(name, errors, histograms, errors_problem, histograms_problem)


def _counterpart(model: nn.Module, quantized: nn.Module, example: Any) -> nn.Module:
    """Return the float model that a quantized one is compared with: some methods fold batch norms, some keep them."""
    return model if norm_paths(model) == norm_paths(quantized) else fold_batchnorm(model, example)


def _file_name(job: Job, configuration: Configuration) -> str:
    if len(job.configurations) == 1:
        return "model.safetensors"
    return f"{configuration.name}-{configuration.bits}.safetensors"


def _seed(job: Job, configuration: Configuration) -> dict[str, int]:
    """The seed of the job, for a method that draws from generators of its own."""
    wants = "seed" in taken(configuration.method) and "seed" not in configuration.options
    return {"seed": job.seed} if wants else {}


def _effective(configuration: Configuration) -> dict[str, Any]:
    """The options of a method as it ran, with its own defaults: a row must not depend on what the defaults become."""
    parameters = taken(configuration.method)
    defaults = {key: each.default for key, each in parameters.items() if each.default is not each.empty}
    # The bits and the seed have columns of their own; how progress is shown and kept changes no result.
    elsewhere = ("weight_bits", "activation_bits", "seed", "progress", "journal")
    return {key: value for key, value in {**defaults, **configuration.options}.items() if key not in elsewhere}


def _plain(value: Any) -> Any:
    """What JSON can hold of an option: numbers and texts as they are, anything else by its name."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    # Where a function lies in memory is no fact about the run.
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", getattr(value, "__name__", str(value)))


def _percent(correct: int, samples: int) -> str:
    return f"{correct} of {samples} correct, {100 * correct / samples:.2f} %"


def _tabulate(chapters: Sequence[Chapter]) -> str:
    width = max(len(chapter.rows[0].network) for chapter in chapters) + 2 if len(chapters) > 1 else 0
    name = max(12, *(len(row.method) + 2 for chapter in chapters for row in chapter.table))
    head = f"{'method':<{name}}{'bits':<8}{'accuracy':>10}{'bits/weight':>13}{'bytes':>13}{'seconds':>9}"
    lines = [
        f"{chapter.rows[0].network if width else '':<{width}}"
        f"{row.method:<{name}}{row.bits:<8}{row.accuracy:>8.2f} %{row.bits_per_weight:>13.2f}{row.size:>13,}"
        f"{'' if row.seconds is None else format(row.seconds, '.1f'):>9}"
        for chapter in chapters
        for row in chapter.table
    ]
    return "\n".join([f"{'network' if width else '':<{width}}{head}", *lines])


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Give a folder whose files move to `out` once the block has succeeded."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SpecError(f"results cannot go to {out}: it is a file; give a folder") from error
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, out / path.name)
