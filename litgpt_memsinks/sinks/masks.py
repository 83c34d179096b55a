"""What is a sink? The mask that says which sink neurons a document switches on.

Memorization Sinks (Ghosal, Maini, Raghunathan, ICML 2025, Sec. 5 and App. G, I.1) share a fraction g of each MLP's
hidden neurons between all documents. Each of the others, the sinks, is on for a document with probability p, decided by
a deterministic function of the document's ID. The paper draws the mask from a linear congruential generator; this one
hashes (ID, neuron) with murmur3's 32-bit finaliser instead, because the generator's masks of consecutive IDs overlap
far more, or far less, than independent ones do. There is no state, no table and no random number generator.

A sequence ID is an int32. Its low 31 bits name the document, and only they choose the mask. Its sign bit says that the
document occurs more than once in the stream (`document_ids/ids.py`). ID 0 means "no document": every sink off.

Checkpoints depend on these bits for ever. They may only change together with ``MASK_VERSION``.

Beyond the paper are `exact_mask`, with the same number of sinks for every document, and `trained_without`, which says
in which rows a document trains without its sinks.
"""

import numpy as np
import torch

MASK_VERSION = 1
"""Version of the function from (ID, neuron, seed, p) to on/off. Stored in each checkpoint's configuration."""

# int32 values of murmur3's finaliser constants 0x85ebca6b, 0xc2b2ae35 and of 2**32 / golden ratio. Signed, because
# PyTorch has no unsigned shifts or comparisons on CPU.
_C1 = 0x85EBCA6B - 2**32
_C2 = 0xC2B2AE35 - 2**32
_GOLDEN = 0x9E3779B9 - 2**32
_LOW_31_BITS = 0x7FFFFFFF


def fmix32(h: torch.Tensor) -> torch.Tensor:
    """Murmur3's 32-bit finaliser: a bijection on 32-bit integers that spreads every input bit over all output bits.

    Args:
        h: int32 of any shape.

    Returns:
        int32 of the same shape. Multiplication wraps.
    """
    # `>>` is arithmetic on signed integers; masking off the copies of the sign bit makes it the logical shift
    h = (h ^ ((h >> 16) & 0xFFFF)) * _C1
    h = (h ^ ((h >> 13) & 0x7FFFF)) * _C2
    return h ^ ((h >> 16) & 0xFFFF)


def threshold(active_probability: float) -> int:
    """The int32 value below which a uniformly distributed int32 falls with the given probability.

    Args:
        active_probability: p, in (0, 1), in steps of 2**-32. ``sink_mask`` treats the ends apart.
    """
    return min(max(round(active_probability * 2**32) - 2**31, -(2**31)), 2**31 - 1)


def document_bits(sequence_ids: torch.Tensor) -> torch.Tensor:
    """The 31 bits that name the document, without the sign bit that says whether it repeats. int32, same shape."""
    return sequence_ids.to(torch.int32) & _LOW_31_BITS


def only_repeated(sequence_ids: torch.Tensor) -> torch.Tensor:
    """IDs with those of documents that occur once replaced by 0, which has no sinks. int32, same shape."""
    sequence_ids = sequence_ids.to(torch.int32)
    return torch.where(sequence_ids < 0, sequence_ids, 0)


def pack_neurons(neurons: torch.Tensor) -> str:
    """A set of sinks as text, as a model's configuration stores it.

    Args:
        neurons: bool ``(n_sink,)``.

    Returns:
        Hexadecimal: the sinks 0 to 7 are the bits of the first byte, the lowest first. Empty if there are none.
    """
    return np.packbits(neurons.cpu().numpy(), bitorder="little").tobytes().hex() if neurons.any() else ""


