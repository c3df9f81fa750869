"""Figure 1 in numbers: weights and activations of every adder layer of the published ResNet-20, before and after.

    python benchmarks/accuracy/adder_figures.py --data DIR [--images 64] [--bits 4] [--plot FILE --layer NAME]

One row per layer: the reach of the weights, the range of the activations by the released rule, how many codes the
activations use when one range holds everything, how many weights lie outside the range of the activations, and how many
kernels stay below that range (only these could profit from a group of their own). `--plot` draws one layer.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from images import load, normalize
from q_adder import adder2d
from q_adder.analysis import RedistributionHistograms, quantile_sweep, redistribution_histograms

MOMENTS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
ALPHA = 0.9997  # as released; applied twice there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with cifar/ and networks/")
    parser.add_argument("--images", type=int, default=64, help="training images to run")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layer", default="layer1.0.conv1", help="layer to draw")
    parser.add_argument("--plot", type=pathlib.Path, help="file of the picture; needs matplotlib")
    options = parser.parse_args()
    state = load_file(options.data / "networks" / "cifar10-adder-resnet20.safetensors")
    images, _ = load(options.data, "cifar10-train-1")
    x = normalize(images[: options.images], *MOMENTS)
    print("layer                  max|w|  max x  range  codes of x   w <= 0  w >= r  kernels below r")
    below, weights, elements = 0, [0, 0], 0
    for name, weight, inputs in adder_layers(state, x):
        (found,) = quantile_sweep(inputs, [ALPHA])
        reach = found.released_range
        seen = redistribution_histograms(weight, inputs, low=0.0, high=reach, bits=options.bits)
        outside = [int((weight <= 0).sum()), int((weight >= reach).sum())]
        small = int((weight.abs().amax((1, 2, 3)) < reach).sum())
        print(
            f"{name:22} {float(weight.abs().max()):6.1f} {float(inputs.max()):6.2f} {reach:6.3f} "
            f"{seen.wide.input.occupied:4} of {2**options.bits:<3} {100 * outside[0] / weight.numel():6.1f}% "
            f"{100 * outside[1] / weight.numel():6.1f}% {small:6} of {len(weight)}"
        )
        below, elements = below + small, elements + weight.numel()
        weights = [total + one for total, one in zip(weights, outside, strict=True)]
        if options.plot and name == options.layer:
            draw(seen, name, options.plot)
    shares = " ".join(f"{100 * count / elements:.1f}%" for count in weights)
    print(f"all layers: weights at or below 0 and at or above the range: {shares}; kernels below the range: {below}")


def adder_layers(state: dict[str, Tensor], x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Run the float network, and yield the name, the weight and the input of every adder layer."""

    def norm(y: Tensor, name: str) -> Tensor:
        moments = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.batch_norm(y, *moments, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for block in [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(3)]:
        projected = f"{block}.downsample.0.adder" in state
        stride, shortcut, y = 2 if projected else 1, x, x
        for conv, bn, step in (("conv1", "bn1", stride), ("conv2", "bn2", 1)):
            weight = state[f"{block}.{conv}.adder"]
            yield f"{block}.{conv}", weight, y
            y = norm(adder2d(y, weight, stride=step, padding=1), f"{block}.{bn}")
            y = F.relu(y) if conv == "conv1" else y
        if projected:
            weight = state[f"{block}.downsample.0.adder"]
            yield f"{block}.downsample.0", weight, x
            shortcut = norm(adder2d(x, weight, stride=stride), f"{block}.downsample.1")
        x = F.relu(y + shortcut)


def draw(seen: RedistributionHistograms, name: str, path: pathlib.Path) -> None:
    """Draw the stages of one layer, values above and codes below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = {
        "separate": "own ranges",
        "wide": "one range for all",
        "narrow": "range of the activations",
        "redistributed": "after redistribution",
    }
    figure, axes = pyplot.subplots(2, len(stages), figsize=(14, 6), layout="constrained")
    for column, (stage, title) in enumerate(stages.items()):
        for tensor, colour in (("input", "tab:orange"), ("weight", "tab:blue")):
            use = getattr(getattr(seen, stage), tensor)
            share = use.codes / use.codes.sum()
            axes[0, column].stairs(use.counts / use.counts.sum(), use.edges, fill=True, alpha=0.6, color=colour)
            axes[1, column].bar(range(use.qmin, use.qmin + len(share)), share, alpha=0.6, color=colour, label=tensor)
        axes[0, column].set(title=title, xlabel="value", yscale="log")
        axes[1, column].set(xlabel="code", ylabel="share of values" if column == 0 else "")
    axes[1, 0].legend()
    figure.suptitle(f"{name} of the published adder ResNet-20")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
