"""The deployment form of layers that quantize patches, and what their borders cost.

The decisions on weights are in the packed codes, and nothing else of them remains. The border of an activation must
come along, because the activations do; it stays a rounding like any other, in the quantizer of the patches. With this
module imported, `pack`, `save_packed`, `load_packed` and `bits_per_weight` of q_core know these layers.
"""

from typing import Any, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_aquant.border import FusedBorder, LearnedBorder
from q_aquant.drop import RandomDrop
from q_aquant.layers import PatchConv2d, convolve_patches, pad_input
from q_aquant.thresholds import ThresholdRounding
from q_core.checkpoint import describe, rebuild
from q_core.errors import FormatError, StateError
from q_core.layers import conv_arguments
from q_core.packed import PackedTensor, packed_form, stored
from q_core.quantizer import Quantizer

_Conv = TypeVar("_Conv", bound=nn.Conv2d)


@final
class PackedPatchConv2d(nn.Conv2d):
    """A convolution that quantizes the patches of its input, and whose weight is stored as packed codes.

    Made by `q_core.pack`; the arguments are those of `torch.nn.Conv2d`. A weight that stays float stays a parameter.
    """

    packed_weight: PackedTensor | None
    patch_quantizer: nn.Module

    @classmethod
    def from_layer(
        cls, layer: nn.Conv2d, packed_weight: PackedTensor | None, patch_quantizer: nn.Module
    ) -> "PackedPatchConv2d":
        """Take the geometry and the bias of a convolution, and its weight where no other is given."""
        bare = adopt(cls(**conv_arguments(layer), device="meta"), layer, packed_weight)
        bare.patch_quantizer = patch_quantizer
        return bare

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Convolve the quantized patches with the unpacked weight."""
        weight = self.weight if self.packed_weight is None else self.packed_weight(x.dtype)
        batch = x if x.ndim == 4 else x.unsqueeze(0)
        out = convolve_patches(pad_input(batch, self), weight, self.bias, self.patch_quantizer, self)
        return out if x.ndim == 4 else out.squeeze(0)


def adopt(bare: _Conv, layer: nn.Conv2d, packed_weight: PackedTensor | None) -> _Conv:
    """Give a convolution that was built without memory the bias of another, and the weight where none is packed."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if packed_weight is not None:
        del bare._parameters["weight"]
    elif weight is not None:
        bare.weight = weight
    if bias is not None:
        bare.bias = nn.Parameter(bias.detach(), requires_grad=False)
    setattr(bare, "packed_weight", packed_weight)  # noqa: B010 - the type of the layer declares it
    return bare.train(layer.training)


def border_bits(model: nn.Module) -> int:
    """Count the bits that the borders of a model take: coefficients, weights of fused borders, or thresholds.

    Args:
        model: A packed model, or one before.
    """
    kinds = LearnedBorder | FusedBorder | ThresholdRounding
    borders = [module for module in model.modules() if isinstance(module, kinds)]
    tensors = {id(tensor): tensor for border in borders for tensor in [*border.parameters(), *border.buffers()]}
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values())


@packed_form.register
def _(module: PatchConv2d) -> nn.Module:
    quantizer = module.weight_quantizer
    if isinstance(quantizer, nn.Identity):
        return PackedPatchConv2d.from_layer(module, None, module.patch_quantizer)
    if not isinstance(quantizer, Quantizer):
        raise StateError(
            f"weight_quantizer holds a {type(quantizer).__name__}: a packed weight needs the codes of a Quantizer"
        )
    weight = PackedTensor.from_quantizer(module.weight, quantizer)
    return PackedPatchConv2d.from_layer(module, weight, module.patch_quantizer)


@packed_form.register
def _(module: RandomDrop) -> nn.Module:
    raise StateError(
        "the model drops quantization at random: finish the reconstruction, which puts the quantizer itself back, "
        "before pack()"
    )


@describe.register
def _(module: PackedPatchConv2d) -> dict[str, Any]:
    return {"packed": module.packed_weight is not None}


@stored.register
def _(module: PackedPatchConv2d) -> tuple[int, int]:
    if module.packed_weight is None:
        return module.weight.numel() * module.weight.element_size() * 8, module.weight.numel()
    return module.packed_weight.stored_bits(), torch.Size(module.packed_weight.shape).numel()


@rebuild.register(PackedPatchConv2d)
def _(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    if not isinstance(layer, nn.Conv2d):
        raise FormatError(f"the layer is a {type(layer).__name__}, the file has a convolution of patches")
    bare = PackedPatchConv2d.from_layer(layer, None, nn.Identity())
    if entry["packed"]:
        del bare._parameters["weight"]
    return bare
