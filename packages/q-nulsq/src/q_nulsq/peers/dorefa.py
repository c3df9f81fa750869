r"""DoReFa: weights squashed to [-1, 1] by tanh, activations clipped to [0, 1], no learned parameter.

With $q_k(r) = \lfloor (2^k - 1)\, r \rceil / (2^k - 1)$ on [0, 1]:

$$
\hat w = 2\, q_k\!\left( \frac{\tanh w}{2 \max |\tanh w|} + \frac12 \right) - 1, \qquad
\hat x = q_k(\mathrm{clip}(x, 0, 1))
$$

For the weights that is a transform, $t = \tanh w / \max|\tanh w|$, and a fixed grid: $2 q_k(t/2 + 1/2) - 1$ has the
$2^k$ levels $(2j + 1 - 2^k)/(2^k - 1)$, which are equally far apart, from -1 to 1, and none of them is zero. Only the
rounding is straight-through; the transform has its own derivative, that of tanh and that of the maximum.

Use `TanhNormalization` as transform of a `q_core.Quantizer` or `q_core.Recipe`, with `DorefaGrid.from_range` as grid of
weights and `dorefa_activation` as that of activations.

Source: Zhou et al. 2016 (DoReFa-Net), arXiv:1606.06160, sections on the quantization of weights and of activations. For
weights of 1 bit the paper has another form, sign times mean magnitude, which is not here: this one gives -1 and 1.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from q_core.grid import UniformGrid
from q_core.module import PreciseModule
from q_core.spec import QuantSpec
from q_nulsq.parameters import check_unsigned
from q_nulsq.tabulated import MidRiseGrid


@final
class TanhNormalization(PreciseModule):
    r"""$\tanh w / \max |\tanh w|$, the maximum over the whole tensor.

    All zeros stay zeros.

    Gradient:
        The true one. With $t$ the result, $M$ the maximum and $g$ the gradient that arrives, an element gets
        $(1 - \tanh^2 w)\, g / M$ and the largest one, besides, $-(1 - \tanh^2 w)\, \mathrm{sign}(w) \sum g\,t / M$;
        several that are equally large share that in equal parts. So the largest weight of a tensor of one has none:
        its result is 1 whatever it is.

    Source:
        Zhou et al. 2016 (DoReFa-Net), arXiv:1606.06160, section on the quantization of weights.
    """

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Squash and normalise, in float32 or wider."""
        squashed = torch.tanh(w.to(torch.promote_types(w.dtype, torch.float32)))
        if not squashed.numel():
            return squashed
        largest = squashed.abs().amax()
        return squashed / torch.where(largest > 0, largest, torch.ones_like(largest))


@final
class DorefaGrid(MidRiseGrid):
    """Equally spaced levels from -1 to 1, none of them zero, that do not learn.

    The ends are -1 and 1 exactly, so the largest weight is inside the range.

    Args:
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive; the number of codes is even.

    Raises:
        SpecError: The number of codes is odd.

    Gradient:
        To `x`: 1 inside the closed range, 0 outside.

    Source:
        Zhou et al. 2016 (DoReFa-Net), arXiv:1606.06160, section on the quantization of weights.
    """

    def __init__(self, *, qmin: int, qmax: int) -> None:
        super().__init__(qmin, qmax)
        self.codebook: Tensor
        self.register_buffer("codebook", (self.odd(torch.zeros(())) / (qmax - qmin)).unsqueeze(0))

    @classmethod
    def from_range(cls, spec: QuantSpec, low: Float[Tensor, "..."], high: Float[Tensor, "..."]) -> "DorefaGrid":
        """Build the grid of a spec, whatever the range: the transform has made it [-1, 1].

        Raises:
            SpecError: The number of codes is odd.
        """
        return cls(qmin=spec.qmin, qmax=spec.qmax).to(low.device)

    def table(self) -> tuple[Float[Tensor, "1 n"], Float[Tensor, "1 n-1"]]:
        """Return the levels and their distances."""
        return self.codebook, self.codebook.diff(dim=-1)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """One table for the whole tensor."""
        return (1,)

    def extra_repr(self) -> str:
        """Show the codes."""
        return f"codes {self.qmin} to {self.qmax}, levels -1 to 1"


def dorefa_activation(spec: QuantSpec, low: Float[Tensor, "..."], high: Float[Tensor, "..."]) -> UniformGrid:
    """Build the grid of DoReFa's activations, whatever the range: clip to [0, 1], then round to equal steps.

    Args:
        spec: The codes; the smallest is 0.
        low: Of the range, not used.
        high: Of the range; its shape is the granularity.

    Returns:
        A grid that does not learn, with levels `k / qmax`.

    Raises:
        SpecError: The smallest code is not 0.

    Source:
        Zhou et al. 2016 (DoReFa-Net), arXiv:1606.06160, section on the quantization of activations.
    """
    check_unsigned("DoReFa", spec)
    scale = torch.full_like(high, 1 / spec.qmax, dtype=torch.promote_types(high.dtype, torch.float32))
    return UniformGrid(scale, qmin=0, qmax=spec.qmax)
