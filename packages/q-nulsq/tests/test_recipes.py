"""From a float model to one that trains: every recipe, its constants, and what preparing must leave alone."""

import copy
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import q_core
from q_core import (
    DataError,
    MatchError,
    MSEObserver,
    NearestEven,
    NearestTowardZero,
    PerChannel,
    QuantAdd,
    Quantizer,
    SpecError,
    UniformGrid,
)
from q_core.layers import slots
from q_nulsq import StepGrid
from q_nulsq.calibration import ClippingWarning
from q_nulsq.optim import (
    ByChannels,
    ByElements,
    ByFeatures,
    Unscaled,
    parameter_groups,
    project_after,
    warmup_cosine,
)
from q_nulsq.peers.apot import ApotGrid
from q_nulsq.peers.dorefa import DorefaGrid, TanhNormalization
from q_nulsq.peers.lcq import INTERVALS, LcqGrid
from q_nulsq.peers.lq_nets import LqNetsGrid
from q_nulsq.peers.lsq_plus import LsqPlusGrid
from q_nulsq.peers.n2uq import N2uqGrid, N2uqWeightGrid
from q_nulsq.peers.normalization import MeanMagnitude, WeightNormalization
from q_nulsq.peers.pact import PactGrid
from q_nulsq.peers.uniq import UniqGrid
from q_nulsq.preparation import Edge, Part, prepare
from q_nulsq.recipes import LLOYD_MAX, LSQ, NULSQ, nulsq_a, nulsq_wa

from .networks import RECIPES, Bottleneck, assert_bit_equal, images, labels, network, state_of

GRIDS: dict[str, tuple[type, type, type]] = {  # of weights, of activations, of activations with negative values
    "nulsq_a": (UniformGrid, StepGrid, StepGrid),
    "nulsq_w": (StepGrid, UniformGrid, UniformGrid),
    "nulsq_wa": (StepGrid, StepGrid, StepGrid),
    "lsq": (UniformGrid, UniformGrid, UniformGrid),
    "lsq_plus": (UniformGrid, LsqPlusGrid, LsqPlusGrid),
    "pact": (DorefaGrid, PactGrid, UniformGrid),
    "dorefa": (DorefaGrid, UniformGrid, UniformGrid),
    "apot": (ApotGrid, ApotGrid, ApotGrid),
    "lcq": (LcqGrid, LcqGrid, LcqGrid),
    "lq_nets": (LqNetsGrid, LqNetsGrid, LqNetsGrid),
    "uniq": (UniqGrid, UniformGrid, UniformGrid),
    "n2uq": (N2uqWeightGrid, N2uqGrid, UniformGrid),
}
TRANSFORMS = {
    "pact": TanhNormalization,
    "dorefa": TanhNormalization,
    "apot": WeightNormalization,
    "lcq": WeightNormalization,
    "n2uq": MeanMagnitude,
}


