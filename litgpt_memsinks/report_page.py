"""How does the whole read? `Results` → one HTML page that needs no network, no script and no other file.

The documents in it are foreign text: Jinja and ElementTree escape them, and a content security policy lets nothing run
or load but this page's own style and script, named by their digests.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from litgpt_memsinks.report_charts import as_table, sections, slug, spoken
from litgpt_memsinks.report_results import (
    Estimate,
    Mapping,
    Results,
    clean,
    compared,
    estimate,
    mean,
    number,
    printable,
)
from litgpt_memsinks.report_svg import chart_svg, legend, swatch
from litgpt_memsinks.report_table import (
    COMPARISON,
    INTERVALS,
    METRICS,
    STATES,
    attack_label,
    show,
    show_interval,
    tables,
)
from litgpt_memsinks.version import __version__

FOLDER = Path(__file__).parent
MARKED_WORDS = 3
"""Shortest run of words that counts as taken from the document"""
EXAMPLES = 4
REFERENCES = {"standard": "model of standard training", "left_out": "model that never saw the documents"}

PARTS = {
    "losses": "Losses",
    "extraction": "Extraction",
    "teacher_forced": "Next tokens right, extraction strength",
    "membership": "Membership inference",
    "relearning": "Relearning",
    "calibrated": "Losses with the output bias trained",
    "quantised": "Losses with 8-bit weights",
    "curve": "Losses over training",
}
"""Part of a result file to what a reader calls it"""


def page(results: Results) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: clean(str(value)) if type(value) is str or isinstance(value, Path) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (show, show_interval, spoken, slug, swatch, legend, chart_svg, as_table, printable):
        wrap = function in (swatch, chart_svg)
        environment.globals[function.__name__] = _marked_up(function) if wrap else function
    style, script = ((FOLDER / f"report_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("report_page.html").render(
        results=results,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        verdict=verdict(results),
        tiles=list(tiles(results)),
        controls=list(controls(results)),
        sections=sections(results),
        examples=examples(results),
        columns=COLUMNS,
        cells=[(row["arm"], [(compared(row, name), form) for name, _, form, _ in COLUMNS]) for row in results.rows],
        tables=[table for table in tables(results) if table.group != COMPARISON],  # that stands on top
        metrics=METRICS,
        states=STATES,
        intervals=INTERVALS,
        missing=list(missing(results)),
        amount=lambda value: show(Estimate(value), ".3g"),
        version=__version__,
    )


def _marked_up(function: Any) -> Any:
    """The same, whose text is not escaped once more."""
    return lambda *arguments: Markup(function(*arguments))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ------------------------------------------------------------------------------------------------------------- verdict


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


# ------------------------------------------------------------------------------------------------------------ examples


class Version(NamedTuple):
    """What one model in one state made of a prompt."""

    label: str
    spans: list[tuple[str, bool]]
    """Text, and whether it is the document's"""
    kept: int
    words: int


class Example(NamedTuple):
    """A document, and how models go on with it."""

    prefix: str
    truth: str
    versions: list[Version]


def examples(results: Results) -> list[Example]:
    """Continuations side by side: standard training's, the subject's with own sinks on, and with sinks dropped."""
    shown = [
        (results.role("standard"), "dropped", "standard training"),
        (results.subject, "own", "own sinks on"),
        (results.subject, "dropped", "sinks dropped"),
    ]
    by_document: dict[Any, dict[str, Mapping]] = {}
    length = None
    for arm, state, label in shown:
        for model in results.of(arm)[:1] if arm else []:
            for entry in model["parts"].get("extraction", []):
                length = length or (entry.get("prefix"), entry.get("suffix"))
                same = (entry.get("prefix"), entry.get("suffix")) == length
                if same and entry.get("state") == state and entry.get("prompt") != "wrong":
                    for example in entry.get("examples") or []:
                        by_document.setdefault(example.get("document"), {}).setdefault(label, example)
    fullest = sorted(by_document.values(), key=len, reverse=True)[:EXAMPLES]
    return [_example(versions) for versions in fullest]


