r"""N2UQ: learned thresholds, equally spaced levels.

What nuLSQ does to the levels, this does to the thresholds: the codes of activations are taken where learned steps say,
and stand for equally spaced levels, so that integer arithmetic needs no table. With the steps $a_i > 0$ from a learned
start $c$, knots $K_0 = c$, $K_i = c + a_1 + \dots + a_i$, and a learned scale on either side,

$$
u = s_1 x, \qquad k = \#\left\{ i : u > K_{i-1} + a_i / 2 \right\}, \qquad
\hat x = s_2\, \frac{2}{2^b - 1}\, k
$$

The gradient, a *generalised straight-through estimator*, is that of the broken line through the points
$(K_i, 2 i/(2^b - 1))$, flat outside: in piece $i$, with $k = i - 1 + (u - K_{i-1})/a_i$ in place of the code,

$$
\frac{\partial k}{\partial u} = \frac{1}{a_i}, \quad
\frac{\partial k}{\partial c} = -\frac{1}{a_i}, \quad
\frac{\partial k}{\partial a_i} = -\frac{u - K_{i-1}}{a_i^2}, \quad
\frac{\partial k}{\partial a_j} = -\frac{1}{a_i} \; (j < i)
$$

and nothing outside $K_0 \le u \le K_{2^b - 1}$. The scale $s_2$ gets the level over $s_2$. With equal steps
$a = 2 s_1 s_2/(2^b-1)$ from $c = 0$ this is uniform quantization. The scale $s_1$ does no more than to divide $c$ and
$a$, but it changes how an optimizer moves them, so it is kept.

Weights are divided by a multiple of their mean magnitude per output channel (`MeanMagnitude`) and go to the $2^b$
levels from -1 to 1, with no level at zero. In the public code their gradient is not cut off outside.

Source: Liu et al. 2022 (N2UQ), CVPR, arXiv:2111.14826, sections on the forward pass, on the generalised
straight-through estimation and on entropy preserving regularization; the scales and the start are those of the authors'
public code.
"""

from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from q_core import functional
from q_core.errors import RangeError, ShapeError, SpecError
from q_core.grid import Grid
from q_core.rounding import Rounding
from q_core.spec import MAX_BITS, QuantSpec
from q_nulsq.parameters import check_positive, owned
from q_nulsq.peers.clips import clip_of_range
from q_nulsq.peers.freezing import without_parameters
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states
from q_nulsq.tabulated import MidRiseGrid

SPAN = 2.0
"""What the knots and the levels span at the start, before their scales."""


