"""Forms in which borders are deployed: the same codes, or a refusal."""

import io
import math
import pathlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from q_aquant.border import BOUNDS, LARGEST, Bound, FusedBorder, LearnedBorder, rectified, unclipped
from q_aquant.deploy import DeployForm, by_shifts, by_thresholds, by_warp, deploy, in_integers
from q_aquant.drop import Draws, RandomDrop
from q_aquant.flips import AdjustedRounding
from q_aquant.layers import PatchConv2d, pad_input
from q_aquant.ops import unfold_patches
from q_aquant.packed import border_bits
from q_aquant.roundings import Gradual
from q_aquant.shifted import IntegerConv2d, ShiftedConv2d, position_steps
from q_aquant.thresholds import ThresholdRounding, WarpedRounding, carrier_table
from q_core import (
    CodebookGrid,
    MatchError,
    NearestEven,
    PackedConv2d,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    RangeError,
    Rounding,
    ShapeError,
    SpecError,
    StateError,
    UniformGrid,
    load_packed,
    pack,
    save_packed,
)
from q_core.testing import check_rounding

EXACT = {"rtol": 0, "atol": 0}
SEEDS = st.integers(0, 2**31 - 1)
BITS = st.integers(2, 4)


def random_border(
    seed: int, bits: int, zero: int, *index: int, degree: int = 2, size: float = 0.7, bound: Bound = rectified
) -> LearnedBorder:
    generator = torch.Generator().manual_seed(seed)
    values = size * torch.randn(degree + 1, *index, generator=generator)
    return LearnedBorder(values, low=float(-zero), high=float(2**bits - 1 - zero), bound=bound)


def doubled(module: Rounding) -> Any:
    """Return what a rounding means: the same in float64."""
    twin = type(module).from_facts(module.facts()).double()
    twin.load_state_dict(module.state_dict())
    return twin


def steepest(border: LearnedBorder) -> float:
    """Sample the largest slope of a border, in steps."""
    u = torch.linspace(border.low, border.high, 4001, dtype=torch.float64)
    index = border.coefficients.shape[1:]
    values = doubled(border).border(u.expand(*index[:-1], -1)).detach()
    return float(values.diff(dim=-1).max() / (u[1] - u[0]))


def points(border: LearnedBorder, rounding: ThresholdRounding) -> Tensor:
    """Return float32 coordinates for every element: a dense grid, levels, and all neighbours of each threshold."""
    index = border.coefficients.shape[1:]
    grid = torch.linspace(border.low, border.high, 501)
    near = [rounding.thresholds.squeeze(-1).movedim(0, -1)]
    for direction in (-math.inf, math.inf):
        at = near[0]
        for _ in range(20):
            at = torch.nextafter(at, torch.full_like(at, direction))
            near.append(at)
    levels = torch.arange(border.low, border.high + 1)
    every = [tensor.expand(*index[:-1], -1) for tensor in (grid, levels)]
    return torch.cat([*every, *near], -1).clamp(border.low, border.high)


# Thresholds


@given(SEEDS, BITS, st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.1, 0.7, 3.0]), st.sampled_from(BOUNDS))
@settings(max_examples=60)
def test_thresholds_have_the_codes_of_the_border_at_every_number(
    seed: int, bits: int, zero: int, degree: int, size: float, bound: Bound
) -> None:
    border = random_border(seed, bits, zero, 2, 3, 1, degree=degree, size=size, bound=bound)
    try:
        rounding = ThresholdRounding.of(border)
    except RangeError:
        # Where it never climbs by more than the activation does, there can be no second crossing.
        # 0.99: the slope is sampled at 4000 points.
        assert steepest(border) > 0.99
        return
    u = points(border, rounding)
    meaning = doubled(border)(u.double()).clamp(border.low, border.high)
    torch.testing.assert_close(rounding(u).double(), meaning, **EXACT)


