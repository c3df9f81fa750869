"""Packed models on disk: what was saved comes back bit for bit, and what was damaged does not come back at all."""

import copy
import json
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from q_core import (
    CodebookGrid,
    FormatError,
    NearestTowardZero,
    PackedLinear,
    PerChannel,
    PerGroup,
    QuantAdd,
    QuantConcat,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    QuantSpec,
    QuantUnit,
    Recipe,
    Rounding,
    Rule,
    StateError,
    Stochastic,
    UniformGrid,
    calibrate,
    fold_batchnorm,
    load_packed,
    nearest,
    pack,
    save_packed,
    swap,
)
from q_core.checkpoint import _digest, describe, rebuild, write_atomically
from q_core.packed import PackedTensor, packed_form
from q_core.swap import wrap_units

from .networks import (
    Inception,
    Residual,
    SharedModule,
    Tied,
    assert_bit_equal,
    everything,
    images,
    recipes,
    trained,
    untouched,
)

DATA = pathlib.Path(__file__).with_name("data")


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.safetensors"


def small(path: pathlib.Path, **options: int) -> tuple[nn.Module, Tensor]:
    """Save the smallest network there is; return it packed, with an input."""
    x = torch.randn(4, 3)
    packed = pack(nearest(nn.Sequential(nn.Linear(3, 2)), [x], **options).model)
    save_packed(packed, path)
    return packed, x


# Round trips


def assert_round_trip(model: nn.Module, skeleton: nn.Module, path: pathlib.Path, *inputs: Tensor) -> nn.Module:
    packed = pack(model).eval()
    assert save_packed(packed, path) == path
    with untouched(skeleton):
        loaded = load_packed(path, skeleton)
    assert not any(module.training for module in loaded.modules())
    assert_bit_equal(loaded.state_dict(), packed.state_dict())
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in packed.state_dict().items()
    }
    with torch.no_grad():
        assert_bit_equal(loaded(*inputs), packed(*inputs))
        assert_bit_equal(loaded(*inputs), model.eval()(*inputs))
    return loaded


@pytest.mark.parametrize("bits", [(8, 8), (1, 1), (3, 5), (4, 32), (32, 4)])
@pytest.mark.parametrize("network", [Residual, Inception])
def test_a_model_comes_back_bit_for_bit(network: type[nn.Module], bits: tuple[int, int], path: pathlib.Path) -> None:
    batches = images()
    model = nearest(trained(network()), batches, weight_bits=bits[0], activation_bits=bits[1]).model
    assert_round_trip(model, network(), path, batches[0])


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model, batches: model.train(),
        lambda model, batches: model.to("meta"),
        lambda model, batches: model.to(torch.bfloat16),
        lambda model, batches: fold_batchnorm(model, batches[0]),
        lambda model, batches: swap(model, everything())[0],
        lambda model, batches: nearest(model, batches, weight_bits=2).model,
        lambda model, batches: pack(nearest(model, batches, weight_bits=2).model),
    ],
    ids=["train", "meta", "bfloat16", "folded", "with observers", "quantized", "packed"],
)
def test_any_model_of_the_architecture_is_a_skeleton(
    prepare: Callable[[nn.Module, list[Tensor]], nn.Module], path: pathlib.Path
) -> None:
    batches = images()
    model = nearest(trained(Residual()), batches, weight_bits=4, activation_bits=4).model
    assert_round_trip(model, prepare(Residual(), batches), path, batches[0])


def test_a_skeleton_with_more_quantizers_than_the_file_loses_them(path: pathlib.Path) -> None:
    batches = images()
    model, _ = swap(trained(Residual()), [Rule("fc", *recipes())])
    calibrate(model, batches)
    skeleton, _ = swap(trained(Residual()), [Rule("add|fc", *recipes())])
    loaded = assert_round_trip(model, skeleton, path, batches[0])
    assert isinstance(loaded.add.left_quantizer, nn.Identity)


def test_the_root_can_be_a_layer(path: pathlib.Path) -> None:
    for layer, x in ((nn.Linear(5, 3), torch.randn(4, 5)), (nn.Conv2d(3, 4, 3), images(1)[0])):
        model, _ = swap(layer, [Rule("", *recipes(4))])
        calibrate(model, [x])
        assert_round_trip(model, copy.deepcopy(layer), path, x)
        only, _ = swap(layer, [Rule("", input=recipes()[1])])
        calibrate(only, [x])
        assert_round_trip(only, copy.deepcopy(layer), path, x)


def test_a_layer_without_bias_gets_the_one_of_its_batch_norm(path: pathlib.Path) -> None:
    batches = images()
    for rules in (everything(4), [Rule("fc", *recipes())]):  # packed, and float with a folded batch norm
        model, _ = swap(fold_batchnorm(trained(Residual()), batches[0]), rules)
        calibrate(model, batches)
        loaded = assert_round_trip(model, Residual(), path, batches[0])
        assert isinstance(loaded.bn1, nn.Identity)
        assert loaded.stem.bias is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back(dtype: torch.dtype, path: pathlib.Path) -> None:
    batches = [batch.to(dtype) for batch in images()]
    model = nearest(trained(Residual()).to(dtype), batches, weight_bits=4, activation_bits=4).model
    assert_round_trip(model, Residual(), path, batches[0])


