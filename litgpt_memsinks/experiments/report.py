"""All results of experiments as a page, generated from the result files and never typed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments.grids import DECLARED
from litgpt_memsinks.experiments.results import EXPERIMENT, FORMAT
from litgpt_memsinks.experiments.verdict import MEANING
from litgpt_memsinks.files import write_text

FIGURES = Path("figures") / "experiments"
HEAD = """# The paper's figures and theorems, one by one

Made by `litgpt-memsinks experiment report` from result files; do not edit it. How runs differ from the paper's is in
each comment. Losses in nats per token, sinks dropped unless said; mean ± standard deviation over seeds.

```
litgpt-memsinks experiment list                          # what each takes
litgpt-memsinks experiment all --seeds 3                 # on the embedded stories; --corpus FILE for others
litgpt-memsinks experiment all --seeds 3 --scale gpu     # the paper's sizes
litgpt-memsinks experiment table3 --seeds 1              # a grid of settings, which `all` leaves out
litgpt-memsinks experiment report                        # this page
```
"""
NOT_RUN = "Not run: {names}."


def write_page(results: Path, out: Path) -> None:
    """Write the page, and the figures beside it.

    Args:
        results: Folder with result files of experiments, at any depth.
        out: Markdown file to write; what was there before is replaced, if it is such a page.

    Raises:
        MemSinksError: If there are no results, one cannot be read, or `out` is another page.
    """
    found = [(path.parent, read_result(path)) for path in sorted(results.rglob(EXPERIMENT))]
    if not found:
        raise MemSinksError(
            f"{str(results)!r} holds no {EXPERIMENT}. Run one first, such as: litgpt-memsinks experiment fig4"
        )
    if out.is_file() and not out.read_text(encoding="utf-8").startswith(HEAD.partition("\n")[0]):
        raise MemSinksError(f"{str(out)!r} is another page and is not overwritten. Name another output.")
    order = list(DECLARED)
    found.sort(key=lambda one: (order.index(one[1]["name"]), one[1]["scale"]))
    for folder, result in found:
        source = folder / f"{result['name']}.svg"
        if source.is_file():
            target = out.parent / FIGURES / _figure(result)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    write_text(out, page([result for _, result in found], out.parent))
    print(f"Page: {out} ({len(found)} results)")


def read_result(path: Path) -> dict[str, Any]:
    """A result file.

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
    return content


def page(results: Sequence[dict[str, Any]], folder: Path | None = None) -> str:
    """The page.

    Args:
        results: Of the experiments, in order.
        folder: Of the page; pictures are shown if they are there.
    """
    missing = [name for name in DECLARED if name not in {result["name"] for result in results}]
    lines = [HEAD, *_verdicts(), *_overview(results)]
    if missing:
        lines += ["", NOT_RUN.format(names=", ".join(missing))]
    for result in results:
        lines += ["", *_section(result, folder)]
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
            result["scale"],
            str(result["seeds"]),
            f"{_held(result)} of {len(result['checks'])}" if result["checks"] else "–",
            result["verdict"],
        )
        for result in results
    ]
    return _table(("experiment", "in the paper", "scale", "seeds", "relations that hold", "verdict"), rows)


def _held(result: dict[str, Any]) -> int:
    return sum(check["outcome"] == "holds" for check in result["checks"])


def _title(result: dict[str, Any]) -> str:
    return f"{result['name']}, {result['scale']}"


def _anchor(result: dict[str, Any]) -> str:
    """As GitHub makes it of the title."""
    return "".join(c for c in _title(result).lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _figure(result: dict[str, Any]) -> str:
    return f"{result['name']}-{result['scale']}.svg"


def _section(result: dict[str, Any], folder: Path | None) -> list[str]:
    lines = [f"## {_title(result)}", "", f"**{result['where']}: {result['verdict']}.** {result['statement']}", ""]
    lines += _selected(result) if result.get("selected") else _checks(result)
    lines += ["", *_values(result)] if "values" in result else []
    if folder is not None and (folder / FIGURES / _figure(result)).is_file():
        lines += ["", f"![{result['where']}]({(FIGURES / _figure(result)).as_posix()})"]
    lines += ["", DECLARED[result["name"]].comment, ""]  # written after the numbers are known
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
            f"{_number(margin['low'], share)} to {_number(margin['high'], share)}"
            if margin.get("low") is not None
            else "–"
        )
        rows.append(
            (
                check["says"],
                check["paper"] or "–",
                _spread(check["left"], share),
                f"{check['relation']} {_spread(check['right'], share)}",
                interval,
                check["outcome"],
            )
        )
    return _table(("what should hold", "the paper", "here", "limit", "margin, 95% over seeds", ""), rows)


def _selected(result: dict[str, Any]) -> list[str]:
    choice = result["selected"]
    label, number = result["labels"][choice["by"]], _number(choice["value"], False)
    which = "settings" if choice["arms"] == choice["of"] else f"of {choice['of']} settings, the others have none"
    return [f"Lowest {label} of {choice['arms']} {which}: **{choice['arm']}**, {number}."]


def _values(result: dict[str, Any]) -> list[str]:
    measures = list(result["values"])
    names = list(dict.fromkeys(name for measure in measures for name in result["values"][measure]))
    shown = [m for m in measures if any(result["values"][m][name]["mean"] is not None for name in names)]
    rows = [
        (name, *(_spread(result["values"][m][name]["per_seed"], m in result["percent"]) for m in shown))
        for name in names
    ]
    return _table(("arm", *(result["labels"][m] for m in shown)), rows)


def _spread(values: Sequence[float | None], percent: bool) -> str:
    """Mean ± sample standard deviation of the seeds that have a number."""
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    mean = sum(there) / len(there)
    if len(set(there)) == 1:
        return _number(mean, percent)
    deviation = (sum((value - mean) ** 2 for value in there) / (len(there) - 1)) ** 0.5
    return f"{_number(mean, percent)} ± {_number(deviation, percent)}"


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(heading)}", *lines[1:]]
