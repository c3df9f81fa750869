"""Dropping quantization at random, so that what is learned does not lean on one particular error.

QDrop replaces quantized activations by their float originals, element by element with a probability: at the input of a
unit (`mix`) and inside it (`RandomDrop`). Both draw from a generator that the caller owns. Where several processes
share one batch each draws for the whole of it and takes its own rows, so that they learn what one process would.
"""

import dataclasses
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from q_core import Quantizer, UniformGrid
from q_core.errors import RangeError


@dataclasses.dataclass
class Draws:
    """A source of random masks for the rows that one process holds of a batch.

    Attributes:
        generator: Owned by the caller; on the device of the activations.
        rank: Which part of the batch this process holds.
        world: How many equal parts there are.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def keep(self, like: Float[Tensor, "*shape"], probability: float) -> Bool[Tensor, "*shape"]:
        """Draw a mask of the shape of `like`, True with the given probability."""
        shape = (like.shape[0] * self.world, *like.shape[1:])
        if probability == 0.5 and like.device.type == "cpu":
            mask = self._fair(shape)
        else:
            mask = torch.rand(shape, generator=self.generator, device=like.device) < probability
        return mask[self.rank * like.shape[0] : (self.rank + 1) * like.shape[0]]

    def _fair(self, shape: tuple[int, ...]) -> Tensor:
        # One random byte an element, eight of them from one draw: several times faster than a uniform float each.
        count = torch.Size(shape).numel()
        words = torch.empty(-(-count // 7), dtype=torch.int64).random_(generator=self.generator)
        # random_() of int64 draws 63 bits: the highest byte of a word would be biased, so seven of eight serve.
        return (words.view(torch.uint8).reshape(-1, 8)[:, :7].reshape(-1)[:count] < 128).reshape(shape)


def mix(
    quantized: Float[Tensor, "*shape"], original: Float[Tensor, "*shape"], probability: float, draws: Draws
) -> Float[Tensor, "*shape"]:
    """Take each element from the quantized network with the given probability, from the float one otherwise.

    Args:
        quantized: Input of the unit in the quantized network.
        original: Input of the unit in the float network.
        probability: Of the quantized element, in [0, 1]. 1 is BRECQ's input, 0.5 QDrop's.
        draws: Where the mask comes from.

    Source:
        Wei et al. 2022 (QDrop), arXiv:2203.05740, as released.
    """
    if probability in (0, 1):
        return quantized if probability else original
    return torch.where(draws.keep(quantized, probability), quantized, original)


@final
class RandomDrop(nn.Module):
    """A quantizer that quantizes each element with a probability only.

    It sits in a slot for the time of reconstruction, around the quantizer, which then goes back into the slot.

    Args:
        quantizer: The quantizer.
        probability: Of an element to be quantized, in [0, 1].
        draws: Where the masks come from.

    Raises:
        RangeError: A probability outside [0, 1].

    Source:
        Wei et al. 2022 (QDrop), arXiv:2203.05740, eq. 8 and 9.
    """

    def __init__(self, quantizer: nn.Module, probability: float, draws: Draws) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise RangeError(f"probability={probability}: it must be in [0, 1]")
        self.quantizer, self.probability, self.draws = quantizer, probability, draws

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Quantize a random part of the elements."""
        inner = self.quantizer
        if isinstance(inner, Quantizer) and isinstance(inner.grid, UniformGrid) and self.probability not in (0, 1):
            # In one pass over the tensor, which does not quantize what is dropped and keeps one tensor and the mask.
            where = self.draws.keep(x, self.probability)
            return inner.grid.fake_quantize(x, inner.rounding, where).to(x.dtype)
        quantized: Tensor = inner(x)
        return mix(quantized, x, self.probability, self.draws)