def test_the_layout_of_the_weights_comes_back(path: pathlib.Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 12, 12)
    skeleton = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 1))
    assert_round_trip(nearest(model, [x]).model, skeleton, path, x)


def test_tied_and_shared_tensors_are_saved_once_and_come_back_tied(path: pathlib.Path) -> None:
    for network, x in ((Tied, torch.randn(5, 6)), (SharedModule, torch.randn(5, 4))):
        model, _ = swap(network(), everything(4))
        calibrate(model, [x], on_reuse="merge")
        loaded = assert_round_trip(model, network(), path, x)
        words = [name for name in load_file(path) if name.endswith("words")]
        if network is Tied:
            assert loaded.encoder.packed_weight is loaded.decoder.packed_weight
            assert words == ["encoder.packed_weight.words"]
        else:
            assert loaded.here is loaded.there
            assert words == ["here.packed_weight.words", "out.packed_weight.words"]


def test_a_tie_between_float_tensors_comes_back(path: pathlib.Path) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.inner = nn.Linear(4, 4)
            self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
            self.norms[1].weight = self.norms[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[1](self.inner(self.norms[0](self.embed(x)))) @ self.embed.weight.t()

    model, x = Embedding(), torch.randint(6, (2, 3))
    loaded = assert_round_trip(nearest(model, [x]).model, Embedding(), path, x)
    assert loaded.norms[0].weight is loaded.norms[1].weight
    assert "norms.1.weight" not in load_file(path)


def test_grids_and_roundings_of_every_kind_come_back(path: pathlib.Path) -> None:
    model = nn.Sequential(QuantLinear(6, 4), QuantLinear(4, 3), QuantAdd())
    model[0].weight_quantizer = Quantizer(CodebookGrid(torch.randn(4, 1, 6).sort(-1).values, qmin=-2))
    model[0].input_quantizer = Quantizer(CodebookGrid(torch.tensor([[-1.0, 0.5, 2]])), NearestTowardZero())
    scale = torch.rand(3, 2) + 0.1
    model[1].weight_quantizer = Quantizer(UniformGrid(scale, torch.ones(3, 2), qmin=-2, qmax=1), NearestTowardZero())
    model[2].left_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=0, qmax=3, learnable=True), Stochastic())
    skeleton = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), QuantAdd())
    packed = pack(model)
    save_packed(packed, path)
    loaded = load_packed(path, skeleton)
    assert_bit_equal(loaded.state_dict(), packed.state_dict())
    assert isinstance(loaded[0].input_quantizer.rounding, NearestTowardZero)
    assert isinstance(loaded[2].left_quantizer.rounding, Stochastic)
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert_bit_equal(loaded[1](loaded[0](x)), model[1](model[0](x)))


def test_parameters_are_as_trainable_as_the_skeletons(path: pathlib.Path) -> None:
    model, _ = swap(trained(Residual()), [Rule("fc", *recipes())])
    calibrate(model, images())
    save_packed(pack(model), path)
    skeleton = Residual()
    skeleton.stem.weight.requires_grad_(False)
    loaded = load_packed(path, skeleton)
    assert not loaded.stem.weight.requires_grad
    assert loaded.depthwise.weight.requires_grad
    assert not loaded.fc.bias.requires_grad


def test_the_loaded_model_shares_nothing_with_the_skeleton(path: pathlib.Path) -> None:
    save_packed(pack(nearest(trained(Residual()), images()).model), path)
    skeleton = Residual()
    loaded = load_packed(path, skeleton)
    mine = {tensor.data_ptr() for tensor in skeleton.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in loaded.state_dict().values()}


# What the file is


def test_the_same_model_gives_the_same_bytes(tmp_path: pathlib.Path) -> None:
    packed = pack(nearest(trained(Residual()), images()).model)
    assert len({save_packed(packed, tmp_path / str(index)).read_bytes() for index in range(8)}) == 1


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: pathlib.Path) -> None:
    first = save_packed(pack(nearest(trained(Residual()), images()).model), tmp_path / "first")
    second = save_packed(load_packed(first, Residual()), tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def test_any_reader_of_safetensors_can_read_the_tensors(path: pathlib.Path) -> None:
    packed, _ = small(path, weight_bits=8)
    tensors = load_file(path)
    assert set(tensors) == {
        "0.bias",
        "0.packed_weight.words",
        "0.packed_weight.grid.scale",
        "0.input_quantizer.grid.scale",
        "0.input_quantizer.grid.zero_point",
    }
    assert tensors["0.packed_weight.words"].dtype == torch.int32
    assert_bit_equal(tensors["0.bias"], packed[0].bias.detach())
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["q-pack"])
    assert header["version"] == 1
    assert header["description"]["packed"]["0.packed_weight"] == {
        "shape": [2, 3],
        "channels_last": False,
        "grid": {"kind": "uniform", "zero_point": False, "qmin": -128, "qmax": 127, "tiles": [2, 1]},
    }


