"""What does the released model hold? The shared neurons, and chosen documents' sinks, as a plain LitGPT checkpoint.

The result loads with stock LitGPT, without this package, and is smaller and faster. Weights are written one by one from
the memory-mapped checkpoint; what memory that takes is in ``docs/release.md``.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.utils import copy_config_files, incremental_save, save_config
from rich.console import Console
from rich.progress import track

from litgpt_memsinks.certificate.certificate import write_certificate
from litgpt_memsinks.certificate.difference import refuse_value_sinks
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.drop_sinks.hf_config import hf_config
from litgpt_memsinks.drop_sinks.kept import KeepArgs, Kept, kept
from litgpt_memsinks.drop_sinks.plain_weights import alone, plain_config, tied, without_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, write_json
from litgpt_memsinks.model.checkpoint import WEIGHTS, check_fits, read_config, read_weights
from litgpt_memsinks.prepared.chosen import Missing


@dataclass
class Dropped:
    """What was done."""

    kept: Kept
    """The sinks that stay, of which documents, by which rule"""
    dropped: int
    """Neurons of each MLP that are gone"""
    config: Config
    """Of the plain model"""


def drop_sinks(
    checkpoint_dir: Path,
    out_dir: Path,
    keep: str = "",
    keep_source: str = "",
    keep_documents: Path | None = None,
    data_path: Path | None = None,
    missing: Missing = "stop",
    certificate: bool = True,
) -> Dropped:
    """Write the plain, smaller LitGPT checkpoint that is left when the memorization sinks are dropped.

    With one of keep, keep_source and keep_documents, the sinks of those documents stay, always on: the result computes
    what the model with sinks computes with the sinks of all these documents on.

    A certificate of removal is written into the result, see `verify_removal`.

    Args:
        checkpoint_dir: Checkpoint of a model trained with sinks, such as OUT_DIR/final or OUT_DIR/step-00001000.
        out_dir: Folder to write. Must not exist; appears only when it is complete.
        keep: Sequence IDs of documents whose sinks stay, with commas between them; or @ and the path of a file of them.
        keep_source: Name of a source: the sinks of all its documents stay.
        keep_documents: A corpus: the sinks of the documents with its texts stay.
        data_path: Folder that `prepare` wrote and that the model was trained on, to find documents in. With it, the
            certificate says what the losses were before and after.
        missing: What is to be kept, but is not in the data: stop, or pass over it.
        certificate: Write one. It reads both checkpoints once more.

    Returns:
        How many neurons are gone, and which sinks were kept.

    Raises:
        MemSinksError: If there is no checkpoint with sinks, it is damaged, what to keep is not there, or `out_dir`
            exists; or if with `data_path` the documents' own sinks do not help, so that it is of another model.
    """
    started = time.perf_counter()
    config = read_config(checkpoint_dir)
    if not isinstance(config, MemSinksConfig):
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} is a plain checkpoint: it has no sinks to drop. Use it as it is, or name the "
            "checkpoint of a run with litgpt_memsinks.MemSinksData."
        )
    if certificate:
        refuse_value_sinks(config)
    with atomic_directory(out_dir) as scratch:
        stay = kept(config, KeepArgs(keep, keep_source, keep_documents, data_path, missing))
        plain = plain_config(config, stay.sinks)
        weights = read_weights(checkpoint_dir)
        slices = without_sinks(weights, config, stay.sinks)
        check_fits(checkpoint_dir, weights, config)
        save_weights(slices, scratch / WEIGHTS)
        copy_config_files(checkpoint_dir, scratch)  # tokenizer, and Hugging Face's files if there are any
        save_config(plain, scratch)
        write_hf_config(scratch, plain, slices)
        if certificate:
            _certify(checkpoint_dir, scratch, out_dir, stay, data_path)
    done = Dropped(stay, config.n_sink - len(stay.sinks), plain)
    size = (out_dir / WEIGHTS).stat().st_size
    print(
        f"{summary(done, config)}: {str(out_dir)!r} is a plain LitGPT checkpoint ({size / 1e6:,.1f} MB, "
        f"{time.perf_counter() - started:.1f} s).\nTry it: litgpt generate {out_dir} --prompt 'Once upon a time'"
    )
    return done


def _certify(before: Path, scratch: Path, out_dir: Path, stay: Kept, data_path: Path | None) -> None:
    """Write the certificate beside the weights, before the folder appears."""
    rule = f"Drop all sinks but those of {stay.rule}." if stay.ids else "Drop the sinks of all documents."
    write_certificate(
        before,
        scratch,
        scratch,
        rule,
        "keep" if stay.ids else "drop",
        kept_ids=stay.ids or None,
        data_path=data_path,
        after_name=out_dir,
    )


def summary(done: Dropped, config: MemSinksConfig) -> str:
    """What was dropped, and what was kept if anything was, in one sentence without its full stop."""
    said = f"Dropped {done.dropped:,} of {config.intermediate_size:,} neurons of each MLP"
    if config.n_value_sink:
        said += " and their value channels (now zeros)"
    if not done.kept.ids:
        return said
    return f"{said} and kept {len(done.kept.sinks):,} of {config.n_sink:,} sinks, those of {done.kept.rule}"


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dict as ``torch.save`` does, one tensor in memory at a time.

    Embeddings that are tied, by storage or by value, are written once and are one tensor again when they are loaded.
    """
    again = "transformer.wte.weight" if tied(weights) else None
    stored: dict[str, Any] = {}
    with incremental_save(path) as saver:
        for name in progress(weights, "Writing the weights"):
            if name != again:
                stored[name] = saver.store_early(alone(weights[name]))
        if again is not None:
            stored[again] = stored["lm_head.weight"]
        saver.save(stored)


def progress(names: Iterable[str], doing: str) -> Iterable[str]:
    """The names, with a bar on a terminal meanwhile."""
    console = Console(stderr=True)
    return track(list(names), doing, console=console, transient=True, disable=not console.is_terminal)


def write_hf_config(folder: Path, plain: Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the model's own ``config.json``, which ``litgpt evaluate`` needs.

    One that was copied came with the tokenizer and may be of another model. If transformers has no architecture for
    this one, it gets the new width and is left otherwise.
    """
    path = folder / "config.json"
    copied = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    try:
        special = {name: copied[name] for name in ("bos_token_id", "eos_token_id") if name in copied}
        values = special | hf_config(plain, tied(weights), next(iter(weights.values())).dtype)
    except MemSinksError:
        widths = {name: plain.intermediate_size for name in ("intermediate_size", "n_inner") if name in copied}
        values = copied | widths
    if values:
        write_json(path, values)
