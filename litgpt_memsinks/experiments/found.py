"""What do the models of an experiment show? `evaluate`'s losses, the runs' own logs, checkpoints and localisations."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.battery import Kept, Measured, Plan, measure
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.curve import step_checkpoints
from litgpt_memsinks.evaluate.evaluate import measure_arms, results_content
from litgpt_memsinks.evaluate.results import write_results
from litgpt_memsinks.evaluate.subject import Asked, Role, Subject, ask_prepared, key_of
from litgpt_memsinks.evaluate.verdict import Thresholds
from litgpt_memsinks.experiments.declared import Experiment, Localised
from litgpt_memsinks.experiments.measures import Found, Point, read_readings
from litgpt_memsinks.experiments.runs import Planned, Workplace
from litgpt_memsinks.localise.localise import frontier
from litgpt_memsinks.localise.scores import LocaliseArgs
from litgpt_memsinks.version import __version__

RATIOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of each layer's neurons that a localisation drops."""


class Dropped(NamedTuple):
    """A point of a localisation, as it is kept."""

    ratio: float
    repeated_loss: float
    validation_loss: float
    n: int


def groups(one: Experiment) -> dict[str, list[str]]:
    """Arm whose documents are asked for, to the arms that are asked for them."""
    others = dict(one.asked_of)
    found: dict[str, list[str]] = {}
    for arm in one.arms:
        found.setdefault(others.get(arm.name, one.asked), []).append(arm.name)
    return found


def asked_documents(one: Experiment, workplace: Workplace, asked_arm: str) -> Asked:
    """The documents of the stream of an arm, whether it could be trained or not."""
    return ask_prepared(workplace.stream(next(arm for arm in one.arms if arm.name == asked_arm)), None)


def measure_seed(
    one: Experiment, workplace: Workplace, runs: Sequence[Planned], device: str
) -> tuple[Found, list[str]]:
    """Measure the trained runs of one seed. What was measured before is kept.

    Args:
        one: The experiment.
        workplace: Where finished measurements are.
        runs: Those that are trained.
        device: Where to compute.

    Returns:
        What was found, and a line for what could not be.
    """
    kept = Kept(workplace.folder / "measured")
    by_name = {run.arm.name: run for run in runs}
    found = Found({arm.name: arm for arm in one.arms}, {})
    notes: list[str] = []
    for asked_arm, names in groups(one).items():
        found.asked_of |= dict.fromkeys(names, asked_arm)
        present = [name for name in names if name in by_name]
        if not present:
            continue
        asked = asked_documents(one, workplace, asked_arm)
        plan = Plan(("losses",), by_name[present[0]].block_size)
        roles = _roles([by_name[name] for name in present])
        subjects = [Subject.at(name, by_name[name].final, roles.get(name)) for name in present]
        measured = measure_arms(subjects, asked, plan, device, kept, allow_wrong_map=True)
        found.measured |= measured
        notes += _wrong_maps(found, measured)
        for name in present:
            if by_name[name].arm.checkpoint_every:
                found.checkpoints[name] = _checkpoints(by_name[name].run.out_dir, name, asked, plan, device, kept)
        for localised in one.localised:
            if localised.arm in present:
                notes += _localise(localised, by_name[localised.arm], workplace, asked, device, kept, found)
    for name, run in by_name.items():
        found.readings[name] = read_readings(run.run.out_dir)
    return found, notes


def _roles(runs: Sequence[Planned]) -> dict[str, Role]:
    """The references that `evaluate`'s own comparison takes: the first of each kind."""
    roles: dict[str, Role] = {}
    for run in runs:
        role: Role | None = "left_out" if run.arm.stream.left_out else None
        if role is None and run.arm.recipe == "standard":
            role = "standard"
        if role is not None and role not in roles.values():
            roles[run.arm.name] = role
    return roles


def _wrong_maps(found: Found, measured: dict[str, Measured]) -> list[str]:
    """Arms whose sinks do not know their documents, though they should."""
    return [
        f"{name}: its own sinks know the repeated documents no better than those of others"
        for name, one in measured.items()
        if one.gate is not None and not one.gate["pass"] and found.arms[name].ids_fit
    ]


def _checkpoints(
    run_dir: Path, name: str, asked: Asked, plan: Plan, device: str, kept: Kept
) -> list[tuple[int, Measured]]:
    """The losses at each checkpoint of a run; none if the run was shorter than the interval."""
    if not any(run_dir.glob("step-*")):
        return []
    return [
        (step, measure(Subject.at(f"{name} {step}", path), asked, plan, device, kept, allow_wrong_map=True))
        for step, path in step_checkpoints(run_dir)
    ]


def _localise(
    localised: Localised, run: Planned, workplace: Workplace, asked: Asked, device: str, kept: Kept, found: Found
) -> list[str]:
    """Try a localisation on a trained model, and add what it comes to; or a line that says why there is none."""
    subject = Subject.at(run.arm.name, run.final)
    settings = LocaliseArgs(block_size=run.block_size)
    key = key_of(
        unit="frontier", model=subject.fingerprint(), data=asked.fingerprint(), method=localised.method, ratios=RATIOS,
        seed=run.seed, settings=asdict(settings), package=__version__, device=device,
    )  # fmt: skip

    def compute() -> list[Dropped]:
        points = frontier(
            subject, workplace.stream(run.arm), localised.method, "pooled", RATIOS, seed=run.seed, settings=settings,
            device=device, parts=kept.folder,
        )  # fmt: skip
        return [Dropped(point.ratio, point.repeated_loss, point.validation_loss, point.n) for point in points]

    try:
        rows, _ = kept.get(key, compute)
    except MemSinksError as error:
        return [f"{localised.name}: {error}"]
    points: list[Point] = [Dropped(*row) for row in rows]
    found.frontiers[localised.name] = (localised.arm, points)
    return []


def write_evaluations(
    one: Experiment, workplace: Workplace, planned: Sequence[Planned], found: Sequence[Found], folder: Path, device: str
) -> None:
    """Write ``results.json``, format 2, of the arms that are measured in all seeds; one for each set of documents."""
    for place, (asked_arm, names) in enumerate(groups(one).items()):
        present = [name for name in names if all(name in seed.measured for seed in found)]
        if not present:
            continue
        asked = asked_documents(one, workplace, asked_arm)
        seeds = [{name: seed.measured[name] for name in present} for seed in found]
        block = next(run.block_size for run in planned if run.arm.name == present[0])
        plan = Plan(("losses",), block)
        judged = next((name for name in present if name == "memsinks"), present[-1])
        file = folder / ("results.json" if place == 0 else f"results_{asked_arm}.json")
        evaluation = results_content(seeds, asked, plan, None, Bootstrap(), Thresholds(), judged)
        evaluation["settings"]["device"] = device
        write_results(file, evaluation, seeds, asked)
