"""Inner loops over levels, written as vectors of LLVM.

A block is `POSITIONS` numbers side by side, a few vectors that stay in registers while all thresholds go by, each
copied to all lanes. A compiler that is given scalar loops keeps them in memory and takes half the width: it was
measured to reach half of the speed.

All addresses are in bytes, everything at them is float32 without gaps.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from q_kernels.cpu.registers import LANES, POSITIONS, VECTORS, Lanes, copied, load, store
from q_kernels.cpu.vector import Builder, Value

_I64 = ir.IntType(64)
_MASK = ir.VectorType(ir.IntType(1), LANES)


class _Masks:
    """Masks that a loop changes: which lanes of each vector are left."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.slots = [cgutils.alloca_once(builder, _MASK) for _ in range(VECTORS)]

    def fill(self) -> None:
        for slot in self.slots:
            self.builder.store(ir.Constant(_MASK, [1] * LANES), slot)

    def __getitem__(self, vector: int) -> Value:
        return self.builder.load(self.slots[vector])

    def leave_out(self, vector: int, mask: Value) -> None:
        self.builder.store(self.builder.and_(self[vector], self.builder.not_(mask)), self.slots[vector])


class _Nearest:
    """The nearest levels of the numbers of a block; a NaN gets the lowest."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.slots = [cgutils.alloca_once(builder, ir.VectorType(ir.FloatType(), LANES)) for _ in range(VECTORS)]

    def of(self, numbers: list[Lanes], levels: Value, thresholds: Value, cells: Value) -> list[Lanes]:
        lowest = copied(self.builder, levels, _I64(0))
        for slot in self.slots:
            self.builder.store(lowest.value, slot)
        with cgutils.for_range(self.builder, cells) as loop:
            threshold = copied(self.builder, thresholds, loop.index)
            level = copied(self.builder, levels, self.builder.add(loop.index, _I64(1)))
            for x, slot in zip(numbers, self.slots, strict=True):
                lower = Lanes(self.builder, self.builder.load(slot))
                self.builder.store(level.where(x.compared(">", threshold), lower).value, slot)
        return [Lanes(self.builder, self.builder.load(slot)) for slot in self.slots]


def _block(builder: Builder, base: Value, places: list[Value]) -> list[Lanes]:
    return [load(builder, base, place) for place in places]


def _places(builder: Builder, block: Value) -> list[Value]:
    first = builder.mul(block, _I64(POSITIONS))
    return [builder.add(first, _I64(LANES * vector)) for vector in range(VECTORS)]


@intrinsic
def nearest(typing: Any, x: Any, tables: Any, cells: Any, blocks: Any, out: Any) -> Any:
    """Write the nearest level of every number; a NaN stays one.

    Args:
        typing: Of numba.
        x: Address of the numbers.
        tables: Addresses of the levels and of the thresholds between them.
        cells: How many thresholds.
        blocks: How many blocks of numbers.
        out: Where the levels go.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        x, tables, cells, blocks, out = arguments
        levels, thresholds = cgutils.unpack_tuple(builder, tables)
        found = _Nearest(builder)
        with cgutils.for_range(builder, blocks) as loop:
            places = _places(builder, loop.index)
            numbers = _block(builder, x, places)
            for place, number, level in zip(places, numbers, found.of(numbers, levels, thresholds, cells), strict=True):
                store(out, place, level.where(number.compared("==", number), number))
        return context.get_dummy_value()

    return types.void(x, tables, types.intp, types.intp, types.uintp), generate


@intrinsic
def gradients(typing: Any, grad: Any, x: Any, tables: Any, cells: Any, blocks: Any, out: Any, sums: Any) -> Any:
    """Write the gradient of every number, and add up those of the ends and the terms of every width.

    Args:
        typing: Of numba.
        grad: Address of the incoming gradient.
        x: Address of the numbers.
        tables: Addresses of the levels and of the thresholds between them.
        cells: How many thresholds, or widths.
        blocks: How many blocks of numbers.
        out: Where the gradient of the numbers goes.
        sums: [2 + cells, lanes], added to: of what is below the range, above it, and between the levels of each width.
            A NaN is counted with the last.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        grad, x, tables, cells, blocks, out, sums = arguments
        levels, thresholds = cgutils.unpack_tuple(builder, tables)
        lowest, highest = copied(builder, levels, _I64(0)), copied(builder, levels, cells)
        found, left = _Nearest(builder), _Masks(builder)

        def add(place: Value, terms: list[Lanes], masks: list[Value]) -> None:
            index = builder.mul(place, _I64(LANES))
            total = load(builder, sums, index)
            for term, mask in zip(terms, masks, strict=True):
                total = (total + term).where(mask, total)
            store(sums, index, total)

        with cgutils.for_range(builder, blocks) as loop:
            places = _places(builder, loop.index)
            numbers, upper = _block(builder, x, places), _block(builder, grad, places)
            terms, under, over = [], [], []
            for place, number, g, level in zip(
                places, numbers, upper, found.of(numbers, levels, thresholds, cells), strict=True
            ):
                under.append(number.compared("<", lowest))
                over.append(number.compared(">", highest))
                inside = builder.not_(builder.or_(under[-1], over[-1]))
                store(out, place, g.where(inside, 0.0))
                terms.append((g * (level - number)).where(inside, 0.0))
            add(_I64(0), upper, under)
            add(_I64(1), upper, over)
            left.fill()
            last = builder.sub(cells, _I64(1))
            with cgutils.for_range(builder, last) as cell:
                bound = copied(builder, levels, builder.add(cell.index, _I64(1)))
                here = [number.compared("<=", bound) for number in numbers]
                own = [builder.and_(mask, left[vector]) for vector, mask in enumerate(here)]
                add(builder.add(cell.index, _I64(2)), terms, own)
                for vector, mask in enumerate(here):
                    left.leave_out(vector, mask)
            add(builder.add(last, _I64(2)), terms, [left[vector] for vector in range(VECTORS)])
        return context.get_dummy_value()

    return types.void(grad, x, tables, types.intp, types.intp, types.uintp, types.uintp), generate
