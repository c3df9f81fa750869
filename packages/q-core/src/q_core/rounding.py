"""Which of the two neighbouring codes a real goes to.

A rounding sees the *code coordinate* `u`: the coordinate in which neighbouring levels are one apart and real zero
is 0. It returns `floor(u)` or `floor(u) + 1`. Ties are a convention of the rounding, not of the grid: `NearestEven`
is the convention of ONNX and of LSQ, `NearestTowardZero` that of nuLSQ.
"""

import abc
import copy
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from q_core.errors import StateError
from q_core.functional import straight_through
from q_core.module import PreciseModule


class Rounding(PreciseModule, abc.ABC):
    """Chooses, for a point between two neighbouring codes, one of the two.

    A soft rounding, while it learns, may return a point between them.

    A rounding with a constructor of its own that is to be saved with a packed model overrides `facts` and, where they
    are not the arguments of the constructor, `from_facts`.
    """

    @abc.abstractmethod
    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `floor(u)` or `floor(u) + 1` for every element.

        Args:
            u: Code coordinate; real zero is at 0.

        Returns:
            Integers in a floating-point dtype.
        """

    def ties_up(self, codes: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"] | None:
        """Tell where the tie half a code below each of `codes` goes: to that code, or to the one below it.

        A rounding that always takes the nearest code says so by an answer. A grid may then compare reals with the
        middles between its levels instead of asking for the code of every element.

        Args:
            codes: Code coordinates, integral in value; real zero is at 0.

        Returns:
            Whether the tie goes up, or None when the nearest code is not always taken.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Return what `from_facts` must know beside the values of the tensors: plain values that JSON can hold.

        Raises:
            StateError: The rounding has a constructor of its own, and nobody said what to tell of it.
        """
        if type(self).__init__ is not Rounding.__init__:
            raise StateError(f"a {type(self).__name__} tells no facts: override facts() and from_facts()")
        return {}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Rounding":
        """Return a rounding with tensors of the right shapes; their values are filled in afterwards.

        It is called with the meta device as default, so that what a file describes takes no memory.

        Args:
            facts: What `facts` returned, once through JSON: a tuple has become a list.
        """
        return cls(**facts)

    def frozen(self) -> "Rounding":
        """Return a rounding of the same codes that does not learn, for deployment; the original is left alone."""
        if next(self.parameters(), None) is None:
            return self
        return copy.deepcopy(self).requires_grad_(False)


@final
class NearestEven(Rounding):
    """The nearest code; a tie goes to the even code coordinate.

    Gradient:
        1 everywhere (straight-through).

    Source:
        ONNX operator `QuantizeLinear`; Esser et al. 2020, arXiv:1902.08153, eq. 1.
    """

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round half to even."""
        return straight_through(torch.round(u), u)

    def ties_up(self, codes: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Up to even codes."""
        return codes.remainder(2) == 0


@final
class NearestTowardZero(Rounding):
    """The nearest code; a tie goes to the code nearer to real zero.

    Gradient:
        1 everywhere (straight-through).

    Source:
        Gongyo et al. 2024 (nuLSQ), supplement, eq. 5: the strict inequality of the Heaviside function.
    """

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round half toward zero."""
        return straight_through(torch.copysign(torch.ceil(u.abs() - 0.5), u), u)

    def ties_up(self, codes: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Up to codes that are not positive."""
        return codes <= 0


@final
class Stochastic(Rounding):
    """The upper code with a probability equal to the fractional part, so that the mean is exact.

    Draws from torch's global generator: seed it with `torch.manual_seed`.

    Gradient:
        1 everywhere (straight-through).

    Source:
        Gupta et al. 2015, arXiv:1502.02551, section 3.1.
    """

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round up with probability `u - floor(u)`."""
        base = torch.floor(u)
        up = torch.rand_like(u) < u - base
        return straight_through(base + up, u)
