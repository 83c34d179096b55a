"""Plain functions that several tests share. What they compute, they compute without the package under test."""

import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tokenizers import Tokenizer as HFTokenizer

from litgpt_memsinks.prepare.prepare import prepare


class Written(NamedTuple):
    """One document as it lies in a stream."""

    sequence_id: int
    tokens: tuple[int, ...]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def read_stream(folder: Path) -> np.ndarray:
    """All numbers of one split in stored order, flat int32, straight from the bytes of litdata's chunk files."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert index["config"]["compression"] is None
    chunks = []
    for chunk in index["chunks"]:
        content = (folder / chunk["filename"]).read_bytes()
        n_items = int.from_bytes(content[:4], "little")
        bounds = np.frombuffer(content, dtype="<u4", count=n_items + 1, offset=4)
        chunks.append(np.frombuffer(content[bounds[0] : bounds[-1]], dtype="<i4"))
        assert len(chunks[-1]) == chunk["dim"]
    return np.concatenate(chunks)


def read_written(folder: Path, eos: int) -> list[Written]:
    """The documents of one split in stored order. Every token of a document must have the same ID beside it."""
    pairs = read_stream(folder).reshape(-1, 2)
    ends = np.flatnonzero(pairs[:, 0] == eos) + 1
    assert ends[-1] == len(pairs)
    written = []
    for document in np.split(pairs, ends[:-1]):
        (sequence_id,) = set(document[:, 1].tolist())
        written.append(Written(sequence_id, tuple(document[:, 0].tolist())))
    return written


def reference_digest(body: Iterable[int]) -> int:
    """xxh3_64 of the tokens as little-endian uint32."""
    values = list(body)
    return xxhash.xxh3_64(struct.pack(f"<{len(values)}I", *values)).intdigest()


def reference_id(body: Iterable[int], repeated: bool) -> int:
    """Two's complement by hand: 31 bits of the digest (never 0), and above them the bit for repeated."""
    bits = reference_digest(body) % 2**31
    pattern = (1 if bits == 0 else bits) | (repeated << 31)
    return struct.unpack("<i", struct.pack("<I", pattern))[0]


def prepare_in_own_group(settings: dict[str, Any]) -> None:
    """Run prepare() as the leader of a process group, so that a test can kill it with its workers."""
    os.setsid()
    prepare(**settings)


def with_bos(source: Path, folder: Path) -> Path:
    """A copy of the tokenizer that LitGPT puts a BOS in front with."""
    shutil.copytree(source, folder)
    tokenizer = HFTokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"bos_token": "<s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
