"""Scales of weights that learn on codes that stay, and borders that learn on."""

import copy

import pytest
import torch

from q_aquant import (
    ActivationScales,
    Borders,
    Calibration,
    InputPlacement,
    Plan,
    WeightRounding,
    aquant,
    reconstruct,
    rounding,
)
from q_aquant.journal import Journal
from q_aquant.learners import WeightScales, quantizers, settle, settled, soft_weights
from q_aquant.losses import DivergenceLoss
from q_aquant.reconstruct import fork
from q_aquant.roundings import Anchored, FixedCodes, FixedRounding, Gradual, LearnedRounding
from q_aquant.setup import Bits, Options, Setup
from q_aquant.units import find_units
from q_core import NearestEven, load_packed, pack, save_packed
from q_core.errors import ShapeError, StateError
from q_core.trace import fold_batchnorm

from .networks import images, net

BITS = {"weight_bits": 2, "activation_bits": 2, "progress": False}
FEW = {"iterations": 8, "batch_size": 8, "looks": 2}


def weights(unit):
    """List the quantizers of the weights of a unit, and the weights."""
    return [(quantizer, weight) for *_, quantizer, weight in quantizers(unit) if weight is not None]


def block():
    """Return a quantized block of its own."""
    return fork(rounding(net(), [images()], **BITS).model.block2)


@pytest.mark.parametrize("learners", [(WeightScales(),), (WeightScales(), WeightRounding())])
def test_scales_at_their_start_settle_to_nearest_rounding(learners) -> None:
    unit, before = block(), block()
    temporaries = [each for learner in learners for each in learner.begin(unit).temporaries]
    settle(temporaries)
    for (found, weight), (old, _) in zip(weights(unit), weights(before), strict=True):
        assert isinstance(found.rounding, FixedCodes)
        assert torch.equal(found.codes(weight), old.codes(weight))
        torch.testing.assert_close(found(weight), old(weight), rtol=0, atol=0)
        assert not list(found.parameters())


def test_a_scale_moves_all_levels_and_no_code() -> None:
    unit = block()
    learning = WeightScales().begin(unit)
    before = [(quantizer.codes(weight), quantizer(weight).detach()) for quantizer, weight in weights(unit)]
    with torch.no_grad():
        for quantizer, _ in weights(unit):
            quantizer.grid.scale.mul_(1.7)
    for temporary in (True, False):
        if not temporary:
            settle(learning.temporaries)
        for (quantizer, weight), (codes, levels) in zip(weights(unit), before, strict=True):
            assert torch.equal(quantizer.codes(weight), codes)
            torch.testing.assert_close(quantizer(weight), 1.7 * levels)


def test_the_gradient_of_a_scale_is_the_code() -> None:
    unit = block()
    WeightScales().begin(unit)
    for quantizer, weight in weights(unit):
        upstream = torch.randn_like(weight)
        (gradient,) = torch.autograd.grad((quantizer(weight) * upstream).sum(), quantizer.grid.scale)
        zero = 0 if quantizer.grid.zero_point is None else quantizer.grid.zero_point
        expected = (upstream * (quantizer.codes(weight) - zero)).flatten(1).sum(1).reshape(gradient.shape)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)  # float32 sums of some 50 terms


def test_rounding_that_learns_sees_the_scale_of_the_start() -> None:
    unit, before = block(), block()
    scales = WeightScales().begin(unit)
    roundings = WeightRounding().begin(unit)
    with torch.no_grad():
        for quantizer, _ in weights(unit):
            assert isinstance(quantizer.rounding, Anchored)
            assert isinstance(quantizer.rounding.rounding, LearnedRounding)
            quantizer.grid.scale.mul_(1.3)
    for (quantizer, weight), (old, _) in zip(weights(unit), weights(before), strict=True):
        levels = old.grid.levels()
        # At the start nothing is rounded: the weight itself, clipped, times the factor of the scale.
        clipped = 1.3 * weight.clamp(levels[..., 0], levels[..., -1])
        torch.testing.assert_close(quantizer(weight), clipped, rtol=1e-5, atol=4e-6)
    logits = [quantizer.rounding.rounding.logit for quantizer, _ in weights(unit)]
    with torch.no_grad():
        for logit in logits:
            logit.copy_(torch.randn_like(logit))
    temporaries = scales.temporaries + roundings.temporaries
    with settled(temporaries):
        for (quantizer, weight), (old, _), logit in zip(weights(unit), weights(before), logits, strict=True):
            zero = 0 if old.grid.zero_point is None else old.grid.zero_point
            levels = old.grid.levels()
            u = weight.clamp(levels[..., 0], levels[..., -1]) / old.grid.scale
            expected = (u.floor() + (logit >= 0) + zero).clamp(old.grid.qmin, old.grid.qmax)
            assert torch.equal(quantizer.codes(weight).float(), expected)
    assert all(isinstance(quantizer.rounding.rounding, LearnedRounding) for quantizer, _ in weights(unit))


