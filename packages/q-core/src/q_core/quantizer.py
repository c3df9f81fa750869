"""A quantizer is a grid and a rounding."""

from typing import final

import torch
from jaxtyping import Float, Int32
from torch import Tensor

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

    Gradient:
        That of `grid.fake_quantize`, straight-through for the grids of this package.
    """

    def __init__(self, grid: Grid, rounding: Rounding | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.rounding = NearestEven() if rounding is None else rounding

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the levels that represent `x`, in the dtype of `x`.

        The arithmetic runs in float32 or wider, whatever the dtype of `x`.
        """
        return self.grid.fake_quantize(x, self.rounding).to(x.dtype)

    def codes(self, x: Float[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
        """Return the integer codes that represent `x`, in `[grid.qmin, grid.qmax]`."""
        with torch.no_grad():
            return self.grid.quantize(x, self.rounding).round().to(torch.int32)

    def frozen(self) -> "Quantizer":
        """Return a quantizer of plain tensors with the same codes, for deployment."""
        return Quantizer(self.grid.frozen(), self.rounding.frozen())
