"""Two processes that share a batch make the steps that one process makes on all of it."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, distributed

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What each of two ranks wrote; both run once for all the tests."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = pathlib.Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
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
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


# Sums of the same few hundred float64 terms in another order, on weights below 10, over three steps.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("way", ["together", "accumulated"])
def test_two_ranks_make_the_steps_of_one_process(ranks: list[dict[str, list[Tensor]]], way: str) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank[way], ranks[0]["alone"], **CLOSE)


@pytest.mark.parametrize("way", ["together", "accumulated"])
def test_ranks_stay_equal(ranks: list[dict[str, list[Tensor]]], way: str) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ranks[0][way], ranks[1][way], strict=True))


def test_the_rule_makes_a_difference(ranks: list[dict[str, list[Tensor]]]) -> None:
    """So that the tests above compare what they say they do."""
    for index in (1, 2):  # the adder weights
        assert float((ranks[0]["alone"][index] - ranks[0]["without"][index]).abs().max()) > 1e-3