@given(SEEDS, BITS, st.integers(0, 3), st.sampled_from(BOUNDS))
def test_thresholds_have_the_codes_of_float32_wherever_float32_decides(
    seed: int, bits: int, zero: int, bound: Bound
) -> None:
    border = random_border(seed, bits, zero, 4, 1, 1, bound=bound)
    rounding = ThresholdRounding.of(border)
    u = border.low + (border.high - border.low) * torch.rand(4, 1, 999)
    gap = u.double() - doubled(border).border(u.double())
    # The polynomial has a dozen operations on values below 10, each rounded by 2^-24 of its value: 1e-5 at most.
    decided = (gap - gap.round()).abs() > 1e-5
    codes, learned = rounding(u), border(u).clamp(border.low, border.high)
    torch.testing.assert_close(codes[decided], learned[decided], **EXACT)


@given(SEEDS, BITS)
def test_thresholds_of_the_border_one_half_are_in_the_middle(seed: int, bits: int) -> None:
    border = LearnedBorder.nearest((2, 1, 1), low=-2.0, high=2.0**bits - 3)
    middle = torch.arange(-2.0, 2.0**bits - 3) + 0.5
    torch.testing.assert_close(ThresholdRounding.of(border).thresholds[:, 0, 0, 0], middle, **EXACT)


def test_a_clipped_border_passes_a_level_at_it_or_just_before_the_next() -> None:
    border = LearnedBorder(torch.tensor([[-5.0, 5.0]]), low=-1.0, high=2.0)
    levels = torch.arange(-1.0, 2.0)
    expected = torch.stack([levels, levels + LARGEST], 1)
    torch.testing.assert_close(ThresholdRounding.of(border).thresholds, expected, **EXACT)


def test_an_unclipped_border_may_pass_a_level_always_or_never() -> None:
    border = LearnedBorder(torch.tensor([[-50.0, 50.0]]), low=0.0, high=3.0, bound=unclipped)
    expected = torch.tensor([[-math.inf, 1.75], [0.25, 2.75], [1.25, math.inf]])
    rounding = ThresholdRounding.of(border)
    torch.testing.assert_close(rounding.thresholds, expected, **EXACT)
    u = torch.linspace(0, 3, 61).unsqueeze(1).expand(-1, 2)
    torch.testing.assert_close(rounding(u), border(u).clamp(0, 3), **EXACT)


def test_coefficients_in_float64_give_thresholds_in_float64() -> None:
    border = random_border(3, 2, 1, 5).double()
    rounding = ThresholdRounding.of(border)
    assert rounding.thresholds.dtype == torch.float64
    above = torch.nextafter(rounding.thresholds, torch.full_like(rounding.thresholds, math.inf))
    assert bool((border(rounding.thresholds) < border(above)).all())


def test_thresholds_obey_the_laws_of_a_rounding() -> None:
    rounding = ThresholdRounding.of(random_border(0, 3, 2))
    check_rounding(rounding, torch.linspace(-2, 5, 301))


def test_a_border_that_crosses_a_level_twice_is_refused_by_name() -> None:
    values = torch.zeros(3, 4, 6, 1)
    values[:, 2, 5, 0] = torch.tensor([-2.0, 12.0, -6.0])
    border = LearnedBorder(values, low=0.0, high=3.0)
    codes = border(torch.linspace(0, 3, 3001).expand(1, 4, 6, -1))[0, 2, 5]
    assert bool((codes.diff() < 0).any())
    with pytest.raises(RangeError, match=r"channel 2, kernel position 5.*\(-2, 12, -6\).*level \d.*by a warp"):
        ThresholdRounding.of(border)


def test_a_border_that_climbs_with_the_activation_is_refused() -> None:
    # Degree 0 in fractions: the polynomial is chosen so that B(u) touches the diagonal u at 0.5 with slope 1.
    border = LearnedBorder(torch.tensor([-0.8, 1.6]), low=0.0, high=1.0)
    with pytest.raises(RangeError, match="more than once or nearly so"):
        ThresholdRounding.of(border)


