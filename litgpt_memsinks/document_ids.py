"""From a document's tokens to the sequence ID that chooses its sinks.

    tokens ─► digest (xxh3, 64 bit) ─► low 31 bits ─► sign bit set if the document occurs more than once ─► int32

The paper hashes "the tokens within that document" (App. I.1). The whole digest stays in the document table; the stream
holds 31 bits of it, so that one int32 per token carries the ID and whether its document repeats. Of a million documents
about 233 pairs share an ID and with it their sinks; `prepare` counts and reports them.
"""

import numpy as np
import numpy.typing as npt
import xxhash

DOCUMENT_BITS = 0x7FFFFFFF
"""Mask of the bits of a sequence ID that name the document."""


def digest(tokens: npt.NDArray[np.int32]) -> int:
    """Hash a document: xxh3_64 of its tokens as little-endian uint32.

    Args:
        tokens: The document's tokens without BOS and EOS, shape ``(n_tokens,)``, none negative.

    Returns:
        Unsigned 64-bit integer.
    """
    return xxhash.xxh3_64_intdigest(tokens.astype("<u4").tobytes())


def sequence_id(digest: int, repeated: bool) -> int:
    """The int32 that stands beside each of the document's tokens in the stream.

    Args:
        digest: Unsigned 64-bit digest of the document.
        repeated: Whether the document occurs more than once in the training stream.

    Returns:
        The digest's low 31 bits, or 1 if they are 0 (0 is reserved for "no document"); minus 2**31 if repeated.
    """
    document = (digest & DOCUMENT_BITS) or 1
    return document - 2**31 if repeated else document


def noisy_ids(ids: npt.NDArray[np.int32], probability: float, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Replace the IDs of repeated documents by random ones (Sec. 5.3, Fig. 5c).

    Args:
        ids: One sequence ID per written document, shape ``(n_written,)``.
        probability: Of replacing the ID of a repeated document, drawn anew each time it is written, in [0, 1].
        rng: Source of the randomness.

    Returns:
        IDs of the same shape. The sign bit stays: what is lost is which document it is, not that it repeats.
    """
    random = rng.integers(1, DOCUMENT_BITS, size=ids.shape, endpoint=True, dtype=np.int64) - 2**31
    replaced = (ids < 0) & (rng.random(ids.shape) < probability)
    return np.where(replaced, random, ids).astype(np.int32)


def colliding_pairs(digests: npt.NDArray[np.uint64]) -> int:
    """Number of pairs of different documents that share a sequence ID.

    Args:
        digests: The digests of distinct documents, shape ``(n_documents,)``.
    """
    documents = np.maximum(digests & np.uint64(DOCUMENT_BITS), np.uint64(1))
    _, counts = np.unique(documents, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def interleave(tokens: npt.NDArray[np.int32], sequence_id: int) -> npt.NDArray[np.int32]:
    """Put the document's ID behind each of its tokens (App. I.1): ``t0 id t1 id ...``.

    Args:
        tokens: Shape ``(n_tokens,)``.
        sequence_id: int32.

    Returns:
        int32 of shape ``(2 * n_tokens,)``.
    """
    stream = np.empty(2 * len(tokens), dtype=np.int32)
    stream[0::2] = tokens
    stream[1::2] = sequence_id
    return stream
