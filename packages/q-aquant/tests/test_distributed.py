"""Two processes that share a batch learn what one process learns from all of it, and end with equal models."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, distributed

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
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
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


# Gradients are sums of at most 1e4 float64 terms below 1, in another order: 1e4 * 1e-16 = 1e-12. Adam divides them by
# their size, here 1e-4 and more, so that a step of 0.1 is off by 0.1 * 1e-12 / 1e-4 = 1e-9; eight steps are taken in
# each of four units, the later ones fed by the earlier. Decisions on weights are booleans and must be equal.
CLOSE = {"rtol": 0, "atol": 1e-7}
PLANS = ["qdrop", "aquant", "dropped"]


@pytest.mark.parametrize("name", PLANS)
def test_two_ranks_learn_what_one_process_learns(ranks: list[Found], name: str) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank[name], ranks[0][f"{name} alone"], **CLOSE)


@pytest.mark.parametrize("name", [*PLANS, "alias qdrop", "alias aquant", "alias brecq"])
def test_ranks_end_with_equal_models(ranks: list[Found], name: str) -> None:
    torch.testing.assert_close(ranks[0][name], ranks[1][name], rtol=0, atol=0)


def test_ranks_go_on_from_the_journal_that_both_wrote(ranks: list[Found]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["resumed alias qdrop"], rank["alias qdrop"], rtol=0, atol=0)


@pytest.mark.parametrize("name", PLANS)
def test_the_batch_makes_a_difference(ranks: list[Found], name: str) -> None:
    """So that the tests above compare what they say they do: blocks have learned, from the whole batch."""
    alone, less = ranks[0][f"{name} alone"], ranks[0][f"{name} with less"]
    assert (alone["outcomes"][1:3, 2] > 0).any()
    decisions = [key for key in alone if key.endswith("rounding.up") and "block" in key]
    assert any(not torch.equal(alone[key], less[key]) for key in decisions if key in less)
