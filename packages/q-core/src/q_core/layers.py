"""Layers with slots.

A *slot* is an attribute `<tensor>_quantizer` that holds any module from tensor to tensor: `nn.Identity` means float, an
`Observer` collects statistics, a `Quantizer` quantizes. If the layer has a parameter `<tensor>`, the slot sees that
parameter, otherwise it sees an activation. Everything that walks a model relies on this naming and on nothing else.

`QuantConv2d` and `QuantLinear` subclass torch's layers so that `weight` and `bias` keep their keys; this is the one
place where a concrete class is subclassed.
"""

from collections.abc import Iterator
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from q_core.errors import ShapeError, SpecError

SLOT_SUFFIX = "_quantizer"


def slots(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """List the slots of one module.

    Yields:
        The attribute name, the module in the slot, and the parameter it sees or None for an activation.
    """
    for name, child in module._modules.items():  # named_children() would list a module in two slots once
        if child is not None and name.endswith(SLOT_SUFFIX):
            yield name, child, module._parameters.get(name.removesuffix(SLOT_SUFFIX))


def conv_arguments(layer: nn.Conv2d) -> dict[str, Any]:
    """Return the arguments that build a convolution of the same geometry."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def linear_arguments(layer: nn.Linear) -> dict[str, Any]:
    """Return the arguments that build a linear layer of the same geometry."""
    names = ("in_features", "out_features")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


@final
class QuantConv2d(nn.Conv2d):
    """A convolution with slots for its weight and its input.

    Takes the arguments of `torch.nn.Conv2d`. With both slots empty it computes the same.

    The input is quantized before it is padded, so a padded zero is an exact real zero.
    """

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quantizer = nn.Identity()
        self.input_quantizer = nn.Identity()

    @classmethod
    def from_float(cls, layer: nn.Conv2d) -> "QuantConv2d":
        """Wrap the very tensors of `layer` in a layer with empty slots."""
        return _adopt(cls(**conv_arguments(layer), device="meta"), layer)

    def forward(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n o i j"]:
        """Convolve the quantized input with the quantized weight."""
        out: Tensor = self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)
        return out

    def input_shape(self) -> tuple[int, ...]:
        """Shape of an input with one image of one pixel; what a per-channel scale is made for."""
        return (1, self.in_channels, 1, 1)


@final
class QuantLinear(nn.Linear):
    """A linear layer with slots for its weight and its input.

    Takes the arguments of `torch.nn.Linear`. With both slots empty it computes the same.
    """

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quantizer = nn.Identity()
        self.input_quantizer = nn.Identity()

    @classmethod
    def from_float(cls, layer: nn.Linear) -> "QuantLinear":
        """Wrap the very tensors of `layer` in a layer with empty slots."""
        return _adopt(cls(**linear_arguments(layer), device="meta"), layer)

    def forward(self, input: Float[Tensor, "*n k"]) -> Float[Tensor, "*n o"]:
        """Multiply the quantized input by the quantized weight."""
        return nn.functional.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)

    def input_shape(self) -> tuple[int, ...]:
        """Shape of an input with one row; what a per-channel scale is made for."""
        return (1, self.in_features)


@final
class QuantAdd(nn.Module):
    """The sum of two tensors, with a slot for each.

    Write it into your model where a residual is added: with empty slots it is `left + right`. An addition written as
    an operator cannot be seen by `swap`, stays float, and is not counted.
    """

    left_quantizer: nn.Module
    right_quantizer: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.left_quantizer = nn.Identity()
        self.right_quantizer = nn.Identity()

    def forward(self, left: Float[Tensor, "..."], right: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Add the two quantized tensors."""
        out: Tensor = self.left_quantizer(left) + self.right_quantizer(right)
        return out


@final
class QuantConcat(nn.Module):
    """The concatenation of tensors, with one slot for all of them.

    One quantizer serves every part, so the codes can be concatenated as they are.

    Args:
        dim: The axis along which the tensors are joined.
    """

    input_quantizer: nn.Module

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.input_quantizer = nn.Identity()

    def forward(self, *parts: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Join the quantized tensors.

        Raises:
            ShapeError: There is nothing to join.
        """
        if not parts:
            raise ShapeError("concatenation of 0 tensors: give at least one")
        out: Tensor = self.input_quantizer(torch.cat(parts, self.dim))
        return out


@final
class QuantUnit(nn.Module):
    """Any part of a network, such as a residual block, with a slot for its input and one for its output.

    With both slots empty it computes what the part computes. The slot of the input sees what every branch of a block
    reads, the skip path too; that of the output sees the result of the block, after its addition and its activation
    function. `q_core.swap.wrap_units` puts parts of a model into units.

    Args:
        body: The part. It returns one tensor.
    """

    body: nn.Module
    input_quantizer: nn.Module
    output_quantizer: nn.Module

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.input_quantizer = nn.Identity()
        self.output_quantizer = nn.Identity()
        self.training = body.training

    def forward(self, x: Float[Tensor, "..."], /, *args: Any, **kwargs: Any) -> Float[Tensor, "..."]:
        """Run the part on the quantized input, and quantize what it returns.

        Args:
            x: The first input.
            *args: Further inputs, as they are.
            **kwargs: Further inputs, as they are.

        Raises:
            SpecError: The part returned something else than one tensor.
        """
        out = self.body(self.input_quantizer(x), *args, **kwargs)
        if not isinstance(out, Tensor):
            raise SpecError(
                f"a {type(self.body).__name__} in a unit returned a {type(out).__name__}: a unit quantizes one tensor; "
                "take a part of the network that returns one"
            )
        quantized: Tensor = self.output_quantizer(out)
        return quantized


_Layer = TypeVar("_Layer", bound=nn.Module)


def _adopt(bare: _Layer, layer: nn.Module) -> _Layer:
    """Give a layer built without memory the tensors and the mode of the float layer."""
    for name, parameter in layer.named_parameters(recurse=False):
        bare.register_parameter(name, parameter)
    return bare.train(layer.training)
