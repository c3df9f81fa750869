"""The aliases: their published constants, what they reduce to, and that they do what they say."""

import copy
import inspect

import pytest
import torch
from torch import nn

from q_aquant import (
    ChannelBorder,
    ElementBorder,
    InputPlacement,
    LearnedBorder,
    OutputPlacement,
    PatchConv2d,
    WindowBorder,
    a_rounding,
    adaround,
    aquant,
    brecq,
    qdrop,
    rounding,
)
from q_aquant.learners import ActivationScales, Borders, WeightRounding
from q_aquant.plan import Plan
from q_aquant.reconstruct import finished, with_borders
from q_aquant.setup import Setup
from q_core import QuantConv2d, Quantizer, QuantLinear, QuantUnit, load_packed, pack, save_packed
from q_core.errors import DataError, SpecError, StateError

from .networks import images, net

FEW = {"iterations": 8, "batch_size": 8, "looks": 2, "progress": False}
ALL = [
    (adaround, FEW),
    (brecq, FEW | {"activation_iterations": 4}),
    (qdrop, FEW),
    (qdrop, FEW | {"placement": InputPlacement()}),
    (qdrop, FEW | {"placement": InputPlacement(skip_bits=8)}),
    (aquant, FEW),
    (aquant, FEW | {"form": ElementBorder(degree=1)}),
    (aquant, FEW | {"form": WindowBorder()}),
    (aquant, FEW | {"form": ChannelBorder()}),
    (rounding, {"progress": False}),
    (rounding, {"progress": False, "placement": OutputPlacement()}),
    (a_rounding, {"progress": False}),
]


def plans(method, monkeypatch, **options) -> list[Plan]:
    """Record the plans by which a method learns, without learning."""
    seen: list[Plan] = []

    def learn(self, quantized, plan, stage):
        seen.append(plan)
        return quantized, ()

    monkeypatch.setattr(Setup, "learn", learn)
    method(net(), [images(16)], progress=False, **options)
    return seen


def test_adaround_has_its_published_constants(monkeypatch) -> None:
    (plan,) = plans(adaround, monkeypatch)
    assert plan.learners == (WeightRounding(lr=1e-3, penalty=0.01, beta=(20.0, 2.0), warmup=0.2),)
    assert (plan.iterations, plan.batch_size, plan.mixing, plan.drop, plan.form) == (20_000, 32, 1.0, 1.0, None)
    assert plan.loss.p == 2


def test_brecq_has_its_published_constants(monkeypatch) -> None:
    weights, scales = plans(brecq, monkeypatch)
    assert weights.learners == (WeightRounding(lr=1e-3, penalty=0.01, beta=(20.0, 2.0), warmup=0.2),)
    assert (weights.iterations, weights.mixing, weights.drop, weights.loss.p) == (20_000, 1.0, 1.0, 2)
    assert scales.learners == (ActivationScales(lr=4e-4),)
    assert (scales.iterations, scales.mixing, scales.drop, scales.loss.p) == (5_000, 1.0, 1.0, 2.4)


def test_qdrop_has_its_published_constants(monkeypatch) -> None:
    (plan,) = plans(qdrop, monkeypatch)
    assert plan.learners == (
        WeightRounding(lr=1e-3, penalty=0.01, beta=(20.0, 2.0), warmup=0.2),
        ActivationScales(4e-5),
    )
    assert (plan.iterations, plan.batch_size, plan.mixing, plan.drop, plan.form) == (20_000, 32, 0.5, 0.5, None)


def test_aquant_has_its_published_constants(monkeypatch) -> None:
    (plan,) = plans(aquant, monkeypatch)
    weights = WeightRounding(lr=3e-3, penalty=0.05, beta=(16.0, 2.0), warmup=0.2)
    assert plan.learners == (weights, ActivationScales(4e-5), Borders(lr=1e-3, warmup=0.2))
    assert (plan.iterations, plan.batch_size, plan.mixing, plan.drop, plan.pace) == (20_000, 32, 0.5, 1.0, 1.0)
    assert plan.form == ElementBorder(degree=2)


