r"""What an optimizer is told about a quantized model: groups, projection, schedule, and the size of gradients.

A plain training loop needs three calls:

    weights, norms, steps = parameter_groups(model, lr=0.04, weight_decay=1e-4, step_lr=4e-4)
    optimizers = torch.optim.SGD([weights, norms], momentum=0.9), torch.optim.AdamW([steps])
    project_after(optimizers[1], model)

Batch norms are estimated anew by `torch.optim.swa_utils.update_bn`, which needs nothing from here.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, final

from torch import nn, optim
from torch.utils.hooks import RemovableHandle

from q_core.errors import RangeError
from q_core.grid import Grid, UniformGrid
from q_core.quantizer import Quantizer
from q_core.rounding import Rounding
from q_nulsq.positivity import Projection


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    step_lr: float,
    step_weight_decay: float = 0.0,
    norm_weight_decay: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Divide the parameters of a model into weights, norms and biases, and those of quantizers.

    Every parameter is in exactly one group, a shared one as well. A group may be empty.

    Args:
        model: Any model.
        lr: Learning rate of weights, norms and biases.
        weight_decay: Of the weights.
        step_lr: Learning rate of everything in a quantizer: steps, scales, and what a rounding or a transform learns.
        step_weight_decay: Of the same.
        norm_weight_decay: Of parameters of normalisations, and of those with one axis or called a bias; that of the
            weights, as published, when None.

    Returns:
        Groups as a torch optimizer takes them, with a `name` each: `weights`, `norms` and `steps`.

    Source:
        Gongyo et al. 2024 (nuLSQ), supplement, section C: SGD for weights and AdamW for steps.
    """
    of_quantizers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (Quantizer, Grid, Rounding))
        for parameter in module.parameters()
    }
    of_norms = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim < 2 or "norm" in type(module).__name__.lower() or name.endswith("bias")
    }
    steps: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    weights: list[nn.Parameter] = []
    for parameter in model.parameters():
        group = steps if id(parameter) in of_quantizers else norms if id(parameter) in of_norms else weights
        group.append(parameter)
    decay = weight_decay if norm_weight_decay is None else norm_weight_decay
    return (
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "norms", "params": norms, "lr": lr, "weight_decay": decay},
        {"name": "steps", "params": steps, "lr": step_lr, "weight_decay": step_weight_decay},
    )


def project_after(optimizer: optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Let steps be put back to where they are allowed to be after each update of an optimizer.

    Calls `project` of every grid that has it, and keeps learned scales of a `q_core.UniformGrid` positive in the same
    way as `q_nulsq.Projection`. It does not wait for the device.

    Args:
        optimizer: The one that updates the steps.
        model: The model. Grids put in later are not seen.

    Returns:
        A handle; its `remove` undoes this.
    """
    grids = [module for module in model.modules() if isinstance(module, Grid)]
    projections: list[Callable[[], None]] = []
    for grid in grids:
        project = getattr(grid, "project", None)
        if callable(project):
            projections.append(project)
        elif isinstance(grid, UniformGrid) and isinstance(grid.scale, nn.Parameter):
            projections.append(_ProjectScale(grid))

    def project_all(*_: Any) -> None:
        for each in projections:
            each()

    return optimizer.register_step_post_hook(project_all)


@dataclasses.dataclass(frozen=True)
class _ProjectScale:
    grid: UniformGrid

    def __call__(self) -> None:
        Projection().project(self.grid.scale.detach().unsqueeze(-1))


def warmup_cosine(
    optimizer: optim.Optimizer, warmup: int, total: int, *, start: float = 1e-5
) -> optim.lr_scheduler.LambdaLR:
    r"""Raise learning rates linearly, then lower them to zero by a cosine.

    At step $e$ of the schedule a group with learning rate $r$ has

    $$ s + (r - s)\, e / W \quad (e < W), \qquad
       \frac{r}{2} \left( 1 + \cos \pi \frac{e - W}{N - W} \right) \quad (W \le e \le N) $$

    with $s$ the `start`, but no more than $r$. After $N$ it stays at zero. A step is whatever lies between two calls of
    `scheduler.step()`: an epoch as published, or a batch.

    Args:
        optimizer: Its groups may have different learning rates.
        warmup: W, steps of warm-up, 0 or more.
        total: N, all steps, those of warm-up among them.
        start: Learning rate of every group at step 0.

    Raises:
        RangeError: `warmup` is negative or not below `total`, or `start` is negative.

    Source:
        Gongyo et al. 2024 (nuLSQ), supplement, section C-II: 10 of 300 epochs from 1e-5.
    """
    if not 0 <= warmup < total or start < 0:
        raise RangeError(
            f"warmup={warmup}, total={total}, start={start}: the warm-up must be from 0 to less than the total, and "
            "the start not negative"
        )

    def factor(base: float) -> Callable[[int], float]:
        first = min(start / base, 1.0) if base > 0 else 1.0

        def at(step: int) -> float:
            if step < warmup:
                return first + (1 - first) * step / warmup
            return (1 + math.cos(math.pi * (min(step, total) - warmup) / (total - warmup))) / 2

        return at

    # A scheduler made before on the same optimizer has noted what the rates are meant to be.
    bases = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return optim.lr_scheduler.LambdaLR(optimizer, [factor(float(base)) for base in bases])


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much data one parameter of a quantizer sees.

    Attributes:
        elements: Elements in its tile; of an activation, those of a whole batch.
        features: Elements in its tile; of an activation, those of one image.
        channels: Elements in its tile; of an activation, its channels.
    """

    elements: int
    features: int
    channels: int


class GradientScale(abc.ABC):
    r"""The rule for the multiplier of the gradient of steps, $1/\sqrt{N Q_p}$, which is to say: what N is.

    Implementations of LSQ differ in it by orders of magnitude. $Q_p$ is the largest code, or where that is 0 minus the
    smallest. Under Adam a constant factor changes nothing, but for its epsilon.

    Source:
        Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2.2.
    """

    @abc.abstractmethod
    def count(self, counts: Counts) -> int:
        """Return N."""

    def factor(self, counts: Counts, grid: Grid) -> float:
        """Return the multiplier for the parameters of a grid."""
        return 1 / math.sqrt(max(1, self.count(counts)) * (grid.qmax or -grid.qmin))


@final
@dataclasses.dataclass(frozen=True)
class Unscaled(GradientScale):
    """A multiplier of 1: as nuLSQ trains with AdamW."""

    def count(self, counts: Counts) -> int:
        """Return 1, which nobody asks for."""
        return 1

    def factor(self, counts: Counts, grid: Grid) -> float:
        """Return 1."""
        return 1.0


@final
@dataclasses.dataclass(frozen=True)
class ByElements(GradientScale):
    """N counts everything that is summed into the gradient, the batch too: as in most public code."""

    def count(self, counts: Counts) -> int:
        """Return the elements."""
        return counts.elements


@final
@dataclasses.dataclass(frozen=True)
class ByFeatures(GradientScale):
    """N counts weights, or the features of a layer for one image: the words of LSQ."""

    def count(self, counts: Counts) -> int:
        """Return the features."""
        return counts.features


@final
@dataclasses.dataclass(frozen=True)
class ByChannels(GradientScale):
    """N counts weights, or the channels of an activation: as the released code of nuLSQ does where it scales."""

    def count(self, counts: Counts) -> int:
        """Return the channels."""
        return counts.channels