def test_scales_after_rounding_are_refused() -> None:
    unit = block()
    WeightRounding().begin(unit)
    with pytest.raises(StateError, match="put WeightScales before WeightRounding"):
        WeightScales().begin(unit)


def test_scales_learn_on_after_rounding_was_decided() -> None:
    unit = block()
    settle(WeightRounding().begin(unit).temporaries)
    before = [quantizer.codes(weight) for quantizer, weight in weights(unit)]
    assert all(isinstance(quantizer.rounding, FixedRounding) for quantizer, _ in weights(unit))
    learning = WeightScales().begin(unit)
    assert len(learning.groups) == len(before)
    settle(learning.temporaries)
    assert all(torch.equal(q.codes(w), codes) for (q, w), codes in zip(weights(unit), before, strict=True))


def test_anchored_and_fixed_roundings_refuse_another_tensor() -> None:
    anchored = Anchored(NearestEven(), torch.rand(3, 2))
    with pytest.raises(ShapeError, match=r"\(3, 2\)"):
        anchored(torch.rand(2, 3))
    with pytest.raises(ShapeError, match=r"\(3, 2\)"):
        anchored.settled()(torch.rand(6))
    again = FixedCodes.from_facts(anchored.settled().facts())
    assert again.codes.shape == (3, 2)


def learned(journal=None):
    model = net()
    quantized = rounding(model, [images()], **BITS)
    folded = fold_batchnorm(model, images(2))
    plan = Plan((WeightScales(), WeightRounding(), ActivationScales()), iterations=8, batch_size=8, looks=2, pace=20.0)
    kept = None if journal is None else Journal(journal, {})
    return reconstruct(
        folded, quantized.model, quantized.units, plan, Calibration(images(), 8), journal=kept, progress=False
    )


def test_a_network_with_learned_scales_packs_and_goes_on_from_a_journal(tmp_path) -> None:
    found, logs = learned(tmp_path / "journal")
    assert "learned" in {log.outcome for log in logs}
    again, _ = learned(tmp_path / "journal")
    data = images(4)
    torch.testing.assert_close(again(data), found(data), rtol=0, atol=0)
    packed = pack(found)
    torch.testing.assert_close(packed(data), found(data), rtol=0, atol=0)
    loaded = load_packed(save_packed(packed, tmp_path / "model.safetensors"), net())
    torch.testing.assert_close(loaded(data), found(data), rtol=0, atol=0)
    assert not any(isinstance(module, Anchored | LearnedRounding) for module in found.modules())


def test_borders_that_have_learned_round_from_the_start() -> None:
    model = aquant(net(), [images()], **BITS, **FEW).model
    unit = fork(model.block1)
    learning = Borders(warmup=None).begin(unit)
    assert not learning.temporaries
    assert not any(isinstance(module, Gradual) for module in unit.modules())
    learning.advance(0.0)
    x = torch.rand(2, 6, 8, 8)
    torch.testing.assert_close(unit(x), model.block1(x), rtol=0, atol=0)


