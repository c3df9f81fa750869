"""Redistribution: its parts, the schemes, the pass over a model, and what it leaves alone."""

import copy
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from q_adder import (
    AdderConv2d,
    AdderLinear,
    AdderMatmul,
    ExactRange,
    Interval,
    OneScale,
    OneSided,
    Published,
    QuantAdderConv2d,
    QuantAdderLinear,
    QuantAdderMatmul,
    StreamingRange,
    Symmetric,
    TiedSpec,
    adder2d,
    clamp_weights,
    cluster_kernels,
    correct_means,
    redistribute,
    reestimate_batchnorm,
)
from q_adder.models.deit import deit_tiny
from q_adder.redistribution import observe_inputs
from q_core import PackedConv2d, bits_per_weight, load_packed, pack, save_packed

seeds = st.integers(0, 2**31)


def seen(x: torch.Tensor, alpha: float = 1.0) -> ExactRange:
    found = ExactRange(alpha)
    found.update(x)
    return found


# Clusters ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    statistic=st.lists(st.floats(0.125, 8, width=16), min_size=1, max_size=12),
    groups=st.integers(1, 5),
    data=st.data(),
)
def test_the_order_of_the_kernels_does_not_change_the_groups(statistic, groups, data):
    assume(groups <= len(statistic))
    order = torch.tensor(data.draw(st.permutations(range(len(statistic)))))
    values = torch.tensor(statistic)
    one, other = cluster_kernels(values, groups), cluster_kernels(values[order], groups)
    assert torch.equal(one.group_of[order], other.group_of)
    assert torch.equal(one.ranges, other.ranges)


@settings(max_examples=40)
@given(statistic=st.lists(st.floats(0, 8, width=16), min_size=1, max_size=12), groups=st.integers(1, 5))
def test_groups_are_intervals_and_their_ranges_rise(statistic, groups):
    assume(groups <= len(statistic))
    values = torch.tensor(statistic)
    found = cluster_kernels(values, groups)
    assert len(found.ranges) == min(groups, len(set(statistic))) or groups == 1
    assert sorted(set(found.group_of.tolist())) == list(range(len(found.ranges)))
    for group, reach in enumerate(found.ranges):
        assert values[found.group_of == group].max() == reach
    assert torch.equal(found.ranges, found.ranges.sort().values)
    order = values.argsort(stable=True)
    assert bool((found.group_of[order].diff() >= 0).all())


def test_kernels_that_lie_apart_are_told_apart():
    found = cluster_kernels(torch.tensor([5.0, 0.1, 1.1, 5.2, 0.2, 1.0]), 3)
    assert found.group_of.tolist() == [2, 0, 1, 2, 0, 1]
    assert torch.equal(found.ranges, torch.tensor([0.2, 1.1, 5.2]))


def test_fewer_distinct_values_than_groups_give_fewer_groups():
    found = cluster_kernels(torch.tensor([2.0, 2.0, 1.0, 2.0]), 3)
    assert found.group_of.tolist() == [1, 1, 0, 1]
    assert found.ranges.tolist() == [1, 2]


