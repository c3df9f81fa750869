"""A convolution whose input is quantized where it is used: unfolded, once for every kernel position.

An element of the input takes part in as many windows as the kernel has positions, and a rounding that depends on the
position, or on the other elements of the window, sends it to a level of its own in each. The unfolded tensor is many
times larger than the input, so it is built for a few images at a time, and again in the backward pass. The borders that
reconstruction learns take an operator that builds no more of it than a cache holds, see `q_aquant.ops`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from q_aquant.border import FusedBorder, LearnedBorder, rectified
from q_aquant.drop import RandomDrop
from q_aquant.ops import border_conv2d, border_quantize, unfold_patches
from q_aquant.roundings import Gradual
from q_core.functional import scale_gradient
from q_core.grid import UniformGrid
from q_core.layers import QuantConv2d, conv_arguments
from q_core.quantizer import Quantizer

_PANEL = 1 << 18
"""Elements of the unfolded tensor that are held at once, 1 MiB of float32: what stays in a cache beside the rest."""


def pad_input(x: Float[Tensor, "n c h w"], layer: nn.Conv2d) -> Float[Tensor, "n c i j"]:
    """Pad an input as the layer would, so that nothing is left to pad."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


@final
class PatchConv2d(nn.Conv2d):
    """A convolution with a slot for its weight and one for the patches of its input.

    Takes the arguments of `torch.nn.Conv2d`. With both slots empty it computes the same. The module in
    `patch_quantizer` gets patches `[n, c, k, l]`, padding included; it must treat images apart from one another,
    because it sees a few at a time.
    """

    weight_quantizer: nn.Module
    patch_quantizer: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quantizer = nn.Identity()
        self.patch_quantizer = nn.Identity()

    @classmethod
    def from_quantized(cls, layer: QuantConv2d, patch_quantizer: nn.Module) -> "PatchConv2d":
        """Wrap the very tensors and the weight quantizer of a layer that quantized its input as a whole."""
        bare = cls(**conv_arguments(layer), device="meta")
        for name, parameter in layer.named_parameters(recurse=False):
            bare.register_parameter(name, parameter)
        bare.weight_quantizer, bare.patch_quantizer = layer.weight_quantizer, patch_quantizer
        return bare.train(layer.training)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Convolve the quantized patches with the quantized weight."""
        weight = self.weight_quantizer(self.weight)
        batch = x if x.ndim == 4 else x.unsqueeze(0)
        out = convolve_patches(pad_input(batch, self), weight, self.bias, self.patch_quantizer, self)
        return out if x.ndim == 4 else out.squeeze(0)

    def patch_shape(self) -> tuple[int, int, int]:
        """Shape of a parameter that belongs to every channel and kernel position of a patch."""
        return (self.in_channels, self.kernel_size[0] * self.kernel_size[1], 1)


def convolve_patches(
    x: Float[Tensor, "n c h w"],
    weight: Float[Tensor, "o p i j"],
    bias: Float[Tensor, " o"] | None,
    quantizer: Callable[[Tensor], Tensor],
    layer: nn.Conv2d,
) -> Float[Tensor, "n o y z"]:
    """Convolve a padded input, quantizing its patches, a few images at a time.

    Args:
        x: Padded input.
        weight: Weight as it enters the product.
        bias: One for each output, or None.
        quantizer: Of patches.
        layer: Gives stride, dilation and groups.

    Returns:
        The output. In the backward pass patches are built again, so that none outlives its turn; but not where they
        are quantized at random.
    """
    border = _Border.of(quantizer)
    if border is not None and border.fits(x, weight, bias):
        return border.convolve(x, weight, bias, layer)
    (high, wide), (down, across) = weight.shape[2:], layer.stride
    rows = (x.shape[2] - layer.dilation[0] * (high - 1) - 1) // down + 1
    columns = (x.shape[3] - layer.dilation[1] * (wide - 1) - 1) // across + 1
    # Random masks are drawn for the whole batch at once, and not again in the backward pass.
    random = isinstance(quantizer, RandomDrop)
    images = len(x) if random else max(1, _PANEL // max(1, x.shape[1] * high * wide * rows * columns))
    matrix = weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)

    def panel(part: Tensor, matrix: Tensor) -> Tensor:
        patches = quantizer(unfold_patches(part, (high, wide), (down, across), (layer.dilation[0], layer.dilation[1])))
        grouped = patches.reshape(len(part), layer.groups, -1, patches.shape[3])
        return (matrix @ grouped).reshape(len(part), weight.shape[0], rows, columns)

    def run(part: Tensor) -> Tensor:
        if random or not torch.is_grad_enabled():
            return panel(part, matrix)
        out: Tensor = checkpoint(panel, part, matrix, use_reentrant=False, preserve_rng_state=False)
        return out

    parts = [run(part) for part in torch.split(x, images)] if len(x) else [panel(x, matrix)]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if bias is None else out + bias.reshape(-1, 1, 1)


@dataclasses.dataclass(frozen=True)
class _Border:
    """A quantizer of patches that the operators of `q_aquant.ops` stand for: its parts.

    Attributes:
        grid: Uniform, with one scale.
        rounding: The border of every element.
        fusion: Weights that fuse the borders of a channel, or None.
        influence: How far the rounding counts, or None: wholly.
    """

    grid: UniformGrid
    rounding: LearnedBorder
    fusion: Tensor | None
    influence: Tensor | None

    @classmethod
    def of(cls, quantizer: Callable[[Tensor], Tensor]) -> "_Border | None":
        """Take a quantizer apart; None where it is anything else, or where somebody listens to its parts."""
        if type(quantizer) is not Quantizer or type(quantizer.grid) is not UniformGrid:
            return None
        parts: list[nn.Module] = [quantizer, quantizer.grid, quantizer.rounding]
        influence = fusion = None
        if type(parts[-1]) is Gradual:
            influence = parts[-1].influence
            parts.append(parts[-1].rounding)
        if type(parts[-1]) is FusedBorder:
            fusion = parts[-1].weights
            parts.append(parts[-1].elements)
        rounding = parts[-1]
        if type(rounding) is not LearnedBorder or rounding.bound is not rectified or rounding.degree > 2:
            return None
        if quantizer.grid.scale.numel() != 1 or any(map(_heard, parts)):
            return None
        return cls(quantizer.grid, rounding, fusion, influence)

    def fits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether an operator computes the same: one dtype throughout, and a border for channels and positions."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[no-untyped-call, attr-defined]
            return False  # the graph is to hold standard operators only
        if is_in_torch_dispatch_mode() and not torch.compiler.is_compiling():
            return False  # somebody looks at the single operations
        if torch.is_autocast_enabled(x.device.type):
            return False
        zero = self.grid.zero_point
        own = (self.grid.scale, zero, self.rounding.coefficients, self.fusion)
        there = [tensor for tensor in (x, weight, bias, *own) if tensor is not None]
        if x.dtype not in (torch.float32, torch.float64) or any(tensor.dtype != x.dtype for tensor in there):
            return False
        if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device != x.device for tensor in there):
            return False
        if zero is not None and zero.requires_grad:
            return False
        channels, positions = x.shape[1], weight.shape[2:].numel()
        index = self._index()
        if len(index) != 3 or index[2] != 1:
            return False
        # Not `in`: a compiler that treats the number of channels as a variable would find it in no tuple.
        whole = index[0] == channels and index[1] == positions
        shared = (index[0] == 1 or index[0] == channels) and (index[1] == 1 or index[1] == positions)
        return whole or (shared and self.fusion is None)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
        """Convolve; where the positions share a border, quantize the whole input first."""
        channels, positions = x.shape[1], weight.shape[2:].numel()
        index, grid = self._index(), self._grid()
        terms = self.rounding.coefficients.reshape(-1, *index[:2])
        codes = [float(code) for code in (self.grid.qmin, self.grid.qmax, self.rounding.low, self.rounding.high)]
        if index[1] == 1 and self.fusion is None:
            levels = border_quantize(x, grid, terms.squeeze(2).expand(-1, channels), codes)
            return F.conv2d(levels, weight, bias, layer.stride, 0, layer.dilation, layer.groups)
        terms, geometry = terms.expand(-1, channels, positions), [*layer.stride, *layer.dilation, layer.groups]
        out: Tensor = border_conv2d(x, weight, bias, grid, terms, self.fusion, codes, geometry)
        return out

    def _index(self) -> tuple[int, ...]:
        """Shape of one coefficient, with the axes it leaves out."""
        index = tuple(self.rounding.coefficients.shape[1:])
        return (1,) * (3 - len(index)) + index

    def _grid(self) -> Tensor:
        scale = scale_gradient(self.grid.scale, self.grid.gradient_scale).reshape(1)
        zero = scale.new_zeros(1) if self.grid.zero_point is None else self.grid.zero_point.reshape(1)
        influence = scale.new_ones(1) if self.influence is None else self.influence.to(scale.dtype)
        return torch.cat([scale, zero, influence])


def _heard(module: nn.Module) -> bool:
    """Whether a module has hooks, which an operator in its place would not call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
