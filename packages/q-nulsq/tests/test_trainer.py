"""The trainer of the accuracy sessions: killed and gone on, on two processes, on bad settings and bad numbers."""

import csv
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from q_core.errors import FormatError, QuantizationError

from . import trainer
from .trainer import BATCH, DISTILLED, KILLED, LOWERED, PLAIN, SAVED, STEPS, outcome, run

pytestmark = pytest.mark.skipif(
    not trainer.SCRIPT.exists(), reason="the trainer is in the repository's benchmarks, not in the package"
)

SAME = {"rtol": 0, "atol": 0}
COLUMNS = [
    "step",
    "loss",
    "lr",
    "step_lr",
    "held_out_percent",
    "collapsed_steps",
    "dead_levels",
    "largest_overflow",
]


def start(*arguments: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, trainer.__file__, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(folder: pathlib.Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def snapshot_in(folder: pathlib.Path) -> pathlib.Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder for each run that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    process = start("killed", folder)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("case", KILLED)
def test_a_run_that_is_killed_and_goes_on_ends_bit_for_bit_as_one_that_is_not(
    case: str, killed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    name, step = KILLED[case]
    kept, folder = step // SAVED * SAVED, killed / case
    if kept:
        assert [int(line["step"]) for line in lines(folder)] == list(range(SAVED, kept + 1, SAVED))
    uninterrupted = run(name, tmp_path)
    uninterrupted.train()
    torch.manual_seed(77)  # whatever happened to random numbers since
    assert run(name, folder).load() == kept
    resumed = run(name, folder)
    resumed.train()
    torch.testing.assert_close(outcome(resumed), outcome(uninterrupted), **SAME)
    assert len(resumed.losses) == STEPS
    assert [one.state_dict() for one in resumed.schedules] == [one.state_dict() for one in uninterrupted.schedules]
    assert torch.equal(resumed.state()["random"], uninterrupted.state()["random"])
    assert lines(folder) == lines(tmp_path)


def test_a_run_of_one_bit_more_ends_with_the_bits_it_was_asked_for() -> None:
    lowered = run(LOWERED)
    assert lowered.model.inner.input_quantizer.grid.bits == 3
    lowered.train()
    assert lowered.model.inner.input_quantizer.grid.bits == 2
    with pytest.raises(SystemExit, match="--steps 1 of nuLSQ-A from one bit more"):
        run(LOWERED, steps=1)


def test_a_finished_run_that_goes_on_has_nothing_left_to_do(tmp_path: pathlib.Path) -> None:
    first = run(PLAIN, tmp_path)
    first.train()
    again = run(PLAIN, tmp_path)
    again.train()
    torch.testing.assert_close(outcome(again), outcome(first), **SAME)
    assert [int(line["step"]) for line in lines(tmp_path)] == [3, 6, 9, 10]


def test_the_log_has_the_stated_columns(tmp_path: pathlib.Path) -> None:
    done = run(PLAIN, tmp_path)
    done.train()
    table = lines(tmp_path)
    assert [list(line) for line in table] == [COLUMNS] * 4
    means = [sum(done.losses[first:last]) / (last - first) for first, last in ((0, 3), (3, 6), (6, 9), (9, 10))]
    assert [float(line["loss"]) for line in table] == means  # written with all digits
    assert float(table[-1]["lr"]) == float(table[-1]["step_lr"]) == 0.0  # the schedule is at its end
    assert 0 < float(table[0]["step_lr"]) < float(table[0]["lr"])
    assert all(0 <= float(line["held_out_percent"]) <= 100 for line in table)
    assert all(0 <= float(line["largest_overflow"]) <= 1 for line in table)


def test_lines_that_a_killed_run_wrote_after_its_snapshot_are_not_written_twice(tmp_path: pathlib.Path) -> None:
    whole = run(PLAIN, tmp_path)
    whole.train()
    (path,) = tmp_path.glob("*.csv")
    text = path.read_text()
    short = run(PLAIN, tmp_path)
    short.forget(6)
    assert [int(line["step"]) for line in lines(tmp_path)] == [3, 6]
    path.write_text(text[:-20])  # killed while it wrote the last line
    short.forget(STEPS)
    assert [int(line["step"]) for line in lines(tmp_path)] == [3, 6, 9]
    short.forget(0)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.06), ("steps", 11), ("frozen_norms", True), ("precision", "bfloat16"), ("warmup", 3)]
)
def test_other_settings_are_refused(field: str, value: Any, tmp_path: pathlib.Path, half_done: pathlib.Path) -> None:
    kept = half_done.read_bytes()
    was = getattr(trainer.settings(PLAIN), field)
    with pytest.raises(SystemExit) as caught:
        run(PLAIN, half_done.parent, **{field: value}).train()
    assert f"is of a run with {field}={was!r}, now {value!r}: give another --out" in str(caught.value)
    assert half_done.read_bytes() == kept


