"""What is left of the sinks when some documents are removed? All others, in a model that goes on being used with them.

    documents ─► numbers (`chosen.py`) ─► their sinks (`pool.py`) ─► zeroed in every layer, recorded, never on again

The weights of a removed sink become zero: its rows of ``fc_1``, ``fc_2`` (``fc`` in ungated MLPs) with their biases,
and its columns of ``proj``. Which sinks those are stands in the configuration and in a buffer of the weights: the mask
of whatever document never has them on, so they are not trained again, and weights from before are refused.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
import torch
from litgpt.utils import copy_config_files, save_config
from rich.console import Console
from rich.progress import Progress

from litgpt_memsinks.certificate.certificate import write_certificate
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.corpus.mixture import Format
from litgpt_memsinks.drop_sinks.plain_weights import neuron_dimensions
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, refuse_to_overwrite
from litgpt_memsinks.model.checkpoint import WEIGHTS, read_config, read_weights
from litgpt_memsinks.model.model import REMOVED, check_removed, removed_mask
from litgpt_memsinks.prepared.chosen import Chosen, Missing, choose
from litgpt_memsinks.prepared.document_table import DocumentTable
from litgpt_memsinks.remove.pool import (
    Collateral,
    collateral,
    expected_coverage,
    kept_repeated,
    least_shared,
    masks,
    numbers_of,
    sharing_ids,
    union,
    weights_of_sinks,
)
from litgpt_memsinks.sinks.masks import pack_neurons

Choice = Literal["all", "least_shared"]
KEPT = ("hyperparameters.yaml",)
"""Files of a training checkpoint that LitGPT's ``copy_config_files`` passes over."""


@dataclass
class Removal:
    """What a removal does to the sinks."""

    chosen: Chosen
    """The documents that were asked for"""
    numbers: list[int]
    """Those of ``chosen.ids`` that have sinks which were not removed before"""
    own: torch.Tensor
    """Their sinks that were not removed before, bool ``(n_sink,)``"""
    removed: torch.Tensor
    """Those of them that are removed now, bool ``(n_sink,)``"""
    before: torch.Tensor
    """Sinks removed earlier, bool ``(n_sink,)``"""
    sharing: int
    """Documents that were not asked for and have the ID of one that was: they lose all that it loses"""
    kept: Collateral
    """What repeated documents that stay lose"""


def remove(
    checkpoint_dir: Path,
    out_dir: Path,
    data_path: Path | None = None,
    ids: str = "",
    source: str = "",
    documents: Path | None = None,
    text: str = "",
    choice: Choice = "all",
    max_collateral: float | None = None,
    missing: Missing = "stop",
    text_field: str = "text",
    format: Format = "auto",
    dry_run: bool = False,
    yes: bool = False,
    certificate: bool = True,
) -> Removal:
    """Remove the sinks of some documents from a model that goes on being used with sinks.

    Give one of ids, source, documents and text. First it says how many sinks go, and how many of their sinks other
    repeated documents lose with them. On a terminal it asks before it writes. What a document has left in the shared
    neurons stays: `docs/removal.md` says what that is.

    Args:
        checkpoint_dir: Checkpoint of a model trained with sinks, or that `remove` wrote. It is not changed: delete it,
            and the run's earlier checkpoints, for what was removed is still in them.
        out_dir: Folder to write. Must not exist; appears only when it is complete.
        data_path: Folder that `prepare` wrote and that the model was trained on. Needed: which documents are there,
            and what they share, stands in it.
        ids: Sequence IDs with commas or spaces between them; or @ and the path of a file of them.
        source: Name of a source: all its documents.
        documents: A corpus of the documents; a file that is none is one document.
        text: A document's whole text.
        choice: `all` their sinks; or `least_shared`, those of them that other documents use least, as many as
            max_collateral allows: they keep the others.
        max_collateral: Largest mean share of their sinks that the other repeated documents may lose, from 0 to 1. With
            `all` it stops where they would lose more.
        missing: What is asked for and not in the training stream: `stop`, or `pass` over it.
        text_field: Field of the text in the objects of `documents`.
        format: Format of `documents`.
        dry_run: Only say what would be removed.
        yes: Do not ask. Needed without a terminal.
        certificate: Write a certificate of removal into the result, with the losses before and after, see
            `verify_removal`. It scores documents with both models.

    Returns:
        What was removed, or would be.

    Raises:
        MemSinksError: If a document is not found, there is nothing to remove, it costs more than `max_collateral`, or
            the checkpoint or `out_dir` cannot be used.
    """
    _check(choice, max_collateral)
    if data_path is None:
        raise MemSinksError("Give --data_path, the folder that `prepare` wrote and that the model was trained on.")
    config = require_sinks(checkpoint_dir)
    refuse_to_overwrite(out_dir)
    chosen = choose(data_path, ids, source, documents, text, text_field, format, missing)
    removal = plan_removal(config, chosen, DocumentTable(data_path), choice, max_collateral)
    describe(removal, config)
    if dry_run:
        print("Nothing was written: this was a dry run.")
    elif _confirmed(yes):
        write_without(checkpoint_dir, out_dir, config, removal, data_path if certificate else None)
        print(
            f"Wrote {str(out_dir)!r}. What was removed is still in {str(checkpoint_dir)!r} and its run's checkpoints."
        )
    return removal


