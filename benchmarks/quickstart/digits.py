"""The main job on real handwritten digits: train a small ResNet and its adder twin, quantize both, report.

    python benchmarks/quickstart/digits.py --out out/quickstart

Needs no download: the images come with scikit-learn. The twins have the same layers, but where one multiplies, the
other sums absolute differences. Where rounding to nearest breaks the ResNet, reconstruction learns the roundings from
the same images without labels: QDrop, and AQuant with activations quantized at the same places. With labels, training
goes on at 2 bits for a few epochs: LSQ, and nuLSQ from the same start. Ends with an error if the float ResNet is below
97 %, if its adder twin is more than a point and a half below it, if either loses more than half a point at 8 bits, if
reconstruction with 2-bit weights and 4-bit activations loses more than three points, or training with 2 bits for both
more than five.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import q_core
from q_adder import AdderConv2d, redistribute
from q_aquant import InputPlacement, aquant, qdrop
from q_core.cli.job import Configuration, Job, accuracy, run
from q_core.methods import Quantized
from q_nulsq import lsq, nulsq_a, recipes
from q_nulsq.optim import Unscaled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import digits

SEED = 0
HELD_OUT = 599  # of 1797: one image is 0.17 points
CALIBRATION = 512  # training images
LOWEST_FLOAT = 97.0  # percent
FARTHEST_TWIN = 1.5  # points, of the adder network below the other
LARGEST_DROP = 0.5  # points, of the 8-bit model
LEARNED_DROP = 3.0  # points, of the reconstructed W2A4 model
TRAINED_DROP = 5.0  # points, of the trained W2A2 models
EPOCHS = 10  # of training at 2 bits; the papers take 300
STEPS = 100  # of each unit; the papers take 20,000

RESNET, ADDER = "DigitsResNet", "DigitsAdderNet"
# Adder weights spread wider than what they are compared with; four times the usual decay keeps them in reach.
RECIPES = {
    RESNET: {"conv": nn.Conv2d, "epochs": 15, "weight_decay": 5e-4},
    ADDER: {"conv": AdderConv2d, "epochs": 40, "weight_decay": 2e-3},
}
CONFIGURATIONS = {
    RESNET: (
        *(Configuration("nearest", q_core.nearest, w, a) for w, a in [(8, 8), (4, 4), (2, 4), (2, 2)]),
        *(
            Configuration(name, method, 2, bits, {"iterations": STEPS, "progress": False, **options})
            for bits in (4, 2)
            for name, method, options in [("qdrop", qdrop, {"placement": InputPlacement()}), ("aquant", aquant, {})]
        ),
    ),
    ADDER: tuple(Configuration("redistribute", redistribute, b, b, {"edge_bits": 8}) for b in (8, 4, 3)),
}

# LSQ from the same start and with the same optimizer as nuLSQ, so that nothing differs but the steps.
TRAINED = {
    "LSQ": (lsq, {"weight": recipes.LSQ, "activation": recipes.LSQ, "gradient_scale": Unscaled()}),
    "nuLSQ-A": (nulsq_a, {}),
}


def main() -> None:
    """Train, quantize, report, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder of the results")
    out = parser.parse_args().out

    # Images of 8x8 pixels are too small to share: a second thread costs more in waiting than it gives, and the result
    # would depend on the number of threads.
    torch.set_num_threads(1)
    train, test = digits.load(SEED, HELD_OUT)
    print(f"{'data':<16}{len(train[0])} training and {len(test[0])} held-out images of handwritten digits, 8x8 pixels")
    evaluation = list(zip(*(tensor.split(128) for tensor in test), strict=True))
    models = {name: trained(name, *train) for name in RECIPES}
    percent = {}
    for name, model in models.items():
        correct, samples = accuracy(model, evaluation)
        percent[name] = 100 * correct / samples
    if percent[RESNET] < LOWEST_FLOAT:
        sys.exit(f"the float {RESNET} is at {percent[RESNET]:.2f} %, below {LOWEST_FLOAT} %: training went wrong")
    if percent[ADDER] < percent[RESNET] - FARTHEST_TWIN:
        sys.exit(
            f"the float {ADDER} is at {percent[ADDER]:.2f} %, more than {FARTHEST_TWIN} points below its twin at "
            f"{percent[RESNET]:.2f} %: training went wrong"
        )
    rows = run([job(name, model, *train, evaluation, out) for name, model in models.items()], out)
    for row in rows:
        allowed = {
            (8, 8): LARGEST_DROP,
            (2, 4): LEARNED_DROP if row.method in ("qdrop", "aquant") else 100,
            (2, 2): TRAINED_DROP if row.method in TRAINED else 100,
        }
        drop = percent[row.network] - row.value
        if drop > allowed.get((row.weight_bits, row.activation_bits), 100):
            sys.exit(
                f"{row.method} W{row.weight_bits}A{row.activation_bits} of {row.network} is at {row.value:.2f} %, "
                f"{drop:.2f} points below float: more than what is allowed"
            )
    print(f"open {out / 'report.html'} in a browser")


def trained(name: str, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Build and train one of the networks."""
    recipe = dict(RECIPES[name])
    torch.manual_seed(SEED)
    model = digits.DigitsResNet(conv=recipe.pop("conv"))
    start = time.perf_counter()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{'train':<16}{name} of {parameters:,} parameters, {recipe['epochs']} epochs")
    digits.train(model, images, labels, seed=SEED, say=lambda line: print(f"{'':16}{line}"), **recipe)
    print(f"{'':16}took {time.perf_counter() - start:.1f} seconds")
    return model


def training(name: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[..., Quantized]:
    """Make a method of a recipe and the training after it."""
    prepare, parts = TRAINED[name]

    def method(
        model: nn.Module, batches: Any, *, weight_bits: int, activation_bits: int, epochs: int = EPOCHS, seed: int = 0
    ) -> Quantized:
        bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        quantized = prepare(model, batches, **bits, **parts, progress=False)
        digits.train_quantized(quantized.model, images, labels, epochs=epochs, seed=seed)
        return quantized

    return method


def job(name: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, evaluation: list, out: Path) -> Job:
    recipe = RECIPES[name]
    trainings = (
        [Configuration(each, training(each, images, labels), 2, 2) for each in TRAINED] if name == RESNET else []
    )
    return Job(
        network=name,
        dataset="scikit-learn digits",
        model=model,
        calibration=list(images[:CALIBRATION].split(128)),
        evaluation=evaluation,
        configurations=(*CONFIGURATIONS[name], *trainings),
        command=f"python benchmarks/quickstart/digits.py --out {out}",
        seed=SEED,
        settings={
            "calibration_samples": CALIBRATION,
            "epochs": recipe["epochs"],
            "weight_decay": recipe["weight_decay"],
            "split": f"{len(images)} training, {HELD_OUT} held out, stratified, seed {SEED}",
        },
        packages=("scikit-learn",),
    )


if __name__ == "__main__":
    main()
