"""Which files a corpus is, and which format each has: told by its ending and its first bytes, never guessed."""

import glob
import os
import stat
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from litgpt_memsinks.corpus.file_formats import (
    BOM,
    DAMAGE,
    BadRecordError,
    is_url,
    one_line,
    open_stream,
    parse_line,
    reaching,
)
from litgpt_memsinks.corpus.mixture import Reading
from litgpt_memsinks.errors import MemSinksError

KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""The endings that are read without saying a format."""
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
FORMAT_KINDS = {"jsonl": "JSON", "json": "JSON", "parquet": "parquet", "separated": "text", "text": "text"}
ABOUT = {"readme", "license", "licence", "notice", "changelog", "citation", "contributing"}
"""Text files that are about the others in a folder."""

_WEB = ("http://", "https://")
_PACKED = f" (also {', '.join(COMPRESSIONS)})"
_READ = ", ".join(KINDS) + _PACKED
_CLEAR = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_HEAD = 1 << 20  # bytes looked at to tell a format


class CorpusFile(NamedTuple):
    """One file of a corpus."""

    path: str
    """As ``open`` or, for a URL, fsspec takes it"""
    size: int
    """Stored size in bytes; 0 if a server does not say"""
    format: str
    """As ``mixture.Format``, never ``auto``"""
    compression: str
    """``"gz"``, ``"zst"`` or ``""``"""


class _Listing(NamedTuple):
    """What one path of a recipe stands for."""

    path: str
    kind: Literal["file", "folder", "pattern"]
    sizes: dict[str, int | None]
    """Stored size of each file; None for local ones, of which few may be wanted"""


def corpus_files(reading: Reading, where: str = "corpus") -> list[CorpusFile]:
    """The files of a corpus, sorted by name, each once.

    A folder stands for all files below it whose endings are read: of one kind (JSON, parquet or text), or of the kind
    of ``reading.format``. Hidden files and, as text, READMEs and licences are passed over. A pattern stands for the
    files that it matches, a name for itself; with a format they may have any ending.

    Args:
        reading: Which files, and how to read them.
        where: How the recipe names these settings.

    Raises:
        MemSinksError: If a path stands for no file, or the format of a file cannot be told.
    """
    reading.check_reading(where)
    files: dict[str, CorpusFile] = {}
    for path in [reading.path] if isinstance(reading.path, str) else reading.path:
        for file in _detected(_listing(path, where), reading, where):
            identity = file.path if is_url(file.path) else os.path.realpath(file.path)
            files[identity] = min(file, files.get(identity, file))
    return sorted(files.values())


# -------------------------------------------------------------------------------------------------------------- listing


def _listing(path: str, where: str) -> _Listing:
    listing = _remote(path) if is_url(path) else _local(os.path.expanduser(path))
    if listing.kind == "pattern" and not listing.sizes:
        raise MemSinksError(f"{where}: no file matches {path!r}. Correct the pattern.")
    return listing


def _local(path: str) -> _Listing:
    with reaching(path):
        if glob.has_magic(path) and not os.path.lexists(path):
            return _Listing(path, "pattern", dict.fromkeys(_matches(path)))
        if stat.S_ISDIR(os.stat(path).st_mode):
            return _Listing(path, "folder", dict.fromkeys(_below(path)))
        return _Listing(path, "file", {path: None})


def _matches(pattern: str) -> Iterator[str]:
    for name in glob.glob(pattern, recursive=True):
        if not os.path.isdir(name):
            yield name
        elif _endings(name)[0] in KINDS and not pattern.endswith("**"):
            raise MemSinksError(f"{pattern!r} matches {name!r}, which is a folder. Name the files in it: {name}/*")


def _below(folder: str) -> Iterator[str]:
    """Files below a folder, also through links to folders; hidden ones are passed over."""
    seen: set[str] = set()  # links may lead in circles
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = os.path.join(parent, name)
            # a link that leads nowhere is an error if it is wanted, not a file less
            if not name.startswith(".") and (os.path.isfile(path) or not os.path.exists(path)):
                yield path


def _raise(error: OSError) -> None:
    raise error


def _remote(path: str) -> _Listing:
    with reaching(path):
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(path)
        # a URL of the web may have a ? or [ ] of its own
        if "*" in path or (not path.startswith(_WEB) and glob.has_magic(path)):
            found = filesystem.glob(root, detail=True)
            return _Listing(path, "pattern", _sizes(filesystem, found, ""))
        info = filesystem.info(root)
        if info["type"] != "directory":
            return _Listing(path, "file", {path: int(info.get("size") or 0)})
        return _Listing(path, "folder", _sizes(filesystem, filesystem.find(root, detail=True), info["name"]))


def _sizes(filesystem: Any, found: dict[str, dict[str, Any]], root: str) -> dict[str, int | None]:
    return {
        filesystem.unstrip_protocol(name): int(info.get("size") or 0)
        for name, info in found.items()
        if info["type"] == "file" and not (root and "/." in name.removeprefix(root))
    }


# ------------------------------------------------------------------------------------------------------------ detection


def _endings(path: str) -> tuple[str, str]:
    """The ending of a file in front of that of its compression, and the compression: ``(".jsonl", "zst")``."""
    name = os.path.basename(urlsplit(path).path if path.startswith(_WEB) else path).lower()
    stem, ending = os.path.splitext(name)
    return (os.path.splitext(stem)[1], COMPRESSIONS[ending]) if ending in COMPRESSIONS else (ending, "")


def _detected(listing: _Listing, reading: Reading, where: str) -> list[CorpusFile]:
    names = list(listing.sizes)
    if listing.kind == "folder":
        names = _of_one_kind(listing, reading, where)
    if reading.format == "auto":
        formats = _formats(names, listing, reading, where)
    else:
        formats = dict.fromkeys(names, str(reading.format))
    files = [CorpusFile(name, _size(name, listing), formats[name], _endings(name)[1]) for name in names]
    for file in files:
        if file.format == "parquet" and file.compression:
            raise MemSinksError(f"{where}: {file.path!r} is parquet, which is packed by itself. Unpack the file.")
        check_fields(file, reading)
    return files


def _size(name: str, listing: _Listing) -> int:
    with reaching(name):
        size = listing.sizes[name]
        return os.stat(name).st_size if size is None else size


def check_fields(file: CorpusFile, reading: Reading) -> None:
    """Raise if fields are asked for that a format does not have.

    Raises:
        MemSinksError: Naming the settings.
    """
    settings = [name for name in ("include", "exclude", "id_field") if getattr(reading, name)]
    if FORMAT_KINDS[file.format] == "text" and settings:
        raise MemSinksError(f"{file.path!r} is plain text, without fields. Remove {' and '.join(settings)}.")


def _of_one_kind(listing: _Listing, reading: Reading, where: str) -> list[str]:
    """The files below a folder that are read: all must be of one kind."""
    kinds: dict[str, list[str]] = {}
    for name in listing.sizes:
        ending, compression = _endings(name)
        kind = KINDS.get(ending or ".json" if compression else ending)
        about = kind == "text" and os.path.basename(name).split(".")[0].lower() in ABOUT
        if kind and not about and reading.format in ("auto", *(f for f, k in FORMAT_KINDS.items() if k == kind)):
            kinds.setdefault(kind, []).append(name)
    folder = f"{where}: the folder {listing.path!r}"
    if not kinds:
        wanted = None if reading.format == "auto" else FORMAT_KINDS[reading.format]
        read = ", ".join(ending for ending, kind in KINDS.items() if wanted in (None, kind)) + _PACKED
        raise MemSinksError(f"{folder} has no file ending in {read}. Name others by a pattern, and set format.")
    if len(kinds) > 1:
        found = " and ".join(f"{len(names)} of {kind} ({names[0]!r})" for kind, names in sorted(kinds.items()))
        raise MemSinksError(f"{folder} has files of several kinds: {found}. Name one kind by a pattern, or set format.")
    return next(iter(kinds.values()))


def _formats(names: list[str], listing: _Listing, reading: Reading, where: str) -> dict[str, str]:
    """The format of each file, by its ending and what it begins with."""
    formats: dict[str, str] = {}
    texts: dict[str, bool] = {}  # whether each has a separator
    for name in names:
        ending, compression = _endings(name)
        if ending in _CLEAR:
            formats[name] = _CLEAR[ending]
        elif ending == ".json" or (compression and not ending):
            formats[name] = _json_format(name, compression, where)
        elif ending not in KINDS:
            raise MemSinksError(
                f"{where}: {name!r} ends in {ending!r}, but {_READ} are read. Convert it, or set format if it is one."
            )
        elif head := _head(name, compression):
            texts[name] = reading.separator.encode() in head
        else:
            formats[name] = "text"
    return formats | (dict.fromkeys(texts, _text_format(texts, listing, reading, where)) if texts else {})


def _text_format(texts: dict[str, bool], listing: _Listing, reading: Reading, where: str) -> str:
    """Whether text files are one document each, or all have a separator."""
    if all(texts.values()):
        return "separated"
    if listing.kind != "file" and not any(texts.values()) and len(texts) > 1:
        return "text"
    without = next(name for name, separated in texts.items() if not separated)
    others = ", but others do" if any(texts.values()) else ""
    raise MemSinksError(
        f"{where}: {without!r} does not have {reading.separator!r} in its first MiB{others}. Set format: text if a "
        "file is one document, or format: separated and separator to what stands between documents."
    )


def _json_format(path: str, compression: str, where: str) -> str:
    """Whether a file holds an array or an object per line."""
    head = _head(path, compression).removeprefix(BOM).lstrip()
    if head.startswith(b"["):
        return "json"
    line, end, _ = head.partition(b"\n")
    if not line or (not end and len(head) > _HEAD // 2):  # nothing to read, or a line too long to look at
        return "jsonl"
    try:
        reason = "" if isinstance(parse_line(line), dict) else "its first line is no object"
    except BadRecordError as bad:
        reason = f"its first line {bad.reason}"
    if reason:
        raise MemSinksError(
            f"{where}: {path!r} is neither an array of objects nor an object per line: {reason}. Convert it, or set "
            "format: jsonl if only that line is wrong."
        )
    return "jsonl"


def _head(path: str, compression: str) -> bytes:
    """The first MiB of a file, unpacked; or what there is in front of damage, which is for its reader to report.

    Raises:
        MemSinksError: If nothing can be read.
    """
    head = b""
    try:
        with open_stream(path, compression) as stream:
            while len(head) < _HEAD and (block := stream.read1(_HEAD)):
                head += block
    except MemSinksError:
        raise
    except DAMAGE as error:
        if not head:
            raise MemSinksError(f"{path!r} cannot be read: {one_line(error)}. It is damaged; replace it.") from error
    return head
