"""All results of experiments as a page, generated from the result files and never typed."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments.grids import DECLARED
from litgpt_memsinks.experiments.readings import Failure, Readings, filled, read_readings
from litgpt_memsinks.experiments.results import EXPERIMENT, FORMAT, number, spread, title
from litgpt_memsinks.experiments.verdict import MEANING
from litgpt_memsinks.files import write_text

FIGURES = Path("figures") / "experiments"
HEAD = """# The paper's figures and theorems, one by one

Made by `litgpt-memsinks experiment report` from result files; do not edit it. How runs differ from the paper's is below
each table. Losses in nats per token, sinks dropped unless said; mean ± standard deviation over seeds, intervals by
Student's t. At the scale *cpu* the model is the demo's, with 0.56M parameters, g = .5 and p = .3 unless said; at *gpu*
it is the paper's.

```
litgpt-memsinks experiment list                          # what each takes
litgpt-memsinks experiment all --seeds 3                 # on the embedded stories; --corpus FILE for others
litgpt-memsinks experiment all --seeds 3 --scale gpu     # the paper's sizes
litgpt-memsinks experiment table3 --seeds 1              # a grid of settings, which `all` leaves out
litgpt-memsinks experiment report                        # a page like this one
```
"""
NOT_RUN = "Not run: {names}."


def write_page(results: Path, out: Path, readings: Path | None = None) -> None:
    """Write the page, and the figures beside it.

    Args:
        results: Folder with result files of experiments, at any depth.
        out: Markdown file to write; what was there before is replaced, if it is such a page.
        readings: YAML file of what to say of them; without it the page has the numbers alone.

    Raises:
        MemSinksError: If there are no results, one cannot be read, `out` is another page, or the readings do not fit.
    """
    found = read_results(results)
    if out.is_file() and not out.read_text(encoding="utf-8").startswith(HEAD.partition("\n")[0]):
        raise MemSinksError(f"{str(out)!r} is another page and is not overwritten. Name another output.")
    said = None if readings is None else filled(read_readings(readings), list(found.values()))
    for folder, result in found.items():
        source = folder / f"{result['name']}.svg"
        if source.is_file():
            target = out.parent / FIGURES / _figure(result)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    write_text(out, page(list(found.values()), out.parent, said))
    print(f"Page: {out} ({len(found)} results)")


def read_results(results: Path) -> dict[Path, dict[str, Any]]:
    """Folders of experiments to what is in their result files, in the order of the page.

    Raises:
        MemSinksError: If there are no results, one cannot be read, or two are of the same experiment and workplace.
    """
    found = [(path.parent, read_result(path)) for path in sorted(results.rglob(EXPERIMENT))]
    if not found:
        raise MemSinksError(
            f"{str(results)!r} holds no {EXPERIMENT}. Run one first, such as: litgpt-memsinks experiment fig4"
        )
    order = list(DECLARED)
    found.sort(key=lambda one: (order.index(one[1]["name"]), one[1]["place"]))
    for (first, result), (second, other) in pairwise(found):
        if title(result) == title(other):
            both = f"{str(first)!r} and {str(second)!r} are both {title(result)}"
            raise MemSinksError(f"{both}. Give --results a folder with one of them.")
    return dict(found)


def read_result(path: Path) -> dict[str, Any]:
    """A result file, with the name of the workplace that its folder is in as its ``place``.

    Raises:
        MemSinksError: If it is not one of this version, or of an experiment that is not declared.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT and content["name"] in DECLARED
    except (ValueError, KeyError, TypeError) as error:
        raise MemSinksError(
            f"{str(path)!r} is no result of an experiment ({error}). Run the experiment again."
        ) from error
    if not known:
        raise MemSinksError(
            f"{str(path)!r} has format {content['format']} and is of {content['name']!r}; this package reads format "
            f"{FORMAT} of its own experiments. Run the experiment again."
        )
    return content | {"place": path.resolve().parent.parent.name}


def page(results: Sequence[dict[str, Any]], folder: Path | None = None, said: Readings | None = None) -> str:
    """The page.

    Args:
        results: Of the experiments, in order.
        folder: Of the page; pictures are shown if they are there.
        said: What people say of them, with the numbers filled in.
    """
    thoughts = {} if said is None else said.of
    missing = [name for name in DECLARED if name not in {result["name"] for result in results}]
    lines = [HEAD, *_verdicts(), *_overview(results)]
    if missing:
        lines += ["", NOT_RUN.format(names=", ".join(missing))]
    for result in results:
        lines += ["", *_section(result, folder, thoughts.get(title(result)))]
    if said is not None and said.did_not_work:
        lines += ["", *_did_not_work(said.did_not_work)]
    return "\n".join(lines) + "\n"


