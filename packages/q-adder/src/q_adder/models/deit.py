r"""The tiny data-efficient vision transformer with additions instead of products.

Linear layers, the attention map $QK^\top$ and its product with the values become distances, and an identity mapping
gives back the rank that the map loses (Shu et al. 2021). That much is published; no formulas or code are. These are
ours:

- **Normalisation.** A distance is large and negative, and every output has an offset of its own. So a batch norm over
  images and tokens follows every adder layer and every product with the values. Folded, it is one factor and one offset
  per channel; a layer norm cannot take out offsets that differ between channels, which hide the tokens' differences.
- **Attention map.** $S = -\lVert q_n - k_m \rVert_1 / \sqrt{d}$, and $P = N\,\mathrm{softmax}(S)$ for $N$ tokens.
  Softmax does not see the offset of $S$. Rows that sum to $N$ have entries of the size of the values they are compared
  with. With rows that sum to 1, $|P - V|$ is nearly $|V|$ whatever the token: of 197 random tokens, the differences
  between tokens are below 0.01 % of the variance of $P \oplus V$, against 19 % so and 64 % in the ordinary product.
- **Identity mapping.** Adding $I$ to the map adds $V$ to the product, in a transformer that multiplies. The sum
  $\mathrm{norm}(P \oplus V) + V$ is taken in that form, because inside a distance the addition saturates: it moves
  $|P_{nm} - V_{mj}|$ by 1 at most. For the same tokens $P \oplus V$ has an effective rank of 3.1 of 64 and the sum
  one of 18, that of the ordinary product (19); $I$ inside the map leaves it at 3.2. Effective rank is the exponential
  of the entropy of the squared singular values.
- **Place of the multiplications.** The patch embedding, the classifier, the norms, the softmax and GELU stay as
  they are.

The twin of products is the ordinary transformer, whose linear layers have a bias and no batch norm.
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_adder.layers import AdderLinear, AdderMatmul
from q_core import QuantAdd
from q_core.errors import RangeError, ShapeError

_RATIO = 4  # width of the hidden layer relative to that of the tokens
_SPREAD = 0.02  # standard deviation of the embeddings at the start, as in Touvron et al.


@final
class TokenNorm(nn.Module):
    """A batch norm per channel over images and tokens.

    Args:
        channels: Size of the last dimension.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        """Normalise every channel."""
        out: Tensor = self.norm(x.flatten(0, 1))
        return out.reshape(x.shape)