def test_what_is_no_border_has_no_thresholds() -> None:
    border = random_border(0, 2, 0, 2)
    border.bound = torch.sigmoid
    with pytest.raises(SpecError, match="bound of your own"):
        ThresholdRounding.of(border)
    with pytest.raises(SpecError, match="integers"):
        ThresholdRounding.of(LearnedBorder(torch.zeros(1, 2), low=0.5, high=3.0))
    with pytest.raises(RangeError, match="1 coefficients of the border are not finite"):
        ThresholdRounding.of(LearnedBorder(torch.tensor([0.0, math.nan]), low=0.0, high=3.0))
    with pytest.raises(ShapeError, match="first axis"):
        ThresholdRounding(torch.zeros(0), low=0.0)
    with pytest.raises(RangeError, match="fall"):
        ThresholdRounding(torch.tensor([1.0, 0.0]), low=0.0)
    with pytest.raises(ShapeError, match="border for elements"):
        ThresholdRounding(torch.zeros(3, 4, 1, 1), low=0.0)(torch.zeros(2, 1, 3, 3))


# Warps


@given(SEEDS, BITS, st.integers(0, 3), st.sampled_from(BOUNDS), st.sampled_from([0.1, 0.7, 5.0]))
@settings(max_examples=60)
def test_a_warp_has_the_codes_of_the_border_off_its_margin(
    seed: int, bits: int, zero: int, bound: Bound, size: float
) -> None:
    border = random_border(seed, bits, zero, 3, 1, 1, bound=bound, size=size)
    warp = WarpedRounding(border)
    u = border.low + (border.high - border.low) * torch.rand(3, 1, 2001)
    base = torch.floor(u)
    gap = u - base - border.border(u)
    off = (gap - gap.round()).abs() > 2 * warp.margin
    torch.testing.assert_close(warp(u)[off], border(u)[off], **EXACT)
    assert off.float().mean() > 0.9 or bound is not rectified or size > 1  # borders at their ends are integers away


@given(SEEDS, BITS, st.integers(0, 3), st.sampled_from([bound for bound in BOUNDS if bound is not unclipped]))
def test_a_warp_keeps_exact_levels_and_sends_ties_down(seed: int, bits: int, zero: int, bound: Bound) -> None:
    border = random_border(seed, bits, zero, 3, 1, 1, bound=bound, size=5.0)
    levels = torch.arange(border.low, border.high + 1).expand(3, 1, -1)
    torch.testing.assert_close(WarpedRounding(border)(levels), levels, **EXACT)
    nearest = LearnedBorder.nearest((3, 1, 1), low=border.low, high=border.high, bound=bound)
    ties = levels[..., :-1] + 0.5
    torch.testing.assert_close(WarpedRounding(nearest)(ties), levels[..., :-1], **EXACT)


@given(SEEDS, BITS, st.integers(0, 3), st.floats(0.01, 10))
def test_a_stock_quantizer_after_a_warp_has_the_codes_of_the_border(
    seed: int, bits: int, zero: int, scale: float
) -> None:
    border = random_border(seed, bits, zero, 3, 1, 1)
    warp = WarpedRounding(border)
    u = border.low + (border.high - border.low) * torch.rand(3, 1, 999)
    u = torch.cat([u, torch.arange(border.low, border.high + 1).expand(3, 1, -1)], -1)
    s = torch.tensor(scale)
    out = torch.fake_quantize_per_tensor_affine(s * warp.warp(u), s, torch.tensor(zero), 0, 2**bits - 1)
    gap = u - torch.floor(u) - border.border(u)
    sure = ((gap - gap.round()).abs() > 2 * warp.margin) | (u == u.round())
    torch.testing.assert_close((out / s).round()[sure], border(u)[sure], **EXACT)


# Convolutions


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 2))),
        "padding": padding,
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }


