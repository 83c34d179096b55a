"""First pass of `prepare`: every file becomes a unit of tokens on disk, read and tokenised once, by all cores.

    file ─► documents ─► tokens + digest (+ MinHash signature) ─► WORK/units/UNIT/

    UNIT/tokens.u2        all documents' tokens with BOS and EOS, one after another: uint16, or `tokens.i4`, int32, if
                          the tokenizer has more than 65,536 tokens
    UNIT/records.bin      one ``RECORD`` per document
    UNIT/keys.bin         the documents' `id_field` values as length-prefixed UTF-8, if one is read
    UNIT/signatures.bin   MinHash signatures, uint32 ``(documents, permutations)``, if they are needed
    UNIT/unit.json        counts; written last

A unit is named by what is in its file and how it is read, so that a run that was killed, changed or split into shards
finds again what is done. Nothing here grows with the corpus: a worker holds one batch of documents.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import cached_property
from multiprocessing.connection import wait as wait_for_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from litgpt_memsinks.corpus.corpus_files import CorpusFile, Document, Passed, read_documents
from litgpt_memsinks.corpus.mixture import NearDuplicates, Reading
from litgpt_memsinks.document_ids.ids import digest
from litgpt_memsinks.document_ids.near_duplicates import SIGNATURE_VERSION, SignatureFile, signatures
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory
from litgpt_memsinks.prepare.encoding import Encoder, load_tokenizer
from litgpt_memsinks.prepare.memory import keep_freed_memory

UNIT_VERSION = 2
"""Version of a unit's layout and content, part of its name."""
RECORD = np.dtype(
    [("digest", "<u8"), ("group", "<u8"), ("offset", "<u8"), ("line", "<i8"), ("length", "<u4"), ("max_token", "<u4")]
)
"""One document of a unit: digest of its tokens, hash of its key (0 without), first token in the token file, line in the
file, tokens with BOS and EOS, and the largest of them."""
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 300_000  # tokenised at once by a thread
"""More at once is no faster, and the tokenizer's memory would go back to the system between batches. To get it again
took a tenth of the time."""
_SECONDS_PER_LINE = 30  # of progress, where there is no terminal for a bar
_PROBE = 4096  # bytes at each end of a file that tell it from another of the same size


class Unit(NamedTuple):
    """A file to be read, and how."""

    reading: int
    """Index of the reading among the recipe's"""
    file: CorpusFile
    """The file"""
    name: str
    """Folder of the result: names the file's content and the settings of reading it"""


@dataclass
class UnitInfo:
    """What ``unit.json`` says."""

    documents: int
    """Documents with text"""
    tokens: int
    """Tokens with BOS and EOS"""
    empty: int
    """Documents without text, or without a token"""
    filtered: int
    """Documents passed over by include and exclude"""
    bad: int
    """Documents that could not be read"""
    first_bad: list[str]
    """Places and reasons of the first of them"""
    without_field: int
    """Documents without a field that include or exclude names"""


class StoppedError(Exception):
    """The run was given up, or has enough."""


@dataclass(frozen=True)
class Done:
    """A unit on disk."""

    unit: Unit
    """What was read"""
    folder: Path
    """Where it is"""
    info: UnitInfo
    """Its counts"""

    def records(self, start: int, stop: int) -> np.ndarray:
        """Records ``start`` to ``stop``, dtype ``RECORD``."""
        return np.fromfile(
            self.folder / "records.bin", dtype=RECORD, count=stop - start, offset=start * RECORD.itemsize
        )

    @cached_property
    def token_file(self) -> Path:
        """Its tokens; see ``token_dtype``.

        Raises:
            MemSinksError: If it is of a shard that an older version wrote.
        """
        for name in ("tokens.u2", "tokens.i4"):
            if (self.folder / name).is_file():
                return self.folder / name
        raise MemSinksError(
            f"{str(self.folder)!r} was written by another version of litgpt-memsinks. Prepare the shard again."
        )

    def signatures(self) -> SignatureFile:
        """The documents' MinHash signatures."""
        return SignatureFile(self.folder / "signatures.bin", self.info.documents)

    def keys(self) -> Iterator[str]:
        """The documents' `id_field` values, in order."""
        with open(self.folder / "keys.bin", "rb") as file:
            while size := file.read(4):
                yield file.read(int.from_bytes(size, "little")).decode()


