"""The result file of `evaluate`, format 2: strict JSON with every number, its interval and what it rests on.

Beside ``results.json`` lies ``results.documents.jsonl``, one line per model and document. ``docs/measuring.md`` says
what each number means.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_memsinks.evaluate.battery import Measured, Plan
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.extraction import METRICS
from litgpt_memsinks.evaluate.membership import attack_row, compressed_size, scores
from litgpt_memsinks.evaluate.subject import Asked
from litgpt_memsinks.files import write_json, write_text
from litgpt_memsinks.metrics import (
    degradation,
    gap_closed,
    memorisation_gap,
    memorisation_gap_closed,
    relative_change,
    sequence_forgetting,
)

FORMAT = 2
_PACKAGES = ("litgpt-memsinks", "litgpt", "litdata", "lightning", "torch")
_EXAMPLES, _SHOWN = 20, 200  # extraction examples of an attempt; characters of a document

Seed = dict[str, Measured]
"""Arm to the model of one seed."""


def documents_file(out_file: Path) -> Path:
    """Where the values of single documents are."""
    return out_file.with_name(f"{out_file.stem}.documents.jsonl")


def strict(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have: what does not apply, or a run that diverged."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(out_file: Path, content: dict[str, Any], seeds: list[Seed], asked: Asked) -> None:
    """Write both files; the one that names the other appears last."""
    lines = (json.dumps(strict(row), ensure_ascii=False) for row in document_rows(seeds, asked))
    write_text(documents_file(out_file), "".join(f"{line}\n" for line in lines))
    write_json(out_file, strict(content))


def provenance(asked: Asked, plan: Plan, limit: int | None, boot: Bootstrap) -> dict[str, Any]:
    """What makes the numbers reproducible."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "versions": {name: version(name) for name in _PACKAGES},
        "unit": "nats per token",
        "data": {
            "path": asked.path,
            "manifest_sha256": asked.manifest_sha256,
            "repeated": len(asked.repeated.tokens),
            "validation": len(asked.validation.tokens),
        },
        "settings": {**asdict(plan), "limit": limit, "bootstrap": boot.draws, "level": boot.level},
    }


