"""Reading a prepared folder's tables and tokenizer; the document table is never loaded as a whole.

A table may have more rows than fit into memory. A question names its columns and a filter; row groups are read one
after another, first the columns of the filter, and the others only where it lets a row through.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import DOCUMENTS, TOKENIZER, Manifest, tokenizer_fingerprint
from litgpt_memsinks.prepare.tables import DOCUMENT_SCHEMA
from litgpt_memsinks.prepare.tokenizing import load_tokenizer

COLUMNS = DOCUMENT_SCHEMA.names
Where = Mapping[str, pa.Array]
"""A filter: name of a column to the values that it lets through, for all of some columns."""


class ParquetFile:
    """A Parquet file of known columns, read only.

    pyarrow's own datasets are not used: their threads now and then abort the process at its end (apache/arrow, "Scanner
    crashing occasionally").

    Args:
        path: The file.
        schema: Columns that it must have.

    Raises:
        MemSinksError: If it is missing, no Parquet file, or of other columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        if not path.is_file():
            raise MemSinksError(f"{str(path)!r} is missing. Copy the folder again, or prepare it again.")
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        if lacking := [name for name in schema.names if name not in self._file.schema_arrow.names]:
            raise MemSinksError(
                f"{str(path)!r} lacks the columns {lacking}. Copy the folder again, or prepare it again."
            )

    def parts(self, columns: Sequence[str], where: Where) -> Iterator[pa.Table]:
        """Stream some columns of the rows that a filter lets through, in the order of the file, a row group at a time.

        Raises:
            MemSinksError: If the file cannot be read.
        """
        try:
            for group in range(self._file.num_row_groups):
                mask = self._mask(group, where)
                if pc.any(mask).as_py():
                    table = self._file.read_row_group(group, columns=list(columns), use_threads=False)
                    yield table.select(columns).filter(mask)
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.path, error) from error

    def count(self, where: Where) -> int:
        """Number of rows that a filter lets through.

        Raises:
            MemSinksError: If the file cannot be read.
        """
        try:
            masks = (self._mask(group, where) for group in range(self._file.num_row_groups))
            return sum(pc.sum(mask).as_py() or 0 for mask in masks)
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.path, error) from error

    def _mask(self, group: int, where: Where) -> pa.Array:
        """Which rows of a row group a filter lets through."""
        mask = pa.array(np.ones(self._file.metadata.row_group(group).num_rows, dtype=np.bool_))
        if not where:
            return mask
        table = self._file.read_row_group(group, columns=list(where), use_threads=False)
        for name, values in where.items():
            mask = pc.and_(mask, pc.is_in(table.column(name), value_set=values))
        return mask


class DocumentTable(ParquetFile):
    """The document table of a prepared folder, read only.

    Args:
        data_path: The prepared folder.

    Raises:
        MemSinksError: If the table is missing, or is none.
    """

    def __init__(self, data_path: Path) -> None:
        super().__init__(data_path / DOCUMENTS, DOCUMENT_SCHEMA)

    def rows(self, where: Where, limit: int | None = None) -> list[dict[str, Any]]:
        """The first rows that a filter lets through, as dictionaries.

        Raises:
            MemSinksError: If the table cannot be read.
        """
        found: list[dict[str, Any]] = []
        for part in self.parts(COLUMNS, where):
            found += part.slice(0, None if limit is None else limit - len(found)).to_pylist()
            if limit is not None and len(found) >= limit:
                break
        return found


def rows_of(split: str) -> Where:
    """The filter for the documents of a split's folder: train, val or val_NAME."""
    if split in ("train", "val"):
        return {"split": pa.array([split])}
    return {"split": pa.array(["val"]), "source": pa.array([split.removeprefix("val_")])}


def with_digests(digests: npt.NDArray[np.uint64] | Sequence[int]) -> Where:
    """The filter for documents with one of these digests."""
    return {"digest": pa.array(np.asarray(digests, dtype=np.uint64))}


def with_ids(ids: npt.NDArray[np.int32] | Sequence[int]) -> Where:
    """The filter for documents with one of these sequence IDs."""
    return {"sequence_id": pa.array(np.asarray(ids, dtype=np.int32))}


def load_folders_tokenizer(data_path: Path) -> Tokenizer:
    """The tokenizer that made a folder's tokens.

    Raises:
        MemSinksError: If it is missing or cannot be loaded.
    """
    folder = data_path / TOKENIZER
    tokenizer_fingerprint(folder)  # says what to do if it is missing
    return load_tokenizer(folder, Manifest.read(data_path).special_tokens)


def damaged(path: Path, error: Exception) -> MemSinksError:
    """The error for a file that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return MemSinksError(f"{str(path)!r} cannot be read ({reason}). Copy the folder again, or prepare it again.")
