"""Which documents does the user mean? What is said on the command line → document numbers, by the document table.

The commands that remove or keep the sinks of some documents share this. Whatever is asked for and not trained on is
said: never is less chosen than was asked for without a word.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from litgpt_memsinks.corpus.mixture import Format
from litgpt_memsinks.document_ids.ids import DOCUMENT_BITS
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.tables import DOCUMENT_SCHEMA
from litgpt_memsinks.prepared.document_table import (
    COLUMNS,
    DocumentTable,
    Where,
    load_folders_tokenizer,
    with_digests,
    with_ids,
)
from litgpt_memsinks.prepared.lookup import canary_hint, find_texts, reading_of, some, spellings, text_digests
from litgpt_memsinks.prepared.similar import SEARCHED, nearest

Missing = Literal["stop", "pass"]
_COMPARED = 10  # missing texts whose near-duplicates are shown


@dataclass
class Chosen:
    """Documents that were chosen, at least one."""

    rule: str
    """One sentence that says by which rule"""
    ids: list[int]
    """Their distinct numbers, sorted: the low 31 bits of sequence IDs, in [1, 2**31)"""
    rows: pa.Table = field(default_factory=lambda: DOCUMENT_SCHEMA.empty_table())
    """Their rows of the document table, ``tables.DOCUMENT_SCHEMA``; none if no prepared folder was given"""
    missing: list[str] = field(default_factory=list)
    """What was asked for and is not in the training stream: IDs, places of texts, or a text"""


def choose(
    data_path: Path | None,
    ids: str = "",
    source: str = "",
    documents: Path | None = None,
    text: str = "",
    text_field: str = "text",
    format: Format = "auto",
    missing: Missing = "stop",
) -> Chosen:
    """Choose documents by one of `ids`, `source`, `documents` and `text`.

    Args:
        data_path: Folder that `prepare` wrote, and that the model was trained on. Only with `ids` may it be ``None``;
            then the IDs are believed.
        ids: Sequence IDs with commas or spaces between them, with or without their sign bit; or @ and the path of a
            file of them.
        source: Name of a source: all its documents.
        documents: A corpus: each of its texts. A file that is none is one text.
        text: A document's whole text.
        text_field: Field of the text in the objects of `documents`.
        format: Format of `documents`.
        missing: What is asked for and not found: stop, or pass over it.

    Raises:
        MemSinksError: If not one of them is given, if something asked for is not found and `missing` is stop, if
            nothing is found, or for bad input.
    """
    _check_one(ids=ids, source=source, documents=documents, text=text)
    if missing not in ("stop", "pass"):
        raise MemSinksError(f"missing is {missing!r}. Choose from: stop, pass.")
    if data_path is None:
        if not ids:
            raise MemSinksError("Without --data_path only --ids can be chosen. Name the folder that `prepare` wrote.")
        numbers = sorted({number & DOCUMENT_BITS for number in read_ids(ids)})
        return Chosen(f"the documents with the IDs {some(list(map(str, numbers)))}", numbers)
    manifest = Manifest.read(data_path)
    table = DocumentTable(data_path)
    if ids:
        chosen = _by_ids(table, read_ids(ids))
    elif source:
        chosen = _by_source(table, manifest, data_path, source)
    elif documents is not None:
        chosen = _by_documents(table, data_path, documents, text_field, format)
    else:
        chosen = _by_text(table, data_path, text)
    _check_missing(chosen, manifest, data_path, missing)
    return chosen


def read_ids(ids: str) -> list[int]:
    """The sequence IDs in a string, or in the file that it names after an @.

    Raises:
        MemSinksError: If one of them is no sequence ID, there is none, or the file cannot be read.
    """
    text = ids
    if ids.startswith("@"):
        try:
            text = Path(ids[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise MemSinksError(
                f"ids is {ids!r}, which cannot be read as text ({reason}). Name another file."
            ) from error
    found = []
    for word in re.split(r"[\s,]+", text.strip(" \t\r\n,")):
        if not re.fullmatch(r"[+-]?[0-9]{1,11}", word):
            raise MemSinksError(f"ids has {word[:40]!r}, which is no sequence ID. Give whole numbers, such as 5,17.")
        found.append(int(word))
        spellings(found[-1])  # refuses what no document can have
    return found


def _check_one(**selectors: Any) -> None:
    given = [f"--{name}" for name, value in selectors.items() if value not in (None, "")]
    if len(given) != 1:
        raise MemSinksError(
            f"Give one of --ids, --source, --documents and --text, not {' and '.join(given) or 'none'}."
        )


def _trained(table: DocumentTable, where: Where) -> pa.Table:
    """Rows of documents that are in the training stream: of others, sinks hold nothing."""
    parts = table.parts(COLUMNS, {**where, "split": pa.array(["train"])})
    rows = pa.concat_tables([DOCUMENT_SCHEMA.empty_table(), *(part.cast(DOCUMENT_SCHEMA) for part in parts)])
    return rows.filter(pc.greater(rows["written"], 0))


def _chosen(rule: str, rows: pa.Table, missing: list[str]) -> Chosen:
    numbers = rows["sequence_id"].to_numpy() & DOCUMENT_BITS
    return Chosen(rule, sorted(set(numbers.tolist())), rows, missing)


def _by_ids(table: DocumentTable, asked: list[int]) -> Chosen:
    spelled = sorted({spelling for number in asked for spelling in spellings(number)})
    rows = _trained(table, with_ids(spelled))
    found = set(rows["sequence_id"].to_pylist())
    lacking = [str(number) for number in dict.fromkeys(asked) if not found & set(spellings(number))]
    return _chosen(f"the documents with the IDs {some([str(n) for n in dict.fromkeys(asked)])}", rows, lacking)


def _by_source(table: DocumentTable, manifest: Manifest, data_path: Path, source: str) -> Chosen:
    known = [name for name, info in manifest.sources.items() if info.split == "train"]
    if source not in known:
        raise MemSinksError(f"{str(data_path)!r} has no source {source!r} to train on. It has {some(known)}.")
    return _chosen(f"all documents of the source {source!r}", _trained(table, {"source": pa.array([source])}), [])


def _by_documents(table: DocumentTable, data_path: Path, file: Path, text_field: str, format: Format) -> Chosen:
    rows: list[pa.Table] = []
    lacking: list[str] = []
    near: dict[str, str] = {}
    for batch in find_texts(table, data_path, reading_of(file, text_field, format)):
        found = [row for _, _, row in batch if _is_trained(row)]
        rows.append(pa.Table.from_pylist(found, DOCUMENT_SCHEMA))
        for place, text, row in batch:
            if not _is_trained(row):
                lacking.append(place)
                near |= {place: text} if len(near) < _COMPARED else {}
    if not rows:
        raise MemSinksError(f"{str(file)!r} holds no text. Name a file of the documents that you mean.")
    _tell_similar(data_path, near)
    return _chosen(f"the documents whose texts are in {str(file)!r}", pa.concat_tables(rows), lacking)


def _by_text(table: DocumentTable, data_path: Path, text: str) -> Chosen:
    rows = _trained(table, with_digests(text_digests([text], load_folders_tokenizer(data_path))))
    shown = repr(text if len(text) <= 60 else f"{text[:59]}…")
    if not rows.num_rows:
        _tell_similar(data_path, {shown: text})
    return _chosen(f"the document with the text {shown}", rows, [] if rows.num_rows else [shown])


def _is_trained(row: dict[str, Any] | None) -> bool:
    return row is not None and row["split"] == "train" and row["written"] > 0


def _check_missing(chosen: Chosen, manifest: Manifest, data_path: Path, missing: Missing) -> None:
    """Refuse to choose less than was asked for, or say that it is less."""
    lacking = len(chosen.missing)
    if not chosen.ids:
        raise MemSinksError(
            f"None of {chosen.rule} is in the training stream of {str(data_path)!r}.{canary_hint(manifest)} Nothing "
            "was trained on it, so there is nothing to choose: check --data_path."
        )
    if lacking and missing == "stop":
        raise MemSinksError(
            f"{lacking:,} of what was asked for is not in the training stream of {str(data_path)!r}: "
            f"{some(chosen.missing)}.{canary_hint(manifest)} Correct it, or pass over it with --missing pass."
        )
    if lacking:
        chosen.rule += f", {lacking:,} of which {'is' if lacking == 1 else 'are'} not in the training stream"
        print(f"Passed over, because not trained on: {some(chosen.missing)}.", file=sys.stderr)


def _tell_similar(data_path: Path, texts: dict[str, str]) -> None:
    """Say which repeated documents nearly are the texts that were not found."""
    if not texts:
        return
    for place, found in zip(texts, nearest(data_path, list(texts.values())), strict=True):
        shown = ", ".join(f"{near.sequence_id} of {near.source} ({near.similarity:.0%})" for near in found)
        said = f"Similar to it: {shown}" if shown else "Nothing similar was found"
        print(f"{place} is no document that was trained on. {said}; {SEARCHED}.", file=sys.stderr)
