"""Vectors of LLVM that read like formulas: what the inner loops on floats are written in.

Addresses are in bytes and indices in elements, of float32 where nothing else is said.
"""

import dataclasses

from llvmlite import ir
from numba.core import cgutils

from q_kernels.cpu.vector import WIDE, Builder, Value

LANES = 16 if WIDE else 8
VECTORS = 4 if WIDE else 2
POSITIONS = LANES * VECTORS
"""Numbers of a block: what the loops work on at once."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES = ir.VectorType(_F32, LANES)


@dataclasses.dataclass(frozen=True, eq=False)
class Lanes:
    """A vector in a register, with arithmetic that reads like a formula."""

    builder: Builder
    value: Value

    def _other(self, other: "Lanes | float") -> Value:
        return other.value if isinstance(other, Lanes) else ir.Constant(_LANES, [other] * LANES)

    def _new(self, value: Value) -> "Lanes":
        return Lanes(self.builder, value)

    def __add__(self, other: "Lanes | float") -> "Lanes":
        return self._new(self.builder.fadd(self.value, self._other(other)))

    def __sub__(self, other: "Lanes | float") -> "Lanes":
        return self._new(self.builder.fsub(self.value, self._other(other)))

    def __mul__(self, other: "Lanes | float") -> "Lanes":
        return self._new(self.builder.fmul(self.value, self._other(other)))

    def times(self, factor: "Lanes | float", plus: "Lanes | float") -> "Lanes":
        """Multiply and add, in one rounding where there is an instruction for it."""
        function = _function(self.builder, f"llvm.fmuladd.v{LANES}f32", 3)
        return self._new(self.builder.call(function, [self.value, self._other(factor), self._other(plus)]))

    def floor(self) -> "Lanes":
        """Round down."""
        return self._new(self.builder.call(_function(self.builder, f"llvm.floor.v{LANES}f32", 1), [self.value]))

    def compared(self, sign: str, other: "Lanes | float") -> Value:
        """Compare; false where either is not a number."""
        return self.builder.fcmp_ordered(sign, self.value, self._other(other))

    def where(self, condition: Value, other: "Lanes | float") -> "Lanes":
        """Keep the lanes where the condition holds and take the others from `other`."""
        return self._new(self.builder.select(condition, self.value, self._other(other)))

    def at_least(self, low: "Lanes | float") -> "Lanes":
        """Raise to `low`; what is not a number stays so."""
        return self._new(self._other(low)).where(self.builder.fcmp_ordered(">", self._other(low), self.value), self)

    def at_most(self, high: "Lanes | float") -> "Lanes":
        """Lower to `high`; what is not a number stays so."""
        return self._new(self._other(high)).where(self.builder.fcmp_ordered("<", self._other(high), self.value), self)


def _function(builder: Builder, name: str, arguments: int) -> Value:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(_LANES, [_LANES] * arguments), name)


def pointer(builder: Builder, base: Value, index: Value, kind: ir.Type, size: int = 4) -> Value:
    """Address the element `index` elements of `size` bytes from `base`."""
    address = builder.add(base, builder.mul(index, _I64(size)))
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Builder, base: Value, index: Value) -> Lanes:
    """Load neighbours from the element `index` of `base` on."""
    return Lanes(builder, builder.load(pointer(builder, base, index, _LANES), align=4))


def store(base: Value, index: Value, lanes: Lanes) -> None:
    """Store them there."""
    lanes.builder.store(lanes.value, pointer(lanes.builder, base, index, _LANES), align=4)


def splat(builder: Builder, number: Value) -> Lanes:
    """Copy one number to all lanes."""
    empty = ir.Constant(_LANES, ir.Undefined)
    first = builder.insert_element(empty, number, _I32(0))
    return Lanes(builder, builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)))


def copied(builder: Builder, base: Value, index: Value) -> Lanes:
    """Load one number into all lanes."""
    return splat(builder, builder.load(pointer(builder, base, index, _F32)))


class Sums:
    """Vectors that a loop adds to."""

    def __init__(self, builder: Builder, count: int) -> None:
        self.builder = builder
        self.slots = [cgutils.alloca_once(builder, _LANES) for _ in range(count)]
        for slot in self.slots:
            builder.store(ir.Constant(_LANES, None), slot)

    def __getitem__(self, index: int) -> Lanes:
        return Lanes(self.builder, self.builder.load(self.slots[index]))

    def __setitem__(self, index: int, lanes: Lanes) -> None:
        self.builder.store(lanes.value, self.slots[index])
