"""Machine code of the GPU kernels, compiled for an A100 and an H100 without either.

What an inner loop is made of decides what a kernel can reach, and a compiler changes its mind with a comma. A count is
exact where it is a matter of arithmetic; a total is a bound, a little above what ptxas 12.8 to 13 makes.
"""

import dataclasses
import math

import pytest

from q_kernels.gpu import adder as host_adder
from q_kernels.gpu import levels as host_levels
from q_kernels.gpu import views

from .triton_needed import compiled

triton = pytest.importorskip("triton")
pytestmark = compiled

ARCHITECTURES = [80, 90]
THREADS = 128
FORMS = {
    "tensor": ((4096, 4096), (1, 1)),
    "channel": ((512, 4608), (512, 1)),
    "columns": ((65536, 256), (1, 256)),
    "group": ((4096, 4096), (4096, 128)),
}
DTYPES = ["fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A form, seen as a kernel sees it."""

    view: views.Rows
    numbers: dict[str, int]

    @property
    def elements(self) -> int:
        """Of a tile, for each thread."""
        return self.numbers["ROWS"] * self.numbers["COLUMNS"] // THREADS


def matrix(form: str, count: int | None = None, *, sums: bool) -> Matrix:
    size, tiles = FORMS[form]
    strides = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    view = views.rows_of(size, strides, tiles)
    assert isinstance(view, views.Rows)
    elements = 1024 if count is None else host_levels._elements(view, count, sums=sums)
    return Matrix(view, views.numbers(view, views.tile(view, elements, sums=sums)))


def uniform(code: Matrix, dtype: str, **flags: bool) -> dict:
    of_floats = dict.fromkeys(("scales", "zeros", "sums_at"), "*fp32")
    ends = dict.fromkeys(("qmin", "qmax"), "fp32")
    return {**of_floats, **ends, "x_at": f"*{dtype}", "mask_at": "*u8", **code.numbers, **flags}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_uniform_levels_take_few_instructions(form: str, dtype: str, architecture: int) -> None:
    """A GPU that moves 4 bytes in and 4 out has time for 62 instructions meanwhile."""
    from q_kernels.gpu.jit import fake

    from . import sass

    made = matrix(form, sums=False)
    arguments = uniform(made, dtype, ZERO=False, MASK=False) | {"out_at": "*fp32"}
    code = sass.compile_for(fake.levels, arguments, architecture, 4)
    assert code.spills == 0
    assert code.registers <= 64  # so many that every thread that a multiprocessor has room for can be there
    assert len(code.loop) <= 36 * made.elements, code.profile()
    assert code.count("MUFU.RCP", "FCHK") == 2 * made.elements  # a division that IEEE 754 would call one
    assert code.count("FRND") == 0
    assert code.count("LDG.E.128") * 16 == made.elements * (4 if dtype == "fp32" else 2), code.profile()
    assert code.count("STG.E.128") * 4 == made.elements


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("flags", [(False, False), (True, True)], ids=["plain", "affine and masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_uniform_gradients_take_few_instructions(
    form: str, dtype: str, flags: tuple[bool, bool], architecture: int
) -> None:
    """Of 12 bytes, 93 instructions."""
    from q_kernels.gpu.jit import fake

    from . import sass

    made = matrix(form, sums=True)
    arguments = uniform(made, dtype, ZERO=flags[0], MASK=flags[1], LEARNS=True)
    arguments |= {"grad_at": "*fp32", "out_at": f"*{dtype}"}
    code = sass.compile_for(fake.gradients, arguments, architecture, 4)
    assert code.spills == 0
    assert code.registers <= (104 if any(flags) else 80)
    assert len(code.loop) <= (70 if any(flags) else 42) * made.elements, code.profile()


def tables(made: Matrix, count: int, dtype: str) -> dict:
    pointers = dict.fromkeys(("tables", "edges", "sums_at"), "*fp32")
    return {**pointers, "x_at": f"*{dtype}", **made.numbers, "LEVELS": count}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_levels_take_two_or_three_instructions_for_each(form: str, count: int, architecture: int) -> None:
    from q_kernels.gpu.jit import levels

    from . import sass

    made = matrix(form, count, sums=False)
    code = sass.compile_for(levels.levels, tables(made, count, "fp32") | {"out_at": "*fp32"}, architecture, 4)
    assert code.spills == 0
    # Compare and select; from 9 levels on compare, select, and half of an instruction that flips the bits of two.
    each = 2.6 if count > 8 else 3.0 if (form, count) == ("group", 8) else 2.0
    assert len(code.loop) <= (each * (count - 1) + 8.5) * made.elements, code.profile()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_levels_take_four_instructions_for_each_width(form: str, count: int, architecture: int) -> None:
    from q_kernels.gpu.jit import levels

    from . import sass

    made = matrix(form, count, sums=True)
    arguments = tables(made, count, "fp32") | {"grad_at": "*fp32", "out_at": "*fp32", "LEARNS": True}
    code = sass.compile_for(levels.gradients, arguments, architecture, 4)
    pairs = (count - 1) * made.elements
    assert code.spills == 0
    assert code.registers <= 168  # three programs on a multiprocessor
    assert code.count("FFMA.SAT") == pairs
    assert code.count("FSET") == pairs
    assert code.count("FFMA") == 2 * pairs
    assert len(code.loop) <= 4 * pairs + 26 * made.elements, code.profile()


def distances(positions: int, outputs: int) -> dict:
    """A layer of 128 channels of 30x30 pixels and as many outputs of 28x28, 32 images."""
    return {
        "weight_at": "*fp32",
        "taps_at": "*i32",
        "positions": 25088,
        "rows": 28,
        "columns": 28,
        "outputs": 128,
        "taps": 1152,
        "out_image": 100352,
        "out_row": 28,
        "out_column": 1,
        "out_channel": 784,
        "POSITIONS": positions,
        "OUTPUTS": outputs,
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("outputs", [32, 64, 128])
def test_a_distance_takes_two_additions_for_each_pair(outputs: int, dtype: str, architecture: int) -> None:
    from q_kernels.gpu.jit import adder

    from . import sass

    high, wide, warps = host_adder._forward_tile(outputs)
    arguments = distances(high, wide) | {"x_image": 115200, "x_row": 30, "x_column": 1, "x_group": 115200}
    pointers = {"x_at": "*fp32", "out_at": f"*{dtype}"}
    code = sass.compile_for(adder.distance, arguments | pointers, architecture, warps)
    pairs = high * wide * 4 // (32 * warps)
    assert code.spills == 0
    assert code.registers <= 168
    assert code.count("FADD") == 2 * pairs  # the absolute value is a modifier of the second
    assert len(code.loop) <= 2.68 * pairs, code.profile()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("outputs", [32, 64])
def test_its_gradient_takes_two_instructions_for_each_pair(outputs: int, dtype: str, architecture: int) -> None:
    from q_kernels.gpu.jit import adder

    from . import sass

    high, wide, warps = host_adder._backward_tile(outputs)
    steps = {"grad_image": 115200, "grad_row": 30, "grad_column": 1, "grad_group": 115200}
    steps |= {"x_image": 115200, "x_row": 30, "x_column": 1, "x_channel": 900}
    pointers = dict.fromkeys(("grad_at", "x_at", "poison_at"), "*fp32") | {"out_at": f"*{dtype}"}
    code = sass.compile_for(adder.input_grad, distances(high, wide) | steps | pointers, architecture, warps)
    pairs = high * wide * 4 // (32 * warps)
    # Triton 3.9 keeps one number in memory while the loop runs, which does not need it.
    assert code.spills <= (2 if triton.__version__.startswith("3.9.") else 0)
    assert code.count("LDL", "STL") == 0
    assert code.registers <= 192
    assert code.count("FADD.SAT") == pairs
    assert code.count("FFMA") == pairs
    assert len(code.loop) <= 2.9 * pairs, code.profile()
