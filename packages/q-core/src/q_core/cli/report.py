"""One HTML file that shows what quantization did to a network, or to several.

The file needs nothing beside itself: figures and style are inline, and no address outside is named. Whatever comes
from the user, down to the names of layers, is escaped.
"""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from q_core.analysis import Distribution, LayerError
from q_core.cli import figures
from q_core.cli.rows import AccuracyRow
from q_core.methods import FLOAT_BITS

MEASURED = ("bits_per_weight", "bytes_on_disk", "seconds")
"""What the settings of a row hold beside the options: figures of that row."""

_SHOWN_LAYERS = 16

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2330; --soft: #5b6475; --line: #d9dde5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --ink: #e4e7ec; --soft: #9aa3b2; --line: #333a46; }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 68rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.facts, .note { color: var(--soft); font-size: .88rem; max-width: 58rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .5rem 0; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre { background: color-mix(in srgb, var(--ink) 7%, transparent); padding: .7rem 1rem; border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .88rem ui-monospace, monospace; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One line of the table.

    Attributes:
        method: Name of the method, or `"float"`.
        weight_bits: Bits of the weights of the inner layers.
        activation_bits: Bits of the activations of the inner layers.
        accuracy: Correct images in percent.
        bits_per_weight: Stored bits per weight, scales included.
        size: Bytes of the file.
        seconds: Time the method took, None for the float model.
        options: Options of the method.
    """

    method: str
    weight_bits: int
    activation_bits: int
    accuracy: float
    bits_per_weight: float
    size: int
    seconds: float | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> str:
        """The bits as they are written: W4A8 is 4-bit weights and 8-bit activations."""
        return f"W{self.weight_bits}A{self.activation_bits}"


@dataclasses.dataclass(frozen=True)
class LayerView:
    """The layers of one quantized model.

    Attributes:
        name: Method and bits.
        errors: Error of each layer, in the order of execution.
        distributions: What enters each quantizer.
        errors_problem: Why there are no errors, if there are none.
        distributions_problem: Why there are no distributions, if there are none.
    """

    name: str
    errors: Sequence[LayerError]
    distributions: Sequence[Distribution]
    errors_problem: str = ""
    distributions_problem: str = ""


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What the report says of one network.

    Attributes:
        rows: The evidence, the float model first.
        table: The table, a line per row.
        views: The configurations to look into.
    """

    rows: Sequence[AccuracyRow]
    table: Sequence[TableRow]
    views: Sequence[LayerView]


def render(rows: Sequence[AccuracyRow], table: Sequence[TableRow], views: Sequence[LayerView]) -> str:
    """Write the report of one network.

    Args:
        rows: The evidence, the float model first.
        table: The table, a line per row.
        views: The configurations to look into.

    Returns:
        A complete HTML document.
    """
    return render_chapters([Chapter(rows, table, views)])


def render_chapters(chapters: Sequence[Chapter]) -> str:
    """Write the report of one network or several.

    Args:
        chapters: One per network, at least one.

    Returns:
        A complete HTML document.
    """
    several = len(chapters) > 1
    views = [
        dataclasses.replace(view, name=f"{chapter.rows[0].network} {view.name}") if several else view
        for chapter in chapters
        for view in chapter.views
    ]
    networks = " and ".join(dict.fromkeys(chapter.rows[0].network for chapter in chapters))
    datasets = " and ".join(dict.fromkeys(chapter.rows[0].dataset for chapter in chapters))
    title = f"{networks} on {datasets}, quantized"
    body = [
        f"<h1>{_text(title)}</h1>",
        *dict.fromkeys(f"<p class='facts'>{_text(_facts(chapter.rows[0], several))}</p>" for chapter in chapters),
        "<h2>Accuracy</h2>",
        _accuracy_table(chapters),
        *(_errors(view) for view in views),
        *(_histograms(view) for view in views),
        "<h2>What stays float</h2>",
        _stays_float([row for chapter in chapters for row in chapter.rows[1:]], several),
        "<h2>How to reproduce</h2>",
        *(_reproduce(chapter.rows, several) for chapter in chapters),
    ]
    return _PAGE.format(title=_text(title), style=_CSS, body="\n".join(body))


