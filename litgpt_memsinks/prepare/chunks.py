"""The files of a stream on disk: litdata's chunks of int32, `token, sequence ID, token, sequence ID, ...`.

A chunk file is a header of uint32 (number of items, where each begins, where the last ends) and the items' numbers. An
item is what litdata was given at once, here some whole documents of a chunk; litdata reads across items.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from litgpt_memsinks.errors import MemSinksError

INDEX = "index.json"
_BLOCK = 1 << 20  # bytes read at once


class Chunk(NamedTuple):
    """One chunk file in memory."""

    name: str
    """File name"""
    pairs: npt.NDArray[np.int32]
    """Tokens and sequence IDs, shape ``(n_tokens, 2)``"""
    checksum: str
    """xxh3_128 of the whole file, hexadecimal"""


def read_index(folder: Path) -> dict[str, Any]:
    """Read litdata's ``index.json`` of one split.

    Raises:
        MemSinksError: If it is missing or not an index.
    """
    path = folder / INDEX
    if not path.is_file():
        raise MemSinksError(f"{str(path)!r} is missing: the folder is half-written or has other splits. Prepare it.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MemSinksError(f"{str(path)!r} is not JSON ({error}). Copy the folder again, or prepare it.") from error
    if not isinstance(index, dict) or not {"chunks", "config"} <= index.keys():
        raise MemSinksError(f"{str(path)!r} is not an index of litdata. Copy the folder again, or prepare it.")
    return index


def read_chunks(folder: Path) -> Iterator[Chunk]:
    """Read the chunks of a split one after another, in the order of the stream.

    Raises:
        MemSinksError: If a chunk is missing or not what its header and the index say.
    """
    for entry in read_index(folder)["chunks"]:
        yield read_chunk(folder / entry["filename"], entry["dim"])


def read_chunk(path: Path, numbers: int) -> Chunk:
    """Read one chunk.

    Args:
        path: Its file.
        numbers: How many numbers it holds by the index: two per token.

    Raises:
        MemSinksError: If it is missing or has another length.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    start = _header_bytes(content)
    if len(content) != start + 4 * numbers or numbers % 2:
        raise _not_whole(path)
    pairs = np.frombuffer(content, dtype="<i4", offset=start).reshape(-1, 2)
    return Chunk(path.name, pairs, xxhash.xxh3_128_hexdigest(content))


def _header_bytes(content: bytes) -> int:
    return 4 * (int.from_bytes(content[:4], "little") + 2)


def _unreadable(path: Path, error: OSError) -> MemSinksError:
    return MemSinksError(f"{str(path)!r} cannot be read: {error.strerror}. Copy the folder again.")


def _not_whole(path: Path) -> MemSinksError:
    return MemSinksError(f"{str(path)!r} is not whole. Copy the folder again, or prepare it.")


class Checksums(NamedTuple):
    """What tells a split from any other."""

    digest: str
    """xxh3_128 of the stream's numbers in order, hexadecimal: the same however it is cut into chunks"""
    chunks: dict[str, str]
    """File name to xxh3_128 of the file"""
    tokens: int
    """Tokens of the stream"""


def checksums(folder: Path) -> Checksums:
    """Read a split's chunks, block by block: new memory for whole chunks would take longer than reading them.

    Raises:
        MemSinksError: If a chunk is missing or not what its header and the index say.
    """
    stream, chunks, tokens = xxhash.xxh3_128(), {}, 0
    for entry in read_index(folder)["chunks"]:
        path = folder / entry["filename"]
        chunks[path.name], size = _checksum(path, stream)
        if size != 4 * entry["dim"] or size % 8:
            raise _not_whole(path)
        tokens += size // 8
    return Checksums(stream.hexdigest(), chunks, tokens)


def _checksum(path: Path, stream: Any) -> tuple[str, int]:
    """Checksum of a chunk, whose numbers go on with that of the stream, and how many bytes they take."""
    chunk, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb") as file:
            header = file.read(4)
            header += file.read(min(_header_bytes(header) - 4, path.stat().st_size))
            chunk.update(header)
            while read := file.readinto(block):
                chunk.update(block[:read])
                stream.update(block[:read])
            return chunk.hexdigest(), file.tell() - len(header)
    except OSError as error:
        raise _unreadable(path, error) from error
