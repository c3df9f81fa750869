r"""What a quantized adder layer costs: operations, bytes and energy, from its geometry alone.

The operation count that the paper uses to call several scales per layer cheap (its Proposition 2), the corrected count,
the bytes that move, and the energy of all of it. Counts are exact integers and fractions.

An adder layer quantizes its input once for every distinct scale of its kernels. The number of scales, $g$ in the paper,
is `scales` here; `groups` are the groups of channels of a convolution, as in torch.
"""

import dataclasses
from fractions import Fraction
from typing import final

from torch import nn

from q_core.errors import RangeError, ShapeError

_FLOAT_BYTES = 4
_WORD_BYTES = 8  # what one access of an `EnergyTable` moves


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """The sizes of one convolution or adder layer and of one image that enters it.

    Attributes:
        inputs: Input channels.
        outputs: Output channels, the number of kernels.
        height: Height of the input, in pixels, without padding.
        width: Width of the input, in pixels, without padding.
        kernel: Height and width of a kernel, in taps.
        stride: Steps of the window, in pixels.
        padding: Zeros on each side of height and width, in pixels. They count as taps.
        dilation: Spacing of the taps, in pixels.
        groups: Groups of channels that do not see each other.

    Raises:
        RangeError: A size is not a positive number, or a padding is negative.
        ShapeError: `groups` does not divide the channels, or the window is larger than the padded input.
    """

    inputs: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "padding" else 1
            if any(size < least for size in (value if isinstance(value, tuple) else (value,))):
                raise RangeError(f"{field.name}={value}: it must be at least {least}")
        if self.inputs % self.groups or self.outputs % self.groups:
            raise ShapeError(
                f"groups={self.groups} with {self.inputs} input and {self.outputs} output channels: it must divide both"
            )
        for axis, size in enumerate((self.height, self.width)):
            window, padded = self.dilation[axis] * (self.kernel[axis] - 1) + 1, size + 2 * self.padding[axis]
            if window > padded:
                raise ShapeError(
                    f"window of {window} pixels on a padded input of {padded}: pad more, or use a smaller kernel"
                )

    @classmethod
    def of(cls, layer: nn.Conv2d, *, height: int, width: int) -> "LayerGeometry":
        """Read the sizes of a layer.

        Args:
            layer: A convolution, or an `AdderConv2d`, which is one.
            height: Height of the input, in pixels.
            width: Width of the input, in pixels.

        Returns:
            Its geometry.

        Raises:
            ShapeError: `padding="same"` that needs more pixels on one side than on the other.
        """
        kernel, dilation = (layer.kernel_size[0], layer.kernel_size[1]), (layer.dilation[0], layer.dilation[1])
        if not isinstance(layer.padding, str):
            padding = (layer.padding[0], layer.padding[1])
        elif layer.padding == "valid":
            padding = (0, 0)
        else:
            extra = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
            if extra[0] % 2 or extra[1] % 2:
                raise ShapeError(
                    f"padding='same' of a layer with kernel {kernel} and dilation {dilation} is not equal on both "
                    "sides: pad the input beforehand, and count the layer with the padded size"
                )
            padding = (extra[0] // 2, extra[1] // 2)
        return cls(
            inputs=layer.in_channels,
            outputs=layer.out_channels,
            height=height,
            width=width,
            kernel=kernel,
            stride=(layer.stride[0], layer.stride[1]),
            padding=padding,
            dilation=dilation,
            groups=layer.groups,
        )

    @property
    def taps(self) -> int:
        """Taps of one kernel: the pairs that one output sums."""
        return self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def output_height(self) -> int:
        """Height of the output, in pixels; eq. 1 of the paper, with dilation."""
        return self._positions(0, self.height)

    @property
    def output_width(self) -> int:
        """Width of the output, in pixels."""
        return self._positions(1, self.width)

    @property
    def input_elements(self) -> int:
        """Elements of one input image, without padding."""
        return self.inputs * self.height * self.width

    @property
    def output_elements(self) -> int:
        """Elements of one output image."""
        return self.outputs * self.output_height * self.output_width

    @property
    def weight_elements(self) -> int:
        """Elements of all kernels."""
        return self.outputs * self.taps

    def _positions(self, axis: int, size: int) -> int:
        window = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - window) // self.stride[axis] + 1


