"""Bad input to quantized adder layers: the error names the layer, and nothing is half-applied."""

import math
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from q_adder import (
    AdderConv2d,
    AdderLinear,
    AdderMatmul,
    ExactRange,
    OneScale,
    OneSided,
    Published,
    QuantAdderConv2d,
    QuantAdderLinear,
    QuantAdderMatmul,
    Symmetric,
    TiedGrid,
    TiedSpec,
    anneal_exponent,
    clamp_weights,
    cluster_kernels,
    redistribute,
)
from q_adder.models.published import load_published_resnet20
from q_adder.models.resnet import resnet20
from q_core import (
    BackendError,
    DataError,
    FormatError,
    MatchError,
    QuantizationError,
    RangeError,
    ShapeError,
    SpecError,
    StateError,
    pack,
)

from . import oracles


def network() -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), AdderConv2d(4, 6, 3), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers, nn.Flatten(), AdderLinear(24, 3)).eval()


X = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def told(error: QuantizationError) -> str:
    """The message and its notes, which is what a traceback shows."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def refused(kind, model, batches=(X,), **options) -> str:
    """What `redistribute` says when it refuses; it must leave the model as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds, modes = [type(module) for module in model.modules()], [module.training for module in model.modules()]
    with pytest.raises(kind) as caught:
        oracles.unchecked(redistribute)(model, batches, progress=False, **options)
    # nan == nan here: some of these models hold one.
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
    assert kinds == [type(module) for module in model.modules()]
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return told(caught.value)


# Requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [OneSided(), Published()])
def test_an_unsigned_scheme_for_a_layer_that_sees_negative_inputs(scheme):
    message = refused(RangeError, network(), scheme={"6": scheme})
    assert f"{type(scheme).__name__} is for inputs that are never negative, and one of -" in message
    assert "use Symmetric() or Interval() for this layer" in message
    assert "in the layer 6" in message


@pytest.mark.parametrize("scheme", [OneSided(groups=7), Symmetric(groups=7), Published(groups=7)])
def test_more_groups_than_kernels(scheme):
    message = refused(RangeError, network(), scheme={"3": scheme})
    assert "groups=7 with 6 kernels: there must be at least 1 and at most one each" in message
    assert "in the layer 3" in message


@pytest.mark.parametrize("groups", [0, -1])
def test_no_group_of_kernels(groups):
    with pytest.raises(RangeError, match=rf"groups={groups} with 3 kernels"):
        cluster_kernels(torch.ones(3), groups)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5, math.nan])
def test_a_fraction_of_inputs_that_is_none(alpha):
    message = refused(RangeError, network(), input_range=lambda: ExactRange(alpha))
    assert f"alpha={alpha}: the fraction of inputs that is kept must be in (0, 1]" in message
    assert "in the layer 3" in message


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_that_adder_layers_do_not_have(bits):
    message = refused(SpecError, network(), weight_bits=bits, activation_bits=bits)
    assert f"bits={bits}: an adder layer is quantized to 2 to 8 bits" in message


def test_weights_and_inputs_of_different_bits():
    message = refused(SpecError, network(), weight_bits=4)
    assert "weight_bits=4, activation_bits=8" in message
    assert "share their levels, so they have the same bits" in message


@pytest.mark.parametrize("edge_bits", [1, 0, 16])
def test_bits_that_edges_do_not_have(edge_bits):
    message = refused(SpecError, network(), edge_bits=edge_bits)
    assert f"edge_bits={edge_bits}: ordinary layers take 2 to 8 bits, or 32 to stay float" in message


def test_a_scheme_for_a_path_that_is_no_adder_layer():
    message = refused(MatchError, network(), scheme={"0": OneSided()})
    assert "scheme names '0', which is no adder layer; there are 2: 3, 6" in message


def test_statistics_that_lack_a_layer():
    message = refused(MatchError, network(), input_range={"3": ExactRange()})
    assert "input_range has no statistic for '6'" in message


def test_a_scheme_about_kernels_where_there_are_none():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = AdderMatmul()

        def forward(self, x):
            return self.distance(x.flatten(2), x.flatten(2))

    for scheme in (Published(), OneScale()):
        message = refused(SpecError, Own().eval(), scheme={"distance": scheme})
        assert f"{type(scheme).__name__} is about kernels, and the distances of two activations have none" in message
        assert "in the layer distance" in message
    assert "in the layer distance" in refused(RangeError, Own().eval(), scheme={"distance": OneSided()})


def test_an_interval_that_ends_before_it_starts():
    weight = torch.randn(3, 4)
    with pytest.raises(RangeError, match=r"interval from 1\.0 to 0\.5: its start must not lie beyond its end"):
        clamp_weights(weight, None, 1.0, 0.5)


