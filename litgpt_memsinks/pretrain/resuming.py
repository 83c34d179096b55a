"""Which checkpoint does a run go on from, and does it fit? The newest whole one of the same run.

A checkpoint is looked at as cheaply as possible: the table at the end of the weights' file, and its small values. Cut
short, empty and missing files are found so; bytes that changed within a tensor are not.
"""

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import clear_stale, left_by_killed
from litgpt_memsinks.model.checkpoint import CONFIG, WEIGHTS
from litgpt_memsinks.pretrain.run import Run
from litgpt_memsinks.pretrain.saving import RUN_FILE, facts

STATE = {"model", "optimizer", "train_dataloader", "iter_num", "step_count"}
"""What LitGPT's training state holds."""
Resume = bool | Literal["auto"] | Path


def find(run: Run, resume: Resume) -> Path | None:
    """The weights to go on from, or ``None`` to start anew. The same on all ranks; rank 0 looks.

    Args:
        run: For its ``fabric`` and ``out_dir``.
        resume: As LitGPT's; a path may name the file or its folder.

    Raises:
        MemSinksError: If a named checkpoint is not whole, or there must be one and is none.
    """
    found: Path | None = None
    problem: str | None = None
    if run.fabric.global_rank == 0:
        clear_leftovers(run.out_dir)
        try:
            found = _find(resume, run.out_dir, run.fabric.print)
        except MemSinksError as error:
            problem = str(error)
    found, problem = run.fabric.broadcast((found, problem))
    if problem is not None:
        raise MemSinksError(problem)
    return found


def _find(resume: Resume, out_dir: Path, say: Callable[[str], None]) -> Path | None:
    if isinstance(resume, Path):
        path = resume / WEIGHTS if (resume / CONFIG).exists() or not resume.suffix else resume
        if reason := flaw(path):
            raise MemSinksError(
                f"resume is {str(resume)!r}, but {reason}. Name another checkpoint, or use --resume auto, which takes "
                "the newest whole one."
            )
        return path
    if not resume:
        return None
    for path in checkpoints(out_dir):
        if not (reason := flaw(path)):
            return path
        say(f"Warning: the checkpoint {str(path.parent)!r} is passed over, because {reason}.")
    if resume is True:
        raise MemSinksError(
            f"resume is true, but there is no whole checkpoint step-*/{WEIGHTS} in {str(out_dir)!r}. Check out_dir, or "
            "use --resume auto, which starts anew then."
        )
    return None


def checkpoints(out_dir: Path) -> Iterator[Path]:
    """Where the weights of the checkpoints below ``out_dir`` are, whole or not, the newest first."""
    steps = [path for path in out_dir.rglob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    for folder in sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True):
        yield folder / WEIGHTS


def flaw(path: Path) -> str | None:
    """Why the checkpoint whose weights are at ``path`` is not whole, or ``None``."""
    for file in (path, path.parent / CONFIG):
        if not file.exists():
            return f"it has no {file.name}"
        if not file.stat().st_size:
            return f"its {file.name} is empty"
    try:
        config = yaml.safe_load((path.parent / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        return f"its {CONFIG} is cut short"
    if path.is_dir():  # of a strategy in which each rank writes a part; PyTorch writes .metadata last
        return None if (path / ".metadata").is_file() else f"its {path.name} has no .metadata"
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return None  # of an optimizer with objects of its own. PyTorch has found the end of the file before
    except (RuntimeError, EOFError, OSError):
        return f"its {path.name} is cut short"
    if missing := STATE - set(state):
        return f"its {path.name} holds no {', '.join(sorted(missing))}"
    return None


def clear_leftovers(out_dir: Path) -> None:
    """Remove what killed processes have left in ``out_dir``, and give back its name to what was to be replaced."""
    for path in out_dir.glob(".*.*.incomplete"):
        clear_stale(path.with_name(path.name[1:].rsplit(".", 2)[0]))
    for path in out_dir.glob(".*.*.replaced"):
        target = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if not left_by_killed(path):
            continue
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)


def check_same_run(run: Run, checkpoint_dir: Path) -> bool:
    """Refuse to go on with settings that would change which blocks come next.

    Returns:
        Whether the data is known to be the same. It is not if the checkpoint is of a release that did not note it.

    Raises:
        MemSinksError: Naming the setting and both values.
    """
    path = checkpoint_dir / RUN_FILE
    if not path.is_file():
        return False
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MemSinksError(f"{str(path)!r} is not JSON ({error}). Take the checkpoint from elsewhere.") from error
    now = facts(run)
    if saved.get("data_digest") != now["data_digest"]:
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} was trained on a stream with digest {saved.get('data_digest')}, but "
            f"{str(run.data.data_path)!r} has {now['data_digest']}. Go on with the data from "
            f"{saved.get('data_path')!r} or a copy of it, or start anew in another out_dir."
        )
    for name in ("data_seed", "num_workers", "world_size", "micro_batch_size", "max_seq_length"):
        if _effective(name, saved.get(name)) != _effective(name, now[name]):
            raise MemSinksError(
                f"{str(checkpoint_dir)!r} was saved with {name} = {saved.get(name)}, but this run has {now[name]}: "
                "blocks would be lost or repeated. Go on with the same, or start anew in another out_dir."
            )
    _tell_versions(run, saved.get("versions", {}), now["versions"])
    return now["data_digest"] is not None


def _effective(name: str, value: Any) -> Any:
    """No worker loads in the order of one."""
    return max(1, value) if name == "num_workers" and isinstance(value, int) else value


def _tell_versions(run: Run, saved: dict[str, str], now: dict[str, str]) -> None:
    changed = [f"{name} {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    if changed:
        run.fabric.print(f"Note: the checkpoint is of other packages ({', '.join(changed)}): it may differ bit by bit.")
