"""What do the result files say? One or several files of `evaluate` → `Results`: models, rows, verdicts, documents.

JSON only, no PyTorch. Anything but the models may be missing: whatever was not measured is ``None`` or absent.
"""

import csv
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.report.schema import DOCUMENT, RESULTS, problem

SAMPLE = 1500
"""Most documents that are kept, over all models: what a page can hold and an eye can tell apart"""

Mapping = dict[str, Any]


class Estimate(NamedTuple):
    """A measured figure."""

    value: float
    low: float | None = None
    """Lower end of the 95% interval"""
    high: float | None = None
    n: int | None = None
    """Documents that it rests on"""


@dataclass
class Results:
    """All that was measured, over all files."""

    files: list[tuple[Path, Mapping]]
    """Each file with what stands in it beside models and rows: date, command, versions, data, settings, verdict"""
    models: list[Mapping]
    """One per arm and seed, in the order of the files"""
    rows: list[Mapping]
    """The comparison, one per arm: lists with a value per seed, and ``intervals``"""
    documents: list[Mapping] = field(default_factory=list)
    """A sample of the repeated documents of each model"""
    n_documents: int = 0
    """Number of which they are a sample"""
    notes: list[str] = field(default_factory=list)
    """What a reader must know before comparing"""

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order of the files."""
        return list(dict.fromkeys(model["arm"] for model in self.models))

    @property
    def subject(self) -> str:
        """The arm that the verdict is about, else the first with sinks, else the first that is no reference."""
        judged = [verdict["model"] for _, verdict in self.verdicts if verdict.get("model") in self.arms]
        with_sinks = [model["arm"] for model in self.models if model.get("sinks")]
        compared = [model["arm"] for model in self.models if model.get("role") is None]
        return [*judged, *with_sinks, *compared, self.models[0]["arm"]][0]

    @property
    def verdicts(self) -> list[tuple[Path, Mapping]]:
        """The files that judge, with what they say."""
        return [(path, top["verdict"]) for path, top in self.files if isinstance(top.get("verdict"), dict)]

    def of(self, arm: str) -> list[Mapping]:
        """The models of an arm, one per seed."""
        return [model for model in self.models if model["arm"] == arm]

    def role(self, role: str) -> str | None:
        """The arm with a role, ``standard`` or ``left_out``."""
        return next((model["arm"] for model in self.models if model.get("role") == role), None)

    def row(self, arm: str) -> Mapping:
        """The comparison of an arm; empty if there is none."""
        return next((row for row in self.rows if row.get("arm") == arm), {})


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def estimate(given: Any) -> Estimate | None:
    """An entry ``{"value", "low", "high", "n"}`` of a result file; ``None`` if it was not measured."""
    if not isinstance(given, dict) or (value := number(given.get("value"))) is None:
        return None
    return Estimate(value, number(given.get("low")), number(given.get("high")), given.get("n"))


def numbers(given: Any) -> list[float]:
    """The finite numbers of a list."""
    return [value for item in given or [] if (value := number(item)) is not None]


def mean(values: list[float]) -> float | None:
    """Arithmetic mean; ``None`` of nothing."""
    return sum(values) / len(values) if values else None


def pooled(given: list[Any]) -> Estimate | None:
    """The mean over seeds. Its interval reaches from the lowest to the highest end of theirs, which is cautious."""
    known = [found for item in given if (found := estimate(item)) is not None]
    if not known:
        return None
    lows, highs, counts = (numbers([item[index] for item in known]) for index in (1, 2, 3))
    return Estimate(
        value=sum(item.value for item in known) / len(known),
        low=min(lows) if len(lows) == len(known) else None,
        high=max(highs) if len(highs) == len(known) else None,
        n=int(min(counts)) if counts else None,
    )


def clean(text: str) -> str:
    """A text without what would disturb those around it: control characters, also of direction, and lone surrogates."""
    kept = {"\n", "\t", "\u200c", "\u200d"}  # joiners, which some scripts need
    return "".join(one if one.isprintable() or one in kept else "\ufffd" for one in text)


def printable(text: str) -> str:
    """A text on one line that disturbs nothing."""
    return clean(" ".join(text.split()))


def compared(row: Mapping, name: str) -> Estimate | None:
    """A figure of a comparison row: the mean over seeds with the interval over seeds and documents."""
    value = mean(numbers(row.get(name)))
    if value is None:
        return None
    interval = (row.get("intervals") or {}).get(name) or {}
    return Estimate(value, number(interval.get("low")), number(interval.get("high")), interval.get("n"))


# ------------------------------------------------------------------------------------------------------------- reading


def read_results(paths: list[Path]) -> Results:
    """Read result files and put their models side by side.

    Raises:
        MemSinksError: If a file is missing or none of ours, or if two files mean different models by one name.
    """
    contents = [(path, _read(path)) for path in paths]
    results = Results(
        files=[
            (path, {key: content[key] for key in content if key not in ("models", "comparison")})
            for path, content in contents
        ],
        models=_merge_models(contents),
        rows=[],
    )
    results.rows = _merge_rows(contents, results.models)
    results.notes = _notes(contents)
    _read_documents(results)
    return results


def _read(path: Path) -> Mapping:
    content = _load(path)
    if wrong := problem(content, RESULTS):
        raise MemSinksError(f"{str(path)!r} cannot be read: {wrong}. Evaluate again, or take the file from a copy.")
    if not content["models"]:
        raise MemSinksError(f"{str(path)!r} holds no models. Name a file that `litgpt-memsinks evaluate` wrote.")
    for model in content["models"]:
        model["parts"] = {name: part for name, part in _measured(model.get("parts") or {}).items() if part}
    for named in (*content["models"], *(content.get("comparison") or [])):
        named["arm"] = printable(named["arm"])
    verdict = content.get("verdict") or {}
    verdict["checks"] = [UNCHECKED | _measured(check) for check in verdict.get("checks") or []]
    return content


UNCHECKED = {"name": "", "pass": None, "value": None, "threshold": None, "why": ""}
"""A check of which nothing is said"""


def _load(path: Path) -> Mapping:
    """What is in the file, if it is of this format."""
    try:
        content: Mapping = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        if content["format"] == 2:
            return content
    except FileNotFoundError as error:
        raise MemSinksError(
            f"There is no {str(path)!r}. Make it: litgpt-memsinks evaluate --out_file {path}"
        ) from error
    except (ValueError, KeyError, TypeError, IsADirectoryError, RecursionError):
        pass
    raise MemSinksError(f"{str(path)!r} is not a result file of `litgpt-memsinks evaluate`. Name its --out_file.")


def _measured(value: Any) -> Any:
    """The same without fields that are null: what was not measured is not there. In lists, null keeps its place."""
    if isinstance(value, dict):
        return {name: _measured(item) for name, item in value.items() if item is not None}
    return [_measured(item) for item in value] if isinstance(value, list) else value


def _merge_models(contents: list[tuple[Path, Mapping]]) -> list[Mapping]:
    """One model per arm and seed. What was measured of the same weights in several files is put together."""
    merged: list[Mapping] = []
    for path, content in contents:
        before = list(merged)
        for model in content["models"]:
            name = (model["arm"], model.get("seed"))
            digest = model.get("checkpoint_sha256")
            known = [other for other in before if digest and other.get("checkpoint_sha256") == digest]
            if same := next(
                (other for other in known if (other["arm"], other.get("seed")) == name), next(iter(known), None)
            ):
                same["parts"] = {**model["parts"], **same["parts"]}
                same["names"].add((path, model["arm"]))
            elif any((other["arm"], other.get("seed")) == name for other in merged):
                raise MemSinksError(
                    f"{str(path)!r} holds another model {model['arm']!r} of seed {model.get('seed')} than the file "
                    "before it. Evaluate one of them under another name: --models NAME=DIR."
                )
            else:
                merged.append({**model, "names": {(path, model["arm"])}, "first": path})
    return merged


def _merge_rows(contents: list[tuple[Path, Mapping]], models: list[Mapping]) -> list[Mapping]:
    """One row per arm: the lists of the files one after the other, or, of models known already, what lacked."""
    merged: dict[str, Mapping] = {}
    for path, row in ((path, row) for path, content in contents for row in content.get("comparison") or []):
        meant = [model for model in models if (path, row["arm"]) in model["names"]]
        if not meant:
            continue
        arm, new = meant[0]["arm"], any(model["first"] == path for model in meant)
        known = merged.setdefault(arm, {"arm": arm, "intervals": {}})
        old, given = known["intervals"], row.get("intervals") or {}
        for name, values in row.items():
            if isinstance(values, list) and (new or not numbers(known.get(name))):
                known[name] = [*(known.get(name) or []), *values] if new else values
                found = pooled([old.get(name), given.get(name)])
                old.update({name: found._asdict()} if found else {})
    return list(merged.values())


def _notes(contents: list[tuple[Path, Mapping]]) -> list[str]:
    """In what several files differ although a comparison needs them equal."""
    notes = []
    for section, name, text in (
        ("data", "manifest_sha256", "were measured on different data"),
        ("settings", "block_size", "score documents over different numbers of tokens (block_size)"),
        ("settings", "limit", "score different numbers of documents (limit)"),
    ):
        values = {str((content.get(section) or {}).get(name)) for _, content in contents}
        if len(values) > 1:
            notes.append(f"These files {text}: {', '.join(sorted(values))}. Compare figures within a file only.")
    if len(contents) > 1:
        notes.append(
            "Several files: means are over their seeds; an interval reaches from the lowest end of the files' "
            "intervals to the highest."
        )
    return notes


# ----------------------------------------------------------------------------------------------------------- documents


def _read_documents(results: Results) -> None:
    """Sample the repeated documents of each model, by a fixed seed, without holding all of them.

    They are those of which the losses with sinks dropped and with their own are known, from the first file with any.
    """
    meant = {(path, name): model["arm"] for model in results.models for path, name in model["names"]}
    kept: dict[tuple[str, Any], list[Mapping]] = {}
    seen: dict[tuple[str, Any], int] = {}
    source: dict[tuple[str, Any], Path] = {}
    drawn = [model for model in results.models if "own" in (model["parts"].get("losses", {}).get("repeated") or {})]
    most = max(1, SAMPLE // max(1, len(drawn)))
    rng = random.Random(0)
    for path, document in ((file, document) for file, _ in results.files for document in _lines(file)):
        key = (meant.get((path, document["arm"]), ""), document.get("seed"))
        loss = document.get("loss") or {}
        if (
            document.get("split") != "repeated"
            or not key[0]
            or len(numbers([loss.get("own"), loss.get("dropped")])) < 2
        ):
            continue
        if source.setdefault(key, path) != path:
            continue
        seen[key] = seen.get(key, 0) + 1
        sample = kept.setdefault(key, [])
        if len(sample) < most:
            sample.append({**document, "arm": key[0]})
        elif (place := rng.randrange(seen[key])) < most:  # Vitter's algorithm R
            sample[place] = {**document, "arm": key[0]}
    results.documents = [document for sample in kept.values() for document in sample]
    results.n_documents = sum(seen.values())


def _lines(path: Path) -> Iterator[Mapping]:
    """The documents beside a result file, if it has them."""
    beside = path.with_suffix(".documents.jsonl")
    if not beside.is_file():
        return
    with open(beside, encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            try:
                document = json.loads(line, parse_constant=lambda _: None)
            except (ValueError, RecursionError) as error:
                raise MemSinksError(
                    f"Line {place} of {str(beside)!r} is not JSON. Remove the file, or evaluate again."
                ) from error
            if wrong := problem(document, DOCUMENT):
                raise MemSinksError(
                    f"Line {place} of {str(beside)!r} cannot be read: {wrong}. Remove the file, or evaluate again."
                )
            yield {**document, "arm": printable(document.get("arm") or "")}


# -------------------------------------------------------------------------------------------------------------- curves


def curve(model: Mapping) -> dict[str, list[tuple[float, float]]]:
    """Losses over training, by name: ``validation``, ``repeated_dropped``, ``repeated_own``; (step, loss) each.

    From the part ``curve``, else from LitGPT's CSV log of the run, as far as that is still beside the checkpoint.
    """
    names = ("validation", "repeated_dropped", "repeated_own")
    points = model["parts"].get("curve")
    if not points:
        return logged_curve(Path(model.get("checkpoint_dir") or "."))
    found = {
        name: [
            (step, loss)
            for point in points
            if (step := number(point.get("step"))) is not None and (loss := number(point.get(name))) is not None
        ]
        for name in names
    }
    return {name: line for name, line in found.items() if line}


LOGGED = {"val_loss": "validation", "memorised/dropped": "repeated_dropped", "memorised/own": "repeated_own"}
"""Column of LitGPT's CSV log, ours among them, to the name of a curve"""


