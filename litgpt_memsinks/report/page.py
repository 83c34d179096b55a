"""How does the whole read? `Results` → one HTML page that needs no network, no script and no other file.

The documents in it are foreign text: Jinja and ElementTree escape them, and a content security policy lets nothing run
or load but this page's own style and script, named by their digests.
"""

import base64
import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from litgpt_memsinks.report.charts import as_table, sections, slug, spoken
from litgpt_memsinks.report.examples import MARKED_WORDS, examples
from litgpt_memsinks.report.results import (
    Estimate,
    Mapping,
    Results,
    clean,
    compared,
    printable,
)
from litgpt_memsinks.report.svg import chart_svg, legend, swatch
from litgpt_memsinks.report.table import (
    COMPARISON,
    INTERVALS,
    METRICS,
    STATES,
    show,
    show_interval,
    tables,
)
from litgpt_memsinks.report.verdict import REFERENCES, controls, tiles, verdict
from litgpt_memsinks.version import __version__

FOLDER = Path(__file__).parent
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
    style, script = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("page.html").render(
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
        marked_words=MARKED_WORDS,
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
