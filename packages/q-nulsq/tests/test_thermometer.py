"""Convolutions and linear layers on planes of integers."""

import dataclasses
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from q_core import (
    CodebookGrid,
    DataError,
    FormatError,
    MatchError,
    NearestEven,
    NearestTowardZero,
    PackedConv2d,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    RangeError,
    SpecError,
    StateError,
    Stochastic,
    UniformGrid,
    bits_per_weight,
    load_packed,
    pack,
    save_packed,
)
from q_core.observer import MinMaxObserver
from q_core.spec import QuantSpec
from q_nulsq import StepGrid
from q_nulsq.thermometer import ThermometerConv2d, ThermometerLinear, deploy

from .oracles import counts_conv2d, counts_linear, planes

EXACT = {"rtol": 0, "atol": 0}
# Steps of a tile add up to 1, and a window has at most 27 taps, so a sum of magnitudes is at most 27. Each of at most
# 16 + 16 sums of planes, 27 sums of the reference and 8 more operations rounds by half a unit: 67 * 27 * 2^-53 = 2e-13
# in float64, 67 * 27 * 2^-24 = 1.1e-4 in float32.
CLOSE = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 0, "atol": 1.1e-4}}
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 2, "dilation": (2, 3), "padding": 3, "groups": 3},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": "valid", "bias": False},
    {"kernel_size": (1, 3), "padding": "same", "groups": 3, "bias": False},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 1, "padding": 1},
]
INPUTS = ["unsigned steps", "signed steps", "codebook", "uniform", "uniform with zero point"]
WEIGHTS = ["uniform", "uniform with zero point", "steps", "codebook"]


def grid_of(kind, bits, tiles, dtype, generator):
    """Return a grid whose steps add up to 1 in each tile, so that no tolerance depends on the drawn numbers."""

    def steps(count):
        drawn = torch.rand((*tiles, count), generator=generator, dtype=torch.float64) + 0.05
        return drawn / drawn.sum(-1, keepdim=True)

    codes, half = 2**bits, 2 ** (bits - 1)
    if kind == "unsigned steps":
        return StepGrid(None, steps(codes - 1).to(dtype))
    if kind in ("signed steps", "steps"):
        both = steps(codes - 1).to(dtype)
        return StepGrid(both[..., :half], both[..., half:] if bits > 1 else None)
    if kind == "codebook":  # without a level at zero
        return CodebookGrid((steps(codes).cumsum(-1) - 0.6).to(dtype), qmin=-1)
    scale = ((0.5 + torch.rand(tiles, generator=generator, dtype=torch.float64) / 2) / codes).to(dtype)
    zero = None
    if kind == "uniform with zero point":
        zero = torch.randint(0, codes, tiles, generator=generator).to(dtype)
    return UniformGrid(scale, zero, qmin=0, qmax=codes - 1) if zero is not None else signed(scale, bits)


