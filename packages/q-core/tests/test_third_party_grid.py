"""A grid written as a user would, in thirty lines and against the public names only, works everywhere."""

import inspect

import pytest
import torch
from torch import nn

import q_core
from q_core import Grid, PerChannel, PerGroup, QuantSpec, Recipe, Rule
from q_core.functional import broadcast_scale
from q_core.testing import check_grid

EXACT = {"rtol": 0, "atol": 0}


class PowersOfTwo(Grid):
    """Zero and plus or minus `scale / 2**k`: multiplying by a level is a shift."""

    def __init__(self, scale, bits):
        super().__init__()
        self.qmax = 2 ** (bits - 1) - 1
        self.qmin = -self.qmax
        self.register_buffer("scale", scale)

    @classmethod
    def from_range(cls, spec, low, high):
        largest = torch.maximum(high, -low)
        return cls(torch.where(largest > 0, largest, 1), spec.bits)

    @property
    def tile_shape(self):
        return tuple(self.scale.shape)

    def quantize(self, x, rounding):
        size = (x / broadcast_scale(self.scale, x.shape)).abs().clamp(max=1) * 2 ** (self.qmax - 1)
        cell = size.clamp(min=1).log2().floor()
        return rounding(torch.where(size < 1, size, cell + size / 2**cell).copysign(x))

    def dequantize(self, codes):
        return codes.sign() * torch.exp2(codes.abs() - self.qmax) * broadcast_scale(self.scale, codes.shape)

    def fake_quantize(self, x, rounding):
        scale = broadcast_scale(self.scale, x.shape)
        return q_core.straight_through(super().fake_quantize(x, rounding), x.clamp(-scale, scale))


class Network(nn.Module):
    """Two convolutions with a residual, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.add = q_core.QuantAdd()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(self.add(x, self.second(x)).relu().mean((2, 3)))


def test_the_grid_is_thirty_lines():
    assert sum(bool(line.strip()) for line in inspect.getsource(PowersOfTwo).splitlines()) <= 30


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1, 1), (5, 1), (3, 7), (1, 3, 1, 1)])
def test_it_obeys_the_laws(bits, shape):
    check_grid(PowersOfTwo(torch.rand(shape) + 0.1, bits))


def test_it_holds_the_levels_it_promises():
    levels = PowersOfTwo(torch.ones(1), 3).levels()
    torch.testing.assert_close(levels, torch.tensor([[-1, -0.5, -0.25, 0, 0.25, 0.5, 1]]), **EXACT)


@pytest.mark.parametrize("granularity", [q_core.PerTensor(), PerChannel(0), PerGroup(3)], ids=repr)
@pytest.mark.parametrize("observer", [q_core.MinMaxObserver, q_core.MSEObserver])
def test_it_is_swapped_in_calibrated_packed_saved_and_loaded(granularity, observer, tmp_path):
    model, batches, x = Network().eval(), [torch.randn(4, 3, 9, 7) for _ in range(3)], torch.randn(5, 3, 9, 7)
    spec = QuantSpec.signed(4, granularity=granularity)
    weight = Recipe(spec, observer=observer, grid=PowersOfTwo.from_range)
    activation = Recipe(QuantSpec.signed(4), observer=observer, grid=PowersOfTwo.from_range)
    quantized, report = q_core.swap(model, [Rule(".*", weight=weight, input=activation)])
    assert [layer.path for layer in report.swapped] == ["first", "second", "add", "head"]
    q_core.calibrate(quantized, batches, progress=False)
    assert isinstance(quantized.first.weight_quantizer.grid, PowersOfTwo)
    assert isinstance(quantized.add.left_quantizer.grid, PowersOfTwo)

    logits = quantized(x).detach()
    assert (logits != model(x)).any()
    packed = q_core.pack(quantized)
    assert isinstance(packed.first.packed_weight.grid, q_core.CodebookGrid)
    assert isinstance(packed.add.left_quantizer.grid, q_core.CodebookGrid)
    torch.testing.assert_close(packed(x).detach(), logits, **EXACT)

    loaded = q_core.load_packed(q_core.save_packed(packed, tmp_path / "model.safetensors"), Network())
    torch.testing.assert_close(loaded(x).detach(), logits, **EXACT)


def test_it_is_trained_through():
    model = Network()
    recipe = Recipe(QuantSpec.signed(4), grid=PowersOfTwo.from_range)
    quantized, _ = q_core.swap(model, [Rule(".*", weight=recipe, input=recipe)])
    q_core.calibrate(quantized, [torch.randn(4, 3, 9, 7)], progress=False)
    quantized(torch.randn(5, 3, 9, 7)).sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in quantized.parameters())
    assert bool(quantized.first.weight.grad.any())