def _commit() -> str | None:
    """The commit that the package runs from; ``None`` if it is no checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


# ------------------------------------------------------------------------------------------------------------ one model


def model_entry(
    measured: Measured, asked: Asked, plan: Plan, boot: Bootstrap, left_out: Measured | None
) -> dict[str, Any]:
    """One model of the result file.

    Args:
        measured: What was found.
        asked: The documents.
        plan: What was asked for.
        boot: How intervals are drawn.
        left_out: The model of the same seed that never saw the repeated documents, for the reference attack.
    """
    found = measured.found
    parts: dict[str, Any] = {"losses": losses(found["losses"], boot), "gate": measured.gate}
    if "extraction" in found:
        parts["extraction"] = [extraction(one, asked, boot) for one in found["extraction"]]
    if "teacher_forced" in plan.parts:
        parts["teacher_forced"] = teacher_forced(found["tokens"]["repeated"], boot)
    if "membership" in plan.parts:
        parts["membership"] = membership(measured, asked, boot, left_out)
    if "relearning" in found:
        parts["relearning"] = found["relearning"]
    for part in ("calibrated", "quantised"):
        if part in found:
            parts[part] = {split: boot.loss(**values) for split, values in found[part].items()}
    if measured.curve is not None:
        parts["curve"] = measured.curve
    seconds = {{"tokens": "membership"}.get(unit, unit): value for unit, value in measured.seconds.items()}
    return {**measured.described, "seconds": seconds, "skipped": measured.skipped, "parts": parts}


def losses(found: dict[str, dict[str, dict[str, Any]]], boot: Bootstrap) -> dict[str, Any]:
    """Split and state to a loss."""
    return {split: {state: boot.loss(**values) for state, values in found[split].items()} for split in found}


def extraction(found: dict[str, Any], asked: Asked, boot: Bootstrap) -> dict[str, Any]:
    """One attempt, with the documents that came closest."""
    prefix, suffix = found["prefix"], found["suffix"]
    closest = sorted(range(len(found["rows"])), key=lambda place: -found["common_prefix"][place])[:_EXAMPLES]
    shift = 1 if found["prompt"] == "wrong" else 0
    examples = []
    for place in closest:
        row, prompt_row = found["rows"][place], found["rows"][place - shift]
        tokens = asked.repeated.tokens[row]
        examples.append(
            {
                "document": int(asked.repeated.sequence_ids[row]),
                "prefix": asked.text(asked.repeated.tokens[prompt_row][:prefix]),
                "truth": asked.text(tokens[prefix : prefix + suffix]),
                "generated": asked.text(found["generated"][place]),
                "common_prefix_tokens": int(found["common_prefix"][place]),
            }
        )
    return {
        **{name: found[name] for name in ("prefix", "suffix", "state", "prompt")},
        **{metric: boot.mean(found[metric]) for metric in METRICS},
        "examples": examples,
    }


def teacher_forced(found: dict[str, dict[str, list[float]]], boot: Bootstrap) -> dict[str, Any]:
    """State to the share of targets predicted, and extraction strength."""
    names = ("exact_match", "extraction_strength")
    return {state: {name: boot.mean(_floats(values[name])) for name in names} for state, values in found.items()}


def membership(measured: Measured, asked: Asked, boot: Bootstrap, left_out: Measured | None) -> list[dict[str, Any]]:
    """Every attack in every state."""
    sizes = [_compressed(part.tokens, asked) for part in (asked.repeated, asked.validation)]
    references: list[Any] = [None, None]
    if left_out is not None and left_out is not measured:
        references = [left_out.found["losses"][split]["dropped"] for split in ("repeated", "validation")]
    tokens = measured.found["tokens"]
    rows = []
    for state in tokens["repeated"]:
        members, non_members = (
            scores({name: _floats(values) for name, values in tokens[split][state].items()}, size, reference)
            for split, size, reference in zip(("repeated", "validation"), sizes, references, strict=True)
        )
        rows += [attack_row(attack, state, members[attack], non_members[attack], boot) for attack in members]
    return rows


def _compressed(documents: list[Any], asked: Asked) -> list[int]:
    return [compressed_size(asked.text(tokens)) for tokens in documents]


def _floats(values: list[Any]) -> list[float]:
    """NaN for what is null in a file of finished measurements."""
    return [math.nan if value is None else float(value) for value in values]


# ------------------------------------------------------------------------------------------------------------ documents


def document_rows(seeds: list[Seed], asked: Asked) -> Iterator[dict[str, Any]]:
    """One line per model and document."""
    for measured in (one for seed in seeds for one in seed.values()):
        attempts = _by_document(measured.found.get("extraction", []))
        for split, documents in (("repeated", asked.repeated), ("validation", asked.validation)):
            by_state = measured.found["losses"][split]
            for index, tokens in enumerate(documents.tokens):
                yield {
                    "arm": measured.subject.arm,
                    "seed": measured.subject.seed,
                    "split": split,
                    "sequence_id": int(documents.sequence_ids[index]),
                    "digest": f"{documents.digests[index]:016x}" if documents.digests else None,
                    "source": documents.sources[index] if documents.sources else None,
                    "tokens": len(tokens),
                    "text": asked.text(tokens[:_SHOWN])[:_SHOWN],
                    "loss": {state: _mean(values, index) for state, values in by_state.items()},
                    "extraction": attempts.get(index, {}) if split == "repeated" else {},
                }


def _by_document(found: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, dict[str, float]]]]:
    rows: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for one in found:
        if one["prompt"] != "own":
            continue
        for place, row in enumerate(one["rows"]):
            states = rows.setdefault(row, {}).setdefault(f"{one['prefix']},{one['suffix']}", {})
            states[one["state"]] = {metric: one[metric][place] for metric in METRICS}
    return rows


def _mean(values: dict[str, list[Any]], index: int) -> float:
    count = values["counts"][index]
    return values["nats"][index] / count if count else math.nan


# ----------------------------------------------------------------------------------------------------------- comparison


@dataclass
class Row:
    """One arm of a comparison, one value per seed in each list; NaN (in JSON null) where it does not apply.

    Losses in nats per token. ``validation_change`` is relative to the standard arm of the same seed.
    ``repeated_ratio`` is the paper's figure: the loss on repeated documents over that of a model that never saw them
    (Fig. 4b: about 0.66). ``forgetting`` and ``degradation`` are against the standard arm, the paper's reference for
    sinks (Fig. 4). ``memorisation_gap`` is L_val - L_rep, ``memorisation_gap_closed`` how much smaller it is than the
    standard arm's (Fig. 6). ``extraction`` is the share of documents extracted word for word by the first kind of
    prompt.
    """

    arm: str
    validation: list[float]
    validation_change: list[float]
    repeated: list[float]
    repeated_ratio: list[float]
    own: list[float]
    placebo: list[float]
    gap_closed: list[float]
    forgetting: list[float]
    degradation: list[float]
    memorisation_gap: list[float]
    memorisation_gap_closed: list[float]
    extraction: list[float]
    own_extraction: list[float]


def compare(seeds: list[Seed]) -> list[Row]:
    """Set each arm against the ``standard`` and ``left_out`` arms of its seed."""
    return [
        Row(
            arm=arm,
            validation=[_loss(seed[arm], "validation") for seed in seeds],
            validation_change=[validation_change(seed, arm) for seed in seeds],
            repeated=[_loss(seed[arm], "repeated") for seed in seeds],
            repeated_ratio=[_ratio(seed, arm) for seed in seeds],
            own=[_loss(seed[arm], "repeated", "own") for seed in seeds],
            placebo=[_loss(seed[arm], "repeated", "placebo") for seed in seeds],
            gap_closed=[gap(seed, arm) for seed in seeds],
            forgetting=[_forgetting(seed, arm) for seed in seeds],
            degradation=[_degradation(seed, arm) for seed in seeds],
            memorisation_gap=[_gap(seed[arm]) for seed in seeds],
            memorisation_gap_closed=[_gap_closed(seed, arm) for seed in seeds],
            extraction=[extracted(seed[arm], "dropped") for seed in seeds],
            own_extraction=[extracted(seed[arm], "own") for seed in seeds],
        )
        for arm in seeds[0]
    ]


def comparison(seeds: list[Seed], boot: Bootstrap) -> list[dict[str, Any]]:
    """The rows as the result file has them, with intervals over seeds and documents."""
    return [{**asdict(row), "intervals": _intervals(seeds, row.arm, boot)} for row in compare(seeds)]


def role(seed: Seed, name: str) -> Measured | None:
    """The reference of a seed."""
    return next((one for one in seed.values() if one.subject.role == name), None)


def _loss(measured: Measured, split: str, state: str = "dropped", drawn: Any = slice(None)) -> float:
    values = measured.found["losses"][split].get(state)
    if values is None:
        return math.nan
    counts = np.asarray(values["counts"])[drawn].sum()
    return float(np.asarray(values["nats"])[drawn].sum() / counts) if counts else math.nan


def gap(seed: Seed, arm: str, state: str = "dropped", drawn: Any = slice(None)) -> float:
    """Gap closed of an arm, of all repeated documents or those drawn; NaN without both references."""
    standard, left_out = role(seed, "standard"), role(seed, "left_out")
    if standard is None or left_out is None:
        return math.nan
    reference = [_loss(one, "repeated", drawn=drawn) for one in (standard, left_out)]
    return gap_closed(_loss(seed[arm], "repeated", state, drawn), *reference)


def validation_change(seed: Seed, arm: str, state: str = "dropped", drawn: Any = slice(None)) -> float:
    """Validation loss against standard training; NaN without it."""
    standard = role(seed, "standard")
    if standard is None:
        return math.nan
    return relative_change(_loss(seed[arm], "validation", state, drawn), _loss(standard, "validation", drawn=drawn))


def _ratio(seed: Seed, arm: str, drawn: Any = slice(None)) -> float:
    left_out = role(seed, "left_out")
    if left_out is None:
        return math.nan
    return _loss(seed[arm], "repeated", drawn=drawn) / _loss(left_out, "repeated", drawn=drawn)


def _forgetting(seed: Seed, arm: str) -> float:
    standard = role(seed, "standard")
    if standard is None:
        return math.nan
    return sequence_forgetting(_loss(seed[arm], "repeated"), _loss(standard, "repeated"))


def _degradation(seed: Seed, arm: str) -> float:
    standard = role(seed, "standard")
    if standard is None:
        return math.nan
    return degradation(_loss(standard, "validation"), _loss(seed[arm], "validation"))


def _gap(measured: Measured) -> float:
    return memorisation_gap(_loss(measured, "validation"), _loss(measured, "repeated"))


def _gap_closed(seed: Seed, arm: str) -> float:
    standard = role(seed, "standard")
    return math.nan if standard is None else memorisation_gap_closed(_gap(seed[arm]), _gap(standard))


def attempt(measured: Measured, state: str, prompt: str = "own") -> dict[str, Any] | None:
    """The first kind of prompt in a state, if it fits a document."""
    for one in measured.found.get("extraction", []):
        if one["state"] == state and one["prompt"] == prompt:
            return one
    return None


def extracted(measured: Measured, state: str, drawn: Any = slice(None)) -> float:
    """Share of the repeated documents that are continued word for word."""
    one = attempt(measured, state)
    return math.nan if one is None else float(np.asarray(one["exact"])[drawn].mean())


def _intervals(seeds: list[Seed], arm: str, boot: Bootstrap) -> dict[str, Any]:
    """Name to a number whose interval is over seeds and documents."""
    losses = seeds[0][arm].found["losses"]
    sizes = {split: len(losses[split]["dropped"]["counts"]) for split in losses}

    def over(statistic: Any, size: int) -> dict[str, Any]:
        def drawn(chosen: Any, documents: Any) -> float:
            return float(np.mean([statistic(seeds[index], documents) for index in chosen]))

        return boot.value(drawn, (len(seeds), size), n=size)

    found = {
        "validation": over(lambda seed, drawn: _loss(seed[arm], "validation", drawn=drawn), sizes["validation"]),
        "validation_change": over(lambda seed, drawn: validation_change(seed, arm, drawn=drawn), sizes["validation"]),
        "repeated": over(lambda seed, drawn: _loss(seed[arm], "repeated", drawn=drawn), sizes["repeated"]),
        "repeated_ratio": over(lambda seed, drawn: _ratio(seed, arm, drawn), sizes["repeated"]),
        "own": over(lambda seed, drawn: _loss(seed[arm], "repeated", "own", drawn), sizes["repeated"]),
        "placebo": over(lambda seed, drawn: _loss(seed[arm], "repeated", "placebo", drawn), sizes["repeated"]),
        "gap_closed": over(lambda seed, drawn: gap(seed, arm, drawn=drawn), sizes["repeated"]),
    }
    for name, state in (("extraction", "dropped"), ("own_extraction", "own")):
        tried = [attempt(seed[arm], state) for seed in seeds]
        size = min(0 if one is None else len(one["rows"]) for one in tried)
        found[name] = over(lambda seed, drawn, state=state: extracted(seed[arm], state, drawn), size)
    return {name: value for name, value in found.items() if value["value"] is not None}