# The clamp --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    low=st.floats(-4, 0),
    width=st.floats(0, 8),
    biased=st.booleans(),
    each=st.booleans(),
    padding=st.integers(0, 1),
    seed=seeds,
)
def test_clamped_kernels_give_the_same_outputs_for_inputs_in_the_interval(low, width, biased, each, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = 4 * torch.randn(5, 2, 3, 2, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator) if biased else None
    x = low + width * torch.rand(2, 2, 6, 5, dtype=torch.float64, generator=generator)
    # A padded zero is an input, and must lie in the interval too.
    high = max(0.0, low + width)
    ends = tuple(torch.full((5,), end, dtype=torch.float64) for end in (low, high)) if each else (low, high)
    clamped, absorbed = clamp_weights(weight, bias, *ends)
    assert float(clamped.min()) >= low
    assert float(clamped.max()) <= high
    before = adder2d(x, weight, bias, padding=padding)
    # Sums of 12 differences below 30 in float64: 50 roundings of sums below 400.
    torch.testing.assert_close(adder2d(x, clamped, absorbed, padding=padding), before, rtol=0, atol=50 * 400 * 2**-52)


def test_clamping_twice_is_clamping_once_and_changes_no_argument():
    weight, bias = 3 * torch.randn(4, 3), torch.randn(4)
    kept = weight.clone(), bias.clone()
    once = clamp_weights(weight, bias, -1.0, 2.0)
    twice = clamp_weights(*once, -1.0, 2.0)
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    assert torch.equal(weight, kept[0])
    assert torch.equal(bias, kept[1])


# Schemes ----------------------------------------------------------------------------------------------------------


def quantized(layer, scheme, x, bits, alpha=1.0):
    """One layer by itself, quantized for the inputs x."""
    fit = scheme.fit(layer.weight, seen(x, alpha), bits)
    kind = QuantAdderConv2d if isinstance(layer, AdderConv2d) else QuantAdderLinear
    made = kind.from_float(layer, fit.tied)
    if fit.weight is not layer.weight:
        made.weight = nn.Parameter(fit.weight)
    return made.eval()


@pytest.mark.parametrize("scheme", [OneSided(), Symmetric(), Interval(), OneScale()])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_that_clamps_nothing_is_within_its_rounding_of_the_float_layer(scheme, bits):
    """One group, alpha = 1: each of the K taps is off by half a step of the input and half a step of the weight."""
    layer = AdderConv2d(3, 4, 3, padding=1)
    signed = not isinstance(scheme, OneSided)
    x = torch.rand(2, 3, 6, 6) * 3 - 1.5 * signed
    # Inside the range of the inputs, and one weight that reaches it, so that the two ranges are one.
    layer.weight.data = torch.rand(layer.weight.shape) * 2.8 - 1.4 * signed
    layer.weight.data[0, 0, 0, 0] = x.max()
    made = quantized(layer, scheme, x, bits)
    scale = float(made.tied.scale)
    # Of an even number of levels around zero, the uppermost lies half a step below the end: one more half each.
    steps = 27 * (1 if isinstance(scheme, OneSided | Interval) else 2)
    difference = (made(x) - layer(x)).abs().max()
    assert 0 < difference <= steps * scale * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_weights_on_levels_leave_half_a_step_for_each_input(bits):
    layer, x = AdderLinear(20, 3), 3 * torch.rand(50, 20)
    x[0, 0] = 3
    scale = 3 / TiedSpec(bits).top
    layer.weight.data = scale * torch.randint(0, TiedSpec(bits).top + 1, layer.weight.shape)
    layer.weight.data[:, 0] = 3
    made = quantized(layer, OneSided(), x, bits)
    assert 0 < (made(x) - layer(x)).abs().max() <= 20 * scale / 2 * (1 + 1e-5)


def test_the_one_sided_scheme_represents_weights_outside_without_any_error():
    layer, x = AdderLinear(30, 4), 2 * torch.rand(9, 30)
    layer.weight.data = torch.where(torch.rand(4, 30) < 0.5, -5 * torch.rand(4, 30), 2 + 9 * torch.rand(4, 30))
    made = quantized(layer, OneSided(), x, 3)
    assert set(made.tied.weight(made.weight).unique().tolist()) == {0, float(made.tied.range()[1])}


def test_the_interval_scheme_has_a_level_at_zero_and_reaches_both_ends():
    layer, x = AdderLinear(4, 3), torch.tensor([[-1.0, 4.0, 0.0, 2.0]])
    made = quantized(layer, Interval(), x, 4)
    low, high = (float(end) for end in made.tied.range())
    assert made.tied.zero_point == 3
    # Fifteen steps of 1/3: both ends are levels.
    torch.testing.assert_close((low, high), (-1.0, 4.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [torch.tensor([[2.0, 5.0]]), torch.tensor([[-2.0, -5.0]])])
def test_an_interval_of_one_sign_is_widened_to_zero(x):
    made = quantized(AdderLinear(2, 3), Interval(), x, 8)
    low, high = made.tied.range()
    assert low <= 0 <= high
    assert float(made.tied.zero_point) == (0 if x.min() > 0 else 255)


def test_one_scale_covers_weights_and_inputs_and_makes_up_for_nothing():
    layer, x = AdderLinear(6, 3), torch.rand(5, 6)
    layer.weight.data[0, 0] = 12.0
    wide = quantized(layer, OneScale(), x, 8)
    torch.testing.assert_close(float(wide.tied.scale), 24 / 255, rtol=1e-6, atol=0)  # one rounding to float32
    narrow = quantized(layer, OneScale(cover_weights=False), x, 8)
    torch.testing.assert_close(float(narrow.tied.scale), 2 * float(x.max()) / 255, rtol=1e-6, atol=0)
    assert torch.equal(narrow.tied.absorbed(narrow.weight), torch.zeros(3))
    assert float(narrow.weight.detach().abs().max()) < 1.1 * float(x.max())
    assert layer.weight[0, 0] == 12


def test_groups_of_kernels_with_no_weight_to_cover_take_the_range_of_the_inputs():
    layer, x = AdderLinear(5, 4), torch.rand(50, 5) * 3
    layer.weight.data = -layer.weight.data.abs()
    made = quantized(layer, OneSided(), x, 8)
    assert float(made.tied.range()[1]) == pytest.approx(float(x.max()))
    # All that is rounded is the input.
    assert (made(x) - layer(x)).abs().max() <= 5 * float(made.tied.scale) / 2 * (1 + 1e-5)


def test_a_layer_of_dead_inputs_gets_the_least_range():
    for scheme in (OneSided(), Symmetric(), Interval(), Published(groups=1)):
        made = quantized(AdderLinear(4, 3), scheme, torch.zeros(2, 4), 8)
        assert bool(made(torch.zeros(2, 4)).isfinite().all())
        low, high = made.tied.range()
        assert 1e-3 <= float(high - low) <= 2.1e-3


def official(weight, x, reach, group_of, bits):
    """The published quantizer, written from its description in exact fractions.

    Returns:
        Codes of the inputs for each kernel, codes of the weights, step and bias of each kernel.
    """
    top, half = 2**bits - 1, 2 ** (bits - 1)
    largest = weight.abs().amax(1)
    inputs, weights, steps, biases = [], [], [], []
    for kernel, group in zip(weight.tolist(), group_of.tolist(), strict=True):
        s = Fraction(min(max(reach, 1e-3), float(largest[group_of == group].max())))
        step = s / top
        inputs.append([[min(top, max(0, round(Fraction(v) / step))) for v in row] for row in x.tolist()])
        clipped = [min(s, max(-s, Fraction(w))) for w in kernel]
        weights.append([min(half - 1, max(-half, round(w / (2 * step)))) for w in clipped])
        steps.append(float(step))
        biases.append(float(-sum(max(0, abs(Fraction(w)) - s) for w in kernel)))
    exact = {"dtype": torch.float64}
    return tuple(torch.tensor(found, **exact) for found in (inputs, weights, steps, biases))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_published_scheme_is_the_published_quantizer(bits, groups):
    layer, x = AdderLinear(12, 8), 3 * torch.rand(40, 12)
    layer.weight.data *= torch.linspace(0.2, 3, 8).reshape(-1, 1)
    # The largest weight of a group lies on a tie, from which a negative one may be rounded either way.
    layer.weight.data[:, 0] = 1.01 * layer.weight.data.abs().amax(1)
    made = quantized(layer, Published(groups), x, bits, alpha=0.99)
    assert made.tied.spec == TiedSpec(bits, 2)
    reach = sorted(x.flatten().tolist())[round(0.99 * (x.numel() - 1))]
    group_of = cluster_kernels(layer.weight.detach().abs().amax(1), groups).group_of
    pixels, kernels, steps, biases = official(layer.weight.detach(), x, reach, group_of, bits)
    own = made.tied.scale[made.tied.group_of]
    # Our steps are float32, one rounding away.
    torch.testing.assert_close(own.double(), steps, rtol=2**-23, atol=0)
    assert torch.equal((made.tied.weight(made.weight) / (2 * own.reshape(-1, 1))).round().double(), kernels)
    for kernel, group in enumerate(made.tied.group_of):
        assert torch.equal((made.tied.input(x, int(group)) / own[kernel]).round().double(), pixels[kernel])
    # Twelve differences below 15 in float32.
    torch.testing.assert_close(made.constant().double(), biases, rtol=0, atol=20 * 100 * 2**-23)
    expected = -steps * (pixels - 2 * kernels.unsqueeze(1)).abs().sum(-1).T + biases
    # A step that is one rounding away, in a sum below 100, and the bias as above.
    torch.testing.assert_close(made(x).double(), expected, rtol=2**-22, atol=30 * 100 * 2**-23)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.5, 4.0])
