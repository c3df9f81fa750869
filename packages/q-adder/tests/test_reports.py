"""What the tools of q_core tell of quantized adder layers."""

import pytest
import torch
from torch import nn

from q_adder import AdderConv2d, AdderLinear, OneSided, Published, redistribute
from q_core import pack
from q_core.analysis import compare, distributions


def network():
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*stem, AdderConv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), AdderLinear(96, 3)).eval()


@pytest.fixture(scope="module")
def made():
    model, batch = network(), torch.randn(16, 1, 8, 8)
    return model, batch, redistribute(model, [batch], weight_bits=4, activation_bits=4, progress=False).model


def test_errors_are_those_of_adder_layers_quantized_or_packed(made):
    model, batch, quantized = made
    for form in (quantized, pack(quantized)):
        errors = compare(model, form, batch)
        assert [error.path for error in errors] == ["3", "6"]
        # Four bits on noise: neither exact nor hopeless. The first layer has the input of the float network.
        assert all(5 < error.local < 60 for error in errors)
        assert errors[0].local == errors[0].accumulated


def test_inputs_and_clamped_weights_share_their_levels(made):
    _, batch, quantized = made
    found = {(entry.path, entry.tensor): entry for entry in distributions(quantized, batch)}
    assert list(found) == [(path, tensor) for path in ("3", "6") for tensor in ("input", "clamped weight")]
    for path, layer in (("3", quantized[3]), ("6", quantized[6])):
        inputs, weights = found[path, "input"], found[path, "clamped weight"]
        assert torch.equal(inputs.levels, weights.levels)
        assert len(inputs.levels) == 16
        assert int(weights.counts.sum()) == layer.weight.numel()
        assert weights.clipped == 0
        low, high = (end.double() for end in layer.tied.range())
        torch.testing.assert_close(inputs.levels[[0, -1]], torch.cat([low, high]))
    assert int(found["3", "input"].counts.sum()) == 16 * 4 * 6 * 6


def test_every_group_of_kernels_has_levels_of_its_own():
    model, batch = network(), torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        model[3].weight[:3] *= 0.01  # small kernels, so that the range of the inputs does not decide every group
    schemes = {"3": Published(groups=2)}
    quantized = redistribute(model, [batch], weight_bits=3, activation_bits=3, scheme=schemes, progress=False).model
    found = {entry.tensor: entry for entry in distributions(quantized, batch) if entry.path == "3"}
    groups = quantized[3].tied.groups
    assert groups == 2
    assert list(found) == [f"{what} of group {g}" for g in range(2) for what in ("input", "clamped weight")]
    for group, (scale, size) in enumerate(zip(quantized[3].tied.scale, quantized[3].tied.sizes, strict=True)):
        weights = found[f"clamped weight of group {group}"]
        assert int(weights.counts.sum()) == size * 36
        # Weights lie on every other level, from -4 to 3 of them.
        torch.testing.assert_close(weights.levels, 2 * scale.double() * torch.arange(-4, 4))
        assert float(found[f"input of group {group}"].levels[0]) == 0


def test_a_layer_that_runs_twice_shows_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = AdderLinear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    model, batch = Twice().eval(), torch.rand(5, 4)
    quantized = redistribute(model, [batch], scheme=OneSided(), progress=False).model
    counts = {entry.tensor: int(entry.counts.sum()) for entry in distributions(quantized, batch)}
    assert counts == {"input": 40, "clamped weight": 16}
