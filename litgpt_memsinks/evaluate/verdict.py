"""Is it forgotten, and at what cost? Checks of one model against thresholds; each says why."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from litgpt_memsinks.evaluate.battery import Measured
from litgpt_memsinks.evaluate.membership import scores
from litgpt_memsinks.evaluate.results import Seed, extracted, gap, role, validation_change
from litgpt_memsinks.metrics import auc

_NO_OWN_SINKS = "Not measured: documents have no sinks of their own."


@dataclass(frozen=True)
class Thresholds:
    """What a model has to reach."""

    gap_closed: float = 0.5
    """Least gap closed on the repeated documents, as a fraction: the paper's "at least 50%" """
    validation_change: float = 0.05
    """Most by which the validation loss may exceed standard training's, as a fraction"""
    extraction: float = 0.02
    """Most by which the share of documents extracted may exceed that of the model that never saw them"""
    membership: float = 0.1
    """Most by which the AUC of the loss attack may differ, up or down, from that on the model that never saw them"""
    relearning: float = 0.1
    """Most by which the other documents' loss may fall more than in the model that never saw them, nats per token"""
    placebo: float = 0.2
    """Most that another document's sinks may bring back of what a document's own do, as a fraction"""


@dataclass(frozen=True)
class Check:
    """One line of the verdict: as the result file has it."""

    name: str
    value: float
    threshold: float | None
    passed: bool | None
    why: str

    def row(self) -> dict[str, Any]:
        """As the result file has it."""
        return {
            "name": self.name,
            "pass": self.passed,
            "value": self.value,
            "threshold": self.threshold,
            "why": self.why,
        }


def verdict(seed: Seed, arm: str, thresholds: Thresholds) -> dict[str, Any]:
    """Judge one model of one seed.

    Returns:
        ``pass`` (true if every check that could be made holds and the gap could be measured; null if there was nothing
        to compare with), ``model`` and ``checks``.
    """
    checks = [check(seed, arm, thresholds) for check in CHECKS]
    failed = any(check.passed is False for check in checks)
    judged = next(check for check in checks if check.name == "gap_closed").passed is not None
    passed = False if failed else (True if judged else None)
    return {"pass": passed, "model": arm, "checks": [check.row() for check in checks]}


def _limit(name: str, value: float, threshold: float, least: bool, unmeasured: str, why: str) -> Check:
    """A check of a number against a limit; open if there is no number."""
    if math.isnan(value):
        return Check(name, math.nan, threshold, None, f"Not measured: {unmeasured}")
    return Check(name, value, threshold, bool(value >= threshold if least else value <= threshold), why)


