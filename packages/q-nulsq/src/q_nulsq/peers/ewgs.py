r"""EWGS: the gradient of rounding, scaled for each element by how far it was rounded.

With $u$ the code coordinate and $q = \lfloor u \rceil$, the gradient $g$ that arrives at $q$ goes on to $u$ as

$$ g \left( 1 + \delta\, \mathrm{sign}(g)\, (u - q) \right) $$

Within one cell all elements get the same $g$, but have different ways to go until their level changes: the farther an
element lies from the threshold it is driven to, the larger its gradient is made. $\delta = 0$ is straight-through.

Source: Lee, Kim, Ham 2021 (EWGS), arXiv:2104.00903, section on element-wise gradient scaling.
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from q_core.errors import RangeError
from q_core.rounding import NearestEven, Rounding


class _ScaledRound(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, delta: float) -> Tensor:
        return torch.round(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        u, ctx.delta = inputs
        ctx.save_for_backward(u - output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (moved,) = ctx.saved_tensors
        return grad + ctx.delta * grad.abs() * moved, None  # g sign(g) = |g|


@final
class ElementwiseScaling(Rounding):
    """The nearest code, ties to even, with a gradient scaled by the distance to it.

    It goes with every grid. Grids that round to the nearest level in one step compute with the parts for it, since
    the gradient is not straight-through.

    Args:
        delta: How strongly, dimensionless, 0 or more. Up to 2 no gradient changes its sign. The distance is measured in
            codes here; the published code measures it as a part of the whole range, so its number is divided by the
            number of codes less one to get the same.

    Raises:
        RangeError: `delta` is negative or not finite.

    Gradient:
        `1 + delta * sign(g) * (u - q)` times the gradient `g` that arrives; 1 for `delta = 0`. The law `gradient` of
        `q_core.testing.check_rounding` asks for 1 and is waived by design.

    Source:
        Lee, Kim, Ham 2021 (EWGS), arXiv:2104.00903, section on element-wise gradient scaling.
    """

    def __init__(self, delta: float) -> None:
        super().__init__()
        if not 0 <= delta < float("inf"):
            raise RangeError(f"delta={delta}: it must be finite and 0 or more; 0 is the straight-through gradient")
        self.delta = delta

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round half to even."""
        result: Tensor = _ScaledRound.apply(u, self.delta)  # type: ignore[no-untyped-call]
        return result

    def facts(self) -> dict[str, Any]:
        """Return the strength."""
        return {"delta": self.delta}

    def frozen(self) -> NearestEven:
        """Return the rounding of the same codes whose gradient nobody asks for."""
        return NearestEven()

    def extra_repr(self) -> str:
        """Show the strength."""
        return f"delta {self.delta}"
