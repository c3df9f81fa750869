r"""Rounding borders: where within a cell an activation starts to go up.

Nearest rounding goes up above one half. AQuant lets the *border* depend on the activation itself, by a polynomial for
every element of the unfolded input of a layer: $\lceil u - B(u) \rceil$, up where the fraction of $u$ is above $B(u)$.
So the errors of one output cancel instead of each being small. All coefficients zero is the border one half.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core.errors import FormatError, RangeError, ShapeError, SpecError, StateError
from q_core.functional import straight_through
from q_core.rounding import Rounding

LARGEST = 1 - 2.0**-20
"""The largest border: just below 1, so that real zero, and with it padding, always keeps code zero."""

SLOPE = 2.5
"""How much AQuant stretches the sigmoid, which by itself hardly comes near its ends."""

Bound = Callable[[Tensor], Tensor]
"""Turns the value of the polynomial into a border."""


def rectified(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Bound a border: $clip(\tfrac12 + 2.5\,(\sigma(z) - \tfrac12),\ 0,\ 1 - 2^{-20})$.

    The ends are reached at $|z| = 0.847$.

    Gradient:
        0 beyond the ends.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, section 4.2 and appendix B, read together.
    """
    return (0.5 + SLOPE * (torch.sigmoid(z) - 0.5)).clamp(0, LARGEST)


