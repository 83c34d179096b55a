"""One command for each figure and theorem of the paper: train what it needs, measure, and say whether it holds here.

Not a stage: it calls the stages' commands, and the stock `litgpt` console script for the training runs.

    OUT/WORKPLACE/data/STREAM              prepared streams, which experiments share
    OUT/WORKPLACE/runs/NAME-PRINT/seedN    training runs, which experiments share
    OUT/WORKPLACE/EXPERIMENT               experiment.json, results.json of `evaluate`, the figure
    OUT/results.md                         the page of `report`
"""

import difflib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.subject import sha256_of
from litgpt_memsinks.experiments.declared import EXPERIMENTS, Arm, Experiment
from litgpt_memsinks.experiments.figures import draw_experiment
from litgpt_memsinks.experiments.found import measure_seed, write_evaluations
from litgpt_memsinks.experiments.grids import DECLARED, GRIDS
from litgpt_memsinks.experiments.report import write_page
from litgpt_memsinks.experiments.results import EXPERIMENT, content, spread, theorem_content
from litgpt_memsinks.experiments.runs import STREAMS, Planned, Workplace, train
from litgpt_memsinks.experiments.scales import TEXTS, ScaleName, make_texts, scale_of, tokens_of
from litgpt_memsinks.files import alone, write_json
from litgpt_memsinks.theory.theory import PARTS as THEOREMS
from litgpt_memsinks.theory.theory import print_verdicts, save_figure

LOCK = ".lock"
SECONDS_BETWEEN_TRIES = 10.0
MEASURING_MINUTES = 0.15
"""Of losses, for each run: what `list` counts with."""


def experiment(
    name: str,
    scale: ScaleName = "cpu",
    seeds: int = 3,
    corpus: Path | None = None,
    out_dir: Path = Path("runs/experiments"),
    recipes: Path = Path("recipes"),
    jobs: int | None = None,
    results: Path | None = None,
    out: Path | None = None,
    readings: Path | None = None,
) -> None:
    """Repeat a figure or check a theorem of the paper: fig4, thm_forgetting, ...; `list` shows all, with their cost.

    What is finished is kept and shared by experiments; a command that was killed goes on. `report` writes a page of all
    results that are there.

    Args:
        name: An experiment, or `all` (figures and theorems, not the grids of the tables), `list`, `report`.
        scale: `cpu`: the demo's model and sizes, minutes on two cores. `gpu`: the paper's.
        seeds: Number of training seeds.
        corpus: JSON lines with a text each, instead of the embedded stories. 3,032 documents to train on, or more.
        out_dir: Folder of data, runs and results.
        recipes: The repository's folder of recipes.
        jobs: Training runs at the same time, one thread each; one per core by default, one on a GPU.
        results: For `report`: where the results are, `out_dir` by default.
        out: For `report`: the page to write, results.md in `out_dir` by default.
        readings: For `report`: YAML of what to say of the results, such as docs/readings.yaml of the repository.

    Raises:
        MemSinksError: For bad input, or if a training run failed; what the others came to is written all the same.
    """
    if name == "report":
        write_page(results or out_dir, out or out_dir / "results.md", readings)
        return
    chosen = _chosen(name)
    for setting, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise MemSinksError(f"{setting} is {value}, but it must be at least 1.")
    if name == "list":
        print_costs(scale, seeds, corpus)
        return
    trained = [one for one in chosen if not one.theorem]
    workplace = None
    if trained:
        if scale == "gpu" and not torch.cuda.is_available():
            raise MemSinksError("scale is 'gpu', but this machine has no usable GPU. Use --scale cpu.")
        if not (recipes / "demo").is_dir():
            raise MemSinksError(f"{str(recipes)!r} lacks demo/. Run in the repository, or give --recipes DIR.")
        workplace = open_workplace(scale, corpus, out_dir, recipes)
    jobs = jobs or (1 if scale == "gpu" else os.cpu_count() or 1)
    failed = []
    for one in chosen:
        if one.theorem:
            run_theorem(one, out_dir / "theory" / one.name)
        else:
            assert workplace is not None  # there are arms to train
            failed += run_experiment(one, workplace, seeds, jobs, "cuda" if scale == "gpu" else "cpu")
    if failed:
        raise MemSinksError(f"{'; '.join(failed)}. The rest is written; the same command tries again what failed.")


