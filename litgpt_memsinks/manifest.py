"""What a prepared folder holds, in one small JSON file: the contract between `prepare.py` and `data.py`.

FOLDER/memsinks.json       this manifest
FOLDER/train/, val/        litdata chunks, int32, `token, sequence ID, token, sequence ID, ...`
FOLDER/documents.parquet   the document table, one row per distinct document (see `prepare.py`)
FOLDER/evaluation.parquet  tokens of the repeated and the validation documents, for `evaluate.py`
FOLDER/tokenizer/          the tokenizer that made the tokens
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import write_json

FORMAT_VERSION = 1
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
    repeated_documents: int = 0
    """Distinct documents that occur more than once"""
    repeated_tokens: int = 0
    """Tokens of the repeated documents, with their repeats"""


@dataclass
class Manifest:
    """Facts about a prepared folder that its readers rely on."""

    tokenizer_sha256: str
    """Fingerprint of the tokenizer, see ``tokenizer_fingerprint``"""
    max_token: int
    """Largest token of the corpora that were read"""
    splits: dict[str, Split]
    """Folder name to its counts: train and val"""
    seed: int
    """Seed of the choice of repeated documents, the shuffle and the ID noise"""
    repeats: int
    """How often each chosen document was written"""
    id_noise: float
    """Probability that a written repeat carried a random ID"""
    left_out: bool
    """Whether the repeated documents were left out of the training stream"""
    colliding_pairs: int
    """Pairs of distinct documents with the same sequence ID"""
    duplicates: int
    """Documents of the training corpus that were exact copies of an earlier one; their occurrences add up"""
    validation_overlap: int
    """Validation documents dropped because they are training documents too"""
    sources: list[str]
    """Names of the files that were read"""
    id_scheme: str = "hash"
    """How IDs are made: xxh3_64 of the tokens, low 31 bits"""
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
        except (AttributeError, TypeError) as error:
            raise MemSinksError(f"{str(path)!r} has unreadable splits ({error}). Prepare the data again.") from error
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
