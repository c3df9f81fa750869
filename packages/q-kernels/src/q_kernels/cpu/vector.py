"""Tiles: the inner loops, written as vectors of LLVM.

A tile holds `OUTPUTS x vectors` sums in registers and walks along the taps. At every tap it loads one row of the panel,
and for every output one weight that it copies to all lanes. A compiler that is given scalar loops does not find this
order by itself: it was measured to reach half of the speed.

A panel is [taps, positions], the weights are [outputs, taps], the inputs of `SLOPES` [outputs, positions], all without
gaps; the results are [outputs, positions] with `pitch` elements from one row to the next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, codegen, config, types
from numba.extending import intrinsic

OUTPUTS = 4


def _features() -> frozenset[str]:
    """Names of the instruction sets that numba compiles for; its environment variables can take some away."""
    names = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return frozenset(name[1:] for name in names.split(",") if name.startswith("+"))


FEATURES = _features()
WIDE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= FEATURES
COUNTS = WIDE and "avx512vpopcntdq" in FEATURES  # counts bits in a vector register; elsewhere LLVM spells it out

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()

Builder = Any
Value = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """An inner loop and the size of what it works on.

    Attributes:
        run: The loop, callable from numba: addresses of panel, weights and inputs, number of taps, address of the
            results, their pitch.
        positions: Columns of the panel.
        element: What panel and weights hold.
        result: What the results are.
    """

    run: Any
    positions: int
    element: str
    result: str


def _address(builder: Builder, base: Value, offset: Value, kind: ir.Type) -> Value:
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _copied(builder: Builder, value: Value, kind: ir.VectorType) -> Value:
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, value, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


def _function(builder: Builder, name: str, result: ir.Type, *arguments: ir.Type) -> Value:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _constant(kind: ir.VectorType, value: float) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def _tile(
    element: ir.Type,
    step: Callable[[Builder, Value, Value, Value, Value], Value],
    finish: Callable[[Builder, Value, Value], Value],
    inputs: bool = False,
) -> Tile:
    """Build a tile.

    Args:
        element: What a lane holds.
        step: From a builder, the sum so far, a row of the panel, the copied weight and the input to the new sum.
        finish: From a builder, a sum and the input to the result, of 32 bits.
        inputs: Whether there are inputs.
    """
    size = 4 if element == _F32 else 8
    # 32 registers of 512 bits hold 4 x 4 sums and what else is live, with inputs less; 16 of 256 bits hold 4 x 2.
    lanes, vectors = (64 // size, 3 if inputs else 4) if WIDE else (32 // size, 2)
    kind = ir.VectorType(element, lanes)
    grid = [(output, v) for output in range(OUTPUTS) for v in range(vectors)]

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        panel, weights, near, taps, results, pitch = arguments

        def load(base: Value, row: Value, v: int) -> Value:
            offset = builder.add(builder.mul(row, _I64(lanes * vectors * size)), _I64(v * lanes * size))
            return builder.load(_address(builder, base, offset, kind), align=size)

        sums = {at: cgutils.alloca_once(builder, kind) for at in grid}
        for slot in sums.values():
            builder.store(ir.Constant(kind, None), slot)
        own = {(output, v): load(near, _I64(output), v) if inputs else None for output, v in grid}
        with cgutils.for_range(builder, taps) as loop:
            columns = [load(panel, loop.index, v) for v in range(vectors)]
            for output in range(OUTPUTS):
                index = builder.add(builder.mul(taps, _I64(output)), loop.index)
                weight = builder.load(_address(builder, weights, builder.mul(index, _I64(size)), element))
                copied = _copied(builder, weight, kind)
                for v, column in enumerate(columns):
                    slot = sums[output, v]
                    builder.store(step(builder, builder.load(slot), column, copied, own[output, v]), slot)
        for (output, v), slot in sums.items():
            value = finish(builder, builder.load(slot), own[output, v])
            index = builder.add(builder.mul(pitch, _I64(output)), _I64(v * lanes))
            target = _address(builder, results, builder.mul(index, _I64(4)), value.type)
            builder.store(value, target, align=4)
        return context.get_dummy_value()

    @intrinsic
    def run(typing: Any, panel: Any, weights: Any, near: Any, taps: Any, results: Any, pitch: Any) -> Any:
        return types.void(types.uintp, types.uintp, types.uintp, types.intp, types.uintp, types.intp), generate

    names = ("float32", "float32") if element == _F32 else ("uint64", "int32")
    return Tile(run, lanes * vectors, *names)


def _absolute_difference(builder: Builder, total: Value, x: Value, w: Value, _: None) -> Value:
    kind = x.type
    absolute = _function(builder, f"llvm.fabs.v{kind.count}f32", kind, kind)
    return builder.fadd(total, builder.call(absolute, [builder.fsub(x, w)]))


def _bits_that_differ(builder: Builder, total: Value, x: Value, w: Value, _: None) -> Value:
    kind = x.type
    count = _function(builder, f"llvm.ctpop.v{kind.count}i64", kind, kind)
    return builder.add(total, builder.call(count, [builder.xor(x, w)]))


def _bytes_that_differ(builder: Builder, total: Value, x: Value, w: Value, _: None) -> Value:
    kind = x.type
    octets = ir.VectorType(ir.IntType(8), kind.count * 8)
    left, right = builder.bitcast(x, octets), builder.bitcast(w, octets)
    if WIDE or "avx2" in FEATURES:
        name = "llvm.x86.avx512.psad.bw.512" if WIDE else "llvm.x86.avx2.psad.bw"
        return builder.add(total, builder.call(_function(builder, name, kind, octets, octets), [left, right]))
    largest, smallest = (
        builder.call(_function(builder, f"llvm.{name}.v{octets.count}i8", octets, octets, octets), [left, right])
        for name in ("umax", "umin")
    )
    difference = builder.bitcast(builder.sub(largest, smallest), kind)
    # Without an instruction for it: pairs of bytes, pairs of those, and so on, inside every 64-bit lane.
    for width in (8, 16, 32):
        mask = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * width))
        keep, shift = _constant(kind, mask), _constant(kind, width)
        difference = builder.add(builder.and_(difference, keep), builder.and_(builder.lshr(difference, shift), keep))
    return builder.add(total, difference)


def _slope_times_gradient(builder: Builder, total: Value, g: Value, w: Value, x: Value) -> Value:
    """Add clamp(w - x, -1, 1) * g."""
    kind, one = g.type, _constant(g.type, 1.0)
    slope = builder.fsub(w, x)
    if WIDE:
        # One instruction: the smaller magnitude of the two, with the sign of the first. It loses the NaN of an input.
        name, mask = "llvm.x86.avx512.mask.range.ps.512", ir.IntType(16)
        function = _function(builder, name, kind, kind, kind, _I32, kind, mask, _I32)
        slope = builder.call(function, [slope, one, _I32(0b0010), slope, mask(0xFFFF), _I32(4)])
    else:
        slope = builder.select(builder.fcmp_ordered("<", one, slope), one, slope)
        slope = builder.select(builder.fcmp_ordered(">", _constant(kind, -1.0), slope), _constant(kind, -1.0), slope)
    product = _function(builder, f"llvm.fmuladd.v{kind.count}f32", kind, kind, kind, kind)  # fused where that is fast
    return builder.call(product, [slope, g, total])


def _negated(builder: Builder, total: Value, _: None) -> Value:
    return builder.fneg(total)


def _narrowed(builder: Builder, total: Value, _: None) -> Value:
    return builder.trunc(total, ir.VectorType(_I32, total.type.count))


def _kept_nan(builder: Builder, total: Value, x: Value) -> Value:
    """Put back the NaN of an input, which the clamp of `_slope_times_gradient` may have lost."""
    return builder.select(builder.fcmp_unordered("uno", x, x), x, total)


FLOATS = _tile(_F32, _absolute_difference, _negated)
BYTES = _tile(_I64, _bytes_that_differ, _narrowed)
BITS = _tile(_I64, _bits_that_differ, _narrowed)
SLOPES = _tile(_F32, _slope_times_gradient, _kept_nan, inputs=True)


@intrinsic
def copy(typing: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy bytes from one address to another."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        target, source, size = arguments
        pointer = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(target, pointer), builder.inttoptr(source, pointer), size, 1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), generate
