"""The first pass: units that are found again, workers that die, errors and interrupts."""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import read_jsonl, reference_digest, write_jsonl
from litgpt.tokenizer import Tokenizer
from planned import texts, write_files

from litgpt_memsinks.corpus.corpus_files import Document, corpus_files
from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import NearDuplicates, Reading
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare import tokenizing
from litgpt_memsinks.prepare.encoding import Encoder
from litgpt_memsinks.prepare.manifest import tokenizer_fingerprint
from litgpt_memsinks.prepare.planning import read_tokens
from litgpt_memsinks.prepare.tokenizing import (
    RECORD,
    Done,
    StoppedError,
    Unit,
    UnitReader,
    batches,
    find_unit,
    list_units,
    read_units,
    unit_name,
)

Read = Callable[..., list[Done]]


@pytest.fixture
def units_of(tokenizer_dir: Path) -> Callable[..., list[Unit]]:
    def list_them(*readings: Reading, near: NearDuplicates | None = None) -> list[Unit]:
        files = [corpus_files(reading) for reading in readings]
        return list_units(list(readings), files, tokenizer_fingerprint(tokenizer_dir), near)

    return list_them


@pytest.fixture
def read(tmp_path: Path, tokenizer_dir: Path, units_of: Callable[..., list[Unit]]) -> Read:
    """Read and tokenise into tmp_path/units."""

    def read_them(*readings: Reading, num_workers: int = 1, near: NearDuplicates | None = None, **more: Any) -> Any:
        reader = UnitReader(readings, tokenizer_dir, tmp_path / "units", near, 1)
        return read_units(units_of(*readings, near=near), reader, [tmp_path / "units"], num_workers, **more)

    return read_them


