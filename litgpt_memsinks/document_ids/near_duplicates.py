"""Which documents are edited copies of each other: MinHash signatures, and clusters of them that are found on disk.

    text ─► shingles ─► signature (MinHash) ─► bands ─► pairs that share a band ─► similar enough? ─► clusters

A hash of a document's tokens changes under any edit. Here two documents are near-duplicates if their sets of shingles,
runs of words, have a Jaccard similarity of at least ``NearDuplicates.threshold``, and documents that near-duplicates
connect are one cluster. Similarities are estimated from signatures, and only documents with an equal band of their
signatures are compared (Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman & Ullman,
"Mining of Massive Datasets", ch. 3). What this finds and misses is measured in ``docs/near_duplicates.md``.

Documents are numbered from 0 through the signature files in the order in which they are given.
"""

import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import clear_stale, incomplete_path

ALGORITHM = 2
"""``RMinHash.ALGORITHM_VERSION`` of rensa. Another one makes other signatures, which must not be mixed with these."""
SIGNATURE_VERSION = f"xxh3-rminhash{ALGORITHM}"
"""What signatures depend on besides the settings. The golden ones of the tests may only change together with it."""

_HASHES_AT_ONCE = 16384  # in one call of rensa, which starts threads at some number above 60,000
_BLOCK_BYTES = 8 << 20  # of signatures in memory at once
_PARTITION_BYTES = 64 << 20  # of records that are sorted at once, on average
_BANDS_AT_ONCE = 8  # in one reading of the signatures; each takes 24 bytes per document on disk
_REACH = 16  # followers in its bucket with which a document is compared
_RECORD_BYTES = 24
_OPEN_FILES = 128  # each takes a file descriptor

_Keys = Callable[[npt.NDArray[np.uint32]], list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]]
"""Of rows of signatures: pairs of the rows' bucket and of their order in the bucket."""

# Chinese characters, Japanese kana: each is a word of its own, because nothing stands between words.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class SignatureFile(NamedTuple):
    """Signatures on disk: little-endian uint32 in C order, shape ``(rows, permutations)``, nothing else."""

    path: Path
    """The file"""
    rows: int
    """How many signatures it holds"""


def shingles(text: str, size: int) -> list[str]:
    """Every run of ``size`` words, lower-cased and without punctuation.

    A word is a run of letters, digits and underscores, but each Chinese character and Japanese kana is a word of its
    own. Thai, Lao, Khmer and Burmese write no spaces either: there, words end where Unicode has a mark that is no
    letter, which cuts a text into pieces that are as good for comparing it.

    Args:
        text: Any text; canonically equivalent characters (NFC) count as equal.
        size: Words in a shingle, at least 1.

    Returns:
        The shingles in order, repeated ones included, and never none: fewer words than ``size`` are one shingle, and
        a text without any word is its own.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    words = _WORD.findall(text.lower())
    if len(words) <= size:
        return [" ".join(words) or text.strip()]
    return [" ".join(run) for run in zip(*(islice(words, first, None) for first in range(size)), strict=False)]


def signatures(texts: list[str], settings: NearDuplicates) -> npt.NDArray[np.uint32]:
    """MinHash signatures: two agree in each number with the probability that is the Jaccard similarity of their texts.

    Shingles are hashed by xxh3_64 of their UTF-8, and the hashes reduced by rensa's R-MinHash. Signatures of equal
    settings and ``SIGNATURE_VERSION`` can be compared, on whatever machine they were made.

    Args:
        texts: The documents. While it is hashed, a text takes about 30 times its size.
        settings: ``shingle_size``, ``permutations`` and ``seed`` are used.

    Returns:
        uint32 of shape ``(len(texts), permutations)``.

    Raises:
        MemSinksError: If the installed rensa makes signatures of another version.
    """
    result = np.empty((len(texts), settings.permutations), dtype=np.uint32)
    for number, text in enumerate(texts):
        result[number] = _signature(_hashes(text, settings.shingle_size), settings)
    return result


def similarity(first: npt.NDArray[np.uint32], second: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity: the share of equal numbers, with a standard error below sqrt(J (1 - J) / n).

    Args:
        first: Signatures of shape ``(..., permutations)``.
        second: Signatures of the same shape.

    Returns:
        float64 of shape ``(...)``, in [0, 1].
    """
    return np.count_nonzero(first == second, axis=-1) / first.shape[-1]


