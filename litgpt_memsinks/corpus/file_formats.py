"""How documents lie in files: opens what is compressed or remote, and takes it apart into one record per document.

A file is held a block at a time, whatever its size; only a single record has to fit into memory.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from litgpt_memsinks.errors import MemSinksError

DAMAGE = (
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RecursionError,
    zlib.error,
    zstandard.ZstdError,
    pa.ArrowException,
)
"""What the functions below raise where a file cannot be read on."""
BOM = codecs.BOM_UTF8
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}

_BLOCK = 1 << 18
_ROWS = 256  # of a parquet file at once: documents may be long
_LONGEST = 1 << 28  # bytes of a separated document; beyond that, the separator is surely another one


class BadRecordError(Exception):
    """One record that is no document. The records behind it can be read.

    Attributes:
        reason: What is wrong, to follow the place: "is not JSON: ...".
        step: What its user can do, a sentence.
    """

    def __init__(self, reason: str, step: str = "Correct it, or pass over it (on_bad_line: skip).") -> None:
        super().__init__(reason)
        self.reason, self.step = reason, step


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """A text as one line of bounded length; an error without a text is called by its type."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else line[:longest] + " ..."


# -------------------------------------------------------------------------------------------------------------- opening


def is_url(path: str) -> bool:
    """Whether fsspec is to open a path, as ``s3://bucket/file``."""
    return "://" in path


