"""Reading a user's corpus: JSON lines, plain or compressed, with errors that name the file and the line."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from litgpt_memsinks.errors import MemSinksError


class Document(NamedTuple):
    """One text of a corpus."""

    line: int
    """Line number in its file, from 1"""
    text: str
    """The text, never empty"""


class _ZstFile(io.RawIOBase):
    """Reads a .zst file of any number of frames, and unlike zstandard's own reader notices if the last one is cut."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None  # that is being read; None between frames
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and (packed := self._packed or self._file.read(65536)):
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._unpacked, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        if not self._unpacked and self._frame is not None:
            raise EOFError("Compressed file ended before the end of its last frame")
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".jsonl": lambda file: file,
    ".json": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": _ZstFile,
}


def corpus_files(path: Path) -> list[Path]:
    """The files of a corpus: the file itself, or all JSON lines below a folder, sorted by name.

    Raises:
        MemSinksError: If there is none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _OPENERS and file.is_file())
    if not files:
        raise MemSinksError(f"The folder {str(path)!r} has no file ending in {', '.join(_OPENERS)}. Name another.")
    return files


def read_documents(
    path: Path, text_field: str = "text", on_bytes: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """Yield the texts of a JSON-lines file.

    Blank lines and empty texts are passed over.

    Args:
        path: File ending in ``.jsonl``, ``.json``, ``.gz`` or ``.zst``.
        text_field: Key of the text in each line's object.
        on_bytes: Called with the number of bytes of the file on disk read so far, for a progress bar.

    Raises:
        MemSinksError: If the file is missing, unreadable or has another ending, or a line is not a JSON object with a
            text in ``text_field``.
    """
    if not path.is_file():
        raise MemSinksError(f"There is no file {str(path)!r}. Give a corpus of JSON lines, one object per document.")
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise MemSinksError(
            f"{str(path)!r} ends in {path.suffix!r}, but JSON lines in {', '.join(_OPENERS)} are read. Convert it."
        )
    with open(path, "rb") as raw:
        lines = io.TextIOWrapper(io.BufferedReader(opener(raw)), encoding="utf-8", newline="\n")
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if on_bytes is not None:
                    on_bytes(raw.tell())
                if line.strip() and (text := _text(line, text_field, f"{str(path)!r}, line {number}")):
                    yield Document(number, text)
        except (EOFError, OSError, zlib.error, zstandard.ZstdError, UnicodeDecodeError) as error:
            raise MemSinksError(
                f"{str(path)!r} cannot be read after line {number}: {error}. It is damaged or not UTF-8."
            ) from error


def _text(line: str, text_field: str, where: str) -> str:
    """The text of one line, or raise with its place."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MemSinksError(f"{where} is not JSON: {error}. Correct the line or remove it.") from error
    if not isinstance(content, dict) or text_field not in content:
        found = f"has the fields {sorted(content)}" if isinstance(content, dict) else f"is a {type(content).__name__}"
        raise MemSinksError(
            f"{where} {found}, but an object with the text in {text_field!r} is expected. Name the field (text_field)."
        )
    text = content[text_field]
    if not isinstance(text, str):
        raise MemSinksError(f"{where} has a {type(text).__name__} in {text_field!r}, but a text is expected.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MemSinksError(f"{where} is not Unicode: {error}. Correct the line or remove it.") from error
    return text
