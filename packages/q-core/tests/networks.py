"""Small networks, each with one property that a quantization toolkit trips over, and what the tests ask of them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from q_core import (
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    PerChannel,
    QuantAdd,
    QuantConcat,
    QuantSpec,
    Recipe,
    Rule,
)

OBSERVERS: dict[str, Callable[..., Observer]] = {
    "minmax": MinMaxObserver,
    "average": partial(MovingAverageObserver, momentum=0.3),
    "percentile": PercentileObserver,
    "mse": partial(MSEObserver, candidates=8),  # the default of 100 takes its time and finds the same faults
    "entropy": partial(EntropyObserver, candidates=8),
}


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 3, "out_channels": 5, "kernel_size": 3},
    "one pixel": {"in_channels": 7, "out_channels": 1, "kernel_size": 1, "bias": False},
    "stride": {"in_channels": 3, "out_channels": 2, "kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)},
    "grouped": {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3},
    "depthwise": {"in_channels": 5, "out_channels": 5, "kernel_size": 3, "groups": 5, "padding": 1, "bias": False},
    "dilated": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "dilation": (1, 2)},
    "same": {"in_channels": 2, "out_channels": 3, "kernel_size": (3, 5), "padding": "same"},
    "valid": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "valid"},
    "reflect": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"in_channels": 2, "out_channels": 3, "kernel_size": 5, "padding": 2, "padding_mode": "replicate"},
    "circular": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
}


class Residual(nn.Module):
    """The ordinary case: convolutions with batch norms, one of them depthwise, a residual sum, a linear layer."""

    def __init__(self, channels: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride=2)
        self.add = QuantAdd()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = self.add(self.bn2(self.depthwise(x)), self.shortcut(x)).relu()
        return self.fc(x.mean((2, 3)))


class Inception(nn.Module):
    """Two branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 5, 3, padding=1)
        self.cat = QuantConcat()
        self.out = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cat(self.left(x), self.right(x)).relu())


class CalledTwice(nn.Module):
    """One block that runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.first(x)))


class Tied(nn.Module):
    """Two layers that share one weight, with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).relu())


class SharedModule(nn.Module):
    """One layer under two names, of which the forward uses both."""

    def __init__(self) -> None:
        super().__init__()
        self.here = nn.Linear(4, 4)
        self.there = self.here
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.there(self.here(x).relu()))


class Branching(nn.Module):
    """A branch on the values of the input, which no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(4, 3)
        self.negative = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.sum() > 0 else self.negative(x)


class TwoInputs(nn.Module):
    """A convolution with a batch norm for one of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(2, 4, 1)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.bn(self.conv(image)) + self.other(mask)[..., 1:-1, 1:-1]


def exact_convolutions() -> nn.Sequential:
    """Make a network whose sums are exact in float32, so that no order of additions changes a bit.

    Inputs of `exact_images` and weights are small integers; the largest sum stays far below 2**24.
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    return model


def exact_images(count: int, size: int = 9) -> Tensor:
    """Draw images whose pixels are small integers."""
    return torch.randint(-8, 9, (count, 3, size, size)).to(torch.float32)


def trained(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and parameters such as training leaves, and return the model in eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
    return model.eval()


def images(count: int = 3, batch: int = 2, size: int = 9) -> list[Tensor]:
    """Draw batches of images."""
    return [torch.randn(batch, 3, size, size) for _ in range(count)]


def recipes(
    weight_bits: int = 8, input_bits: int = 8, observer: Callable[..., Observer] = MinMaxObserver
) -> tuple[Recipe, Recipe]:
    """Make the usual pair: symmetric weights per channel, unsigned activations per tensor with a zero point."""
    weight = Recipe(QuantSpec.signed(weight_bits, granularity=PerChannel(0)), observer=observer)
    return weight, Recipe(QuantSpec.unsigned(input_bits), observer=observer)


def everything(
    weight_bits: int = 8, input_bits: int = 8, observer: Callable[..., Observer] = MinMaxObserver
) -> list[Rule]:
    """Make one rule that quantizes whatever can be."""
    return [Rule(".*", *recipes(weight_bits, input_bits, observer))]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Every tensor of a model: which object, its version, and a copy of its values."""

    identities: dict[str, tuple[int, int, bool]]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Tensors":
        state = model.state_dict(keep_vars=True)
        identities = {name: (id(tensor), tensor._version, tensor.requires_grad) for name, tensor in state.items()}
        return cls(identities, {name: tensor.detach().clone() for name, tensor in state.items()})


@contextmanager
def untouched(model: nn.Module, *, writes: bool = False) -> Iterator[None]:
    """Check that the model is afterwards what it was: its modules, their types, modes and hooks, and every bit.

    Args:
        model: The model.
        writes: Whether a tensor may be written with the values it had.
    """

    def structure() -> list[Any]:
        return [
            (
                path,
                id(module),
                type(module),
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for path, module in model.named_modules(remove_duplicate=False)
        ]

    before, tensors = structure(), Tensors.of(model)
    yield
    after = Tensors.of(model)
    assert structure() == before
    if not writes:
        assert after.identities == tensors.identities
    assert_bit_equal(after.values, tensors.values)


def assert_bit_equal(actual: Any, expected: Any) -> None:
    """Check for equality of every bit, NaN included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