def test_another_float_network_is_refused(half_done: pathlib.Path) -> None:
    other = run(PLAIN, half_done.parent)
    other.checkpoint = "0" * 64
    with pytest.raises(SystemExit, match=r"float_sha256='[0-9a-f]{64}', now '0000"):
        other.train()


def test_another_number_of_processes_is_refused(half_done: pathlib.Path) -> None:
    other = run(PLAIN, half_done.parent)
    other.ranks.size = 2
    with pytest.raises(SystemExit, match="processes=1, now 2"):
        other.load()


@pytest.fixture
def half_done(tmp_path: pathlib.Path) -> pathlib.Path:
    """The snapshot of a run after three steps."""
    begun = run(PLAIN, tmp_path)
    for step in range(3):
        begun.losses.append(begun.step(step))
    begun.save(3)
    return snapshot_in(tmp_path)


def test_a_snapshot_that_was_only_half_written_is_not_seen(half_done: pathlib.Path) -> None:
    # What a kill leaves behind while the next one is written: part of a file beside the last one.
    half_done.with_name(f".{half_done.name}.x7").write_bytes(half_done.read_bytes()[:500])
    assert run(PLAIN, half_done.parent).load() == 3


def test_a_write_that_fails_leaves_the_last_snapshot(half_done: pathlib.Path) -> None:
    before = half_done.read_bytes()
    state = {"tensor": torch.ones(2), "word": object()}
    with pytest.raises(TypeError):
        trainer.script().snapshot.save(half_done, state)
    assert half_done.read_bytes() == before
    assert list(half_done.parent.glob(".*")) == []


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_a_damaged_snapshot_is_told_of(damage: str, half_done: pathlib.Path) -> None:
    content = half_done.read_bytes()
    if damage == "cut":
        half_done.write_bytes(content[:-100])
    elif damage == "garbage":
        half_done.write_bytes(b"\x07" * 300)
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, half_done)
    with pytest.raises(FormatError, match=r"\.safetensors is damaged, or no snapshot .*remove it to start anew"):
        run(PLAIN, half_done.parent).train()


def test_a_snapshot_holds_any_nesting_of_tensors_and_plain_values(tmp_path: pathlib.Path) -> None:
    snapshot = trainer.script().snapshot
    state = {
        "a.b": {"c": torch.tensor([1.5, -0.0])},
        "a": {"b.c": torch.tensor(2, dtype=torch.int64)},
        "list": [1, 0.1, None, True, "word", [torch.zeros(0, 3)]],
        3: {0: torch.arange(4, dtype=torch.uint8)},
        "not": float("inf"),
    }
    snapshot.save(tmp_path / "state", state)
    loaded = snapshot.load(tmp_path / "state")
    assert list(loaded) == list(state)
    assert loaded["list"][:5] == state["list"][:5]
    assert loaded["not"] == state["not"]
    for found, expected in (
        (loaded["a.b"]["c"], state["a.b"]["c"]),
        (loaded["a"]["b.c"], state["a"]["b.c"]),
        (loaded["list"][5][0], state["list"][5][0]),
        (loaded[3][0], state[3][0]),
    ):
        torch.testing.assert_close(found, expected, **SAME)


