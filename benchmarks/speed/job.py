"""What every environment shares: the network, the images, and a way to be asked for one timing at a time.

A worker is a process that holds its model ready and runs one case for each line it reads. The runner asks the workers
in turn, so that a slow minute of the machine falls on all of them. This file needs torch and torchvision only, because
the environments of the peers hold nothing else of ours.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGES, BATCH, SIDE, SEED = 1024, 32, 224, 0
REPLY = "@reply "


def network() -> nn.Module:
    """ResNet-18 with random weights and its batch norms folded, in evaluation mode."""
    torch.manual_seed(SEED)
    model = torchvision.models.resnet18(weights=None).eval()
    for block in [
        model,
        *(part for stage in ("layer1", "layer2", "layer3", "layer4") for part in getattr(model, stage)),
    ]:
        fold(block, "conv1", "bn1")
        if hasattr(block, "conv2"):
            fold(block, "conv2", "bn2")
            if block.downsample is not None:
                fold(block.downsample, "0", "1")
    return model


def fold(block: nn.Module, convolution: str, norm: str) -> None:
    setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm)))
    setattr(block, norm, nn.Identity())


def images(count: int) -> tuple[Tensor, ...]:
    """Normally distributed images, as after normalisation, in batches."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator).split(BATCH)


class Job:
    """The float network and the images, and the pass over them that everything is compared with."""

    def __init__(self) -> None:
        self.float = network()
        self.batches = images(IMAGES)

    def model(self) -> nn.Module:
        """A copy that a peer may change."""
        return copy.deepcopy(self.float)

    def first(self, count: int) -> tuple[Tensor, ...]:
        """The first images, in whole batches."""
        return self.batches[: count // BATCH]

    def float_pass(self, count: int) -> dict[str, float]:
        """Run the float network over the images: evaluation mode, no gradients."""
        with torch.no_grad():
            return {"seconds": seconds(lambda: [self.float(batch) for batch in self.first(count)])}


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve(cases: dict[str, Callable[[int], dict[str, float]]], versions: dict[str, str]) -> None:
    """Answer lines `case count` on the standard input with the timing of that case, until the input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    reply({"versions": {"torch": torch.__version__, **versions}})
    for line in sys.stdin:
        name, count = line.split()
        reply(cases[name](int(count)))


def reply(answer: dict[str, Any]) -> None:
    print(REPLY + json.dumps(answer), flush=True)
