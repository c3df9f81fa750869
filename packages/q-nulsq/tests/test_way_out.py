"""From a trained model on learned steps to codes and tables, with the same outputs to the last bit."""

import functools
import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from q_core import (
    CodebookGrid,
    NearestEven,
    NearestTowardZero,
    PackedConv2d,
    PackedLinear,
    PerChannel,
    Quantizer,
    QuantSpec,
    RangeError,
    Recipe,
    Rule,
    UniformGrid,
    bits_per_weight,
    calibrate,
    load_packed,
    pack,
    save_packed,
    swap,
)
from q_nulsq import Exponential, Projection, Softplus, StepGrid
from q_nulsq.thermometer import deploy

from .cases import cases

EXACT = {"rtol": 0, "atol": 0}
POSITIVITIES = {"projection": Projection, "softplus": Softplus, "exponential": Exponential}


def float_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 5),
    )


def batch(seed=0):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def recipe(bits, signed=True, steps=True, positivity="projection", per_channel=False):
    spec = QuantSpec.signed(bits) if signed else QuantSpec.unsigned(bits)
    if per_channel:
        spec = QuantSpec.signed(bits, granularity=PerChannel(0))
    made = StepGrid.from_range if steps else UniformGrid.from_range
    options = {"positivity": POSITIVITIES[positivity]()} if steps else {}
    return Recipe(
        spec,
        grid=functools.partial(made, learnable=True, **options),
        rounding=NearestTowardZero if steps else NearestEven,
    )


def trained(bits, kind="WA", positivity="projection", per_channel=True, dtype=torch.float32):
    """Train a little, and spread the steps as a long training does."""
    model = float_net()
    weight = recipe(bits, steps="W" in kind, positivity=positivity, per_channel=per_channel)
    rules = [
        Rule(name, weight=weight, input=recipe(bits, signed, "A" in kind, positivity))
        for name, signed in (("0", True), ("3", False), ("6", True))
    ]
    model, _ = swap(model, rules)
    calibrate(model, [batch()], progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(5):
        model.train()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for module in model.modules():
            if isinstance(module, StepGrid):
                module.project()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StepGrid):
                steps = module.positivity.steps(module.steps)
                module.steps.copy_(module.positivity.raw(steps * torch.exp(0.5 * torch.randn_like(steps))))
    return model.to(dtype).eval()


def near_thresholds(grid, rounding, dtype, count=3):
    """Return each threshold of a grid and its neighbours in a dtype, within some ulps."""
    levels = grid.levels().flatten()
    middles = ((levels[1:] + levels[:-1]) / 2).to(dtype)
    found = [middles]
    for end in (-math.inf, math.inf):
        near = middles
        for _ in range(count):
            near = torch.nextafter(near, torch.full_like(near, end))
            found.append(near)
    return torch.cat([*found, levels.to(dtype)])


def hard_batch(model, dtype):
    """Return images of which every other pixel lies at a threshold of the first layer, give or take some ulps."""
    quantizer = model[0].input_quantizer
    special = near_thresholds(quantizer.grid, quantizer.rounding, dtype)
    x = batch(1).to(dtype)
    x.view(-1)[::2] = special[torch.randint(len(special), x.view(-1)[::2].shape)]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["A", "W", "WA"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_model_is_the_trained_one_bit_for_bit(bits, kind, dtype):
    model = trained(bits, kind, dtype=dtype)
    packed = pack(model)
    x = hard_batch(model, dtype)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), **EXACT)
        for layer, form in ((0, PackedConv2d), (3, PackedConv2d), (6, PackedLinear)):
            assert type(packed[layer]) is form
            trained_layer = model[layer]
            weight = trained_layer.weight_quantizer(trained_layer.weight)
            torch.testing.assert_close(packed[layer].packed_weight(dtype), weight, **EXACT)
    assert isinstance(packed[3].input_quantizer.grid, CodebookGrid if "A" in kind else UniformGrid)
    assert isinstance(packed[3].packed_weight.grid, CodebookGrid if "W" in kind else UniformGrid)


