"""What people think of results: prose beside the numbers, in which every measured number is filled in from the results.

A YAML file:

    readings:
      fig4, cpu-embedded: Sinks close {gap_closed memsinks} of the gap.  # {MEASURE ARM}
    did_not_work:
      - {date: 2026-11-21, tried: Goldfish loss alone, came_out: 22% still extracted}
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments.results import spread, title

PLACE = re.compile(r"\{(\S+) ([^{}]+)\}")


@dataclass(frozen=True)
class Failure:
    """What was tried and did not work."""

    date: date
    tried: str
    came_out: str


@dataclass(frozen=True)
class Readings:
    """What is in the file."""

    of: dict[str, str]
    """Title of a section of the page, "fig4, cpu-embedded", to what we think of it"""
    did_not_work: tuple[Failure, ...]
    """What else was tried"""


def read_readings(path: Path) -> Readings:
    """The readings of a file.

    Raises:
        MemSinksError: If the file is missing or is not as above.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        readings = Readings(content["readings"], tuple(Failure(**row) for row in content["did_not_work"]))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise MemSinksError(
            f"{str(path)!r} holds no readings ({' '.join(str(error).split())}). It is YAML with readings, a text for "
            "each section, and did_not_work, a list of date, tried and came_out."
        ) from error
    if not isinstance(readings.of, dict):
        raise MemSinksError(f"{str(path)!r}: readings must have a text for each section, not {readings.of!r}.")
    wrong = [f"readings, {name}" for name, text in readings.of.items() if not isinstance(text, str)]
    wrong += [
        f"did_not_work, {row.tried}"
        for row in readings.did_not_work
        if not (isinstance(row.date, date) and isinstance(row.tried, str) and isinstance(row.came_out, str))
    ]
    if wrong:
        raise MemSinksError(f"{str(path)!r}: {wrong[0]}: texts must be texts, and dates YYYY-MM-DD.")
    return readings


def filled(readings: Readings, results: Sequence[dict[str, Any]]) -> Readings:
    """Readings with the results' numbers in their texts.

    Raises:
        MemSinksError: If a text is of no result, or asks for a number that the result lacks.
    """
    by_title = {title(result): result for result in results}
    if strange := [name for name in readings.of if name not in by_title]:
        raise MemSinksError(
            f"There is a reading of {strange[0]!r}, but no such result, only of {', '.join(by_title)}. Run it, or "
            "remove the reading."
        )
    texts = {name: PLACE.sub(partial(_number, by_title[name]), text) for name, text in readings.of.items()}
    if left := [name for name, text in texts.items() if "{" in text or "}" in text]:
        raise MemSinksError(f"The reading of {left[0]!r} has a brace that is no {{MEASURE ARM}}. Write it as that.")
    return replace(readings, of=texts)


def _number(result: dict[str, Any], place: re.Match[str]) -> str:
    measure, arm = place.groups()
    found = result.get("values", {}).get(measure, {}).get(arm)
    if found is None or found["mean"] is None:
        raise MemSinksError(
            f"The reading of {title(result)!r} has {place.group()}, but the result has no such number. Its measures "
            f"are {', '.join(result.get('values', {})) or 'none'}."
        )
    return spread(found["per_seed"], measure in result["percent"])
