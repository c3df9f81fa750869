r"""Inner loops of the rounding border, written as vectors of LLVM: borders, their gradients, and small products.

A *block* is a few vectors of neighbouring positions, each with a place of its own in memory, so that the vectors of a
block may lie in several images. A *panel* is [taps, positions of a block] without gaps. All addresses are in bytes,
everything at them is float32 but for the places and offsets, which are int64 and count elements.

The border is $B = clip(1/2 + f(z), 0, 1 - 2^{-20})$ with $f(z) = 2.5\,(\sigma(z) - 1/2)$. It is clipped from
$|z| = \ln(7/3)$ on, and inside that $f$ is an odd polynomial to the last bit of float32: no exponential is computed,
and it is $z$ that is clipped. Its derivative is $5/8 - 2/5\,f^2$. Here $z$ is a polynomial of the code coordinate.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from q_kernels.cpu.registers import LANES, POSITIONS, VECTORS, Lanes, Sums, copied, load, pointer, splat, store
from q_kernels.cpu.vector import WIDE, Builder, Value

ROWS = 8
"""What the rows of a product are a multiple of."""

LARGEST = 1 - 2.0**-20

_MARGIN = 1.2e-7
"""Two units in the last place of 1/2: what rounding errors of the polynomial may add to a border."""

START = -math.log(7 / 3) + _MARGIN / 0.525
END = math.log(7 / 3) - (1 - LARGEST + _MARGIN) / 0.525
"""Where a border is clipped: `_MARGIN` before its ends, so that none is below 0 or above `LARGEST`. Slope: 0.525."""

ODD = (0.6249999911239074, -0.05208308281100904, 0.005206347782696606, -0.0005205609190330311, 4.39675893123391e-05)
"""f(z) / z as a polynomial of z^2, lowest power first: the largest error of f on [-END, END] is 7e-10, least of all."""

SCALE, LOW, HIGH, SHARE, ROUNDED, PARAMETERS = range(6)
"""Places in the table of parameters: scale; ends of the code coordinate; the share of the way from `u` that is gone,
or, below 0, of the way from the rounded if `ROUNDED` is 1."""

B0, B1, B2, WEIGHT, RESIDUAL, TERMS = range(6)
"""Places in the totals of a tap."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _number(builder: Builder, base: Value, index: Value) -> Value:
    return builder.load(pointer(builder, base, index, _I64, 8))


@dataclasses.dataclass(frozen=True, eq=False)
class _Border:
    """The border of one tap of one vector: its polynomial before and after the clip, and its odd part."""

    z: Lanes
    clipped: Lanes
    odd: Lanes

    @property
    def value(self) -> Lanes:
        return self.odd + 0.5

    @property
    def slope(self) -> Lanes:
        return (self.odd * self.odd).times(-0.4, 0.625).where(self.z.compared("==", self.clipped), 0.0)


def _rounded(u: Lanes, border: Lanes) -> Lanes:
    """Go up where the fraction is above the border."""
    base = u.floor()
    return (base + 1.0).where((u - base).compared(">", border), base)


def _clipped(border: Lanes) -> Lanes:
    return border.at_least(0.0).at_most(LARGEST)


class _Frame:
    """What the loops over the taps of one channel have in common.

    For numba it is a tuple: addresses of the code coordinates (clamped), of the places of the vectors of the block, of
    the offsets of the taps from a place, of the coefficients [taps, 3], of the weights of a fused border, and of the
    table of parameters; number of taps.
    """

    def __init__(self, builder: Builder, frame: Value) -> None:
        self.builder = builder
        (
            self.planes,
            self.places,
            self.offsets,
            self.coefficients,
            self.weights,
            table,
            self.taps,
        ) = cgutils.unpack_tuple(builder, frame)
        self.parameters = [copied(builder, table, _I64(index)) for index in range(PARAMETERS)]
        self.bases = [_number(builder, self.places, _I64(vector)) for vector in range(VECTORS)]

    def places_of(self, tap: Value) -> list[Value]:
        offset = _number(self.builder, self.offsets, tap)
        return [self.builder.add(base, offset) for base in self.bases]

    def row(self, tap: Value) -> list[Value]:
        """Where the vectors of a tap are in the panel."""
        first = self.builder.mul(tap, _I64(POSITIONS))
        return [self.builder.add(first, _I64(LANES * vector)) for vector in range(VECTORS)]

    def polynomial(self, tap: Value) -> Callable[[Lanes], _Border]:
        first = self.builder.mul(tap, _I64(3))
        b0, b1, b2 = (copied(self.builder, self.coefficients, self.builder.add(first, _I64(term))) for term in range(3))

        def border(u: Lanes) -> _Border:
            z = b2.times(u, b1).times(u, b0)
            clipped = z.at_least(START).at_most(END)
            square = clipped * clipped
            ratio = square.times(ODD[-1], ODD[-2])
            for coefficient in ODD[-3::-1]:
                ratio = ratio.times(square, coefficient)
            return _Border(z, clipped, clipped * ratio)

        return border

    def quantized(self, u: Lanes, border: Lanes) -> Lanes:
        """Return reals; in the range, because no border is below 0 or reaches 1."""
        rounded = _rounded(u, border)
        back = self.parameters[ROUNDED].compared(">", 0.5)
        moved = (rounded - u).times(self.parameters[SHARE], rounded.where(back, u))
        return moved * self.parameters[SCALE]

    def mean(self, sums: Sums) -> list[Lanes]:
        """Divide by the number of taps."""
        count = self.builder.sitofp(self.taps, _F32)
        divisor = splat(self.builder, count).value
        return [Lanes(self.builder, self.builder.fdiv(sums[v].value, divisor)) for v in range(VECTORS)]

    def fused(self) -> list[Lanes]:
        """Fuse the borders of all taps, before the clip."""
        sums = Sums(self.builder, VECTORS)
        with cgutils.for_range(self.builder, self.taps) as loop:
            border, weight = self.polynomial(loop.index), copied(self.builder, self.weights, loop.index)
            for vector, place in enumerate(self.places_of(loop.index)):
                value = border(load(self.builder, self.planes, place)).value
                sums[vector] = value.times(weight, sums[vector])
        return self.mean(sums)


