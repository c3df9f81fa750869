"""What the monitor tells of a model, and that it leaves none of itself behind."""

import copy

import pytest
import torch
from torch import nn

from q_core import DataError, MatchError, NearestTowardZero, QuantConv2d, Quantizer, RangeError, UniformGrid
from q_nulsq import Projection, StepGrid, StepMonitor, check_finite, inspect
from q_nulsq.monitor import first_nonfinite

from .test_positivity import NoWaiting

EXACT = {"rtol": 0, "atol": 0}


def quantizer(*steps, below=None, **options):
    negative = None if below is None else torch.tensor([below])
    return Quantizer(StepGrid(negative, torch.tensor([steps]), **options), NearestTowardZero())


def network():
    conv = QuantConv2d(3, 5, 3, bias=False)
    conv.weight_quantizer = Quantizer(StepGrid(torch.full((5, 1, 1, 1, 2), 0.1), torch.full((5, 1, 1, 1, 1), 0.1)))
    conv.input_quantizer = quantizer(0.5, 0.5, 0.5)
    return nn.Sequential(conv, nn.BatchNorm2d(5), nn.ReLU())


def test_levels_that_nothing_uses_and_values_beyond_the_range_are_counted():
    model = nn.Sequential(quantizer(0.5, 0.5, 0.5))
    (layer,) = inspect(model, torch.tensor([-1.0, 0.0, 0.1, 0.4, 1.4, 1.6, 7.0, 1.5])).layers
    assert layer.path == "0"
    torch.testing.assert_close(layer.counts, torch.tensor([[3, 1, 0, 4]]), **EXACT)
    assert (layer.dead, layer.seen, layer.nan) == (1, 8, 0)
    assert (layer.below, layer.above, layer.overflow) == (1 / 8, 2 / 8, 3 / 8)
    assert (layer.collapsed, layer.nonfinite, layer.raised) == (0, 0, 0)
    assert "1 of 4 levels dead, 12.50% below and 25.00% above" in str(layer)


def test_every_tile_has_levels_of_its_own():
    grid = StepGrid(None, torch.tensor([[[0.5, 0.5]], [[2.0, 2.0]]]))
    (layer,) = inspect(nn.Sequential(Quantizer(grid)), torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 3.9]])).layers
    torch.testing.assert_close(layer.counts, torch.tensor([[1, 1, 1], [2, 0, 1]]), **EXACT)
    assert layer.dead == 1


def test_collapsed_steps_are_counted_by_their_part_of_the_mean_of_their_tile():
    grid = StepGrid(None, torch.tensor([[[1.0, 1.0, 1e-3]], [[1e-3, 1e-3, 1e-3]]]))
    (layer,) = inspect(nn.Sequential(Quantizer(grid)), torch.rand(2, 3)).layers
    assert layer.collapsed == 1
    # 0.001 of the mean of 1, 1 and 0.001, as the difference of two levels near 2, rounded once.
    torch.testing.assert_close(layer.smallest, 0.001 / (2.001 / 3), rtol=2e-4, atol=0)
    (layer,) = inspect(nn.Sequential(Quantizer(grid)), torch.rand(2, 3), collapsed=1e-3).layers
    assert layer.collapsed == 0


def test_a_negative_step_is_seen_before_and_after_it_was_put_back():
    model = nn.Sequential(quantizer(0.5, 0.5, 0.5))
    grid = model[0].grid
    with StepMonitor(model) as monitor:
        with torch.no_grad():
            grid.steps[0, 1] = -0.1
        assert monitor.report().layers[0].collapsed == 1
        grid.project()
        (layer,) = monitor.report().layers
        assert (layer.collapsed, layer.raised) == (1, 1)
        assert "1 steps put back" in str(layer)
        monitor.reset()
        assert monitor.report().layers[0].raised == 0


def test_nan_steps_are_named_by_their_layer():
    model = network()
    with torch.no_grad():
        model[0].weight_quantizer.grid.steps[3, 0, 0, 0, 0] = torch.nan  # two levels are NaN by this one step
    report = inspect(model, torch.rand(2, 3, 7, 5))
    assert [layer.nonfinite for layer in report.layers] == [1, 0]
    with pytest.raises(RangeError, match=r"0\.weight_quantizer: 1 of 15 steps are NaN"):
        report.require_finite()
    inspect(network(), torch.rand(2, 3, 7, 5)).require_finite()


def test_nan_values_are_counted_apart_and_named():
    report = inspect(nn.Sequential(quantizer(0.5)), torch.tensor([torch.nan, 0.0, torch.inf]))
    assert (report.layers[0].nan, report.layers[0].seen, report.layers[0].above) == (1, 2, 1 / 2)
    with pytest.raises(RangeError, match="0: 1 values that are NaN came in"):
        report.require_finite()


def test_inspecting_leaves_no_trace():
    model = network().train()
    state = copy.deepcopy(model.state_dict())
    batch = torch.rand(2, 3, 7, 5)
    random = torch.random.get_rng_state()
    inspect(model, batch)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), state, **EXACT)
    torch.testing.assert_close(torch.random.get_rng_state(), random, **EXACT)