def _example(versions: dict[str, Mapping]) -> Example:
    first = next(iter(versions.values()))
    truth = printable(first.get("truth") or "")
    return Example(
        printable(first.get("prefix") or ""),
        truth,
        [_version(label, truth, printable(example.get("generated") or "")) for label, example in versions.items()],
    )


def _version(label: str, truth: str, generated: str) -> Version:
    words: list[str] = re.findall(r"\S+\s*", generated)
    bare = [word.strip() for word in words]
    spans: list[tuple[str, bool]] = []
    place, kept = 0, 0
    for block in SequenceMatcher(None, truth.split(), bare, autojunk=False).get_matching_blocks():
        if block.size < min(MARKED_WORDS, len(bare)):
            continue
        spans += [
            ("".join(words[place : block.b]), False),
            ("".join(words[block.b : block.b + block.size]), True),
        ]
        place, kept = block.b + block.size, kept + block.size
    spans.append(("".join(words[place:]), False))
    return Version(label, [(text, taken) for text, taken in spans if text], kept, len(bare))


# -------------------------------------------------------------------------------------------------------------- tables

COLUMNS = (
    ("gap_closed", "gap closed", ".0%", METRICS["gap_closed"].definition),
    ("validation_change", "cost in validation loss", "+.1%", METRICS["validation_change"].definition),
    ("validation", "validation loss", ".3f", METRICS["validation"].definition),
    ("repeated", "loss on repeated", ".3f", METRICS["repeated"].definition),
    ("repeated_ratio", "share of unseen loss", ".0%", METRICS["repeated_ratio"].definition),
    (
        "own",
        "own sinks on",
        ".3f",
        "Loss on the repeated documents with their own sinks on: what training has memorised.",
    ),
    (
        "placebo",
        "other sinks on",
        ".3f",
        "Loss on the repeated documents with another document's sinks on: must not help.",
    ),
    ("extraction", "extracted", ".0%", METRICS["exact"].definition),
    ("own_extraction", "extracted, own sinks on", ".0%", METRICS["exact"].definition),
)
"""Name in the comparison, head, format, definition"""


class Missing(NamedTuple):
    """What was not measured, and how it is, or why it cannot be."""

    what: str
    arms: str
    command: str
    why: str


def missing(results: Results) -> Iterator[Missing]:
    """Parts that no model or not every model has. One curve is enough: they are named one by one."""
    drawn = {section.name for section in sections(results)}
    for part, what in PARTS.items():
        lacking = [model for model in results.models if part not in model["parts"]]
        if lacking and not (part == "curve" and "training" in drawn):
            arms = dict.fromkeys(model["arm"] for model in lacking)
            of = "any model" if len(lacking) == len(results.models) else ", ".join(map(spoken, arms))
            first = next((model for model in lacking if model["arm"] == results.subject), lacking[0])
            why = (first.get("skipped") or {}).get(part) or ""
            yield Missing(what, of, "" if why else _command(results, first, lacking, part), why)


def _command(results: Results, model: Mapping, lacking: list[Mapping], part: str) -> str:
    """What measures the part of a model, and of the references that lack it as well."""
    data = next((top["data"].get("path") for _, top in results.files if isinstance(top.get("data"), dict)), None)
    directory = model.get("checkpoint_dir") or "CHECKPOINT_DIR"
    where = ["--curve", str(Path(directory).parent)] if part == "curve" else ["--parts", part]
    arguments = ["--checkpoint_dir", directory, "--data_path", data or "DATA_DIR", *where]
    for role in REFERENCES:
        found = [other.get("checkpoint_dir") or "DIR" for other in lacking if other.get("role") == role]
        arguments += [f"--{role}", found[0]] if found and model.get("role") is None else []
    arguments += ["--out_file", f"{part}.json"]
    return f"litgpt-memsinks evaluate {shlex.join(map(str, arguments))}"