def _check(choice: str, max_collateral: float | None) -> None:
    if choice not in ("all", "least_shared"):
        raise MemSinksError(f"choice is {choice!r}. Choose from: all, least_shared.")
    if max_collateral is None and choice == "least_shared":
        raise MemSinksError("choice least_shared needs a limit. Give one, such as --max_collateral 0.02.")
    if max_collateral is not None and not 0 <= max_collateral <= 1:
        raise MemSinksError(f"max_collateral is {max_collateral}, but it is a share from 0 to 1.")


def require_sinks(checkpoint_dir: Path) -> MemSinksConfig:
    """The configuration of a checkpoint with sinks.

    Raises:
        MemSinksError: If it has none.
    """
    config = read_config(checkpoint_dir)
    if not isinstance(config, MemSinksConfig) or not config.n_sink:
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} has no sinks to remove. Name the checkpoint of a run with "
            "litgpt_memsinks.MemSinksData, before its sinks are dropped."
        )
    if config.sink_method != "memsinks":
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} was trained by gradient masking ({config.sink_method}): no document has sinks of "
            "its own to remove. Use drop_sinks, which drops those of all."
        )
    if config.n_value_sink:
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} has sinks in its attention, too (sinks.value_shared_fraction), which remove does "
            "not reach. Use drop_sinks, which drops those of all, or keeps those of some."
        )
    return config


# ------------------------------------------------------------------------------------------------------------ what goes


def plan_removal(
    config: MemSinksConfig, chosen: Chosen, table: DocumentTable, choice: Choice, max_collateral: float | None
) -> Removal:
    """Find the sinks of the documents and what their loss costs others; nothing is changed.

    Raises:
        MemSinksError: If there is nothing to remove, or it costs more than `max_collateral`.
    """
    numbers = numbers_of(chosen.rows, config.sink_sinks_for)
    if not numbers:
        raise MemSinksError(
            f"Of {chosen.rule}, none occurs more than once, and this model has sinks for repeated documents only: what "
            "it learnt of them is in its shared neurons, which cannot be removed."
        )
    own = union(config, numbers)
    there = torch.cat([mask.any(1) for mask in masks(config, torch.tensor(numbers))])
    numbers = torch.tensor(numbers)[there].tolist()
    if not numbers:
        raise MemSinksError(f"All sinks of {chosen.rule} are removed already.")
    removed = own
    if choice == "least_shared":
        assert max_collateral is not None  # checked
        removed = least_shared(own, weights_of_sinks(config, kept_repeated(table, chosen.ids)), max_collateral)
    if not removed.any():
        raise MemSinksError(
            f"max_collateral is {max_collateral}, but the loss of a single one of the {int(own.sum())} sinks costs the "
            "other repeated documents more. Raise it, or train with a smaller active_probability."
        )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Other repeated documents", total=None)
        kept = collateral(
            config, kept_repeated(table, chosen.ids), removed, lambda rows: progress.update(task, advance=rows)
        )
    if max_collateral is not None and kept.mean > max_collateral + 1e-9:
        raise MemSinksError(
            f"The other repeated documents would lose {kept.mean:.2%} of their sinks on average, but max_collateral is "
            f"{max_collateral:.2%}. Raise it, remove fewer documents, or use --choice least_shared."
        )
    return Removal(chosen, numbers, own, removed, removed_mask(config), sharing_ids(table, chosen.rows), kept)


