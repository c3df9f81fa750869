"""Operation counts: the supplement's tables 1 and 2, and the counter's manners."""

import pytest
import torch
from torch import nn

from q_adder.counting import DISTANCES, PRODUCTS, Operations, count_operations
from q_adder.layers import AdderConv2d, AdderLinear, AdderMatmul
from q_adder.models import (
    deit_tiny,
    original_bottleneck,
    product_block,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
    vgg_small,
)
from q_adder.quantized import QuantAdderConv2d, QuantAdderLinear
from q_adder.redistribution import redistribute
from q_core import StateError, pack

# Our pairs of all layers and of the adder layers; then as printed, in the unit of the print: #mul of AddNN and BNN,
# #add of CNN and BNN, #xnor of BNN, #add of AddNN.
TABLES = {
    "vgg_small": (vgg_small, 32, 607_600_640, 603_979_776, 1e9, ("0.05", "0.65", "0.60", "1.25")),
    "resnet20": (resnet20, 32, 40_813_184, 40_370_176, 1e6, ("0.45", "41.17", "40.72", "81.89")),
    "resnet32": (resnet32, 32, 69_124_736, 68_681_728, 1e6, ("0.45", "69.12", "68.67", "137.79")),
    "resnet18": (resnet18, 224, 1_814_073_344, 1_695_547_392, 1e9, ("0.1", "1.8", "1.7", "3.5")),
    "resnet50": (
        lambda: resnet50(block=original_bottleneck),
        224,
        3_857_973_248,
        3_737_911_296,
        1e9,
        ("0.1", "3.9", "3.8", "7.6"),
    ),
}

# Relative difference of ours to the printed number, in percent, rounded to a tenth; the documentation says why.
DIFFERENCES = {
    "vgg_small": (-92.8, -6.5, 0.7, -3.1),
    "resnet20": (-1.6, -0.9, -0.9, -0.9),
    "resnet32": (-1.6, 0.0, 0.0, 0.0),
    "resnet18": (18.5, 0.8, -0.3, 0.3),
    "resnet50": (20.1, -1.1, -1.6, -0.1),
}


def counted(build, size):
    with torch.device("meta"):
        return count_operations(build(), torch.empty(1, 3, size, size))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_supplement(name):
    build, size, total, adders, unit, printed = TABLES[name]
    count = counted(build, size)
    assert count.as_product == Operations(total, total, 0)
    assert count.as_binary == Operations(total - adders, total, adders)
    assert count.as_built == Operations(total - adders, total + adders, 0)
    ours = (total - adders, total, adders, total + adders)
    actual = tuple(round(100 * (n / (float(p) * unit) - 1), 1) for n, p in zip(ours, printed, strict=True))
    assert actual == DIFFERENCES[name]


@pytest.mark.parametrize(
    ("name", "columns"),
    [("vgg_small", [2]), ("resnet32", [1]), ("resnet18", [0, 1, 2, 3]), ("resnet50", [0, 1, 3])],
)
def test_these_numbers_round_to_what_is_printed(name, columns):
    _, _, total, adders, unit, printed = TABLES[name]
    ours = (total - adders, total, adders, total + adders)
    for column in columns:
        digits = len(printed[column].partition(".")[2])
        assert f"{ours[column] / unit:.{digits}f}" == printed[column]


def test_the_two_cifar_networks_cannot_come_from_one_convention():
    """Two more blocks per stage cost 28.31 M pairs whatever the shortcuts; the printed totals differ by less."""
    blocks = counted(resnet32, 32).as_product.additions - counted(resnet20, 32).as_product.additions
    assert blocks == 28_311_552
    assert blocks > (69.12 - 41.17 + 0.01) * 1e6


@pytest.mark.parametrize(("build", "size"), [(vgg_small, 32), (resnet20, 32), (resnet18, 64)])
def test_the_twin_of_an_adder_network_has_its_pairs(build, size):
    twin = counted(lambda: build(conv=nn.Conv2d), size)
    assert twin.as_built == counted(build, size).as_product
    assert twin.as_built == twin.as_product == twin.as_binary


def test_transformers_are_counted_with_both_products_of_their_attention():
    adder = counted(lambda: deit_tiny(depth=1), 224)
    twin = counted(lambda: deit_tiny(depth=1, block=product_block), 224)
    tokens, width = 197, 192
    linear, attention = 12 * tokens * width * width, 2 * tokens * tokens * width
    ordinary = 196 * width * 768 + width * 1000
    assert adder.as_product == twin.as_built == Operations(linear + attention + ordinary, linear + attention + ordinary)
    assert adder.as_built.multiplications == ordinary


