"""What a grid does to a tensor, and its gradients, as one tuple."""

import torch
from torch import Tensor

from q_core import NearestEven, Rounding


def gradients(
    grid: torch.nn.Module, x: Tensor, upstream: Tensor, rounding: Rounding | None = None
) -> dict[str, Tensor]:
    """Return the levels, and the gradients to x and to each parameter by its name."""
    leaf = x.clone().requires_grad_()
    levels = grid.fake_quantize(leaf, rounding or NearestEven())
    names = dict(grid.named_parameters())
    found = torch.autograd.grad((levels * upstream).sum(), [leaf, *names.values()])
    return {"levels": levels.detach(), "x": found[0], **dict(zip(names, found[1:], strict=True))}
