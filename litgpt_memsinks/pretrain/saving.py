"""How does a checkpoint become whole? LitGPT writes it into a hidden folder, which gets its name when it is on disk."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import clear_stale, fsync_tree, incomplete_path, write_json
from litgpt_memsinks.pretrain.run import Run

RUN_FILE = "memsinks_run.json"
"""What whoever resumes must match, see `facts`."""
PACKAGES = ("litgpt", "litdata", "torch", "litgpt-memsinks")
WRITER_ERRORS = ("PytorchStreamWriter", "unexpected pos")
"""In the text of the RuntimeError with which PyTorch reports that a file could not be written."""


def save_checkpoint(
    run: Run,
    base_save_checkpoint: Callable[..., None],
    fabric: L.Fabric,
    state: dict[str, Any],
    tokenizer_dir: Path | None,
    checkpoint_file: Path,
) -> None:
    """LitGPT's ``save_checkpoint``, after which the folder is there with everything in it, or as it was. Collective.

    Raises:
        MemSinksError: On rank 0, if it cannot be written. The other ranks exit with status 1.
    """
    target = Path(os.path.abspath(checkpoint_file.parent))
    scratch = Path(fabric.broadcast(str(incomplete_path(target))))
    try:
        with _on_all_ranks(fabric, state, target):
            if fabric.global_rank == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                clear_stale(target)
                scratch.mkdir()
        # Lightning writes to the folder for temporary files first: to memory, on many clusters
        with _on_all_ranks(fabric, state, target), mock.patch.object(tempfile, "tempdir", str(scratch)):
            file = scratch / checkpoint_file.name
            _collectively(fabric, lambda: base_save_checkpoint(fabric, state, tokenizer_dir, file))
            if fabric.global_rank == 0:
                write_json(scratch / RUN_FILE, facts(run))
        with _on_all_ranks(fabric, state, target):
            if fabric.global_rank == 0:
                put_in_place(scratch, target)
    except BaseException:
        if fabric.global_rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    run.saved_step = state["step_count"]
    fabric.print(f"Saved {str(checkpoint_file.parent)!r}")


def facts(run: Run) -> dict[str, Any]:
    """What the order of the blocks in a run depends on, and the packages that it runs with."""
    return {
        "data_digest": run.data_digest,
        "data_path": str(run.data.data_path),
        "data_seed": run.data.seed,
        "num_workers": run.data.num_workers,
        "world_size": run.fabric.world_size,
        "micro_batch_size": run.train.micro_batch_size,
        "max_seq_length": run.train.max_seq_length or run.config.block_size,
        "versions": {name: version(name) for name in PACKAGES},
    }


def put_in_place(scratch: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it its name.

    What is there already, such as the ``final`` of an earlier run, waits aside until the new one has the name. Killed
    in between, it gets its name back by `resuming.clear_leftovers`.
    """
    fsync_tree(scratch)
    aside = replaced_path(target)
    if target.exists():
        target.rename(aside)
    scratch.rename(target)
    _fsync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def replaced_path(target: Path) -> Path:
    """Where this process puts what it replaces by a new ``target``."""
    return incomplete_path(target).with_suffix(".replaced")


def _fsync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _collectively(fabric: L.Fabric, save: Callable[[], None]) -> None:
    """Let ``fabric.save`` reach its barrier, at which the other ranks wait, also if this one cannot write."""
    failures: list[OSError | RuntimeError] = []
    strategy_save = fabric.strategy.save_checkpoint

    def save_or_note(*args: Any, **kwargs: Any) -> None:
        try:
            strategy_save(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    with mock.patch.object(fabric.strategy, "save_checkpoint", save_or_note):
        save()
    if failures:
        raise failures[0]


@contextmanager
def _on_all_ranks(fabric: L.Fabric, state: dict[str, Any], target: Path) -> Iterator[None]:
    """End all ranks if one of them could not write in the block.

    Raises:
        MemSinksError: On rank 0, if so.
        SystemExit: On the others, with status 1 and no line of their own.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
    except RuntimeError as error:
        if not any(text in str(error) for text in WRITER_ERRORS):
            raise
        problem = str(error).splitlines()[0]
    problems = [problem] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        if fabric.global_rank:
            raise SystemExit(1)
        raise MemSinksError(
            f"{str(target)!r} cannot be written ({found}). It needs about {needed_bytes(state):,} bytes, and "
            f"{shutil.disk_usage(target.parent).free:,} are free there. Older checkpoints are untouched: make room, "
            "then go on with --resume auto."
        )


def needed_bytes(state: dict[str, Any]) -> int:
    """Bytes of the weights and of what the optimizer keeps for them."""
    optimizer = state["optimizer"]
    kept = [value for slot in getattr(optimizer, "optimizer", optimizer).state.values() for value in slot.values()]
    tensors = [*state["model"].parameters(), *(value for value in kept if isinstance(value, torch.Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
