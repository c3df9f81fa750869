"""Levels at learned distances from one another, with zero a level always."""

from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from q_core import functional
from q_core.errors import RangeError, ShapeError, SpecError
from q_core.grid import CodebookGrid
from q_core.spec import MAX_BITS, QuantSpec
from q_nulsq.positivity import Positivity, Projection, refuse_unsound_states
from q_nulsq.tabulated import TabulatedGrid


@final
class StepGrid(TabulatedGrid):
    r"""Levels at learned distances: $\{-K_{Q_n}, \dots, -K_1, 0, C_1, \dots, C_{Q_p}\}$.

    The steps $s_k > 0$ above zero and $r_k > 0$ below it are what is learned; $C_k = s_1 + \dots + s_k$ and
    $K_k = r_1 + \dots + r_k$. Zero is a level whatever is learned, so padding and what a ReLU cuts off stay exact. With
    `NearestTowardZero` this is nuLSQ; equal steps and `NearestEven` are the grid of LSQ, and the sum of the gradients
    of its steps is LSQ's gradient of its scale.

    The one parameter, `steps` of shape `(*tiles, Qn + Qp)`, stands for the steps in the way of `positivity`, in the
    order $r_1, \dots, r_{Q_n}, s_1, \dots, s_{Q_p}$.

    Args:
        negative: Steps below zero, that next to zero first, along the last axis; the axes before it tile the tensor:
            `(1, Qn)` per tensor, `(C, 1, 1, 1, Qn)` per channel of a kernel. None means no level below zero.
        positive: Steps above zero, that next to zero first. None means no level above zero.
        positivity: How the parameter stands for the steps; `Projection()` when None.
        learnable: Whether the steps are a parameter.
        gradient_scale: Multiplier of the gradient of the steps, dimensionless.

    Attributes:
        steps: The parameter.
        raised: How many steps `project` had to put back so far, counted on the device; not saved.

    Raises:
        ShapeError: No axis of tiles, or two different ones.
        SpecError: No step at all, or more levels than `MAX_BITS` bits number.
        RangeError: A step that is not positive and finite, or so small beside the others that two levels are one.

    Gradient:
        To `x`: 1 in the closed range of levels, 0 outside. To a step: $(\hat x - x)/s_k$ from the elements between its
        two levels, and the whole gradient of every element beyond the range on its side (negated below zero).

    Source:
        Gongyo et al. 2024 (nuLSQ), supplement, eq. 5 and 10 to 13; eq. 13 with its first sum up to k.
    """

    def __init__(
        self,
        negative: Float[Tensor, "..."] | None,
        positive: Float[Tensor, "..."] | None,
        *,
        positivity: Positivity | None = None,
        learnable: bool = True,
        gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        below, above = _sides(negative, positive)
        self.qmin, self.qmax, self.gradient_scale = -below.shape[-1], above.shape[-1], gradient_scale
        _check_count(self.qmin, self.qmax)
        steps = torch.cat([below, above], -1)
        if not steps.is_meta:
            _check_steps(steps)
            _check_apart(_levels(steps, -self.qmin), "give fewer levels, or steps of more equal size")
        self.positivity = Projection() if positivity is None else positivity
        refuse_unsound_states(self, "steps")
        raw = self.positivity.raw(steps).contiguous()
        if learnable:
            self.steps: Tensor = nn.Parameter(raw)
        else:
            self.register_buffer("steps", raw)
        self.raised: Tensor
        self.register_buffer("raised", torch.zeros((), dtype=torch.int64, device=raw.device), persistent=False)

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
    ) -> "StepGrid":
        """Build the grid of equal steps that just covers a range of reals.

        Zero is code 0, whether or not `spec` is symmetric: these grids have no zero point. A side without codes is not
        covered. A range of zero width gets steps of 1, as `UniformGrid.from_range` does.

        Args:
            spec: The codes.
            low: Smallest real of each tile.
            high: Largest real of each tile. Shape of `low`.
            positivity: How the parameter stands for the steps; `Projection()` when None.
            learnable: Whether the steps are a parameter.
            gradient_scale: Multiplier of the gradient of the steps.

        Returns:
            A grid whose tiles have the shape of `low`.

        Raises:
            RangeError: The range is not finite, or lies wholly on the side of zero that has no codes.
        """
        _check_range(spec, low, high)
        wide = torch.promote_types(low.dtype, torch.float32)
        low, high = low.detach().to(wide).clamp(max=0), high.detach().to(wide).clamp(min=0)
        ends = [end / code for end, code in ((low, spec.qmin), (high, spec.qmax)) if code]
        step = ends[0] if len(ends) == 1 else torch.maximum(*ends)
        # Below the smallest normal number the inverse of a step overflows, so such a range counts as zero width.
        step = torch.where(step > torch.finfo(wide).tiny, step, torch.ones_like(step)).unsqueeze(-1)
        below, above = (step.expand(*low.shape, count) for count in (-spec.qmin, spec.qmax))
        return cls(below, above, positivity=positivity, learnable=learnable, gradient_scale=gradient_scale)

    @classmethod
    def from_levels(
        cls,
        table: Float[Tensor, "*tiles n"],
        *,
        qmin: int,
        positivity: Positivity | None = None,
        learnable: bool = True,
        gradient_scale: float = 1.0,
    ) -> "StepGrid":
        """Build the grid with given levels, to the last digit or two of their dtype.

        Args:
            table: Levels in ascending order along the last axis; the axes before it tile the tensor.
            qmin: Code of the first level, so that `table[..., -qmin]` is zero.
            positivity: How the parameter stands for the steps; `Projection()` when None.
            learnable: Whether the steps are a parameter.
            gradient_scale: Multiplier of the gradient of the steps.

        Raises:
            SpecError: No level has code 0.
            RangeError: That level is not zero, or the levels are not finite and strictly increasing.
        """
        if not 0 <= -qmin < table.shape[-1]:
            raise SpecError(f"qmin={qmin} with {table.shape[-1]} levels: code 0 must be among the codes of the levels")
        if not table.is_meta and bool((table[..., -qmin] != 0).any()):
            zero = table[..., -qmin].flatten()
            raise RangeError(
                f"level {float(zero[(zero != 0).nonzero()[0, 0]])} at code 0 (qmin={qmin}): it must be 0, on which a "
                "StepGrid is built; another qmin, or q_core.CodebookGrid for levels without a zero"
            )
        if not table.is_meta:
            _check_apart(table.detach(), "list the levels in ascending order, each once")
        widths = table.detach().double().diff(dim=-1).to(torch.promote_types(table.dtype, torch.float32))
        below, above = widths[..., :-qmin].flip(-1), widths[..., -qmin:]
        return cls(below, above, positivity=positivity, learnable=learnable, gradient_scale=gradient_scale)

    def table(self) -> tuple[Float[Tensor, "*tiles n"], Float[Tensor, "*tiles n-1"]]:
        """Return the levels in ascending order and the distances between them, differentiable."""
        steps = functional.scale_gradient(self.positivity.steps(self.steps), self.gradient_scale)
        return _levels(steps, -self.qmin), _widths(steps, -self.qmin)

    def project(self) -> None:
        """Put steps that the optimizer moved too low back, in place, without waiting for the device.

        Call it after every update of the optimizer. It does nothing where the parameter stands for positive steps
        wherever it is.
        """
        with torch.no_grad():
            before = self.steps.clone()
            self.positivity.project(self.steps)
            self.raised += (self.steps > before).sum()

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the steps without their last axis."""
        return tuple(self.steps.shape[:-1])

    @property
    def widths(self) -> Shaped[Tensor, "..."]:
        """Distances between neighbouring levels, from the lowest up: shape `(*tile_shape, qmax - qmin)`."""
        return _widths(self.positivity.steps(self.steps.detach()), -self.qmin)

    def sides(self) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """Return the steps below and above zero, those next to zero first, as the constructor takes them."""
        steps = self.positivity.steps(self.steps.detach())
        return steps[..., : -self.qmin], steps[..., -self.qmin :]

    def frozen(self) -> CodebookGrid:
        """Return the table of the levels, which has the same codes and levels, bit for bit.

        Raises:
            RangeError: Two levels have become one.
        """
        table = self.levels()
        _check_apart(table, "call project(), or train with a larger floor of Projection")
        return CodebookGrid(table, qmin=self.qmin)

    def extra_repr(self) -> str:
        """Show the codes and the granularity."""
        return f"codes {self.qmin} to {self.qmax}, steps {tuple(self.steps.shape)}"


def _levels(steps: Tensor, below: int) -> Tensor:
    """Add steps up, from zero outward, in the order of the parameter: `below` ones below zero, then those above."""
    # In float64: one after the other or pairwise, as a GPU and a compiler add, comes to the same float32 then.
    sums = [side.cumsum(-1, dtype=torch.float64).to(steps.dtype) for side in (steps[..., :below], steps[..., below:])]
    return torch.cat([-sums[0].flip(-1), steps.new_zeros((*steps.shape[:-1], 1)), sums[1]], -1)


def _widths(steps: Tensor, below: int) -> Tensor:
    """Bring steps from the order of the parameter to that of the levels."""
    return torch.cat([steps[..., :below].flip(-1), steps[..., below:]], -1) if below else steps


def _sides(negative: Tensor | None, positive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both sides in one dtype, float32 or wider, an empty one in place of None."""
    given = [side.detach() for side in (negative, positive) if side is not None]
    if not given:
        raise SpecError("neither negative nor positive steps: a grid has at least 2 levels")
    for side in given:
        if side.ndim < 2:
            raise ShapeError(
                f"steps of shape {tuple(side.shape)}: they need the axes of the tiles before the axis of the steps, "
                f"(1, {side.numel()}) for one row of steps per tensor"
            )
    if given[0].shape[:-1] != given[-1].shape[:-1]:
        raise ShapeError(
            f"negative steps of shape {tuple(given[0].shape)} and positive ones of shape {tuple(given[-1].shape)}: "
            "all axes but the last must be equal"
        )
    dtype = torch.promote_types(torch.promote_types(given[0].dtype, given[-1].dtype), torch.float32)
    empty = given[0].new_empty((*given[0].shape[:-1], 0), dtype=dtype)
    below, above = (empty if side is None else side.detach().to(dtype) for side in (negative, positive))
    return below, above


