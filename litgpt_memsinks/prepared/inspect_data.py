"""What is in a prepared folder: a summary of its manifest, and what a model sees in one training block."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from litgpt.tokenizer import Tokenizer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt_memsinks.document_ids.ids import digest
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.chunks import read_index
from litgpt_memsinks.prepare.manifest import Manifest, SourceInfo
from litgpt_memsinks.prepared.document_table import (
    DocumentTable,
    load_folders_tokenizer,
    rows_of,
    with_digests,
    with_ids,
)

_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")
_JOINED = 16  # segments with one ID that are tried as one document
_WIDTH = 160  # of tables that are not on a terminal
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
Row = dict[str, Any]


def inspect(data_path: Path, block: int | None = None, split: str = "train", block_size: int = 2048) -> None:
    """Show what a prepared folder holds, or one training block with its documents told apart.

    The summary comes from the manifest alone, so it takes no longer for a large folder.

    Args:
        data_path: Folder that `prepare` wrote.
        block: Number of a training block, from 0, in stored order (training shuffles them): shows its documents.
        split: Folder of the block: train, val, or val_NAME.
        block_size: Tokens in a training row, T; a block has T + 1.

    Raises:
        MemSinksError: If the folder is not prepared, or the block or split is not there.
    """
    manifest = Manifest.read(data_path)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if block is None:
        _summarise(console, data_path, manifest)
        return
    if split not in manifest.splits:
        raise MemSinksError(f"There is no split {split!r} in {str(data_path)!r}. It has {', '.join(manifest.splits)}.")
    found = read_block(data_path / split, block, block_size)
    tokenizer = load_folders_tokenizer(data_path)
    pieces = documents_of(found, tokenizer, DocumentTable(data_path), split)
    _print_line(
        console, f"Block {block:,} of {found.blocks:,} in {split}: {len(found.pairs):,} tokens of {found.place}", ""
    )
    for number, piece in enumerate(pieces, start=1):
        style = _STYLES[number % len(_STYLES)]
        _print_line(console, f"── document {number}: {piece.header()} ──", f"bold {style}")
        _print_line(console, decode(piece.tokens, tokenizer), style)


# ------------------------------------------------------------------------------------------------------------- summary


def _summarise(console: Console, folder: Path, manifest: Manifest) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _print_line(console, f"{folder}: {size / 1e6:,.1f} MB, format {manifest.format_version}", "bold")
    for table in (_splits_table(manifest), _reading_table(manifest), _sources_table(manifest)):
        console.print(table)
    for line in _notes(manifest):
        _print_line(console, line, "")


def _splits_table(manifest: Manifest) -> Table:
    table = _table("split", "documents", "distinct", "repeated", "tokens", "of repeated", "share", "chunks")
    for name, split in manifest.splits.items():
        share = f"{split.repeated_tokens / max(split.tokens, 1):.1%}"
        counts = (split.written, split.documents, split.repeated_documents, split.tokens, split.repeated_tokens)
        _add(table, name, *counts, share, len(split.chunks))
    return table


def _reading_table(manifest: Manifest) -> Table:
    """What was read for each source."""
    table = _table("source", "format", "files", "bytes", "read", "filtered", "empty", "bad")
    for name, info in manifest.sources.items():
        counts = (info.files, info.bytes, info.read, info.filtered, info.empty, info.bad)
        _add(table, name, ", ".join(info.format), *counts)
    return table


def _sources_table(manifest: Manifest) -> Table:
    """What each source gave."""
    table = _table("source", "split", "documents", "tokens", "repeats", "share", "overlap", "near-duplicates")
    for name, info in manifest.sources.items():
        share = f"{info.written_tokens / max(manifest.splits[info.split].tokens, 1):.1%}"
        repeats, dropped = _repeats(name, info, manifest), (info.overlap, info.near_duplicates_dropped)
        _add(table, name, info.split, info.documents, info.tokens, repeats, share, *dropped)
    return table


def _repeats(name: str, info: SourceInfo, manifest: Manifest) -> str:
    """How often a source's documents occur: as the recipe says, or on average as the files hold them."""
    if info.documents and not info.written:
        return "left out"
    fixed = manifest.recipe["sources"].get(name, {}).get("repeats")
    return f"×{fixed}" if fixed is not None else f"×{info.written / max(info.documents, 1):.3g}"


