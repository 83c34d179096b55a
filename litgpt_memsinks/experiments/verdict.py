"""Does what the paper says hold here? Pure functions from numbers, one per seed, to a verdict."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from scipy.special import stdtrit

from litgpt_memsinks.evaluate.evaluate import deviation
from litgpt_memsinks.experiments.declared import Check

LEVEL = 0.95
"""Of intervals over seeds."""

Outcome = Literal["holds", "does not hold", "undecided", "not measured"]
Verdict = Literal["reproduced", "not at this scale", "differs", "not measured", "selected"]

MEANING: dict[Verdict, str] = {
    "reproduced": "every relation holds, in the interval over seeds if there are several",
    "not at this scale": "the interval of a relation has both signs: what seeds differ by hides the effect here",
    "differs": "a relation does not hold, in the interval over seeds if there are several",
    "not measured": "a run or a measurement is missing",
    "selected": "a grid of settings, of which the one with the lowest loss is chosen; the paper claims nothing of it",
}


def margin(left: float, relation: Literal["above", "below"], right: float) -> float:
    """By how much a relation holds; negative if it does not; NaN if a side is."""
    return left - right if relation == "above" else right - left


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Interval of the mean by Student's t; none of a single seed.

    A bootstrap of three seeds ends at the least and the largest of them, which holds the mean three times in four.
    """
    if len(values) < 2:
        return None, None
    centre = math.fsum(values) / len(values)
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * deviation(values) / math.sqrt(len(values))
    return centre - half, centre + half


def outcome(margins: Sequence[float]) -> tuple[Outcome, float | None, float | None]:
    """Whether a relation holds, and the interval of its margin's mean over seeds; of one seed, its sign decides.

    Args:
        margins: One for each seed, see ``margin``.
    """
    if not margins or any(math.isnan(value) for value in margins):
        return "not measured", None, None
    low, high = interval_over_seeds(margins)
    ends = (margins[0],) * 2 if low is None or high is None else (low, high)
    if ends[0] > 0:
        return "holds", low, high
    return ("does not hold" if ends[1] <= 0 else "undecided"), low, high


def check_row(check: Check, left: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """A check with what was found.

    Args:
        check: What was expected.
        left: The measure of its arm, one for each seed.
        right: What it is compared with, before the factor.
    """
    bounds = [check.times * value for value in right]
    margins = [margin(a, check.relation, b) for a, b in zip(left, bounds, strict=True)]
    result, low, high = outcome(margins)
    return {
        "says": check.says,
        "measure": check.measure,
        "arm": check.arm,
        "relation": check.relation,
        "than": check.than,
        "times": check.times,
        "paper": check.paper or None,
        "left": list(left),
        "right": bounds,
        "margin": {"per_seed": margins, "low": low, "high": high},
        "outcome": result,
    }


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    """What the checks of an experiment come to."""
    if "does not hold" in outcomes:
        return "differs"
    if "not measured" in outcomes or not outcomes:
        return "not measured"
    return "not at this scale" if "undecided" in outcomes else "reproduced"
