"""What do the runs of one seed come to? Each measure is a number of an arm, from what was found of it."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from litgpt_memsinks.evaluate.battery import Measured
from litgpt_memsinks.experiments.declared import Arm
from litgpt_memsinks.metrics import gap_closed as _gap_closed
from litgpt_memsinks.metrics import memorisation_gap_closed as _memorisation_gap_closed
from litgpt_memsinks.metrics import relative_change

PRICE = 0.05
"""How much higher the validation loss may be after a localisation, relative to before, at least."""


class Reading(NamedTuple):
    """Losses at one validation of a run, nats per token; NaN where there is none."""

    step: int
    """Of LitGPT's log: iterations"""
    validation: float
    """Sinks dropped"""
    repeated: float
    """Sinks dropped"""
    own: float
    """As the run trains on the repeated documents: their own sinks on, if it has any"""


class Point(Protocol):
    """What `localise` finds of a share of neurons that is dropped."""

    @property
    def ratio(self) -> float:
        """The share."""

    @property
    def repeated_loss(self) -> float:
        """Nats per token."""

    @property
    def validation_loss(self) -> float:
        """Nats per token."""


@dataclass
class Found:
    """All that was found of one seed.

    Attributes:
        arms: Name to declaration.
        measured: Arm to what `evaluate` measures of its last checkpoint.
        asked_of: Arm to the arm whose repeated documents it was asked for.
        readings: Arm to what was logged while it trained.
        checkpoints: Arm to optimizer step and measurement of each checkpoint, in order.
        frontiers: Name of a localisation to its arm and points, in the order of their ratios; the first drops nothing.
    """

    arms: dict[str, Arm]
    measured: dict[str, Measured]
    asked_of: dict[str, str] = field(default_factory=dict)
    readings: dict[str, list[Reading]] = field(default_factory=dict)
    checkpoints: dict[str, list[tuple[int, Measured]]] = field(default_factory=dict)
    frontiers: dict[str, tuple[str, list[Point]]] = field(default_factory=dict)

    def unseen(self, arm: str) -> str | None:
        """The arm that never saw the documents that this one is asked for."""
        group = self.asked_of.get(arm)
        return next(
            (name for name, one in self.arms.items() if one.stream.left_out and self.asked_of.get(name) == group), None
        )