def token_dtype(path: Path) -> np.dtype:
    """The type of the numbers in a file of tokens: its suffix says it as NumPy does, ``.u2`` or ``.i4``."""
    return np.dtype(f"<{path.suffix[1:]}")


# --------------------------------------------------------------------------------------------------------------- units


def list_units(
    readings: Sequence[Reading],
    files: Sequence[Sequence[CorpusFile]],
    tokenizer: dict[str, Any],
    settings: NearDuplicates | None,
) -> list[Unit]:
    """Name the unit of every file, reading by reading, file by file."""
    return [
        Unit(index, file, unit_name(file, reading, tokenizer, settings))
        for index, (reading, its_files) in enumerate(zip(readings, files, strict=True))
        for file in its_files
    ]


def unit_name(file: CorpusFile, reading: Reading, tokenizer: dict[str, Any], settings: NearDuplicates | None) -> str:
    """Name a unit by its file's path and content and the settings that decide what comes of it."""
    how = {item.name: getattr(reading, item.name) for item in fields(Reading) if item.name != "path"}
    minhash = settings and (SIGNATURE_VERSION, settings.permutations, settings.shingle_size, settings.seed)
    what = (UNIT_VERSION, file.path, file.size, file.format, file.compression, probe(file), how, tokenizer, minhash)
    name = Path(file.path).name
    readable = "".join(character if character.isalnum() else "-" for character in name)[:40]
    return f"{readable}-{xxhash.xxh3_128_hexdigest(json.dumps(what, sort_keys=True).encode())}"


def probe(file: CorpusFile) -> str:
    """Fingerprint of both ends of a local file; a remote one is known by its name and size alone."""
    if "://" in file.path:
        return ""
    try:
        with open(file.path, "rb") as content:
            start = content.read(_PROBE)
            content.seek(max(0, file.size - _PROBE))
            return xxhash.xxh3_64_hexdigest(start + content.read(_PROBE))
    except OSError as error:
        raise MemSinksError(f"{file.path!r} cannot be read: {error.strerror}. Check its permissions.") from error


def find_unit(unit: Unit, stores: Iterable[Path]) -> Done | None:
    """The finished result of a unit in the first of some folders that has it."""
    for store in stores:
        path = store / unit.name / "unit.json"
        if path.is_file():
            return Done(unit, path.parent, UnitInfo(**json.loads(path.read_text(encoding="utf-8"))))
    return None