@pytest.fixture
def read_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names of the corpus files that were read since the last call, in whatever process."""
    log = tmp_path / "read.log"
    log.touch()
    real = tokenizing.read_documents

    def logged(file: Any, *arguments: Any) -> Any:
        with open(log, "a") as out:
            out.write(Path(file.path).stem + "\n")
        return real(file, *arguments)

    monkeypatch.setattr(tokenizing, "read_documents", logged)

    def since() -> list[str]:
        names = log.read_text().split()
        log.write_text("")
        return sorted(names)

    return since


def content(done: Done) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(done.folder.iterdir())}


# --------------------------------------------------------------------------------------------------------------- units


def test_unit_holds_the_documents(tmp_path: Path, tokenizer_dir: Path, read: Read) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["", *stories(20), "<|endoftext|>", "last"])
    (done,) = read(Reading(str(path)))
    tokenizer = Tokenizer(tokenizer_dir)
    expected = [(2 + i, tokenizer.encode(text, eos=True).tolist()) for i, text in enumerate(stories(20))]
    expected.append((23, tokenizer.encode("last", eos=True).tolist()))
    assert (done.info.documents, done.info.empty, done.info.bad) == (21, 2, 0)
    assert done.info.tokens == sum(len(tokens) for _, tokens in expected)
    all_tokens = np.fromfile(done.folder / "tokens.u2", dtype="<u2")
    assert all_tokens.tolist() == [token for _, tokens in expected for token in tokens]
    offset = 0
    for record, (line, tokens) in zip(done.records(0, 21), expected, strict=True):
        values = (reference_digest(tokens[:-1]), 0, offset, line, len(tokens), max(tokens))
        assert record.tolist() == values
        offset += len(tokens)
    assert done.records(5, 7).tolist() == done.records(0, 21)[5:7].tolist()
    assert (done.folder / "records.bin").stat().st_size == 21 * RECORD.itemsize
    assert not (done.folder / "keys.bin").stat().st_size
    assert not (done.folder / "signatures.bin").stat().st_size


def test_tokens_of_a_large_vocabulary_take_four_bytes(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(str(write_jsonl(tmp_path / "c.jsonl", stories(20))))
    (done,) = read(reading)
    assert done.token_file.name == "tokens.u2"
    small = read_tokens(done.token_file, 0, done.info.tokens)
    assert read_tokens(done.token_file, 3, 40).tolist() == small[3:43].tolist()
    shutil.rmtree(done.folder)
    for largest, name in ((2**16 - 1, "tokens.u2"), (2**16, "tokens.i4")):
        monkeypatch.setattr(Encoder, "largest_token", largest)
        (done,) = read(reading)
        assert done.token_file.name == name
        assert read_tokens(done.token_file, 3, 40).tolist() == small[3:43].tolist()
        shutil.rmtree(done.folder)


def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "largest_token", 7)
    with pytest.raises(MemSinksError, match=r"The tokenizer gave token \d+, but its vocabulary ends at 7\."):
        read(Reading(str(write_jsonl(tmp_path / "c.jsonl", stories(2)))))


def test_unit_of_another_version_is_named(tmp_path: Path, read: Read) -> None:
    (done,) = read(Reading(str(write_jsonl(tmp_path / "c.jsonl", stories(2)))))
    (done.folder / "tokens.u2").rename(done.folder / "tokens.bin")
    with pytest.raises(MemSinksError, match=r"written by another version of litgpt-memsinks\. Prepare the shard again"):
        _ = done.token_file


def test_keys_and_counts(tmp_path: Path, read: Read) -> None:
    rows = [
        {"text": "a", "id": "x", "lang": "en"},
        {"text": "b", "id": "漢字", "lang": "de"},
        {"text": "c", "id": 7, "lang": "en"},
        {"text": "", "id": "y", "lang": "en"},
        {"text": 5, "id": "y", "lang": "en"},
        {"text": "d", "id": "x" * 300},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading(str(tmp_path / "c.jsonl"), id_field="id", exclude={"lang": ["de"]}, on_bad_line="skip")
    (done,) = read(reading)
    assert list(done.keys()) == ["x", "7", "x" * 300]
    info = done.info
    assert (info.documents, info.empty, info.filtered, info.bad, info.without_field) == (3, 1, 1, 1, 1)
    assert "line 5" in info.first_bad[0]
    groups = done.records(0, 3)["group"]
    assert len(set(groups.tolist())) == 3


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_workers_give_the_same_units_in_order(tmp_path: Path, read: Read, num_workers: int) -> None:
    path = write_files(tmp_path / "c", {name: stories(10 + i) for i, name in enumerate("abcd")})
    done = read(Reading(path), num_workers=num_workers)
    assert [Path(unit.unit.file.path).stem for unit in done] == list("abcd")
    assert [unit.info.documents for unit in done] == [10, 11, 12, 13]


def test_threads_give_the_same_unit(
    tmp_path: Path, tokenizer_dir: Path, read: Read, units_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", stories(100))
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 33)
    (threaded,) = read(Reading(str(path)), num_workers=3)
    used: list[int] = []
    for threads in (1, 3):
        reader = UnitReader([Reading(str(path))], tokenizer_dir, tmp_path / f"threads-{threads}", None, threads)
        (unit,) = units_of(Reading(str(path)))
        reader(unit, lambda position, tokens: used.append(threading.active_count()), lambda: False)
        found = find_unit(unit, [reader.store])
        assert found is not None
        assert content(found) == content(threaded)
    assert max(used) >= 3


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 10)
    sizes = [1, 1, 1, 1, 9, 20, 1, 5, 5, 2]
    made = list(batches(Document(i, "x" * size) for i, size in enumerate(sizes)))
    assert [[len(document.text) for document in batch] for batch in made] == [[1, 1, 1], [1, 9], [20], [1, 5, 5], [2]]
    assert [len(batch) for batch in batches((Document(i, "x") for i in range(13)), threads=2)] == [6, 6, 1]
    assert list(batches([])) == []


# -------------------------------------------------------------------------------------------------------------- resume


def test_units_are_read_once(tmp_path: Path, read: Read, read_files: Callable[[], list[str]]) -> None:
    path = write_files(tmp_path / "c", {name: texts(3, name) for name in "abc"})
    first = read(Reading(path))
    assert read_files() == ["a", "b", "c"]
    assert read(Reading(path), num_workers=2) == first
    assert read_files() == []
    write_files(tmp_path / "c", {"d": texts(3, "d")})
    assert len(read(Reading(path))) == 4
    assert read_files() == ["d"]


def test_a_file_that_is_listed_twice_is_read_once(
    tmp_path: Path, read: Read, read_files: Callable[[], list[str]]
) -> None:
    path = write_files(tmp_path / "c", {name: texts(3, name) for name in "ab"})
    done = read(Reading(path), Reading([f"{path}/b.jsonl"]))
    assert read_files() == ["a", "b"]
    assert [(unit.unit.reading, Path(unit.unit.file.path).stem) for unit in done] == [(0, "a"), (0, "b"), (1, "b")]
    assert done[1].folder == done[2].folder


@pytest.mark.parametrize("place", [20, 139_000])  # both ends are looked at
def test_changed_content_of_the_same_size_is_read_again(
    tmp_path: Path, read: Read, read_files: Callable[[], list[str]], place: int
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["x" * 70_000, "y" * 70_000, "z"])
    (before,) = read(Reading(str(path)))
    changed = bytearray(path.read_bytes())
    changed[place] = ord("a")
    path.write_bytes(changed)
    read_files()
    (after,) = read(Reading(str(path)))
    assert read_files() == ["c"]
    assert after.records(0, 3)["digest"].tolist() != before.records(0, 3)["digest"].tolist()


def test_name_depends_on_what_decides_the_content(tmp_path: Path) -> None:
    write_files(tmp_path / "c", {"a": texts(3)})
    write_files(tmp_path / "same", {"a": texts(3)})
    base = Reading(str(tmp_path / "c"))
    (file,), (same,) = corpus_files(base), corpus_files(Reading(str(tmp_path / "same")))
    near = NearDuplicates()
    name = unit_name(file, base, "t", None)
    assert name == unit_name(file, Reading([base.path]), "t", None)  # however it was found
    others = [
        unit_name(same, base, "t", None),  # equal ends do not make equal files
        unit_name(file, base, "u", None),
        unit_name(file, base, "t", near),
        unit_name(file, base, "t", NearDuplicates(permutations=64)),
        unit_name(file, base, "t", NearDuplicates(shingle_size=5)),
        unit_name(file, base, "t", NearDuplicates(seed=2)),
        unit_name(file._replace(format="json"), base, "t", None),
        unit_name(file._replace(compression="gz"), base, "t", None),
    ]
    settings = [
        {"text_field": "other"},
        {"include": {"text": ["a"]}},
        {"exclude": {"text": ["a"]}},
        {"separator": "#"},
        {"id_field": "text"},
        {"on_bad_line": "skip"},
    ]
    others += [unit_name(file, Reading(base.path, **setting), "t", None) for setting in settings]
    os.rename(tmp_path / "same" / "a.jsonl", tmp_path / "same" / "b.jsonl")
    (renamed,) = corpus_files(Reading(str(tmp_path / "same")))
    others.append(unit_name(renamed, base, "t", None))
    assert len({name, *others}) == 1 + len(others)
    # which of the near-duplicates are dropped or joined does not change their signatures
    assert unit_name(file, base, "t", NearDuplicates(threshold=0.9, drop_validation=True)) == others[2]


def test_a_version_of_the_layout_reads_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "c", {"a": texts(3)})
    (file,) = corpus_files(Reading(str(tmp_path / "c")))
    name = unit_name(file, Reading("c"), "t", None)
    monkeypatch.setattr(tokenizing, "UNIT_VERSION", tokenizing.UNIT_VERSION + 1)
    assert unit_name(file, Reading("c"), "t", None) != name


def test_only_as_many_units_as_are_wanted(tmp_path: Path, read: Read, read_files: Callable[[], list[str]]) -> None:
    path = write_files(tmp_path / "c", {name: texts(3, name) for name in "abcdefgh"})
    done = read(Reading(path), enough=lambda units: sum(unit.info.documents for unit in units) >= 5)
    assert [Path(unit.unit.file.path).stem for unit in done] == ["a", "b"]
    assert len(read_files()) < 8
    again = read(Reading(path), enough=lambda units: sum(unit.info.documents for unit in units) >= 3)
    assert [Path(unit.unit.file.path).stem for unit in again] == ["a"]
    assert read_files() == []


# -------------------------------------------------------------------------------------------------- errors and signals


def test_largest_files_are_read_first_if_all_are_wanted(tmp_path: Path, read: Read) -> None:
    path = write_files(tmp_path / "c", {"a": texts(2, "a"), "b": texts(9, "b"), "c": texts(5, "c")})
    done = read(Reading(path))
    assert [unit.info.documents for unit in done] == [2, 9, 5]  # numbered in the order of the files all the same
    written = {(unit.folder / "unit.json").stat().st_mtime_ns: unit.info.documents for unit in done}
    assert [written[moment] for moment in sorted(written)] == [9, 5, 2]
    first = read(Reading(write_files(tmp_path / "d", {"a": ["x"], "b": texts(9, "d")})), enough=lambda units: True)
    assert [unit.info.documents for unit in first] == [1]


def test_error_in_one_worker_stops_the_others(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_files(tmp_path / "c", {"a": ["fine"], "b": texts(2000, "b"), "c": texts(2000, "c")})
    with open(tmp_path / "c" / "b.jsonl", encoding="utf-8") as others, open(tmp_path / "c" / "a.jsonl", "w") as file:
        file.write('{"text": 5}\n' + others.read())  # the largest, which is read first
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 10)
    real = UnitReader._encode

    def slow(self: UnitReader, documents: list[Document]) -> Any:
        time.sleep(0.2)
        return real(self, documents)

    monkeypatch.setattr(UnitReader, "_encode", slow)
    start = time.monotonic()
    with pytest.raises(MemSinksError, match=r"a\.jsonl', line 1 has a int"):
        read(Reading(path), num_workers=2)
    assert time.monotonic() - start < 20  # of 40 seconds that each of the others takes
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "units").glob("*/unit.json"))


def test_a_file_of_which_nothing_is_kept_can_be_stopped(tmp_path: Path, tokenizer_dir: Path, units_of: Any) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", stories(50))
    reading = Reading(str(path), include={"text": ["no such"]})
    (unit,) = units_of(reading)
    with pytest.raises(StoppedError):
        UnitReader([reading], tokenizer_dir, tmp_path / "u", None, 1)(unit, lambda *_: None, lambda: True)


def test_killed_worker_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, read: Read, read_files: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_files(tmp_path / "c", {name: texts(3, name) for name in "abcd"})
    real = UnitReader._write_batch

    def dies_at_c(self: UnitReader, documents: list[Document], *rest: Any) -> None:
        if documents[0].text.startswith("c"):
            while len(list(tmp_path.glob("units/*/unit.json"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, documents, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(UnitReader, "_write_batch", dies_at_c)
        with pytest.raises(
            MemSinksError, match=r"A worker process died, probably for lack of memory.*num_workers"
        ) as e:
            read(Reading(path), num_workers=2)
    assert "\n" not in str(e.value)
    assert len(list((tmp_path / "units").glob("*/unit.json"))) >= 2
    read_files()
    assert [unit.info.documents for unit in read(Reading(path))] == [3, 3, 3, 3]
    assert "c" in read_files()
    assert not list((tmp_path / "units").glob(".*"))


def test_worker_that_dies_with_the_lock_of_the_counters(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_files(tmp_path / "c", {"a": texts(3)})

    def dies(self: UnitReader, *rest: Any) -> None:
        tokenizing._worker["counters"].get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(UnitReader, "_write_batch", dies)
    with pytest.raises(MemSinksError, match="A worker process died"):
        read(Reading(path))


# ------------------------------------------------------------------------------------------------------------ progress


class Counters:
    """What workers count, at given times."""

    def __init__(self, *values: int) -> None:
        self.values = values

    def get_obj(self) -> tuple[int, ...]:
        return self.values


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 110.0, 129.0, 131.0, 140.0, 170.0])
    monkeypatch.setattr(tokenizing.time, "monotonic", lambda: next(clock))
    line = tokenizing._lines(3, 1000, Counters(250, 6200))
    for _ in range(5):
        line()
    assert capsys.readouterr().out.splitlines() == [
        "Tokenising 3 file(s): 25%, 6,200 tokens, 200/s, 0:01:33 left",
        "Tokenising 3 file(s): 25%, 6,200 tokens, 89/s, 0:03:30 left",
    ]


@pytest.mark.parametrize(("total", "position"), [(0, 5), (100, 0)])
def test_progress_of_unknown_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int, position: int
) -> None:
    monkeypatch.setattr(tokenizing, "_SECONDS_PER_LINE", 0)
    tokenizing._lines(3, total, Counters(position, 0))()
    assert "0%, 0 tokens, 0/s, time left unknown" in capsys.readouterr().out


def test_short_run_prints_nothing(tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    read(Reading(write_files(tmp_path / "c", {"a": texts(3)})))
    assert capsys.readouterr().out == ""


def test_workers_count_bytes_and_tokens(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_files(tmp_path / "c", {name: stories(50) for name in "ab"})
    seen: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def progress(units: Any, done: Any, counters: Any) -> Any:
        yield lambda: seen.append(tuple(counters.get_obj()[:]))

    monkeypatch.setattr(tokenizing, "_progress", progress)
    done = read(Reading(path), num_workers=2)
    assert seen[-1] == (sum(unit.unit.file.size for unit in done), sum(unit.info.tokens for unit in done))


@pytest.mark.parametrize("late", [False, True], ids=["before", "meanwhile"])
def test_a_unit_that_an_orphan_finishes_is_taken(
    tmp_path: Path, tokenizer_dir: Path, units_of: Any, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A worker that outlives its killed parent may rename its unit after the next run has found it missing."""
    path = write_files(tmp_path / "c", {"a": stories(20)})
    (unit,) = units_of(Reading(path))
    orphan = UnitReader([Reading(path)], tokenizer_dir, tmp_path / "units", None, 1)

    class Overtaken(UnitReader):
        def _write_batch(self, *arguments: Any) -> None:
            if late:
                shutil.copytree(tmp_path / "finished" / unit.name, tmp_path / "units" / unit.name)
            super()._write_batch(*arguments)

    own = Overtaken([Reading(path)], tokenizer_dir, tmp_path / "units", None, 1)
    worker = {"reader": own, "counters": multiprocessing.Array("Q", 2), "stop": multiprocessing.RawValue("b", 0)}
    monkeypatch.setattr(tokenizing, "_worker", worker)
    orphan(unit, lambda position, tokens: None, lambda: False)
    if late:
        (tmp_path / "units").rename(tmp_path / "finished")
    tokenizing._read_unit(unit)
    assert [folder.name for folder in (tmp_path / "units").iterdir()] == [unit.name]
    done = find_unit(unit, [tmp_path / "units"])
    assert done is not None
    assert done.info.documents == 20


