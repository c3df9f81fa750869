"""Our side of the calibration benchmark: a worker of `run.py`.

Cases: `float`, a pass of the float network; `w8a8` and `w4a4`, `swap` and `calibrate` with the rules of `nearest`,
that is, MSE observers with 100 candidates, weights per channel, inputs per tensor, first and last layer in 8 bits;
`weights`, the part of the latter that does not depend on the number of images.
"""

from functools import partial

import torch
from job import Job, seconds, serve
from torch import nn

from q_core import MSEObserver, PerChannel, QuantSpec, Recipe, calibrate, swap
from q_core.layers import slots
from q_core.methods import edge_rules


def swapped(model: nn.Module, bits: int) -> nn.Module:
    """The network with observers in its slots, as `nearest` puts them."""
    rules = edge_rules(
        model,
        weight=lambda b: Recipe(QuantSpec.signed(b, granularity=PerChannel(0)), observer=MSEObserver),
        input=lambda b: Recipe(QuantSpec.unsigned(b), observer=MSEObserver),
        bits=(bits, bits, 8),
    )
    return swap(model, rules)[0]


def main() -> None:
    job = Job()

    def calibration(bits: int, count: int) -> dict[str, float]:
        return {
            "seconds": seconds(lambda: calibrate(swapped(job.float, bits), job.first(count), progress=False)),
        }

    def weights(count: int) -> dict[str, float]:
        model = swapped(job.float, 4)
        found = [
            (child, parameter)
            for module in model.modules()
            for _, child, parameter in slots(module)
            if isinstance(child, MSEObserver) and parameter is not None
        ]
        with torch.no_grad():
            return {"seconds": seconds(lambda: [(observer(weight), observer.grid()) for observer, weight in found])}

    serve(
        {
            "float": job.float_pass,
            "w8a8": partial(calibration, 8),
            "w4a4": partial(calibration, 4),
            "weights": weights,
        },
        {},
    )


if __name__ == "__main__":
    main()
