"""Prints GOLDEN_SIGNATURES of test_near_duplicates.py: the first number of each signature, and xxh3_64 of all of them.

    python tests/make_golden_signatures.py

They were made with rensa 0.5.0 (R-MinHash, algorithm version 2) and xxhash 4.1.0 on x86-64.
"""

import xxhash

from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.document_ids.near_duplicates import signatures

TEXTS = {
    "empty": "",
    "word": "Once",
    "story": "Once upon a time, there was a little pony. The pony couldn't fly like the birds.",
    "chinese": "从前有一匹小马，它不能像鸟儿一样飞。",
    "accents": "Der Bär schläft; l’été, naïve façade, 한국어 문장, ไม่มีช่องว่าง",
    "emoji": "🙂🙂",
    "surrogate": "a lone \ud800 surrogate",
    "long": " ".join(str(number) for number in range(40000)),
}
SETTINGS = ((2, 128, 1), (3, 128, 1), (2, 16, 7), (1, 100, 2**32 - 1))
"""shingle_size, permutations, seed."""


def golden(shingle_size: int, permutations: int, seed: int) -> dict[str, tuple[int, str]]:
    """The first number and the digest of each text's signature."""
    settings = NearDuplicates(shingle_size=shingle_size, permutations=permutations, seed=seed)
    rows = signatures(list(TEXTS.values()), settings).astype("<u4")
    return {name: (int(row[0]), xxhash.xxh3_64_hexdigest(row.tobytes())) for name, row in zip(TEXTS, rows, strict=True)}


if __name__ == "__main__":
    print("GOLDEN_SIGNATURES = {")
    for setting in SETTINGS:
        print(f"    {setting}: {{")
        for name, (first, digest) in golden(*setting).items():
            print(f'        "{name}": ({first}, "{digest}"),')
        print("    },")
    print("}")
