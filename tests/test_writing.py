"""Cutting a stream into chunks, and the chunks as litdata reads them."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from helpers import read_stream
from hypothesis import given
from hypothesis import strategies as st
from litdata import StreamingDataset, TokensLoader
from litdata.processing import data_processor
from planned import write_files

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare import chunks as chunk_files
from litgpt_memsinks.prepare import writing
from litgpt_memsinks.prepare.chunks import Checksums, checksums, read_chunks
from litgpt_memsinks.prepare.planning import ENTRY
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.prepare.writing import ChunkWriter, Piece, cut, entry_lengths, items, write_stream

LENGTHS = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 60)), max_size=40)


def in_blocks(lengths: list[int], size: int) -> Iterator[np.ndarray]:
    return (np.array(lengths[start : start + size], dtype=np.int64) for start in range(0, len(lengths), size))


def cut_greedily(lengths: list[int], most: int) -> list[Piece]:
    """One document at a time: into the chunk if it fits, else into a new one; a longer one into pieces of its own."""
    pieces: list[Piece] = []
    start, skip, filled = 0, 0, 0
    for index, length in enumerate(lengths):
        if filled and filled + length > most:
            pieces.append(Piece(start, index, skip, filled))
            start, skip, filled = index, 0, 0
        passed = 0
        while length - passed > most or (length > most and length - passed == most):
            pieces.append(Piece(index, index + 1, passed, most))
            passed += most
        if passed:
            start, skip, filled = (index, passed, length - passed) if passed < length else (index + 1, 0, 0)
        else:
            filled += length
    return [*pieces, Piece(start, len(lengths), skip, filled)] if filled else pieces


@given(lengths=LENGTHS, most=st.integers(1, 20), size=st.integers(1, 9))
def test_cut_is_greedy(lengths: list[int], most: int, size: int) -> None:
    assert list(cut(in_blocks(lengths, size), most)) == cut_greedily(lengths, most)


@given(lengths=LENGTHS, most=st.integers(1, 20), size=st.integers(1, 9))
def test_pieces_cover_all_tokens_in_order(lengths: list[int], most: int, size: int) -> None:
    pieces = list(cut(in_blocks(lengths, size), most))
    starts = np.cumsum([0, *lengths])
    covered = 0
    for piece in pieces:
        assert covered == starts[piece.start] + piece.skip
        assert 0 < piece.tokens <= most
        covered += piece.tokens
        assert starts[piece.stop - 1] < covered <= starts[piece.stop]
    assert covered == starts[-1]
    # litdata begins a new chunk at each piece only because no two neighbours fit together
    assert all(a.tokens + b.tokens > most for a, b in pairwise(pieces))


@pytest.mark.parametrize(
    ("lengths", "pieces"),
    [
        ([], []),
        ([10], [(0, 1, 0, 10)]),
        ([4, 6, 1], [(0, 2, 0, 10), (2, 3, 0, 1)]),
        ([4, 7], [(0, 1, 0, 4), (1, 2, 0, 7)]),
        ([3, 25, 4, 2], [(0, 1, 0, 3), (1, 2, 0, 10), (1, 2, 10, 10), (1, 3, 20, 9), (3, 4, 0, 2)]),
        ([20, 5], [(0, 1, 0, 10), (0, 1, 10, 10), (1, 2, 0, 5)]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 10])
def test_cut_by_hand(lengths: list[int], pieces: list[tuple[int, ...]], size: int) -> None:
    assert list(cut(in_blocks(lengths, size), 10)) == pieces


# ----------------------------------------------------------------------------------------------------------- to litdata


class Written:
    """A stream of documents in two token files."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(3)
        self.files = [folder / "a.i4", folder / "b.i4"]
        tokens = [random.integers(0, 2**31, size=60_000, dtype=np.int32) for _ in self.files]
        for path, content in zip(self.files, tokens, strict=True):
            content.tofile(path)
        self.entries = np.zeros(150, dtype=ENTRY)
        self.entries["length"] = random.integers(1, 900, size=150)
        self.entries["length"][[0, 40, 149]] = 2500  # longer than a chunk
        self.entries["unit"] = random.integers(0, 2, size=150)
        self.entries["offset"] = random.integers(0, 57_000, size=150)
        self.entries["id"] = random.integers(-(2**31), 2**31, size=150)
        self.path = folder / "entries.bin"
        self.entries.tofile(self.path)
        self.stream = np.array(
            [
                number
                for row in self.entries
                for token in tokens[row["unit"]][int(row["offset"]) :][: row["length"]].tolist()
                for number in (token, int(row["id"]))
            ],
            dtype=np.int32,
        )

    def write(self, folder: Path, num_workers: int, chunk_bytes: int = 8192) -> Path:
        write_stream(self.path, self.files, folder / "out", folder / "work", chunk_bytes, num_workers)
        return folder / "out"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module", params=[1 << 20, 300])