def test_the_whole_network_is_a_unit_that_learns_its_prediction() -> None:
    model, data = net(), images(64)
    first = aquant(model, [data], **BITS, **FEW).model
    folded = fold_batchnorm(model, images(2))
    (unit,) = whole = find_units(folded, images(2), blocks=("",))
    assert unit.path == ""
    plan = Plan(
        (ActivationScales(), Borders(warmup=None), WeightScales()),
        loss=DivergenceLoss(2.0),
        iterations=20,
        batch_size=8,
        looks=5,
        pace=20.0,
    )
    before = copy.deepcopy(first.state_dict())
    found, (log,) = reconstruct(folded, first, whole, plan, Calibration(data, 16), progress=False)
    with torch.no_grad():
        held = data[48:]
        expected = plan.loss.error(found(held), folded(held))
    # The mean of one batch, in float64 from float32 logits.
    assert log.error == pytest.approx(float(expected), rel=1e-5)
    assert log.outcome == "learned"
    assert log.error < log.start
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_rounding_goes_on_from_what_was_decided() -> None:
    unit = block()
    first = WeightRounding().begin(unit)
    with torch.no_grad():
        for quantizer, _ in weights(unit):
            quantizer.rounding.logit.copy_(torch.randn_like(quantizer.rounding.logit))
    settle(first.temporaries)
    before = [(quantizer.codes(weight), quantizer.rounding.up) for quantizer, weight in weights(unit)]
    second = WeightRounding().begin(unit)
    for (quantizer, _), (_, up) in zip(weights(unit), before, strict=True):
        assert torch.equal(quantizer.rounding.share() >= 0.5, up)
        assert bool(((quantizer.rounding.share() > 0.25) & (quantizer.rounding.share() < 0.75)).any())
    settle(second.temporaries)
    for (quantizer, weight), (codes, _) in zip(weights(unit), before, strict=True):
        assert torch.equal(quantizer.codes(weight), codes)


def test_rounding_does_not_go_on_where_scales_have_moved_away_from_the_codes() -> None:
    unit = block()
    settle(WeightScales().begin(unit).temporaries)
    with pytest.raises(StateError, match="leave WeightRounding out"):
        WeightRounding().begin(unit)


def test_a_setup_offers_the_whole_network_as_its_only_unit() -> None:
    setup = Setup.of(net(), [images()], Bits(2, 2, 8), Options(progress=False, batch_size=8, looks=2))
    whole = setup.whole()
    assert [unit.path for unit in whole.units] == [""]
    assert whole.units[0].layers == tuple(layer for unit in setup.units for layer in unit.layers)
    twin, _, _ = setup.quantize(setup.model, InputPlacement(), weights=True, activations=True)
    plan = Plan((WeightRounding(), ActivationScales()), iterations=6)
    twin, _ = setup.learn(twin, plan, "units")
    last = Plan((WeightScales(), ActivationScales()), loss=DivergenceLoss(4.0), iterations=6)
    _, (log,) = whole.learn(twin, last, "whole")
    assert log.error <= log.start


# Weights of which nothing but the rounding learns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soft_weight_is_what_the_quantizer_finds(dtype) -> None:
    unit = block().to(dtype)
    WeightRounding().begin(unit)
    plain = weights(unit)
    with torch.no_grad():
        for quantizer, _ in plain:
            quantizer.rounding.logit.copy_(3 * torch.randn_like(quantizer.rounding.logit))
    temporaries = soft_weights(unit)
    assert len(temporaries) == len(plain)
    for each, (quantizer, weight) in zip(temporaries, plain, strict=True):
        assert each.module.quantizer is quantizer
        found, expected = each.module(weight), quantizer(weight)
        # Levels and codes below 4 in magnitude are rounded once each, in the one order or the other.
        scale = quantizer.grid.scale.detach().max()
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(scale))
        upstream, logit = torch.randn_like(weight), quantizer.rounding.logit
        gradients = [torch.autograd.grad(out, logit, upstream)[0] for out in (found, expected)]
        # The scale, against the distance of two levels up to twice as large, each rounded once.
        torch.testing.assert_close(*gradients, rtol=16 * torch.finfo(dtype).eps, atol=0)


def test_a_soft_weight_leaves_the_quantizer() -> None:
    unit = block()
    before = [quantizer for quantizer, _ in weights(unit)]
    learning = WeightRounding().begin(unit)
    temporaries = soft_weights(unit) + learning.temporaries
    assert not weights(unit)
    with settled(temporaries):
        assert [quantizer for quantizer, _ in weights(unit)] == before
        assert all(isinstance(quantizer.rounding, FixedRounding) for quantizer in before)
    assert not weights(unit)
    assert all(isinstance(quantizer.rounding, LearnedRounding) for quantizer in before)
    settle(temporaries)
    assert [quantizer for quantizer, _ in weights(unit)] == before


def test_a_weight_whose_scale_learns_is_found_anew_in_every_step() -> None:
    unit = block()
    WeightScales().begin(unit)
    WeightRounding().begin(unit)
    assert not soft_weights(unit)


def test_a_weight_that_does_not_learn_is_found_by_its_quantizer() -> None:
    assert not soft_weights(block())