def test_the_folder_is_made_and_the_path_returned(tmp_path: pathlib.Path) -> None:
    packed = pack(nearest(nn.Linear(3, 2), [torch.randn(4, 3)]).model)
    target = tmp_path / "a" / "b" / "model.safetensors"
    assert save_packed(packed, str(target)) == target
    assert sorted(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o644


# Roundings of other packages


def assert_rounding_survives(rounding: Rounding, path: pathlib.Path) -> Rounding:
    model, x = nn.Sequential(QuantLinear(3, 2)), torch.randn(5, 3)
    model[0].input_quantizer = Quantizer(UniformGrid(torch.full((1,), 0.2), qmin=-8, qmax=7), rounding)
    packed = pack(model)
    save_packed(packed, path)
    loaded = load_packed(path, nn.Sequential(nn.Linear(3, 2)))
    with torch.no_grad():
        assert_bit_equal(loaded(x), model(x))
    assert not any(parameter.requires_grad for parameter in loaded[0].input_quantizer.parameters())
    assert save_packed(loaded, path.with_name("again")).read_bytes() == path.read_bytes()
    return loaded[0].input_quantizer.rounding


def test_a_rounding_of_another_package_comes_back(path: pathlib.Path) -> None:
    assert type(assert_rounding_survives(Upward(), path)) is Upward
    told = assert_rounding_survives(Told(0.125), path)
    assert type(told) is Told
    assert told.shift == 0.125


def test_a_rounding_that_holds_tensors_and_another_rounding_comes_back_frozen(path: pathlib.Path) -> None:
    rounding = Learned(torch.tensor([1.5, 0.0, -0.5]), Told(0.75))
    rounding.calls += 3
    loaded = assert_rounding_survives(rounding, path)
    assert type(loaded) is Learned
    assert type(loaded.inner) is Told
    assert_bit_equal(loaded.state_dict(), rounding.state_dict())


def test_packing_freezes_a_copy_of_a_rounding_that_learns() -> None:
    quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=0, qmax=3), Learned(torch.ones(1), Upward()))
    frozen = quantizer.frozen()
    assert quantizer.rounding.shifts.requires_grad
    assert not frozen.rounding.shifts.requires_grad
    assert frozen.rounding.shifts.data_ptr() != quantizer.rounding.shifts.data_ptr()
    still = Told()
    assert Quantizer(quantizer.grid, still).frozen().rounding is still


def test_a_rounding_that_is_not_imported_is_named(path: pathlib.Path) -> None:
    assert_rounding_survives(Upward(), path)

    def forge(header: dict[str, Any], _: Any) -> None:
        header["description"]["quantizers"]["0.input_quantizer"]["rounding"] = "elsewhere.Downward"

    rewrite(path, forge)
    complaint = r"0\.input_quantizer rounds with 'elsewhere\.Downward', which nothing that is imported defines: import"
    with pytest.raises(FormatError, match=complaint):
        load_packed(path, nn.Sequential(nn.Linear(3, 2)))


def test_a_rounding_that_another_of_the_same_name_hides_is_refused(path: pathlib.Path) -> None:
    model = nn.Sequential(QuantAdd())
    model[0].left_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=0, qmax=3), Upward())
    hiding = namesake()
    with pytest.raises(StateError, match=r"0\.left_quantizer rounds with a Upward.*made a Upward"):
        save_packed(pack(model), path)
    model[0].left_quantizer = Quantizer(model[0].left_quantizer.grid, hiding)
    save_packed(pack(model), path)


def test_facts_that_do_not_fit_the_rounding_are_refused(path: pathlib.Path) -> None:
    for facts in ({"shift": 0, "more": 1}, [1], 3, {"size": [10**9, 10**9]}):
        assert_rounding_survives(Told(0.5), path)
        rewrite(
            path,
            lambda header, _, facts=facts: header["description"]["quantizers"]["0.input_quantizer"].update(facts=facts),
        )
        with pytest.raises(FormatError, match="does not fit a Sequential"):
            load_packed(path, nn.Sequential(nn.Linear(3, 2)))


# Units


def in_units(*, paths: tuple[str, ...] = ("add", "shortcut", "fc")) -> tuple[nn.Module, list[Tensor]]:
    """Quantize a network with units, each with something in its slots."""
    batches = images()
    model = wrap_units(fold_batchnorm(trained(Residual()), batches[0]), paths)
    activation = recipes()[1]
    rules = [Rule("|".join(paths), input=activation, output=Recipe(QuantSpec.signed(6))), *everything(4, 5)]
    twin, _ = swap(model, rules)
    calibrate(twin, batches)
    return twin, batches


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(x))


def test_units_come_back_bit_for_bit(path: pathlib.Path) -> None:
    model, batches = in_units(paths=("shortcut", "depthwise", "fc"))
    loaded = assert_round_trip(model, Residual(), path, batches[0])
    assert isinstance(loaded.fc, QuantUnit)
    assert isinstance(loaded.fc.body, PackedLinear)
    assert isinstance(loaded.fc.output_quantizer, Quantizer)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["q-pack"])["description"]
    assert description["wrapped"] == ["depthwise", "shortcut", "fc"]
    assert "shortcut.body.packed_weight" in description["packed"]


