"""Nothing half-written looks whole."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, incomplete_path, refuse_to_overwrite, write_json, write_text


def _everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_appears_whole(tmp_path: Path) -> None:
    out_dir = tmp_path / "new" / "parents" / "out"
    with atomic_directory(out_dir) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "file").write_text("content")
        assert not out_dir.exists()
    assert (out_dir / "sub" / "file").read_text() == "content"
    assert _everything_below(tmp_path) == [
        "new",
        "new/parents",
        "new/parents/out",
        "new/parents/out/sub",
        "new/parents/out/sub/file",
    ]


def test_content_is_on_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, bool] = {}  # inode of each file that was flushed, and whether the folder was there by then
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = (tmp_path / "out").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "sub").mkdir()
        for name in ("a", "sub/b"):
            (scratch / name).write_text(name)
    assert [synced.get((tmp_path / "out" / name).stat().st_ino) for name in ("a", "sub/b")] == [False, False]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "out") as scratch:
            (scratch / "file").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert _everything_below(tmp_path) == []


def test_failure_leaves_an_empty_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert _everything_below(tmp_path) == ["out"]


def test_stale_scratch_is_cleared_and_that_of_a_running_process_is_not(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    running = tmp_path / f".out.{os.getppid()}.incomplete"
    running.mkdir()
    stale = tmp_path / f".out.{process.pid}.incomplete"
    (stale / "sub").mkdir(parents=True)
    (stale / "sub" / "old").write_text("of a killed run")
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "file").write_text("new")
    assert _everything_below(tmp_path) == sorted([running.name, "out", "out/file"])


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "file").write_text("new")
    assert _everything_below(tmp_path) == ["out", "out/file"]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_directory(Path("out")) as scratch:
        (scratch / "file").write_text("new")
        monkeypatch.chdir("/")  # as a library may do while the block runs
    assert _everything_below(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "precious").write_text("data")
    else:
        out.write_text("data")
    before = _everything_below(tmp_path)
    with pytest.raises(MemSinksError, match=r"out' exists and is not overwritten") as caught:
        refuse_to_overwrite(out)
    assert "\n" not in str(caught.value)
    with pytest.raises(MemSinksError, match=r"exists"), atomic_directory(out):
        pytest.fail("the block must not run")
    assert _everything_below(tmp_path) == before
    assert (out / "precious" if kind == "folder" else out).read_text() == "data"


def test_missing_and_empty_are_not_refused(tmp_path: Path) -> None:
    refuse_to_overwrite(tmp_path / "missing")
    refuse_to_overwrite(tmp_path)


def _die_in_folder(out_dir: Path) -> None:
    with atomic_directory(out_dir) as scratch:
        (scratch / "file").write_text("half")
        os._exit(9)


def _die_in_write_text(path: Path) -> None:
    os.fsync = lambda _: os._exit(9)  # the text is written but not yet known to be on disk
    write_text(path, "new")


def _run_until_death(function: object, path: Path) -> int:
    process = multiprocessing.get_context("fork").Process(target=function, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert process.pid is not None
    return process.pid


def test_killed_process_leaves_no_folder(tmp_path: Path) -> None:
    pid = _run_until_death(_die_in_folder, tmp_path / "out")
    assert _everything_below(tmp_path) == [f".out.{pid}.incomplete", f".out.{pid}.incomplete/file"]
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "whole").write_text("new")
    assert _everything_below(tmp_path) == ["out", "out/whole"]


def test_killed_process_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    _run_until_death(_die_in_write_text, path)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert _everything_below(tmp_path) == ["file.txt"]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first, and longer than the second")
    held_open = path.open(encoding="utf-8")
    write_text(path, "zweite, äöü 漢字\n")
    assert path.read_bytes() == "zweite, äöü 漢字\n".encode()
    with held_open:
        assert held_open.read() == "first, and longer than the second"  # a reader keeps the old file, no mixture
    assert _everything_below(tmp_path) == ["new", "new/file.txt"]


def test_failed_text_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")  # a lone surrogate has no UTF-8
    assert path.read_text() == "old"
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None, True], "a": {"text": "ä漢"}}
    write_json(tmp_path / "file.json", content)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "ä漢" in text  # readable, not escaped
    assert text.endswith("}\n")
    assert '\n  "b"' in text  # indented


def test_scratch_is_a_hidden_sibling(tmp_path: Path) -> None:
    # a rename is atomic only within one file system, so the scratch must lie beside the result
    assert incomplete_path(tmp_path / "out") == tmp_path / f".out.{os.getpid()}.incomplete"
