"""torchao's side of the calibration benchmark: a worker of `run.py`, in an environment of its own.

The PT2E flow with `X86InductorQuantizer` and its default configuration: 8 bits, histogram observers of 2,048 bins on
activations, min-max per channel on weights (which is less work than our search). Timed are the pass over the images
and `convert_pt2e`, in which the ranges are searched; `torch.export` and `prepare_pt2e` are not timed. The export is
strict, because the quantizer refuses modules that are called twice, as ResNet's ReLU, in a non-strict one.
"""

import pathlib
import sys
from importlib import metadata

import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from job import Job, seconds, serve


def prepared(job: Job) -> nn.Module:
    """The exported network with torchao's observers."""
    graph = torch.export.export(job.model(), (job.batches[0],), strict=True).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    return prepare_pt2e(graph, quantizer)


def main() -> None:
    job = Job()

    def calibration(count: int) -> dict[str, float]:
        model = prepared(job)
        batches = job.first(count)

        def work() -> None:
            for batch in batches:
                model(batch)
            convert_pt2e(model)

        with torch.no_grad():
            return {"seconds": seconds(work)}

    serve({"float": job.float_pass, "w8a8": calibration}, {"torchao": metadata.version("torchao")})


if __name__ == "__main__":
    main()
