"""Is a prepared folder what its manifest says? Every byte is read again, and every document is counted.

The manifest's checksums find damage that came after `prepare`. The walk through the streams does not believe them: it
finds every document by its tokens, so it finds wrong IDs, lost documents and wrong counts in a folder that agrees with
its own checksums, too.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from rich.console import Console
from rich.table import Table

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.chunks import INDEX, Chunk, read_chunk, read_index
from litgpt_memsinks.prepare.manifest import EVALUATION, TOKENIZER, Manifest, Split, tokenizer_fingerprint
from litgpt_memsinks.prepare.tables import EVALUATION_SCHEMA
from litgpt_memsinks.prepared.document_table import (
    DocumentTable,
    ParquetFile,
    load_folders_tokenizer,
    rows_of,
    with_digests,
)
from litgpt_memsinks.prepared.document_walk import Expected, Marks, Walk
from litgpt_memsinks.progress import progress

_NAMED = 3  # examples of a kind of failure
_BYTES_PER_PAIR = 8
_WIDTH = 160  # of a table that is not on a terminal


@dataclass
class SplitCheck:
    """What was found in one split."""

    digest: str
    """xxh3_128 of the stream's numbers in order, see ``chunks.Checksums``"""
    tokens: int
    """Tokens read"""
    chunks: int
    """Chunk files read"""
    documents: int
    """Distinct documents found"""
    written: int
    """Documents found, with their repeats"""
    repeated_documents: int
    """Distinct documents found whose ID says that they repeat"""
    repeated_tokens: int
    """Their tokens, with their repeats"""
    mispaired: int
    """Tokens that carry another ID than their document"""
    noisy: int
    """Occurrences of repeated documents with a random ID"""
    repeated: int
    """Occurrences of repeated documents"""
    unreached: int
    """Tokens at the ends of chunks that no training block of ``block_size + 1`` tokens reaches"""
    failures: list[str] = field(default_factory=list)
    """What is wrong, in short"""
    examples: list[str] = field(default_factory=list)
    """Where it is wrong, the first places"""


@dataclass
class Verification:
    """What `verify` found in a folder that is right."""

    splits: dict[str, SplitCheck]
    """Name of each split to what was found in it"""
    max_token: int
    """Largest token of the streams and of the documents that are scored"""


def verify(data_path: Path, block_size: int = 2048) -> Verification:
    """Prove a prepared folder right: read every byte of it again, and find every document by its tokens.

    Checked are the files' checksums and the streams' digests; that each document's tokens carry the document's ID;
    that each is in the document table and occurs as often as the table says; all counts of the manifest; the tokens
    that are scored; and the tokenizer. It prints what each split holds, and the first things that are wrong. With ID
    noise, an occurrence of a repeated document may carry any one ID of a repeated document; how many do is printed.

    Memory: some copies of one chunk, and 44 bytes per distinct document.

    Args:
        data_path: Folder that `prepare` wrote.
        block_size: Tokens in a training row, T. Chunks are cut into blocks of T + 1; how many tokens at the ends of
            chunks no block reaches is printed, and is no error.

    Returns:
        What was found.

    Raises:
        MemSinksError: If anything is wrong, or missing.
    """
    if block_size < 1:
        raise MemSinksError(f"block_size is {block_size}, but it must be at least 1.")
    manifest = Manifest.read(data_path)
    table = DocumentTable(data_path)
    with progress("Verifying", _BYTES_PER_PAIR * sum(split.tokens for split in manifest.splits.values())) as on_bytes:
        check = _FolderCheck(data_path, manifest, table, on_bytes)
        splits = {name: check.split(name, block_size) for name in manifest.splits}
        failures = [*check.whole(), *(f"{text} in {name}" for name in splits for text in splits[name].failures)]
    print_splits(splits, manifest)
    if failures:
        for name, found in splits.items():
            for example in found.examples:
                print(f"{name}: {example}")
        more = f"; and {len(failures) - 8} more" if len(failures) > 8 else ""
        raise MemSinksError(
            f"{str(data_path)!r} is damaged: {'; '.join(failures[:8])}{more}. Copy it again, or prepare it again."
        )
    streams = ", ".join(f"{name} {found.digest}" for name, found in splits.items())
    print(f"OK: {str(data_path)!r} is what its manifest says. Streams: {streams}")
    return Verification(splits, manifest.max_token)


