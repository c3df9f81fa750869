"""The methods behind `q-quantize --method`, and the keywords that a command can give them."""

import importlib
import json
import runpy
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from q_aquant import ChannelBorder, aquant
from q_core import load_packed, pack
from q_core.cli import main

pytest.importorskip("matplotlib", reason="the command is part of the extra q-core[cli]")
pytest.importorskip("tyro", reason="the command is part of the extra q-core[cli]")

from q_core.cli import sources
from q_core.cli.job import accuracy

NETWORK = """
import torch
from torch import nn
from torch.nn import functional as F

from q_aquant import ChannelBorder, InputPlacement, aquant


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), Block(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.block(F.relu(self.stem(x))).mean((2, 3)))


def net():
    torch.manual_seed(3)
    return Net()


def data():
    images = torch.randn(40, 3, 7, 6, generator=torch.Generator().manual_seed(5))
    labels = net().eval()(images).argmax(1)
    return [images[:20], images[20:]], [(images[:25], labels[:25]), (images[25:], labels[25:])]


def shared(model, batches, *, iterations=7, **options):
    return aquant(model, batches, iterations=iterations, form=ChannelBorder(), **options)
"""
PLAIN = {"a-rounding", "nearest"}
STEPS = ["--iterations", "4", "--option", "batch_size=8", "--option", "looks=2"]


