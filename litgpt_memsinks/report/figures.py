"""How does a chart look in a paper? `Chart` → SVG, PDF or PNG, by matplotlib."""

from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from litgpt_memsinks.files import incomplete_path
from litgpt_memsinks.report.charts import Chart, Series
from litgpt_memsinks.report.results import Results
from litgpt_memsinks.report.svg import legend, limits, marked_place, ticks

COLOURS = ("#0a7bc2", "#d55e00", "#00936f", "#a03a90", "#2c3036", "#8a6d00", "#5a55d6", "#7d858f")
"""The light ones of `page.css`: near Okabe and Ito's, darkened to a contrast of 3 on white"""
MARKERS = "osD^vPHs"
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "litgpt-memsinks",  # the same bytes each time
}


def overview(results: Results, charts: list[Chart], out_file: Path) -> None:
    """Draw three pictures side by side: training, what is left, and at what cost.

    Args:
        results: For the title.
        charts: Those to show.
        out_file: PNG, SVG or PDF, by its ending.
    """
    seeds = len({model.get("seed") for model in results.models})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 5), layout="constrained")
        all_axes = figure.subplots(1, max(1, len(charts)), squeeze=False)[0]
        for axes, chart in zip(all_axes, charts, strict=False):
            draw(axes, chart)
        figure.suptitle(f"Memorization sinks, {seeds} seed(s), sinks dropped unless said")
        save(figure, out_file)


def write_figure(chart: Chart, out_file: Path) -> None:
    """Draw one chart; PNG, SVG or PDF by the ending of ``out_file``."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        draw(figure.subplots(), chart)
        save(figure, out_file)


def save(figure: Figure, out_file: Path) -> None:
    """Write a figure so that a reader never sees a part of it."""
    out_file.parent.mkdir(parents=True, exist_ok=True)
    scratch = incomplete_path(out_file)
    form = out_file.suffix.lstrip(".").lower()
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    figure.savefig(scratch, dpi=110 if form == "png" else 300, format=form, metadata=dated)
    scratch.replace(out_file)


def draw(axes: Axes, chart: Chart) -> None:
    """Draw a chart into axes."""
    for place, series in enumerate(chart.series):
        shift = 0.14 * (place - (len(chart.series) - 1) / 2) if chart.y.categories else 0.0
        _draw_series(axes, chart, series, shift)
    for guide in chart.guides:
        if guide.x is not None:
            axes.axvline(guide.x, color="#6b7280", linewidth=0.8, zorder=1)
        if guide.y is not None:
            axes.axhline(guide.y, color="#6b7280", linewidth=0.8, zorder=1)
    if chart.diagonal:
        axes.axline((0.1, 0.1), (1, 1), color="#6b7280", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set(title=_plain(chart.title), xlabel=_plain(chart.x.label), ylabel=_plain(chart.y.label))
    for axis, spec, name in ((axes.xaxis, chart.x, "x"), (axes.yaxis, chart.y, "y")):
        ends = limits(chart, name)
        axes.set(**{f"{name}scale": "log" if spec.log else "linear", f"{name}lim": ends})
        axis.set_ticks(*zip(*[(value, _plain(text)) for value, text in ticks(spec, ends)], strict=True))
        axis.set_ticks([], minor=True)
    if legend(chart):
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=2)


def _draw_series(axes: Axes, chart: Chart, series: Series, shift: float) -> None:
    colour, marker = COLOURS[series.slot % len(COLOURS)], MARKERS[series.slot % len(MARKERS)]
    label = _plain(series.label) if any(series is named for named in legend(chart)) else None
    y = [value + shift for value in series.y]
    if series.kind == "line":
        _draw_line(axes, series, y, colour, marker, marked_place(chart, series), label)
        return
    axes.errorbar(
        series.x,
        y,
        xerr=_bars(series.x, series.x_range),
        yerr=_bars(series.y, series.y_range),
        fmt=marker,
        color=colour,
        alpha=0.4 if series.faint else 1.0,
        markersize=4 if series.faint else 6,
        linewidth=1.2,
        label=label,
    )


def _draw_line(
    axes: Axes, series: Series, y: list[float], colour: str, marker: str, mark: int, label: str | None
) -> None:
    """A line with its shape once; a single seed's thin and without."""
    if series.faint:
        axes.plot(series.x, y, "-", color=colour, alpha=0.45, linewidth=0.7, zorder=1.5)
    else:
        axes.plot(series.x, y, "-", color=colour, marker=marker, markevery=[mark], markersize=5, label=label)


def _bars(values: list[float], ranges: list[tuple[float, float] | None]) -> list[list[float]] | None:
    """Lengths of error bars below and above; an interval need not hold the mean of a skewed sample."""
    if not ranges:
        return None
    ends = [found or (value, value) for value, found in zip(values, ranges, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    return [below, [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]]


def _plain(text: str) -> str:
    """Text that leaves room for the drawing, and in which a dollar sign is one, not the start of a formula."""
    return shorten(text, 50, placeholder="…").replace("$", r"\$")
