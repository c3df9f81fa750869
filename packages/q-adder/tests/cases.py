"""Quantized adder layers of every geometry and encoding, for Hypothesis."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from q_adder import QuantAdderConv2d, QuantAdderLinear, TiedGrid, TiedSpec

from . import oracles

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SEEDS = st.integers(0, 2**31)
ENCODINGS = ("one-sided", "symmetric", "interval", "every other level")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Arguments of a `TiedGrid`.

    Strategies draw plain values only and tests build from them: the checks of shapes and types at run time use a random
    generator, which Hypothesis does not allow while it draws.
    """

    bits: int
    step: int
    scale: list[float]
    zero: list[int]
    group_of: list[int]

    def build(self, *, learnable: bool = False) -> TiedGrid:
        zero = torch.tensor(self.zero, dtype=torch.float32)
        spec, which = TiedSpec(self.bits, self.step), torch.tensor(self.group_of)
        return TiedGrid(spec, torch.tensor(self.scale), zero, which, learnable=learnable)


@st.composite
def grids(draw, outputs: int, most_groups: int = 4):
    """Levels of every encoding, with one to four groups of kernels."""
    bits, encoding = draw(st.integers(2, 8)), draw(st.sampled_from(ENCODINGS))
    top, groups = (1 << bits) - 1, draw(st.integers(1, min(most_groups, outputs)))
    zeros = {"symmetric": st.just((top + 1) // 2), "interval": st.integers(0, top)}
    zero = [draw(zeros.get(encoding, st.just(0))) for _ in range(groups)]
    # Ranges from 0.5 to 8, so that weights and inputs of the size of 3 lie on both sides of the ends.
    scale = [draw(st.floats(0.5, 8, width=32)) / top for _ in range(groups)]
    rest = [draw(st.integers(0, groups - 1)) for _ in range(outputs - groups)]
    group_of = draw(st.permutations([*range(groups), *rest]))
    return Grid(bits, 2 if encoding == "every other level" else 1, scale, zero, group_of)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a layer, shape and dtype of an input, and the seed of their values."""

    kind: type
    arguments: tuple[Any, ...]
    grid: Grid
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def build(self) -> tuple[Any, Tensor]:
        """A layer in evaluation mode, and an input."""
        generator = torch.Generator().manual_seed(self.seed)
        layer = self.kind(*self.arguments, tied=self.grid.build(), path="a.layer")
        for parameter in layer.parameters():
            parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
        x = 3 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return layer.eval(), x.to(self.dtype)


@st.composite
def convolutions(draw):
    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    same = draw(st.booleans())
    stride = (1, 1) if same else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = "same" if same else (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    arguments = (inputs, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    # Large enough for the window without padding, and for what a reflection copies.
    size = [max(3, dilation[a] * (kernel[a] - 1) + 1) + draw(st.integers(0, 3)) for a in (0, 1)]
    shape = (*draw(st.sampled_from([(), (1,), (2,)])), inputs, *size)
    rest = (draw(grids(outputs)), shape, draw(st.sampled_from(DTYPES)), draw(SEEDS))
    return Case(QuantAdderConv2d, arguments, *rest)


@st.composite
def linears(draw):
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    shape = (*draw(st.sampled_from([(), (1,), (4,), (2, 3)])), inputs)
    rest = (draw(grids(outputs)), shape, draw(st.sampled_from(DTYPES)), draw(SEEDS))
    return Case(QuantAdderLinear, (inputs, outputs, draw(st.booleans())), *rest)


def integer_oracle(layer: QuantAdderConv2d, x: Tensor) -> Tensor:
    """-scale D + constant of a convolution, each kernel with the codes of its own group, distances in int64."""
    tied, spec = layer.tied, layer.tied.spec
    batched = x if x.ndim == 4 else x.unsqueeze(0)
    edges = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(batched, edges, mode) if any(edges) else batched
    channels, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    rows = []
    for o, group in enumerate(tied.group_of.tolist()):
        scale, zero = tied.scale[group], tied.zero_point[group]
        first = o // outputs * channels
        pixels = oracles.rounded_codes(padded[:, first : first + channels], scale, zero, 0, spec.top)
        if spec.weight_step == 1:
            kernel = oracles.rounded_codes(layer.weight[o : o + 1], scale, zero, 0, spec.top)
        else:
            half = 1 << (spec.bits - 1)
            kernel = 2 * oracles.rounded_codes(layer.weight[o : o + 1], 2 * scale, zero, -half, half - 1)
        distance = oracles.code_distances(pixels, kernel, layer.stride, layer.dilation, 1)
        wide = torch.promote_types(x.dtype, scale.dtype)
        rows.append((-scale * distance).to(wide) + layer.constant()[o].to(wide))
    out = torch.cat(rows, 1).to(x.dtype)
    return out if x.ndim == 4 else out.squeeze(0)
