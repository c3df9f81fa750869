"""The fault matrix: what goes wrong in practice, and what happens here when it does.

One section per fault. The rest of a row lives where its subject does:

* corrupt files, byte by byte, atomic writes, old versions: `test_checkpoint.py`;
* every law of grids, roundings, observers and packing: `laws/`;
* several processes: `test_distributed.py`;
* compilation of every quantizer and layer with the default backend: `test_compile.py`;
* killing and resuming a reconstruction, and halving its batches when memory runs out: nothing in this package
  reconstructs; they belong to the package that does.
"""

import ast
import copy
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import q_core
from q_core import (
    CodebookGrid,
    DataError,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    NearestTowardZero,
    Observer,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    QuantSpec,
    Recipe,
    Rule,
    SpecError,
    StateError,
    calibrate,
    fold_batchnorm,
    load_packed,
    nearest,
    pack,
    restore,
    save_packed,
    swap,
)

from .networks import (
    OBSERVERS,
    Branching,
    CalledTwice,
    Inception,
    Residual,
    Tied,
    assert_bit_equal,
    everything,
    exact_convolutions,
    exact_images,
    images,
    recipes,
    trained,
    untouched,
)


def spoiled(batch: Tensor, *values: float) -> Tensor:
    """Copy a batch and put the values at its start."""
    bad = batch.clone()
    bad.view(-1)[: len(values)] = torch.tensor(values, dtype=batch.dtype)
    return bad


# NaN or infinity in one batch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_a_non_finite_value_is_named_by_layer_batch_and_count(value: float, observer: Callable[..., Observer]) -> None:
    model = trained(Residual())
    twin, _ = swap(model, everything(observer=observer))
    batches = images(4)
    batches[2] = spoiled(batches[2], value, value, value)
    with (
        untouched(model),
        untouched(twin, writes=True),
        pytest.raises(DataError, match=r"batch 2 has 3 non-finite of 486 values at stem\.input: clean the data"),
    ):
        calibrate(twin, batches)


