"""The layers take what torch's own take, in the same places, and keep nothing that forward would have to set up."""

import copy
import math

import pytest
import torch
from torch import nn

from q_adder import AdderConv2d, AdderLinear, adder2d, adder_linear, anneal_exponent
from q_core import MatchError, RangeError, ShapeError

EXPAND = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@pytest.mark.parametrize("kernel", [3, (2, 5), 1])
@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same", "valid"])
@pytest.mark.parametrize("mode", EXPAND)
@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)  # torch's, as a twin says
def test_a_layer_pads_as_a_convolution_does(kernel, padding, mode):
    arguments = {"kernel_size": kernel, "padding": padding, "padding_mode": mode, "dilation": (1, 2)}
    layer, twin = AdderConv2d(2, 3, **arguments), nn.Conv2d(2, 3, **arguments, bias=False)
    x = torch.randn(2, 2, 9, 10)
    # The twin with the squares of both operands is the adder layer at exponent 2, so padding is torch's own.
    twin.load_state_dict(layer.state_dict())
    ones = copy.deepcopy(twin)
    nn.init.ones_(ones.weight)
    squares = ones(x.square()) + layer.weight.square().sum((1, 2, 3)).reshape(1, -1, 1, 1)
    layer.exponent = 2.0
    # Sums of 20 squares below 20 in float32, of either sign: some units in the last place of 400.
    torch.testing.assert_close(layer(x), 2 * twin(x) - squares, rtol=0, atol=20 * 400 * 2**-24)
    layer.exponent = 1.0
    assert layer(x).shape == twin(x).shape


@pytest.mark.parametrize("mode", EXPAND)
def test_padded_pixels_are_taps_in_every_mode(mode):
    layer = AdderConv2d(2, 3, 3, padding=2, padding_mode=mode)
    x = torch.randn(1, 2, 6, 7)
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode=EXPAND[mode])
    assert torch.equal(layer(x), adder2d(padded, layer.weight))
    assert torch.equal(layer(x[0]), layer(x)[0])


def test_arguments_are_those_of_a_convolution_in_the_same_places():
    places = (4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, True, "replicate")
    layer, twin = AdderConv2d(*places), nn.Conv2d(*places)
    assert repr(layer).replace("AdderConv2d", "Conv2d") == repr(twin)
    assert {name: value.shape for name, value in layer.state_dict().items()} == {
        name: value.shape for name, value in twin.state_dict().items()
    }
    x = torch.randn(2, 4, 9, 8)
    padded = nn.functional.pad(x, (0, 0, 1, 1), mode="replicate")
    expected = adder2d(padded, layer.weight, layer.bias, stride=(2, 1), dilation=(1, 2), groups=2)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == twin(x).shape
    linear = AdderLinear(5, 3, True)
    rows = torch.randn(2, 5)
    assert torch.equal(linear(rows), adder_linear(rows, linear.weight, linear.bias))


def test_there_is_no_bias_unless_asked_for():
    assert AdderConv2d(2, 3, 3).bias is None
    assert AdderConv2d(2, 3, 3, 1, 0, 1, 1, False).bias is None
    assert AdderConv2d(2, 3, 3, bias=True).bias is not None
    assert AdderLinear(2, 3).bias is None
    assert AdderLinear(2, 3, False).bias is None
    assert AdderLinear(2, 3, bias=True).bias is not None


@pytest.mark.parametrize("build", [lambda **kw: AdderConv2d(2, 3, 3, **kw), lambda **kw: AdderLinear(2, 3, **kw)])
def test_device_dtype_and_exponent_are_set_at_construction(build):
    layer = build(bias=True, exponent=1.5, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}
    assert layer.exponent == 1.5
    assert "exponent=1.5" in repr(layer)
    assert "exponent" not in repr(build())
    for exponent in (0.5, 2.5, math.nan):
        with pytest.raises(RangeError, match=f"exponent={exponent}"):
            build(exponent=exponent)


def test_weights_start_from_a_standard_normal_distribution():
    weight = AdderConv2d(64, 64, 3).weight.detach()
    # 36,864 draws: the mean is within 5 / sqrt(36864) = 0.026, the standard deviation within 0.02 of 1.
    assert abs(float(weight.mean())) < 0.026
    assert abs(float(weight.std()) - 1) < 0.02
    bias = AdderConv2d(1, 1000, 1, bias=True).bias.detach()
    assert 0 <= float(bias.min()) <= float(bias.max()) < 1


def test_a_convolution_computes_with_every_exponent():
    layer = AdderConv2d(2, 3, 3, exponent=1.5)
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(layer(x), adder2d(x, layer.weight, exponent=1.5))


