"""What a unit is fitted to: the distance of its output, or of what the network makes of it, from the float network's.

All losses sum over the channels and average over everything else, so that a loss does not grow with the image and the
penalty of learned rounding, which is weighed against it, has one scale for convolutional and linear units.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from q_core.errors import RangeError

Tail = Callable[[Tensor, Tensor], Tensor]
"""What the float network makes of the output of a unit: `(images, output) -> logits`."""


class Loss(abc.ABC):
    """A distance between the output of a unit and its target."""

    @abc.abstractmethod
    def __call__(
        self, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], importance: Tensor | None
    ) -> Float[Tensor, ""]:
        """Return the loss, an average over the batch.

        Args:
            output: Of the quantized unit.
            target: Of the float unit.
            importance: What `importance` returned for these images; None if it returned None.
        """

    def importance(
        self, images: Tensor, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], tail: Tail
    ) -> Float[Tensor, "n *shape"] | None:
        """Return how much each element of the output matters, computed once before the unit learns; None for all alike.

        Args:
            images: Inputs of the network.
            output: Of the quantized unit, before it learns.
            target: Of the float unit.
            tail: What the float network makes of an output of the unit.
        """
        return None

    def further(
        self, images: Tensor, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], tail: Tail
    ) -> Float[Tensor, ""] | None:
        """Return what is added for the sake of what follows the unit, in every step; None for nothing.

        Args:
            images: Inputs of the network.
            output: Of the quantized unit.
            target: Of the float unit.
            tail: What the float network makes of an output of the unit.
        """
        return None

    def error(self, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"]) -> Float64[Tensor, ""]:
        """Return what a unit is judged by on images that were held out: the squared error, in float64.

        Args:
            output: Of the quantized unit, as it would be left.
            target: Of the float unit.
        """
        return _reduce((output - target).square(), torch.float64)


@final
@dataclasses.dataclass(frozen=True)
class PowerLoss(Loss):
    r"""$\sum_c |y - \hat{y}|^p$, averaged over images and positions.

    Attributes:
        p: Exponent, above 0. 2 is the mean squared error of BRECQ and QDrop as released, 2.4 what BRECQ fits the
            scales of activations with.

    Raises:
        RangeError: An exponent that is not positive.

    Gradient:
        To the output; to the target too if the exponent is not 2.

    Source:
        Li et al. 2021 (BRECQ), arXiv:2102.05426; Wei et al. 2022 (QDrop), arXiv:2203.05740, as released.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        """Check the exponent."""
        if self.p <= 0:
            raise RangeError(f"p={self.p}: it must be positive")

    def __call__(
        self, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], importance: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss."""
        if self.p == 2:
            squared: Tensor = _SquaredError.apply(output, target)  # type: ignore[no-untyped-call]
            return squared
        return _reduce((output - target).abs().pow(self.p))


class _SquaredError(torch.autograd.Function):
    """The squared error, summed over channels: three passes forth and back, where `mse_loss` takes twice the time."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        error = output - target
        ctx.save_for_backward(error)
        # Divided before it is squared, so that no dtype overflows by the number of elements.
        length: Tensor = torch.linalg.vector_norm(error)
        return (length / math.sqrt(_averaged(error))).square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        error: Tensor = ctx.saved_tensors[0]
        return error * (grad * (2 / _averaged(error))), None


def _averaged(error: Tensor) -> int:
    """Count what a loss averages over: everything but the channels."""
    return error.numel() // (error.shape[1] if error.ndim > 1 else 1)


@final
@dataclasses.dataclass(frozen=True)
class FisherLoss(Loss):
    r"""The squared error weighted by the diagonal of the Fisher information: $\sum_c g^2 (y - \hat{y})^2$.

    $g$ is the gradient of the divergence of the prediction, with the unit quantized, from that of the float network;
    its magnitude is raised by one, as released, so that no element is ignored.

    Source:
        Li et al. 2021 (BRECQ), arXiv:2102.05426, eq. 10; magnitude plus one as released.
    """

    def __call__(
        self, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], importance: Tensor | None
    ) -> Float[Tensor, ""]:
        """Return the loss."""
        error = output - target
        return _reduce(error.square() if importance is None else (error * importance).square())

    def importance(
        self, images: Tensor, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], tail: Tail
    ) -> Float[Tensor, "n *shape"]:
        """Return the magnitude of the gradient, plus one."""
        with torch.no_grad():
            expected = F.softmax(tail(images, target), dim=1)
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            divergence = F.kl_div(F.log_softmax(tail(images, leaf), dim=1), expected, reduction="batchmean")
            (gradient,) = torch.autograd.grad(divergence, leaf)
        return gradient.abs() + 1


