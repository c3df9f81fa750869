"""Training the published adder ResNet-20 at few bits, block by block: with labels, or without.

    nox -s accuracy -- --data DIR --suite adder-qat [--resume]
    python benchmarks/accuracy/adder_qat.py --data DIR [--bits 2] [--steps N] [--without-labels] [--rate R]

The start is what the `adder` suite ends with: one-sided levels, one factor common to all ranges, means corrected. From
there weights, scales and batch norms are trained on random crops and flips, with Adam and one cosine; the gradient of
each adder layer gets its length from the optimizer's step. Batch norms are in training mode.

No gradient passes from a block to the one before it. Each block learns to give what the float network gives at its
place, from the inputs that the quantized blocks before it make, and the last one also to classify. One loss at the end
brought nothing in 150 steps at any rate: on its way back the gradient grows with every adder layer, a thousandfold from
the last to the first, and what reaches the first ones is noise.

What is evaluated is the packed model, which computes on integers, once, on all test images. Settings are chosen on
`HELD_OUT` training images that this training does not see (but that of the float network did). The row is appended to
`benchmarks/results/accuracy/adder.jsonl`.
"""

import argparse
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator

import numpy as np
import torch

# First of ours: it puts the folder of the next ones on the path.
from adder import NETWORK, ONE_SIDED, RESULTS, Session, Variant, recorded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm.auto import tqdm

from images import load, normalize
from networks import CIFAR10, correct, crop
from q_adder import AdderLearningRate, QuantAdderConv2d, adder_weights, trainable
from q_adder.models.resnet import BasicBlock
from q_adder.refinement import divergence
from q_core import bits_per_weight, pack
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts

BITS, BATCH, ETA, SEED = 2, 64, 0.2, 0
START = Variant("one-sided, common factor, means", ONE_SIDED, (2, 3, 4), means=True, tune=0)
STEPS, RATE, SCALE_RATE, OTHER_RATE = 1000, 1e-2, 1e-2, 1e-2
HELD_OUT, SHOWN = 1000, 100  # images, steps between lines


def main() -> None:
    options = parse()
    if options.resume and (options.variant, options.bits, None, options.seed) in recorded():
        print(f"{RESULTS} holds the row of {options.variant!r}")
        return
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    session = Session(options.data, set())
    start = session.quantize(START, options.bits, options.seed)
    training = Training(trainable(start.model), session.model, Crops(options.data, options.seed), options)
    begin = time.perf_counter()
    training.run()
    seconds = time.perf_counter() - begin
    packed = pack(training.student.eval())
    hits = correct(packed, session.images, session.labels)
    names = ("variant", "steps", "rate", "scale_rate", "other_rate")
    row = AccuracyRow(
        network=NETWORK,
        dataset=f"{session.network.dataset} test",
        method="trained",
        weight_bits=options.bits,
        activation_bits=options.bits,
        seed=options.seed,
        metric=TOP1,
        value=100 * hits / len(session.labels),
        samples=len(session.labels),
        stays_float=float_parts(training.student, start.swap),
        settings={name: getattr(options, name) for name in names}
        | {"labels": not options.without_labels, "start": START.name, "batch": BATCH, "eta": ETA, "loss": training.loss}
        | {"training_seconds": round(seconds), "bits_per_weight": round(bits_per_weight(packed), 3)},
        command=f"nox -s accuracy -- --data DIR --suite adder-qat --bits {options.bits} --steps {options.steps}"
        + (" --without-labels" if options.without_labels else ""),
        checkpoint_sha256=session.checkpoint,
        **dataclasses.asdict(environment()),
    )
    append_jsonl(options.results, row)
    print(
        f"W{options.bits}A{options.bits} {options.variant}: {row.value:.2f} % of {row.samples} test images", flush=True
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--bits", type=int, default=BITS, choices=START.bits)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--without-labels", action="store_true", help="learn the classes of the float network instead")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of the weights of adder layers")
    parser.add_argument("--scale-rate", type=float, default=SCALE_RATE, help="of scales, as a relative change")
    parser.add_argument("--other-rate", type=float, default=OTHER_RATE, help="of everything else")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file that the row is appended to")
    parser.add_argument("--resume", action="store_true", help="do nothing if the row is in the results already")
    options = parser.parse_args(words)
    labels = "without labels" if options.without_labels else "with labels"
    options.variant = f"blocks trained {options.steps} steps {labels}"
    return options


