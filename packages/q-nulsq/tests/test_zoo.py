"""Networks of different kinds train at 2 bits: residual, inverted residual, transformers, modern convolutions."""

import pytest
import torch
from torch import Tensor, nn

from q_core import Quantizer, pack
from q_core.layers import slots
from q_nulsq import StepGrid, nulsq_wa
from q_nulsq.optim import parameter_groups, project_after

TORCHVISION = ["resnet18", "resnet34", "mobilenet_v2", "convnext_tiny", "swin_t"]
OWN = ["preresnet20", "preresnet56", "preresnet18", "preresnet34"]
# The small ones run everywhere.
NETWORKS = [*OWN[:2], *(pytest.param(name, marks=pytest.mark.zoo) for name in (*OWN[2:], *TORCHVISION))]
SIDE, STEPS = 64, 3


def network(name: str) -> nn.Module:
    """A network with random weights, whose batch norms have seen images."""
    torch.manual_seed(0)
    if name in OWN:
        kind = "cifar" if name in ("preresnet20", "preresnet56") else "preresnet"
        module = pytest.importorskip(f"models.{kind}", reason="needs the repository's benchmarks")
        model = getattr(module, name)()
    else:
        models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
        model = models.get_model(name, weights=None)
    if name == "swin_t":
        swin = pytest.importorskip("models.swin", reason="needs the repository's benchmarks")
        model = swin.with_called_projections(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of everything seen
    with torch.no_grad():
        model.train()(images())
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def see_negative(model: nn.Module) -> dict[str, bool]:
    """Whether the input of each convolution and linear layer has negative values, by path."""
    found: dict[str, bool] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: found.update({path: bool((args[0] < 0).any())}))
    with torch.no_grad():
        model(images())
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_at_2_bits(name: str) -> None:
    model, x = network(name), images()
    result = nulsq_wa(model, [x], weight_bits=2, activation_bits=2, progress=False)
    signed = see_negative(model)
    # Nothing with a weight is left out but norms, tables and scales of layers.
    kept = {layer.path for layer in result.swap.stays_float if layer.kind in ("Conv2d", "Linear")}
    assert not kept
    assert {layer.path for layer in result.swap.swapped} == set(signed)
    steps = {}
    for path, parent in result.model.named_modules():
        for slot, child, parameter in slots(parent):
            assert isinstance(child, Quantizer), f"{path}.{slot}"
            if parameter is None and isinstance(child.grid, StepGrid):
                assert (child.grid.qmin < 0) == signed[path], path
            if isinstance(child.grid, StepGrid):
                assert child.grid.bits == 2
                steps[f"{path}.{slot}"] = child.grid.steps
    assert len(steps) == 2 * len(signed) - 4  # the first and the last layer have steps that are equal
    before = {path: parameter.detach().clone() for path, parameter in steps.items()}

    weights, norms, learned = parameter_groups(result.model, lr=1e-3, weight_decay=1e-4, step_lr=1e-3)
    optimizers = torch.optim.SGD([weights, norms], momentum=0.9), torch.optim.AdamW([learned])
    project_after(optimizers[1], result.model)
    result.model.train()
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(result.model(x), torch.tensor([1, 2]))
        assert loss.isfinite()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for path, parameter in steps.items():
        assert parameter.isfinite().all(), path
        assert (parameter > 0).all(), path
        assert not torch.equal(parameter, before[path]), path
    result.model.eval()
    with torch.no_grad():
        expected = result.model(x)
        assert expected.isfinite().all()
        # The same operations on the same values: equal bit for bit.
        torch.testing.assert_close(pack(result.model)(x), expected, rtol=0, atol=0)


@pytest.mark.zoo
def test_an_inverted_residual_block_has_signed_inputs_where_no_rectifier_has_cut() -> None:
    result = nulsq_wa(network("mobilenet_v2"), [images()], weight_bits=2, activation_bits=2, progress=False)
    grids = {
        layer: result.model.get_submodule(f"features.3.conv.{layer}").input_quantizer.grid
        for layer in ("0.0", "1.0", "2")
    }
    # What comes in is the output of a linear bottleneck; the other two follow a ReLU6.
    assert [grid.qmin < 0 for grid in grids.values()] == [True, False, False]


@pytest.mark.zoo
def test_torchvisions_swin_does_not_call_its_projections_and_the_report_says_so() -> None:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
    torch.manual_seed(0)
    model = models.get_model("swin_t", weights=None).eval()
    result = nulsq_wa(model, [images()], weight_bits=2, activation_bits=2, progress=False)
    kept = {layer.path: layer.reason for layer in result.swap.stays_float if layer.kind == "Linear"}
    assert len(kept) == 2 * 12  # two for each block
    assert all(path.endswith(("attn.qkv", "attn.proj")) for path in kept)
    assert set(kept.values()) == {"the first batch does not call it"}


@pytest.mark.zoo
@pytest.mark.parametrize("side", [64, 96, 224])
def test_swin_with_called_projections_computes_the_same(side: int) -> None:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision with its compiled operators")
    swin = pytest.importorskip("models.swin", reason="needs the repository's benchmarks")
    torch.manual_seed(0)
    model = models.get_model("swin_t", weights=None).eval()
    twin = swin.with_called_projections(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert sum(type(module) is swin.WindowAttention for module in twin.modules()) == 12
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected = model(x)
        # Sums of up to 3072 float32 products in 12 blocks, whose order may differ: 12 * sqrt(3072) * 2**-24 = 4e-5 of
        # outputs of about 1 at worst, and much less for terms of both signs.
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-5)
        assert not torch.equal(twin(x), twin(x.flip(-1)))


@pytest.mark.zoo
@pytest.mark.parametrize("size", [(14, 14), (9, 20), (5, 16), (7, 7)])
@pytest.mark.parametrize("shift", [(0, 0), (3, 3), (3, 0)])
def test_an_attention_in_windows_computes_the_same(size: tuple[int, int], shift: tuple[int, int]) -> None:
    torchvision = pytest.importorskip(
        "torchvision.models.swin_transformer", reason="needs torchvision with its compiled operators"
    )
    swin = pytest.importorskip("models.swin", reason="needs the repository's benchmarks")
    attention = torchvision.ShiftedWindowAttention(12, [7, 7], list(shift), 3, attention_dropout=0.3, dropout=0.2)
    nn.init.normal_(attention.relative_position_bias_table)
    attention.double()
    twin = swin.WindowAttention(attention)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    for module in (attention.eval(), twin.eval()):
        module.eval()
    with torch.no_grad():
        # Sums of at most 49 float64 terms of about 1 in another order: 49 * 2**-53 = 5e-15.
        torch.testing.assert_close(twin(x), attention(x), rtol=0, atol=1e-13)
    twin.train()
    assert not torch.equal(twin(x), twin(x))  # dropout
