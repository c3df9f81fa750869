"""Small networks and images for the tests."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual block whose rectifiers are functions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Net(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block1 = Block(6, 6)
        self.block2 = Block(6, 8, stride=2)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def net(seed: int = 0) -> Net:
    """Make the network with batch norms that have seen something."""
    torch.manual_seed(seed)
    model = Net()
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8))
    return model.eval()


def images(count: int = 48, seed: int = 1) -> Tensor:
    """Make images."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
