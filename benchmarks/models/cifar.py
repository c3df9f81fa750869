"""CIFAR residual networks, most of them with published weights that the accuracy sessions load.

`resnet20` and `resnet56` are the networks of He et al. 2016 (arXiv:1512.03385, section 4.2) with the parameter-free
shortcut. `resnet20v` is a variant with a 64-channel stem, a projection in the first block of every stage, no rectifier
after the additions and one at the end of each stage. `preresnet20` and `preresnet56` are the pre-activation networks of
He et al. 2016 (arXiv:1603.05027), on which nuLSQ was published: inner convolutions read the output of a rectifier.
"""

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that is sliced and zero-padded where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.extra // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """The CIFAR network with 6n + 2 layers."""

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2), strict=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(n - 1)))
            for inputs, width, stride in stages
        )
        self.linear = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class VBlock(nn.Module):
    """Two 3x3 convolutions beside an identity or a projection, without a rectifier after the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projection = (nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(*projection) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)


class CifarResNetV(nn.Module):
    """The variant with a wide stem and signed activations inside its stages."""

    def __init__(self, n: int, classes: int) -> None:
        super().__init__()
        stem = 64
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        stages = zip((stem, *WIDTHS), WIDTHS, (1, 2, 2), strict=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(VBlock(inputs, width, stride, True), *(VBlock(width, width, 1, False) for _ in range(n - 1)))
            for inputs, width, stride in stages
        )
        self.linear = nn.Linear(WIDTHS[-1] * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            out = F.relu(stage(out))
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


class PreBlock(nn.Module):
    """Two 3x3 convolutions, each behind a batch norm and a rectifier, beside an identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.bn1(x))
        # The projection reads what the first convolution reads, the identity what comes in.
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(ready)
        return self.conv2(F.relu(self.bn2(self.conv1(ready)))) + shortcut


class CifarPreResNet(nn.Module):
    """The pre-activation network with 6n + 2 layers."""

    def __init__(self, n: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        stages = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2), strict=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(PreBlock(inputs, width, stride), *(PreBlock(width, width, 1) for _ in range(n - 1)))
            for inputs, width, stride in stages
        )
        self.bn = nn.BatchNorm2d(WIDTHS[-1])
        self.linear = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1).flatten(1))


def resnet20(classes: int = 10) -> CifarResNet:
    """20 layers, 0.27 M parameters."""
    return CifarResNet(3, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """56 layers, 0.85 M parameters."""
    return CifarResNet(9, classes)


def resnet20v(classes: int = 100) -> CifarResNetV:
    """20 layers with a 64-channel stem, 0.30 M parameters."""
    return CifarResNetV(3, classes)


def preresnet20(classes: int = 10) -> CifarPreResNet:
    """20 layers in pre-activation order, 0.27 M parameters."""
    return CifarPreResNet(3, classes)


def preresnet56(classes: int = 10) -> CifarPreResNet:
    """56 layers in pre-activation order, 0.86 M parameters."""
    return CifarPreResNet(9, classes)
