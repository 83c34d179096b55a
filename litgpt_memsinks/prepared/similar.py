"""Which repeated documents of a prepared folder nearly are a text? Those of similar MinHash signatures.

The folder keeps no signatures. They are made anew from the tokens of the repeated documents, so nothing is said
of documents that occur once.
"""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.document_ids.near_duplicates import signatures, similarity
from litgpt_memsinks.prepare.manifest import EVALUATION, Manifest
from litgpt_memsinks.prepare.tables import EVALUATION_SCHEMA
from litgpt_memsinks.prepared.document_table import ParquetFile, load_folders_tokenizer
from litgpt_memsinks.prepared.inspect_data import decode

SEARCHED = "only the repeated documents were searched"
"""What an empty answer does not say."""
_ROWS = 256  # decoded and hashed at a time


class Similar(NamedTuple):
    """A repeated document that nearly is a text. Ordered by similarity."""

    similarity: float
    """Estimated Jaccard similarity of the two sets of shingles, see `near_duplicates.py`"""
    sequence_id: int
    """As it stands in the stream"""
    source: str
    """Its source"""


def nearest(data_path: Path, texts: list[str], number: int = 3) -> list[list[Similar]]:
    """The repeated documents that are near-duplicates of each text, the most similar first.

    Memory is that of one row group of the scored documents, about four million tokens. Time grows with the repeated
    documents: about a millisecond for each.

    Args:
        data_path: The prepared folder.
        texts: Any texts.
        number: Most documents for each.

    Returns:
        A list for each text; empty where nothing reaches the threshold of the folder's recipe.

    Raises:
        MemSinksError: If the folder is not whole.
    """
    manifest = Manifest.read(data_path)
    settings = NearDuplicates(**manifest.recipe["near_duplicates"])
    tokenizer = load_folders_tokenizer(data_path)
    body = slice(int(manifest.special_tokens["bos"] is not None), -1)
    wanted = signatures(texts, settings)
    found: list[list[Similar]] = [[] for _ in texts]
    for part in track(_parts(data_path), "Looking for similar documents", console=Console(stderr=True), transient=True):
        there = [decode(tokens.values.to_numpy()[body], tokenizer) for tokens in part["tokens"]]
        rows = signatures(there, settings)
        for text, signature in enumerate(wanted):
            alike = similarity(signature, rows)
            near = np.flatnonzero(alike >= settings.threshold).tolist()
            some = [
                Similar(float(alike[row]), part["sequence_id"][row].as_py(), part["source"][row].as_py())
                for row in near
            ]
            found[text] = heapq.nlargest(number, [*found[text], *some])
    return found


def _parts(data_path: Path) -> Iterator[pa.Table]:
    """The repeated documents, some at a time."""
    file = ParquetFile(data_path / EVALUATION, EVALUATION_SCHEMA)
    for group in file.parts(["sequence_id", "source", "tokens"], {"split": pa.array(["repeated"])}):
        for start in range(0, group.num_rows, _ROWS):
            yield group.slice(start, _ROWS)
