"""Integer execution equals the quantized layer exactly, and so does every implementation of the distance of codes."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from q_adder import (
    AdderConv2d,
    AdderLinear,
    AdderMatmul,
    IntegerAdderConv2d,
    IntegerAdderLinear,
    IntegerAdderMatmul,
    QuantAdderConv2d,
    QuantAdderLinear,
    QuantAdderMatmul,
    TiedGrid,
    TiedSpec,
    explain,
    ops,
    redistribute,
    trainable,
)
from q_adder.integer import level_distance_conv2d
from q_core import (
    BackendError,
    FormatError,
    MatchError,
    StateError,
    bits_per_weight,
    load_packed,
    nearest,
    pack,
    save_packed,
)
from q_core.kernels import Kernel, only

from . import cases, oracles

# The quantized layer, its integers and the equation ---------------------------------------------------------------


@settings(max_examples=150)
@given(case=cases.convolutions())
def test_an_integer_convolution_equals_the_quantized_one_and_the_equation(case):
    layer, x = case.build()
    packed = pack(layer)
    assert isinstance(packed, IntegerAdderConv2d)
    with torch.no_grad():
        out = layer(x)
        assert out.dtype == x.dtype
        assert torch.equal(packed(x), out)
        assert torch.equal(cases.integer_oracle(layer, x), out)


@settings(max_examples=80)
@given(case=cases.linears())
def test_an_integer_linear_layer_equals_the_quantized_one_and_a_convolution_of_one_pixel(case):
    layer, x = case.build()
    packed = pack(layer)
    assert isinstance(packed, IntegerAdderLinear)
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    kernels = layer.weight.detach()[:, :, None, None]
    twin = QuantAdderConv2d(*kernels.shape[1::-1], 1, bias=layer.bias is not None, tied=layer.tied)
    twin.weight, twin.bias = nn.Parameter(kernels), layer.bias
    with torch.no_grad():
        out = layer(x)
        assert out.dtype == x.dtype
        assert torch.equal(packed(x), out)
        assert torch.equal(cases.integer_oracle(twin, rows).reshape(out.shape), out)


@settings(max_examples=60)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    size=st.tuples(*[st.integers(1, 6)] * 3),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from(cases.DTYPES)] * 2),
    seed=st.integers(0, 2**31),
)
def test_the_integer_distances_of_rows_equal_the_quantized_ones_and_the_equation(
    batch, size, bits, signed, dtypes, seed
):
    n, m, k = size
    generator = torch.Generator().manual_seed(seed)
    a, b = (3 * torch.randn(*batch, rows, k, generator=generator) for rows in (n, m))
    a, b = a.to(dtypes[0]), b.to(dtypes[1])
    spec = TiedSpec(bits)
    zero = torch.tensor([float(signed * (spec.top + 1) // 2)])
    tied = TiedGrid(spec, torch.tensor([4.0 / spec.top]), zero, torch.zeros(0, dtype=torch.int64))
    layer = QuantAdderMatmul(tied, path="a.layer")
    packed = pack(layer)
    assert isinstance(packed, IntegerAdderMatmul)
    dtype = torch.promote_types(*dtypes)
    codes = [oracles.rounded_codes(rows.to(dtype), tied.scale, zero, 0, spec.top) for rows in (a, b)]
    distance = (codes[0].unsqueeze(-2) - codes[1].unsqueeze(-3)).abs().sum(-1)
    out = layer(a, b)
    assert torch.equal(out, (-tied.scale * distance).to(dtype))
    assert torch.equal(packed(a, b), out)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (0, 4)])
def test_an_empty_batch_gives_an_empty_result(shape):
    tied = TiedGrid(TiedSpec(8), torch.tensor([0.1]), torch.zeros(1), torch.zeros(3, dtype=torch.int64))
    layer = QuantAdderConv2d(4, 3, 3, tied=tied) if len(shape) == 4 else QuantAdderLinear(4, 3, tied=tied)
    expected = (0, 3, 3, 3) if len(shape) == 4 else (0, 3)
    assert layer(torch.zeros(shape)).shape == expected
    assert pack(layer)(torch.zeros(shape)).shape == expected


def test_infinities_are_clamped_to_the_ends_of_the_range():
    tied = TiedGrid(TiedSpec(4), torch.tensor([0.5]), torch.tensor([3.0]), torch.zeros(2, dtype=torch.int64))
    layer = QuantAdderLinear(3, 2, tied=tied).eval()
    low, high = (float(end) for end in tied.range())
    given, meant = torch.tensor([[-torch.inf, torch.inf, 0.2]]), torch.tensor([[low, high, 0.2]])
    with torch.no_grad():
        assert torch.equal(layer(given), layer(meant))
        assert torch.equal(pack(layer)(given), layer(meant))


# Implementations of the distance of codes -------------------------------------------------------------------------

THERMOMETERS = {"thermometer-convolution", "thermometer-product"}


def implementations() -> dict[str, Kernel]:
    """All that this environment has, those of `q_kernels` included."""
    found = {kernel.name: kernel for kernel in (ops.CODE_DISTANCE.reference, *ops.CODE_DISTANCE.kernels)}
    try:
        from q_kernels.cpu import adder
    except ImportError:
        return found
    return found | {kernel.name: kernel for kernel in adder.code_distance_conv2d}


def random_codes(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> torch.Tensor:
    """Codes of which a third are the ends."""
    top = (1 << bits) - 1
    extreme = top * torch.randint(0, 2, shape, generator=generator)
    anything = torch.randint(0, top + 1, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, extreme, anything).to(torch.uint8)


@settings(max_examples=100)
@given(
    bits=st.integers(1, 8),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(*[st.integers(1, 6)] * 2),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    dilation=st.tuples(*[st.integers(1, 3)] * 2),
    more=st.tuples(*[st.integers(0, 6)] * 2),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**31),
)
def test_every_implementation_agrees_exactly(
    bits, batch, groups, channels, kernel, stride, dilation, more, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    size = [dilation[a] * (kernel[a] - 1) + 1 + more[a] for a in (0, 1)]
    x = random_codes((batch, groups * channels[0], *size), bits, generator).contiguous(memory_format=layout)
    weight = random_codes((groups * channels[1], channels[0], *kernel), bits, generator)
    agree(x, weight, list(stride), list(dilation), groups, bits)


def agree(*arguments) -> None:
    bits = arguments[-1]
    expected = oracles.code_distances(*arguments[:-1]).to(torch.int32)
    ran = set()
    for name, implementation in implementations().items():
        if implementation.refuses(*arguments) is None:
            ran.add(name)
            out = implementation.run(*arguments)
            assert out.dtype == torch.int32, name
            assert torch.equal(out, expected), name
    assert ran >= ({"reference", *THERMOMETERS} if bits <= 4 else {"reference"})
    assert torch.equal(ops.code_distance_conv2d(*arguments), expected)


@pytest.mark.parametrize("stride", [[1, 2], [1, 3], [2, 1], [3, 1], [2, 2]])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("channels", [1, 3, 32])
def test_outputs_of_one_row_or_column_ignore_the_stride_across(stride, axis, channels):
    """oneDNN of torch 2.13 and 2.14 is wrong in int8 for one column and a stride of 1 down, more across."""
    size = [9, 9]
    size[axis] = 3 + stride[axis] - 1
    x, weight = (
        random_codes(shape, 3, torch.default_generator) for shape in ((2, channels, *size), (4, channels, 3, 3))
    )
    agree(x, weight, stride, [1, 1], 1, 3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_layer_gives_the_same_with_every_implementation_alone(bits):
    spec = TiedSpec(bits)
    tied = TiedGrid(spec, torch.tensor([3.0 / spec.top]), torch.zeros(1), torch.zeros(6, dtype=torch.int64))
    layer = QuantAdderConv2d(5, 6, 3, stride=2, padding=1, tied=tied).eval()
    x, outputs = torch.randn(2, 5, 9, 8), {}
    shapes = (2, 5, 11, 10), (6, 5, 3, 3)  # the padded input and the kernels
    arguments = (*(torch.zeros(shape, dtype=torch.uint8) for shape in shapes), [2, 2], [1, 1], 1, bits)
    for kernel in ops.CODE_DISTANCE.kernels:
        with only(kernel.name), torch.no_grad():
            if kernel.refuses(*arguments) is None:
                outputs[kernel.name] = (layer(x), pack(layer)(x))
            else:
                with pytest.raises(BackendError, match=f"{kernel.name} cannot run"):
                    layer(x)
    with only("reference"), torch.no_grad():
        expected = layer(x)
    for name, results in outputs.items():
        assert all(torch.equal(result, expected) for result in results), name
    # What is there is tried, all of it where codes are narrow.
    everything = {kernel.name for kernel in ops.CODE_DISTANCE.kernels}
    assert outputs.keys() >= (everything if bits <= 4 else everything & {"cpu-sad"})
    assert bits == 8 or outputs.keys() >= THERMOMETERS


@pytest.mark.parametrize("name", sorted(THERMOMETERS))
def test_a_thermometer_refuses_wide_codes_and_says_why(name):
    tied = TiedGrid(TiedSpec(5), torch.tensor([0.1]), torch.zeros(1), torch.zeros(2, dtype=torch.int64))
    layer = QuantAdderLinear(4, 2, tied=tied)
    with only(name), pytest.raises(BackendError, match=r"5-bit code has 31 places; it takes 4 bits at most"):
        layer(torch.zeros(1, 4))


@pytest.mark.parametrize(("taps", "bits"), [(70_000, 8), (1_150_000, 4)])
def test_sums_beyond_the_integers_of_float32_are_exact(taps, bits):
    """Above 2**24 only even integers are float32, and the sums here are odd."""
    top = (1 << bits) - 1
    x = torch.full((1, taps, 1, 1), top, dtype=torch.uint8)
    weight = torch.zeros(1, taps, 1, 1, dtype=torch.uint8)
    weight[0, 0] = 1
    expected = taps * top - 1
    assert expected > 1 << 24
    assert expected % 2 == 1
    arguments = (x, weight, [1, 1], [1, 1], 1, bits)
    for name, kernel in implementations().items():
        if kernel.refuses(*arguments) is None:
            assert kernel.run(*arguments).item() == expected, name
    reason = implementations()["thermometer-convolution"].refuses(*arguments)
    assert reason is not None


def test_explain_names_the_implementation_of_every_layer_and_why_not_the_others():
    model = nn.Sequential(AdderConv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), AdderLinear(36, 2)).eval()
    x = torch.randn(2, 3, 5, 5)
    quantized = redistribute(model, [x], weight_bits=8, activation_bits=8, progress=False).model
    found = explain(quantized, x)
    assert found.keys() == {"0", "3"}
    assert found == explain(pack(quantized), x)
    for text in found.values():
        assert "thermometer-product: the thermometer of a 8-bit code has 255 places" in text
        assert text.count(": runs") == 1
    assert not quantized.training
    assert not any(module._forward_hooks for module in quantized.modules())


def test_explain_says_that_a_layer_is_float_and_takes_the_batches_of_redistribute():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rows, self.last = AdderConv2d(3, 4, 3, padding=1), AdderMatmul(), AdderLinear(9, 2)

        def forward(self, x):
            y = self.conv(x).flatten(2)
            return self.last(self.rows(a=y, b=y[:, :3]).repeat(1, 1, 3))

    model, x = Own().eval(), torch.randn(2, 3, 5, 5)
    found = explain(model, x)
    assert found.keys() == {"conv", "rows", "last"}
    for text in found.values():
        assert text.startswith("float, a distance of reals: redistribute() quantizes it\n")
        assert text.count(": runs") == 1
    quantized = redistribute(model, [(x, torch.zeros(2))], progress=False).model
    for batch in ((x, torch.zeros(2)), {"x": x}):
        assert explain(quantized, batch) == explain(quantized, x)
        assert not any(text.startswith("float") for text in explain(quantized, batch).values())
    with pytest.raises(MatchError, match="a Linear has no adder layer: there is nothing to explain"):
        explain(nn.Linear(2, 2), torch.zeros(1, 2))


def test_explain_sees_the_distances_of_rows():
    tied = TiedGrid(TiedSpec(4), torch.tensor([0.1]), torch.zeros(1), torch.zeros(0, dtype=torch.int64))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = QuantAdderMatmul(tied)

        def forward(self, x):
            return self.distance(x, x)

    model = Own().eval()
    assert "thermometer-product" in explain(model, torch.randn(2, 3, 5, 4))["distance"]
    assert explain(pack(model), torch.randn(2, 3, 5, 4)).keys() == {"distance"}


# Weights on levels of their own -----------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    levels=st.lists(st.floats(-5, 5), min_size=2, max_size=9, unique=True).map(sorted),
    groups=st.integers(1, 2),
    stride=st.tuples(*[st.integers(1, 2)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    seed=st.integers(0, 2**31),
)
def test_weights_on_levels_of_any_spacing_meet_reals_in_one_convolution(levels, groups, stride, dilation, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(levels, dtype=torch.float64)
    codes = torch.randint(0, len(levels), (4, 2, 2, 3), generator=generator).to(torch.uint8)
    x = 4 * torch.randn(2, 2 * groups, 6, 7, generator=generator, dtype=torch.float64)
    out = level_distance_conv2d(x, codes, table, stride=stride, dilation=dilation, groups=groups)
    expected = oracles.adder2d(x, table[codes.long()], stride, (0, 0), dilation, groups)
    # Some 12 taps of 9 differences below 30: a hundred roundings of sums below 400.
    torch.testing.assert_close(out, expected, rtol=0, atol=100 * 400 * 2**-52)


def test_weights_on_levels_are_not_narrowed_by_autocast():
    x, codes = 100 * torch.rand(1, 64, 3, 3), torch.randint(0, 4, (2, 64, 3, 3), dtype=torch.uint8)
    levels = torch.tensor([0.0, 1.0, 5.0, 40.0])
    expected = level_distance_conv2d(x, codes, levels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(level_distance_conv2d(x, codes, levels), expected)
        narrow = level_distance_conv2d(x.bfloat16(), codes, levels)
    assert torch.equal(narrow, level_distance_conv2d(x.bfloat16().float(), codes, levels))


def test_a_code_beyond_the_levels_counts_as_the_last():
    x, levels = torch.randn(1, 2, 3, 3), torch.tensor([-1.0, 0.5, 2.0])
    last, beyond = (torch.full((1, 2, 2, 2), code, dtype=torch.uint8) for code in (2, 200))
    assert torch.equal(level_distance_conv2d(x, beyond, levels), level_distance_conv2d(x, last, levels))


# Mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_autocast_leaves_a_network_of_every_kind_of_layer_in_float32(bits):
    """The outputs lie around -2000, where bfloat16 has a number every 8 or 16."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rows, self.last = AdderConv2d(256, 4, 3), AdderMatmul(), AdderLinear(4, 2)
            nn.init.uniform_(self.conv.weight, 0.87, 1.87)

        def forward(self, x):
            y = self.conv(x).flatten(2)
            return y, (z := self.rows(y, y[:, :4])), self.last(z)

    model, x = Own().eval(), torch.rand(2, 256, 4, 4).bfloat16()
    quantized = redistribute(
        model, [x.float()], weight_bits=bits, activation_bits=bits, mean_correction=False, progress=False
    ).model
    for form in (model, quantized, pack(quantized)):
        with torch.no_grad():
            expected = form(x.float())
            with torch.autocast("cpu", torch.bfloat16):
                actual = form(x)
        assert -2200 < float(actual[0].mean()) < -1800
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)