@pytest.fixture(autouse=True)
def entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the entry points of the package be found where it runs from a source tree that is not installed."""
    if any(entry.name == "aquant" for entry in metadata.entry_points(group=sources.METHODS)):
        return
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    information = tmp_path / "site" / f"q_aquant-{project['version']}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: q-aquant\nVersion: {project['version']}\n")
    lines = [f"{name} = {place}" for name, place in project["entry-points"][sources.METHODS].items()]
    (information / "entry_points.txt").write_text("\n".join([f"[{sources.METHODS}]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "user.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture
def words(file: Path) -> list[str]:
    """The words of a command, but for the method and the folder."""
    bits = ["--weight-bits", "2", "--activation-bits", "2"]
    return ["--model", f"{file}:net", "--data", f"{file}:data", *bits]


def row(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())[1]


@pytest.mark.parametrize("name", ["adaround", "aquant", "brecq", "qdrop", *sorted(PLAIN)])
def test_a_method_quantizes_reports_and_packs(
    name: str, words: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if name in PLAIN else [*STEPS, *(["--option", "activation-iterations=3"] if name == "brecq" else [])]
    out = tmp_path / "out"
    assert main([*words, "--method", name, *more, "--seed", "11", "--out", str(out)]) == 0
    assert "the same logits on 40 images, bit for bit" in capsys.readouterr().out
    found = row(out)
    assert (found["method"], found["seed"], found["weight_bits"]) == (name, 11, 2)
    if name not in PLAIN:
        settings = found["settings"]
        assert (settings["iterations"], settings["batch_size"], settings["looks"]) == (4, 8, 2)
        assert settings["loader_batch_size"] == 64
        assert "seed" not in settings
        assert found["versions"]["q-aquant"]
    # Everything but biases and what lies between modules has bits, wherever the quantizers are.
    assert len(found["stays_float"]) == 2
    report = (out / "report.html").read_text()
    assert f"Error of each layer: {name} W2A2" in report
    model, evaluation = sources.model(f"{file}:net", None), runpy.run_path(str(file))["data"]()[1]
    packed = load_packed(out / "model.safetensors", model)
    correct, samples = accuracy(packed, evaluation)
    assert found["value"] == 100 * correct / samples


def test_the_packed_model_is_that_of_the_method_with_this_seed(words: list[str], file: Path, tmp_path: Path) -> None:
    calibration = runpy.run_path(str(file))["data"]()[0]
    options = {"weight_bits": 2, "activation_bits": 2, "iterations": 4, "batch_size": 8, "looks": 2}
    outputs = []
    for seed in (0, 1):
        assert main([*words, "--method", "aquant", *STEPS, "--seed", str(seed), "--out", str(tmp_path / "out")]) == 0
        model = sources.model(f"{file}:net", None)
        packed = load_packed(tmp_path / "out" / "model.safetensors", model)
        expected = pack(aquant(model, calibration, seed=seed, progress=False, **options).model)
        # The same function with the same arguments on the same machine.
        torch.testing.assert_close(packed.state_dict(), expected.state_dict(), rtol=0, atol=0)
        outputs.append(packed(calibration[0]))
    assert not torch.equal(*outputs)


def test_a_journal_takes_up_an_interrupted_run_and_refuses_another(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal, out = tmp_path / "journal", tmp_path / "out"
    command = [*words, "--method", "qdrop", *STEPS, "--journal", str(journal), "--out", str(out)]
    assert main(command) == 0
    packed = (out / "model.safetensors").read_bytes()
    entries = sorted(journal.glob("units/unit-*.safetensors"))
    assert len(entries) == 3
    entries[-1].unlink()
    before = {entry: entry.stat().st_mtime_ns for entry in entries[:-1]}
    (out / "model.safetensors").unlink()
    assert main(command) == 0
    assert (out / "model.safetensors").read_bytes() == packed
    assert {entry: entry.stat().st_mtime_ns for entry in entries[:-1]} == before
    assert entries[-1].exists()
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "holds the units of another run: seed was 0, is 1" in capsys.readouterr().err


def test_a_dry_run_takes_no_steps_worth_mentioning_and_keeps_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("brecq", "aquant"):  # 20,000 steps for each unit, were they taken
        before = sorted(tmp_path.iterdir())
        more = ["--journal", str(tmp_path / "journal"), "--option", "held_out=30", "--dry-run"]
        assert main([*words, "--method", name, *more]) == 0
        assert sorted(tmp_path.iterdir()) == before
        shown = capsys.readouterr().out
        assert f"{name} W2A2 would swap 4 layers" in shown
        assert any(line.split() == ["block.conv2", "Conv2d", "W2A2"] for line in shown.splitlines())


def test_options_reach_the_method(words: list[str], tmp_path: Path) -> None:
    options = ["blocks=block", "held_out=16", "batch_size=8", "looks=1"]
    given = [word for option in options for word in ("--option", option)]
    assert main([*words, "--method", "qdrop", "--iterations", "2", *given, "--out", str(tmp_path / "out")]) == 0
    settings = row(tmp_path / "out")["settings"]
    assert (settings["held_out"], settings["looks"], settings["blocks"]) == (16, 1, "('block',)")
    # What nobody gave is in the row too.
    assert settings["placement"] == "OutputPlacement()"


def test_a_function_in_a_file_is_a_method(words: list[str], file: Path, tmp_path: Path) -> None:
    name = f"{file}:shared"
    assert main([*words, "--method", name, "--iterations", "3", "--out", str(tmp_path / "out")]) == 0
    found = row(tmp_path / "out")
    assert (found["method"], found["settings"]["iterations"]) == ("user.py:shared", 3)
    model = sources.model(f"{file}:net", None)
    packed = load_packed(tmp_path / "out" / "model.safetensors", model)
    calibration = runpy.run_path(str(file))["data"]()[0]
    options = {"weight_bits": 2, "activation_bits": 2, "iterations": 3, "form": ChannelBorder(), "progress": False}
    expected = pack(aquant(model, calibration, **options).model)
    torch.testing.assert_close(packed.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("nearest", ["--iterations", "5"], "--iterations 5: method 'nearest' takes no iterations; leave it out"),
        ("nearest", ["--journal", "runs"], "--journal runs: method 'nearest' takes no journal; leave it out"),
        ("qdrop", ["--iterations", "0"], "--iterations 0: it must be at least 1"),
        ("qdrop", ["--option", "looks"], "--option looks: expected NAME=VALUE"),
        (
            "qdrop",
            ["--option", "lokos=3"],
            "method 'qdrop' takes placement, blocks, held_out, batch_size, looks, storage",
        ),
        ("qdrop", ["--option", "lokos=3"], "did you mean 'looks'?"),
        ("qdrop", ["--option", "looks=3", "--option", "looks=4"], "--option looks=4: looks is given twice"),
        ("qdrop", ["--option", "looks=many"], "--option looks=many: looks is a whole number"),
        ("qdrop", ["--option", "held_out=2.5"], "--option held_out=2.5: held_out is a whole number or none"),
        ("qdrop", ["--option", "seed=3"], "--option seed=3: give it as --seed 3"),
        ("qdrop", ["--option", "placement=input"], "placement is no number and no text; write a function"),
        ("aquant", ["--option", "blocks=blokc", "--iterations", "1"], "blokc"),
        ("aquant", ["--option", "batch_size=64", "--iterations", "1"], "fewer than the 64 of a batch"),
        ("user.py:absent", [], "there is no file user.py"),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    method: str, more: list[str], message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--method", method, *more, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    # The folder is made before the first method runs, but nothing is in it.
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
