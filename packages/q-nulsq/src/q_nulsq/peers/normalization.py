r"""Weights brought to a common size before they are quantized: modules for the transform of a `q_core.Quantizer`.

A clip that is learned for weights chases them: they grow and shrink while it learns. Normalised weights stay where they
are, and one start of the clip fits all layers.

$$ \tilde W = \frac{W - \mu}{\sigma + \epsilon} \quad \text{(APoT, LCQ)}, \qquad
   \tilde W = \frac{W}{\gamma\, \overline{|W|}}, \quad \gamma = \frac{2^b - 1}{2^{b-1}} \quad \text{(N2UQ)} $$

The quantized weights are then of that size too. A batch norm that follows takes the factor out again: in training the
function of the network is the same with and without it, but running statistics of before do not fit. Where none
follows, as in transformers, the factor changes the network, and `restore` gives it back.

Whether a gradient flows through $\mu$, $\sigma$ and $\overline{|W|}$ is the choice `through_statistics`: the public
code of these papers holds them constant, and so does the default here; the papers themselves do not say. With it the
gradient is that of the formula: orthogonal to $1$ and, but for $\epsilon$, to $\tilde W$.

Source: Li, Dong, Wang 2020 (APoT), arXiv:1909.13144, section on weight normalization; Yamamoto 2021 (LCQ),
arXiv:2103.07156, section on limited weight normalization; Liu et al. 2022 (N2UQ), arXiv:2111.14826, section on entropy
preserving weight regularization.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core.errors import RangeError, SpecError
from q_core.functional import broadcast_scale


@final
class WeightNormalization(nn.Module):
    r"""Subtract the mean of a weight and divide by its standard deviation, of the whole tensor.

    LCQ limits the normalisation to the quantizer: what is quantized is multiplied by the deviation again. That is
    `restore`; a quantizer with this module as its transform does the first half only.

    Args:
        through_statistics: Whether the gradient flows through the mean and the deviation.
        epsilon: Added to the deviation, so that a weight of equal elements becomes zero.

    Raises:
        RangeError: `epsilon` is not positive.

    Gradient:
        $1/(\sigma + \epsilon)$ while the statistics are held constant; else that of the formula.
    """

    def __init__(self, *, through_statistics: bool = False, epsilon: float = 1e-5) -> None:
        super().__init__()
        if not epsilon > 0:
            raise RangeError(f"epsilon={epsilon}: it must be positive; 1e-5 is usual")
        self.through_statistics, self.epsilon = through_statistics, epsilon

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalise, in float32 or wider."""
        mean, deviation = self._statistics(x)
        return (_wide(x) - mean) / deviation

    def restore(self, levels: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give quantized weights the deviation of `x`, from which they were made; its mean stays out."""
        return levels * self._statistics(x)[1]

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        source = _wide(x if self.through_statistics else x.detach())
        # One element has no unbiased deviation; it becomes zero like any weight of equal elements.
        return source.mean(), source.std(correction=min(1, x.numel() - 1)) + self.epsilon

    def extra_repr(self) -> str:
        """Show the choices."""
        return f"through_statistics={self.through_statistics}, epsilon={self.epsilon}"


@final
class MeanMagnitude(nn.Module):
    r"""Divide a weight by its mean magnitude times $(2^b - 1)/2^{b-1}$, for each index of its first axis.

    Then all codes of `N2uqWeightGrid` are used equally often, if the magnitudes are uniform.

    Args:
        bits: Bit width $b$ of the codes, 1 to 8.
        through_statistics: Whether the gradient flows through the mean magnitude.

    Raises:
        SpecError: `bits` outside 1 to 8.

    Gradient:
        One over the divisor while the mean is held constant; else that of the formula.
    """

    def __init__(self, bits: int, *, through_statistics: bool = False) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise SpecError(f"bits={bits}: supported are 1 to 8")
        self.bits, self.through_statistics = bits, through_statistics

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalise, in float32 or wider; a channel of zeros stays zero."""
        return _wide(x) / self._divisor(x)

    def restore(self, levels: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give quantized weights the size of `x`, from which they were made."""
        return levels * self._divisor(x)

    def _divisor(self, x: Tensor) -> Tensor:
        source = _wide(x if self.through_statistics else x.detach())
        mean = source.abs().reshape(x.shape[0], -1).mean(1)
        mean = torch.where(mean > torch.finfo(mean.dtype).tiny, mean, torch.ones_like(mean))
        factor = (2**self.bits - 1) / 2 ** (self.bits - 1)
        return broadcast_scale(factor * mean.reshape(-1, *(1,) * (x.ndim - 1)), tuple(x.shape))

    def extra_repr(self) -> str:
        """Show the choices."""
        return f"bits={self.bits}, through_statistics={self.through_statistics}"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
