"""Second pass of `prepare`: which documents, how often, with which ID and in which order.

    records of all units ─► buckets by digest ─► distinct documents ─► each set takes its own
                         ─► one entry per occurrence ─► buckets by shuffle key ─► SPLIT.bin

Every step reads a bucket of some hundred thousand rows, works on it with NumPy and writes it back, so that memory stays
the same for any corpus. What is random is drawn from a document's own digest (`document_ids.mix`), so that it does not
depend on how the corpus is cut into files, workers or shards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.corpus.mixture import Choice, IdScheme, Mixture, NearDuplicates, Source, ValidationSet
from litgpt_memsinks.document_ids.ids import colliding_pairs, digest, document_bits, mix, noisy_ids, sequence_ids
from litgpt_memsinks.document_ids.near_duplicates import cluster, near_any
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.tokenizing import RECORD, Done, token_dtype

BUCKET_ROWS = 200_000  # rows sorted at once: about 20 MB
ROW = np.dtype(
    [
        ("digest", "<u8"),
        ("group", "<u8"),  # hash that documents with one ID have in common; see `Grouping`
        ("order", "<u8"),  # number among all documents read
        ("offset", "<u8"),  # first token in the unit's file
        ("unit", "<u4"),
        ("length", "<u4"),  # tokens
        ("max_token", "<u4"),
        ("copies", "<u4"),  # in the files of the reading
        ("times", "<u4"),  # how often it is to occur
        ("written", "<u4"),  # how often it is written: not at all if it is left out
        ("reading", "<u2"),
        ("taker", "<i2"),  # index of the set that took it; -1 for none
        ("clustered", "?"),  # whether it has near-duplicates
        ("taken", "?"),  # whether a copy was taken, from this reading or another
    ]
)
"""A distinct document of a reading."""
ENTRY = np.dtype([("key", "<u8"), ("offset", "<u8"), ("unit", "<u4"), ("length", "<u4"), ("id", "<i4")])
"""An occurrence in a stream: shuffle key, place of its tokens, sequence ID."""
CHOSEN = np.dtype([*((name, ROW[name]) for name in ROW.names or ()), ("id", "<i4")])
"""A row of the document table."""


class Buckets:
    """Rows in files by bucket number; one bucket fits into memory."""

    def __init__(self, folder: Path, count: int, dtype: np.dtype) -> None:
        folder.mkdir(parents=True)
        self.folder, self.count, self.dtype = folder, count, dtype

    @classmethod
    def for_rows(cls, folder: Path, rows: int, dtype: np.dtype) -> "Buckets":
        """As many buckets, a power of two, as it takes to have ``BUCKET_ROWS`` in each."""
        return cls(folder, 1 << max(0, math.ceil(math.log2(max(rows, 1) / BUCKET_ROWS))), dtype)

    def by_hash(self, hashes: npt.NDArray[np.uint64], bits: int = 64) -> npt.NDArray[np.int64]:
        """The bucket of each hash of so many bits, by its highest ones: buckets in order are in order of the hashes."""
        used = self.count.bit_length() - 1
        return (hashes >> np.uint64(bits - used)).astype(np.int64) if used else np.zeros(len(hashes), dtype=np.int64)

    def add(self, rows: np.ndarray, bucket: npt.NDArray[np.int64]) -> None:
        """Append rows to their buckets."""
        rows = rows[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=self.count))
        for index in np.unique(bucket):
            with open(self._path(index), "ab") as file:
                rows[ends[index - 1] if index else 0 : ends[index]].tofile(file)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self._path(index)
        return np.fromfile(path, dtype=self.dtype) if path.is_file() else np.zeros(0, dtype=self.dtype)

    def __setitem__(self, index: int, rows: np.ndarray) -> None:
        rows.tofile(self._path(index))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(self.count))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.bin"


@dataclass
class Taker:
    """A source or a validation set that takes documents from a reading."""

    name: str
    """As in the recipe"""
    split: Literal["train", "val"]
    """Where its documents go"""
    reading: int
    """Index of its reading"""
    choose: Choice
    """How it chooses under a limit"""
    limit: tuple[Literal["documents", "fraction", "tokens", "fill_to"], float] | None = None
    """What it takes at most"""
    repeats: int | None = None
    """How often each document occurs; ``None`` for as often as the files hold it"""
    hold_out: bool = False
    """Whether it takes only documents that no other reading has, before the sources"""
    alike: tuple[int, ...] = ()
    """Readings of the same files in the same way, which count as one there"""
    ids: IdScheme = "hash"
    """How its documents get their ID"""
    canary_tokens: int = 0
    """Random tokens appended to each document"""
    documents: int = 0
    """Distinct documents taken"""
    tokens: int = 0
    """Tokens of its distinct documents"""
    written: int = 0
    """Documents written, with repeats"""
    written_tokens: int = 0
    """Tokens written, with repeats"""
    near_duplicates_dropped: int = 0
    """Validation documents dropped because they are near-duplicates of documents that are trained on"""
    overlap: int = 0
    """Validation documents dropped because they are trained on"""

    @classmethod
    def of(cls, name: str, settings: Source | ValidationSet, reading: int) -> "Taker":
        """Read a taker off its settings in the recipe."""
        names = ("documents", "fraction", "tokens", "fill_to")
        limits = [(item, value) for item in names if (value := getattr(settings, item, None)) is not None]
        limit = limits[0] if limits else None
        if isinstance(settings, ValidationSet):
            return cls(name, "val", reading, settings.choose, limit, repeats=1, hold_out=settings.hold_out)  # type: ignore[arg-type]
        return cls(
            name,
            "train",
            reading,
            settings.choose,
            limit,  # type: ignore[arg-type]
            settings.repeats,
            ids=settings.ids,
            canary_tokens=settings.canary_tokens,
        )

    @property
    def label(self) -> str:
        """How the recipe names it."""
        return f"{'sources' if self.split == 'train' else 'validation'}.{self.name}"


class NeedMoreError(Exception):
    """A set that takes the first documents has not enough of them, and there are files left to read.

    Attributes:
        reading: Index of the reading to go on with.
        documents: How many more distinct documents are wanted, if they are counted.
        tokens: How many more tokens are wanted, if they are counted.
    """

    def __init__(self, reading: int, documents: int = 0, tokens: int = 0) -> None:
        super().__init__(reading, documents, tokens)
        self.reading, self.documents, self.tokens = reading, documents, tokens


# ------------------------------------------------------------------------------------------------- distinct documents


class Grouping(NamedTuple):
    """Near-duplicate clusters of some readings, on disk, by number among their documents."""

    starts: dict[int, int]
    """Number of each reading's first document"""
    digests: npt.NDArray[np.uint64]
    """Digest of each document, memory-mapped"""
    clusters: npt.NDArray[np.int64]
    """Smallest number in each document's cluster, memory-mapped"""
    clustered: npt.NDArray[np.bool_]
    """Whether each document's cluster has others, memory-mapped"""

    def of(self, reading: int, start: int, stop: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Digest of the first document of each one's cluster, and whether the cluster has others."""
        numbers = slice(self.starts[reading] + start, self.starts[reading] + stop)
        return self.digests[self.clusters[numbers]], self.clustered[numbers]


def group_near_duplicates(units: Sequence[Done], readings: set[int], settings: NearDuplicates, work: Path) -> Grouping:
    """Cluster the documents of some readings.

    Args:
        units: All units, in order.
        readings: Indices of the readings whose documents get one ID per cluster.
        settings: What a near-duplicate is.
        work: Folder for scratch files; made here.
    """
    work.mkdir(parents=True)
    own = [unit for unit in units if unit.unit.reading in readings]
    starts: dict[int, int] = {}
    total = 0
    with open(work / "digests.bin", "wb") as file:
        for unit in own:
            starts.setdefault(unit.unit.reading, total)
            total += unit.info.documents
            for start, stop in _blocks(unit.info.documents):
                unit.records(start, stop)["digest"].tofile(file)
    path = cluster([unit.signatures() for unit in own], settings, work)
    clusters = np.memmap(path, dtype=np.int64, mode="r", shape=(total,))
    digests = np.memmap(work / "digests.bin", dtype=np.uint64, mode="r")
    clustered = np.memmap(work / "clustered.bin", dtype=np.bool_, mode="w+", shape=(total,))
    for start, stop in _blocks(total):  # exact copies alone do not count: `repeats` may drop them
        first = clusters[start:stop]
        clustered[first[digests[first] != digests[start:stop]]] = True
    for start, stop in _blocks(total):
        clustered[start:stop] = clustered[clusters[start:stop]]
    return Grouping(starts, digests, clusters, clustered)


def distinct_documents(units: Sequence[Done], work: Path, grouping: Grouping | None = None) -> Buckets:
    """Sort the records of all units into buckets by digest, and merge exact copies within each reading.

    Args:
        units: All units, in order.
        work: Folder for the buckets; made here.
        grouping: Near-duplicate clusters, where a reading has them.

    Returns:
        Buckets of ``ROW``, sorted by digest and reading.
    """
    buckets = Buckets.for_rows(work, sum(unit.info.documents for unit in units), ROW)
    order = 0
    read: dict[int, int] = {}
    for index, unit in enumerate(units):
        reading = unit.unit.reading
        for start, stop in _blocks(unit.info.documents):
            records = unit.records(start, stop)
            rows = np.zeros(len(records), dtype=ROW)
            for name in set(RECORD.names or ()) & set(ROW.names or ()):
                rows[name] = records[name]
            rows["order"] = np.arange(order + start, order + stop)
            rows["unit"], rows["reading"], rows["copies"], rows["taker"] = index, reading, 1, -1
            if grouping is not None and reading in grouping.starts:
                before = read.get(reading, 0)
                rows["group"], rows["clustered"] = grouping.of(reading, before + start, before + stop)
            buckets.add(rows, buckets.by_hash(rows["digest"]))
        order += unit.info.documents
        read[reading] = read.get(reading, 0) + unit.info.documents
    for index, rows in enumerate(buckets):
        buckets[index] = merge_copies(rows)
    return buckets


def merge_copies(rows: np.ndarray) -> np.ndarray:
    """One row for each digest and reading, the first in order, with the number of its copies."""
    rows = rows[np.lexsort((rows["order"], rows["reading"], rows["digest"]))]
    new = _differs(rows["digest"]) | _differs(rows["reading"])
    merged = rows[new]
    merged["copies"] = np.diff(np.append(np.flatnonzero(new), len(rows)))
    return merged


def _differs(values: np.ndarray) -> npt.NDArray[np.bool_]:
    """Whether each value differs from the one before; the first does."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BUCKET_ROWS, rows)) for start in range(0, rows, BUCKET_ROWS))


# ------------------------------------------------------------------------------------------------------------ choosing


def choose(buckets: Buckets, takers: Sequence[Taker], mixture: Mixture, exhausted: Sequence[bool]) -> None:
    """Let every set take its documents: held-out sets first, then sources in order, then other validation sets.

    Args:
        buckets: Of ``distinct_documents``; the rows are marked.
        takers: All sets; their counts are filled in.
        mixture: The recipe.
        exhausted: Whether all files of each reading were read.

    Raises:
        MemSinksError: If a set has not as many documents as it is to take, or nothing is left.
        NeedMoreError: If more files must be read first.
    """
    for taker in sorted(takers, key=lambda taker: 1 if taker.split == "train" else 0 if taker.hold_out else 2):
        picker = Picker(taker, mixture)
        last = None
        if taker.limit is not None:
            written = sum(other.written_tokens for other in takers if other.split == "train")
            limit = picker.limit(buckets, written, exhausted[taker.reading])
            if not limit:
                continue
            last = last_key(partial(picker.keys_and_weights, buckets), limit)
        picker.mark(buckets, takers.index(taker), last)
    if not any(taker.written for taker in takers if taker.split == "train"):
        raise MemSinksError("No document is left for training. Raise --documents, or the limits of the sources.")


class Picker:
    """One set's choice among the documents that are still free.

    Args:
        taker: The set; its counts are filled in.
        mixture: The recipe.
    """

    def __init__(self, taker: Taker, mixture: Mixture) -> None:
        self.taker, self.mixture = taker, mixture

    def candidates(self, rows: np.ndarray) -> npt.NDArray[np.bool_]:
        """Which rows of a bucket the set may take."""
        free = (rows["reading"] == self.taker.reading) & ~rows["taken"]
        if self.taker.hold_out:  # a document that another corpus has too would be missed there
            others = rows["digest"][~np.isin(rows["reading"], (self.taker.reading, *self.taker.alike))]
            free &= ~np.isin(rows["digest"], others)
        return free

    def keys(self, rows: np.ndarray) -> npt.NDArray[np.uint64]:
        """What documents are chosen by, smallest first."""
        if self.taker.choose == "first":
            return rows["order"]
        return mix(rows["digest"], self.mixture.seed, "choose", self.taker.name)

    def times(self, rows: np.ndarray) -> npt.NDArray[np.int64]:
        """How often each document is to occur."""
        return rows["copies"].astype(np.int64) if self.taker.repeats is None else np.full(len(rows), self.taker.repeats)

    def times_written(self, rows: np.ndarray) -> npt.NDArray[np.int64]:
        """How often each document is written."""
        times = self.times(rows)
        left_out = self.taker.split == "train" and self.mixture.leave_out_repeated
        return np.where(times > 1, 0, times) if left_out else times

    def lengths(self, rows: np.ndarray) -> npt.NDArray[np.int64]:
        """Tokens of each document as it is written."""
        return rows["length"].astype(np.int64) + self.taker.canary_tokens

    def weights(self, rows: np.ndarray) -> npt.NDArray[np.int64]:
        """What each document counts towards the limit."""
        if self.taker.limit is None or self.taker.limit[0] in ("documents", "fraction"):
            return np.ones(len(rows), dtype=np.int64)
        return self.lengths(rows) * (1 if self.taker.limit[0] == "tokens" else self.times_written(rows))

    def keys_and_weights(self, buckets: Buckets) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        """Keys and weights of the free documents, bucket by bucket."""
        for rows in buckets:
            free = rows[self.candidates(rows)]
            yield self.keys(free), self.weights(free)

    def limit(self, buckets: Buckets, written: int, exhausted: bool) -> int:
        """The sum of weights at which the set has enough.

        Args:
            buckets: The documents.
            written: Tokens in the training stream so far.
            exhausted: Whether all files were read.

        Raises:
            MemSinksError: If there are not enough documents.
            NeedMoreError: If there may be after more reading.
        """
        taker = self.taker
        assert taker.limit is not None
        kind, value = taker.limit
        available = sum(int(weights.sum()) for _, weights in self.keys_and_weights(buckets))
        if kind == "fraction":
            if (wanted := max(1, round(value * available))) >= available:
                raise MemSinksError(
                    f"{taker.label}: {available} document(s) cannot be split into training and validation. Give more "
                    "text; what another source has too is not held out."
                )
            return wanted
        wanted = int(value) - (written if kind == "fill_to" else 0)
        if kind == "fill_to" and wanted <= 0:
            raise MemSinksError(
                f"{taker.label}.fill_to is {int(value):,} tokens, but the other sources fill {written:,}. Raise it."
            )
        if wanted <= available:
            return wanted
        if not exhausted:
            missing = wanted - available
            raise NeedMoreError(taker.reading, **{"documents" if kind == "documents" else "tokens": missing})
        if kind == "fill_to":
            raise MemSinksError(
                f"{taker.label}.fill_to is {int(value):,} tokens: the other sources give {written:,}, and it has only "
                f"{available:,} of the other {wanted:,}. Lower it, or give more text."
            )
        what = "distinct documents" if kind == "documents" else "tokens"
        raise MemSinksError(
            f"{taker.label}.{kind} is {int(value):,}, but only {available:,} {what} are left for it. Lower it, or give "
            "more text."
        )

    def mark(self, buckets: Buckets, index: int, last: np.uint64 | None) -> None:
        """Take documents.

        Args:
            buckets: The documents; their rows are marked.
            index: Of the set.
            last: The largest key that is taken; all are if it is ``None``.

        Raises:
            MemSinksError: If there is none.
        """
        taker = self.taker
        for bucket, rows in enumerate(buckets):
            if taker.split == "val" and not taker.hold_out:
                taker.overlap += int(((rows["reading"] == taker.reading) & rows["taken"]).sum())
            take = self.candidates(rows)
            if last is not None:
                take &= self.keys(rows) <= last
            rows["taker"][take] = index
            rows["times"][take] = self.times(rows[take])
            rows["written"][take] = self.times_written(rows[take])
            rows["taken"] |= np.isin(rows["digest"], rows["digest"][take])
            buckets[bucket] = rows
        if not any((rows["taker"] == index).any() for rows in buckets):
            if taker.overlap:
                raise MemSinksError(
                    f"Every validation document of {taker.label} is in the training corpus too. Give held-out text."
                )
            raise MemSinksError(f"No document is left for {taker.label}. Give more text.")
        self.count(buckets, index)

    def count(self, buckets: Buckets, index: int) -> None:
        """Fill in what the set has taken."""
        taker = self.taker
        taker.documents = taker.tokens = taker.written = taker.written_tokens = 0
        for rows in buckets:
            mine = rows[rows["taker"] == index]
            taker.documents += len(mine)
            taker.tokens += int(self.lengths(mine).sum())
            taker.written += int(mine["written"].sum())
            taker.written_tokens += int((self.lengths(mine) * mine["written"]).sum())


_BINS = 65536


def last_key(
    stream: Callable[[], Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]], limit: int
) -> np.uint64:
    """The key at which a running sum over items in order of their keys reaches a limit, without sorting them all.

    Each pass over the items finds the bin of keys in which it happens, until the bin's items fit into memory.

    Args:
        stream: Gives the items anew at each call, as blocks of keys (uint64, distinct) and weights (int64, >= 0).
        limit: At least 1 and at most the sum of all weights.
    """
    low, high, before = 0, 2**64, 0
    while True:
        width = -(-(high - low) // _BINS)
        counts, sums = np.zeros(_BINS, dtype=np.int64), np.zeros(_BINS)
        for keys, weights in stream():
            inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))
            bins = ((keys[inside] - np.uint64(low)) // np.uint64(width)).astype(np.int64)
            counts += np.bincount(bins, minlength=_BINS)
            sums += np.bincount(bins, weights[inside], minlength=_BINS)  # exact below 2**53
        reached = before + np.cumsum(sums)
        index = int(np.searchsorted(reached, limit))
        before = int(reached[index - 1]) if index else before
        low, high = low + index * width, min(low + (index + 1) * width, high)
        if counts[index] <= BUCKET_ROWS or width == 1:
            break
    return _last_of(stream(), low, high, limit - before)


def _last_of(
    blocks: Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]], low: int, high: int, limit: int
) -> np.uint64:
    found = [
        (keys[inside], weights[inside])
        for keys, weights in blocks
        for inside in [(keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))]
    ]
    keys, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(keys)
    return keys[order][np.searchsorted(np.cumsum(weights[order]), limit)]


def drop_near_duplicates(
    buckets: Buckets, takers: Sequence[Taker], units: Sequence[Done], mixture: Mixture, work: Path
) -> None:
    """Drop validation documents that are near-duplicates of documents that are trained on.

    Args:
        buckets: After ``choose``; the rows are marked.
        takers: All sets; their counts are corrected.
        units: All units, in order.
        mixture: The recipe.
        work: Folder for scratch files.

    Raises:
        MemSinksError: If no validation document is left in a set.
    """
    total = sum(unit.info.documents for unit in units)
    trained = np.memmap(work / "trained.bin", dtype=np.bool_, mode="w+", shape=(total,))
    is_source = np.array([taker.split == "train" for taker in takers])
    for rows in buckets:
        chosen = rows[rows["taker"] >= 0]
        trained[chosen["order"][is_source[chosen["taker"]]]] = True
    for index, taker in enumerate(takers):
        if taker.split == "train":
            continue
        mine = np.sort(np.concatenate([rows["order"][rows["taker"] == index] for rows in buckets]))
        near = near_any(
            [unit.signatures() for unit in units],
            _signatures_of(mine, units, mixture.near_duplicates.permutations),
            mixture.near_duplicates,
            selected=lambda start, stop: trained[start:stop],
        )
        if near.all():
            raise MemSinksError(
                f"Every document of {taker.label} is a near-duplicate of a document that is trained on "
                f"(threshold {mixture.near_duplicates.threshold}). Give other text, or raise the threshold."
            )
        for bucket, rows in enumerate(buckets):
            rows["taker"][(rows["taker"] == index) & np.isin(rows["order"], mine[near])] = -1
            buckets[bucket] = rows
        Picker(taker, mixture).count(buckets, index)
        taker.near_duplicates_dropped = int(near.sum())


def _signatures_of(order: npt.NDArray[np.uint64], units: Sequence[Done], permutations: int) -> npt.NDArray[np.uint32]:
    """Signatures of some documents by their number among all."""
    found = []
    start = 0
    for unit in units:
        stop = start + unit.info.documents
        inside = order[(order >= start) & (order < stop)]
        if len(inside):
            path, rows = unit.signatures()
            own = np.memmap(path, dtype=np.uint32, mode="r", shape=(rows, permutations))
            found.append(np.array(own[inside - np.uint64(start)]))
        start = stop
    return np.concatenate(found)


# ------------------------------------------------------------------------------------------------------------ ordering


@dataclass
class Stream:
    """A stream to be written."""

    entries: Path
    """``ENTRY`` rows in their final order"""
    documents: int = 0
    """Distinct documents"""
    written: int = 0
    """Occurrences"""
    tokens: int = 0
    """Tokens of all occurrences"""
    repeated_documents: int = 0
    """Distinct documents that occur more than once"""
    repeated_tokens: int = 0
    """Tokens of their occurrences"""


@dataclass
class Plan:
    """What is to be written, on disk."""

    token_files: list[Path]
    """Files of tokens, all of one ``token_dtype``; an entry's ``unit`` is an index into them"""
    streams: dict[str, Stream]
    """Name of the split's folder to its stream"""
    chosen: Buckets
    """``CHOSEN`` rows of the document table, in order of reading"""
    max_token: int = 0
    """Largest token of all streams"""
    colliding_pairs: int = 0
    """Pairs of training documents that share an ID by chance"""
    duplicates: int = 0
    """Documents of the training corpora that are exact copies of another"""


def make_plan(
    buckets: Buckets,
    takers: Sequence[Taker],
    units: Sequence[Done],
    mixture: Mixture,
    canary_vocabulary: npt.NDArray[np.int32],
    work: Path,
) -> Plan:
    """Give every occurrence its ID and its place in the shuffle.

    Args:
        buckets: After ``choose``.
        takers: All sets.
        units: All units, in order.
        mixture: The recipe.
        canary_vocabulary: Tokens that canaries are drawn from.
        work: Folder for the plan; made here.
    """
    total = sum(unit.info.documents for unit in units)
    chosen = Buckets.for_rows(work / "chosen", total, CHOSEN)
    token_files = [unit.token_file for unit in units]
    token_files.append(work / f"canaries{token_files[0].suffix}")
    token_files[-1].touch()
    val_sets = [taker.name for taker in takers if taker.split == "val"]
    written = {"train": sum(taker.written for taker in takers if taker.split == "train")}
    written["val"] = sum(taker.written for taker in takers if taker.split == "val")
    if len(val_sets) > 1:
        written |= {f"val_{taker.name}": taker.written for taker in takers if taker.split == "val"}
    entries = {name: Buckets.for_rows(work / "entries" / name, count, ENTRY) for name, count in written.items()}
    plan = Plan(token_files, {name: Stream(work / f"{name}.bin") for name in written}, chosen)
    identities = Buckets.for_rows(work / "identities", written["train"], _IDENTITY)
    training = {taker.reading for taker in takers if taker.split == "train"}
    plan.duplicates = sum(unit.info.documents for unit in units if unit.unit.reading in training)
    for bucket in buckets:
        plan.duplicates -= len(np.unique(bucket["digest"][np.isin(bucket["reading"], list(training))]))
        rows = finished_rows(bucket[bucket["taker"] >= 0], takers, token_files, mixture, canary_vocabulary)
        chosen.add(rows, (rows["order"] * np.uint64(chosen.count) // np.uint64(max(total, 1))).astype(np.int64))
        plan.max_token = max(plan.max_token, int(rows["max_token"].max(initial=0)))
        for name, stream in plan.streams.items():
            mine = rows[_in_split(rows, name, takers)]
            _count(stream, mine)
            for part in _parts(mine):
                occurrences = entries_of(part, mixture)
                entries[name].add(occurrences, entries[name].by_hash(occurrences["key"]))
            if name == "train":
                identities.add(*_identities(mine, takers, identities))
    for name, stream in plan.streams.items():
        _sort_entries(entries[name], stream.entries)
    plan.colliding_pairs = sum(colliding_pairs(np.unique(rows)["hash"]) for rows in identities)
    return plan


_IDENTITY = np.dtype([("hash", "<u8")])


def _identities(
    rows: np.ndarray, takers: Sequence[Taker], buckets: Buckets
) -> tuple[np.ndarray, npt.NDArray[np.int64]]:
    """What the IDs of training documents are made of, by bucket of their ID."""
    hashes = np.zeros(len(rows), dtype=_IDENTITY)
    hashes["hash"] = rows["group"]
    return hashes, buckets.by_hash(document_bits(rows["group"]), bits=31)


def finished_rows(
    rows: np.ndarray,
    takers: Sequence[Taker],
    token_files: Sequence[Path],
    mixture: Mixture,
    canary_vocabulary: npt.NDArray[np.int32],
) -> np.ndarray:
    """Rows of the document table: with canaries appended, and with IDs.

    ``group`` becomes what the ID is made of: the digest, the hash of the key, the document's number, or the digest of
    the first document of its cluster.
    """
    finished = np.zeros(len(rows), dtype=CHOSEN)
    for name in ROW.names or ():
        finished[name] = rows[name]
    for index, taker in enumerate(takers):
        mine = np.flatnonzero(rows["taker"] == index)
        if taker.canary_tokens and len(mine):
            own = finished[mine]
            append_canaries(own, taker.canary_tokens, token_files, mixture.seed, canary_vocabulary)
            finished[mine] = own
        if taker.ids == "hash":
            finished["group"][mine] = finished["digest"][mine]
        elif taker.ids == "index":
            finished["group"][mine] = finished["order"][mine] + np.uint64(1)
    by_cluster = np.array([taker.ids == "near_duplicate" for taker in takers])[finished["taker"]]
    is_source = np.array([taker.split == "train" for taker in takers])[finished["taker"]]
    repeated = is_source & ((finished["times"] > 1) | (by_cluster & finished["clustered"]))
    finished["id"] = sequence_ids(finished["group"], repeated)
    return finished


def append_canaries(
    rows: np.ndarray, canary_tokens: int, token_files: Sequence[Path], seed: int, vocabulary: npt.NDArray[np.int32]
) -> None:
    """Write copies of documents with random tokens before their EOS to the last token file, and point the rows there.

    The digest becomes that of the whole, BOS (which a tokenizer may add) aside, so that the canary decides the ID too.
    """
    with open(token_files[-1], "ab") as out:
        for row in rows:
            tokens = read_tokens(token_files[row["unit"]], int(row["offset"]), int(row["length"]))
            canary = np.random.default_rng([seed, int(row["digest"])]).choice(vocabulary, canary_tokens)
            bos = int(digest(tokens[:-1]) != row["digest"])
            tokens = np.concatenate((tokens[:-1], canary, tokens[-1:])).astype(np.int32)
            row["unit"], row["length"] = len(token_files) - 1, len(tokens)
            row["offset"] = out.tell() // token_dtype(token_files[-1]).itemsize
            row["digest"], row["max_token"] = digest(tokens[bos:-1]), tokens.max()
            tokens.astype(token_dtype(token_files[-1])).tofile(out)


def read_tokens(path: Path, offset: int, length: int) -> npt.NDArray[np.int32]:
    """Tokens of one document."""
    dtype = token_dtype(path)
    return np.fromfile(path, dtype=dtype, count=length, offset=dtype.itemsize * offset).astype(np.int32)


def _in_split(rows: np.ndarray, split: str, takers: Sequence[Taker]) -> npt.NDArray[np.bool_]:
    members = [taker.split == split or (taker.split == "val" and split == f"val_{taker.name}") for taker in takers]
    return np.array(members)[rows["taker"]]


def _count(stream: Stream, rows: np.ndarray) -> None:
    rows = rows[rows["written"] > 0]
    tokens = rows["length"].astype(np.int64) * rows["written"]
    repeated = rows["id"] < 0
    stream.documents += len(rows)
    stream.written += int(rows["written"].sum())
    stream.tokens += int(tokens.sum())
    stream.repeated_documents += int(repeated.sum())
    stream.repeated_tokens += int(tokens[repeated].sum())


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows so that the occurrences of each part fit into memory."""
    part = np.cumsum(rows["written"], dtype=np.int64) // BUCKET_ROWS
    return (rows[start:stop] for start, stop in _runs(part))


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    starts = np.flatnonzero(_differs(values)).tolist()
    return zip(starts, [*starts[1:], len(values)], strict=False)  # no run if there are no values


def entries_of(rows: np.ndarray, mixture: Mixture) -> np.ndarray:
    """One ``ENTRY`` per occurrence: the shuffle is the order of keys drawn from the document and the occurrence."""
    written = rows["written"].astype(np.int64)
    source = np.repeat(np.arange(len(rows)), written)
    occurrence = np.arange(len(source)) - np.repeat(np.cumsum(written) - written, written)
    entries = np.zeros(len(source), dtype=ENTRY)
    for name in ("offset", "unit", "length", "id"):
        entries[name] = rows[name][source]
    with np.errstate(over="ignore"):
        drawn = mix(rows["digest"], mixture.seed, "occurrence")[source] + occurrence.astype(np.uint64)
    entries["key"] = mix(drawn, "shuffle")
    entries["id"] = noisy_ids(entries["id"], mixture.id_noise, mix(drawn, "noise"))
    return entries


def _sort_entries(buckets: Buckets, path: Path) -> None:
    with open(path, "wb") as file:
        for rows in buckets:
            rows[np.argsort(rows["key"], kind="stable")].tofile(file)
