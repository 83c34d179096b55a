"""What does each picture show? `Results` → `Chart`, which `svg.py` and `figures.py` draw.

A chart is drawn only if what it shows was measured.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from litgpt_memsinks.report.results import (
    Estimate,
    Results,
    compared,
    curve,
    estimate,
    number,
    numbers,
    pooled,
    printable,
)
from litgpt_memsinks.report.table import STATES, attack_label, show, show_interval, state_label

MOST_POINTS = 150
"""Points of a line that are drawn: more than a figure has pixels to tell apart"""


@dataclass
class Axis:
    """What an axis shows."""

    label: str
    log: bool = False
    percent: bool = False
    categories: list[str] = field(default_factory=list)
    """Names at 0, 1, ... instead of numbers"""
    limits: tuple[float, float] | None = None


@dataclass
class Series:
    """Points or a line of one kind."""

    label: str
    x: list[float]
    y: list[float]
    slot: int
    """Colour and marker"""
    kind: Literal["line", "points"] = "points"
    faint: bool = False
    """Drawn lightly and left out of the legend: single seeds, documents"""
    seed: int | None = None
    """Of a faint line"""
    notes: list[str] = field(default_factory=list)
    """What a reader sees who points at each"""
    x_range: list[tuple[float, float] | None] = field(default_factory=list)
    """Ends of the interval of each"""
    y_range: list[tuple[float, float] | None] = field(default_factory=list)


@dataclass
class Guide:
    """A line that the figures are read against."""

    label: str
    x: float | None = None
    y: float | None = None


@dataclass
class Chart:
    """One picture."""

    name: str
    """Of its file"""
    title: str
    reading: str
    """How to read it: a sentence or two"""
    x: Axis
    y: Axis
    series: list[Series]
    guides: list[Guide] = field(default_factory=list)
    diagonal: str = ""
    """Text at a line x = y"""


@dataclass
class Section:
    """Pictures of one question."""

    name: str
    title: str
    intro: str
    charts: list[Chart]


def sections(results: Results) -> list[Section]:
    """The pictures of all that was measured."""
    made = [
        Section(
            "frontier",
            "What is removed, and at what cost",
            "Forgetting alone is easy: a broken model forgets everything. What counts is how much is forgotten at how "
            "little cost on text that the model has not seen.",
            [*frontier(results), *losses(results)],
        ),
        Section(
            "training",
            "While training",
            "Where what is repeated collects: with their own sinks on, the documents are learnt by heart; without "
            "them the loss should stop falling early.",
            list(curves(results)),
        ),
        Section(
            "documents",
            "Document by document",
            "A mean can hide documents that are still remembered. Each dot is one repeated document.",
            list(documents(results)),
        ),
        Section(
            "extraction",
            "Can the text be drawn out?",
            "The model is given the first tokens of a repeated document and goes on by itself with its first choice.",
            list(extraction(results)),
        ),
        Section(
            "membership",
            "Can one tell what it was trained on?",
            "Membership inference sets the repeated documents against like ones that the model never saw. An attack "
            "that guesses finds as many as it wrongly accuses.",
            [*membership(results), *roc(results)],
        ),
        Section(
            "relearning",
            "Does it come back?",
            "The released model is trained for a few steps on some of the repeated documents. What was only hidden "
            "comes back for the others as well, and faster than in a model that never saw them.",
            list(relearning(results)),
        ),
    ]
    return [section for section in made if section.charts]


def slots(results: Results) -> dict[str, int]:
    """The colour and marker of each arm, the same in all pictures. The subject has the first."""
    others = [arm for arm in results.arms if arm != results.subject]
    return {arm: place for place, arm in enumerate([results.subject, *others])}


def spoken(arm: str) -> str:
    """An arm as it is written in a picture."""
    return arm.replace("_", " ")


# -------------------------------------------------------------------------------------------------------------- charts


def frontier(results: Results) -> Iterator[Chart]:
    """Gap closed against the cost in validation loss, each seed and the mean with intervals."""
    series = []
    for arm, slot in slots(results).items():
        row = results.row(arm)
        seeds = [
            (x, y)
            for cost, gap in zip(row.get("validation_change") or [], row.get("gap_closed") or [], strict=False)
            if (x := number(cost)) is not None and (y := number(gap)) is not None
        ]
        cost, gap = compared(row, "validation_change"), compared(row, "gap_closed")
        if not seeds or cost is None or gap is None:
            continue
        if len(seeds) > 1:
            notes = [f"{spoken(arm)}, one seed: gap closed {y:.0%}, validation loss {x:+.1%}" for x, y in seeds]
            series.append(Series(spoken(arm), *_columns(seeds), slot, faint=True, notes=notes))
        note = (
            f"{spoken(arm)}: gap closed {show(gap, '.0%')} {show_interval(gap, '.0%')}, "
            f"validation loss {show(cost, '+.1%')} {show_interval(cost, '+.1%')}"
        )
        mark = Series(spoken(arm), [cost.value], [gap.value], slot, notes=[note])
        mark.x_range, mark.y_range = [_ends(cost)], [_ends(gap)]
        series.append(mark)
    if series:
        yield Chart(
            "frontier",
            "Forgetting against cost",
            "Up and to the left is better: more forgotten, less lost. Lines: 95% intervals; light marks: single seeds.",
            Axis("validation loss against standard training", percent=True),
            Axis("gap closed", percent=True),
            series,
            [Guide("standard training", y=0.0), Guide("never seen", y=1.0), Guide("", x=0.0)],
        )


def losses(results: Results) -> Iterator[Chart]:
    """Loss on the repeated documents in each state, and on validation documents, arm by arm."""
    for split, title, reading in (
        (
            "repeated",
            "Loss on the repeated documents",
            "Further right is more forgotten. Own sinks on shows what the sinks hold.",
        ),
        (
            "validation",
            "Loss on validation documents",
            "Further left is better. Dropping random neurons shows what carelessness costs.",
        ),
    ):
        series = []
        for slot, (state, (label, _)) in enumerate(STATES.items()):
            given = [_loss(results, arm, split, state) for arm in results.arms]
            series += _by_arm(results, label, given, slot, ".3f")
        if series:
            yield Chart(
                f"losses_{split}",
                title,
                f"{reading} Lines are 95% intervals.",
                Axis("nats per token"),
                Axis("", categories=[spoken(arm) for arm in results.arms]),
                series,
            )


def _loss(results: Results, arm: str, split: str, state: str) -> Estimate | None:
    return pooled([(model["parts"].get("losses", {}).get(split) or {}).get(state) for model in results.of(arm)])


def _by_arm(results: Results, label: str, given: Sequence[Estimate | None], slot: int, form: str) -> list[Series]:
    """One mark per arm at its figure, or nothing if no arm has one."""
    known = [(place, found) for place, found in enumerate(given) if found is not None]
    if not known:
        return []
    notes = [
        f"{spoken(results.arms[place])}, {label}: {show(found, form)} {show_interval(found, form)}"
        for place, found in known
    ]
    places, values = [float(place) for place, _ in known], [found.value for _, found in known]
    return [Series(label, values, places, slot, notes=notes, x_range=[_ends(found) for _, found in known])]


def curves(results: Results) -> Iterator[Chart]:
    """Losses over training: each arm's mean over seeds, and each seed."""
    found = [(model["arm"], model.get("seed"), curve(model)) for model in results.models]
    repeated = [loss for _, _, line in found for key in line if key != "validation" for _, loss in line[key]]
    counted = "step" if any(model["parts"].get("curve") for model in results.models) else "iteration"  # as LitGPT logs
    limits = (0.9 * min(repeated), 1.1 * max(repeated)) if repeated and min(repeated) > 0 else None
    for key, title, reading in (
        ("validation", "Validation loss", "Lower is better."),
        ("repeated_dropped", "Repeated documents, sinks dropped", "Staying high is better: little is learnt by heart."),
        ("repeated_own", "Repeated documents, own sinks on", "Falling is right: what is repeated is learnt here."),
    ):
        lines = [Line(arm, seed, line[key]) for arm, seed, line in found if key in line]
        if lines:
            y = Axis("nats per token", log=True, limits=limits if key != "validation" else None)
            series = with_seeds(results, lines)
            yield Chart(f"curve_{key}", title, f"{reading} {seeds_said(lines)}", Axis(counted), y, series)