def batches(documents: Iterable[Document], threads: int = 1) -> Iterator[list[Document]]:
    """Group documents so that a batch is worth the while of so many threads but small in memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= threads * _BATCH_DOCUMENTS or characters >= threads * _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class UnitReader:
    """Reads and tokenises files; runs in worker processes.

    Args:
        readings: The recipe's readings.
        tokenizer_dir: Folder of the tokenizer, loaded once per process.
        store: Folder of the units.
        near_duplicates: Settings of the signatures; ``None`` if none are needed.
        threads: Threads that tokenise in this process.
        special: The tokens around a document, see ``encoding.special_tokens``; the tokenizer's by default.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        tokenizer_dir: Path,
        store: Path,
        near_duplicates: NearDuplicates | None,
        threads: int,
        special: dict[str, int | None] | None = None,
    ) -> None:
        self.readings, self.tokenizer_dir, self.store, self.special = readings, tokenizer_dir, store, special
        self.near_duplicates, self.threads = near_duplicates, threads

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer of this process."""
        return Encoder(load_tokenizer(self.tokenizer_dir, self.special))

    @cached_property
    def token_type(self) -> str:
        """The smallest type that holds this tokenizer's tokens; half the bytes are half the time to write them."""
        return "u2" if self.encoder.largest_token < 2**16 else "i4"

    def __call__(self, unit: Unit, on_progress: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
        """Write one unit.

        Args:
            unit: The file.
            on_progress: Called with the bytes read and the tokens made so far, 0 where that is not known.
            stop: Whether the run was given up.

        Raises:
            MemSinksError: If the file cannot be read.
        """
        passed, counts = Passed(), {"documents": 0, "tokens": 0, "untokenizable": 0}

        def on_bytes(position: int) -> None:
            if stop():  # include and exclude may pass over a whole file
                raise StoppedError
            on_progress(position, 0)

        with atomic_directory(self.store / unit.name) as folder, contextlib.ExitStack() as stack:
            out = {
                name: stack.enter_context(open(folder / f"{name}.bin", "wb"))
                for name in ("records", "keys", "signatures")
            }
            out["tokens"] = stack.enter_context(open(folder / f"tokens.{self.token_type}", "wb"))
            documents_read = read_documents(unit.file, self.readings[unit.reading], passed, on_bytes)
            for documents in batches(documents_read, self.threads):
                if stop():
                    raise StoppedError
                self._write_batch(documents, self._encode(documents), out, counts)
                on_progress(0, counts["tokens"])
            info = UnitInfo(
                documents=counts["documents"],
                tokens=counts["tokens"],
                empty=passed.empty + counts["untokenizable"],
                filtered=passed.filtered,
                bad=passed.bad,
                first_bad=passed.first_bad,
                without_field=passed.without_field,
            )
            (folder / "unit.json").write_text(json.dumps(asdict(info)), encoding="utf-8")

    def _encode(self, documents: list[Document]) -> list[npt.NDArray[np.int32]]:
        """Tokenise with this process' threads; the tokenizer's own ones do not survive a fork."""
        texts = [document.text for document in documents]
        if self.threads == 1 or len(texts) == 1:
            return self.encoder(texts)
        size = -(-len(texts) // self.threads)
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        encoded = self._pool.map(self.encoder, parts)
        return [tokens for part in encoded for tokens in part]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def _write_batch(
        self,
        documents: list[Document],
        encoded: list[npt.NDArray[np.int32]],
        out: dict[str, Any],
        counts: dict[str, int],
    ) -> None:
        bos = int(self.encoder.tokenizer.use_bos)
        kept = [pair for pair in zip(documents, encoded, strict=True) if len(pair[1]) > 1 + bos]
        counts["untokenizable"] += len(documents) - len(kept)
        if not kept:
            return
        records = np.zeros(len(kept), dtype=RECORD)
        lengths = np.array([len(tokens) for _, tokens in kept])
        tokens = np.concatenate([tokens for _, tokens in kept])
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        records["offset"] = counts["tokens"] + starts
        records["length"] = lengths
        records["max_token"] = np.maximum.reduceat(tokens, starts)
        if (found := int(records["max_token"].max())) > (largest := self.encoder.largest_token):
            raise MemSinksError(
                f"The tokenizer gave token {found:,}, but its vocabulary ends at {largest:,}. Download it again."
            )
        records["line"] = [document.line for document, _ in kept]
        records["digest"] = [digest(body[bos:-1]) for _, body in kept]
        if kept[0][0].key is not None:
            keys = [(document.key or "").encode() for document, _ in kept]
            records["group"] = [xxhash.xxh3_64_intdigest(key) for key in keys]
            out["keys"].write(b"".join(len(key).to_bytes(4, "little") + key for key in keys))
        if self.near_duplicates is not None:
            out["signatures"].write(signatures([document.text for document, _ in kept], self.near_duplicates).tobytes())
        out["tokens"].write(tokens.astype(f"<{self.token_type}").data)
        out["records"].write(records.tobytes())
        counts["documents"] += len(kept)
        counts["tokens"] += len(tokens)


# ------------------------------------------------------------------------------------------------------ all cores busy

_worker: dict[str, Any] = {}  # of a worker process: the reader, the counters and the flag that stops it


def _start_worker(reader: UnitReader, counters: Any, stop: Any) -> None:
    """Leave interrupts to the parent, and die with it even if it is killed."""
    _worker.update(reader=reader, counters=counters, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    keep_freed_memory()
    die_with_parent()


def die_with_parent() -> None:
    """End this worker process as soon as its parent ends, even if that is killed. Nothing happens outside workers."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for_process([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read_unit(unit: Unit) -> None:
    """Read one unit in a worker, adding to the counters that the parent draws."""
    before = [0, 0]

    def on_progress(position: int, tokens: int) -> None:
        counters = _worker["counters"]
        with counters.get_lock():
            for index, value in enumerate((position, tokens)):
                if value > before[index]:
                    counters[index] += value - before[index]
                    before[index] = value

    reader = _worker["reader"]
    try:
        reader(unit, on_progress, lambda: bool(_worker["stop"].value))
    except (MemSinksError, OSError):
        # a worker that outlives its killed parent for a moment may finish the same unit, whose content is the same
        if find_unit(unit, [reader.store]) is None:
            raise


def read_units(
    units: Sequence[Unit],
    reader: UnitReader,
    stores: Sequence[Path],
    num_workers: int,
    enough: Callable[[list[Done]], bool] | None = None,
) -> list[Done]:
    """Read and tokenise units in parallel, those that are not done yet.

    Args:
        units: In the order in which documents are numbered.
        reader: What reads one.
        stores: Folders that may hold finished units; new ones go where the reader puts them, the first.
        num_workers: Processes.
        enough: Whether these units, the first ones without a gap, suffice; then the others are left unread. ``None``
            if all are wanted: the largest are read first then, so that all cores end together.

    Returns:
        The shortest run of first units that is enough, or all of them.

    Raises:
        MemSinksError: If a file cannot be read, or a worker dies.
    """
    done = [find_unit(unit, stores) for unit in units]
    prefix = _enough_of(done, enough)
    if prefix is not None:
        return prefix
    missing: dict[str, list[int]] = {}  # the same file may be listed twice
    for index, unit in enumerate(done):
        if unit is None:
            missing.setdefault(units[index].name, []).append(index)
    queue = iter(list(missing))
    if enough is None:
        queue = iter(sorted(missing, key=lambda name: -units[missing[name][0]].file.size))
    workers = min(num_workers, len(missing))
    reader.threads = num_workers // workers
    with (
        ThreadPoolExecutor(1) as meanwhile,  # entered first: after an error, workers are told before it is waited for
        _workers(reader, workers) as (pool, counters),
        _progress(units, done, counters) as redraw,
    ):
        running: dict[Future[None], str] = {}
        while True:
            with _interrupts_wait():
                for name in queue:
                    running[pool.submit(_read_unit, units[missing[name][0]])] = name
                    if len(running) > workers:
                        break
            if not running:
                return [unit for unit in done if unit is not None]
            if "litdata" not in sys.modules:  # it takes half a second, and writing the stream needs it
                meanwhile.submit(importlib.import_module, "litdata")
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            redraw()
            for future in finished:
                future.result()
                for index in missing[running.pop(future)]:
                    done[index] = find_unit(units[index], stores)
            if finished and (prefix := _enough_of(done, enough)) is not None:
                return prefix


def _enough_of(done: Sequence[Done | None], enough: Callable[[list[Done]], bool] | None) -> list[Done] | None:
    """The shortest gapless run of finished first units that is enough, if there is one, or all if all are finished."""
    prefix: list[Done] = []
    for unit in done:
        if unit is None:
            return None
        prefix.append(unit)
        if enough is not None and enough(prefix):
            return prefix
    return prefix


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back where workers may be started: they ignore it, but only once they run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _workers(reader: UnitReader, workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Worker processes and their counters of bytes and tokens. They stop soon after an error."""
    # a spawned worker would first import all of litgpt and torch; these only read, tokenise and write files
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # neither is read under its lock, which a killed worker would never give back
    counters, stop = context.Array("Q", 2), context.RawValue("b", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (reader, counters, stop))
    try:
        yield pool, counters
    except BrokenProcessPool as error:
        raise MemSinksError(
            "A worker process died, probably for lack of memory. Run the same command again, with fewer num_workers; "
            "what is done is kept."
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _progress(units: Sequence[Unit], done: Sequence[Done | None], counters: Any) -> Iterator[Callable[[], None]]:
    """A bar over the bytes that are still to be read, with tokens per second and the time left.

    Where there is no terminal, it is a line now and then instead.
    """
    total = sum(unit.file.size for unit, finished in zip(units, done, strict=True) if finished is None)
    files = sum(unit is None for unit in done)
    if not Console().is_terminal:
        yield _lines(files, total, counters)
        return
    columns = (
        TextColumn("Tokenising {task.fields[files]} file(s)"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    start = time.monotonic()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total, files=files, tokens=0, rate=0.0)

        def redraw() -> None:
            position, tokens = counters.get_obj()[:]
            rate = tokens / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=position, tokens=tokens, rate=rate)

        yield redraw


def _lines(files: int, total: int, counters: Any) -> Callable[[], None]:
    """Prints a line on the progress each time it is called, but seldom."""
    start = last = time.monotonic()

    def line() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_PER_LINE:
            return
        last = now
        position, tokens = counters.get_obj()[:]
        share = min(position / total, 1) if total else 0
        left = f"{timedelta(seconds=round((now - start) * (1 / share - 1)))} left" if share else "time left unknown"
        rate = tokens / (now - start)
        print(f"Tokenising {files:,} file(s): {share:.0%}, {tokens:,} tokens, {rate:,.0f}/s, {left}", flush=True)

    return line