def test_any_model_of_the_architecture_is_a_skeleton_of_units(path: pathlib.Path) -> None:
    model, batches = in_units(paths=("shortcut", "fc"))
    for skeleton in (
        wrap_units(Residual(), ["fc", "stem"]),
        wrap_units(Residual(), ["", "body.fc"]),
        model,
        pack(model),
    ):
        assert_round_trip(model, skeleton, path, batches[0])
    plain = nearest(trained(Residual()), batches).model
    assert_round_trip(plain, model, path, batches[0])


def test_nested_and_shared_units_come_back(path: pathlib.Path) -> None:
    model = wrap_units(TwoArguments(), ["", "body.inner", "body.inner.body.1"])
    twin, _ = swap(model, [Rule(".*", *recipes(4), output=recipes()[1])])
    x = torch.randn(6, 3)
    calibrate(twin, [x], on_reuse="merge")
    loaded = assert_round_trip(twin, TwoArguments(), path, x)
    assert loaded.body.again is loaded.body.inner
    assert isinstance(loaded.body.inner.body[1], QuantUnit)
    assert isinstance(QuantUnit(loaded).body, QuantUnit)
    nested = QuantUnit(QuantUnit(QuantLinear(3, 2)))
    nested.body.output_quantizer = Quantizer(UniformGrid(torch.ones(1), qmin=-1, qmax=1))
    assert_round_trip(nested.eval(), nn.Linear(3, 2), path, x)


def test_a_body_that_is_not_only_in_its_unit_is_refused(path: pathlib.Path) -> None:
    packed, _ = small(path)
    model = nn.Sequential(QuantUnit(packed[0]), packed[0])
    with pytest.raises(StateError, match="the body of the unit '0' is also in 'the model', outside of that unit"):
        save_packed(model, path)


def test_a_file_without_units_does_not_speak_of_them(path: pathlib.Path) -> None:
    small(path)
    with safe_open(path, framework="pt") as file:
        assert "wrapped" not in json.loads(file.metadata()["q-pack"])["description"]


def test_a_unit_at_no_place_of_the_skeleton_is_refused(path: pathlib.Path) -> None:
    small(path)
    rewrite(path, lambda header, _: header["description"].update(wrapped=["0", "7"]))
    with pytest.raises(FormatError, match="module '7' is not in the model"):
        load_packed(path, nn.Sequential(nn.Linear(3, 2)))


# What is not saved


def test_a_model_that_is_not_packed_is_refused(path: pathlib.Path) -> None:
    twin, _ = swap(trained(Residual()), everything())
    with pytest.raises(StateError, match=r"stem\.weight_quantizer holds a MinMaxObserver|stem.*call pack\(\)"):
        save_packed(twin, path)
    calibrate(twin, images())
    with pytest.raises(StateError, match=r"stem holds a QuantConv2d: call pack\(\) before save_packed\(\)"):
        save_packed(twin, path)
    with pytest.raises(StateError, match="nothing in the model is packed"):
        save_packed(Residual(), path)
    assert not path.exists()