def item_tokens(request: pytest.FixtureRequest) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "ITEM_TOKENS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def one_worker(written: Written, item_tokens: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written.write(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture
def most(item_tokens: int) -> int:
    """Tokens in a chunk of 8192 bytes of one item, or of as many of 300 tokens as may have to fit into it."""
    return (8192 - 4 * ({1 << 20: 1, 300: 2 * (8192 // 2400) + 1}[item_tokens] + 2)) // 8


def test_chunks_hold_the_stream(written: Written, one_worker: Path) -> None:
    np.testing.assert_array_equal(read_stream(one_worker), written.stream)
    sizes = [path.stat().st_size for path in one_worker.glob("*.bin")]
    assert max(sizes) <= 8192
    assert len(sizes) > 50


def test_chunks_hold_items(one_worker: Path, item_tokens: int) -> None:
    counts = [int.from_bytes(path.read_bytes()[:4], "little") for path in one_worker.glob("*.bin")]
    assert set(counts) == {1} if item_tokens > 8192 else max(counts) > 2


@given(lengths=LENGTHS, most=st.integers(1, 60))
def test_items_are_whole_documents(lengths: list[int], most: int) -> None:
    entries = np.zeros(len(lengths), dtype=ENTRY)
    entries["length"] = lengths
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "ITEM_TOKENS", most)
        parts = [item["length"].tolist() for item in items(entries)]
    assert [length for part in parts for length in part] == lengths
    assert all(sum(part) <= most or len(part) == 1 for part in parts)
    assert all(sum(a) + sum(b) > most for a, b in pairwise(parts))


def test_chunks_are_the_pieces(written: Written, one_worker: Path, most: int) -> None:
    pieces = cut_greedily(written.entries["length"].tolist(), most)
    assert [len(chunk.pairs) for chunk in read_chunks(one_worker)] == [piece.tokens for piece in pieces]


def test_checksums(written: Written, one_worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_files, "_BLOCK", 1000)
    names = [f"chunk-0-{index}.bin" for index in range(len(list(one_worker.glob("*.bin"))))]
    assert checksums(one_worker) == Checksums(
        xxhash.xxh3_128_hexdigest(written.stream.astype("<i4").tobytes()),
        {name: xxhash.xxh3_128_hexdigest((one_worker / name).read_bytes()) for name in names},
        len(written.stream) // 2,
    )
    assert [chunk.checksum for chunk in read_chunks(one_worker)] == list(checksums(one_worker).chunks.values())


@pytest.mark.parametrize("change", ["longer", "a byte", "shorter", "header", "items", "empty", "missing"])
def test_chunk_that_is_not_whole(one_worker: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(one_worker, tmp_path / "out"))
    path = folder / "chunk-0-3.bin"
    content = path.read_bytes()
    changed = {
        "longer": content + b"1234",
        "a byte": content + b"1",
        "shorter": content[:-4],
        "header": content[:3],
        "items": b"\xff\xff\xff\xff" + content[4:],
    }
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(changed.get(change, b""))
    for read in (lambda: list(read_chunks(folder)), lambda: checksums(folder)):
        with pytest.raises(MemSinksError, match=r"chunk-0-3.bin' (is not whole|cannot be read: No such file)"):
            read()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_chunks_do_not_depend_on_the_workers(
    written: Written, one_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(writing, "BUCKET_ROWS", 7)
    folder = written.write(tmp_path, num_workers)
    chunks, reference = list(read_chunks(folder)), list(read_chunks(one_worker))
    assert [chunk.checksum for chunk in chunks] == [chunk.checksum for chunk in reference]
    assert len({chunk.name.split("-")[1] for chunk in chunks}) == num_workers


def test_litdata_reads_the_stream(written: Written, one_worker: Path, most: int) -> None:
    dataset = StreamingDataset(str(one_worker), item_loader=TokensLoader(block_size=100), shuffle=False)
    blocks = torch.cat([dataset[index] for index in range(len(dataset))]).numpy()
    expected, position = [], 0
    for piece in cut_greedily(written.entries["length"].tolist(), most):
        # litdata passes over what is left of a chunk behind its last block
        expected.append(written.stream[position:][: 2 * piece.tokens // 100 * 100])
        position += 2 * piece.tokens
    np.testing.assert_array_equal(blocks, np.concatenate(expected))


def test_more_workers_than_chunks(written: Written, tmp_path: Path) -> None:
    folder = written.write(tmp_path, 3, chunk_bytes=300_000)
    assert len(list(folder.glob("*.bin"))) == 2
    np.testing.assert_array_equal(read_stream(folder), written.stream)


@pytest.mark.parametrize("dtype", ["u2", "i4"])
def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(writing, "_OPEN_FILES", 2)
    content = np.arange(2**16 - 50, 2**16, dtype=f"<{dtype}")
    files = [tmp_path / f"{index}.{dtype}" for index in range(9)]
    for file in files:
        content.tofile(file)
    entries = np.zeros(40, dtype=ENTRY)
    entries["unit"], entries["length"], entries["offset"] = np.arange(40) % 9, 5, np.arange(40)
    entries.tofile(tmp_path / "entries.bin")
    writer = ChunkWriter(tmp_path / "entries.bin", files)
    (tensor,) = writer(Piece(0, 40, 0, 200))
    assert tensor.dtype == torch.int32
    assert tensor[::2].tolist() == [token for i in range(40) for token in content[i : i + 5].tolist()]
    assert writer._file.cache_info().currsize == 2  # type: ignore[attr-defined]


def test_lengths_are_read_in_blocks(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BUCKET_ROWS", 64)
    blocks = list(entry_lengths(written.path))
    assert [len(block) for block in blocks] == [64, 64, 22]
    assert np.concatenate(blocks).tolist() == written.entries["length"].tolist()


# --------------------------------------------------------------------------------------------------- what litdata hides


def test_killed_writer_is_noticed(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_files(tmp_path / "c", {"a": stories(60)})
    settings: dict[str, Any] = {
        "sources": {"s": Source(corpus)},
        "validation": {"held": ValidationSet(corpus, hold_out=True, documents=5)},
        "tokenizer_dir": tokenizer_dir,
        "out_dir": tmp_path / "out",
        "chunk_bytes": 8192,
    }
    real = ChunkWriter.__call__

    def killed(self: ChunkWriter, piece: Piece) -> Iterator[torch.Tensor]:
        if piece.start:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from real(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "__call__", killed)
        # some releases of litdata notice it, and write no index
        with pytest.raises(
            MemSinksError,
            match=r"(Of [\d,]+ tokens of train, [\d,]+ were written|The chunks of train .*): a worker process died",
        ):
            prepare(**settings, num_workers=2)
    assert not (tmp_path / "out").exists()
    assert prepare(**settings, num_workers=2) is not None


def test_error_of_a_writer_ends_the_others(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: ChunkWriter, piece: Piece) -> Iterator[torch.Tensor]:
        if piece.start == 0:
            raise ValueError("no such token")
        time.sleep(60)
        yield torch.zeros(2, dtype=torch.int32)

    monkeypatch.setattr(ChunkWriter, "__call__", fails)
    with pytest.raises(RuntimeError, match="no such token"):
        written.write(tmp_path, 2)
    assert not multiprocessing.active_children()


def test_interrupts_are_left_as_they_were(written: Written, tmp_path: Path) -> None:
    # litdata's own handler would end the process with status 0, long after it has done its work
    before = signal.getsignal(signal.SIGINT)
    written.write(tmp_path, 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_waits_while_a_worker_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints and loses an exception that is raised between its steps of a fork."""
    steps: list[str] = []

    def start(worker: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), writing._workers_end_with_us():
            object.__new__(data_processor.DataWorkerProcess).start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == ["started"]
