"""Torchvision's models through the whole pipeline: fold, swap, calibrate, pack, save, load, same logits."""

import pathlib

import pytest
import torch

from q_core import MinMaxObserver, bits_per_weight, load_packed, nearest, pack, save_packed

pytestmark = pytest.mark.zoo

NAMES = [
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "regnet_x_400mf",
    "mnasnet1_0",
    "efficientnet_b0",
    "convnext_tiny",
    "swin_t",
    "vit_b_32",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_torchvision_model_goes_through_the_whole_pipeline(name: str, tmp_path: pathlib.Path) -> None:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 224, 224)
    result = nearest(model, [images], weight_bits=4, activation_bits=8, observer=MinMaxObserver, progress=False)
    packed = pack(result.model)
    loaded = load_packed(save_packed(packed, tmp_path / "model.safetensors"), model)
    with torch.no_grad():
        expected = result.model(images)
        assert expected.isfinite().all()
        assert torch.equal(packed(images), expected)
        assert torch.equal(loaded(images), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the float model has changed"
    # Every convolution and linear layer that is not swapped must be in the report, with a reason.
    kept = {layer.path for layer in result.swap.stays_float}
    swapped = {layer.path for layer in result.swap.swapped}
    weights = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    assert weights <= kept | swapped
    assert 4 <= bits_per_weight(packed) < 32


def test_the_accuracy_on_eight_bits_follows_the_float_network() -> None:
    """At 8 bits a random network's logits move by a few percent of their spread."""
    models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    images = torch.randn(4, 3, 224, 224)
    result = nearest(model, [images], weight_bits=8, activation_bits=8, progress=False)
    with torch.no_grad():
        expected, actual = model(images), result.model(images)
    noise = (actual - expected).square().mean() / (expected - expected.mean()).square().mean()
    # 8-bit rounding noise is about -40 dB a layer; some twenty layers add to about -27 dB, 20 dB leaves a margin.
    assert noise < 10**-2
