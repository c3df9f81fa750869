"""The cost of quantizers in the forward pass: a worker of `run.py`.

Cases: one forward of one batch without gradients, of the float network (`float`) and of the calibrated W4A4 network
(`quantized`), each eager and compiled with `torch.compile(fullgraph=True)`, whose default backend is inductor. The
quantizers are in place: weights are quantized anew in every forward.
"""

from collections.abc import Callable

import torch
from calibrate import swapped
from job import BATCH, Job, seconds, serve
from torch import nn

from q_core import calibrate


def main() -> None:
    job = Job()
    batch = job.batches[0]
    quantized = swapped(job.float, 4)
    calibrate(quantized, job.first(BATCH), progress=False)
    models: dict[str, nn.Module] = {
        "float": job.float,
        "quantized": quantized,
        "float-compiled": torch.compile(job.float, fullgraph=True),
        "quantized-compiled": torch.compile(quantized, fullgraph=True),
    }

    def forward(model: nn.Module) -> Callable[[int], dict[str, float]]:
        def case(_: int) -> dict[str, float]:
            with torch.no_grad():
                return {"seconds": seconds(lambda: model(batch))}

        return case

    serve({name: forward(model) for name, model in models.items()}, {})


if __name__ == "__main__":
    main()