def signed(scale, bits):
    return UniformGrid(scale, qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1 if bits > 1 else 1)


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a layer and an input are made from."""

    input_kind: str
    weight_kind: str
    input_bits: int
    weight_bits: int
    per_channel: bool
    even: bool
    seed: int

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def fill(self, layer, dtype):
        generator = self.generator()
        rounding = NearestEven() if self.even else NearestTowardZero()
        shape = layer.weight.shape
        tiles = (shape[0] if self.per_channel else 1,) + (1,) * (len(shape) - 1)
        layer.to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        layer.input_quantizer = Quantizer(grid_of(self.input_kind, self.input_bits, (1,), dtype, generator), rounding)
        layer.weight_quantizer = Quantizer(
            grid_of(self.weight_kind, self.weight_bits, tiles, dtype, generator), rounding
        )
        return layer

    def x(self, layer, shape):
        """Return an input with levels, middles, and what is an ulp or two from a middle, beside any other numbers."""
        generator, grid = self.generator(), layer.input_quantizer.grid
        levels = grid.levels().flatten()
        middles = (levels[1:] + levels[:-1]) / 2
        ulps = [middles]
        for end in (-torch.inf, torch.inf):
            near = middles
            for _ in range(2):
                near = torch.nextafter(near, torch.full_like(near, end))
                ulps.append(near)
        special = torch.cat([levels, *ulps, torch.tensor([0.0, -0.0, 1e6, -1e6, torch.inf, -torch.inf])])
        picked = special.to(levels.dtype)[torch.randint(len(special), shape, generator=generator)]
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(levels.dtype)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, picked, drawn)


LAYERS = st.builds(
    Layers,
    st.sampled_from(INPUTS),
    st.sampled_from(WEIGHTS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
DTYPES = st.sampled_from([torch.float64, torch.float32])


def expected_planes(layer, x):
    """Return the planes of the codes that the trained layer takes, in int64."""
    found = []
    for tensor, quantizer in ((x, layer.input_quantizer), (layer.weight, layer.weight_quantizer)):
        grid, codes = quantizer.grid, quantizer.codes(tensor.detach())
        zero = getattr(grid, "zero_point", None)
        if isinstance(grid, UniformGrid):
            zero = 0 if zero is None else zero.reshape(-1, *[1] * (codes.ndim - 1)).long()
            found.append((codes.long() - zero).unsqueeze(0))
        else:
            found.append(planes(codes, grid.levels(), grid.qmin))
    return found


def deployed(layer):
    twin, report = deploy(layer)
    assert not report.refused
    return twin


# What it computes


@given(LAYERS, st.sampled_from(GEOMETRIES), DTYPES)
def test_the_integers_are_those_of_loops_in_int64(case, geometry, dtype):
    layer = case.fill(QuantConv2d(3, 6, **geometry), dtype)
    x = case.x(layer, (2, 3, 6, 7))
    inputs, weights = expected_planes(layer, x)
    torch.testing.assert_close(deployed(layer).counts(x).long(), counts_conv2d(inputs, weights, layer), **EXACT)


@given(LAYERS, DTYPES, st.sampled_from([(5,), (4, 5), (0, 5), (2, 3, 5)]))
def test_the_integers_of_a_linear_layer_are_those_of_loops_in_int64(case, dtype, shape):
    layer = case.fill(QuantLinear(5, 4), dtype)
    x = case.x(layer, shape)
    inputs, weights = expected_planes(layer, x)
    torch.testing.assert_close(deployed(layer).counts(x).long(), counts_linear(inputs, weights), **EXACT)


@given(LAYERS, st.sampled_from(GEOMETRIES), DTYPES)
def test_a_convolution_returns_what_the_trained_one_returns(case, geometry, dtype):
    layer = case.fill(QuantConv2d(3, 6, **geometry), dtype)
    x = case.x(layer, (2, 3, 6, 7))
    twin = deployed(layer)
    assert type(twin) is ThermometerConv2d
    torch.testing.assert_close(twin(x), layer(x).detach(), **CLOSE[dtype])
    torch.testing.assert_close(twin(x[0]), twin(x)[0], **EXACT)


@given(LAYERS, DTYPES, st.sampled_from([(5,), (4, 5), (0, 5), (2, 3, 5)]))
def test_a_linear_layer_returns_what_the_trained_one_returns(case, dtype, shape):
    layer = case.fill(QuantLinear(5, 4), dtype)
    x = case.x(layer, shape)
    twin = deployed(layer)
    assert type(twin) is ThermometerLinear
    torch.testing.assert_close(twin(x), layer(x).detach(), **CLOSE[dtype])


@given(LAYERS, st.sampled_from(GEOMETRIES), st.sampled_from([1, 100, 1000]))
def test_how_much_is_held_at_once_changes_nothing(case, geometry, panel):
    layer = case.fill(QuantConv2d(3, 6, **geometry), torch.float32)
    x, twin = case.x(layer, (2, 3, 6, 7)), deployed(layer)
    whole = twin(x)
    twin.panel = panel
    torch.testing.assert_close(twin(x), whole, **EXACT)


@given(LAYERS, st.sampled_from(GEOMETRIES), st.integers(-20, 20))
def test_steps_times_a_power_of_two_give_outputs_times_it(case, geometry, exponent):
    layer = case.fill(QuantConv2d(3, 6, **{**geometry, "bias": False}), torch.float32)
    x, twin = case.x(layer, (1, 3, 6, 7)), deployed(layer)
    before = twin(x)
    grid = twin.input_quantizer.grid
    table = grid.scale if isinstance(grid, UniformGrid) else grid.codebook
    table.mul_(2.0**exponent)
    torch.testing.assert_close(twin(x * 2.0**exponent), before * 2.0**exponent, **EXACT)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_of_equal_steps_add_up_to_the_codes(bits):
    """A step that is a power of two divides without rounding, so both grids have the same ties."""
    levels = 2**bits - 1
    layer = QuantConv2d(3, 4, 3, padding=1)
    layer.weight_quantizer = Quantizer(UniformGrid(torch.full((4, 1, 1, 1), 0.05), qmin=-4, qmax=3))
    x = torch.randn(2, 3, 5, 5)
    layer.input_quantizer = Quantizer(StepGrid(None, torch.full((1, levels), 0.25)))
    planes_each = deployed(layer).counts(x)
    layer.input_quantizer = Quantizer(UniformGrid(torch.full((1,), 0.25), qmin=0, qmax=levels))
    torch.testing.assert_close(planes_each.sum(0, dtype=torch.int32), deployed(layer).counts(x)[0], **EXACT)


@pytest.mark.parametrize("kind", INPUTS)
def test_a_padded_zero_is_a_real_zero(kind):
    case = Layers(kind, "uniform", 3, 3, True, False, 1)
    layer = case.fill(QuantConv2d(2, 3, 3, padding=2), torch.float64)
    wide = case.fill(QuantConv2d(2, 3, 3, padding=0), torch.float64)
    x = case.x(layer, (1, 2, 4, 4)).clamp(-1, 1)
    quantized = nn.functional.pad(layer.input_quantizer(x), (2, 2, 2, 2)).detach()
    wide.input_quantizer = nn.Identity()
    torch.testing.assert_close(deployed(layer)(x), wide(quantized).detach(), **CLOSE[torch.float64])


def test_integers_beyond_the_reach_of_float32_are_exact():
    features = 601
    layer = QuantLinear(features, 2, bias=False)
    layer.input_quantizer = Quantizer(UniformGrid(torch.ones(1), torch.zeros(1), qmin=0, qmax=255))
    layer.weight_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-128, qmax=127))
    with torch.no_grad():
        layer.weight.copy_(torch.full_like(layer.weight, -127.0))
        layer.weight[1, ::7] = 126
    x = torch.full((3, features), 255.0)
    x[1, ::3] = 254
    twin = deployed(layer)
    expected = x.long() @ layer.weight.detach().long().T
    assert int(expected.abs().max()) > 1 << 24
    assert int(expected.abs().max()) % 2 == 1
    torch.testing.assert_close(twin.counts(x)[0, 0].long(), expected, **EXACT)


@pytest.mark.parametrize("kind", ["unsigned steps", "codebook", "uniform"])
def test_a_nan_reaches_the_outputs_that_see_it(kind):
    layer = Layers(kind, "steps", 2, 2, True, False, 3).fill(QuantConv2d(2, 3, 3, padding=1), torch.float32)
    x = torch.randn(1, 2, 6, 6)
    x[0, 1, 0, 4] = torch.nan
    twin = deployed(layer)
    torch.testing.assert_close(twin(x), layer(x).detach(), **CLOSE[torch.float32], equal_nan=True)
    assert int(twin(x).isnan().sum()) == 3 * 2 * 3
    with pytest.raises(DataError, match="holds a NaN"):
        twin.counts(x)


def test_autocast_does_not_reach_the_integers():
    layer = Layers("unsigned steps", "uniform", 2, 4, True, False, 5).fill(QuantLinear(601, 4), torch.float32)
    x, twin = torch.rand(3, 601), deployed(layer)
    assert int(twin.counts(x).abs().max()) > 1 << 8  # bfloat16 rounds from there on
    with torch.autocast("cpu", torch.bfloat16):
        inside = twin(x)
    torch.testing.assert_close(inside, twin(x), **EXACT)


def test_a_bfloat16_model_has_the_same_integers_and_rounds_once():
    case = Layers("signed steps", "steps", 3, 3, True, False, 7)
    layer = case.fill(QuantConv2d(3, 4, 3, padding=1), torch.float32).to(torch.bfloat16)
    x, twin = torch.randn(2, 3, 6, 6).to(torch.bfloat16), deployed(layer)
    inputs, weights = expected_planes(layer, x)
    torch.testing.assert_close(twin.counts(x).long(), counts_conv2d(inputs, weights, layer), **EXACT)
    quantizers = layer.input_quantizer, layer.weight_quantizer
    tensors = x, layer.weight.detach()
    reals, kernels = (q.grid.dequantize(q.codes(t).float()).double() for q, t in zip(quantizers, tensors, strict=True))
    exact = nn.functional.conv2d(reals, kernels, layer.bias.double(), padding=1)
    assert twin(x).dtype == torch.bfloat16
    # Half a unit of the last of 8 digits, and what float32 lost before.
    torch.testing.assert_close(twin(x).double(), exact.detach(), rtol=2**-8, atol=1.1e-4)


def test_a_transform_of_the_input_comes_first():
    layer = Layers("signed steps", "uniform", 3, 3, True, False, 9).fill(QuantLinear(5, 4), torch.float64)
    layer.input_quantizer = Quantizer(layer.input_quantizer.grid, NearestTowardZero(), nn.Tanh())
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(deployed(layer)(x), layer(x).detach(), **CLOSE[torch.float64])


# What becomes of a model


class Net(nn.Module):
    """Quantized layers of each kind, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = QuantConv2d(3, 4, 3, padding=1)
        self.middle = QuantConv2d(4, 4, 3, padding=1, groups=2)
        self.last = QuantLinear(4, 5)

    def forward(self, x):
        x = self.middle(torch.relu(self.middle(self.first(x))))
        return self.last(x.mean((2, 3)))


