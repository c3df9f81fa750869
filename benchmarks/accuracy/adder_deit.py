"""An adder vision transformer at the scale of CIFAR: train it a little, then quantize it with the signed clamp.

    nox -s accuracy -- --data DIR --suite adder-deit
    python benchmarks/accuracy/adder_deit.py --data DIR [--steps 400] [--out out/adder-deit]

No trained adder transformer is published, so this one is trained here: the layout of DeiT-Tiny with 4 blocks of width
96 on patches of 4 x 4, for a few hundred steps on CIFAR-10. That is far from converged. It shows that the loss falls,
and what bits cost where the inputs of adder layers are signed: behind a layer norm, kernels are clamped to both sides
of zero.

Prints the loss as it goes, and appends rows to `benchmarks/results/accuracy/adder.jsonl`. With one thread a seed gives
the same figures again on the same machine.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from images import load, normalize
from networks import CIFAR10, correct
from q_adder import AdderLearningRate, Redistributed, adder_weights, redistribute
from q_adder.models import deit_tiny
from q_core import bits_per_weight, pack
from q_core.checkpoint import write_atomically
from q_core.cli.rows import TOP1, AccuracyRow, append_jsonl, environment, float_parts, state_sha256

NETWORK = "cifar10-adder-deit"
RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "accuracy" / "adder.jsonl"
SIZE = {"image_size": 32, "patch_size": 4, "depth": 4, "width": 96, "heads": 3}
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 400, 32, 1e-3, 0.05, 0
BITS = (8, 6, 4)
CALIBRATION_IMAGES, CALIBRATION_BATCH = 512, 64
SHOWN = 50  # steps over which the printed loss is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the images, see images.py")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--test-images", type=int, default=10_000, help="how many of the test images to evaluate on")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/adder-deit"), help="for the weights")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file that the rows are appended to")
    parser.add_argument("--resume", action="store_true", help="do nothing if all rows are in the results already")
    options = parser.parse_args()
    if options.resume and recorded(options.results) >= {32, *BITS}:
        print(f"{options.results} holds all rows of {NETWORK}")
        return
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    (images, labels), test = read(options.data, "cifar10-train-1"), read(options.data, "cifar10-test")
    test = (test[0][: options.test_images], test[1][: options.test_images])
    model = deit_tiny(10, **SIZE)
    start = time.perf_counter()
    losses = train(model, images, labels, options.steps)
    few = min(SHOWN, len(losses) // 2)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    seconds = time.perf_counter() - start
    print(f"loss {first:.3f} in the first {few} steps, {last:.3f} in the last; {seconds:.0f} seconds")
    if not last < first:
        raise SystemExit("the loss did not fall: training went wrong")
    write_atomically(options.out / "model.safetensors", lambda path: save_file(model.state_dict(), path))
    recorder = Recorder(model, options, {"first_loss": round(first, 3), "last_loss": round(last, 3)})
    recorder.write(None, 32, correct(model, *test), len(test[1]))
    calibration = images[:CALIBRATION_IMAGES].split(CALIBRATION_BATCH)
    for bits in BITS:
        result = redistribute(model, calibration, weight_bits=bits, activation_bits=bits)
        recorder.write(result, bits, correct(result.model, *test), len(test[1]))


def recorded(results: pathlib.Path) -> set[int]:
    """Bits whose row is in the results; 32 is the float network."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return {row["weight_bits"] for row in rows if row["network"] == NETWORK}


def read(data: pathlib.Path, name: str) -> tuple[Tensor, Tensor]:
    images, labels = load(data, name)
    return normalize(images, *CIFAR10), torch.from_numpy(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Train with AdamW on batches drawn at random; return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    AdderLearningRate(optimizer, adder_weights(model))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    model.train()
    for step in tqdm(range(1, steps + 1), desc="training", disable=None):
        part = torch.randint(0, len(images), (BATCH,), generator=generator)
        x = images[part]
        x = torch.where(torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
        loss = cross_entropy(model(x), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % SHOWN == 0:
            print(f"step {step} of {steps}, loss {sum(losses[-SHOWN:]) / SHOWN:.3f}", flush=True)
    model.eval()
    return losses


class Recorder:
    """Writes rows, with what all of them share."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, settings: dict[str, float]) -> None:
        self.options, self.checkpoint = options, state_sha256(model)
        self.settings = {**SIZE, "steps": options.steps, "batch": BATCH, **settings}

    def write(self, result: Redistributed | None, bits: int, hits: int, samples: int) -> None:
        settings, floats = {**self.settings, "variant": "float"}, ("everything",)
        if result is not None:
            schemes = {"signed" if layer.reach[0] < 0 else "one-sided" for layer in result.layers}
            settings |= {"variant": f"{' and '.join(sorted(schemes))}, means", "edge_bits": 32}
            settings |= {"calibration_images": CALIBRATION_IMAGES}
            settings |= {"bits_per_weight": round(bits_per_weight(pack(result.model)), 3)}
            floats = float_parts(result.model, result.swap)
        row = AccuracyRow(
            network=NETWORK,
            dataset="cifar10 test",
            method="float" if result is None else "redistribute",
            weight_bits=bits,
            activation_bits=bits,
            seed=SEED,
            metric=TOP1,
            value=100 * hits / samples,
            samples=samples,
            stays_float=floats,
            settings=settings,
            command=f"nox -s accuracy -- --data DIR --suite adder-deit --steps {self.options.steps}",
            checkpoint_sha256=self.checkpoint,
            **dataclasses.asdict(environment()),
        )
        append_jsonl(self.options.results, row)
        what = settings["variant"] if result is None else f"W{bits}A{bits}, {settings['variant']}"
        print(f"{NETWORK} {what}: {row.value:.2f} % of {samples} test images", flush=True)


if __name__ == "__main__":
    main()
