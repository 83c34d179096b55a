"""Is it forgotten, and at what cost? What stands on top of the page: verdict, large figures, controls."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from litgpt_memsinks.report.charts import spoken
from litgpt_memsinks.report.results import Estimate, Mapping, Results, compared, estimate, mean, number
from litgpt_memsinks.report.table import METRICS, attack_label, show, show_interval

REFERENCES = {"standard": "model of standard training", "left_out": "model that never saw the documents"}
"""The models that a verdict compares with: role, and what a reader calls it"""


@dataclass
class Verdict:
    """What stands on top."""

    word: str
    kind: str
    sentence: str
    checks: list[tuple[str, list[Mapping]]]
    """For each file its name, if there are several, and its checks"""


def verdict(results: Results) -> Verdict:
    """Fail if a file fails, else pass if one passes; no verdict if none judges."""
    judged = results.verdicts
    checks = [(path.name if len(judged) > 1 else "", found.get("checks") or []) for path, found in judged]
    by_state: dict[Any, dict[str, None]] = {True: {}, False: {}, None: {}}  # names, each once, in order
    for check in (check for _, of_file in checks for check in of_file):
        by_state[check.get("pass")][spoken(str(check.get("name")))] = None
    subject, known = spoken(results.subject), len({**by_state[True], **by_state[False]})
    if any(found.get("pass") is False for _, found in judged):
        missed = ", ".join(by_state[False])
        return Verdict(
            "Fail", "fail", f"{subject} misses {len(by_state[False])} of {known} thresholds: {missed}.", checks
        )
    if any(found.get("pass") for _, found in judged):
        unknown = len(by_state[None].keys() - by_state[True].keys())
        left = f"; {unknown} could not be checked" if unknown else ""
        return Verdict("Pass", "pass", f"{subject} meets all {known} thresholds{left}.", checks)
    lacking = {role: words for role, words in REFERENCES.items() if results.role(role) is None}
    options = " ".join(f"--{role} DIR" for role in lacking)
    reason = f"there is no {' and no '.join(lacking.values())} to compare with. Give evaluate {options}"
    reason = reason if lacking else "the gap was not measured"
    return Verdict("No verdict", "none", f"{subject}: {reason}.", checks)


class Tile(NamedTuple):
    """A figure that is shown large."""

    label: str
    value: str
    interval: str
    note: str
    metric: str


def tiles(results: Results) -> Iterator[Tile]:
    """The figures of the subject that matter most, as far as they were measured."""
    row, left_out = results.row(results.subject), results.role("left_out")
    for name, note in (
        ("gap_closed", "0% is standard training, 100% never having seen the documents"),
        ("validation_change", "against standard training; below 0% is better than it"),
    ):
        if found := compared(row, name):
            form = METRICS[name].form
            yield Tile(METRICS[name].label, show(found, form), show_interval(found, form), note, name)
    after = compared(row, "extraction")
    if after:
        before = compared(row, "own_extraction") or compared(results.row(results.role("standard") or ""), "extraction")
        level = compared(results.row(left_out or ""), "extraction")
        value = f"{show(before, '.0%')} → {show(after, '.0%')}" if before else show(after, ".0%")
        note = "before → after dropping" if before else "sinks dropped"
        note += f"; a model that never saw them: {show(level, '.0%')}" if level else ""
        yield Tile("extracted word for word", value, show_interval(after, ".0%"), note, "exact")
    if strongest := _strongest(results, results.subject):
        attack, auc = strongest
        known = [found for name, found in _aucs(results, left_out or "") if name == attack]
        note = f"strongest attack ({attack_label(attack)}); 0.5 is guessing"
        note += f"; on a model that never saw them: {known[0].value:.2f}" if known else ""
        yield Tile("membership AUC", f"{auc.value:.2f}", show_interval(auc, ".2f"), note, "auc")


def _aucs(results: Results, arm: str) -> list[tuple[str, Estimate]]:
    return [
        (str(entry.get("attack")), found)
        for model in results.of(arm)
        for entry in model["parts"].get("membership", [])
        if entry.get("state") == "dropped" and (found := estimate(entry.get("auc"))) is not None
    ]


def _strongest(results: Results, arm: str) -> tuple[str, Estimate] | None:
    return max(_aucs(results, arm), key=lambda found: abs(found[1].value - 0.5), default=None)


class Control(NamedTuple):
    """What a control says of the subject."""

    sentence: str
    good: bool | None


def controls(results: Results) -> Iterator[Control]:
    """Whether the effect is the sinks' and not an accident's."""
    parts = [model["parts"] for model in results.of(results.subject)]
    gates = [part["gate"] for part in parts if isinstance(part.get("gate"), dict)]
    own, placebo = (
        mean([value for gate in gates if (value := number(gate.get(name))) is not None]) for name in ("own", "placebo")
    )
    if own is not None and placebo is not None:
        passed = all(gate.get("pass") for gate in gates)
        verb = "more than" if passed else "no more than"
        yield Control(
            f"A document's own sinks help it {verb} another document's: loss {own:.2f} against {placebo:.2f}.", passed
        )
    dropped, chance = (_loss(parts, "repeated", state) for state in ("dropped", "random_drop"))
    costs = [_loss(parts, "validation", state) for state in ("dropped", "random_drop")]
    if dropped is not None and chance is not None:
        sentence = (
            f"Dropping as many random neurons instead leaves a loss of {chance:.2f} on the repeated documents, "
            f"dropping the sinks {dropped:.2f}"
        )
        if costs[0] is not None and costs[1] is not None:
            sentence += f", at a validation loss of {costs[1]:.2f} and {costs[0]:.2f}"
        worse = None if costs[0] is None or costs[1] is None else chance < dropped or costs[1] > costs[0]
        yield Control(f"{sentence}.", worse)


def _loss(parts: list[Mapping], split: str, state: str) -> float | None:
    found = [estimate((part.get("losses", {}).get(split) or {}).get(state)) for part in parts]
    return mean([one.value for one in found if one is not None])
