r"""How fast a kernel could be: the larger of the times that its arithmetic and its memory take at the rates of a GPU.

$$ t = \max\left(\frac{\text{work}}{\text{work per clock and multiprocessor} \cdot \text{multiprocessors} \cdot f},\
   \frac{\text{bytes}}{\text{bytes a second}}\right) $$

Nothing here asks a driver: a GPU is a few numbers, and the formulas are plain arithmetic. A benchmark divides the limit
by the time it measured. Instructions are counted in the machine code that tests hold the kernels to; lanes of a
multiprocessor issue 128 of them in a clock, of the kinds that the kernels are made of.

Source:
    NVIDIA, CUDA C++ Programming Guide, arithmetic instructions: 128 float32 additions, multiplications and fused ones
    for each clock and multiprocessor of compute capability 8.6, 8.9 and 9.0, 64 of 8.0.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a GPU can do.

    Attributes:
        multiprocessors: How many there are.
        clock: Cycles a second, under load.
        bandwidth: Bytes a second, of a copy: what is read and what is written together.
        lanes: Instructions of one thread that a multiprocessor issues in a cycle.
        floats: Float32 additions or fused multiply-adds of a multiprocessor in a cycle.
    """

    multiprocessors: int
    clock: float
    bandwidth: float
    lanes: int = 128
    floats: int = 128


KNOWN = {
    "H200": Gpu(132, 1.98e9, 4.8e12),
    "H100": Gpu(132, 1.98e9, 3.35e12),
    "A100": Gpu(108, 1.41e9, 2.039e12, floats=64),
}
"""By a part of the name that a driver reports, with the bandwidth of the data sheet. A measured copy is lower."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least time of a call.

    Attributes:
        arithmetic: Seconds of the instructions, all multiprocessors busy.
        memory: Seconds of the bytes.
    """

    arithmetic: float
    memory: float

    @property
    def seconds(self) -> float:
        """The larger of both: they overlap."""
        return max(self.arithmetic, self.memory)

    @property
    def bound(self) -> str:
        """Which of both it is."""
        return "arithmetic" if self.arithmetic >= self.memory else "memory"

    def percent(self, seconds: float) -> float:
        """How much of the limit a measured time reaches; 100 is the limit itself."""
        return 100 * self.seconds / seconds


def _elementwise(gpu: Gpu, elements: int, instructions: float, moved: int) -> Limit:
    whole = gpu.multiprocessors * gpu.clock * gpu.lanes
    return Limit(elements * instructions / whole, elements * moved / gpu.bandwidth)


def fake_quantize(gpu: Gpu, elements: int, width: int) -> Limit:
    """Uniform, forward: reads `width` bytes of an element, writes 4; 31 instructions, of which a division is 10."""
    return _elementwise(gpu, elements, 31.0, width + 4)


def fake_quantize_grad(gpu: Gpu, elements: int, width: int) -> Limit:
    """Uniform, backward: reads the gradient in float32 and the element, writes one of its dtype; 36 instructions."""
    return _elementwise(gpu, elements, 36.0, 4 + 2 * width)


def fake_quantize_levels(gpu: Gpu, elements: int, width: int, levels: int) -> Limit:
    """To levels, forward: two instructions for each threshold, and half of one more from 9 levels on."""
    each = 2.0 if levels <= 8 else 2.5
    return _elementwise(gpu, elements, 7 + each * (levels - 1), width + 4)


def fake_quantize_levels_grad(gpu: Gpu, elements: int, width: int, levels: int) -> Limit:
    """To levels, backward: four instructions for each width, and 18 for an element."""
    return _elementwise(gpu, elements, 18.0 + 4 * (levels - 1), 4 + 2 * width)


def distance(gpu: Gpu, pairs: int, moved: int) -> Limit:
    """An adder layer, forward: two additions for each pair of an output and a tap of it; backward as many.

    Args:
        gpu: The GPU.
        pairs: Positions, times outputs, times taps. Backward to the input: the pairs that exist, which are as many.
        moved: Bytes of input, weights and output, each once.
    """
    whole = gpu.multiprocessors * gpu.clock * gpu.floats
    return Limit(2 * pairs / whole, moved / gpu.bandwidth)
