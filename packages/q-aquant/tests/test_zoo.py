"""Torchvision's models through the whole pipeline: units, reconstruction, pack, save, load, same outputs."""

import pathlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from q_aquant import PatchConv2d, aquant, qdrop
from q_core import QuantUnit, bits_per_weight, load_packed, pack, save_packed

pytestmark = pytest.mark.zoo

LITERATURE = {
    "resnet18": {"BasicBlock": 8, "Conv2d": 1, "Linear": 1},
    "resnet50": {"Bottleneck": 16, "Conv2d": 1, "Linear": 1},
    "mobilenet_v2": {"InvertedResidual": 17, "Conv2dNormActivation": 2, "Sequential": 1},
    "regnet_x_400mf": {"ResBottleneckBlock": 22, "SimpleStemIN": 1, "Linear": 1},
    "regnet_x_3_2gf": {"ResBottleneckBlock": 25, "SimpleStemIN": 1, "Linear": 1},
    "mnasnet1_0": {"_InvertedResidual": 16, "Conv2d": 4, "Sequential": 1},
}
"""The units of the papers: a block each, the layers before and after them one by one."""

METHODS = {"aquant W2A2": (aquant, 2), "qdrop W4A4": (qdrop, 4)}


def settled(name: str, images: Tensor) -> nn.Module:
    """A model with random weights, whose batch norms have seen the images, so that activations have a usual size."""
    models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of everything seen
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LITERATURE)
def test_a_torchvision_model_goes_through_the_whole_pipeline(name: str, method: str, tmp_path: pathlib.Path) -> None:
    images = torch.randn(24, 3, 32, 32)
    model = settled(name, images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make, bits = METHODS[method]
    result = make(
        model,
        images.split(8),
        weight_bits=bits,
        activation_bits=bits,
        iterations=2,
        batch_size=8,
        looks=1,
        progress=False,
    )
    assert Counter(unit.kind for unit in result.units) == LITERATURE[name]
    assert not result.units.left_out
    assert len(result.logs) == len(result.units)
    assert all(log.error <= log.start for log in result.logs)
    # Two steps are enough to learn something somewhere, at the rates that go with so few.
    assert any(log.outcome == "learned" for log in result.logs)
    kinds = Counter(type(module) for module in result.model.modules())
    assert (PatchConv2d in kinds, QuantUnit in kinds) == (make is aquant, make is qdrop)

    packed = pack(result.model)
    loaded = load_packed(save_packed(packed, tmp_path / "model.safetensors"), model)
    with torch.no_grad():
        expected = result.model(images)
        assert expected.isfinite().all()
        # The same operations on the same values: equal bit for bit.
        torch.testing.assert_close(packed(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the float model has changed"
    assert not result.swap.stays_float
    # The first and the last layer have 8 bits, and a scale is stored for every channel.
    assert bits < bits_per_weight(packed) < bits + 4