def test_a_non_finite_value_is_named_by_the_first_layer_that_sees_it() -> None:
    """In the order of execution, which here is not the order of registration."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).sqrt())

    twin, _ = swap(Reversed(), everything())
    twin.first.bias.data.fill_(-100)  # the square root of a negative number
    with pytest.raises(DataError, match=r"batch 0 has 8 non-finite of 8 values at second\.input"):
        calibrate(twin, [torch.rand(2, 4)])


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_skipping_a_batch_is_leaving_it_out(observer: Callable[..., Observer]) -> None:
    model, batches = trained(Residual()), images(4)
    bad = spoiled(batches[1], float("nan"), float("inf"))
    skipping, _ = swap(model, everything(4, 4, observer))
    without, _ = swap(model, everything(4, 4, observer))
    report = calibrate(skipping, [bad, *batches[:2], bad, *batches[2:]], on_nonfinite="skip")
    assert calibrate(without, batches).batches == report.batches == 4
    assert report.skipped == (0, 3)
    assert_bit_equal(skipping.state_dict(), without.state_dict())


def test_nothing_is_left_when_every_batch_is_skipped() -> None:
    twin, _ = swap(trained(Residual()), everything())
    bad = spoiled(images(1)[0], float("nan"))
    with untouched(twin, writes=True), pytest.raises(DataError, match="all 2 batches held non-finite values"):
        calibrate(twin, [bad, bad], on_nonfinite="skip")


def test_a_non_finite_weight_is_named() -> None:
    model = trained(Residual())
    model.fc.weight.data[1, 2] = float("nan")
    model.fc.weight.data[0, 0] = float("-inf")
    twin, _ = swap(model, everything())
    with untouched(twin, writes=True), pytest.raises(DataError, match=r"fc\.weight holds 2 non-finite of 30 values"):
        calibrate(twin, images(), on_nonfinite="skip")


def test_the_method_names_a_bad_first_batch_too() -> None:
    """The first batch is also the example with which batch norms are folded; its NaN must not hide as a bad fold."""
    model = trained(Residual())
    with untouched(model), pytest.raises(DataError, match=r"batch 0 has 1 non-finite of 486 values at stem\.input"):
        nearest(model, [spoiled(images(1)[0], float("nan"))])
    model.bn1.running_var[0] = float("nan")
    with untouched(model), pytest.raises(DataError, match=r"stem\.weight holds 27 non-finite of 162 values"):
        nearest(model, images())


# An empty loader


@pytest.mark.parametrize("batches", [[], iter(()), (batch for batch in ())], ids=["list", "iterator", "generator"])
def test_an_empty_loader_is_refused_before_the_model_is_touched(batches: object) -> None:
    model = Residual().train()
    model.bn2.eval()
    twin, _ = swap(model, everything())
    with untouched(model), untouched(twin):  # not even written with the same values
        with pytest.raises(DataError, match="the calibration data holds no batch: give at least one"):
            calibrate(twin, batches)
        with pytest.raises(DataError, match="the calibration data holds no batch: give at least one"):
            nearest(model, batches)


def test_a_loader_of_empty_batches_is_refused() -> None:
    twin, _ = swap(trained(Residual()), everything())
    with untouched(twin, writes=True), pytest.raises(StateError, match="5 layers saw no data"):
        calibrate(twin, [torch.randn(0, 3, 9, 9)])


# Channels and activations that are dead or nearly so


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_channel_of_zeros_has_scale_one_and_codes_zero_and_is_listed(
    observer: Callable[..., Observer], bits: int
) -> None:
    model = trained(Residual())
    model.depthwise.weight.data[[1, 4]] = 0
    twin, _ = swap(model, everything(bits, bits, observer))
    report = calibrate(twin, images())
    assert report.dead["depthwise.weight_quantizer"] == (1, 4)
    quantizer = twin.depthwise.weight_quantizer
    assert_bit_equal(quantizer.grid.scale[[1, 4]].flatten(), torch.ones(2))
    assert not quantizer.codes(twin.depthwise.weight)[[1, 4]].any()
    assert twin(images(1)[0]).isfinite().all()


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_a_dead_activation_saturates_nothing_and_is_listed(observer: Callable[..., Observer]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].bias.data.fill_(-1000)
    twin, _ = swap(model, everything(observer=observer))
    report = calibrate(twin, images())
    assert report.dead == {"2.input_quantizer": (0,)}
    assert_bit_equal(twin[2].input_quantizer.grid.scale, torch.ones(1, 1, 1, 1))
    x = images(1)[0]
    assert not twin[2].input_quantizer.codes(twin[1](twin[0](x))).any()
    assert_bit_equal(twin(x), model(x))  # the bias alone, which is not quantized
    _check_bias_fits(twin[2])


def _check_bias_fits(layer: nn.Module) -> None:
    unit = layer.input_quantizer.grid.scale.double().flatten() * layer.weight_quantizer.grid.scale.double().flatten()
    # Half of 32 signed bits is left for the products; one rounding of a scale to float32 may exceed it by 2**-23.
    assert (layer.bias.abs() / unit).max() <= 2**30 * (1 + 2**-23)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(2), PerBlock((2, 2))])
def test_scales_are_widened_until_an_integer_bias_fits(granularity: object) -> None:
    """An activation of 1e-20 with a bias of 1 would need an integer bias of 1e22."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 6))
    model[0].weight.data *= 1e-20
    model[1].bias.data.copy_(torch.tensor([1.0, -2, 0, 0.5, 3, -1e-12]))
    twin, _ = swap(model, [Rule(".*", Recipe(QuantSpec.signed(8, granularity=granularity)), recipes()[1])])
    report = calibrate(twin, [torch.randn(5, 4)])
    assert report.widened == ("1.weight_quantizer",)
    unit = twin[1].input_quantizer.grid.scale.double() * twin[1].weight_quantizer.grid.levels().diff().amin()
    assert unit > 0
    scale = q_core.functional.broadcast_scale(twin[1].weight_quantizer.grid.scale, (6, 4)).double().expand(6, 4)
    codes = model[1].bias.abs() / (twin[1].input_quantizer.grid.scale.double().reshape(()) * scale.amin(1))
    assert codes.max() <= 2**30 * (1 + 2**-22)  # two roundings to float32
    x = torch.randn(5, 4)
    # What the products add to the bias is below 2**-14 of it, which float32 may show.
    torch.testing.assert_close(twin(x), model(x), rtol=2**-14, atol=1e-16)


def test_sound_scales_are_not_widened() -> None:
    quantized = nearest(trained(Residual()), images())
    assert quantized.calibration.widened == ()


