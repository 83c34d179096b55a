"""Is this file a certificate? It comes from anywhere: every part must be there, of its kind, and nothing else.

Whether it is true is for `verify_removal.py`.
"""

import json
import math
from pathlib import Path
from typing import Any

from litgpt_memsinks.certificate.before_after import GROUPS
from litgpt_memsinks.certificate.certificate import FORMAT
from litgpt_memsinks.digests import CONTENT
from litgpt_memsinks.errors import MemSinksError

Shape = dict[str, Any]
_NUMBER = (int, float)
_NONE = type(None)
_KINDS = ("drop", "keep", "remove")
_STATES = ("own", "placebo", "dropped", "released")

_WHOLE: Shape = {
    **dict.fromkeys(("format",), int),
    **dict.fromkeys(("kind", "rule", "date", CONTENT), str),
    **dict.fromkeys(("versions", "before", "after", "documents", "neurons", "coverage"), dict),
    **dict.fromkeys(("data", "losses", "gate", "settings"), (dict, _NONE)),
}
_CHECKPOINT: Shape = {
    **dict.fromkeys(("folder", "weights_sha256", "config_sha256", "tree_sha256"), str),
    **dict.fromkeys(("weights_bytes", "files"), int),
}
_DATA: Shape = dict.fromkeys(("folder", "manifest_sha256", "evaluation_sha256", "stream_digest"), str)
_DOCUMENTS: Shape = dict.fromkeys(("removed", "kept"), (list, _NONE))
_DOCUMENT: Shape = {"id": int, "digest": (str, _NONE)}
_NEURONS: Shape = {
    **dict.fromkeys(("layers", "shared", "sinks", "gone", "empty_before", "tensors_identical", "tensors_sliced"), int),
    **dict.fromkeys(("outside_documents", "left_of_documents"), (int, _NONE)),
    "gone_sinks": str,
    "projection_factor": _NUMBER,
}
_COVERAGE: Shape = {**dict.fromkeys(("fraction", "expected"), (*_NUMBER, _NONE)), "others": (dict, _NONE)}
_OTHERS: Shape = {"documents": int, "mean": _NUMBER, "most": _NUMBER}
_SIDES: Shape = {"before": dict, "after": dict}
_LOSS: Shape = {"loss": _NUMBER, "targets": int, "documents": int}
_GATE: Shape = {"own": _NUMBER, "placebo": _NUMBER, "documents": int}
_SETTINGS: Shape = {
    "block_size": int,
    "limit": (int, _NONE),
    **dict.fromkeys(("device", "dtype", "placebo"), str),
    "tolerance": _NUMBER,
}


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a certificate and check that it has all its parts; not that they are true.

    Raises:
        MemSinksError: If the file is missing, no JSON, of another format, or has other parts.
    """
    if not path.is_file():
        raise MemSinksError(
            f"There is no certificate {str(path)!r}. Make one with: litgpt-memsinks certify BEFORE AFTER"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_without_duplicates)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # refuses halves of characters
    except (ValueError, RecursionError) as error:  # what JSON and UTF-8 raise is a ValueError
        reason = ascii(" ".join(str(error).split())[:200])[1:-1]
        raise MemSinksError(f"{str(path)!r} is not a certificate: {reason}. Take it from where it was made.") from error
    form = content.get("format") if isinstance(content, dict) else None
    if form != FORMAT:
        raise MemSinksError(
            f"{str(path)!r} is not a certificate of removal of format {FORMAT}. Take it from where it was made, or "
            "install the release that wrote it."
        )
    if (problem := _misshapen(content)) is not None:
        raise MemSinksError(
            f"{str(path)!r} is not a whole certificate: {problem} is missing, of another kind or too much. Take it "
            "from where it was made."
        )
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _misshapen(content: dict[str, Any]) -> str | None:
    """The first part of a certificate that is missing, of another kind, or not known."""
    if (problem := _differs("", content, _WHOLE)) is not None:
        return problem
    if content["kind"] not in _KINDS:
        return "kind"
    parts = [("before", _CHECKPOINT), ("after", _CHECKPOINT), ("documents", _DOCUMENTS), ("neurons", _NEURONS)]
    parts += [("coverage", _COVERAGE), ("versions", dict.fromkeys(content["versions"], str))]
    measured = [("data", _DATA), ("losses", _SIDES), ("gate", _GATE), ("settings", _SETTINGS)]
    if any(content[name] is not None for name, _ in measured):  # all or none
        parts += measured
    problems = (_differs(name, content[name], shape) for name, shape in parts)
    return next((problem for problem in problems if problem is not None), None) or _misshapen_items(content)


def _misshapen_items(content: dict[str, Any]) -> str | None:
    """The same of what there can be any number of."""
    if content["coverage"]["others"] is not None and _differs("", content["coverage"]["others"], _OTHERS) is not None:
        return "coverage.others"
    for name, listed in content["documents"].items():
        for entry in listed or []:
            if _differs("", entry, _DOCUMENT) is not None or not 0 < entry["id"] < 2**31:
                return f"documents.{name}"
    for side, groups in (content["losses"] or {}).items():
        for group, states in groups.items():
            known = group in (*GROUPS, "validation") and isinstance(states, dict) and set(states) <= set(_STATES)
            if not known or any(_differs("", value, _LOSS) is not None for value in states.values()):
                return f"losses.{side}"
    return None


def _differs(name: str, part: Any, shape: Shape) -> str | None:
    """The first key of a part that is missing, of another kind, or not known."""
    if not isinstance(part, dict):
        return name
    for key, kind in shape.items():
        if key not in part or not isinstance(part[key], kind) or isinstance(part[key], bool):
            return f"{name}.{key}".lstrip(".")
    return None if len(part) == len(shape) else f"something in {name or 'it'}"
