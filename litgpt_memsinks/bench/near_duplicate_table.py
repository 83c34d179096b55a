"""How many edited copies `near_duplicates` finds, and which different documents it takes for copies.

    python -m litgpt_memsinks.bench.near_duplicate_table CORPUS.jsonl [--threshold 0.6] [--shingle-size 2]
    python -m litgpt_memsinks.bench.near_duplicate_table --generated 5000

Run it on some thousand documents of your own before you trust the settings: what is alike depends on the corpus. The
measurements in ``docs/near_duplicates.md`` are its output.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.document_ids.near_duplicates import SignatureFile, bands, cluster, shingles, signatures

SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)


class Row(NamedTuple):
    """What became of one edited copy of each document."""

    share: float
    """Share of the words that were edited"""
    jaccard: float
    """Mean Jaccard similarity of a copy's shingles and its original's, exactly"""
    found: float
    """Share of the copies in the cluster of their original; the others are missed"""


class Merges(NamedTuple):
    """What became of different documents."""

    merged: int
    """Documents in a cluster with another one"""
    largest: int
    """Documents in the largest cluster"""


def edited(text: str, share: float, rng: Random) -> str:
    """Edit words here and there: each is replaced, deleted or followed by another one, with equal probability.

    Args:
        text: Words and what lies between them, which the copy has, too.
        share: Of the words, in [0, 1].
        rng: Source of the randomness.

    Returns:
        The copy. New words are words of the text itself, the hardest case: they belong to it.
    """
    pieces = re.findall(r"(\S+)(\s*)", text)
    words = [word for word, _ in pieces]
    copy = [[word] for word in words]
    for place in rng.sample(range(len(words)), round(share * len(words))):
        new = rng.choice(words)
        copy[place] = rng.choice(([new], [], [words[place], new]))
    return "".join(" ".join(new) + gap for new, (_, gap) in zip(copy, pieces, strict=True) if new)


def jaccard(first: str, second: str, size: int) -> float:
    """Exact Jaccard similarity of the sets of shingles of ``size`` words."""
    one, other = set(shingles(first, size)), set(shingles(second, size))
    return len(one & other) / len(one | other)


def recall_table(
    texts: list[str], settings: NearDuplicates, shares: Sequence[float] = SHARES, seed: int = 0
) -> list[Row]:
    """Cluster a corpus together with one edited copy of each of its documents, for each share of edited words.

    Args:
        texts: Different documents.
        settings: What counts as a near-duplicate.
        shares: Of edited words.
        seed: Of the edits.
    """
    original = signatures(texts, settings)
    rows = []
    for share in shares:
        rng = Random(f"{seed} {share}")
        copies = [edited(text, share, rng) for text in texts]
        together = clusters(np.concatenate([original, signatures(copies, settings)]), settings)
        found = together[: len(texts)] == together[len(texts) :]
        similarities = [jaccard(*pair, settings.shingle_size) for pair in zip(texts, copies, strict=True)]
        rows.append(Row(share, float(np.mean(similarities)), float(found.mean())))
    return rows


def merges(texts: list[str], settings: NearDuplicates) -> Merges:
    """Cluster different documents.

    Args:
        texts: Different documents.
        settings: What counts as a near-duplicate.
    """
    _, sizes = np.unique(clusters(signatures(texts, settings), settings), return_counts=True)
    return Merges(int(sizes[sizes > 1].sum()), int(sizes.max(initial=0)))


def clusters(rows: npt.NDArray[np.uint32], settings: NearDuplicates) -> npt.NDArray[np.int64]:
    """The cluster of each document, int64 ``(n,)``, from their signatures, uint32 ``(n, permutations)``."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "signatures.bin"
        rows.tofile(path)
        return np.fromfile(cluster([SignatureFile(path, len(rows))], settings, Path(folder)), dtype="<i8")


def _read(path: Path, text_field: str) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)[text_field] for line in lines if line.strip()]


def main() -> None:
    """Print the table of a corpus."""
    defaults = NearDuplicates()
    parser = argparse.ArgumentParser(prog="python -m litgpt_memsinks.bench.near_duplicate_table")
    parser.add_argument("corpus", type=Path, nargs="?", help="JSON lines")
    parser.add_argument("--generated", type=int, default=5000, help="stories of the demo's grammar, without a corpus")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--documents", type=int, help="the first ones only")
    parser.add_argument("--threshold", type=float, default=defaults.threshold)
    parser.add_argument("--shingle-size", type=int, default=defaults.shingle_size)
    parser.add_argument("--permutations", type=int, default=defaults.permutations)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of edited words")
    args = parser.parse_args()
    settings = NearDuplicates(args.threshold, args.shingle_size, args.permutations)
    settings.check()
    read = _read(args.corpus, args.text_field) if args.corpus else list(stories(args.generated))
    texts = list(dict.fromkeys(read))[: args.documents]
    start = time.process_time()
    signatures(texts, settings)
    seconds = time.process_time() - start
    megabytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    n_bands, rows = bands(settings.threshold, settings.permutations)
    print(f"{len(texts)} different documents, {megabytes:.1f} MB; {n_bands} bands of {rows}")
    print(f"Signatures: {len(texts) / seconds:.0f} documents/s, {megabytes / seconds:.1f} MB/s of one core")
    print("Different documents: {} in a cluster with another, {} in the largest".format(*merges(texts, settings)))
    print("| words edited | Jaccard similarity | found | missed |\n|---:|---:|---:|---:|")
    for row in recall_table(texts, settings, args.shares):
        print(f"| {row.share:.0%} | {row.jaccard:.3f} | {row.found:.2%} | {1 - row.found:.2%} |")


if __name__ == "__main__":
    main()
