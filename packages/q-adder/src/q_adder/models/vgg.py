"""The small VGG network for CIFAR that binary and adder networks are compared on."""

from collections.abc import Callable
from itertools import pairwise
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from q_adder.layers import AdderConv2d

_WIDTHS = (128, 128, 256, 256, 512, 512)


@final
class VGGSmall(nn.Module):
    """Six 3x3 layers of 128, 128, 256, 256, 512 and 512 channels, a pool after every second, and a linear layer.

    The first layer and the classifier are ordinary. The adder version was not released; that a batch norm and a
    rectifier follow each layer, and the maximum pool comes after them, is our reading.

    Args:
        classes: Outputs.
        conv: Makes the second to the sixth layer.
    """

    def __init__(self, classes: int, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False), *_after(_WIDTHS[0])]
        for place, (inputs, outputs) in enumerate(pairwise(_WIDTHS)):
            layers += [conv(inputs, outputs, 3, padding=1, bias=False), *_after(outputs)]
            if place % 2 == 0:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(4)  # nothing to do for images of 32x32
        self.classifier = nn.Linear(_WIDTHS[-1] * 16, classes)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of normalised images."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _after(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


def vgg_small(classes: int = 10, *, conv: Callable[..., nn.Module] = AdderConv2d) -> VGGSmall:
    """Build the adder VGG-small for CIFAR, or its twin with `conv=torch.nn.Conv2d`.

    Args:
        classes: Outputs.
        conv: Makes the layers between the first one and the classifier, from the arguments of `torch.nn.Conv2d`.

    Returns:
        A network of 4.7 million parameters for images [n, 3, 32, 32].

    Source:
        The network of Zhang et al. 2018, arXiv:1807.10029; with adder layers Chen et al. 2020, arXiv:1912.13200.
    """
    return VGGSmall(classes, conv)
