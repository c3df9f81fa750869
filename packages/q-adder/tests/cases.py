"""Quantized adder layers of every geometry and encoding, for Hypothesis."""

import dataclasses

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from q_adder import QuantAdderConv2d, QuantAdderLinear, TiedGrid, TiedSpec

from . import oracles

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ENCODINGS = ("one-sided", "symmetric", "interval", "every other level")


@dataclasses.dataclass(frozen=True)
class Case:
    layer: nn.Module
    x: Tensor


@st.composite
def grids(draw, outputs: int, most_groups: int = 4):
    """Levels of every encoding, with one to four groups of kernels."""
    bits, encoding = draw(st.integers(2, 8)), draw(st.sampled_from(ENCODINGS))
    spec = TiedSpec(bits, 2 if encoding == "every other level" else 1)
    groups = draw(st.integers(1, min(most_groups, outputs)))
    zeros = {"symmetric": st.just((spec.top + 1) // 2), "interval": st.integers(0, spec.top)}
    zero = [draw(zeros.get(encoding, st.just(0))) for _ in range(groups)]
    # Ranges from 0.5 to 8, so that weights and inputs of the size of 3 lie on both sides of the ends.
    scale = [draw(st.floats(0.5, 8, width=32)) / spec.top for _ in range(groups)]
    rest = [draw(st.integers(0, groups - 1)) for _ in range(outputs - groups)]
    group_of = draw(st.permutations([*range(groups), *rest]))
    return TiedGrid(spec, torch.tensor(scale), torch.tensor(zero, dtype=torch.float32), torch.tensor(group_of))


def filled(draw, layer: nn.Module, shape: tuple[int, ...]) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for parameter in layer.parameters():
        parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Case(layer.eval(), x.to(draw(st.sampled_from(DTYPES))))


@st.composite
def convolutions(draw):
    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    same = draw(st.booleans())
    stride = (1, 1) if same else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = "same" if same else (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    layer = QuantAdderConv2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        tied=draw(grids(outputs)),
        path="a.layer",
    )
    # Large enough for the window without padding, and for what a reflection copies.
    size = [max(3, dilation[a] * (kernel[a] - 1) + 1) + draw(st.integers(0, 3)) for a in (0, 1)]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return filled(draw, layer, (*batch, inputs, *size))


@st.composite
def linears(draw):
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    layer = QuantAdderLinear(inputs, outputs, draw(st.booleans()), tied=draw(grids(outputs)), path="a.layer")
    return filled(draw, layer, (*draw(st.sampled_from([(), (1,), (4,), (2, 3)])), inputs))


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
