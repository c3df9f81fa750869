"""Packed layers: what was fake-quantized, bit for bit, in exactly the bits it takes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from q_core import (
    CodebookGrid,
    Granularity,
    Grid,
    NearestTowardZero,
    PackedConv2d,
    PackedLinear,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    QuantSpec,
    Recipe,
    Rounding,
    Rule,
    StateError,
    UniformGrid,
    bits_per_weight,
    calibrate,
    nearest,
    pack,
    swap,
)
from q_core.packed import PackedTensor, pack_layer, packed_form, stored

from .networks import (
    GEOMETRIES,
    Inception,
    Residual,
    Tied,
    assert_bit_equal,
    everything,
    images,
    recipes,
    trained,
    untouched,
)

GRANULARITIES: dict[str, Granularity] = {
    "tensor": PerTensor(),
    "channel": PerChannel(0),
    "input channel": PerChannel(1),
    "group": PerGroup(3),
    "block": PerBlock((2, 3)),
}


def quantized(layer: nn.Module, spec: QuantSpec, x: Tensor) -> nn.Module:
    twin, _ = swap(layer, [Rule("", Recipe(spec), recipes()[1])])
    calibrate(twin, [x])
    return twin.eval()


# The same outputs


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_linear_layer_is_the_quantized_one(bits: int, granularity: Granularity, symmetric: bool) -> None:
    x = torch.randn(5, 6)
    spec = QuantSpec.signed(bits, granularity=granularity, symmetric=symmetric)
    linear = nn.Linear(6, 4)
    if bits == 1:
        linear.weight.data = (
            -linear.weight.data.abs()
        )  # the symmetric codes of one bit, -1 and 0, hold nothing positive
    layer = quantized(linear, spec, x)
    packed = pack(layer)
    assert isinstance(packed, PackedLinear)
    with torch.no_grad():
        assert_bit_equal(packed.packed_weight(torch.float32), layer.weight_quantizer(layer.weight))
        assert_bit_equal(packed(x), layer(x))
    assert packed.packed_weight.words.numel() == math.ceil(24 * bits / 32)
    assert packed.packed_weight.words.dtype == torch.int32
    assert_bit_equal(packed.packed_weight.codes(), layer.weight_quantizer.codes(layer.weight))


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_packed_convolution_has_the_geometry_of_the_quantized_one(options: dict[str, Any], bits: int) -> None:
    conv = nn.Conv2d(**options)
    x = torch.randn(2, conv.in_channels, 9, 7)
    layer = quantized(conv, QuantSpec.signed(bits, granularity=PerChannel(0)), x)
    packed = pack(layer)
    assert isinstance(packed, PackedConv2d)
    with torch.no_grad():
        assert_bit_equal(packed(x), layer(x))
        assert_bit_equal(packed(x[0]), layer(x[0]))
    assert packed.packed_weight.words.numel() == math.ceil(conv.weight.numel() * bits / 32)
    assert "weight" not in packed.state_dict()
    assert (packed.bias is None) == (conv.bias is None)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    bits=st.integers(1, 8),
    narrow=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_weight_is_packed_without_a_change(
    shape: tuple[int, ...], bits: int, narrow: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = -weight.abs() if bits == 1 else weight
    spec = QuantSpec.signed(bits, granularity=PerChannel(0), narrow=narrow and bits > 1)
    observer = Recipe(spec).build(shape)
    observer(weight)
    quantizer = observer.quantizer()
    packed = PackedTensor.from_quantizer(weight, quantizer)
    assert packed.words.numel() == math.ceil(weight.numel() * bits / 32)
    assert_bit_equal(packed(dtype), quantizer(weight))
    if dtype == torch.float32:  # what autocast makes of it
        assert_bit_equal(packed(torch.bfloat16), quantizer(weight).to(torch.bfloat16))


@pytest.mark.parametrize("network", [Residual, Inception, Tied])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_packed_network_is_the_quantized_one(network: type[nn.Module], bits: int) -> None:
    batches = [torch.randn(4, 6)] if network is Tied else images()
    twin, _ = swap(trained(network()), everything(bits, bits))
    calibrate(twin, batches)
    with untouched(twin):
        packed = pack(twin)
        assert not any(isinstance(module, (QuantConv2d, QuantLinear)) for module in packed.modules())
        with torch.no_grad():
            assert_bit_equal(packed(batches[0]), twin(batches[0]))
    biases = [layer.bias for layer in packed.modules() if isinstance(layer, (PackedConv2d, PackedLinear))]
    assert not any(bias.requires_grad for bias in biases if bias is not None)


def test_a_model_in_channels_last_is_packed_in_channels_last() -> None:
    """The layout of the weight decides how a convolution adds."""
    for conv in (nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 1), nn.Conv2d(8, 8, 5), nn.Conv2d(1, 8, 3)):
        model = conv.to(memory_format=torch.channels_last)
        x = torch.randn(4, conv.in_channels, 12, 12)
        layer = quantized(model, QuantSpec.signed(4, granularity=PerChannel(0)), x)
        packed = pack(layer)
        with torch.no_grad():
            assert packed.packed_weight(torch.float32).stride() == layer.weight_quantizer(layer.weight).stride()
            for layout in (x, x.to(memory_format=torch.channels_last)):
                assert_bit_equal(packed(layout), layer(layout))


def test_outputs_are_the_same_under_autocast() -> None:
    model = nearest(trained(Residual()), images(), weight_bits=4, activation_bits=4).model
    packed, x = pack(model), images(1)[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bit_equal(packed(x), model(x))


def test_a_packed_layer_unpacks_in_the_dtype_of_its_input() -> None:
    packed = pack(nearest(nn.Sequential(nn.Linear(6, 4)), [torch.randn(5, 6)]).model)
    for dtype in (torch.bfloat16, torch.float64):
        assert packed.to(dtype)(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert packed[0].packed_weight.words.dtype == torch.int32


# What packing does to a model


def test_packing_before_calibration_is_refused() -> None:
    twin, _ = swap(Residual(), everything())
    with (
        untouched(twin),
        pytest.raises(StateError, match=r"still holds 10 observers \(stem\.weight_quantizer, .*calibrate"),
    ):
        pack(twin)


def test_a_float_model_packs_to_itself() -> None:
    model, x = trained(Residual()), images(1)[0]
    packed = pack(model)
    assert packed is not model
    assert_bit_equal(packed(x), model(x))
    assert packed.fc.weight is model.fc.weight


def test_layers_whose_weight_stays_float_keep_it() -> None:
    weight, activation = recipes()
    twin, _ = swap(trained(Residual()), [Rule("stem", input=activation), Rule("fc", weight=weight)])
    calibrate(twin, images())
    packed = pack(twin)
    assert packed.stem.weight is twin.stem.weight
    assert isinstance(packed.stem, QuantConv2d)
    assert isinstance(packed.fc, PackedLinear)
    assert isinstance(packed.fc.input_quantizer, nn.Identity)
    assert type(packed.depthwise) is nn.Conv2d
    with torch.no_grad():
        x = images(1)[0]
        assert_bit_equal(packed(x), twin(x))


def test_the_root_can_be_packed() -> None:
    layer = quantized(nn.Linear(6, 4), QuantSpec.signed(4), torch.randn(3, 6))
    assert isinstance(pack(layer), PackedLinear)
    assert isinstance(layer, QuantLinear)


def test_activation_quantizers_are_frozen_and_their_own() -> None:
    twin, _ = swap(trained(Residual()), everything())
    calibrate(twin, images())
    twin.fc.input_quantizer = Quantizer(UniformGrid(torch.tensor([0.1]), qmin=0, qmax=15, learnable=True))
    packed = pack(twin)
    assert list(packed.fc.input_quantizer.parameters()) == []
    twin.fc.input_quantizer.grid.scale.data.fill_(9)
    twin.add.left_quantizer.grid.scale.fill_(9)
    assert_bit_equal(packed.fc.input_quantizer.grid.scale, torch.tensor([0.1]))
    assert packed.add.left_quantizer.grid.scale < 9


def test_a_quantizer_in_two_slots_stays_one() -> None:
    twin, _ = swap(trained(Residual()), everything())
    calibrate(twin, images())
    twin.add.right_quantizer = twin.add.left_quantizer
    packed = pack(twin)
    assert packed.add.right_quantizer is packed.add.left_quantizer


def test_the_mode_and_the_random_state_are_kept() -> None:
    twin, _ = swap(trained(Residual()), everything())
    calibrate(twin, images())
    twin.fc.train()
    state = torch.random.get_rng_state()
    packed = pack(twin)
    assert_bit_equal(torch.random.get_rng_state(), state)
    assert {name for name, module in packed.named_modules() if module.training} >= {"fc", "fc.packed_weight"}
    assert not packed.stem.packed_weight.training


def test_packed_models_can_be_packed_again_and_copied() -> None:
    import copy

    twin, _ = swap(trained(Residual()), everything())
    calibrate(twin, images())
    packed, x = pack(twin), images(1)[0]
    assert_bit_equal(pack(packed)(x), packed(x))
    assert_bit_equal(copy.deepcopy(packed)(x), packed(x))
    assert "codes -128 to 127" in repr(packed.fc)


def test_a_layer_of_another_kind_has_no_packed_form() -> None:
    weight = PackedTensor.from_quantizer(torch.ones(2, 2), Quantizer(UniformGrid(torch.ones(1), qmin=0, qmax=1)))
    with pytest.raises(StateError, match="layer of type Embedding has no packed form"):
        pack_layer(nn.Embedding(2, 2), weight, nn.Identity())


# Grids of other kinds


class Squares(Grid):
    """Levels at signed squares: a grid as a user writes one, with nothing but the two maps."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.qmin, self.qmax = -2, 3
        self.register_buffer("scale", scale)

    def quantize(self, x: Tensor, rounding: Rounding) -> Tensor:
        u = x / self.scale
        magnitude = torch.floor(u.abs().sqrt())
        fraction = (u.abs() - magnitude**2) / (2 * magnitude + 1)
        return rounding(torch.copysign(magnitude + fraction, u)).clamp(self.qmin, self.qmax)

    def dequantize(self, codes: Tensor) -> Tensor:
        return torch.copysign(codes**2, codes) * self.scale