@intrinsic
def fill(typing: Any, frame: Any, panel: Any) -> Any:
    """Quantize the taps of one channel, each with its border, and write them to a panel."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        frame, panel = _Frame(builder, arguments[0]), arguments[1]
        with cgutils.for_range(builder, frame.taps) as loop:
            border = frame.polynomial(loop.index)
            for place, goal in zip(frame.places_of(loop.index), frame.row(loop.index), strict=True):
                u = load(builder, frame.planes, place)
                store(panel, goal, frame.quantized(u, border(u).value))
        return context.get_dummy_value()

    return types.void(frame, types.uintp), generate


@intrinsic
def fill_fused(typing: Any, frame: Any, panel: Any) -> Any:
    """Quantize the taps of one channel with the border that `weights` fuse from the borders of all."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        frame, panel = _Frame(builder, arguments[0]), arguments[1]
        borders = [_clipped(mean) for mean in frame.fused()]
        with cgutils.for_range(builder, frame.taps) as loop:
            places, row = frame.places_of(loop.index), frame.row(loop.index)
            for place, goal, border in zip(places, row, borders, strict=True):
                u = load(builder, frame.planes, place)
                store(panel, goal, frame.quantized(u, border))
        return context.get_dummy_value()

    return types.void(frame, types.uintp), generate


def _add(builder: Builder, base: Value, index: Value, lanes: Lanes) -> None:
    store(base, index, load(builder, base, index) + lanes)


class _Totals:
    """Sums of one tap, in memory before and after."""

    def __init__(self, builder: Builder, totals: Value, tap: Value) -> None:
        self.builder, self.base = builder, totals
        self.first = builder.mul(tap, _I64(TERMS * LANES))
        self.sums: dict[int, Lanes] = {}

    def _place(self, term: int) -> Value:
        return self.builder.add(self.first, _I64(LANES * term))

    def before(self, term: int) -> Lanes:
        return self.sums[term] if term in self.sums else load(self.builder, self.base, self._place(term))

    def add_product(self, term: int, left: Lanes, right: Lanes) -> None:
        self.sums[term] = left.times(right, self.before(term))

    def add_powers(self, to_z: Lanes, u: Lanes) -> None:
        """Add what the coefficients get from a gradient of the polynomial."""
        to_u = to_z * u
        self.sums[B0] = self.before(B0) + to_z
        self.sums[B1] = self.before(B1) + to_u
        self.add_product(B2, to_u, u)

    def store(self) -> None:
        for term, lanes in self.sums.items():
            store(self.base, self._place(term), lanes)