def test_one_group_covers_the_inputs_whatever_its_weights(spread):
    weight, x = spread * torch.tensor([[1.0, -0.5], [0.25, 0.75]]), torch.tensor([[0.0, 3.0, 1.0]])
    found = OneSided().fit(weight, seen(x), 8).tied
    torch.testing.assert_close(found.range()[1], torch.tensor([3.0]))
    signed = Symmetric().fit(weight, seen(-x), 8).tied
    torch.testing.assert_close(signed.scale, torch.tensor([2 * 3.0 / 255]))


@pytest.mark.parametrize("scheme", [OneSided(groups=2), Symmetric(groups=2), Published(groups=1), Published(groups=2)])
def test_the_published_range_is_the_smaller_one_of_weights_and_inputs(scheme):
    weight, x = torch.tensor([[1.0, 0.5], [0.25, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    found = scheme.fit(weight, seen(x), 8).tied
    width = 2 if isinstance(scheme, Symmetric) else 1
    torch.testing.assert_close(found.scale, torch.tensor([width * 1.0 / 255]))


@pytest.mark.parametrize("scheme", [OneSided(), Symmetric()])
@pytest.mark.parametrize("spread", [0.01, 0.3, 0.9])
def test_inputs_beyond_all_weights_are_not_lost(scheme, spread):
    x = 3 * torch.rand(400, 64)
    x *= -1 if isinstance(scheme, Symmetric) else 1
    layer = AdderLinear(64, 16)
    layer.weight.data = spread * x.abs().max() * (2 * torch.rand(16, 64) - 1)
    with torch.no_grad():
        exact, made = layer(x), quantized(layer, scheme, x, 8)(x)
    gap = (made - exact) - (made - exact).mean(0)
    # An input has the variance 3**2 / 12 and its rounding that of a step, step**2 / 12: 1 / 255**2 with 255 levels on
    # one side, four times that on two, and up to twice that where weights lie among the inputs and are rounded too:
    # 1.2e-4. With a clamp to the range of the weights 4e-3 is lost at a spread of 0.9, most at 0.3 and all at 0.01.
    assert float(gap.square().mean() / exact.var(0).mean()) < 1e-3


def test_groups_that_end_up_with_equal_ranges_are_one():
    weight = torch.tensor([1.0, 1.1, 4.0, 4.1, 9.0, 9.1]).reshape(-1, 1) * torch.ones(6, 3)
    x = torch.tensor([[0.0, 3.0, 1.0]])
    found = OneSided(groups=3).fit(weight, seen(x), 8).tied
    assert found.group_of.tolist() == [0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(found.scale, torch.tensor([1.1, 3.0]) / 255, rtol=2**-23, atol=0)


# A model ----------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [AdderConv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [AdderConv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Flatten(), AdderLinear(32, 10)]
    return nn.Sequential(*layers, nn.BatchNorm1d(10), nn.Linear(10, 4))


def trained(model: nn.Module | None = None) -> tuple[nn.Module, torch.Tensor]:
    """A network whose batch norms have seen data, and data."""
    model, x = (model or network()).train(), torch.randn(48, 3, 8, 8)
    with torch.no_grad():
        for _ in range(30):
            model(x)
    return model.eval(), x


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.detach().flatten(), other.detach().flatten()]))[0, 1])


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (6, 0.995), (4, 0.95)])
def test_a_quantized_network_stays_close_to_its_float_model(bits, least):
    model, x = trained()
    result = redistribute(model, x.split(16), weight_bits=bits, activation_bits=bits, progress=False)
    assert correlation(model(x), result.model(x)) > least
    assert not result.model.training
    assert [type(module) for path, module in result.model.named_children() if path in ("3", "6", "9")] == [
        QuantAdderConv2d,
        QuantAdderConv2d,
        QuantAdderLinear,
    ]
    # Behind a rectifier one-sided, behind a batch norm symmetric.
    assert [layer.zero_point for layer in result.layers] == [0, 0, 1 << (bits - 1)]