def test_a_grid_of_ones_own_is_packed_as_a_table_of_its_levels() -> None:
    layer = QuantLinear(5, 7)
    layer.weight_quantizer = Quantizer(Squares(torch.tensor([0.05])))
    layer.input_quantizer = Quantizer(Squares(torch.tensor([0.3])), NearestTowardZero())
    packed, x = pack(layer), torch.randn(6, 5)
    assert isinstance(packed.packed_weight.grid, CodebookGrid)
    assert packed.packed_weight.words.numel() == math.ceil(35 * 3 / 32)  # 6 levels take 3 bits
    assert isinstance(packed.input_quantizer.grid, CodebookGrid)
    with torch.no_grad():
        torch.testing.assert_close(
            packed.packed_weight(torch.float32), layer.weight_quantizer(layer.weight), rtol=2**-23, atol=0
        )  # the table holds each product code**2 * scale, rounded once as the grid rounds it
        # A real within an ulp of the middle of two levels may fall to either side; none of these does.
        torch.testing.assert_close(packed(x), layer(x), rtol=0, atol=5 * 2**-22)  # sums of 5 products below 4


def test_a_codebook_per_channel_is_packed() -> None:
    levels = torch.randn(4, 1, 5).sort(-1).values
    layer = QuantLinear(3, 4)
    layer.weight_quantizer = Quantizer(CodebookGrid(levels, qmin=-2))
    packed, x = pack(layer), torch.randn(2, 3)
    assert packed.packed_weight.words.numel() == math.ceil(12 * 3 / 32)
    with torch.no_grad():
        assert_bit_equal(packed(x), layer(x))


