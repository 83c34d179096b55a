"""What `prepare` writes beside the streams: the document table, and the tokens of the documents that are scored.

Both go through the chosen documents in the order of the files, a bucket at a time, so that memory does not grow.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from litgpt_memsinks.prepare.manifest import DOCUMENTS, EVALUATION
from litgpt_memsinks.prepare.planning import Plan, Taker, read_tokens
from litgpt_memsinks.prepare.tokenizing import Done

DOCUMENT_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("key", pa.string()),
        ("digest", pa.uint64()),
        ("sequence_id", pa.int32()),
        ("tokens", pa.int64()),
        ("repeats", pa.int64()),
        ("written", pa.int64()),
    ]
)
EVALUATION_SCHEMA = pa.schema(
    [
        ("split", pa.string()),  # repeated or val
        ("source", pa.string()),
        ("digest", pa.uint64()),
        ("sequence_id", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)
_SCORED_TOKENS = 4_000_000  # in a row group


def write_tables(folder: Path, plan: Plan, takers: Sequence[Taker], units: Sequence[Done]) -> None:
    """Write ``documents.parquet`` and ``evaluation.parquet``.

    Args:
        folder: The prepared folder.
        plan: The plan.
        takers: All sets.
        units: All units, in order.
    """
    with (
        pq.ParquetWriter(folder / DOCUMENTS, DOCUMENT_SCHEMA) as documents,
        pq.ParquetWriter(folder / EVALUATION, EVALUATION_SCHEMA) as scored,
    ):
        places = Places(units)
        for bucket in plan.chosen:
            rows = bucket[np.argsort(bucket["order"])]
            if len(rows):
                documents.write_table(document_rows(rows, takers, places))
            for part in _by_tokens(rows[_is_scored(rows, takers)]):
                scored.write_table(scored_rows(part, takers, plan.token_files))


class Places:
    """File, line and key of documents by their number among all; asked for in ascending order.

    Args:
        units: All units, in order.
    """

    def __init__(self, units: Sequence[Done]) -> None:
        self.units = units
        self.starts = np.cumsum([0, *(unit.info.documents for unit in units)])
        self._keys: tuple[int, int, Iterator[str]] = (-1, 0, iter(()))  # unit, keys passed, the others

    def of(self, order: np.ndarray) -> tuple[list[str], list[int], list[str | None]]:
        """Files, lines and keys (``None`` where none is read)."""
        files: list[str] = []
        lines: list[int] = []
        keys: list[str | None] = []
        owner = np.searchsorted(self.starts, order, side="right") - 1
        for index in np.unique(owner).tolist():
            unit = self.units[index]
            rows = order[owner == index].astype(np.int64) - int(self.starts[index])
            records = unit.records(int(rows[0]), int(rows[-1]) + 1)
            files += [unit.unit.file.path] * len(rows)
            lines += records["line"][rows - rows[0]].tolist()
            keys += self._keys_of(index, rows.tolist())
        return files, lines, keys

    def _keys_of(self, index: int, rows: list[int]) -> list[str | None]:
        if not (self.units[index].folder / "keys.bin").stat().st_size:
            return [None] * len(rows)
        unit, position, keys = self._keys
        if unit != index:
            position, keys = 0, self.units[index].keys()
        found: list[str | None] = []
        for row in rows:
            while position < row:
                next(keys)
                position += 1
            found.append(next(keys))
            position += 1
        self._keys = (index, position, keys)
        return found


def document_rows(rows: np.ndarray, takers: Sequence[Taker], places: Places) -> pa.Table:
    """Rows of the document table."""
    files, lines, keys = places.of(rows["order"])
    columns = [
        _named(rows, [taker.split for taker in takers]),
        _named(rows, [taker.name for taker in takers]),
        files,
        lines,
        keys,
        rows["digest"],
        rows["id"],
        rows["length"].astype(np.int64),
        rows["times"].astype(np.int64),
        rows["written"].astype(np.int64),
    ]
    return pa.table(columns, schema=DOCUMENT_SCHEMA)


def scored_rows(rows: np.ndarray, takers: Sequence[Taker], token_files: Sequence[Path]) -> pa.Table:
    """Rows of the evaluation table."""
    places = zip(rows["unit"].tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True)
    columns = [
        _named(rows, ["repeated" if taker.split == "train" else "val" for taker in takers]),
        _named(rows, [taker.name for taker in takers]),
        rows["digest"],
        rows["id"],
        _lists([read_tokens(token_files[unit], offset, length) for unit, offset, length in places]),
    ]
    return pa.table(columns, schema=EVALUATION_SCHEMA)


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.ListArray:
    """A column of lists, without a Python object for each number."""
    ends = np.cumsum([0, *map(len, arrays)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.concatenate(arrays)))


def _is_scored(rows: np.ndarray, takers: Sequence[Taker]) -> np.ndarray:
    """Whether a document is scored: it repeats, or validates."""
    validates = np.array([taker.split == "val" for taker in takers])
    return (rows["id"] < 0) | validates[rows["taker"]]


def _named(rows: np.ndarray, names: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(rows["taker"]), pa.array(names)).cast(pa.string())


def _by_tokens(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows so that the tokens of each part fit into memory."""
    part = np.cumsum(rows["length"], dtype=np.int64) // _SCORED_TOKENS
    for value in np.unique(part):
        yield rows[part == value]
