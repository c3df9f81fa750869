r"""The steps that suit the standard normal distribution best, with zero pinned as a level.

Because zero is a level, the two sides of a grid do not know each other, and each is a problem of the half-normal
distribution: levels $0 < L_1 < \dots < L_Q$, thresholds $t_k$ in the middles, and with

$$ P_k = \int_{t_k}^{t_{k+1}} \varphi, \qquad M_k = \int_{t_k}^{t_{k+1}} x \varphi = \varphi(t_k) - \varphi(t_{k+1}),
   \qquad t_{Q+1} = \infty, $$

the mean squared error is least where each level is the mean of its cell, $L_k = M_k / P_k$ (Lloyd 1982, Max 1960). Of
equal steps $L_k = k s$ the best is where $\sum_k k\,(M_k - k s P_k) = 0$, over both sides together.

Everything is computed when it is asked for, and kept. The numbers are to be multiplied by the standard deviation.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from q_core.errors import RangeError

_HALVINGS = 60  # of the bracket 0 to 8: to the last digit of float64
_ROUNDS = 10  # Newton's method needs 4 to 6 for 1 to 255 levels


@functools.cache
def uniform_step(negative: int, positive: int) -> float:
    """Return the best distance of equal levels for the normal distribution.

    Args:
        negative: Number of levels below zero. 0 stands for data without a negative side, as a rectified linear unit
            leaves them: the standard deviation is then the one before it.
        positive: Number of levels above zero.

    Returns:
        The step, in standard deviations.

    Raises:
        RangeError: A number is negative, or both are 0.

    Source:
        Max 1960, "Quantizing for minimum distortion", section on equal steps; here with a level at zero.
    """
    if min(negative, positive) < 0 or not negative + positive:
        raise RangeError(f"{negative} levels below zero and {positive} above: give numbers from 0, not both 0")
    return _root(lambda step: sum(_excess(step, side, 0.0) for side in (negative, positive) if side))


@functools.cache
def mid_rise_step(levels: int) -> float:
    r"""Return the best distance of equal levels of which none is zero: $\pm s/2$, $\pm 3s/2$ and so on.

    Args:
        levels: Number of all levels, even.

    Returns:
        The step, in standard deviations.

    Raises:
        RangeError: `levels` is odd or below 2.

    Source:
        Max 1960, "Quantizing for minimum distortion", section on equal steps.
    """
    if levels < 2 or levels % 2:
        raise RangeError(f"{levels} levels: half of them lie on either side of zero, so give an even number from 2")
    return _root(lambda step: _excess(step, levels // 2, 0.5))


@functools.cache
def lloyd_max_steps(levels: int) -> tuple[float, ...]:
    """Return the best steps from zero outward on one side of the normal distribution.

    Args:
        levels: Number of levels on that side, apart from zero.

    Returns:
        The steps, in standard deviations, the one next to zero first.

    Raises:
        RangeError: `levels` is below 1.

    Source:
        Lloyd 1982, "Least squares quantization in PCM", with one level held at zero. The start is the density of
        levels that is best for very many of them: that of a normal distribution of variance 3 (Panter, Dite 1951).
    """
    if levels < 1:
        raise RangeError(f"{levels} levels: there is at least 1")
    index = torch.arange(1, levels + 1, dtype=torch.float64)
    found = math.sqrt(3) * torch.special.ndtri((1 + index / (levels + 0.5)) / 2)
    for _ in range(_ROUNDS):
        found = found - _newton(found)
    return tuple(found.diff(prepend=found.new_zeros(1)).tolist())


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _cells(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return mass and first moment between neighbouring edges, which are not negative."""
    beyond = torch.special.erfc(edges / math.sqrt(2)) / 2  # keeps its digits far out, which 1 - erf does not
    density = _density(edges)
    return beyond[:-1] - beyond[1:], density[:-1] - density[1:]


def _root(falling: Callable[[float], float]) -> float:
    low, high = 0.0, 8.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _excess(step: float, levels: int, shift: float) -> float:
    """Return minus half the derivative by `step` of the error of one side with levels `(k - shift) * step`."""
    index = torch.arange(1, levels + 1, dtype=torch.float64) - shift
    mass, moment = _cells(torch.cat([(index - 0.5) * step, index.new_tensor([math.inf])]))
    return float((index * (moment - index * step * mass)).sum())


def _newton(levels: Tensor) -> Tensor:
    """Return the step of Newton's method toward levels that are the means of their cells."""
    before = torch.cat([levels.new_zeros(1), levels[:-1]])
    edges = torch.cat([(before + levels) / 2, levels.new_tensor([math.inf])])
    mass, moment = _cells(edges)
    mean, density = moment / mass, _density(edges)
    # How the mean of a cell moves with its two edges; each edge moves by half of either level beside it.
    lower = density[:-1] * (mean - edges[:-1]) / mass / 2
    upper = torch.where(edges[1:].isinf(), 0.0, density[1:] * (edges[1:] - mean) / mass) / 2
    jacobian = torch.diag(1 - lower - upper) - torch.diag(lower[1:], -1) - torch.diag(upper[:-1], 1)
    step: Tensor = torch.linalg.solve(jacobian, levels - mean)
    return step
