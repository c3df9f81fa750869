"""Brevitas' side of the calibration benchmark: a worker of `run.py`, in an environment of its own.

`layerwise_quantize` puts quantizers on the weight and the input of each layer, which are the slots that we fill. The
weights have `Int8WeightPerChannelFloatMSE`, a search over 20 candidates. Inputs, with a zero point, have either
`ShiftedUint8ActPerTensorFloatMSE`, which searches 20 scales and 20 zero points for each batch and averages (`w8a8`,
`w4a4`), or `ShiftedUint8ActPerTensorFloat`, percentiles (`w8a8-percentile`). Bits are set by `let`, 8 in the first and
the last layer. Timed are the calibration pass under `calibration_mode` and one forward of one image after it, in
which the scales of the weights are searched; building the quantized network is not timed.
"""

import pathlib
import sys
from functools import partial
from importlib import metadata

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.inject import value
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat, ShiftedUint8ActPerTensorFloatMSE
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from job import Job, seconds, serve


def quantized(model: nn.Module, bits: int, activation: type) -> nn.Module:
    """The network with Brevitas' quantizers."""

    @value
    def bit_width(module: nn.Module) -> int:
        edge = isinstance(module, nn.Linear) or module.in_channels == 3
        return 8 if edge else bits

    options = {
        "weight_quant": Int8WeightPerChannelFloatMSE.let(bit_width=bit_width, narrow_range=False),
        "input_quant": activation.let(bit_width=bit_width),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    table = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    return layerwise_quantize(model, compute_layer_map=table).eval()


def main() -> None:
    job = Job()

    def calibration(bits: int, activation: type, count: int) -> dict[str, float]:
        model = quantized(job.model(), bits, activation)
        batches = job.first(count)

        def work() -> None:
            with calibration_mode(model):
                for batch in batches:
                    model(batch)
            model(batches[0][:1])

        with torch.no_grad():
            return {"seconds": seconds(work)}

    serve(
        {
            "float": job.float_pass,
            "w8a8": partial(calibration, 8, ShiftedUint8ActPerTensorFloatMSE),
            "w4a4": partial(calibration, 4, ShiftedUint8ActPerTensorFloatMSE),
            "w8a8-percentile": partial(calibration, 8, ShiftedUint8ActPerTensorFloat),
        },
        {"brevitas": metadata.version("brevitas")},
    )


if __name__ == "__main__":
    main()