def print_splits(splits: dict[str, SplitCheck], manifest: Manifest) -> None:
    """Print what was found, a row per split."""
    table = Table(box=None)
    table.add_column("split")
    columns = ("chunks", "tokens", "documents", "distinct", "repeated", "mispaired", "random IDs", "not in blocks")
    for name in columns:
        table.add_column(name, justify="right")
    for name, found in splits.items():
        share = found.unreached / max(found.tokens, 1)
        numbers = (found.chunks, found.tokens, found.written, found.documents, found.repeated_documents)
        noise = f"{found.noisy / found.repeated:.1%}" if found.repeated else "-"
        table.add_row(
            name, *(f"{n:,}" for n in numbers), f"{found.mispaired:,}", noise, f"{found.unreached:,} ({share:.2%})"
        )
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    if manifest.recipe["id_noise"]:
        print(f"The recipe's ID noise is {manifest.recipe['id_noise']:.1%} of the repeated documents' occurrences.")


class _FolderCheck:
    """Checks the parts of one folder.

    Args:
        folder: The prepared folder.
        manifest: Its manifest.
        table: Its document table.
        on_bytes: Called with the number of bytes that were read.
    """

    def __init__(self, folder: Path, manifest: Manifest, table: DocumentTable, on_bytes: Callable[[int], None]) -> None:
        self.folder, self.manifest, self.table, self.on_bytes = folder, manifest, table, on_bytes
        self.fingerprint = tokenizer_fingerprint(folder / TOKENIZER)
        self.marks = marks_of(folder)
        self.noise = manifest.recipe["id_noise"] > 0
        self.max_token = -1
        self.min_token = 0
        self._scored_failures: list[str] = []

    # ---------------------------------------------------------------------------------------------------- one split

    def split(self, name: str, block_size: int) -> SplitCheck:
        """Check one split, and the scored documents that belong to it."""
        expected = Expected(self.table, rows_of(name))
        files = _Files(self.folder / name, self.manifest.splits[name])
        walk = self._walk(expected, files, self.on_bytes)
        lost, extra = _differing(expected)
        if lost.any() and extra.any() and not walk.unknown:
            # a text that consists of other documents and EOS between them may have been taken for these
            walk = self._walk(expected, _Files(self.folder / name, self.manifest.splits[name]), None, extra)
        found = _found(files, walk, expected, block_size)
        found.failures = [*files.failures, *_walk_failures(walk, expected), *_wrong_counts(found, self.manifest, name)]
        found.examples = [f"token {place:,}: {reason}" for place, reason in walk.failures]
        found.examples += self._named(expected)
        if name in ("train", "val"):
            self._check_scored(name, expected)
        return found

    def _walk(
        self,
        expected: Expected,
        files: "_Files",
        on_bytes: Callable[[int], None] | None,
        surplus: npt.NDArray[np.bool_] | None = None,
    ) -> Walk:
        expected.counted[:] = 0
        walk = Walk(expected, self.marks, self.noise, surplus)
        for chunk in files.chunks():
            tokens = chunk.pairs[:, 0]
            self.max_token = max(self.max_token, int(tokens.max(initial=-1)))
            self.min_token = min(self.min_token, int(tokens.min(initial=0)))
            walk.feed(chunk.pairs)
            if on_bytes is not None:
                on_bytes(chunk.pairs.nbytes)
        walk.finish()
        return walk

    def _named(self, expected: Expected) -> list[str]:
        """Places of the first documents that occur too often or too seldom."""
        lost, extra = _differing(expected)
        numbers = np.flatnonzero(lost | extra)[:_NAMED]
        counts = dict(zip(expected.digests[numbers].tolist(), expected.counted[numbers].tolist(), strict=True))
        if not counts:
            return []
        return [
            f"the document of {row['file']!r}, {row['line']:,} occurs {counts[row['digest']]:,} times, not "
            f"{row['written']:,}"
            for row in self.table.rows(with_digests(list(counts)), _NAMED)
        ]

    # ------------------------------------------------------------------------------------------------ scored documents

    def _check_scored(self, split: str, expected: Expected) -> None:
        """Hold the tokens in ``evaluation.parquet`` against the table."""
        path = self.folder / EVALUATION
        if not path.is_file():
            self._scored_failures = [f"{EVALUATION} is missing"]
            return
        kind = "repeated" if split == "train" else "val"
        wanted = int((expected.ids < 0).sum()) if split == "train" else len(expected.ids)
        scored = ParquetFile(path, EVALUATION_SCHEMA)
        rows = wrong = 0
        seen = np.zeros(len(expected.ids), dtype=np.bool_)
        for part in scored.parts(["digest", "sequence_id", "tokens"], {"split": pa.array([kind])}):
            numbers = self._scored_rows(part, expected)
            right = numbers[numbers >= 0]
            rows, wrong = rows + part.num_rows, wrong + int((numbers < 0).sum())
            seen[right] = True
        if wrong:
            self._scored_failures.append(f"{wrong:,} {kind} documents of {EVALUATION} differ from the document table")
        if rows != wanted or seen.sum() != wanted - wrong:
            self._scored_failures.append(f"{EVALUATION} has {rows:,} {kind} documents, not each of {wanted:,} once")

    def _scored_rows(self, part: pa.Table, expected: Expected) -> npt.NDArray[np.int64]:
        """Rows of scored documents in the table; -1 where digest, ID or tokens differ from it."""
        digest, sequence_id, lists = (column.combine_chunks() for column in part.columns)
        tokens = lists.flatten().to_numpy(zero_copy_only=False)
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        self.max_token = max(self.max_token, int(tokens.max(initial=-1)))
        ends = np.cumsum(lengths)
        front = int(self.marks.bos is not None)
        view = np.ascontiguousarray(tokens).data.cast("B")
        places = zip((4 * (ends - lengths + front)).tolist(), (4 * (ends - 1)).tolist(), strict=True)
        digests = np.fromiter((xxhash.xxh3_64_intdigest(view[a:b]) for a, b in places), np.uint64, len(ends))
        rows = expected.find(digests, lengths)
        same = digests == digest.to_numpy(zero_copy_only=False)
        if len(expected.ids):
            same &= expected.ids[rows] == sequence_id.to_numpy(zero_copy_only=False)
        return np.where(same, rows, -1)

    # ------------------------------------------------------------------------------------------------------- the whole

    def whole(self) -> list[str]:
        """What is wrong with the folder as a whole, after all splits."""
        failures = list(self._scored_failures)
        if self.fingerprint != self.manifest.tokenizer_sha256:
            failures.append("the tokenizer is not the one that made the tokens")
        if self.max_token != self.manifest.max_token:
            failures.append(f"the largest token is {self.max_token:,}, not {self.manifest.max_token:,}")
        if self.min_token < 0:
            failures.append(f"there is a token {self.min_token:,}")
        return failures + self._wrong_sources()

    def _wrong_sources(self) -> list[str]:
        """Sources whose counts in the manifest are not those of the table."""
        totals = {name: np.zeros(4, dtype=np.int64) for name in self.manifest.sources}
        for part in self.table.parts(["source", "tokens", "written"], {}):
            names = part.column(0).combine_chunks().dictionary_encode()
            owner = names.indices.to_numpy(zero_copy_only=False)
            tokens, written = (part.column(index).to_numpy() for index in (1, 2))
            for index, name in enumerate(names.dictionary.to_pylist()):
                own = owner == index
                sums = (own.sum(), tokens[own].sum(), written[own].sum(), (tokens * written)[own].sum())
                totals.setdefault(name, np.zeros(4, dtype=np.int64))[:] += np.array(sums)
        failures = []
        for name, total in totals.items():
            info = self.manifest.sources.get(name)
            if info is None:
                failures.append(f"the document table has a source {name!r} that the manifest lacks")
                continue
            fields = ("documents", "tokens", "written", "written_tokens")
            for what, value in zip(fields, total.tolist(), strict=True):
                if getattr(info, what) != value:
                    failures.append(f"the manifest says {what} {getattr(info, what):,} of {name}, the table {value:,}")
        return failures


