"""Which documents are in a prepared folder, which sequence IDs they have, and which repeat."""

import json as json_module
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from litgpt.tokenizer import Tokenizer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt_memsinks.corpus.corpus_files import corpus_files, read_documents
from litgpt_memsinks.corpus.mixture import Format, Reading
from litgpt_memsinks.document_ids.ids import DOCUMENT_BITS, digest
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.encoding import Encoder
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepared.document_table import (
    COLUMNS,
    DocumentTable,
    Where,
    load_folders_tokenizer,
    with_digests,
    with_ids,
)

_TEXTS = 4096  # looked up with one pass through the table
_CORPORA = {".jsonl", ".ndjson", ".json", ".parquet"}
_NAMED = 10  # sources named in an error
Row = dict[str, Any]


def lookup(
    data_path: Path,
    text: str = "",
    file: Path | None = None,
    id: int | None = None,
    source: str = "",
    text_field: str = "text",
    format: Format = "auto",
    limit: int = 20,
    json: bool = False,
) -> int:
    """Say which documents are in a prepared folder: where they are from, their sequence ID, how often they occur.

    Give one of text, file, id and source. The answer has the columns of the document table, see `manifest.py`; for
    `file` a row per text, with its place and whether it was found. It is a table on a terminal, else lines of
    tab-separated values with a header, or with json an object per line. Like grep, it ends with status 1 if nothing
    at all is found.

    Args:
        data_path: Folder that `prepare` wrote.
        text: A document's whole text.
        file: Which of its texts are in the folder? A corpus as `prepare` reads it; any other file is one text, found
            with or without its last line ends.
        id: A sequence ID, as it stands in the stream, or without its sign bit.
        source: Name of a source or validation set: which documents did it give?
        text_field: Field of the text in the objects of `file`.
        format: Format of `file`: `separated` if a text file holds many documents.
        limit: Documents to show for an ID or a source; 0 for all.
        json: Print JSON lines.

    Returns:
        How many documents were shown, or how many texts of `file` were found.

    Raises:
        MemSinksError: If nothing is found, or for bad input.
    """
    _check_selector(text=text, file=file, id=id, source=source)
    if limit < 0:
        raise MemSinksError(f"limit is {limit}, but it must be at least 0, which shows all.")
    manifest = Manifest.read(data_path)
    table = DocumentTable(data_path)
    if source and source not in manifest.sources:
        raise MemSinksError(f"There is no source {source!r} in {str(data_path)!r}. It has {some(manifest.sources)}.")
    if text:
        return _find_text(table, manifest, data_path, text, json)
    if file is not None:
        return _find_file(table, manifest, data_path, reading_of(file, text_field, format), json)
    if id is not None:
        where, what = with_ids(spellings(id)), f"with the ID {id}"
        hint = " With ID noise, it may be a random one." if manifest.recipe["id_noise"] else ""
    else:
        where, what, hint = {"source": pa.array([source])}, f"of the source {source!r}", ""
    return _find_rows(table, where, f"{what} in {str(data_path)!r}", hint, limit, json)


def spellings(sequence_id: int) -> list[int]:
    """The IDs that a user may mean: of an ID without its sign, the documents that repeat are meant, too.

    Raises:
        MemSinksError: If no document can have it.
    """
    if sequence_id == 0 or not -(2**31) < sequence_id <= DOCUMENT_BITS:
        raise MemSinksError(f"id is {sequence_id}, but sequence IDs are in -2147483647..-1 and 1..2147483647.")
    return [sequence_id] if sequence_id < 0 else [sequence_id, sequence_id - 2**31]


def reading_of(file: Path, text_field: str, format: Format) -> Reading:
    """How a user's file is read: unlike a corpus, a text file needs no settings to be one text."""
    corpus = any(suffix in _CORPORA for suffix in file.suffixes[-2:])
    return Reading(
        path=str(file),
        text_field=text_field,
        format="text" if format == "auto" and file.is_file() and not corpus else format,
    )


def _check_selector(**selectors: Any) -> None:
    given = [name for name, value in selectors.items() if value not in (None, "")]
    if len(given) != 1:
        raise MemSinksError(f"Give one of --text, --file, --id and --source, not {' and '.join(given) or 'none'}.")