def _verdicts() -> list[str]:
    lines = [f"- *{name}*: {meaning}." for name, meaning in MEANING.items()]
    return [
        *lines,
        "",
        "A theorem is reproduced if it holds as printed in all that is simulated, counterexamples too.",
        "",
    ]


def _overview(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        (
            f"[{result['name']}](#{_anchor(result)})",
            result["where"],
            result["place"],
            str(result["seeds"]),
            f"{_held(result)} of {len(result['checks'])}" if result["checks"] else "–",
            result["verdict"],
        )
        for result in results
    ]
    return _table(("experiment", "in the paper", "scale and corpus", "seeds", "relations that hold", "verdict"), rows)


def _held(result: dict[str, Any]) -> int:
    return sum(check["outcome"] == "holds" for check in result["checks"])


def _anchor(result: dict[str, Any]) -> str:
    """As GitHub makes it of the title."""
    return "".join(c for c in title(result).lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _figure(result: dict[str, Any]) -> str:
    return f"{result['name']}-{result['place']}.svg"


def _did_not_work(failures: Sequence[Failure]) -> list[str]:
    rows = [(row.date.isoformat(), row.tried, row.came_out) for row in failures]
    return ["## What did not work", "", *_table(("date", "tried", "came out"), rows)]


def _section(result: dict[str, Any], folder: Path | None, thoughts: str | None) -> list[str]:
    lines = [f"## {title(result)}", "", f"**{result['where']}: {result['verdict']}.** {result['statement']}", ""]
    lines += _selected(result) if result.get("selected") else _checks(result)
    lines += ["", *_values(result)] if "values" in result else []
    if folder is not None and (folder / FIGURES / _figure(result)).is_file():
        lines += ["", f"![{result['where']}]({(FIGURES / _figure(result)).as_posix()})"]
    lines += ["", DECLARED[result["name"]].comment, ""]  # written after the numbers are known
    lines += [f"**What we think of it**: {thoughts}", ""] if thoughts is not None else []
    lines += [f"- Failed: {line}" for line in result["failed"]]
    lines += [f"- Note: {line}" for line in result["notes"]]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += [f"- `{result['command']}`, {result['date'][:10]}, {result['hardware']}; {versions}."]
    return [*lines, *_sizes(result)]


def _sizes(result: dict[str, Any]) -> list[str]:
    if "sizes" not in result:
        return []
    sizes = result["sizes"]
    corpus = "" if result["corpus_sha256"] is None else f" Corpus: SHA-256 {result['corpus_sha256'][:12]}."
    return [
        f"- {result['seeds']} seed(s), {result['training_minutes']:.0f} minutes of wall time in training, "
        "pauses and other work included, all runs added up; other experiments share them. "
        f"{sizes['once']:,} documents once, {sizes['repeated']} × {sizes['repeats']}, rows of "
        f"{sizes['block_size']} tokens, unless the comment says otherwise.{corpus}"
    ]


def _checks(result: dict[str, Any]) -> list[str]:
    percent = set(result.get("percent", []))
    rows = []
    for check in result["checks"]:
        share = check.get("measure") in percent
        margin = check.get("margin", {})
        interval = (
            f"{number(margin['low'], share)} to {number(margin['high'], share)}"
            if margin.get("low") is not None
            else "–"
        )
        rows.append(
            (
                check["says"],
                check["paper"] or "–",
                spread(check["left"], share),
                f"{check['relation']} {spread(check['right'], share)}",
                interval,
                check["outcome"],
            )
        )
    return _table(("what should hold", "the paper", "here", "limit", "margin, 95% over seeds", ""), rows)


def _selected(result: dict[str, Any]) -> list[str]:
    choice = result["selected"]
    label, least = result["labels"][choice["by"]], number(choice["value"], False)
    which = "settings" if choice["arms"] == choice["of"] else f"of {choice['of']} settings, the others have none"
    return [f"Lowest {label} of {choice['arms']} {which}: **{choice['arm']}**, {least}."]


def _values(result: dict[str, Any]) -> list[str]:
    measures = list(result["values"])
    names = list(dict.fromkeys(name for measure in measures for name in result["values"][measure]))
    shown = [m for m in measures if any(result["values"][m][name]["mean"] is not None for name in names)]
    rows = [
        (name, *(spread(result["values"][m][name]["per_seed"], m in result["percent"]) for m in shown))
        for name in names
    ]
    return _table(("arm", *(result["labels"][m] for m in shown)), rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(heading)}", *lines[1:]]