# Bits per weight


def test_bits_per_weight_counts_codes_scales_and_tables() -> None:
    def built(layer: nn.Module, spec: QuantSpec) -> nn.Module:
        return pack(quantized(layer, spec, torch.randn(3, 8)))

    linear = nn.Linear(8, 4)
    # 32 weights of 4 bits in 4 words, and 4 scales of 32 bits: (4 * 32 + 4 * 32) / 32.
    assert bits_per_weight(built(linear, QuantSpec.signed(4, granularity=PerChannel(0)))) == 8
    # One scale: (128 + 32) / 32.
    assert bits_per_weight(built(linear, QuantSpec.signed(4))) == 5
    # A zero point beside the scale: (128 + 64) / 32.
    assert bits_per_weight(built(linear, QuantSpec.signed(4, symmetric=False))) == 6
    # 32 weights of 3 bits fill 3 words exactly, with 8 groups of 4: (96 + 8 * 32) / 32.
    assert bits_per_weight(built(linear, QuantSpec.signed(3, granularity=PerGroup(4)))) == 11
    # 9 weights of 1 bit take a word: (32 + 32) / 9.
    small = pack(quantized(nn.Linear(3, 3), QuantSpec.signed(1), torch.randn(2, 3)))
    assert bits_per_weight(small) == pytest.approx(64 / 9)
    table = QuantLinear(8, 4)
    table.weight_quantizer = Quantizer(CodebookGrid(torch.tensor([[-1.0, 0, 1, 2]])))
    # 32 weights of 2 bits in 2 words, and a table of 4 levels: (64 + 128) / 32.
    assert bits_per_weight(pack(table)) == 6


