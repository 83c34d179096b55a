"""How fast is a memorised document forgotten? Theorems H.1 and H.2, and the training that H.3 shares.

Notation, as in App. H: features z are frozen, ``W`` (the paper's W_proj) is trained by the cross entropy of
softmax(W z), one document a step. Output tokens are one-hot, e_mem belongs to the memorised document alone. C is twice
the largest spectral norm of ``W`` in training, so that every probability lies in [c_min, c_max].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.theory.verdict import Verdict, require

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MEMORISED = 0
"""e_mem: the next token of the memorised document"""


@dataclass(frozen=True)
class Forgetting:
    """The setting of App. H.2: some steps on the memorised document, then steps on others, each seen once."""

    vocabulary: int = 16
    """d_emb, the number of next tokens"""
    width: int = 24
    """Dimension of z"""
    memorising: int = 20
    """Steps on the memorised document, before"""
    steps: int = 200
    """m: steps on other documents, after"""
    learning_rate: float = 0.05
    """gamma, above 0"""
    least_similarity: float = 0.3
    """epsilon: the least inner product of the memorised document's z and another's, in [-1, 1]"""
    most_similarity: float = 0.6
    """The largest one"""
    seed: int = 0
    """Seed of features and tokens"""

    def __post_init__(self) -> None:
        require(self.vocabulary >= 2, "vocabulary", self.vocabulary, "2 or more")
        require(self.width >= 2, "width", self.width, "2 or more")
        require(self.memorising >= 0, "memorising", self.memorising, "0 or more")
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require_similarities(self.least_similarity, self.most_similarity)


class Run(NamedTuple):
    """Training, step by step."""

    weights: Array
    """``W`` after 0, 1, ... steps, shape ``(S + 1, vocabulary, width)``"""
    largest_norm: float
    """The largest spectral norm among them"""


def require_similarities(least: float, most: float) -> None:
    """Refuse limits of inner products that no unit vectors have.

    Raises:
        MemSinksError: Naming the limit, its value and what it must be.
    """
    require(-1 <= least <= 1, "least_similarity", least, "in [-1, 1]")
    require(least <= most <= 1, "most_similarity", most, f"in [least_similarity = {least}, 1]")


def similar_features(rng: np.random.Generator, count: int, width: int, least: float, most: float) -> Array:
    """Unit vectors in rows: the memorised document's, then ``count`` others in random order.

    Their inner products with the first are spread evenly over [least, most], ends included.

    Returns:
        Shape ``(count + 1, width)``.
    """
    rows = rng.normal(size=(count + 1, width))
    first = rows[0] / np.linalg.norm(rows[0])
    others = rows[1:] - np.outer(rows[1:] @ first, first)
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    cosines = rng.permutation(np.linspace(least, most, count))[:, None]
    return np.vstack([first, cosines * first + np.sqrt(1 - cosines**2) * others])


def train(features: Array, tokens: Integers, vocabulary: int, learning_rate: float) -> Run:
    """Gradient descent on the cross entropy from ``W`` = 0, one document a step.

    Args:
        features: z of each step, shape ``(S, width)``.
        tokens: Next token of each step, shape ``(S,)``.
        vocabulary: Number of tokens.
        learning_rate: gamma.
    """
    weights = np.zeros((len(tokens) + 1, vocabulary, features.shape[1]))
    for step, (z, token) in enumerate(zip(features, tokens, strict=True)):
        error = -softmax(weights[step] @ z)
        error[token] += 1
        weights[step + 1] = weights[step] + learning_rate * np.outer(error, z)
    return Run(weights, float(np.linalg.norm(weights, ord=2, axis=(1, 2)).max()))


def softmax(logits: Array) -> Array:
    """Probabilities of the last dimension."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def probability_bounds(C: float, vocabulary: int) -> tuple[float, float]:
    """c_min and c_max of App. H.2: every probability lies between ``exp(-C) / d`` and ``exp(C) / (d - 1)``.

    Theorem H.1 for logits of at most C / 2 in size; its printed exponent 2k is 2 times that size.
    """
    return math.exp(-C) / vocabulary, math.exp(C) / (vocabulary - 1)


def printed_bound(start: float, learning_rate: float, steps: int, similarity: float, c_min: float) -> float:
    """Theorem H.2's upper bound on the memorised logit, ``start - gamma m epsilon c_min``."""
    return start - learning_rate * steps * similarity * c_min


def corrected_bound(
    start: float, learning_rate: float, steps: int, similarity: float, c_min: float, c_max: float
) -> float:
    """The same for every sign of epsilon: a negative one multiplies c_max, as the token then gains at each step."""
    return start - learning_rate * steps * similarity * (c_min if similarity >= 0 else c_max)


def fastest(start: float, learning_rate: float, steps: int, similarity: float, c_max: float) -> float:
    """A lower bound on the memorised logit, ``start - gamma m epsilon_max c_max``, for the largest similarity >= 0."""
    return start - learning_rate * steps * similarity * c_max


def run(setup: Forgetting) -> tuple[Array, float]:
    """Train in a setting.

    Returns:
        The memorised logit after 0, ..., m steps on other documents, shape ``(m + 1,)``, and C.
    """
    rng = np.random.default_rng(setup.seed)
    rows = similar_features(rng, setup.steps, setup.width, setup.least_similarity, setup.most_similarity)
    features = np.vstack([np.repeat(rows[:1], setup.memorising, axis=0), rows[1:]])
    others = rng.integers(1, setup.vocabulary, setup.steps)  # never e_mem
    tokens = np.concatenate([np.full(setup.memorising, MEMORISED), others])
    result = train(features, tokens, setup.vocabulary, setup.learning_rate)
    return (result.weights[:, MEMORISED] @ rows[0])[setup.memorising :], 2 * result.largest_norm


def verdicts(setup: Forgetting | None = None) -> list[Verdict]:
    """Check H.2 in a setting, and show what a negative similarity does to it.

    Args:
        setup: The setting; ``least_similarity`` must be 0 or more. The counterexample reverses both similarities.
    """
    setup = setup or Forgetting()
    require(setup.least_similarity >= 0, "least_similarity", setup.least_similarity, "0 or more here")
    least, most = -setup.most_similarity, -setup.least_similarity
    reversed_setup = Forgetting(**{**vars(setup), "least_similarity": least, "most_similarity": most})
    return check(setup) + check(reversed_setup)


def check(setup: Forgetting) -> list[Verdict]:
    """The printed and the corrected bound in one setting."""
    logits, C = run(setup)
    start, end, epsilon = float(logits[0]), float(logits[-1]), setup.least_similarity
    c_min, c_max = probability_bounds(C, setup.vocabulary)
    settings = (start, setup.learning_rate, setup.steps, epsilon, c_min)
    simulated = f"{setup.memorising} + {setup.steps} steps, γ = {setup.learning_rate:g}, ε = {epsilon:g}"
    return [
        Verdict(
            *("H.2", "printed", "logit ≤ start − γmε c_min", simulated),
            *(end, "<=", printed_bound(*settings)),
        ),
        Verdict(
            *("H.2", "corrected", "the same, with c_max if ε < 0", simulated),
            *(end, "<=", corrected_bound(*settings, c_max)),
        ),
    ]