def made(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    chosen = {"weight_bits": 3, "activation_bits": 2, "progress": False} | options
    return RECIPES[name](network() if model is None else model, images(), **chosen)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    return {
        f"{path}.{slot}": child
        for path, parent in model.named_modules()
        for slot, child, _ in slots(parent)
        if isinstance(child, Quantizer)
    }


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    weights, norms, steps = parameter_groups(model, lr=0.05, weight_decay=1e-4, step_lr=1e-3)
    chosen: list[torch.optim.Optimizer] = [torch.optim.SGD([weights, norms], momentum=0.9)]
    if steps["params"]:
        chosen.append(torch.optim.AdamW([steps]))
    for optimizer in chosen:
        project_after(optimizer, model)
    return chosen


def train(
    model: nn.Module, chosen: list[torch.optim.Optimizer], steps: int, schedules: Iterable[Any] = ()
) -> list[float]:
    model.train()
    losses = []
    for step in range(steps):
        x = images(7, seed=100 + step % 2)[-1]
        loss = nn.functional.cross_entropy(model(x), labels(x))
        losses.append(float(loss.detach()))
        for optimizer in chosen:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in chosen:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    return losses


@pytest.mark.parametrize("name", RECIPES)
def test_each_method_has_its_grids(name: str) -> None:
    found = quantizers(made(name).model)
    weight, activation, negative = GRIDS[name]
    for path, bits in (("inner.weight", 3), ("linear.weight", 3), ("inner.input", 2), ("linear.input", 2)):
        quantizer = found[f"{path}_quantizer"]
        expected = weight if "weight" in path else negative if path.startswith("linear") else activation
        assert type(quantizer.grid) is expected
        assert quantizer.grid.bits == bits
        signed = "weight" in path or path.startswith("linear")
        assert (quantizer.grid.qmin < 0) == (signed and expected is not LsqPlusGrid)
        strict = type(quantizer.grid) in (StepGrid, N2uqGrid)
        assert type(quantizer.rounding) is (NearestTowardZero if strict else NearestEven)
        wanted = TRANSFORMS.get(name) if "weight" in path else None
        assert quantizer.transform is None if wanted is None else type(quantizer.transform) is wanted


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_and_the_last_layer_have_8_bits_and_learn_nothing(name: str) -> None:
    for path, quantizer in quantizers(made(name).model).items():
        if path.startswith(("stem", "fc")):
            assert quantizer.grid.bits == 8
            assert type(quantizer.grid) is UniformGrid
            assert not list(quantizer.parameters())


def test_constants_are_the_published_ones() -> None:
    for name in ("apot", "lcq"):
        found = quantizers(made(name).model)
        assert float(found["inner.weight_quantizer"].grid.clip.detach()) == 3.0
        assert float(found["inner.input_quantizer"].grid.clip.detach()) == 8.0
    theta = quantizers(made("lcq").model)["inner.weight_quantizer"].grid.theta
    assert theta.shape[-1] == INTERVALS == 16
    assert not theta.any()
    # Weights of 2 bits: three levels.
    two = quantizers(made("apot", weight_bits=2).model)["inner.weight_quantizer"]
    torch.testing.assert_close(two.grid.levels().flatten(), torch.tensor([-3.0, 0.0, 3.0]), atol=0, rtol=0)
    assert quantizers(made("lq_nets").model)["inner.weight_quantizer"].grid.tile_shape == (7, 1, 1, 1)
    unit = quantizers(made("dorefa").model)["inner.input_quantizer"].grid.levels().flatten()
    # A third is not a number of float32.
    torch.testing.assert_close(unit, torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]), atol=2**-24, rtol=0)


def test_lsq_starts_from_its_own_rule() -> None:
    found = quantizers(made("lsq").model)
    weight = network().inner.weight.detach()
    step = 2 * weight.abs().mean() / 3**0.5
    # The end of the range and its quotient are rounded once more.
    torch.testing.assert_close(
        found["inner.weight_quantizer"].grid.scale.detach().reshape(()), step, rtol=4 * 2**-24, atol=0
    )


@pytest.mark.parametrize("name", RECIPES)
def test_preparing_leaves_the_float_model_and_batch_norms_alone(name: str) -> None:
    model = network()
    before, modes = state_of(model), [module.training for module in model.modules()]
    ids = [id(parameter) for parameter in model.parameters()]
    result = made(name, model)
    assert_bit_equal(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert [id(parameter) for parameter in model.parameters()] == ids
    assert not any(module._forward_pre_hooks for module in [*model.modules(), *result.model.modules()])
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in result.model.parameters()}
    state = result.model.state_dict()
    for name_, tensor in before.items():
        assert torch.equal(state[name_], tensor), name_  # running statistics too


def test_training_mode_and_batch_norms_stay_as_they_are_where_the_model_trains() -> None:
    model = network().train()
    model.bn2.eval()
    before = state_of(model)
    result = made("nulsq_a", model)
    assert result.model.training
    assert not result.model.bn2.training
    assert_bit_equal(model.state_dict(), before)
    assert torch.equal(result.model.bn1.running_mean, before["bn1.running_mean"])


@pytest.mark.parametrize("name", RECIPES)
def test_training_lowers_the_loss(name: str) -> None:
    model = made(name).model
    losses = train(model, optimizers(model), 20)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    for path, quantizer in quantizers(model).items():
        assert bool((quantizer.grid.levels().diff(dim=-1) > 0).all()), path


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_loads_the_state_is_the_same_model(name: str) -> None:
    trained = made(name).model
    train(trained, optimizers(trained), 3)
    fresh = made(name).model
    fresh.load_state_dict(trained.state_dict(), strict=True)
    x = images()[0]
    trained.eval(), fresh.eval()
    assert torch.equal(fresh(x), trained(x))
    with pytest.raises(RuntimeError):
        made(name, weight_bits=4, activation_bits=3).model.load_state_dict(
            made("nulsq_wa").model.state_dict(), strict=True
        )


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(name: str) -> None:
    def start() -> tuple[nn.Module, list[torch.optim.Optimizer], list[Any]]:
        model = made(name).model
        chosen = optimizers(model)
        return model, chosen, [warmup_cosine(optimizer, 2, 9) for optimizer in chosen]

    model, chosen, schedules = start()
    train(model, chosen, 3, schedules)
    saved = copy.deepcopy(
        [
            model.state_dict(),
            [optimizer.state_dict() for optimizer in chosen],
            [schedule.state_dict() for schedule in schedules],
        ]
    )
    expected = train(model, chosen, 4, schedules)
    again, others, plans = start()
    again.load_state_dict(saved[0])
    for part, state in zip([*others, *plans], [*saved[1], *saved[2]], strict=True):
        part.load_state_dict(state)
    assert train(again, others, 4, plans) == expected
    assert_bit_equal(again.state_dict(), model.state_dict())