def test_bits_per_weight_of_float_layers_are_those_of_their_dtype() -> None:
    assert bits_per_weight(Residual()) == 32
    assert bits_per_weight(Residual().to(torch.bfloat16)) == 16
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin, _ = swap(half, [Rule("0", weight=Recipe(QuantSpec.signed(2)))])
    calibrate(twin, [])
    # 16 weights of 2 bits and a scale, 16 of 32 bits: (32 + 32 + 512) / 32.
    assert bits_per_weight(pack(twin)) == 18


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(Tied(), nn.Linear(6, 4))
    rules = [Rule(r"0\..*", Recipe(QuantSpec.signed(8))), Rule("1", Recipe(QuantSpec.signed(4)))]
    twin, _ = swap(model, rules)
    calibrate(twin, [])
    # 36 weights of 8 bits in 9 words and a scale, 24 of 4 bits in 3 words and a scale: (9 + 1 + 3 + 1) * 32 / 60.
    assert bits_per_weight(pack(twin)) == pytest.approx(14 * 32 / 60)
    twin[1].to(torch.bfloat16)
    # Not packed: 36 weights of 32 bits and 24 of 16.
    assert bits_per_weight(twin) == pytest.approx((36 * 32 + 24 * 16) / 60)


def test_a_model_without_weights_has_no_bits_per_weight() -> None:
    with pytest.raises(StateError, match="has no convolution or linear layer to count"):
        bits_per_weight(nn.ReLU())


# Quantized modules of other packages


class Whole(nn.Module):
    """A quantized layer that q_core does not know: its weight is rounded to whole numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(10 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.round()


class WholeCodes(nn.Module):
    """Its packed form."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.codes.to(x.dtype)


@packed_form.register
def _(module: Whole) -> nn.Module:
    return WholeCodes(module.weight.detach().round().to(torch.int8))


@stored.register
def _(module: WholeCodes) -> tuple[int, int]:
    return 8 * module.codes.numel(), module.codes.numel()


def test_a_module_of_another_package_is_packed_by_what_it_registered() -> None:
    own, x = Whole(6), torch.randn(4, 6)
    shared = nn.Sequential(own, nn.ReLU(), own)
    packed = pack(shared)
    assert isinstance(packed[0], WholeCodes)
    assert packed[2] is packed[0]
    assert_bit_equal(packed(x), shared(x).detach())
    assert shared[0] is own
    assert isinstance(pack(own), WholeCodes)


def test_a_module_of_another_package_counts_with_what_it_says_it_stores() -> None:
    # 6 weights of 8 bits, and 2 of 32.
    assert bits_per_weight(pack(nn.Sequential(Whole(6), nn.Linear(2, 1)))) == (6 * 8 + 2 * 32) / 8
    # Before packing it is no layer that could be counted.
    assert bits_per_weight(nn.Sequential(Whole(6), nn.Linear(2, 1))) == 32


def test_ordinary_modules_have_no_packed_form_of_their_own() -> None:
    assert packed_form(nn.ReLU()) is None
    assert stored(nn.Linear(2, 2)) is None
