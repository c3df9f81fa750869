r"""A-rounding: nearest rounding, corrected until the errors of a window cancel.

A dot product of positive activations with weights whose mean is not zero passes on the *mean* error of the activations.
Nearest rounding makes every error small and leaves their sum to chance. A-rounding then sends a few elements, those
nearest to the middle of their cell, to their other neighbour: within every channel of a window until its errors sum to
at most one half, and then within the window as a whole. Nothing is learned, and every window is sorted at inference:
it is a yardstick, not a method to deploy.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from q_core.errors import ShapeError, SpecError
from q_core.functional import straight_through
from q_core.rounding import Rounding


@final
class AdjustedRounding(Rounding):
    r"""A-rounding of the patches of a convolution: error sums of at most 1 in a channel and 1/2 in the whole window.

    With $r = \lfloor u \rceil - u$, the error of nearest rounding, and $e_i$ the sum of $r$ over channel $i$:

    1. $n_i = \lfloor |e_i| \rceil$ elements of the channel whose $r$ has the sign of $e_i$, those with the largest
       $|r|$, go to their other neighbour, which leaves $|e_i| \le 1/2$.
    2. With $E$ the sum of what is left, $\lfloor |E| \rceil$ channels give one element more or take one back, whichever
       lowers $|E|$: the last to flip if $n_i \ge |e_i|$, otherwise the next in line; again those with the largest
       $|r|$ first.

    An element on a level stays there, so zeros and padding keep their code. Equal $|r|$ flip in the order of their
    positions.

    Args:
        low: Code coordinate of the smallest level, `qmin - zero_point`, an integer. `u` is clamped, so that no flip
            makes up for a clipped value.
        high: Code coordinate of the largest level.

    Raises:
        SpecError: `low` is not below `high`, or one of them is not an integer.

    Gradient:
        1 everywhere (straight-through).

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, section 3 and appendix A; Guo et al. 2022 (SQuant), arXiv:2202.07471,
        does so to weights.
    """

    def __init__(self, *, low: float, high: float) -> None:
        super().__init__()
        _check_levels(low, high)
        self.low, self.high = low, high

    def facts(self) -> dict[str, float]:
        """Return the ends of the codes."""
        return {"low": self.low, "high": self.high}

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round each window `[c, k]` of patches `[n, c, k, l]` for itself.

        Raises:
            ShapeError: `u` does not have these four axes.
        """
        if u.ndim != 4:
            raise ShapeError(
                f"a tensor of shape {tuple(u.shape)}: A-rounding needs patches [n, c, k, l], as PatchConv2d makes "
                "them; for a linear layer take AdjustedVectorRounding"
            )
        return straight_through(_adjust(u.detach().clamp(self.low, self.high)), u)

    def extra_repr(self) -> str:
        """Show the range."""
        return f"{self.low} to {self.high}"


@final
class AdjustedVectorRounding(Rounding):
    """A-rounding of the input of a linear layer: an error sum of at most 1/2 in every vector along the last axis.

    It is `AdjustedRounding` with one kernel position: every feature is a channel.

    Args:
        low: Code coordinate of the smallest level, `qmin - zero_point`, an integer.
        high: Code coordinate of the largest level.

    Raises:
        SpecError: `low` is not below `high`, or one of them is not an integer.

    Gradient:
        1 everywhere (straight-through).

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, section 3 and appendix A.
    """

    def __init__(self, *, low: float, high: float) -> None:
        super().__init__()
        _check_levels(low, high)
        self.low, self.high = low, high

    def facts(self) -> dict[str, float]:
        """Return the ends of the codes."""
        return {"low": self.low, "high": self.high}

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round each vector for itself.

        Raises:
            ShapeError: `u` has no axis.
        """
        if u.ndim == 0:
            raise ShapeError("a tensor without axes: A-rounding needs vectors along the last axis")
        bounded = u.detach().clamp(self.low, self.high)
        windows = bounded.reshape(-1, u.shape[-1], 1, 1)
        return straight_through(_adjust(windows).reshape(u.shape), u)

    def extra_repr(self) -> str:
        """Show the range."""
        return f"{self.low} to {self.high}"


def _adjust(u: Float[Tensor, "n c k l"]) -> Float[Tensor, "n c k l"]:
    """Round windows; a channel flips the first so many of its elements in an order that does not change any more."""
    nearest = torch.round(u)
    error = nearest - u
    total = error.sum(2)
    sign = total.sign()
    # Positive for the elements that may flip. There are always enough: each brings at most one half to the sum.
    gain = error.mul_(sign.unsqueeze(2))
    turn = _ranks(gain)
    size = total.abs()
    flips = size.round()
    undo = (flips >= size) & (flips > 0)
    candidate = (flips - undo.to(flips.dtype)).to(turn.dtype)
    distance = (turn == candidate.unsqueeze(2)).to(gain.dtype).mul_(gain).sum(2)
    distance = torch.where(undo, 1 - distance, distance)
    remaining = total - sign * flips
    step = torch.where(undo, sign, -sign)
    chosen = _largest(distance, remaining, step)
    count = (flips + torch.where(undo, -chosen, chosen)).to(turn.dtype)
    return torch.addcmul(nearest, (turn < count.unsqueeze(2)).to(nearest.dtype), sign.unsqueeze(2), value=-1)


def _largest(
    distance: Float[Tensor, "n c l"], remaining: Float[Tensor, "n c l"], step: Float[Tensor, "n c l"]
) -> Float[Tensor, "n c l"]:
    """Return 1 for each channel whose candidate is to flip, so that the sum of what remains is at most one half."""
    whole = remaining.sum(1, keepdim=True)
    # A channel without error has step 0 and can never be asked.
    useful = step * whole < 0
    score = torch.where(useful, distance, distance.new_full((), -1))
    order = score.argsort(dim=1, descending=True, stable=True)
    channels = torch.arange(score.shape[1], device=score.device).reshape(1, -1, 1)
    first = (channels < whole.abs().round()).to(score.dtype).expand_as(score)
    return torch.zeros_like(score).scatter_(1, order, first) * useful


def _ranks(values: Float[Tensor, "n c k l"]) -> Tensor:
    """For each element, how many of its channel are larger, or equal and before it.

    Comparing all pairs is a few passes over short windows, where sorting would gather every window from memory.
    """
    positions = values.shape[2]
    ranks = torch.zeros(values.shape, dtype=torch.int8 if positions < 128 else torch.int16, device=values.device)
    for position in range(positions):
        one = values.narrow(2, position, 1)
        before, after = values[:, :, :position], values[:, :, position + 1 :]
        ranks[:, :, :position] += one > before
        ranks[:, :, position + 1 :] += one >= after
    return ranks


def _check_levels(low: float, high: float) -> None:
    if not low < high:
        raise SpecError(f"codes from {low} to {high}: low must be below high")
    if low != round(low) or high != round(high):
        raise SpecError(f"codes from {low} to {high}: the smallest and the largest level must be integers")
