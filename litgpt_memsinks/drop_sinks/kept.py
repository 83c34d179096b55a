"""Which sinks does the released model keep? What the command line says → neurons, for `drop_sinks` and `export_hf`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.drop_sinks.plain_weights import sinks_of
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepared.chosen import Chosen, Missing, choose, read_ids


@dataclass
class KeepArgs:
    """Which documents keep their sinks. Nothing set: none."""

    ids: str = ""
    source: str = ""
    documents: Path | None = None
    data_path: Path | None = None
    missing: Missing = "stop"

    @property
    def given(self) -> bool:
        """Whether any sinks are to be kept."""
        return bool(self.ids or self.source or self.documents is not None)


@dataclass
class Kept:
    """Sinks that become ordinary neurons of the released model."""

    rule: str = "no sinks are kept"
    """By which rule, for people"""
    ids: list[int] = field(default_factory=list)
    """Distinct numbers of the documents whose sinks are kept, sorted: the low 31 bits of sequence IDs"""
    sinks: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Indices of the sinks, int64 ``(kept,)``, ascending, in [0, n_sink): the union of those of the documents"""


def kept(config: MemSinksConfig, keep: KeepArgs) -> Kept:
    """Choose the sinks to keep: the union of those of the documents asked for.

    Raises:
        MemSinksError: If the settings contradict each other, a document asked for is not in the data, or it has no
            sinks.
    """
    given = [name for name in ("ids", "source", "documents") if getattr(keep, name) not in (None, "")]
    flags = {"ids": "--keep", "source": "--keep_source", "documents": "--keep_documents"}
    if not given:
        return Kept()
    if len(given) > 1:
        raise MemSinksError(f"Give one of {' and '.join(flags[name] for name in given)}, not {len(given)} of them.")
    if keep.data_path is None and not keep.ids:
        raise MemSinksError(
            f"{flags[given[0]]} needs --data_path. Name the folder that `prepare` wrote for the training."
        )
    if not config.n_sink:
        raise MemSinksError("The model was trained with shared_fraction 1.0: it has no sinks to keep. Leave that out.")
    chosen = choose(keep.data_path, keep.ids, keep.source, keep.documents, missing=keep.missing)
    if config.sink_sinks_for == "repeated":
        chosen.ids = _with_sinks(chosen, keep)
    # the sign says that they repeat, which counts under `sinks_for: repeated` only
    sequence_ids = torch.tensor(chosen.ids, dtype=torch.int64) - 2**31
    return Kept(chosen.rule, chosen.ids, sinks_of(config, sequence_ids))


def _with_sinks(chosen: Chosen, keep: KeepArgs) -> list[int]:
    """Numbers of those chosen documents that repeat; the others have no sinks under ``sinks_for: repeated``."""
    if keep.data_path is None:
        signed = read_ids(keep.ids)
        hint = " Write IDs as they stand in the stream, below 0 if the document repeats, or name --data_path."
    else:
        signed, hint = chosen.rows["sequence_id"].to_pylist(), ""
    once = sorted({number for number in signed if number > 0})
    if once and (len(once) == len(set(signed)) or not (keep.source or keep.missing == "pass")):
        raise MemSinksError(
            f"{len(once):,} of {chosen.rule} occur once, such as ID {once[0]}, and the model was trained with "
            f"sinks_for: repeated, so they have no sinks to keep. Leave them out.{hint}"
        )
    if once:
        chosen.rule += f", {len(once):,} of which occur once and have no sinks"
    return sorted({number + 2**31 for number in signed if number < 0})
