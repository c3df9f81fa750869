"""Run by `test_recipes.py` in two processes: prepare alone, then together, and write what came out."""

import datetime
import pathlib
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

import q_core
from networks import RECIPES, images, network
from q_nulsq.batches import LargestBatch, MeanOfBatches, PercentileOfBatches
from q_nulsq.calibration import LloydMaxObserver, LsqObserver, NormalizedMSEObserver, NormalLloydMaxObserver
from q_nulsq.grid import StepGrid
from q_nulsq.preparation import Part

OVERS = {"mean": MeanOfBatches(), "largest": LargestBatch(), "percentile": PercentileOfBatches(0.6)}
PARTS = {
    f"{kind.__name__} {name}": Part(StepGrid.from_range, partial(kind, over=over))
    for kind in (LsqObserver, NormalizedMSEObserver, NormalLloydMaxObserver)
    for name, over in OVERS.items()
} | {"LloydMaxObserver": Part(StepGrid.from_range, LloydMaxObserver)}


def prepared(share: list[Tensor]) -> dict[str, dict[str, Any]]:
    options: dict[str, Any] = {"weight_bits": 3, "activation_bits": 2, "progress": False}
    made = {name: recipe(network(), share, **options) for name, recipe in RECIPES.items()}
    made |= {name: RECIPES["nulsq_wa"](network(), share, activation=part, **options) for name, part in PARTS.items()}
    return {name: result.model.state_dict() for name, result in made.items()}


def failure(share: list[Tensor]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        RECIPES["nulsq_a"](network(), share, progress=False)
    except q_core.QuantizationError as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
    return {"error": "", "seconds": time.monotonic() - start}


def main(rank: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    data = images(5)
    alone = prepared(data) if rank == 0 else {}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    together = prepared(data[rank::2])  # three batches and two
    # The rank that gets no negative input in its first batch must not take another grid than the one that does.
    signs = prepared([each if rank else each.abs() for each in data[:2]])
    failed = failure([] if rank else data)
    distributed.destroy_process_group()
    torch.save({"alone": alone, "together": together, "signs": signs, "failed": failed}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
