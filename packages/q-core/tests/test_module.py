"""Quantizer state follows device moves and widening, and refuses to be narrowed."""

import copy

import pytest
import torch
from torch import nn

from q_core import CodebookGrid, MSEObserver, Quantizer, QuantSpec, UniformGrid

EXACT = {"rtol": 0, "atol": 0}
CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
}


class Layer(nn.Module):
    """A float weight beside quantizer state, as in a quantized layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))
        self.learnable = Quantizer(
            UniformGrid(torch.full((1,), 0.1), torch.full((1,), 3.0), qmin=0, qmax=7, learnable=True)
        )
        self.table = Quantizer(CodebookGrid(torch.rand(1, 5).cumsum(1)))
        self.observer = MSEObserver(QuantSpec.signed(4), bins=16)


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_narrows_the_weight_and_keeps_the_quantizer(cast):
    layer = Layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    result = CASTS[cast](layer)
    assert result is layer
    assert layer.weight.element_size() == 2
    for name, tensor in layer.state_dict().items():
        if name != "weight":
            torch.testing.assert_close(tensor, before[name], **EXACT)


def test_a_learnable_scale_stays_the_same_parameter_through_a_cast():
    """An optimizer made before the cast must go on updating the very tensor."""
    layer = Layer()
    scale = layer.learnable.grid.scale
    layer.half()
    assert layer.learnable.grid.scale is scale
    assert isinstance(scale, nn.Parameter)
    assert scale.requires_grad


def test_widening_is_followed():
    layer = Layer().double()
    assert {tensor.dtype for tensor in layer.table.state_dict().values()} == {torch.float64}
    assert layer.half().table.grid.codebook.dtype == torch.float64


def test_device_moves_are_followed():
    layer = Layer().to("meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_device_moves_are_followed_together_with_a_narrowing():
    layer = Layer().to("meta", torch.float16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.learnable.grid.scale.dtype == torch.float32


def test_a_copy_is_independent():
    layer = Layer()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.learnable.grid.scale.mul_(2)
    torch.testing.assert_close(layer.learnable.grid.scale.detach(), torch.full((1,), 0.1), **EXACT)
    torch.testing.assert_close(twin.learnable.grid.scale.detach(), torch.full((1,), 0.2), **EXACT)
