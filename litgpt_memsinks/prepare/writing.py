"""Third pass of `prepare`: the plan becomes litdata chunks, through litdata's own `optimize`.

    entries in their final order ─► pieces of one chunk each ─► worker: gather tokens, interleave IDs ─► chunk file

The plan says where each chunk ends, so the chunks are the same whatever the number of workers: litdata then shuffles
the same chunks in the same way, and two preparations train alike.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from litgpt_memsinks.document_ids.ids import interleave
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import write_json
from litgpt_memsinks.prepare.chunks import INDEX, read_index
from litgpt_memsinks.prepare.memory import keep_freed_memory
from litgpt_memsinks.prepare.planning import BUCKET_ROWS, ENTRY
from litgpt_memsinks.prepare.tokenizing import die_with_parent, token_dtype

BYTES_PER_PAIR = 8
ITEM_TOKENS = 1 << 20
"""Tokens that a worker hands to litdata at once, at most, but whole documents. litdata copies them, so that a whole
chunk at once would take a third more memory; and so few stay in the processor's cache until they are copied."""
WORKER_DIED = (
    "a worker process died, probably for lack of memory. Run the same command again, with fewer num_workers; what is "
    "tokenised is kept."
)
_OPEN_FILES = 128  # token files that a worker keeps open


class Piece(NamedTuple):
    """What one chunk holds: documents, or a part of one that is longer than a chunk."""

    start: int
    """First entry"""
    stop: int
    """Entry behind the last one"""
    skip: int
    """Tokens of the first entry that the chunk before has"""
    tokens: int
    """Tokens of the chunk"""


def cut(lengths: Iterator[npt.NDArray[np.int64]], most: int) -> Iterator[Piece]:
    """Cut a stream into chunks: as many whole documents as fit, and a document longer than a chunk into pieces.

    Args:
        lengths: Tokens of the documents in order, in blocks.
        most: Tokens in a chunk.
    """
    start, entry, skip, filled = 0, 0, 0, 0
    for block in lengths:
        ends = np.cumsum(block)
        done, index = 0, 0  # tokens and documents of this block that are dealt with
        while index < len(block):
            fitting = int(np.searchsorted(ends, done + most - filled, side="right")) - index
            if fitting:
                filled += int(ends[index + fitting - 1]) - done
                done, index, entry = int(ends[index + fitting - 1]), index + fitting, entry + fitting
                continue
            if filled:
                yield Piece(start, entry, skip, filled)
                start, skip, filled = entry, 0, 0
                continue
            whole, rest = divmod(int(block[index]), most)
            for part in range(whole):
                yield Piece(entry, entry + 1, part * most, most)
            done, index, entry = int(ends[index]), index + 1, entry + 1
            start, skip, filled = (entry - 1, whole * most, rest) if rest else (entry, 0, 0)
    if filled:
        yield Piece(start, entry, skip, filled)


