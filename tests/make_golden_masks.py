"""The sink mask in NumPy, from its definition and not from `sinks.py`. Prints GOLDEN_MASKS of test_sinks.py.

    python tests/make_golden_masks.py

Unsigned 32-bit arithmetic throughout: shifts are logical and products wrap by the rules of the language, where
`sinks.py` builds both out of signed numbers. Masks are packed eight neurons to the byte, the first in the highest bit.
"""

import numpy as np

GOLDEN_RATIO = np.uint32(0x9E3779B9)

DOCUMENTS = (0, 1, -1, 2, 3, 65536, 12345678, -12345678, 2**31 - 1, -(2**31), -(2**31) + 1)
SETTINGS = ((45, 0.3, 0), (45, 0.3, 7), (45, 0.3, -7), (17, 0.5, 2**31 - 1), (33, 0.9, -(2**31)), (7, 0.01, 123456))
"""n_sink, p, seed."""


def reference_fmix32(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser as its author wrote it, on uint32."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def reference_mask(ids: np.ndarray, n_sink: int, active_probability: float, seed: int) -> np.ndarray:
    """The mask of any integer ids: bool of shape ``ids.shape + (n_sink,)``."""
    documents = (np.asarray(ids, dtype=np.int64) % 2**31).astype(np.uint32)[..., None]
    neurons = np.arange(n_sink, dtype=np.uint32)
    token_state = reference_fmix32(reference_fmix32(documents + GOLDEN_RATIO))
    neuron_key = reference_fmix32(neurons * GOLDEN_RATIO + np.uint32(seed % 2**32))
    mixed = reference_fmix32(token_state ^ neuron_key)
    # signed order is unsigned order with the sign bit flipped; thresholds end at the largest int32
    rank = mixed ^ np.uint32(0x80000000)
    on = rank < np.uint32(min(round(active_probability * 2**32), 2**32 - 1))
    if active_probability in (0, 1):
        on = np.full_like(on, active_probability == 1)
    return on & (documents != 0)


def packed(mask: np.ndarray) -> str:
    """One document's mask as hexadecimal digits."""
    return np.packbits(mask).tobytes().hex()


if __name__ == "__main__":
    print("GOLDEN_MASKS = {\n    1: {")
    for setting in SETTINGS:
        print(f"        {setting}: {{")
        for document in DOCUMENTS:
            print(f'            {document}: "{packed(reference_mask(np.array(document), *setting))}",')
        print("        },")
    print("    },\n}")
