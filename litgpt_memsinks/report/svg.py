"""How does a chart look in a page? `Chart` → an SVG that scales, is read aloud, and tells each point's figures.

Colours are classes of `page.css`, so that one drawing serves light and dark. Text is escaped by ElementTree.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from matplotlib.ticker import MaxNLocator

from litgpt_memsinks.report.charts import Axis, Chart, Series, named, tick_text

WIDTH, HEIGHT = 380.0, 300.0
RIGHT, BOTTOM = 14.0, 44.0
ROW = 40.0
"""Height of a category"""
CHARACTER = 6.6
"""Width of a character at the size of the labels, about"""
LONGEST = 18
"""Characters of a label; what is longer is cut"""
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # circle
    "M-4-4h8v8h-8z",  # square
    "M0-5.6 5.6 0 0 5.6-5.6 0z",  # diamond
    "M0-5.2 5 3.8H-5z",  # triangle
    "M0 5.2 5-3.8H-5z",  # triangle that stands on its tip
    "M-5-1.8h3.2V-5h3.6v3.2H5v3.6H1.8V5h-3.6V1.8H-5z",  # cross
    "M-5 0 -2.5-4.6h5L5 0 2.5 4.6h-5z",  # hexagon
    "M-4.8-2.2 4.8-2.2 4.8 2.2-4.8 2.2z",  # bar
)
MARKED = 40
"""Most points of a line that are marked one by one"""

Scale = Callable[[float], float]


def chart_svg(chart: Chart, identifier: str) -> str:
    """An ``<svg>`` element with a title and a description.

    Args:
        chart: What to draw.
        identifier: Unique in the page.
    """
    frame = _frame(chart)
    x = _scale(chart.x, limits(chart, "x"), frame.left, WIDTH - RIGHT)
    y = _scale(chart.y, limits(chart, "y"), frame.bottom, frame.top)
    svg = Element("svg", {"class": "chart", "viewBox": f"0 0 {WIDTH:g} {frame.bottom + BOTTOM:g}", "role": "img"})
    svg.set("aria-labelledby", f"{identifier}-title {identifier}-desc")
    SubElement(svg, "title", id=f"{identifier}-title").text = chart.title
    SubElement(svg, "desc", id=f"{identifier}-desc").text = describe(chart)
    _draw_axes(svg, chart, x, y, frame)
    _draw_guides(svg, chart, x, y, frame)
    for place, series in enumerate(chart.series):
        # rows of categories hold a mark of each kind, one below the other
        shift = 5.5 * (place - (len(chart.series) - 1) / 2) if chart.y.categories else 0.0
        _draw_series(svg, chart, series, x, lambda value, shift=shift: y(value) + shift)  # type: ignore[misc]
    return tostring(svg, encoding="unicode")


def describe(chart: Chart) -> str:
    """What a chart shows, in words: for those who do not see it."""
    kinds = dict.fromkeys(series.label for series in chart.series)
    across = f"Across: {chart.x.label}. " if chart.x.label else ""
    up = f"Up: {chart.y.label}. " if chart.y.label else f"Rows: {', '.join(chart.y.categories)}. "
    return f"{chart.reading} {across}{up}Shown: {', '.join(kinds)}. The figures are in the table below."


def swatch(series: Series) -> str:
    """The mark of a series, for a legend."""
    svg = Element("svg", {"viewBox": "0 0 26 14", "class": "swatch", "aria-hidden": "true"})
    group = SubElement(svg, "g", {"class": f"s{series.slot % len(SHAPES)}"})
    if series.kind == "line":
        SubElement(group, "path", {"class": "line", "d": "M1 7H25"})
    shape = SHAPES[series.slot % len(SHAPES)]
    SubElement(group, "path", {"class": "mark", "d": shape, "transform": "translate(13 7)"})
    return tostring(svg, encoding="unicode")


def legend(chart: Chart) -> list[Series]:
    """One series for each name in the legend; none where the picture shows one kind only."""
    named: dict[str, Series] = {}
    for series in chart.series:
        if series.label not in named or not series.faint:
            named[series.label] = series
    return list(named.values()) if len(named) > 1 else []


# ---------------------------------------------------------------------------------------------------------------- axes


class Frame(NamedTuple):
    """Where the drawing lies, inside its labels."""

    left: float
    top: float
    bottom: float


def _frame(chart: Chart) -> Frame:
    longest = max(len(text) for _, text in _y_ticks(chart))
    titled = chart.y.label or any(guide.x is not None and guide.label for guide in chart.guides)
    top = 30.0 if titled else 8.0
    height = ROW * len(chart.y.categories) if chart.y.categories else HEIGHT - BOTTOM - top
    return Frame(14 + CHARACTER * min(LONGEST, longest), top, top + height)


def limits(chart: Chart, name: str) -> tuple[float, float]:
    """Ends of an axis, with some room."""
    axis: Axis = getattr(chart, name)
    if axis.categories:
        return len(axis.categories) - 0.5, -0.5  # from the bottom up
    if axis.limits:
        return axis.limits
    values = [value for series in chart.series for value in getattr(series, name)]
    for series in chart.series:
        values += [end for ends in getattr(series, f"{name}_range") if ends for end in ends]
    values += [value for guide in chart.guides if (value := getattr(guide, name)) is not None]
    if axis.log:
        values = [value for value in values if value > 0] or [1.0]
        return min(values) / 1.15, max(values) * 1.15
    low, high = min(values), max(values)
    if chart.diagonal:  # which starts at zero
        return 0.0, 1.05 * high or 1.0
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _scale(axis: Axis, ends: tuple[float, float], start: float, end: float) -> Scale:
    """From a value to its place in the drawing."""
    low, high = map(math.log10, ends) if axis.log else ends

    def place(value: float) -> float:
        known = math.log10(max(value, 1e-300)) if axis.log else value
        return start + (end - start) * (known - low) / (high - low)

    return place


def ticks(axis: Axis, ends: tuple[float, float]) -> list[tuple[float, str]]:
    """Values to be written at an axis, and how."""
    low, high = sorted(ends)
    if axis.categories:
        values = [float(place) for place in range(len(axis.categories))]
    elif axis.log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
        values = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
    else:
        values = [float(value) for value in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    slack = 1e-9 * (high - low)
    return [(value, tick_text(value, axis)) for value in values if low - slack <= value <= high + slack]


def _y_ticks(chart: Chart) -> list[tuple[float, str]]:
    return ticks(chart.y, limits(chart, "y")) or [(0.0, "")]


def _draw_axes(svg: Element, chart: Chart, x: Scale, y: Scale, frame: Frame) -> None:
    grid = SubElement(svg, "g", {"class": "grid"})
    labels = SubElement(svg, "g", {"class": "labels"})
    for value, text in _y_ticks(chart):
        _line(grid, frame.left, y(value), WIDTH - RIGHT, y(value))
        shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        _text(labels, frame.left - 8, y(value) + 4.5, shown, "end")
    for value, text in ticks(chart.x, limits(chart, "x")):
        _line(grid, x(value), frame.top, x(value), frame.bottom)
        _text(labels, x(value), frame.bottom + 18, text, "middle")
    titles = SubElement(svg, "g", {"class": "axes"})
    _text(titles, 2, 14, chart.y.label, "start")
    _text(titles, WIDTH - RIGHT, frame.bottom + 37, chart.x.label, "end")


def _draw_guides(svg: Element, chart: Chart, x: Scale, y: Scale, frame: Frame) -> None:
    group = SubElement(svg, "g", {"class": "guide"})
    right = WIDTH - RIGHT
    for guide in chart.guides:
        if guide.x is not None:
            _line(group, x(guide.x), frame.top, x(guide.x), frame.bottom)
            _text(group, x(guide.x), frame.top - 7, guide.label, "middle")
        if guide.y is not None:
            _line(group, frame.left, y(guide.y), right, y(guide.y))
            above = y(guide.y) < (frame.top + frame.bottom) / 2  # the good ones lie up and to the left
            _text(group, right if above else frame.left + 4, y(guide.y) - 5, guide.label, "end" if above else "start")
    if chart.diagonal:
        (low_x, high_x), (low_y, high_y) = limits(chart, "x"), limits(chart, "y")
        low, high = max(low_x, low_y), min(high_x, high_y)
        _line(group, x(low), y(low), x(high), y(high))
        _text(group, right - 4, frame.bottom - 8, f"line: {chart.diagonal}", "end")


def _line(parent: Element, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(parent, "line", {name: f"{value:.1f}" for name, value in ends.items()})


def _text(parent: Element, x: float, y: float, text: str, anchor: str) -> None:
    if text:
        SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = text


# -------------------------------------------------------------------------------------------------------------- series


def _draw_series(svg: Element, chart: Chart, series: Series, x: Scale, y: Scale) -> None:
    slot = series.slot % len(SHAPES)
    group = SubElement(svg, "g", {"class": f"s{slot} faint" if series.faint else f"s{slot}"})
    places = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    if series.kind == "line" and places:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        SubElement(group, "path", {"class": "line", "d": path})
    lowest, highest = sorted(limits(chart, "x"))
    for ends, (_, b) in zip(series.x_range, places, strict=False):
        if ends:
            _line(group, x(max(ends[0], lowest)), b, x(min(ends[1], highest)), b)
    for ends, (a, _) in zip(series.y_range, places, strict=False):
        if ends:
            _line(group, a, y(ends[0]), a, y(ends[1]))
    mark = marked_place(chart, series)
    for place, note in _told(chart, series):
        a, b = places[place]
        point = SubElement(group, "g", {"class": "point", "transform": f"translate({a:.1f} {b:.1f})"})
        SubElement(point, "title").text = note
        small = series.kind == "line" and (series.faint or place != mark)
        SubElement(point, "path", {"class": "dot" if small else "mark", "d": SHAPES[slot]})


def marked_place(chart: Chart, series: Series) -> int:
    """Index of the point where a line bears its shape: another for each, so that lines that meet can be told apart.

    A thin one bears it at its end.
    """
    if series.faint:
        return len(series.x) - 1
    bold = [one for one in chart.series if not one.faint]
    return int((bold.index(series) + 0.5) / len(bold) * len(series.x))


def _told(chart: Chart, series: Series) -> Iterator[tuple[int, str]]:
    """Index and text of the points that tell their figures: all, or of a long or a thin line the one with its shape."""
    whole = series.kind == "points" or (len(series.x) <= MARKED and not series.faint)
    for place, (a, b) in enumerate(zip(series.x, series.y, strict=True)):
        if whole or place == marked_place(chart, series):
            default = f"{named(series)}: {tick_text(a, chart.x)}, {tick_text(b, chart.y)}"
            yield place, series.notes[place] if series.notes else default
