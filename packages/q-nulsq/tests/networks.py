"""Small networks, data for them, and every recipe by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from q_core import Quantized
from q_nulsq import recipes

RECIPES: dict[str, Callable[..., Quantized]] = {
    name: getattr(recipes, name)
    for name in (
        "nulsq_a",
        "nulsq_w",
        "nulsq_wa",
        "lsq",
        "lsq_plus",
        "pact",
        "dorefa",
        "apot",
        "lcq",
        "lq_nets",
        "uniq",
        "n2uq",
    )
}
CLASSES = 5


class Bottleneck(nn.Module):
    """Convolutions with batch norms; the third one sees what no ReLU has cut off, as in a linear bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 7, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(7)
        self.linear = nn.Conv2d(7, 6, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = self.bn3(self.linear(self.bn2(self.inner(x)))).relu()
        return self.fc(x.mean((2, 3)))


def network(seed: int = 1) -> Bottleneck:
    """A network with batch norms that have seen data."""
    generator = torch.random.fork_rng(devices=[])
    with generator:
        torch.manual_seed(seed)
        model = Bottleneck()
        for _ in range(3):
            model(torch.randn(8, 3, 7, 7))
    return model.eval()


def images(count: int = 3, seed: int = 2) -> list[Tensor]:
    """Batches of different sizes and scales."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4 + index, 3, 7, 7, generator=generator) * (1 + index / 4) for index in range(count)]


def labels(batch: Tensor) -> Tensor:
    """A class that depends on the image."""
    return (batch.mean((1, 2, 3)) * 30).long() % CLASSES


def state_of(model: nn.Module) -> dict[str, Any]:
    """A copy of everything that training moves."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bit_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