def test_signs_are_what_the_layer_sees() -> None:
    found = quantizers(made("nulsq_a").model)
    assert found["inner.input_quantizer"].grid.qmin == 0  # after a ReLU
    assert found["linear.input_quantizer"].grid.qmin == -2  # after a batch norm
    assert found["stem.input_quantizer"].grid.zero_point.item() > 0  # images of both signs


def test_negative_values_after_the_first_batch_are_told_of() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
    batches = [torch.rand(8, 4), torch.rand(8, 4) - 0.1]
    with pytest.warns(ClippingWarning, match="of the 64 elements"):
        nulsq_a(model, batches, progress=False)
    part = dataclasses.replace(LSQ, observer=MSEObserver)
    with pytest.warns(ClippingWarning, match=r"of the 64 elements .*that 1.input_quantizer saw"):
        prepare(model, batches, weight=LSQ, activation=part, progress=False)


def test_float_bits_stay_float() -> None:
    weights = quantizers(made("nulsq_wa", activation_bits=32).model)
    assert {path.rpartition(".")[2] for path in weights} == {"weight_quantizer"}
    inputs = quantizers(prepare(network(), images(), weight=None, activation=NULSQ, progress=False).model)
    assert {path.rpartition(".")[2] for path in inputs} == {"input_quantizer"}
    nothing = made("lsq", weight_bits=32, activation_bits=32, edge_bits=8)
    assert not quantizers(nothing.model)
    x = images()[0]
    assert torch.equal(nothing.model(x), network()(x))


def test_edges_without_more_bits_are_quantized_as_the_others() -> None:
    for path, quantizer in quantizers(made("nulsq_wa", edge_bits=2, activation_bits=2, weight_bits=2).model).items():
        assert isinstance(quantizer.grid, StepGrid), path
        assert quantizer.grid.bits == 2
    edge = Edge(weight=dataclasses.replace(LSQ, granularity=PerChannel(0)), activation=LSQ)
    found = quantizers(made("nulsq_wa", edge=edge).model)
    assert isinstance(found["stem.weight_quantizer"].grid.scale, nn.Parameter)


def test_parts_can_be_replaced_in_an_alias() -> None:
    per_channel = dataclasses.replace(NULSQ, granularity=PerChannel(0))
    found = quantizers(made("nulsq_a", weight=per_channel, activation=LLOYD_MAX).model)
    assert found["inner.weight_quantizer"].grid.steps.shape == (7, 1, 1, 1, 7)
    steps = found["inner.input_quantizer"].grid.steps.detach()
    assert not torch.equal(steps, steps[..., :1].expand_as(steps))


def test_gradient_scales_follow_the_rule() -> None:
    counts = {Unscaled(): None, ByElements(): 4 * 6 * 49, ByFeatures(): 6 * 49, ByChannels(): 6}
    for rule, count in counts.items():
        found = quantizers(made("nulsq_a", gradient_scale=rule).model)
        expected = 1.0 if count is None else (count * 3) ** -0.5
        # A root and a quotient, each rounded.
        exact = {"rtol": 4 * 2**-53, "atol": 0.0}
        torch.testing.assert_close(found["inner.input_quantizer"].grid.gradient_scale, expected, **exact)
        weight = 1.0 if count is None else (7 * 6 * 9 * 3) ** -0.5
        torch.testing.assert_close(found["inner.weight_quantizer"].grid.gradient_scale, weight, **exact)
    per_channel = dataclasses.replace(LSQ, granularity=PerChannel(0))
    found = quantizers(made("lsq", weight=per_channel).model)
    one_channel = (6 * 9 * 3) ** -0.5
    torch.testing.assert_close(found["inner.weight_quantizer"].grid.gradient_scale, one_channel, **exact)