def net(seed=11, bits=4):
    model = Net()
    for number, (name, kinds) in enumerate(
        {
            "first": ("uniform with zero point", "uniform"),
            "middle": ("signed steps", "steps"),
            "last": ("codebook", "codebook"),
        }.items()
    ):
        Layers(*kinds, bits, bits - 1, True, False, seed + number).fill(getattr(model, name), torch.float32)
    return model.eval()


def test_every_layer_of_a_model_is_replaced_and_told_of():
    model, x = net(), torch.randn(2, 3, 6, 6)
    twin, report = deploy(model)
    assert [layer.path for layer in report.layers] == ["first", "middle", "last"]
    assert [(layer.input_planes, layer.weight_planes) for layer in report.layers] == [(1, 1), (15, 7), (16, 8)]
    # 3 * 9 products of up to 15 by 4; 2 * 9 and 4 products of ones.
    assert [layer.largest for layer in report.layers] == [27 * 15 * 4, 18, 4]
    assert "15 x 7 products of integers up to 18: 6 bits with the sign" in str(report)
    assert "15 planes of the input, 7 of the weight" in repr(twin.middle)
    assert isinstance(model.first, QuantConv2d)
    # Three layers one after the other; the tolerance of one, times what the next ones make of it: no flips with this
    # seed, and weights of a row add up to less than 10.
    torch.testing.assert_close(twin(x), model(x).detach(), rtol=0, atol=1e-3)


