"""Training quantized networks from published weights: nuLSQ, LSQ and their peers in one loop.

    nox -s accuracy -- --data DIR --suite qat [--resume]
    python benchmarks/accuracy/qat.py --data DIR [--only TEXT] [--bits 2] [--seeds 0] [--steps 200] [--resume]
    torchrun --nproc-per-node 2 benchmarks/accuracy/qat.py --data DIR ...

Every variant starts from the same weights and takes the same steps, optimizers, learning rates and images: SGD with
momentum for weights and AdamW for what quantizers learn, a short warm-up and a cosine to zero. Images are cropped and
flipped at random. First and last layer have 8 bits, over the range of the calibration images, and nothing to learn.
`HELD_OUT` training images are never trained on; settings are chosen on them, and progress is reported on them. The
test images are used once, at the end, by the packed model. Rows are appended to
`benchmarks/results/accuracy/qat.jsonl`; the tables in the documentation are generated from that file.

On a CPU the steps are few: 200 of 64 images, where the papers take 300 epochs of 50,000. `--steps` and `--batch` say
how many; the published recipe is `--steps 117000 --batch 128 --lr 0.04`, for a GPU.

A run that is killed goes on where it was: with `--out` its state is kept in a file every `SAVED` steps, with the
optimizers, the schedules and the random numbers, and a run that goes on ends bit for bit as one that was not stopped. A
file of other settings is refused. Under torchrun each process takes an equal share of every batch; on a CPU each sees
the batch norms of its own share then, unless `--frozen-norms` is given.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import torch

# Beside this file.
from qat_variants import BITS, SEEDS, VARIANTS, Variant
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm

import snapshot
from images import load, normalize
from networks import NETWORKS, correct, crop
from q_core import bits_per_weight, pack
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256
from q_core.errors import QuantizationError
from q_nulsq.distillation import distillation_loss
from q_nulsq.monitor import check_finite, inspect
from q_nulsq.optim import parameter_groups, project_after, warmup_cosine
from q_nulsq.progressive import lower_bits

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "accuracy" / "qat.jsonl"
CALIBRATION_IMAGES, HELD_OUT, SAVED = 1024, 5000, 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is, apart from what it is called: a run goes on only under the same settings.

    Attributes:
        network: Name of the pretrained network.
        variant: Name of the variant.
        bits: Of weights and activations.
        seed: Of images and their order.
        steps: Updates.
        batch: Images of each update, of all processes together.
        lr: Learning rate of weights.
        step_lr: Learning rate of what quantizers learn.
        weight_decay: Of weights.
        warmup: Steps of warm-up.
        frozen_norms: Whether batch norms keep the statistics of the pretrained network.
        precision: `float32`, or `bfloat16` for autocast.
    """

    network: str
    variant: str
    bits: int
    seed: int
    steps: int
    batch: int
    lr: float
    step_lr: float
    weight_decay: float
    warmup: int
    frozen_norms: bool
    precision: str


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    ranks = Ranks()
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    done = recorded(options.results) if options.resume else set()
    for settings, variant in cells(options):
        if key(dataclasses.asdict(settings)) in done:
            continue
        run = Run(
            settings,
            variant,
            Images.read(settings, options.data),
            NETWORKS[settings.network].load(options.data, settings.network),
            ranks,
            out=options.out,
        )
        run.train()
        row = judge(run, options)
        if ranks.rank == 0:
            append_jsonl(options.results, row)
            print(f"{name(settings)}: {row.value:.2f} % of {row.samples} images of {row.dataset}", flush=True)
    ranks.close()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--exactly", help="the variant of this name")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.01, help="of weights")
    parser.add_argument("--step-lr", type=float, default=5e-3, help="of what quantizers learn")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of weights")
    parser.add_argument("--warmup", type=int, default=20, help="steps of warm-up")
    parser.add_argument("--frozen-norms", action="store_true", help="leave the statistics of batch norms alone")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where autocast does")
    parser.add_argument("--test-images", type=int, default=10_000, help="0 to report on the held-out images instead")
    parser.add_argument("--out", type=pathlib.Path, help="folder of logs and of what a killed run goes on from")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--resume", action="store_true", help="leave out cells whose row is in the results already")
    return parser.parse_args(words)


