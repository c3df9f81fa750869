"""Rules, reports, sharing, and the folding of batch norms."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm
from torch.nn.utils.parametrizations import weight_norm

from q_core import (
    DataError,
    MatchError,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PerChannel,
    QuantConcat,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    QuantUnit,
    Recipe,
    Rule,
    ShapeError,
    SpecError,
    StateError,
    calibrate,
    fold_batchnorm,
    nearest,
    pack,
    swap,
)
from q_core.swap import plain_path, replace_modules, replace_submodule, share, unwrap_units, wrap_units

from .networks import (
    CalledTwice,
    Inception,
    Residual,
    SharedModule,
    Tied,
    TwoInputs,
    assert_bit_equal,
    everything,
    images,
    recipes,
    trained,
    untouched,
)

# Rules


def test_the_first_rule_that_matches_decides() -> None:
    weight8, input8 = recipes(8, 8)
    weight2, input2 = recipes(2, 2)
    twin, report = swap(Residual(), [Rule("stem|fc", weight8, input8), Rule("depthwise"), Rule(".*", weight2, input2)])
    bits = {
        layer.path: (layer.weight and layer.weight.bits, layer.input and layer.input.bits) for layer in report.swapped
    }
    assert bits == {"stem": (8, 8), "shortcut": (2, 2), "add": (None, 2), "fc": (8, 8)}
    assert isinstance(twin.stem.weight_quantizer, MinMaxObserver)
    assert twin.stem.weight_quantizer.spec.bits == 8
    assert twin.shortcut.input_quantizer.spec.bits == 2
    assert type(twin.depthwise) is nn.Conv2d


def test_a_pattern_must_match_the_whole_path() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    _, report = swap(model, [Rule("0", *recipes())])
    assert [layer.path for layer in report.swapped] == ["0"]
    _, report = swap(model, [Rule(r".*\.0", *recipes())])
    assert [layer.path for layer in report.swapped] == ["1.0"]


def test_a_rule_that_matches_nothing_raises_with_a_suggestion() -> None:
    with pytest.raises(MatchError, match=r"rule 'shortcutt' matched no module.*there are 5.*did you mean 'shortcut'\?"):
        swap(Residual(), [Rule(".*", *recipes()), Rule("shortcutt", *recipes())])
    with pytest.raises(MatchError, match=r"rule 'zzz' matched no module.*stem, depthwise, shortcut, add … fc"):
        swap(Residual(), [Rule("zzz", *recipes())])
    with pytest.raises(MatchError, match="there are 0: none"):
        swap(nn.ReLU(), [Rule(".*", *recipes())])


def test_a_rule_shadowed_by_an_earlier_one_is_no_error() -> None:
    """It matches; an earlier one wins. Only a rule that could never act is a mistake."""
    swap(Residual(), [Rule(".*", *recipes()), Rule("fc")])


def test_no_rule_swaps_nothing() -> None:
    model = Residual()
    twin, report = swap(model, [])
    assert report.swapped == ()
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(SpecError, match=r"pattern 'conv\(' is not a regular expression.*re\.escape"):
        Rule("conv(")


def test_a_rule_keeps_either_slot_float() -> None:
    weight, activation = recipes()
    twin, report = swap(Residual(), [Rule("stem", weight=weight), Rule("fc", input=activation)])
    assert isinstance(twin.stem.input_quantizer, nn.Identity)
    assert isinstance(twin.fc.weight_quantizer, nn.Identity)
    assert [(layer.path, layer.weight is None, layer.input is None) for layer in report.swapped] == [
        ("stem", False, True),
        ("fc", True, False),
    ]


def test_the_root_can_be_a_layer() -> None:
    model = nn.Linear(3, 2)
    twin, report = swap(model, [Rule("", *recipes())])
    assert isinstance(twin, QuantLinear)
    assert twin.weight is model.weight
    assert report.swapped[0].path == ""


def test_a_recipe_that_does_not_fit_names_the_layer() -> None:
    per_channel = Recipe(QuantSpec.unsigned(8, granularity=PerChannel(1)))
    with pytest.raises(ShapeError) as caught:
        swap(Residual(), [Rule("add", input=per_channel)])
    assert caught.value.__notes__ == ["while swapping add"]
    with pytest.raises(ShapeError) as caught:
        swap(nn.Linear(2, 2), [Rule("", Recipe(QuantSpec.signed(8, granularity=PerChannel(2))))])
    assert caught.value.__notes__ == ["while swapping the model itself"]


def test_activations_can_have_a_scale_per_channel() -> None:
    per_channel = Recipe(QuantSpec.unsigned(8, granularity=PerChannel(1)))
    twin, _ = swap(trained(Residual()), [Rule("depthwise|fc", input=per_channel)])
    calibrate(twin, images())
    assert twin.depthwise.input_quantizer.grid.scale.shape == (1, 6, 1, 1)
    assert twin.fc.input_quantizer.grid.scale.shape == (1, 6)
    assert twin(images(1, size=5)[0]).isfinite().all()


# The report


def test_the_report_lists_what_was_swapped_and_what_stays_float_and_why() -> None:
    _, report = swap(Residual(), [Rule("stem|add", *recipes(4, 8))])
    assert [(layer.path, layer.kind) for layer in report.swapped] == [("stem", "Conv2d"), ("add", "QuantAdd")]
    assert {layer.path: (layer.kind, layer.reason) for layer in report.stays_float} == {
        "bn1": ("BatchNorm2d", "this type cannot be swapped"),
        "depthwise": ("Conv2d", "no rule asks for it"),
        "bn2": ("BatchNorm2d", "this type cannot be swapped"),
        "shortcut": ("Conv2d", "no rule asks for it"),
        "fc": ("Linear", "no rule asks for it"),
    }
    lines = str(report).splitlines()
    assert lines[0].split() == ["stem", "Conv2d", "W4A8"]
    assert lines[1].split() == ["add", "QuantAdd", "W32A8"]
    assert lines[-1].split(maxsplit=2) == ["fc", "Linear", "float: no rule asks for it"]


def test_a_layer_that_gets_no_observer_is_not_reported_as_swapped() -> None:
    """A sum has no weight: a rule for weights alone does nothing to it."""
    twin, report = swap(Residual(), [Rule(".*", weight=recipes()[0])])
    assert "add" not in {layer.path for layer in report.swapped}
    assert isinstance(twin.add.left_quantizer, nn.Identity)
    assert "add" in {layer.path for layer in report.stays_float}


def test_attention_is_left_alone_and_reported() -> None:
    """Its projections run inside one function that never calls the layer: a slot there would be a lie."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.attention(x, x, x)[0])

    model, x = Block().eval(), torch.randn(2, 5, 8)
    twin, report = swap(model, everything())
    assert [layer.path for layer in report.swapped] == ["mlp"]
    kept = {layer.path: layer.reason for layer in report.stays_float}
    assert kept["attention"] == kept["attention.out_proj"] == "this type cannot be swapped"
    assert type(twin.attention) is nn.MultiheadAttention
    calibrate(twin, [x])
    with torch.no_grad():
        assert_bit_equal(pack(twin)(x), twin(x))
    with pytest.raises(MatchError, match="matched no module that can be swapped"):
        swap(model, [Rule(r"attention.*", *recipes())])