@final
@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Operations of one quantized adder layer for one image; every operation counts one, whatever its kind.

    Attributes:
        distance: Subtractions and accumulations.
        weight: Quantizing the kernels, once and offline.
        input: Quantizing the input, once for every scale.
        output: De-quantizing the output.
    """

    distance: int
    weight: int
    input: int
    output: int

    @property
    def per_image(self) -> int:
        """Operations that recur with every image: all but those on the weight."""
        return self.distance + self.input + self.output

    @property
    def total(self) -> int:
        """All operations, as the paper adds them."""
        return self.per_image + self.weight


def published_flops(layer: LayerGeometry, *, scales: int = 1) -> FlopCount:
    r"""Count operations as the paper does.

    $$ 2hw(c_{in}d^2 + 1)c_{out} + c_{in}d^2c_{out} + g\,hwc_{in} + h_{out}w_{out}c_{out} $$

    In its equation 2 the last term is written out for a padding and stride of 1, $(h-d+3)(w-d+3)c_{out}$; here it is
    that of its equation 1, which agrees there and holds elsewhere too.

    Args:
        layer: Sizes.
        scales: Distinct scales of the kernels, from 1 to the number of kernels.

    Returns:
        The four terms.

    Raises:
        RangeError: `scales` below 1 or above the number of kernels.

    Note:
        The paper multiplies the distance by the pixels of the *input*, which is right where the output has as many:
        with stride 2 it counts four times too much. It adds the quantization of the weight, done once, to the work of
        one image. It counts neither clamping nor rounding, and a float32 multiplication like an 8-bit addition. It
        leaves out that each scale needs a copy of the input. `corrected_flops`, `traffic` and `adder_energy` mend
        these.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, eq. 1 and 2.
    """
    _check_scales(scales, layer.outputs)
    pixels = layer.height * layer.width
    return _count(layer, scales, pixels)


def corrected_flops(layer: LayerGeometry, *, scales: int = 1) -> FlopCount:
    r"""Count operations with the distances at the positions of the output.

    $$ 2h_{out}w_{out}(c_{in}d^2/G + 1)c_{out} \quad+\quad g\,hwc_{in} + h_{out}w_{out}c_{out} $$

    per image, $G$ being the groups of channels, and $c_{in}d^2c_{out}/G$ once for the weight. The 1 beside the taps is
    the bias of a channel, counted like a tap, as the paper has it.

    Args:
        layer: Sizes.
        scales: Distinct scales of the kernels, from 1 to the number of kernels.

    Returns:
        The four terms; `per_image` leaves out the weight.

    Raises:
        RangeError: `scales` below 1 or above the number of kernels.
    """
    _check_scales(scales, layer.outputs)
    return _count(layer, scales, layer.output_height * layer.output_width)


def _count(layer: LayerGeometry, scales: int, positions: int) -> FlopCount:
    return FlopCount(
        distance=2 * positions * (layer.taps + 1) * layer.outputs,
        weight=layer.weight_elements,
        input=scales * layer.input_elements,
        output=layer.output_elements,
    )


def scale_overhead(layer: LayerGeometry, *, scales: int) -> Fraction:
    """Return the operations per image that further scales add, relative to those with one scale.

    Args:
        layer: Sizes.
        scales: Distinct scales of the kernels, from 1 to the number of kernels.

    Returns:
        Relative increase of the corrected count, exact.

    Raises:
        RangeError: `scales` below 1 or above the number of kernels.
    """
    one = corrected_flops(layer, scales=1).per_image
    return Fraction(corrected_flops(layer, scales=scales).per_image - one, one)


def square_flops(channels: int, size: int, *, scales: int = 1) -> int:
    r"""Count operations of a 3x3 layer with equal channels, padding and stride 1, on a square image.

    $$ 18k^2c^2 + gk^2c + 9c^2 + 3k^2c $$

    Args:
        channels: Input and output channels, $c$.
        size: Height and width of the image, $k$, in pixels.
        scales: Distinct scales of the kernels, $g$, from 1 to the number of kernels.

    Returns:
        The published total.

    Raises:
        RangeError: A size below 1, or `scales` below 1 or above the number of kernels.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, eq. 3.
    """
    _check_square(channels, size, scales)
    square = size * size
    return 18 * square * channels**2 + scales * square * channels + 9 * channels**2 + 3 * square * channels


def square_overhead(channels: int, size: int, *, scales: int) -> Fraction:
    r"""Return the relative increase of `square_flops` by further scales.

    $$ r = \frac{(g-1)k^2}{(18k^2 + 9)c + 4k^2} $$

    Args:
        channels: Input and output channels, $c$.
        size: Height and width of the image, $k$, in pixels.
        scales: Distinct scales of the kernels, $g$, from 1 to the number of kernels.

    Returns:
        The ratio, exact.

    Raises:
        RangeError: A size below 1, or `scales` below 1 or above the number of kernels.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, eq. 4, before the approximation.
    """
    _check_square(channels, size, scales)
    square = size * size
    return Fraction((scales - 1) * square, (18 * square + 9) * channels + 4 * square)


def square_overhead_offline(channels: int, *, scales: int) -> Fraction:
    r"""Return the approximation of `square_overhead` that does not depend on the size of the image.

    $$ r \approx \frac{g-1}{18c + 4} $$

    It drops the $9c^2$ operations on the weight. Since these are done once, before any image, the approximation is
    exact for the work per image.

    Args:
        channels: Input and output channels, $c$.
        scales: Distinct scales of the kernels, $g$, from 1 to the number of kernels.

    Returns:
        The ratio. It is too large by less than $1/(2k^2)$ of `square_overhead`: 1 % at $k=7$.

    Raises:
        RangeError: `channels` below 1, or `scales` below 1 or above the number of kernels.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, eq. 4.
    """
    _check_square(channels, 1, scales)
    return Fraction(scales - 1, 18 * channels + 4)


def square_overhead_of_four(channels: int) -> Fraction:
    r"""Return the published approximation for four scales, $1 / (6c + 1)$.

    Args:
        channels: Input and output channels, $c$, at least 4.

    Returns:
        The ratio. It is too large by $1/(18c + 3)$ of $3/(18c+4)$, from which it is rounded.

    Raises:
        RangeError: Fewer than four kernels.

    Source:
        Nie et al. 2022, arXiv:2212.10200, supplement, eq. 5.
    """
    _check_square(channels, 1, 4)
    return Fraction(1, 6 * channels + 1)


@final
@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one layer moves for one image, each tensor passing once.

    Attributes:
        source: The float32 input, read.
        copies: The codes of the input for all scales, as stored; they are written and then read. 0 for a float layer.
        weight: The kernels, read.
        output: The float32 output, written.
    """

    source: int
    copies: int
    weight: int
    output: int

    @property
    def total(self) -> int:
        """All bytes: the copies count twice, since they are written and read."""
        return self.source + 2 * self.copies + self.weight + self.output


