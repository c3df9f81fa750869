"""Train an adder network on CIFAR with the published recipe, or its twin of products.

    python benchmarks/accuracy/adder_train.py --data DIR --network resnet20 --out out/adder-resnet20 [--resume]
    torchrun --nproc-per-node 4 benchmarks/accuracy/adder_train.py --data DIR --network resnet20 --out OUT [--resume]

SGD with momentum, one cosine over all epochs, random crops and flips, weight decay on everything; the gradient of each
adder layer has one length, given to it by the optimizer's step (Chen et al. 2020, arXiv:1912.13200, as released). The
default of 399 epochs is the published number.

OUT gets `checkpoint.pt` after every epoch, `log.csv`, and at the end `model.safetensors` and a row with the accuracy on
the test images, which are looked at once. A part of the training images is held out to watch the training;
`--validation 0` trains on all of them, as published. `--resume` goes on after the last whole epoch: on a processor with
one thread the result is then, bit for bit, that of a run that was not interrupted.

Several processes share every batch: all draw the same order and the same crops, so they see the batches that one
process would see, and only batch norms differ, because each process normalises its own part.
"""

import argparse
import csv
import dataclasses
import math
import os
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, pad
from tqdm.auto import tqdm

from q_adder import AdderLearningRate, adder_weights, anneal_exponent
from q_adder.models import resnet20, resnet32, vgg_small
from q_core.checkpoint import write_atomically
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, state_sha256

NETWORKS = {"resnet20": resnet20, "resnet32": resnet32, "vgg-small": vgg_small}
CLASSES = {"cifar10": 10, "cifar100": 100}
EPOCHS, BATCH = 399, 256
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, ETA = 0.1, 0.9, 5e-4, 0.2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PADDING = 4  # pixels on every side, of which a crop takes back as many
HELD_OUT = 5000
SPLIT_SEED = 0  # the images held out are the same for all seeds of a training


def main() -> None:
    options = parse()
    place = Place.find()
    try:
        train, held_out, test = read(options)
        run = Run(options, place)
        if options.resume:
            run.load()
        elif run.checkpoint.exists():
            raise SystemExit(f"{run.checkpoint} is there already: --resume goes on with it, another --out begins anew")
        run.train(train, held_out)
        if place.rank == 0:
            run.report(test)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the images, see images.py")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--twin", action="store_true", help="train the twin of products")
    parser.add_argument("--dataset", choices=CLASSES, default="cifar10")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--anneal", type=int, default=0, help="epochs in which the exponent falls from 2 to 1")
    parser.add_argument("--validation", type=int, default=HELD_OUT, help="training images held out")
    parser.add_argument("--limit-images", type=int, help="use only so many training and test images, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="half precision with a scaled loss, on CUDA")
    parser.add_argument("--resume", action="store_true", help="go on after the last whole epoch in OUT")
    parser.add_argument("--results", type=pathlib.Path, help="file for the row, by default results.jsonl in OUT")
    return parser.parse_args(words)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where it computes."""

    rank: int = 0
    world: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def find(cls) -> "Place":
        """Take the process's place among those that torchrun started, if it did."""
        cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1:
            distributed.init_process_group("nccl" if cuda else "gloo")
        return cls(int(os.environ.get("RANK", "0")), world, device)


Images = tuple[Tensor, Tensor]
"""Bytes [n, 3, 32, 32] and labels [n]."""


def read(options: argparse.Namespace) -> tuple[Images, Images, Images]:
    """Read the images to train with, those held out of them, and the test images."""
    from images import load

    def tensors(*names: str) -> Images:
        parts = [load(options.data, f"{options.dataset}-{name}") for name in names]
        images = torch.cat([torch.from_numpy(images.copy()).permute(0, 3, 1, 2) for images, _ in parts])
        return images.contiguous(), torch.cat([torch.from_numpy(labels) for _, labels in parts])

    images, labels = tensors(*(f"train-{part}" for part in range(1, 6)))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))[: options.limit_images]
    held_out, train = order[: options.validation], order[options.validation :]
    if len(train) < 2:
        raise SystemExit(f"--validation {options.validation} leaves {len(train)} of {len(order)} images to train with")
    test_images, test_labels = (tensor[: options.limit_images] for tensor in tensors("test"))
    return (images[train], labels[train]), (images[held_out], labels[held_out]), (test_images, test_labels)