class Upward(Rounding):
    """A rounding of another package without a constructor."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.ceil(u)


class Shifted(Rounding):
    """A rounding with an argument, of which it tells nothing."""

    def __init__(self, shift: Any = 0.25) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, u: Tensor) -> Tensor:
        return torch.floor(u + self.shift)


class Told(Shifted):
    """A rounding with a plain argument."""

    def facts(self) -> dict[str, Any]:
        return {"shift": self.shift}


class Learned(Rounding):
    """A rounding that holds another one, a parameter and a buffer."""

    def __init__(self, shifts: Tensor, inner: Rounding) -> None:
        super().__init__()
        self.inner = inner
        self.shifts = nn.Parameter(shifts)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, u: Tensor) -> Tensor:
        return self.inner(u) + torch.floor(self.shifts)

    def facts(self) -> dict[str, Any]:
        return {"size": tuple(self.shifts.shape), "inner": self.inner.facts()}

    @classmethod
    def from_facts(cls, facts: Any) -> "Learned":
        return cls(torch.empty(facts["size"]), Told.from_facts(facts["inner"]))


class Misshapen(Learned):
    """A rounding that tells the wrong shape."""

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"size": [7]}


def namesake() -> Rounding:
    class Upward(Rounding):
        def forward(self, u: Tensor) -> Tensor:
            return u

    Upward.__qualname__ = "Upward"
    return Upward()


UNTOLD = [
    (Shifted(), r"Shifted, which the format cannot hold: a Shifted tells no facts: override facts\(\)"),
    (Told(torch.ones(1)), "Told, which the format cannot hold: Object of type Tensor is not JSON serializable"),
    (Told(float("inf")), "Told, which the format cannot hold: Out of range float values"),
    (Misshapen(torch.ones(2), Told()), r"Misshapen, .*from_facts\(\) made a Misshapen with tensors of shapes .*\(7,\)"),
]


def test_what_the_format_cannot_describe_is_refused_by_name(path: pathlib.Path) -> None:
    packed, _ = small(path)
    before = path.read_bytes()
    for rounding, complaint in UNTOLD:
        packed[0].input_quantizer.rounding = rounding
        with pytest.raises(StateError, match=rf"0\.input_quantizer rounds with a {complaint}.*before save_packed\(\)"):
            save_packed(packed, path)

    class Stateful(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None: ...

    extra = Stateful(packed[0])
    extra[0].input_quantizer = nn.Identity()
    with pytest.raises(StateError, match="state_dict entry '_extra_state' is a dict: the format holds tensors only"):
        save_packed(extra, path)
    assert path.read_bytes() == before


# Damage


def test_a_flipped_bit_anywhere_is_found(path: pathlib.Path) -> None:
    small(path)
    sound = path.read_bytes()
    assert len(sound) < 2000
    skeleton = nn.Sequential(nn.Linear(3, 2))
    for index in range(len(sound)):
        damaged = bytearray(sound)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            load_packed(path, skeleton)
    path.write_bytes(sound)
    load_packed(path, skeleton)


def test_a_truncated_file_is_found(path: pathlib.Path) -> None:
    small(path)
    sound = path.read_bytes()
    for length in [*range(0, len(sound), 13), len(sound) - 1]:
        path.write_bytes(sound[:length])
        with pytest.raises(FormatError, match="is not a sound safetensors file"):
            load_packed(path, nn.Sequential(nn.Linear(3, 2)))


def test_a_changed_value_is_found_and_said(path: pathlib.Path) -> None:
    """The format below has no checksum: without ours this loads."""
    small(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    load_file(path)
    with pytest.raises(FormatError, match="is damaged: its SHA-256 is not the one it was written with; copy it again"):
        load_packed(path, nn.Sequential(nn.Linear(3, 2)))


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 100, struct.pack("<Q", 2**63) + b"{}"])
def test_a_file_of_another_kind_is_refused(content: bytes, path: pathlib.Path) -> None:
    path.write_bytes(content)
    with pytest.raises(FormatError, match="is not a sound safetensors file"):
        load_packed(path, nn.Linear(3, 2))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_weights_that_are_not_packed_are_refused(metadata: dict[str, str] | None, path: pathlib.Path) -> None:
    save_file({"weight": torch.ones(2, 3)}, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"has no 'q-pack' in its metadata: expected a file written by save_packed"):
        load_packed(path, nn.Linear(3, 2))


def rewrite(path: pathlib.Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the header and the tensors of a file and give it a digest that fits, as an attacker would."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["q-pack"])
    tensors = load_file(path)
    change(header, tensors)
    if "sha256" in header:
        header["sha256"] = _digest(tensors, header.get("description"))
    save_file(tensors, path, metadata={"q-pack": json.dumps(header)})


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_another_version_of_the_format_is_refused(version: Any, path: pathlib.Path) -> None:
    small(path)
    rewrite(path, lambda header, _: header.update(version=version))
    with pytest.raises(FormatError, match=rf"has version {version!r} of the format: this release reads 1"):
        load_packed(path, nn.Sequential(nn.Linear(3, 2)))


def test_a_header_that_is_no_mapping_is_refused(path: pathlib.Path) -> None:
    for text in ("", "[]", "3", "{", "null"):
        save_file({"x": torch.ones(1)}, path, metadata={"q-pack": text})
        with pytest.raises(FormatError, match="its 'q-pack' metadata cannot be read"):
            load_packed(path, nn.Linear(3, 2))


def _entry(header: dict[str, Any]) -> dict[str, Any]:
    return header["description"]["packed"]["0.packed_weight"]


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no description": lambda header, _: header.update(description=None),
    "description of another type": lambda header, _: header.update(description=[1, 2]),
    "no list of ties": lambda header, _: header["description"].pop("aliases"),
    "a tie to nothing": lambda header, _: header["description"]["aliases"].update({"0.bias": "nothing"}),
    "an unknown grid": lambda header, _: _entry(header)["grid"].update(qmin="low"),
    "a grid without codes": lambda header, _: _entry(header)["grid"].update(qmin=5, qmax=5),
    "codes of 40 bits": lambda header, _: _entry(header)["grid"].update(qmin=0, qmax=2**40),
    "tiles that do not tile": lambda header, _: _entry(header)["grid"].update(tiles=[3, 1]),
    "tiles that do not tile, with a scale to match": lambda header, tensors: (
        _entry(header)["grid"].update(tiles=[3, 1]),
        tensors.update({"0.packed_weight.grid.scale": torch.ones(3, 1)}),
    ),
    "a table of a terabyte": lambda header, _: _entry(header)["grid"].update(kind="codebook", qmax=2**40),
    "no tiles": lambda header, _: _entry(header)["grid"].update(tiles=[]),
    "negative tiles": lambda header, _: _entry(header)["grid"].update(tiles=[-1, 1]),
    "a weight of another shape": lambda header, _: _entry(header).update(shape=[3, 2]),
    "a weight of a million terabytes": lambda header, _: _entry(header).update(shape=[10**9, 10**9]),
    "a shape of another type": lambda header, _: _entry(header).update(shape="large"),
    "an unknown rounding": lambda header, _: header["description"]["quantizers"]["0.input_quantizer"].update(
        rounding="os.system"
    ),
    "a quantizer in no slot": lambda header, _: header["description"]["quantizers"].update(
        {"5.input_quantizer": header["description"]["quantizers"]["0.input_quantizer"]}
    ),
    "an identity in no place": lambda header, _: header["description"]["identities"].append("9.bn"),
    "a swapped layer of no kind": lambda header, _: header["description"]["swapped"].append("0.input_quantizer"),
    "too few words": lambda _, tensors: tensors.update({"0.packed_weight.words": torch.zeros(1, dtype=torch.int32)}),
    "a missing tensor": lambda _, tensors: tensors.pop("0.bias"),
    "a tensor too many": lambda _, tensors: tensors.update(extra=torch.ones(1)),
    "a scale of another shape": lambda _, tensors: tensors.update({"0.packed_weight.grid.scale": torch.ones(3, 1)}),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_file_with_a_good_digest_is_refused(
    forge: Callable[[dict[str, Any], dict[str, Tensor]], Any], path: pathlib.Path
) -> None:
    small(path, weight_bits=8)
    rewrite(path, forge)
    skeleton = nn.Sequential(nn.Linear(3, 2))
    with untouched(skeleton), pytest.raises(FormatError):
        load_packed(path, skeleton)


def test_a_missing_file_is_a_missing_file(path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_packed(path, nn.Linear(3, 2))


# Another architecture


@pytest.mark.parametrize(
    ("skeleton", "complaint"),
    [
        (nn.Sequential(nn.Linear(3, 4)), r"0 has a weight of shape \(4, 3\), the file one of shape \(2, 3\)"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), r"Missing key.*1\.weight"),
        (nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)), r"Missing key.*1\.weight"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), r"0 has a weight of shape \(2, 3, 1, 1\)"),
        (nn.Sequential(nn.ReLU()), "layer of type ReLU has no packed form"),
        (nn.Sequential(), "is not in the model|no attribute"),
        (nn.Linear(3, 2), "has no attribute `0`|is not in the model"),
    ],
    ids=["width", "depth", "norm", "kind", "no layer", "empty", "nesting"],
)
def test_another_architecture_is_refused_and_the_difference_said(
    skeleton: nn.Module, complaint: str, path: pathlib.Path
) -> None:
    small(path)
    with (
        untouched(skeleton),
        pytest.raises(FormatError, match=rf"(?s)does not fit a \w+: .*{complaint}.*; pass a model"),
    ):
        load_packed(path, skeleton)


def convolutions(**geometry: Any) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"padding": 1} | geometry
    return nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))


@pytest.mark.parametrize(
    ("skeleton", "complaint"),
    [
        (convolutions(stride=2), r"0 is a convolution .*stride=\[2, 2\].* written with .*stride=\[1, 1\]"),
        (convolutions(padding=2, dilation=2), r"0 is a convolution .*dilation=\[2, 2\]"),
        (convolutions(padding_mode="circular"), r"0 is a convolution .*padding_mode=circular"),
        (nn.Sequential(*convolutions()[:2], nn.Tanh(), convolutions()[3]), "2 is Tanh, the file was written with ReLU"),
        (nn.Sequential(convolutions()[0], nn.Tanh(), *convolutions()[2:]), "1 is Tanh, where the file has a folded"),
        (nn.Sequential(*convolutions(), nn.Softmax(1)), "4 is Softmax, the file was written with absent"),
    ],
    ids=["stride", "dilation", "padding mode", "activation", "no norm", "one more"],
)
def test_what_no_tensor_shows_is_compared_too(skeleton: nn.Module, complaint: str, path: pathlib.Path) -> None:
    save_packed(pack(nearest(convolutions(), [torch.randn(2, 2, 6, 6)], progress=False).model), path)
    load_packed(path, convolutions())
    with untouched(skeleton), pytest.raises(FormatError, match=rf"(?s)does not fit a Sequential: .*{complaint}"):
        load_packed(path, skeleton)


# Atomic writing


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")

    def fail(temporary: str) -> None:
        pathlib.Path(temporary).write_bytes(b"half of the new")
        assert target.read_bytes() == b"old"
        raise OSError(28, "no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_new_file_replaces_the_old_one_in_one_step(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")
    reader = target.open("rb")
    write_atomically(target, lambda temporary: pathlib.Path(temporary).write_bytes(b"new"))
    assert reader.read() == b"old"  # who was reading reads on
    reader.close()
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "model.safetensors"
    (target / "inside").mkdir(parents=True)
    packed = pack(nearest(nn.Linear(3, 2), [torch.randn(4, 3)]).model)
    with pytest.raises(OSError, match="directory"):
        save_packed(packed, target)
    assert os.listdir(tmp_path) == ["model.safetensors"]


# The golden file of version 1


class Golden(nn.Module):
    """The network of the golden file. It must never change: the file was written from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, stride=2, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.add = QuantAdd()
        self.cat = QuantConcat()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.table = nn.Linear(8, 6)
        self.grouped_scales = nn.Linear(6, 6)
        self.float_weight = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = self.add(self.grouped(x), self.pointwise(x[..., ::2, ::2])).relu().mean((2, 3))
        x = self.two(self.one(self.cat(x, -x)))
        return self.float_weight(self.grouped_scales(self.table(x).tanh()))