def traffic(layer: LayerGeometry, *, bits: int | None = None, scales: int = 1) -> Traffic:
    """Return the bytes that a layer moves for one image.

    The input is read once in float32, its codes for every scale are written, and then read. Codes are packed without
    gaps, each copy in whole bytes. No tensor is read twice, so this is a lower bound for any memory that does not hold
    them all; on the other hand, a layer that hands codes to the next one never moves the float32 input and output.

    Args:
        layer: Sizes.
        bits: Width of the codes of weight and input, 1 to 8. None for a float32 layer, which makes no copies.
        scales: Distinct scales of the kernels, from 1 to the number of kernels.

    Returns:
        Bytes by tensor.

    Raises:
        RangeError: `bits` outside 1 to 8, `scales` below 1 or above the number of kernels, or several of a float layer.
    """
    _check_precision(layer, bits, scales)
    return Traffic(
        source=_FLOAT_BYTES * layer.input_elements,
        copies=0 if bits is None else scales * _packed_bytes(layer.input_elements, bits),
        weight=_FLOAT_BYTES * layer.weight_elements if bits is None else _packed_bytes(layer.weight_elements, bits),
        output=_FLOAT_BYTES * layer.output_elements,
    )


def _packed_bytes(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyTable:
    """Energy of single operations, in picojoules.

    The defaults are rough figures for a 45 nm process at 0.9 V; only their ratios carry over to other processes, and
    those between arithmetic and memory least of all. Replace them by those of your target.

    Attributes:
        int8_add: One 8-bit addition or subtraction.
        int32_add: One 32-bit integer addition.
        float16_add: One float16 addition.
        float32_add: One float32 addition.
        int8_multiply: One 8-bit multiplication.
        int32_multiply: One 32-bit integer multiplication.
        float16_multiply: One float16 multiplication.
        float32_multiply: One float32 multiplication.
        cache_8k: One 64-bit access to a cache of 8 KB.
        cache_32k: One 64-bit access to a cache of 32 KB.
        cache_1m: One 64-bit access to a cache of 1 MB.
        dram: One 64-bit access to DRAM: the lower end of the 1300 to 2600 pJ given.

    Source:
        Horowitz 2014, Computing's energy problem (and what we can do about it), ISSCC.
    """

    int8_add: float = 0.03
    int32_add: float = 0.1
    float16_add: float = 0.4
    float32_add: float = 0.9
    int8_multiply: float = 0.2
    int32_multiply: float = 3.1
    float16_multiply: float = 1.1
    float32_multiply: float = 3.7
    cache_8k: float = 10.0
    cache_32k: float = 20.0
    cache_1m: float = 100.0
    dram: float = 1300.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < float("inf"):
                raise RangeError(
                    f"{field.name}={getattr(self, field.name)} pJ: an energy must be a finite number of at least 0"
                )


HOROWITZ = EnergyTable()


@final
@dataclasses.dataclass(frozen=True)
class LayerEnergy:
    """Energy of one layer for one image, in picojoules.

    Attributes:
        arithmetic: Differences and their sums, or products and their sums.
        requantization: Quantizing the input, once for every scale.
        dequantization: Scaling the output.
        memory: Moving the tensors.
    """

    arithmetic: float
    requantization: float
    dequantization: float
    memory: float

    @property
    def total(self) -> float:
        """The whole energy, in picojoules."""
        return self.arithmetic + self.requantization + self.dequantization + self.memory


def adder_energy(
    layer: LayerGeometry,
    *,
    bits: int | None = None,
    scales: int = 1,
    table: EnergyTable = HOROWITZ,
    accumulation: float | None = None,
    access: float | None = None,
) -> LayerEnergy:
    """Estimate the energy of an adder layer for one image.

    Each pair costs a subtraction and an accumulation; the absolute value is free, being the choice of what to add. Each
    quantized input element costs a float32 multiplication for every scale, each output element of a quantized layer
    one. Clamping, rounding, bias, batch norm and activation function are left out, and so is control, which in a
    processor exceeds all else: this is the energy of a fixed-function circuit.

    Args:
        layer: Sizes.
        bits: Width of the codes, 1 to 8. Arithmetic is that of 8 bits whatever the width; memory is that of the width.
            None for a float32 layer.
        scales: Distinct scales of the kernels, from 1 to the number of kernels.
        table: Energy of single operations.
        accumulation: Energy of adding one term to a sum, in picojoules. By default a 32-bit integer addition, or a
            float32 one for a float layer.
        access: Energy of moving 64 bits, in picojoules. By default those of `table.cache_1m`.

    Returns:
        Energy by part.

    Raises:
        RangeError: `bits` outside 1 to 8, `scales` below 1 or above the number of kernels, or several of a float layer;
            a negative energy.
    """
    term = table.float32_add if bits is None else table.int8_add
    return _energy(layer, bits, scales, table, (term, accumulation, access))


def convolution_energy(
    layer: LayerGeometry,
    *,
    bits: int | None = None,
    table: EnergyTable = HOROWITZ,
    accumulation: float | None = None,
    access: float | None = None,
) -> LayerEnergy:
    """Estimate the energy of the convolution of the same geometry for one image.

    As `adder_energy`, with a multiplication in place of the subtraction. Scales of a convolution factor out of its
    sums, so one copy of the input serves any number of them.

    Args:
        layer: Sizes.
        bits: Width of the codes, 1 to 8. Arithmetic is that of 8 bits whatever the width; memory is that of the width.
            None for a float32 layer.
        table: Energy of single operations.
        accumulation: Energy of adding one term to a sum, in picojoules. By default a 32-bit integer addition, or a
            float32 one for a float layer.
        access: Energy of moving 64 bits, in picojoules. By default those of `table.cache_1m`.

    Returns:
        Energy by part.

    Raises:
        RangeError: `bits` outside 1 to 8, or a negative energy.
    """
    term = table.float32_multiply if bits is None else table.int8_multiply
    return _energy(layer, bits, 1, table, (term, accumulation, access))


def _energy(
    layer: LayerGeometry,
    bits: int | None,
    scales: int,
    table: EnergyTable,
    costs: tuple[float, float | None, float | None],
) -> LayerEnergy:
    _check_precision(layer, bits, scales)
    term, accumulation, access = costs
    if accumulation is None:
        accumulation = table.float32_add if bits is None else table.int32_add
    if access is None:
        access = table.cache_1m
    for name, value in (("accumulation", accumulation), ("access", access)):
        if not 0 <= value < float("inf"):
            raise RangeError(f"{name}={value} pJ: an energy must be a finite number of at least 0")
    # Only a quantized layer scales its input and output.
    conversions = 0 if bits is None else scales * layer.input_elements
    results = 0 if bits is None else layer.output_elements
    return LayerEnergy(
        arithmetic=layer.output_elements * layer.taps * (term + accumulation),
        requantization=conversions * table.float32_multiply,
        dequantization=results * table.float32_multiply,
        memory=traffic(layer, bits=bits, scales=scales).total / _WORD_BYTES * access,
    )


def _check_scales(scales: int, outputs: int) -> None:
    if not 1 <= scales <= outputs:
        raise RangeError(f"scales={scales} for {outputs} kernels: supported are 1 to {outputs}")


def _check_square(channels: int, size: int, scales: int) -> None:
    if channels < 1 or size < 1:
        raise RangeError(f"channels={channels}, size={size}: both must be at least 1")
    _check_scales(scales, channels)


def _check_precision(layer: LayerGeometry, bits: int | None, scales: int) -> None:
    if bits is not None and not 1 <= bits <= 8:
        raise RangeError(f"bits={bits}: supported are 1 to 8, and None for a float32 layer")
    _check_scales(scales, layer.outputs)
    if bits is None and scales > 1:
        raise RangeError(f"scales={scales} of a float32 layer: it has none; give bits, or leave scales at 1")
