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

_BITS_OF_BYTE = torch.tensor([[byte >> bit & 1 for bit in range(8)] for byte in range(256)], dtype=torch.uint8)
"""What each byte says about eight elements, [256, 8]."""


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
        """Draw a mask of the shape of `like` and in its order of memory, True with the given probability."""
        count = like.numel() * self.world
        if probability == 0.5 and like.device.type == "cpu":
            mask = self._fair(count)
        else:
            mask = torch.rand(count, generator=self.generator, device=like.device) < probability
        own = mask[self.rank * like.numel() : (self.rank + 1) * like.numel()]
        if not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
            images, channels, rows, columns = like.shape
            return own.view(images, rows, columns, channels).permute(0, 3, 1, 2)
        return own.view(like.shape)

    def _fair(self, count: int) -> Tensor:
        # One random bit an element, 64 of them from one draw: many times faster than a uniform float each.
        words = torch.empty(-(-count // 64), dtype=torch.int64)
        words.random_(torch.iinfo(torch.int64).min, None, generator=self.generator)
        # Eight elements at a time are looked up as one number, which is much faster than shifting bits apart.
        eights = _BITS_OF_BYTE.view(torch.int64).squeeze(1).index_select(0, words.view(torch.uint8).int())
        return eights.view(torch.bool)[:count]


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
    # Exact at both ends, and on a CPU several times faster than torch.where, which reads its condition byte by byte.
    # So is the conversion, of bytes instead of bools.
    own = draws.keep(quantized, probability).view(torch.uint8).to(quantized.dtype)
    return torch.lerp(original, quantized, own)


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
