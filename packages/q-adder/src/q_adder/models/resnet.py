"""Residual networks for CIFAR and ImageNet, with the keys of the published adder networks.

The first layer and the classifier are convolutions; the layers between are what `conv` makes. Where a block changes the
shape, its shortcut is a 1x1 layer of the same kind. The classifier is a 1x1 convolution after the average pool, and a
batch norm follows it.
"""

from collections.abc import Callable, Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from q_adder.layers import AdderConv2d
from q_core import QuantAdd

Conv = Callable[..., nn.Module]
"""Makes a layer from the arguments of `torch.nn.Conv2d`."""

Block = Callable[[int, int, int, Conv], nn.Module]
"""Makes a block from its input channels, its width, its stride and what makes its layers."""


def _shortcut(inputs: int, outputs: int, stride: int, conv: Conv) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


@final
class BasicBlock(nn.Module):
    """Two 3x3 layers beside a shortcut; a rectifier follows the addition.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Step of the first layer, in pixels.
        conv: Makes the layers.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, conv: Conv) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride, conv)
        self.add = QuantAdd()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o i j"]:
        """Return the rectified sum of the two paths."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.add(self.bn2(self.conv2(out)), shortcut))


@final
class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 layer beside a shortcut; a rectifier follows the addition.

    Args:
        inputs: Input channels.
        width: Channels between the layers; the output has four times as many.
        strides: Steps of the first and of the second layer, in pixels.
        conv: Makes the layers.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, strides: tuple[int, int], conv: Conv) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1, stride=strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=strides[1], padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1, stride=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, strides[0] * strides[1], conv)
        self.add = QuantAdd()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o i j"]:
        """Return the rectified sum of the two paths."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.add(self.bn3(self.conv3(out)), shortcut))


def bottleneck(inputs: int, width: int, stride: int, conv: Conv) -> Bottleneck:
    """Make a bottleneck whose 3x3 layer strides, as the released adder ResNet-50 and torchvision have it.

    Args:
        inputs: Input channels.
        width: Channels between the layers.
        stride: Step of the block, in pixels.
        conv: Makes the layers.

    Returns:
        The block.
    """
    return Bottleneck(inputs, width, (1, stride), conv)


def original_bottleneck(inputs: int, width: int, stride: int, conv: Conv) -> Bottleneck:
    """Make a bottleneck whose first 1x1 layer strides, as He et al. 2016 have it: 6 % fewer operations in ResNet-50.

    Args:
        inputs: Input channels.
        width: Channels between the layers.
        stride: Step of the block, in pixels.
        conv: Makes the layers.

    Returns:
        The block.

    Source:
        He et al. 2016, arXiv:1512.03385.
    """
    return Bottleneck(inputs, width, (stride, 1), conv)


def _stage(inputs: int, width: int, count: int, stride: int, expansion: int, block: Block, conv: Conv) -> nn.Sequential:
    first = block(inputs, width, stride, conv)
    return nn.Sequential(first, *(block(width * expansion, width, 1, conv) for _ in range(count - 1)))


@final
class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels for small images.

    Args:
        depth: Blocks per stage.
        classes: Outputs.
        conv: Makes the layers between the first one and the classifier.
    """

    def __init__(self, depth: int, classes: int, conv: Conv) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, depth, 1, BasicBlock.expansion, BasicBlock, conv)
        self.layer2 = _stage(16, 32, depth, 2, BasicBlock.expansion, BasicBlock, conv)
        self.layer3 = _stage(32, 64, depth, 2, BasicBlock.expansion, BasicBlock, conv)
        # 8x8 for images of 32x32, and whatever is left for others.
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(64, classes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(classes)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of normalised images."""
        out = relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.bn2(self.fc(self.avgpool(out))).flatten(1)
        return logits


@final
class ImageNetResNet(nn.Module):
    """A 7x7 stem and four stages of 64 to 512 channels for large images.

    Args:
        depths: Blocks of each of the four stages.
        classes: Outputs.
        block: Makes the blocks.
        expansion: Output channels of a block relative to its width.
        conv: Makes the layers between the first one and the classifier.
    """

    def __init__(self, depths: Sequence[int], classes: int, block: Block, expansion: int, conv: Conv) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, depths[0], 1, expansion, block, conv)
        self.layer2 = _stage(64 * expansion, 128, depths[1], 2, expansion, block, conv)
        self.layer3 = _stage(128 * expansion, 256, depths[2], 2, expansion, block, conv)
        self.layer4 = _stage(256 * expansion, 512, depths[3], 2, expansion, block, conv)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(512 * expansion, classes, 1)
        self.bn2 = nn.BatchNorm2d(classes)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of normalised images."""
        out = self.maxpool(relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.bn2(self.fc(self.avgpool(out))).flatten(1)
        return logits


def resnet20(classes: int = 10, *, conv: Conv = AdderConv2d) -> CifarResNet:
    """Build the adder ResNet-20 for CIFAR, or its twin with `conv=torch.nn.Conv2d`.

    Args:
        classes: Outputs.
        conv: Makes the layers between the first one and the classifier.

    Returns:
        A network of 272 thousand parameters for images [n, 3, 32, 32].

    Source:
        Chen et al. 2020, arXiv:1912.13200, with the keys of the released network; see `load_published_resnet20`.
    """
    return CifarResNet(3, classes, conv)


def resnet32(classes: int = 10, *, conv: Conv = AdderConv2d) -> CifarResNet:
    """Build the adder ResNet-32 for CIFAR, or its twin with `conv=torch.nn.Conv2d`.

    Args:
        classes: Outputs.
        conv: Makes the layers between the first one and the classifier.

    Returns:
        A network of 467 thousand parameters for images [n, 3, 32, 32].

    Source:
        Chen et al. 2020, arXiv:1912.13200.
    """
    return CifarResNet(5, classes, conv)


def resnet18(classes: int = 1000, *, conv: Conv = AdderConv2d) -> ImageNetResNet:
    """Build the adder ResNet-18 for ImageNet, or its twin with `conv=torch.nn.Conv2d`.

    Args:
        classes: Outputs.
        conv: Makes the layers between the first one and the classifier.

    Returns:
        A network of 11.7 million parameters for images [n, 3, 224, 224].

    Source:
        Chen et al. 2020, arXiv:1912.13200.
    """
    return ImageNetResNet((2, 2, 2, 2), classes, BasicBlock, BasicBlock.expansion, conv)


def resnet50(
    classes: int = 1000, *, conv: Conv = AdderConv2d, block: Callable[[int, int, int, Conv], Bottleneck] = bottleneck
) -> ImageNetResNet:
    """Build the adder ResNet-50 for ImageNet, or its twin with `conv=torch.nn.Conv2d`.

    Args:
        classes: Outputs.
        conv: Makes the layers between the first one and the classifier.
        block: Makes the blocks: `bottleneck`, as the released code, or `original_bottleneck`, which the operation
            counts of the papers are for.

    Returns:
        A network of 25.6 million parameters for images [n, 3, 224, 224].

    Source:
        Chen et al. 2020, arXiv:1912.13200.
    """
    return ImageNetResNet((3, 4, 6, 3), classes, block, Bottleneck.expansion, conv)
