"""How fast does the loader yield? Pairs from our stream against tokens from LitGPT's own `LitData`, in turn.

The plain stream holds the same tokens without IDs, so ours reads twice the bytes for the same rows. Each round goes
through both, without workers in CPU time, and with them in wall time.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.data import LitData
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader

from litgpt_memsinks.corpus.embedded import stories, train_tokenizer
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.data.data import MemSinksData
from litgpt_memsinks.prepare.chunks import read_chunks
from litgpt_memsinks.prepare.prepare import prepare

_STORIES, _BLOCK, _BATCH, _CHUNK_BYTES = 4000, 256, 8, 1 << 20
CONTENDERS = ("LitData", "LitData again", "pairs")


@dataclass
class Loading:
    """One contender with one number of workers."""

    loader: str
    num_workers: int
    rows_per_second: float
    """Median over the rounds; per second of CPU time without workers, of wall time with them"""
    ratio: float
    """Median over the rounds of its rows per second divided by LitData's"""


def bench_loader(rounds: int = 7, workers: tuple[int, ...] = (0, 2)) -> list[dict[str, Any]]:
    """Measure and print the rows per second of both loaders.

    Args:
        rounds: How often each takes its turn.
        workers: Numbers of DataLoader workers.

    Returns:
        ``Loading`` of each as plain values.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_streams(work)
        measured = [one for num_workers in workers for one in _measure(work, num_workers, rounds)]
    _print(measured, rounds)
    return list(map(asdict, measured))


def make_streams(work: Path) -> None:
    """Prepare a corpus in ``work/pairs``, and its tokens as a plain stream of the same rows in ``work/plain``."""
    from litdata import TokensLoader, optimize

    train_tokenizer(stories(500), work / "tokenizer", vocab_size=1024)
    (work / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(_STORIES)))
    text = str(work / "stories.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):  # how to train on it
        prepare(
            work / "pairs",
            work / "tokenizer",
            {"stories": Source(text)},
            {"held_out": ValidationSet(text, documents=400, hold_out=True)},
            chunk_bytes=_CHUNK_BYTES,
        )
    for split in ("train", "val"):
        chunks = [chunk.pairs[:, 0] for chunk in read_chunks(work / "pairs" / split)]
        optimize(
            fn=_tokens,
            inputs=chunks,
            output_dir=str(work / "plain" / split),
            chunk_bytes=_CHUNK_BYTES,
            item_loader=TokensLoader(),
            num_workers=1,
            reorder_files=False,
            start_method="fork",
            verbose=False,
        )


def _tokens(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.copy())


def _measure(work: Path, num_workers: int, rounds: int) -> list[Loading]:
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in track(range(rounds), f"loading, {num_workers} worker(s)", transient=True):
        for place in range(len(CONTENDERS)):
            name = CONTENDERS[(place + turn) % len(CONTENDERS)]
            speeds[name].append(rows_per_second(_loader(work, name, num_workers), num_workers))
    base = speeds[CONTENDERS[0]]
    return [
        Loading(
            loader=name,
            num_workers=num_workers,
            rows_per_second=statistics.median(own),
            ratio=statistics.median(mine / stock for mine, stock in zip(own, base, strict=True)),
        )
        for name, own in speeds.items()
    ]


def _loader(work: Path, name: str, num_workers: int) -> DataLoader:
    data: LitData
    if name == "pairs":
        data = MemSinksData(data_path=work / "pairs", num_workers=num_workers)
    else:
        data = LitData(data_path=str(work / "plain"), split_names=("train", "val"), num_workers=num_workers)
    data.connect(batch_size=_BATCH, max_seq_length=_BLOCK)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        return data.train_dataloader()


def rows_per_second(loader: DataLoader, num_workers: int) -> float:
    """Rows of an epoch after its first batch, which pays for the start, per second of CPU or wall time."""
    clock: Callable[[], float] = time.perf_counter if num_workers else time.process_time
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")  # LitData's, without a GPU
        batches = iter(loader)
        next(batches)
        started = clock()
        rows = sum(map(len, batches))
        return rows / (clock() - started)


def _print(measured: list[Loading], rounds: int) -> None:
    title = f"Loading rows of {_BLOCK} tokens, batches of {_BATCH}: median of {rounds} rounds"
    table = Table(title=title, title_justify="left")
    for name in ("workers", "loader", "rows/s", "tokens/s", "ratio to LitData"):
        table.add_column(name, justify="left" if name == "loader" else "right")
    for one in measured:
        kind = f"{one.num_workers}" + (" (wall)" if one.num_workers else " (CPU)")
        speed = one.rows_per_second
        table.add_row(kind, one.loader, f"{speed:,.0f}", f"{speed * _BLOCK:,.0f}", f"{one.ratio:.3f}")
    Console(width=120).print(table)
    print("A run is not held up by its loader while the tokens/s with workers exceed those of the training step.")
