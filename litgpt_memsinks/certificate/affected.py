"""Whose sinks are gone? Documents set against the neurons that two checkpoints differ by.

A document's sinks are computed from its ID, so whether the neurons that are gone are those of the documents that are
named can be checked, and which documents were concerned can be found, without believing anybody.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from litgpt_memsinks.certificate.difference import Difference, Kind
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import DOCUMENTS

_DOCUMENT_BITS = 2**31 - 1
_BATCH = 1024  # documents whose masks are held at a time


def numbers(ids: Iterable[int]) -> list[int]:
    """Sequence IDs without their signs, each once, in order: the numbers that choose the sinks."""
    return sorted({number & _DOCUMENT_BITS for number in ids})


def found_by_weights(difference: Difference, repeated: torch.Tensor) -> list[int] | None:
    """Numbers of the repeated documents that were removed, or kept, as far as the weights show it.

    Args:
        difference: What became of the checkpoint.
        repeated: IDs of the repeated documents, int64 ``(n,)``.

    Returns:
        Of kind ``remove``, those that have no sink left; of kind ``keep``, those that have all of theirs. ``None`` of
        kind ``drop``.
    """
    if difference.kind == "drop":
        return None
    candidates = numbers(repeated.tolist())
    lost = difference.gone | difference.empty_before
    if difference.kind == "keep":
        lost = difference.gone & ~difference.empty_before
    wanted = 1.0 if difference.kind == "remove" else 0.0
    shares = share_gone(candidates, difference.config, lost)
    return [number for number, share in zip(candidates, shares, strict=True) if share == wanted]


def documents_of(kind: Kind, ids: list[int] | None, data_path: Path | None) -> dict[str, Any]:
    """The certificate's list of documents; ``None`` in it means that none are named.

    Args:
        kind: What was done.
        ids: Numbers of the documents that were removed, or kept.
        data_path: Prepared folder whose document table has the digests of their tokens.
    """
    listed = None
    if ids is not None:
        digests = {} if data_path is None else _digests(ids, data_path)
        listed = [{"id": number, "digest": digests.get(number)} for number in ids]
    return {"removed": listed if kind == "remove" else None, "kept": listed if kind == "keep" else None}


def _digests(ids: list[int], data_path: Path) -> dict[int, str]:
    """Number of each document to the digest of its tokens, in hexadecimal."""
    spelt = pa.array([*ids, *(number - 2**31 for number in ids)], pa.int32())
    try:
        table = pq.read_table(
            data_path / DOCUMENTS,
            columns=["sequence_id", "digest"],
            filters=pc.field("sequence_id").isin(spelt) & (pc.field("split") == "train"),
        )
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemSinksError(f"{str(data_path / DOCUMENTS)!r} cannot be read ({reason}). Copy it again.") from error
    pairs = zip(table["sequence_id"].to_pylist(), table["digest"].to_pylist(), strict=True)
    return {number & _DOCUMENT_BITS: f"{digest:016x}" for number, digest in pairs}


def neurons(difference: Difference, ids: list[int] | None) -> dict[str, Any]:
    """Which sinks are gone, the same in every layer, and whether they are those of the documents that are named.

    Args:
        difference: What became of the checkpoint.
        ids: Numbers of the documents that were removed, or kept; ``None`` if none are named.

    Returns:
        The certificate's ``neurons``. ``outside_documents``: sinks that are gone, or were kept, and that none of the
        documents uses. ``left_of_documents``: sinks of theirs that are still there, or were not kept.
    """
    outside = left = None
    if ids is not None:
        used = sinks_of(ids, difference.config)
        concerned = difference.gone if difference.kind == "remove" else ~difference.gone
        outside = int((concerned & ~used).sum())
        left = int((used & ~concerned & ~difference.empty_before).sum())
    return {
        "layers": difference.config.n_layer,
        "shared": difference.config.n_shared,
        "sinks": difference.config.n_sink,
        "gone": int(difference.gone.sum()),
        "gone_sinks": ranges(difference.gone),
        "empty_before": int(difference.empty_before.sum()),
        "outside_documents": outside,
        "left_of_documents": left,
        "projection_factor": difference.projection_factor,
        "tensors_identical": difference.tensors_identical,
        "tensors_sliced": difference.tensors_sliced,
    }


def coverage(difference: Difference, ids: list[int] | None, repeated: torch.Tensor | None) -> dict[str, Any]:
    """How much of the pool of sinks went, and what other repeated documents lost of theirs.

    Args:
        difference: What became of the checkpoint.
        ids: Numbers of the documents that were removed, or kept; ``None`` if none are named.
        repeated: IDs of the repeated documents.

    Returns:
        The certificate's ``coverage``. ``fraction`` of the sinks that are gone; ``expected`` of independent masks: 1 -
        (1 - p)^k for k documents removed. ``others``: repeated documents that were not removed, or were kept, and the
        mean and the largest fraction that they lost of their own sinks.
    """
    config = difference.config
    untouched = None if ids is None else (1 - config.sink_active_probability) ** len(ids)
    expected = {"drop": 1.0, "keep": untouched, "remove": None if untouched is None else 1 - untouched}[difference.kind]
    others = None
    if repeated is not None and ids is not None:
        of_kept = difference.kind == "keep"
        rest = [number for number in numbers(repeated.tolist()) if (number in set(ids)) == of_kept]
        if shares := share_gone(rest, config, difference.gone):
            others = {
                "documents": len(shares),
                "mean": round(sum(shares) / len(shares), 6),
                "most": round(max(shares), 6),
            }
    return {
        "fraction": round(int(difference.gone.sum()) / config.n_sink, 6) if config.n_sink else None,
        "expected": None if expected is None else round(expected, 6),
        "others": others,
    }


def sinks_of(ids: list[int], config: MemSinksConfig) -> torch.Tensor:
    """Which sinks any of some documents uses, bool ``(n_sink,)``."""
    union = torch.zeros(config.n_sink, dtype=torch.bool)
    for mask in _masks(ids, config):
        union |= mask.any(0)
    return union


def share_gone(ids: list[int], config: MemSinksConfig, gone: torch.Tensor) -> list[float]:
    """Which fraction of each document's sinks is gone; of a document without any, all.

    Args:
        ids: Numbers of the documents.
        config: Of the model with sinks.
        gone: Sinks that are gone, bool ``(n_sink,)``.
    """
    shares: list[float] = []
    for mask in _masks(ids, config):
        total, lost = mask.sum(1), (mask & gone).sum(1)
        shares += torch.where(total > 0, lost / total.clamp(min=1), 1.0).tolist()
    return shares


def _masks(ids: list[int], config: MemSinksConfig) -> Iterator[torch.Tensor]:
    """Masks of some documents at a time, bool ``(documents, n_sink)``."""
    for start in range(0, len(ids), _BATCH):
        part = torch.tensor(ids[start : start + _BATCH], dtype=torch.int64)
        yield config.mask(part)


def ranges(mask: torch.Tensor) -> str:
    """Indices of the true values, such as ``0-3,7``."""
    indices = mask.nonzero().flatten().tolist()
    starts = [index for index in indices if index == 0 or not mask[index - 1]]
    ends = [index for index in indices if index == len(mask) - 1 or not mask[index + 1]]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
