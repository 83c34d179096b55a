"""Several training runs with the stock `litgpt pretrain`, some at a time, each with a bar; a finished one is kept."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import alone, write_json
from litgpt_memsinks.prepare.manifest import Manifest

MICRO_BATCH = 8  # of the recipes in recipes/demo
TRAINED, LOG = "trained.json", "train.log"


class TrainingFailedError(MemSinksError):
    """A run ended with another status than 0.

    Args:
        command: What was run.
        status: With what it ended.
        log: Where its output is.
        tail: The last lines of that.
    """

    def __init__(self, command: Sequence[str], status: int, log: Path, tail: Sequence[str]) -> None:
        self.status, self.log = status, log
        self.last = next((line.strip() for line in reversed(tail) if line.strip()), "no output")
        super().__init__(f"`{' '.join(command)}` failed with status {status}. Its log, {log}, ends:\n" + "".join(tail))


@dataclass(frozen=True)
class TrainingRun:
    """One run of the stock command."""

    title: str
    """What its bar says"""
    command: tuple[str, ...]
    """The command line"""
    out_dir: Path
    """Its ``--out_dir``; what an interrupted run has left there is removed"""
    iterations: int
    """Micro batches until its end"""


def one_pass(stream: Path, block_size: int) -> int:
    """Iterations of one pass over a prepared stream: a block holds T inputs and a last target."""
    return Manifest.read(stream).splits["train"].tokens // (MICRO_BATCH * (block_size + 1))


def is_trained(out_dir: Path) -> bool:
    """Whether a run has come to its end: LitGPT writes this file last."""
    return (out_dir / "final" / "model_config.yaml").is_file()


def pretrain_command(
    recipe: Path, data_path: Path, out_dir: Path, seed: int, block_size: int, max_tokens: int
) -> list[str]:
    """The stock command of one run. The recipe has everything but what the corpus and the seed decide."""
    return [
        *seeded_command(recipe, data_path, out_dir, seed),
        *("--train.max_seq_length", str(block_size)),
        *("--train.max_tokens", str(max_tokens)),
    ]


def seeded_command(recipe: Path, data_path: Path, out_dir: Path, seed: int) -> list[str]:
    """The stock command for a recipe that is complete but for its data, its folder and its seed."""
    script = Path(sys.executable).parent / "litgpt"
    return [
        str(script) if script.is_file() else shutil.which("litgpt") or "litgpt",
        "pretrain",
        *("--config", str(recipe)),
        *("--data.data_path", str(data_path)),
        *("--out_dir", str(out_dir)),
        *("--seed", str(seed)),
        *("--data.seed", str(seed)),
    ]


def train_runs(
    runs: Sequence[TrainingRun], jobs: int, threads: int, keep_going: bool = False
) -> dict[str, TrainingFailedError]:
    """Train, some at a time, with one progress bar each.

    Args:
        runs: What to train; finished ones are not trained again.
        jobs: Runs at the same time.
        threads: Threads of each.
        keep_going: Train the others if one fails, instead of stopping them all.

    Returns:
        Title of each run that failed to how; empty unless ``keep_going``.

    Raises:
        TrainingFailedError: If a run fails and ``keep_going`` is not set; the message has the end of its log.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    stop = threading.Event()
    failed: dict[str, TrainingFailedError] = {}
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        tasks = [progress.add_task(run.title, total=run.iterations, start=False, loss="waiting") for run in runs]
        futures = [
            pool.submit(train_run, list(run.command), run.out_dir, threads, progress, task, stop)
            for run, task in zip(runs, tasks, strict=True)
        ]
        try:
            for run, future in zip(runs, futures, strict=True):
                try:
                    future.result()
                except TrainingFailedError as error:
                    if not keep_going:
                        raise
                    failed[run.title] = error
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return failed


_ITERATION = re.compile(r"iter (\d+) step .* loss train: ([\d.]+|nan)")


def train_run(
    command: list[str], out_dir: Path, threads: int, progress: Progress, task: TaskID, stop: threading.Event
) -> None:
    """Run one command, copy its output to ``train.log``, follow its iterations, and note the seconds at its end.

    A run that is finished is left as it is, and one that another process trains is waited for.

    Raises:
        TrainingFailedError: If it ends with another status than 0.
    """
    progress.start_task(task)

    def wait() -> bool:
        progress.update(task, loss="another command trains it")
        return not stop.wait(1)

    with alone(out_dir.with_name(f".{out_dir.name}.lock"), wait):
        if is_trained(out_dir):
            progress.update(task, completed=progress.tasks[task].total, loss="done before")
        elif not stop.is_set():
            _train(command, out_dir, threads, progress, task, stop)


def _train(
    command: list[str], out_dir: Path, threads: int, progress: Progress, task: TaskID, stop: threading.Event
) -> None:
    shutil.rmtree(out_dir, ignore_errors=True)  # of an interrupted run
    out_dir.mkdir(parents=True, exist_ok=True)  # what outlived its killed parent may still write a line
    progress.update(task, loss="starting")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    tail: list[str] = []
    started = time.monotonic()
    with (
        open(out_dir / LOG, "w", encoding="utf-8", buffering=1) as log,  # a line at a time, to be followed
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None  # asked for
        log.write(" ".join(command) + "\n")
        for line in process.stdout:
            log.write(line)
            tail = [*tail[-9:], line]
            if match := _ITERATION.search(line):
                _show(progress, task, int(match[1]), f"loss {match[2]}")
            if stop.is_set():
                process.terminate()
    if stop.is_set():
        return
    if process.returncode:
        raise TrainingFailedError(command, process.returncode, out_dir / LOG, tail)
    write_json(out_dir / TRAINED, {"seconds": round(time.monotonic() - started, 1), "threads": threads})
    progress.update(task, completed=progress.tasks[task].total)


def _show(progress: Progress, task: TaskID, iteration: int, loss: str) -> None:
    """Move the bar; in a log file or a pipe, which show no bars, print a line at every quarter instead."""
    shown, total = progress.tasks[task], progress.tasks[task].total or 1
    if not progress.console.is_terminal and int(4 * iteration / total) > int(4 * shown.completed / total):
        print(f"  {shown.description}: iteration {iteration} of {total:.0f}, {loss}", flush=True)
    progress.update(task, completed=iteration, loss=loss)