def grid_of(bits: int, zero: int) -> UniformGrid:
    zero_point = torch.full((1,), float(zero)) if zero else None
    return UniformGrid(torch.full((1,), 0.37), zero_point, qmin=0, qmax=2**bits - 1)


def weight_quantizer(weight: Tensor, bits: int, *, per_channel: bool = True) -> Quantizer:
    """Make levels and zero points at random, one for each output or one for all."""
    shape = (len(weight), *[1] * (weight.ndim - 1)) if per_channel else (1,)
    zero = torch.randint(0, 2**bits, shape).float()
    return Quantizer(UniformGrid(0.05 + 0.1 * torch.rand(shape), zero, qmin=0, qmax=2**bits - 1))


def patch_layer(
    options: dict[str, Any], rounding: str, seed: int, bits: int, zero: int, *, shared: bool = False
) -> PatchConv2d:
    torch.manual_seed(seed)
    layer = QuantConv2d(**options)
    layer.weight_quantizer = weight_quantizer(layer.weight, bits)
    channels, positions = layer.in_channels, math.prod(layer.kernel_size)
    border = random_border(seed, bits, zero, channels, 1 if shared else positions, 1, size=0.5)
    made = {
        "border": lambda: border,
        "fused": lambda: FusedBorder(border, 0.5 + torch.rand(channels, positions)),
        "thresholds": lambda: ThresholdRounding.of(border),
        "warp": lambda: WarpedRounding(border),
        "nearest": NearestEven,
    }[rounding]()
    return PatchConv2d.from_quantized(layer, Quantizer(grid_of(bits, zero), made)).eval()


def patch_codes(layer: nn.Conv2d, quantizer: Any, x: Tensor) -> Tensor:
    stride, dilation = layer.stride, layer.dilation
    patches = unfold_patches(pad_input(x, layer), layer.kernel_size, stride, dilation)  # type: ignore[arg-type]
    return quantizer.codes(patches)


ROUNDINGS = st.sampled_from(["border", "fused", "thresholds", "warp", "nearest"])


@given(geometries(), ROUNDINGS, SEEDS, BITS, st.integers(0, 3))
@settings(max_examples=80)
def test_shifted_convolutions_have_the_codes_and_the_output_of_patches(
    options: dict[str, Any], rounding: str, seed: int, bits: int, zero: int
) -> None:
    layer = patch_layer(options, rounding, seed, bits, zero).double()  # where the order of a sum decides nothing
    x = torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64)
    shifted = ShiftedConv2d.from_patches(layer)
    steps = torch.stack(list(position_steps(pad_input(x, layer), shifted.patch_quantizer, shifted)), 2).flatten(3)
    torch.testing.assert_close((steps + zero).to(torch.int32), patch_codes(layer, layer.patch_quantizer, x), **EXACT)
    # At most 54 products below 100, added in another order in float64: 54 * 100 * 2^-53 = 6e-13.
    with torch.no_grad():
        torch.testing.assert_close(shifted(x), layer(x), rtol=0, atol=1e-11)
        torch.testing.assert_close(shifted(x[1]), layer(x)[1], rtol=0, atol=1e-11)


