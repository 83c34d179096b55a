"""Which targets does the Goldfish loss leave out? Always the same of a text, by a hash of the tokens before.

Goldfish loss (Hans et al., "Be like a Goldfish, Don't Memorize!", arXiv 2406.10209) takes one in k targets out of the
training loss, so that no text can be learnt without gaps. Which ones must not change from copy to copy, or the copies
fill each other's gaps. So a hash of the ``context_width`` tokens before a target decides.

Unlike their code, ours hashes the order of these tokens, not only their product; does not hash the target itself, as
their text has it; and takes no token of the document before, so that copies are alike from their first tokens on.
"""

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.config import GoldfishArgs
from litgpt_memsinks.document_ids.ids import mix

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, as in splitmix64


def left_out(
    tokens: npt.NDArray[np.int32], ids: npt.NDArray[np.int32], goldfish: GoldfishArgs
) -> npt.NDArray[np.bool_]:
    """Which tokens of training rows are no targets.

    The hash is over the ``context_width`` tokens before, or all before of a document that begins within that width.
    Where the row begins within a document, its tokens are left in until the width is full: the same as in their code.
    So is each document's first token, which no token of it comes before.

    Args:
        tokens: Rows ``(B, N)``.
        ids: Sequence ID of each token, ``(B, N)``. They only say where a document ends; neighbours with one ID are one.
        goldfish: Settings, with k of at least 2.

    Returns:
        bool ``(B, N)``.
    """
    width, number = goldfish.context_width, tokens.shape[1]
    document = np.zeros(tokens.shape, dtype=np.int64)
    document[:, 1:] = np.cumsum(ids[:, 1:] != ids[:, :-1], axis=1)
    symbols = tokens.astype(np.uint64) + np.uint64(1)  # 0 stands for no token
    state = np.zeros(tokens.shape, dtype=np.uint64)
    for back in range(min(width, number - 1), 0, -1):
        state *= _MULTIPLIER  # a polynomial in it: wraps, and no two orders of tokens are the same
        same = document[:, back:] == document[:, :-back]
        state[:, back:] += np.where(same, symbols[:, :-back], np.uint64(0))
    known = (document > 0) | (np.arange(number) >= width)
    return known & (state != 0) & (mix(state, "goldfish", goldfish.seed) < np.uint64(2**64 // goldfish.k))


def describe(goldfish: GoldfishArgs) -> str:
    """One line that says what is left out of the loss."""
    return (
        f"Goldfish loss: one in {goldfish.k} targets is left out of the training loss, by the {goldfish.context_width} "
        "tokens before it."
    )
