"""How much of the sinks is some documents', and how much of other documents' sinks is that? All is counted.

A sink is on for a document with probability p, so k documents use 1 - (1 - p)^k of all sinks on average, and every
other document shares that part of its own with them. What is said here comes from the masks themselves.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.document_ids.ids import DOCUMENT_BITS
from litgpt_memsinks.model.model import removed_mask
from litgpt_memsinks.prepared.document_table import DocumentTable

_ELEMENTS = 1 << 22  # of masks at a time; hashing takes some int32 of each
_BINS = 1000
WORST = 10
"""Documents that are listed one by one."""


class Place(NamedTuple):
    """A document and what it loses. Ordered by the share."""

    share: float
    """Of its sinks, in [0, 1]"""
    lost: int
    """Sinks that it loses"""
    own: int
    """Sinks that it has"""
    sequence_id: int
    """As it stands in the stream"""
    place: str
    """Source, file and line"""


@dataclass
class Collateral:
    """What documents that are not removed lose of their sinks."""

    documents: int = 0
    """Distinct IDs of repeated documents that are kept"""
    total: float = 0.0
    """Sum of their shares"""
    bins: list[int] = field(default_factory=lambda: [0] * (_BINS + 1))
    """Documents by share: a bin per 0.1%, the last one for all of it"""
    worst: list[Place] = field(default_factory=list)
    """Those that lose the largest shares"""

    @property
    def mean(self) -> float:
        """Mean share that they lose, in [0, 1]."""
        return self.total / self.documents if self.documents else 0.0

    def quantile(self, q: float) -> float:
        """The share that a fraction ``q`` of them does not exceed, up to 0.1%."""
        seen = 0
        for index, count in enumerate(self.bins):
            seen += count
            if seen >= q * self.documents:
                return index / _BINS
        return 0.0


def masks(config: MemSinksConfig, documents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The sinks of documents that can still be on, bool ``(n, n_sink)``, some documents at a time.

    Args:
        config: Of a model with sinks.
        documents: Their numbers, or sequence IDs; integers of shape ``(n_documents,)``.
    """
    alive = ~removed_mask(config)
    for some in documents.split(max(1, _ELEMENTS // config.n_sink)):
        yield config.mask(some) & alive


def union(config: MemSinksConfig, documents: Iterable[int]) -> torch.Tensor:
    """The sinks that any of these documents uses and that are not removed, bool ``(n_sink,)``."""
    found = torch.zeros(config.n_sink, dtype=torch.bool)
    for mask in masks(config, torch.tensor(list(documents), dtype=torch.int64)):
        found |= mask.any(0)
    return found


def expected_coverage(active_probability: float, documents: int) -> float:
    """Expected share of all sinks that some documents use: 1 - (1 - p)^k."""
    return 1 - (1 - active_probability) ** documents


def sharing_ids(table: DocumentTable, rows: pa.Table) -> int:
    """How many other trained documents have the ID of one of these: near-duplicates, of one key, or by chance.

    Args:
        table: The document table.
        rows: Some rows of it.
    """
    numbers = sorted({value & DOCUMENT_BITS for value in rows["sequence_id"].to_pylist()})
    where = {"split": pa.array(["train"]), "sequence_id": _spelled(numbers)}
    others = (
        part.filter(pc.greater(part["written"], 0))["digest"] for part in table.parts(["digest", "written"], where)
    )
    return sum(pc.sum(pc.invert(pc.is_in(digests, value_set=rows["digest"]))).as_py() or 0 for digests in others)


def _spelled(numbers: list[int]) -> pa.Array:
    """The sequence IDs of documents with these numbers, repeated or not."""
    return pa.array([spelled for number in numbers for spelled in (number - 2**31, number)], pa.int32())


def kept_repeated(table: DocumentTable, removed: list[int]) -> Iterator[pa.Table]:
    """Repeated documents that are trained on and have none of the removed numbers: ID, source, file and line."""
    numbers = _spelled(removed)
    columns = ["sequence_id", "written", "source", "file", "line"]
    for part in table.parts(columns, {"split": pa.array(["train"])}):
        repeated = pc.and_(pc.less(part["sequence_id"], 0), pc.greater(part["written"], 0))
        part = part.filter(pc.and_(repeated, pc.invert(pc.is_in(part["sequence_id"], value_set=numbers))))
        if part.num_rows:
            yield part


def weights_of_sinks(config: MemSinksConfig, kept: Iterable[pa.Table]) -> torch.Tensor:
    """What the loss of each sink adds to the mean share of their sinks that kept documents lose.

    A document of n sinks loses 1/n of them with each. So the shares of any set of sinks add up.

    Args:
        config: Of the model.
        kept: Rows with ``sequence_id``.

    Returns:
        float64 ``(n_sink,)``; their sum over all sinks is 1 if there are kept documents.
    """
    weights = torch.zeros(config.n_sink, dtype=torch.float64)
    documents = 0
    for part in kept:
        for mask in masks(config, torch.from_numpy(part["sequence_id"].to_numpy().copy())):
            share = 1 / mask.sum(1, keepdim=True).clamp(min=1).double()
            weights += (mask * share).sum(0)
            documents += len(mask)
    return weights / max(documents, 1)


def least_shared(candidates: torch.Tensor, weights: torch.Tensor, most: float) -> torch.Tensor:
    """Of some sinks those that others use least, as many as keep the mean share that others lose at or below a limit.

    Args:
        candidates: The removed documents' sinks, bool ``(n_sink,)``.
        weights: Of ``weights_of_sinks``.
        most: The limit, in [0, 1].

    Returns:
        bool ``(n_sink,)``: the first ones in the order of their weights, equal ones by number.
    """
    indices = candidates.nonzero().flatten()
    indices = indices[weights[indices].argsort(stable=True)]
    chosen = torch.zeros_like(candidates)
    chosen[indices[weights[indices].cumsum(0) <= most]] = True
    return chosen


def collateral(
    config: MemSinksConfig,
    kept: Iterable[pa.Table],
    removed: torch.Tensor,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Collateral:
    """What kept documents lose when some sinks are removed.

    Memory does not grow with the documents.

    Args:
        config: Of the model, before.
        kept: Rows of ``kept_repeated``. Documents that share an ID are counted one by one.
        removed: The sinks, bool ``(n_sink,)``.
        on_rows: Called with the number of rows done.
    """
    result = Collateral()
    for part in kept:
        ids = torch.from_numpy(part["sequence_id"].to_numpy().copy())
        counted = [(mask.sum(1), (mask & removed).sum(1)) for mask in masks(config, ids)]
        own, lost = (torch.cat(numbers) for numbers in zip(*counted, strict=True))
        shares = lost.double() / own.clamp(min=1)
        result.documents += len(ids)
        result.total += float(shares.sum())
        counts = torch.bincount((shares * _BINS).long(), minlength=_BINS + 1).tolist()
        result.bins = [old + new for old, new in zip(result.bins, counts, strict=True)]
        top = [row for row in shares.topk(min(WORST, len(ids))).indices.tolist() if lost[row]]
        places = [
            Place(float(shares[row]), int(lost[row]), int(own[row]), int(ids[row]), _place(part, row)) for row in top
        ]
        result.worst = heapq.nlargest(WORST, [*result.worst, *places])
        on_rows(len(ids))
    return result


def _place(part: pa.Table, row: int) -> str:
    source, file, line = (part[name][row].as_py() for name in ("source", "file", "line"))
    return f"{source}, {file}:{line}"


def numbers_of(rows: pa.Table, sinks_for: str) -> list[int]:
    """Distinct numbers of the documents among some rows that have sinks at all."""
    ids = rows["sequence_id"].to_numpy()
    return sorted({int(value) & DOCUMENT_BITS for value in (ids[ids < 0] if sinks_for == "repeated" else ids)})