@pytest.mark.parametrize("positivity", list(POSITIVITIES))
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_way_to_keep_steps_positive_leads_out(positivity, per_channel):
    model = trained(3, positivity=positivity, per_channel=per_channel)
    x = hard_batch(model, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(pack(model)(x), model(x), **EXACT)


@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_a_frozen_quantizer_has_the_codes_and_levels_of_the_trained_one(case, dtype, even):
    # Steps of 4 decades at 8 bits stay apart in float32, which tables have at least: 255 * 1e4 < 2^24.
    grid = case.grid(torch.float32 if dtype.itemsize == 2 else dtype)
    quantizer = Quantizer(grid, NearestEven() if even else NearestTowardZero())
    x = case.x(grid).to(dtype)
    if grid.steps.shape[:-1].numel() == 1:
        x = torch.cat([x.flatten(), near_thresholds(grid, quantizer.rounding, dtype)])
        x = x.reshape(-1, *[1] * (len(grid.tile_shape) - 1))
    frozen = quantizer.frozen()
    assert isinstance(frozen.grid, CodebookGrid)
    torch.testing.assert_close(frozen.codes(x), quantizer.codes(x), **EXACT)
    torch.testing.assert_close(frozen(x), quantizer(x).detach(), **EXACT)
    # Training and evaluation, codes and levels: one rule.
    wide = torch.promote_types(dtype, torch.float32)
    by_codes = frozen.grid.dequantize(quantizer.codes(x).to(wide)).to(dtype)
    torch.testing.assert_close(quantizer.train()(x).detach(), by_codes, **EXACT)


def test_a_tie_goes_the_same_way_out_as_in_training():
    """Dyadic steps, whose middles are numbers: at each of them the rounding decides, toward zero and to even."""
    grid = StepGrid(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.25, 0.5, 1.0]]))
    ties = torch.tensor([-1.0, -0.25, 0.125, 0.5, 1.25])
    for rounding, expected in (
        (NearestTowardZero(), [-0.5, 0.0, 0.0, 0.25, 0.75]),
        (NearestEven(), [-1.5, 0.0, 0.0, 0.75, 0.75]),
    ):
        for quantizer in (Quantizer(grid, rounding), Quantizer(grid, rounding).frozen()):
            torch.testing.assert_close(quantizer(ties).detach(), torch.tensor(expected), **EXACT)


@pytest.mark.parametrize("kind", ["A", "W", "WA"])
def test_a_packed_model_goes_through_a_file(kind, tmp_path):
    model = trained(3, kind)
    loaded = load_packed(save_packed(pack(model), tmp_path / "net.safetensors"), float_net())
    x = hard_batch(model, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), **EXACT)
    assert type(loaded[3].input_quantizer.rounding) is type(model[3].input_quantizer.rounding)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weight_takes_its_bits_and_its_table(bits, per_channel):
    model = trained(bits, "W", per_channel=per_channel)
    layers = [model[i] for i in (0, 3, 6)]
    words = sum(math.ceil(layer.weight.numel() * bits / 32) for layer in layers)
    tables = sum(layer.weight.shape[0] if per_channel else 1 for layer in layers) * 2**bits
    weights = sum(layer.weight.numel() for layer in layers)
    assert bits_per_weight(pack(model)) == 32 * (words + tables) / weights


@pytest.mark.compile
def test_a_packed_model_is_exported():
    model = trained(3)
    packed, x = pack(model), hard_batch(model, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.export.export(packed, (x,))
        torch.testing.assert_close(program.module()(x), model(x), **EXACT)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(call.startswith("aten.") or "getitem" in call for call in calls), calls


@pytest.mark.parametrize("kind", ["A", "W", "WA"])
def test_prepare_convert_and_integers_agree(kind):
    """In float64, layer by layer: a rounding error in one layer could flip a code in the next."""
    model = trained(3, kind, dtype=torch.float64)
    packed = pack(model)
    whole, report = deploy(model)
    assert not report.refused
    x = batch(2).double()
    for trained_layer, packed_layer, layer in zip(model, packed, whole, strict=True):
        with torch.no_grad():
            expected = trained_layer(x)
            torch.testing.assert_close(packed_layer(x), expected, **EXACT)
            # At most 72 products, below 10 together, and 14 sums of planes: (72 + 14 + 8) * 10 * 2^-53 = 1e-13.
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        x = expected


def test_levels_that_have_become_one_are_named_on_the_way_out():
    model = trained(2)
    with torch.no_grad():
        model[3].weight_quantizer.grid.steps[0, ..., 1] = -1.0  # not projected
    with pytest.raises(RangeError, match=r"call project\(\)"):
        pack(model)
    model[3].weight_quantizer.grid.project()
    pack(model)
