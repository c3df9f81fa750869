"""The command `q-quantize`, and the job behind it."""

import importlib.util
import json
import math
import os
import pickle
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import q_core
from q_core.cli import main

pytest.importorskip("matplotlib", reason="the command is part of the extra q-core[cli]")
pytest.importorskip("tyro", reason="the command is part of the extra q-core[cli]")

from q_core.cli import keywords, sources
from q_core.cli.job import Configuration, Job, accuracy, run
from q_core.cli.rows import state_sha256

NETWORK = """
import torch
from torch import nn

import helper


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 7, 3)
        self.act = nn.PReLU(7)
        self.fc = nn.Linear(7, helper.CLASSES)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.act(self.conv2(x)).mean((2, 3)))


def net():
    torch.manual_seed(3)
    return Net()


def number():
    return 7


def data():
    images = torch.randn(40, 3, 7, 5, generator=torch.Generator().manual_seed(5))
    labels = net().eval()(images).argmax(1)
    return [images[:16], images[16:24]], ((x, y) for x, y in zip(images.split(9), labels.split(9)))


def no_calibration():
    return [], data()[1]


def no_labels():
    return data()[0], data()[0]


def no_evaluation():
    return data()[0], []


def not_finite():
    images, pairs = data()
    return [*images, torch.full((2, 3, 7, 5), float("nan"))], pairs


CONSTANT = 1
"""

