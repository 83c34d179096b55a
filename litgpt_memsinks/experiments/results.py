"""What does an experiment come to, as `experiment.json`: every number, what it rests on, and the verdict.

Strict JSON, ``format`` 2: intervals over seeds are by Student's t, in format 1 they were a bootstrap's. Losses in nats
per token. What could not be measured is null.
"""

import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch

from litgpt_memsinks.bench.bench import processor
from litgpt_memsinks.evaluate.evaluate import deviation
from litgpt_memsinks.evaluate.results import strict
from litgpt_memsinks.experiments.declared import Check, Experiment
from litgpt_memsinks.experiments.measures import MEASURES, Found, price_of, shares, value
from litgpt_memsinks.experiments.runs import Planned, Workplace
from litgpt_memsinks.experiments.verdict import Outcome, check_row, interval_over_seeds, verdict
from litgpt_memsinks.theory.verdict import Verdict as TheoremVerdict

EXPERIMENT = "experiment.json"
FORMAT = 2
_PACKAGES = ("litgpt-memsinks", "litgpt", "litdata", "lightning", "torch")


def content(
    one: Experiment,
    workplace: Workplace,
    planned: Sequence[Planned],
    found: Sequence[Found],
    failed: Sequence[str],
    notes: Sequence[str],
    device: str,
) -> dict[str, Any]:
    """The result file of an experiment with training runs.

    Args:
        one: The experiment.
        workplace: Its sizes.
        planned: Its runs.
        found: What was found, for each seed.
        failed: A line for each run that failed.
        notes: A line for each measurement that could not be made.
        device: Where was measured.
    """
    checks = [_check(check, found) for check in one.checks]
    minutes = [run.minutes for run in {run.run.out_dir: run for run in planned}.values()]
    return strict(
        {
            **_head(one),
            **_environment(device),
            "scale": workplace.scale.name,
            "corpus": workplace.texts.train,
            "corpus_sha256": workplace.corpus_sha256 or None,
            "seeds": len(found),
            "sizes": {
                name: size
                for name, size in asdict(workplace.scale).items()
                if name in ("once", "repeated", "repeats", "canary_tokens", "rare", "rare_repeats", "block_size")
            },
            "arms": [_arm(arm.name, [run for run in planned if run.arm.name == arm.name]) for arm in one.arms],
            "training_minutes": round(sum(filter(None, minutes)), 2),
            "values": {
                measure: {name: summary([value(seed, measure, name) for seed in found]) for name in _named(one)}
                for measure in _measures(one)
            },
            "labels": {measure: MEASURES[measure].label for measure in _measures(one)},
            "percent": [measure for measure in _measures(one) if MEASURES[measure].percent],
            "training": [{name: [list(r) for r in rows] for name, rows in seed.readings.items()} for seed in found],
            "frontiers": [
                {"price": price_of(seed), **{name: shares(seed, name) for name in seed.frontiers}} for seed in found
            ],
            "checks": checks,
            "selected": (choice := selected(one, found)),
            "verdict": verdict([check["outcome"] for check in checks]) if choice is None else "selected",
            "failed": list(failed),
            "notes": list(notes),
        }
    )


def selected(one: Experiment, found: Sequence[Found]) -> dict[str, Any] | None:
    """The arm of a grid with the least mean over seeds; ``None`` without a grid, or without a number.

    An arm that lacks its number, because it diverged, say, is not chosen.
    """
    means = {
        arm.name: math.fsum(value(seed, one.selected_by, arm.name) for seed in found) / len(found)
        for arm in one.arms
        if one.selected_by
    }
    there = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not there:
        return None
    best = min(there, key=lambda name: there[name])
    return {"by": one.selected_by, "arm": best, "value": there[best], "arms": len(there), "of": len(means)}


def theorem_content(one: Experiment, setup: Any, verdicts: Sequence[TheoremVerdict]) -> dict[str, Any]:
    """The result file of a theorem: it is reproduced if it holds as the paper prints it."""
    checks = [
        {
            "says": f"{row.theorem}, {row.version}: {row.statement} ({row.simulated})",
            "version": row.version,
            "paper": f"{row.relation} {row.bound:.4g}" if row.version == "printed" else None,
            "left": [row.measured],
            "right": [row.bound],
            "relation": row.relation,
            "outcome": "holds" if row.holds else "does not hold",
        }
        for row in verdicts
    ]
    printed: list[Outcome] = ["holds" if row.holds else "does not hold" for row in verdicts if row.version == "printed"]
    return strict(
        {
            **_head(one),
            **_environment("cpu"),
            "scale": "theory",
            "seeds": 1,
            "setup": asdict(setup),
            "checks": checks,
            "verdict": verdict(printed),
            "failed": [],
            "notes": [],
        }
    )


def _head(one: Experiment) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": one.name,
        "where": one.where,
        "statement": one.statement,
        "comment": one.comment,
    }


def _environment(device: str) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["litgpt-memsinks", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def _arm(name: str, runs: Sequence[Planned]) -> dict[str, Any]:
    """How an arm was trained; nothing but its name if its recipe is missing."""
    if not runs:
        return {"name": name}
    return {
        "name": name,
        "recipe": runs[0].settings["recipe"],
        "stream": runs[0].settings["stream"],
        "stream_tokens": runs[0].settings["stream_tokens"],
        "changes": runs[0].settings["changes"],
        "folders": [str(run.run.out_dir) for run in runs],
        "minutes": [None if run.minutes is None else round(run.minutes, 2) for run in runs],
    }


def _named(one: Experiment) -> list[str]:
    return [*(arm.name for arm in one.arms), *(localised.name for localised in one.localised)]


def _measures(one: Experiment) -> list[str]:
    """Those of the table, those of the checks, and those of the picture."""
    drawn = ["validation", "repeated"] if one.arms else []
    return list(dict.fromkeys([*one.table, *(check.measure for check in one.checks), *drawn]))


def _check(check: Check, found: Sequence[Found]) -> dict[str, Any]:
    left = [value(seed, check.measure, check.arm) for seed in found]
    right = [check.than if isinstance(check.than, float) else value(seed, check.measure, check.than) for seed in found]
    return check_row(check, left, right)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """A number for each seed, with mean, sample standard deviation, and the interval of the mean over seeds."""
    there = [number for number in values if not math.isnan(number)]
    low, high = interval_over_seeds(there)
    return {
        "per_seed": list(values),
        "mean": math.fsum(there) / len(there) if there else None,
        "sd": deviation(there) if len(there) > 1 else None,
        "low": low,
        "high": high,
    }


def title(result: dict[str, Any]) -> str:
    """What tells results on a page apart."""
    return f"{result['name']}, {result['place']}"


def spread(values: Sequence[float | None], percent: bool) -> str:
    """Numbers of all seeds as mean ± sample standard deviation, of the seeds that have one."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    if not there:
        return "–"
    mean = number(sum(there) / len(there), percent)
    return mean if len(set(there)) == 1 else f"{mean} ± {number(deviation(there), percent)}"


def number(value: float, percent: bool) -> str:
    """A number in three decimals, or as a percentage in one."""
    return f"{value:.1%}" if percent else f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"
