"""What may stand in a result file of format 2? Its fields with their kinds, and the first one that is of another.

Fields may lack or be null, what was not measured is not there, unless they end in "!". Fields that are not named here
are for later versions and pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST = 1e300
"""Numbers beyond it overflow when they are drawn"""


@dataclass(frozen=True)
class Kind:
    """A plain value: how it is called, and whether a value is one."""

    name: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Named:
    """An object whose names are free, and whose values are all of one schema."""

    values: Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


NUMBER = Kind("a number", _number)
WHOLE = Kind("a whole number", _whole)
RATE = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
PATH = Kind("a path", lambda value: isinstance(value, str) and "\0" not in value)
ANY = Kind("anything", lambda value: True)

ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": WHOLE}
_EXAMPLE = {"document": WHOLE, "prefix": TEXT, "truth": TEXT, "generated": TEXT}
_PARTS = {
    "losses": Named(Named(ESTIMATE)),
    "gate": {"own": NUMBER, "placebo": NUMBER, "pass": FLAG},
    "extraction": [
        {
            **{"prefix": WHOLE, "suffix": WHOLE, "state": TEXT, "prompt": TEXT},
            **dict.fromkeys(("exact", "rouge_l", "levenshtein", "common_prefix"), ESTIMATE),
            "examples": [_EXAMPLE],
        }
    ],
    "teacher_forced": Named({"exact_match": ESTIMATE, "extraction_strength": ESTIMATE}),
    "membership": [
        {
            **{"attack!": TEXT, "state": TEXT, "auc": ESTIMATE, "tpr": Named(ESTIMATE)},
            "roc": {"fpr": [RATE], "tpr": [RATE]},
        }
    ],
    "relearning": {"steps": [NUMBER], "runs": [{"n": WHOLE, "other": [NUMBER], "validation": [NUMBER]}]},
    "calibrated": Named(ESTIMATE),
    "quantised": Named(ESTIMATE),
    "curve": [dict.fromkeys(("step", "validation", "repeated_dropped", "repeated_own"), NUMBER)],
}
_MODEL = {
    **{"arm!": TEXT, "seed": WHOLE, "role": TEXT, "checkpoint_dir": PATH, "checkpoint_sha256": TEXT, "kind": TEXT},
    **{"parameters": WHOLE, "sinks": Named(ANY), "recipe": TEXT, "skipped": Named(TEXT), "parts": _PARTS},
}
_COMPARED = (
    *("validation", "validation_change", "repeated", "repeated_ratio", "own", "placebo", "gap_closed", "forgetting"),
    *("degradation", "memorisation_gap", "memorisation_gap_closed", "extraction", "own_extraction"),
)
_ROW = {"arm!": TEXT, **{name: [NUMBER] for name in _COMPARED}, "intervals": Named(ESTIMATE)}
_CHECK = {"name": TEXT, "pass": FLAG, "value": NUMBER, "threshold": NUMBER, "why": TEXT}
RESULTS = {
    **{"date": TEXT, "command": TEXT, "commit": TEXT},
    **{"data": Named(ANY), "versions": Named(ANY), "settings": Named(ANY)},
    "models!": [_MODEL],
    "comparison": [_ROW],
    "verdict": {"pass": FLAG, "model": TEXT, "checks": [_CHECK]},
}
"""The file itself"""
DOCUMENT = {"arm": TEXT, "seed": WHOLE, "split": TEXT, "text": TEXT, "loss": Named(NUMBER)}
"""A line of the file of single documents"""


def problem(value: Any, schema: Any, place: str = "") -> str | None:
    """What is wrong with the first field that is of another kind: its place, what it holds, what it must be.

    Args:
        value: What was read, as ``json`` gives it.
        schema: A ``Kind``; an object's fields by name; a list of what its items are; or ``Named``.
        place: Where the value stands in the file; empty for the whole.

    Returns:
        ``None`` if all is well.
    """
    if isinstance(schema, Kind):
        return None if schema.holds(value) else _wrong(value, schema.name, place)
    if isinstance(schema, list):
        return _of_list(value, schema[0], place)
    if not isinstance(value, dict):
        return _wrong(value, "an object", place)
    if isinstance(schema, Named):
        return _first(
            problem(item, schema.values, _field(place, name)) for name, item in value.items() if item is not None
        )
    return _of_object(value, schema, place)


def _of_list(value: Any, schema: Any, place: str) -> str | None:
    if not isinstance(value, list):
        return _wrong(value, "a list", place)
    gaps = isinstance(schema, Kind)  # null among numbers is one that was not measured
    items = (
        problem(item, schema, f"{place}[{index}]") for index, item in enumerate(value) if not gaps or item is not None
    )
    return _first(items)


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], place: str) -> str | None:
    for name, expected in schema.items():
        required, name = name.endswith("!"), name.removesuffix("!")
        item = value.get(name)
        if item is not None and (found := problem(item, expected, _field(place, name))):
            return found
        if item is None and required:
            return f"{_field(place, name)} is missing"
    return None


def _first(found: Any) -> str | None:
    return next(filter(None, found), None)


def _field(place: str, name: str) -> str:
    shown = "".join(one if one.isprintable() else "\ufffd" for one in name)[:40]
    return f"{place}.{shown}" if place else shown


def _wrong(value: Any, wanted: str, place: str) -> str:
    kinds: Sequence[tuple[type, str]] = ((dict, "an object"), (list, "a list"), (str, "text"), (type(None), "null"))
    held = next((name for kind, name in kinds if isinstance(value, kind)), None)
    return f"{place or 'the whole'} is {held or repr(value)[:40]}, but it must be {wanted}"
