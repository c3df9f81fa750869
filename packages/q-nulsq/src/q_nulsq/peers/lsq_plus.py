r"""LSQ+: equal steps with a learned offset, for activations that are neither unsigned nor symmetric.

$$ \hat x = s \left\lfloor \mathrm{clamp}\left( \frac{x - b}{s}, q_{min}, q_{max} \right) \right\rceil + b $$

with the gradients, $v = (x - b)/s$,

$$
\frac{\partial \hat x}{\partial x} = [q_{min} \le v \le q_{max}], \qquad
\frac{\partial \hat x}{\partial s} =
\begin{cases} \lfloor v \rceil - v & q_{min} \le v \le q_{max} \\ q_{min} & v < q_{min} \\ q_{max} & v > q_{max}
\end{cases}, \qquad
\frac{\partial \hat x}{\partial b} = \begin{cases} 0 & q_{min} \le v \le q_{max} \\ 1 & \text{else} \end{cases}
$$

Swish, GELU and the outputs of linear bottlenecks have a short negative tail. Unsigned codes cut it off, signed ones
spend half of the levels on it; the offset puts all of them where the data are. The weights of LSQ+ are those of LSQ.

Source: Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, section on learnable asymmetric quantization.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import functional
from q_core.errors import RangeError, ShapeError, SpecError
from q_core.spec import QuantSpec
from q_nulsq.parameters import check_positive, owned, spread
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states
from q_nulsq.tabulated import TabulatedGrid


@final
class LsqPlusGrid(TabulatedGrid):
    r"""Levels one scale apart and shifted by an offset: $\hat x = s\,q + b$, both learned.

    In general real zero is no level. Where a convolution pads with zeros, the padding keeps its exact zero while a zero
    in the data moves to the nearest level, at most half a scale away.

    Args:
        scale: Real width of one code. Positive, finite, at least one axis; its shape is the granularity.
        offset: Real value of code 0. Finite. Shape of `scale`. None means 0, which is the grid of LSQ.
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.
        positivity: How the scale is kept positive while it learns; `Projection` when None.
        learnable: Whether scale and offset are parameters.
        gradient_scale: Multiplier of the gradients of scale and offset, dimensionless.

    Raises:
        SpecError: `qmin` is not below `qmax`.
        ShapeError: The scale has no axis, or the offset another shape.
        RangeError: A scale that is not positive and finite, or an offset that is not finite.

    Gradient:
        Those of the module's equations, times `gradient_scale` for scale and offset. What lies on an end is inside.
        The gradient of the offset is exactly 0 while nothing is clipped: no difference of two sums makes noise that an
        optimizer with a step of fixed size would follow.

    Source:
        Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, section on learnable asymmetric quantization.
    """

    def __init__(
        self,
        scale: Float[Tensor, "..."],
        offset: Float[Tensor, "..."] | None = None,
        *,
        qmin: int,
        qmax: int,
        positivity: Positivity | None = None,
        learnable: bool = True,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if qmin >= qmax:
            raise SpecError(f"codes {qmin} to {qmax}: qmin must be below qmax")
        check_positive("scale", scale)
        offset = torch.zeros_like(scale) if offset is None else offset
        _check_offset(offset, scale)
        self.qmin, self.qmax, self.gradient_scale = qmin, qmax, gradient_scale
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "scale")
        raw, offset = self.positivity.raw(owned(scale)), owned(offset)
        self.scale: Tensor
        self.offset: Tensor
        if learnable:
            self.scale, self.offset = nn.Parameter(raw), nn.Parameter(offset)
        else:
            self.register_buffer("scale", raw)
            self.register_buffer("offset", offset)

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
    ) -> "LsqPlusGrid":
        """Build the grid whose outermost levels are the ends of a range of reals.

        The range is not widened to hold zero. One of zero width gets the scale 1 and its own value as code 0.

        Args:
            spec: The codes.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            positivity: How the scale is kept positive; `Projection` when None.
            learnable: Whether scale and offset are parameters.
            gradient_scale: Multiplier of their gradients.

        Returns:
            A grid whose scale has the shape of `low`.

        Raises:
            RangeError: The range is not finite, or its ends are in the wrong order.
        """
        scale, flat = spread(low, high, spec.qmax - spec.qmin)
        offset = torch.where(flat, owned(low), owned(low) - spec.qmin * scale)
        return cls(
            scale,
            offset,
            qmin=spec.qmin,
            qmax=spec.qmax,
            positivity=positivity,
            learnable=learnable,
            gradient_scale=gradient_scale,
        )

    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return the offset and multiples of the scale, and the scale between any two of them."""
        scale, offset = (
            functional.scale_gradient(part, self.gradient_scale).unsqueeze(-1)
            for part in (self.positivity.steps(self.scale), self.offset)
        )
        codes = torch.arange(self.qmin, self.qmax + 1, dtype=scale.dtype, device=scale.device)
        return offset + scale * codes, scale.expand(*self.tile_shape, self.qmax - self.qmin)

    def project(self) -> None:
        """Make the scale positive again after a step of the optimizer, in place."""
        self.positivity.project(self.scale.unsqueeze(-1))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the scale."""
        return tuple(self.scale.shape)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, scale {self.tile_shape}, offset"


def _check_offset(offset: Tensor, scale: Tensor) -> None:
    if offset.shape != scale.shape:
        raise ShapeError(
            f"offset of shape {tuple(offset.shape)} with a scale of shape {tuple(scale.shape)}: the two must be equal"
        )
    if not offset.is_meta and not bool(offset.isfinite().all()):
        raise RangeError(f"offset {float(offset[~offset.isfinite()][0])}: it must be finite")
