"""Write beside, then rename: nothing half-written is ever left looking whole."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError


def refuse_to_overwrite(path: Path) -> None:
    """Raise if there is something at ``path`` that writing there would destroy.

    Raises:
        MemSinksError: If ``path`` is a file or a folder with something in it.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise MemSinksError(f"{str(path)!r} exists and is not overwritten. Remove it or name another output.")


def incomplete_path(path: Path) -> Path:
    """The hidden sibling in which this process makes the content of ``path`` before it is renamed to ``path``.

    The process ID is in the name, because a worker process may outlive a killed parent for a while and go on writing.
    """
    return path.parent / f".{path.name}.{os.getpid()}.incomplete"


def clear_stale(path: Path) -> None:
    """Remove what killed processes of this machine have left beside ``path``."""
    for stale in path.parent.glob(f".{path.name}.*.incomplete"):
        if left_by_killed(stale):
            shutil.rmtree(stale, ignore_errors=True)
            stale.unlink(missing_ok=True)


def left_by_killed(path: Path) -> bool:
    """Whether no other process of this machine may still be working on ``.NAME.PROCESS.SUFFIX``."""
    process = path.name.rsplit(".", 2)[1]
    return not (process.isdigit() and _is_running(int(process))) or int(process) == os.getpid()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def alone(path: Path, wait: Callable[[], bool]) -> Iterator[None]:
    """Hold a lock, which a killed process loses. Nothing is locked on a file system that cannot.

    Args:
        path: File to lock; it stays.
        wait: Called again and again while another process has the lock, for as long as it sleeps; whether to go on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        waiting = True
        while waiting:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting = wait()
            except OSError:
                break
        yield


@contextmanager
def atomic_directory(out_dir: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``out_dir`` in one rename if the block succeeds.

    A killed process leaves only a hidden ``.NAME.PROCESS.incomplete`` beside ``out_dir``, which the next run clears.

    Raises:
        MemSinksError: If ``out_dir`` already holds something.
    """
    out_dir = Path(os.path.abspath(out_dir))
    refuse_to_overwrite(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(out_dir)
    scratch = incomplete_path(out_dir)
    scratch.mkdir()
    try:
        yield scratch
        fsync_tree(scratch)
        if (
            out_dir.is_dir() and not out_dir.is_symlink()
        ):  # empty, see above: rename refuses a folder that exists on some file systems
            out_dir.rmdir()
        scratch.rename(out_dir)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    scratch = incomplete_path(path)
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def fsync_tree(folder: Path) -> None:
    """Flush every file below ``folder`` to disk, so that the rename cannot become durable before the content."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