def golden_inputs() -> Tensor:
    return (torch.arange(2 * 2 * 6 * 6, dtype=torch.float64) * 0.7).sin().reshape(2, 2, 6, 6)


def write_golden(folder: pathlib.Path) -> None:
    """Write the golden file of the current version and what must come out of it; call it once for each version."""

    def codebook(spec: QuantSpec, low: Tensor, high: Tensor) -> CodebookGrid:
        steps = torch.linspace(-1, 1, spec.qmax - spec.qmin + 1) ** 3
        return CodebookGrid(torch.maximum(high, -low).unsqueeze(-1) * steps, qmin=spec.qmin)

    model = Golden().eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()) * (0.9 + 0.1 * index)).sin().reshape(parameter.shape) / 2)
        model.bn.weight.copy_(torch.tensor([1.2, 0.8, -1, 0.5]))
        model.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0]))
        model.bn.running_var.copy_(torch.tensor([1, 2, 0.5, 1.5]))
    weight, activation = recipes(3, 8)
    rules = [
        Rule("float_weight", input=Recipe(QuantSpec.unsigned(4), rounding=NearestTowardZero)),
        Rule("table", Recipe(QuantSpec.signed(4, granularity=PerChannel(0)), grid=codebook), activation),
        Rule("grouped_scales", Recipe(QuantSpec.signed(5, granularity=PerGroup(2), symmetric=False)), activation),
        Rule("pointwise", Recipe(QuantSpec.signed(8))),
        Rule(".*", weight, activation),
    ]
    x = golden_inputs().float()
    twin, _ = swap(fold_batchnorm(model, x), rules)
    calibrate(twin, [x])
    packed = pack(twin)
    save_packed(packed, folder / "packed-v1.safetensors")
    weights = {
        f"{name}.weight": layer.packed_weight(torch.float32)
        for name, layer in packed.named_children()
        if hasattr(layer, "packed_weight")
    }
    logits = copy.deepcopy(packed).double()(golden_inputs()).detach()
    save_file({**weights, "logits": logits}, folder / "packed-v1-expected.safetensors")