def test_a_fused_encoder_layer_is_left_alone_and_reported() -> None:
    """In evaluation without gradients it reads the weights of its linear layers and never calls them."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)).eval()
    twin, report = swap(model, everything(2, 2))
    assert [layer.path for layer in report.swapped] == ["1"]
    kept = {layer.path: layer.reason for layer in report.stays_float}
    assert kept["0.linear1"] == kept["0.linear2"] == "a fused encoder layer reads its weight without calling it"
    x = torch.randn(2, 5, 8)
    calibrate(twin, [x])
    packed = pack(twin)
    with torch.no_grad():
        assert_bit_equal(packed(x), twin(x))
    nearest(model, [x])


def test_a_decoder_layer_calls_its_layers_and_is_quantized() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    twin, report = swap(model, everything(2, 2))
    assert [layer.path for layer in report.swapped] == ["linear1", "linear2"]
    x = torch.randn(2, 5, 8)
    calibrate(twin, [x], forward=lambda network, batch: network(batch, batch))
    with torch.no_grad():
        assert not torch.equal(twin(x, x), model(x, x))
    assert_bit_equal(pack(twin)(x, x), twin(x, x))


@pytest.mark.parametrize("compute", [spectral_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5)])
def test_a_weight_that_a_hook_computes_stays_float(compute: Callable[[nn.Module], nn.Module]) -> None:
    model = trained(Residual())
    compute(model.stem)
    with torch.enable_grad():
        model(images(1)[0])  # leaves a weight with a history, which deepcopy refuses
    twin, report = swap(model, everything())
    assert {layer.path: layer.reason for layer in report.stays_float}["stem"] == "a hook computes its weight"
    x = images(1)[0]
    calibrate(twin, [x])
    assert twin(x).isfinite().all()
    assert nearest(model, [x]).swap.stays_float[0].path == "stem"
    fold_batchnorm(model, x)


def test_a_parametrized_layer_stays_float() -> None:
    model = trained(Residual())
    weight_norm(model.stem)
    twin, report = swap(model, everything())
    assert "stem" not in {layer.path for layer in report.swapped}
    assert "stem.parametrizations.weight" in {layer.path for layer in report.stays_float}
    calibrate(twin, images())


# Sharing


def test_the_twin_shares_every_tensor() -> None:
    model = trained(Residual())
    twin, _ = swap(model, everything())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert twin.state_dict(keep_vars=True)[name] is tensor
    modules = {id(module) for module in model.modules()}
    assert not modules & {id(module) for module in twin.modules()}


def test_a_twin_with_empty_slots_computes_the_same() -> None:
    for network, x in ((trained(Residual()), images(1)[0]), (Inception(), images(1)[0])):
        twin, _ = swap(network, [Rule(".*", *recipes())])
        assert_bit_equal(twin(x), network(x))  # observers let everything pass


def test_a_module_under_two_names_stays_one() -> None:
    model = SharedModule()
    twin, report = swap(model, everything())
    assert twin.here is twin.there
    assert isinstance(twin.here, QuantLinear)
    assert [layer.path for layer in report.swapped] == ["here", "out"]
    calibrate(twin, [torch.randn(9, 4)], on_reuse="merge")
    packed = pack(twin)
    assert packed.here is packed.there
    x = torch.randn(3, 4)
    assert_bit_equal(packed(x), twin(x))


def test_layers_that_share_a_parameter_share_its_observer() -> None:
    twin, _ = swap(Tied(), everything())
    assert twin.encoder.weight_quantizer is twin.decoder.weight_quantizer
    assert twin.encoder.input_quantizer is not twin.decoder.input_quantizer
    apart, _ = swap(Tied(), [Rule("encoder", *recipes(8)), Rule("decoder", *recipes(2))])
    assert apart.encoder.weight_quantizer is not apart.decoder.weight_quantizer
    calibrate(apart, [torch.randn(5, 6)])
    x = torch.randn(3, 6)
    assert_bit_equal(pack(apart)(x), apart(x))


def test_swapping_a_twin_again_replaces_its_observers() -> None:
    twin, _ = swap(Residual(), everything(8))
    again, report = swap(twin, everything(2))
    assert again.stem.weight_quantizer.spec.bits == 2
    assert twin.stem.weight_quantizer.spec.bits == 8
    assert report.swapped[0].kind == "QuantConv2d"


def test_a_table_of_your_own_decides_what_can_be_swapped() -> None:
    model = Residual()
    twin, report = swap(model, [Rule(".*", *recipes())], table={nn.Linear: QuantLinear.from_float})
    assert [layer.path for layer in report.swapped] == ["fc"]
    assert type(twin.stem) is nn.Conv2d


def test_a_subclass_is_another_type() -> None:
    """A subclass may compute something else, so the table holds exact types."""

    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    _, report = swap(nn.Sequential(Mine(2, 2), nn.Linear(2, 2)), everything())
    assert [layer.path for layer in report.swapped] == ["1"]
    assert report.stays_float[0].kind == "Mine"


def test_share_keeps_plain_attributes_apart() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.options = {"list": [1]}
            self.linear = nn.Linear(2, 2)
            self.alias = self.linear

    model = Plain()
    twin = share(model)
    twin.options["list"].append(2)
    assert model.options == {"list": [1]}
    assert twin.alias is twin.linear
    assert twin.linear.weight is model.linear.weight


def test_modules_are_replaced_by_path_and_wherever_they_stand() -> None:
    model = SharedModule()
    old, new = model.here, nn.Linear(4, 4)
    assert replace_modules(model, {id(old): new}) is model
    assert model.here is model.there is new
    assert replace_modules(new, {id(new): old}) is old
    replace_submodule(model, "there", old)
    assert (model.here, model.there) == (new, old)
    with pytest.raises(MatchError, match=r"module 'here\.deeper' is not in the model"):
        replace_submodule(model, "here.deeper", old)


@pytest.mark.parametrize("network", [Residual, Inception])
def test_sums_and_concatenations_are_quantized_as_modules(network: type[nn.Module]) -> None:
    model = trained(network())
    twin, _ = swap(model, everything())
    calibrate(twin, images())
    joint = twin.add if network is Residual else twin.cat
    names = ["left_quantizer", "right_quantizer"] if network is Residual else ["input_quantizer"]
    assert [name for name, _ in joint.named_children()] == names
    for name in names:
        assert getattr(joint, name).grid.scale.shape == (1,)
    x = images(1)[0]
    parts = [torch.randn(2, 4), torch.randn(2, 4)]
    if network is Residual:
        expected = joint.left_quantizer(parts[0]) + joint.right_quantizer(parts[1])
    else:
        expected = torch.cat([joint.input_quantizer(part) for part in parts], 1)  # the codes can be joined as they are
    assert_bit_equal(joint(*parts), expected)
    assert_bit_equal(pack(twin)(x), twin(x))


def test_an_empty_concatenation_is_refused() -> None:
    with pytest.raises(ShapeError, match="concatenation of 0 tensors"):
        QuantConcat()()


# Folding batch norms


def folded_and_float(model: nn.Module, example: Any, *, relative: float = 1e-12) -> tuple[nn.Module, int]:
    """Fold in float64, compare, and return the folded model and how many batch norms are left."""
    model = model.double()
    with untouched(model):
        folded = fold_batchnorm(model, example)
    arguments = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*arguments)
        actual = copy.deepcopy(folded).eval()(*arguments)
    # Folding rounds each weight and each sum of at most 100 products once more: 1e-12 is thousands of ulp of float64.
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * float(expected.abs().max()))
    return folded, sum(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in folded.modules())


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda bias: [nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)], (2, 3, 7, 5)),
        (lambda bias: [nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6)], (2, 4, 7, 7)),
        (lambda bias: [nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=bias), nn.BatchNorm2d(8)], (1, 4, 7, 7)),
        (lambda bias: [nn.Conv2d(3, 1, 1, stride=2, bias=bias), nn.BatchNorm2d(1)], (2, 3, 5, 5)),
        (
            lambda bias: [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=bias), nn.BatchNorm2d(4)],
            (1, 3, 5, 5),
        ),
        (lambda bias: [nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6)], (7, 5)),
        (lambda bias: [nn.Linear(5, 6, bias=bias), nn.Identity(), nn.BatchNorm1d(6)], (7, 5)),
    ],
    ids=["conv", "grouped", "depthwise", "one channel", "reflect", "linear", "through an identity"],
)
def test_a_batch_norm_is_folded_into_the_layer_before_it(
    make: Callable[[bool], list[nn.Module]], shape: tuple[int, ...], bias: bool
) -> None:
    model = trained(nn.Sequential(*make(bias)))
    folded, left = folded_and_float(model, doubles(*shape))
    assert left == 0
    assert type(folded[0]) is type(model[0])
    assert folded[0].bias is not None
    assert isinstance(folded[-1], nn.Identity)


def test_names_and_nesting_do_not_matter() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"zeta": nn.BatchNorm2d(4), "a b+c": nn.ModuleList([nn.Conv2d(3, 4, 3)])})
            self.norm_before = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["zeta"](self.inner["a b+c"][0](self.norm_before(x)))

    folded, left = folded_and_float(trained(Odd()), doubles(2, 3, 6, 6))
    assert left == 1  # the one before the convolution reads no convolution
    assert isinstance(folded.inner["zeta"], nn.Identity)


def test_a_batch_norm_that_does_not_read_the_very_output_stays() -> None:
    for between in (nn.ReLU(), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1, groups=4)):
        last = nn.Conv2d(4, 2, 1)
        model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4), last))
        _, left = folded_and_float(model, doubles(2, 3, 8, 8))
        assert left == (0 if isinstance(between, nn.Conv2d) else 1)


def test_a_batch_norm_over_another_axis_stays() -> None:
    """With three axes a linear layer has its channels last and the batch norm reads the middle one."""
    for length in (4, 7):
        _, left = folded_and_float(
            trained(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(length))), doubles(2, length, 5)
        )
        assert left == 1


def test_a_batch_norm_without_parameters_or_statistics_stays() -> None:
    for options in ({"affine": False}, {"track_running_stats": False}):
        _, left = folded_and_float(
            trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options))), doubles(3, 3, 5, 5)
        )
        assert left == 1


def test_a_convolution_used_beside_its_batch_norm_is_refused() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    model = trained(Beside())
    with (
        untouched(model),
        pytest.raises(StateError, match=r"folding 1 batch norms changes the output"),
    ):
        fold_batchnorm(model, images(1)[0])


def test_two_batch_norms_of_one_convolution_are_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.one(y) - self.two(y)

    with pytest.raises(StateError, match="folding 2 batch norms changes the output"):
        fold_batchnorm(trained(Both()), images(1)[0])


def test_layers_that_run_twice_or_share_a_weight_keep_their_batch_norms() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.two.weight = self.one.weight
            self.twice = nn.Conv2d(3, 3, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[1](self.two(self.norms[0](self.one(x))))
            return self.norms[3](self.twice(self.norms[2](self.twice(x))))

    folded, left = folded_and_float(trained(Shared()), doubles(2, 3, 4, 4))
    assert left == 4
    assert folded.one.weight is folded.two.weight


def test_a_network_without_batch_norms_is_only_shared() -> None:
    model = CalledTwice()
    folded = fold_batchnorm(model, torch.randn(2, 4))
    assert folded is not model
    assert all(folded.get_parameter(name) is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_folding_keeps_the_dtype_and_rounds_to_it(dtype: torch.dtype) -> None:
    model = trained(Residual()).to(dtype)
    x = images(1)[0].to(dtype)
    folded = fold_batchnorm(model, x)
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    with torch.no_grad():
        expected, actual = (copy.deepcopy(each).double()(x.double()) for each in (model, folded))
    # Every folded weight is computed in the dtype of the model with a few roundings: 8 eps of the largest output.
    torch.testing.assert_close(actual, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max()))


def test_folding_keeps_the_mode_of_every_module() -> None:
    model = trained(Residual()).train()
    model.depthwise.eval()
    folded = fold_batchnorm(model, images(1)[0])
    assert [module.training for module in folded.modules()] == [module.training for module in model.modules()]


def test_folded_weights_can_be_trained_and_the_others_are_shared() -> None:
    model = trained(Residual())
    model.stem.weight.requires_grad_(False)
    folded = fold_batchnorm(model, images(1)[0])
    assert not folded.stem.weight.requires_grad
    assert folded.depthwise.weight.requires_grad
    assert folded.fc.weight is model.fc.weight
    assert folded.stem.weight is not model.stem.weight


def test_an_example_can_be_a_tensor_a_tuple_or_a_mapping() -> None:
    model = trained(TwoInputs())
    image, mask = torch.randn(2, 3, 6, 6), torch.randn(2, 2, 6, 6)
    for example in ((image, mask), {"mask": mask, "image": image}):
        folded = fold_batchnorm(model, example)
        assert isinstance(folded.bn, nn.Identity)
    for example in (None, 3, (), {}, ("text", 1)):
        with pytest.raises(DataError, match="holds no tensor"):
            fold_batchnorm(model, example)


class Casting(nn.Module):
    """Takes integers, as images come from a file, and casts them by name; so it does not run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.float() / 255)


