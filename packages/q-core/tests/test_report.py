"""The report, its figures, and the rows of evidence."""

import dataclasses
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import q_core

pytest.importorskip("matplotlib", reason="the report is part of the extra q-core[cli]")

from q_core.analysis import Distribution, LayerError
from q_core.cli.report import LayerView, TableRow, render
from q_core.cli.rows import AccuracyRow, append_jsonl, environment, float_parts, source_commit, state_sha256
from q_core.swap import wrap_units

FIELDS = [
    "network",
    "dataset",
    "method",
    "weight_bits",
    "activation_bits",
    "seed",
    "metric",
    "value",
    "samples",
    "stays_float",
    "settings",
    "command",
    "checkpoint_sha256",
    "commit",
    "versions",
    "device",
    "date",
]


def row(**changes: object) -> AccuracyRow:
    facts = {
        "network": "Net",
        "dataset": "images",
        "method": "nearest",
        "weight_bits": 4,
        "activation_bits": 4,
        "seed": 0,
        "metric": "top1_percent",
        "value": 98.5,
        "samples": 200,
        "stays_float": ("biases",),
        "settings": {"transform": "crop"},
        "command": "q-quantize --model x.py:f",
        "checkpoint_sha256": "ab" * 32,
        "commit": None,
        "versions": {"python": "3.11"},
        "device": "a processor, 2 threads",
        "date": "2026-01-02T03:04:05+00:00",
    }
    return AccuracyRow(**{**facts, **changes})


def line(**changes: object) -> TableRow:
    facts = {
        "method": "nearest",
        "weight_bits": 4,
        "activation_bits": 4,
        "accuracy": 98.5,
        "bits_per_weight": 4.25,
        "size": 12345,
        "seconds": 1.5,
    }
    return TableRow(**{**facts, **changes})


def view(paths: list[str], name: str = "nearest W4A4", levels: int = 16, worst: str = "") -> LayerView:
    errors = [LayerError(path, "QuantConv2d", 1.0 if path == worst else 20.0 + i, 10.0) for i, path in enumerate(paths)]
    entries = [
        Distribution(
            path=path,
            tensor=tensor,
            counts=torch.arange(64),
            edges=torch.linspace(-1, 1, 65, dtype=torch.float64),
            levels=torch.linspace(-0.9, 0.9, levels, dtype=torch.float64),
            tiles=1,
            clipped=0.125,
        )
        for path in paths
        for tensor in ("input", "weight")
    ]
    return LayerView(name, errors, entries)


def page(views: list[LayerView], **changes: object) -> str:
    first = row(**{**changes, "method": "float", "weight_bits": 32, "activation_bits": 32})
    table = [line(method="float", weight_bits=32, activation_bits=32, accuracy=99.0, seconds=None), line()]
    return render([first, row(**changes)], table, views)


