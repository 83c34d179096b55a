"""Reading a user's corpus: its files one by one, their documents one by one, and errors that name their place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from litgpt_memsinks.corpus import file_formats
from litgpt_memsinks.corpus.file_formats import DAMAGE, BadRecordError, one_line, open_stream
from litgpt_memsinks.corpus.find_files import CorpusFile, check_fields, corpus_files
from litgpt_memsinks.corpus.mixture import Reading
from litgpt_memsinks.errors import MemSinksError

__all__ = ["CorpusFile", "Document", "Passed", "corpus_files", "read_documents", "read_texts"]

UNITS = {"jsonl": "line", "json": "element", "parquet": "row", "separated": "document", "text": "document"}
"""What is counted in a file of each format."""

_MISSING = object()


class Document(NamedTuple):
    """One text of a corpus."""

    line: int
    """Number of its line, element, row or document in its file, from 1"""
    text: str
    """The text, never empty"""
    key: str | None = None
    """``str`` of the value of ``reading.id_field``; None if that is not set"""


@dataclass
class Passed:
    """What was passed over while reading a file. Blank lines are not counted."""

    filtered: int = 0
    """Documents that ``include`` or ``exclude`` leaves out"""
    empty: int = 0
    """Documents whose text is the empty string"""
    bad: int = 0
    """Places that cannot be read, with ``on_bad_line: skip``"""
    without_field: int = 0
    """Documents that lack a field of ``include``, which leaves them out, or of ``exclude``, which keeps them"""
    first_bad: list[str] = field(default_factory=list)
    """The first five bad places and what is wrong with them"""

    def add_bad(self, reason: str) -> None:
        """Count one bad place."""
        self.bad += 1
        if len(self.first_bad) < 5:
            self.first_bad.append(reason)


def read_documents(
    file: CorpusFile,
    reading: Reading,
    passed: Passed | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    r"""Yield the documents of a file.

    Blank lines and empty texts are passed over. From separated documents, ``\n`` and ``\r`` on both sides are taken
    away: files have the separator on a line of its own. A text file that is one document is kept as it is. A byte
    order mark at the beginning of a file is passed over.

    Args:
        file: As ``corpus_files`` gives it.
        reading: How to read it; ``path`` and ``format`` are not used.
        passed: Counts what is passed over.
        on_bytes: Called with the number of stored bytes read so far, for a progress bar.

    Raises:
        MemSinksError: If the file cannot be reached; and unless ``reading.on_bad_line`` is ``skip``, if it is damaged
            or a record is not an object with a text in ``text_field`` and a value in ``id_field``. With ``skip``, such
            records are counted in ``passed``, and damage ends the file as one bad place.
    """
    check_fields(file, reading)
    picker = _Picker(file, reading, Passed() if passed is None else passed)
    number = 0
    try:
        with open_stream(file.path, file.compression, None if file.format == "parquet" else on_bytes) as stream:
            for number, record in enumerate(_records(stream, file, reading, on_bytes), start=1):
                if (document := picker.document(number, record)) is not None:
                    yield document
    except MemSinksError:
        raise
    except DAMAGE as error:
        picker.damage(number, error)


def read_texts(path: Path, text_field: str = "text") -> Iterator[str]:
    """Yield all texts of a file or folder, in the format that it is found to have.

    Raises:
        MemSinksError: As ``corpus_files`` and ``read_documents``.
    """
    reading = Reading(path=str(path), text_field=text_field)
    for file in corpus_files(reading):
        for document in read_documents(file, reading):
            yield document.text


def _records(stream: Any, file: CorpusFile, reading: Reading, on_bytes: Callable[[int], None] | None) -> Iterator[Any]:
    """Yield a record for each line, element, row or document, to be parsed by ``_Picker``."""
    if file.format == "jsonl":
        return file_formats.lines(stream)
    if file.format == "json":
        return file_formats.elements(stream)
    if file.format == "separated":
        return file_formats.pieces(stream, reading.separator)
    if file.format == "text":
        return file_formats.whole(stream)
    columns = [
        reading.text_field,
        *reading.include,
        *reading.exclude,
        *([reading.id_field] if reading.id_field else []),
    ]
    return file_formats.rows(stream, columns, lambda share: on_bytes and on_bytes(round(share * file.size)))


class _Picker:
    """Makes documents of the records of one file, and counts those that it passes over."""

    def __init__(self, file: CorpusFile, reading: Reading, passed: Passed) -> None:
        self.file, self.reading, self.passed = file, reading, passed
        self.include = {name: set(map(str, values)) for name, values in reading.include.items()}
        self.exclude = {name: set(map(str, values)) for name, values in reading.exclude.items()}
        self.has_blank_lines = file.format == "jsonl"
        self.parse: Callable[[Any], Any] = {
            "jsonl": file_formats.parse_line,
            "parquet": _parse_row,
            "separated": self._parse_piece,
            "text": self._parse_text,
        }.get(file.format, lambda record: record)

    def document(self, number: int, record: Any) -> Document | None:
        """The document of a record; None if it is passed over.

        Raises:
            MemSinksError: If the record is bad, and bad ones are not to be passed over.
        """
        if self.has_blank_lines and record.isspace():
            return None
        try:
            return self._document(number, self.parse(record))
        except BadRecordError as bad:
            reason = f"{self.file.path!r}, {UNITS[self.file.format]} {number} {bad.reason}"
            if self.reading.on_bad_line == "error":
                raise MemSinksError(f"{reason}. {bad.step}") from bad
            self.passed.add_bad(reason)
            return None

    def damage(self, number: int, error: Exception) -> None:
        """Count, or raise, what makes it impossible to read on behind record ``number``.

        Raises:
            MemSinksError: If bad places are not to be passed over.
        """
        reason = f"{self.file.path!r} cannot be read after {UNITS[self.file.format]} {number}: {one_line(error)}"
        if self.reading.on_bad_line == "error":
            step = "Replace it, or do without its rest (on_bad_line: skip)."
            raise MemSinksError(f"{reason}. It is damaged or no {self.file.format}. {step}") from error
        self.passed.add_bad(f"{reason}; the rest of the file is lost")

    def _document(self, number: int, content: Any) -> Document | None:
        if not isinstance(content, dict):
            raise self._no_text(f"is a {type(content).__name__}")
        if (self.include or self.exclude) and not self._wanted(content):
            self.passed.filtered += 1
            return None
        text = self._text(content)
        if not text:
            self.passed.empty += 1
            return None
        return Document(number, text, None if self.reading.id_field is None else self._key(content))

    def _text(self, content: dict[str, Any]) -> str:
        text = _value(content, self.reading.text_field)
        if text is _MISSING:
            raise self._no_text(f"has the fields {one_line(repr(sorted(content)))}")
        if not isinstance(text, str):
            found = f"has a {type(text).__name__} in {self.reading.text_field!r}"
            raise BadRecordError(f"{found}, but a text is expected")
        return _unicode(text)

    def _no_text(self, found: str) -> BadRecordError:
        expected = f"but an object with the text in {self.reading.text_field!r} is expected"
        return BadRecordError(
            f"{found}, {expected}", "Name the field (text_field), or pass over it (on_bad_line: skip)."
        )

    def _wanted(self, content: dict[str, Any]) -> bool:
        included = {name: _spelled(_value(content, name)) for name in self.include}
        excluded = {name: _spelled(_value(content, name)) for name in self.exclude}
        self.passed.without_field += None in included.values() or None in excluded.values()
        return all(value in self.include[name] for name, value in included.items()) and not any(
            value in self.exclude[name] for name, value in excluded.items()
        )

    def _key(self, content: dict[str, Any]) -> str:
        name = str(self.reading.id_field)
        value = _spelled(_value(content, name))
        if value is None:
            raise BadRecordError(f"has no value in {name!r}", "Name another field (id_field), or correct it.")
        return _unicode(value)

    def _parse_text(self, record: bytes) -> dict[str, str]:
        try:
            return {self.reading.text_field: record.decode()}
        except UnicodeDecodeError as error:
            step = "Convert it, or pass over it (on_bad_line: skip)."
            raise BadRecordError(f"is not UTF-8: {error}", step) from error

    def _parse_piece(self, record: bytes) -> dict[str, str]:
        return self._parse_text(record.strip(b"\r\n"))


def _parse_row(record: Any) -> Any:
    if isinstance(record, Exception):
        raise BadRecordError(f"cannot be read: {one_line(record)}")
    return record


def _value(content: dict[str, Any], path: str) -> Any:
    """The value of a field, whose name may have dots of its own, or lead into nested objects by them."""
    if path in content:
        return content[path]
    value: Any = content
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _spelled(value: Any) -> str | None:
    """A value as the settings spell it; None for null (which a missing field is in parquet) and for what has parts."""
    return None if value is _MISSING or value is None or isinstance(value, dict | list) else str(value)


def _unicode(text: str) -> str:
    """The text, if it can be written as UTF-8: no tokenizer takes half a surrogate pair."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"is not Unicode: {error}") from error
    return text