def _facts(row: AccuracyRow, several: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    facts = f"{row.samples:,} images · seed {row.seed} · {row.date} · {row.device} · {versions}"
    return f"{row.network}: {facts}" if several else facts


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _accuracy_table(chapters: Sequence[Chapter]) -> str:
    network = ["network"] if len(chapters) > 1 else []
    texts = [*network, "method", "bits"]
    heads = [*texts, "accuracy", "against float", "bits per weight", "bytes on disk", "seconds"]
    lines = []
    for chapter, row in ((each, row) for each in chapters for row in each.table):
        is_float = row.weight_bits == row.activation_bits == FLOAT_BITS
        cells = [
            f"{row.accuracy:.2f} %",
            "" if is_float else f"{row.accuracy - chapter.table[0].accuracy:+.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.size:,}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        names = [chapter.rows[0].network] if network else []
        lines.append(
            f"<tr>{''.join(f'<td>{_text(name)}</td>' for name in (*names, row.method, row.bits))}"
            + "".join(f"<td class='number'>{_text(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(
        f"<th{' class=number' if i >= len(texts) else ''}>{_text(name)}</th>" for i, name in enumerate(heads)
    )
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "<p class='note'>W4A8 means 4-bit weights and 8-bit activations in the inner layers. Accuracy is top-1; the "
        "column beside it is the difference to the float model in points. Bits per weight count codes, scales and "
        "codebooks. Bytes are those of the whole file. Seconds are what the method took, without evaluation. Each "
        "quantized model was packed, written, read again and evaluated to the same logits, bit for bit.</p>"
    )


def _errors(view: LayerView) -> str:
    heading = f"<h2>Error of each layer: {_text(view.name)}</h2>"
    if not view.errors:
        return f"{heading}<p class='note'>not measured: {_text(view.errors_problem)}</p>"
    note = (
        "Signal-to-quantization-noise ratio of each layer's output; more is better, 6 dB are about one bit. "
        "<em>Local</em>: the layer alone is quantized and sees the input of the float network. <em>Accumulated</em>: "
        "its output in the quantized network, with all errors before it. From top to bottom in the order of execution."
    )
    return (
        f"{heading}<p class='note'>{note}</p><figure>{figures.error_bars(view.errors, view.name + ' errors')}</figure>"
    )


def _histograms(view: LayerView) -> str:
    heading = f"<h2>Weights and activations: {_text(view.name)}</h2>"
    if not view.distributions:
        return f"{heading}<p class='note'>not measured: {_text(view.distributions_problem)}</p>"
    paths = list(dict.fromkeys(entry.path for entry in view.distributions))
    chosen = _chosen(paths, view.errors)
    which = (
        f"all {len(paths)} layers"
        if len(chosen) == len(paths)
        else (f"{len(chosen)} of {len(paths)} layers: the first, the last, and those with the lowest local SQNR")
    )
    entries = [entry for entry in view.distributions if entry.path in chosen]
    note = (
        f"What enters the quantizers of {which}. Red: the levels that are there to hold it, as lines, or as a band of "
        f"ticks at the foot where there are more than {figures.LINES}; whatever lies outside them is clipped. Heights "
        "are on a logarithmic scale. Where each channel has a scale of its own, values are divided by the largest "
        "level of their channel."
    )
    return (
        f"{heading}<p class='note'>{_text(note)}</p>"
        f"<figure>{figures.histograms(entries, view.name + ' histograms')}</figure>"
    )


def _chosen(paths: list[str], errors: Sequence[LayerError]) -> set[str]:
    if len(paths) <= _SHOWN_LAYERS:
        return set(paths)
    worst = [error.path for error in sorted(errors, key=lambda error: error.local)] or paths
    ranked = dict.fromkeys([paths[0], paths[-1], *(path for path in worst if path in paths)])
    return set(list(ranked)[:_SHOWN_LAYERS])


def _stays_float(rows: Sequence[AccuracyRow], several: bool) -> str:
    """List it once for each different list, open where it is short."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        name = f"{row.method} W{row.weight_bits}A{row.activation_bits}"
        groups.setdefault(row.stays_float, []).append(f"{row.network} {name}" if several else name)
    blocks = []
    for parts, names in groups.items():
        items = "".join(f"<li>{_text(part)}</li>" for part in parts)
        is_open = " open" if len(parts) <= _SHOWN_LAYERS else ""
        blocks.append(
            f"<details{is_open}><summary>{_text(', '.join(names))}: {len(parts)} entries</summary>"
            f"<ul>{items}</ul></details>"
        )
    return "\n".join(blocks)


def _reproduce(rows: Sequence[AccuracyRow], several: bool) -> str:
    row = rows[0]
    settings: dict[str, list[str]] = {}
    for name, value in (item for row in rows for item in row.settings.items() if item[0] not in MEASURED):
        known = settings.setdefault(name, [])
        if str(value) not in known:
            known.append(str(value))
    facts = [
        ("SHA-256 of the float weights", row.checkpoint_sha256),
        ("commit", row.commit or "not run from a checkout"),
        *((name, "; ".join(values)) for name, values in settings.items()),
    ]
    lines = "".join(f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>" for name, value in facts)
    heading = f"<h3>{_text(row.network)}</h3>" if several else ""
    return f"{heading}<pre><code>{_text(row.command)}</code></pre><table>{lines}</table>"