class Document(html.parser.HTMLParser):
    """Checks that tags nest, and gathers identifiers, references and text."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [tag] if tag not in self.VOID else []
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.identifiers += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_needs_nothing_beside_itself() -> None:
    text = page([view(["conv", "fc"], levels=256), view(["conv", "fc"], name="nearest W2A4", levels=4)])
    assert not re.search(r"https?:|//|@import|<script|<link|<img|<iframe", text)
    document = Document(text)
    for name, value in document.attributes:
        assert name not in ("src", "srcset", "data", "action")
        if name.endswith("href"):
            assert value.startswith("#")
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.startswith("#")


def test_identifiers_are_unique_and_references_resolve() -> None:
    document = Document(page([view(["conv", "fc"]), view(["conv", "fc"], name="nearest W2A4")]))
    assert len(document.identifiers) == len(set(document.identifiers))
    wanted = {value[1:] for name, value in document.attributes if name.endswith("href")}
    wanted |= {target for _, value in document.attributes for target in re.findall(r"url\(#([^)]*)\)", value)}
    assert wanted
    assert wanted <= set(document.identifiers)


def test_report_shows_the_table_the_errors_and_how_to_reproduce() -> None:
    text = Document(page([view(["stage1.conv", "fc"])])).text
    for expected in (
        "Net on images, quantized",
        "2026-01-02T03:04:05+00:00",
        "a processor, 2 threads",
        "python 3.11",
        "99.00 %",
        "98.50 %",
        "-0.50",
        "4.25",
        "12,345",
        "stage1.conv",
        "20.0",
        "16 levels, 12 % clipped",
        "biases",
        "q-quantize --model x.py:f",
        "ab" * 32,
        "crop",
    ):
        assert expected in text, expected
    # Figures of one row are in the table, not among the settings of all.
    assert "bits_per_weight" not in text


def test_text_of_the_user_is_escaped_and_not_read_as_mathematics() -> None:
    bad = "<script>alert('1')</script>&"
    text = page([view([bad[:20], "a$b_1$c"])], network=bad, command=bad, settings={bad: bad}, stays_float=(bad,))
    assert "<script" not in text
    document = Document(text)
    assert document.text.count(bad) >= 4
    assert "a$b_1$c input" in document.text


def test_an_exact_layer_is_named_so() -> None:
    exact = LayerError("conv", "QuantConv2d", math.inf, math.inf)
    lost = LayerError("fc", "QuantLinear", -math.inf, -3.5)
    text = Document(page([LayerView("nearest W8A8", [exact, lost], [], "", "no quantizer ran")])).text
    assert text.count("exact") == 2
    assert "-inf" in text
    assert "-3.5" in text
    assert "no quantizer ran" in text


def test_a_view_without_errors_says_why() -> None:
    text = Document(page([LayerView("other W4A4", [], view(["conv"]).distributions, "layers <differ>")])).text
    assert "not measured: layers <differ>" in text


def test_many_layers_show_the_first_the_last_and_the_worst_within_three_megabytes() -> None:
    paths = [f"layer{i}" for i in range(60)]
    views = [view(paths, name=name, levels=256, worst="layer41") for name in ("nearest W8A8", "nearest W4A4")]
    text = page(views)
    assert len(text.encode()) < 3e6
    shown = Document(text).text
    assert "16 of 60 layers" in shown
    for path in ("layer0", "layer59", "layer41"):
        assert f"{path} weight" in shown
    # 1 dB, then 20 dB and more in the order of execution: the last ones are the best.
    assert "layer50 weight" not in shown


def test_the_same_data_give_the_same_bytes() -> None:
    assert page([view(["conv", "fc"])]) == page([view(["conv", "fc"])])


def test_rows_have_exactly_the_fields_of_the_schema() -> None:
    assert [field.name for field in dataclasses.fields(AccuracyRow)] == FIELDS


def test_rows_are_appended_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "area" / "name.jsonl"
    append_jsonl(path, row())
    append_jsonl(path, row(value=97.0))
    lines = path.read_text().splitlines()
    assert [json.loads(entry)["value"] for entry in lines] == [98.5, 97.0]
    assert list(json.loads(lines[0])) == FIELDS
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(path, row(value=math.nan))
    assert path.read_text().splitlines() == lines


def test_hash_of_the_weights_is_the_documented_one() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    text = b"bias torch.float32 (1,)\n" + bytes(4) + b"weight torch.float32 (1, 2)\n"
    # 1.0 and 2.0 in little-endian IEEE 754 single precision.
    text += bytes.fromhex("0000803f00000040")
    assert state_sha256(model) == hashlib.sha256(text).hexdigest()


def test_hash_sees_values_names_and_types_but_not_strides() -> None:
    def model(**changes: torch.Tensor) -> nn.Module:
        module = nn.Module()
        for name, value in {"a": torch.arange(6.0).reshape(2, 3), **changes}.items():
            module.register_buffer(name, value)
        return module

    first = state_sha256(model())
    assert state_sha256(model(a=torch.arange(6.0).reshape(2, 3).t().contiguous().t())) == first
    others = [
        model(a=torch.arange(6.0).reshape(3, 2)),
        model(a=-torch.arange(6.0).reshape(2, 3)),
        model(b=torch.ones(())),
    ]
    others.append(model(a=torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)))
    assert len({first, *map(state_sha256, others)}) == 5


def test_environment_names_versions_device_and_time() -> None:
    place = environment(["torch"])
    assert place.versions["torch"] == torch.__version__
    assert {"python", "numpy", "q_core"} <= set(place.versions)
    assert f"{torch.get_num_threads()} threads" in place.device
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", place.date)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_that_of_a_tracked_file_and_marks_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert source_commit(file) is None
    git("init", "-q")
    assert source_commit(file) is None
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert source_commit(file) == commit
    # A result that was just written does not make the code another.
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert source_commit(file) == commit
    file.write_text("a = 2\n")
    assert source_commit(file) == f"{commit}+changes"


def test_float_parts_name_modules_slots_and_what_no_module_shows() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.PReLU(), nn.Flatten(), nn.Linear(27, 2))
    weight = q_core.Recipe(q_core.QuantSpec.signed(4))
    twin, report = q_core.swap(model, [q_core.Rule("0", weight=weight)])
    parts = float_parts(twin, report)
    assert "0 (Conv2d): its input" in parts
    assert any(part.startswith("1 (PReLU)") for part in parts)
    assert any(part.startswith("3 (Linear)") for part in parts)
    assert "biases" in parts
    assert any("additions" in part for part in parts)


def test_float_parts_follow_a_method_that_moves_a_quantizer_to_a_unit_around_its_layers() -> None:
    block = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    recipe = q_core.Recipe(q_core.QuantSpec.signed(4))
    rules = [q_core.Rule(r"0\.0", weight=recipe, input=recipe), q_core.Rule(r"0\.2|1", weight=recipe)]
    twin, report = q_core.swap(nn.Sequential(block, nn.Conv2d(2, 2, 1)), rules)
    twin = wrap_units(twin, ["0", "1"])
    twin[0].input_quantizer, twin[0].body[0].input_quantizer = twin[0].body[0].input_quantizer, nn.Identity()
    assert [part for part in float_parts(twin, report) if "Conv2d" in part] == [
        "0.2 (Conv2d): its input",
        "1 (Conv2d): its input",
    ]
