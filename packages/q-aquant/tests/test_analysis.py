"""Figure 2, border curves, and the parameter counts of the paper's table."""

import copy
import math

import pytest
import torch
from torch import nn

from q_aquant.analysis import (
    LayerShape,
    border_cost,
    border_curve,
    held_border_parameters,
    inputs_of,
    layer_shapes,
    propagated_error,
)
from q_aquant.border import FusedBorder, LearnedBorder, rectified
from q_aquant.layers import PatchConv2d
from q_core.analysis import compare
from q_core.errors import DataError, MatchError, RangeError, ShapeError, StateError
from q_core.grid import UniformGrid
from q_core.layers import QuantConv2d
from q_core.quantizer import Quantizer

EXACT = {"atol": 0.0, "rtol": 0.0}


def conv(path: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> LayerShape:
    return LayerShape(path, inputs, kernel**2, outputs * inputs // groups * kernel**2, groups)


def resnet18() -> list[LayerShape]:
    shapes = [conv("conv1", 3, 64, 7)]
    for stage, width in enumerate([64, 128, 256, 512]):
        inputs = width if stage == 0 else width // 2
        shapes += [conv("conv", inputs, width, 3), *[conv("conv", width, width, 3)] * 3]
        shapes += [conv("downsample", inputs, width, 1)] if stage else []
    return [*shapes, LayerShape("fc", 512, 1, 512_000)]


def test_resnet18_has_the_parameter_ratio_of_the_paper() -> None:
    cost = border_cost(resnet18())
    assert (cost.parameters, cost.weights) == (3 * 31_488, 11_678_912)
    assert round(100 * cost.ratio, 2) == 0.81
    weights, borders = cost.bytes_of(weight_bits=4, border_bits=16)
    assert weights == 11_678_912 // 2
    assert round(100 * borders / weights, 1) == 3.2  # "only 3 %" in the paper
    assert cost.bytes_of(weight_bits=4, border_bits=8)[1] == borders // 2


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "weights", "elements", "percent"),
    [
        ("resnet18", 11_678_912, 31_488, 0.81),
        ("resnet50", 25_502_912, 54_784, 0.64),
        ("regnet_x_600mf", 6_161_760, 58_000, 2.82),
        ("regnet_x_3_2gf", 15_232_992, 109_024, 2.14),
        ("mobilenet_v2", 3_469_760, 74_144, 4.56),
        ("mnasnet2_0", 12_395_664, 341_664, 8.27),
    ],
)
def test_networks_have_the_parameter_ratios_of_the_paper(
    name: str, weights: int, elements: int, percent: float
) -> None:
    models = pytest.importorskip("torchvision").models
    if name == "regnet_x_600mf":  # not in torchvision: Radosavovic et al. 2020, arXiv:2003.13678, as released
        stages = models.regnet.BlockParams.from_init_params(depth=16, w_0=48, w_a=36.97, w_m=2.24, group_width=24)
        model = models.regnet.RegNet(stages)
    elif name == "mnasnet2_0":
        model = models.MNASNet(2.0)
    else:
        model = getattr(models, name)()
    shapes = layer_shapes(model)
    one = border_cost(shapes, terms=1)
    assert (one.weights, one.parameters) == (weights, elements)
    # MobileNetV2's number is the linear border in depthwise convolutions, and the quadratic one elsewhere.
    cost = border_cost(shapes, depthwise_terms=2 if name == "mobilenet_v2" else 3)
    if name == "mobilenet_v2":
        assert cost.parameters == 158_208
    # The last digit of 2.147 is cut off in the paper.
    cut = math.floor(1e4 * cost.ratio) / 100 if name == "regnet_x_3_2gf" else round(100 * cost.ratio, 2)
    assert cut == percent


def test_the_bytes_of_a_model_round_up() -> None:
    cost = border_cost([LayerShape("a", 1, 1, 3), LayerShape("b", 1, 1, 2)])
    assert cost.bytes_of(weight_bits=3, border_bits=3) == (2, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.depth = nn.Conv2d(4, 4, (3, 1), groups=4)
        self.group = nn.Conv2d(4, 6, 1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.stem(x))
        return self.head(self.group(torch.relu(self.depth(x))).mean((2, 3)))


def quantized(model: Net) -> Net:
    """Quantize the depthwise and the grouped convolution at their inputs, one with a border, one with a fused one."""
    twin = copy.deepcopy(model)
    for name in ("depth", "group"):
        layer = PatchConv2d.from_quantized(QuantConv2d.from_float(getattr(twin, name)), nn.Identity())
        border = LearnedBorder.nearest(layer.patch_shape(), low=0.0, high=3.0)
        rounding = border if name == "depth" else FusedBorder(border)
        layer.patch_quantizer = Quantizer(UniformGrid(torch.full((1, 1, 1, 1), 0.3), qmin=0, qmax=3), rounding)
        setattr(twin, name, layer)
    return twin


def test_shapes_of_layers_are_listed_in_order_and_counted_as_modules_hold_them() -> None:
    model = Net()
    shapes = layer_shapes(model)
    assert shapes == [
        LayerShape("stem", 3, 9, 108),
        LayerShape("depth", 4, 3, 12, 4),
        LayerShape("group", 4, 1, 12, 2),
        LayerShape("head", 6, 1, 30),
    ]
    assert [shape.depthwise for shape in shapes] == [False, True, False, False]
    assert border_cost(shapes).parameters == 3 * (12 + 4 + 6)
    assert border_cost(shapes, depthwise_terms=2).parameters == 2 * 12 + 3 * (4 + 6)
    twin = quantized(model)
    assert layer_shapes(twin) == shapes
    assert held_border_parameters(twin) == 3 * (12 + 4) + 4  # the fused border has a weight for each element


def test_counts_of_nothing_are_refused() -> None:
    with pytest.raises(MatchError, match="nothing to count"):
        border_cost([])
    with pytest.raises(RangeError, match="terms=0"):
        border_cost(resnet18(), terms=0)
    with pytest.raises(RangeError, match="border_bits=0"):
        border_cost(resnet18()).bytes_of(weight_bits=4, border_bits=0)


def test_error_is_grouped_by_the_size_of_the_activation() -> None:
    noised = torch.tensor([[0.5, -1.5, 4.0], [1.0, 3.5, -3.0]])
    exact = noised - torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.9]])
    found = propagated_error(noised, exact, groups=4)
    torch.testing.assert_close(found.edges, torch.linspace(0, 4, 5).double(), **EXACT)
    torch.testing.assert_close(found.counts, torch.tensor([1, 2, 0, 3]), **EXACT)
    # The differences were rounded to float32 at magnitudes up to 4.
    single = {"atol": 1e-6, "rtol": 0.0, "equal_nan": True}
    torch.testing.assert_close(found.mean, torch.tensor([0.1, 0.3, math.nan, 1.7 / 3]).double(), **single)
    spread = torch.tensor([0.3, 0.5, 0.9]).std(correction=0).item()
    torch.testing.assert_close(found.spread, torch.tensor([0.0, 0.1, math.nan, spread]).double(), **single)


