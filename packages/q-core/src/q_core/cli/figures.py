"""Figures of the report, as SVG that can stand inside an HTML page.

Text and axes take the colour of the page, so that a figure reads in light and in dark. Identifiers are unique to a
figure, so that many can share a page. The same data give the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from q_core.analysis import Distribution, LayerError

LINES = 32
"""More levels than this would hide a histogram if each were a line."""

_INK = "#010203"  # stands for the colour of the text of the page, which matplotlib cannot name
_LOCAL, _ACCUMULATED, _LEVELS = "#4c8fd6", "#e08a3c", "#d6455d"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "path.simplify": False,
    "text.parse_math": False,  # a dollar in the name of a layer is a dollar
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}


def error_bars(errors: Sequence[LayerError], label: str) -> str:
    """Draw the SQNR of each layer, local and accumulated, from top to bottom.

    Args:
        errors: At least one entry.
        label: What the figure shows; no other figure of the page has the same.
    """
    return _svg(lambda: _error_figure(errors), label)


def histograms(entries: Sequence[Distribution], label: str) -> str:
    """Draw small multiples of histograms with the levels over them.

    Args:
        entries: At least one entry.
        label: What the figure shows; no other figure of the page has the same.
    """
    return _svg(lambda: _histogram_figure(entries), label)


def short(path: str, limit: int = 26) -> str:
    """Cut the front of a path that is too long for a label."""
    name = path or "the model"
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def _error_figure(errors: Sequence[LayerError]) -> Figure:
    series = (
        ("local", _LOCAL, -0.2, [error.local for error in errors]),
        ("accumulated", _ACCUMULATED, 0.2, [error.accumulated for error in errors]),
    )
    finite = [value for *_, values in series for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([10.0, *finite])
    # An infinite ratio is drawn to the edge of the figure and labelled, so that it is not taken for a number.
    edge = high + 0.1 * (high - low)
    figure = Figure(figsize=(9, 0.8 + 0.34 * len(errors)))
    axes = figure.subplots()
    for name, color, offset, values in series:
        places = [index + offset for index in range(len(values))]
        drawn = [min(max(value, low), edge) for value in values]
        axes.barh(places, drawn, height=0.36, color=color, label=name)
        for place, value, width in zip(places, values, drawn, strict=True):
            text = "exact" if value == math.inf else f"{value:.1f}"
            axes.text(max(width, 0) + 0.005 * (edge - low), place, text, va="center", fontsize=7)
    axes.set_yticks(range(len(errors)), [short(error.path) for error in errors])
    axes.set_ylim(len(errors) - 0.5, -0.5)
    axes.set_xlim(low, edge + 0.06 * (edge - low))
    axes.set_xlabel("SQNR, dB")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.25, color=_INK, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure


def _histogram_figure(entries: Sequence[Distribution]) -> Figure:
    columns = 4
    lines = math.ceil(len(entries) / columns)
    figure = Figure(figsize=(11.5, 1.75 * lines + 0.2))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, entry in zip(panels, entries, strict=False):
        _draw_histogram(axes, entry)
    for axes in panels[len(entries) :]:
        axes.set_axis_off()
    figure.tight_layout(h_pad=1.2, w_pad=1.0)
    return figure


def _draw_histogram(axes: Axes, entry: Distribution) -> None:
    levels, foot = entry.levels.tolist(), axes.get_xaxis_transform()
    axes.set_yscale("log")
    axes.stairs(entry.counts.clamp(min=0.5).tolist(), entry.edges.tolist(), baseline=0.5, fill=True, color=_LOCAL)
    axes.set_ylim(0.5, max(2.0, 2.0 * float(entry.counts.max())))
    many = len(levels) > LINES
    for places, height, width in (([levels[0], levels[-1]] if many else levels, 1, 0.9), (levels, 0.06, 0.3)):
        # One path with gaps is a tenth of the bytes of a path per line.
        x = [part for place in places for part in (place, place, math.nan)]
        axes.plot(x, [0, height, math.nan] * len(places), transform=foot, color=_LEVELS, linewidth=width)
    axes.set_title(f"{short(entry.path)} {entry.tensor}", fontsize=8, loc="left", pad=12)
    share = f", {100 * entry.clipped:.2g} % clipped" if entry.clipped else ""
    axes.text(0, 1.02, f"{len(levels)} levels{share}", transform=axes.transAxes, va="bottom", fontsize=6.5)
    axes.locator_params(axis="x", nbins=4)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=6.5, length=2)
    axes.tick_params(which="minor", length=0)


def _svg(draw: Callable[[], Figure], label: str) -> str:
    buffer = io.StringIO()
    # The salt makes the identifiers of a figure its own, and the same in every run.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = draw()
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>",
        r"<style[^>]*>.*?</style>",  # the page has the same rules, and they would apply to all of it
        r' xmlns(:xlink)?="[^"]*"',  # HTML knows these names
        r' id="[^"]*_\d+"',  # numbered anew in each figure, and referred to by nothing
    ):
        drawing = re.sub(pattern, "", drawing, flags=re.DOTALL)
    width = re.search(r'viewBox="0 0 ([\d.]+) ', drawing)
    size = f' style="max-width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    drawing = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img"{size}>', drawing, count=1)
    return drawing.replace(_INK, "currentColor")
