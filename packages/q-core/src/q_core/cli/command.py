"""The command line of `q-quantize`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn

from q_core.cli import keywords, sources
from q_core.cli.job import Configuration, Job, run, say
from q_core.cli.rows import float_parts
from q_core.cli.sources import Channels, Images, Preparation
from q_core.errors import QuantizationError, SpecError
from q_core.methods import FLOAT_BITS, first_batch
from q_core.spec import MAX_BITS

_CIFAR = ("cifar10", "cifar100")


@dataclasses.dataclass(frozen=True)
class Options:
    """Quantize a trained classifier, measure it, and write a table, a report and the packed model.

    Images come from --calib and --eval, or from --data. Bits are 1 to 8, or 32 for float.

    Attributes:
        model: torchvision:NAME, or FILE.py:FUNCTION where the function returns a torch.nn.Module. The file is run.
        out: Folder for results.json, report.html and model.safetensors. Not needed for a dry run.
        weights: The state_dict of the float model: .safetensors, or .pth with nothing but tensors in it.
        calib: Folder of calibration images, a subfolder per class.
        eval: Folder of evaluation images, a subfolder per class.
        data: cifar10, cifar100, or FILE.py:FUNCTION where the function returns (calibration batches, evaluation
            batches). The file is run.
        data_dir: Folder in which torchvision keeps CIFAR.
        download: Fetch CIFAR into --data-dir if it is not there.
        method: How to quantize; installed packages bring methods. Or FILE.py:FUNCTION, where the function has the
            signature of q_core.nearest. The file is run.
        weight_bits: Bits of the weights.
        activation_bits: Bits of the layer inputs.
        edge_bits: Least bits of the first and the last layer.
        iterations: Steps for each unit, of a method that learns; as published unless given.
        journal: Folder in which a method that learns keeps what it has finished. The same command goes on from there.
        option: A further keyword of the method as NAME=VALUE; can be given several times.
        samples: Images to calibrate with.
        batch_size: Images in a batch.
        seed: Seed of everything random.
        workers: Processes that read images beside the main one.
        mean: Mean of red, green and blue, 0-1. By default that of the data set, of ImageNet for folders.
        std: Standard deviation of red, green and blue, 0-1. Default as for --mean.
        resize: Pixels of the shorter side of an image from a folder.
        crop: Pixels of either side of its central cut-out.
        dry_run: Show what would be swapped and what stays float, and write nothing.
    """

    model: str
    out: Path | None = None
    weights: Path | None = None
    calib: Path | None = None
    eval: Path | None = None
    data: str | None = None
    data_dir: Path | None = None
    download: bool = False
    method: str = "nearest"
    weight_bits: int = 8
    activation_bits: int = 8
    edge_bits: int = 8
    iterations: int | None = None
    journal: Path | None = None
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    samples: int = 1024
    batch_size: int = 64
    seed: int = 0
    workers: int = 0
    mean: Channels | None = None
    std: Channels | None = None
    resize: int = 256
    crop: int = 224
    dry_run: bool = False


def execute(arguments: list[str]) -> int:
    """Run the command with these words.

    Returns:
        0, or 2 when the input cannot be used; the reason is then on standard error.
    """
    options = tyro.cli(
        Annotated[Options, tyro.conf.FlagCreatePairsOff], prog="q-quantize", args=arguments, use_underscores=False
    )
    try:
        _execute(options, shlex.join(["q-quantize", *arguments]))
    except QuantizationError as error:
        sys.stderr.write("\n".join([f"q-quantize: {error}", *getattr(error, "__notes__", [])]) + "\n")
        return 2
    return 0


def _execute(options: Options, command: str) -> None:
    _check(options)
    method, package = sources.method(options.method)
    keyword_arguments = {
        "edge_bits": options.edge_bits,
        **keywords.flag(options.method, method, "iterations", options.iterations),
        **keywords.flag(options.method, method, "journal", options.journal),
        **keywords.read(options.method, method, options.option),
    }
    model = sources.model(options.model, options.weights)
    network = options.model.removeprefix(sources.TORCHVISION)
    say(f"{'model':<16}{network}, {sum(p.numel() for p in model.parameters()):,} parameters")
    images = _images(options)
    say(f"{'images':<16}{images.name}, {', '.join(f'{key}: {value}' for key, value in images.settings.items())}")
    configuration = Configuration(
        Path(options.method).name, method, options.weight_bits, options.activation_bits, keyword_arguments
    )
    if options.dry_run:
        _dry_run(model, images, configuration)
        return
    if options.out is None:
        raise SpecError("--out is missing: give a folder for the results, or --dry-run")
    settings = {"weights": options.weights and options.weights.name, "loader_batch_size": options.batch_size}
    job = Job(
        network=Path(network).name,
        dataset=images.name,
        model=model,
        calibration=images.calibration,
        evaluation=images.evaluation,
        configurations=(configuration,),
        command=command,
        seed=options.seed,
        settings={**settings, **images.settings},
        packages=(*package, *(["torchvision"] if "torchvision" in sys.modules else [])),
    )
    run(job, options.out)


def _check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded."""
    for name in ("weight_bits", "activation_bits", "edge_bits"):
        bits = getattr(options, name)
        if bits != FLOAT_BITS and not 1 <= bits <= MAX_BITS:
            raise SpecError(f"{_flag(name)} {bits}: supported are 1 to {MAX_BITS}, or {FLOAT_BITS} for float")
    for name in ("iterations", "samples", "batch_size", "resize", "crop"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise SpecError(f"{_flag(name)} {getattr(options, name)}: it must be at least 1")
    if (options.mean is None) != (options.std is None):
        raise SpecError("one of --mean and --std is given: give both or neither")
    if options.out is None and not options.dry_run:
        raise SpecError("--out is missing: give a folder for the results, or --dry-run")
    folders = [name for name in ("calib", "eval") if getattr(options, name) is not None]
    if options.data is not None and folders:
        raise SpecError(f"--data {options.data} and {_flag(folders[0])} are both given: images come from one of them")
    if options.data is None and len(folders) < 2:
        raise SpecError("no images: give the folders --calib and --eval, or --data")
    if options.data in _CIFAR and options.data_dir is None:
        raise SpecError(f"--data {options.data} without --data-dir: give the folder in which torchvision keeps it")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _images(options: Options) -> Images:
    preparation = Preparation(
        samples=options.samples,
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.workers,
        normalisation=(options.mean, options.std) if options.mean and options.std else None,
        resize=options.resize,
        crop=options.crop,
    )
    if options.data in _CIFAR and options.data_dir is not None:
        return sources.cifar_images(options.data, options.data_dir, options.download, preparation)
    if options.data is not None:
        return sources.function_images(options.data, preparation)
    if options.calib is not None and options.eval is not None:
        return sources.folder_images(options.calib, options.eval, preparation)
    raise SpecError("no images: give the folders --calib and --eval, or --data")


def _dry_run(model: nn.Module, images: Images, configuration: Configuration) -> None:
    # Only the method knows what it swaps, so it is run, on two images and with one step if it learns: what it would
    # learn from them is thrown away.
    example, _ = first_batch(images.calibration)
    quantized = configuration.method(
        model,
        [example[:2]],
        weight_bits=configuration.weight_bits,
        activation_bits=configuration.activation_bits,
        progress=False,
        **{**configuration.options, **keywords.least(configuration.method)},
    )
    say(f"{configuration.name} {configuration.bits} would swap {len(quantized.swap.swapped)} layers")
    say(str(quantized.swap))
    say("stays float: " + "; ".join(float_parts(quantized.model, quantized.swap)))
    say("dry run: nothing was written")
