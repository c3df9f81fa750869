"""The main job on real handwritten digits: train a small ResNet, quantize it, report.

    python benchmarks/quickstart/digits.py --out out/quickstart

Needs no download: the images come with scikit-learn. Ends with an error if the float model is below 97 % or the
8-bit model more than half a point below it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import q_core
from q_core.cli.job import Configuration, Job, accuracy, run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import digits

SEED = 0
EPOCHS = 15
HELD_OUT = 599  # of 1797: one image is 0.17 points
CALIBRATION = 512  # training images
BITS = [(8, 8), (4, 4), (2, 4)]
LOWEST_FLOAT = 97.0  # percent
LARGEST_DROP = 0.5  # points, of the 8-bit model


def main() -> None:
    """Train, quantize, report, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder of the results")
    out = parser.parse_args().out

    # Images of 8x8 pixels are too small to share: a second thread costs more in waiting than it gives, and the result
    # would depend on the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    (images, labels), (test_images, test_labels) = digits.load(SEED, HELD_OUT)
    print(
        f"{'data':<16}{len(images)} training and {len(test_images)} held-out images of handwritten digits, 8x8 pixels"
    )
    model = digits.DigitsResNet()
    start = time.perf_counter()
    print(f"{'train':<16}a ResNet of {sum(p.numel() for p in model.parameters()):,} parameters, {EPOCHS} epochs")
    digits.train(model, images, labels, epochs=EPOCHS, seed=SEED, say=lambda line: print(f"{'':16}{line}"))
    print(f"{'':16}took {time.perf_counter() - start:.1f} seconds")
    evaluation = list(zip(test_images.split(128), test_labels.split(128), strict=True))
    correct, samples = accuracy(model, evaluation)
    if 100 * correct / samples < LOWEST_FLOAT:
        sys.exit(f"the float model has {correct} of {samples} correct, below {LOWEST_FLOAT} %: training went wrong")

    rows = run(
        Job(
            network="DigitsResNet",
            dataset="scikit-learn digits",
            model=model,
            calibration=list(images[:CALIBRATION].split(128)),
            evaluation=evaluation,
            configurations=tuple(Configuration("nearest", q_core.nearest, w, a) for w, a in BITS),
            command=f"python benchmarks/quickstart/digits.py --out {out}",
            seed=SEED,
            settings={
                "calibration_samples": CALIBRATION,
                "epochs": EPOCHS,
                "split": f"{len(images)} training, {HELD_OUT} held out, stratified, seed {SEED}",
            },
            packages=("scikit-learn",),
        ),
        out,
    )
    float_row, eight_bits = rows[0], rows[1]
    if eight_bits.value < float_row.value - LARGEST_DROP:
        sys.exit(
            f"8-bit accuracy {eight_bits.value:.2f} % is more than {LARGEST_DROP} points below float, "
            f"{float_row.value:.2f} %"
        )
    print(f"open {out / 'report.html'} in a browser")


if __name__ == "__main__":
    main()