@pytest.mark.parametrize("layer", [AdderConv2d(5, 3, 1, bias=True), AdderLinear(5, 3, bias=True)])
def test_forward_sets_nothing_up(layer):
    """The first call changes neither the state nor an attribute, so a layer is complete once it is built."""
    shape = (2, 5, 1, 1) if isinstance(layer, AdderConv2d) else (2, 5)
    state, attributes = copy.deepcopy(layer.state_dict()), dict(vars(layer))
    layer(torch.randn(shape))
    assert vars(layer) == attributes
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "twin"),
    [(AdderConv2d(2, 3, 3, bias=True), nn.Conv2d(2, 3, 3)), (AdderLinear(2, 3, bias=True), nn.Linear(2, 3))],
)
def test_state_round_trips_under_the_keys_of_torch(layer, twin):
    assert layer.state_dict().keys() == twin.state_dict().keys()
    x = torch.randn(4, 2, 4, 4) if isinstance(layer, AdderConv2d) else torch.randn(4, 2)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    copied.reset_parameters()
    assert not torch.equal(copied(x), layer(x))
    copied.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(copied(x), layer(x))
    twin.load_state_dict(layer.state_dict(), strict=True)


def test_a_copy_keeps_its_exponent():
    layer = AdderConv2d(2, 3, 3, exponent=1.25)
    copied = copy.deepcopy(layer)
    anneal_exponent(layer, 1.0)
    assert (layer.exponent, copied.exponent) == (1.0, 1.25)


def test_a_linear_layer_is_a_one_by_one_convolution():
    linear = AdderLinear(5, 3, bias=True)
    conv = AdderConv2d(5, 3, 1, bias=True)
    conv.load_state_dict({"weight": linear.weight.reshape(3, 5, 1, 1), "bias": linear.bias})
    x = torch.randn(4, 5)
    assert torch.equal(linear(x), conv(x.reshape(4, 5, 1, 1)).reshape(4, 3))


def test_half_precision_activations_meet_float32_weights():
    """What a convolution hands on under autocast: the result is float32, as that of a norm is on a GPU."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AdderConv2d(4, 5, 3, bias=True), nn.BatchNorm2d(5))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[0](torch.randn(2, 3, 8, 8))
        out = model[1](hidden)
        assert (hidden.dtype, out.dtype) == (torch.bfloat16, torch.float32)
        loss = model[2](out).float().square().sum()
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    # The bias before a batch norm has no effect, the rest does.
    assert all(bool(model[index].weight.grad.abs().sum() > 0) for index in (0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_keeps_its_dtype(dtype):
    model = nn.Sequential(AdderConv2d(3, 4, 3), nn.Flatten(), AdderLinear(36, 5)).to(dtype)
    assert model(torch.randn(2, 3, 5, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("mode", "size", "least"), [("reflect", 2, 3), ("circular", 1, 2)])
def test_an_input_that_is_too_small_for_its_padding_is_refused(mode, size, least):
    layer = AdderConv2d(2, 3, 3, padding=(0, 2), padding_mode=mode)
    with pytest.raises(
        ShapeError, match=rf'padding of 2 pixels in the mode "{mode}" on an input of {size} .* {least} at'
    ):
        layer(torch.zeros(1, 2, 5, size))
    assert layer(torch.zeros(1, 2, 5, least)).shape == (1, 3, 3, least + 2)


@pytest.mark.parametrize(("progress", "exponent"), [(-1.0, 2.0), (0.0, 2.0), (0.25, 1.75), (1.0, 1.0), (3.0, 1.0)])
def test_the_exponent_is_annealed_from_two_to_one(progress, exponent):
    model = nn.Sequential(AdderConv2d(1, 2, 1), nn.Flatten(), AdderLinear(2, 2))
    anneal_exponent(model, progress)
    assert [model[0].exponent, model[2].exponent] == [exponent, exponent]


def test_annealing_without_an_exponent_or_a_progress_is_refused():
    with pytest.raises(MatchError, match="Sequential has no AdderConv2d"):
        anneal_exponent(nn.Sequential(nn.Linear(1, 1)), 0.5)
    with pytest.raises(RangeError, match="progress=nan"):
        anneal_exponent(AdderConv2d(1, 1, 1), math.nan)


def test_an_input_with_other_channels_is_refused():
    with pytest.raises(ShapeError, match="kernels with 4 channels in 1 groups on an input with 3: expected 3"):
        AdderConv2d(4, 3, 3)(torch.zeros(1, 3, 5, 5))