def logged_curve(checkpoint_dir: Path) -> dict[str, list[tuple[float, float]]]:
    """The curves in LitGPT's newest CSV log of a run, by name; empty if it has none."""
    try:
        logs = list(checkpoint_dir.parent.glob("logs/csv/version_*/metrics.csv"))
    except OSError:  # a path of another machine, too long or not allowed here
        return {}
    if not logs:
        return {}
    newest = max(logs, key=lambda path: (len(path.parent.name), path.parent.name))  # version_10 after version_9
    try:
        return _logged(newest)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise MemSinksError(
            f"{str(newest)!r} is no CSV log of LitGPT: {' '.join(str(error).split())}. Remove it, or mend it."
        ) from error


def _logged(path: Path) -> dict[str, list[tuple[float, float]]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = {
        name: [(float(int(row["step"]) + 1), float(row[column])) for row in rows if row.get(column)]
        for column, name in LOGGED.items()
    }
    finite = {name: [(step, loss) for step, loss in line if math.isfinite(loss)] for name, line in lines.items()}
    return {name: line for name, line in finite.items() if line}


def validation_curve(checkpoint_dir: Path) -> tuple[list[int], list[float]]:
    """Iterations and validation losses (nats per token) from LitGPT's CSV log of a run; empty if it has none."""
    points = logged_curve(checkpoint_dir).get("validation", [])
    return [int(step) for step, _ in points], [loss for _, loss in points]