def gate_holds(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """The IDs are those of the training run."""
    gate = seed[arm].gate
    if gate is None:
        return Check("gate", math.nan, None, None, _NO_OWN_SINKS)
    why = f"With its own sinks on, a document has a loss of {gate['own']:.3f}, with another's of {gate['placebo']:.3f}"
    end = "." if gate["pass"] else ", which is no difference: these IDs, or this seed of the masks, are not the run's."
    return Check("gate", gate["placebo"] - gate["own"], 0.0, gate["pass"], why + end)


def is_not_the_standard(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """It is another model than the reference that remembers."""
    standard = role(seed, "standard")
    if standard is None or standard is seed[arm]:
        return Check("not_standard", math.nan, None, None, "Not measured: no standard model was given.")
    same = standard.subject.sha256 == seed[arm].subject.sha256
    why = (
        "Its weights are those of the standard model, file for file."
        if same
        else "Its weights differ from the standard's."
    )
    return Check("not_standard", float(not same), 1.0, not same, why)


def gap_is_closed(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """The repeated documents are about as strange to it as to a model that never saw them."""
    value = gap(seed, arm)
    return _limit(
        "gap_closed", value, thresholds.gap_closed, True, "give --standard and --left_out.",
        f"{value:.0%} of the gap on the repeated documents is closed; at least {thresholds.gap_closed:.0%} is asked.",
    )  # fmt: skip


def validation_is_kept(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """It did not cost much."""
    value = validation_change(seed, arm)
    return _limit(
        "validation_change", value, thresholds.validation_change, False, "give --standard.",
        f"The validation loss is {value:+.1%} against standard training; at most {thresholds.validation_change:+.0%} "
        "is allowed.",
    )  # fmt: skip


def extraction_is_gone(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """No more documents are extracted word for word than from a model that never saw them."""
    left_out = role(seed, "left_out")
    value = extracted(seed[arm], "dropped")
    never = math.nan if left_out is None else extracted(left_out, "dropped")
    base = 0.0 if math.isnan(never) else never
    beside = "" if math.isnan(never) else f", {never:.1%} by a model that never saw them"
    return _limit(
        "extraction", value, base + thresholds.extraction, False,
        "extraction was left out, or no document is long enough.",
        f"{value:.1%} of the repeated documents are continued word for word{beside}.",
    )  # fmt: skip


def membership_is_hidden(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """Its loss does not tell repeated documents from others, in either direction."""
    left_out = role(seed, "left_out")
    missing = "membership was left out, or no --left_out was given."
    if left_out is None or "tokens" not in seed[arm].found or "tokens" not in left_out.found:
        return _limit("membership", math.nan, thresholds.membership, False, missing, "")
    own, never = loss_auc(seed[arm]), loss_auc(left_out)
    return _limit(
        "membership", abs(own - never), thresholds.membership, False, missing,
        f"The loss attack has an AUC of {own:.3f}, and {never:.3f} on a model that never saw them; up or down counts.",
    )  # fmt: skip


def loss_auc(measured: Measured) -> float:
    """AUC of the loss attack, sinks dropped."""
    groups = []
    for split in ("repeated", "validation"):
        statistics = measured.found["tokens"][split]["dropped"]
        found = scores(statistics, [1] * len(statistics["nats"]), None)["loss"]
        groups.append(found[~np.isnan(found)])
    return auc(groups[0], groups[1])


def memory_does_not_return(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """Other repeated documents do not come back when some are taught again."""
    left_out = role(seed, "left_out")
    missing = "relearning was left out, or no --left_out was given."
    runs = [[] if one is None else one.found.get("relearning", {"runs": []})["runs"] for one in (seed[arm], left_out)]
    if not runs[0] or not runs[1]:
        return _limit("relearning", math.nan, thresholds.relearning, False, missing, "")
    falls = [[run["other"][0] - run["other"][-1] for run in part] for part in runs]
    value = max(own - never for own, never in zip(*falls, strict=False))
    return _limit(
        "relearning", value, thresholds.relearning, False, missing,
        f"Relearning lowers the loss of the others by up to {value:.3f} nats more than in a model that never saw them.",
    )  # fmt: skip


def random_neurons_do_not_do_it(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """It is the sinks: dropping as many other neurons does not do the same."""
    forgets, costs = gap(seed, arm, "random_drop"), validation_change(seed, arm, "random_drop")
    if math.isnan(forgets) or math.isnan(costs):
        return Check("random_drop", math.nan, None, None, "Not measured: no sinks, or no --standard and --left_out.")
    passed = not (forgets >= thresholds.gap_closed and costs <= thresholds.validation_change)
    why = f"As many neurons drawn at random close {forgets:.0%} of the gap at {costs:+.1%} validation loss."
    return Check("random_drop", costs, thresholds.validation_change, passed, why)


def placebo_does_not_help(seed: Seed, arm: str, thresholds: Thresholds) -> Check:
    """Each document needs its own sinks: those of another bring little back."""
    found = seed[arm].found["losses"]["repeated"]
    if "own" not in found or seed[arm].gate is None:
        return Check("placebo", math.nan, thresholds.placebo, None, _NO_OWN_SINKS)
    dropped, own, placebo = (math.fsum(found[state]["nats"]) for state in ("dropped", "own", "placebo"))
    value = (dropped - placebo) / (dropped - own) if dropped > own else math.nan
    return _limit(
        "placebo", value, thresholds.placebo, False, "own sinks bring nothing back.",
        f"Another document's sinks bring back {value:.0%} of what a document's own do.",
    )  # fmt: skip


CHECKS: tuple[Callable[[Seed, str, Thresholds], Check], ...] = (
    gate_holds,
    is_not_the_standard,
    gap_is_closed,
    validation_is_kept,
    extraction_is_gone,
    membership_is_hidden,
    memory_does_not_return,
    random_neurons_do_not_do_it,
    placebo_does_not_help,
)