class Crops:
    """Training images with their labels, cropped and flipped at random, and some that are held out."""

    def __init__(self, data: pathlib.Path, seed: int) -> None:
        parts = [load(data, f"cifar10-train-{part}") for part in range(1, 6)]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        self.held_out = normalize(images[-HELD_OUT:].numpy(), *CIFAR10), labels[-HELD_OUT:]
        self.images, self.labels = images[:-HELD_OUT], labels[:-HELD_OUT]
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the images in a new order, again and again."""
        while True:
            order = torch.randperm(len(self.labels), generator=self.generator)
            for part in order[: len(order) // BATCH * BATCH].split(BATCH):
                images = crop(pad(self.images[part], (0, 0, 4, 4, 4, 4)), self.generator)
                yield normalize(images.numpy(), *CIFAR10), self.labels[part]


class Training:
    """A quantized student on its way through its steps, beside its float teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module, crops: Crops, options: argparse.Namespace) -> None:
        self.student, self.teacher, self.crops, self.options = student, teacher.eval(), crops, options
        self.outputs: dict[nn.Module, Tensor] = {}
        self.blocks = [
            (student.get_submodule(path), block)
            for path, block in teacher.named_modules()
            if isinstance(block, BasicBlock)
        ]
        for pair in self.blocks:
            pair[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
            for block in pair:
                block.register_forward_hook(lambda block, _, output: self.outputs.__setitem__(block, output))
        weights = adder_weights(student)
        scales = [parameter for name, parameter in student.named_parameters() if ".tied." in name]
        # The batch norm behind an adder layer takes its bias away: what is left is noise, which Adam would make large.
        biases = [module.bias for module in student.modules() if isinstance(module, QuantAdderConv2d)]
        known = {id(parameter) for parameter in (*weights, *scales, *biases)}
        others = [parameter for parameter in student.parameters() if id(parameter) not in known]
        rates = ((weights, options.rate), (scales, options.scale_rate), (others, options.other_rate))
        self.optimizer = torch.optim.Adam([{"params": part, "lr": rate} for part, rate in rates])
        AdderLearningRate(self.optimizer, weights, eta=ETA)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: (1 + math.cos(math.pi * step / options.steps)) / 2
        )
        self.loss = math.inf  # mean over the last steps

    def run(self) -> None:
        """Take all steps."""
        losses: list[float] = []
        batches = iter(self.crops)
        self.student.train()
        for step in tqdm(range(1, self.options.steps + 1), desc="training", disable=None):
            losses.append(self.step(*next(batches)))
            if step % SHOWN == 0 or step == self.options.steps:
                self.loss = round(sum(losses[-SHOWN:]) / len(losses[-SHOWN:]), 4)
                print(f"step {step}, loss {self.loss:.4f}, held out {self.held_out():.2f} %", flush=True)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Take one step and return its loss."""
        with torch.no_grad():
            expected = self.teacher(x)
        logits = self.student(x)
        loss = divergence(logits, expected) if self.options.without_labels else cross_entropy(logits, y)
        for block, float_block in self.blocks:
            goal = self.outputs[float_block]
            loss = loss + (self.outputs[block] - goal).square().mean() / goal.var()
        if not bool(loss.isfinite()):
            raise SystemExit(f"the loss is {float(loss)}: lower the rates")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def held_out(self) -> float:
        """Return the percentage of the images held out that are classified correctly."""
        self.student.eval()
        hits = correct(self.student, *self.crops.held_out)
        self.student.train()
        return 100 * hits / len(self.crops.held_out[1])


if __name__ == "__main__":
    main()