@pytest.mark.parametrize(
    ("scheme", "shown", "hint"),
    [
        (OneSided, "OneSided'> is no scheme", ": write OneSided()"),
        ("one-sided", "scheme='one-sided' is no scheme", "it takes OneSided(), Symmetric()"),
        (4, "scheme=4 is no scheme", "a mapping from paths to these"),
        ({"3": Published}, "Published'> for '3' is no scheme", ": write Published()"),
        ({"3": OneSided(), "6": None}, "scheme=None for '6' is no scheme", "OneScale() or a Scheme of your own"),
    ],
)
def test_a_scheme_that_is_none_is_refused_instead_of_ignored(scheme, shown, hint):
    message = refused(SpecError, network(), scheme=scheme)
    assert shown in message
    assert hint in message


@pytest.mark.parametrize(
    ("input_range", "shown"),
    [
        (0.999, "input_range gives 0.999: it takes a statistic such as ExactRange(0.999)"),
        ("exact", "input_range gives 'exact': it takes"),
        (lambda: 0.999, "input_range gives 0.999, made by a call: it takes"),
        ({"3": ExactRange(), "6": ExactRange}, "ExactRange'> for '6': it takes"),
    ],
)
def test_a_statistic_that_is_none(input_range, shown):
    assert shown in refused(SpecError, network(), input_range=input_range)


def test_a_statistic_that_has_seen_inputs_is_no_template():
    used = ExactRange()
    used.update(torch.ones(3))
    message = refused(StateError, network(), input_range=used)
    assert "input_range has seen inputs, and every layer starts from none" in message


@pytest.mark.parametrize("bits", [2.5, "4", 4.0])
def test_bits_that_are_no_whole_number(bits):
    for name in ("weight_bits", "activation_bits", "edge_bits"):
        options = {"weight_bits": 4, "activation_bits": 4, name: bits}
        assert f"{name}={bits!r}: it must be a whole number" in refused(SpecError, network(), **options)
    with pytest.raises(SpecError, match=rf"bits={bits!r}: an adder layer is quantized to 2 to 8 bits, a whole number"):
        TiedSpec.__post_init__(types.SimpleNamespace(bits=bits, weight_step=1))


def test_groups_that_are_no_whole_number():
    with pytest.raises(SpecError, match=r"groups=2\.5: it must be a whole number of groups of kernels"):
        oracles.unchecked(cluster_kernels)(torch.ones(3), 2.5)


def test_a_negative_number_of_batches():
    assert "reestimate_batches=-1: it is a number of batches" in refused(RangeError, network(), reestimate_batches=-1)


# Models -----------------------------------------------------------------------------------------------------------


def test_a_model_without_adder_layers():
    message = refused(MatchError, nn.Sequential(nn.Conv2d(2, 3, 3)).eval())
    assert "a Sequential has no adder layer: use q_core.nearest for ordinary layers" in message


@pytest.mark.parametrize("form", [lambda model: model, pack])
def test_a_model_that_is_quantized_already(form):
    done = form(redistribute(network(), [X], progress=False).model)
    message = refused(MatchError, done)
    assert (
        "the adder layers of this Sequential are quantized already, '3' to begin with: pass the float model" in message
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("path", "name"), [("3", "weight"), ("6", "weight"), ("6", "bias")])
def test_a_weight_that_is_not_finite(bad, path, name):
    model = network()
    model[6].bias = nn.Parameter(torch.zeros(3))
    getattr(model.get_submodule(path), name).data[1] = bad
    message = refused(DataError, model)
    assert f"values of the {name} are NaN or infinite: find where training diverged" in message
    assert f"in the layer {path}" in message


@pytest.mark.parametrize(
    "normed",
    [nn.utils.parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.3)],
)
def test_a_weight_that_is_computed(normed):
    model = network()
    normed(model[6])
    with pytest.raises(StateError) as caught:
        redistribute(model, [X], progress=False)
    assert "the weight is computed from other tensors, by weight norm, pruning" in told(caught.value)
    assert "in the layer 6" in told(caught.value)


def test_a_model_without_values():
    model = network()
    model[3].to("meta")
    with pytest.raises(BackendError) as caught:
        redistribute(model, [X], progress=False)
    assert "the weight is on the meta device, where there are no values: load the model first" in told(caught.value)
    assert "in the layer 3" in told(caught.value)


def test_an_input_too_small_for_its_padding_names_the_layer():
    layer = QuantAdderConv2d(2, 3, 3, padding=3, padding_mode="reflect", tied=levels(3), path="block.conv")
    for run in (layer, pack(layer)):
        with pytest.raises(ShapeError) as caught:
            run(torch.zeros(1, 2, 4, 3))
        assert 'padding of 3 pixels in the mode "reflect" on an input of 3 pixels: it takes 4' in told(caught.value)
        assert "in the layer block.conv" in told(caught.value)


def test_a_layer_that_is_still_annealed():
    model = network()
    anneal_exponent(model, 0.5)
    message = refused(SpecError, model)
    assert "3 has the exponent 1.5: only sums of absolute differences can be quantized" in message
    assert "anneal_exponent(model, 1.0)" in message


