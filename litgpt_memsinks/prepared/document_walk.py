"""From a stream back to its documents: where each begins and ends, held against the document table.

    pairs ─► segments, each up to an EOS ─► digest ─► row of the table with this digest, length and ID

EOS ends a document, but a text may hold EOS itself (`<|endoftext|>` in a text becomes the token), and then its segments
are no documents. A segment that is none is joined with what follows under the same ID until the table knows the
whole, and if that fails, with the documents before it: the first segments of a text may be a document, too. Two
documents in a row may share an ID, and a document longer than a chunk goes on in the next, so neither a change of the
ID nor the end of a chunk is a boundary.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from litgpt_memsinks.prepared.document_table import DocumentTable, Where

_FIRST = 5  # places named of each kind of failure
_VAIN = 1_000_000  # joins tried in vain before giving up: a stream of other tokens would try them all


class Expected:
    """The document table of one split as sorted columns: 28 bytes per distinct document, 44 while it is read.

    Args:
        table: The document table.
        where: Filter for the split's rows.

    Attributes:
        digests: Sorted, uint64 ``(n_documents,)``.
        ids: Sequence IDs, int32 of the same shape.
        lengths: Tokens with BOS and EOS, int64.
        written: Occurrences that the table promises, uint32.
        counted: Occurrences that were found, uint32.
    """

    def __init__(self, table: DocumentTable, where: Where) -> None:
        rows = table.count(where)
        self.digests = np.empty(rows, dtype=np.uint64)
        self.ids = np.empty(rows, dtype=np.int32)
        self.lengths = np.empty(rows, dtype=np.int64)
        self.written = np.empty(rows, dtype=np.uint32)
        start = 0
        for part in table.parts(["digest", "sequence_id", "tokens", "written"], where):
            stop = start + part.num_rows
            columns: list[np.ndarray] = [self.digests, self.ids, self.lengths, self.written]
            for column, values in zip(columns, part.columns, strict=True):
                column[start:stop] = values.to_numpy()
            start = stop
        order = np.argsort(self.digests)
        self.digests, self.ids = self.digests[order], self.ids[order]
        self.lengths, self.written = self.lengths[order], self.written[order]
        self.counted = np.zeros(rows, dtype=np.uint32)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max(initial=0))

    def find(self, digests: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of documents.

        Args:
            digests: Shape ``(n,)``.
            lengths: Tokens with BOS and EOS, same shape.

        Returns:
            Row numbers of the same shape; -1 where the table has no such document.
        """
        if not len(self.digests):
            return np.full(len(digests), -1)
        rows = np.minimum(np.searchsorted(self.digests, digests), len(self.digests) - 1)
        return np.where((self.digests[rows] == digests) & (self.lengths[rows] == lengths), rows, -1)


class Marks(NamedTuple):
    """How the streams' tokenizer marks documents."""

    bos: int | None
    """Token in front of each document; ``None`` if there is none"""
    eos: int
    """Token at the end of each document"""