def frozen_state(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    return (
        state,
        hooks,
        [module.training for module in model.modules()],
        list(map(id, model.state_dict(keep_vars=True).values())),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"edge_bits": 8},
        {"reestimate_batches": 3},
        {"scheme": OneScale()},
        {"scheme": {"3": Published(), "6": OneSided(groups=2)}},
        {"mean_correction": False},
    ],
    ids=str,
)
def test_the_float_model_is_left_as_it_was(options):
    model, x = trained()
    model[4].train()
    model[3].register_forward_hook(lambda module, inputs, output: None)
    state, hooks, modes, tensors = frozen_state(model)
    result = redistribute(model, x.split(16), progress=False, **options)
    result.model(x)
    after = frozen_state(model)
    assert all(torch.equal(value, after[0][name]) for name, value in state.items())
    assert (hooks, modes, tensors) == after[1:]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_kernels_are_shared_with_the_float_model_and_biases_are_not():
    model, x = trained()
    twin = redistribute(model, [x], progress=False).model
    assert twin[3].weight is model[3].weight
    assert twin[3].bias is not None
    assert model[3].bias is None


@pytest.mark.parametrize("mean_correction", [True, False])
def test_batches_may_come_in_any_form(mean_correction):
    model, x = trained()
    parts = list(x.split(16))
    forms = {
        "list": parts,
        "generator": (part for part in parts),
        "with labels": [(part, torch.zeros(16)) for part in parts],
        "mapping": [{"input": part} for part in parts],
        "loader": DataLoader(TensorDataset(x, torch.zeros(48)), batch_size=16),
    }
    results = [
        redistribute(model, form, mean_correction=mean_correction, reestimate_batches=4, progress=False).model
        for form in forms.values()
    ]
    for other in results[1:]:
        assert all(
            torch.equal(one, two)
            for one, two in zip(results[0].state_dict().values(), other.state_dict().values(), strict=True)
        )


