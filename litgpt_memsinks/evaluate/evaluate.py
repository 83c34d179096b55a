"""Measured result: what a model still knows of the repeated documents, and what that cost in validation loss.

    models ─► losses in every state ─► gate ─► attacks ─► intervals ─► comparison ─► verdict
                     └──────────────── battery.py ──────────┘          results.py    verdict.py

What each number means: docs/measuring.md.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.battery import PARTS, Kept, Measured, Plan, cost, measure, units, wrong_map
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.curve import measure_curve, step_checkpoints
from litgpt_memsinks.evaluate.results import (
    Row,
    Seed,
    compare,
    comparison,
    documents_file,
    model_entry,
    provenance,
    role,
    write_results,
)
from litgpt_memsinks.evaluate.subject import Asked, Subject, ask_files, ask_prepared
from litgpt_memsinks.evaluate.verdict import Thresholds, verdict
from litgpt_memsinks.files import refuse_to_overwrite
from litgpt_memsinks.model.losses import Loss, placebo_ids, score
from litgpt_memsinks.progress import progress

__all__ = [
    "Loss",
    "evaluate",
    "measure_arms",
    "placebo_ids",
    "print_results",
    "read_scored",
    "results_content",
    "score",
]

EVALUATED = "evaluated"
"""Arm of the checkpoint that is judged."""


def evaluate(
    checkpoint_dir: Path | None = None,
    data_path: Path | None = None,
    standard: Path | None = None,
    left_out: Path | None = None,
    out_file: Path | None = None,
    block_size: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    models: list[str] | None = None,
    parts: str = "all",
    repeated: Path | None = None,
    validation: Path | None = None,
    tokenizer_dir: Path | None = None,
    curve: Path | None = None,
    allow_wrong_map: bool = False,
    require_pass: bool = False,
    seed: int = 0,
    bootstrap: int = 1000,
    level: float = 0.95,
    relearn_documents: list[int] | None = None,
    relearn_steps: int = 40,
    thresholds: Thresholds | None = None,
    threads: int | None = None,
) -> None:
    """Measure what a model remembers of the repeated documents, attack it, and judge it.

    Models are LitGPT checkpoints, with sinks or plain, or Hugging Face folders. With `out_file`, what is finished
    outlives a kill: the same command goes on.

    Args:
        checkpoint_dir: Model to measure and judge. The last checkpoint of `curve` by default.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        standard: Model of standard training on the same stream: 0% of the gap closed.
        left_out: Model of training without the repeated documents: 100% of the gap closed.
        out_file: JSON file for the result; values of single documents go beside it. Must not exist.
        block_size: Most tokens of a document that are scored. The model's context length by default.
        limit: Most documents of each kind. All by default.
        device: Where to compute, cpu or cuda.
        models: More models to measure, each as NAME=FOLDER.
        parts: What to measure, separated by commas: losses, extraction, teacher_forced, membership, relearning,
            calibrated, quantised; or all.
        repeated: Instead of data_path: file of the texts that were trained on many times.
        validation: Instead of data_path: file of texts like them that were not trained on.
        tokenizer_dir: The tokenizer, with `repeated` and `validation`.
        curve: Folder of a run, to measure the losses at each of its step-* checkpoints, too.
        allow_wrong_map: Write the result even if the documents' IDs are not those of the training run.
        require_pass: End with status 1 unless every check that could be made holds.
        seed: Seed of shuffled IDs, random neurons and resamples.
        bootstrap: Resamples behind an interval; 0 for none.
        level: Share of the resamples that an interval holds.
        relearn_documents: Repeated documents to relearn from, one run for each number. 1, 4 and 16 by default.
        relearn_steps: Optimizer steps of a relearning run.
        thresholds: What the model has to reach.
        threads: Threads that compute. By default what OMP_NUM_THREADS says, else one per core; fewer are faster where
            other work has the cores.

    Raises:
        MemSinksError: For settings out of range, data of another tokenizer, or IDs that are not the model's.
    """
    _check(block_size, limit, device, bootstrap, level, relearn_documents, relearn_steps, threads)
    _refuse_results(out_file)
    plan = Plan(_parts(parts), block_size, seed, tuple(relearn_documents or Plan.relearn_documents), relearn_steps)
    asked = _asked(data_path, repeated, validation, tokenizer_dir, limit)
    subjects = _subjects(checkpoint_dir or _last(curve), standard, left_out, models or [])
    kept = Kept(None if out_file is None else out_file.with_name(f".{out_file.name}.parts"))
    with computing_with(threads):
        arms = _measured(subjects, asked, plan, device, kept, allow_wrong_map, curve)
    boot, reached = Bootstrap(bootstrap, level, seed), thresholds or Thresholds()
    content = results_content([arms], asked, plan, limit, boot, reached, EVALUATED)
    print_results(compare([arms]))
    print_verdict(content["verdict"])
    _write(out_file, content, arms, asked, kept)
    if require_pass and not content["verdict"]["pass"]:
        raise MemSinksError("The model does not pass; the checks that failed are above.")


def _refuse_results(out_file: Path | None) -> None:
    if out_file is not None:
        refuse_to_overwrite(out_file)
        refuse_to_overwrite(documents_file(out_file))


def _last(curve: Path | None) -> Path:
    """The last checkpoint of a run."""
    if curve is None:
        raise MemSinksError("There is no model to measure. Name one: --checkpoint_dir OUT_DIR/final")
    return step_checkpoints(curve)[-1][1]


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Compute with so many threads of PyTorch; as many as it chooses if ``None``."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(
    subjects: list[Subject],
    asked: Asked,
    plan: Plan,
    device: str,
    kept: Kept,
    allow_wrong_map: bool,
    curve: Path | None,
) -> Seed:
    """All models, and the losses at every checkpoint of a run."""
    arms = measure_arms(subjects, asked, plan, device, kept, allow_wrong_map)
    for measured in arms.values():
        _warn(measured)
    if curve is not None:
        arms[EVALUATED].curve = measure_curve(curve, asked, plan, device, kept)
    return arms


def _write(out_file: Path | None, content: dict[str, Any], arms: Seed, asked: Asked, kept: Kept) -> None:
    if out_file is not None:
        write_results(out_file, content, [arms], asked)
        kept.clear()
        print(f"Result: {out_file}   Per document: {documents_file(out_file)}")


def _check(
    block_size: int | None,
    limit: int | None,
    device: str,
    bootstrap: int,
    level: float,
    relearn_documents: list[int] | None,
    relearn_steps: int,
    threads: int | None,
) -> None:
    """Refuse settings out of range."""
    numbers = [("block_size", block_size), ("limit", limit), ("relearn_steps", relearn_steps), ("threads", threads)]
    numbers += [("relearn_documents", number) for number in relearn_documents or []]
    for setting, value in numbers:
        if value is not None and value < 1:
            raise MemSinksError(f"{setting} is {value}, but it must be at least 1.")
    if bootstrap < 0:
        raise MemSinksError(f"bootstrap is {bootstrap}, but it must be at least 0 (no intervals).")
    if not 0 < level < 1:
        raise MemSinksError(f"level is {level}, but it must be above 0 and below 1, such as 0.95.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MemSinksError(f"device is {device!r}, but this machine has no usable GPU. Use --device cpu.")


def _parts(given: str) -> tuple[str, ...]:
    if given == "all":
        return PARTS
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise MemSinksError(f"parts has {unknown[0]!r}. Choose from: {', '.join(PARTS)}; or all.")
    return tuple(part for part in PARTS if part in {"losses", *names})


def _asked(
    data_path: Path | None,
    repeated: Path | None,
    validation: Path | None,
    tokenizer_dir: Path | None,
    limit: int | None,
) -> Asked:
    files = (repeated, validation, tokenizer_dir)
    if data_path is not None and not any(files):
        return ask_prepared(data_path, limit)
    if data_path is None and repeated is not None and validation is not None and tokenizer_dir is not None:
        return ask_files(repeated, validation, tokenizer_dir, limit)
    raise MemSinksError(
        "The documents are those of --data_path DIR, or else of --repeated FILE --validation FILE --tokenizer_dir DIR. "
        "Give the one or all three of the others."
    )


def _subjects(checkpoint_dir: Path, standard: Path | None, left_out: Path | None, models: list[str]) -> list[Subject]:
    subjects = []
    if standard is not None:
        subjects.append(Subject.at("standard", standard, "standard"))
    if left_out is not None:
        subjects.append(Subject.at("left_out", left_out, "left_out"))
    for given in models:
        name, sign, folder = given.partition("=")
        if not sign or not name or name in {EVALUATED, *(subject.arm for subject in subjects)}:
            raise MemSinksError(f"models has {given!r}. Give each as NAME=FOLDER, with names of their own.")
        subjects.append(Subject.at(name, Path(folder)))
    return [*subjects, Subject.at(EVALUATED, checkpoint_dir)]


# ----------------------------------------------------------------------------------------------------------- measuring


def measure_arms(
    subjects: Sequence[Subject], asked: Asked, plan: Plan, device: str, kept: Kept, allow_wrong_map: bool
) -> Seed:
    """Measure the models of one seed one after another, with a progress bar on stderr.

    Raises:
        MemSinksError: See ``battery.measure``; or if the models' contexts hold different parts of the documents.
    """
    costs = {
        subject.arm: sum(cost(unit, asked, plan, subject.kind == "memsinks") for unit in units(plan))
        for subject in subjects
    }
    arms: Seed = {}
    with progress("Measuring", sum(costs.values())) as advance:
        for subject in subjects:
            arms[subject.arm] = measure(
                subject, asked, plan, device, kept, allow_wrong_map, lambda unit, done: advance(done, unit)
            )
    _check_same_targets(arms)
    return arms


def _check_same_targets(arms: Seed) -> None:
    """Refuse to compare models that were asked for different tokens, because their contexts differ."""
    counts = {
        arm: [count for split in measured.found["losses"].values() for count in split["dropped"]["counts"]]
        for arm, measured in arms.items()
    }
    longest = {arm: max(numbers) for arm, numbers in counts.items()}
    if len({tuple(numbers) for numbers in counts.values()}) > 1:
        shown = ", ".join(f"{arm} {length}" for arm, length in longest.items())
        raise MemSinksError(
            f"The models' contexts hold different parts of the documents (targets of the longest: {shown}), so their "
            f"losses cannot be compared. Set --block_size {min(longest.values())}."
        )


def _warn(measured: Measured) -> None:
    """Say on stderr what the reader of the numbers must know."""
    if measured.gate is not None and not measured.gate["pass"]:
        print(f"Warning: {wrong_map(measured.subject, measured.gate)}", file=sys.stderr)
    for part, why in measured.skipped.items():
        print(f"{measured.subject.arm}: no {part}. {why}", file=sys.stderr)


def results_content(
    seeds: list[Seed],
    asked: Asked,
    plan: Plan,
    limit: int | None,
    boot: Bootstrap,
    thresholds: Thresholds,
    judged: str,
) -> dict[str, Any]:
    """All of the result file, see ``results.py``.

    Args:
        seeds: What was measured.
        asked: The documents.
        plan: What was asked for.
        limit: Most documents of each kind.
        boot: How intervals are drawn.
        thresholds: What the model has to reach.
        judged: Arm of the model to judge: by its worst seed.
    """
    content = provenance(asked, plan, limit, boot)
    content["settings"] |= {"thresholds": asdict(thresholds)}
    content["models"] = [
        model_entry(measured, asked, plan, boot, role(seed, "left_out")) for seed in seeds for measured in seed.values()
    ]
    content["comparison"] = comparison(seeds, boot)
    verdicts = [verdict(seed, judged, thresholds) for seed in seeds]
    content["verdict"] = next((one for one in verdicts if one["pass"] is False), verdicts[0])
    return content


# ------------------------------------------------------------------------------------------------------------- printing


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / max(len(values) - 1, 1))


def print_results(rows: list[Row]) -> None:
    """Print the comparison, with what each column means."""
    table = Table(
        title=f"Loss in nats per token, sinks dropped unless said ({len(rows[0].validation)} seed(s))",
        title_justify="left",
    )
    table.add_column("arm")
    for name in ("validation", "vs standard", "repeated", "of unseen", "own sinks", "placebo", "gap closed"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.arm,
            _cell(row.validation, ".3f"),
            _cell(row.validation_change, "+.1%"),
            _cell(row.repeated, ".3f"),
            _cell(row.repeated_ratio, ".0%"),
            _cell(row.own, ".3f"),
            _cell(row.placebo, ".3f"),
            _cell(row.gap_closed, ".0%"),
        )
    _console().print(table)
    print(
        "repeated:    documents that were trained on many times; higher is more forgotten\n"
        "of unseen:   that loss, as a share of the loss of a model that never saw them\n"
        "own sinks:   the same with their own sinks on: what training memorised\n"
        "placebo:     the same with another document's sinks on\n"
        "gap closed:  how far the loss on repeated documents is from standard training's (0%)\n"
        "             to that of a model that never saw them (100%)"
    )


def print_verdict(content: dict[str, Any]) -> None:
    """Print the checks of a verdict and what they come to."""
    table = Table(title=f"Verdict on {content['model']}", title_justify="left")
    for name in ("check", "", "why"):
        table.add_column(name)
    marks = {True: "pass", False: "FAIL", None: "–"}
    for check in content["checks"]:
        table.add_row(check["name"], marks[check["pass"]], check["why"])
    _console().print(table)
    summary = {
        True: "Every check that could be made holds.",
        False: "It does not pass.",
        None: "No verdict: give --standard and --left_out to compare with.",
    }
    print(summary[content["pass"]])


def _console() -> Console:
    """A log file or a pipe has no width: do not squeeze tables into rich's 80 columns there."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=150)


def _cell(values: list[float], spec: str) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    spread = f" ± {format(deviation(values), spec.lstrip('+'))}" if len(values) > 1 else ""
    return format(mean(values), spec) + spread