# Memory layout


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerBlock((1, 2, 3, 3))])
def test_grids_and_codes_do_not_depend_on_the_memory_layout(
    observer: Callable[..., Observer], granularity: object
) -> None:
    x = torch.randn(2, 4, 9, 6)
    layouts = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    spec = QuantSpec.unsigned(4, granularity=granularity)
    quantizers = []
    for layout in layouts:
        seen = observer(spec, granularity.scale_shape(tuple(x.shape)))
        seen(layout)
        quantizers.append(seen.quantizer())
    for layout, quantizer in zip(layouts, quantizers, strict=True):
        assert_bit_equal(quantizer.state_dict(), quantizers[0].state_dict())
        assert_bit_equal(quantizer(layout), quantizers[0](x))
        assert_bit_equal(quantizer.codes(layout), quantizers[0].codes(x))


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_calibration_in_channels_last_is_bit_equal_when_the_sums_are_exact(observer: Callable[..., Observer]) -> None:
    """A convolution may add in another order in another layout. Where no sum is rounded, nothing may differ."""
    model, batches = exact_convolutions(), [exact_images(2) for _ in range(3)]
    plain, _ = swap(model, everything(4, 4, observer))
    last, _ = swap(copy.deepcopy(model).to(memory_format=torch.channels_last), everything(4, 4, observer))
    calibrate(plain, batches)
    calibrate(last, [batch.to(memory_format=torch.channels_last) for batch in batches])
    assert_bit_equal(last.state_dict(), plain.state_dict())


def test_every_code_in_a_channels_last_network_is_that_of_the_contiguous_one() -> None:
    """In float64 the sums differ by 1e-16, and every quantizer maps them to the same level."""
    model, batches = trained(Residual(channels=8)).double(), [batch.double() for batch in images(2)]
    plain = nearest(model, batches, weight_bits=4, activation_bits=4).model
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    codes: dict[nn.Module, list[Tensor]] = {plain: [], last: []}
    for network in (plain, last):
        for module in network.modules():
            if isinstance(module, Quantizer):
                module.register_forward_pre_hook(
                    lambda quantizer, inputs, seen=codes[network]: seen.append(quantizer.codes(inputs[0]))
                )
    outputs = [plain(batches[0]), last(batches[0].to(memory_format=torch.channels_last))]
    assert len(codes[plain]) == 10
    assert_bit_equal(codes[last], codes[plain])
    # The last layer adds 8 products whose order is free: 8 ulp of float64 at magnitudes up to 8.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=8 * 8 * 2**-52)


# Batches of one and odd sizes


@pytest.mark.parametrize("observer", sorted(OBSERVERS.keys() - {"average"}))
def test_batches_of_one_calibrate_like_one_batch(observer: str) -> None:
    model, batch = exact_convolutions(), exact_images(5, size=7)
    together, _ = swap(model, everything(4, 4, OBSERVERS[observer]))
    apart, _ = swap(model, everything(4, 4, OBSERVERS[observer]))
    calibrate(together, [batch])
    assert calibrate(apart, batch.split(1)).batches == 5
    assert_bit_equal(apart.state_dict(), together.state_dict())


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 3, 7), (3, 3, 17, 5), (2, 3, 63, 1)])
def test_odd_sizes_run_after_calibration_at_another_size(shape: tuple[int, ...]) -> None:
    quantized = nearest(trained(Residual()), images()).model
    x = torch.randn(shape)
    assert quantized(x).shape == (shape[0], 5)
    assert quantized(x).isfinite().all()
    assert_bit_equal(pack(quantized)(x), quantized(x))


# A model left in train()


def test_a_model_left_in_train_mode_calibrates_like_one_in_eval_mode() -> None:
    model, batches = trained(Residual()), images()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    training = copy.deepcopy(model).train()
    training.bn1.eval()  # modes differ within the model, and each must survive
    with untouched(model), untouched(training):
        expected = nearest(model, batches)
        actual = nearest(training, batches)
    assert_bit_equal(actual.model.state_dict(), expected.model.state_dict())
    assert not any(module.training for module in actual.model.modules())


def test_calibrate_restores_the_mode_of_every_module() -> None:
    twin, _ = swap(trained(Residual()).train(), everything())
    twin.bn2.eval()
    twin.stem.eval()
    modes = {path: module.training for path, module in twin.named_modules() if "quantizer" not in path}
    statistics = {name: buffer.clone() for name, buffer in twin.named_buffers() if "running" in name}
    calibrate(twin, images())
    assert {path: module.training for path, module in twin.named_modules() if "quantizer" not in path} == modes
    assert_bit_equal({name: twin.get_buffer(name) for name in statistics}, statistics)


