"""The files of a stream on disk: litdata's chunks of int32, `token, sequence ID, token, sequence ID, ...`.

A chunk file is a header of uint32 (number of items, where each begins, where the last ends) and the items' numbers. An
item is what litdata wrote at once, here as many documents as fit into a chunk; litdata reads across items.
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


def read_chunks(folder: Path, one_by_one: bool = False) -> Iterator[Chunk]:
    """Read the chunks of a split one after another, in the order of the stream.

    Args:
        folder: Of the split.
        one_by_one: Whether each is done with when the next is read, so that they take the same memory: new memory
            costs more time than reading.

    Raises:
        MemSinksError: If a chunk is missing or not what its header and the index say.
    """
    memory = bytearray()
    for entry in read_index(folder)["chunks"]:
        path = folder / entry["filename"]
        if one_by_one and path.is_file() and len(memory) < path.stat().st_size:
            memory = bytearray(path.stat().st_size)
        yield read_chunk(path, entry["dim"], memory if one_by_one else None)


def read_chunk(path: Path, numbers: int, memory: bytearray | None = None) -> Chunk:
    """Read one chunk.

    Args:
        path: Its file.
        numbers: How many numbers it holds by the index: two per token.
        memory: Where to read it to, large enough; memory of its own by default.

    Raises:
        MemSinksError: If it is missing or has another length.
    """
    try:
        content = path.read_bytes() if memory is None else _read_into(path, memory)
    except OSError as error:
        raise MemSinksError(f"{str(path)!r} cannot be read: {error.strerror}. Copy the folder again.") from error
    items = int.from_bytes(content[:4], "little")
    start = 4 * (items + 2)
    if len(content) != start + 4 * numbers or numbers % 2:
        raise MemSinksError(f"{str(path)!r} is not whole. Copy the folder again, or prepare it.")
    pairs = np.frombuffer(content, dtype="<i4", offset=start).reshape(-1, 2)
    return Chunk(path.name, pairs, xxhash.xxh3_128_hexdigest(content))


def _read_into(path: Path, memory: bytearray) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(memory)[: file.readinto(memory)]


def stream_digest(pairs: Iterator[npt.NDArray[np.int32]]) -> str:
    """xxh3_128 of a stream's numbers in order, hexadecimal: the same however it is cut into chunks."""
    state = xxhash.xxh3_128()
    for part in pairs:
        state.update(np.ascontiguousarray(part, dtype="<i4").data.cast("B"))
    return state.hexdigest()
