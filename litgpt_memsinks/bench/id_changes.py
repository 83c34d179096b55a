"""Which changes that a pipeline makes to a text change the ID of its document, by either scheme of IDs.

    python -m litgpt_memsinks.bench.id_changes CORPUS.jsonl --tokenizer-dir TOKENIZER

Run it on some documents of your own before you trust your IDs. The table in ``docs/operators_guide.md`` is its output.
"""

import argparse
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.bench.near_duplicate_table import clusters
from litgpt_memsinks.corpus.corpus_files import read_texts
from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.document_ids.near_duplicates import signatures
from litgpt_memsinks.prepared.lookup import text_digests

_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


def _first(text: str, share: float) -> str:
    """The first words of a text, with what lies between them."""
    return text[: round(share * len(text))].rsplit(maxsplit=1)[0]


CHANGES: dict[str, Callable[[str], str]] = {
    "a line end behind it": lambda text: text + "\n",
    "white space at both ends removed": str.strip,
    "line ends as on Windows": lambda text: text.replace("\n", "\r\n"),
    "runs of white space made one space": lambda text: " ".join(text.split()),
    "typographic quotes made plain": lambda text: text.translate(_QUOTES),
    "Unicode normalised (NFKC)": lambda text: unicodedata.normalize("NFKC", text),
    "lower case": str.lower,
    "its last word cut off": lambda text: text.rsplit(maxsplit=1)[0],
    "a line of ten words in front": lambda text: "Copied from a page of the archive on this day:\n" + text,
    "cut to the first 90%": lambda text: _first(text, 0.9),
    "cut to the first 70%": lambda text: _first(text, 0.7),
    "cut to the first half": lambda text: _first(text, 0.5),
}
"""What pipelines do to texts."""


class Row(NamedTuple):
    """What became of one changed copy of each document."""

    change: str
    """What was done"""
    changed: int
    """Documents whose text that changes; the others do not count"""
    same_hash: float
    """Share of the copies with the ID of their original under ``ids: hash``"""
    same_cluster: float
    """Share of the copies with the ID of their original under ``ids: near_duplicate``"""


def id_changes(texts: list[str], tokenizer: Tokenizer, settings: NearDuplicates) -> list[Row]:
    """Change each text, and compare the IDs of the copy and of the original.

    Args:
        texts: Different documents.
        tokenizer: Makes the tokens that are hashed.
        settings: What counts as a near-duplicate.
    """
    rows = []
    for name, change in CHANGES.items():
        pairs = [(text, copy) for text in texts if (copy := change(text)) != text and copy]
        if not pairs:
            rows.append(Row(name, 0, float("nan"), float("nan")))
            continue
        originals, copies = map(list, zip(*pairs, strict=True))
        digests = zip(text_digests(originals, tokenizer), text_digests(copies, tokenizer), strict=True)
        found = clusters(np.concatenate([signatures(originals, settings), signatures(copies, settings)]), settings)
        rows.append(
            Row(
                name,
                len(pairs),
                float(np.mean([one == other for one, other in digests])),
                float((found[: len(pairs)] == found[len(pairs) :]).mean()),
            )
        )
    return rows


def main() -> None:
    """Print the table of a corpus."""
    parser = argparse.ArgumentParser(prog="python -m litgpt_memsinks.bench.id_changes")
    parser.add_argument("corpus", type=Path, help="JSON lines")
    parser.add_argument("--tokenizer-dir", type=Path, required=True)
    parser.add_argument("--documents", type=int, help="the first ones only")
    args = parser.parse_args()
    texts = list(dict.fromkeys(read_texts(args.corpus)))[: args.documents]
    print(f"{len(texts):,} different documents")
    print("| change | documents that it changes | same ID, `hash` | same ID, `near_duplicate` |\n|---|---:|---:|---:|")
    for row in id_changes(texts, Tokenizer(args.tokenizer_dir), NearDuplicates()):
        shares = f"{row.same_hash:.1%} | {row.same_cluster:.1%}" if row.changed else "– | –"
        print(f"| {row.change} | {row.changed:,} | {shares} |")


if __name__ == "__main__":
    main()
