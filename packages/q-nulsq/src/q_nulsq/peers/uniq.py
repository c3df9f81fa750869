r"""UniQ: equal steps for weights with no level at zero.

With $m = 2^b$ levels and $A = \Delta (m - 1)/2$ the level of number $k = 0, \dots, m - 1$ is $\Delta k - A$:

$$
\hat x = \Delta \left\lfloor \mathrm{clamp}\left( \frac{x + A}{\Delta}, 0, m - 1 \right) \right\rceil - A, \qquad
\frac{\partial \hat x}{\partial \Delta} =
\begin{cases} \lfloor v \rceil - v & |x| \le A \\ \mathrm{sign}(x)\,(m - 1)/2 & |x| > A \end{cases},
\qquad v = \frac{x + A}{\Delta}
$$

The levels are symmetric about zero, none of them is zero, and no code is spent on one side more than on the other. Such
a grid is called *mid-rise*. The activations of UniQ are those of LSQ.

Source: Pham, Abraham, Chung 2021 (UniQ), ICCV, section on the quantizer.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import functional
from q_core.spec import QuantSpec
from q_nulsq.parameters import check_positive, owned, spread
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states
from q_nulsq.tabulated import MidRiseGrid


@final
class UniqGrid(MidRiseGrid):
    """Levels one scale apart, symmetric about a zero that is not among them.

    A signed code `c` stands for `(c + 1/2) * scale`.

    Args:
        scale: Real width of one code. Positive, finite, at least one axis; its shape is the granularity.
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive; the number of codes is even.
        positivity: How the scale is kept positive while it learns; `Projection` when None.
        learnable: Whether the scale is a parameter.
        gradient_scale: Multiplier of the gradient of the scale, dimensionless.

    Raises:
        SpecError: The number of codes is odd, so that zero would be a level.
        ShapeError: The scale has no axis.
        RangeError: A scale that is not positive and finite.

    Gradient:
        Those of the module's equations, times `gradient_scale` for the scale. What lies on an end is inside.

    Source:
        Pham, Abraham, Chung 2021 (UniQ), ICCV, section on the quantizer.
    """

    def __init__(
        self,
        scale: Float[Tensor, "..."],
        *,
        qmin: int,
        qmax: int,
        positivity: Positivity | None = None,
        learnable: bool = True,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__(qmin, qmax)
        check_positive("scale", scale)
        self.gradient_scale = gradient_scale
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "scale")
        raw = self.positivity.raw(owned(scale))
        self.scale: Tensor
        if learnable:
            self.scale = nn.Parameter(raw)
        else:
            self.register_buffer("scale", raw)

    @classmethod
    def from_range(
        cls,
        spec: QuantSpec,
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        positivity: Positivity | None = None,
        learnable: bool = True,
        gradient_scale: float = 1.0,
    ) -> "UniqGrid":
        """Build the grid whose outermost levels are as far from zero as the farther end of a range of reals.

        A range of zero width at zero gets the scale 1.

        Args:
            spec: The codes, evenly many.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            positivity: How the scale is kept positive; `Projection` when None.
            learnable: Whether the scale is a parameter.
            gradient_scale: Multiplier of its gradient.

        Returns:
            A grid whose scale has the shape of `low`.

        Raises:
            SpecError: The number of codes is odd.
            RangeError: The range is not finite, or its ends are in the wrong order.
        """
        spread(low, high, 1)  # for its checks: the range below is in order whatever this one is
        end = torch.maximum(high.abs(), low.abs())
        scale, _ = spread(-end, end, spec.qmax - spec.qmin)
        return cls(
            scale,
            qmin=spec.qmin,
            qmax=spec.qmax,
            positivity=positivity,
            learnable=learnable,
            gradient_scale=gradient_scale,
        )

    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return odd multiples of half the scale, and the scale between any two of them."""
        scale = functional.scale_gradient(self.positivity.steps(self.scale), self.gradient_scale).unsqueeze(-1)
        return scale * (0.5 * self.odd(scale)), scale.expand(*self.tile_shape, self.qmax - self.qmin)

    def project(self) -> None:
        """Make the scale positive again after a step of the optimizer, in place."""
        self.positivity.project(self.scale.unsqueeze(-1))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the scale."""
        return tuple(self.scale.shape)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, scale {self.tile_shape}"
