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
optimizers, the schedule and the random numbers, and a run that goes on ends bit for bit as one that was not stopped. A
file of other settings is refused. Under torchrun each process takes its share of every batch.
"""

import argparse
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
from tqdm.auto import tqdm

import snapshot
from images import load, normalize
from networks import NETWORKS, correct, crop
from q_core import bits_per_weight, pack
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256
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
    done = recorded(options.results) if options.resume else set()
    for settings, variant in cells(options):
        if key(dataclasses.asdict(settings)) in done:
            continue
        row = Run(settings, variant, options, ranks).row()
        if ranks.rank == 0:
            append_jsonl(options.results, row)
            print(f"{name(settings)}: {row.value:.2f} % of {row.samples} test images", flush=True)
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
    parser.add_argument("--step-lr", type=float, default=1e-3, help="of what quantizers learn")
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
                wanted = seed in variant.seeds and network in variant.networks and options.only in variant.name
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
        if self.size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return batch.chunk(self.size)[self.rank]

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
    """Training images of one network, cropped and flipped, some of them held out, and test images."""

    def __init__(self, network: str, data: pathlib.Path, settings: Settings) -> None:
        self.pretrained, self.data, self.settings = NETWORKS[network], data, settings
        hundred = self.pretrained.dataset == "cifar100"
        splits = ["cifar100-train-balanced-10k"] if hundred else [f"cifar10-train-{part}" for part in range(1, 6)]
        parts = [load(data, split) for split in splits]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        held = min(HELD_OUT, len(images) // 10)
        self.held_out = normalize(images[-held:].numpy(), *self.pretrained.moments), labels[-held:]
        self.images, self.labels = images[:-held], labels[:-held]

    def calibration(self) -> list[Tensor]:
        """Return batches of training images as they are."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        chosen = torch.randperm(len(self.images), generator=generator)[:CALIBRATION_IMAGES]
        return list(normalize(self.images[chosen].numpy(), *self.pretrained.moments).split(128))

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
        return normalize(images.numpy(), *self.pretrained.moments), self.labels[chosen]


