"""Dropping quantization at random inside layers that quantize patches."""

import torch

from q_aquant import LearnedBorder, PatchConv2d
from q_aquant.drop import Draws, RandomDrop
from q_core import Quantizer, UniformGrid


def dropping(generator: torch.Generator) -> PatchConv2d:
    layer = PatchConv2d(2, 3, 3, padding=1, bias=False).double()
    border = LearnedBorder.nearest((2, 9, 1), low=0.0, high=3.0)
    quantizer = Quantizer(UniformGrid(torch.tensor([0.3]), qmin=0, qmax=3), border).double()
    layer.patch_quantizer = RandomDrop(quantizer, 0.5, Draws(generator))
    return layer


def test_the_backward_pass_has_the_masks_of_the_forward_pass() -> None:
    layer, x = dropping(torch.Generator().manual_seed(0)), torch.rand(4, 2, 5, 5, dtype=torch.float64)
    total = layer(x).sum()
    (gradient,) = torch.autograd.grad(total, layer.weight)
    # The sum is linear in the weight, so the gradient gives it back: 54 products of sums of 100 float64 terms below 1.
    torch.testing.assert_close((gradient * layer.weight).sum(), total, rtol=0, atol=1e-12)


def test_images_are_dropped_as_in_one_batch_however_many_fit_at_once(monkeypatch) -> None:
    x = torch.rand(4, 2, 5, 5, dtype=torch.float64)
    generator = torch.Generator()
    layer = dropping(generator)
    outputs = []
    for panel in (1 << 18, 1):
        monkeypatch.setattr("q_aquant.layers._PANEL", panel)
        generator.manual_seed(0)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