def cells(options: argparse.Namespace) -> Iterator[tuple[Settings, Variant]]:
    """List the cells, the first seed of everything before the second of anything."""
    for seed in options.seeds:
        for network in options.networks:
            for variant in VARIANTS:
                seeds = variant.seeds if network == variant.networks[0] else variant.seeds[:1]
                wanted = seed in seeds and network in variant.networks and options.only in variant.name
                if not wanted or options.exactly not in (None, variant.name):
                    continue
                for bits in variant.bits:
                    if bits in options.bits:
                        yield settings_of(options, network, variant, bits, seed), variant


def settings_of(options: argparse.Namespace, network: str, variant: Variant, bits: int, seed: int) -> Settings:
    given = {field: getattr(options, field) for field in ("steps", "batch", "lr", "step_lr", "weight_decay", "warmup")}
    precision = "bfloat16" if options.amp else "float32"
    named = {"network": network, "variant": variant.name, "bits": bits, "seed": seed}
    return Settings(**named, **given, frozen_norms=options.frozen_norms, precision=precision)


def name(settings: Settings) -> str:
    return f"{settings.network} W{settings.bits}A{settings.bits} seed {settings.seed} {settings.variant}"


def key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(settings[field.name] for field in dataclasses.fields(Settings))


def recorded(results: pathlib.Path) -> set[tuple[Any, ...]]:
    """Cells whose row is in the results."""
    if not results.exists():
        return set()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {
        key(row["settings"] | {"network": row["network"], "bits": row["weight_bits"], "seed": row["seed"]})
        for row in rows
    }


class Ranks:
    """This process among those that train together; one alone unless torchrun started it."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """Average a number over all processes, so that all of them know it."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size

    def wrap(self, model: nn.Module) -> nn.Module:
        """Let gradients be averaged over processes, and batch norms see the whole batch where that exists."""
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model)

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


class Images:
    """Training images of one network, cropped and flipped, some of them held out.

    Args:
        settings: Of the run.
        images: All training images, uint8 [n, 32, 32, 3].
        labels: Their classes [n].
        moments: Mean and standard deviation per channel of the network's training.
    """

    def __init__(
        self, settings: Settings, images: Tensor, labels: Tensor, moments: tuple[tuple[float, ...], tuple[float, ...]]
    ) -> None:
        held = min(HELD_OUT, len(images) // 10)
        self.settings, self.moments = settings, moments
        self.images, self.labels = images[:-held], labels[:-held]
        self.held_out = normalize(images[-held:].numpy(), *moments), labels[-held:]
        if settings.batch > len(self.images):
            raise SystemExit(f"--batch {settings.batch}: there are {len(self.images)} training images")

    @classmethod
    def read(cls, settings: Settings, data: pathlib.Path) -> "Images":
        """Read the training images that a pretrained network goes with."""
        pretrained = NETWORKS[settings.network]
        hundred = pretrained.dataset == "cifar100"
        splits = ["cifar100-train-balanced-10k"] if hundred else [f"cifar10-train-{part}" for part in range(1, 6)]
        parts = [load(data, split) for split in splits]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return cls(settings, images, labels, pretrained.moments)

    def calibration(self) -> list[Tensor]:
        """Return batches of training images as they are."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        chosen = torch.randperm(len(self.images), generator=generator)[:CALIBRATION_IMAGES]
        return list(normalize(self.images[chosen].numpy(), *self.moments).split(128))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the images of a step: a function of seed and step alone, so that any step can be the next."""
        per_epoch = len(self.images) // self.settings.batch
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch)
        )
        chosen = order[place * self.settings.batch : (place + 1) * self.settings.batch]
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        images = crop(pad(self.images[chosen], (0, 0, 4, 4, 4, 4)), generator)
        return normalize(images.numpy(), *self.moments), self.labels[chosen]


