"""How fast is `prepare`? Against LitGPT's own SlimPajama preparation and plain litdata, on the same files and cores.

Each contender runs in a process of its own, in turns. `plain litdata` tokenises the same batches of documents in every
worker by `tokenizers`' own batch encoding, but has no document IDs, repeats, shuffle, tables or checks. It runs twice,
and the second one's ratio to the first is the control. To tell what IDs and all the rest cost, both run with the same
tokenisation as well: ours with `tokenizers`' batch encoding, plain litdata with our encoder (`encoding.py`).

A machine that is faster in one minute than in the next makes such ratios vary by more than what IDs cost. So contenders
with the same tokenisation also run in pairs, both at once on one core, and their CPU times are compared: whatever slows
one down slows down the other. They are bound to that core because not all cores of a virtual machine are equally fast.
"""

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zstandard
from rich.console import Console
from rich.progress import track
from rich.table import Table

from litgpt_memsinks.corpus.corpus_files import corpus_files, read_documents
from litgpt_memsinks.corpus.embedded import stories, train_tokenizer
from litgpt_memsinks.corpus.mixture import Reading, Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.prepare.encoding import Encoder, load_tokenizer
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.prepare.tokenizing import batches

CONTENDERS = (
    "plain litdata",
    "plain litdata again",
    "ours, tokenizers' encoding",
    "plain litdata, our encoder",
    "ours",
    "litgpt prepare_slimpajama",
)
PAIRS = (
    ("plain litdata", "plain litdata again"),
    ("plain litdata", "ours, tokenizers' encoding"),
    ("plain litdata, our encoder", "ours"),
)
"""What runs at once on one core: the control, and the contenders with the same tokenisation."""
_PAIRED_CORES, _PAIRED_WORKERS = 2, 2  # cores that have a pair each at the same time, and workers of each contender
_STORIES = 4000  # in each made-up file
_SAMPLED_EVERY = 0.5  # seconds; the kernel walks all pages of a process for its memory, and stops it meanwhile
_CHUNK_BYTES = 16_000_000  # so that a small corpus fills some, and a larger one takes no more memory for that reason


@dataclass
class Measurement:
    """One contender on one size of data."""

    contender: str
    files: int
    """Files that were read"""
    tokens: int
    """Tokens in them"""
    seconds: float
    """Wall time, median over the rounds"""
    cpu_seconds: float
    """CPU time of all processes, median over the rounds"""
    peak_memory: int
    """Bytes of all processes together at the worst moment, shared pages counted once; largest over the rounds"""
    wall_speed: float
    """Median over the rounds of the wall time of plain litdata divided by this contender's: above 1 is faster"""
    cpu_speed: float
    """The same of CPU time"""


@dataclass
class Pair:
    """Two contenders that ran at once on one core, with two workers each."""

    base: str
    """The one that the other is compared to"""
    contender: str
    """The other"""
    files: int
    """Files that each read"""
    cpu_speed: float
    """CPU time of the first divided by the second's, geometric mean of all runs: above 1, the second is faster"""
    standard_error: float | None
    """Of the logarithm of that, so about a share of it; ``None`` of one run"""
    runs: int
    """Rounds times cores"""


