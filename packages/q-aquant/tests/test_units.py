"""Units: which modules are reconstructed at once, and how they hang together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from q_aquant.units import Units, find_layers, find_units
from q_core import MinMaxObserver, QuantAdd, QuantSpec, Recipe, Rule, calibrate, fold_batchnorm, swap
from q_core.errors import DataError, MatchError, QuantizationError, SpecError, StateError


class Block(nn.Module):
    """Two convolutions beside a shortcut made of functions; none if the shape changes and `bare`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bare: bool = False) -> None:
        super().__init__()
        self.stride, self.extra, self.bare = stride, outputs - inputs, bare
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bare:
            return out
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra)))


class Net(nn.Module):
    """A stem, three blocks in two stages, a classifier; registered in another order than it runs."""

    def __init__(self, block: Callable[..., nn.Module] = Block) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.stage2 = nn.Sequential(block(3, 5, 2), block(5, 5))
        self.stage1 = nn.Sequential(block(3, 3))
        self.stem = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def images(count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 7, 7)


def paths(units: Units) -> list[str]:
    return [unit.path for unit in units]


NET = ["stem", "stage1.0", "stage2.0", "stage2.1", "fc"]


def test_blocks_with_functional_shortcuts_are_found_in_the_order_of_execution() -> None:
    units = find_units(Net(), images())
    assert paths(units) == NET
    assert [unit.kind for unit in units] == ["Conv2d", "Block", "Block", "Block", "Linear"]
    assert units[1].layers == ("stage1.0.conv1", "stage1.0.conv2")
    assert units[1].weights == 2 * 3 * 3 * 9
    assert units[2].input_shape == (3, 7, 7)
    assert units[2].output_shape == (5, 4, 4)
    assert not units.left_out


def test_a_folded_network_and_its_quantized_twin_have_the_units_of_the_float_one() -> None:
    model, x = Net().eval(), images()
    folded = fold_batchnorm(model, x)
    recipe = Recipe(QuantSpec.signed(4), observer=MinMaxObserver)
    twin, _ = swap(folded, [Rule(".*", recipe, recipe)])
    calibrate(twin, [x], progress=False)
    expected = [(unit.path, unit.layers, unit.readers, unit.chained) for unit in find_units(model, x)]
    for other in (folded, twin):
        assert [(unit.path, unit.layers, unit.readers, unit.chained) for unit in find_units(other, x)] == expected


def test_a_block_without_shortcut_is_found_by_its_class() -> None:
    def block(inputs: int, outputs: int, stride: int = 1) -> Block:
        return Block(inputs, outputs, stride, bare=inputs != outputs)

    assert paths(find_units(Net(block), images())) == NET


def test_without_any_join_every_layer_is_a_unit() -> None:
    def block(inputs: int, outputs: int, stride: int = 1) -> Block:
        return Block(inputs, outputs, stride, bare=True)

    units = find_units(Net(block), images())
    assert paths(units) == ["stem", *(f"{b}.conv{i}" for b in NET[1:4] for i in (1, 2)), "fc"]


class Added(nn.Module):
    """A residual whose sum is a module of its own, around one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(3, 3, 1), QuantAdd()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv(x), x)


def test_a_sum_in_a_module_belongs_to_the_block_around_its_paths() -> None:
    units = find_units(nn.Sequential(Added(), nn.ReLU(), Added()), images())
    assert paths(units) == ["0", "2"]
    assert [unit.kind for unit in units] == ["Added", "Added"]


class Gate(nn.Module):
    """Squeeze and excitation, then a smooth activation written by hand, in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.out(0.5 * y * (1 + torch.tanh(y + 0.04 * y**3)))


def test_neither_a_gate_nor_a_sum_of_functions_of_one_tensor_is_a_join() -> None:
    assert paths(find_units(nn.Sequential(Gate()), images())) == ["0.down", "0.up", "0.out"]