class Run:
    """One network on its way through its steps.

    Args:
        settings: What the run is.
        variant: The variant that the settings name.
        images: What it trains on.
        float_model: The network it starts from, in evaluation mode. Not changed.
        ranks: The processes that train together.
        out: Folder of the log, and of what a killed run goes on from; neither is kept when None.
        saved: Steps between two lines of the log, and between two snapshots.
    """

    def __init__(
        self,
        settings: Settings,
        variant: Variant,
        images: Images,
        float_model: nn.Module,
        ranks: Ranks,
        *,
        out: pathlib.Path | None = None,
        saved: int = SAVED,
    ) -> None:
        self.settings, self.variant, self.images, self.ranks = settings, variant, images, ranks
        self.out, self.saved = out, saved
        self.half = settings.steps // 2 if variant.from_more else 0
        if settings.batch % ranks.size:
            raise SystemExit(f"--batch {settings.batch} of {ranks.size} processes: they must have equal shares of it")
        if variant.from_more and not self.half:
            raise SystemExit(f"--steps {settings.steps} of {variant.name}: its two halves have a step each at least")
        self.float_model = float_model.to(ranks.device)
        self.checkpoint = state_sha256(float_model)
        torch.manual_seed(settings.seed)
        self.seconds, self.losses = 0.0, []
        self.build(settings.bits + (1 if self.half else 0))

    def build(self, bits: int) -> None:
        """Give a copy of the float network quantizers and optimizers."""
        calibration = [batch.to(self.ranks.device) for batch in self.images.calibration()]
        method, progress = self.variant.method, {"progress": False}
        self.quantized = method(self.float_model, calibration, weight_bits=bits, activation_bits=bits, **progress)
        self.adopt(self.quantized.model, self.half or self.settings.steps)

    def adopt(self, model: nn.Module, steps: int) -> None:
        """Train this model from now on, for so many steps."""
        self.model = model
        settings = self.settings
        weights, norms, learned = parameter_groups(
            model, lr=settings.lr, weight_decay=settings.weight_decay, step_lr=settings.step_lr
        )
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([weights, norms], momentum=0.9, nesterov=True)]
        if learned["params"]:
            self.optimizers.append(self.variant.step_optimizer([learned]))
            project_after(self.optimizers[-1], model)
        warmup = min(settings.warmup, steps - 1)
        self.schedules = [warmup_cosine(optimizer, warmup, steps) for optimizer in self.optimizers]
        self.wrapped = self.ranks.wrap(model)

    def switch(self) -> None:
        """Merge the steps of a network of one bit more, and train what comes out for the rest of the run."""
        policy = self.variant.from_more
        lowered = lower_bits(self.model, self.settings.bits, activation=policy, weight=policy)
        self.adopt(lowered, self.settings.steps - self.half)

    def train(self) -> None:
        """Take all steps, from where a killed run was."""
        first, last = self.load(), self.settings.steps
        quiet = True if self.ranks.rank else None  # None: where nobody is watching
        begin = time.perf_counter()
        for step in tqdm(range(first, last), desc=name(self.settings), disable=quiet):
            if self.half and step == self.half:
                self.switch()
            self.losses.append(self.step(step))
            if (step + 1) % self.saved == 0 or step + 1 == last:
                self.log(step + 1)
                self.seconds += time.perf_counter() - begin
                begin = time.perf_counter()
                self.save(step + 1)

    def step(self, step: int) -> float:
        """Take one step and return the loss, the mean over all processes."""
        x, y = (self.ranks.share(part).to(self.ranks.device) for part in self.images.batch(step))
        self.wrapped.train()
        if self.settings.frozen_norms:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                    module.eval()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self.autocast():
            logits = self.wrapped(x)
            loss = self.loss(logits, x, y)
        loss.backward()
        value = self.sound(loss, x, step)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return value

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def sound(self, loss: Tensor, x: Tensor, step: int) -> float:
        """Return the loss, or stop and name the layer that spoils it or its gradient; all processes stop together."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        value, norm = torch.stack([self.ranks.mean(loss), get_total_norm(gradients).to(loss)]).tolist()
        if not np.isfinite([value, norm]).all():
            try:
                with self.autocast():
                    check_finite(self.model, loss, x)
            except QuantizationError as error:
                raise SystemExit(f"{name(self.settings)}: step {step}: {error}") from error
            raise SystemExit(f"{name(self.settings)}: step {step}: loss {value}, of gradients of norm {norm}")
        return float(value)

    def loss(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = wide(logits)
        if not self.variant.distill:
            return cross_entropy(logits, y)
        with torch.no_grad():
            teacher = self.float_model(x)
        return distillation_loss(logits, wide(teacher), y)

    @torch.no_grad()
    def held_out(self) -> float:
        """Percent of the held-out images that are classified correctly."""
        self.model.eval()
        images, labels = (part.to(self.ranks.device) for part in self.images.held_out)
        return 100 * correct(self.model, images, labels) / len(labels)

    def log(self, step: int) -> None:
        """Write a line: the mean loss since the last one, learning rates, accuracy, and the state of the steps."""
        if self.ranks.rank or self.out is None:
            return
        report = inspect(self.model, self.images.held_out[0][:256].to(self.ranks.device))
        # Most of the 256 levels of the first and the last layer are not taken by their few weights.
        layers = [layer for layer in report.layers if layer.counts.shape[-1] <= 2 ** (self.settings.bits + 1)]
        recent = self.losses[(step - 1) // self.saved * self.saved :]
        line = {
            "step": step,
            "loss": sum(recent) / len(recent),
            "lr": self.schedules[0].get_last_lr()[0],
            "step_lr": self.schedules[-1].get_last_lr()[0],
            "held_out_percent": self.held_out(),
            "collapsed_steps": sum(layer.collapsed for layer in layers),
            "dead_levels": sum(layer.dead for layer in layers),
            "largest_overflow": max((layer.overflow for layer in layers), default=0.0),
        }
        path = self.file("csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, line)
            if not file.tell():
                writer.writeheader()
            writer.writerow(line)

    def forget(self, step: int) -> None:
        """Take lines off the log that a killed run wrote after the step it goes on from."""
        if self.ranks.rank or self.out is None or not self.file("csv").exists():
            return
        header, *lines = self.file("csv").read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= step]
        self.file("csv").write_text("".join([header, *kept]) if kept else "")

    def file(self, suffix: str) -> pathlib.Path:
        return self.out / f"{name(self.settings).replace(' ', '-').replace(',', '')}.{suffix}"

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.ranks.device.type == "cuda" else None,
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        fixed = {"float_sha256": self.checkpoint, "processes": self.ranks.size}
        return dataclasses.asdict(self.settings) | fixed

    def save(self, step: int) -> None:
        """Keep the state after so many steps."""
        if self.out is not None and not self.ranks.rank:
            state = {"settings": self.identity(), "step": step, "training": self.state()}
            snapshot.save(self.file("safetensors"), state)

    def load(self) -> int:
        """Go on from what was kept, if anything was, and return the number of steps that were taken already."""
        step = 0
        if self.out is not None and self.file("safetensors").exists():
            saved = snapshot.load(self.file("safetensors"))
            self.compare(saved["settings"])
            step = int(saved["step"])
            if self.half and step > self.half:
                self.switch()
            self.restore(saved["training"])
        self.forget(step)
        return step

    def compare(self, there: Mapping[str, Any]) -> None:
        """Refuse to go on from a run that was another one."""
        here = self.identity()
        changed = [
            f"{field}={there.get(field)!r}, now {here[field]!r}" for field in here if there.get(field) != here[field]
        ]
        if changed:
            raise SystemExit(
                f"{self.file('safetensors')} is of a run with {'; '.join(changed)}: give another --out, or the "
                "settings it was started with"
            )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for schedule, kept in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(kept)
        torch.set_rng_state(state["random"])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"])
        self.losses, self.seconds = state["losses"], state["seconds"]


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32, if they are narrower."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def judge(run: Run, options: argparse.Namespace) -> AccuracyRow:
    """Pack what was trained, and evaluate what is packed."""
    settings, pretrained, ranks = run.settings, NETWORKS[run.settings.network], run.ranks
    packed = pack(copy.deepcopy(run.model).eval()).to(ranks.device)
    images, labels = run.images.held_out
    if options.test_images:
        images, labels = (part[: options.test_images] for part in pretrained.test(options.data))
    hits = correct(packed, images.to(ranks.device), labels.to(ranks.device))
    last = run.losses[-run.saved :]
    extra = {
        "calibration_images": CALIBRATION_IMAGES,
        "held_out_percent": round(run.held_out(), 2),
        "loss": round(sum(last) / len(last), 4),
        "seconds": round(run.seconds),
        "bits_per_weight": round(bits_per_weight(packed), 3),
        "processes": ranks.size,
    }
    given = {field: value for field, value in dataclasses.asdict(settings).items() if field != "network"}
    return AccuracyRow(
        network=settings.network,
        dataset=f"{pretrained.dataset} {'test' if options.test_images else 'held out'}",
        method="trained",
        weight_bits=settings.bits,
        activation_bits=settings.bits,
        seed=settings.seed,
        metric=TOP1,
        value=100 * hits / len(labels),
        samples=len(labels),
        stays_float=float_parts(run.model, run.quantized.swap),
        settings=given | extra,
        command=f"nox -s accuracy -- --data DIR --suite qat --steps {settings.steps}",
        checkpoint_sha256=run.checkpoint,
        **dataclasses.asdict(environment()),
    )


if __name__ == "__main__":
    main()