def bench_data(
    corpus: Path | None = None,
    tokenizer_dir: Path | None = None,
    files: int = 50,
    rounds: int = 3,
    growth: int = 10,
    num_workers: int | None = None,
    out_file: Path | None = None,
) -> None:
    """Time `prepare` against LitGPT's SlimPajama preparation and plain litdata, and its memory on more data.

    Args:
        corpus: Folder of SlimPajama's `.jsonl.zst` files; made-up stories by default. Copies of them are prepared.
        tokenizer_dir: A tokenizer; one of 4,096 tokens trained on stories by default.
        files: How many files to prepare. With few, what does not grow with the data (half a second) weighs too much.
        rounds: How often each contender takes its turn.
        growth: How many times as many files to measure our memory on; 1 leaves that out.
        num_workers: Processes; one per core by default. LitGPT's own always takes one per core.
        out_file: JSON file for the figures. Must not exist.

    Raises:
        MemSinksError: If a number is too small, or `out_file` exists.
    """
    for name, value in (("files", files), ("rounds", rounds), ("growth", growth)):
        if value < 1:
            raise MemSinksError(f"{name} is {value}, but it must be at least 1.")
    if out_file is not None:
        refuse_to_overwrite(out_file)
    workers = num_workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer_dir = tokenizer_dir or _tokenizer(work)
        inputs = {count: _copies(corpus, work / f"files-{count}", count) for count in {files, files * growth}}
        # each round begins with another one, so that none always follows the same
        starts = [turn % len(CONTENDERS) for turn in range(rounds)]
        orders = [CONTENDERS[start:] + CONTENDERS[:start] for start in starts]
        turns = [(contender, files) for order in orders for contender in order]
        turns += [("ours", files * growth)] * (growth > 1)
        tokens = {count: count_tokens(path, tokenizer_dir) for count, path in inputs.items()}
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for contender, count in track(turns, "Preparing", transient=True):
            figures = _in_own_process(contender, inputs[count], tokenizer_dir, work / "out", workers)
            found.setdefault((contender, count), []).append(figures)
        at_once = [(pair, turn) for turn in range(rounds) for pair in PAIRS]
        ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
        for pair, turn in track(at_once, "Preparing, two at once", transient=True):
            ratios[pair] += _cpu_ratios(pair, turn, inputs[files], tokenizer_dir, work)
    measurements = [_summary(contender, count, found, files, tokens) for contender, count in found]
    pairs = [_pair(pair, files, ratios[pair]) for pair in PAIRS]
    _print(measurements, rounds, workers)
    _print_pairs(pairs)
    if out_file is not None:
        versions = {name: version(name) for name in ("litdata", "litgpt", "litgpt-memsinks", "tokenizers")}
        figures = {"measurements": [asdict(one) for one in measurements], "pairs": [asdict(one) for one in pairs]}
        write_json(out_file, {"num_workers": workers, "versions": versions, **figures})


def _summary(
    contender: str, count: int, found: dict[tuple[str, int], list[dict[str, Any]]], files: int, tokens: dict[int, int]
) -> Measurement:
    runs, plain = found[contender, count], found[CONTENDERS[0], files]

    def ratio(name: str) -> float:
        return statistics.median(base[name] / own[name] for base, own in zip(plain, runs, strict=False))

    return Measurement(
        contender=contender,
        files=count,
        tokens=tokens[count],
        seconds=statistics.median(run["seconds"] for run in runs),
        cpu_seconds=statistics.median(run["cpu_seconds"] for run in runs),
        peak_memory=max(run["peak_memory"] for run in runs),
        wall_speed=ratio("seconds") * tokens[count] / tokens[files],
        cpu_speed=ratio("cpu_seconds") * tokens[count] / tokens[files],
    )


def _pair(pair: tuple[str, str], files: int, ratios: list[float]) -> Pair:
    logs = [math.log(ratio) for ratio in ratios]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
    return Pair(*pair, files, math.exp(statistics.mean(logs)), error, len(logs))


# ---------------------------------------------------------------------------------------------------------- contenders


def run_ours(inputs: Path, tokenizer_dir: Path, out_dir: Path, num_workers: int) -> None:
    """Our `prepare`, with validation held out, as for a run."""
    skip = {"meta.redpajama_set_name": ["RedPajamaGithub"]}
    path = str(inputs / "*.zst")
    prepare(
        out_dir,
        tokenizer_dir,
        {"slimpajama": Source(path, exclude=skip)},
        {"held_out": ValidationSet(path, exclude=skip, documents=10, hold_out=True)},
        chunk_bytes=_CHUNK_BYTES,
        num_workers=num_workers,
    )


def run_ours_unaided(inputs: Path, tokenizer_dir: Path, out_dir: Path, num_workers: int) -> None:
    """Our `prepare`, tokenising whole texts as plain litdata does. Workers are forked, so they inherit the patch."""
    with mock.patch("litgpt_memsinks.prepare.encoding.begins_words_at_spaces", return_value=False):
        run_ours(inputs, tokenizer_dir, out_dir, num_workers)


def run_litgpt(inputs: Path, tokenizer_dir: Path, out_dir: Path, num_workers: int) -> None:
    """LitGPT's own script."""
    from litgpt.data import prepare_slimpajama

    prepare_slimpajama.prepare(inputs, out_dir, tokenizer_dir)