def test_a_packed_model_and_a_deployed_one_can_be_deployed():
    model, x = net(), torch.randn(2, 3, 6, 6)
    once, _ = deploy(model)
    for other in (pack(model), once):
        torch.testing.assert_close(deploy(other)[0](x), once(x), **EXACT)


def test_a_deployed_model_goes_through_a_file(tmp_path):
    model, x = net(), torch.randn(2, 3, 6, 6)
    twin, _ = deploy(model)
    loaded = load_packed(save_packed(twin, tmp_path / "net.safetensors"), Net())
    torch.testing.assert_close(loaded(x), twin(x), **EXACT)
    assert isinstance(loaded.last, ThermometerLinear)
    assert loaded.last.offsets == (True, True)
    assert bits_per_weight(loaded) == bits_per_weight(pack(model))


@pytest.mark.compile
def test_a_deployed_model_is_exported_for_any_batch():
    twin, _ = deploy(net(bits=2))
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.export.export(twin, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    for images in (x, torch.randn(5, 3, 6, 6)):
        torch.testing.assert_close(program.module()(images), twin(images), **EXACT)


def test_what_cannot_be_held_is_named_with_its_reason():
    model = nn.ModuleDict(
        {
            "input": QuantLinear(4, 4),
            "weight": QuantLinear(4, 4),
            "channels": QuantLinear(4, 4),
            "random": QuantLinear(4, 4),
            "groups": QuantLinear(4, 4),
            "wide": QuantLinear(66_000, 1),
            "good": QuantLinear(4, 4),
            "real": QuantLinear(4, 4),
        }
    )
    steps = Quantizer(StepGrid(None, torch.ones(1, 3)))
    bytes_of = UniformGrid(torch.ones(1), torch.zeros(1), qmin=0, qmax=255)
    for name, layer in model.items():
        layer.weight_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-128, qmax=127))
        layer.input_quantizer = steps
        if name == "real":
            layer.weight_quantizer = layer.input_quantizer = nn.Identity()
    model["input"].input_quantizer = nn.Identity()
    model["weight"].weight_quantizer = nn.Identity()
    model["channels"].input_quantizer = Quantizer(StepGrid(None, torch.ones(1, 4, 3)))
    model["random"].input_quantizer = Quantizer(bytes_of, Stochastic())
    model["groups"].weight_quantizer = Quantizer(UniformGrid(torch.ones(4, 2), qmin=-1, qmax=1))
    model["wide"].input_quantizer = Quantizer(bytes_of)
    twin, report = deploy(model)
    assert [layer.path for layer in report.layers if layer.refused is None] == ["good"]
    reasons = {layer.path: layer.refused for layer in report.refused}
    assert reasons.keys() == {"input", "weight", "channels", "random", "groups", "wide"}
    for path, words in {
        "input": "its input goes through a Identity",
        "weight": "its weight stays float",
        "channels": "each of (1, 4) tiles",
        "random": "rounded by a Stochastic",
        "groups": "levels for (4, 2) tiles",
        "wide": f"66000 products of integers can add up to {66_000 * 255 * 128}",
    }.items():
        assert words in reasons[path]
        assert f"refused: {reasons[path]}" in str(report)
    assert isinstance(twin["weight"], QuantLinear)