def test_a_forward_that_casts_is_checked_in_its_own_dtype() -> None:
    model, pixels = trained(Casting()), torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    folded = fold_batchnorm(model, pixels)
    with torch.no_grad():
        # The same network in float32 with sums of 100 products at most, each rounded: 200 eps of the largest output.
        expected = model(pixels)
        torch.testing.assert_close(folded(pixels), expected, rtol=0, atol=200 * 2**-23 * float(expected.abs().max()))
    assert nearest(model, [pixels]).model(pixels).shape == (2, 5)

    class Beside(Casting):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body.stem(x.float())
            return self.body.bn1(y) + y

    with pytest.raises(StateError, match="changes the output"):
        fold_batchnorm(trained(Beside()), pixels)


@dataclasses.dataclass
class Result:
    scores: Tensor
    note: str = "none"


class Wrapped(nn.Module):
    """Returns whatever a function makes of the scores."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrap = Residual(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.body(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, [{"deep": y}, None], 3),
        lambda y: {"scores": y, "loss": None},
        Result,
        lambda y: y.argmax(1),
        lambda y: y > 0,
        lambda y: torch.complex(y, y),
        lambda y: y.log(),  # NaN and -inf in both are no difference
        lambda y: y[:0],
    ],
    ids=["nested", "mapping", "dataclass", "integers", "booleans", "complex", "non-finite", "empty"],
)
def test_outputs_of_any_kind_are_compared(wrap: Callable[[Tensor], Any]) -> None:
    fold_batchnorm(trained(Wrapped(wrap)), images(1)[0])


@pytest.mark.parametrize("wrap", [lambda y: None, lambda y: str(y.shape), lambda y: object()])
def test_an_output_that_cannot_be_compared_is_refused(wrap: Callable[[Tensor], Any]) -> None:
    with pytest.raises(StateError, match="holds no tensor, so the fold of 2 batch norms cannot be checked"):
        fold_batchnorm(trained(Wrapped(wrap)), images(1)[0])


def test_a_difference_anywhere_in_the_output_is_found() -> None:
    class Leaking(Residual):
        def forward(self, x: Tensor) -> Any:
            seen = self.stem(x)
            return {"scores": torch.zeros(3), "rest": [self.bn1(seen), (seen > 0, 1)]}

    with pytest.raises(StateError, match="changes the output by 1 of"):
        fold_batchnorm(trained(Leaking()), images(1)[0])


def test_an_example_with_a_nan_still_checks_the_fold() -> None:
    class Beside(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.stem(x)) + self.stem.weight.sum()

    x = torch.full((1, 3, 9, 9), float("nan"))
    fold_batchnorm(trained(Residual()), x)
    with pytest.raises(StateError, match="changes the output by 0"):
        fold_batchnorm(trained(Beside()), x)


def test_an_observer_that_a_recipe_makes_gets_everything_it_asks_for() -> None:
    made: list[dict[str, Any]] = []

    def observer(spec: QuantSpec, shape: tuple[int, ...], **options: Any) -> Observer:
        made.append({"spec": spec, "shape": shape, **options})
        return MSEObserver(spec, shape, **options)

    recipe = Recipe(QuantSpec.signed(4, granularity=PerChannel(0)), observer=observer)
    twin, _ = swap(nn.Sequential(nn.Conv2d(3, 4, 3)), [Rule("0", weight=recipe)])
    assert isinstance(twin[0], QuantConv2d)
    assert made == [{"spec": recipe.spec, "shape": (4, 1, 1, 1), "grid": recipe.grid, "rounding": recipe.rounding}]


# Units


class Blocks(nn.Module):
    """Two blocks with skip paths, the second one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.third = self.second

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_units_are_wrapped_and_unwrapped_and_the_function_is_the_same() -> None:
    model, x = Blocks(), torch.randn(5, 4)
    expected, tree = model(x), list(model.named_modules())
    wrapped = wrap_units(model, ["first", "second", "second.body.1", "third"])
    assert wrapped is model
    assert isinstance(model.first, QuantUnit)
    assert model.third is model.second
    assert isinstance(model.second.body[1], QuantUnit)
    assert not isinstance(model.second.body, QuantUnit)
    assert_bit_equal(model(x), expected)
    assert plain_path(model, "second.body.1.body.0") == "second.1.0"
    assert unwrap_units(model) is model
    assert list(model.named_modules()) == tree