@intrinsic
def spread(typing: Any, frame: Any, panel: Any, pixels: Any, totals: Any) -> Any:
    """Take the gradient of quantized taps apart.

    Args:
        typing: Of numba.
        frame: As for `fill`.
        panel: Gradient of every tap, that of the real value.
        pixels: The gradients of the pixels, laid out like the code coordinates: added to.
        totals: [taps, TERMS, lanes], added to: gradients of the coefficients, over minus scale and influence, and of
            the scale, over the influence, without what pixels outside the range add.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        frame, (panel, pixels, totals) = _Frame(builder, arguments[0]), arguments[1:]
        with cgutils.for_range(builder, frame.taps) as loop:
            border = frame.polynomial(loop.index)
            total = _Totals(builder, totals, loop.index)
            for place, source in zip(frame.places_of(loop.index), frame.row(loop.index), strict=True):
                u = load(builder, frame.planes, place)
                found = border(u)
                gradient = load(builder, panel, source)
                _add(builder, pixels, place, gradient)
                total.add_product(RESIDUAL, gradient, _rounded(u, found.value) - u)
                total.add_powers(gradient * found.slope, u)
            total.store()
        return context.get_dummy_value()

    return types.void(frame, types.uintp, types.uintp, types.uintp), generate


@intrinsic
def spread_fused(typing: Any, frame: Any, panel: Any, pixels: Any, totals: Any) -> Any:
    """Take the gradient apart where the border is fused; there is a total for its weights too."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        frame, (panel, pixels, totals) = _Frame(builder, arguments[0]), arguments[1:]
        means = frame.fused()
        gathered = Sums(builder, VECTORS)
        with cgutils.for_range(builder, frame.taps) as loop:
            places, row = frame.places_of(loop.index), frame.row(loop.index)
            total = _Totals(builder, totals, loop.index)
            for vector, (place, source) in enumerate(zip(places, row, strict=True)):
                u, mean = load(builder, frame.planes, place), means[vector]
                gradient = load(builder, panel, source)
                _add(builder, pixels, place, gradient)
                total.add_product(RESIDUAL, gradient, _rounded(u, _clipped(mean)) - u)
                gathered[vector] = gathered[vector] + gradient
            total.store()
        shares = [
            share.where(mean.compared("==", _clipped(mean)), 0.0)
            for share, mean in zip(frame.mean(gathered), means, strict=True)
        ]
        with cgutils.for_range(builder, frame.taps) as loop:
            border, weight = frame.polynomial(loop.index), copied(builder, frame.weights, loop.index)
            total = _Totals(builder, totals, loop.index)
            for vector, place in enumerate(frame.places_of(loop.index)):
                u = load(builder, frame.planes, place)
                found = border(u)
                total.add_product(WEIGHT, shares[vector], found.value)
                total.add_powers(shares[vector] * weight * found.slope, u)
            total.store()
        return context.get_dummy_value()

    return types.void(frame, types.uintp, types.uintp, types.uintp), generate


@intrinsic
def turn(typing: Any, source: Any, target: Any, rows: Any) -> Any:
    """Write rows of a block as columns.

    Args:
        typing: Of numba.
        source: Address, pitch and address of the places of the rows.
        target: Address and pitch of [positions, rows].
        rows: How many.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        source, pitch, places = cgutils.unpack_tuple(builder, arguments[0])
        target, width = cgutils.unpack_tuple(builder, arguments[1])
        starts = [_number(builder, places, _I64(vector)) for vector in range(VECTORS)]
        with cgutils.for_range(builder, arguments[2]) as loop:
            below = builder.mul(pitch, loop.index)
            for vector, start in enumerate(starts):
                value = load(builder, source, builder.add(start, below)).value
                for lane in range(LANES):
                    place = builder.add(builder.mul(width, _I64(vector * LANES + lane)), loop.index)
                    number = builder.extract_element(value, _I32(lane))
                    builder.store(number, pointer(builder, target, place, _F32), align=4)
        return context.get_dummy_value()

    return types.void(source, target, types.intp), generate


def _product(rows: int, vectors: int, add: bool) -> Any:
    """Build the product of `rows` rows of numbers and rows of vectors: C[r, :] = sum over k of A[r, k] B[k, :].

    Its arguments, for numba: address and pitch of A; address, pitch and address of the places of B; the same of C; how
    many terms. Pitches and places count elements; places are one for each vector.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        (left, left_pitch), (right, right_pitch, right_places), (result, result_pitch, result_places) = (
            cgutils.unpack_tuple(builder, argument) for argument in arguments[:3]
        )
        terms = arguments[3]
        sources, goals = (
            [_number(builder, places, _I64(vector)) for vector in range(vectors)]
            for places in (right_places, result_places)
        )
        targets = [
            builder.add(goals[vector], builder.mul(result_pitch, _I64(row)))
            for row in range(rows)
            for vector in range(vectors)
        ]
        sums = Sums(builder, rows * vectors)
        with cgutils.for_range(builder, terms) as loop:
            below = builder.mul(right_pitch, loop.index)
            columns = [load(builder, right, builder.add(source, below)) for source in sources]
            for row in range(rows):
                factor = copied(builder, left, builder.add(builder.mul(left_pitch, _I64(row)), loop.index))
                for vector, column in enumerate(columns):
                    place = row * vectors + vector
                    sums[place] = factor.times(column, sums[place])
        for place, target in enumerate(targets):
            if add:
                _add(builder, result, target, sums[place])
            else:
                store(result, target, sums[place])
        return context.get_dummy_value()

    @intrinsic
    def run(typing: Any, left: Any, right: Any, result: Any, terms: Any) -> Any:
        return types.void(left, right, result, types.intp), generate

    return run


multiply = _product(4, VECTORS, add=False)

ROWS2 = 8 if WIDE else 4
"""Rows of `add2`."""

add4, add2, add1 = _product(4, 4, add=True), _product(ROWS2, 2, add=True), _product(8, 1, add=True)
"""Products of that many vectors that are added to what is there."""
