"""Runs that are killed, started twice or repeated: the stream is always the same, and nothing half-written is left."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from helpers import prepare_in_own_group, write_jsonl
from planned import texts, write_files

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare import prepare as prepare_module
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare, work_folder

Settings = dict[str, Any]
Digests = dict[str, str]


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Starts processes from one that has imported the package and done nothing else."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["litgpt_memsinks.prepare.prepare"])
    return forkserver


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Settings:
    folder = tmp_path_factory.mktemp("resume") / "c"
    files = {f"{i}": [f"{i} {text}" for text in stories(60)] for i in range(6)}
    path = write_files(folder, files)
    sources = {"rare": Source(path, documents=20, repeats=5), "web": Source(path)}
    validation = {"held": ValidationSet(path, hold_out=True, fraction=0.1)}
    more = {"tokenizer_dir": tokenizer_dir, "num_workers": 2, "chunk_bytes": 8192}
    return {"sources": sources, "validation": validation} | more


@pytest.fixture(scope="module")
def digests(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Digests:
    """Of a run that nobody disturbed."""
    out_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(**settings, out_dir=out_dir)
    return digests_of(out_dir)


def digests_of(out_dir: Path) -> Digests:
    return {name: split.digest for name, split in Manifest.read(out_dir).splits.items()}


def descendants(process: int) -> set[int]:
    """Children and theirs, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = {process}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {process}


