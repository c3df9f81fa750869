"""Quantized adder layers: levels, the lossless clamp in them, gradients, training, compilation."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from q_adder import (
    AdderConv2d,
    AdderLinear,
    Published,
    QuantAdderConv2d,
    QuantAdderLinear,
    QuantAdderMatmul,
    TiedGrid,
    TiedSpec,
    adder2d,
    ops,
    redistribute,
)
from q_adder.refinement import trainable
from q_core import RangeError, ShapeError, SpecError, pack

from . import cases, oracles

NO_KERNELS = torch.zeros(0, dtype=torch.int64)


def one_group(kernels: int) -> torch.Tensor:
    return torch.zeros(kernels, dtype=torch.int64)


# Levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_are_2_to_8(bits):
    with pytest.raises(SpecError, match=rf"bits={bits}: an adder layer is quantized to 2 to 8 bits"):
        TiedSpec(bits)


def test_weights_lie_on_every_level_or_on_every_other():
    with pytest.raises(SpecError, match=r"weight_step=3"):
        TiedSpec(4, 3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("step", [1, 2])
def test_the_farthest_codes_are_as_far_apart_as_stated(bits, step):
    tied = TiedGrid(TiedSpec(bits, step), torch.ones(1), torch.zeros(1), one_group(1))
    ends = torch.tensor([[-1e6, 1e6]])
    inputs, weights = tied.input(ends, 0), tied.weight(ends)
    assert (inputs.reshape(-1, 1) - weights.reshape(1, -1)).abs().max() == tied.spec.farthest


def test_tensors_that_do_not_fit_one_another_are_refused():
    spec, scale, zero = TiedSpec(4), torch.ones(2), torch.zeros(2)
    with pytest.raises(ShapeError, match="one scale and one zero point per group"):
        oracles.unchecked(TiedGrid.__init__)(object.__new__(TiedGrid), spec, scale, zero[:1], one_group(3))
    with pytest.raises(RangeError, match="every scale must be positive and finite"):
        TiedGrid(spec, torch.tensor([1.0, -1.0]), zero, torch.tensor([0, 1]))
    with pytest.raises(RangeError, match="it must be a code, 0 to 15"):
        TiedGrid(spec, scale, torch.tensor([0.0, 16.0]), torch.tensor([0, 1]))
    with pytest.raises(RangeError, match="it must be a code, 0 to 15"):
        TiedGrid(spec, scale, torch.tensor([0.0, 0.5]), torch.tensor([0, 1]))
    with pytest.raises(RangeError, match="groups 0 to 2 of kernels with 2 scales"):
        TiedGrid(spec, scale, zero, torch.tensor([0, 1, 2]))
    with pytest.raises(RangeError, match="group 1 of 2 has a scale but no kernel"):
        TiedGrid(spec, scale, zero, torch.tensor([0, 0]))


def test_a_layer_and_its_levels_must_have_as_many_kernels():
    tied = TiedGrid(TiedSpec(4), torch.ones(1), torch.zeros(1), one_group(3))
    with pytest.raises(ShapeError, match=r"layer1 has 4 kernels, and groups are given for 3"):
        QuantAdderConv2d(2, 4, 3, tied=tied, path="layer1")
    with pytest.raises(ShapeError, match=r"mixing has no kernels.*groups for 3"):
        QuantAdderMatmul(tied, path="mixing")


@settings(max_examples=60)
@given(grid=cases.grids(5), seed=cases.SEEDS)
def test_every_kernel_lies_on_the_levels_of_its_group(grid, seed):
    tied = grid.build()
    weight = 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    levels = tied.weight(weight)
    for kernel, group, found in zip(weight, tied.group_of.tolist(), levels, strict=True):
        alone = TiedGrid(tied.spec, tied.scale[group : group + 1], tied.zero_point[group : group + 1], one_group(1))
        assert torch.equal(alone.weight(kernel[None])[0], found)
        if tied.spec.weight_step == 1:
            assert torch.equal(alone.input(kernel, 0), found)
        else:
            assert torch.equal((found / (2 * alone.scale)).round() * (2 * alone.scale), found)


@settings(max_examples=60)
@given(grid=cases.grids(4), seed=cases.SEEDS)
def test_what_the_clamp_absorbs_is_the_distance_of_weights_to_the_range(grid, seed):
    tied = grid.build()
    weight = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    low, high = (end.double() for end in tied.range())
    if tied.spec.weight_step == 2:
        low = -high
    rows = weight.double()
    expected = [(row - row.clamp(low[g], high[g])).abs().sum() for row, g in zip(rows, tied.group_of, strict=True)]
    # Six differences below 20 in float32: ten roundings of sums below 120.
    torch.testing.assert_close(tied.absorbed(weight).double(), torch.stack(expected), rtol=0, atol=10 * 120 * 2**-24)


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    zero=st.integers(0, 255),
    step=st.sampled_from([1, 2]),
    spread=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_a_layer_whose_weights_are_levels_and_whose_inputs_are_codes_is_lossless(bits, zero, step, spread, seed):
    """Nothing is rounded, so the quantized layer equals the float one, however far the weights lie outside."""
    spec = TiedSpec(bits, step)
    zero = 0 if step == 2 else min(zero, spec.top)
    generator = torch.Generator().manual_seed(seed)
    tied = TiedGrid(spec, torch.ones(1), torch.tensor([float(zero)]), one_group(3))
    layer = QuantAdderConv2d(2, 3, (2, 3), stride=(2, 1), padding=1, tied=tied).eval()
    # Integers, the signed weights on every other level even, with the end of the range among them.
    weight = step * torch.randint(-spread, spread + 1, layer.weight.shape, generator=generator)
    if step == 2:
        # The signed codes reach one step below -h, and one half step short of h: stay inside, or at once far beyond.
        half = 1 << (bits - 1)
        weight = weight.clamp(-2 * (half - 1), 2 * (half - 1))
    layer.weight.data = weight.float()
    codes = torch.randint(0, spec.top + 1, (2, 2, 5, 6), generator=generator)
    x = (codes - zero).float()
    with torch.no_grad():
        expected = adder2d(x, layer.weight, layer.bias, stride=(2, 1), padding=1)
        # Integers below 2**24 are exact, but the biases are not: two sums of integers below 2**13 and one real.
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2 * 2**13 * 2**-24)


def test_a_value_beyond_the_calibrated_range_breaks_the_clamp():
    tied = TiedGrid(TiedSpec(2), torch.ones(1), torch.zeros(1), one_group(1))
    layer = QuantAdderLinear(1, 1, bias=False, tied=tied)
    layer.weight.data.fill_(7.0)
    x = torch.tensor([[2.0], [3.0], [4.0]])
    # Up to the end of the range, 3, the distance to 7 is right; beyond, the input is taken for 3.
    assert layer(x).flatten().tolist() == [-5, -4, -4]


# Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_stay_in_float32_when_the_model_is_cast(dtype):
    tied = TiedGrid(TiedSpec(8), torch.tensor([0.01, 0.02]), torch.zeros(2), torch.tensor([0, 1, 0]), learnable=True)
    layer = QuantAdderConv2d(2, 3, 3, tied=tied)
    before = tied.scale.detach().clone()
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.tied.scale.dtype == layer.tied.zero_point.dtype == torch.float32
    assert torch.equal(layer.tied.scale, before)
    assert layer.constant().dtype == torch.float32
    x = torch.rand(2, 2, 5, 5).to(dtype)
    with torch.no_grad():
        assert torch.equal(pack(layer)(x), layer(x))


def test_a_double_model_has_double_levels():
    tied = TiedGrid(TiedSpec(8), torch.tensor([0.01]), torch.zeros(1), one_group(3))
    layer = QuantAdderConv2d(2, 3, 3, tied=tied).double()
    x = torch.rand(2, 2, 5, 5, dtype=torch.float64)
    assert layer.tied.scale.dtype == torch.float64
    with torch.no_grad():
        out = layer(x)
        assert torch.equal(pack(layer)(x), out)
    # 18 taps whose distances are below 18: a quantized step of 0.01 at most for each operand.
    expected = adder2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=18 * 0.01)


# Gradients --------------------------------------------------------------------------------------------------------


def gradient_oracle(layer: QuantAdderConv2d, x, grad):
    """Published gradients on the quantized reals, straight through the rounding, group by group in float64."""
    tied, spec = layer.tied, layer.tied.spec
    scale, zero = tied.scale.detach(), tied.zero_point
    dx, dw, dscale = torch.zeros_like(x), torch.zeros_like(layer.weight), torch.zeros_like(scale)
    levels = tied.weight(layer.weight).detach()
    step = spec.weight_step
    for group in range(tied.groups):
        own = (tied.group_of == group).reshape(-1, 1, 1)
        s, z = scale[group], zero[group]
        low, high = -z * s, (spec.top - z) * s
        codes = ((x / s).round() + z).clamp(0, spec.top)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        gx, gw = oracles.gradients(grad * own, (codes - z) * s, levels, *geometry)
        inside = (x >= low) & (x <= high)
        dx += gx * inside
        dscale[group] = (gx * torch.where(inside, (codes - z) - x / s, codes - z)).sum()
        ends = (low, high)
        if step == 2:
            half = 1 << (spec.bits - 1)
            ends = (-half * 2 * s, (half - 1) * 2 * s)
        kept = (layer.weight >= ends[0]) & (layer.weight <= ends[1])
        dw += gw * kept * own.unsqueeze(-1)
    return dx, dw, grad.sum((0, 2, 3)), dscale


@settings(max_examples=40)
@given(
    channel_groups=st.integers(1, 2),
    stride=st.tuples(*[st.integers(1, 2)] * 2),
    padding=st.tuples(*[st.integers(0, 1)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    grid=cases.grids(4, 3),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_the_published_ones_on_the_quantized_reals(channel_groups, stride, padding, dilation, grid, seed):
    generator = torch.Generator().manual_seed(seed)
    tied = grid.build(learnable=True)
    layer = QuantAdderConv2d(4, 4, (3, 2), stride, padding, dilation, channel_groups, tied=tied).double()
    layer.weight.data = 3 * torch.randn(layer.weight.shape, dtype=torch.float64, generator=generator)
    x = 3 * torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=generator)
    out = layer(x.requires_grad_())
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    actual = torch.autograd.grad(out, (x, layer.weight, layer.bias, layer.tied.scale), grad)
    with torch.no_grad():
        expected = gradient_oracle(layer, x, grad)
    # Sums of at most 240 terms, of codes up to 255 times gradients of a size of 50: 1e-9 is far above their roundings,
    # and a thousand times below the least term that a wrong mask would leave out.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_linear_layer_is_that_of_a_convolution_of_one_pixel():
    tied = TiedGrid(TiedSpec(4), torch.tensor([0.2, 0.3]), torch.tensor([8.0, 8.0]), torch.tensor([0, 1, 1]))
    layer = QuantAdderLinear(5, 3, tied=tied)
    twin = QuantAdderConv2d(5, 3, 1, tied=tied)
    twin.weight, twin.bias = nn.Parameter(layer.weight.detach()[:, :, None, None]), layer.bias
    x = torch.randn(4, 5)
    rows, pixels = x.clone().requires_grad_(), x[:, :, None, None].clone().requires_grad_()
    grad = torch.randn(4, 3)
    one = torch.autograd.grad(layer(rows), (rows, layer.weight, layer.bias), grad)
    other = torch.autograd.grad(twin(pixels), (pixels, twin.weight, twin.bias), grad[:, :, None, None])
    for left, right in zip(one, other, strict=True):
        # The same terms, at most five of a size of 3, in another order.
        torch.testing.assert_close(left, right.reshape(left.shape), rtol=0, atol=10 * 15 * 2**-24)


def test_the_gradient_of_distances_of_rows_is_the_published_one_on_the_quantized_reals():
    tied = TiedGrid(TiedSpec(5), torch.tensor([0.15]), torch.tensor([16.0]), NO_KERNELS, learnable=True)
    layer = QuantAdderMatmul(tied).double()
    a, b = (2 * torch.randn(2, rows, 3, dtype=torch.float64) for rows in (4, 5))
    grad = torch.randn(2, 4, 5, dtype=torch.float64)
    actual = torch.autograd.grad(layer(a.requires_grad_(), b.requires_grad_()), (a, b, layer.tied.scale), grad)
    s, z = tied.scale.detach(), tied.zero_point
    codes = [((x.detach() / s).round() + z).clamp(0, 31) - z for x in (a, b)]
    slope = ((codes[1].unsqueeze(-3) - codes[0].unsqueeze(-2)) * s).clamp(-1, 1) * grad.unsqueeze(-1)
    expected, dscale = [], 0
    for x, q, g in zip((a, b), codes, (slope.sum(-2), -slope.sum(-3)), strict=True):
        inside = (x.detach() >= -16 * s) & (x.detach() <= 15 * s)
        expected.append(g * inside)
        dscale = dscale + (g * torch.where(inside, q - x.detach() / s, q)).sum()
    # Sums of at most 40 terms below 100.
    torch.testing.assert_close(actual, (*expected, dscale.reshape(1)), rtol=1e-11, atol=1e-11)


def test_a_scale_that_does_not_learn_is_a_buffer_and_one_that_does_is_the_only_new_parameter():
    for learnable in (False, True):
        tied = TiedGrid(TiedSpec(4), torch.ones(1), torch.zeros(1), one_group(2), learnable=learnable)
        layer = QuantAdderLinear(3, 2, tied=tied)
        assert ("tied.scale" in dict(layer.named_parameters())) == learnable
        keys = {"weight", "bias", "tied.scale", "tied.zero_point", "tied.group_of", "tied.kind"}
        assert set(layer.state_dict()) == keys
        assert layer.tied.scale.ndim == 1


# Training ---------------------------------------------------------------------------------------------------------


def digits_like(count=96):
    """Two classes that a small network tells apart."""
    labels = torch.arange(count) % 2
    x = torch.randn(count, 2, 6, 6) + labels.reshape(-1, 1, 1, 1) * torch.linspace(-2, 2, 6)
    return x, labels


def network() -> nn.Sequential:
    # One pass in training mode gives these batch norms the statistics of the data; with the usual momentum it would
    # leave nothing alive behind the rectifiers.
    norms = [nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None), nn.BatchNorm1d(4, momentum=None)]
    first = [nn.Conv2d(2, 6, 3, padding=1), norms[0], nn.ReLU(), AdderConv2d(6, 6, 3), norms[1], nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), AdderLinear(96, 4), norms[2], nn.Linear(4, 2))


@pytest.mark.parametrize("bits", [2, 4])
def test_quantization_aware_training_lowers_the_loss(bits):
    x, labels = digits_like()
    model = network().train()
    model(x)
    options = {"weight_bits": bits, "activation_bits": bits, "progress": False}
    learner = trainable(redistribute(model.eval(), [x], **options).model)
    scales = [module.tied.scale.clone() for module in learner.modules() if hasattr(module, "tied")]
    assert len(scales) == 2
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(learner(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    learned = [module.tied.scale for module in learner.modules() if hasattr(module, "tied")]
    assert all(not torch.equal(one, other) for one, other in zip(scales, learned, strict=True))
    learner.eval()
    with torch.no_grad():
        assert torch.equal(pack(learner)(x), learner(x))


def test_the_state_of_a_quantized_model_fits_one_of_the_same_structure():
    x, _ = digits_like()
    models = [redistribute(network().eval(), [x], progress=False).model for _ in range(2)]
    assert not torch.equal(models[0](x), models[1](x))
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()), strict=True)
    assert torch.equal(models[0](x), models[1](x))
    keys = {"weight", "bias", "tied.scale", "tied.zero_point", "tied.group_of", "tied.kind"}
    assert set(models[0][3].state_dict()) == keys


def test_a_state_of_other_codes_is_refused():
    """Its scale fits in shape: a state of 4 bits in a model of 8 would give other numbers without a word."""
    x, _ = digits_like()
    model = network().train()
    model(x)
    states = {}
    for bits, step in ((4, 1), (8, 1), (8, 2)):
        options = {"weight_bits": bits, "activation_bits": bits, "scheme": Published(1) if step == 2 else None}
        states[bits, step] = redistribute(model.eval(), [x], **options, progress=False).model
    for one, other in (((4, 1), (8, 1)), ((8, 1), (8, 2)), ((8, 2), (8, 1))):
        with pytest.raises(RuntimeError) as caught:
            states[other].load_state_dict(states[one].state_dict())
        for path in ("3", "7"):
            text = (
                f"{path}.tied: the state has [bits, weight step] = {list(one)}, the layer {list(other)}: load it into"
            )
            assert text in str(caught.value)
    with pytest.raises(RuntimeError, match=r"3\.tied: the state has \[bits, weight step\] = \[4, 1\]"):
        trainable(states[8, 1]).load_state_dict(trainable(states[4, 1]).state_dict())


def test_a_state_that_does_not_name_its_codes_is_taken():
    x, _ = digits_like()
    models = [redistribute(network().eval(), [x], progress=False).model for _ in range(2)]
    earlier = {name: value.clone() for name, value in models[0].state_dict().items() if not name.endswith("kind")}
    assert len(earlier) < len(models[0].state_dict())
    models[1].load_state_dict(earlier, strict=True)
    assert torch.equal(models[0](x), models[1](x))
    assert not any(name.endswith("kind") for name in pack(models[0]).state_dict())


def test_groups_follow_when_a_state_is_loaded():
    make = [
        TiedGrid(TiedSpec(4), torch.tensor([0.1, 0.3]), torch.zeros(2), torch.tensor(which))
        for which in ([0, 1, 1, 1], [0, 0, 0, 1])
    ]
    one, other = (QuantAdderLinear(5, 4, tied=tied) for tied in make)
    other.load_state_dict(one.state_dict())
    assert other.tied.sizes == (1, 3)
    x = torch.rand(3, 5)
    assert torch.equal(one(x), other(x))


# Compilation ------------------------------------------------------------------------------------------------------

compiled = [
    pytest.mark.compile,
    # Both are torch's own: Dynamo when it traces any autograd.Function, Inductor when it is imported.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


def apply(marks):
    def decorate(function):
        for mark in marks:
            function = mark(function)
        return function

    return decorate


class Everything(nn.Module):
    """Every kind of quantized layer, with groups of kernels and of channels."""

    def __init__(self):
        super().__init__()
        spec, two = TiedSpec(4), torch.tensor([0.2, 0.4])
        which = torch.tensor([0, 1, 1, 0])
        self.first = QuantAdderConv2d(
            3, 4, 3, padding=1, padding_mode="reflect", tied=TiedGrid(spec, two, torch.zeros(2), which, learnable=True)
        )
        self.second = QuantAdderConv2d(
            4, 4, 3, stride=2, groups=2, tied=TiedGrid(spec, 20 * two, torch.zeros(2), which)
        )
        self.rows = QuantAdderMatmul(TiedGrid(spec, torch.tensor([9.0]), torch.tensor([15.0]), NO_KERNELS))
        self.last = QuantAdderLinear(4, 4, tied=TiedGrid(spec, 20 * two, torch.full((2,), 15.0), which))

    def forward(self, x):
        y = self.second(self.first(x).neg()).flatten(2)
        return self.last(self.rows(y, y))


def results(function, model, x):
    out = function(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))]


@apply(compiled)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_quantized_model_compiles_as_one_graph_with_its_gradients(dynamic):
    model, x = Everything(), torch.rand(2, 3, 7, 7, requires_grad=True)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for one, other in zip(results(fast, model, x), results(model, model, x), strict=True):
        assert torch.equal(one, other)
    assert any(gradient.abs().sum() > 0 for gradient in results(model, model, x)[1:])


@apply(compiled)
def test_a_packed_model_compiles_as_one_graph_and_exports():
    model, x = pack(Everything().eval()), torch.rand(2, 3, 7, 7)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=2)
    for strict in (False, True):
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for images in (x, torch.rand(5, 3, 7, 7)):
            assert torch.equal(loaded(images), model(images))
        # Without gradients the layers are graphs of their own inside the graph.
        targets = {str(node.target) for part in exported.graph_module.modules() for node in part.graph.nodes}
        assert "q_adder.code_distance_conv2d.default" in targets


@apply(compiled)
def test_a_quantized_model_exports():
    model, x = Everything().eval(), torch.rand(2, 3, 7, 7)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    images = torch.rand(4, 3, 7, 7)
    assert torch.equal(exported.module()(images), model(images))


@apply([*compiled, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_on_levels_and_codes_pass_opcheck(dtype):
    scale, zero = torch.tensor([0.25], dtype=dtype), torch.tensor([7.0], dtype=dtype)
    codes = [torch.randint(0, 16, (3, rows, 4), dtype=torch.uint8) for rows in (5, 6)]
    a, b = (((rows - zero) * scale).requires_grad_() for rows in codes)
    torch.library.opcheck(ops.tied_distance_matmul, (a, b, scale, zero, 4))
    torch.library.opcheck(ops.code_distance_matmul, (*codes, 4))
    torch.library.opcheck(ops.as_bytes, (codes[0].to(dtype),))
    images = ((torch.randint(0, 16, (2, 4, 7, 6)) - zero) * scale).requires_grad_()
    # Kernels may lie beyond the codes of the input.
    kernels = (torch.randint(-20, 40, (4, 2, 3, 2)) * scale).requires_grad_()
    torch.library.opcheck(ops.tied_distance_conv2d, (images, kernels, scale, zero, 4, [2, 1], [1, 2], 2))
