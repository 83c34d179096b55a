"""Which figures are there, and what does each mean? `Results` → one `Figure` per number, tables, CSV, Markdown."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from litgpt_memsinks.report.results import (
    Estimate,
    Mapping,
    Results,
    compared,
    estimate,
    number,
    numbers,
    pooled,
    printable,
)


class Metric(NamedTuple):
    """What a number means."""

    group: str
    label: str
    form: str
    """Format specification of a value"""
    definition: str


COMPARISON = "Comparison"
METRICS = {
    "gap_closed": Metric(
        COMPARISON,
        "gap closed",
        ".0%",
        "How far the loss on the repeated documents comes, sinks dropped, from standard training's (0%) to that of a "
        "model that never saw them (100%). Higher is more forgotten; above 100% is worse on them than that model.",
    ),
    "validation_change": Metric(
        COMPARISON,
        "cost in validation loss",
        "+.1%",
        "Validation loss, sinks dropped, relative to standard training of the same seed. Lower is better; "
        "below 0% the model is better than standard training's.",
    ),
    "repeated_ratio": Metric(
        COMPARISON,
        "share of unseen loss",
        ".0%",
        "Loss on the repeated documents as a share of the loss of a model that never saw them (the paper's Fig. 4b).",
    ),
    "validation": Metric(
        "Losses",
        "validation loss",
        ".3f",
        "Mean loss on documents that no model was trained on, nats per token. Lower is better.",
    ),
    "repeated": Metric(
        "Losses",
        "loss on repeated documents",
        ".3f",
        "Mean loss on the documents that were trained on many times, nats per token. With sinks dropped, higher is "
        "more forgotten.",
    ),
    "exact": Metric(
        "Extraction",
        "extracted word for word",
        ".1%",
        "Share of repeated documents whose next tokens come out exactly, greedily, after their first tokens are given.",
    ),
    "rouge_l": Metric(
        "Extraction",
        "ROUGE-L",
        ".3f",
        "Longest common subsequence of what was generated and what is true, as an F-measure. 1 is word for word.",
    ),
    "levenshtein": Metric(
        "Extraction",
        "edit distance",
        ".2f",
        "Tokens to insert, delete or replace to get from what was generated to what is true, by their number. 0 is "
        "word for word.",
    ),
    "common_prefix": Metric(
        "Extraction", "common prefix", ".1f", "Tokens from the start on that are generated as they are in the document."
    ),
    "exact_match": Metric(
        "Extraction",
        "next tokens right",
        ".1%",
        "Share of tokens that are the model's first choice when all before them are given (teacher-forced).",
    ),
    "extraction_strength": Metric(
        "Extraction",
        "extraction strength",
        ".3f",
        "1 - k/n, where k is the shortest prefix of n tokens after which all the rest is right; 0 if nothing is.",
    ),
    "auc": Metric(
        "Membership inference",
        "AUC",
        ".3f",
        "Chance that an attack scores a repeated document above one that was never seen. 0.5 is guessing. Read it "
        "two-sided: far below 0.5 tells members apart, too.",
    ),
    "tpr_0.001": Metric(
        "Membership inference",
        "found at 0.1% false alarms",
        ".1%",
        "Share of repeated documents that the attack finds when it may wrongly accuse one unseen document in 1,000.",
    ),
    "tpr_0.01": Metric(
        "Membership inference",
        "found at 1% false alarms",
        ".1%",
        "Share of repeated documents that the attack finds when it may wrongly accuse one unseen document in 100.",
    ),
    "relearned": Metric(
        "Robustness",
        "loss after relearning",
        ".3f",
        "Loss on the other repeated documents after a few steps of training on n of them. What is really gone does not "
        "come back faster than in a model that never saw them.",
    ),
    "calibrated_validation": Metric(
        "Robustness",
        "validation loss, output bias trained",
        ".3f",
        "Only the output bias is trained before measuring; forgetting that this undoes is superficial.",
    ),
    "calibrated_repeated": Metric(
        "Robustness",
        "loss on repeated, output bias trained",
        ".3f",
        "Only the output bias is trained before measuring; forgetting that this undoes is superficial.",
    ),
    "quantised_validation": Metric(
        "Robustness", "validation loss, 8-bit weights", ".3f", "After the weights went through int8 and back."
    ),
    "quantised_repeated": Metric(
        "Robustness",
        "loss on repeated, 8-bit weights",
        ".3f",
        "After the weights went through int8 and back: rounding can bring back what was hidden only.",
    ),
}

STATES = {
    "dropped": ("sinks dropped", "No sinks: the model that is released."),
    "own": ("own sinks on", "The document's own sinks on: what training has memorised."),
    "placebo": ("another document's sinks on", "Control: must not help."),
    "shuffled": ("shuffled IDs", "Control: the documents' IDs exchanged at random; must not help."),
    "random_drop": ("random neurons dropped", "Control: as many other neurons dropped instead; must not do the same."),
}
"""Name of a state to how it is called, and what it is"""

INTERVALS = (
    "Means over seeds, with 95% intervals. Where an interval was measured for each seed alone, it reaches from the "
    "lowest end to the highest."
)
COMPARED = ("gap_closed", "validation_change", "repeated_ratio")
ATTACKS = {"min_k": "Min-K%", "min_k_plus_plus": "Min-K%++"}


@dataclass
class Figure:
    """One number of one model, or of an arm over its seeds (``seed`` is then ``None``)."""

    metric: str
    detail: str
    arm: str
    seed: int | None
    found: Estimate


def figures(results: Results) -> Iterator[Figure]:
    """Every number that was measured, model by model; those of a comparison per arm and seed."""
    for row in results.rows:
        seeds = [model.get("seed") for model in results.of(row["arm"])]
        for name in COMPARED:
            values = row.get(name) or []
            for seed, value in zip(seeds, values, strict=False):
                if (known := number(value)) is not None:
                    alone = compared(row, name) if len(values) == 1 else None
                    yield Figure(name, "", row["arm"], seed, alone or Estimate(known))
    for model in results.models:
        for metric, detail, given in _measured(model["parts"]):
            if (found := estimate(given)) is not None:
                yield Figure(printable(metric), detail, model["arm"], model.get("seed"), found)


def _measured(parts: Mapping) -> Iterator[tuple[str, str, object]]:
    """Metric, detail and entry of every number in a model's parts."""
    for split, states in parts.get("losses", {}).items():
        for state, loss in states.items():
            yield split, state_label(state), loss
    for entry in parts.get("extraction", []):
        for metric in ("exact", "rouge_l", "levenshtein", "common_prefix"):
            yield metric, extraction_label(entry), entry.get(metric)
    for state, entry in parts.get("teacher_forced", {}).items():
        for metric in ("exact_match", "extraction_strength"):
            yield metric, state_label(state), entry.get(metric)
    for entry in parts.get("membership", []):
        detail = f"{attack_label(entry['attack'])}, {state_label(entry.get('state'))}"
        yield "auc", detail, entry.get("auc")
        for rate, found in (entry.get("tpr") or {}).items():
            yield f"tpr_{rate}", detail, found
    for run in parts.get("relearning", {}).get("runs", []):
        if losses := numbers(run.get("other")):
            steps = (parts["relearning"].get("steps") or ["?"])[-1]
            yield "relearned", f"n = {run.get('n')}, {steps} steps", {"value": losses[-1]}
    for part in ("calibrated", "quantised"):
        for split, found in parts.get(part, {}).items():
            yield f"{part}_{split}", "sinks dropped", found


