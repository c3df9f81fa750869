r"""Borders without polynomials: thresholds, a warp before ordinary rounding, a table.

A learned border sends $u$ above level $k$ exactly where $u - B(u) > k$. Where that happens once and for all at one
point $t_k$, the border *is* the list of these points, and neither sigmoid nor polynomial is left.

**What equal means.** A border is a function of reals. Evaluated in float32 it is off by about 1e-7 of a step, and
differently so in every kernel, so its own codes are not determined within that distance of $t_k$. The meaning of a
border here is its evaluation in float64, with the coefficients as they are. Thresholds give the codes of that meaning
at *every* number of their dtype, and so those of each float32 kernel wherever float32 decides at all.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from q_aquant.border import (
    SLOPE,
    Bound,
    LearnedBorder,
    check_index,
    polynomial_border,
    rectified,
    round_above,
    steep,
    unclipped,
)
from q_core.errors import RangeError, ShapeError, SpecError, StateError
from q_core.functional import quantize, straight_through
from q_core.grid import UniformGrid
from q_core.quantizer import Quantizer
from q_core.rounding import Rounding

_STEEPNESS: Mapping[Bound, float] = {rectified: 1.0, unclipped: 1.0, steep: SLOPE}
r"""Of each bound: $m$, where its slope is at most that of a sigmoid, $2.5\,\sigma(mz)(1 - \sigma(mz))$."""

_REACH = 2.0
"""Whether u is above level k is open only from k - 1 to k + 2, because no bound goes below -1 or above 2."""

_HALVINGS = 24
"""How often an interval is halved before what is in it counts as inseparable: to 2e-7 of a step, like float32."""

_PIECES = 1 << 18
"""Intervals that are looked at together, some 20 MiB."""

_MOST_PIECES = 64
"""More open pieces than these, and they are not going to close."""


@final
class ThresholdRounding(Rounding):
    r"""A rounding given by a threshold for every level: $r(u) = low + \sum_k [u > t_k]$.

    Args:
        thresholds: [levels - 1, *index], not falling along the first axis; what follows it broadcasts against `u`, as
            the coefficients of a `LearnedBorder` do. Minus infinity is a level that is always passed, infinity one that
            never is. Copied.
        low: Code coordinate of the smallest level, `qmin - zero_point`.

    Raises:
        ShapeError: There is no threshold.
        RangeError: They fall, or one is NaN.

    Gradient:
        1 everywhere (straight-through).
    """

    def __init__(self, thresholds: Float[Tensor, "..."], *, low: float) -> None:
        super().__init__()
        if thresholds.ndim == 0 or not len(thresholds):
            raise ShapeError(f"thresholds of shape {tuple(thresholds.shape)}: the first axis holds one for each level")
        if not thresholds.is_meta and not bool((thresholds[1:] >= thresholds[:-1]).all() & ~thresholds.isnan().any()):
            raise RangeError("thresholds fall from one level to the next, or are NaN: sort them along the first axis")
        self.low = low
        self.thresholds: Tensor
        self.register_buffer("thresholds", thresholds.detach().clone())

    @classmethod
    def of(cls, border: LearnedBorder) -> "ThresholdRounding":
        """Derive the thresholds of a border, in float64, and prove that there is one for each level.

        Returns:
            A rounding with the codes of the border at every number of the dtype of its coefficients, see the module.

        Raises:
            RangeError: A border crosses a level more than once, or a coefficient is not finite.
            SpecError: The bound is not one of `q_aquant.border.BOUNDS`, or the ends of the codes are not integers.
        """
        return cls(_thresholds(border), low=border.low)

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Count the thresholds below each element.

        Raises:
            ShapeError: The thresholds do not broadcast to `u`.
        """
        check_index(tuple(self.thresholds.shape[1:]), u)
        return straight_through(count_passed(u.detach(), self.thresholds, self.low), u)

    def facts(self) -> dict[str, Any]:
        """Return the shape of the thresholds and the smallest code coordinate."""
        return {"shape": list(self.thresholds.shape), "low": self.low}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "ThresholdRounding":
        """Return a rounding whose thresholds are zero."""
        return cls(torch.zeros(facts["shape"]), low=facts["low"])

    def extra_repr(self) -> str:
        """Show the number of levels and what shares thresholds."""
        return f"{len(self.thresholds) + 1} levels, {tuple(self.thresholds.shape[1:])}"