@pytest.mark.parametrize("where", ["activation", "gradient", "step"])
def test_a_loss_that_is_no_number_names_the_layer_and_writes_nothing(where: str, half_done: pathlib.Path) -> None:
    kept = half_done.read_bytes()
    going = run(PLAIN, half_done.parent)
    if where == "activation":

        def overflow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + torch.inf - torch.inf

        going.model.linear.register_forward_hook(overflow)
        message = "linear is the first to return values that are NaN or infinite"
    elif where == "gradient":
        going.model.linear.register_full_backward_hook(lambda *_: (torch.full((BATCH, 5, 4, 4), torch.nan),))
        # What comes before it has its gradient from there.
        message = "the gradient of bn2.bias holds 5 of 5"
    else:
        load = going.load

        def spoil() -> int:
            step = load()
            with torch.no_grad():
                going.model.inner.input_quantizer.grid.steps[..., 0] = torch.nan
            return step

        going.load = spoil
        message = "inner.input_quantizer.grid.steps holds 1 of 3"
    with pytest.raises(SystemExit) as caught:
        going.train()
    assert f"made-up W2A2 seed 1 nuLSQ-WA: step 3: {message}" in str(caught.value)
    assert half_done.read_bytes() == kept
    assert not list(half_done.parent.glob("*.csv"))
    assert isinstance(caught.value.__cause__, QuantizationError)


def test_more_images_in_a_batch_than_there_are_is_refused() -> None:
    with pytest.raises(SystemExit, match="--batch 55: there are 54 training images"):
        run(PLAIN, batch=55)


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_it_trains_in_bfloat16_where_autocast_does(name: str, tmp_path: pathlib.Path) -> None:
    narrow = run(name, tmp_path, precision="bfloat16")
    seen = []
    narrow.model.fc.register_forward_hook(lambda *parts: seen.append(parts[-1].dtype))
    narrow.train()
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.float32}
    assert sum(narrow.losses[-3:]) < sum(narrow.losses[:3])


def test_norms_that_are_frozen_stay_as_they_are() -> None:
    frozen, free = run(PLAIN, frozen_norms=True), run(PLAIN)
    for each in (frozen, free):
        each.train()
    before = trainer.network().bn2.running_mean
    assert torch.equal(frozen.model.bn2.running_mean, before)
    assert not torch.equal(free.model.bn2.running_mean, before)


# Two processes.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks wrote; both run once for all the tests."""
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    processes = [start("rank", folder, rank, port) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


# A gradient is a sum of at most 12 images x 64 places = 1e3 float64 terms below 10, added in another order:
# 1e3 * 10 * 1e-16 = 1e-12. SGD multiplies it by 0.05, with momentum by ten times that, in each of ten steps: 5e-12.
# AdamW divides it by its size, here 1e-3 and more, and multiplies it by 2e-3: far less.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ["LSQ", PLAIN, LOWERED]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_what_one_learns_from_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    alone = ranks[0]["found"][f"{name} alone"]
    for rank in ranks:
        torch.testing.assert_close(rank["found"][f"{name} together"], alone, **CLOSE)
    # So that this compares what it says: another batch learns something else.
    less = ranks[0]["found"][f"{name} of half the images"]
    steps = next(
        key for key in alone if key.endswith("inner.input_quantizer.grid." + ("scale", "steps")[name != "LSQ"])
    )
    assert (alone[steps] - less[steps]).abs().max() > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_processes_end_with_equal_models(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["found"][f"{name} together"] for rank in ranks)
    torch.testing.assert_close(first, second, **SAME)


def test_processes_go_on_together_from_what_the_first_one_kept(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["found"]["again"], ranks[0]["found"]["plain"], **SAME)


def test_processes_stop_together(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        share, loss = rank["errors"]
        assert share == "--batch 11 of 2 processes: they must have equal shares of it"
        assert "step 2: " in loss
    assert "stem.input_quantizer is the first to return values that are NaN" in ranks[0]["errors"][1]
    assert "the gradient of" in ranks[1]["errors"][1]  # its own images were sound