class Twice(nn.Module):
    """One adder layer that runs twice, with inputs of different ranges."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.adder = AdderConv2d(4, 4, 3, padding=1)
        # As wide as trained weights are: else the range of the weights would cut the inputs of the second call.
        self.adder.weight.data *= 8
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.again = self.adder
        self.head = AdderConv2d(4, 5, 3)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        x = self.norms[0](self.adder(self.stem(x).relu())).relu()
        x = self.norms[1](self.again(3 * x)).relu()
        return self.norm(self.head(x))


def test_a_layer_that_runs_twice_is_quantized_once_for_both():
    model, x = trained(Twice())
    result = redistribute(model, x.split(16), progress=False)
    assert result.model.again is result.model.adder
    assert [layer.path for layer in result.layers] == ["adder", "head"]
    assert correlation(model(x), result.model(x)) > 0.99
    # One bias serves both calls: it makes up for the mean of what they lack.
    plain = redistribute(model, x.split(16), mean_correction=False, progress=False).model
    wanted, corrected, uncorrected = (both_means(root, x) for root in (model, result.model, plain))
    assert (corrected - wanted).abs().max() < 0.5 * (uncorrected - wanted).abs().max()


def both_means(model, x):
    """The mean output of each channel over the two calls."""
    outputs = []
    handle = model.adder.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    model(x)
    handle.remove()
    return torch.cat(outputs).mean((0, 2, 3))


def test_edges_are_quantized_when_asked_for():
    model, x = trained()
    result = redistribute(model, x.split(16), edge_bits=8, progress=False)
    assert correlation(model(x), result.model(x)) > 0.999
    kinds = {layer.path: layer.kind for layer in result.swap.swapped}
    assert result.calibration.batches == 3
    packed = pack(result.model)
    assert isinstance(packed[0], PackedConv2d)
    assert bits_per_weight(packed) < 12
    assert set(kinds) == {"0", "3", "6", "9", "11"}


def test_schemes_may_be_given_by_path():
    model, x = trained()
    schemes = {"3": Published(groups=2), "9": Interval()}
    result = redistribute(model, [x], scheme=schemes, progress=False)
    assert [module.tied.spec.weight_step for module in (result.model[3], result.model[6], result.model[9])] == [2, 1, 1]
    assert result.layers[0].groups_asked == 2
    assert result.layers[1].zero_point == 0
    assert result.layers[2].zero_point not in (0, 128)


def test_one_scheme_may_be_given_for_all():
    model, x = trained()
    result = redistribute(model, [x], scheme=Symmetric(), progress=False)
    assert [layer.zero_point for layer in result.layers] == [128] * 3


def test_statistics_may_be_observed_once_and_used_often():
    model, x = trained()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AdderConv2d | AdderLinear)}
    ranges = observe_inputs(model, x.split(16), layers)
    one = redistribute(model, x.split(16), input_range=ranges, progress=False)
    other = redistribute(model, x.split(16), progress=False)
    assert torch.equal(one.model(x), other.model(x))
    streaming = redistribute(model, x.split(16), input_range=StreamingRange, progress=False)
    for left, right in zip(streaming.layers, other.layers, strict=True):
        # 4096 bins, and the largest of three batches beside the quantile of all.
        assert left.scales[0] == pytest.approx(right.scales[0], rel=0.2)


@pytest.mark.parametrize("make", [lambda: ExactRange(0.9), lambda: StreamingRange(0.9)])
def test_a_statistic_may_be_given_as_a_template(make):
    model, x = trained()
    template = make()
    one, other = (redistribute(model, [x], input_range=given, progress=False) for given in (template, make))
    assert [layer.scales for layer in one.layers] == [layer.scales for layer in other.layers]
    assert len({layer.scales for layer in one.layers}) == 3
    assert template.low > template.high
    wide = redistribute(model, [x], progress=False)
    assert all(a.scales[0] < b.scales[0] for a, b in zip(one.layers, wide.layers, strict=True))


def test_idle_groups_are_reported():
    model, x = trained()
    # Every kernel reaches beyond the inputs, so every group has their range.
    for path in ("3", "6"):
        model.get_submodule(path).weight.data[:, 0, 0, 0] = 50.0
    schemes = {"3": OneSided(groups=4), "6": OneSided(groups=2)}
    result = redistribute(model, [x], scheme=schemes, progress=False)
    assert [layer.grouping_is_idle for layer in result.layers] == [True, True, False]
    assert [len(layer.scales) for layer in result.layers] == [1, 1, 1]
    assert "grouping changed nothing in 2 of 3 layers" in str(result)
    model[3].weight.data[:4] = 0.01
    busy = redistribute(model, [x], scheme=schemes, progress=False)
    assert [layer.grouping_is_idle for layer in busy.layers] == [False, True, False]
    assert len(busy.layers[0].scales) == 2
    assert str(busy).count("\n") == 3


def test_the_report_counts_what_the_clamp_moved():
    model, x = trained()
    weight = torch.full_like(model[3].weight, 0.5)
    weight[0] = -1.0
    weight[1] = 100.0
    model[3].weight.data = weight
    result = redistribute(model, [x], progress=False)
    assert result.layers[0].clamped == 2 / 8
    assert result.layers[0].reach[0] == 0
    assert result.layers[0].shift > 0


def test_everything_is_listed_as_quantized_or_float():
    model, x = trained()
    report = redistribute(model, [x], progress=False).swap
    assert [layer.path for layer in report.swapped] == ["3", "6", "9"]
    assert {layer.path: layer.kind for layer in report.stays_float} == {
        "0": "Conv2d",
        "1": "BatchNorm2d",
        "4": "BatchNorm2d",
        "7": "BatchNorm2d",
        "10": "BatchNorm1d",
        "11": "Linear",
    }
    reasons = {layer.kind: layer.reason for layer in report.stays_float}
    assert reasons["Linear"] == "an ordinary layer, and edge_bits=32"
    assert reasons["BatchNorm2d"] == "holds parameters, but is no adder, convolution or linear layer"


# Means ------------------------------------------------------------------------------------------------------------


def channel_means(model, x, paths):
    found = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: found.update(
                {path: output.double().mean((0, 2, 3) if output.ndim == 4 else 0)}
            )
        )
        for path in paths
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_corrected_channels_have_the_mean_of_the_float_model(bits):
    model, x = trained()
    options = {"weight_bits": bits, "activation_bits": bits, "progress": False}
    paths = ("3", "6", "9")
    wanted = channel_means(model, x, paths)
    before = channel_means(redistribute(model, [x], mean_correction=False, **options).model, x, paths)
    after = channel_means(redistribute(model, [x], **options).model, x, paths)
    for path in paths:
        # Means of outputs below 400 in size, and a bias of that size in float32: a few roundings.
        torch.testing.assert_close(after[path], wanted[path], rtol=0, atol=4 * 400 * 2**-23)
        assert (before[path] - wanted[path]).abs().max() > 0.01


def test_means_are_those_of_all_batches():
    model, x = trained()
    result = redistribute(model, x.split(16), weight_bits=3, activation_bits=3, progress=False)
    wanted, found = (channel_means(root, x, ("3",)) for root in (model, result.model))
    # The inputs of the first adder layer do not depend on any correction: exact up to roundings, as above.
    torch.testing.assert_close(found["3"], wanted["3"], rtol=0, atol=4 * 400 * 2**-23)


def test_correcting_again_changes_nothing():
    model, x = trained()
    result = redistribute(model, [x], weight_bits=3, activation_bits=3, progress=False)
    shifts = correct_means(result.model, model, [x])
    assert shifts.keys() == {"3", "6", "9"}
    assert max(shifts.values()) <= 4 * 400 * 2**-23


def test_the_correction_reads_the_data_once_and_restores_modes_and_hooks():
    model, x = trained()
    twin = redistribute(model, [x], mean_correction=False, progress=False).model
    twin[4].train()
    reads = []

    def once():
        reads.append(1)
        yield from x.split(16)

    class Batches:
        __iter__ = staticmethod(once)

    correct_means(twin, model, Batches())
    assert len(reads) == 1
    assert twin[4].training
    assert not twin[5].training
    assert not any(module._forward_hooks for root in (model, twin) for module in root.modules())


# Batch norms ------------------------------------------------------------------------------------------------------


def test_new_statistics_are_those_of_training_mode():
    model, x = trained()
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.train()
            module.momentum = 0.3
    with torch.no_grad():
        for batch in (x[:16], x[16:32], x[32:], x[:16]):
            other(batch)
    reestimate_batchnorm(model, x.split(16), 4, momentum=0.3)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert not any(module.training for module in model.modules())
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_a_failure_leaves_the_momentum_as_it_was():
    model, _ = trained()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [torch.zeros(2, 5, 8, 8)], 1, momentum=0.9)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    assert not any(module.training for module in model.modules())


def test_new_statistics_are_those_of_the_quantized_network():
    model, x = trained()
    options = {"weight_bits": 3, "activation_bits": 3, "mean_correction": False, "progress": False}
    plain = redistribute(model, [x], **options).model
    renewed = redistribute(model, [x], reestimate_batches=60, **options).model
    assert renewed[4].running_mean is not model[4].running_mean
    assert renewed[4].num_batches_tracked is not model[4].num_batches_tracked
    # Behind the batch norm every channel has the mean 0; of what it was, 0.9**60 = 0.002 is left.
    left = [channel_means(root, x, ("4",))["4"].abs().max() for root in (plain, renewed)]
    assert left[1] < 0.01 * left[0]


# Distances of two activations -------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, rectified=False):
        super().__init__()
        self.one, self.other = AdderLinear(6, 5), AdderLinear(6, 5)
        self.norms = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2))
        self.distance = AdderMatmul()
        self.rectified = rectified

    def forward(self, x):
        parts = zip((self.one, self.other), self.norms, strict=True)
        a, b = (norm(layer(x).flatten(0, 1)).unflatten(0, x.shape[:2]) for layer, norm in parts)
        return self.distance(a.relu(), 2 * b.relu()) if self.rectified else self.distance(a, 2 * b)


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_two_activations_share_the_levels_that_cover_both(rectified, bits):
    model = Pair(rectified).train()
    x = torch.randn(12, 4, 6)
    with torch.no_grad():
        for _ in range(30):
            model(x)
    model.eval()
    options = {"weight_bits": bits, "activation_bits": bits, "progress": False}
    result = redistribute(model, [x], input_range=lambda: ExactRange(1.0), **options)
    layer, report = result.model.distance, result.layers[-1]
    assert isinstance(layer, QuantAdderMatmul)
    assert report.path == "distance"
    assert report.zero_point == (0 if rectified else 1 << (bits - 1))
    assert report.clamped == report.shift == 0
    operands = []
    handle = model.distance.register_forward_pre_hook(lambda module, inputs: operands.extend(inputs))
    expected = model(x)
    handle.remove()
    largest = max(float(operand.detach().abs().max()) for operand in operands)
    assert layer.tied.scale.item() == pytest.approx((1 if rectified else 2) * largest / TiedSpec(bits).top)
    # Five differences of two roundings; the uppermost of an even number of levels is half a step below the end.
    steps = 5 if rectified else 10
    assert (layer(*operands) - expected).abs().max() <= steps * layer.tied.scale.item() * (1 + 1e-5)
    with torch.no_grad():
        assert torch.equal(pack(result.model)(x), result.model(x))


def test_two_activations_may_have_an_interval_of_their_own():
    model, x = Pair().eval(), torch.randn(12, 4, 6)
    result = redistribute(model, [x], scheme={"distance": Interval()}, progress=False)
    assert result.layers[-1].zero_point not in (0, 128)
    # A scheme for all layers is one for kernels.
    other = redistribute(model, [x], scheme=Interval(), progress=False)
    assert other.layers[-1].zero_point == 128


def test_a_model_of_nothing_but_distances_of_rows_is_quantized():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = AdderMatmul()

        def forward(self, x):
            return self.distance(x, b=x.flip(-2))

    model, x = Own().eval(), torch.randn(5, 4, 3)
    result = redistribute(model, [x], input_range=lambda: ExactRange(1.0), progress=False)
    assert result.layers[0].reach == (float(x.min()), float(x.max()))
    # Three differences of two roundings, and the end as above.
    assert (result.model(x) - model(x)).abs().max() <= 3 * 2 * result.layers[0].scales[0]


def small_transformer():
    return deit_tiny(10, image_size=32, patch_size=4, depth=2, width=48, heads=2)


@pytest.fixture(scope="module")
def transformer():
    """A small adder DeiT after a few steps of training."""
    torch.manual_seed(0)
    model = small_transformer().train()
    x, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x


def test_an_adder_transformer_quantizes_packs_and_reloads(transformer, tmp_path):
    model, x = transformer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = redistribute(model, [x[:6], x[6:]], progress=False)
    out = result.model(x)
    assert bool(out.isfinite().all())
    assert correlation(model(x), out) > 0.99
    packed = pack(result.model)
    with torch.no_grad():
        assert torch.equal(packed(x), result.model(x))
    save_packed(packed, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors", small_transformer())
    assert torch.equal(loaded(x), packed(x))


def test_the_report_of_a_transformer_lists_what_is_quantized_and_all_that_stays_float(transformer):
    model, x = transformer
    result = redistribute(model, [x], progress=False)
    report = result.swap
    kinds = {}
    for layer in (*report.swapped, *report.stays_float):
        kinds.setdefault(layer.kind, []).append(layer.path)
    # In each of two blocks six linear layers and two distances of rows, seven norms of tokens, two of LayerNorm and
    # three additions.
    counts = {kind: len(paths) for kind, paths in kinds.items()}
    assert counts == {
        "AdderLinear": 12,
        "AdderMatmul": 4,
        "VisionTransformer": 1,
        "Conv2d": 1,
        "LayerNorm": 5,
        "BatchNorm1d": 14,
        "QuantAdd": 6,
        "Linear": 1,
    }
    assert {layer.reason for layer in report.stays_float if layer.kind == "QuantAdd"} == {
        "joins activations, which redistribute leaves float"
    }
    floats = {layer.path for layer in report.stays_float}
    assert {"", "patch_embedding", "norm", "head", "blocks.0.norm1"} <= floats
    assert all(layer.weight is None for layer in report.swapped if layer.kind == "AdderMatmul")
    # Tokens behind a layer norm have both signs.
    signed = {layer.path: layer.zero_point for layer in result.layers}
    assert signed["blocks.0.attention.query.0"] == 128