def test_the_hooks_are_gone_after_an_error_too():
    model = network()
    with pytest.raises(RuntimeError):
        inspect(model, torch.rand(2, 4, 7, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loop_is_watched_without_waiting_and_without_changing_it():
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        monitor = StepMonitor(model)
        if watched:
            monitor.__enter__()
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 7, 5)
            with NoWaiting():
                model(x).square().mean().backward()
            optimizer.step()
        monitor.__exit__(None, None, None)
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], **EXACT)
    weight, activation = monitor.report().layers
    assert (weight.seen, activation.seen) == (5 * 135, 5 * 2 * 3 * 7 * 5)
    assert activation.below > 0.3  # signed data in an unsigned grid
    assert [line.split(":")[0] for line in str(monitor.report()).splitlines()] == [
        "0.weight_quantizer",
        "0.input_quantizer",
    ]


def test_any_grid_is_told_of():
    model = nn.Sequential(Quantizer(UniformGrid(torch.tensor([0.5]), qmin=0, qmax=3)))
    (layer,) = inspect(model, torch.tensor([0.0, 0.5, 9.0])).layers
    torch.testing.assert_close(layer.counts, torch.tensor([[1, 1, 0, 1]]), **EXACT)
    assert (layer.collapsed, layer.smallest) == (0, 1.0)


def test_what_a_transform_makes_of_the_values_is_counted():
    grid = StepGrid(None, torch.full((1, 3), 0.5))
    model = nn.Sequential(Quantizer(grid, NearestTowardZero(), nn.Hardtanh(0.0, 1.0)))
    (layer,) = inspect(model, torch.tensor([-5.0, 0.4, 9.0])).layers
    torch.testing.assert_close(layer.counts, torch.tensor([[1, 1, 1, 0]]), **EXACT)
    assert layer.overflow == 0


def test_levels_are_not_called_dead_before_any_value_passed():
    with StepMonitor(nn.Sequential(quantizer(0.5))) as monitor:
        assert monitor.report().layers[0].dead == 0


def test_batches_are_taken_as_a_loader_yields_them():
    model = nn.Sequential(quantizer(0.5))
    assert inspect(model, [torch.rand(7), torch.zeros(7)]).layers[0].seen == 7
    with pytest.raises(DataError, match="batch of type str"):
        inspect(model, "images")


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(MatchError, match="Linear without quantizers"):
        StepMonitor(nn.Linear(3, 3))
    with pytest.raises(RangeError, match="collapsed=1"):
        StepMonitor(network(), collapsed=1.0)


def test_a_gradient_that_is_no_number_is_named():
    model = network()
    model(torch.rand(2, 3, 7, 5)).sum().backward()
    check_finite(model, torch.tensor(1.0))
    model[0].weight_quantizer.grid.steps.grad[0, 0, 0, 0, 0] = torch.inf
    with pytest.raises(RangeError, match=r"the gradient of 0\.weight_quantizer\.grid\.steps holds 1 of 15.*loss 2\.0"):
        check_finite(model, torch.tensor(2.0))
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(RangeError, match=r"^0\.weight holds 27 of 135"):
        check_finite(model)


def test_a_loss_that_is_no_number_is_told_apart_from_a_broken_model():
    with pytest.raises(DataError, match=r"sound parameters and gradients \(loss nan\)"):
        check_finite(network(), torch.tensor(torch.nan))


def test_a_step_at_the_floor_of_the_projection_counts_as_collapsed():
    model = nn.Sequential(quantizer(0.5, 0.5, 0.5, positivity=Projection()))
    with torch.no_grad():
        model[0].grid.steps[0, 0] = 0.0
    model[0].grid.project()
    assert inspect(model, torch.rand(9)).layers[0].collapsed == 1


class Overflow(nn.Module):
    """Returns infinity for what is large."""

    def forward(self, x):
        return torch.where(x > 2, torch.inf, x)


def test_the_layer_that_spoils_a_loss_is_named_and_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Identity(), Overflow()), nn.Linear(3, 2))
    nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
    x = torch.zeros(9, 3)
    assert first_nonfinite(model, x) is None
    x[0] = 5.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert first_nonfinite(model, x) == "2.1"
    assert first_nonfinite(model, {"input": x}) == first_nonfinite(model, [x, "labels"]) == "2.1"
    loss = model(x).sum()
    assert not loss.isfinite()
    model.load_state_dict(before)
    with pytest.raises(RangeError, match=r"^2\.1 is the first to return values that are NaN or infinite \(loss "):
        check_finite(model, loss, x)
    torch.testing.assert_close(model.state_dict(), before, **EXACT)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_that_spoils_gradients_is_named_before_those_that_have_them_from_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].register_full_backward_hook(lambda *_: (torch.full((4, 3), torch.nan),))
    loss = model(torch.rand(4, 3)).sum()
    loss.backward()
    assert model[0].weight.grad.isnan().all()
    with pytest.raises(RangeError, match=r"^the gradient of 1\.bias holds 3 of 3 .*loss -?\d"):
        check_finite(model, loss)