def test_with_fewer_steps_learning_rates_grow(monkeypatch) -> None:
    (plan,) = plans(qdrop, monkeypatch, iterations=625)
    assert plan.pace == pytest.approx(16)
    weights, scales = plans(brecq, monkeypatch, iterations=625, activation_iterations=5000 // 32)
    assert weights.pace == pytest.approx(16)
    assert scales.pace == pytest.approx((5000 / 156) ** 0.8)
    monkeypatch.undo()
    (plan,) = plans(adaround, monkeypatch)
    assert plan.pace == 1


@pytest.mark.parametrize("method", [rounding, a_rounding, adaround, brecq, qdrop, aquant])
def test_an_alias_is_at_most_ten_lines_over_the_parts(method) -> None:
    source = inspect.getsource(method)
    body = source.partition(method.__doc__)[2].strip().removeprefix('"""').strip()
    assert len(body.splitlines()) <= 10


@pytest.mark.parametrize(("method", "options"), ALL)
def test_a_method_leaves_the_float_model_alone_and_gives_a_model_that_packs(method, options, tmp_path) -> None:
    model, batches = net(), list(images().split(16))
    before = copy.deepcopy(model.state_dict())
    result = method(model, batches, weight_bits=3, activation_bits=3, **options)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not result.model.training
    packed = pack(result.model)
    with torch.no_grad():
        expected = result.model(batches[0])
        torch.testing.assert_close(packed(batches[0]), expected, rtol=0, atol=0)
        loaded = load_packed(save_packed(packed, tmp_path / "model.safetensors"), model)
        torch.testing.assert_close(loaded(batches[0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "options"), ALL)
def test_nothing_temporary_stays_behind(method, options) -> None:
    result = method(net(), [images()], weight_bits=2, activation_bits=2, **options)
    names = {type(module).__name__ for module in result.model.modules()}
    assert not names & {"LearnedRounding", "Gradual", "RandomDrop", "MSEObserver"}
    for module in result.model.modules():
        if isinstance(module, Quantizer):
            assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    states = [
        aquant(net(), [images()], weight_bits=2, activation_bits=2, seed=seed, **FEW).model.state_dict()
        for seed in (0, 0, 1)
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0)
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_quantization_at_outputs_wraps_blocks_and_leaves_readers_of_their_tensors_empty() -> None:
    model = rounding(net(), [images()], placement=OutputPlacement(), progress=False).model
    assert isinstance(model.block1, QuantUnit)
    # A rectifier lies between the stem and the first block, so the block quantizes what it is given.
    assert isinstance(model.block1.input_quantizer, Quantizer)
    assert isinstance(model.block1.output_quantizer, Quantizer)
    assert isinstance(model.block1.body.conv1.input_quantizer, nn.Identity)
    assert isinstance(model.block1.body.conv2.input_quantizer, Quantizer)
    assert isinstance(model.block2.conv1.input_quantizer, nn.Identity)
    assert isinstance(model.block2.shortcut.input_quantizer, nn.Identity)
    assert isinstance(model.head.input_quantizer, Quantizer)


def test_quantization_at_inputs_gives_every_layer_a_quantizer_of_its_own() -> None:
    model = rounding(net(), [images()], progress=False).model
    layers = [module for module in model.modules() if isinstance(module, QuantConv2d | QuantLinear)]
    assert len(layers) == 7
    assert all(isinstance(layer.input_quantizer, Quantizer) for layer in layers)


def test_layers_of_eight_bits_keep_nearest_rounding_and_others_get_borders() -> None:
    nearest = rounding(net(), [images()], weight_bits=2, activation_bits=2, progress=False).model
    model = with_borders(nearest, ElementBorder())
    assert type(model.stem) is QuantConv2d
    assert type(model.head) is QuantLinear
    assert type(model.block1.conv1) is PatchConv2d
    assert isinstance(model.block1.conv1.patch_quantizer.rounding, LearnedBorder)
    # A kernel of one position needs no patches once it has learned.
    assert type(model.block2.shortcut) is PatchConv2d
    model = finished(model)
    assert type(model.block1.conv1) is PatchConv2d
    assert type(model.block2.shortcut) is QuantConv2d
    assert isinstance(model.block2.shortcut.input_quantizer.rounding, LearnedBorder)


def test_float_weights_and_float_activations_are_left_out() -> None:
    weights = qdrop(net(), [images()], weight_bits=2, activation_bits=32, edge_bits=32, **FEW)
    assert all(layer.input is None for layer in weights.swap.swapped)
    activations = aquant(net(), [images()], weight_bits=32, activation_bits=2, edge_bits=32, **FEW)
    assert all(layer.weight is None for layer in activations.swap.swapped)
    assert {log.outcome for log in activations.logs} <= {"learned", "no better than nearest", "nothing to learn"}


def test_every_unit_is_at_least_as_good_as_nearest_on_what_was_held_out() -> None:
    for method in (adaround, qdrop, aquant):
        result = method(net(), [images(64)], weight_bits=2, activation_bits=2, **FEW | {"iterations": 20})
        assert len(result.logs) == len(result.units)
        for log in result.logs:
            assert log.error <= log.start
            assert (log.best == 0) == (log.outcome != "learned")


def test_learning_helps_the_output_of_the_network() -> None:
    model, data = net(), images(96)
    exact = model(data)
    nearest = rounding(model, [data], weight_bits=2, activation_bits=4, progress=False).model(data)
    options = FEW | {"iterations": 150, "looks": 5, "placement": InputPlacement()}
    learned = qdrop(model, [data], weight_bits=2, activation_bits=4, **options).model(data)
    assert (learned - exact).square().mean() < 0.8 * (nearest - exact).square().mean()


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"7 images teach \(8 given, 1 held out\), fewer than the 32 of a batch"):
        qdrop(net(), [images(8)], progress=False, iterations=2)


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="no batch"):
        qdrop(net(), [], progress=False)