def describe(removal: Removal, config: MemSinksConfig) -> None:
    """Print what goes, and what it costs."""
    chosen, kept, n = removal.chosen, removal.kept, config.n_sink
    count, k = int(removal.removed.sum()), len(removal.numbers)
    p = config.sink_active_probability
    print(f"Remove {chosen.rule}.")
    asked = _count(pc.count_distinct(chosen.rows["digest"]).as_py(), "document")
    print(f"  documents    {asked} of {_count(len(chosen.ids), 'ID')}" + _and_sharing(removal.sharing))
    if len(chosen.ids) > k:
        without = _count(len(chosen.ids) - k, "ID")
        print(f"               {without} without sinks, of documents that occur once or were removed before")
    print(
        f"  sinks        {count:,} of {n:,} in each MLP ({count / n:.1%}; {_count(k, 'document')} would use "
        f"{expected_coverage(p, k):.1%} on average at p = {p:g}), {int(removal.before.sum()):,} were removed before"
    )
    if count < int(removal.own.sum()):
        print(
            f"  left         {int(removal.own.sum()) - count:,} of their sinks stay, because others use them more: "
            f"{_left(removal, config):.0%} of a removed document's on average"
        )
    if not kept.documents:
        print("  others       no other document is repeated")
        return
    quantiles = ", ".join(f"{name} {kept.quantile(q):.1%}" for name, q in (("median", 0.5), ("90% of them", 0.9)))
    others = _count(kept.documents, "other repeated document")
    print(
        f"  others       {others} lose {kept.mean:.2%} of their sinks on average ({quantiles}, "
        f"most {kept.worst[0].share if kept.worst else 0:.1%})"
    )
    for place in kept.worst:
        print(f"               {place.sequence_id} loses {place.lost} of {place.own} ({place.place})")
    print("  What that does to a loss is measured in docs/removal.md; shared neurons are untouched.")


def _and_sharing(number: int) -> str:
    return f"; {_count(number, 'more document')} with the same IDs will lose their sinks as well" if number else ""


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _left(removal: Removal, config: MemSinksConfig) -> float:
    """Mean share of a removed document's sinks that stays."""
    shares = [
        ((mask & ~removal.removed).sum(1) / mask.sum(1).clamp(min=1)).tolist()
        for mask in masks(config, torch.tensor(removal.numbers))
    ]
    values = [share for part in shares for share in part]
    return sum(values) / len(values)


def _confirmed(yes: bool, ask: Callable[[str], str] = input) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise MemSinksError("Nothing was removed: without a terminal to ask at, it needs --yes true.")
    if ask("Remove them? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("Nothing was removed.")
    return False


# -------------------------------------------------------------------------------------------------------------- writing


def write_without(
    checkpoint_dir: Path, out_dir: Path, config: MemSinksConfig, removal: Removal, certify_on: Path | None = None
) -> None:
    """Write the checkpoint without the removed sinks. It has weights only: an optimizer's averages remember, too.

    Args:
        checkpoint_dir: What to read.
        out_dir: What to write.
        config: Of `checkpoint_dir`.
        removal: What to remove.
        certify_on: Prepared folder whose documents a certificate is measured on; ``None`` for no certificate.

    Raises:
        MemSinksError: If the checkpoint is damaged, `out_dir` holds something, or own sinks do not help.
    """
    after = replace(
        config,
        sink_removed=pack_neurons(removal.before | removal.removed),
        sink_removed_documents=config.sink_removed_documents + len(removal.numbers),
    )
    with Console(stderr=True).status("Removing the sinks"), atomic_directory(out_dir) as scratch:
        weights = read_weights(checkpoint_dir)
        check_removed(config, weights.get(REMOVED))
        torch.save(without_removed(weights, after), scratch / WEIGHTS)
        copy_config_files(checkpoint_dir, scratch)  # tokenizer, and Hugging Face's files if there are any
        for name in KEPT:
            if (checkpoint_dir / name).is_file():
                (scratch / name).write_bytes((checkpoint_dir / name).read_bytes())
        save_config(after, scratch)
        if certify_on is not None:
            rule = f"Remove {removal.chosen.rule}."
            write_certificate(
                *(checkpoint_dir, scratch, scratch, rule, "remove"),
                removed_ids=removal.numbers,
                data_path=certify_on,
                after_name=out_dir,
            )


def without_removed(weights: dict[str, torch.Tensor], config: MemSinksConfig) -> dict[str, torch.Tensor]:
    """Zero the removed sinks in every layer, and note them beside.

    Args:
        weights: State dict of a model with sinks.
        config: Its configuration, with the record of all removed sinks.

    Returns:
        State dict of the model of ``config``. What is not changed shares memory with ``weights``.

    Raises:
        MemSinksError: If a weight has another shape than the configuration says.
    """
    neurons = config.n_shared + removed_mask(config).nonzero().flatten()
    result = dict(weights)
    for name, dimension in neuron_dimensions(weights, config).items():
        result[name] = weights[name].index_fill(dimension, neurons, 0)
    result[REMOVED] = removed_mask(config).to(torch.uint8)
    return result