@final
class N2uqGrid(Grid):
    r"""Equally spaced levels whose thresholds are learned, for activations that are not negative.

    With `NearestTowardZero` a real on a threshold goes down, as published.

    Args:
        steps: Distances between knots, along the last axis; the axes before it tile the tensor: `(1, 2^b - 1)` per
            tensor. Positive.
        start: The lowest knot, shape of `steps` without the last axis. None: 0.
        input_scale: What the tensor is multiplied by. Positive. None: 1.
        output_scale: What the levels from 0 to 2 are multiplied by. Positive. None: 1.
        positivity: How steps and scales are kept positive while they learn; `Projection` when None.
        gradient_scale: Multiplier of the gradients of all parameters, dimensionless.

    Raises:
        ShapeError: No axis of tiles, or a start or scale of another shape.
        SpecError: A number of steps that is not one less than a power of two, 1 to 8 bits.
        RangeError: A step or scale that is not positive and finite, or a start that is not finite.

    Gradient:
        Those of the module's equations, times `gradient_scale` for the parameters.

    Note:
        The laws `levels` (a level has its own code), `idempotence`, `nearest` and `gradient` do not hold, by design:
        what a code stands for is not where it is taken. For the same reason `frozen` is a grid of this kind and no
        table.

    Source:
        Liu et al. 2022 (N2UQ), arXiv:2111.14826.
    """

    def __init__(
        self,
        steps: Float[Tensor, "..."],
        start: Float[Tensor, "..."] | None = None,
        *,
        input_scale: Float[Tensor, "..."] | None = None,
        output_scale: Float[Tensor, "..."] | None = None,
        positivity: Positivity | None = None,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_steps(steps)
        tiles = tuple(steps.shape[:-1])
        self.qmin, self.qmax, self.gradient_scale = 0, steps.shape[-1], gradient_scale
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "steps", "input_scale", "output_scale")
        dtype = torch.promote_types(steps.dtype, torch.float32)
        given = {"start": start, "input_scale": input_scale, "output_scale": output_scale}
        for name, part in given.items():
            if part is not None:
                _check_part(name, part, tiles)
        begin, before, after = (
            torch.full(tiles, default, dtype=dtype, device=steps.device)
            if part is None
            else part.detach().to(dtype, copy=True)
            for part, default in ((start, 0.0), (input_scale, 1.0), (output_scale, 1.0))
        )
        self.steps: Tensor = nn.Parameter(self.positivity.raw(owned(steps)))
        self.start: Tensor = nn.Parameter(begin)
        self.input_scale: Tensor = nn.Parameter(self.positivity.raw(before))
        self.output_scale: Tensor = nn.Parameter(self.positivity.raw(after))

    @classmethod
    def from_range(
        cls,
        spec: QuantSpec,
        low: Float[Tensor, "..."],
        high: Float[Tensor, "..."],
        *,
        positivity: Positivity | None = None,
        gradient_scale: float = 1.0,
    ) -> "N2uqGrid":
        """Build the grid of equal steps from 0 to the upper end of a range of reals.

        The scales bring the range to the published one, where steps of `2/(2^b - 1)` start; reals below 0 go to 0.

        Args:
            spec: The codes: `QuantSpec.unsigned(bits)`.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            positivity: How steps and scales are kept positive; `Projection` when None.
            gradient_scale: Multiplier of the gradients of all parameters.

        Returns:
            A grid whose tiles have the shape of `low`.

        Raises:
            SpecError: Other codes.
            RangeError: The range is not finite, its ends are in the wrong order, or all of it is negative.
        """
        if spec.qmin != 0 or spec.qmax != 2**spec.bits - 1:
            raise SpecError(
                f"codes {spec.qmin} to {spec.qmax}: the thresholds of N2UQ are defined for QuantSpec.unsigned(bits); "
                "for weights see N2uqWeightGrid"
            )
        end = clip_of_range(spec, low, high)
        steps = (end.new_full((), SPAN) / spec.qmax).expand(*end.shape, spec.qmax)
        return cls(
            steps,
            input_scale=SPAN / end,
            output_scale=end / SPAN,
            positivity=positivity,
            gradient_scale=gradient_scale,
        )

    def quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to codes: the place between the knots, rounded."""
        steps, start, scale, _ = self._parts(x.dtype)
        # In float64: one after the other or pairwise, as a GPU and a compiler add, comes to the same float32 then.
        sums = steps.cumsum(1, dtype=torch.float64).to(steps.dtype)
        knots = start + torch.cat([torch.zeros_like(start), sums], 1)
        fixed = knots.detach()
        # Far outside nothing changes, and an infinity times a gradient of 0 would be a NaN.
        far = 2 * (1 + fixed.abs().amax(1, keepdim=True)) / scale.detach()
        rows = functional.to_tiles(x, self.tile_shape).to(knots.dtype)
        rows = functional.closed_clamp(rows, -far, far) * scale
        inner = functional.closed_clamp(rows, fixed[:, :1], fixed[:, -1:])
        cell = torch.searchsorted(fixed, inner.detach().contiguous(), right=True) - 1
        cell = cell.clamp(0, self.qmax - 1)
        coordinate = cell.to(rows.dtype) + (inner - knots.gather(1, cell)) / steps.gather(1, cell)
        # Outside, the code is constant whatever the knots do.
        outside = (rows.detach() < fixed[:, :1]) | (rows.detach() > fixed[:, -1:])
        coordinate = torch.where(outside, coordinate.detach(), coordinate)
        codes = functional.closed_clamp(rounding(coordinate), 0, self.qmax)
        numbers = torch.arange(1, self.qmax + 1, dtype=rows.dtype, device=rows.device)
        if (ties_up := rounding.ties_up(numbers)) is not None:
            edges = functional.middles(fixed, ties_up.expand(fixed.shape[0], -1))
            found = torch.searchsorted(edges, rows.detach().contiguous()).to(rows.dtype)
            codes = functional.straight_through(torch.where(rows.isnan(), rows.detach(), found), codes)
        return functional.from_tiles(codes, self.tile_shape, tuple(x.shape))

    def dequantize(self, codes: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map codes to equally spaced levels."""
        *_, scale = self._parts(codes.dtype)
        rows = functional.to_tiles(codes, self.tile_shape).to(scale.dtype)
        return functional.from_tiles(rows * (SPAN / self.qmax) * scale, self.tile_shape, tuple(codes.shape))

    def thresholds(self) -> Shaped[Tensor, "*tiles n"]:
        """Return what separates the codes, in the units of the tensor: shape `(*tile_shape, qmax)`."""
        with torch.no_grad():
            steps, start, scale, _ = self._parts(self.steps.dtype)
            return ((start + steps.cumsum(1) - steps / 2) / scale).reshape(*self.tile_shape, -1)

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return steps, start and both scales as rows, one for each tile."""
        wide = torch.promote_types(dtype, self.steps.dtype)
        steps, start, before, after = (
            functional.scale_gradient(part, self.gradient_scale).to(wide)
            for part in (
                self.positivity.steps(self.steps),
                self.start,
                self.positivity.steps(self.input_scale),
                self.positivity.steps(self.output_scale),
            )
        )
        return steps.reshape(-1, self.qmax), start.reshape(-1, 1), before.reshape(-1, 1), after.reshape(-1, 1)

    def project(self) -> None:
        """Make steps and scales positive again after a step of the optimizer, in place."""
        self.positivity.project(self.steps)
        for scale in (self.input_scale, self.output_scale):
            self.positivity.project(scale.unsqueeze(-1))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the steps without their last axis."""
        return tuple(self.steps.shape[:-1])

    def frozen(self) -> "N2uqGrid":
        """Return the same grid with thresholds and scales that do not learn."""
        return without_parameters(self)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, steps {tuple(self.steps.shape)}"