def unpack_neurons(text: str, n_sink: int) -> torch.Tensor:
    """What ``pack_neurons`` packed, bool ``(n_sink,)`` on the CPU.

    Raises:
        ValueError: If the text is not of so many sinks.
    """
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little").astype(np.bool_)
    if text and (len(packed) != -(-n_sink // 8) or bits[n_sink:].any()):
        raise ValueError(f"{len(text)} hexadecimal digits are not of {n_sink} sinks")
    return torch.from_numpy(bits[:n_sink] if text else np.zeros(n_sink, dtype=np.bool_))


def mixed_bits(sequence_ids: torch.Tensor, n_sink: int, seed: int = 0) -> torch.Tensor:
    """32 pseudorandom bits for each document and sink, which the masks are made of.

    Args:
        sequence_ids: See ``sink_mask``.
        n_sink: See ``sink_mask``.
        seed: See ``sink_mask``.

    Returns:
        int32 of shape ``(..., n_sink)``.
    """
    documents = document_bits(sequence_ids)
    neurons = torch.arange(n_sink, dtype=torch.int32, device=documents.device)
    # Two rounds before the XOR: with one, consecutive IDs give correlated masks
    token_state = fmix32(fmix32(documents + _GOLDEN)).unsqueeze(-1)
    # The `&` changes no number. Without it Inductor (torch 2.15, CPU, AVX-512) folds the multiplication into its loop
    # index, where it overflows a signed integer; the C++ compiler may assume that never happens, and then masks are
    # wrong and memory beyond them is overwritten wherever n_sink is not a multiple of 64.
    neuron_key = fmix32((neurons & _LOW_31_BITS) * _GOLDEN + seed)
    return fmix32(token_state ^ neuron_key)


def sink_mask(sequence_ids: torch.Tensor, n_sink: int, active_probability: float, seed: int = 0) -> torch.Tensor:
    """Which sinks are on for which token (Sec. 5, App. I.1). The same in every layer, as in the paper.

    Args:
        sequence_ids: The ID of each token's document, shape ``(..., )`` such as ``(B, T)``, int32 or wider; only the
            low 31 bits count. 0 switches all sinks off.
        n_sink: Number of sink neurons in one MLP.
        active_probability: p, the probability that a given sink is on for a given document, in [0, 1].
        seed: Another small seed gives independent masks. Any int32.

    Returns:
        bool of shape ``(..., n_sink)``.
    """
    documents = document_bits(sequence_ids)
    named = (documents != 0).unsqueeze(-1)
    neurons = torch.arange(n_sink, dtype=torch.int32, device=documents.device)
    if active_probability <= 0:
        return named & (neurons < 0)
    if active_probability >= 1:
        return named & (neurons >= 0)
    # nothing is below the smallest int32: no sink is on for ID 0
    limit = torch.where(named, threshold(active_probability), -(2**31)).to(torch.int32)
    return mixed_bits(sequence_ids, n_sink, seed) < limit


def exact_mask(sequence_ids: torch.Tensor, n_sink: int, active_probability: float, seed: int = 0) -> torch.Tensor:
    """As ``sink_mask``, but with exactly ``round(p * n_sink)`` sinks on for every document, never less than one.

    Not in the paper. On are the sinks whose bits are the smallest; their lowest bits are replaced by the sink's number,
    so that no two are equal.

    Args:
        sequence_ids: See ``sink_mask``.
        n_sink: See ``sink_mask``.
        active_probability: p, in [0, 1].
        seed: See ``sink_mask``.

    Returns:
        bool of shape ``(..., n_sink)``.
    """
    named = (document_bits(sequence_ids) != 0).unsqueeze(-1)
    neurons = torch.arange(n_sink, dtype=torch.int32, device=named.device)
    number = exact_number(n_sink, active_probability)
    if number in (0, n_sink):
        return named & (neurons < number)
    low_bits = (1 << (n_sink - 1).bit_length()) - 1
    keys = (mixed_bits(sequence_ids, n_sink, seed) & ~low_bits) | neurons
    return named & (keys <= keys.kthvalue(number, dim=-1, keepdim=True).values)


def exact_number(n_sink: int, active_probability: float) -> int:
    """How many sinks ``exact_mask`` switches on: the nearest whole number to ``p * n_sink``, at least one if p > 0."""
    return min(n_sink, max(round(active_probability * n_sink), int(active_probability > 0)))


def trained_without(tokens: torch.Tensor, sequence_ids: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    """Which tokens of training rows are trained with their sinks off, so that the shared neurons learn to do without.

    Not in the paper. Each document in each row is a coin flip of its own, decided by a hash of the document's ID and of
    all tokens of the row. So another occurrence of the document, in another row, is another flip; all tokens of a
    document in a row go together; and the same row is the same flips, in every epoch, after a resume and on any device.

    Args:
        tokens: Tokens of the rows, integers of shape ``(B, T)``.
        sequence_ids: The ID of each token's document, of the same shape.
        share: Probability that a document's sinks are off in a row, in [0, 1).
        seed: Another small seed gives independent flips. Any int32.

    Returns:
        bool of shape ``(B, T)``.
    """
    places = torch.arange(tokens.size(-1), dtype=torch.int32, device=tokens.device)
    # the `&` for the reason in `mixed_bits`
    words = fmix32(tokens.to(torch.int32) + fmix32((places & _LOW_31_BITS) * _GOLDEN + seed))
    row = (words.sum(dim=-1, keepdim=True, dtype=torch.int64) & _LOW_31_BITS).to(torch.int32)
    return fmix32(fmix32(document_bits(sequence_ids) + _GOLDEN) ^ fmix32(row)) < threshold(share)
