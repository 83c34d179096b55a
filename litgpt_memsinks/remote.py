"""Prepared folders in an object store: the small files are copied to this machine, the chunks are left to litdata.

Everything goes through litdata's downloaders, so that credentials, endpoints and ``storage_options`` mean the same for
the small files as for the chunks that litdata streams.
"""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError

SCHEMES = ("s3", "gs", "azure", "r2")
"""Stores from which litdata streams blocks of tokens. Its hf:// reads Parquet files only."""
INSTALL = {"gs": "google-cloud-storage", "azure": "azure-storage-blob"}
"""Packages that litdata needs for a store and does not install by itself."""
NOT_FOUND, DENIED = (404,), (401, 403)


def is_url(path: str | Path) -> bool:
    """Whether ``path`` names a store, such as ``s3://bucket/prefix``, also after pathlib made ``s3:/`` of it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None  # two letters: C:/ is a disk


def check_url(url: str) -> None:
    """Refuse a URL from which litdata cannot stream.

    Raises:
        MemSinksError: If it is of another kind than ``SCHEMES``, or went through pathlib.
    """
    scheme, _, rest = url.partition(":")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise MemSinksError(f"data.data_path is {url!r}, but chunks stream from {known} only. Copy the folder there.")
    if not re.match(r"//[^/]", rest):
        raise MemSinksError(
            f"data.data_path is {url!r}, which names no bucket. Give a string like '{scheme}://bucket/prefix', not a "
            "pathlib.Path, which joins the slashes."
        )


def copy_files(
    url: str, names: Sequence[str], optional: Sequence[str] = (), storage_options: dict[str, Any] | None = None
) -> Path:
    """Copy the small files of a remote folder into a local one of the same layout.

    They are fetched anew each time, so that a changed store is noticed. The local folder is named by their content and
    appears in one rename: any number of processes may call this at once, and what one of them reads never changes.

    Args:
        url: The remote folder.
        names: Paths of the files in it. One that is not there is left out.
        optional: More of them. One that may not be read counts as not there, because a store that does not let its
            files be listed answers so for missing ones.
        storage_options: As in litdata's ``StreamingDataset``.

    Returns:
        A folder below litdata's cache folder.

    Raises:
        MemSinksError: If none of ``names`` is there, the store cannot be read, or the cache cannot be written.
    """
    downloader = _downloader(url, storage_options)
    files = {name: _read(downloader, f"{url}/{name}") for name in names}
    if not any(content is not None for content in files.values()):
        raise MemSinksError(
            f"There is no prepared data at {url!r}: none of {', '.join(names)} is there. Check bucket and prefix, or "
            f"copy a prepared folder there as a whole, such as: aws s3 sync FOLDER {url}"
        )
    files |= {name: _read(downloader, f"{url}/{name}", missing=NOT_FOUND + DENIED) for name in optional}
    return _keep({name: content for name, content in files.items() if content is not None})


def _downloader(url: str, storage_options: dict[str, Any] | None) -> Any:
    """The downloader of litdata for a URL, with fewer retries: at the start of a run somebody waits for the answer."""
    from botocore.config import Config
    from litdata.streaming.downloader import get_downloader

    scheme = url.partition(":")[0]
    options = dict(storage_options or {})
    if scheme in ("s3", "r2"):  # litdata's own 1000 attempts take hours where nobody answers
        retries = {"total_max_attempts": 3, "mode": "standard"}
        options = {"config": Config(connect_timeout=10, read_timeout=20, retries=retries)} | options
    try:
        return get_downloader(url, tempfile.gettempdir(), [], options)
    except ModuleNotFoundError as error:
        package = INSTALL.get(scheme, error.name)
        raise MemSinksError(f"Reading {url!r} needs a package that is not there: pip install {package}") from error
    except Exception as error:
        raise _unreadable(url, error) from error


def _read(downloader: Any, url: str, missing: tuple[int, ...] = NOT_FOUND) -> bytes | None:
    """One file's content, or ``None`` if the store answers with a status of ``missing``.

    Raises:
        MemSinksError: If it cannot be read for another reason.
    """
    content = io.BytesIO()
    try:
        downloader.download_fileobj(url, content)
    except Exception as error:  # each store's client raises its own
        if _status(error) in missing:
            return None
        raise _unreadable(url, error) from error
    return content.getvalue()


def _status(error: Exception) -> int | None:
    """HTTP status in an error of boto3 (``response``), google-cloud-storage (``code``) or Azure (``status_code``)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _unreadable(url: str, error: Exception) -> MemSinksError:
    """Say in one line what a store's client reported in its own words."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    if _status(error) in DENIED:
        problem = f"Reading {url!r} is denied, or it is not there and the store does not say so ({reason})"
    else:
        problem = f"{url!r} cannot be read ({type(error).__name__}: {reason})"
    return MemSinksError(f"{problem}. Check the credentials, AWS_ENDPOINT_URL and data.storage_options.")


def _keep(files: dict[str, bytes]) -> Path:
    """Write files to a folder that is named by their content, unless it is there already.

    Raises:
        MemSinksError: If the cache folder cannot be written.
    """
    from litdata.utilities.dataset_utilities import get_default_cache_dir

    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    folder = Path(get_default_cache_dir()) / "memsinks" / digest.hexdigest()[:32]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # not named by the process, as in files.py: nodes that share a disk have the same process IDs
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".incomplete") as scratch:
            whole = Path(scratch) / "whole"
            for name, content in files.items():
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_bytes(content)
            os.rename(whole, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise MemSinksError(
                f"The cache {str(folder.parent)!r} cannot be written ({error.strerror}). Set LITDATA_CACHE_DIR to a "
                "folder on a disk with room."
            ) from error
    return folder
