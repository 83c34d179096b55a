"""The comparison as a picture: training curves, what is left of the repeated documents, and at what cost."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import incomplete_path, refuse_to_overwrite

FORMAT = 2
"""Of the result files that are read, see ``results.py``."""
DROPPED, OWN = "#0072b2", "#d55e00"  # distinguishable for colour-blind readers


def report(results: Path, out_file: Path = Path("report.png")) -> None:
    """Draw the curves and the comparison of a result file as a PNG.

    Args:
        results: JSON file written by `litgpt-memsinks evaluate --out_file` or by the demo.
        out_file: Picture to write. Must not exist.

    Raises:
        MemSinksError: If the result file is missing or is not one, or `out_file` exists.
    """
    refuse_to_overwrite(out_file)
    content = read_results(results)
    figure, (curves, bars, frontier) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    draw_curves(curves, {model["arm"]: model for model in reversed(content["models"])})  # of the first seed
    draw_losses(bars, content["comparison"])
    draw_frontier(frontier, content["comparison"])
    figure.suptitle(
        f"Memorization sinks, {len(content['comparison'][0]['validation'])} seed(s), sinks dropped unless said"
    )
    out_file.parent.mkdir(parents=True, exist_ok=True)
    scratch = incomplete_path(out_file)
    figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
    scratch.replace(out_file)
    print(f"Picture: {out_file}")


def read_results(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        MemSinksError: If it is missing or not a result file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and content["models"] and content["comparison"]:
            return content
    except FileNotFoundError as error:
        raise MemSinksError(
            f"There is no {str(path)!r}. Make it: litgpt-memsinks evaluate --out_file {path}"
        ) from error
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        pass
    raise MemSinksError(f"{str(path)!r} is not a result file of `litgpt-memsinks evaluate`. Name its --out_file.")


def validation_curve(checkpoint_dir: Path) -> tuple[list[int], list[float]]:
    """Iterations and validation losses (nats per token) from LitGPT's CSV log of a run; empty if it has none."""
    logs = list(checkpoint_dir.parent.glob("logs/csv/version_*/metrics.csv"))
    if not logs:
        return [], []
    newest = max(logs, key=lambda path: int(path.parent.name.removeprefix("version_")))
    with open(newest, encoding="utf-8", newline="") as file:
        rows = [(int(row["step"]) + 1, row.get("val_loss") or "") for row in csv.DictReader(file)]
    points = [(step, float(value)) for step, value in rows if value]
    return [step for step, _ in points], [value for _, value in points]


def draw_curves(axes: Axes, results: dict[str, Any]) -> None:
    """Validation loss over training, one line per arm, of the first seed."""
    for arm, result in results.items():
        steps, losses = validation_curve(Path(result["checkpoint_dir"]))
        if steps:
            axes.plot(steps, losses, marker=".", label=arm)
    axes.set(title="Validation loss while training (first seed)", xlabel="iteration", ylabel="nats per token")
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no CSV log beside the checkpoints\n(logger_name: csv)", ha="center", va="center")


def draw_losses(axes: Axes, comparison: list[dict[str, Any]]) -> None:
    """Loss on the repeated documents with sinks dropped, and with each document's own sinks on."""
    places = range(len(comparison))
    for offset, name, label, colour in (
        (0.2, "repeated", "sinks dropped", DROPPED),
        (-0.2, "own", "own sinks on", OWN),
    ):
        values = [_mean(row[name]) for row in comparison]
        axes.barh([place + offset for place in places], values, 0.38, label=label, color=colour)
        for place, value in zip(places, values, strict=True):
            if not math.isnan(value):
                axes.text(value, place + offset, f" {value:.2f}", va="center")
    axes.set_yticks(list(places), [row["arm"] for row in comparison])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="Loss on the repeated documents (higher: forgotten)", xlabel="nats per token")
    axes.legend()


def draw_frontier(axes: Axes, comparison: list[dict[str, Any]]) -> None:
    """Gap closed against the cost in validation loss: up and to the left is better."""
    for row in comparison:
        for change, gap in zip(row["validation_change"], row["gap_closed"], strict=True):
            if change is not None and gap is not None:
                axes.plot(100 * change, 100 * gap, "o", color=DROPPED, alpha=0.6)
        x, y = 100 * _mean(row["validation_change"]), 100 * _mean(row["gap_closed"])
        if not (math.isnan(x) or math.isnan(y)):
            axes.annotate(row["arm"], (x, y), xytext=(6, 6), textcoords="offset points")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.margins(0.2)
    axes.set(
        title="What is removed, at what cost",
        xlabel="validation loss against standard training, %",
        ylabel="gap closed, %",
    )


def _mean(values: list[float | None]) -> float:
    """Mean over seeds; NaN if the figure does not apply to the arm."""
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else math.nan