@cache
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Number of bands and numbers in each, such that near-duplicates share a band and other documents seldom do.

    Of similarity ``s``, documents share one with probability ``1 - (1 - s**rows)**bands``. Minimised is the integral of
    the probability to miss a pair, above the threshold, plus a ninth of that to compare one in vain, below it: what is
    compared in vain only costs time.

    Args:
        threshold: Least similarity of near-duplicates, above 0, at most 1.
        permutations: Numbers in a signature.

    Returns:
        ``(bands, rows)`` with ``bands * rows <= permutations``.
    """
    grid = (np.arange(1000) + 0.5) / 1000

    def cost(rows: int) -> float:
        def shared(similarities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return 1 - (1 - similarities**rows) ** (permutations // rows)

        vain = shared(grid * threshold).mean() * threshold
        missed = (1 - shared(threshold + grid * (1 - threshold))).mean() * (1 - threshold)
        return float(0.1 * vain + 0.9 * missed)

    rows = min(range(1, permutations + 1), key=cost)
    return permutations // rows, rows


def cluster(
    files: list[SignatureFile],
    settings: NearDuplicates,
    work: Path,
    wanted: npt.NDArray[np.bool_] | None = None,
) -> Path:
    """Write the cluster of each document to ``work / "clusters.bin"``.

    Documents with equal signatures are joined first, and only the first of them goes on. Then, band by band, documents
    are sorted into buckets on disk, and each is compared with the next 16 in its bucket: all others, unless more than
    17 *different* signatures share a band, in which case those lie next to each other that share the next band, too.
    So the time is linear in the number of documents, whatever they are: O(n bands (log n + 16 permutations)), and of
    that the last term only for documents that share a bucket and are not in one cluster yet.

    Which documents share a cluster depends on the set of signatures alone. It does not depend on their order, on how
    they are cut into files or on the number of partitions.

    Memory does not grow with the number of documents: about 30 MB. Files in ``work`` take up to 201 bytes per
    document while this runs, and 8 when it is done; their pages in memory are the system's cache.

    Args:
        files: Signatures; documents are numbered through them.
        settings: ``threshold`` and ``permutations`` are used.
        work: Folder that is there.
        wanted: Which documents take part, shape ``(n_documents,)``; all by default. The others are alone.

    Returns:
        The path. The file holds little-endian int64 of shape ``(n_documents,)``: the smallest number of a document in
        the document's cluster, so its own number if it is alone or the first.

    Raises:
        MemSinksError: If a file has another size than its rows take.
    """
    rows = _Rows(files, settings.permutations)
    path = work / "clusters.bin"
    clear_stale(path)
    scratch = incomplete_path(path)
    scratch.mkdir()
    try:
        if rows.total:
            _cluster(rows, settings.threshold, scratch, wanted)
        else:
            (scratch / "parent.bin").touch()
        (scratch / "parent.bin").replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def near_any(
    files: list[SignatureFile],
    reference: npt.NDArray[np.uint32],
    settings: NearDuplicates,
    on_rows: Callable[[int], None] | None = None,
    selected: Callable[[int, int], npt.NDArray[np.bool_]] | None = None,
) -> npt.NDArray[np.bool_]:
    """Which reference documents have a near-duplicate in the files.

    Every document is compared with every reference document that shares a band with it and has no near-duplicate yet.

    Args:
        files: Signatures, read once, in blocks of 8 MB.
        reference: Signatures of the reference documents, uint32 of shape ``(n_reference, permutations)``; about twice
            their size is needed in memory.
        settings: ``threshold`` and ``permutations`` are used.
        on_rows: Called with the number of rows of each block that is done.
        selected: Called with ``start`` and ``stop``; says which of the documents with these numbers count, bool of
            shape ``(stop - start,)``. All by default.

    Returns:
        bool of shape ``(n_reference,)``.

    Raises:
        MemSinksError: If a file has another size than its rows take.
    """
    rows = _Rows(files, settings.permutations)
    if not len(reference):
        return np.zeros(0, dtype=np.bool_)
    distinct, inverse = np.unique(reference, axis=0, return_inverse=True)
    index = _Index(distinct, settings)
    for start, block in rows.blocks():
        size = len(block)
        if selected is not None:
            block = block[selected(start, start + size)]
        index.mark_near(block)
        if on_rows is not None:
            on_rows(size)
    return index.found[inverse.reshape(-1)]


@cache
def _minhash() -> Any:
    """The class of rensa, imported here because most recipes need no signatures."""
    from rensa import RMinHash

    if RMinHash.ALGORITHM_VERSION != ALGORITHM:
        raise MemSinksError(
            f"The installed rensa makes signatures of version {RMinHash.ALGORITHM_VERSION}, but {ALGORITHM} is needed. "
            "Install rensa>=0.5,<0.6."
        )
    return RMinHash


def _signature(hashes: npt.NDArray[np.uint64], settings: NearDuplicates) -> npt.NDArray[np.uint32]:
    """The signature of a set of hashes, shape ``(n,)`` to ``(permutations,)``.

    For many sets or hashes at once rensa starts threads, and a process that is forked afterwards hangs in its next
    call. So it is given one small piece at a time: the signature of a union is the least of the signatures, in each
    number.
    """
    pieces = [hashes[start : start + _HASHES_AT_ONCE] for start in range(0, len(hashes), _HASHES_AT_ONCE)]
    rows = [
        _minhash()
        .digest_matrix_from_flat_token_hashes(
            piece, np.array([0, len(piece)], dtype=np.uint64), settings.permutations, settings.seed
        )
        .to_rows()[0]
        for piece in pieces
    ]
    return np.array(rows, dtype=np.uint32).min(axis=0)


def _hashes(text: str, size: int) -> npt.NDArray[np.uint64]:
    """xxh3_64 of each shingle. JSON can hold lone surrogates, which UTF-8 cannot: those pass."""
    found = shingles(text, size)
    digests = (xxhash.xxh3_64_intdigest(shingle.encode("utf-8", "surrogatepass")) for shingle in found)
    return np.fromiter(digests, dtype=np.uint64, count=len(found))


def _mixed(columns: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row of ``(n, columns)``: multiply and shift per column, then SplitMix64's finaliser."""
    state = np.full(len(columns), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in columns.T:
        state = (state ^ column) * np.uint64(0xD6E8FEB86659FD93)
        state ^= state >> np.uint64(32)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class _Rows:
    """The rows of all files under one numbering."""

    def __init__(self, files: list[SignatureFile], permutations: int) -> None:
        self._files, self.permutations = files, permutations
        for path, rows in files:
            if (size := path.stat().st_size) != 4 * rows * permutations:
                raise MemSinksError(
                    f"{str(path)!r} has {size} bytes, but {rows} signatures of {permutations} numbers take "
                    f"{4 * rows * permutations}. Make it anew."
                )
        self._starts = np.cumsum([0, *(file.rows for file in files)])
        self._maps: dict[int, npt.NDArray[np.uint32]] = {}
        self.total = int(self._starts[-1])
        self.at_once = max(1, _BLOCK_BYTES // (4 * permutations))

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
        """Yield the number of a block's first document and the block."""
        for first, (path, rows) in zip(self._starts, self._files, strict=False):
            for row in range(0, rows, self.at_once):
                count, offset = min(self.at_once, rows - row), 4 * row * self.permutations
                flat = np.fromfile(path, dtype="<u4", count=count * self.permutations, offset=offset)
                yield int(first) + row, flat.reshape(count, self.permutations)

    def __getitem__(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """The signatures of the documents with these numbers."""
        result = np.empty((len(documents), self.permutations), dtype=np.uint32)
        files = np.searchsorted(self._starts, documents, side="right") - 1
        for file in np.unique(files):
            mine = files == file
            result[mine] = self._map(int(file))[documents[mine] - self._starts[file]]
        return result

    def _map(self, file: int) -> npt.NDArray[np.uint32]:
        if file not in self._maps:
            if len(self._maps) == _OPEN_FILES:
                self._maps.pop(next(iter(self._maps)))
            path, rows = self._files[file]
            self._maps[file] = np.memmap(path, dtype="<u4", mode="r", shape=(rows, self.permutations))
        return self._maps[file]


def _cluster(rows: _Rows, threshold: float, scratch: Path, wanted: npt.NDArray[np.bool_] | None) -> None:
    """Write ``parent.bin``, in which every document points at the first of its cluster."""
    parent = np.memmap(scratch / "parent.bin", dtype="<i8", mode="w+", shape=(rows.total,))
    takes_part = np.memmap(scratch / "takes_part.bin", dtype=np.bool_, mode="w+", shape=(rows.total,))
    forest = _Forest(parent.view(np.ndarray))
    for start in range(0, rows.total, rows.at_once):
        stop = min(start + rows.at_once, rows.total)
        takes_part[start:stop] = True if wanted is None else wanted[start:stop]
    _join_all(rows, forest, takes_part, _whole, 1, scratch, reach=1, threshold=1.0)
    for start in range(0, rows.total, rows.at_once):
        takes_part[start : start + rows.at_once] &= forest.is_root(start, start + rows.at_once)
    n_bands, width = bands(threshold, rows.permutations)
    for first in range(0, n_bands, _BANDS_AT_ONCE):
        some = range(first, min(first + _BANDS_AT_ONCE, n_bands))
        keys = _banded(some, n_bands, width)
        _join_all(rows, forest, takes_part, keys, len(some), scratch, reach=_REACH, threshold=threshold)
    for start in range(0, rows.total, rows.at_once):
        numbers = np.arange(start, min(start + rows.at_once, rows.total))
        parent[numbers] = forest.roots(numbers)
    parent.flush()


def _whole(block: npt.NDArray[np.uint32]) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
    """Buckets of equal signatures."""
    return [(_mixed(block), np.zeros(len(block), dtype=np.uint64))]


def _banded(some: range, n_bands: int, width: int) -> _Keys:
    """Buckets of some of the bands, in the order of the band after and then of the whole signature.

    What else documents share decides who is near whom in a crowded bucket, and their numbers never do.
    """

    def keys(block: npt.NDArray[np.uint32]) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        whole = _mixed(block) >> np.uint64(32)
        buckets = [_mixed(block[:, band % n_bands * width :][:, :width]) for band in (*some, some.stop)]
        following = [bucket & np.uint64(0xFFFFFFFF00000000) for bucket in buckets[1:]]
        return [(bucket, after | whole) for bucket, after in zip(buckets, following, strict=False)]

    return keys


def _join_all(
    rows: _Rows,
    forest: "_Forest",
    takes_part: npt.NDArray[np.bool_],
    keys: _Keys,
    n_keys: int,
    scratch: Path,
    reach: int,
    threshold: float,
) -> None:
    """Join the near-duplicates among documents that share a bucket; see ``cluster``."""
    partitions = -(-rows.total * _RECORD_BYTES // _PARTITION_BYTES)
    for start, block in rows.blocks():
        chosen = np.flatnonzero(takes_part[start : start + len(block)])
        if len(chosen):
            for index, (bucket, order) in enumerate(keys(block[chosen])):
                _scatter(bucket, order, chosen + start, scratch / f"{index}", partitions)
    for index in range(n_keys):
        for partition in range(partitions):
            if (path := Path(f"{scratch / str(index)}-{partition}")).exists():
                _join(path, rows, forest, reach, threshold)
                path.unlink()


def _scatter(
    bucket: npt.NDArray[np.uint64],
    order: npt.NDArray[np.uint64],
    documents: npt.NDArray[np.int64],
    prefix: Path,
    partitions: int,
) -> None:
    """Append records ``(bucket, order, document)`` to the partitions of their buckets.

    They are big-endian, so that the order of their bytes is their own.
    """
    records = np.stack([bucket, order, documents.astype(np.uint64)], axis=1).astype(">u8")
    owner = (bucket >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)
    by_owner = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[by_owner], np.arange(partitions, dtype=np.uint64), side="right")
    for partition, mine in enumerate(np.split(by_owner, ends[:-1])):
        if len(mine):
            with open(f"{prefix}-{partition}", "ab") as file:
                records[mine].tofile(file)


def _join(path: Path, rows: _Rows, forest: "_Forest", reach: int, threshold: float) -> None:
    """Compare each document of a partition with its followers in its bucket, and join near-duplicates."""
    records = np.memmap(path, dtype=f"S{_RECORD_BYTES}", mode="r+")
    records.sort()  # in place, in the file: one bucket can hold any number of documents
    table = records.view(np.ndarray).view(">u8").reshape(-1, 3)
    for start in range(0, len(table), rows.at_once):
        block = table[start : start + rows.at_once + reach]
        bucket, documents = block[:, 0].astype(np.uint64), block[:, 2].astype(np.int64)
        for offset in range(1, reach + 1):
            pairs = np.flatnonzero(bucket[:-offset] == bucket[offset:])
            pairs = pairs[pairs < rows.at_once]
            if not len(pairs):
                break
            first, second = documents[pairs], documents[pairs + offset]
            apart = forest.roots(first) != forest.roots(second)
            first, second = first[apart], second[apart]
            near = similarity(rows[first], rows[second]) >= threshold
            forest.join(first[near], second[near])


class _Forest:
    """Union-find in which a parent is never above its child, so that a root is the first of its cluster."""

    def __init__(self, parent: npt.NDArray[np.int64]) -> None:
        self._parent = parent  # in a file
        for start in range(0, len(parent), 1 << 20):
            stop = min(start + (1 << 20), len(parent))
            parent[start:stop] = np.arange(start, stop)

    def is_root(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the documents with these numbers are the first of their cluster."""
        parents = self._parent[start:stop]
        return parents == np.arange(start, start + len(parents))

    def roots(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The first of each document's cluster. Paths are halved on the way."""
        while True:
            above = self._parent[documents]
            top = self._parent[above]
            if np.array_equal(above, top):
                return above
            self._parent[documents] = top

    def join(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        """Join the clusters of each pair."""
        while len(first):
            first, second = self.roots(first), self.roots(second)
            apart = first != second
            first, second = first[apart], second[apart]
            # several pairs may share a root: the least of its new parents wins, and the other pairs come round again
            np.minimum.at(self._parent, np.maximum(first, second), np.minimum(first, second))


class _Index:
    """Signatures by the hashes of their bands, and which of them have a near-duplicate."""

    def __init__(self, reference: npt.NDArray[np.uint32], settings: NearDuplicates) -> None:
        self._reference, self._threshold = reference, settings.threshold
        n_bands, self._width = bands(settings.threshold, settings.permutations)
        hashes = [self._band(reference, band) for band in range(n_bands)]
        self._orders = [np.argsort(column, kind="stable") for column in hashes]
        self._sorted = [column[order] for column, order in zip(hashes, self._orders, strict=True)]
        self.found = np.zeros(len(reference), dtype=np.bool_)

    def _band(self, rows: npt.NDArray[np.uint32], band: int) -> npt.NDArray[np.uint64]:
        return _mixed(rows[:, band * self._width :][:, : self._width])

    def mark_near(self, block: npt.NDArray[np.uint32]) -> None:
        """Compare a block of signatures with the reference and mark what has a near-duplicate there."""
        block = block[np.unique(_mixed(block), return_index=True)[1]]
        for band in range(len(self._sorted)):
            hashes = self._band(block, band)
            low = np.searchsorted(self._sorted[band], hashes, side="left")
            counts = np.searchsorted(self._sorted[band], hashes, side="right") - low
            ends = np.cumsum(counts)
            for start in range(0, int(ends[-1]) if len(ends) else 0, 1 << 14):
                # pairs are numbered through the rows: no more than these are ever in memory
                pairs = np.arange(start, min(start + (1 << 14), int(ends[-1])))
                row = np.searchsorted(ends, pairs, side="right")
                reference = self._orders[band][low[row] + pairs - (ends[row] - counts[row])]
                self._mark(block, row, reference)

    def _mark(
        self, block: npt.NDArray[np.uint32], row: npt.NDArray[np.int64], reference: npt.NDArray[np.int64]
    ) -> None:
        open_ = ~self.found[reference]
        row, reference = row[open_], reference[open_]
        near = similarity(block[row], self._reference[reference]) >= self._threshold
        self.found[reference[near]] = True
