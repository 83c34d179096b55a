"""Which documents are scored, and how do they become rows? Each alone, from its first token, over one block.

`prepare` writes the tokens of the repeated and the validation documents beside the stream (``evaluation.parquet``).
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from litgpt_memsinks.document_ids.ids import mix
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.metrics import IGNORED
from litgpt_memsinks.prepare.manifest import EVALUATION, Manifest

ScoredSplit = Literal["repeated", "val"]
_COLUMNS = ("split", "source", "digest", "sequence_id", "tokens")


@dataclass
class Scored:
    """Documents to score.

    Attributes:
        tokens: Tokens of each document, int64 ``(n_tokens,)``.
        sequence_ids: ID of each document, int64 ``(n_documents,)``.
        digests: xxh3_64 of each document's tokens; empty if they were not asked for.
        sources: Source or validation set of each document; empty if they were not asked for.
    """

    tokens: list[torch.Tensor]
    sequence_ids: torch.Tensor
    digests: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def read_scored(data_path: Path, split: ScoredSplit, limit: int | None = None) -> Scored:
    """Read the documents of a prepared folder that are scored.

    Args:
        data_path: The prepared folder.
        split: Repeated or validation documents.
        limit: At most so many.

    Raises:
        MemSinksError: If the folder is not whole or there is no such document.
    """
    Manifest.read(data_path)
    if not (data_path / EVALUATION).is_file():
        raise MemSinksError(f"{str(data_path / EVALUATION)!r} is missing. Copy the folder again, or prepare it anew.")
    table = pq.read_table(data_path / EVALUATION, filters=[("split", "=", split)])
    table = table.slice(0, limit)
    if not table.num_rows:
        raise MemSinksError(
            f"{str(data_path)!r} has no {split} documents to score. Prepare it with --repeated_documents and --repeats."
        )
    return Scored(
        [torch.tensor(tokens) for tokens in table["tokens"].to_pylist()],
        torch.tensor(table["sequence_id"].to_pylist()),
        table["digest"].to_pylist(),
        table["source"].to_pylist(),
    )


def count_scored(path: Path, split: ScoredSplit) -> int:
    """Number of documents in a file of scored ones.

    Raises:
        MemSinksError: If the file is damaged or of other columns.
    """
    with _reading(path) as file:
        groups = (file.read_row_group(group, columns=["split"]) for group in range(file.num_row_groups))
        return sum(pc.sum(pc.equal(group["split"], split)).as_py() or 0 for group in groups)


def sample_scored(
    path: Path, numbers: Mapping[ScoredSplit, int], seed: int, longest: int
) -> dict[tuple[str, str], Scored]:
    """Draw documents of every source and validation set, without reading the tokens of the others.

    The draw depends on a document's own digest: it is the same for every folder that scores the same documents. Memory
    is that of one row group, about four million tokens, besides what is drawn.

    Args:
        path: The file of the scored documents.
        numbers: How many of each source or set of a split; all if there are fewer.
        seed: Of the draw.
        longest: Tokens of a document that are kept, its first ones.

    Returns:
        (split, source) to its documents, in an order that only the seed decides. Sources without any are left out.

    Raises:
        MemSinksError: If the file is damaged or of other columns.
    """
    with _reading(path) as file:
        return _read_drawn(file, _draw(file, numbers, seed), longest)


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file of scored documents, and say in one line what is wrong with it."""
    try:
        with pq.ParquetFile(path) as file:
            if lacking := [name for name in _COLUMNS if name not in file.schema_arrow.names]:
                raise MemSinksError(f"{str(path)!r} lacks the columns {lacking}. Copy it again, or prepare anew.")
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemSinksError(f"{str(path)!r} cannot be read ({reason}). Copy it again, or prepare anew.") from error


def _draw(
    file: pq.ParquetFile, numbers: Mapping[ScoredSplit, int], seed: int
) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """Key, row group and row of the documents with the smallest keys."""
    drawn: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["split", "source", "digest"], use_threads=False)
        keys = mix(table["digest"].to_numpy(), seed, "watch")
        for split, number in numbers.items():
            of_split = pc.equal(table["split"], split)
            for source in pc.unique(table["source"].filter(of_split)).to_pylist():
                rows = np.flatnonzero(pc.and_(of_split, pc.equal(table["source"], source)).to_numpy())
                rows = rows[np.argsort(keys[rows], kind="stable")[:number]]
                here = zip(keys[rows].tolist(), repeat(group), rows.tolist(), strict=False)
                drawn[split, source] = heapq.nsmallest(number, [*drawn.get((split, source), []), *here])
    return {place: drawn[place] for place in sorted(drawn) if drawn[place]}


def _read_drawn(
    file: pq.ParquetFile, drawn: dict[tuple[str, str], list[tuple[int, int, int]]], longest: int
) -> dict[tuple[str, str], Scored]:
    wanted = sorted({(group, row) for places in drawn.values() for _, group, row in places})
    found: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
    for group in sorted({group for group, _ in wanted}):
        rows = [row for other, row in wanted if other == group]
        table = file.read_row_group(group, columns=["tokens", "sequence_id"], use_threads=False).take(rows)
        for row, tokens, sequence_id in zip(rows, table["tokens"], table["sequence_id"].to_pylist(), strict=True):
            found[group, row] = torch.tensor(tokens.values.slice(0, longest).to_numpy(), dtype=torch.int64), sequence_id
    return {
        place: Scored(
            [found[group, row][0] for _, group, row in rows],
            torch.tensor([found[group, row][1] for _, group, row in rows]),
        )
        for place, rows in drawn.items()
    }


def pad(documents: Sequence[torch.Tensor], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make rows of inputs and targets, one document each, from its first token over at most one block.

    Padding is on the right, where causal attention keeps it from changing anything that is scored.

    Args:
        documents: Tokens, each ``(n_tokens,)``.
        block_size: Most targets of a document.

    Returns:
        Inputs and targets, int64 ``(B, T)``; padded targets are ``IGNORED``.
    """
    rows = [document[: block_size + 1] for document in documents]
    longest = max(max(len(row) for row in rows) - 1, 1)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = row[:-1]
        targets[index, : len(row) - 1] = row[1:]
    return inputs, targets
