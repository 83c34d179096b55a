"""What is beyond the paper in `sinks.py`, in NumPy, from its definition. Prints the golden tables of test_options.py.

python tests/make_golden_options.py
"""

import numpy as np

from tests.make_golden_masks import DOCUMENTS, GOLDEN_RATIO, packed, reference_fmix32

EXACT_SETTINGS = ((45, 0.3, 0), (45, 0.3, 7), (17, 0.5, 2**31 - 1), (7, 0.01, 123456))
"""n_sink, p, seed."""


def documents_of(ids: np.ndarray) -> np.ndarray:
    return (np.asarray(ids, dtype=np.int64) % 2**31).astype(np.uint32)


def reference_exact(ids: np.ndarray, n_sink: int, active_probability: float, seed: int) -> np.ndarray:
    """The exact mask of any integer ids, by sorting: bool of shape ``ids.shape + (n_sink,)``."""
    documents = documents_of(ids)[..., None]
    neurons = np.arange(n_sink, dtype=np.uint32)
    state = reference_fmix32(reference_fmix32(documents + GOLDEN_RATIO))
    mixed = reference_fmix32(state ^ reference_fmix32(neurons * GOLDEN_RATIO + np.uint32(seed % 2**32)))
    low = 1
    while low < n_sink:
        low *= 2
    rank = ((mixed ^ np.uint32(0x80000000)) // np.uint32(low)).astype(np.int64) * low + neurons
    number = round(active_probability * n_sink)
    number = 1 if number == 0 and active_probability > 0 and n_sink else number
    on = np.argsort(np.argsort(rank, axis=-1), axis=-1) < number
    return on & (documents != 0)


def reference_trained_without(tokens: np.ndarray, ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which tokens of rows ``(B, T)`` are trained with their sinks off, by plain sums: bool ``(B, T)``."""
    places = reference_fmix32(np.arange(tokens.shape[1], dtype=np.uint32) * GOLDEN_RATIO + np.uint32(seed % 2**32))
    words = reference_fmix32(tokens.astype(np.uint32) + places).view(np.int32).astype(np.int64)
    row = (words.sum(axis=1, keepdims=True) % 2**31).astype(np.uint32)
    mixed = reference_fmix32(reference_fmix32(documents_of(ids) + GOLDEN_RATIO) ^ reference_fmix32(row))
    return (mixed ^ np.uint32(0x80000000)) < np.uint32(round(share * 2**32))


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Three rows of 11 tokens, the same documents in each; and the first row again with another last token."""
    tokens = np.arange(33).reshape(3, 11) * 7919 % 1000
    changed = tokens[:1].copy()
    changed[0, -1] += 1
    return np.concatenate((tokens, changed)), np.tile(np.array(DOCUMENTS), (4, 1))


if __name__ == "__main__":
    print("GOLDEN_EXACT = {")
    for setting in EXACT_SETTINGS:
        print(f"    {setting}: {[packed(reference_exact(np.array(document), *setting)) for document in DOCUMENTS]},")
    print("}\nGOLDEN_WITHOUT = {")
    for share, seed in ((0.5, 0), (0.5, -7), (0.1, 3)):
        print(f"    {share, seed}: {[packed(row) for row in reference_trained_without(*rows(), share, seed)]},")
    print("}")
