"""What a unit is fitted to: the distance of its output from that of the float network.

All losses sum over the channels and average over everything else, so that a loss does not grow with the image and the
penalty of learned rounding, which is weighed against it, has one scale for convolutional and linear units.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
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


@final
@dataclasses.dataclass(frozen=True)
class PowerLoss(Loss):
    r"""$\sum_c |y - \hat{y}|^p$, averaged over images and positions.

    Attributes:
        p: Exponent, above 0. 2 is the mean squared error of BRECQ and QDrop as released, 2.4 what BRECQ fits the
            scales of activations with.

    Raises:
        RangeError: An exponent that is not positive.

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
        error = output - target
        power = error.square() if self.p == 2 else error.abs().pow(self.p)
        return _reduce(power)


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


def _reduce(power: Tensor) -> Tensor:
    return power.sum(1).mean() if power.ndim > 1 else power.mean()
