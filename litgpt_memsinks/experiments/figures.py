"""What does the picture of an experiment show? `Found` → charts, drawn as those of the report are."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from litgpt_memsinks.experiments.declared import Experiment
from litgpt_memsinks.experiments.measures import MEASURES, Found, shares, value
from litgpt_memsinks.experiments.results import selected
from litgpt_memsinks.report.charts import Axis, Chart, Series
from litgpt_memsinks.report.figures import STYLE, draw, save

LOSS = "loss, nats per token"
MOST_PRICE = 1.0
"""Most rise of validation loss, as a share, of a trained model in the picture of the frontier: a broken one would leave
nothing else to see"""


def draw_experiment(one: Experiment, found: Sequence[Found], path: Path) -> None:
    """Draw an experiment's charts side by side, as ``path.svg`` and ``path.png``; nothing if nothing was measured."""
    charts = [chart for name in one.pictures if (chart := CHARTS[name](one, found)).series]
    if not charts:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(charts), 4.2), layout="constrained")
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            draw(axes, chart)
        figure.suptitle(f"{one.where}, {len(found)} seed(s)")
        for ending in ("svg", "png"):
            save(figure, path.with_name(f"{path.name}.{ending}"))


def _over_training(title: str, name: str) -> Callable[[Experiment, Sequence[Found]], Chart]:
    """Readings of all arms, a line for each seed."""

    def chart(one: Experiment, found: Sequence[Found]) -> Chart:
        series = []
        for slot, arm in enumerate(one.arms):
            for seed in found:
                rows = [row for row in seed.readings.get(arm.name, []) if not math.isnan(getattr(row, name))]
                if rows:
                    steps = [float(row.step) for row in rows]
                    series.append(Series(arm.name, steps, [getattr(row, name) for row in rows], slot, kind="line"))
        return Chart(name, title, "", Axis("iteration"), Axis(LOSS), series)

    return chart


def _sweep(one: Experiment, found: Sequence[Found]) -> Chart:
    """Validation and repeated loss against what is swept; an interval from the least to the largest seed."""
    arms = sorted((arm for arm in one.arms if arm.x is not None), key=lambda arm: arm.x or 0.0)
    series = []
    for slot, measure in enumerate(("repeated", "validation")):
        points = {
            arm.x: numbers for arm in arms if arm.x is not None and (numbers := _numbers(found, measure, arm.name))
        }
        if points:
            ends: list[tuple[float, float] | None] = [(min(some), max(some)) for some in points.values()]
            means = [math.fsum(some) / len(some) for some in points.values()]
            series.append(Series(f"{measure} loss", list(points), means, slot, y_range=ends))
    return Chart("sweep", "Sinks dropped", "", Axis(one.sweep), Axis(LOSS), series)


def _frontier(one: Experiment, found: Sequence[Found]) -> Chart:
    """What is forgotten, and at which price: localisations as lines, trained arms as points; one for each seed."""
    series = []
    for slot, localised in enumerate(one.localised):
        for seed in found:
            if localised.name in seed.frontiers:
                points = shares(seed, localised.name)
                if all(math.isfinite(number) for point in points for number in point):
                    x, y = map(list, zip(*points, strict=True))
                    series.append(Series(localised.name, x, y, slot, kind="line"))
    for slot, arm in enumerate((arm for arm in one.arms if arm.recipe != "standard"), len(one.localised)):
        pairs = [(value(seed, "validation_change", arm.name), value(seed, "gap_closed", arm.name)) for seed in found]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair)) and pair[0] <= MOST_PRICE]
        if pairs:
            x, y = map(list, zip(*pairs, strict=True))
            series.append(Series(arm.name, x, y, slot))
    x_axis = Axis("validation loss: rise against before", percent=True)
    note = f"Trained models that cost more than {MOST_PRICE:.0%} are in the table only."
    return Chart("frontier", "Forgotten, and its price", note, x_axis, Axis("share forgotten", percent=True), series)


def _losses(one: Experiment, found: Sequence[Found]) -> Chart:
    """Repeated against validation loss of each arm and seed."""
    series = []
    for slot, arm in enumerate(one.arms):
        pairs = [(value(seed, "validation", arm.name), value(seed, "repeated", arm.name)) for seed in found]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if pairs:
            x, y = map(list, zip(*pairs, strict=True))
            series.append(Series(arm.name, x, y, slot))
    title, axis = "Sinks dropped: up and left is better", Axis(f"validation {LOSS}")
    return Chart("losses", title, "", axis, Axis(f"repeated documents' {LOSS}"), series)


def _grid(one: Experiment, found: Sequence[Found]) -> Chart:
    """Repeated loss against what a grid selects by: each arm and seed, and the selected arm's."""
    choice = selected(one, found)
    shown = {"all settings": [arm.name for arm in one.arms]} | ({choice["arm"]: [choice["arm"]]} if choice else {})
    series = []
    for slot, (label, names) in enumerate(shown.items()):
        pairs = [tuple(value(seed, measure, name) for measure in (one.selected_by, "repeated"))
                 for name in names for seed in found]  # fmt: skip
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if pairs:
            x, y = map(list, zip(*pairs, strict=True))
            series.append(Series(label, x, y, slot))
    by = MEASURES[one.selected_by].label
    return Chart("grid", "Selected: the lowest", "", Axis(by), Axis(f"repeated documents' {LOSS}"), series)


def _numbers(found: Sequence[Found], measure: str, arm: str) -> list[float]:
    values = [value(seed, measure, arm) for seed in found]
    return [number for number in values if math.isfinite(number)]


CHARTS: dict[str, Callable[[Experiment, Sequence[Found]], Chart]] = {
    "validation": _over_training("Validation, sinks dropped", "validation"),
    "repeated": _over_training("Repeated documents, sinks dropped", "repeated"),
    "own": _over_training("The document, as it is trained on", "own"),
    "sweep": _sweep,
    "frontier": _frontier,
    "losses": _losses,
    "grid": _grid,
}