def test_the_golden_file_of_version_1_is_read() -> None:
    """Every future release must read it. If this fails, the reader is wrong: never write the file anew."""
    expected = load_file(DATA / "packed-v1-expected.safetensors")
    logits = expected.pop("logits")
    loaded = load_packed(DATA / "packed-v1.safetensors", Golden())
    # One product of a code and a scale each, rounded once on any machine.
    weights = {
        name: loaded.get_submodule(name.removesuffix(".weight")).packed_weight(torch.float32) for name in expected
    }
    assert_bit_equal(weights, expected)
    with torch.no_grad():
        # In float64 the order of additions shows in the 13th digit, and no value lies that close to where it would be
        # rounded to another code.
        torch.testing.assert_close(loaded.double()(golden_inputs()), logits, rtol=1e-12, atol=1e-12)


def test_the_golden_file_holds_what_the_format_can_hold() -> None:
    loaded = load_packed(DATA / "packed-v1.safetensors", Golden())
    assert isinstance(loaded.bn, nn.Identity)
    assert loaded.stem.bias is not None
    assert loaded.one.packed_weight is loaded.two.packed_weight
    assert isinstance(loaded.table.packed_weight.grid, CodebookGrid)
    assert loaded.grouped_scales.packed_weight.grid.zero_point is not None
    assert isinstance(loaded.float_weight, QuantLinear)
    assert isinstance(loaded.float_weight.input_quantizer.rounding, NearestTowardZero)
    assert isinstance(loaded.pointwise.input_quantizer, nn.Identity)
    assert not isinstance(loaded.grouped, QuantConv2d)
    assert isinstance(loaded.one, PackedLinear)
    bits = {
        name: layer.packed_weight.grid.bits
        for name, layer in loaded.named_children()
        if hasattr(layer, "packed_weight")
    }
    assert bits == {"stem": 3, "grouped": 3, "pointwise": 8, "one": 3, "two": 3, "table": 4, "grouped_scales": 5}


def test_the_golden_file_is_written_as_it_was(path: pathlib.Path) -> None:
    """As long as the version is 1, a model that is saved again gives the same header and the same tensors."""
    golden = DATA / "packed-v1.safetensors"
    assert golden.stat().st_size < 10_000
    save_packed(load_packed(golden, Golden()), path)
    headers = []
    for file in (path, golden):
        with safe_open(file, framework="pt") as opened:
            headers.append(json.loads(opened.metadata()["q-pack"]))
    assert headers[0] == headers[1]
    assert_bit_equal(load_file(path), load_file(golden))


# Quantized modules of other packages


class Rounded(nn.Module):
    """A float layer of another package, its quantized form and its packed form in one type each."""

    def __init__(self, size: int, step: float = 1.0) -> None:
        super().__init__()
        self.step = step
        self.weight = nn.Parameter(10 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class QuantRounded(Rounded):
    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight / self.step).round() * self.step