def test_geometry_is_counted_by_the_elements_of_the_output():
    layer = AdderConv2d(6, 9, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=3)
    count = count_operations(layer, torch.empty(2, 6, 9, 8))
    assert count.layers[0].pairs == 2 * 9 * 4 * 8 * (6 // 3 * 3 * 2)


def test_a_transposed_convolution_is_counted_by_its_input():
    count = count_operations(nn.ConvTranspose2d(4, 6, 3, stride=2), torch.empty(1, 4, 5, 5))
    assert count.as_product.multiplications == 4 * 5 * 5 * 6 * 9


def test_a_linear_layer_counts_every_row():
    assert count_operations(AdderLinear(5, 7), torch.empty(2, 3, 5)).as_built == Operations(0, 2 * 2 * 3 * 5 * 7, 0)


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert count_operations(Twice(), torch.empty(1, 4)).as_product.additions == 2 * 16


def test_the_model_is_left_as_it_was():
    model = resnet20()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    count_operations(model, torch.randn(1, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_hooks_go_even_when_the_run_fails():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(RuntimeError, match="channels"):
        count_operations(model, torch.randn(1, 3, 8, 8))
    assert all(not module._forward_hooks for module in model.modules())


def test_what_is_not_counted_is_listed():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.norm, self.idle = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.norm(self.seen(x))

    count = count_operations(Partly(), torch.empty(1, 4))
    assert [layer.path for layer in count.layers] == ["seen"]
    assert dict(count.uncounted) == {"norm": "LayerNorm", "idle": "Linear"}


def test_a_model_without_a_layer_of_the_tables_is_refused():
    with pytest.raises(StateError, match="no layer of ReLU was counted"):
        count_operations(nn.ReLU(), torch.empty(1, 4))


def test_own_layers_are_counted_by_a_table_of_ones_own():
    class Shift(nn.Module):
        def forward(self, x):
            return 2 * x

    tables = {"products": {**PRODUCTS, Shift: lambda layer, inputs, output: output.numel()}, "distances": DISTANCES}
    count = count_operations(nn.Sequential(Shift(), AdderLinear(3, 2)), torch.empty(1, 3), **tables)
    assert [(layer.pairs, layer.adds) for layer in count.layers] == [(3, False), (6, True)]


def test_quantized_adder_layers_are_convolutions_by_class_but_count_as_distances():
    assert set(DISTANCES) >= {QuantAdderConv2d, QuantAdderLinear}
    assert issubclass(QuantAdderConv2d, nn.Conv2d)


def forms(model, images, **options):
    """The same network in float, quantized and packed, its ordinary layers too."""
    quantized = redistribute(model.eval(), [images], edge_bits=8, progress=False, **options).model
    return [count_operations(form, images[:1]) for form in (model, quantized, pack(quantized))]


@pytest.mark.parametrize("build", [resnet20, lambda: deit_tiny(10, image_size=32, patch_size=8, depth=1, width=24)])
def test_quantized_and_packed_networks_have_the_operations_of_the_float_network(build):
    images = torch.randn(2, 3, 32, 32)
    counts = forms(build(), images)
    for count in counts[1:]:
        assert count.as_built == counts[0].as_built
        assert count.as_binary == counts[0].as_binary
        assert [(x.path, x.pairs, x.adds) for x in count.layers] == [
            (x.path, x.pairs, x.adds) for x in counts[0].layers
        ]


def test_operands_may_be_given_by_name():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.matmul = AdderMatmul()

        def forward(self, a, b):
            return self.matmul(a=a, b=b)

    assert (
        count_operations(Attend(), torch.empty(2, 5, 4), torch.empty(2, 3, 4)).as_built.additions == 2 * 2 * 5 * 3 * 4
    )


def test_a_subclass_counts_as_its_parent():
    class Mine(nn.Conv2d):
        pass

    assert count_operations(Mine(2, 3, 1), torch.empty(1, 2, 4, 4)).as_product.additions == 2 * 3 * 16


def test_distances_of_activations_have_no_parameters_and_count():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.matmul = AdderMatmul()

        def forward(self, a, b):
            return self.matmul(a, b)

    count = count_operations(Attend(), torch.empty(2, 5, 4), torch.empty(2, 3, 4))
    assert count.as_built == Operations(0, 2 * 2 * 5 * 3 * 4, 0)


def test_the_table_shows_layers_and_totals():
    text = str(count_operations(nn.Sequential(nn.Conv2d(3, 2, 1), AdderConv2d(2, 4, 3)), torch.empty(1, 3, 5, 5)))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["0", "150", "no"]
    assert lines[2] == ["1", "648", "yes"]
    assert lines[4:] == [
        ["CNN", "798", "798", "0"],
        ["BNN", "150", "798", "648"],
        ["AddNN", "150", "1,446", "0"],
    ]
