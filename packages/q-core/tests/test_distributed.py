"""Two processes that share the batches make what one process makes of all of them."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import distributed

from .networks import OBSERVERS, assert_bit_equal

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks wrote; both run once for all the tests."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = pathlib.Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", str(worker), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    # Written by the worker a moment ago: our own file, and the restricted reader does not know the reports in it.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_rank_gets_the_same_quantizers(ranks: list[dict[str, Any]], observer: str) -> None:
    assert_bit_equal(ranks[1]["together"][observer][0], ranks[0]["together"][observer][0])


@pytest.mark.parametrize("observer", sorted(OBSERVERS.keys() - {"average"}))
def test_two_ranks_are_bit_equal_to_one(ranks: list[dict[str, Any]], observer: str) -> None:
    alone, report = ranks[0]["alone"][observer]
    for result in ("together", "uneven"):
        state, merged = ranks[0][result][observer]
        assert_bit_equal(state, alone)
        assert merged == report  # batches of all ranks, the same dead channels


def test_a_moving_average_over_two_ranks_is_that_of_one_to_a_rounding(ranks: list[dict[str, Any]]) -> None:
    alone, report = ranks[0]["alone"]["average"]
    together, merged = ranks[0]["together"]["average"]
    assert merged == report
    for name, tensor in alone.items():
        # The two orders of adding six numbers in float64 differ by 1e-15. Ends of ranges are then rounded to float32,
        # and so are their difference and its quotient: three roundings that may each fall to the other side.
        tolerance = 3 * 2**-23 if name.endswith("scale") else 0
        torch.testing.assert_close(together[name], tensor, rtol=tolerance, atol=0)


def test_batches_count_over_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [result["together"]["minmax"][1].batches for result in ranks] == [6, 6]
    assert [result["skipped"].batches for result in ranks] == [3, 3]
    assert [result["skipped"].skipped for result in ranks] == [(), (1,)]


@pytest.mark.parametrize(
    ("fault", "on_rank_0", "on_rank_1"),
    [
        ("nan on rank 1", "StateError: calibration failed on another rank", "DataError: batch 1 has 1 non-finite of"),
        (
            "nothing on rank 1",
            "StateError: calibration failed on another rank",
            "DataError: the calibration data holds no",
        ),
        ("uneven moving average", "StateError: ranks saw 2 to 3 batches", "StateError: ranks saw 2 to 3 batches"),
        ("negative", "RangeError: range -", "RangeError: range -"),
    ],
)
def test_when_one_rank_fails_no_rank_waits(
    ranks: list[dict[str, Any]], fault: str, on_rank_0: str, on_rank_1: str
) -> None:
    found = [result["failures"][fault] for result in ranks]
    assert found[0]["error"].startswith(on_rank_0)
    assert found[1]["error"].startswith(on_rank_1)
    for failure in found:
        assert failure["same"]  # the model is what it was before
        assert failure["seconds"] < 15  # half of the timeout at which a rank would stop waiting
