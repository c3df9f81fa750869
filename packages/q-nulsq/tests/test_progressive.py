"""From b+1 bits to b: how steps are merged, and what becomes of a whole model."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from q_core import MatchError, PerChannel, Quantizer, QuantSpec, SpecError, UniformGrid
from q_core.layers import slots
from q_nulsq import Exponential, StepGrid
from q_nulsq.optim import ByFeatures
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.peers.pact import PactGrid
from q_nulsq.peers.uniq import UniqGrid
from q_nulsq.progressive import DropTop, FoldTop, RescaleTop, TopStep, lower_bits, merged
from q_nulsq.recipes import NULSQ

from .networks import RECIPES, assert_bit_equal, images, network, state_of

POLICIES: tuple[TopStep, ...] = (DropTop(), FoldTop(), RescaleTop())
SEVEN = torch.tensor([[0.25, 0.5, 1.0, 0.5, 0.125, 0.125, 0.5]])
exact = {"rtol": 0.0, "atol": 0.0}  # dyadic


def test_pairs_are_added_and_the_policy_decides_on_the_top() -> None:
    torch.testing.assert_close(DropTop().merge(SEVEN), torch.tensor([[0.75, 1.5, 0.25]]), **exact)
    torch.testing.assert_close(FoldTop().merge(SEVEN), torch.tensor([[0.75, 1.5, 0.75]]), **exact)
    torch.testing.assert_close(RescaleTop().merge(SEVEN), torch.tensor([[0.75, 1.5, 0.25]]) * (3 / 2.5), **exact)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_even_number_of_steps_asks_no_policy(policy: TopStep) -> None:
    torch.testing.assert_close(policy.merge(SEVEN[:, :4]), torch.tensor([[0.75, 1.5]]), **exact)
    assert policy.merge(SEVEN[:, :1]).shape == (1, 0)


@given(st.integers(2, 31), st.integers(0, 2**31), st.sampled_from([(1,), (3, 1)]))
def test_ranges_and_levels_obey_the_policy(count: int, seed: int, tiles: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(*tiles, count, dtype=torch.float64, generator=generator) + 0.01
    levels = steps.cumsum(-1)
    # Sums of up to 31 numbers near 1.
    near = {"rtol": 1e-14, "atol": 1e-14}
    for policy in POLICIES:
        found = policy.merge(steps)
        assert found.shape == (*tiles, count // 2)
        assert bool((found > 0).all())
    dropped = DropTop().merge(steps).cumsum(-1)
    torch.testing.assert_close(dropped, levels[..., 1 : 2 * (count // 2) : 2], **near)
    for policy in (FoldTop(), RescaleTop()):
        torch.testing.assert_close(policy.merge(steps).sum(-1), steps.sum(-1), **near)
    equal = RescaleTop().merge(torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(equal, torch.full_like(equal, count / (count // 2)), **near)


def test_a_signed_grid_is_merged_on_either_side() -> None:
    grid = StepGrid(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.5, 0.25, 0.125]]), positivity=Exponential())
    new = merged(grid, FoldTop())
    assert (new.qmin, new.qmax) == (-2, 1)
    assert isinstance(new.positivity, Exponential)
    assert new.positivity is not grid.positivity
    assert isinstance(new.steps, nn.Parameter)
    # exp(log(s)) is rounded twice.
    torch.testing.assert_close(new.levels(), torch.tensor([[-10.0, -3.0, 0.0, 0.875]]), rtol=1e-6, atol=0)
    assert merged(new, FoldTop()).qmax == 0  # one bit: the only step above zero has no partner


@pytest.mark.parametrize("spec", [QuantSpec.signed(4), QuantSpec.unsigned(4, symmetric=True), QuantSpec.unsigned(4)])
def test_a_uniform_grid_keeps_its_range(spec: QuantSpec) -> None:
    low = torch.tensor([[-1.0], [0.0]]) * (spec.qmin < 0 or not spec.symmetric)
    grid = UniformGrid.from_range(spec, low, torch.tensor([[3.0], [0.7]]), learnable=True)
    new = merged(grid, DropTop())
    assert new.bits == 3
    torch.testing.assert_close(new.scale.detach(), grid.scale.detach() * (15 / 7), rtol=2**-23, atol=0)
    assert isinstance(new.scale, nn.Parameter)
    if grid.zero_point is None:
        assert new.zero_point is None
        assert (new.qmin, new.qmax) == ((-4, 3) if spec.qmin else (0, 7))
    else:
        # Zero stays a level, so the range moves by half of a new code.
        moved = new.levels()[..., 0] - grid.levels()[..., 0]
        assert bool((moved.abs() <= new.scale.detach() * 0.5001).all())


def test_the_grids_of_pact_and_lsq_plus_keep_their_ranges() -> None:
    clipped = PactGrid(torch.tensor([6.0]), qmax=7)
    torch.testing.assert_close(
        merged(clipped, DropTop()).levels(), torch.tensor([[0.0, 2.0, 4.0, 6.0]]), rtol=1e-6, atol=0
    )
    shifted = LsqPlusGrid(torch.tensor([[0.5]]), torch.tensor([[-1.0]]), qmin=0, qmax=7)
    new = merged(shifted, DropTop())
    ends = new.levels()[..., [0, -1]]
    # The last level is rounded twice.
    torch.testing.assert_close(ends, torch.tensor([[[-1.0, 2.5]]]), rtol=1e-6, atol=0)


def test_gradients_keep_their_rule() -> None:
    grid = StepGrid(None, SEVEN, gradient_scale=0.5)
    assert merged(grid, DropTop()).gradient_scale == 0.5 * (7 / 3) ** 0.5
    assert merged(StepGrid(None, SEVEN), DropTop()).gradient_scale == 1.0


def test_grids_that_cannot_be_merged_are_refused() -> None:
    with pytest.raises(SpecError, match="UniqGrid has no rule"):
        merged(UniqGrid(torch.ones(1), qmin=-4, qmax=3), DropTop())
    with pytest.raises(SpecError, match="codes 0 to 1 cannot be halved"):
        merged(StepGrid(None, torch.ones(1, 1)), DropTop())
    with pytest.raises(SpecError, match="codes 0 to 4 cannot be halved"):
        merged(StepGrid(None, torch.ones(1, 4)), DropTop())


def prepared(name: str = "nulsq_a", **options: Any) -> nn.Module:
    chosen: dict[str, Any] = {"weight_bits": 3, "activation_bits": 3, "progress": False} | options
    return RECIPES[name](network(), images(), **chosen).model


def bits(model: nn.Module) -> dict[str, int]:
    return {
        f"{path}.{name}": child.grid.bits
        for path, parent in model.named_modules()
        for name, child, _ in slots(parent)
        if isinstance(child, Quantizer)
    }


def test_a_model_loses_a_bit_where_it_is_asked_to() -> None:
    model = prepared().train()
    before, had = state_of(model), bits(model)
    inputs = lower_bits(model, 2, activation=FoldTop(), weight=None)
    both = lower_bits(model, 2, activation=FoldTop(), weight=RescaleTop())
    assert_bit_equal(model.state_dict(), before)
    assert bits(model) == had
    assert had["inner.input_quantizer"] == had["inner.weight_quantizer"] == 3
    for new, weight_bits in ((inputs, 3), (both, 2)):
        now = bits(new)
        assert now["inner.input_quantizer"] == now["linear.input_quantizer"] == 2
        assert now["inner.weight_quantizer"] == weight_bits
        assert now["stem.input_quantizer"] == now["fc.weight_quantizer"] == 8
        assert new.training
        assert all(module.training for module in new.modules())
        assert not {each.data_ptr() for each in new.parameters()} & {each.data_ptr() for each in model.parameters()}
    old, new = (each.linear.input_quantizer.grid for each in (model, both))
    # Every second level stays; sums are rounded.
    torch.testing.assert_close(new.levels()[..., :3], old.levels()[..., [0, 2, 4]], rtol=1e-6, atol=0)


def test_a_merged_model_is_one_that_prepare_would_make_but_for_its_values() -> None:
    per_channel = dataclasses.replace(NULSQ, granularity=PerChannel(0))
    options: dict[str, Any] = {"weight": per_channel, "gradient_scale": ByFeatures()}
    new = lower_bits(prepared("nulsq_wa", **options), 2, activation=DropTop(), weight=DropTop())
    plain = prepared("nulsq_wa", weight_bits=2, activation_bits=2, **options)
    plain.load_state_dict(new.state_dict(), strict=True)
    x = images()[0]
    assert torch.equal(plain.eval()(x), new.eval()(x))
    for name in ("inner", "linear"):
        scales = [getattr(each, name).input_quantizer.grid.gradient_scale for each in (new, plain)]
        torch.testing.assert_close(scales[0], scales[1], rtol=1e-15, atol=0)  # roots of the same number


def test_tied_weights_keep_one_quantizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[3].weight = model[1].weight
    twin = RECIPES["nulsq_wa"](model, [torch.randn(9, 4)], weight_bits=3, activation_bits=4, progress=False).model
    new = lower_bits(twin, 2, activation=None, weight=DropTop())
    assert new[1].weight_quantizer is new[3].weight_quantizer
    assert new[1].weight_quantizer.grid.bits == 2


def test_a_model_with_nothing_to_merge_is_refused() -> None:
    model = prepared()
    with pytest.raises(MatchError, match=r"nothing with 5 bits to be merged to 4: those to merge have \[3, 8\] bits"):
        lower_bits(model, 4, activation=DropTop(), weight=DropTop())
    with pytest.raises(MatchError, match="there is no quantizer to merge"):
        lower_bits(model, 2, activation=None, weight=None)
    with pytest.raises(SpecError) as caught:
        lower_bits(prepared("uniq"), 2, activation=None, weight=DropTop())
    assert "inner.weight_quantizer" in caught.value.__notes__[0]