class Halves(nn.Module):
    """One half of the channels passes beside a layer, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return torch.cat([left, self.branch(right)], dim=1)


def test_a_concatenation_joins_paths() -> None:
    units = find_units(nn.Sequential(Halves(), Halves()), images(channels=4))
    assert paths(units) == ["0", "1"]
    assert units[0].readers == ()  # the layer reads a half, not the tensor that the unit is given


def test_a_join_inside_a_plain_sequence_makes_no_block_of_other_sequences() -> None:
    class Keep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            return x

    class AddKept(nn.Module):
        def __init__(self, keep: Keep) -> None:
            super().__init__()
            self.keep = (keep,)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.keep[0].kept

    keep = Keep()
    joined = nn.Sequential(keep, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), AddKept(keep))
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    assert paths(find_units(nn.Sequential(joined, plain), images())) == ["0", "1.0", "1.1"]


def test_of_nested_joins_the_smallest_module_is_the_block() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.tail = nn.Sequential(Block(3, 3), Block(3, 3)), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.tail(self.inner(x))

    assert paths(find_units(nn.Sequential(Outer()), images())) == ["0.inner.0", "0.inner.1", "0.tail"]


def test_a_single_layer_brings_the_modules_around_it() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU6())
    model = nn.Sequential(stem, Block(3, 3), nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(147, 2)))
    units = find_units(model, images())
    assert paths(units) == ["0", "1", "2"]
    assert units[0].layers == ("0.0",)
    assert [unit.chained for unit in units] == [False, True, True]
    assert units[2].readers == ()  # it reads the flattened tensor


@pytest.mark.parametrize("find", [find_units, find_layers])
@pytest.mark.parametrize("make", [Net, lambda: nn.Sequential(Added(), Gate()), lambda: nn.Sequential(Gate(), Added())])
def test_every_layer_that_runs_is_in_one_unit(find: Callable[..., Units], make: Callable[[], nn.Module]) -> None:
    model = make()
    layers = [layer for unit in find(model, images()) for layer in unit.layers]
    assert len(layers) == len(set(layers))
    assert set(layers) == {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def test_layerwise_units_are_the_layers_themselves() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    units = find_layers(nn.Sequential(stem, nn.Conv2d(3, 2, 1)), images())
    assert [(unit.path, unit.kind) for unit in units] == [("0.0", "Conv2d"), ("1", "Conv2d")]


# ------------------------------------------------------------------ the caller decides


def test_blocks_can_be_given_by_class_and_of_nested_ones_the_outermost_counts() -> None:
    units = find_units(Net(), images(), blocks=(nn.Sequential,))
    assert paths(units) == ["stem", "stage1", "stage2", "fc"]
    assert len(units[2].layers) == 4
    assert paths(find_units(Net(), images(), blocks=(Block,))) == NET


def test_blocks_can_be_given_by_path() -> None:
    units = find_units(Net(), images(), blocks=("stage2",))
    assert paths(units) == ["stem", "stage1.0.conv1", "stage1.0.conv2", "stage2", "fc"]
    assert paths(find_units(Net(), images(), blocks=("stage2.1", nn.Linear))) == [
        *("stem", "stage1.0.conv1", "stage1.0.conv2", "stage2.0.conv1", "stage2.0.conv2", "stage2.1", "fc")
    ]


def test_the_whole_network_can_be_one_unit() -> None:
    (unit,) = find_units(Net(), images(), blocks=("",))
    assert unit.path == ""
    assert len(unit.layers) == 8
    assert unit.readers == ("stem",)


def test_no_blocks_leave_layers() -> None:
    assert len(find_units(Net(), images(), blocks=())) == 8


def test_skipped_layers_are_in_no_unit_and_reported() -> None:
    units = find_units(Net(), images(), skip=("stem", "stage2.0"))
    assert paths(units) == ["stage1.0", "stage2.1", "fc"]
    assert [each.path for each in units.left_out] == ["stage2.0.conv1", "stage2.0.conv2", "stem"]
    assert {each.reason for each in units.left_out} == {"skipped on request"}


def test_a_layer_skipped_inside_a_block_stays_out_of_its_layers() -> None:
    units = find_units(Net(), images(), skip=("stage1.0.conv2",))
    assert units[1].path == "stage1.0"
    assert units[1].layers == ("stage1.0.conv1",)


# ------------------------------------------------------------------ facts


def test_a_chain_is_broken_by_whatever_lies_between() -> None:
    units = find_units(Net(), images())
    assert [unit.chained for unit in units] == [False, False, True, True, False]


def test_a_chain_is_broken_by_an_activation_in_place() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Identity(), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)
    )
    assert [unit.chained for unit in find_layers(layers, images())] == [False, True, False]


def test_readers_are_the_layers_that_read_the_very_input() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shortcut = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + self.shortcut(input=x)

    units = find_units(nn.Sequential(nn.Conv2d(3, 3, 1), Projected()), images())
    assert units[1].readers == ("1.a", "1.shortcut")

    class Preactivated(Projected):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.relu_())) + self.shortcut(x)

    units = find_units(nn.Sequential(nn.Conv2d(3, 3, 1), Preactivated()), images())
    assert units[1].readers == ()  # what they read is the same object, written over


def test_layers_are_listed_as_they_run_not_as_they_are_registered() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(self.b(x))

    assert find_units(nn.Sequential(Backwards()), images())[0].layers == ("0.b", "0.a")


# ------------------------------------------------------------------ what is left out


class Odd(nn.Module):
    """Layers that cannot be reconstructed, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.idle = nn.Linear(2, 2)
        self.hooked = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
        self.transposed = nn.ConvTranspose2d(3, 3, 1)
        self.norm = nn.GroupNorm(1, 3)
        self.add = QuantAdd()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.norm(self.transposed(self.hooked(self.conv(x)))), x)


