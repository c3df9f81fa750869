r"""PACT: activations clipped at a learned level.

With $n = 2^b - 1$:

$$
y = \mathrm{clip}(x, 0, \alpha), \qquad \hat x = \frac{\alpha}{n} \left\lfloor \frac{n\,y}{\alpha} \right\rceil, \qquad
\frac{\partial \hat x}{\partial \alpha} = [x \ge \alpha]
$$

The gradient of $\alpha$ knows the clipping and not the rounding: the residual that LSQ adds inside the range is left
out. It only ever sees what is clipped, so the paper decays $\alpha$ as strongly as the weights; give it to a group of
the optimizer with weight decay. The weights of PACT are those of DoReFa.

Source: Choi et al. 2018 (PACT), arXiv:1805.06085, section on the parameterized clipping activation function.
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import functional
from q_core.errors import RangeError, SpecError
from q_core.grid import Grid, UniformGrid
from q_core.ops import fake_quantize
from q_core.rounding import NearestEven, Rounding
from q_core.spec import QuantSpec
from q_nulsq.parameters import check_positive, check_unsigned, owned, spread
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states


class _ClippedAt(torch.autograd.Function):
    """Pass levels on, and tell `end` the gradient of the elements of `x` whose code coordinate has reached `qmax`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(levels: Tensor, x: Tensor, end: Tensor, scale: Tensor, qmax: int) -> Tensor:
        return levels.view_as(levels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, end, scale, ctx.qmax = inputs
        ctx.save_for_backward(x, scale)
        ctx.shape, ctx.dtype = end.shape, end.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[2]:
            return grad, None, None, None, None
        x, scale = ctx.saved_tensors
        # The comparison that decides what is outside, so that no element is lost between the two.
        reached = x / functional.broadcast_scale(scale, tuple(x.shape)) >= ctx.qmax
        to_end = functional.sum_tiles(grad.masked_fill(~reached, 0), tuple(ctx.shape))
        return grad, None, to_end.to(ctx.dtype), None, None


@final
class PactGrid(Grid):
    r"""Levels $k\,\alpha/n$, $k = 0, \dots, n$, of which the last one is learned.

    Args:
        alpha: Where to clip, in the units of the activation. Positive, finite, at least one axis; its shape is the
            granularity.
        qmax: Largest code, inclusive; the smallest is 0.
        positivity: How alpha is kept positive while it learns; `Projection` when None.
        learnable: Whether alpha is a parameter.
        gradient_scale: Multiplier of the gradient of alpha, dimensionless.

    Raises:
        SpecError: `qmax` is not positive.
        ShapeError: Alpha has no axis.
        RangeError: An alpha that is not positive and finite.

    Gradient:
        To `x`: 1 in the closed range, 0 outside. To alpha: 1 from what has reached it, 0 from the rest, times
        `gradient_scale`. An element that equals alpha has both.

    Source:
        Choi et al. 2018 (PACT), arXiv:1805.06085, section on the parameterized clipping activation function.
    """

    def __init__(
        self,
        alpha: Float[Tensor, "..."],
        *,
        qmax: int,
        positivity: Positivity | None = None,
        learnable: bool = True,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if qmax < 1:
            raise SpecError(f"codes 0 to {qmax}: qmax must be positive")
        check_positive("alpha", alpha)
        self.qmin, self.qmax, self.gradient_scale = 0, qmax, gradient_scale
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "alpha")
        raw = self.positivity.raw(owned(alpha))
        self.alpha: Tensor
        if learnable:
            self.alpha = nn.Parameter(raw)
        else:
            self.register_buffer("alpha", raw)

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
    ) -> "PactGrid":
        """Build the grid that clips at the upper end of a range of reals; a range of zeros is clipped at 1.

        Args:
            spec: The codes; the smallest is 0.
            low: Smallest real of each tile. What lies below zero is clipped.
            high: Largest real of each tile. Shape of `low`.
            positivity: How alpha is kept positive; `Projection` when None.
            learnable: Whether alpha is a parameter.
            gradient_scale: Multiplier of its gradient.

        Returns:
            A grid whose alpha has the shape of `high`.

        Raises:
            SpecError: The smallest code is not 0.
            RangeError: The range is not finite, or wholly negative.
        """
        check_unsigned("PACT", spec)
        spread(low, high, 1)  # for its checks
        if bool(((high <= 0) & (low < 0)).any()):
            raise RangeError(
                f"range {float(low.min())} to {float(high.max())} is negative, and all of it would be clipped to zero: "
                "use LsqPlusGrid for activations like these"
            )
        alpha, _ = spread(torch.zeros_like(high), high, 1)
        return cls(alpha, qmax=spec.qmax, positivity=positivity, learnable=learnable, gradient_scale=gradient_scale)

    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes. Alpha gets no gradient through a code."""
        return functional.quantize(x, self._scale(), qmin=0, qmax=self.qmax, rounding=rounding)

    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map codes to reals."""
        return functional.dequantize(codes, self._scale())

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to levels; to the nearest in one step, which keeps `x` alone for the backward pass."""
        scale = self._scale()
        if type(rounding) is NearestEven:
            levels = fake_quantize(x, scale, qmin=0, qmax=self.qmax)
        else:
            levels = super().fake_quantize(x, rounding)
        end = functional.scale_gradient(self.positivity.steps(self.alpha), self.gradient_scale)
        result: Tensor = _ClippedAt.apply(levels, x, end, scale, self.qmax)  # type: ignore[no-untyped-call]
        return result

    def _scale(self) -> Tensor:
        return self.positivity.steps(self.alpha).detach() / self.qmax

    def project(self) -> None:
        """Make alpha positive again after a step of the optimizer, in place."""
        self.positivity.project(self.alpha.unsqueeze(-1))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of alpha."""
        return tuple(self.alpha.shape)

    def frozen(self) -> UniformGrid:
        """Return the uniform grid with the same levels."""
        return UniformGrid(self._scale(), qmin=0, qmax=self.qmax)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes 0 to {self.qmax}, alpha {self.tile_shape}"
