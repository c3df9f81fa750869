"""The networks: shapes, keys, twins, training, and the published weights."""

import hashlib
import json
import os
import pathlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from q_adder import AdderLearningRate, adder_weights
from q_adder.functional import adder_matmul
from q_adder.layers import AdderConv2d, AdderLinear, AdderMatmul
from q_adder.models import (
    BasicBlock,
    ProductMatmul,
    bottleneck,
    deit_tiny,
    load_published_resnet20,
    original_bottleneck,
    product_block,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
    vgg_small,
)
from q_core import FormatError, QuantAdd, QuantSpec, RangeError, Recipe, Rule, ShapeError, swap

SMALL = {"image_size": 8, "patch_size": 4, "depth": 2, "width": 16, "heads": 2}
CONVOLUTIONAL = {"vgg_small": (vgg_small, 32), "resnet20": (resnet20, 32), "resnet32": (resnet32, 32)}
LARGE = {
    "resnet18": (resnet18, 11_691_512),
    "resnet50": (resnet50, 25_559_032),
    "resnet50, original": (lambda **options: resnet50(block=original_bottleneck, **options), 25_559_032),
    "deit_tiny": (deit_tiny, 5_742_760),
}


def shapes(model):
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


# --- shapes, keys, twins


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_small_networks_return_one_logit_per_class(name):
    build, size = CONVOLUTIONAL[name]
    assert build(7).eval()(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", LARGE)
def test_large_networks_have_their_parameters_and_return_one_logit_per_class(name):
    build, parameters = LARGE[name]
    with torch.device("meta"):
        model = build()
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.eval()(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


@pytest.mark.parametrize("build", [resnet20, vgg_small])
@pytest.mark.parametrize("size", [(33, 47), (29, 32)])
def test_odd_sizes_of_images_pass(build, size):
    assert build(conv=nn.Conv2d).eval()(torch.randn(1, 3, *size)).shape == (1, 10)


@pytest.mark.parametrize("build", [vgg_small, resnet20, resnet32, resnet18, resnet50])
def test_twins_have_the_same_keys_and_shapes(build):
    with torch.device("meta"):
        adder, twin = build(), build(conv=nn.Conv2d)
    assert shapes(adder) == shapes(twin)
    assert not any(isinstance(module, AdderConv2d) for module in twin.modules())


@pytest.mark.parametrize("build", [vgg_small, resnet20, resnet32, resnet18, resnet50])
def test_every_layer_but_the_first_and_the_classifier_adds(build):
    with torch.device("meta"):
        layers = [module for module in build().modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    ordinary = [place for place, layer in enumerate(layers) if not isinstance(layer, AdderConv2d)]
    assert ordinary == [0, len(layers) - 1]


def test_transformers_add_everywhere_but_in_the_embedding_and_the_classifier():
    model = deit_tiny(10, **SMALL)
    ordinary = [n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear, ProductMatmul)]
    assert ordinary == ["patch_embedding", "head"]
    assert sum(isinstance(m, AdderLinear) for m in model.modules()) == 12
    assert sum(isinstance(m, AdderMatmul) for m in model.modules()) == 4
    twin = deit_tiny(10, block=product_block, **SMALL)
    assert sum(type(m) is nn.Linear for m in twin.modules()) == 13
    assert sum(isinstance(m, ProductMatmul) for m in twin.modules()) == 4


def test_the_product_transformer_is_the_ordinary_one():
    """Its block equals torch's own encoder layer with the same weights."""
    torch.manual_seed(0)
    block = product_block(16, 2).double()
    theirs = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    parts = [block.attention.query, block.attention.key, block.attention.value]
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
            "self_attn.out_proj.weight": block.attention.projection.weight,
            "self_attn.out_proj.bias": block.attention.projection.bias,
            "linear1.weight": block.mlp[0].weight,
            "linear1.bias": block.mlp[0].bias,
            "linear2.weight": block.mlp[2].weight,
            "linear2.bias": block.mlp[2].bias,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
        }
    )
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    # The same float64 sums of at most 64 terms of size one in another order.
    torch.testing.assert_close(block(x), theirs(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("conv", [AdderConv2d, nn.Conv2d])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_rectifies_between_its_layers_and_after_the_addition(conv, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    for block, layers in ((BasicBlock(8, 8, stride, conv), 2), (bottleneck(8, 2, stride, conv), 3)):
        out = x
        for place in range(1, layers + 1):
            out = getattr(block, f"bn{place}")(getattr(block, f"conv{place}")(out))
            out = out.relu() if place < layers else out
        shortcut = x if stride == 1 else block.downsample(x)
        # The same float32 operations in the same order.
        torch.testing.assert_close(block(x), (out + shortcut).relu(), rtol=0, atol=0)


@pytest.mark.parametrize(("block", "strides"), [(bottleneck, (1, 2)), (original_bottleneck, (2, 1))])
def test_the_two_bottlenecks_stride_in_different_layers(block, strides):
    made = block(8, 4, 2, nn.Conv2d)
    assert (made.conv1.stride[0], made.conv2.stride[0]) == strides
    assert made.downsample[0].stride == (2, 2)
    assert made(torch.randn(1, 8, 7, 7)).shape == (1, 16, 4, 4)


def test_adder_attention_follows_its_formula():
    torch.manual_seed(0)
    attention = deit_tiny(10, **SMALL).double().eval().blocks[0].attention
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    mixed = torch.empty_like(value)
    for head in (slice(0, 8), slice(8, 16)):
        q, k, v = query[..., head], key[..., head], value[..., head]
        scores = -(q.unsqueeze(2) - k.unsqueeze(1)).abs().sum(-1) / 8**0.5
        p = 5 * scores.softmax(-1)
        mixed[..., head] = -(p.unsqueeze(-1) - v.unsqueeze(1)).abs().sum(2)
    expected = attention.projection(attention.norm(mixed) + value)
    # Float64 sums of at most 16 terms below 100 in another order.
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-11)


def test_the_identity_mapping_gives_back_the_rank_of_the_tokens():
    """The reasons that the module gives for its formulas, on random tokens."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(16, 65, 24) for _ in range(3))

    def normalised(y):
        return (y - y.mean((0, 1))) / y.std((0, 1))

    def rank(y):
        share = torch.linalg.svdvals(y).square()
        share = share / share.sum(-1, keepdim=True)
        return float((-(share * share.log()).sum(-1)).exp().mean())

    softmax = (adder_matmul(query, key) / 24**0.5).softmax(-1)
    ones = normalised(adder_matmul(softmax, value.mT))
    tokens = normalised(adder_matmul(65 * softmax, value.mT))
    product = normalised((query @ key.mT / 24**0.5).softmax(-1) @ value)
    assert rank(ones) < 1.2 < 2 < rank(tokens) < 4
    assert rank(tokens + value) > 8
    assert 8 < rank(product) < 10


def test_residual_additions_are_modules_that_swap_finds():
    for model in (resnet20(), deit_tiny(10, **SMALL)):
        adds = [name for name, module in model.named_modules() if isinstance(module, QuantAdd)]
        _, report = swap(model, [Rule("|".join(adds), input=Recipe(QuantSpec.signed(8)))])
        assert {layer.path for layer in report.swapped} >= set(adds)
    assert sum(isinstance(module, QuantAdd) for module in resnet20().modules()) == 9


def test_transformers_refuse_sizes_that_do_not_fit():
    with pytest.raises(RangeError, match="heads=3 with width=16"):
        deit_tiny(10, **{**SMALL, "heads": 3})
    with pytest.raises(RangeError, match="patch_size=3 with image_size=8"):
        deit_tiny(10, **{**SMALL, "patch_size": 3})
    with pytest.raises(ShapeError, match="images of 12 x 8 pixels in a network for 8 x 8"):
        deit_tiny(10, **SMALL)(torch.randn(1, 3, 12, 8))


# --- training


@pytest.mark.parametrize("build", [lambda: resnet20(4), lambda: deit_tiny(4, **SMALL)])
def test_gradients_reach_every_parameter(build):
    torch.manual_seed(0)
    model = build()
    nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_a_small_adder_transformer_learns_separable_images():
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    patterns = torch.randn(4, 3, 8, 8)
    images = patterns[labels] + 0.3 * torch.randn(64, 3, 8, 8)
    model = deit_tiny(4, **SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    AdderLearningRate(optimizer, adder_weights(model))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Four classes start at ln 4 = 1.39; a network that learns nothing stays there.
    assert losses[-1] < 0.5, losses


@pytest.mark.compile
@pytest.mark.parametrize("build", [lambda: resnet20(4), lambda: deit_tiny(4, **SMALL)])
def test_networks_compile_as_one_graph_with_their_gradients(build):
    torch.manual_seed(0)
    model, images = build().eval(), torch.randn(2, 3, 8, 8)
    expected = model(images)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    # Decomposed norms round otherwise: float32 sums behind ten layers.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), list(model.parameters())), wanted, rtol=1e-3, atol=1e-3
    )


# --- the published network


def published(model, prefix="", suffix=".adder"):
    """The state of a network in the layout of the released one."""
    adders = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, AdderConv2d)}
    return {
        prefix + (key.removesuffix(".weight") + suffix if key in adders else key): tensor.clone()
        for key, tensor in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".adder", ".weight"])
@pytest.mark.parametrize("classes", [10, 100])
def test_the_published_layout_loads_with_and_without_its_prefix(prefix, suffix, classes):
    model = resnet20(classes)
    loaded = load_published_resnet20(published(model, prefix, suffix))
    assert not loaded.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_a_safetensors_file_loads(tmp_path):
    model = resnet20()
    save_file(published(model, "module."), tmp_path / "network.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_published_resnet20(tmp_path / "network.safetensors")(x), model.eval()(x))


def test_a_state_with_counters_loads():
    assert load_published_resnet20(resnet20().state_dict())


def test_wrong_keys_and_shapes_are_named_all_at_once():
    state = published(resnet20())
    del state["layer1.0.bn1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    state["bn1.bias"] = torch.full((16,), torch.nan)
    with pytest.raises(FormatError) as caught:
        load_published_resnet20(state)
    message = str(caught.value)
    assert "1 missing: layer1.0.bn1.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "1 misshapen: conv1.weight (16, 1, 3, 3) instead of (16, 3, 3, 3)" in message
    assert "1 not finite reals: bn1.bias (torch.float32)" in message


def test_the_keys_of_another_network_are_counted_not_all_listed():
    with pytest.raises(FormatError, match=r"missing: .* and \d+ more"):
        load_published_resnet20({"fc.weight": torch.zeros(10, 64, 1, 1)})
    with pytest.raises(FormatError, match="unexpected"):
        load_published_resnet20(resnet32().state_dict())
    with pytest.raises(FormatError, match="missing"):
        load_published_resnet20({})


def test_a_tensor_under_two_names_is_refused():
    state = published(resnet20())
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.adder"]
    with pytest.raises(FormatError, match=r"layer1\.0\.conv1\.weight twice"):
        load_published_resnet20(state)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "network.pth").write_bytes(b"PK\x03\x04 not safetensors")
    with pytest.raises(FormatError, match=r"network\.pth is no safetensors file"):
        load_published_resnet20(tmp_path / "network.pth")
    with pytest.raises(FileNotFoundError):
        load_published_resnet20(tmp_path / "missing.safetensors")


def data():
    root = os.environ.get("Q_DATA")
    if root is None:
        pytest.skip("set Q_DATA to the folder with cifar/ and networks/ to run on real images")
    pytest.importorskip("PIL", reason="the images are read with pillow")
    return pathlib.Path(root)


def cifar10_test(root, count):
    """The first test images, normalised as the released network was trained, and their labels."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    picture = np.asarray(image.open(root / "cifar" / "cifar10-test.webp").convert("RGB"))
    images = picture.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    assert digest == json.loads((root / "cifar" / "manifest.json").read_text())["cifar10-test"]["sha256_pixels"]
    labels = torch.from_numpy(np.load(root / "cifar" / "cifar10-test.labels.npy")[:count].astype("int64"))
    pixels = torch.from_numpy(np.ascontiguousarray(images[:count])).permute(0, 3, 1, 2) / 255
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([0.2023, 0.1994, 0.2010]).reshape(1, 3, 1, 1)
    return (pixels - mean) / deviation, labels


def test_the_released_network_classifies_real_images_as_published():
    """186 of the first 200; all 10,000 are the matter of the accuracy sessions (9,182)."""
    root = data()
    images, labels = cifar10_test(root, 200)
    model = load_published_resnet20(root / "networks" / "cifar10-adder-resnet20.safetensors")
    assert sum(p.numel() for p in model.parameters()) == 272_484
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    assert right == 186