@contextmanager
def reaching(path: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a file into errors that name it.

    Raises:
        MemSinksError: If it is missing or forbidden, its server fails, or fsspec lacks the package for its protocol.
    """
    try:
        yield
    except MemSinksError:
        raise
    except FileNotFoundError as error:
        # fsspec also says so of a server that does not answer; then the cause knows more
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
        raise MemSinksError(f"There is no file or folder {path!r}{cause}. Correct the path.") from error
    except PermissionError as error:
        reason = one_line(error.strerror or error)
        raise MemSinksError(f"{path!r} may not be read: {reason}. Change its permissions, or log in.") from error
    except ImportError as error:
        package = PACKAGES.get(path.split("://")[0].split("::")[-1], error.name)
        raise MemSinksError(f"{path!r} needs a package: {one_line(error)}. Run: pip install {package}") from error
    except Exception as error:
        # the libraries behind fsspec raise errors of many families
        if not is_url(path) and not isinstance(error, OSError | ValueError):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise MemSinksError(f"{path!r} cannot be reached: {reason}. Correct the path, or try again.") from error


class _Raw(io.RawIOBase):
    """The stored bytes of a file. Its failures are MemSinksErrors, so that no reader takes them for damage."""

    def __init__(self, path: str, on_bytes: Callable[[int], None] | None) -> None:
        self._path, self._on_bytes = path, on_bytes
        with reaching(path):
            self._file = _open_url(path) if is_url(path) else io.FileIO(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with reaching(self._path):
            size = self._file.readinto(buffer)
        if self._on_bytes is not None:
            self._on_bytes(self._file.tell())
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with reaching(self._path):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


def _open_url(path: str) -> Any:
    import fsspec

    return fsspec.open(path, "rb").open()


class _GzFile(io.RawIOBase):
    """Reads a .gz file of any number of members, and hands out all that is in front of damage before it raises."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = gzip.GzipFile(fileobj=io.BufferedReader(file, _BLOCK))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto1(buffer)


class _ZstFile(io.RawIOBase):
    """Reads a .zst file of any number of frames, and unlike zstandard's own reader notices if the last one is cut."""

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file = file
        self._frame: Any = None  # that is being read; None between frames
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and (packed := self._packed or self._file.read(65536)):
            self._frame = self._frame or self._new_frame()
            self._unpacked, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        if not self._unpacked and self._frame is not None:
            raise EOFError("Compressed file ended before the end of its last frame")
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    @staticmethod
    def _new_frame() -> Any:
        # some corpora are packed with `zstd --long=31`; its window is only used by those that are
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


@contextmanager
def open_stream(
    path: str, compression: str = "", on_bytes: Callable[[int], None] | None = None
) -> Iterator[io.BufferedReader]:
    """Open a local or remote file for reading what it holds, unpacked.

    Args:
        path: Path, or URL that fsspec opens.
        compression: ``"gz"``, ``"zst"`` or ``""``.
        on_bytes: Called with the number of stored bytes read so far.

    Raises:
        MemSinksError: If it cannot be reached, here or later; see ``reaching``.
    """
    with _Raw(path, on_bytes) as raw:
        unpacked: Any = raw
        if compression == "gz":
            unpacked = _GzFile(raw)
        elif compression == "zst":
            unpacked = _ZstFile(raw)
        yield io.BufferedReader(unpacked, _BLOCK)


def _read(stream: io.BufferedReader, least: int) -> bytes:
    """A block of bytes, of at least ``least`` unless the file ends before."""
    # read1 hands out what there is in front of damage, where read would lose it
    blocks = [stream.read1(_BLOCK)]
    size = len(blocks[0])
    while blocks[-1] and size < least:
        blocks.append(stream.read1(_BLOCK))
        size += len(blocks[-1])
    return b"".join(blocks)


# ----------------------------------------------------------------------------------------------------- JSON and parquet


_decode_json = json.JSONDecoder().decode


def parse_line(line: bytes) -> Any:
    """The value of one line of JSON.

    Raises:
        BadRecordError: If it is not UTF-8 or not JSON.
    """
    try:
        # json.loads(line) would guess the encoding, and take UTF-16 where every line has to be UTF-8
        return _decode_json(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecordError(f"is not UTF-8: {error}", "Convert it, or pass over it (on_bad_line: skip).") from error
    except json.JSONDecodeError as error:
        raise BadRecordError(f"is not JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"is not JSON that Python reads: {one_line(error)}") from error


def lines(stream: io.BufferedReader) -> Iterator[bytes]:
    r"""Yield the lines of a file, without its byte order mark. They end at ``\n`` only, as JSON lines do."""
    first = stream.readline()
    return chain([first.removeprefix(BOM)] if first else [], stream)


def elements(stream: io.BufferedReader) -> Iterator[Any]:
    """Yield the values of a JSON array one by one.

    Invalid UTF-8 becomes lone surrogates, so that it spoils no more than the element that has it.

    Raises:
        ValueError: If the file is not one array, at the first place that is wrong.
        RecursionError: If an element is nested too deeply.
    """
    # the standard library reads each element: ijson 3.6 turns half a surrogate pair into "?" and crashes at integers
    # of thousands of digits
    text = _GrowingText(stream)
    if text.next_character() == "\ufeff":
        text.at += 1
    if text.next_character() != "[":
        raise ValueError("it does not begin with [ as an array does")
    text.at += 1
    mark = "" if text.next_character() == "]" else ","
    while mark == ",":
        yield text.value()
        mark = text.next_character()
        text.at += mark == ","
    if text.next_character() != "]":
        raise ValueError("an element is followed by neither , nor ]" if text.next_character() else "it ends before ]")
    text.at += 1
    if text.next_character():
        raise ValueError("more follows after the array")


class _GrowingText:
    """Text of a stream from ``at`` on, of which more is read as needed."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.text, self.at, self._ended = "", 0, False
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def _more(self) -> None:
        rest = self.text[self.at :]
        block = _read(self._stream, len(rest))  # twice as much each time, or a long element took quadratic time
        self.text, self.at, self._ended = rest + self._decoder.decode(block, not block), 0, not block

    def next_character(self) -> str:
        """The first character that is not white space, where ``at`` is then; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self) -> Any:
        """The JSON value that comes next; ``at`` is then behind it."""
        self.next_character()
        while True:
            try:
                value, end = _raw_decode(self.text, self.at)
                if end + 2 < len(self.text) or self._ended:  # or a number may go on in the next block, as 1 e+ 5
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended or not _may_be_cut(error, self.text):
                    raise ValueError(error.msg) from error
            self._more()


_SPACE = re.compile(r"[ \t\n\r]*")
_raw_decode = json.JSONDecoder().raw_decode


def _may_be_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could mend an error: a string is open, or it is within a token (as -Infinity) of the end."""
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


def rows(stream: io.BufferedReader, columns: list[str], on_share: Callable[[float], None]) -> Iterator[Any]:
    """Yield the rows of a parquet file as objects, reading a few at a time.

    Args:
        stream: The file, from which can be read anywhere.
        columns: The only columns that are read, dots leading into nested ones. Others are in the objects as None.
        on_share: Called with the share of the rows that have been read.

    Raises:
        DAMAGE: If the file is not parquet, or damaged. A row that has no Python value is yielded as its error.
    """
    # pre_buffer would read whole row groups, which may be the whole file
    options = {"buffer_size": _BLOCK, "pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(stream, **options) as file:
        names = dict.fromkeys(file.schema_arrow.names)
        paths = [file.schema.column(index).path for index in range(len(file.schema))]
        known = [column for column in columns if any(f"{path}.".startswith(f"{column}.") for path in paths)]
        if not known:
            yield from (dict(names) for _ in range(file.metadata.num_rows))
            return
        done = 0
        for batch in file.iter_batches(_ROWS, columns=known, use_threads=False):
            done += batch.num_rows
            on_share(done / file.metadata.num_rows)
            for row in _python_rows(batch):
                yield {**names, **row} if isinstance(row, dict) else row


def _python_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:  # bytes that are not UTF-8, the year 10000
        if batch.num_rows == 1:
            return [error]
        return [row for index in range(batch.num_rows) for row in _python_rows(batch.slice(index, 1))]


# ----------------------------------------------------------------------------------------------------------- plain text


def pieces(stream: io.BufferedReader, separator: str) -> Iterator[bytes]:
    """Yield what stands between separators; behind the last one only if it is more than line ends.

    Raises:
        ValueError: If no separator comes for too long.
    """
    mark = separator.encode()
    *found, rest = _read(stream, len(BOM)).removeprefix(BOM).split(mark)
    yield from found
    while block := _read(stream, len(rest)):
        *found, rest = (rest + block).split(mark)
        yield from found
        if len(rest) > _LONGEST:
            raise ValueError(f"there is no {separator!r} (separator) in {len(rest):,} bytes")
    if rest.strip(b"\r\n"):
        yield rest


def whole(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield all of a file, without its byte order mark."""
    yield stream.read().removeprefix(BOM)
