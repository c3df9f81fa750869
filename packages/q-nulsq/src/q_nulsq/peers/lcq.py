r"""LCQ: uniform codes between a learned compressor and its inverse.

$$
\hat x = \mathrm{sign}(x)\, \alpha\, g^{-1}\!\left( \frac{1}{s} \left\lfloor s\, g(v) \right\rceil \right), \qquad
v = \min(|x| / \alpha, 1),
$$

with the largest code $s$: $2^{b-1} - 1$ for signed codes, $2^b - 1$ for unsigned ones. The compressor $g$ is increasing
and linear in $K$ pieces of the width $1/K$, whose slopes a softmax keeps positive, with $g(0) = 0$ and $g(1) = 1$:

$$
g(v) = \gamma_i (v - d_i) + \beta_i, \quad i = \lfloor K v \rfloor, \qquad
\gamma_i = K\, \mathrm{softmax}(\theta)_i, \quad \beta_i = \sum_{j < i} \mathrm{softmax}(\theta)_j, \quad d_i = i/K
$$

The levels are $\alpha\, g^{-1}(k/s)$, and equally spaced for $\theta = 0$. What is rounded is the *compressed* real, so
the thresholds are $\alpha\, g^{-1}((k - 1/2)/s)$: in general not in the middle of two levels, and the level that is
taken is not always the nearest.

The gradient is that of these formulas with 1 for the rounding, by the chain rule through $g$ and $g^{-1}$. With the
piece $i$ in which $v$ lies and $q$ that in which the level lies, inside the clip

$$
\frac{\partial \hat x}{\partial x} = \frac{\gamma_i}{\gamma_q}, \qquad
\frac{\partial \hat x}{\partial \alpha} = \mathrm{sign}(x) \left( \frac{|\hat x|}{\alpha} -
\frac{\gamma_i}{\gamma_q} v \right),
$$

and outside $0$ and $\mathrm{sign}(x)$. The public re-implementation by the authors of nuLSQ leaves the ratio of slopes
out of these two, as if the compressor were the identity, and has the same gradient of $\theta$; whether the paper means
that could not be checked. Both are equal for $\theta = 0$.

Weights are normalised before, and get their deviation back afterwards, see `q_nulsq.peers.normalization`. Published
weights of 2 bits are the three levels $\{-\alpha, 0, \alpha\}$ without a compressor, which is one piece.

Source: Yamamoto 2021 (LCQ), CVPR, arXiv:2103.07156, section on learnable companding quantization.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core import functional
from q_core.errors import RangeError, ShapeError
from q_core.grid import Grid
from q_core.rounding import Rounding
from q_core.spec import QuantSpec
from q_nulsq.parameters import check_positive, owned
from q_nulsq.peers.clips import clip_of_range, magnitude_bits
from q_nulsq.peers.freezing import without_parameters
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states

INTERVALS = 16
"""Pieces of the compressor in the paper."""


def compress(v: Float[Tensor, "tiles n"], theta: Float[Tensor, "tiles intervals"]) -> Float[Tensor, "tiles n"]:
    """Apply the compressor g.

    Args:
        v: Reals from 0 to 1, one row for each row of `theta`.
        theta: Parameters of the slopes; equal ones make the identity.

    Returns:
        Reals from 0 to 1, increasing in `v`.

    Gradient:
        To `v` the slope of its piece; to `theta` that of the formula.

    Source:
        Yamamoto 2021 (LCQ), arXiv:2103.07156, section on learnable companding quantization.
    """
    slopes, starts, intervals = *_pieces(theta), theta.shape[-1]
    piece = (v.detach().nan_to_num() * intervals).floor().clamp(0, intervals - 1).long()
    return slopes.gather(1, piece) * (v - piece.to(v.dtype) / intervals) + starts.gather(1, piece)


def expand(q: Float[Tensor, "tiles n"], theta: Float[Tensor, "tiles intervals"]) -> Float[Tensor, "tiles n"]:
    """Apply the inverse of the compressor.

    Args:
        q: Reals from 0 to 1, one row for each row of `theta`.
        theta: Parameters of the slopes.

    Returns:
        Reals from 0 to 1, increasing in `q`.

    Gradient:
        To `q` one over the slope of its piece; to `theta` that of the formula.

    Source:
        Yamamoto 2021 (LCQ), arXiv:2103.07156, section on learnable companding quantization.
    """
    slopes, starts = _pieces(theta)
    piece = torch.searchsorted(starts.detach()[:, 1:].contiguous(), q.detach().contiguous(), right=True)
    return (q - starts.gather(1, piece)) / slopes.gather(1, piece) + piece.to(q.dtype) / theta.shape[-1]


def _pieces(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope of each piece, and the value of the compressor where it starts."""
    parts = theta.softmax(-1)
    # A slope that underflows to 0 would divide by it; nothing lies in such a piece.
    slopes = (parts * theta.shape[-1]).clamp(min=torch.finfo(theta.dtype).tiny)
    return slopes, parts.cumsum(-1) - parts