def documents(results: Results) -> Iterator[Chart]:
    """Each document's loss with its own sinks on against its loss with sinks dropped, arm by arm."""
    for arm, slot in slots(results).items():
        points, notes = [], []
        for document in (document for document in results.documents if document.get("arm") == arm):
            x, y = (number((document.get("loss") or {}).get(state)) for state in ("own", "dropped"))
            if x is not None and y is not None:
                points.append((x, y))
                notes.append(f"own {x:.2f}, dropped {y:.2f}: {printable(document.get('text') or '')[:200]}")
        if points:
            yield Chart(
                f"documents_{slot}_{slug(arm)}",
                spoken(arm),
                "High above the diagonal: remembered by its sinks only. On it: dropping the sinks changes nothing. "
                "Low on the left: still remembered.",
                Axis("loss with its own sinks on, nats per token"),
                Axis("loss with sinks dropped"),
                [Series(spoken(arm), *_columns(points), slot, notes=notes, faint=True)],
                diagonal="dropping changes nothing",
            )


def extraction(results: Results) -> Iterator[Chart]:
    """Share of documents that come out word for word, one picture per length of prompt."""
    entries = [(model["arm"], entry) for model in results.models for entry in model["parts"].get("extraction", [])]
    for prefix, suffix in dict.fromkeys((entry.get("prefix"), entry.get("suffix")) for _, entry in entries):
        series = []
        for slot, state in enumerate(dict.fromkeys(entry.get("state") for _, entry in entries)):
            given = [
                pooled(
                    [
                        entry.get("exact")
                        for name, entry in entries
                        if name == arm
                        and (entry.get("prefix"), entry.get("suffix"), entry.get("state")) == (prefix, suffix, state)
                        and entry.get("prompt") != "wrong"
                    ]
                )
                for arm in results.arms
            ]
            series += _by_arm(results, state_label(state), given, slot, ".1%")
        if series:
            yield Chart(
                f"extraction_{slug(f'{prefix} {suffix}')}",
                f"{suffix} tokens after {prefix} are given",
                "Further left is better: less comes out.",
                Axis("extracted word for word", percent=True, limits=(0.0, 1.0)),
                Axis("", categories=[spoken(arm) for arm in results.arms]),
                series,
            )


