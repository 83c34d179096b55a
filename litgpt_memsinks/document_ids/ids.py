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
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype="<u4").data)


def noisy_ids(ids: npt.NDArray[np.int32], probability: float, drawn: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """Replace the IDs of repeated documents by random ones (Sec. 5.3, Fig. 5c).

    Args:
        ids: One sequence ID per written document, shape ``(n_written,)``.
        probability: Of replacing the ID of a repeated document, drawn anew each time it is written, in [0, 1].
        drawn: A random number for each, same shape; see ``mix``.

    Returns:
        IDs of the same shape. The sign bit stays: what is lost is which document it is, not that it repeats.
    """
    random = (document_bits(mix(drawn, "id")).astype(np.int64) - 2**31).astype(np.int32)
    replaced = (ids < 0) & ((drawn >> np.uint64(11)) * 2.0**-53 < probability)
    return np.where(replaced, random, ids)


def colliding_pairs(digests: npt.NDArray[np.uint64]) -> int:
    """Number of pairs of different documents that share a sequence ID.

    Args:
        digests: The digests of distinct documents, shape ``(n_documents,)``.
    """
    documents = np.maximum(digests & np.uint64(DOCUMENT_BITS), np.uint64(1))
    _, counts = np.unique(documents, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def document_bits(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Low 31 bits of 64-bit hashes, 1 where they are 0: what names a document in the stream.

    Args:
        hashes: Digests of documents, or hashes of what documents with one ID have in common, any shape.
    """
    return np.maximum(hashes & np.uint64(DOCUMENT_BITS), np.uint64(1))


def sequence_ids(hashes: npt.NDArray[np.uint64], repeated: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """The int32 that stand beside each of the documents' tokens in the stream.

    Args:
        hashes: What names each document, see ``document_bits``; shape ``(n_documents,)``.
        repeated: Whether each occurs more than once in the training stream, same shape.

    Returns:
        The hashes' low 31 bits, or 1 where they are 0 (0 is reserved for "no document"); minus 2**31 where repeated.
        Shape as given.
    """
    return (document_bits(hashes).astype(np.int64) - repeated * 2**31).astype(np.int32)


def mix(hashes: npt.NDArray[np.uint64], *salt: str | int) -> npt.NDArray[np.uint64]:
    """Random-looking 64-bit numbers that depend on a document and a purpose, and on nothing else.

    What is drawn with them (the choice of documents, their order, noise) is the same however the corpus is cut into
    files, workers and shards. It is xxh3_64 of the purpose added to the hash, then splitmix64's finaliser.

    Args:
        hashes: One per document, any shape.
        salt: Names of the purpose: a seed, a word, a number.
    """
    purpose = xxhash.xxh3_64_intdigest(repr(salt).encode())
    with np.errstate(over="ignore"):
        state = hashes + np.uint64(purpose)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def interleave(
    tokens: npt.NDArray[np.integer],
    ids: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.integer],
    out: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.int32]:
    """Put its document's ID behind each token (App. I.1): ``t0 id t1 id ...``.

    Args:
        tokens: Of documents one after another, shape ``(n_tokens,)``.
        ids: Sequence ID of each document, shape ``(n_documents,)``.
        lengths: Tokens of each document, same shape.
        out: Where to write, int32 of shape ``(2 * n_tokens,)``; new memory by default.

    Returns:
        int32 of shape ``(2 * n_tokens,)``.
    """
    stream = np.empty(2 * len(tokens), dtype=np.int32) if out is None else out
    stream[0::2] = tokens
    stream[1::2] = np.repeat(ids, lengths)
    return stream