@final
class LcqGrid(Grid):
    r"""Levels that a learned compressor makes of equally spaced ones.

    Args:
        clip: Largest level. Positive, finite, at least one axis; its shape is the granularity.
        qmin: Smallest code: `-qmax`, or 0.
        qmax: Largest code, one less than a power of two.
        theta: Parameters of the slopes, `(*clip.shape, intervals)`. None: zeros for `INTERVALS` pieces, equal steps.
        positivity: How the clip is kept positive while it learns; `Projection` when None.
        gradient_scale: Multiplier of the gradients of clip and theta, dimensionless.

    Raises:
        SpecError: Codes that are not the same on both sides of zero.
        ShapeError: The clip has no axis, or theta does not go with it.
        RangeError: A clip that is not positive and finite, or a theta that is not finite.

    Gradient:
        Those of the module's equations, times `gradient_scale` for clip and theta. What lies on an end is inside.

    Note:
        The laws `nearest` and `gradient` hold for equal slopes only, by design. For the same reason `frozen` is a grid
        of this kind and no table of levels.

    Source:
        Yamamoto 2021 (LCQ), arXiv:2103.07156.
    """

    def __init__(
        self,
        clip: Float[Tensor, "..."],
        *,
        qmin: int,
        qmax: int,
        theta: Float[Tensor, "..."] | None = None,
        positivity: Positivity | None = None,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        magnitude_bits("LCQ", qmin, qmax)
        check_positive("clip", clip)
        self.qmin, self.qmax, self.gradient_scale = qmin, qmax, gradient_scale
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "clip")
        wide = owned(clip)
        theta = wide.new_zeros(*wide.shape, INTERVALS) if theta is None else theta.detach().to(wide, copy=True)
        _check_theta(theta, wide)
        self.clip: Tensor = nn.Parameter(self.positivity.raw(wide))
        self.theta: Tensor = nn.Parameter(theta)

    @classmethod
    def from_range(
        cls,
        spec: QuantSpec,
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        clip: float | None = None,
        intervals: int | None = None,
        positivity: Positivity | None = None,
        gradient_scale: float = 1.0,
    ) -> "LcqGrid":
        """Build the grid of equal steps whose outermost level is the farther end of a range of reals.

        Args:
            spec: The codes: `QuantSpec.signed(bits, narrow=True)` or `QuantSpec.unsigned(bits)`, of 2 to 8 bits.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            clip: A constant in place of the end of the range: published are 3 for normalised weights, 8 for
                activations.
            intervals: Pieces of the compressor. None: 1, which is no compressor, for signed codes of 2 bits, as
                published, and else 16.
            positivity: How the clip is kept positive; `Projection` when None.
            gradient_scale: Multiplier of the gradients of clip and theta.

        Returns:
            A grid whose clip has the shape of `low`.

        Raises:
            SpecError: Other codes.
            RangeError: The range is not finite, its ends are in the wrong order, or no code holds any of it; or
                `intervals` is below 1.
        """
        magnitude_bits("LCQ", spec.qmin, spec.qmax)
        if intervals is not None and intervals < 1:
            raise RangeError(f"intervals={intervals}: a compressor has 1 piece or more; 16 are usual")
        pieces = (1 if spec.qmax == 1 else INTERVALS) if intervals is None else intervals
        end = clip_of_range(spec, low, high, clip)
        return cls(
            end,
            qmin=spec.qmin,
            qmax=spec.qmax,
            theta=end.new_zeros(*end.shape, pieces),
            positivity=positivity,
            gradient_scale=gradient_scale,
        )

    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes: clip, compress, round."""
        clip, theta = self._rows(x.dtype)
        rows, far = functional.to_tiles(x, self.tile_shape).to(clip.dtype), 2 * clip.detach()
        # Far outside nothing changes, and an infinity times a gradient of 0 would be a NaN.
        ratio = functional.closed_clamp(rows, -far, far) / clip
        ratio = functional.closed_clamp(ratio, -1 if self.qmin else 0, 1)
        sign = _sign(ratio)
        coordinate = sign * compress(sign * ratio, theta) * self.qmax
        codes = functional.closed_clamp(rounding(coordinate), self.qmin, self.qmax)
        return functional.from_tiles(codes, self.tile_shape, tuple(x.shape))

    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map codes to reals: expand, times the clip."""
        clip, theta = self._rows(codes.dtype)
        ratio = functional.to_tiles(codes, self.tile_shape).to(clip.dtype) / self.qmax
        sign = _sign(ratio)
        reals = sign * expand(sign * ratio, theta) * clip
        return functional.from_tiles(reals, self.tile_shape, tuple(codes.shape))

    def _rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, self.clip.dtype)
        clip, theta = (
            functional.scale_gradient(part, self.gradient_scale).to(wide)
            for part in (self.positivity.steps(self.clip), self.theta)
        )
        return clip.reshape(-1, 1), theta.reshape(-1, theta.shape[-1])

    def project(self) -> None:
        """Make the clip positive again after a step of the optimizer, in place."""
        self.positivity.project(self.clip.unsqueeze(-1))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the clip."""
        return tuple(self.clip.shape)

    def frozen(self) -> "LcqGrid":
        """Return the same grid with a clip and slopes that do not learn."""
        return without_parameters(self)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, clip {self.tile_shape}, intervals {self.theta.shape[-1]}"


def _sign(ratio: Tensor) -> Tensor:
    """Return 1 for zero too, so that the slope there is that of the first piece and not none."""
    return torch.where(ratio.detach() < 0, -1.0, 1.0).to(ratio.dtype)


def _check_theta(theta: Tensor, clip: Tensor) -> None:
    if theta.shape[:-1] != clip.shape or theta.shape[-1] < 1:
        raise ShapeError(
            f"theta of shape {tuple(theta.shape)} with a clip of shape {tuple(clip.shape)}: it needs the axes of the "
            "clip and one of 1 or more pieces after them"
        )
    if not theta.is_meta and not bool(theta.isfinite().all()):
        raise RangeError(f"theta {float(theta[~theta.isfinite()][0])}: it must be finite")
