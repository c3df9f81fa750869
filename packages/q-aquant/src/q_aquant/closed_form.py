r"""The border that needs no gradient descent.

With one output, the border that makes the error of a product least is known (AQuant, eq. 7). An element of the input
takes part in many outputs, and the least sum of squares over all that share it is as plain:

$$ B_c(u) = \tfrac12 + \rho_c\,u + (1 - \rho_c)\,\mathbb{E}[e \mid u] / s,
   \quad \rho_c = \frac{\langle \hat{w}_c, \Delta w_c \rangle}{\lVert \hat{w}_c \rVert^2},
   \quad \hat{w} = w + \Delta w $$

where $e$ is the error that arrives from the layers before, in its dependence on $u$ a quadratic fitted to calibration
data. Each element is treated by itself: what the elements of a window do to one another is left out, and is what
learning adds. So take it where it lowers the error on held-out data, as a start or as it is.
"""

from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from q_aquant.border import SLOPE
from q_core.errors import DataError, RangeError, ShapeError, SpecError

INITIAL_SLOPE = SLOPE / 4
"""Slope of every bound of `q_aquant.border` at zero: that of the sigmoid is one quarter."""


def weight_terms(
    weight: Float[Tensor, "o *window"], quantized: Float[Tensor, "o *window"], *, groups: int = 1
) -> tuple[Float[Tensor, "*index"], Float[Tensor, "*index"]]:
    r"""Return how a border answers to the activation and to the error that comes with it.

    Args:
        weight: Float weight: `[outputs, channels / groups, kh, kw]` of a convolution, `[outputs, features]` of a linear
            layer.
        quantized: The weight as it enters the product.
        groups: Of the convolution.

    Returns:
        $\rho$ and $\langle \hat{w}, w \rangle / \lVert \hat{w} \rVert^2 = 1 - \rho$, over the outputs that use an
        element: `[channels, kh * kw, 1]` of a convolution, `[features]` of a linear layer. Both are 0 for an element
        whose quantized weights are all 0: nothing depends on its border.

    Raises:
        ShapeError: The weights differ in shape, have neither 2 nor 4 axes, or the groups do not divide the outputs.
    """
    if weight.shape != quantized.shape or weight.ndim not in (2, 4):
        raise ShapeError(
            f"weights of shape {tuple(weight.shape)} and {tuple(quantized.shape)}: give both of one convolution or of "
            "one linear layer"
        )
    outputs = weight.shape[0]
    if groups < 1 or outputs % groups or (weight.ndim == 2 and groups > 1):
        raise ShapeError(f"{groups} groups in a weight of shape {tuple(weight.shape)}: they must divide the outputs")
    exact, used = (part.detach().double().reshape(groups, outputs // groups, -1) for part in (weight, quantized))
    power = used.square().sum(1)
    index = (groups * weight.shape[1], -1, 1) if weight.ndim == 4 else (weight.shape[1],)
    rho, rest = (
        torch.where(power > 0, (used * other).sum(1) / power.clamp(min=torch.finfo(power.dtype).tiny), 0.0)
        for other in (used - exact, exact)
    )
    wide = torch.promote_types(weight.dtype, torch.float32)
    return rho.to(wide).reshape(index), rest.to(wide).reshape(index)


def positions_as_outputs(weight: Float[Tensor, "o p i j"]) -> Float[Tensor, "outputs p 1 1"]:
    """Make every kernel position an output of its own, for a border that all positions of a channel share."""
    return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1], 1, 1)


def closed_form_border(
    weight: Float[Tensor, "o *window"],
    quantized: Float[Tensor, "o *window"],
    *,
    low: float,
    high: float,
    groups: int = 1,
    propagated: Float[Tensor, "terms c"] | None = None,
    degree: int = 2,
) -> Float[Tensor, "powers *index"]:
    """Return the closed-form border as a polynomial of the position $v = (u - low) / (high - low)$, not bounded.

    Args:
        weight: Float weight of a convolution or a linear layer.
        quantized: The weight as it enters the product.
        low: Code coordinate of the smallest level, `qmin - zero_point`.
        high: Code coordinate of the largest level.
        groups: Of the convolution.
        propagated: `PropagatedError.regression()` of the input of the layer. None leaves out the error of the layers
            before.
        degree: Of the result, at least 1 and at least that of `propagated`.

    Returns:
        Coefficients of 1, v, v^2, ...: `[degree + 1, channels, kh * kw, 1]`, or `[degree + 1, features]`.

    Raises:
        SpecError: `low` is not below `high`.
        RangeError: The degree is too small.
        ShapeError: The weights or the propagated error do not fit one another.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, eq. 7, for one output. The sum over outputs is ours: the sum of the
        squares of eq. 6 is least where the rounding error is one half less the border.
    """
    _check_range(low, high)
    terms = 0 if propagated is None else len(propagated)
    if degree < max(1, terms - 1):
        raise RangeError(f"degree={degree}: the border has degree {max(1, terms - 1)} at least")
    rho, rest = weight_terms(weight, quantized, groups=groups)
    out = rho.new_zeros(degree + 1, *rho.shape)
    out[0] = 0.5 + rho * low
    out[1] = rho * (high - low)
    if propagated is not None:
        if propagated.shape[1:] != rho.shape[:1]:
            raise ShapeError(
                f"propagated error of shape {tuple(propagated.shape)} with {rho.shape[0]} channels: give the one of "
                "this layer's input"
            )
        each = propagated.reshape(terms, -1, *[1] * (rho.ndim - 1)).to(rho)
        out[:terms] += rest * each
    return out