def tokens_per_chunk(chunk_bytes: int) -> int:
    """Tokens that fit into a chunk file with its header, which says where each of its items begins.

    Two neighbouring items hold more than ``ITEM_TOKENS`` together, which limits their number.
    """
    most_items = 2 * (chunk_bytes // (BYTES_PER_PAIR * ITEM_TOKENS)) + 1
    return (chunk_bytes - 4 * (most_items + 2)) // BYTES_PER_PAIR


def items(entries: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Cut a chunk's entries into items: as many as fit into ``ITEM_TOKENS``, at least one.

    A document is never cut here: litdata would put its beginning into the chunk before.
    """
    ends = np.cumsum(entries["length"], dtype=np.int64)
    start, done = 0, 0  # entries and tokens
    while start < len(entries):
        stop = max(int(np.searchsorted(ends, done + ITEM_TOKENS, side="right")), start + 1)
        yield entries[start:stop]
        start, done = stop, int(ends[stop - 1])


def entry_lengths(path: Path) -> Iterator[npt.NDArray[np.int64]]:
    """Tokens of a plan's entries, in blocks."""
    with open(path, "rb") as file:
        while len(entries := np.fromfile(file, dtype=ENTRY, count=BUCKET_ROWS)):
            yield entries["length"].astype(np.int64)


class ChunkWriter:
    """Makes the content of one chunk; litdata runs it in its worker processes.

    Args:
        entries: File of ``ENTRY`` rows.
        token_files: What an entry's ``unit`` is an index of.
    """

    def __init__(self, entries: Path, token_files: Sequence[Path]) -> None:
        self.entries, self.token_files = entries, token_files
        self.dtype = token_dtype(token_files[0])
        self._memory = np.empty(0, dtype=np.int32)

    @cached_property
    def _file(self) -> Callable[[int], FileIO]:
        # opened in the worker: open files do not travel between processes
        return lru_cache(_OPEN_FILES)(lambda unit: FileIO(self.token_files[unit]))

    def __call__(self, piece: Piece) -> Iterator[torch.Tensor]:
        """Yield the chunk's items as int32 tensors ``(2 * n_tokens,)``, each token followed by its document's ID."""
        entries = np.fromfile(
            self.entries, dtype=ENTRY, count=piece.stop - piece.start, offset=piece.start * ENTRY.itemsize
        )
        entries["offset"][0] += piece.skip
        entries["length"][0] -= piece.skip
        entries["length"][-1] -= int(entries["length"].sum(dtype=np.int64)) - piece.tokens
        for item in items(entries):
            yield self._interleaved(item)

    def _interleaved(self, entries: npt.NDArray[Any]) -> torch.Tensor:
        tokens, stream = self._buffers(int(entries["length"].sum(dtype=np.int64)))
        position = 0
        for unit, offset, length in entries[["unit", "offset", "length"]].tolist():
            place = tokens[position : position + length]
            self._file(unit).seek(self.dtype.itemsize * offset)
            if self._file(unit).readinto(place.data) != place.nbytes:
                raise OSError(f"{self.token_files[unit]} ends before token {offset + length}")
            position += length
        return torch.from_numpy(interleave(tokens, entries["id"], entries["length"], out=stream))

    def _buffers(self, tokens: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Memory for tokens and for the stream, used again for each item: litdata copies one before it asks for more.

        New memory costs as much as filling it.
        """
        if len(self._memory) < 3 * tokens:
            self._memory = np.empty(3 * tokens, dtype=np.int32)
        return self._memory[:tokens].view(self.dtype)[:tokens], self._memory[tokens : 3 * tokens]


def _dying_with_parent(function: Callable[..., None]) -> Callable[..., None]:
    def watched(*arguments: Any) -> None:
        keep_freed_memory()
        die_with_parent()
        function(*arguments)

    return watched


@contextlib.contextmanager
def _workers_end_with_us() -> Iterator[None]:
    """Leave Ctrl-C as it was, and end litdata's workers after an error or if this process is killed.

    litdata would end this process at once with status 0, and would go on doing so after its work is done. Its workers,
    and the processes that they start, would wait for a killed one for ever.
    """
    from litdata.processing import data_processor

    handler, process, others = signal.getsignal(signal.SIGINT), os.getpid(), set(multiprocessing.active_children())
    starting: list[multiprocessing.Process] = []
    waiting: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process or not callable(handler):  # forked workers inherit this, and leave it to us
            return
        if starting:  # an exception from Python's own functions around a fork would be printed and lost
            waiting.append(number)
        else:
            handler(number, frame)

    def start(worker: multiprocessing.Process) -> None:
        starting.append(worker)
        try:
            super(data_processor.DataWorkerProcess, worker).start()
        finally:
            starting.remove(worker)
        if waiting:
            interrupt(waiting.pop(), None)

    changes = callable(handler) and threading.current_thread() is threading.main_thread()
    if changes:
        signal.signal(signal.SIGINT, interrupt)
    try:
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(data_processor, "signal"))
            patches.enter_context(mock.patch.object(data_processor.DataWorkerProcess, "start", start))
            for owner, name in [
                (data_processor.DataWorkerProcess, "run"),
                (data_processor, "_upload_fn"),  # a worker's own processes
                (data_processor, "_remove_target"),
            ]:
                if hasattr(owner, name):  # they are private to litdata
                    patches.enter_context(mock.patch.object(owner, name, _dying_with_parent(getattr(owner, name))))
            yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
            worker.join()
        raise
    finally:
        if changes:
            signal.signal(signal.SIGINT, handler)


def write_stream(
    entries: Path, token_files: Sequence[Path], out_dir: Path, work: Path, chunk_bytes: int, num_workers: int
) -> None:
    """Write a plan's documents, interleaved with their IDs, as litdata chunks of int32.

    Args:
        entries: File of ``ENTRY`` rows in their final order.
        token_files: What an entry's ``unit`` is an index of.
        out_dir: Folder for chunks and ``index.json``.
        work: Scratch folder; made here.
        chunk_bytes: Size of a chunk file in bytes, at most.
        num_workers: Processes that write.

    Raises:
        MemSinksError: If a worker died and litdata noticed; newer releases of it do not.
    """
    from litdata import TokensLoader, optimize

    work.mkdir(parents=True)
    most = tokens_per_chunk(chunk_bytes)
    pieces = list(cut(entry_lengths(entries), most))
    # litdata's own scratch folders default to fixed places in /tmp, where two runs would disturb each other
    caches = {f"DATA_OPTIMIZER_{name}CACHE_FOLDER": str(work / f"{name}cache") for name in ("", "DATA_")}
    with mock.patch.dict(os.environ, caches), warnings.catch_warnings(), _workers_end_with_us():
        warnings.filterwarnings("ignore", message="An item was larger than the target chunk size")  # by its header
        optimize(
            fn=ChunkWriter(entries, token_files),
            inputs=pieces,
            output_dir=str(out_dir),
            # litdata ends a chunk before the item that no longer fits, which a piece's first document never does
            chunk_bytes=most * BYTES_PER_PAIR,
            item_loader=TokensLoader(),
            num_workers=min(num_workers, len(pieces)),
            reorder_files=False,
            keep_data_ordered=True,
            # a spawned writer would first import all of litgpt; a forked one only copies numbers between files
            start_method="fork" if sys.platform == "linux" else None,
            verbose=False,
        )
    if not (out_dir / INDEX).is_file():
        raise MemSinksError(f"The chunks of {out_dir.name} are not whole: {WORKER_DIED}")
    _put_in_order(out_dir)


def _put_in_order(out_dir: Path) -> None:
    """List the chunks in the order of the stream: older releases of litdata put worker 10 before worker 2."""
    index = read_index(out_dir)
    index["chunks"].sort(key=lambda chunk: [int(number) for number in re.findall(r"\d+", chunk["filename"])])
    write_json(out_dir / INDEX, index)