@given(geometries(), ROUNDINGS, SEEDS, BITS, st.integers(0, 3))
@settings(max_examples=80)
def test_integers_accumulate_the_products_of_codes_exactly(
    options: dict[str, Any], rounding: str, seed: int, bits: int, zero: int
) -> None:
    layer = patch_layer(options, rounding, seed, bits, zero).double()
    x = torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64)
    integer = IntegerConv2d.from_layer(layer)
    acc = integer.accumulate(x)
    assert acc.dtype == torch.int32
    codes = patch_codes(layer, layer.patch_quantizer, x) - zero
    own = layer.weight_quantizer
    weight = own.codes(layer.weight) - own.grid.zero_point.to(torch.int32)
    grouped = codes.reshape(2, layer.groups, -1, codes.shape[3]).long()
    matrix = weight.reshape(layer.groups, layer.out_channels // layer.groups, -1).long()
    expected = (matrix.unsqueeze(0).unsqueeze(4) * grouped.unsqueeze(2)).sum(3)
    torch.testing.assert_close(acc.long().flatten(1), expected.flatten(1), **EXACT)
    with torch.no_grad():
        # As above: another order of a sum in float64.
        torch.testing.assert_close(integer(x), layer(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(integer.accumulate(x[0]), acc[0], **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch pads a copy, which costs memory only
@given(geometries(), SEEDS, BITS, st.integers(0, 3), st.booleans(), st.booleans())
def test_a_shared_border_is_a_stock_integer_convolution_of_one_quantized_image(
    options: dict[str, Any], seed: int, bits: int, zero: int, packed: bool, per_channel: bool
) -> None:
    torch.manual_seed(seed)
    layer = QuantConv2d(**options).double().eval()
    layer.weight_quantizer = weight_quantizer(layer.weight, bits, per_channel=per_channel).double()
    border = random_border(seed, bits, zero, layer.in_channels, 1, 1)
    layer.input_quantizer = Quantizer(grid_of(bits, zero), border).double()
    x = torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64)
    integer = in_integers(pack(layer) if packed else layer)
    assert isinstance(integer, IntegerConv2d)
    codes = layer.input_quantizer.codes(x) - zero
    own = layer.weight_quantizer
    weight = own.codes(layer.weight) - own.grid.zero_point.to(torch.int32)
    stock = layer._conv_forward(codes.double(), weight.double(), None)  # below 2^53 float64 has integers
    torch.testing.assert_close(integer.accumulate(x).double(), stock, **EXACT)
    with torch.no_grad():
        # As above: another order of a sum in float64.
        torch.testing.assert_close(integer(x), layer(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rounding", ["border", "fused", "thresholds", "warp"])
def test_in_float32_shifted_and_integer_convolutions_have_the_output_of_patches(rounding: str) -> None:
    options = {"in_channels": 8, "out_channels": 6, "kernel_size": 3, "padding": 1, "stride": 2, "groups": 2}
    layer = patch_layer(options, rounding, 0, 3, 2)
    x = torch.randn(4, 8, 9, 9)
    with torch.no_grad():
        expected = layer(x)
        for form in (by_shifts, in_integers):
            # 36 products below 10, each rounded by 2^-24 of its value, and so is each sum: 36 * 10 * 36 * 6e-8 at most.
            torch.testing.assert_close(form(layer)(x), expected, rtol=0, atol=1e-3)


def test_a_border_shared_on_patches_is_shifted_too() -> None:
    options = {"in_channels": 3, "out_channels": 2, "kernel_size": (2, 3), "padding": 1}
    layer = patch_layer(options, "border", 0, 3, 0, shared=True).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        # 18 products below 100 in another order in float64.
        torch.testing.assert_close(ShiftedConv2d.from_patches(layer)(x), layer(x), rtol=0, atol=1e-11)


def test_what_cannot_be_shifted_or_counted_is_refused() -> None:
    options = {"in_channels": 4, "out_channels": 2, "kernel_size": 3}
    layer = patch_layer(options, "border", 0, 3, 0)
    grid, border = layer.patch_quantizer.grid, layer.patch_quantizer.rounding

    def with_slot(quantizer: nn.Module) -> PatchConv2d:
        twin = patch_layer(options, "border", 0, 3, 0)
        twin.patch_quantizer = quantizer
        return twin

    for form in (ShiftedConv2d.from_patches, IntegerConv2d.from_layer):
        with pytest.raises(StateError, match="AdjustedRounding looks at whole patches"):
            form(with_slot(Quantizer(grid, AdjustedRounding(low=0.0, high=7.0))))
        with pytest.raises(StateError, match="finish the reconstruction"):
            form(with_slot(Quantizer(grid, Gradual(border))))
        with pytest.raises(StateError, match="goes through a Identity"):
            form(with_slot(nn.Identity()))
        with pytest.raises(SpecError, match="CodebookGrid"):
            form(with_slot(Quantizer(CodebookGrid(torch.tensor([[0.0, 1.0, 3.0]])), border)))
        with pytest.raises(ShapeError, match="another layer"):
            form(with_slot(Quantizer(grid, random_border(0, 3, 0, 4, 4, 1))))
    bare = with_slot(Quantizer(grid, border))
    bare.weight_quantizer = nn.Identity()
    with pytest.raises(StateError, match="the weight is float"):
        in_integers(bare)
    bare.weight_quantizer = Quantizer(UniformGrid(torch.ones(2, 2, 1, 1), qmin=-2, qmax=1))
    with pytest.raises(StateError, match="one for each output"):
        in_integers(bare)
    wide = patch_layer({**options, "in_channels": 2**13}, "border", 0, 8, 0)
    wide.weight_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-128, qmax=127))
    with pytest.raises(RangeError, match="int32"):
        in_integers(wide)


# Whole models


class Mixed(nn.Module):
    """Layers of every kind, of one channel count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.patches = nn.Conv2d(4, 4, 3, padding=1)
        self.fused = nn.Conv2d(4, 4, (3, 2), groups=2, stride=2)
        self.channels = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(F.relu(self.fused(F.relu(self.patches(F.relu(self.stem(x)))))))
        return self.head(F.relu(x).mean((2, 3)))


def mixed(bits: int = 3) -> nn.Module:
    """Make the network with a border in every layer but the first."""
    torch.manual_seed(0)
    model = Mixed()
    borders = {
        "patches": random_border(1, bits, 0, 4, 9, 1),
        "fused": FusedBorder(random_border(2, bits, 0, 4, 6, 1)),
        "channels": random_border(3, bits, 0, 4, 1, 1),
        "head": random_border(4, bits, 0, 5),
    }
    for name, rounding in borders.items():
        layer = getattr(model, name)
        quantized = (QuantConv2d if name != "head" else QuantLinear).from_float(layer)
        quantized.weight_quantizer = weight_quantizer(layer.weight, bits)
        quantizer = Quantizer(UniformGrid(torch.full((1,), 0.11), qmin=0, qmax=2**bits - 1), rounding)
        if name in ("patches", "fused"):
            setattr(model, name, PatchConv2d.from_quantized(quantized, quantizer))
        else:
            quantized.input_quantizer = quantizer
            setattr(model, name, quantized)
    return model.double().eval()


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("form", "refused"),
    [
        (by_thresholds, {"fused": "fused border, which depends on the whole window"}),
        (by_warp, {"fused": "fused border, which depends on the whole window"}),
        (by_shifts, {"channels": "nothing to shift", "head": "nothing to shift"}),
        (in_integers, {"head": "no convolution"}),
    ],
)
def test_a_model_is_deployed_layer_by_layer(packed: bool, form: DeployForm, refused: dict[str, str]) -> None:
    model = pack(mixed()) if packed else mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = kinds(model)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        deployed, report = deploy(model, form)
        # As for a single layer: codes are equal, and sums of float64 in another order.
        torch.testing.assert_close(deployed(x), expected, rtol=0, atol=1e-11)
    assert [layer.path for layer in report.layers] == ["patches", "fused", "channels", "head"]
    assert {layer.path for layer in report.refused} == set(refused)
    for layer in report.refused:
        assert refused[layer.path] in str(layer.refused)
        assert f"refused: {layer.refused}" in str(report)
        assert type(deployed.get_submodule(layer.path)) is type(model.get_submodule(layer.path))
    assert kinds(model) == modules
    torch.testing.assert_close(dict(model.state_dict()), before, **EXACT)


def test_thresholds_and_shifts_go_one_after_the_other() -> None:
    model = pack(mixed())
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    deployed, _ = deploy(deploy(model, by_thresholds)[0], by_shifts)
    assert isinstance(deployed.patches, ShiftedConv2d)
    assert isinstance(deployed.patches.patch_quantizer.rounding, ThresholdRounding)
    assert isinstance(deployed.channels, PackedConv2d)
    assert not any(isinstance(module, LearnedBorder) for module in deployed.patches.modules())
    with torch.no_grad():
        # Sums of float64 in another order.
        torch.testing.assert_close(deployed(x), model(x), rtol=0, atol=1e-11)
    again, report = deploy(deployed, by_shifts)
    assert again.patches.packed_weight.words is deployed.patches.packed_weight.words
    assert len(report.refused) == 2


@pytest.mark.parametrize("forms", [(by_thresholds,), (by_warp,), (by_shifts,), (in_integers,), (by_warp, by_shifts)])
def test_a_deployed_model_comes_back_from_a_file(forms: tuple[DeployForm, ...], tmp_path: pathlib.Path) -> None:
    model = pack(mixed().float())
    for form in forms:
        model, _ = deploy(model, form)
    x = torch.randn(2, 3, 8, 8)
    path = save_packed(model, tmp_path / "model.safetensors")
    loaded = load_packed(path, Mixed())
    assert kinds(loaded) == kinds(model)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), **EXACT)
    assert save_packed(loaded, tmp_path / "again").read_bytes() == path.read_bytes()


def test_one_layer_may_be_the_model() -> None:
    layer = patch_layer({"in_channels": 2, "out_channels": 3, "kernel_size": 2}, "border", 0, 2, 0)
    deployed, report = deploy(layer, by_thresholds)
    assert type(deployed) is PatchConv2d
    assert type(layer.patch_quantizer.rounding) is LearnedBorder
    assert report.layers[0].rounding == "ThresholdRounding"


def test_a_layer_in_two_places_is_deployed_once() -> None:
    layer = patch_layer({"in_channels": 2, "out_channels": 2, "kernel_size": 1}, "border", 0, 2, 0)
    deployed, report = deploy(nn.Sequential(layer, nn.ReLU(), layer), by_shifts)
    assert deployed[0] is deployed[2]
    assert isinstance(deployed[0], ShiftedConv2d)
    assert len(report.layers) == 1


def test_what_still_learns_or_is_already_deployed_is_refused() -> None:
    layer = patch_layer({"in_channels": 2, "out_channels": 3, "kernel_size": 2}, "border", 0, 2, 0)
    quantizer = layer.patch_quantizer
    with pytest.raises(StateError, match="WarpedRounding: its border is gone"):
        by_thresholds(by_warp(layer))
    assert isinstance(by_warp(by_warp(layer)).patch_quantizer.rounding, WarpedRounding)
    layer.patch_quantizer = Quantizer(quantizer.grid, Gradual(quantizer.rounding))
    with pytest.raises(StateError, match="holds a Gradual"):
        by_thresholds(layer)
    layer.patch_quantizer = RandomDrop(quantizer, 0.5, Draws(torch.Generator()))
    _, report = deploy(layer, by_thresholds)
    assert "holds a RandomDrop" in str(report)
    with pytest.raises(MatchError, match="no layer of the Conv2d has a border"):
        deploy(nn.Conv2d(1, 1, 1), by_thresholds)


def test_thresholds_count_as_a_border() -> None:
    layer = patch_layer({"in_channels": 2, "out_channels": 3, "kernel_size": 2}, "border", 0, 2, 0)
    assert border_bits(by_thresholds(layer)) == 3 * 2 * 4 * 32
    assert border_bits(by_warp(layer)) == border_bits(layer) == 3 * 2 * 4 * 32


# Exporters


@pytest.mark.parametrize("rounding", ["border", "fused", "thresholds", "warp"])
def test_exported_shifted_convolutions_hold_standard_operators_and_no_patches(rounding: str) -> None:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2, "stride": 2}
    layer = ShiftedConv2d.from_patches(patch_layer(options, rounding, 0, 3, 2))
    x = torch.randn(2, 4, 7, 7)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert all(call.startswith("aten.") or "getitem" in call or "sym" in call for call in calls)
    assert not any("im2col" in call or "unfold" in call for call in calls)
    assert calls.count("aten.conv2d.default") == 9
    for images in (x, torch.randn(5, 4, 7, 7)):
        torch.testing.assert_close(program.module()(images), layer(images), **EXACT)


@pytest.mark.parametrize("rounding", ["border", "fused", "thresholds", "warp"])
def test_shifted_convolutions_become_onnx(rounding: str) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    reference = pytest.importorskip("onnx.reference", reason="onnx has no reference evaluator")
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "padding": 1, "groups": 2, "stride": 2}
    layer = ShiftedConv2d.from_patches(patch_layer(options, rounding, 0, 3, 2))
    plain = layer.unpacked()
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(plain(x), layer(x), **EXACT)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package announces its end, and each `if`
        torch.onnx.export(plain, (x,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue())
    (out,) = reference.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    # 12 products below 10, added in another order in float32: 12 * 10 * 2^-23 = 1.4e-5.
    torch.testing.assert_close(torch.from_numpy(out), layer(x).detach(), rtol=0, atol=1e-4)


# Tables


@given(SEEDS, BITS, st.integers(0, 3), st.sampled_from(["border", "thresholds", "warp"]))
def test_a_table_has_the_codes_of_the_quantizer_for_every_carrier_code(
    seed: int, bits: int, zero: int, rounding: str
) -> None:
    options = {"in_channels": 3, "out_channels": 2, "kernel_size": 2}
    quantizer = patch_layer(options, rounding, seed, bits, zero).double().patch_quantizer
    carrier = UniformGrid(torch.full((1,), 0.021), torch.full((1,), 31.0), qmin=0, qmax=255).double()
    table = carrier_table(quantizer, carrier)
    assert table.dtype == torch.uint8
    assert table.shape == (3, 4, 1, 256)
    levels = carrier.levels().reshape(1, 1, 1, -1).expand(1, 3, 4, -1)
    torch.testing.assert_close(table.squeeze(2).to(torch.int32), quantizer.codes(levels)[0], **EXACT)


@given(SEEDS, BITS)
def test_learned_and_derived_tables_are_equal(seed: int, bits: int) -> None:
    quantizer = patch_layer({"in_channels": 3, "out_channels": 2, "kernel_size": 2}, "border", seed, bits, 0)
    quantizer = quantizer.patch_quantizer.double()
    carrier = UniformGrid(torch.full((1,), 0.021), qmin=-128, qmax=127).double()
    derived = Quantizer(quantizer.grid, ThresholdRounding.of(quantizer.rounding))
    torch.testing.assert_close(carrier_table(derived, carrier), carrier_table(quantizer, carrier), **EXACT)


def test_what_has_no_table_is_refused() -> None:
    options = {"in_channels": 3, "out_channels": 2, "kernel_size": 2}
    carrier = UniformGrid(torch.full((1,), 0.021), qmin=0, qmax=255)
    with pytest.raises(StateError, match="FusedBorder rounds no element by itself"):
        carrier_table(patch_layer(options, "fused", 0, 2, 0).patch_quantizer, carrier)
    quantizer = patch_layer(options, "border", 0, 2, 0).patch_quantizer
    with pytest.raises(SpecError, match="8 are the most"):
        carrier_table(quantizer, UniformGrid(torch.ones(1), qmin=0, qmax=256))
    with pytest.raises(SpecError, match="one scale"):
        carrier_table(quantizer, UniformGrid(torch.ones(2, 1), qmin=0, qmax=255))