def test_layers_that_do_not_run_stay_float_and_the_report_says_why() -> None:
    class Spare(Bottleneck):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 3)

    result = nulsq_wa(Spare().eval(), images(), progress=False)
    assert [layer.path for layer in result.swap.stays_float if "does not call" in layer.reason] == ["spare"]
    assert "fc.weight_quantizer" in quantizers(result.model)  # the last layer is the last one that runs
    assert quantizers(result.model)["fc.weight_quantizer"].grid.bits == 8


def test_tied_weights_share_their_quantizer_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[3].weight = model[1].weight
    twin = nulsq_wa(model, [torch.randn(9, 4)], progress=False).model
    assert twin[1].weight is twin[3].weight
    assert twin[1].weight is not model[1].weight
    assert twin[1].weight_quantizer is twin[3].weight_quantizer


def test_sums_are_quantized_by_the_part_of_activations() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.add = nn.Linear(4, 4), nn.Linear(4, 3), QuantAdd()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.add(self.first(x).relu(), x))

    found = quantizers(nulsq_a(Sum().eval(), [torch.randn(9, 4)], progress=False).model)
    assert isinstance(found["add.left_quantizer"].grid, StepGrid)
    assert found["add.left_quantizer"].grid.qmin < 0  # one of the two is signed


def test_batches_may_be_an_iterator_or_something_that_the_caller_knows_how_to_run() -> None:
    batches = images()
    expected = state_of(nulsq_wa(network(), batches, progress=False).model)
    once = nulsq_wa(network(), iter(batches), progress=False)
    assert once.calibration.batches == len(batches)
    assert_bit_equal(once.model.state_dict(), expected)
    odd = [{"picture": batch} for batch in batches]
    told = nulsq_wa(network(), odd, progress=False, forward=lambda model, batch: model(batch["picture"]))
    assert_bit_equal(told.model.state_dict(), expected)


def test_what_cannot_be_prepared_is_refused() -> None:
    model = network()
    before = state_of(model)
    with pytest.raises(DataError, match="no batch"):
        nulsq_a(model, [])
    with pytest.raises(MatchError, match="no convolution or linear layer"):
        nulsq_a(nn.Sequential(nn.ReLU()), [torch.randn(2, 3)])
    with pytest.raises(SpecError, match="bits=9"):
        nulsq_a(model, images(), weight_bits=9)
    with pytest.raises(SpecError) as caught:
        RECIPES["lcq"](model, images(), activation_bits=1, weight_bits=2, progress=False)
    assert "of the input of linear" in str(caught.value.__notes__)  # which is signed
    bad = images()
    bad[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"stem\.input"):
        nulsq_a(model, bad, progress=False)
    assert_bit_equal(model.state_dict(), before)


def test_steps_that_were_calibrated_are_frozen_to_the_same_function() -> None:
    for name in ("nulsq_wa", "lsq", "uniq"):
        twin = made(name).model
        packed = q_core.pack(twin)
        x = images()[0]
        assert torch.equal(packed(x), twin(x)), name


def test_parts_are_plain_values_that_can_be_compared() -> None:
    assert Part(StepGrid.from_range) == Part(StepGrid.from_range)
    assert dataclasses.replace(NULSQ, rounding=NearestEven) != NULSQ
    assert Edge() == Edge()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks wrote; both run once for all the tests."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = pathlib.Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", str(worker), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


needs_ranks = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


@needs_ranks
def test_two_ranks_with_different_numbers_of_batches_are_bit_equal_to_one(ranks: list[dict[str, Any]]) -> None:
    alone = ranks[0]["alone"]
    assert len(alone) == len(RECIPES) + 10
    for name, state in alone.items():
        for rank in ranks:
            assert_bit_equal(rank["together"][name], state)


@needs_ranks
def test_ranks_agree_on_signs_that_only_one_of_them_sees(ranks: list[dict[str, Any]]) -> None:
    for name, state in ranks[0]["signs"].items():
        assert_bit_equal(ranks[1]["signs"][name], state)


@needs_ranks
def test_no_rank_waits_for_one_that_has_no_batch(ranks: list[dict[str, Any]]) -> None:
    errors = [rank["failed"]["error"] for rank in ranks]
    assert errors[0].startswith("StateError: the first batch failed on another rank")
    assert errors[1].startswith("DataError: the calibration data holds no batch")
    assert all(rank["failed"]["seconds"] < 15 for rank in ranks)  # half of the timeout