@pytest.mark.parametrize(
    ("quantizer", "error", "words"),
    [
        (nn.Identity(), StateError, "Identity"),
        (Quantizer(StepGrid(None, torch.ones(1, 2, 3))), SpecError, "tiles"),
        (Quantizer(UniformGrid(torch.ones(1), torch.zeros(1), qmin=0, qmax=255)), RangeError, "beyond 2147483647"),
    ],
)
def test_one_layer_that_cannot_be_held_is_an_error(quantizer, error, words):
    layer = QuantConv2d(2, 1, (200, 200))
    layer.weight_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-128, qmax=127))
    layer.input_quantizer = quantizer
    packed = pack(layer)
    assert isinstance(packed, PackedConv2d)
    with pytest.raises(error, match=words):
        ThermometerConv2d.from_packed(packed)


def test_a_grid_that_is_not_frozen_is_an_error():
    layer = QuantLinear(4, 4)
    layer.weight_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-128, qmax=127))
    packed = pack(layer)
    packed.input_quantizer = Quantizer(StepGrid(None, torch.ones(1, 3)))
    with pytest.raises(SpecError, match="on a StepGrid"):
        ThermometerLinear.from_packed(packed)


@pytest.mark.parametrize(
    ("slot", "error", "words"),
    [
        (nn.Identity(), StateError, "goes through a Identity"),
        (Quantizer(StepGrid(None, torch.ones(1, 3))), StateError, "on a StepGrid"),
        (Quantizer(CodebookGrid(torch.tensor([[0.0, 1.0]])), Stochastic()), SpecError, "Stochastic does not"),
    ],
)
def test_a_slot_that_was_changed_afterwards_is_an_error(slot, error, words):
    twin, _ = deploy(net())
    twin.last.input_quantizer = slot
    with pytest.raises(error, match=words):
        twin.last(torch.ones(1, 4))


@pytest.mark.parametrize("name", ["first", "last"])
def test_a_file_of_another_architecture_is_an_error(name, tmp_path):
    twin, _ = deploy(net())
    path = save_packed(twin, tmp_path / "net.safetensors")
    skeleton = Net()
    setattr(skeleton, name, nn.ReLU())
    with pytest.raises(FormatError, match="the layer is a ReLU"):
        load_packed(path, skeleton)


def test_a_model_without_quantized_layers_is_an_error():
    with pytest.raises(MatchError, match="no convolution or linear layer"):
        deploy(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_a_model_that_is_not_calibrated_is_an_error():
    model = net()
    model.first.input_quantizer = MinMaxObserver(QuantSpec.signed(4))
    with pytest.raises(StateError, match="observers"):
        deploy(model)