@final
@dataclasses.dataclass(frozen=True)
class PredictionDifference(Loss):
    r"""Another loss, plus how far the prediction moves: $L + \lambda\,KL(p_T \,\|\, \hat{p}_T)$.

    $p_T$ is the softmax of the logits over $T$ of the float network, and $\hat{p}_T$ that of the float network which is
    given the output of the quantized unit. Every step runs the part of the network behind the unit.

    Attributes:
        loss: The loss of the output itself.
        weight: $\lambda$, at least 0; 0 is the loss itself.
        temperature: $T$, above 0.

    Raises:
        RangeError: A negative weight, or a temperature that is not positive.

    Source:
        Liu et al. 2023 (PD-Quant), arXiv:2212.07048; weight and temperature as released for ResNets. There the output
        that is pushed on has an input of its own, without mixing; here both terms see the same one.
    """

    loss: Loss = dataclasses.field(default_factory=PowerLoss)
    weight: float = 10.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.weight < 0:
            raise RangeError(f"weight={self.weight}: it must be at least 0")
        _check_temperature(self.temperature)

    def __call__(
        self, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], importance: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss of the output itself."""
        return self.loss(output, target, importance)

    def importance(
        self, images: Tensor, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], tail: Tail
    ) -> Float[Tensor, "n *shape"] | None:
        """Return that of the loss of the output."""
        return self.loss.importance(images, output, target, tail)

    def further(
        self, images: Tensor, output: Float[Tensor, "n *shape"], target: Float[Tensor, "n *shape"], tail: Tail
    ) -> Float[Tensor, ""] | None:
        """Return the weighted difference of the predictions, and what the loss of the output adds."""
        inner = self.loss.further(images, output, target, tail)
        if not self.weight:
            return inner
        with torch.no_grad():
            expected = tail(images, target).detach()
        difference = self.weight * divergence(tail(images, output), expected, self.temperature)
        return difference if inner is None else inner + difference


@final
@dataclasses.dataclass(frozen=True)
class DivergenceLoss(Loss):
    r"""How far a prediction is from that of the float network: $T^2\,KL(p_T \,\|\, \hat{p}_T)$, for logits on axis 1.

    It fits the unit that ends with the logits, such as the whole network. $T^2$ keeps the size of the gradient.

    Attributes:
        temperature: $T$, above 0. Large values compare the logits themselves.

    Raises:
        RangeError: A temperature that is not positive.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        _check_temperature(self.temperature)

    def __call__(
        self, output: Float[Tensor, "n c *shape"], target: Float[Tensor, "n c *shape"], importance: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss."""
        return self.temperature**2 * divergence(output, target, self.temperature)

    def error(self, output: Float[Tensor, "n c *shape"], target: Float[Tensor, "n c *shape"]) -> Float64[Tensor, ""]:
        """Return the loss in float64: a prediction is judged as what it is."""
        return self(output.double(), target.double())


def divergence(
    output: Float[Tensor, "n c *shape"], target: Float[Tensor, "n c *shape"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    r"""Return $KL(softmax(y / T) \,\|\, softmax(\hat{y} / T))$, averaged over everything but the classes on axis 1.

    Args:
        output: $\hat{y}$, logits.
        target: $y$, logits.
        temperature: $T$.

    Returns:
        A value of at least 0, and 0 where the two differ by a constant.
    """
    expected, found = (F.log_softmax(logits / temperature, dim=1) for logits in (target, output))
    return _reduce(F.kl_div(found, expected, reduction="none", log_target=True))


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise RangeError(f"temperature={temperature}: it must be positive")


def _reduce(power: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return power.sum(1).mean(dtype=dtype) if power.ndim > 1 else power.mean(dtype=dtype)
