"""Run by `test_distributed.py` in two processes: calibrate alone, then together, and write what came out."""

import datetime
import pathlib
import sys
import time

import torch
from torch import Tensor, distributed

import q_core
from networks import OBSERVERS, everything, exact_convolutions, exact_images, recipes

BATCHES = 6


def batches() -> list[Tensor]:
    return [exact_images(2) * (1 + index) / 7 for index in range(BATCHES)]


def calibrated(observer: str, share: list[Tensor]) -> tuple[dict[str, Tensor], q_core.CalibrationReport]:
    torch.manual_seed(1)
    twin, _ = q_core.swap(exact_convolutions(), everything(4, 4, OBSERVERS[observer]))
    report = q_core.calibrate(twin, share)
    return twin.state_dict(), report


def failure(share: list[Tensor] | None, observer: str = "minmax", rules: object = None) -> dict[str, object]:
    """Calibrate with what must fail, and say how it failed and in what state it left the model."""
    torch.manual_seed(1)
    twin, _ = q_core.swap(exact_convolutions(), rules or everything(4, 4, OBSERVERS[observer]))
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    start = time.monotonic()
    try:
        q_core.calibrate(twin, [] if share is None else share)
    except q_core.QuantizationError as error:
        same = all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())
        return {"error": f"{type(error).__name__}: {error}", "same": same, "seconds": time.monotonic() - start}
    return {"error": "", "same": False, "seconds": time.monotonic() - start}


def main(rank: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = batches()
    alone = {name: calibrated(name, data) for name in OBSERVERS} if rank == 0 else {}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    mine = data[rank::2]
    together = {name: calibrated(name, mine) for name in OBSERVERS}
    # Ranges and histograms do not ask which rank saw what, nor how often.
    uneven = {name: calibrated(name, data[:5] if rank == 0 else data[5:]) for name in OBSERVERS if name != "average"}
    bad = mine[1].clone()
    bad[0, 0, 0, 0] = float("nan")
    unsigned = q_core.Recipe(q_core.QuantSpec.unsigned(4, symmetric=True))
    failures = {
        "nan on rank 1": failure([mine[0], bad if rank == 1 else mine[1]]),
        "nothing on rank 1": failure(None if rank == 1 else mine),
        "uneven moving average": failure(mine[: 3 - rank], "average"),
        "negative": failure(
            [-data[rank].abs()],
            rules=[q_core.Rule("0", input=unsigned), q_core.Rule("2", *recipes())],
        ),
    }
    torch.manual_seed(1)
    skipping, _ = q_core.swap(exact_convolutions(), everything())
    skipped = q_core.calibrate(skipping, [mine[0], bad if rank == 1 else mine[1]], on_nonfinite="skip")
    distributed.destroy_process_group()
    result = {"alone": alone, "together": together, "uneven": uneven, "failures": failures, "skipped": skipped}
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