class PackedRounded(nn.Module):
    def __init__(self, codes: Tensor, step: float) -> None:
        super().__init__()
        self.step = step
        self.codes: Tensor
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.codes.to(x.dtype) * self.step


@packed_form.register
def _(module: QuantRounded) -> nn.Module:
    return PackedRounded((module.weight.detach() / module.step).round().to(torch.int8), module.step)


@describe.register
def _(module: PackedRounded) -> dict[str, Any]:
    return {"size": len(module.codes), "step": module.step}


@rebuild.register
def _(layer: Rounded, entry: dict[str, Any]) -> nn.Module:
    if len(layer.weight) != entry["size"]:
        raise FormatError(f"the layer has {len(layer.weight)} weights, the file {entry['size']}")
    return PackedRounded(torch.empty(entry["size"], dtype=torch.int8, device="meta"), entry["step"])


def own(kind: type[nn.Module], size: int = 3) -> nn.Sequential:
    """The layer of another package beside one of ours, used twice."""
    layer = kind(size)
    return nn.Sequential(layer, nn.Linear(3, 3), layer).eval()


def test_a_module_of_another_package_survives_a_file(path: pathlib.Path) -> None:
    model, x = own(QuantRounded), torch.randn(4, 3)
    model[0].step = 0.25
    mixed = nearest(model, [x], weight_bits=4, activation_bits=4).model
    with torch.no_grad():
        packed = pack(mixed)
        assert isinstance(packed[0], PackedRounded)
        assert isinstance(packed[1], PackedLinear)
        save_packed(packed, path)
        loaded = load_packed(path, own(Rounded))
        assert_bit_equal(loaded(x), mixed(x))
    assert loaded[2] is loaded[0]
    assert loaded[0].step == 0.25
    save_packed(loaded, path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_a_file_of_nothing_but_modules_of_another_package_is_one(path: pathlib.Path) -> None:
    model, x = QuantRounded(3), torch.randn(4, 3)
    loaded = load_packed(save_packed(pack(model), path), Rounded(3))
    assert isinstance(loaded, PackedRounded)
    assert_bit_equal(loaded(x), model(x).detach())


def test_a_file_without_them_does_not_speak_of_them(path: pathlib.Path) -> None:
    small(path)
    with safe_open(path, framework="pt") as file:
        assert "own" not in json.loads(file.metadata()["q-pack"])["description"]


def test_a_quantized_module_of_another_package_must_be_packed_before_it_is_saved(path: pathlib.Path) -> None:
    with pytest.raises(StateError, match=r"0 holds a QuantRounded: call pack\(\) before save_packed\(\)"):
        save_packed(own(QuantRounded), path)
    assert not path.exists()


def test_a_skeleton_without_the_layer_of_another_package_is_refused(path: pathlib.Path) -> None:
    save_packed(pack(own(QuantRounded)), path)
    with pytest.raises(FormatError, match=r"a Linear has no packed form of its own: import the package of the method"):
        load_packed(path, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(FormatError, match=r"the layer has 4 weights, the file 3"):
        load_packed(path, own(Rounded, size=4))


class Doubled(nn.Module):
    """A packed layer of another package that replaces a layer of torch, with a weight and a quantizer of ours."""

    def __init__(self, weight: nn.Module | None = None, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.table = nn.Identity() if weight is None else weight
        self.some_quantizer = nn.Identity() if quantizer is None else quantizer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.some_quantizer(x) @ self.table(x.dtype).t()


class QuantDoubled(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.weight_quantizer = Quantizer(UniformGrid(torch.full((1,), 0.1), qmin=-4, qmax=3))
        self.some_quantizer = Quantizer(UniformGrid(torch.full((1,), 0.2), qmin=-8, qmax=7), Told(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.some_quantizer(x) @ self.weight_quantizer(self.weight).t()


@packed_form.register
def _(module: QuantDoubled) -> nn.Module:
    if module.weight.numel() > 100:
        raise StateError("too large")
    return Doubled(PackedTensor.from_quantizer(module.weight, module.weight_quantizer), module.some_quantizer)


@describe.register
def _(module: Doubled) -> dict[str, Any]:
    return {"factor": 2}


@rebuild.register(Doubled)
def _(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    return Doubled()


def test_a_packed_module_in_the_place_of_a_layer_of_torch_survives_a_file(path: pathlib.Path) -> None:
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    model = nn.Sequential(QuantDoubled(layer), QuantLinear(2, 3)).eval()
    loaded = assert_round_trip(model, nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3)), path, x)
    assert isinstance(loaded[0], Doubled)
    rewrite(path, lambda header, _: header["description"]["own"]["0"].update(form="elsewhere.Tripled"))
    with pytest.raises(FormatError, match=r"0 was packed as a 'elsewhere\.Tripled', which nothing that is imported"):
        load_packed(path, nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3)))


def test_an_error_while_packing_names_the_module() -> None:
    with pytest.raises(StateError) as caught:
        pack(nn.Sequential(QuantDoubled(nn.Linear(30, 20))))
    assert caught.value.__notes__ == ["while packing 0"]