def test_error_of_activations_that_are_all_zero_has_one_group() -> None:
    found = propagated_error(torch.zeros(5), torch.zeros(5), groups=3)
    assert found.counts.sum() == 5
    assert found.mean.nan_to_num().abs().max() == 0


def test_error_needs_two_tensors_of_finite_values() -> None:
    with pytest.raises(ShapeError, match="the same of both"):
        propagated_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(RangeError, match="groups=0"):
        propagated_error(torch.zeros(2), torch.zeros(2), groups=0)
    for bad in (torch.zeros(0), torch.tensor([1.0, math.inf])):
        with pytest.raises(DataError, match="finite"):
            propagated_error(bad, bad)


def test_inputs_of_a_layer_are_collected_from_both_networks() -> None:
    model = Net()
    twin = quantized(model)
    batches = [torch.rand(2, 3, 8, 7), (torch.rand(3, 3, 8, 7), torch.zeros(3))]
    noised, exact = inputs_of(model, twin, "group", batches)
    images = torch.cat([batches[0], batches[1][0]])
    with torch.no_grad():
        torch.testing.assert_close(exact, torch.relu(model.depth(torch.relu(model.stem(images)))), **EXACT)
        # The matrix product of the patches may sum in another order for another number of images: 3 terms.
        close = {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(noised, torch.relu(twin.depth(torch.relu(twin.stem(images)))), **close)
    for network in (model, twin):
        assert network.training
        assert not network.group._forward_pre_hooks
    first = inputs_of(model, twin, "depth", batches)
    torch.testing.assert_close(*first, **EXACT)


def test_inputs_of_a_layer_that_is_not_there_or_idle_are_refused() -> None:
    model = Net()
    with pytest.raises(MatchError, match="tail"):
        inputs_of(model, model, "tail", [torch.rand(1, 3, 8, 7)])
    model.tail = nn.Identity()
    with pytest.raises(StateError, match="ran 0 times"):
        inputs_of(model, model, "tail", [torch.rand(1, 3, 8, 7)])


def test_curves_are_the_borders_at_every_point() -> None:
    coefficients = torch.randn(3, 4, 6, 1)
    rounding = LearnedBorder(coefficients, low=-2.0, high=1.0)
    curve = border_curve(rounding, points=7)
    assert curve.border.shape == (4, 6, 1, 7)
    v = (curve.u.float() + 2) / 3
    expected = rectified(coefficients[0] + coefficients[1] * v + coefficients[2] * v * v)
    # A few float32 operations on numbers of about 10.
    torch.testing.assert_close(curve.border.squeeze(2), expected, atol=1e-5, rtol=1e-5)
    features = border_curve(LearnedBorder(torch.randn(2, 5), low=0.0, high=3.0), points=2)
    assert features.border.shape == (5, 2)
    assert not features.border.requires_grad


def test_curve_of_a_fused_border_is_that_of_an_even_window() -> None:
    elements = LearnedBorder(0.3 * torch.randn(3, 4, 6, 1), low=0.0, high=3.0)
    weights = torch.rand(4, 6) + 0.5
    curve = border_curve(FusedBorder(elements, weights), points=9)
    assert curve.border.shape == (4, 1, 9)
    parts = border_curve(elements, points=9).border.squeeze(2) * weights[:, :, None]
    # A mean of six numbers of about one half in float32.
    torch.testing.assert_close(curve.border.squeeze(1), parts.mean(1).clamp(0, 1), atol=1e-5, rtol=0.0)
    with pytest.raises(RangeError, match="points=1"):
        border_curve(elements, points=1)


def test_errors_of_layers_with_borders_are_compared_by_the_core() -> None:
    model = Net()
    found = compare(model, quantized(model), 10 * torch.rand(4, 3, 8, 7))
    assert [(error.path, error.kind) for error in found] == [("depth", "PatchConv2d"), ("group", "PatchConv2d")]
    assert 0 < found[0].local == pytest.approx(found[0].accumulated)  # nothing before it is quantized
    assert found[1].local < math.inf
