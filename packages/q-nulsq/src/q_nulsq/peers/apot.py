r"""APoT: levels that are sums of powers of two.

A magnitude of $b = kn$ bits is the sum of $n$ terms of $k$ bits each, and the levels are, up to the clip $\alpha$,

$$
\mathcal{Q}(\alpha, kn) = \gamma \left\{ \sum_{i=0}^{n-1} p_i \right\}, \qquad
p_i \in \left\{ 0, 2^{-i}, 2^{-(i+n)}, \dots, 2^{-(i + (2^k - 2) n)} \right\},
$$

where $\gamma$ makes the largest one $\alpha$. A multiplication by a level is $n$ shifts. No two terms hold the same
power, so there are $2^b$ different sums. With $k = 1$ they are equally spaced, with $k = b$ they are single powers.
The paper takes $k = 2$, and for an odd number of bits $b = 2n + 1$ one more term of one bit:

$$
p_i \in \left\{ 0, 2^{-i}, 2^{-(i+n)}, 2^{-(i+2n+1)} \right\}, \qquad \tilde p \in \left\{ 0, 2^{-2n} \right\}
$$

Signed codes spend a bit on the sign, so weights of 2 bits have three levels, $\{-\alpha, 0, \alpha\}$, one less than
those of LSQ. With $v = x/\alpha$ and $q$ the nearest level for $\alpha = 1$,

$$
\hat x = \alpha\, q(\mathrm{clamp}(v, -1, 1)), \qquad
\frac{\partial \hat x}{\partial \alpha} = \begin{cases} q - v & |v| \le 1 \\ \mathrm{sign}(v) & |v| > 1 \end{cases}
$$

The gradient of activations is cut off outside the clip. That of weights is not, in the public code: a weight that is
clipped goes on learning as if it were not. Weights are normalised before, see `q_nulsq.peers.normalization`.

Source: Li, Dong, Wang 2020 (APoT), arXiv:1909.13144, section on additive powers-of-two and section on the
reparameterized clipping function. The order of the powers for odd bits follows the authors' public code.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import functional
from q_core.errors import SpecError
from q_core.rounding import Rounding
from q_core.spec import QuantSpec
from q_nulsq.parameters import check_positive, owned
from q_nulsq.peers.clips import clip_of_range, magnitude_bits
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states
from q_nulsq.tabulated import TabulatedGrid


def additive_powers(bits: int, *, base_bits: int = 2) -> Float[Tensor, " levels"]:
    """Return the magnitudes of APoT, ascending from 0 to 1, in float64.

    Args:
        bits: Bits that number the magnitudes, 1 to 8. Signed codes have one bit more.
        base_bits: Bits of one term. 1 makes equal steps, `bits` single powers of two.

    Returns:
        The `2**bits` magnitudes.

    Raises:
        SpecError: `bits` outside 1 to 8, or no multiple of `base_bits` (unless that is 2), or magnitudes that lie
            closer together than float32 can tell.

    Source:
        Li, Dong, Wang 2020 (APoT), arXiv:1909.13144, section on additive powers-of-two.
    """
    if not 1 <= bits <= 8 or base_bits < 1:
        raise SpecError(f"{bits} bits with base_bits={base_bits}: supported are 1 to 8 bits, of terms of 1 bit or more")
    terms, rest = divmod(bits, base_bits)
    if rest and base_bits != 2:
        raise SpecError(
            f"{bits} bits with base_bits={base_bits}: the bits of the magnitude must be a multiple of those of a term, "
            "except for base_bits=2"
        )
    if rest:
        exponents = [[i, i + terms, i + 2 * terms + 1] for i in range(terms)] + [[2 * terms]]
    else:
        exponents = [[i + j * terms for j in range(2**base_bits - 1)] for i in range(terms)]
    sums = torch.zeros(1, dtype=torch.float64)
    for term in exponents:
        powers = torch.tensor([0.0, *(2.0**-exponent for exponent in term)], dtype=torch.float64)
        sums = (sums.unsqueeze(1) + powers).flatten()
    magnitudes = sums.sort().values / sums.max()
    if not bool((magnitudes.float().diff() > 0).all()):
        raise SpecError(
            f"{bits} bits with base_bits={base_bits}: some levels lie closer together than float32 can tell; take "
            "terms of fewer bits"
        )
    return magnitudes


@final
class ApotGrid(TabulatedGrid):
    """Sums of powers of two, the largest of which is learned.

    Args:
        clip: Largest level. Positive, finite, at least one axis; its shape is the granularity.
        qmin: Smallest code: `-qmax`, or 0.
        qmax: Largest code, one less than a power of two.
        base_bits: Bits of one term; 1 makes equal steps.
        pass_outside: Whether the gradient to `x` is 1 outside the clip too, as published for weights.
        positivity: How the clip is kept positive while it learns; `Projection` when None.
        gradient_scale: Multiplier of the gradient of the clip, dimensionless.

    Raises:
        SpecError: Codes that are not the same on both sides of zero, or terms that do not make up the bits.
        ShapeError: The clip has no axis.
        RangeError: A clip that is not positive and finite.

    Gradient:
        To `x`: 1 inside the closed range; outside 0, or 1 with `pass_outside`. To the clip: that of the module's
        equations, times `gradient_scale`.

    Source:
        Li, Dong, Wang 2020 (APoT), arXiv:1909.13144.
    """

    def __init__(
        self,
        clip: Float[Tensor, "..."],
        *,
        qmin: int,
        qmax: int,
        base_bits: int = 2,
        pass_outside: bool = False,
        positivity: Positivity | None = None,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        bits = magnitude_bits("APoT", qmin, qmax)
        check_positive("clip", clip)
        self.qmin, self.qmax, self.base_bits = qmin, qmax, base_bits
        self.pass_outside, self.gradient_scale = pass_outside, gradient_scale
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "clip")
        self.clip = nn.Parameter(self.positivity.raw(owned(clip)))
        magnitudes = additive_powers(bits, base_bits=base_bits)
        units = torch.cat([-magnitudes[1:].flip(0), magnitudes]) if qmin else magnitudes
        self.units: Tensor
        self.register_buffer("units", units.to(self.clip), persistent=False)

    @classmethod
    def from_range(
        cls,
        spec: QuantSpec,
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        clip: float | None = None,
        base_bits: int = 2,
        pass_outside: bool | None = None,
        positivity: Positivity | None = None,
        gradient_scale: float = 1.0,
    ) -> "ApotGrid":
        """Build the grid whose outermost level is the farther end of a range of reals.

        Args:
            spec: The codes: `QuantSpec.signed(bits, narrow=True)` or `QuantSpec.unsigned(bits)`, of 2 to 8 bits.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            clip: A constant in place of the end of the range: published are 3 for normalised weights and 8 (CIFAR) or 6
                (ImageNet) for activations.
            base_bits: Bits of one term; 1 makes equal steps.
            pass_outside: Whether the gradient to `x` is 1 outside the clip. None: for signed codes, as published.
            positivity: How the clip is kept positive; `Projection` when None.
            gradient_scale: Multiplier of the gradient of the clip.

        Returns:
            A grid whose clip has the shape of `low`.

        Raises:
            SpecError: Other codes.
            RangeError: The range is not finite, its ends are in the wrong order, or no code holds any of it.
        """
        magnitude_bits("APoT", spec.qmin, spec.qmax)
        return cls(
            clip_of_range(spec, low, high, clip),
            qmin=spec.qmin,
            qmax=spec.qmax,
            base_bits=base_bits,
            pass_outside=spec.qmin < 0 if pass_outside is None else pass_outside,
            positivity=positivity,
            gradient_scale=gradient_scale,
        )

    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return the clip times the level set, and the clip times its distances."""
        clip = functional.scale_gradient(self.positivity.steps(self.clip), self.gradient_scale).unsqueeze(-1)
        return clip * self.units, clip * self.units.diff()

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to levels, and let the gradient pass outside the clip where it is to."""
        if not self.pass_outside:
            return super().fake_quantize(x, rounding)
        levels = super().fake_quantize(x.detach(), rounding)
        return functional.straight_through(levels, levels + x)

    def project(self) -> None:
        """Make the clip positive again after a step of the optimizer, in place."""
        self.positivity.project(self.clip.unsqueeze(-1))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the clip."""
        return tuple(self.clip.shape)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, clip {self.tile_shape}, base_bits {self.base_bits}"