def read_readings(run_dir: Path) -> list[Reading]:
    """What a run has logged of the documents that it watched, in order; see ``watch.py``."""
    found: dict[int, Reading] = {}
    for path in sorted(run_dir.glob("logs/csv/version_*/metrics.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {name: float(value) for name, value in row.items() if name and value}
                validation = [value for name, value in values.items() if name.startswith("val/")]
                if validation:
                    repeated = values.get("memorised/dropped", math.nan)
                    own = values.get("memorised/own", repeated)
                    found[int(values["step"])] = Reading(int(values["step"]), validation[0], repeated, own)
    return [found[step] for step in sorted(found)]


# --------------------------------------------------------------------------------------------------------------- losses


def loss(measured: Measured | None, split: str, state: str = "dropped") -> float:
    """Nats per token; NaN if it was not measured."""
    values = None if measured is None else measured.found["losses"][split].get(state)
    if not values or not sum(values["counts"]):
        return math.nan
    return math.fsum(values["nats"]) / sum(values["counts"])


def _validation(found: Found, arm: str) -> float:
    return loss(found.measured.get(arm), "validation")


def _repeated(found: Found, arm: str) -> float:
    return loss(found.measured.get(arm), "repeated")


def _own(found: Found, arm: str) -> float:
    return loss(found.measured.get(arm), "repeated", "own")


def kept_loss(measured: Measured | None) -> float:
    """Validation loss with all neurons kept: under gradient masking the ``own`` state, else there is none to drop."""
    kept = loss(measured, "validation", "own")
    return loss(measured, "validation") if math.isnan(kept) else kept


def _kept(found: Found, arm: str) -> float:
    return kept_loss(found.measured.get(arm))


def _cost_of_dropping(found: Found, arm: str) -> float:
    return _validation(found, arm) - _kept(found, arm)


def _cost_growth(found: Found, arm: str) -> float:
    points = found.checkpoints.get(arm, [])
    if not points:
        return math.nan
    first = points[0][1]
    return _cost_of_dropping(found, arm) - (loss(first, "validation") - kept_loss(first))


def _validation_change(found: Found, arm: str) -> float:
    return relative_change(_validation(found, arm), _validation(found, _standard(found, arm)))


def _standard(found: Found, arm: str) -> str:
    return found.arms[arm].standard if arm in found.arms else ""


def _unseen_loss(found: Found, arm: str) -> float:
    unseen = found.unseen(arm)
    return math.nan if unseen is None else _repeated(found, unseen)


def _repeated_ratio(found: Found, arm: str) -> float:
    return _repeated(found, arm) / _unseen_loss(found, arm)


def _gap(found: Found, arm: str) -> float:
    if arm in found.frontiers:
        return _forgotten(found, arm)
    return _gap_closed(_repeated(found, arm), _repeated(found, _standard(found, arm)), _unseen_loss(found, arm))


def _forgetting(found: Found, arm: str) -> float:
    return _repeated(found, arm) - _repeated(found, _standard(found, arm))


def _memorisation_gap(found: Found, arm: str) -> float:
    return _validation(found, arm) - _repeated(found, arm)


def _memorisation_closed(found: Found, arm: str) -> float:
    return _memorisation_gap_closed(_memorisation_gap(found, arm), _memorisation_gap(found, _standard(found, arm)))


# ------------------------------------------------------------------------------------------------------------- training


def _reading(found: Found, arm: str, name: str) -> list[float]:
    values = [getattr(reading, name) for reading in found.readings.get(arm, [])]
    return [value for value in values if not math.isnan(value)]


def _late(values: Sequence[float]) -> Sequence[float]:
    """The second half."""
    return values[len(values) // 2 :]


def late_mean(values: Sequence[float]) -> float:
    """Mean of the second half; NaN for none."""
    return math.fsum(_late(values)) / len(_late(values)) if values else math.nan


def late_change(values: Sequence[float]) -> float:
    """Mean absolute change between neighbours in the second half; NaN for fewer than two."""
    steps = [abs(after - before) for before, after in pairwise(_late(values))]
    return math.fsum(steps) / len(steps) if steps else math.nan


def late_rise(values: Sequence[float]) -> float:
    """The last value above that at three quarters; NaN for fewer than four."""
    return values[-1] - values[len(values) * 3 // 4 - 1] if len(values) >= 4 else math.nan


def fall(values: Sequence[float]) -> float:
    """The first value above that in the middle; NaN for fewer than two."""
    return values[0] - values[len(values) // 2] if len(values) >= 2 else math.nan


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, for values without ties; NaN for fewer than three."""
    if len(x) < 3 or len(x) != len(y):
        return math.nan
    first, second = (np.argsort(np.argsort(values)) for values in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def _falls_together(found: Found, arm: str) -> float:
    return rank_correlation(_reading(found, arm, "validation"), _reading(found, arm, "repeated"))


# --------------------------------------------------------------------------------------------------------- localisation


def forgotten_at(points: Sequence[tuple[float, float]], price: float) -> float:
    """The most that is forgotten at a price, on the straight lines between the points.

    Args:
        points: (price, share forgotten), in the order of the neurons dropped, from none.
        price: Most that may be paid.
    """
    best = max((share for cost, share in points if cost <= price), default=math.nan)
    for (cost, share), (next_cost, next_share) in pairwise(points):
        if min(cost, next_cost) < price < max(cost, next_cost):
            place = (price - cost) / (next_cost - cost)
            best = max(best, share + place * (next_share - share))
    return best


def shares(found: Found, name: str) -> list[tuple[float, float]]:
    """Price and share forgotten of each point of a localisation.

    The price is how much higher the validation loss is; the share, how far the repeated loss has come from its own
    to that of a model that never saw the documents.
    """
    arm, points = found.frontiers[name]
    start, way = points[0], _unseen_loss(found, arm) - _repeated(found, arm)
    return [
        (
            relative_change(point.validation_loss, start.validation_loss),
            (point.repeated_loss - start.repeated_loss) / way,
        )
        for point in points
    ]


def price_of(found: Found) -> float:
    """What a localisation may cost: as much as sinks do where there are any, and at least ``PRICE``."""
    paid = _validation_change(found, "memsinks") if "memsinks" in found.arms else PRICE
    return PRICE if math.isnan(paid) else max(PRICE, paid)


def _forgotten(found: Found, name: str) -> float:
    return forgotten_at(shares(found, name), price_of(found)) if name in found.frontiers else math.nan


# ------------------------------------------------------------------------------------------------------------- measures


class Measure(NamedTuple):
    """A number of an arm."""

    label: str
    """What it is, in a table"""
    of: Callable[[Found, str], float]
    """From what was found of a seed, and the arm's name; NaN if it cannot be told"""
    percent: bool = False
    """How it is written"""


def _of_readings(name: str, function: Callable[[Sequence[float]], float]) -> Callable[[Found, str], float]:
    return lambda found, arm: function(_reading(found, arm, name))


MEASURES: dict[str, Measure] = {
    "validation": Measure("validation loss", _validation),
    "validation_change": Measure("validation against standard", _validation_change, percent=True),
    "validation_kept": Measure("validation loss, all neurons kept", _kept),
    "cost_of_dropping": Measure("rise of validation loss by dropping", _cost_of_dropping),
    "cost_growth": Measure("growth of that rise since the first checkpoint", _cost_growth),
    "repeated": Measure("repeated documents' loss", _repeated),
    "repeated_ratio": Measure("repeated loss, of the unseen one", _repeated_ratio, percent=True),
    "own": Measure("repeated loss, own sinks on", _own),
    "gap_closed": Measure("gap closed", _gap, percent=True),
    "forgetting": Measure("repeated loss above standard's", _forgetting),
    "memorisation_gap": Measure("validation loss less repeated loss", _memorisation_gap),
    "memorisation_gap_closed": Measure("share of that gap closed", _memorisation_closed, percent=True),
    "forgotten": Measure("forgotten at 5% validation loss", _forgotten, percent=True),
    "repeated_fall": Measure("fall of the repeated loss in the first half", _of_readings("repeated", fall)),
    "validation_fall": Measure("fall of the validation loss in the first half", _of_readings("validation", fall)),
    "falls_together": Measure("rank correlation of both losses", _falls_together),
    "late_rise": Measure("rise of the repeated loss in the last quarter", _of_readings("repeated", late_rise)),
    "late_loss": Measure("late loss of the document, as trained", _of_readings("own", late_mean)),
    "late_change": Measure("late change between readings", _of_readings("own", late_change)),
}
"""Name to measure. Losses in nats per token, sinks dropped unless said."""


def value(found: Found, measure: str, arm: str) -> float:
    """A measure of an arm or a localisation; NaN if it cannot be told."""
    return MEASURES[measure].of(found, arm)