def state_label(state: object) -> str:
    """A state as a reader calls it."""
    return STATES[state][0] if isinstance(state, str) and state in STATES else printable(str(state))


def attack_label(attack: object) -> str:
    """An attack as the literature calls it."""
    return ATTACKS.get(str(attack), printable(str(attack)))


def extraction_label(entry: Mapping) -> str:
    """Tokens given and asked for, state, and whether the prompt is another document's."""
    prompt = ", wrong prompt" if entry.get("prompt") == "wrong" else ""
    return f"{entry.get('prefix')}+{entry.get('suffix')} tokens, {state_label(entry.get('state'))}{prompt}"


def show(found: Estimate | None, form: str) -> str:
    """A value as text; a dash if there is none."""
    return "–" if found is None else _text(found.value, form)


def show_interval(found: Estimate | None, form: str) -> str:
    """Its 95% interval as text; empty if it has none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"[{_text(found.low, form)}, {_text(found.high, form)}]"


def _text(value: float, form: str) -> str:
    text = format(value, form)
    return (text if text.strip("-+0.%") else text.replace("-", "")).replace("-", "−")  # no minus zero


@dataclass
class Table:
    """Rows of measures, a column per arm."""

    group: str
    arms: list[str]
    rows: list[tuple[str, str, list[Estimate | None]]]
    """Metric, detail, and a value per arm: the mean over seeds"""


def tables(results: Results) -> list[Table]:
    """All that was measured, grouped, with a column per arm."""
    found: dict[tuple[str, str], dict[str, list[Estimate]]] = {}
    for figure in figures(results):
        found.setdefault((figure.metric, figure.detail), {}).setdefault(figure.arm, []).append(figure.found)
    grouped: dict[str, Table] = {}
    for metric, detail in sorted(found, key=lambda key: list(METRICS).index(key[0]) if key[0] in METRICS else 99):
        if metric not in METRICS:
            continue
        table = grouped.setdefault(METRICS[metric].group, Table(METRICS[metric].group, results.arms, []))
        by_arm = found[metric, detail]
        cells = [_cell(results, metric, arm, by_arm.get(arm)) for arm in results.arms]
        table.rows.append((metric, detail, cells))
    return list(grouped.values())


def _cell(results: Results, metric: str, arm: str, seeds: list[Estimate] | None) -> Estimate | None:
    if metric in COMPARED:
        return compared(results.row(arm), metric)
    return pooled([found._asdict() for found in seeds or []])


def as_csv(results: Results) -> str:
    """One line per number and seed: what, of which model, its interval, its documents."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("metric", "detail", "arm", "seed", "value", "low", "high", "documents"))
    for figure in figures(results):
        seed = "" if figure.seed is None else figure.seed
        writer.writerow((figure.metric, figure.detail, _inert(figure.arm), seed, *figure.found))
    return buffer.getvalue()


def _inert(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@") else name


def as_markdown(results: Results) -> str:
    """The tables, with the definitions of their measures below."""
    lines = [f"{INTERVALS} Losses in nats per token.", ""]
    for table in tables(results):
        lines += [f"## {table.group}", "", _line(["measure", *map(_escape, table.arms)])]
        lines.append(_line(["---"] + ["---:"] * len(table.arms)))
        for metric, detail, cells in table.rows:
            known = METRICS[metric]
            label = known.label + (f" ({detail})" if detail else "")
            shown = [f"{show(cell, known.form)} {show_interval(cell, known.form)}".strip() for cell in cells]
            lines.append(_line([label, *shown]))
        used = dict.fromkeys(metric for metric, _, _ in table.rows)
        lines += ["", *(f"- **{METRICS[metric].label}**: {METRICS[metric].definition}" for metric in used), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """A name that breaks no Markdown table and is no HTML."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