def border_coefficients(border: Float[Tensor, "powers *index"]) -> Float[Tensor, "powers *index"]:
    r"""Turn a polynomial for the border into coefficients for `LearnedBorder`.

    Every bound is $\tfrac12 + 0.625\,z$ to first order, and that is inverted: $z = (B - \tfrac12) / 0.625$. `rectified`
    then gives a border that is off by less than 0.026 everywhere, `steep` by less than 0.12, and none where the border
    is one half.

    Args:
        border: Coefficients of the border itself.

    Returns:
        Coefficients of $z$; the shape is kept.
    """
    shifted = border.clone()
    shifted[0] -= 0.5
    return shifted / INITIAL_SLOPE


@final
class PropagatedError:
    r"""Fits the error that arrives at the input of a layer, $\mathbb{E}[e \mid u] / s$, by a polynomial per channel.

    Only sums over batches are kept, in float64. Elements at or beyond an end of the range are left out, and so are the
    zeros of a ReLU: whatever the border, these go to the end.

    Args:
        channels: Channels, or features of a linear layer.
        scale: Of the input quantizer, broadcastable to the input.
        low: Code coordinate of the smallest level, `qmin - zero_point`.
        high: Code coordinate of the largest level.
        degree: Of the polynomial.
        axis: Axis of the channels in the input; -1 for a linear layer.

    Raises:
        SpecError: `low` is not below `high`.
        RangeError: A degree or a number of channels that is not allowed.

    Source:
        Li et al. 2022 (AQuant), arXiv:2208.11945, section 4.2 and figure 2: a quadratic fits the propagated error.
    """

    def __init__(
        self,
        channels: int,
        *,
        scale: Float[Tensor, "..."],
        low: float,
        high: float,
        degree: int = 2,
        axis: int = 1,
    ) -> None:
        _check_range(low, high)
        if degree < 0 or channels < 1:
            raise RangeError(f"degree={degree}, channels={channels}: at least 0 and 1")
        self.scale, self.low, self.high, self.degree, self.axis = scale.detach(), low, high, degree, axis
        self._powers = torch.zeros(2 * degree + 1, channels, dtype=torch.float64, device=scale.device)
        self._products = torch.zeros(degree + 1, channels, dtype=torch.float64, device=scale.device)

    @property
    def count(self) -> Float64[Tensor, " c"]:
        """Number of elements that entered the fit of each channel."""
        return self._powers[0]

    def add(self, noised: Float[Tensor, "*shape"], exact: Float[Tensor, "*shape"]) -> None:
        """Take one batch.

        Args:
            noised: Input of the layer in the network that is quantized up to it.
            exact: Input of the layer in the float network.

        Raises:
            ShapeError: The two differ in shape, or have another number of channels.
            DataError: A value that counts is not finite.
        """
        channels = self._powers.shape[1]
        if noised.shape != exact.shape or noised.ndim == 0 or noised.shape[self.axis] != channels:
            raise ShapeError(
                f"inputs of shape {tuple(noised.shape)} and {tuple(exact.shape)}: both must have {channels} channels "
                f"on axis {self.axis}"
            )
        u = (noised.detach() / self.scale).double()
        error = ((noised - exact).detach() / self.scale).double()
        v = ((u - self.low) / (self.high - self.low)).movedim(self.axis, 0).flatten(1)
        error = error.movedim(self.axis, 0).flatten(1)
        decided = (v <= 0) | (v >= 1)
        error = error.masked_fill(decided, 0.0)
        v = v.masked_fill(decided, 0.0)
        if not bool(torch.isfinite(error.sum() + v.sum())):
            raise DataError("the input of a layer holds values that are not finite: the propagated error has no fit")
        power = (~decided).double()
        for exponent in range(len(self._powers)):
            self._powers[exponent] += power.sum(1)
            if exponent < len(self._products):
                self._products[exponent] += (power * error).sum(1)
            power = power * v

    def regression(self) -> Float64[Tensor, "terms c"]:
        r"""Return the least-squares fit of $e / s$.

        Returns:
            Coefficients of 1, v, v^2, ... per channel, the smallest ones where the data leave a choice: 0 for a channel
            without data.
        """
        terms = torch.arange(self.degree + 1, device=self._powers.device)
        normal = self._powers.T[:, terms.unsqueeze(0) + terms.unsqueeze(1)]
        # A channel that uses a small part of its range has nearly dependent powers: 1e-13 of the largest eigenvalue is
        # where the sums, in float64, no longer know better.
        inverse = torch.linalg.pinv(normal, rtol=1e-13, hermitian=True)
        fit: Tensor = inverse @ self._products.T.unsqueeze(2)
        return fit.squeeze(2).T


def _check_range(low: float, high: float) -> None:
    if not low < high:
        raise SpecError(f"codes from {low} to {high}: low must be below high")