def _check_count(qmin: int, qmax: int) -> None:
    if not 2 <= qmax - qmin + 1 <= 2**MAX_BITS:
        raise SpecError(
            f"{-qmin} negative and {qmax} positive steps make {qmax - qmin + 1} levels: a grid has 2 to {2**MAX_BITS}"
        )


def _check_steps(steps: Tensor) -> None:
    bad = ~(steps.isfinite() & (steps > 0))
    if bool(bad.any()):
        raise RangeError(
            f"steps have {int(bad.sum())} of {steps.numel()} values that are not positive and finite, the first is "
            f"{float(steps[bad][0])} at {tuple(bad.nonzero()[0].tolist())}: steps are distances between neighbouring "
            "levels, not the levels, see from_levels"
        )


def _check_apart(table: Tensor, advice: str) -> None:
    gaps = table.diff(dim=-1)
    bad = ~(table.isfinite().all(-1, keepdim=True) & (gaps > 0))
    if bool(bad.any()):
        *tile, cell = bad.nonzero()[0].tolist()
        raise RangeError(
            f"levels {float(table[(*tile, cell)])} and {float(table[(*tile, cell + 1)])} of tile {tuple(tile)} are not "
            f"finite and apart in {table.dtype}: {advice}"
        )


def _check_range(spec: QuantSpec, low: Tensor, high: Tensor) -> None:
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise RangeError(f"range {float(low.min())} to {float(high.max())} is not finite")
    if bool((low > high).any()):
        raise RangeError(f"range with low {float(low.max())} above high {float(high.min())}")
    lost = ((high <= 0) & (low < 0)) if spec.qmin == 0 else ((low >= 0) & (high > 0)) if spec.qmax == 0 else None
    if lost is not None and bool(lost.any()):
        side = "negative" if spec.qmin == 0 else "positive"
        raise RangeError(
            f"range {float(low[lost][0])} to {float(high[lost][0])} is {side}, but codes {spec.qmin} to {spec.qmax} "
            f"hold no {side} real: use QuantSpec.signed, of 2 bits or more"
        )