def _notes(manifest: Manifest) -> list[str]:
    recipe = manifest.recipe
    schemes = {name: source["ids"] for name, source in recipe["sources"].items()}
    canaries = {name: source["canary_tokens"] for name, source in recipe["sources"].items() if source["canary_tokens"]}
    lines = [
        f"IDs: {', '.join(f'{name} by {scheme}' for name, scheme in schemes.items())}; noise {recipe['id_noise']:.1%}; "
        f"{manifest.colliding_pairs:,} pairs of documents share one by chance",
        f"Exact copies in the training corpora: {manifest.duplicates:,}. Seed {recipe['seed']}"
        + (". Repeated documents are left out of training" if recipe["leave_out_repeated"] else ""),
        f"Tokenizer: {manifest.tokenizer_sha256[:12]}, largest token {manifest.max_token:,}",
        f"Made by {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
    ]
    lines += [f"Stream {name}: {split.digest}" for name, split in manifest.splits.items()]
    lines += [f"Canaries: {number} random tokens behind each document of {name}" for name, number in canaries.items()]
    for name, info in manifest.sources.items():
        lines += [f"Bad in {name}: {place}" for place in info.first_bad]
        if info.without_field:
            lines.append(f"{info.without_field:,} documents of {name} lack a field of include or exclude")
    return lines


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=name != "format")
    return table


def _add(table: Table, *values: Any) -> None:
    table.add_row(*(Text(f"{value:,}" if isinstance(value, int) else str(value)) for value in values))


def _print_line(console: Console, text: str, style: str) -> None:
    """Print text as it is: nothing in it is markup, and nothing in it commands a terminal."""
    text = text.translate(_CONTROLS)
    if console.is_terminal:
        console.print(Text(text, style), soft_wrap=True)
    else:
        print(text)


# ----------------------------------------------------------------------------------------------------------- one block


@dataclass
class Block:
    """A training block as litdata cuts it."""

    pairs: npt.NDArray[np.int32]
    """Tokens and sequence IDs, shape ``(block_size + 1, 2)``"""
    blocks: int
    """Blocks in the split"""
    place: str
    """Where it lies"""