class Segments:
    """What lies between two EOS in a part of a stream, and which segments make a document.

    Args:
        pairs: Tokens and sequence IDs, shape ``(n_tokens, 2)``.
        marks: The tokenizer's.
        expected: The table.
        noise: Whether repeated documents may carry random IDs.
    """

    def __init__(self, pairs: npt.NDArray[np.int32], marks: Marks, expected: Expected, noise: bool) -> None:
        self.marks, self.expected, self.noise = marks, expected, noise
        self.tokens, self.ids = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
        self.view = self.tokens.data.cast("B")
        self.ends = np.flatnonzero(self.tokens == marks.eos)
        self.starts = np.concatenate(([0], self.ends[:-1] + 1)) if len(self.ends) else self.ends
        self.changes = np.flatnonzero(self.ids[1:] != self.ids[:-1]) + 1  # where another ID begins
        self.rows = self._rows()
        self.good = (self.rows >= 0) & (self._wrong() == 0)
        self.heads = np.ones(len(self.ends), dtype=np.bool_)  # whether a document begins here
        self.last = np.arange(len(self.ends))  # last segment of the document that begins here

    @property
    def tail(self) -> int:
        """Position behind the last EOS."""
        return int(self.ends[-1]) + 1 if len(self.ends) else 0

    def _rows(self) -> npt.NDArray[np.int64]:
        front = 4 * (self.marks.bos is not None)
        view = self.view
        places = zip((4 * self.starts + front).tolist(), (4 * self.ends).tolist(), strict=True)
        digests = np.fromiter(
            (xxhash.xxh3_64_intdigest(view[start:end]) for start, end in places), np.uint64, len(self.ends)
        )
        rows = self.expected.find(digests, self.ends + 1 - self.starts)
        return rows if self.marks.bos is None else np.where(self.tokens[self.starts] == self.marks.bos, rows, -1)

    def _wrong(self) -> npt.NDArray[np.int64]:
        """Tokens of each segment that carry another ID than they are to; the segment's first one if it is unknown."""
        if not len(self.ends):
            return self.ends
        wanted = self.wanted_ids(self.rows, self.ids[self.starts])
        wrong = self.ids[: self.tail] != np.repeat(wanted, self.ends + 1 - self.starts)
        return np.add.reduceat(wrong, self.starts, dtype=np.int64)

    def wanted_ids(self, rows: npt.NDArray[np.int64], seen: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The IDs that documents are to carry, given the ones that they do: of a noisy one, only the sign is known."""
        if not len(self.expected.ids):
            return seen
        wanted = self.expected.ids[rows]
        free = rows < 0
        if self.noise:
            free |= (wanted < 0) & (seen < 0)
        return np.where(free, seen, wanted)

    def run_start(self, position: int) -> int:
        """Where the run of equal IDs begins that holds a position."""
        index = int(np.searchsorted(self.changes, position, side="right"))
        return int(self.changes[index - 1]) if index else 0

    def run_stop(self, position: int) -> int:
        """Where the run of equal IDs ends that holds a position."""
        index = int(np.searchsorted(self.changes, position, side="right"))
        return int(self.changes[index]) if index < len(self.changes) else len(self.ids)

    def document_before(self, segment: int) -> int | None:
        """The first segment of the document before another."""
        before = segment - 1
        while before >= 0 and not self.heads[before]:
            before -= 1
        return before if before >= 0 else None

    def join(self, first: int, last: int, row: int) -> None:
        """Make one document of several segments."""
        self.heads[first + 1 : last + 1] = False
        self.rows[first], self.last[first], self.good[first] = row, last, True

    def span(self, first: int) -> slice:
        """Tokens of the document that begins with a segment."""
        return slice(int(self.starts[first]), int(self.ends[self.last[first]]) + 1)


class Failure(NamedTuple):
    """Something that is wrong with a document of a stream."""

    position: int
    """Its first token's number in the stream, from 0"""
    reason: str
    """What is wrong"""


class Walk:
    """Reads a stream from its first token to its last, however it is cut, and counts its documents.

    Memory is a few times that of one part, or of the longest document.

    Args:
        expected: The table of the split; its ``counted`` is filled in.
        marks: The tokenizer's.
        noise: Whether repeated documents may carry random IDs.
        surplus: Rows that an earlier walk found too often, bool ``(n_documents,)``: one of them and those behind it may
            be a document that was found too seldom, if all have the same ID.

    Attributes:
        occurrences: Documents that the table knows.
        unknown: Segments that the table does not know.
        mispaired: Tokens that carry another ID than their document.
        repeated: Occurrences of repeated documents.
        repeated_tokens: Their tokens.
        noisy: Those with another ID than the table's.
        failures: The first things that are wrong.
    """

    def __init__(
        self, expected: Expected, marks: Marks, noise: bool, surplus: npt.NDArray[np.bool_] | None = None
    ) -> None:
        self.expected, self.marks, self.noise, self.surplus = expected, marks, noise, surplus
        self.occurrences = self.unknown = self.mispaired = 0
        self.repeated = self.repeated_tokens = self.noisy = 0
        self.failures: list[Failure] = []
        self._carry = np.empty((0, 2), dtype=np.int32)
        self._position = 0  # of the carry's first token
        self._longest, self._vain = expected.longest, 0

    def feed(self, pairs: npt.NDArray[np.int32]) -> None:
        """Read on.

        Args:
            pairs: The next tokens and sequence IDs, int32 ``(n_tokens, 2)``.
        """
        self._read(np.concatenate((self._carry, pairs)), whole=False)

    def finish(self) -> None:
        """Read what was held back."""
        self._read(self._carry, whole=True)

    def _read(self, pairs: npt.NDArray[np.int32], whole: bool) -> None:
        segments = Segments(pairs, self.marks, self.expected, self.noise)
        if self.surplus is not None:
            self._join_surplus(segments, self.surplus)
        for segment in np.flatnonzero(~segments.good).tolist():
            if segments.heads[segment]:
                self._join(segments, segment)
        stop = len(pairs) if whole else self._held_from(segments)
        self._count(segments, stop)
        if stop > segments.tail:
            self._fail(segments.tail, f"{stop - segments.tail:,} tokens without an EOS")
            self.unknown += 1
        self._carry = pairs[stop:].copy()
        self._position += stop

    def _held_from(self, segments: Segments) -> int:
        """Where what may belong to a document that goes on begins: the last run of one ID, as far as one can reach."""
        size = len(segments.ids)
        if size - segments.tail > self._longest:
            return size
        begin = max(segments.run_start(size - 1), size - self._longest) if size else 0
        heads = segments.starts[segments.heads]
        index = int(np.searchsorted(heads, begin))
        return int(heads[index]) if index < len(heads) else segments.tail

    # ------------------------------------------------------------------------------------------- EOS inside documents

    def _join(self, segments: Segments, segment: int) -> None:
        """Make a document of a segment that is none, with those behind it or before it."""
        first: int | None = segment
        reach = max(segments.run_start(int(segments.starts[segment])), int(segments.ends[segment]) + 1 - self._longest)
        while first is not None and segments.starts[first] >= reach and self._vain < _VAIN:
            if (found := self._known(segments, first, segment)) is not None:
                segments.join(first, *found)
                return
            first = segments.document_before(first)

    def _join_surplus(self, segments: Segments, surplus: npt.NDArray[np.bool_]) -> None:
        """Make documents that are still wanting of others that there are too many of."""
        joined: Counter[int] = Counter()
        for segment in np.flatnonzero(segments.good & surplus[segments.rows]).tolist():
            found = self._known(segments, segment, segment + 1) if segments.heads[segment] else None
            if found is None:
                continue
            row = found[1]
            if self.expected.counted[row] + joined[row] < self.expected.written[row]:
                segments.join(segment, *found)
                joined[row] += 1

    def _known(self, segments: Segments, first: int, least: int) -> tuple[int, int] | None:
        """The document that begins with a segment and ends with another, not before ``least``, if there is one.

        Returns:
            Its last segment, and its row.
        """
        start = int(segments.starts[first])
        stop = min(segments.run_stop(start), start + self._longest)
        for last, digest in self._digests(segments, first, stop):
            if last >= least:
                self._vain += 1
                length = int(segments.ends[last]) + 1 - start
                row = self.expected.find(np.array([digest], dtype=np.uint64), np.array([length]))
                if row[0] >= 0 and segments.wanted_ids(row, segments.ids[start : start + 1])[0] == segments.ids[start]:
                    self._vain -= last - least + 1
                    return last, int(row[0])
        return None

    def _digests(self, segments: Segments, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Digests of a segment alone, with the next, with the next two, and so on."""
        position = int(segments.starts[first])
        if self.marks.bos is not None:
            if segments.tokens[position] != self.marks.bos:
                return
            position += 1
        state = xxhash.xxh3_64()
        for last in range(first, len(segments.ends)):
            end = int(segments.ends[last])
            if end >= stop:
                return
            state.update(segments.view[4 * position : 4 * end])
            position = end
            yield last, state.intdigest()

    # -------------------------------------------------------------------------------------------------------- counting

    def _count(self, segments: Segments, stop: int) -> None:
        """Count the documents that begin before a position."""
        own = np.flatnonzero(segments.heads & (segments.starts < stop))
        known = own[segments.good[own]]
        rows = segments.rows[known]
        np.add.at(self.expected.counted, rows, 1)
        self.occurrences += len(known)
        repeated = self.expected.ids[rows] < 0
        self.repeated += int(repeated.sum())
        self.repeated_tokens += int(self.expected.lengths[rows[repeated]].sum())
        self.noisy += int((segments.ids[segments.starts[known]] != self.expected.ids[rows]).sum())
        for first in own[~segments.good[own]].tolist():
            self._count_wrong(segments, first)

    def _count_wrong(self, segments: Segments, first: int) -> None:
        """Count a document that is not in the table, or whose tokens carry other IDs."""
        span, row = segments.span(first), int(segments.rows[first])
        values, counts = np.unique(segments.ids[span], return_counts=True)
        common = values[counts.argmax()]
        wanted = int(segments.wanted_ids(np.array([row]), np.array([common]))[0])
        wrong = int(counts[values != wanted].sum())
        self.mispaired += wrong
        length = span.stop - span.start
        if row < 0:
            self.unknown += 1
            self._fail(span.start, f"a document of {length:,} tokens with ID {common} that is not in the table")
            return
        self.expected.counted[row] += 1
        self.occurrences += 1
        if self.expected.ids[row] < 0:
            self.repeated, self.repeated_tokens = self.repeated + 1, self.repeated_tokens + length
        self._fail(span.start, f"{wrong:,} of {length:,} tokens of a document carry another ID than {wanted}")

    def _fail(self, position: int, reason: str) -> None:
        if len(self.failures) < _FIRST:
            self.failures.append(Failure(self._position + position, reason))