def membership(results: Results) -> Iterator[Chart]:
    """AUC of each attack on each arm, sinks dropped."""
    entries = [
        (model["arm"], entry)
        for model in results.models
        for entry in model["parts"].get("membership", [])
        if entry.get("state") == "dropped"
    ]
    attacks = list(dict.fromkeys(entry["attack"] for _, entry in entries))
    series = []
    for arm, slot in slots(results).items():
        given = [
            pooled([entry.get("auc") for name, entry in entries if (name, entry["attack"]) == (arm, attack)])
            for attack in attacks
        ]
        known = [(place, found) for place, found in enumerate(given) if found is not None]
        if known:
            notes = [
                f"{spoken(arm)}, {attack_label(attacks[place])}: AUC {show(found, '.3f')} {show_interval(found, '.3f')}"
                for place, found in known
            ]
            places, values = [float(place) for place, _ in known], [found.value for _, found in known]
            ranges = [_ends(found) for _, found in known]
            series.append(Series(spoken(arm), values, places, slot, notes=notes, x_range=ranges))
    if series:
        yield Chart(
            "membership_auc",
            "Attacks, sinks dropped",
            "Near the line at 0.5, or near the model that never saw them, is better. Far to the left of 0.5 gives "
            "members away as well.",
            Axis("AUC", limits=(0.0, 1.0)),
            Axis("", categories=[attack_label(attack) for attack in attacks]),
            series,
            [Guide("guessing", x=0.5)],
        )


def roc(results: Results) -> Iterator[Chart]:
    """ROC of the strongest attack on each arm, over its seeds and of each, linear and log-log."""
    lines, attacks = [], {}
    for arm in slots(results):
        drawn = [
            (model.get("seed"), entry)
            for model in results.of(arm)
            for entry in model["parts"].get("membership", [])
            if entry.get("state") == "dropped" and entry.get("roc") and estimate(entry.get("auc"))
        ]
        if drawn:
            attacks[arm] = _strongest([entry for _, entry in drawn])
            lines += [Line(arm, seed, _rates(entry)) for seed, entry in drawn if entry["attack"] == attacks[arm]]
    for log in (False, True) if lines else ():
        shown = [
            line._replace(points=[(x, y) for x, y in line.points if not log or (x > 0 and y > 0)]) for line in lines
        ]
        series = with_seeds(results, shown, log, lambda arm: f"{spoken(arm)}: {attack_label(attacks[arm])}")
        lowest = min([x for line in series for x in line.x] + [0.1])
        limits = (10.0 ** math.floor(math.log10(lowest)), 1.0) if log else (0.0, 1.0)
        reading = (
            "Few false alarms matter most: there an attack that finds anything is one to worry about."
            if log
            else "Nearer the diagonal is better. Sinks dropped."
        )
        yield Chart(
            "roc_log" if log else "roc",
            "The strongest attack on each, log-log" if log else "The strongest attack on each",
            f"{reading} {seeds_said(lines)}",
            Axis("unseen documents accused", log, True, limits=limits),
            Axis("repeated documents found", log, True, limits=limits),
            series,
            diagonal="guessing",
        )


def _strongest(entries: list[Any]) -> str:
    """The attack whose AUC is furthest from a guess, in the mean over seeds."""
    aucs: dict[str, list[float]] = {}
    for entry in entries:
        aucs.setdefault(entry["attack"], []).append(entry["auc"]["value"])
    return max(aucs, key=lambda attack: abs(sum(aucs[attack]) / len(aucs[attack]) - 0.5))


def _rates(entry: Any) -> list[tuple[float, float]]:
    return sorted(zip(numbers(entry["roc"].get("fpr")), numbers(entry["roc"].get("tpr")), strict=False))