def read_block(folder: Path, number: int, block_size: int) -> Block:
    """Read the n-th block of a split without reading its chunk. Blocks do not cross chunks.

    Raises:
        MemSinksError: If there is no such block, or its chunk is not whole.
    """
    if block_size < 1:
        raise MemSinksError(f"block_size is {block_size}, but it must be at least 1.")
    size = block_size + 1
    entries = read_index(folder)["chunks"]
    counts = [entry["dim"] // (2 * size) for entry in entries]
    if not 0 <= number < sum(counts):
        raise MemSinksError(f"block is {number}, but {str(folder)!r} has {sum(counts):,} of {size:,} tokens, from 0.")
    last = np.cumsum(counts)
    chunk = int(np.searchsorted(last, number, side="right"))
    start = (number - int(last[chunk]) + counts[chunk]) * size
    path = folder / entries[chunk]["filename"]
    header = 4 * (entries[chunk]["chunk_size"] + 2)
    try:
        pairs = np.fromfile(path, dtype="<i4", count=2 * size, offset=header + 8 * start)
    except OSError as error:
        raise MemSinksError(f"{str(path)!r} cannot be read: {error.strerror}. Copy the folder again.") from error
    if len(pairs) < 2 * size:
        raise MemSinksError(f"{str(path)!r} is not whole. Copy the folder again, or prepare it.")
    return Block(pairs.reshape(-1, 2), sum(counts), f"{path.name}, from its token {start:,}")


@dataclass
class Piece:
    """A document, or what a block has of one."""

    start: int
    """First token in the block"""
    tokens: npt.NDArray[np.int32]
    """Its tokens"""
    sequence_id: int
    """ID of its first token"""
    row: Row | None = None
    """Its row of the document table, if it is known"""
    whole: bool = False
    """Whether all of it is in the block"""
    namesakes: int = 0
    """Documents of the table with this ID"""

    def header(self) -> str:
        """What is known about it, on one line."""
        parts = [f"id {self.sequence_id}", *self._origin(), f"{len(self.tokens):,} tokens in this block"]
        return ", ".join(part for part in parts if part)

    def _origin(self) -> list[str]:
        if self.row is None:
            reason = "an ID that the table does not have (noise?)" if not self.namesakes else ""
            return [reason or f"one of {self.namesakes:,} documents with this ID"]
        noise = (
            "" if self.row["sequence_id"] == self.sequence_id else f"a random ID instead of {self.row['sequence_id']}"
        )
        shared = f"of {self.namesakes:,} documents with this ID" if self.namesakes > 1 else ""
        size = "whole" if self.whole else f"a part of {self.row['tokens']:,} tokens"
        place = f"{self.row['file']}:{self.row['line']}"
        return [noise, shared, f"×{self.row['repeats']:,}", self.row["source"], place, size]


def documents_of(block: Block, tokenizer: Tokenizer, table: DocumentTable, split: str) -> list[Piece]:
    """Tell the documents of a block apart and find them in the table: whole ones by their tokens, others by their ID.

    Args:
        block: The block.
        tokenizer: The folder's.
        table: The document table.
        split: Name of the split's folder.
    """
    pieces = _segments(block.pairs, tokenizer.eos_id)
    front = int(tokenizer.use_bos)
    joins = {
        (first, last): digest(np.concatenate([piece.tokens for piece in pieces[first : last + 1]])[front:-1])
        for first, last in _joinable(pieces, tokenizer)
    }
    own = rows_of(split)
    known = {row["digest"]: row for row in table.rows({**own, **with_digests(list(joins.values()))})} if joins else {}
    found = _joined(pieces, joins, known)
    ids = np.array(sorted({piece.sequence_id for piece in found}), dtype=np.int32)
    counts: Counter[int] = Counter()
    for part in table.parts(["sequence_id"], {**own, **with_ids(ids)}):
        counts.update(part.column(0).to_pylist())
    single = [sequence_id for sequence_id, count in counts.items() if count == 1]
    by_id = {row["sequence_id"]: row for row in table.rows({**own, **with_ids(single)})}
    for piece in found:
        piece.namesakes = counts[piece.sequence_id]
        piece.row = piece.row or by_id.get(piece.sequence_id)
    return found


def _segments(pairs: npt.NDArray[np.int32], eos: int) -> list[Piece]:
    """Cut a block behind every EOS and wherever the ID changes."""
    tokens, ids = pairs[:, 0], pairs[:, 1]
    bounds = np.flatnonzero((tokens[:-1] == eos) | (ids[1:] != ids[:-1])) + 1
    starts = [0, *bounds.tolist()]
    return [Piece(start, part, int(ids[start])) for start, part in zip(starts, np.split(tokens, bounds), strict=True)]


def _joinable(pieces: list[Piece], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """First and last of segments under one ID that may be one document, whose text holds EOS."""
    pairs = []
    for first, piece in enumerate(pieces):
        if tokenizer.use_bos and piece.tokens[0] != tokenizer.bos_id:
            continue
        for last in range(first, min(first + _JOINED, len(pieces))):
            if pieces[last].sequence_id != piece.sequence_id:
                break
            if pieces[last].tokens[-1] == tokenizer.eos_id:
                pairs.append((first, last))
    return pairs


def _joined(pieces: list[Piece], joins: dict[tuple[int, int], int], known: dict[int, Row]) -> list[Piece]:
    """Put the segments of each document that the table knows together."""
    found = []
    first = 0
    while first < len(pieces):
        ends = [last for (start, last), value in joins.items() if start == first and value in known]
        last = ends[0] if ends else first
        tokens = np.concatenate([piece.tokens for piece in pieces[first : last + 1]])
        row = known[joins[first, last]] if ends else None
        found.append(Piece(pieces[first].start, tokens, pieces[first].sequence_id, row, whole=bool(ends)))
        first = last + 1
    return found


def decode(tokens: npt.NDArray[np.int32], tokenizer: Tokenizer) -> str:
    """The text of tokens, with special ones shown as they are written."""
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.decode(tokens.tolist(), skip_special_tokens=False)
    return tokenizer.processor.decode(tokens.tolist())
