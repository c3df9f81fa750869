"""Writes the measured tables of the documentation from `benchmarks/results`.

    python benchmarks/tables.py [--check]

Rows are only ever appended to the results; of several rows of one cell the last one counts. With `--check` nothing is
written, and a table that is not the one of the rows ends the command with an error.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reference" / "results.md"
BITS = ("W8A8", "W6A6", "W4A4", "W3A3", "W2A4")
EMPTY = "No rows yet."
ADDER = "adder-"  # what the benchmarks of adder layers are called begins so
RECONSTRUCTION = "reconstruction-"  # and those of reconstruction
NULSQ = "nulsq-"  # and those of learned steps

Row = dict[str, Any]


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a table is stale")
    check = parser.parse_args().check
    text = page = PAGE.read_text(encoding="utf-8")
    for name, make in BLOCKS.items():
        text = fill(text, name, make())
    if text == page:
        print(f"{PAGE.relative_to(ROOT)} is what the rows say")
    elif check:
        sys.exit(f"{PAGE.relative_to(ROOT)} is stale: run python benchmarks/tables.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")


def fill(text: str, name: str, block: str) -> str:
    """Replace what stands between the markers of a block."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        sys.exit(f"{PAGE.relative_to(ROOT)}: expected one block between {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", text)


def read(area: str, cell: Callable[[Row], tuple[Any, ...]]) -> list[Row]:
    """Return the last row of each cell of an area, in the order in which the cells first appear."""
    newest: dict[tuple[Any, ...], Row] = {}
    for path in sorted((RESULTS / area).glob("**/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            newest[cell(row)] = row
    return list(newest.values())


def accuracy() -> str:
    """One section per network: observers and granularities down, bits across."""
    rows = read("accuracy", lambda row: (row["dataset"], row["network"], row["method"], bits(row), *variant(row)))
    rows = [row for row in rows if not {"variant", "method"} & row["settings"].keys()]
    networks = sorted({(row["dataset"], row["network"]) for row in rows})
    sections = [section(*key, [row for row in rows if (row["dataset"], row["network"]) == key]) for key in networks]
    return "\n\n".join(sections) or EMPTY


ADDER_BITS = ("W8A8", "W6A6", "W5A5", "W4A4", "W3A3", "W2A2")


def adder_accuracy() -> str:
    """One section per network: variants down, bits across."""

    def cell(row: Row) -> tuple[Any, ...]:
        return row["network"], row["settings"].get("variant"), row["settings"].get("alpha"), bits(row), row["seed"]

    rows = [row for row in read("accuracy", cell) if "variant" in row["settings"] and not is_qat(row)]
    sections = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        exact = next((f"{row['value']:.2f}" for row in own if row["method"] == "float"), "")
        cells: dict[tuple[str, str], list[float]] = {}
        for row in own:
            if row["method"] != "float":
                alpha = row["settings"].get("alpha")
                name = row["settings"]["variant"] + ("" if alpha is None else f" = {alpha}")
                cells.setdefault((name, bits(row)), []).append(row["value"])
        names = dict.fromkeys(name for name, _ in cells)
        lines = [[name, exact, *(mean_and_spread(cells.get((name, b), [])) for b in ADDER_BITS)] for name in names]
        labels = distinct("yes" if row["settings"].get("labels") else "no" for row in own if row["method"] != "float")
        sections += [
            f"### {network}",
            table(["variant", "FP32", *ADDER_BITS], lines, left=1),
            f"Top-1 accuracy in percent on {distinct(row['samples'] for row in own)} images of "
            f"{distinct(row['dataset'] for row in own)}. Labels used: {labels}. "
            f"Seeds: {distinct(row['seed'] for row in own)}. "
            f"Float checkpoint: {distinct(row['checkpoint_sha256'][:12] for row in own)}. Commit: {commits(own)}.",
            "Stays float: " + "; ".join(by_kind([row for row in own if row["method"] != "float"])) + ".",
            machine(own),
            "\n".join(["```console", *dict.fromkeys(row["command"] for row in own), "```"]),
        ]
    return "\n\n".join(sections) or EMPTY


RECONSTRUCTION_BITS = ("W4A4", "W2A4", "W32A4", "W3A3", "W2A2", "W32A2")


def reconstruction_accuracy() -> str:
    """One section per network and number of steps: methods with their placement down, bits across."""

    def cell(row: Row) -> tuple[Any, ...]:
        settings = row["settings"]
        return row["network"], settings.get("method"), settings.get("iterations"), bits(row), row["seed"]

    found = read("accuracy", cell)
    rows = [row for row in found if "method" in row["settings"] and not row["settings"].get("past")]
    sections = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        cells: dict[tuple[str, str, str, str], list[float]] = {}
        for row in own:
            settings = row["settings"]
            steps = "none" if settings["iterations"] is None else f"{settings['iterations']:,}"
            cells.setdefault((settings["method"], settings["placement"], steps, bits(row)), []).append(row["value"])
        names = dict.fromkeys(key[:3] for key in cells)
        shown_bits = [each for each in RECONSTRUCTION_BITS if any(key[3] == each for key in cells)]
        lines = [[*name, *(mean_and_spread(cells.get((*name, each), [])) for each in shown_bits)] for name in names]
        sections += [
            f"### {network}, reconstructed",
            table(["method", "placement", "steps", *shown_bits], lines, left=2),
            f"Top-1 accuracy in percent on {distinct(row['samples'] for row in own)} images of "
            f"{distinct(row['dataset'] for row in own)}, mean over seeds with the least and the largest. "
            f"Seeds: {distinct(row['seed'] for row in own)}. "
            f"Calibration images: {distinct(row['settings']['calibration_images'] for row in own)}, without labels. "
            f"First and last layer: {distinct(row['settings']['edge_bits'] for row in own)} bits. "
            f"Learning rates: {distinct(row['settings']['rates'] for row in own if row['settings']['rates'])}. "
            f"Float checkpoint: {distinct(row['checkpoint_sha256'][:12] for row in own)}. Commit: {commits(own)}.",
            machine(own),
            "\n".join(["```console", *dict.fromkeys(row["command"] for row in own), "```"]),
        ]
    return "\n\n".join(sections) or EMPTY


def is_qat(row: Row) -> bool:
    """Tell whether `accuracy/qat.py` wrote a row: only there what quantizers learn has a learning rate of its own."""
    return "step_lr" in row["settings"]


BUDGET = ("steps", "batch", "lr", "step_lr", "weight_decay", "warmup", "frozen_norms", "precision")


def qat_accuracy() -> str:
    """One section per network, in it a table per budget: variants down, bits across."""

    def cell(row: Row) -> tuple[Any, ...]:
        settings = row["settings"]
        named = (row["dataset"], row["network"], row["method"], settings.get("variant"), bits(row), row["seed"])
        return (*named, *(settings.get(name) for name in BUDGET))

    every = read("accuracy", cell)
    rows = [row for row in every if is_qat(row)]
    sections = []
    for dataset, network in dict.fromkeys((row["dataset"], row["network"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["network"]) == (dataset, network)]
        checkpoints = {row["checkpoint_sha256"] for row in own}
        exact = distinct(
            f"{row['value']:.2f}"
            for row in every
            if row["method"] == "float" and row["dataset"] == dataset and row["checkpoint_sha256"] in checkpoints
        )
        sections.append(f"### {network}, trained" + (", on held-out images" if dataset.endswith("held out") else ""))
        for budget in dict.fromkeys(tuple(row["settings"][name] for name in BUDGET) for row in own):
            some = [row for row in own if tuple(row["settings"][name] for name in BUDGET) == budget]
            cells: dict[tuple[str, str], list[float]] = {}
            for row in some:
                cells.setdefault((row["settings"]["variant"], bits(row)), []).append(row["value"])
            across = sorted({key[1] for key in cells})
            lines = [
                [name, *(mean_and_spread(cells.get((name, each), [])) for each in across)]
                for name in dict.fromkeys(name for name, _ in cells)
            ]
            seeds = distinct(row["seed"] for row in some)
            sections += [
                f"{described(dict(zip(BUDGET, budget, strict=True)))} Seeds: {seeds}"
                + ("; where there is one figure, one of them." if "," in seeds else "."),
                table(["variant", *across], lines, left=1),
                "\n".join(["```console", *dict.fromkeys(row["command"] for row in some), "```"]),
            ]
        sections += [
            f"Top-1 accuracy in percent on {distinct(row['samples'] for row in own)} images of {dataset}, "
            f"mean over seeds with the least and the largest. Float: {exact or 'not measured'}. "
            "First and last layer: 8 bits. "
            f"Calibration images: {distinct(row['settings']['calibration_images'] for row in own)}. "
            f"Float checkpoint: {distinct(each[:12] for each in checkpoints)}. Commit: {commits(own)}.",
            "Stays float: " + "; ".join(by_kind(own)) + ".",
            machine(own),
        ]
    return "\n\n".join(sections) or EMPTY


def described(budget: dict[str, Any]) -> str:
    """Say what every row of a table was given."""
    images = budget["steps"] * budget["batch"]
    text = (
        f"{budget['steps']:,} steps of {budget['batch']} images, {images:,} in all; learning rates {budget['lr']:g} "
        f"for weights and {budget['step_lr']:g} for what quantizers learn, weight decay {budget['weight_decay']:g}, "
        f"{budget['warmup']} steps of warm-up"
    )
    text += ", statistics of batch norms as in the float network" if budget["frozen_norms"] else ""
    return text + ("." if budget["precision"] == "float32" else f", computed in {budget['precision']}.")


def reconstruction_past() -> str:
    """One line per part on top of AQuant: accuracy on images that judge, and the difference from the base, per seed."""

    def cell(row: Row) -> tuple[Any, ...]:
        return row["dataset"], row["settings"].get("method"), row["settings"].get("iterations"), row["seed"]

    rows = [row for row in read("accuracy", cell) if row["settings"].get("past")]
    if not rows:
        return EMPTY
    values = {(row["settings"]["method"], row["seed"]): row["value"] for row in rows}
    names = list(dict.fromkeys(name for name, _ in values))
    seeds = sorted({seed for _, seed in values})
    base = names[0]
    lines = []
    for name in names:
        shown_values = [f"{values[name, seed]:.2f}" if (name, seed) in values else "" for seed in seeds]
        gains = [
            f"{values[name, seed] - values[base, seed]:+.2f}" if {(name, seed), (base, seed)} <= values.keys() else ""
            for seed in seeds
        ]
        lines.append([name, *shown_values, *(gains if name != base else [""] * len(seeds))])
    head = ["variant", *(f"seed {seed}" for seed in seeds), *(f"difference, seed {seed}" for seed in seeds)]
    return "\n\n".join(
        [
            table(head, lines, left=1),
            f"Top-1 accuracy of {distinct(row['network'] for row in rows)} at W2A2 in percent on "
            f"{distinct(row['samples'] for row in rows)} images of {distinct(row['dataset'] for row in rows)}, which "
            "the float network was trained on. "
            f"Steps for each unit: {distinct(row['settings']['iterations'] for row in rows)}. "
            f"Float checkpoint: {distinct(row['checkpoint_sha256'][:12] for row in rows)}. Commit: {commits(rows)}.",
            machine(rows),
            "\n".join(["```console", *dict.fromkeys(row["command"] for row in rows), "```"]),
        ]
    )


def by_kind(rows: list[Row]) -> list[str]:
    """Count the layers that stay float by their type, where a row names each."""
    counted: dict[str, int] = {}
    for part in rows[-1]["stays_float"] if rows else []:
        named = re.fullmatch(r"(?P<path>.*) \((?P<kind>\w+)\): .*", part)
        counted[named["kind"] if named else part] = counted.get(named["kind"] if named else part, 0) + 1
    return [name if count == 1 else f"{count} {name}" for name, count in counted.items()]


def mean_and_spread(values: list[float]) -> str:
    """Show one value, or the mean of several with the least and the largest."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def bits(row: Row) -> str:
    return "FP32" if row["method"] == "float" else f"W{row['weight_bits']}A{row['activation_bits']}"


def variant(row: Row) -> tuple[str, str]:
    settings = row["settings"]
    return settings.get("observer", ""), settings.get("weight_granularity", "")


def section(dataset: str, network: str, rows: list[Row]) -> str:
    quantized = [row for row in rows if row["method"] != "float"]
    exact = next((f"{row['value']:.2f}" for row in rows if row["method"] == "float"), "")
    cells = {(row["method"], *variant(row), bits(row)): f"{row['value']:.2f}" for row in quantized}
    stored = {(variant(row)[1], bits(row)): row["settings"].get("bits_per_weight") for row in quantized}
    lines = [
        [
            method,
            observer,
            f"per {granularity}",
            exact,
            *(cells.get((method, observer, granularity, b), "") for b in BITS),
        ]
        for method, observer, granularity in dict.fromkeys((row["method"], *variant(row)) for row in quantized)
    ]
    lines += [
        ["bits per weight", "", f"per {granularity}", "32", *(f"{stored.get((granularity, b)) or '':.5}" for b in BITS)]
        for granularity in dict.fromkeys(granularity for granularity, _ in stored)
    ]
    return "\n\n".join(
        [
            f"### {network}",
            table(["method", "observer", "weight scale", "FP32", *BITS], lines, left=3),
            f"Top-1 accuracy in percent on {distinct(row['samples'] for row in rows)} images of {dataset}. "
            f"Seeds: {distinct(row['seed'] for row in rows)}. "
            f"Float checkpoint: {distinct(row['checkpoint_sha256'][:12] for row in rows)}. "
            f"Commit: {commits(rows)}. First and last layer: at least "
            f"{distinct(row['settings'].get('edge_bits') for row in quantized)} bits. "
            f"Calibration images: {distinct(row['settings'].get('calibration_images') for row in quantized)}.",
            "Stays float: " + "; ".join(dict.fromkeys(part for row in quantized for part in row["stays_float"])) + ".",
            machine(rows),
            "\n".join(["```console", *dict.fromkeys(row["command"] for row in rows), "```"]),
        ]
    )


def speed() -> str:
    """One table of all comparisons."""
    names = ("benchmark", "case", "peer", "threads", "device")
    rows = read("speed", lambda row: tuple(row.get(name) for name in names))
    rows = [row for row in rows if not row["benchmark"].startswith((ADDER, RECONSTRUCTION, NULSQ))]
    if not rows:
        return EMPTY
    lines = [
        [
            row["benchmark"],
            row["case"],
            f"{row['ours_seconds']:.3g}",
            row["peer"],
            f"{row['peer_seconds']:.3g}",
            f"{row['ratio']:.2f}",
            shown(row["spread"]),
            str(row["threads"]),
        ]
        for row in sorted(rows, key=lambda row: (row["benchmark"], row["case"], row["peer"], row["threads"]))
    ]
    head = ["benchmark", "case", "ours (s)", "peer", "peer (s)", "ratio", "spread", "threads"]
    return "\n\n".join([table(head, lines, left=2), f"Commit: {commits(rows)}.", machine(rows)])


def adder_speed() -> str:
    """Goals first, then one table for each kind of measurement."""
    rows = [row for row in read("speed", adder_cell) if row["benchmark"].startswith(ADDER)]
    if not rows:
        return EMPTY
    chosen = [row for row in rows if row["chosen"]]

    def across(benchmark: str, first: str, value: Callable[[Row], str]) -> str:
        """One line for each case, our party and number of threads; the peers across."""
        some = [row for row in chosen if row["benchmark"] == benchmark]
        peers = list(dict.fromkeys(row["peer"] for row in some))
        lines: dict[tuple[Any, ...], list[str]] = {}
        for row in some:
            key = (row["case"], row["ours"], row["threads"])
            if key not in lines:
                lines[key] = [row["case"], row["ours"], row["kernel"], str(row["threads"]), value(row)]
                lines[key] += [""] * len(peers)
            lines[key][5 + peers.index(row["peer"])] = factor(row)
        head = [first, "ours", "kernel", "threads", "memory" if benchmark.endswith("memory") else "time"]
        return table([*head, *(f"vs {peer}" for peer in peers)], list(lines.values()), left=3)

    def milliseconds(row: Row) -> str:
        return f"{1e3 * row['ours_seconds']:.3g} ms"

    parts = [
        goals(chosen),
        "#### Forward in float32",
        across("adder-forward", "layer", milliseconds),
        "#### Forward on integer codes",
        across("adder-codes", "layer", milliseconds),
        "#### Deployed layer, from floats to floats",
        across("adder-layer", "layer", milliseconds),
        "#### Kernels on integer codes, asked for by name",
        kernels([row for row in rows if not row["chosen"]]),
        "#### Training",
        across("adder-step", "network", milliseconds),
        across("adder-memory", "network", lambda row: f"{row['ours_bytes'] / 2**20:.0f} MiB"),
        f"Commit: {commits(rows)}.",
        machine(rows),
    ]
    return "\n\n".join(parts)


MEASURED = {
    "step": "A step of all units",
    "once": "What is done once, of all units: passes over the images, and looks",
    "run": "A whole run, put together of both",
    "memory": "Peak memory of a run",
}


def reconstruction_speed() -> str:
    """One table for each kind of measurement."""

    def cell(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("benchmark", "case", "ours", "peer", "threads", "device"))

    rows = [row for row in read("speed", cell) if row["benchmark"].removeprefix(RECONSTRUCTION) in MEASURED]
    parts = []
    for kind, title in MEASURED.items():
        some = [row for row in rows if row["benchmark"] == RECONSTRUCTION + kind]
        lines = [
            [
                row["case"],
                row["ours"],
                size(row, "ours"),
                row["peer"],
                size(row, "peer"),
                f"{row['ratio']:.2f}",
                *([] if kind == "memory" else [shown(row["spread"])]),
                "" if row["target"] is None else f"at most {row['target']:.3g}, {'met' if row['met'] else 'missed'}",
                str(row["threads"]),
            ]
            for row in some
        ]
        spread = [] if kind == "memory" else ["spread"]
        head = ["case", "ours", "takes", "peer", "takes", "ratio", *spread, "goal", "threads"]
        parts += [f"#### {title}", table(head, lines, left=2)] if some else []
    if not rows:
        return EMPTY
    images = f"Network and images: {distinct(row['images'] for row in rows)}."
    return "\n\n".join([*parts, f"{images} Commit: {commits(rows)}.", machine(rows)])


def nulsq_speed() -> str:
    """Goals first, then one table for each kind of measurement."""
    names = ("benchmark", "case", "ours", "bits", "peer", "threads", "device")
    rows = [
        row
        for row in read("speed", lambda row: tuple(row.get(name) for name in names))
        if row["benchmark"].startswith(NULSQ)
    ]
    if not rows:
        return EMPTY
    quantize, saved, step = (
        [row for row in rows if row["benchmark"] == NULSQ + kind] for kind in ("quantize", "saved", "step")
    )
    kept = {(row["case"], row["bits"]): row for row in saved}
    parts = [
        nulsq_goals(rows),
        "#### One tensor, forward and backward",
        pairs_across(quantize, "tensor"),
        "#### What is kept for the backward pass beyond the tensor, in bytes for each element",
        table(
            ["tensor", "bits", "ours", distinct(row["peer"] for row in saved)],
            [[case, str(b), f"{row['ours_bytes']:.3g}", f"{row['peer_bytes']:.3g}"] for (case, b), row in kept.items()],
            left=1,
        ),
        "#### One step of training",
        pairs_across(step, "network"),
        f"Commit: {commits(rows)}.",
        machine(rows),
    ]
    return "\n\n".join(parts)


def pairs_across(rows: list[Row], first: str) -> str:
    """One line for each case, bits and threads; across, each of ours with its time and how much faster than a peer."""
    pairs = list(dict.fromkeys((row["ours"], row["peer"]) for row in rows))
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        line = [row["case"], str(row["bits"]), row["kernel"], str(row["threads"]), *[""] * len(pairs)]
        line = lines.setdefault((row["case"], row["bits"], row["threads"]), line)
        line[4 + pairs.index((row["ours"], row["peer"]))] = f"{1e3 * row['ours_seconds']:.3g} ms, {factor(row)}"
    head = [first, "bits", "kernel", "threads", *(f"{ours}, vs {peer}" for ours, peer in pairs)]
    return table(head, list(lines.values()), left=1)


def nulsq_goals(rows: list[Row]) -> str:
    """One line for each goal: what it asks for, what was measured, and where it was missed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["target"] is not None:
            groups.setdefault((row["benchmark"], row["ours"], row["peer"], row["target"]), []).append(row)
    lines = []
    for (benchmark, ours, peer, target), group in groups.items():
        memory = benchmark == f"{NULSQ}saved"
        # A ratio up to 1 is told as how many times as fast, one above as how many times as long.
        turned = not memory and target <= 1
        values = [row["ours_bytes"] if memory else 1 / row["ratio"] if turned else row["ratio"] for row in group]
        asked = (
            f"at most {target:g} byte an element"
            if memory
            else ("as fast or faster" if target == 1 else f"{1 / target:.3g} times as fast or more")
            if turned
            else f"at most {target:.3g} times as long"
        )
        missed = [
            f"{row['case']}, {row['bits']} bits, {row['threads']} threads: {value:.3g}"
            for row, value in zip(group, values, strict=True)
            if not row["met"]
        ]
        kind = benchmark.removeprefix(NULSQ)
        lines.append(
            [f"{ours}, {kind}", "" if memory else peer, asked, shown_range(values), "; ".join(missed) or "none"]
        )
    return table(["ours", "peer", "goal", "measured", "missed by"], lines, left=5)


def size(row: Row, party: str) -> str:
    if row["benchmark"].endswith("memory"):
        return f"{row[f'{party}_bytes'] / 2**20:.0f} MiB"
    return f"{row[f'{party}_seconds']:.3g} s"


def adder_cell(row: Row) -> tuple[Any, ...]:
    # Which kernel is chosen may change; a kernel that was asked for by name is a cell of its own.
    kernel = row.get("kernel") if not row.get("chosen") else None
    return (*(row.get(name) for name in ("benchmark", "case", "ours", "peer", "threads", "device")), kernel)


def factor(row: Row) -> str:
    """How many times as fast as the peer, with the spread of the rounds; of memory how many times as much."""
    if row["benchmark"].endswith("memory"):
        return f"{row['ratio']:.3g}"
    low, high = sorted(1 / value for value in row["spread"])
    return f"{1 / row['ratio']:.3g} ({low:.3g} to {high:.3g})"


def goals(rows: list[Row]) -> str:
    """One line for each goal: what it asks for, and the measurements that are nearest to missing it."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["target"] is not None:
            groups.setdefault((row["benchmark"], row["ours"], row["peer"], row["target"]), []).append(row)
    lines = []
    for (benchmark, ours, peer, target), group in groups.items():
        ordered = sorted(group, key=lambda row: row["ratio"], reverse=True)
        missed = [
            f"{row['case']}, {row['threads']} threads: {1 / row['ratio']:.3g}" for row in ordered if not row["met"]
        ]
        memory = benchmark.endswith("memory")
        asked = f"at most {target:.3g} times the memory" if memory else f"{1 / target:.3g} times as fast or more"
        ends = [ordered[0]["ratio"], ordered[-1]["ratio"]]
        found = shown_range(ends if memory else [1 / value for value in ends])
        kind = benchmark.removeprefix(ADDER)
        lines.append(
            [ours if ours == f"training {kind}" else f"{ours}, {kind}", peer, asked, found, "; ".join(missed) or "none"]
        )
    return table(["ours", "peer", "goal", "measured", "missed by"], lines, left=5)


def shown_range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def kernels(rows: list[Row]) -> str:
    """Pairs (tap, position, output) a second in thousand millions; the kernels across."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        key = (row["case"], row["ours"], row["threads"])
        line = lines.setdefault(key, [row["case"], row["ours"], str(row["threads"]), *[""] * len(names)])
        line[3 + names.index(row["kernel"])] = f"{row['pairs'] / row['ours_seconds'] / 1e9:.0f}"
    rates = table(["layer", "codes", "threads", *names], list(lines.values()), left=2)
    return f"In 10⁹ absolute differences a second, all threads together.\n\n{rates}"


def shown(value: Any) -> str:
    """Show a figure or a few, such as the ends of a spread."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return " to ".join(f"{each:.2f}" for each in values)


def commits(rows: list[Row]) -> str:
    """Shorten the commits; `+changes` marks rows of a tree with uncommitted files."""
    return distinct(re.sub(r"^(\w{10})\w*", r"\1", row["commit"] or "unknown") for row in rows)


def machine(rows: list[Row]) -> str:
    versions = sorted({f"{name} {version}" for row in rows for name, version in row["versions"].items()})
    dates = sorted(row["date"][:10] for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"Measured on {distinct(row['device'] for row in rows)}, {when}, with {', '.join(versions)}."


def distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({f"{value:,}" if isinstance(value, int) else str(value) for value in values}))


def table(head: list[str], lines: list[list[str]], *, left: int) -> str:
    """Write a Markdown table whose first columns are left-aligned."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


BLOCKS = {
    "accuracy": accuracy,
    "adder-accuracy": adder_accuracy,
    "reconstruction-accuracy": reconstruction_accuracy,
    "reconstruction-past": reconstruction_past,
    "qat-accuracy": qat_accuracy,
    "speed": speed,
    "adder-speed": adder_speed,
    "reconstruction-speed": reconstruction_speed,
    "nulsq-speed": nulsq_speed,
}

if __name__ == "__main__":
    main()
