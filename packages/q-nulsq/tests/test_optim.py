"""Groups of an optimizer, projection after its updates, and the schedule."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from q_core import NearestEven, Quantizer, QuantSpec, RangeError, Recipe, Rule, UniformGrid, calibrate, swap
from q_nulsq import Exponential, StepGrid
from q_nulsq.optim import (
    ByChannels,
    ByElements,
    ByFeatures,
    Counts,
    Unscaled,
    parameter_groups,
    project_after,
    warmup_cosine,
)

from .networks import RECIPES, images, network


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    model = RECIPES[name](network(), images(), weight_bits=3, activation_bits=2, progress=False).model
    groups = parameter_groups(model, lr=0.1, weight_decay=1e-4, step_lr=1e-3, step_weight_decay=2e-4)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    assert [group["name"] for group in groups] == ["weights", "norms", "steps"]
    assert [group["lr"] for group in groups] == [0.1, 0.1, 1e-3]
    assert [group["weight_decay"] for group in groups] == [1e-4, 1e-4, 2e-4]
    weights, norms, steps = ({id(parameter) for parameter in group["params"]} for group in groups)
    assert weights == {id(layer.weight) for layer in (model.stem, model.inner, model.linear, model.fc)}
    assert {id(model.bn1.weight), id(model.stem.bias), id(model.fc.bias)} <= norms
    grids = [module.grid for module in model.modules() if isinstance(module, Quantizer)]
    assert steps == {id(parameter) for grid in grids for parameter in grid.parameters()}


def test_norms_of_any_kind_may_have_a_decay_of_their_own() -> None:
    class LayerNorm2d(nn.LayerNorm):
        pass

    model = nn.Sequential(nn.Linear(4, 4), LayerNorm2d((4, 4)), nn.GroupNorm(2, 4), nn.Embedding(3, 4))
    model.bias_table = nn.Parameter(torch.zeros(3, 3))
    model.table_bias = nn.Parameter(torch.zeros(3, 3))
    weights, norms, steps = parameter_groups(model, lr=1.0, weight_decay=0.5, step_lr=1.0, norm_weight_decay=0.0)
    assert norms["weight_decay"] == 0.0
    assert {id(each) for each in weights["params"]} == {id(model[0].weight), id(model[3].weight), id(model.bias_table)}
    assert {id(model[1].weight), id(model.table_bias)} <= {id(each) for each in norms["params"]}
    assert steps["params"] == []


def test_a_parameter_that_two_modules_own_is_listed_once() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    weights, norms, _ = parameter_groups(model, lr=1.0, weight_decay=0.0, step_lr=1.0)
    assert (len(weights["params"]), len(norms["params"])) == (1, 2)


def stepped(positivity=None) -> nn.Module:
    grid = StepGrid(None, torch.tensor([[1.0, 2.0, 3.0]]), positivity=positivity)
    return nn.Sequential(Quantizer(grid, NearestEven()))


def test_steps_are_put_back_after_each_update_until_the_handle_is_removed() -> None:
    model = stepped()
    steps = model[0].grid.steps
    optimizer = torch.optim.SGD([steps], lr=1.0)
    handle = project_after(optimizer, model)
    steps.grad = torch.tensor([[5.0, 0.0, 0.0]])
    optimizer.step()
    assert bool((steps > 0).all())
    handle.remove()
    optimizer.step()
    assert float(steps[0, 0].detach()) < 0


def test_other_ways_to_stay_positive_are_left_alone() -> None:
    model = stepped(Exponential())
    raw = model[0].grid.steps
    optimizer = torch.optim.SGD([raw], lr=1.0)
    project_after(optimizer, model)
    raw.grad = torch.tensor([[5.0, 0.0, 0.0]])
    expected = raw.detach() - raw.grad
    optimizer.step()
    assert torch.equal(raw.detach(), expected)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 2, 2)])
def test_scales_of_a_uniform_grid_stay_positive(shape: tuple[int, ...]) -> None:
    grid = UniformGrid(torch.ones(shape), qmin=0, qmax=3, learnable=True)
    fixed = UniformGrid(torch.ones(shape), qmin=0, qmax=3)
    model = nn.ModuleList([Quantizer(grid), Quantizer(fixed)])
    optimizer = torch.optim.SGD([grid.scale], lr=1.0)
    project_after(optimizer, model)
    grid.scale.grad = torch.full(shape, 3.0)
    grid.scale.grad.view(-1)[-1] = 0.25
    optimizer.step()
    expected = torch.full(shape, 2e-3)  # a thousandth of the magnitude
    expected.view(-1)[-1] = 0.75
    torch.testing.assert_close(grid.scale.detach(), expected, rtol=2**-23, atol=0)  # the product is rounded


def test_the_schedule_has_the_published_values() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": [each], "lr": lr} for each, lr in zip(parameters, (0.04, 4e-4, 4e-6), strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_cosine(optimizer, 10, 300)
    seen = []
    for _ in range(302):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for index, base in enumerate((0.04, 4e-4, 4e-6)):
        start = min(1e-5, base)  # a rate below the start does not begin above itself
        expected = {
            0: start,
            1: start + (base - start) / 10,
            9: start + (base - start) * 0.9,
            10: base,
            11: base * (1 + math.cos(math.pi / 290)) / 2,
            155: base / 2,
            300: 0.0,
            301: 0.0,
        }
        for epoch, rate in expected.items():
            # Factors are rounded, and so is pi: what should be zero is 1e-17 of the rate.
            torch.testing.assert_close(seen[epoch][index], rate, rtol=1e-14, atol=1e-16)


def test_a_schedule_without_warmup_begins_at_the_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    warmup_cosine(optimizer, 0, 4)
    assert optimizer.param_groups[0]["lr"] == 0.5
    still = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    warmup_cosine(still, 2, 4)
    assert still.param_groups[0]["lr"] == 0.0


def test_a_resumed_schedule_goes_on() -> None:
    def fresh():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, warmup_cosine(optimizer, 3, 10)

    optimizer, schedule = fresh()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    other, resumed = fresh()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(4):
        for each, plan in ((optimizer, schedule), (other, resumed)):
            each.step()
            plan.step()
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("warmup", "total", "start"), [(-1, 3, 0.0), (3, 3, 0.0), (0, 0, 0.0), (1, 3, -1.0)])
def test_an_impossible_schedule_is_refused(warmup: int, total: int, start: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(RangeError, match=f"warmup={warmup}, total={total}"):
        warmup_cosine(optimizer, warmup, total, start=start)


def test_the_rules_of_gradients_count_what_they_say() -> None:
    counts = Counts(elements=600, features=60, channels=6)
    grid = UniformGrid(torch.ones(1), qmin=-4, qmax=3)
    one_bit = UniformGrid(torch.ones(1), qmin=-1, qmax=0)
    # A root and a quotient, each rounded.
    exact = {"rtol": 4 * 2**-53, "atol": 0.0}
    for rule, count in ((ByElements(), 600), (ByFeatures(), 60), (ByChannels(), 6)):
        torch.testing.assert_close(rule.factor(counts, grid), 1 / math.sqrt(3 * count), **exact)
        torch.testing.assert_close(rule.factor(counts, one_bit), 1 / math.sqrt(count), **exact)
    assert Unscaled().factor(counts, grid) == 1.0
    assert ByElements() == ByElements() != ByFeatures()


def test_batch_norms_are_estimated_anew_by_torch_alone() -> None:
    model = RECIPES["apot"](network(), images(), progress=False).model
    before = model.bn2.running_var.clone()
    update_bn(images(), model)
    assert not torch.equal(model.bn2.running_var, before)
    x = torch.cat(images())
    with torch.no_grad():
        inner = model.inner(model.bn1(model.stem(x)).relu())
    # Cumulative averages of batches of 4 to 6 images, against the statistics of all: alike, not equal.
    torch.testing.assert_close(model.bn2.running_var, inner.var((0, 2, 3)), rtol=0.3, atol=0)


def test_what_a_transform_learns_is_a_step() -> None:
    twin, _ = swap(
        nn.Sequential(nn.Linear(3, 3)), [Rule("0", Recipe(QuantSpec.signed(3), transform=lambda: nn.PReLU()))]
    )
    calibrate(twin, [], progress=False)
    _, _, steps = parameter_groups(twin, lr=1.0, weight_decay=0.0, step_lr=1.0)
    assert [id(each) for each in steps["params"]] == [id(twin[0].weight_quantizer.transform.weight)]
