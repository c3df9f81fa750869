r"""Rounding that learns, and rounding that has learned.

A weight may go to either of its two neighbouring levels. `LearnedRounding` holds a number for each weight and lets
gradient descent choose, softly at first; `FixedRounding` is what it decided. They are two types: a model that was
reconstructed holds the second, and nothing has to be switched. `SoftWeight` stands in for the quantizer of a weight
while nothing but its rounding learns. `Gradual` lets any rounding in by degrees while something else learns.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from q_core import Quantizer
from q_core.errors import RangeError, ShapeError, SpecError
from q_core.functional import straight_through
from q_core.rounding import Rounding

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid: Louizos et al. 2018, arXiv:1712.01312, as AdaRound, eq. 23, takes them."""


@final
class FixedRounding(Rounding):
    """For every element of one tensor, whether it goes up or down.

    Args:
        up: True where the element goes to the upper of its two neighbours. Shape of the tensor it was made for.

    Gradient:
        1 everywhere (straight-through).
    """

    def __init__(self, up: Bool[Tensor, "*shape"]) -> None:
        super().__init__()
        self.up: Tensor
        self.register_buffer("up", up.detach().clone())

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `floor(u)` or `floor(u) + 1`, as was decided for each element.

        Raises:
            ShapeError: `u` has another shape than the tensor this rounding was made for.
        """
        _check_shape(u, self.up)
        return straight_through(torch.floor(u) + self.up, u)

    def facts(self) -> dict[str, Any]:
        """Return the shape of the tensor it was made for."""
        return {"shape": list(self.up.shape)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "FixedRounding":
        """Return one that rounds everything down."""
        return cls(torch.zeros(facts["shape"], dtype=torch.bool))


@final
class FixedCodes(Rounding):
    """For every element of one tensor, the code it has, wherever it lies.

    What is left when scales learned on codes that stayed: with the scale that was learned, an element need no longer
    be next to its level.

    Args:
        codes: Integral code coordinates, real zero at 0, in -32768 to 32767. Shape of the tensor they were made for.

    Gradient:
        1 everywhere (straight-through).
    """

    def __init__(self, codes: Shaped[Tensor, "*shape"]) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes.detach().round().to(torch.int16))

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the codes, whatever `u` is.

        Raises:
            ShapeError: `u` has another shape than the tensor this rounding was made for.
        """
        _check_shape(u, self.codes)
        return straight_through(self.codes.to(u.dtype), u)

    def facts(self) -> dict[str, Any]:
        """Return the shape of the tensor they were made for."""
        return {"shape": list(self.codes.shape)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "FixedCodes":
        """Return one whose codes are all zero."""
        return cls(torch.zeros(facts["shape"], dtype=torch.int16))


@final
class Anchored(Rounding):
    """A rounding that sees its tensor where it was, whatever became of the scale since.

    So the codes do not depend on the scale, and the scale can learn with a gradient that is exact: the code itself.

    Args:
        rounding: Any rounding.
        coordinate: Code coordinate of the tensor at the scale of the start.

    Gradient:
        None to `u`. To the parameters of the rounding: its own.

    Source:
        Jeon et al. 2023 (Genie), arXiv:2303.13109: weights whose scale learns while what rounds down stays.
    """

    def __init__(self, rounding: Rounding, coordinate: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        self.rounding = rounding
        self.coordinate: Tensor
        self.register_buffer("coordinate", coordinate.detach().clone(), persistent=False)

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round the coordinate of the start.

        Raises:
            ShapeError: `u` has another shape than the tensor this rounding was made for.
        """
        _check_shape(u, self.coordinate)
        rounded: Tensor = self.rounding(self.coordinate)
        return rounded.to(u.dtype)

    def settled(self) -> FixedCodes:
        """Return the codes as they are."""
        with torch.no_grad():
            return FixedCodes(self.rounding(self.coordinate))


@final
class LearnedRounding(Rounding):
    r"""The soft rounding of AdaRound: $\lfloor u \rfloor + h(V)$ with $h(V) = clip(1.2\,\sigma(V) - 0.1, 0, 1)$.

    At the start $h$ is the fraction of each element, so nothing is rounded at all; `rounding_penalty` then drives every
    $h$ to 0 or 1, and `hardened` takes the decision.

    Args:
        fraction: `u - floor(u)` of the tensor it is made for, in [0, 1).

    Raises:
        RangeError: A fraction outside [0, 1).

    Gradient:
        To $V$: that of $h$, whose ends count as inside the clip: in float32, an element on a level starts at one. To
        `u`: 1 (straight-through), which is of use only if the scale learns as well.

    Source:
        Nagel et al. 2020 (AdaRound), arXiv:2004.10568, eq. 22 and 23.
    """

    def __init__(self, fraction: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        if not bool(((fraction >= 0) & (fraction < 1)).all()):
            raise RangeError(f"fraction from {float(fraction.min())} to {float(fraction.max())}: it must be in [0, 1)")
        inner = (fraction.detach() - GAMMA) / (ZETA - GAMMA)
        self.logit = nn.Parameter(torch.log(inner / (1 - inner)))

    @classmethod
    def of(cls, u: Float[Tensor, "*shape"], decided: FixedRounding | None = None) -> "LearnedRounding":
        """Start from the code coordinate of a tensor, or half-way from there to what was decided before.

        Args:
            u: Code coordinate.
            decided: What hardening gives at the start; None for the nearest code.
        """
        fraction = u - torch.floor(u)
        if decided is not None:
            fraction = (fraction + decided.up) / 2
        # What lies just below an integer is 1 above the integer before it, once the difference is rounded.
        return cls(fraction.clamp(max=1 - torch.finfo(u.dtype).eps / 2))

    def share(self) -> Float[Tensor, "*shape"]:
        """Return $h(V)$: how far each element goes up, in [0, 1]."""
        share: Tensor = _RectifiedSigmoid.apply(self.logit)  # type: ignore[no-untyped-call]
        return share

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return a point between `floor(u)` and `floor(u) + 1`.

        Raises:
            ShapeError: `u` has another shape than the tensor this rounding was made for.
        """
        _check_shape(u, self.logit)
        return straight_through(torch.floor(u), u) + self.share()

    def hardened(self) -> FixedRounding:
        r"""Return the decision: up where $h \geq 1/2$."""
        return FixedRounding(self.logit.detach() >= 0)


class _RectifiedSigmoid(torch.autograd.Function):
    """The share of `LearnedRounding`, in fewer passes than its parts take, and with a derivative at both ends."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(logit)
        stretched = (ZETA - GAMMA) * sigmoid + GAMMA
        ctx.save_for_backward(sigmoid, stretched)
        return stretched.clamp(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        sigmoid, stretched = ctx.saved_tensors
        slope: Tensor = torch.ops.aten.sigmoid_backward(grad, sigmoid).mul_(ZETA - GAMMA)
        # One pass for a clip, instead of four, but its ends are open: they are set to the next numbers outside. Close
        # to 0 that is one that a difference of numbers as large as GAMMA cannot be.
        info = torch.finfo(slope.dtype)
        inside: Tensor = torch.ops.aten.hardtanh_backward(slope, stretched, -info.tiny, 1 + info.eps)
        return inside


@final
class SoftWeight(nn.Module):
    r"""A weight between two levels: $w_0 + h(V)\,(w_1 - w_0)$.

    For the time of learning it sits in the slot of a weight whose rounding alone learns, around the quantizer, which
    then goes back into the slot. The quantizer finds the same from the weight; but the levels do not change, and a step
    is spared to find them again.

    Args:
        quantizer: The quantizer; its rounding is a `LearnedRounding`.
        lower: The level of each element that goes down, in the units of the weight.
        upper: The level of each element that goes up.

    Gradient:
        To $V$: the distance of the levels times that of $h$. None to the weight.

    Source:
        Nagel et al. 2020 (AdaRound), arXiv:2004.10568, eq. 22.
    """

    def __init__(self, quantizer: Quantizer, lower: Float[Tensor, "*shape"], upper: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        if not isinstance(quantizer.rounding, LearnedRounding):
            raise SpecError(f"a {type(quantizer.rounding).__name__} in a soft weight: it takes a LearnedRounding")
        self.quantizer, self.rounding = quantizer, quantizer.rounding
        self.lower: Tensor
        self.upper: Tensor
        self.register_buffer("lower", lower, persistent=False)
        self.register_buffer("upper", upper, persistent=False)

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the weight on its way, in the dtype of `weight`."""
        return torch.lerp(self.lower, self.upper, self.rounding.share()).to(weight.dtype)


def rounding_penalty(share: Float[Tensor, "*shape"], beta: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""Return $\sum (1 - |2h - 1|^\beta)$: how many elements are undecided.

    Args:
        share: $h$, in [0, 1].
        beta: Exponent, above 0. Large values leave all but the decided alone, small ones push everybody.

    Returns:
        A sum from 0 (all decided) to the number of elements.

    Source:
        Nagel et al. 2020, arXiv:2004.10568, eq. 24.
    """
    undecided: Tensor = _Undecided.apply(share, beta)  # type: ignore[no-untyped-call]
    return undecided


class _Undecided(torch.autograd.Function):
    """`rounding_penalty`, with one power for both passes: powers are what takes the time."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, beta: float | Tensor) -> Tensor:
        distance = 2 * share - 1
        power = distance.abs().pow(beta)
        ctx.save_for_backward(distance, power, beta if isinstance(beta, Tensor) else None)
        ctx.beta = beta if not isinstance(beta, Tensor) else None
        return (1 - power).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        distance, power, beta = ctx.saved_tensors
        # Half-way there is no nearer end: 0 / 1.
        slope = power / (distance + (distance == 0).to(distance.dtype))
        return slope.mul_(-2 * grad * (ctx.beta if beta is None else beta)), None


def annealed_beta(progress: float, *, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float:
    """Return the exponent of the penalty: `start` during the warm-up, then falling linearly to `end`.

    Args:
        progress: Fraction of the iterations that are over, in [0, 1].
        start: Exponent at the start.
        end: Exponent at the end.
        warmup: Fraction of the iterations without a penalty, in [0, 1).

    Source:
        Li et al. 2021 (BRECQ) and Wei et al. 2022 (QDrop), as released.
    """
    over = max(0.0, (progress - warmup) / (1 - warmup))
    return start + (end - start) * min(1.0, over)


@final
class Gradual(Rounding):
    r"""A rounding that enters by degrees: $u + \alpha\,(r(u) - u)$.

    At 0 nothing is rounded, at 1 it is the rounding itself. It is a wrapper for the time of learning.

    Args:
        rounding: The rounding.
        influence: $\alpha$, in [0, 1]; set it with `set_influence`.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, appendix B, eq. 2.
    """

    def __init__(self, rounding: Rounding, influence: float = 0.0) -> None:
        super().__init__()
        self.rounding = rounding
        self.influence: Tensor
        self.register_buffer("influence", torch.zeros(1), persistent=False)
        self.set_influence(influence)

    def set_influence(self, influence: float) -> None:
        """Set how far the rounding counts.

        Raises:
            RangeError: A value outside [0, 1].
        """
        if not 0 <= influence <= 1:
            raise RangeError(f"influence={influence}: it must be in [0, 1]")
        self.influence.fill_(influence)

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return a point on the way from `u` to where the rounding sends it."""
        return torch.lerp(u, self.rounding(u), self.influence.to(u.dtype))


def gradual_influence(progress: float, *, warmup: float = 0.2) -> float:
    """Return the influence of AQuant's rounding schedule: 0 during the warm-up, then rising linearly to 1.

    Args:
        progress: Fraction of the iterations that are over, in [0, 1].
        warmup: Fraction without rounding, in [0, 1).

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, appendix B.
    """
    return min(1.0, max(0.0, (progress - warmup) / (1 - warmup)))


def _check_shape(u: Tensor, made_for: Tensor) -> None:
    if u.shape != made_for.shape:
        raise ShapeError(
            f"a rounding made for a tensor of shape {tuple(made_for.shape)} got one of shape {tuple(u.shape)}: every "
            "tensor needs a rounding of its own"
        )