def some(names: Sequence[str] | Any) -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:_NAMED]) + (f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")


# ------------------------------------------------------------------------------------------------------- by ID, source


def _find_rows(table: DocumentTable, where: Where, what: str, hint: str, limit: int, json: bool) -> int:
    rows = table.rows(where, limit or None)
    if not rows:
        raise MemSinksError(f"There is no document {what}.{hint}")
    _Printer(COLUMNS, json).print(rows)
    if limit and len(rows) == limit and (total := table.count(where)) > limit:
        _note(f"These are {limit:,} of {total:,} documents {what}; --limit 0 shows all.")
    return len(rows)


# --------------------------------------------------------------------------------------------------------------- texts


def text_digests(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """Digests of texts as `prepare` makes them, without BOS and EOS."""
    front = int(tokenizer.use_bos)
    return [digest(tokens[front:-1]) for tokens in Encoder(tokenizer)(texts)]


def _find_text(table: DocumentTable, manifest: Manifest, data_path: Path, text: str, json: bool) -> int:
    rows = table.rows(with_digests(_digests(data_path)([text])))
    if not rows:
        raise MemSinksError(f"No document of {str(data_path)!r} has exactly this text.{canary_hint(manifest)}")
    _Printer(COLUMNS, json).print(rows)
    return len(rows)


def _find_file(table: DocumentTable, manifest: Manifest, data_path: Path, reading: Reading, json: bool) -> int:
    printer = _Printer(["text", "found", *COLUMNS], json)
    asked = hits = 0
    for batch in find_texts(table, data_path, reading):
        rows = [_answer(place, row) for place, _, row in batch]
        printer.print(rows)
        asked, hits = asked + len(rows), hits + sum(row["found"] for row in rows)
    if not hits:
        raise MemSinksError(f"None of the {asked:,} texts is a document of {str(data_path)!r}.{canary_hint(manifest)}")
    _note(f"{hits:,} of {asked:,} texts are documents of {str(data_path)!r}.{canary_hint(manifest)}")
    return hits


def find_texts(
    table: DocumentTable, data_path: Path, reading: Reading
) -> Iterator[list[tuple[str, str, dict[str, Any] | None]]]:
    """Look the texts of a corpus up, some thousand at a time.

    Args:
        table: The document table of `data_path`.
        data_path: The prepared folder, for its tokenizer.
        reading: The corpus.

    Yields:
        Place and text of each document, and its row of the table, ``None`` if it has none.

    Raises:
        MemSinksError: If the corpus, the table or the tokenizer cannot be read.
    """
    digests = _digests(data_path)
    texts = _texts(reading)
    while batch := list(islice(texts, _TEXTS)):
        values = digests([text for _, text in batch])
        # editors end a file with a line end that the document had not
        others = digests([text.rstrip("\r\n") for _, text in batch]) if reading.format == "text" else values
        known = {row["digest"]: row for row in table.rows(with_digests([*values, *others]))}
        yield [
            (place, text, known.get(value) or known.get(other))
            for (place, text), value, other in zip(batch, values, others, strict=True)
        ]


def _texts(reading: Reading) -> Iterator[tuple[str, str]]:
    """Place and text of each document of a corpus."""
    for file in corpus_files(reading):
        for document in read_documents(file, reading):
            yield f"{file.path}:{document.line}", document.text


def _answer(place: str, row: Row | None) -> Row:
    return {"text": place, "found": row is not None, **(row or dict.fromkeys(COLUMNS))}


def _digests(data_path: Path) -> Any:
    tokenizer = load_folders_tokenizer(data_path)
    return lambda texts: text_digests(texts, tokenizer)


def canary_hint(manifest: Manifest) -> str:
    """Why a text that was read may not be found."""
    names = [name for name, source in manifest.recipe["sources"].items() if source["canary_tokens"]]
    if not names:
        return ""
    return f" Documents of {some(names)} have canaries appended, so they are found by --id or --source only."


# -------------------------------------------------------------------------------------------------------------- output


class _Printer:
    """Prints rows as people or programs read them.

    Args:
        columns: Names of the values.
        json: Whether to print an object per line.
    """

    def __init__(self, columns: list[str], json: bool) -> None:
        self.columns, self.json = columns, json
        self.console = Console()
        self._header = True

    def print(self, rows: list[Row]) -> None:
        """Print some rows; further ones may follow."""
        if self.json:
            lines: Iterator[str] = (json_module.dumps(row, ensure_ascii=False) for row in rows)
        elif self.console.is_terminal:
            self.console.print(self._table(rows))
            return
        else:
            lines = ("\t".join(_cell(row[name]) for name in self.columns) for row in rows)
            if self._header:
                print("\t".join(self.columns))
                self._header = False
        sys.stdout.writelines(f"{line}\n" for line in lines)

    def _table(self, rows: list[Row]) -> Table:
        table = Table(box=None)
        for name in self.columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(row[name])) for name in self.columns))  # Text: paths may look like markup
        return table


def _cell(value: Any) -> str:
    r"""A value on one line: tabs and line ends are written as in C, and a value that is not there is empty."""
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool | np.bool_) else str(value)
    return text.encode("unicode_escape").decode() if not text.isprintable() else text


def _note(text: str) -> None:
    print(text, file=sys.stderr)