def count_passed(u: Float[Tensor, "*shape"], thresholds: Float[Tensor, "..."], low: float) -> Float[Tensor, "*shape"]:
    """Return `low` plus the number of thresholds below each element; NaN stays NaN."""
    passed = torch.full_like(u, low)
    for threshold in thresholds:
        passed = passed + (u > threshold)
    return torch.where(u.isnan(), u, passed)


@final
class WarpedRounding(Rounding):
    r"""A border as an element-wise function before ordinary rounding: $r(u) = round(w(u))$ with half to even.

    $$ w(u) = u + \tfrac12 - \delta - \min(B(u),\ 1 - 2\delta) $$

    `warp` is for a graph that ends in a stock quantizer: quantize $s\,w(x / s)$ instead of $x$. The small $\delta$, 1
    millionth at 2 bits and 4 at 4 bits, is there because a border sends a tie down while half to even sends it up from
    every odd level, and because float32 rounds the sum, and a stock quantizer rounds again; with it a tie goes down,
    and an exact level, such as zero, stays (`unclipped` does not promise that).

    The codes are those of the border wherever $u - B(u)$ is further than $2\delta$ from an integer. There is no other
    condition: the border may cross a level as often as it likes.

    Args:
        border: The learned border. Its parameters become those of this rounding.

    Gradient:
        To `u`: 1 (straight-through). To the border: -1.
    """

    def __init__(self, border: LearnedBorder) -> None:
        super().__init__()
        self.elements = border

    @property
    def margin(self) -> float:
        r"""Return $\delta$: twice what float32 and a stock quantizer do to a warped coordinate by rounding."""
        # What is below 2^m is rounded by at most 2^(m - 25): the sum, and product, inverse and product of the scale.
        return 2.0 ** (math.ceil(math.log2(max(abs(self.elements.low), abs(self.elements.high)) + 1)) - 22)

    def warp(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return what ordinary rounding must get.

        Args:
            u: Code coordinate, clamped to the range of the codes.

        Raises:
            ShapeError: The border does not broadcast to `u`.
        """
        return self.warped(u, self.elements.border(u))

    def warped(self, u: Float[Tensor, "*shape"], border: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Warp by a border that is known."""
        if self.elements.bound is not unclipped:
            border = border.clamp(max=1 - 2 * self.margin)
        return u + ((0.5 - self.margin) - border)

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Warp, and round to the nearest, half to even."""
        warped = self.warp(u)
        return straight_through(torch.round(warped), warped)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the border."""
        return {"border": self.elements.facts()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "WarpedRounding":
        """Return the warp of a border whose coefficients are zero."""
        return cls(LearnedBorder.from_facts(facts["border"]))


def carrier_table(quantizer: Quantizer, carrier: UniformGrid) -> UInt8[Tensor, "*index levels"]:
    """Tabulate a quantizer with a border over the codes of an activation that is stored on a grid of its own.

    Args:
        quantizer: On a uniform grid with one scale, with a `LearnedBorder`, `ThresholdRounding` or `WarpedRounding`.
        carrier: Grid of the stored activation, one scale and at most 8 bits.

    Returns:
        For every element of the rounding, its index, and every carrier code from `carrier.qmin` on: the code minus
        `quantizer.grid.qmin`.

    Raises:
        StateError: The rounding is none of a single element, such as a fused border.
        SpecError: A grid has another form.
    """
    grid = one_scale(quantizer.grid)
    if one_scale(carrier).bits > 8 or grid.bits > 8:
        raise SpecError(f"a table from {carrier.bits} to {grid.bits} bits: 8 are the most")
    flat, index = _flattened(quantizer.rounding)
    levels = carrier.levels().reshape(1, -1).expand(math.prod(index), -1)
    with torch.no_grad():
        codes = quantize(levels, grid.scale, grid.zero_point, qmin=grid.qmin, qmax=grid.qmax, rounding=flat)
    return (codes - grid.qmin).to(torch.uint8).reshape(*index, -1)


def one_scale(grid: Any) -> UniformGrid:
    """Return a grid as what it is.

    Raises:
        SpecError: It is not a uniform grid with one scale.
    """
    if not isinstance(grid, UniformGrid) or grid.scale.numel() != 1:
        raise SpecError(
            f"activations on a {type(grid).__name__} of tiles {grid.tile_shape}: a border is deployed on a uniform "
            "grid with one scale for the whole tensor"
        )
    return grid


def _flattened(rounding: Rounding) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Return a rounding of elements [index, n], and the shape of its index."""
    if isinstance(rounding, WarpedRounding):
        flat, index = _flattened(rounding.elements)
        return WarpedRounding(flat), index  # type: ignore[arg-type]
    if isinstance(rounding, ThresholdRounding):
        thresholds = rounding.thresholds
        return ThresholdRounding(thresholds.reshape(len(thresholds), -1, 1), low=rounding.low), tuple(
            thresholds.shape[1:]
        )
    if isinstance(rounding, LearnedBorder):
        border, coefficients = rounding, rounding.coefficients
        flat = LearnedBorder(
            coefficients.reshape(len(coefficients), -1, 1), low=border.low, high=border.high, bound=border.bound
        )
        return flat, tuple(coefficients.shape[1:])
    raise StateError(
        f"a {type(rounding).__name__} rounds no element by itself: a table needs a border of every element or channel"
    )


# The derivation. One problem is one level of one element: where is u - B(u) > k? Each interval of u is settled when it
# is seen to be wholly below or wholly above, or when u - B(u) is seen to rise all over it; otherwise it is halved.
# What is seen are bounds that hold for the whole interval, never samples.


def _thresholds(border: LearnedBorder) -> Float[Tensor, "..."]:
    """Return the thresholds of a border [levels - 1, *index], in the dtype of its coefficients."""
    if border.bound not in _STEEPNESS:
        raise SpecError(
            "thresholds of a border with a bound of your own: nothing is known of its slope; deploy it by a warp, or "
            "learn with one of q_aquant.border.BOUNDS"
        )
    if border.low != round(border.low) or border.high != round(border.high):
        raise SpecError(f"codes from {border.low} to {border.high}: thresholds belong to levels, which are integers")
    own = border.coefficients.detach()
    if not bool(own.isfinite().all()):
        raise RangeError(f"{int((~own.isfinite()).sum())} coefficients of the border are not finite: learn it again")
    index = tuple(own.shape[1:])
    coefficients = own.double().reshape(len(own), -1)
    levels = torch.arange(round(border.low), round(border.high), dtype=torch.float64, device=own.device)
    shape = (len(levels), coefficients.shape[1])
    problem = _Problem(border, coefficients, levels.repeat_interleave(shape[1]), index)
    left, right = problem.separate()
    return problem.settle(left, right, own.dtype).reshape(-1, *index)


class _Problem:
    """Levels [p] of elements [e], p running over levels first: where does a border pass them?"""

    def __init__(self, border: LearnedBorder, coefficients: Tensor, levels: Tensor, index: tuple[int, ...]) -> None:
        self.low, self.high, self.bound, self.index = border.low, border.high, border.bound, index
        self.coefficients, self.levels = coefficients, levels

    def of(self, which: Tensor) -> Tensor:
        """Return the coefficients [degree + 1, n] of some problems."""
        return self.coefficients[:, which % self.coefficients.shape[1]]

    def passes(self, u: Tensor, which: Tensor) -> Bool[Tensor, " n"]:
        """Tell what the border means at a point: whether its code is above the level."""
        at = polynomial_border(u, self.of(which), low=self.low, high=self.high, bound=self.bound)
        return round_above(u, at) > self.levels[which]

    def separate(self) -> tuple[Tensor, Tensor]:
        """Find for each problem a point that is not above the level, and one after it that is.

        Returns:
            Both [p]. Everything before the first is not above, everything from the second on is; infinite where there
            is no such point.

        Raises:
            RangeError: A level is crossed more than once.
        """
        which = torch.arange(len(self.levels), device=self.levels.device)
        last_below = torch.full_like(self.levels, -torch.inf)
        first_above = torch.full_like(self.levels, torch.inf)
        end_above = torch.full_like(self.levels, torch.inf)
        work = [
            (part, (self.levels[part] - 1).clamp(min=self.low), (self.levels[part] + _REACH).clamp(max=self.high))
            for part in torch.split(which, _PIECES)
        ]
        for _ in range(_HALVINGS):
            halved = []
            for part, a, b in work:
                settled, has_below, has_above = self._look(part, a, b)
                below, above = settled & has_below, settled & has_above
                last_below.scatter_reduce_(0, part[below], a[below], "amax")
                first_above.scatter_reduce_(0, part[above], a[above], "amin")
                end_above.scatter_reduce_(0, part[above], b[above], "amin")
                part, a, b = part[~settled], a[~settled], b[~settled]
                middle = (a + b) / 2
                both = torch.cat([part, part]), torch.cat([a, middle]), torch.cat([middle, b])
                halved += list(zip(*(torch.split(tensor, _PIECES) for tensor in both), strict=True))
            work = [piece for piece in halved if len(piece[0])]
            if not work or len(work) > _MOST_PIECES:
                break
        refused = first_above < last_below
        for part, a, _ in work:  # never settled: a crossing downwards, or two that are next to one another
            refused[part] = True
            first_above.scatter_reduce_(0, part, a, "amin")
        if bool(refused.any()):
            self._refuse(refused, first_above)
        return last_below, end_above

    def _look(self, which: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tell of intervals whether they are settled, and which hold points that are not, or are, above the level."""
        width = self.high - self.low
        pillars = _bernstein(self.of(which), (a - self.low) / width, (b - self.low) / width)
        least, most = pillars.amin(0), pillars.amax(0)
        lower, upper = self.bound(least), self.bound(most)
        level = self.levels[which]
        below, above = b - lower <= level, a - upper > level
        degree = len(pillars) - 1
        climb = degree * pillars.diff(dim=0).amax(0).clamp(min=0) if degree else torch.zeros_like(a)
        steepest = torch.zeros_like(a).clamp(least, most)  # where in the interval the sigmoid is steepest
        sigmoid = torch.sigmoid(_STEEPNESS[self.bound] * steepest)
        slope = torch.where(lower == upper, 0.0, SLOPE * sigmoid * (1 - sigmoid) * climb)
        rising = slope < (1 - 1e-9) * (b - a)  # so that u - B(u) rises by more than what float64 rounds away
        below, above = below | (rising & ~self.passes(a, which)), above | (rising & self.passes(b, which))
        settled = rising | (below ^ above)
        return settled, below, above

    def settle(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Float[Tensor, " p"]:
        """Return the largest number of a dtype that is not above the level, where there is one crossing in between."""
        which = (left.isfinite() & right.isfinite()).nonzero().squeeze(1)
        thresholds = torch.where(left.isfinite(), torch.inf, -torch.inf).to(left.dtype)
        a, b = left[which], right[which]
        # A border that is clipped passes a level at an integer, which halving would only come near to. Then 80 halves
        # of an interval 3 wide, until float64 has nothing in between, or next to nothing around zero.
        for step in range(82):
            middle = (self.levels[which] + step).clamp(a, b) if step < 2 else (a + b) / 2
            up = self.passes(middle, which)
            a, b = torch.where(up, a, middle), torch.where(up, middle, b)
        found = a.to(dtype)
        for direction in (-torch.inf, torch.inf):
            for _ in range(3):
                there = torch.nextafter(found, torch.full_like(found, direction))
                looked = found if direction < 0 else there
                move = self.passes(looked.double(), which) == (direction < 0)
                found = torch.where(move, there, found)
        thresholds = thresholds.to(dtype)
        thresholds[which] = found
        return thresholds

    def _refuse(self, refused: Tensor, near: Tensor) -> None:
        problem, elements = int(refused.nonzero()[0]), self.coefficients.shape[1]
        place: list[int] = []
        element = problem % elements
        for size in reversed(self.index):
            place.insert(0, element % size)
            element //= size
        names = ("channel", "kernel position") if len(self.index) == 3 else ("feature",)
        where = ", ".join(f"{name} {at}" for name, at in zip(names, place, strict=False)) or "all elements"
        values = ", ".join(f"{value:.4g}" for value in self.coefficients[:, problem % elements].tolist())
        raise RangeError(
            f"the border of {where}, coefficients ({values}), passes level {float(self.levels[problem]):g} more than "
            f"once or nearly so, near {float(near[problem]):.6g} steps, the first of {int(refused.sum())} such among "
            f"{len(refused)} levels of {elements} borders: no thresholds have their codes; deploy the layer by a warp "
            "or by shifted convolutions, or learn flatter borders"
        )


def _bernstein(coefficients: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, "terms n"]:
    """Return the Bernstein coefficients of polynomials on [a, b]: between the least and the largest of them is the
    polynomial, and between the least and the largest of their differences, times the degree, its slope.
    """  # noqa: D205 - one sentence
    degree = len(coefficients) - 1
    pillars = []
    for ends in range(degree + 1):
        # The blossom at (a, ..., a, b, ..., b): powers of v become means of the products of as many arguments.
        products = [torch.ones_like(a)] + [torch.zeros_like(a)] * degree
        for argument in [a] * (degree - ends) + [b] * ends:
            for power in range(degree, 0, -1):
                products[power] = products[power] + argument * products[power - 1]
        terms = [coefficients[power] * products[power] / math.comb(degree, power) for power in range(degree + 1)]
        pillars.append(torch.stack(terms).sum(0))
    return torch.stack(pillars)