def test_what_is_left_out_is_reported_with_the_reason() -> None:
    units = find_units(Odd(), images())
    assert paths(units) == ["conv"]
    reasons = {each.path: each.reason for each in units.left_out}
    assert "does not call it" in reasons["idle"]
    assert "stays float" in reasons["hooked"]
    assert "stay float" in reasons["transposed"]
    assert "calibration" in reasons["add"]
    assert "norm" not in reasons


def test_the_report_has_a_line_for_every_unit_and_every_layer_left_out() -> None:
    units = find_units(nn.Sequential(Odd(), Block(3, 3)), images())
    lines = str(units).splitlines()
    assert len(lines) == len(units) + len(units.left_out)
    assert [line.split()[:6] for line in lines[:2]] == [
        ["0", "Odd", "1", "layers", "9", "weights"],
        ["1", "Block", "2", "layers", "162", "weights"],
    ]
    assert all("left out: " in line for line in lines[2:])


# ------------------------------------------------------------------ errors


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Added(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


def test_a_unit_that_runs_twice_is_refused() -> None:
    with pytest.raises(StateError, match=r"unit 'block', a Added, runs 2 times .*leave it out of blocks"):
        find_units(Twice(), images(), blocks=(Added,))
    with pytest.raises(StateError, match=r"unit 'block.conv', a Conv2d, runs 2 times .*skip=\('block.conv',\)"):
        find_units(Twice(), images())
    assert paths(find_units(Twice(), images(), skip=("block",))) == ["head"]


def test_a_unit_that_runs_one_of_its_layers_twice_is_refused() -> None:
    with pytest.raises(StateError, match=r"runs its layer 'block.conv' 2 times"):
        find_units(Twice(), images(), blocks=("",))


def test_a_unit_of_several_tensors_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.conv, self.form = nn.Conv2d(3, 3, 1), form

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            return (self.conv(x), x) if self.form == "returns" else self.conv(x)

    class Around(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.two = Two(form)

        def forward(self, x: Tensor) -> Tensor:
            if self.two.form == "returns":
                return self.two(x)[0]
            return self.two(x, y=x) if self.two.form == "keyword" else self.two(x, x)

    for form, said in (
        ("takes", r"is called with \(Tensor, Tensor\), allowed is one tensor"),
        ("keyword", r"is called with \(Tensor, y=\)"),
        ("returns", "returns a tuple, allowed is one tensor"),
    ):
        with pytest.raises(StateError, match=said):
            find_units(Around(form), images(), blocks=(Two,))
        assert paths(find_units(Around(form), images())) == ["two.conv"]


def test_a_unit_whose_first_axis_is_not_that_of_the_images_is_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(0, 2)).reshape(len(x), -1)

    with pytest.raises(StateError, match=r"unit 'fc', a Linear, (takes|returns) a tensor of shape .* 2 images"):
        find_units(Rows(), images())
    assert paths(find_units(nn.Sequential(Rows()), images(), blocks=("0",))) == ["0"]


def test_units_that_share_a_weight_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    with pytest.raises(StateError, match="units '0' and '2' share a parameter"):
        find_units(model, images())
    assert len(find_units(nn.Sequential(model), images(), blocks=("0",))) == 1


def test_a_module_under_two_names_cannot_be_two_blocks() -> None:
    model = Net()
    model.again = model.stage2
    with pytest.raises(SpecError, match="'stage2' and 'again' hold the same modules"):
        find_units(model, images(), blocks=("stage2", "again"))


def test_a_unit_with_another_order_every_time_is_refused() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.turn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.turn += 1
            first, second = (self.a, self.b) if self.turn % 2 else (self.b, self.a)
            return x + second(first(x))

    with pytest.raises(StateError, match=r"unit '0' ran as 0.a, 0.b, but in a second pass .* 0.b, 0.a: "):
        find_units(nn.Sequential(Moody()), images())


def test_a_layer_that_its_unit_does_not_run_itself_is_refused() -> None:
    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.block.bare = True
            early = self.block.conv2(x)
            self.block.conv2, conv2 = nn.Identity(), self.block.conv2
            try:
                return self.block(early)
            finally:
                self.block.conv2 = conv2

    with pytest.raises(StateError, match=r"itself ran block.conv1: it must run all of them"):
        find_units(Reaching(), images(), blocks=(Block,))


@pytest.mark.parametrize(
    ("error", "said", "options"),
    [
        (MatchError, r"blocks: no module is at 'stage3' in a Net \(did you mean 'stage\d'", {"blocks": ("stage3",)}),
        (MatchError, r"skip: no module is at 'sten' in a Net \(did you mean 'stem'", {"skip": ("sten",)}),
        (MatchError, "no Bilinear with a layer", {"blocks": (nn.Bilinear,)}),
        (MatchError, "nothing can be reconstructed", {"skip": ("",)}),
        (SpecError, r"blocks='stage1' is one string: give a tuple, such as \('stage1',\)", {"blocks": "stage1"}),
        (SpecError, "skip='stem' is one string", {"skip": "stem"}),
        (SpecError, "'stage2' and 'stage2.0' hold the same modules", {"blocks": ("stage2", "stage2.0")}),
        (SpecError, "'stage2.0' and 'stage2' hold the same modules", {"blocks": ("stage2.0", nn.Sequential)}),
        (SpecError, "block 'stage1.0.bn1' holds no layer", {"blocks": ("stage1.0.bn1",)}),
    ],
)
def test_a_request_that_does_not_fit_is_refused(error: type[QuantizationError], said: str, options: dict) -> None:
    with pytest.raises(error, match=said):
        find_units(Net(), images(), **options)


def test_an_example_without_a_tensor_is_refused() -> None:
    with pytest.raises(DataError, match="example of type str holds no tensor"):
        find_units(Net(), "image")


def test_an_example_can_be_a_tuple_or_a_mapping() -> None:
    x = images()
    assert paths(find_units(Net(), (x,))) == NET
    assert paths(find_units(Net(), {"x": x})) == NET


def test_the_model_stays_as_it_was_even_after_a_fault() -> None:
    model = Net().train()
    model.stage1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    find_units(model, images())
    with pytest.raises(RuntimeError):
        find_units(model, images(channels=2))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)  # bit-equal: nothing may touch the model


