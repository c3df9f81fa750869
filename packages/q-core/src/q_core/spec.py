"""What codes exist, and how a scale tiles a tensor: frozen facts, no tensors.

A `QuantSpec` says everything about a quantizer that is known before any data is seen. A granularity turns the
shape of a tensor into the shape of its scale; below this module nothing knows about axes.
"""

import abc
import dataclasses
from typing import final

from q_core.errors import ShapeError, SpecError

MAX_BITS = 8


class Granularity(abc.ABC):
    """Which elements of a tensor share one scale."""

    @abc.abstractmethod
    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale of a tensor of shape `shape`.

        Raises:
            ShapeError: The tensor has no such axis, or the axis does not divide.
        """


def _axis(axis: int, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ShapeError(f"axis {axis} of a tensor of shape {shape}: it has {len(shape)} axes")
    return axis % len(shape)


@final
@dataclasses.dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor: shape `(1, ..., 1)`."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ones, at least one."""
        return (1,) * max(1, len(shape))


@final
@dataclasses.dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of `axis`: shape `(1, ..., C, ..., 1)`.

    Attributes:
        axis: The axis that keeps its length.
    """

    axis: int = 0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ones except at `axis`."""
        kept = _axis(self.axis, shape)
        return tuple(size if axis == kept else 1 for axis, size in enumerate(shape))


@final
@dataclasses.dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each output channel and each run of `size` elements along `axis`.

    `PerGroup(size=K, axis=1)` on a `(C, K)` weight is `PerChannel(0)`.

    Attributes:
        size: Elements in a group.
        axis: The axis that is cut into groups.
        channel_axis: The axis that keeps its length.
    """

    size: int
    axis: int = 1
    channel_axis: int = 0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of groups at `axis`, the channels at `channel_axis`, ones elsewhere."""
        grouped, channel = _axis(self.axis, shape), _axis(self.channel_axis, shape)
        if grouped == channel:
            raise SpecError(f"axis and channel_axis are both axis {grouped}: they must differ")
        if self.size < 1 or shape[grouped] % self.size:
            raise ShapeError(
                f"groups of {self.size} along axis {grouped} of a tensor of shape {shape}: "
                f"{shape[grouped]} is not a multiple of {self.size}"
            )
        kept = {grouped: shape[grouped] // self.size, channel: shape[channel]}
        return tuple(kept.get(axis, 1) for axis in range(len(shape)))


@final
@dataclasses.dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each block of the given sizes.

    Attributes:
        sizes: Elements of a block along each axis, the leading axes first; axes not listed are not cut.
    """

    sizes: tuple[int, ...]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of blocks along each axis."""
        if len(self.sizes) > len(shape):
            raise ShapeError(f"blocks of {self.sizes} on a tensor of shape {shape}: it has {len(shape)} axes")
        blocks = []
        for axis, size in enumerate(shape):
            block = self.sizes[axis] if axis < len(self.sizes) else size
            if block < 1 or size % block:
                raise ShapeError(
                    f"blocks of {self.sizes} on a tensor of shape {shape}: axis {axis} has {size} elements, "
                    f"not a multiple of {block}"
                )
            blocks.append(size // block)
        return tuple(blocks)


@final
@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The codes of a quantizer and its granularity.

    Use `QuantSpec.signed` for weights and `QuantSpec.unsigned` for activations.

    Attributes:
        bits: Bit width, 1 to 8.
        qmin: Smallest code, inclusive.
        qmax: Largest code, inclusive.
        symmetric: Whether real zero is code 0 (no zero point).
        granularity: Which elements share a scale.

    Raises:
        SpecError: `bits` outside 1 to 8, or codes that do not fit in `bits`.
    """

    bits: int
    qmin: int
    qmax: int
    symmetric: bool
    granularity: Granularity = PerTensor()

    def __post_init__(self) -> None:
        """Check that the codes fit in the bits."""
        if not 1 <= self.bits <= MAX_BITS:
            raise SpecError(f"bits={self.bits}: supported are 1 to {MAX_BITS}; leave the slot empty to keep it float")
        if not 1 <= self.qmax - self.qmin < 2**self.bits:
            raise SpecError(
                f"codes {self.qmin} to {self.qmax} with bits={self.bits}: a grid has 2 to {2**self.bits} codes"
            )
        if not self.qmin <= 0 <= self.qmax:
            raise SpecError(f"codes {self.qmin} to {self.qmax}: code 0 must be among them")

    @classmethod
    def signed(
        cls, bits: int, *, granularity: Granularity = PerTensor(), symmetric: bool = True, narrow: bool = False
    ) -> "QuantSpec":
        """Describe signed codes `-2^(bits-1)` to `2^(bits-1) - 1`.

        Args:
            bits: Bit width, 1 to 8.
            granularity: Which elements share a scale.
            symmetric: Whether real zero is code 0.
            narrow: Whether the lowest code is left out, so that the codes are symmetric about 0.

        Raises:
            SpecError: `bits` outside 1 to 8, or a narrow grid of 1 bit.
        """
        half = 2 ** (_checked_bits(bits) - 1)
        if narrow and bits == 1:
            raise SpecError("narrow signed codes with bits=1: only code 0 would be left; use bits=2 for {-1, 0, 1}")
        return cls(bits, -half + narrow, half - 1, symmetric, granularity)

    @classmethod
    def unsigned(cls, bits: int, *, granularity: Granularity = PerTensor(), symmetric: bool = False) -> "QuantSpec":
        """Describe unsigned codes 0 to `2^bits - 1`.

        Args:
            bits: Bit width, 1 to 8.
            granularity: Which elements share a scale.
            symmetric: Whether real zero is code 0; the grid then holds no negative real.

        Raises:
            SpecError: `bits` outside 1 to 8.
        """
        return cls(bits, 0, 2 ** _checked_bits(bits) - 1, symmetric, granularity)


def _checked_bits(bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise SpecError(f"bits={bits!r}: supported are 1 to {MAX_BITS}; leave the slot empty to keep it float")
    return bits