def marks_of(data_path: Path) -> Marks:
    """How a folder's tokenizer marks documents.

    Raises:
        MemSinksError: If it cannot be loaded.
    """
    tokenizer = load_folders_tokenizer(data_path)
    return Marks(tokenizer.bos_id if tokenizer.use_bos else None, tokenizer.eos_id)


class _Files:
    """Reads the chunk files of a split, and collects what is wrong with them."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder, self.split = folder, split
        self.failures: list[str] = []
        self.sizes: list[int] = []  # tokens of each chunk that was read
        self.digest = xxhash.xxh3_128()

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, without those that cannot be read."""
        try:
            entries = [(entry["filename"], entry["dim"]) for entry in read_index(self.folder)["chunks"]]
        except MemSinksError as error:
            self.failures.append(_sentence(error))
            return
        except (KeyError, TypeError):
            self.failures.append(f"an {INDEX} that names no chunks")
            return
        self._check_names([name for name, _ in entries])
        for name, numbers in entries:
            try:
                chunk = read_chunk(self.folder / name, numbers)
            except MemSinksError as error:
                self.failures.append(_sentence(error))
                continue
            if self.split.chunks.get(name, chunk.checksum) != chunk.checksum:
                self.failures.append(f"another checksum of {name}")
            self.sizes.append(len(chunk.pairs))
            self.digest.update(chunk.pairs.data)
            yield chunk
        if self.digest.hexdigest() != self.split.digest:
            self.failures.append("another digest of the stream")

    def _check_names(self, names: list[str]) -> None:
        if names != list(self.split.chunks):
            self.failures.append(f"other chunks in {INDEX} than in the manifest")
        present = {path.name for path in self.folder.glob("*.bin")}
        if extra := sorted(present - set(names) - set(self.split.chunks)):
            self.failures.append(f"{len(extra):,} chunks too many ({', '.join(extra[:_NAMED])})")