def test_a_scaler_trains_a_quantized_network_under_autocast():
    model, x = trained()
    learner = trainable(redistribute(model, [x], progress=False).model)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = learner(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    changed = [not torch.equal(one, other) for one, other in zip(before, learner.parameters(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)


# Files ------------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [AdderConv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [AdderConv2d(8, 8, 3, groups=2, bias=True), nn.BatchNorm2d(8), nn.Flatten(), AdderLinear(32, 10)]
    return nn.Sequential(*layers, nn.BatchNorm1d(10), nn.Linear(10, 4))


def trained() -> tuple[nn.Sequential, torch.Tensor]:
    """A network whose batch norms have seen data."""
    model, x = network().train(), torch.randn(16, 3, 8, 8)
    for _ in range(30):
        model(x)
    return model.eval(), x


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("edge_bits", [8, 32])
def test_a_packed_network_comes_back_from_its_file_bit_for_bit(bits, edge_bits, tmp_path):
    model, x = trained()
    options = {"weight_bits": bits, "activation_bits": bits, "edge_bits": edge_bits, "progress": False}
    quantized = redistribute(model, [x], **options).model
    packed = pack(quantized)
    save_packed(packed, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors", network())
    with torch.no_grad():
        assert torch.equal(packed(x), quantized(x))
        assert torch.equal(loaded(x), packed(x))
    assert loaded[3].kernels.tied.spec == TiedSpec(bits)
    assert loaded[3].path == "3"
    save_packed(pack(quantized), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_packed_layer_takes_its_bits_a_weight_and_one_scale(bits):
    spec = TiedSpec(bits)
    tied = TiedGrid(spec, torch.ones(1), torch.zeros(1), torch.zeros(64, dtype=torch.int64))
    packed = pack(QuantAdderConv2d(64, 64, 3, tied=tied))
    # Scale and zero point are 64 bits, a group and an offset for each kernel 96, and the last word is filled.
    most = bits + (64 + 64 * 96 + 32) / (64 * 64 * 9)
    assert bits < bits_per_weight(packed) <= most
    assert packed.kernels.words.dtype == torch.int32
    assert "weight" not in packed.state_dict()


def test_packed_kernels_with_groups_of_two_sorts_survive_a_file(tmp_path):
    tied = TiedGrid(
        TiedSpec(4, 2), torch.tensor([0.1, 0.4]), torch.zeros(2), torch.tensor([0, 1, 1, 0]), learnable=True
    )
    layer = QuantAdderConv2d(4, 4, 3, groups=2, tied=tied, path="first")
    packed = pack(nn.Sequential(layer))
    save_packed(packed, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors", nn.Sequential(AdderConv2d(4, 4, 3, groups=2)))
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(loaded(x), nn.Sequential(layer)(x).detach())
    assert loaded[0].kernels.tied.sizes == (2, 2)
    assert not list(loaded[0].kernels.parameters())


def test_distances_of_rows_survive_a_file(tmp_path):
    class Own(nn.Module):
        def __init__(self, distance):
            super().__init__()
            self.distance = distance

        def forward(self, x):
            return self.distance(x, x)

    tied = TiedGrid(TiedSpec(5), torch.tensor([0.2]), torch.tensor([16.0]), torch.zeros(0, dtype=torch.int64))
    packed = pack(Own(QuantAdderMatmul(tied, path="distance")))
    save_packed(packed, tmp_path / "model.safetensors")
    loaded, x = load_packed(tmp_path / "model.safetensors", Own(AdderMatmul())), torch.randn(2, 5, 3)
    assert torch.equal(loaded(x), packed(x))
    assert loaded.distance.path == "distance"


def test_the_skeleton_of_another_architecture_is_refused(tmp_path):
    model, x = trained()
    path = save_packed(pack(redistribute(model, [x], progress=False).model), tmp_path / "model.safetensors")
    other = network()
    other[3] = AdderConv2d(6, 8, 5, stride=2, padding=1, padding_mode="reflect")
    with pytest.raises(FormatError, match=r"kernels of shape \(8, 6, 5, 5\), the file ones of shape \(8, 6, 3, 3\)"):
        load_packed(path, other)
    other[3] = AdderConv2d(6, 8, 3, stride=1, padding=1, padding_mode="reflect")
    with pytest.raises(FormatError, match=r"3 is a convolution with .*stride=\[1, 1\]"):
        load_packed(path, other)
    other[3] = nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect")
    with pytest.raises(FormatError, match=r"a Conv2d has no packed form of its own"):
        load_packed(path, other)


def test_a_model_that_is_not_packed_is_not_saved(tmp_path):
    model, x = trained()
    quantized = redistribute(model, [x], progress=False).model
    with pytest.raises(StateError, match=r"3 holds a QuantAdderConv2d: call pack\(\) before save_packed\(\)"):
        save_packed(quantized, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_packing_leaves_the_quantized_model_as_it_was():
    model, x = trained()
    quantized = redistribute(model, [x], progress=False).model
    before, state = quantized(x), {name: value.clone() for name, value in quantized.state_dict().items()}
    pack(quantized)
    assert torch.equal(quantized(x), before)
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())


def test_the_state_of_a_packed_layer_can_be_loaded_into_another():
    tied = TiedGrid(TiedSpec(3), torch.tensor([0.3]), torch.zeros(1), torch.zeros(4, dtype=torch.int64))
    one, other = (pack(QuantAdderLinear(6, 4, tied=tied)) for _ in range(2))
    x = torch.rand(5, 6)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_packed_model_keeps_its_precision_when_it_is_cast(dtype):
    tied = TiedGrid(TiedSpec(6), torch.tensor([0.0313]), torch.zeros(1), torch.zeros(3, dtype=torch.int64))
    layer = QuantAdderConv2d(4, 3, 3, tied=tied)
    packed, x = pack(layer), torch.rand(2, 4, 5, 5).to(dtype)
    cast = copy.deepcopy(packed).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert cast.kernels.constant.dtype == cast.kernels.tied.scale.dtype == wide
    with torch.no_grad():
        if dtype != torch.float64:
            assert torch.equal(cast(x), packed(x))
            assert torch.equal(cast(x), layer(x))
        # In float64 the sum of distance and constant rounds later than in float32, where they are below 100.
        torch.testing.assert_close(cast(x), packed(x), rtol=0, atol=100 * 2**-22)


def test_deep_copies_compute_the_same_and_are_independent():
    tied = TiedGrid(TiedSpec(4), torch.tensor([0.1, 0.2]), torch.zeros(2), torch.tensor([0, 1, 0]))
    x = torch.rand(2, 5)
    for layer in (QuantAdderLinear(5, 3, tied=tied), pack(QuantAdderLinear(5, 3, tied=tied))):
        twin = copy.deepcopy(layer)
        before = layer(x)
        assert torch.equal(twin(x), before)
        (twin.tied if isinstance(twin, QuantAdderLinear) else twin.kernels.tied).scale.mul_(2)
        assert torch.equal(layer(x), before)
        assert not torch.equal(twin(x), before)


def test_a_network_of_ordinary_layers_is_packed_as_ever():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).eval()
    x = torch.randn(4, 3, 5, 5)
    packed = pack(nearest(model, [x], weight_bits=4, activation_bits=4, edge_bits=4, progress=False).model)
    # Two layers of 108 and 72 codes of 4 bits, with a scale of 32 bits for each of 6 outputs, in whole words.
    assert bits_per_weight(packed) == pytest.approx((112 * 4 + 72 * 4 + 6 * 32) / 180, abs=32 / 180)
