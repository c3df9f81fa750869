"""Learned steps in the published form: two searches, a gather, saved 64-bit indices, and a scatter.

Written from the description and the formulas of Gongyo et al. 2024 (nuLSQ), supplement, eq. 5 and 10 to 12, in
operations of torch, as their layers proceed: every step is asked whether it is positive, the levels are cumulative
sums, one search finds the level and another the cell, and the gradients of the cells are scattered into the steps. Both
sides of zero are searched at once, which the released code does one after the other.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Published(torch.autograd.Function):
    """Maps `x` to the nearest level: `steps` holds those below zero first, outward, then those above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, below: int) -> Tensor:
        for step in steps:
            assert step > 0
        levels = torch.cat([-steps[:below].cumsum(0).flip(0), steps.new_zeros(1), steps[below:].cumsum(0)])
        level = torch.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        ctx.save_for_backward(x, steps, levels, torch.searchsorted(levels, x))
        ctx.below = below
        return levels[level]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, steps, levels, cell = ctx.saved_tensors
        below, above = x < levels[0], x > levels[-1]
        inside = ~(below | above)
        cell = (cell - 1).clamp(0, len(steps) - 1)
        widths = torch.cat([steps[: ctx.below].flip(0), steps[ctx.below :]])
        place = (x - levels[cell]) / widths[cell]
        slope = (torch.round(place) - place) * inside
        sums = torch.zeros_like(widths).scatter_add(0, cell.flatten(), (grad * slope).flatten())
        lower, upper = sums[: ctx.below].flip(0) - (grad * below).sum(), sums[ctx.below :] + (grad * above).sum()
        return grad * inside, torch.cat([lower, upper]), None


class PublishedSteps(nn.Module):
    """A quantizer of that kind."""

    def __init__(self, steps: Tensor, below: int) -> None:
        super().__init__()
        self.steps, self.below = nn.Parameter(steps.detach().clone()), below

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Published.apply(x.contiguous(), self.steps, self.below)
        return out