def normalize(images: Tensor) -> Tensor:
    """Turn bytes into the floats that the network is trained on."""
    mean, std = (torch.tensor(values, device=images.device).reshape(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, randoms: tuple[Tensor, Tensor]) -> Tensor:
    """Shift every image by up to `PADDING` pixels each way, black moving in, and mirror every other one.

    Args:
        images: Bytes [n, 3, h, w].
        randoms: Row and column of each cut-out, [2, n], and whether it is mirrored, [n].
    """
    (tops, lefts), mirrored = randoms
    count, channels, height, width = images.shape
    padded = pad(images, (PADDING,) * 4)
    rows = tops[:, None] + torch.arange(height, device=images.device)
    columns = lefts[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(count, device=images.device)[:, None, None, None]
    planes = torch.arange(channels, device=images.device)[:, None, None]
    return padded[index, planes, rows[:, None, :, None], columns[:, None, None, :]]


class Run:
    """A network on its way through the epochs: everything that a checkpoint holds."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        if options.amp and place.device.type != "cuda":
            raise SystemExit("--amp is for CUDA, and there is none here: leave it away")
        self.options, self.place = options, place
        self.checkpoint = options.out / "checkpoint.pt"
        torch.manual_seed(options.seed)
        kind = {"conv": nn.Conv2d} if options.twin else {}
        self.model = NETWORKS[options.network](CLASSES[options.dataset], **kind).to(place.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        if not options.twin:
            AdderLearningRate(self.optimizer, adder_weights(self.model), eta=ETA)
        # Epoch e = 1, 2, ... of E has 0.05 (1 + cos(pi e / (E + 1))): the published run leaves out both ends.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: (1 + math.cos(math.pi * (done + 1) / (options.epochs + 1))) / 2
        )
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.amp)
        self.order = torch.Generator().manual_seed(options.seed)  # of images, crops and flips
        self.history: list[dict[str, float]] = []

    def train(self, images: Images, held_out: Images, *, until: int | None = None) -> None:
        """Train to the last epoch, or to an earlier one, with a checkpoint after each."""
        network = nn.parallel.DistributedDataParallel(self.model) if self.place.world > 1 else self.model
        images, labels = (tensor.to(self.place.device) for tensor in images)
        for epoch in range(len(self.history) + 1, (until or self.options.epochs) + 1):
            start, rate = time.perf_counter(), self.optimizer.param_groups[0]["lr"]
            if self.options.anneal and not self.options.twin:
                anneal_exponent(self.model, (epoch - 1) / self.options.anneal)
            loss, hits = self.epoch(network, (images, labels), f"epoch {epoch} of {self.options.epochs}")
            if not math.isfinite(loss):
                raise SystemExit(f"the loss of epoch {epoch} is {loss}: {self.checkpoint} holds the epoch before it")
            self.schedule.step()
            row = {"epoch": epoch, "learning_rate": rate, "train_loss": loss, "train_percent": hits}
            if self.place.rank == 0:
                row |= {"held_out_percent": self.percent(held_out)} if len(held_out[0]) else {}
                row["seconds"] = round(time.perf_counter() - start, 1)
            self.history.append(row)
            if self.place.rank == 0:
                self.save()

    def epoch(self, network: nn.Module, data: Images, label: str) -> tuple[float, float]:
        """Train on every image once; return the mean loss and the percentage of correct images, of this process."""
        place, total, hits, seen = self.place, 0.0, 0, 0
        network.train()
        parts = torch.randperm(len(data[0]), generator=self.order).split(BATCH)
        # A batch norm needs two images, and every process its own two.
        parts = [part for part in parts if len(part) >= 2 * place.world]
        for part in tqdm(parts, desc=label, disable=None if place.rank == 0 else True, leave=False):
            shifts = torch.randint(0, 2 * PADDING + 1, (2, len(part)), generator=self.order)
            mirrored = torch.rand(len(part), generator=self.order) < 0.5
            mine = slice(place.rank, None, place.world)
            index, *randoms = (tensor.to(place.device) for tensor in (part[mine], shifts[:, mine], mirrored[mine]))
            x, y = normalize(augment(data[0][index], (randoms[0], randoms[1]))), data[1][index]
            with torch.autocast(place.device.type, torch.float16, enabled=self.options.amp):
                logits = network(x)
            # The gradient of the mean over the whole batch, although parts may differ by one image: processes are
            # averaged.
            loss = cross_entropy(logits.float(), y, reduction="sum") * (place.world / len(part))
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += float(loss.detach()) * len(part) / place.world
            hits += int((logits.detach().argmax(1) == y).sum())
            seen += len(index)
        return total / seen, 100 * hits / seen

    @torch.no_grad()
    def percent(self, data: Images) -> float:
        """Return the percentage of images that are classified correctly."""
        self.model.eval()
        hits = 0
        for images, labels in zip(*(tensor.split(250) for tensor in data), strict=True):
            logits = self.model(normalize(images.to(self.place.device)))
            hits += int((logits.argmax(1) == labels.to(self.place.device)).sum())
        return 100 * hits / len(data[0])

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}

    def recipe(self) -> dict[str, Any]:
        """What must not change between the parts of a run."""
        names = ("network", "twin", "dataset", "epochs", "anneal", "validation", "limit_images", "seed", "amp")
        return {name: getattr(self.options, name) for name in names}

    def save(self) -> None:
        """Write the checkpoint, then the log; either file is whole at any time."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"recipe": self.recipe(), "history": self.history}
        state |= {"random": torch.get_rng_state(), "order": self.order.get_state()}
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

        def log(path: str) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(self.history[-1]))
                writer.writeheader()
                writer.writerows(self.history)

        write_atomically(self.options.out / "log.csv", log)
        print(", ".join(f"{name} {value:.6g}" for name, value in self.history[-1].items()), flush=True)

    def load(self) -> None:
        """Go back to the last whole epoch."""
        if not self.checkpoint.exists():
            if self.place.rank == 0:
                print(f"no {self.checkpoint}: beginning with the first epoch")
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["recipe"] != self.recipe():
            raise SystemExit(f"{self.checkpoint} is of a run with {state['recipe']}, asked for are {self.recipe()}")
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.history = state["history"]
        torch.set_rng_state(state["random"])
        self.order.set_state(state["order"])
        if self.place.rank == 0:
            print(f"{self.checkpoint}: going on after epoch {len(self.history)}")

    def report(self, test: Images) -> None:
        """Write the weights, and the accuracy on the test images as a row of evidence."""
        name = f"{self.options.dataset}-{'' if self.options.twin else 'adder-'}{self.options.network}"
        weights = {key: tensor.detach().cpu().contiguous() for key, tensor in self.model.state_dict().items()}
        write_atomically(self.options.out / "model.safetensors", lambda path: save_file(weights, path))
        value = self.percent(test)
        row = AccuracyRow(
            network=name,
            dataset=f"{self.options.dataset} test",
            method="float",
            weight_bits=32,
            activation_bits=32,
            seed=self.options.seed,
            metric=TOP1,
            value=value,
            samples=len(test[0]),
            stays_float=("everything",),
            settings={**self.recipe(), "world": self.place.world, "eta": ETA, "batch": BATCH, **self.history[-1]},
            command=f"python benchmarks/accuracy/adder_train.py --data DIR {' '.join(words(self.options))}",
            checkpoint_sha256=state_sha256(self.model),
            **dataclasses.asdict(environment()),
        )
        append_jsonl(self.options.results or self.options.out / "results.jsonl", row)
        print(f"{name}: {value:.2f} % of {len(test[0])} test images after {len(self.history)} epochs")


def words(options: argparse.Namespace) -> list[str]:
    """The options as they would be typed, but for folders and `--resume`."""
    named = {key: value for key, value in vars(options).items() if key not in ("data", "out", "results", "resume")}
    flags = {f"--{key.replace('_', '-')}": value for key, value in named.items() if value not in (None, False)}
    return [*(f"{flag}{'' if value is True else f' {value}'}" for flag, value in flags.items()), "--out OUT"]


if __name__ == "__main__":
    main()