# ------------------------------------------------------------------------------------------------------------- Ctrl-C

SLOW_READING = """
from litgpt_memsinks.prepare.tokenizing import UnitReader
tokenizing._BATCH_DOCUMENTS = 5
real = UnitReader._encode
def slow(self, documents):
    print("busy", flush=True)
    time.sleep(0.2)
    return real(self, documents)
UnitReader._encode = slow
"""
SLOW_WRITING = """
from litgpt_memsinks.prepare.writing import ChunkWriter
real = ChunkWriter.__call__
def slow(self, piece):
    print("busy", flush=True)
    time.sleep(0.2)
    yield from real(self, piece)
ChunkWriter.__call__ = slow
"""

SLOW_START = f"""
import os
forks = []
os.register_at_fork(before=lambda: forks.append(1), after_in_child=lambda: time.sleep(len(forks) > 1))
{SLOW_READING}
"""  # the second worker has not begun when the first one is busy


OTHER_TIMES = [pytest.param(SLOW_WRITING, marks=pytest.mark.long), pytest.param(SLOW_START, marks=pytest.mark.long)]


@pytest.mark.parametrize("slow", [SLOW_READING, *OTHER_TIMES], ids=["reading", "writing", "starting"])
def test_interrupt_is_one_word(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path, slow: str) -> None:
    corpus = write_files(tmp_path / "c", {name: read_jsonl(corpus_dir / "train.jsonl") for name in "abc"})
    imports = "import time\nfrom litgpt_memsinks import __main__\nfrom litgpt_memsinks.prepare import tokenizing"
    code = f"{imports}\n{slow}\n__main__.main()"
    settings = {"train": corpus, "tokenizer_dir": tokenizer_dir, "out_dir": tmp_path / "out", "chunk_bytes": 8192}
    flags = [f"--{name}={value}" for name, value in {**settings, "num_workers": 2}.items()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code, "prepare", *flags],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a background job, as the tests may be one, starts with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert any("busy" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "Interrupted."
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


def test_what_writes_is_imported_while_workers_read(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and after the workers are forked, which would inherit the locks of a half-done import."""
    path = write_files(tmp_path / "c", {"a": stories(50)})
    seen = []

    def note(name: str) -> None:
        seen.append((name, len(multiprocessing.active_children())))
        sys.modules[name] = sys

    monkeypatch.setitem(sys.modules, "litdata", sys)  # to be put back as it was
    monkeypatch.delitem(sys.modules, "litdata")
    monkeypatch.setattr(importlib, "import_module", note)
    read(Reading(path))
    assert set(seen) == {("litdata", 1)}
