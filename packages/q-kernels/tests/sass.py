"""What a kernel becomes: machine code for a GPU that need not be there, and what its inner loop is made of.

Triton compiles ahead of time for any target, and brings the disassembler along. How a launch would specialise its
arguments is repeated here: an integer 1 becomes a constant, a multiple of 16 is known to be one.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclasses.dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    Attributes:
        instructions: Mnemonic and operands of each instruction, in order.
        loop: Those of its largest innermost loop.
        registers: Of one thread.
        shared: Bytes of one program.
    """

    instructions: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    loop: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    registers: int
    shared: int

    @property
    def spills(self) -> int:
        """Instructions that move registers to memory and back."""
        return sum(name.startswith(("LDL", "STL")) for name, _ in self.instructions)

    def count(self, *names: str) -> int:
        """Count the instructions of the loop whose mnemonics are these, or begin with these and a dot."""
        return sum(name in names or name.startswith(tuple(f"{n}." for n in names)) for name, _ in self.loop)

    def profile(self) -> dict[str, int]:
        """Count the instructions of the loop by the first part of the mnemonic."""
        return dict(collections.Counter(name.split(".")[0] for name, _ in self.loop).most_common())


def compile_for(kernel: Any, arguments: dict[str, Any], architecture: int, warps: int) -> Code:
    """Compile a kernel for arguments: types as strings, such as `*fp32`, and the values of integers and constants."""
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str):
            signature[name] = value
            known = value.startswith("*")
        elif name in constant or (value == 1 and name not in plain):
            signature[name] = "constexpr"
            constants[name] = value
            known = False
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            known = value % 16 == 0 and name not in plain
        if known:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    return dataclasses.replace(_disassembled(built.asm["cubin"]), shared=built.metadata.shared)


@functools.lru_cache(maxsize=256)
def _disassembled(binary: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        text = _output("nvdisasm", "-c", str(path))
        usage = _output("cuobjdump", "-res-usage", str(path))
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2].strip()))
            target = _TARGET.search(found[2])
            # A jump to what has been seen already; programs end in one that jumps to itself.
            if (
                found[1].startswith("BRA")
                and target
                and labels.get(target[1], len(instructions)) < len(instructions) - 1
            ):
                loops.append((labels[target[1]], len(instructions)))
    inner = [loop for loop in loops if not any(loop != other and _within(other, loop) for other in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    registers = re.findall(r"REG:(\d+)", usage)
    return Code(tuple(instructions), tuple(instructions[first:last]), max(map(int, registers)), 0)


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