@pytest.mark.parametrize(("bits", "taps"), [(8, 8_421_505), (2, 715_827_883)])
def test_sums_that_32_bits_do_not_hold(bits, taps):
    spec = TiedSpec(bits)
    with torch.device("meta"):
        tied = TiedGrid(spec, torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        assert QuantAdderLinear(taps - 1, 1, tied=tied, path="wide").in_features * spec.top < 2**31
        with pytest.raises(
            RangeError, match=rf"wide sums {taps} differences of {bits}-bit codes, up to \d+: more than"
        ):
            QuantAdderLinear(taps, 1, tied=tied, path="wide")


def test_sums_of_signed_weights_that_32_bits_do_not_hold():
    with torch.device("meta"):
        tied = TiedGrid(TiedSpec(8, 2), torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(RangeError, match=r"wide sums 4202513 differences"):
            QuantAdderLinear(4_202_513, 1, tied=tied, path="wide")
        QuantAdderLinear(4_202_512, 1, tied=tied)


def test_a_model_whose_sums_32_bits_do_not_hold():
    model = nn.Sequential(nn.ReLU(), AdderLinear(8_421_505, 1)).eval()
    message = refused(RangeError, model, [torch.zeros(1, 8_421_505)])
    assert "1 sums 8421505 differences of 8-bit codes, up to 2147483775" in message


def test_a_layer_that_never_runs():
    model = network()
    model.idle = AdderLinear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    message = refused(StateError, model)
    assert "the layer saw no input: feed batches that reach it" in message
    assert "in the layer idle" in message


def test_a_published_checkpoint_with_the_wrong_keys():
    tensors = dict(resnet20().state_dict())
    tensors["layer1.0.conv1.kernel"] = tensors.pop("layer1.0.conv1.weight")
    with pytest.raises(FormatError) as caught:
        load_published_resnet20(tensors)
    assert "1 missing: layer1.0.conv1.weight; 1 unexpected: layer1.0.conv1.kernel" in str(caught.value)


# Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], iter(()), ()])
def test_no_batch(batches):
    assert "the calibration data holds no batch" in refused(DataError, network(), batches)


def test_a_batch_that_is_no_input():
    assert "batch of type str" in refused(DataError, network(), ["images"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("index", [0, 1])
def test_activations_that_are_not_finite_in_calibration(bad, index):
    broken = X.clone()
    broken[2, 1, 3, 3] = bad
    batches = [X, X]
    batches[index] = broken
    message = refused(DataError, network(), batches)
    assert "inputs are not finite: clean the data, or look for what diverges" in message
    assert "in the layer 3" in message


def test_a_network_that_makes_them_is_told_where_they_enter():
    model = network()
    model[4].weight.data[0] = math.nan
    assert "in the layer 6" in refused(DataError, model)


def levels(kernels: int) -> TiedGrid:
    return TiedGrid(TiedSpec(4), torch.tensor([0.1]), torch.tensor([3.0]), torch.zeros(kernels, dtype=torch.int64))


LAYERS = [
    (QuantAdderConv2d(2, 3, 3, tied=levels(3), path="block.conv"), (torch.zeros(1, 2, 4, 4),)),
    (QuantAdderLinear(4, 3, tied=levels(3), path="block.linear"), (torch.zeros(2, 4),)),
    (QuantAdderMatmul(levels(0), path="block.rows"), (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))),
]


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda case: getattr(case, "path", ""))
def test_activations_that_are_no_numbers_at_run_time(layer, inputs, integer):
    broken = inputs[-1].clone()
    broken.flatten()[[1, 2]] = math.nan
    run = pack(layer) if integer else layer
    with pytest.raises(DataError) as caught:
        run(*inputs[:-1], broken)
    message = told(caught.value)
    assert "inputs are NaN, for which there is no code: find where they come from" in message
    assert f"in the layer {layer.path}" in message
    assert bool(run(*inputs).isfinite().all())


@pytest.mark.parametrize("integer", [False, True])
def test_inputs_that_do_not_fit_the_layer(integer):
    conv, linear, rows = (pack(layer) if integer else layer for layer, _ in LAYERS)
    cases = [
        (conv, (torch.zeros(1, 3, 4, 4),), "on an input with 3: expected 3"),
        (conv, (torch.zeros(1, 2, 2, 4),), "window of 3 pixels on a padded input of 2"),
        (linear, (torch.zeros(2, 5),), "on an input with 5: expected 5"),
        (rows, (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), "batch dimensions and the last dimension must be equal"),
    ]
    for layer, inputs, text in cases:
        with pytest.raises(ShapeError) as caught:
            oracles.unchecked(type(layer).forward)(layer, *inputs)
        assert text in told(caught.value)
        assert f"in the layer {layer.path}" in told(caught.value)


@pytest.mark.parametrize("integer", [False, True])
def test_inputs_that_are_no_reals(integer):
    for layer, inputs in LAYERS[:2]:
        run = pack(layer) if integer else layer
        with pytest.raises(BackendError, match=r"input of torch.int64: it takes floating-point dtypes"):
            oracles.unchecked(type(run).forward)(run, inputs[0].long())