# Dtypes of the model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_model_of_any_dtype_keeps_it_and_its_grids_stay_precise(dtype: torch.dtype) -> None:
    model = trained(Residual()).to(dtype)
    batches = [batch.to(dtype) for batch in images()]
    quantized = nearest(model, batches, weight_bits=4, activation_bits=4).model
    output = quantized(batches[0])
    assert output.dtype == dtype
    assert output.isfinite().all()
    grids = [module.grid for module in quantized.modules() if isinstance(module, Quantizer)]
    assert len(grids) == 10
    assert {grid.scale.dtype for grid in grids} == {torch.float32}
    assert {parameter.dtype for parameter in quantized.parameters()} == {dtype}
    assert_bit_equal(pack(quantized)(batches[0]), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_quantized_model_leaves_its_grids_alone(dtype: torch.dtype) -> None:
    quantized = nearest(trained(Residual()), images()).model
    for model in (quantized, pack(quantized)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "grid" in name}
        model.to(dtype)
        assert_bit_equal({name: tensor for name, tensor in model.state_dict().items() if "grid" in name}, before)
        assert model(images(1)[0].to(dtype)).dtype == dtype


# A block called twice


def test_a_layer_that_runs_twice_is_refused_by_name() -> None:
    twin, _ = swap(CalledTwice(), everything())
    with (
        untouched(twin, writes=True),
        pytest.raises(StateError, match=r"layer 'block\.0' ran 2 times in one forward pass.*on_reuse='merge'"),
    ):
        calibrate(twin, [torch.randn(3, 4)])


def test_a_layer_that_runs_twice_can_share_one_scale() -> None:
    model, batch = CalledTwice(), torch.randn(50, 4)
    twin, _ = swap(model, everything())
    report = calibrate(twin, [batch], on_reuse="merge")
    assert report.reused == {"block.0": 2}
    with torch.no_grad():
        once = model.first(batch)
        inputs = torch.cat([once, model.block(once)])
    grid = twin.block[0].input_quantizer.grid
    # The whole range of both calls, rounded to float32 once.
    torch.testing.assert_close(grid.scale, ((inputs.max() - inputs.min()) / 255).reshape(1, 1), rtol=2**-22, atol=0)


def test_a_layer_whose_weight_alone_is_quantized_may_run_twice() -> None:
    twin, _ = swap(CalledTwice(), [Rule("block.0", recipes()[0]), Rule("first", *recipes())])
    assert calibrate(twin, [torch.randn(3, 4)]).reused == {}


# Tied weights


def test_tied_weights_are_quantized_once_and_stay_tied(tmp_path: pathlib.Path) -> None:
    model, batches = Tied(), [torch.randn(20, 6)]
    twin, _ = swap(model, everything(4, 8))
    assert twin.encoder.weight is twin.decoder.weight is model.encoder.weight
    assert twin.encoder.weight_quantizer is twin.decoder.weight_quantizer
    calibrate(twin, batches)
    assert twin.encoder.weight_quantizer is twin.decoder.weight_quantizer
    packed = pack(twin)
    assert packed.encoder.packed_weight is packed.decoder.packed_weight
    path = save_packed(packed, tmp_path / "tied.safetensors")
    loaded = load_packed(path, Tied())
    assert loaded.encoder.packed_weight is loaded.decoder.packed_weight
    x = torch.randn(3, 6)
    assert_bit_equal(loaded(x), twin(x))
    assert_bit_equal(packed(x), twin(x))
    untied = Tied()
    untied.decoder.weight = nn.Parameter(untied.decoder.weight.clone())
    two = nearest(untied, batches, weight_bits=8).model
    more = save_packed(pack(two), tmp_path / "untied.safetensors").stat().st_size - path.stat().st_size
    assert more > 6 * 6 * 4 // 8  # at least one more weight is in the file


# A branch on values


def test_a_branch_on_values_is_no_obstacle() -> None:
    model = Branching()
    twin, report = swap(model, everything())
    assert [layer.path for layer in report.swapped] == ["positive", "negative"]
    with untouched(twin, writes=True), pytest.raises(StateError, match=r"1 layers saw no data \(negative\)"):
        calibrate(twin, [torch.rand(5, 4)])
    batches = [torch.rand(5, 4), -torch.rand(5, 4)]
    assert calibrate(twin, batches).batches == 2
    for batch in batches:
        # 8 bits over 4 products: half a step of either operand each, with values below 1 and scales below 1/127.
        torch.testing.assert_close(twin(batch), model(batch), rtol=0, atol=4 * 2 / 127)


# Strict round trips of the state


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
@pytest.mark.parametrize("network", [Residual, Inception])
def test_observers_make_a_strict_round_trip(observer: Callable[..., Observer], network: type[nn.Module]) -> None:
    """In the middle of a calibration too: half the statistics in one process and half in the next."""
    model, batches = trained(network()), images(2)
    first, _ = swap(model, everything(4, 4, observer))
    with torch.no_grad():
        first.eval()(batches[0])
    second, _ = swap(model, everything(4, 4, observer))
    assert second.load_state_dict(first.state_dict(), strict=True) == ([], [])
    assert_bit_equal(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
@pytest.mark.parametrize("network", [Residual, Inception, Tied])
def test_a_calibrated_model_makes_a_strict_round_trip(
    observer: Callable[..., Observer], network: type[nn.Module]
) -> None:
    batches = [torch.randn(8, 6)] if network is Tied else images()
    first, _ = swap(trained(network()), everything(4, 4, observer))
    calibrate(first, batches)
    model = network()
    second, _ = swap(model, everything(4, 4, observer))
    with untouched(model):  # the state goes into the twin, not into the float model whose tensors it shares
        restore(second, first.state_dict())
    assert_bit_equal(second.state_dict(), first.state_dict())
    assert_bit_equal(second.eval()(batches[0]), first.eval()(batches[0]))
    third = copy.deepcopy(second)
    assert third.load_state_dict(first.state_dict(), strict=True) == ([], [])


def test_a_codebook_and_another_rounding_make_a_strict_round_trip() -> None:
    def grid(spec: QuantSpec, low: Tensor, high: Tensor) -> CodebookGrid:
        steps = torch.linspace(0, 1, spec.qmax - spec.qmin + 1) ** 2
        return CodebookGrid(low.unsqueeze(-1) + (high - low).clamp(min=1).unsqueeze(-1) * steps, qmin=spec.qmin)

    weight, activation = (
        Recipe(recipe.spec, grid=grid, rounding=NearestTowardZero, observer=MSEObserver) for recipe in recipes(3, 3)
    )
    twins = [swap(trained(Residual()), [Rule(".*", weight, activation)])[0] for _ in range(2)]
    calibrate(twins[0], images())
    restore(twins[1], twins[0].state_dict())
    x = images(1)[0]
    assert_bit_equal(twins[1].eval()(x), twins[0].eval()(x))
    packed = pack(twins[0])
    other = pack(twins[1])
    assert other.load_state_dict(packed.state_dict(), strict=True) == ([], [])
    assert_bit_equal(other(x), twins[0](x))


def test_restore_keeps_ties_and_copies() -> None:
    first, _ = swap(Tied(), everything())
    calibrate(first, [torch.randn(8, 6)])
    second, _ = swap(Tied(), everything())
    restore(second, first.state_dict())
    assert second.encoder.weight is second.decoder.weight
    assert second.encoder.weight is not first.encoder.weight
    assert second.encoder.weight.data_ptr() != first.encoder.weight.data_ptr()
    assert isinstance(second.encoder.weight, nn.Parameter)
    assert second.encoder.weight.requires_grad


def test_restore_fills_a_model_without_memory() -> None:
    first, _ = swap(trained(Residual()), everything())
    calibrate(first, images())
    second, _ = swap(Residual().to("meta"), everything())
    restore(second, first.state_dict())
    x = images(1)[0]
    assert_bit_equal(second.eval()(x), first.eval()(x))


def test_restore_changes_nothing_when_the_state_does_not_fit() -> None:
    first, _ = swap(trained(Residual()), everything())
    calibrate(first, images())
    state = first.state_dict()
    second, _ = swap(Residual(), everything())
    misfits = {
        "missing": {name: tensor for name, tensor in state.items() if name != "fc.input_quantizer.grid.scale"},
        "unexpected": state | {"fc.border": torch.ones(1)},
        "of another shape": state | {"fc.weight": torch.ones(5, 7)},
    }
    for complaint, misfit in misfits.items():
        with (
            untouched(second, writes=True),
            pytest.raises(StateError, match=f"1 entries that are {complaint}.*swap with the rules"),
        ):
            restore(second, misfit)
    restore(second, state)
    with pytest.raises(StateError, match="holds no observer"):
        restore(second, state)


# Two runs


def test_two_runs_are_bit_equal(tmp_path: pathlib.Path) -> None:
    files = []
    for run in range(2):
        torch.manual_seed(run)  # another random state each time: nothing may depend on it
        generator = torch.Generator().manual_seed(5)
        model = trained(Residual())
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        batches = [torch.randn(2, 3, 9, 9, generator=generator) for _ in range(3)]
        quantized = nearest(model, batches, weight_bits=3, activation_bits=4).model
        files.append(save_packed(pack(quantized), tmp_path / f"{run}.safetensors").read_bytes())
    assert files[0] == files[1]


def test_the_random_state_of_the_user_is_left_alone() -> None:
    model, batches = trained(Residual()), images()
    before = torch.random.get_rng_state()
    pack(nearest(model, batches).model)
    assert_bit_equal(torch.random.get_rng_state(), before)


# torch.compile


# torch.compile itself warns of what it does with the Function behind the straight-through estimator.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.compile
@pytest.mark.parametrize("stage", ["observers", "quantizers", "packed"])
def test_the_whole_network_compiles_as_one_graph_at_every_stage(stage: str) -> None:
    model, batches = trained(Residual()), images(2)
    twin, _ = swap(fold_batchnorm(model, batches[0]), everything(4, 4, MSEObserver))
    if stage != "observers":
        calibrate(twin, batches)
    network = (pack(twin) if stage == "packed" else twin).eval()
    eager = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        # The same operators in the same order, so nothing may differ.
        assert_bit_equal(compiled(batches[1]), eager(batches[1]))
    assert_bit_equal(network.state_dict(), eager.state_dict())


# Bits


@pytest.mark.parametrize("bits", [-1, 0, 9, 16, 31, 33])
@pytest.mark.parametrize("which", ["weight_bits", "activation_bits", "edge_bits"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_bits_that_are_not_supported_are_refused_whatever_the_network(bits: int, which: str, layers: int) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    with pytest.raises(SpecError, match=rf"bits={bits}: supported are 1 to 8"):
        nearest(model, [torch.randn(3, 4)], **{which: bits})


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_that_are_supported_are_honoured(bits: int) -> None:
    quantized = nearest(trained(Residual()), images(), weight_bits=bits, activation_bits=bits, edge_bits=bits).model
    quantizers = [module for module in quantized.modules() if isinstance(module, Quantizer)]
    assert len(quantizers) == 10
    assert {quantizer.grid.qmax - quantizer.grid.qmin for quantizer in quantizers} == {2**bits - 1}
    for layer in (quantized.stem, quantized.depthwise, quantized.shortcut, quantized.fc):
        assert 1 < len(layer.weight_quantizer.codes(layer.weight).unique()) <= 2**bits


# A failure in the middle


@pytest.mark.parametrize("failure", [OSError("the disk is gone"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(failure: BaseException) -> None:
    """Running out of memory is no exception: nothing is caught, so nothing goes on with half the work done."""
    model = trained(Residual()).train()
    twin, _ = swap(model, everything(observer=MovingAverageObserver))

    def batches() -> object:
        yield from images(2)
        raise failure

    with untouched(model), untouched(twin, writes=True), pytest.raises(type(failure)):
        calibrate(twin, batches())
    calibrate(twin, images())  # and it can be tried again


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = trained(Residual())
    twin, _ = swap(model, everything())

    def forward(network: nn.Module, batch: Tensor) -> Tensor:
        network(batch)
        raise torch.OutOfMemoryError("full")

    with untouched(model), untouched(twin, writes=True), pytest.raises(torch.OutOfMemoryError):
        calibrate(twin, images(), forward=forward)


def test_an_observer_that_refuses_its_statistics_is_named_and_nothing_has_changed() -> None:
    """Unsigned codes without a zero point hold no negative number."""
    recipe = Recipe(QuantSpec.unsigned(8, symmetric=True))
    twin, _ = swap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), [Rule("1", input=recipe), Rule("0", *recipes())])
    with untouched(twin, writes=True), pytest.raises(q_core.RangeError, match="is negative") as caught:
        calibrate(twin, [-torch.rand(4, 3)], forward=lambda network, batch: network[1](batch) + network[0](batch))
    assert caught.value.__notes__ == ["while making the quantizer of 1.input_quantizer"]


def test_the_float_model_is_never_changed() -> None:
    model, batches = trained(Residual()).train(), images()
    x = batches[0]
    with untouched(model):
        folded = fold_batchnorm(model, x)
        twin, _ = swap(folded, everything(4, 4))
        direct, _ = swap(model, everything(4, 4))
        with untouched(folded):
            calibrate(twin, batches)
            calibrate(direct, batches)
            pack(twin)
            with untouched(twin):
                pack(twin)
        nearest(model, batches)


# Devices


def test_observers_and_quantizers_are_made_where_the_layer_is() -> None:
    """A device other than the CPU that every machine has is the meta device, which observers avoid on purpose."""
    twin, _ = swap(Residual().to("meta"), everything())
    buffers = {name: buffer.device.type for name, buffer in twin.named_buffers() if "quantizer" in name}
    assert set(buffers.values()) == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_quantized_there() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, batches = trained(Residual()).to(device), [batch.to(device) for batch in images()]
    quantized = nearest(model, batches).model
    assert {tensor.device for tensor in quantized.state_dict().values()} == {device}
    assert {tensor.device for tensor in pack(quantized).state_dict().values()} == {device}


def test_batches_on_another_device_are_refused_with_both_devices_and_the_layer() -> None:
    twin, _ = swap(nn.Sequential(nn.Linear(4, 4)), [Rule("0", input=recipes()[1])])
    with (
        untouched(twin, writes=True),
        pytest.raises(StateError, match="observer is on cpu and the tensor it sees on meta: move") as caught,
    ):
        calibrate(twin, [torch.randn(2, 4, device="meta")])
    assert caught.value.__notes__ == ["while calibrating 0 with batch 0"]


# The state of batch norms


def test_folding_is_checked_to_a_hundred_thousandth_in_eval_mode() -> None:
    model, x = trained(Residual()), images(1)[0]
    folded = fold_batchnorm(model.train(), x)
    # 1e-5 of the largest output is what the fold promises in float32.
    with torch.no_grad():
        expected, actual = model.eval().double()(x.double()), folded.eval().double()(x.double())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_ranges_are_those_of_the_folded_network() -> None:
    """Folding comes before calibration: a range seen before the batch norm would clip or waste what comes after it."""
    model, batches = trained(Residual()), images()
    quantized = nearest(model, batches, observer=MinMaxObserver).model
    with torch.no_grad():
        inner = torch.cat([model.bn1(model.stem(batch)).relu() for batch in batches])
    expected = inner.max() / 255
    # Folding rounds every weight to float32: a sum of 27 products differs by 27 roundings at most.
    torch.testing.assert_close(
        quantized.depthwise.input_quantizer.grid.scale.flatten(), expected.reshape(1), rtol=27 * 2**-23, atol=0
    )


# A malicious checkpoint


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.save", "pd.read_pickle", "pandas.read_pickle", "eval", "exec", "__import__"}


def test_no_package_has_a_path_to_pickle() -> None:
    """A pickle runs code when it is read. Nothing here imports a reader of one.

    A weights file of the user may be torch's own format: that is read with torch's restricted reader or not at all.
    """
    sources = [path for folder in _sources() for path in sorted(folder.rglob("*.py"))]
    assert len(sources) > 15
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not _runs_code(node), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "import numpy, joblib.pool",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.save(model, path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_a_path_to_pickle_would_be_found(line: str) -> None:
    assert any(map(_runs_code, ast.walk(ast.parse(line))))


def _runs_code(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return bool({alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in FORBIDDEN_MODULES
    if not isinstance(node, ast.Call):
        return False
    name, options = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    unsafe = name == "torch.load" and options.get("weights_only") != "True"
    return unsafe or name in FORBIDDEN_CALLS or options.get("allow_pickle", "False") != "False"


def _sources() -> list[pathlib.Path]:
    """The source trees of all packages where the tests run in the repository, else of the installed package."""
    packages = pathlib.Path(__file__).parents[2]
    trees = sorted(packages.glob("q-*/src")) if packages.name == "packages" else []
    return trees or [pathlib.Path(q_core.__file__).parent]