def relearning(results: Results) -> Iterator[Chart]:
    """Loss on the other repeated documents over steps of relearning, one picture per number of documents given."""
    found: dict[int, list[Line]] = {}
    for model in results.models:
        part = model["parts"].get("relearning", {})
        for run in part.get("runs", []):
            pairs = zip(part.get("steps", []), run.get("other", []), strict=False)
            points = [(number(step), number(loss)) for step, loss in pairs]
            known = [(step, loss) for step, loss in points if step is not None and loss is not None]
            if known and isinstance(run.get("n"), int):
                found.setdefault(run["n"], []).append(Line(model["arm"], model.get("seed"), known))
    for n, lines in sorted(found.items()):
        yield Chart(
            f"relearning_{n}",
            f"After training on {n} of them",
            f"Higher is better; falling no faster than a model that never saw them is best. {seeds_said(lines)}",
            Axis("step"),
            Axis("loss on the others, nats per token"),
            with_seeds(results, lines),
        )


# --------------------------------------------------------------------------------------------------------------- tools


class Line(NamedTuple):
    """What was measured of one seed."""

    arm: str
    seed: int | None
    points: list[tuple[float, float]]


def with_seeds(
    results: Results, lines: list[Line], log: bool = False, label: Callable[[str], str] = spoken
) -> list[Series]:
    """Each arm's seeds as thin lines and their mean; of one seed its line.

    Args:
        results: For the order of the arms.
        lines: One for each arm and seed.
        log: Whether the axis across is logarithmic.
        label: What an arm is called.
    """
    thick, fine = [], []
    for arm, slot in slots(results).items():
        of_arm = [line for line in lines if line.arm == arm and line.points]
        if not of_arm:
            continue
        middle = mean_line([line.points for line in of_arm]) if len(of_arm) > 1 else of_arm[0].points
        thick.append(Series(label(arm), *_columns(thin(middle, log)), slot, kind="line"))
        for line in of_arm if len(of_arm) > 1 else ():
            columns = _columns(thin(line.points, log))
            fine.append(Series(label(arm), *columns, slot, kind="line", faint=True, seed=line.seed))
    return [*fine, *(series for series in thick if series.x)]  # means on top


def seeds_said(lines: list[Line]) -> str:
    """What the lines of a picture are."""
    several = len(lines) > len({line.arm for line in lines})
    return "Thick lines: means over seeds; thin lines: single seeds." if several else "One seed."


def mean_line(lines: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of lines wherever all are known, linear between their points; of a vertical rise its upper end."""
    tops = [dict(sorted(line)) for line in lines]  # of equal x the highest y, which comes last
    low, high = max(min(top) for top in tops), min(max(top) for top in tops)
    places = sorted({x for top in tops for x in top if low <= x <= high})
    values = [np.interp(places, list(top), list(top.values())) for top in tops]
    return list(zip(places, np.mean(values, 0).tolist(), strict=True)) if places else []


def _ends(found: Estimate) -> tuple[float, float] | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def thin(points: list[tuple[float, float]], log: bool = False, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points of a line in the order of x, even along the axis, always both ends."""
    if len(points) <= most:
        return points
    scaled = [math.log10(x) if log else x for x, _ in points]
    step = (scaled[-1] - scaled[0]) / (most - 2)
    kept, nearest = [points[0]], scaled[0]
    for place, point in zip(scaled[1:-1], points[1:-1], strict=True):
        if place - nearest >= step:
            kept.append(point)
            nearest = place
    return [*kept, points[-1]]


def slug(name: str) -> str:
    """A name as a part of a file name or an identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:40]


def named(series: Series) -> str:
    """A series as it is called where it stands alone."""
    return series.label if series.seed is None else f"{series.label}, seed {series.seed}"


def as_table(chart: Chart, most: int = 40) -> tuple[list[str], list[list[str]]]:
    """The figures of a chart as a head and rows: lines thinned, of single seeds the end; of many documents the lowest,
    the most remembered.
    """
    head = ["", chart.x.label, chart.y.label or "of"]
    rows = []
    for series in chart.series:
        places = list(range(len(series.x)))
        if series.faint and series.kind == "line":
            places = places[-1:]
        elif len(places) > most and series.kind == "points":
            places = sorted(places, key=lambda place: series.y[place])[:most]
        elif len(places) > 12:
            places = places[:: math.ceil(len(places) / 12)] + places[-1:]
        for place in places:
            text = series.notes[place].partition(": ")[2] if chart.diagonal and series.notes else named(series)
            rows.append([text, tick_text(series.x[place], chart.x), tick_text(series.y[place], chart.y)])
    return head, rows


def tick_text(value: float, axis: Axis) -> str:
    """A number as it is written at an axis."""
    if axis.categories:
        return axis.categories[int(value)]
    shown = f"{100 * value:.4g}%" if axis.percent else f"{value:.4g}"
    return shown.replace("-", "−")