METHOD = """
import q_core


def shy(model, batches, *, weight_bits, activation_bits, edge_bits, progress=True):
    "Leaves the inputs float, whatever the bits."
    return q_core.nearest(model, batches, weight_bits=weight_bits, activation_bits=32, edge_bits=1, progress=progress)


def patient(model, batches, *, iterations=20, seed=3, progress=True, **bits):
    "Takes steps, and draws from a generator of its own."
    import helper

    assert (iterations, seed) in ((4, 11), (1, 3)), (iterations, seed)
    return q_core.nearest(model, batches, progress=progress, **bits)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "helper.py").write_text("CLASSES = 4\n")
    path = folder / "my_net.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture
def words(file: Path, tmp_path: Path) -> list[str]:
    """The words of a command that succeeds."""
    return ["--model", f"{file}:net", "--data", f"{file}:data", "--out", str(tmp_path / "out")]


def float_model(file: Path) -> nn.Module:
    return sources.model(f"{file}:net", None)


def evaluation(file: Path) -> torch.Tensor:
    return torch.randn(40, 3, 7, 5, generator=torch.Generator().manual_seed(5))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_command_quantizes_reports_and_packs(
    words: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--weight-bits", "4", "--activation-bits", "5", "--edge-bits", "6", "--seed", "11", "--samples", "16"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "report.html", "results.json"]
    for expected in ("40 of 40 correct, 100.00 %", "swapped 3 layers", "the same logits on 40 images, bit for bit"):
        assert expected in shown
    assert shown.splitlines()[-4].split() == ["method", "bits", "accuracy", "bits/weight", "bytes", "seconds"]

    rows = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in rows] == ["float", "nearest"]
    before, after = rows
    assert list(before) == list(after)
    assert (before["weight_bits"], before["activation_bits"], before["value"]) == (32, 32, 100.0)
    assert (after["weight_bits"], after["activation_bits"], after["seed"]) == (4, 5, 11)
    assert after["network"] == "my_net.py:net"
    assert after["dataset"] == "my_net.py:data"
    assert after["metric"] == "top1_percent"
    assert after["samples"] == 40
    assert after["settings"]["edge_bits"] == 6
    # The defaults of the method are in the row as well.
    assert after["settings"]["observer"] == "MSEObserver"
    assert after["settings"]["weight_granularity"] == "PerChannel(axis=0)"
    assert after["settings"]["calibration_samples"] == 16
    assert after["settings"]["bytes_on_disk"] == (out / "model.safetensors").stat().st_size
    assert any(part.startswith("act (PReLU)") for part in after["stays_float"])
    assert after["checkpoint_sha256"] == before["checkpoint_sha256"] == state_sha256(float_model(file))
    assert shlex.split(after["command"]) == ["q-quantize", *words]

    # The packed model is that of the method called directly, and its accuracy is the one in the table.
    images = evaluation(file)
    model = float_model(file)
    quantized = q_core.nearest(model, [images[:16]], weight_bits=4, activation_bits=5, edge_bits=6).model
    loaded = q_core.load_packed(out / "model.safetensors", model)
    with torch.no_grad():
        # The evaluation ran in batches of 9, whose convolutions may sum in another order: 1e-6 of logits below 1.
        torch.testing.assert_close(loaded(images), quantized(images), atol=1e-6, rtol=0)
    correct, samples = accuracy(loaded, [(images, model(images).argmax(1))])
    assert after["value"] == 100 * correct / samples

    report = (out / "report.html").read_text()
    assert "PerChannel(axis=0)" in report
    assert "my_net.py:net on my_net.py:data" in report
    assert not any(word in report for word in ("http:", "https:", "src=", "<script", "<link"))


def test_two_runs_give_the_same_results(words: list[str], tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        words[-1] = str(tmp_path / name)
        assert main([*words, "--weight-bits", "3"]) == 0
        rows = json.loads((tmp_path / name / "results.json").read_text())
        for row in rows:
            del row["date"], row["command"], row["settings"]["seconds"]
        results.append(rows)
    assert results[0] == results[1]
    first, second = (
        q_core.load_packed(tmp_path / name / "model.safetensors", _net(words)) for name in ("first", "second")
    )
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, atol=0, rtol=0)  # the same run twice is bit-equal


def _net(words: list[str]) -> nn.Module:
    return sources.model(words[1], None)


def test_dry_run_shows_what_would_be_swapped_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    assert main([*words, "--dry-run", "--weight-bits", "4", "--activation-bits", "4"]) == 0
    assert main([*words[:-2], "--dry-run"]) == 0
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    for path in ("conv1", "conv2", "fc"):
        assert any(line.startswith(path) and "W" in line for line in shown.splitlines())
    assert "act (PReLU)" in shown
    assert "additions" in shown
    assert "nothing was written" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--method": "nearst"}, "method 'nearst' is not installed; installed are .*nearest.*did you mean 'nearest'"),
        ({"--weight-bits": "9"}, "--weight-bits 9: supported are 1 to 8, or 32 for float"),
        ({"--activation-bits": "0"}, "--activation-bits 0: supported"),
        ({"--edge-bits": "16"}, "--edge-bits 16: supported"),
        ({"--samples": "0"}, "--samples 0: it must be at least 1"),
        ({"--model": "FILE:nett"}, "my_net.py has no function 'nett' .did you mean 'net'"),
        ({"--model": "FILE:CONSTANT"}, "has no function 'CONSTANT'"),
        ({"--model": "FILE:number"}, "returned a int: a torch.nn.Module is expected"),
        ({"--model": "absent.py:net"}, "there is no file absent.py"),
        ({"--model": "resnet18"}, "--model resnet18: expected FILE.py:FUNCTION, or torchvision:NAME"),
        ({"--model": "torchvision:resnet18"}, "random weights: give a file of trained ones with --weights"),
        ({"--data": "mnist"}, "--data mnist: expected FILE.py:FUNCTION, cifar10 or cifar100"),
        ({"--data": "FILE:net"}, "returned a Net: expected .calibration_batches, evaluation_batches."),
        ({"--data": "FILE:no_calibration"}, "the calibration data holds no batch"),
        ({"--data": "FILE:no_evaluation"}, "the evaluation data holds no batch"),
        ({"--data": "FILE:no_labels"}, "evaluation batch 0 is a Tensor: expected a pair"),
        (
            {"--data": "FILE:not_finite"},
            "batch 2 has 210 non-finite of 210 values at conv1.input(.|\n)*in nearest W8A8",
        ),
        ({"--data": "cifar10"}, "--data cifar10 without --data-dir"),
        ({"--data": None}, "no images: give the folders --calib and --eval, or --data"),
        ({"--data": None, "--calib": "."}, "no images: give the folders --calib and --eval, or --data"),
        ({"--eval": "."}, "--data .* and --eval are both given"),
        ({"--out": None}, "--out is missing"),
        ({"--out": "FILE"}, "results cannot go to .*my_net.py: it is a file"),
        ({"--weights": "absent.pth"}, "--weights absent.pth: there is no such file"),
        ({"--mean": "0 0 0"}, "one of --mean and --std is given"),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    words: list[str],
    file: Path,
    tmp_path: Path,
    change: dict[str, str | None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {**dict(zip(words[::2], words[1::2], strict=True)), **change}
    given = [word for name, value in options.items() if value is not None for word in (name, *value.split())]
    before = tree(tmp_path)
    assert main([word.replace("FILE", str(file)) for word in given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("q-quantize: ")
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert tree(tmp_path) == before


def test_words_that_are_no_options_exit_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([*words, "--bits", "4"], [*words, "--weight-bits", "four"], []):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "--weight-bits" in capsys.readouterr().err


def test_weights_are_loaded_from_safetensors_and_from_plain_pth(words: list[str], file: Path, tmp_path: Path) -> None:
    model = float_model(file)
    with torch.no_grad():
        model.fc.weight.neg_()
        model.fc.bias.neg_()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "nested.pth")
    for name in ("w.safetensors", "w.pth", "nested.pth"):
        assert main([*words, "--weights", str(tmp_path / name)]) == 0
        row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
        assert row["checkpoint_sha256"] == state_sha256(model)
        assert row["settings"]["weights"] == name
        # The labels are those of the model with the other sign.
        assert row["value"] < 100


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_weights_that_do_not_fit_or_are_no_tensors_are_refused(
    words: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = float_model(file).state_dict()
    save_file({name: value for name, value in state.items() if name != "fc.bias"}, tmp_path / "short.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "short.safetensors").read_bytes()[:100])
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    torch.save({"weight": Malicious(tmp_path / "ran")}, tmp_path / "evil2.pth")
    for name, message in (
        ("short.safetensors", "do not fit the model"),
        ("torn.safetensors", "is not a sound safetensors file"),
        ("text.pth", "cannot be read as plain tensors"),
        ("list.pth", "holds a list: a state_dict of tensors is expected"),
        ("evil.pth", "cannot be read as plain tensors"),
        ("evil2.pth", "cannot be read as plain tensors"),
    ):
        assert main([*words, "--weights", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_results_of_the_last_one(words: list[str], tmp_path: Path) -> None:
    assert main(words) == 0
    before = tree(tmp_path)
    assert main([*words[:3], words[3].replace("data", "not_finite"), *words[4:]]) == 2
    assert tree(tmp_path) == before


def test_a_file_of_the_user_leaves_no_trace_on_the_path(words: list[str]) -> None:
    before = list(sys.path)
    assert main([*words, "--dry-run"]) == 0
    assert sys.path == before


def test_methods_are_found_by_their_entry_points(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    information = site / "q_shy-1.2.dist-info"
    information.mkdir(parents=True)
    (site / "q_shy.py").write_text(METHOD)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: q-shy\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text("[q_core.methods]\nshy = q_shy:shy\n")
    monkeypatch.syspath_prepend(str(site))
    assert main([*words, "--method", "shy", "--weight-bits", "4", "--activation-bits", "4"]) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())[1]
    assert row["method"] == "shy"
    assert row["versions"]["q-shy"] == "1.2"
    # What the method left float is said, whatever bits were asked for.
    assert "conv2 (Conv2d): its input" in row["stays_float"]
    capsys.readouterr()
    assert main([*words, "--method", "unknown"]) == 2
    assert "installed are nearest, shy" in capsys.readouterr().err


def test_a_function_in_a_file_is_a_method_and_gets_steps_and_seed(
    words: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = file.parent / "method.py"
    method.write_text(METHOD)
    given = [*words, "--method", f"{method}:patient", "--seed", "11", "--iterations"]
    assert main([*given, "4"]) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())[1]
    assert (row["method"], row["seed"], row["settings"]["iterations"]) == ("method.py:patient", 11, 4)
    # A dry run takes one step.
    assert main([*given, "400", "--dry-run"]) == 0
    capsys.readouterr()
    assert main([*words, "--method", f"{method}:patent"]) == 2
    assert "method.py has no function 'patent' (did you mean 'patient'?)" in capsys.readouterr().err


def taker(
    model: nn.Module,
    batches: object,
    *,
    looks: int = 3,
    share: float | None = None,
    flip: bool = False,
    name: str = "a",
    folder: str | os.PathLike[str] | None = None,
    parts: Sequence[type[nn.Module]] | Sequence[str] | None = None,
    late: "int" = 2,
    bare=None,
    grid: nn.Module | None = None,
    seed: int = 0,
    progress: bool = True,
    **others: object,
) -> None:
    """Has a keyword of every kind."""


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("looks=5", 5),
        ("looks=-5", -5),
        ("share=0.25", 0.25),
        ("share=2", 2.0),
        ("share=none", None),
        ("flip=True", True),
        ("flip=false", False),
        ("name=none", "none"),
        ("name=a=b", "a=b"),
        ("folder=x/y", "x/y"),
        ("folder=None", None),
        ("parts=one,two", ("one", "two")),
        ("late=7", 7),
        ("bare=text", "text"),
        ("grid=none", None),
    ],
)
def test_words_become_what_a_keyword_is_declared_to_be(word: str, value: object) -> None:
    (found,) = keywords.read("taker", taker, [word]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("looks=2.5", "looks is a whole number$"),
        ("looks=none", "looks is a whole number$"),
        ("share=much", "share is a number or none$"),
        ("flip=1", "flip is true or false$"),
        ("grid=UniformGrid", "grid is no number and no text"),
        ("late=x", "late is a whole number$"),
        ("others=3", "'taker' takes looks, share, flip, name, folder, parts, late, bare, grid$"),
        ("progress=false", "'taker' takes looks"),
        ("edge-bits=3", "give it as --edge-bits 3$"),
    ],
)
def test_words_that_are_not_are_refused(word: str, message: str) -> None:
    with pytest.raises(q_core.SpecError, match=message) as raised:
        keywords.read("taker", taker, [word])
    assert str(raised.value).startswith(f"--option {word}: ")


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed; nox -s zoo uses it"
)
def test_without_torchvision_the_message_says_what_to_install(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.pth").write_text("")
    for change in (
        ["--model", "torchvision:resnet18", "--weights", str(tmp_path / "w.pth"), *words[2:]],
        [*words[:2], "--calib", str(tmp_path), "--eval", str(tmp_path), *words[4:]],
        [*words[:2], "--data", "cifar10", "--data-dir", str(tmp_path), *words[4:]],
    ):
        assert main(change) == 2
        assert "pip install torch torchvision" in capsys.readouterr().err


def job(**changes: object) -> Job:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)).eval()
    images = torch.randn(8, 1, 5, 5)
    facts = {
        "network": "net",
        "dataset": "noise",
        "model": model,
        "calibration": [images],
        "evaluation": [(images, torch.arange(8) % 3)],
        "configurations": (Configuration("nearest", q_core.nearest, 8, 8),),
        "command": "python job.py",
    }
    return Job(**{**facts, **changes})


def test_several_configurations_have_a_file_each_and_two_are_looked_into(tmp_path: Path) -> None:
    bits = [(8, 8), (4, 4), (2, 4)]
    configurations = tuple(Configuration("nearest", q_core.nearest, w, a, {"edge_bits": 2}) for w, a in bits)
    lines: list[str] = []
    rows = run(job(configurations=configurations), tmp_path, say=lines.append)
    assert [(row.weight_bits, row.activation_bits) for row in rows] == [(32, 32), *bits]
    for name in ("nearest-W8A8", "nearest-W4A4", "nearest-W2A4"):
        assert (tmp_path / f"{name}.safetensors").exists()
    report = (tmp_path / "report.html").read_text()
    assert "Error of each layer: nearest W8A8" in report
    assert "Error of each layer: nearest W2A4" in report
    assert "Error of each layer: nearest W4A4" not in report
    stored = [row.settings["bits_per_weight"] for row in rows]
    assert stored[0] == 32
    assert stored[1] > stored[2] > stored[3] > 2
    assert any("W2A4" in line for line in lines)


def test_a_reloaded_model_with_other_logits_is_an_error(tmp_path: Path) -> None:
    def dice(model: nn.Module, batches: object, **_: object) -> q_core.Quantized:
        recipe = q_core.Recipe(q_core.QuantSpec.unsigned(2), rounding=q_core.Stochastic)
        weight = q_core.Recipe(q_core.QuantSpec.signed(4))
        twin, report = q_core.swap(model, [q_core.Rule(".*", weight=weight, input=recipe)])
        return q_core.Quantized(twin, report, q_core.calibrate(twin, batches))

    configuration = Configuration("dice", dice, 4, 2)
    with pytest.raises(q_core.StateError, match=r"logits of model.safetensors reloaded differ by up to") as raised:
        run(job(configurations=(configuration,)), tmp_path, say=lambda _: None)
    assert "in dice W4A2" in raised.value.__notes__
    assert not list(tmp_path.iterdir())


def test_several_jobs_share_a_table_and_a_report(tmp_path: Path) -> None:
    lines: list[str] = []
    configurations = tuple(Configuration("nearest", q_core.nearest, bits, bits) for bits in (8, 4))
    jobs = [job(), job(network="wide", dataset="sound", configurations=configurations)]
    rows = run(jobs, tmp_path, say=lines.append)
    assert [row.network for row in rows] == ["net", "net", "wide", "wide", "wide"]
    assert [row["network"] for row in json.loads((tmp_path / "results.json").read_text())] == [r.network for r in rows]
    for name in ("net-model", "wide-nearest-W8A8", "wide-nearest-W4A4"):
        assert (tmp_path / f"{name}.safetensors").exists()
    report = (tmp_path / "report.html").read_text()
    assert "net and wide on noise and sound, quantized" in report
    assert "Error of each layer: wide nearest W4A4" in report
    assert "Error of each layer: net nearest W8A8" in report
    assert report.count("<td>wide</td>") == 3
    assert "<h3>net</h3>" in report
    table = next(line for line in lines if line.startswith("network")).splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["net", "float", "W32A32"], ["net", "nearest", "W8A8"]]
    assert len({line.index("W") for line in table[1:]}) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_jobs_must_be_of_different_networks(tmp_path: Path, count: int) -> None:
    with pytest.raises(q_core.SpecError, match="net, net" if count else "no network"):
        run([job()] * count, tmp_path, say=lambda _: None)


def test_a_method_that_renames_layers_is_refused(tmp_path: Path) -> None:
    def renamed(model: nn.Module, batches: object, **bits: int) -> q_core.Quantized:
        return q_core.nearest(nn.Sequential(model), batches, **bits)

    class Outer(nn.Sequential):
        """Has the same parameters below another name, so that the packed file fits."""

    inner = job().model
    configuration = Configuration("renamed", renamed, 8, 8)
    with pytest.raises(q_core.FormatError, match="does not fit"):
        run(job(model=Outer(*inner), configurations=(configuration,)), tmp_path, say=lambda _: None)


def test_a_method_that_keeps_batch_norms_is_compared_with_the_model_that_has_them(tmp_path: Path) -> None:
    def unfolded(model: nn.Module, batches: object, **_: object) -> q_core.Quantized:
        recipe = q_core.Recipe(q_core.QuantSpec.signed(4))
        twin, report = q_core.swap(model, [q_core.Rule(".*", weight=recipe)])
        return q_core.Quantized(twin, report, q_core.calibrate(twin, batches))

    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3)).eval()
    run(job(model=model, configurations=(Configuration("unfolded", unfolded, 4, 32),)), tmp_path, say=lambda _: None)
    report = (tmp_path / "report.html").read_text()
    assert "not measured" not in report
    assert "Error of each layer: unfolded W4A32" in report


def test_data_that_can_be_read_only_once_are_refused() -> None:
    for name in ("calibration", "evaluation"):
        with pytest.raises(q_core.DataError, match=f"{name} of type list_iterator can be read only once"):
            job(**{name: iter([1])})
    with pytest.raises(q_core.SpecError, match="0 configurations"):
        job(configurations=())


def test_float_size_counts_shared_weights_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 25), nn.ReLU(), nn.Linear(25, 25))
    model[3].weight = model[1].weight
    rows = run(job(model=model, configurations=(Configuration("nearest", q_core.nearest, 8, 8),)), tmp_path, say=len)
    tensors = 4 * (25 * 25 + 2 * 25)
    # Beside the tensors a safetensors file has a header of a few hundred bytes.
    assert tensors < rows[0].settings["bytes_on_disk"] < tensors + 600
    assert math.isclose(rows[0].settings["bits_per_weight"], 32)


@pytest.mark.zoo
def test_torchvision_model_on_folders_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchvision = pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for split, count in (("calib", 6), ("eval", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (70 + index, 90, 3), dtype=torch.uint8).numpy()
                image.fromarray(pixels).save(folder / f"{index}.png")
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.safetensors")
    words = ["--model", "torchvision:resnet18", "--weights", str(tmp_path / "resnet18.safetensors")]
    words += ["--calib", str(tmp_path / "calib"), "--eval", str(tmp_path / "eval"), "--out", str(tmp_path / "out")]
    words += ["--weight-bits", "4", "--activation-bits", "4", "--samples", "8", "--batch-size", "4"]
    assert main([*words, "--resize", "72", "--crop", "64"]) == 0
    shown = capsys.readouterr().out
    assert "swapped 21 layers, calibrated with 2 batches" in shown
    row = json.loads((tmp_path / "out" / "results.json").read_text())[1]
    assert row["network"] == "resnet18"
    assert row["samples"] == 8
    assert "resize 72, centre crop 64" in row["settings"]["transform"]
    assert "2 classes" in row["settings"]["transform"]
    assert torchvision.__version__.startswith(row["versions"]["torchvision"])
    assert (tmp_path / "out" / "report.html").stat().st_size < 3e6
    for change, message in (
        ({"--model": "torchvision:resnet19"}, "no classifier 'resnet19'"),
        ({"--eval": str(tmp_path / "none")}, "there is no such folder"),
        ({"--eval": str(tmp_path / "out")}, "a folder of images per class is expected"),
    ):
        given = {**dict(zip(words[::2], words[1::2], strict=True)), **change}
        assert main([word for pair in given.items() for word in pair]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.zoo
def test_cifar_is_not_downloaded_unless_asked(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    assert main([*words[:2], "--data", "cifar10", "--data-dir", str(tmp_path / "none"), *words[4:]]) == 2
    assert "--download fetches it" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