def test_networks_of_several_inputs_are_refused() -> None:
    with pytest.raises(DataError, match="networks of one tensor"):
        qdrop(net(), [{"x": images(4), "y": images(4)}], progress=False)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_bits_that_do_not_exist_are_refused(bits) -> None:
    with pytest.raises(SpecError, match=f"bits={bits}"):
        aquant(net(), [images()], weight_bits=bits, **FEW)


def test_a_model_in_training_mode_is_quantized_as_in_evaluation_mode_and_stays_in_training_mode() -> None:
    model = net()
    expected = qdrop(model, [images()], weight_bits=3, activation_bits=3, **FEW).model(images(4))
    model.train()
    found = qdrop(model, [images()], weight_bits=3, activation_bits=3, **FEW).model(images(4))
    assert model.training
    assert model.block1.bn1.training
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)))

    with pytest.raises(StateError, match="conv"):
        qdrop(Twice().eval(), [images()], progress=False, iterations=2)


@pytest.mark.parametrize("form", [ChannelBorder(), ElementBorder()])
def test_an_ordinary_layer_computes_what_the_layer_on_patches_does(form) -> None:
    model = rounding(net(), [images()], weight_bits=2, activation_bits=2, progress=False).model
    patched = with_borders(model, form)
    for module in patched.modules():
        if isinstance(module, LearnedBorder):
            nn.init.normal_(module.coefficients, std=0.3)
    data = images(4)
    expected = patched(data)
    kinds = [type(module) for module in patched.modules()].count(PatchConv2d)
    settled = finished(patched)
    assert [type(module) for module in settled.modules()].count(PatchConv2d) < kinds
    torch.testing.assert_close(settled(data), expected, rtol=1e-5, atol=1e-5)  # the order of float32 sums


def test_the_whole_model_can_be_the_unit_whose_input_is_quantized() -> None:
    blocks = {"blocks": ("",), "placement": OutputPlacement(), "progress": False}
    model = rounding(net(), [images()], weight_bits=4, activation_bits=4, **blocks).model
    assert isinstance(model, QuantUnit)
    assert isinstance(model.input_quantizer, Quantizer)
    assert isinstance(model.body.stem.input_quantizer, nn.Identity)