def test_a_whole_model_can_be_a_unit_and_a_unit_the_body_of_another() -> None:
    layer = nn.Linear(3, 2)
    unit = wrap_units(layer, [""])
    assert isinstance(unit, QuantUnit)
    assert wrap_units(unit, [""]) is unit
    assert plain_path(unit, "body") == ""
    assert unwrap_units(QuantUnit(unit)) is layer


def test_a_unit_at_no_place_is_refused() -> None:
    with pytest.raises(MatchError, match="module 'fourth' is not in the model, so it cannot become a unit"):
        wrap_units(Blocks(), ["fourth"])


def test_a_rule_fills_the_slots_of_a_unit_by_what_they_see() -> None:
    model = wrap_units(Blocks(), ["first", "second"])
    weight, activation = recipes(4, 8)
    output = Recipe(QuantSpec.unsigned(3))
    rules = [
        Rule("second", input=activation, output=output),
        Rule("first", output=output),
        Rule(r"second\.body\..*", weight, activation, output=output),
    ]
    with untouched(model):
        twin, report = swap(model, rules)
    assert [(layer.path, layer.kind) for layer in report.swapped] == [
        ("first", "QuantUnit"),
        ("second", "QuantUnit"),
        ("second.body.0", "Linear"),
        ("second.body.1.0", "Linear"),
    ]
    bits = [tuple(spec and spec.bits for spec in (layer.weight, layer.input, layer.output)) for layer in report.swapped]
    assert bits == [(None, None, 3), (None, 8, 3), (4, 8, None), (4, 8, None)]
    assert isinstance(twin.first.input_quantizer, nn.Identity)
    assert twin.first.output_quantizer.spec.bits == 3
    assert str(report).splitlines()[0].split() == ["first", "QuantUnit", "W32A32O3"]
    assert str(report).splitlines()[2].split() == ["second.body.0", "Linear", "W4A8"]


def test_a_unit_is_calibrated_on_what_enters_and_leaves_its_body() -> None:
    model, x = wrap_units(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), [""]), torch.randn(64, 4)
    twin, _ = swap(model, [Rule("", input=recipes()[1], output=Recipe(QuantSpec.unsigned(8)))])
    calibrate(twin, [x])
    with torch.no_grad():
        expected = model(x)
    assert_bit_equal(twin.input_quantizer.grid.scale, ((x.max() - x.min()) / 255).reshape(1))
    assert_bit_equal(twin.output_quantizer.grid.scale, (expected.max() / 255).reshape(1))


def test_a_layer_in_a_unit_that_never_runs_is_named_with_its_path() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    twin, _ = swap(wrap_units(nn.Sequential(Skipping()), ["0"]), [Rule(".*", *recipes())])
    with pytest.raises(StateError, match=r"1 layers saw no data \(0\.body\.idle\)"):
        calibrate(twin, [torch.ones(1, 2)])
