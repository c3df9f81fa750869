"""The operators compute the same in any cut into panels, and never build the cube."""

import itertools
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from q_adder import ops
from q_core.kernels import only

ARGUMENTS = ([2, 1], [1, 2], 2)


def test_panels_that_cut_the_rows_change_nothing(monkeypatch):
    x, weight = torch.randn(2, 4, 9, 6), torch.randn(4, 2, 3, 2)
    grad = torch.randn_like(ops.distance_conv2d(x, weight, *ARGUMENTS, 1.0))

    def results():
        with only("reference"):
            return [
                ops.DISTANCE(x, weight, *ARGUMENTS, 1.0),
                ops.INPUT_GRAD(grad, x, weight, *ARGUMENTS, 1.0),
                ops.distance_conv2d_weight_grad(grad, x, weight, *ARGUMENTS, 1.5),
            ]

    whole = results()
    for panel in (1, 200):
        monkeypatch.setattr(ops, "_PANEL", panel)
        # Sums of at most 80 float32 terms below 10 in another order: 80 roundings of sums below 100.
        torch.testing.assert_close(results(), whole, rtol=0, atol=80 * 100 * 2**-24)


# Memory ----------------------------------------------------------------------------------------------------------


def peak_and_largest(function, path) -> tuple[int, int]:
    """Bytes that `function` holds at its peak beyond those before it, and those of its largest tensor."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes)), max(changes)


@pytest.mark.parametrize(
    ("outputs", "size", "batch", "exponent"), [(32, 24, 2, 1.0), (64, 48, 3, 1.0), (32, 24, 2, 1.5)]
)
def test_memory_is_that_of_inputs_outputs_and_a_panel(outputs, size, batch, exponent, monkeypatch, tmp_path):
    """The cube of the second case is 64 x 144 x 6912 x 4 bytes = 255 MB, forward and again backward.

    torch's weight gradient of a convolution unfolds its whole input for one image on one thread, and in float64, which
    adds a tensor of taps x input; so these cases are not looked at.
    """
    panel = 1 << 14  # elements: four rows of the second case
    monkeypatch.setattr(ops, "_PANEL", panel)
    x = torch.randn(batch, 16, size + 2, size + 2, requires_grad=True)
    weight = torch.randn(outputs, 16, 3, 3, requires_grad=True)
    grad = torch.randn(batch, outputs, size, size)

    def step():
        with only("reference"):
            torch.autograd.grad(ops.distance_conv2d(x, weight, [1, 1], [1, 1], 1, exponent), (x, weight), grad)

    step()  # what is loaded and kept by the first call is not part of the step
    peak, largest = peak_and_largest(step, tmp_path / "trace.json")
    inputs, results, kernels = (4 * tensor.numel() for tensor in (x, grad, weight))
    row = 4 * 16 * 9 * size
    assert largest <= max(inputs, results, kernels, 4 * panel, row)
    # The result and the gradient to the input; of the weight's gradient the padding to blocks of channels that a
    # convolution does; a panel with its difference, slope, sum and the distances of as many positions.
    assert peak <= 2 * inputs + 2 * results + 4 * kernels + 8 * max(4 * panel, row)
