"""Adder layers with the arguments of torch's own.

`AdderConv2d` and `AdderLinear` subclass torch's layers so that `weight` and `bias` keep their keys. Their weights start
from a standard normal distribution, because a kernel is compared with activations of that size, not multiplied by them.
"""

import math
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from q_adder.functional import adder2d, adder_linear, adder_matmul, check_exponent, pad
from q_core.errors import MatchError, RangeError

_PLACE_OF_BIAS_IN_CONV2D, _PLACE_OF_BIAS_IN_LINEAR = 8, 3  # counted from 1


@final
class AdderConv2d(nn.Conv2d):
    """A convolution that sums absolute differences.

    Takes the arguments of `torch.nn.Conv2d`, in the same places; there is no bias unless asked for, because a batch
    norm must follow. Padded pixels are taps like any other, in every `padding_mode`.

    Outputs lie far from zero and close to each other. Under `torch.autocast` they are float32; a layer that is cast by
    `.bfloat16()` or `.half()` returns that dtype and loses most of what tells outputs apart, and in float16 they become
    minus infinity below -65504, see `q_adder.functional.adder2d`.

    Args:
        *args: As `torch.nn.Conv2d`.
        exponent: Power of the absolute difference, from 1 (the adder operator) to 2; see `anneal_exponent`. Not part of
            the state dict: the schedule sets it.
        **kwargs: As `torch.nn.Conv2d`.

    Raises:
        RangeError: `exponent` outside 1 to 2.

    Source:
        Chen et al. 2020, arXiv:1912.13200; initialisation as released.
    """

    exponent: float

    def __init__(self, *args: Any, exponent: float = 1.0, **kwargs: Any) -> None:
        check_exponent(exponent)
        if len(args) < _PLACE_OF_BIAS_IN_CONV2D:
            kwargs.setdefault("bias", False)
        super().__init__(*args, **kwargs)
        self.exponent = exponent

    def reset_parameters(self) -> None:
        """Draw the weight from a standard normal distribution and the bias from the unit interval."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.uniform_(self.bias)

    def extra_repr(self) -> str:
        """Show the arguments, and the exponent while it is not that of the adder operator."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call, unused-ignore]  # torch gives it no type
        return shown if self.exponent == 1.0 else f"{shown}, exponent={self.exponent:g}"

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Return minus the distance between every window and every kernel, of a batch or of one image."""
        return adder2d(
            pad(x, self),
            self.weight,
            self.bias,
            stride=(self.stride[0], self.stride[1]),
            dilation=(self.dilation[0], self.dilation[1]),
            groups=self.groups,
            exponent=self.exponent,
        )


@final
class AdderLinear(nn.Linear):
    """A linear layer that sums absolute differences.

    Takes the arguments of `torch.nn.Linear`, in the same places; there is no bias unless asked for. Under autocast it
    returns float32, as `AdderConv2d` does.

    Args:
        *args: As `torch.nn.Linear`.
        exponent: Power of the absolute difference, from 1 to 2; as `AdderConv2d`.
        **kwargs: As `torch.nn.Linear`.

    Raises:
        RangeError: `exponent` outside 1 to 2.
    """

    exponent: float

    def __init__(self, *args: Any, exponent: float = 1.0, **kwargs: Any) -> None:
        check_exponent(exponent)
        if len(args) < _PLACE_OF_BIAS_IN_LINEAR:
            kwargs.setdefault("bias", False)
        super().__init__(*args, **kwargs)
        self.exponent = exponent

    def reset_parameters(self) -> None:
        """Draw the weight from a standard normal distribution and the bias from the unit interval."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.uniform_(self.bias)

    def extra_repr(self) -> str:
        """Show the arguments, and the exponent while it is not that of the adder operator."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call, unused-ignore]  # torch gives it no type
        return shown if self.exponent == 1.0 else f"{shown}, exponent={self.exponent:g}"

    def forward(self, input: Float[Tensor, "*n k"]) -> Float[Tensor, "*n o"]:
        """Return minus the distance between every row of the input and every row of the weight."""
        return adder_linear(input, self.weight, self.bias, exponent=self.exponent)


@final
class AdderMatmul(nn.Module):
    """The distances of the rows of two activations, as a module so that quantization can find it.

    Both operands are activations; there are no parameters. See `q_adder.functional.adder_matmul`.
    """

    def forward(self, a: Float[Tensor, "*b n k"], b: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b n m"]:
        """Return minus the distance between every row of `a` and every row of `b`."""
        return adder_matmul(a, b)


def anneal_exponent(model: nn.Module, progress: float) -> None:
    """Set the exponent of every adder layer on the straight line from 2 to 1, in place.

    Args:
        model: A model with adder layers.
        progress: Fraction of the annealing that is done; beyond 0 to 1 the exponent stays at its end.

    Raises:
        MatchError: The model has no adder layer.
        RangeError: `progress` is not a number.

    Source:
        Xu et al. 2021, arXiv:2105.14202.
    """
    if math.isnan(progress):
        raise RangeError("progress=nan: it is the fraction of the annealing that is done")
    layers = [module for module in model.modules() if isinstance(module, AdderConv2d | AdderLinear)]
    if not layers:
        raise MatchError(
            f"{type(model).__name__} has no AdderConv2d and no AdderLinear: there is no exponent to anneal"
        )
    for layer in layers:
        layer.exponent = 2.0 - min(1.0, max(0.0, progress))