# ------------------------------------------------------------------ real networks

LITERATURE = {
    "resnet18": ("BasicBlock", 8, ["conv1"], ["fc"]),
    "resnet50": ("Bottleneck", 16, ["conv1"], ["fc"]),
    "mobilenet_v2": ("InvertedResidual", 17, ["features.0"], ["features.18", "classifier"]),
    "regnet_x_400mf": ("ResBottleneckBlock", 22, ["stem"], ["fc"]),
    "regnet_x_3_2gf": ("ResBottleneckBlock", 25, ["stem"], ["fc"]),
    "mnasnet1_0": ("_InvertedResidual", 16, ["layers.0", "layers.3", "layers.6"], ["layers.14", "classifier"]),
    "efficientnet_b0": ("MBConv", 16, ["features.0"], ["features.8", "classifier"]),
    "shufflenet_v2_x0_5": ("InvertedResidual", 16, ["conv1"], ["conv5", "fc"]),
    "googlenet": ("Inception", 9, ["conv1", "conv2", "conv3"], ["fc"]),
    "convnext_tiny": ("CNBlock", 18, ["features.0"], ["features.2", "features.4", "features.6", "classifier"]),
}


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize("name", LITERATURE)
def test_the_blocks_of_torchvision_models_are_those_of_the_literature(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
    model = models.get_model(name, weights=None).eval()
    kind, count, before, after = LITERATURE[name]
    units = find_units(model, torch.randn(2, 3, 64, 64))
    blocks = [path for path, module in model.named_modules() if type(module).__name__ == kind]
    assert len(blocks) == count
    assert sorted(paths(units)) == sorted([*before, *blocks, *after])
    assert paths(units)[: len(before)] == before
    assert paths(units)[-1] == after[-1]
    if name == "googlenet":
        return  # poolings lie between its blocks
    assert all(unit.chained for unit in units[len(before) + 1 : len(before) + count] if unit.kind == kind)


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet56", 27), ("resnet20v", 9)])
def test_the_blocks_of_the_accuracy_sessions_are_found(name: str, blocks: int) -> None:
    cifar = pytest.importorskip("models.cifar", reason="needs the folder benchmarks on the path")
    model = getattr(cifar, name)().eval()
    expected = [path for path, module in model.named_modules() if isinstance(module, cifar.Block | cifar.VBlock)]
    assert len(expected) == blocks
    assert paths(find_units(model, torch.randn(2, 3, 32, 32))) == ["conv1", *expected, "linear"]
