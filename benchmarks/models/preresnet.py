"""Residual networks in pre-activation order for larger images, without published weights.

He et al. 2016 (arXiv:1603.05027) with the blocks of ResNet-18 and ResNet-34; nuLSQ reports on them beside the original
order, for which torchvision has both networks.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar import PreBlock

WIDTHS = (64, 128, 256, 512)


class PreResNet(nn.Module):
    """A stem that reduces by four, four stages of blocks, a batch norm and a rectifier before the classifier."""

    def __init__(self, blocks: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        stages = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2, 2), blocks, strict=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(PreBlock(inputs, width, stride), *(PreBlock(width, width, 1) for _ in range(count - 1)))
            for inputs, width, stride, count in stages
        )
        self.bn, self.fc = nn.BatchNorm2d(WIDTHS[-1]), nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(self.conv1(x), 3, stride=2, padding=1)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1).flatten(1))


def preresnet18(classes: int = 1000) -> PreResNet:
    """18 layers in pre-activation order."""
    return PreResNet((2, 2, 2, 2), classes)


def preresnet34(classes: int = 1000) -> PreResNet:
    """34 layers in pre-activation order."""
    return PreResNet((3, 4, 6, 3), classes)
