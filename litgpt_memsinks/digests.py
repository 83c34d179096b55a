r"""Are these the same files? SHA-256 digests of files, of folders and of JSON, all of which other tools can compute.

A folder's digest is that of the list that coreutils print, one line per file in the order of the bytes of the paths::

    cd FOLDER && find . -xtype f ! -path './certificate.*' -printf '%P\0' | LC_ALL=C sort -z |
      xargs -0 sha256sum --text | sha256sum

Links to files count as files; linked folders are not entered. A certificate in the folder, its page and its signature
are left out, because the certificate holds the digest.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.progress import progress

CERTIFICATE = "certificate.json"
PAGE = "certificate.md"
CONTENT = "content_sha256"
"""Key under which a JSON object holds the digest of all its other keys"""
_BLOCK = 1 << 22  # bytes read at a time


def file_sha256(path: Path, on_bytes: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file, in hexadecimal. Reads it in pieces.

    Args:
        path: The file.
        on_bytes: Called with the number of bytes that were read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def folder_sha256(folder: Path, description: str = "Digesting") -> dict[str, str]:
    """SHA-256 of every file below a folder, with a progress bar on a terminal.

    Args:
        folder: The folder.
        description: Shown beside the bar.

    Returns:
        Path below the folder, with ``/`` between its parts, to digest; in the order of the paths' bytes.

    Raises:
        MemSinksError: If a path holds a line end or a backslash, which sha256sum writes otherwise.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted((name for name in paths if not name.startswith("certificate.")), key=os.fsencode)
    if strange := [name for name in names if set(name) & set("\n\r\\")]:
        raise MemSinksError(f"The name {strange[0]!r} in {str(folder)!r} cannot be listed. Rename or remove the file.")
    with progress(description, sum(paths[name].stat().st_size for name in names)) as advance:
        return {name: file_sha256(paths[name], advance) for name in names}


def tree_sha256(files: Mapping[str, str]) -> str:
    """One digest for a folder, as defined above.

    Args:
        files: Path to SHA-256, as `folder_sha256` gives them.
    """
    names = sorted(files, key=os.fsencode)
    return hashlib.sha256(
        b"".join(f"{files[name]}  ".encode() + os.fsencode(name) + b"\n" for name in names)
    ).hexdigest()


def content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its key ``content_sha256``.

    The object is written as UTF-8 with sorted keys, no spaces, characters as themselves and the shortest decimals that
    give back each float: ``json.dumps(..., sort_keys=True, separators=(",", ":"), ensure_ascii=False)`` of Python.
    """
    rest = {key: value for key, value in content.items() if key != CONTENT}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