def unclipped(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Bound a border by the letter of the appendix: $\tfrac12 + 2.5\,(\sigma(z) - \tfrac12)$, in (-0.75, 1.75).

    Beyond 0 and 1 it moves exact levels: real zero no longer has code zero, nor has padding.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, appendix B.
    """
    return 0.5 + SLOPE * (torch.sigmoid(z) - 0.5)


def steep(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Bound a border by a steeper sigmoid: $\min(\sigma(2.5\,z),\ 1 - 2^{-20})$.

    Source:
        Another reading of Li et al. 2022 (AQuant), arXiv:2208.11945, appendix B.
    """
    return torch.sigmoid(SLOPE * z).clamp(max=LARGEST)


BOUNDS: tuple[Bound, ...] = (rectified, unclipped, steep)
"""The bounds that a file can name."""


@final
class LearnedBorder(Rounding):
    r"""The quadratic border of AQuant, or one of any other degree.

    $$ r(u) = \lceil u - B(u) \rceil, \quad B(u) = bound(b_0 + b_1 v + b_2 v^2),
       \quad v = \frac{u - low}{high - low} $$

    The coefficients are for $v$ in [0, 1], so that one learning rate suits every number of bits.

    Args:
        coefficients: [degree + 1, *index]; what follows the first axis broadcasts against `u`: `(c, k, 1)` for every
            channel and kernel position of patches, `(c, 1, 1)` for every channel of an ordinary input, `(features,)`
            for a linear layer. Copied.
        low: Code coordinate of the smallest level, `qmin - zero_point`.
        high: Code coordinate of the largest level.
        bound: Turns the value of the polynomial into a border.

    Raises:
        SpecError: `low` is not below `high`.
        ShapeError: There is no coefficient.

    Gradient:
        To `u`: 1 (straight-through; the border sees `u` as a constant). To the border: -1.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 8.
    """

    references: ClassVar[tuple[str, ...]] = ("arXiv:2208.11945",)

    def __init__(
        self, coefficients: Float[Tensor, "..."], *, low: float, high: float, bound: Bound = rectified
    ) -> None:
        super().__init__()
        if not low < high:
            raise SpecError(f"codes from {low} to {high}: low must be below high")
        if coefficients.ndim == 0 or not len(coefficients):
            raise ShapeError(f"coefficients of shape {tuple(coefficients.shape)}: the first axis holds b0, b1, ...")
        self.low, self.high, self.bound = low, high, bound
        self.coefficients = nn.Parameter(coefficients.detach().clone())

    @classmethod
    def nearest(
        cls, index: tuple[int, ...], *, low: float, high: float, degree: int = 2, bound: Bound = rectified
    ) -> "LearnedBorder":
        """Start at the border one half: nearest rounding, ties down.

        Args:
            index: Shape of one coefficient.
            low: Code coordinate of the smallest level.
            high: Code coordinate of the largest level.
            degree: Of the polynomial: 2 as published, 1 the linear border, 0 a constant.
            bound: Turns the value of the polynomial into a border.

        Raises:
            RangeError: A negative degree.
        """
        if degree < 0:
            raise RangeError(f"degree={degree}: it must be at least 0")
        return cls(torch.zeros(degree + 1, *index), low=low, high=high, bound=bound)

    @property
    def degree(self) -> int:
        """Degree of the polynomial."""
        return len(self.coefficients) - 1

    def border(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the border at each element; no gradient flows to `u`.

        Raises:
            ShapeError: The coefficients do not broadcast to `u`.
        """
        check_index(tuple(self.coefficients.shape[1:]), u)
        return polynomial_border(u, self.coefficients, low=self.low, high=self.high, bound=self.bound)

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round up where the fraction is above the border, down otherwise.

        Raises:
            ShapeError: The coefficients do not broadcast to `u`.
        """
        return _round(u, self.border(u))

    def facts(self) -> dict[str, Any]:
        """Return the shape of the coefficients, the ends of the codes and the name of the bound.

        Raises:
            StateError: The bound is none of `BOUNDS`, and a file holds no code.
        """
        if self.bound not in BOUNDS:
            known = ", ".join(map(_name, BOUNDS))
            raise StateError(f"a file holds no code, so the bound {_name(self.bound)} cannot be one of {known}")
        shape = list(self.coefficients.shape)
        return {"shape": shape, "low": self.low, "high": self.high, "bound": _name(self.bound)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "LearnedBorder":
        """Return a border whose coefficients are zero.

        Raises:
            FormatError: The name of the bound is unknown.
        """
        bound = next((bound for bound in BOUNDS if _name(bound) == facts["bound"]), None)
        if bound is None:
            raise FormatError(f"a border with the bound {facts['bound']!r}: known are {', '.join(map(_name, BOUNDS))}")
        return cls(torch.zeros(facts["shape"]), low=facts["low"], high=facts["high"], bound=bound)

    def extra_repr(self) -> str:
        """Show the degree and what shares a border."""
        return f"degree {self.degree}, {tuple(self.coefficients.shape[1:])}, {_name(self.bound)}"


@final
class FusedBorder(Rounding):
    r"""One border for all kernel positions of a channel, fused from the borders of each.

    $$ B^I = clip\Big(\frac{1}{k} \sum_j \alpha_j B^E_j(u_j),\ 0,\ 1 - 2^{-20}\Big) $$

    It works on patches `[n, c, k, l]`; padding takes part with $u = 0$. With one kernel position and weight 1 it is
    the border itself.

    Args:
        border: The element-wise border, with coefficients of index `(c, k, 1)`.
        weights: $\alpha$, [c, k]. Ones when None. Copied.

    Raises:
        ShapeError: The weights do not fit the border.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 9.
    """

    def __init__(self, border: LearnedBorder, weights: Float[Tensor, "c k"] | None = None) -> None:
        super().__init__()
        index = tuple(border.coefficients.shape[1:])
        if len(index) != 3 or index[2] != 1:
            raise ShapeError(
                f"border for elements of shape {index}: fusion needs one of shape (channels, positions, 1)"
            )
        if weights is not None and tuple(weights.shape) != index[:2]:
            raise ShapeError(f"weights of shape {tuple(weights.shape)} with a border of shape {index[:2]}")
        self.elements = border
        self.weights = nn.Parameter(
            border.coefficients.detach().new_ones(index[:2]) if weights is None else weights.detach().clone()
        )

    def border(self, u: Float[Tensor, "n c k l"]) -> Float[Tensor, "n c 1 l"]:
        """Return the border that all kernel positions share."""
        weighted = self.elements.border(u) * self.weights.unsqueeze(2)
        return weighted.mean(2, keepdim=True).clamp(0, LARGEST)

    def forward(self, u: Float[Tensor, "n c k l"]) -> Float[Tensor, "n c k l"]:
        """Round up where the fraction is above the fused border, down otherwise."""
        return _round(u, self.border(u))

    def facts(self) -> dict[str, Any]:
        """Return the facts of the element-wise border, which determine the shape of the weights."""
        return {"border": self.elements.facts()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "FusedBorder":
        """Return the mean of borders whose coefficients are zero."""
        return cls(LearnedBorder.from_facts(facts["border"]))


def polynomial_border(
    u: Float[Tensor, "*shape"], coefficients: Float[Tensor, "..."], *, low: float, high: float, bound: Bound
) -> Float[Tensor, "*shape"]:
    r"""Return $bound(b_0 + b_1 v + b_2 v^2 + \dots)$ with $v = (u - low) / (high - low)$; no gradient flows to `u`.

    Args:
        u: Code coordinate.
        coefficients: [degree + 1, *index]; what follows the first axis broadcasts against `u`.
        low: Code coordinate of the smallest level.
        high: Code coordinate of the largest level.
        bound: Turns the value of the polynomial into a border.
    """
    v = (u.detach() - low) / (high - low)
    value = coefficients[-1].expand_as(v)
    for coefficient in coefficients[:-1].flip(0):
        value = torch.addcmul(coefficient, value, v)
    return bound(value)


def check_index(index: tuple[int, ...], u: Tensor) -> None:
    """Check that parameters of shape `index` broadcast to the elements of `u`, and not the other way round.

    Raises:
        ShapeError: They do not.
    """
    fits = len(index) <= u.ndim and all(
        # Not `in`: a compiler that treats a size as a variable would find it in no tuple.
        size == 1 or size == there
        for size, there in zip(reversed(index), reversed(u.shape), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"border for elements of shape {tuple(index)} got a tensor of shape {tuple(u.shape)}: make one for "
            "this layer, on patches [n, c, k, l] for a border of every kernel position"
        )


def round_above(u: Float[Tensor, "*shape"], border: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
    r"""Return $\lceil u - B \rceil$, without a gradient; exact levels keep their codes at every $0 \leq B < 1$."""
    # The difference of u and a border is rounded, and a border near 1 would send an exact level down.
    base = torch.floor(u)
    return base + torch.ceil(u - base - border)


def _name(bound: Bound) -> str:
    # A partial or a module has no name of its own.
    name: str = getattr(bound, "__name__", type(bound).__name__)
    return name


def _round(u: Tensor, border: Tensor) -> Tensor:
    rounded = round_above(u.detach(), border.detach())
    return straight_through(rounded.to(u.dtype), (u - border).to(u.dtype))