def _sentence(error: Exception) -> str:
    """The first sentence of an error."""
    return str(error).partition(". ")[0].rstrip(".")


def _differing(expected: Expected) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which documents were found too seldom, and which too often."""
    return expected.counted < expected.written, expected.counted > expected.written


def _found(files: _Files, walk: Walk, expected: Expected, block_size: int) -> SplitCheck:
    present = expected.counted > 0
    return SplitCheck(
        digest=files.digest.hexdigest(),
        tokens=sum(files.sizes),
        chunks=len(files.sizes),
        documents=int(present.sum()),
        written=walk.occurrences,
        repeated_documents=int((present & (expected.ids < 0)).sum()),
        repeated_tokens=walk.repeated_tokens,
        mispaired=walk.mispaired,
        noisy=walk.noisy,
        repeated=walk.repeated,
        unreached=sum(size % (block_size + 1) for size in files.sizes),
    )


def _walk_failures(walk: Walk, expected: Expected) -> list[str]:
    """What is wrong with the documents of a split."""
    lost, extra = _differing(expected)
    missing = int((expected.written[lost] - expected.counted[lost]).sum())
    surplus = int((expected.counted[extra] - expected.written[extra]).sum())
    copies = int((expected.digests[1:] == expected.digests[:-1]).sum())
    counts = [
        (walk.mispaired, "mispaired tokens"),
        (walk.unknown, "pieces that are no document of the document table"),
        (int((lost & (expected.counted == 0)).sum()), "documents lost"),
        (missing, "occurrences of documents missing"),
        (surplus, "occurrences of documents too many"),
        (copies, "documents more than once in the document table"),
    ]
    return [f"{count:,} {what}" for count, what in counts if count]


def _wrong_counts(found: SplitCheck, manifest: Manifest, name: str) -> list[str]:
    """Counts of the manifest that are not what was found."""
    split = manifest.splits[name]
    fields = ("tokens", "written", "documents", "repeated_documents", "repeated_tokens")
    return [
        f"{what} {getattr(found, what):,}, not {getattr(split, what):,} as the manifest says,"
        for what in fields
        if getattr(found, what) != getattr(split, what)
    ]