@final
class N2uqWeightGrid(MidRiseGrid):
    r"""The levels $2k/(2^b - 1) - 1$, from -1 to 1 and symmetric about a zero that is not among them. Nothing learns.

    Args:
        bits: Bit width, 1 to 8.
        tile_shape: One entry for each axis of the tensor, or `(1,)`. All levels are the same, so it is ones.

    Raises:
        SpecError: `bits` outside 1 to 8.
        ShapeError: A tile shape that is not of ones.

    Gradient:
        1 everywhere, as in the public code. The law `gradient` does not hold, by design.

    Source:
        Liu et al. 2022 (N2UQ), arXiv:2111.14826, section on entropy preserving regularization.
    """

    def __init__(self, bits: int, tile_shape: tuple[int, ...] = (1,)) -> None:
        if not 1 <= bits <= MAX_BITS:
            raise SpecError(f"bits={bits}: supported are 1 to {MAX_BITS}")
        super().__init__(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if not tile_shape or any(size != 1 for size in tile_shape):
            raise ShapeError(
                f"tiles of shape {tile_shape}: the levels are the same for all, (1,) or ones for each axis"
            )
        units = torch.linspace(-1, 1, 2**bits, dtype=torch.float64).to(torch.float32)
        self.units: Tensor
        self.register_buffer("units", units.reshape(*tile_shape, -1), persistent=False)

    @classmethod
    def from_range(cls, spec: QuantSpec, low: Float[Tensor, "..."], high: Float[Tensor, "..."]) -> "N2uqWeightGrid":
        """Build the grid for normalised weights, whatever their range.

        Args:
            spec: The codes: `QuantSpec.signed(bits)`, one grid for the whole tensor.
            low: Smallest real.
            high: Largest real.

        Raises:
            SpecError: Other codes.
            RangeError: The range is not finite, or its ends are in the wrong order.
        """
        if (spec.qmin, spec.qmax) != (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1):
            raise SpecError(f"codes {spec.qmin} to {spec.qmax}: N2UQ's weights are defined for QuantSpec.signed(bits)")
        clip_of_range(spec, low, high)
        return cls(spec.bits, tuple(low.shape)).to(low.device)

    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return the levels and their distances."""
        return self.units, self.units.diff(dim=-1)

    def fake_quantize(self, x: Float[Tensor, "*shape"], rounding: Rounding) -> Float[Tensor, "*shape"]:
        """Map reals to levels; the gradient passes everywhere."""
        levels = super().fake_quantize(x.detach(), rounding)
        return functional.straight_through(levels, levels + x)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Ones."""
        return tuple(self.units.shape[:-1])

    def extra_repr(self) -> str:
        """Show the codes."""
        return f"codes {self.qmin} to {self.qmax}"


def _check_steps(steps: Tensor) -> None:
    if steps.ndim < 2:
        raise ShapeError(
            f"steps of shape {tuple(steps.shape)}: they need the axes of the tiles before the axis of the steps, "
            f"(1, {steps.numel()}) for one row of steps per tensor"
        )
    count = steps.shape[-1]
    if not 1 <= count < 2**MAX_BITS or (count + 1) & count:
        raise SpecError(f"{count} steps: supported are 2^b - 1 for b from 1 to {MAX_BITS}")
    check_positive("steps", steps)


def _check_part(name: str, part: Tensor, tiles: tuple[int, ...]) -> None:
    if tuple(part.shape) != tiles:
        raise ShapeError(f"{name} of shape {tuple(part.shape)} with steps for tiles of {tiles}: the two must be equal")
    if name != "start":
        check_positive(name, part)
    elif not part.is_meta and not bool(part.isfinite().all()):
        raise RangeError(f"start {float(part[~part.isfinite()][0])}: it must be finite")