def _chosen(name: str) -> list[Experiment]:
    """The experiments of a name.

    Raises:
        MemSinksError: If there is none, with the choices.
    """
    if name in ("all", "list"):
        return list(EXPERIMENTS.values())
    if name in DECLARED:
        return [DECLARED[name]]
    near = difflib.get_close_matches(name, DECLARED, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise MemSinksError(
        f"There is no experiment {name!r}.{hint} Choose from: {', '.join([*DECLARED, 'all', 'list', 'report'])}."
    )


def open_workplace(scale: ScaleName, corpus: Path | None, out_dir: Path, recipes: Path) -> Workplace:
    """Make the texts of a scale and a corpus, in a folder of their own.

    Raises:
        MemSinksError: If the corpus cannot be used, or the folder holds the texts of another.
    """
    if corpus is not None and not corpus.is_file():
        raise MemSinksError(f"There is no file {str(corpus)!r}. Give a corpus of JSON lines, one object per document.")
    sizes = scale_of(scale, corpus)
    folder = out_dir / (sizes.name if corpus is None else f"{sizes.name}-{corpus.stem}")
    sha256 = "" if corpus is None else sha256_of([corpus])
    # training speed and flags do not decide the texts; flags are in each run's fingerprint
    settings = {"corpus_sha256": sha256} | {
        name: value for name, value in asdict(sizes).items() if isinstance(value, int | str) and name != "paper"
    }
    note = folder / "workplace.json"
    with alone(folder / LOCK, _wait):
        holds = any((folder / made).is_dir() for made in (TEXTS, STREAMS))  # else a mended corpus may take the name
        if holds and note.is_file() and (found := json.loads(note.read_text(encoding="utf-8"))) != settings:
            different = ", ".join(name for name in settings if found.get(name) != settings[name])
            raise MemSinksError(
                f"{str(folder)!r} holds experiments on other texts: their {different} differ. Remove it, or set "
                "--out_dir."
            )
        write_json(note, settings)
        return Workplace(sizes, make_texts(sizes, corpus, folder), folder, recipes, sha256)


def _wait() -> bool:
    """For another command that makes texts or streams in the same workplace."""
    print("Waiting for another command, which prepares texts or streams in this workplace", flush=True)
    time.sleep(SECONDS_BETWEEN_TRIES)
    return True


# -------------------------------------------------------------------------------------------------------------- running


def run_experiment(one: Experiment, workplace: Workplace, seeds: int, jobs: int, device: str) -> list[str]:
    """Train, measure and write one experiment.

    Args:
        one: The experiment.
        workplace: Where its runs are.
        seeds: Number of training seeds.
        jobs: Training runs at the same time.
        device: Where to measure, cpu or cuda.

    Returns:
        A line for everything that failed; the experiment is written without it.
    """
    print(f"{one.name}, {one.where}: {len(one.arms)} arms x {seeds} seed(s)", flush=True)
    problems: list[str] = []
    planned: list[Planned] = []
    for arm in one.arms:
        try:
            with alone(workplace.folder / LOCK, _wait):
                workplace.stream(arm)
            planned += [workplace.planned(arm, seed) for seed in range(1, seeds + 1)]
        except MemSinksError as error:
            problems.append(f"{arm.name}: {str(error).rstrip('.')}")
    failures = train(planned, jobs)
    problems += [f"{run.arm.name} seed {run.seed}: {failures[run.run.out_dir]}" for run in planned
                 if run.run.out_dir in failures]  # fmt: skip
    there = [run for run in planned if run.run.out_dir not in failures]
    found, notes = [], []
    for seed in range(1, seeds + 1):
        of_seed, said = measure_seed(one, workplace, [run for run in there if run.seed == seed], device)
        found.append(of_seed)
        notes += [f"seed {seed}: {note}" for note in said]
    folder = workplace.folder / one.name
    write_evaluations(one, workplace, planned, found, folder, device)
    result = content(one, workplace, planned, found, problems, notes, device)
    draw_experiment(one, found, folder / one.name)
    write_json(folder / EXPERIMENT, result)
    print_outcome(result)
    print(f"Numbers: {folder / EXPERIMENT}   Figure: {folder / one.name}.svg", flush=True)
    return [f"{one.name}: {problem}" for problem in dict.fromkeys(problems)]


def run_theorem(one: Experiment, folder: Path) -> None:
    """Simulate a theorem, as `litgpt-memsinks theory` does, and write the experiment."""
    part = THEOREMS[one.theorem]
    verdicts = part.verdicts(part.setup)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(part.draw, folder / f"{one.name}.svg")
    write_json(folder / EXPERIMENT, theorem_content(one, part.setup, verdicts))
    print_verdicts(verdicts)
    print(f"Numbers: {folder / EXPERIMENT}   Figure: {folder / one.name}.svg", flush=True)


# ------------------------------------------------------------------------------------------------------------- printing


def run_of(arm: Arm) -> tuple[object, ...]:
    """What tells runs apart: arms that agree in it share one."""
    return (arm.recipe, arm.stream, arm.settings, arm.size, arm.reading_every)


def print_costs(scale: ScaleName, seeds: int, corpus: Path | None) -> None:
    """What each experiment takes, alone; and all of them together, which share runs."""
    sizes, cores = scale_of(scale, corpus), os.cpu_count() or 1
    speeds = sizes.minutes_per_million_tokens

    def row(experiments: Sequence[Experiment]) -> tuple[str, ...]:
        arms = {run_of(arm): arm for one in experiments for arm in one.arms}
        if not arms:
            return ("–", "–", "–", "seconds")
        tokens = [tokens_of(arm, sizes) for arm in arms.values()]
        total = None if None in tokens else sum(filter(None, tokens)) * seeds
        minutes = "not measured"
        if speeds is not None:
            training = sum((tokens_of(arm, sizes) or 0) / 1e6 * speeds[arm.size] for arm in arms.values())
            methods = {
                (found.method, next(run_of(arm) for arm in one.arms if arm.name == found.arm))
                for one in experiments
                for found in one.localised
            }
            measuring = len(arms) * MEASURING_MINUTES + sum(
                sizes.minutes_per_localisation[method] for method, _ in methods
            )
            minutes = f"{seeds * (training / cores + measuring):.0f}"
        counted = "as in the recipes" if total is None else f"{total / 1e6:.1f}M"
        return (str(len(arms)), str(len(arms) * seeds), counted, minutes)

    table = Table(title=f"Experiments, scale {scale}, {seeds} seed(s), {cores} core(s)", title_justify="left")
    for heading in ("name", "in the paper", "arms", "runs", "tokens", "minutes, estimated"):
        table.add_column(heading, justify="left" if heading in ("name", "in the paper") else "right")
    for one in EXPERIMENTS.values():
        table.add_row(one.name, one.where, *row([one]))
    table.add_row("all", "runs are shared", *row(list(EXPERIMENTS.values())))
    for one in GRIDS.values():
        table.add_row(one.name, one.where, *row([one]))
    _console().print(table)


def print_outcome(result: dict[str, Any]) -> None:
    """The checks of an experiment, and its verdict."""
    table = Table(title=f"{result['name']}: {result['verdict']}", title_justify="left")
    for heading in ("what should hold", "here", "limit", ""):
        table.add_column(heading)
    for check in result["checks"]:
        percent = check.get("measure") in result.get("percent", [])
        table.add_row(check["says"], *(spread(check[side], percent) for side in ("left", "right")), check["outcome"])
    if choice := result.get("selected"):
        label = result["labels"][choice["by"]]
        print(f"{result['name']}: lowest {label} of {choice['arms']}: {choice['arm']}, {choice['value']:.3f}")
    else:
        _console().print(table)
    for line in (*result["failed"], *result["notes"]):
        print(f"  {line}")


def _console() -> Console:
    """A pipe has no width: do not squeeze tables into rich's 80 columns there."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=150)