def is_running(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def start(context: ForkServerContext, settings: Settings) -> Any:
    process = context.Process(target=prepare_in_own_group, args=(settings,))
    process.start()
    return process


def kill_group(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may not be the leader of a group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# ------------------------------------------------------------------------------------------------------------- kill -9


def test_killed_at_any_moment_it_gives_the_same_stream(
    settings: Settings, digests: Digests, context: ForkServerContext, tmp_path: Path
) -> None:
    settings = settings | {"out_dir": tmp_path / "out"}
    for _ in range(2):  # the second one is not slowed down by the start of the fork server
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        began = time.monotonic()
        process = start(context, settings)
        process.join()
        duration = time.monotonic() - began
    assert digests_of(tmp_path / "out") == digests
    moments = random.Random(7)
    killed = 0
    for _ in range(10):  # from nothing where it has finished, else from where it was killed
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = start(context, settings)
        process.join(moments.uniform(0, duration))
        killed += process.is_alive()
        kill_group(process)
        assert not (tmp_path / "out").exists() or digests_of(tmp_path / "out") == digests
    assert killed > 3
    prepare(**settings)
    assert digests_of(tmp_path / "out") == digests
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", [".out.work/units/.*.incomplete", ".out.*.incomplete/train/*.bin"])
def test_workers_of_a_killed_parent_die_and_the_next_run_starts_at_once(
    settings: Settings, digests: Digests, context: ForkServerContext, tmp_path: Path, moment: str
) -> None:
    settings = settings | {"out_dir": tmp_path / "out"}
    for _ in range(10):
        process = start(context, settings)
        while process.is_alive() and not any(tmp_path.glob(moment)):
            pass
        workers = descendants(process.pid)
        process.kill()
        process.join()
        if workers and not (tmp_path / "out").exists():
            break
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    else:
        pytest.fail("it was always faster than this test")
    prepare(**settings)  # while they may still be there
    assert digests_of(tmp_path / "out") == digests
    until = time.monotonic() + 5
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [worker for worker in workers if is_running(worker)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------- two at the same time


def hold_lock(out_dir: Path, ready: Any, release: Any, finished: Path | None) -> None:
    with work_folder(out_dir):
        ready.set()
        release.wait()
        if finished is not None:
            shutil.copytree(finished, out_dir)


@contextlib.contextmanager
def another_process(context: Any, out_dir: Path, finished: Path | None = None) -> Iterator[Any]:
    """Another process that prepares the same output until it is released."""
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold_lock, args=(out_dir, ready, release, finished))
    process.start()
    assert ready.wait(20)
    try:
        yield release
    finally:
        release.set()
        process.join()


def test_second_run_of_one_output_is_refused(
    settings: Settings, context: ForkServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module.time, "sleep", lambda seconds: None)
    with (
        another_process(context, tmp_path / "out"),
        pytest.raises(MemSinksError, match=r"^Another process is preparing '.*out'\. Wait for it, or name another"),
    ):
        prepare(**settings, out_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_second_run_finds_what_the_first_has_made(
    settings: Settings, context: ForkServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(**settings, out_dir=tmp_path / "made")
    monkeypatch.setattr(prepare_module, "read_files", None)
    with another_process(context, tmp_path / "out", tmp_path / "made") as release:
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            release.set()
            waited.append(seconds)
            while not (tmp_path / "out" / "memsinks.json").is_file() or (tmp_path / ".out.work").exists():
                pass

        monkeypatch.setattr(prepare_module.time, "sleep", sleep)
        manifest = prepare(**settings, out_dir=tmp_path / "out")
    assert waited
    assert manifest == Manifest.read(tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]


# ------------------------------------------------------------------------------------------------------ finished before


@pytest.fixture
def small(tmp_path: Path, tokenizer_dir: Path) -> Settings:
    corpus = write_files(tmp_path / "c", {"a": texts(8), "b": texts(8, "b")})
    sources = {"s": Source(corpus)}
    validation = {"held": ValidationSet(corpus, hold_out=True, documents=2)}
    made = {"sources": sources, "validation": validation, "tokenizer_dir": tokenizer_dir, "out_dir": tmp_path / "out"}
    prepare(**made, num_workers=1)
    return made


def test_finished_folder_is_recognised(
    small: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "read_units", None)
    monkeypatch.setattr(prepare_module, "work_folder", None)
    assert prepare(**small) == Manifest.read(small["out_dir"])
    assert "is prepared already, from the same recipe, files and tokenizer. Nothing to do." in capsys.readouterr().out
    assert prepare(**small, num_workers=7) is not None  # does not change the result


CHANGED = [
    ({"seed": 3}, "recipe.seed: 0 -> 3"),
    ({"chunk_bytes": 4096}, "recipe.chunk_bytes: 64000000 -> 4096"),
    ({"id_noise": 0.5}, "recipe.id_noise: 0.0 -> 0.5"),
]


@pytest.mark.parametrize(("change", "said"), CHANGED, ids=str)
def test_changed_recipe_is_refused(small: Settings, change: Settings, said: str) -> None:
    refused(small | change, said)


def test_changed_source_is_refused(small: Settings) -> None:
    sources = {"s": Source(small["sources"]["s"].path, repeats=2), "t": Source(small["sources"]["s"].path)}
    message = refused(small | {"sources": sources}, "recipe.sources.s.repeats: None -> 2")
    assert "recipe.sources.t: None -> {'path'" in message


def test_changed_files_are_refused(small: Settings, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c" / "b.jsonl", texts(9, "b"))
    write_jsonl(tmp_path / "c" / "new.jsonl", texts(9, "b"))
    refused(small, f"inputs.s: 2 file(s) -> 3, changed: {tmp_path / 'c' / 'b.jsonl'}, {tmp_path / 'c' / 'new.jsonl'}")


def test_changed_tokenizer_is_refused(small: Settings, tmp_path: Path) -> None:
    other = shutil.copytree(small["tokenizer_dir"], tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    refused(small | {"tokenizer_dir": other}, "tokenizer_sha256: ")


def test_finished_folder_without_its_corpus_names_what_is_missing(small: Settings, tmp_path: Path) -> None:
    """Whether it was made of this corpus cannot be told, so it is an error; the folder stays."""
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(MemSinksError, match=str(tmp_path / "c")):
        prepare(**small)
    assert Manifest.read(small["out_dir"]).splits["train"].documents == 14


def refused(settings: Settings, said: str) -> str:
    before = Manifest.read(settings["out_dir"])
    with pytest.raises(MemSinksError) as caught:
        prepare(**settings)
    message = str(caught.value)
    assert f"{str(settings['out_dir'])!r} was prepared otherwise: " in message
    assert said in message
    assert "It is not overwritten" in message
    assert "\n" not in message
    assert Manifest.read(settings["out_dir"]) == before
    return message


def test_error_keeps_what_is_tokenised(small: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = small | {"out_dir": tmp_path / "other", "sources": {"s": Source(str(tmp_path / "c"), documents=99)}}
    with pytest.raises(MemSinksError):
        prepare(**wrong)
    work = tmp_path / ".other.work"
    assert f"Kept the tokens of 2 file(s) in {str(work)!r} for the next run." in capsys.readouterr().err
    assert not (work / "plan").exists()
    prepare(**(wrong | {"sources": small["sources"]}))
    assert not work.exists()


def test_lock_of_a_folder_that_is_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepare_module.fcntl.lockf

    def after_the_other_has_finished(*arguments: Any) -> None:
        shutil.rmtree(tmp_path / "work")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.fcntl, "lockf", after_the_other_has_finished)
        assert prepare_module._try_lock(tmp_path / "work") is None
    lock = prepare_module._try_lock(tmp_path / "work")
    assert lock is not None
    lock.close()