@final
class ProductMatmul(nn.Module):
    """The product of the rows of two activations, as a module so that quantization and counting find it."""

    def forward(self, a: Float[Tensor, "*b n k"], b: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b n m"]:
        """Return the inner product of every row of `a` and every row of `b`."""
        return a @ b.mT


def adder_linear_norm(inputs: int, outputs: int) -> nn.Sequential:
    """Make an adder layer and the norm that must follow it.

    Args:
        inputs: Size of a token.
        outputs: Outputs per token.

    Returns:
        A module from [n, t, inputs] to [n, t, outputs].
    """
    return nn.Sequential(AdderLinear(inputs, outputs), TokenNorm(outputs))


def _split(x: Tensor, heads: int) -> Tensor:
    """Tokens [n, t, c] as heads [n, heads, t, c / heads]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@final
class AdderAttention(nn.Module):
    """Attention by distances, with the identity mapping.

    Args:
        width: Size of a token.
        heads: Attention maps.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = adder_linear_norm(width, width)
        self.key = adder_linear_norm(width, width)
        self.value = adder_linear_norm(width, width)
        self.similarity = AdderMatmul()
        self.mixing = AdderMatmul()
        self.norm = TokenNorm(width)
        self.identity = QuantAdd()
        self.projection = adder_linear_norm(width, width)

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        """Let every token see every other."""
        value = self.value(x)
        query, key, values = (_split(part, self.heads) for part in (self.query(x), self.key(x), value))
        scores = self.similarity(query, key) * query.shape[-1] ** -0.5
        attention = scores.softmax(-1) * x.shape[1]
        mixed = self.norm(_merge(self.mixing(attention, values.mT)))
        out: Tensor = self.projection(self.identity(mixed, value))
        return out


@final
class ProductAttention(nn.Module):
    """Ordinary attention, with the keys of `AdderAttention`.

    Args:
        width: Size of a token.
        heads: Attention maps.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.similarity = ProductMatmul()
        self.mixing = ProductMatmul()
        self.projection = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        """Let every token see every other."""
        query, key, values = (_split(part(x), self.heads) for part in (self.query, self.key, self.value))
        scores = self.similarity(query, key) * query.shape[-1] ** -0.5
        out: Tensor = self.projection(_merge(self.mixing(scores.softmax(-1), values.mT)))
        return out


@final
class TransformerBlock(nn.Module):
    """Attention and two linear layers, each beside a shortcut and behind a layer norm.

    Args:
        width: Size of a token.
        attention: From tokens to tokens.
        linear: Makes a linear layer from its number of inputs and outputs, with the norm that it needs.
    """

    def __init__(self, width: int, attention: nn.Module, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.add1 = QuantAdd()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(linear(width, _RATIO * width), nn.GELU(), linear(_RATIO * width, width))
        self.add2 = QuantAdd()

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        """Transform the tokens."""
        x = self.add1(self.attention(self.norm1(x)), x)
        out: Tensor = self.add2(self.mlp(self.norm2(x)), x)
        return out


def adder_block(width: int, heads: int) -> TransformerBlock:
    """Make a block that adds.

    Args:
        width: Size of a token.
        heads: Attention maps; they divide the width.

    Returns:
        The block.
    """
    return TransformerBlock(width, AdderAttention(width, heads), adder_linear_norm)


def product_block(width: int, heads: int) -> TransformerBlock:
    """Make an ordinary block.

    Args:
        width: Size of a token.
        heads: Attention maps; they divide the width.

    Returns:
        The block.
    """
    return TransformerBlock(width, ProductAttention(width, heads), nn.Linear)


@final
class VisionTransformer(nn.Module):
    """Patches of an image as tokens, a class token, a stack of blocks, and a linear layer on the class token.

    Args:
        classes: Outputs.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels.
        depth: Number of blocks.
        width: Size of a token.
        heads: Attention maps per block.
        block: Makes a block from `width` and `heads`.

    Raises:
        RangeError: `heads` does not divide `width`, or `patch_size` does not divide `image_size`.
    """

    def __init__(
        self,
        classes: int,
        *,
        image_size: int,
        patch_size: int,
        depth: int,
        width: int,
        heads: int,
        block: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        if width % heads:
            raise RangeError(f"heads={heads} with width={width}: heads must divide the width")
        if image_size % patch_size:
            raise RangeError(
                f"patch_size={patch_size} with image_size={image_size}: the patches must divide the image; "
                "4 suits images of 32, 16 images of 224"
            )
        self.image_size = image_size
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.class_token, std=_SPREAD)
        nn.init.trunc_normal_(self.position, std=_SPREAD)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of normalised images.

        Raises:
            ShapeError: The images have another size than the network was built for.
        """
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ShapeError(
                f"images of {x.shape[-2]} x {x.shape[-1]} pixels in a network for {self.image_size} x "
                f"{self.image_size}: resize them, or build the network with another image_size"
            )
        patches = self.patch_embedding(x).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def deit_tiny(
    classes: int = 1000,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    depth: int = 12,
    width: int = 192,
    heads: int = 3,
    block: Callable[[int, int], nn.Module] = adder_block,
) -> VisionTransformer:
    """Build the adder DeiT-Tiny, or its twin with `block=product_block`; smaller ones for smaller images.

    Args:
        classes: Outputs.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels.
        depth: Number of blocks.
        width: Size of a token.
        heads: Attention maps per block.
        block: Makes a block from `width` and `heads`.

    Returns:
        A network of 5.7 million parameters for images [n, 3, 224, 224], or one as asked for.

    Raises:
        RangeError: `heads` does not divide `width`, or `patch_size` does not divide `image_size`.

    Source:
        Touvron et al. 2021, arXiv:2012.12877 (without distillation); with additions after Shu et al. 2021 (NeurIPS,
        "Adder Attention for Vision Transformer"), of which only the idea is published: see the head of this module.
    """
    return VisionTransformer(
        classes,
        image_size=image_size,
        patch_size=patch_size,
        depth=depth,
        width=width,
        heads=heads,
        block=block,
    )