class Run:
    """One network on its way through its steps."""

    def __init__(self, settings: Settings, variant: Variant, options: argparse.Namespace, ranks: Ranks) -> None:
        self.settings, self.variant, self.options, self.ranks = settings, variant, options, ranks
        self.images = Images(settings.network, options.data, settings)
        self.float_model = self.images.pretrained.load(options.data, settings.network).to(ranks.device)
        self.checkpoint = state_sha256(self.float_model)
        torch.manual_seed(settings.seed)
        self.seconds, self.losses = 0.0, []
        self.half = settings.steps // 2 if variant.from_more else 0
        self.build(settings.bits + (1 if variant.from_more else 0))

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

    def train(self) -> None:
        """Take all steps, from where a killed run was."""
        first = self.load()
        begin = time.perf_counter()
        shown = tqdm(range(first, self.settings.steps), desc=name(self.settings), disable=None)
        for step in shown:
            if step == self.half and self.half:
                policy = self.variant.from_more
                self.adopt(
                    lower_bits(self.model, self.settings.bits, activation=policy, weight=policy),
                    self.settings.steps - self.half,
                )
            self.losses.append(self.step(step))
            if (step + 1) % SAVED == 0:
                self.log(step + 1)
                self.seconds += time.perf_counter() - begin
                begin = time.perf_counter()
                self.save(step + 1)
        self.seconds += time.perf_counter() - begin

    def step(self, step: int) -> float:
        """Take one step and return the loss."""
        x, y = (self.ranks.share(part).to(self.ranks.device) for part in self.images.batch(step))
        self.wrapped.train()
        if self.settings.frozen_norms:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            logits = self.wrapped(x)
            loss = self.loss(logits.float(), x, y)
        value = float(loss.detach())
        if not np.isfinite(value):
            check_finite(self.model)
            raise SystemExit(f"{name(self.settings)}: the loss is {value} at step {step}: lower the learning rates")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return value

    def loss(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not self.variant.distill:
            return cross_entropy(logits, y)
        with torch.no_grad():
            teacher = self.float_model(x)
        return distillation_loss(logits, teacher, y)

    @torch.no_grad()
    def held_out(self) -> float:
        """Percent of the held-out images that are classified correctly."""
        self.model.eval()
        images, labels = (part.to(self.ranks.device) for part in self.images.held_out)
        return 100 * correct(self.model, images, labels) / len(labels)

    def log(self, step: int) -> None:
        """Write a line: the mean loss since the last one, learning rates, accuracy, and the state of the steps."""
        if self.ranks.rank or self.options.out is None:
            return
        report = inspect(self.model, self.images.held_out[0][:256].to(self.ranks.device))
        line = {
            "step": step,
            "loss": sum(self.losses[-SAVED:]) / len(self.losses[-SAVED:]),
            "lr": self.schedules[0].get_last_lr()[0],
            "step_lr": self.schedules[-1].get_last_lr()[0],
            "held_out_percent": self.held_out(),
            "collapsed_steps": sum(layer.collapsed for layer in report.layers),
            "dead_levels": sum(layer.dead for layer in report.layers),
            "largest_overflow": max(layer.overflow for layer in report.layers),
        }
        path = self.file("csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, line)
            if not file.tell():
                writer.writeheader()
            writer.writerow(line)

    def file(self, suffix: str) -> pathlib.Path:
        return self.options.out / f"{name(self.settings).replace(' ', '-').replace(',', '')}.{suffix}"

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": torch.get_rng_state(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def save(self, step: int) -> None:
        if self.options.out is None or self.ranks.rank:
            return
        tensors: dict[str, Tensor] = {}
        header = {
            "settings": dataclasses.asdict(self.settings),
            "step": step,
            "state": taken(self.state(), "", tensors),
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        metadata = {"qat": json.dumps(header)}
        write_atomically(self.file("safetensors"), lambda path: save_file(tensors, path, metadata=metadata))

    def load(self) -> int:
        """Return the number of steps that were taken already."""
        if self.options.out is None or not self.file("safetensors").exists():
            return 0
        saved = snapshot.load(self.file("safetensors"))
        here, there = dataclasses.asdict(self.settings), saved["settings"]
        changed = [
            f"{field}={there.get(field)!r}, now {here[field]!r}" for field in here if there.get(field) != here[field]
        ]
        if changed:
            raise SystemExit(
                f"{self.file('safetensors')} is of a run with {'; '.join(changed)}: give another --out, or the "
                "settings it was started with"
            )
        step, state = int(saved["step"]), saved["training"]
        if self.half and step > self.half:
            policy = self.variant.from_more
            lowered = lower_bits(self.model, self.settings.bits, activation=policy, weight=policy)
            self.adopt(lowered, self.settings.steps - self.half)
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for schedule, kept in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(kept)
        torch.set_rng_state(state["random"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        return step

    def row(self) -> AccuracyRow:
        """Train, pack, and evaluate what is packed."""
        torch.set_num_threads(1 if self.ranks.device.type == "cpu" else torch.get_num_threads())
        self.train()
        packed = pack(copy.deepcopy(self.model).eval()).to(self.ranks.device)
        images, labels = self.images.held_out
        if self.options.test_images:
            images, labels = (
                part[: self.options.test_images] for part in self.images.pretrained.test(self.options.data)
            )
        hits = correct(packed, images.to(self.ranks.device), labels.to(self.ranks.device))
        last = self.losses[-SAVED:]
        extra = {
            "calibration_images": CALIBRATION_IMAGES,
            "held_out_percent": round(self.held_out(), 2),
            "loss": round(sum(last) / len(last), 4),
            "seconds": round(self.seconds),
            "bits_per_weight": round(bits_per_weight(packed), 3),
            "processes": self.ranks.size,
        }
        settings = {field: value for field, value in dataclasses.asdict(self.settings).items() if field != "network"}
        return AccuracyRow(
            network=self.settings.network,
            dataset=f"{self.images.pretrained.dataset} {'test' if self.options.test_images else 'held out'}",
            method="trained",
            weight_bits=self.settings.bits,
            activation_bits=self.settings.bits,
            seed=self.settings.seed,
            metric=TOP1,
            value=100 * hits / len(labels),
            samples=len(labels),
            stays_float=float_parts(self.model, self.quantized.swap),
            settings=settings | extra,
            command=f"nox -s accuracy -- --data DIR --suite qat --steps {self.settings.steps}",
            checkpoint_sha256=self.checkpoint,
            **dataclasses.asdict(environment()),
        )


if __name__ == "__main__":
    main()
