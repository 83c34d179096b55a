"""What a prepared folder holds, in one small JSON file: the contract between `prepare.py` and `data.py`.

FOLDER/memsinks.json       this manifest
FOLDER/train/, val/        litdata chunks, int32, `token, sequence ID, token, sequence ID, ...`
FOLDER/val_NAME/           the same for each validation set, if there are several; val/ has all of them
FOLDER/documents.parquet   the document table, one row per distinct document, in the order of the files:
    split          train, val
    source         name of the source or validation set
    file, line     where its first copy is; line, row or document number from 1
    key            value of the source's id_field, if it has one
    digest         xxh3_64 of its tokens, uint64
    sequence_id    what stands beside its tokens, int32; negative if it repeats
    tokens         with BOS and EOS
    repeats        how often it occurs
    written        how often it is in the stream: 0 if it was left out
FOLDER/evaluation.parquet  tokens of the repeated and the validation documents, for `evaluate.py`
FOLDER/tokenizer/          the tokenizer that made the tokens
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import write_json
from litgpt_memsinks.remote import is_url

FORMAT_VERSION = 2
"""Version of the prepared folder's layout. A reader refuses any other."""
MANIFEST = "memsinks.json"
DOCUMENTS = "documents.parquet"
EVALUATION = "evaluation.parquet"
TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")


@dataclass
class Split:
    """One folder of chunks."""

    documents: int
    """Distinct documents"""
    written: int
    """Documents with their repeats"""
    tokens: int
    """Tokens with their repeats, each followed by an ID in the stream"""
    digest: str
    """xxh3_128 of the stream's numbers in order, see ``chunks.Checksums``"""
    chunks: dict[str, str]
    """File name to xxh3_128 of the file"""
    repeated_documents: int = 0
    """Distinct documents that occur more than once"""
    repeated_tokens: int = 0
    """Tokens of the repeated documents, with their repeats"""


@dataclass
class SourceInfo:
    """What was read for a source or a validation set, and what it gave."""

    split: str
    """train or val"""
    format: list[str]
    """Formats that were found, as in ``jsonl.zst``"""
    files: int
    """Files that were read"""
    bytes: int
    """Their size"""
    read: int
    """Documents with text in them, exact copies included"""
    empty: int
    """Documents without text"""
    filtered: int
    """Documents passed over by include and exclude"""
    bad: int
    """Documents that could not be read"""
    first_bad: list[str]
    """Places and reasons of the first of them"""
    without_field: int
    """Documents without a field that include or exclude names"""
    documents: int
    """Distinct documents taken"""
    tokens: int
    """Their tokens"""
    written: int
    """Documents written, with repeats"""
    written_tokens: int
    """Their tokens"""
    overlap: int
    """Validation documents dropped because they are trained on, or in another validation set"""
    near_duplicates_dropped: int
    """Validation documents dropped because they are near-duplicates of documents that are trained on"""


@dataclass
class Manifest:
    """Facts about a prepared folder that its readers rely on."""

    tokenizer_sha256: str
    """Fingerprint of the tokenizer, see ``tokenizer_fingerprint``"""
    special_tokens: dict[str, int | None]
    """The token in front of each document (``bos``, may be none) and behind it (``eos``)"""
    max_token: int
    """Largest token of the streams"""
    splits: dict[str, Split]
    """Folder name to its counts: train, val, and val_NAME"""
    sources: dict[str, SourceInfo]
    """Name of each source and validation set to its counts"""
    recipe: dict[str, Any]
    """The recipe, see ``mixture.Mixture``"""
    inputs: dict[str, list[tuple[str, int, str]]]
    """Name of each source and validation set to all its files, read or not: path, bytes, ``tokenizing.probe``"""
    colliding_pairs: int
    """Pairs of distinct training documents that share a sequence ID by chance"""
    duplicates: int
    """Documents of the training corpora that were exact copies of an earlier one"""
    versions: dict[str, str]
    """Packages that made the folder"""
    format_version: int = FORMAT_VERSION
    """Version of the folder's layout"""

    def write(self, folder: Path) -> None:
        """Write the manifest into a prepared folder."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check the manifest of a prepared folder.

        Raises:
            MemSinksError: If the folder is missing, plain, half-written or of another format version.
        """
        path = folder / MANIFEST
        if is_url(folder) and not folder.is_dir():
            raise MemSinksError(
                f"{str(folder)!r} is a URL, but this command reads a folder on disk. Copy the data to this machine "
                "first, such as: aws s3 sync s3://BUCKET/PREFIX FOLDER"
            )
        if not folder.is_dir():
            raise MemSinksError(
                f"There is no prepared data at {str(folder)!r}. Make it with: "
                f"litgpt-memsinks prepare --train CORPUS.jsonl --tokenizer_dir TOKENIZER --out_dir {folder}"
            )
        if not path.is_file():
            raise MemSinksError(
                f"{str(folder)!r} has no {MANIFEST}: it holds a plain or half-written stream, whose numbers would "
                f"be read as tokens and IDs. Remove it and make it anew: litgpt-memsinks prepare --out_dir {folder} ..."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MemSinksError(f"{str(path)!r} is not JSON ({error}). Prepare the data again.") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise MemSinksError(
                f"{str(path)!r} has format version {version!r}, but this release reads {FORMAT_VERSION}. "
                "Prepare the data again, or install the release that wrote it."
            )
        if unknown := {field.name for field in fields(cls)} ^ set(content):
            raise MemSinksError(f"{str(path)!r} lacks or adds {sorted(unknown)}. Prepare the data again.")
        try:
            content["splits"] = {name: Split(**split) for name, split in content["splits"].items()}
            content["sources"] = {name: SourceInfo(**source) for name, source in content["sources"].items()}
            content["inputs"] = {
                name: [(path, size, probe) for path, size, probe in files] for name, files in content["inputs"].items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise MemSinksError(f"{str(path)!r} has unreadable parts ({error}). Prepare the data again.") from error
        return cls(**content)


def tokenizer_fingerprint(tokenizer_dir: Path) -> str:
    """SHA-256 of the file that defines a tokenizer (``tokenizer.json``, else ``tokenizer.model``, as in LitGPT).

    Raises:
        MemSinksError: If the folder holds neither.
    """
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path := tokenizer_dir / name).is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    raise MemSinksError(
        f"{str(tokenizer_dir)!r} has no tokenizer.json or tokenizer.model. Get one with: "
        "litgpt download REPOSITORY --tokenizer_only true"
    )
