"""A quantizer is a grid and a rounding."""

import copy
from typing import final

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from q_core.grid import Grid
from q_core.module import PreciseModule
from q_core.rounding import NearestEven, Rounding


@final
class Quantizer(PreciseModule):
    """Replaces every real by a level of the grid, chosen by the rounding.

    A quantizer cannot exist without its parameters, so nobody has to ask whether it is initialised.

    Args:
        grid: Where the representable reals are.
        rounding: Which of two neighbours to take; `NearestEven` when None.
        transform: What is done to a tensor before, such as a normalisation of weights: what is replaced is then not
            the tensor but the transformed one. Nothing when None.

    Gradient:
        That of `grid.fake_quantize`, straight-through for the grids of this package, and of the transform.
    """

    def __init__(self, grid: Grid, rounding: Rounding | None = None, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.rounding = NearestEven() if rounding is None else rounding
        self.transform: nn.Module | None
        # Registered, so that a quantizer without one has no module there, and files no entry for it.
        self.register_module("transform", transform)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the levels that represent `x`, in the dtype of `x`.

        The arithmetic runs in float32 or wider, whatever the dtype of `x`.
        """
        return self.grid.fake_quantize(self._transformed(x), self.rounding).to(x.dtype)

    def codes(self, x: Float[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
        """Return the integer codes that represent `x`, in `[grid.qmin, grid.qmax]`."""
        with torch.no_grad():
            return self.grid.quantize(self._transformed(x), self.rounding).round().to(torch.int32)

    def frozen(self) -> "Quantizer":
        """Return a quantizer of plain tensors with the same codes, for deployment."""
        transform = None if self.transform is None else copy.deepcopy(self.transform).requires_grad_(False)
        return Quantizer(self.grid.frozen(), self.rounding.frozen(), transform)

    def _transformed(self, x: Tensor) -> Tensor:
        return x if self.transform is None else self.transform(x)