class PlainTokens:
    """Yields the tokens of a file's documents, tokenised in batches; litdata runs it in its worker processes.

    Args:
        tokenizer_dir: Folder of the tokenizer.
        by_words: Whether words are encoded once, as in `prepare`, or all texts by the tokenizer.
    """

    def __init__(self, tokenizer_dir: Path, by_words: bool) -> None:
        self.tokenizer_dir, self.by_words = tokenizer_dir, by_words

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer of this process."""
        encoder = Encoder(load_tokenizer(self.tokenizer_dir))
        encoder.by_words &= self.by_words
        return encoder

    def __call__(self, path: str) -> Iterator[torch.Tensor]:
        """Yield one int32 tensor per document of a file."""
        reading = Reading(path)
        (file,) = corpus_files(reading)
        for documents in batches(read_documents(file, reading)):
            for tokens in self.encoder([document.text for document in documents]):
                yield torch.from_numpy(tokens.copy())  # which PyTorch wants writable


def run_plain(inputs: Path, tokenizer_dir: Path, out_dir: Path, num_workers: int, by_words: bool = False) -> None:
    """Plain `litdata.optimize`: tokens without IDs, in the order of the files."""
    from litdata import TokensLoader, optimize

    optimize(
        fn=PlainTokens(tokenizer_dir, by_words),
        inputs=[str(path) for path in sorted(inputs.glob("*.zst"))],
        output_dir=str(out_dir),
        chunk_bytes=_CHUNK_BYTES,
        item_loader=TokensLoader(),
        num_workers=num_workers,
        start_method="fork",  # as ours; spawned workers would import everything again
        verbose=False,
    )


_RUNS: dict[str, Callable[[Path, Path, Path, int], None]] = {
    "ours": run_ours,
    "ours, tokenizers' encoding": run_ours_unaided,
    "litgpt prepare_slimpajama": run_litgpt,
    "plain litdata": run_plain,
    "plain litdata, our encoder": partial(run_plain, by_words=True),
}


# ----------------------------------------------------------------------------------------------------------- measuring


def _in_own_process(contender: str, inputs: Path, tokenizer_dir: Path, out_dir: Path, workers: int) -> dict[str, Any]:
    return _figures(_start(contender, inputs, tokenizer_dir, out_dir, workers), contender, out_dir)


def _cpu_ratios(pair: tuple[str, str], turn: int, inputs: Path, tokenizer_dir: Path, work: Path) -> list[float]:
    """Run two contenders at once on each of some cores, beginning with either in turns.

    Returns:
        For each core, the first one's CPU time divided by the second's.
    """
    started: list[dict[str, tuple[subprocess.Popen[bytes], Path]]] = []
    for core in _cores()[:_PAIRED_CORES]:
        started.append({})
        for contender in pair[:: -1 if (turn + len(started)) % 2 else 1]:
            out_dir = work / f"out-{len(started)}-{pair.index(contender)}"
            process = _start(contender, inputs, tokenizer_dir, out_dir, _PAIRED_WORKERS, core)
            started[-1][contender] = process, out_dir
    cpu = [
        {name: _figures(process, name, out_dir)["cpu_seconds"] for name, (process, out_dir) in both.items()}
        for both in started
    ]
    return [one[pair[0]] / one[pair[1]] for one in cpu]


def _cores() -> list[int]:
    """The cores that this process may use; one where the system binds no process to a core."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def _start(
    contender: str, inputs: Path, tokenizer_dir: Path, out_dir: Path, workers: int, core: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a contender on all cores, measuring memory, or as one of a pair on one core, without."""
    shutil.rmtree(out_dir, ignore_errors=True)
    what = [contender.removesuffix(" again"), str(inputs), str(tokenizer_dir), str(out_dir), workers, core]
    code = "import sys; from litgpt_memsinks.bench.data import measure_here; measure_here(sys.argv[1])"
    scratch = {"DATA_OPTIMIZER_CACHE_FOLDER": f"{out_dir}-cache", "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{out_dir}-data"}
    if core is not None:  # CPU times would not be comparable if one tokenised with more threads than it has workers
        scratch["TOKENIZERS_PARALLELISM"] = "false"
    with open(f"{out_dir}.out", "wb") as out, open(f"{out_dir}.err", "wb") as err:
        command = [sys.executable, "-c", code, json.dumps(what)]
        return subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | scratch)


def _figures(process: subprocess.Popen[bytes], contender: str, out_dir: Path) -> dict[str, Any]:
    """Wait for a contender, and read what it printed last."""
    code = process.wait()
    out, err = (Path(f"{out_dir}.{name}").read_text().strip().splitlines() for name in ("out", "err"))
    if code:
        raise MemSinksError(f"{contender} failed: {(err or ['no output'])[-1]}")
    figures: dict[str, Any] = json.loads(out[-1])
    return figures


def count_tokens(inputs: Path, tokenizer_dir: Path) -> int:
    """Tokens of a folder of files."""
    tokens_of = PlainTokens(tokenizer_dir, True)
    files = track(sorted(inputs.glob("*.zst")), "Counting tokens", transient=True)
    return sum(len(document) for path in files for document in tokens_of(str(path)))


def measure_here(what: str) -> None:
    """Run one contender in this process and print its figures as JSON."""
    contender, inputs, tokenizer_dir, out_dir, workers, core = json.loads(what)
    run = _RUNS[contender]
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})  # and with it all processes that are started from here
    with _peak_memory() if core is None else nullcontext([0]) as peak:
        started = time.perf_counter()
        run(Path(inputs), Path(tokenizer_dir), Path(out_dir), workers)
        seconds = time.perf_counter() - started
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in usage) - _CPU_OF_IMPORTS
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_memory": peak[0]}))


_CPU_OF_IMPORTS = time.process_time()


class _peak_memory:  # noqa: N801 (used as a function)
    """Largest sum of the proportional memory of this process and all below it, sampled twice a second."""

    def __enter__(self) -> list[int]:
        self.peak, self.done = [0], threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self.peak

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.done.wait(_SAMPLED_EVERY):
            self.peak[0] = max(self.peak[0], sum(_memory(process) for process in _tree(os.getpid())))


def _tree(process: int) -> Iterator[int]:
    yield process
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = thread.read_text().split()
        except OSError:
            continue  # it has ended
        for child in children:
            yield from _tree(int(child))


def _memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended, or this is not Linux
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# ---------------------------------------------------------------------------------------------------------------- data


def _tokenizer(work: Path) -> Path:
    train_tokenizer(stories(2000), work / "tokenizer", vocab_size=4096)
    return work / "tokenizer"


def _copies(corpus: Path | None, folder: Path, count: int) -> Path:
    """A folder of so many files, named `NUMBER-ORIGINAL`.

    Each document begins with the file's number: SlimPajama is deduplicated, and documents that repeat have a table of
    their own in what `prepare` writes.
    """
    folder.mkdir()
    if corpus is None:
        made = folder.parent / "stories"
        if not made.is_dir():
            made.mkdir()
            meta = {"redpajama_set_name": "RedPajamaC4"}
            lines = "".join(json.dumps({"text": text, "meta": meta}) + "\n" for text in stories(_STORIES))
            (made / "stories.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        corpus = made
    originals = sorted(corpus.rglob("*.jsonl.zst"))
    if not originals:
        raise MemSinksError(f"{str(corpus)!r} has no file ending in .jsonl.zst. Name a folder of SlimPajama files.")
    for number in track(range(count), f"Making {count} files", transient=True):
        original = originals[number % len(originals)]
        with zstandard.open(original, "rt", encoding="utf-8") as file:
            documents = [json.loads(line) for line in file]
        own = [json.dumps(document | {"text": f"{number} {document['text']}"}) + "\n" for document in documents]
        (folder / f"{number:04d}-{original.name}").write_bytes(zstandard.compress("".join(own).encode()))
    return folder


def _print(measurements: list[Measurement], rounds: int, workers: int) -> None:
    title = f"Preparing data: {workers} processes, median of {rounds} rounds"
    table = Table(title=title, title_justify="left")
    for name in ("contender", "files", "tokens", "wall s", "CPU s", "tokens/s", "speed", "CPU speed", "peak MB"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for one in measurements:
        table.add_row(
            one.contender,
            str(one.files),
            f"{one.tokens:,}",
            f"{one.seconds:.1f}",
            f"{one.cpu_seconds:.1f}",
            f"{one.tokens / one.seconds:,.0f}",
            f"{one.wall_speed:.2f}",
            f"{one.cpu_speed:.2f}",
            f"{one.peak_memory / 1e6:.0f}",
        )
    Console(width=120).print(table)
    print('Speeds are tokens per second as a ratio to plain litdata. "again" is the control. Peak: of all processes.')


def _print_pairs(pairs: list[Pair]) -> None:
    table = Table(title="Two at once on one core, with two workers each", title_justify="left")
    for name in ("contender", "against", "CPU speed", "standard error", "runs"):
        table.add_column(name, justify="left" if name in ("contender", "against") else "right")
    for one in pairs:
        error = "" if one.standard_error is None else f"{one.standard_error:.3f}"
        table.add_row(one.contender, one.base, f"{one.cpu_speed:.3f}", error, str(one.runs))
    Console(width=120).print(table)
    print("CPU speed: how many times as fast as the one it runs against, by CPU time, which the core slows down alike.")
