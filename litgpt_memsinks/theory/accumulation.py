"""Does memorisation collect in the sinks? Theorem H.3, on training with memorization sinks.

Notation, as in App. H: a document's features z, of length 1, are those of the shared neurons and those of the sinks.
The memorised document, seen k times in N steps, always has its sinks on; a fraction rho of the other documents has the
same ones on. The rest is that of ``forgetting.py``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.theory.forgetting import (
    MEMORISED,
    probability_bounds,
    require_similarities,
    similar_features,
    train,
)
from litgpt_memsinks.theory.verdict import Verdict, require

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Accumulation:
    """The setting of App. H.3, with as many sinks as shared neurons, of different strength."""

    vocabulary: int = 16
    """d_emb, the number of next tokens"""
    width: int = 24
    """Number of shared neurons, and of sinks"""
    steps: int = 1000
    """N: all steps"""
    repeats: int = 10
    """k: steps on the memorised document, spread evenly"""
    learning_rate: float = 0.01
    """gamma, above 0"""
    active: float = 0.1
    """rho: fraction of the other documents that have the memorised one's sinks on, in [0, 1]"""
    shared_share: float = 0.5
    """Squared length of the shared part of z, in [0, 1]; the sinks' is the rest of 1"""
    least_similarity: float = 0.5
    """The least cosine of the memorised document's features and another's, in each of the two parts; 0 or more"""
    most_similarity: float = 0.8
    """The largest one"""
    seed: int = 0
    """Seed of features, tokens and masks"""

    def __post_init__(self) -> None:
        require(self.vocabulary >= 2, "vocabulary", self.vocabulary, "2 or more")
        require(self.width >= 2, "width", self.width, "2 or more")
        require(1 <= self.repeats <= self.steps, "repeats", self.repeats, f"in [1, steps = {self.steps}]")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(0 <= self.active <= 1, "active", self.active, "in [0, 1]")
        require(0 <= self.shared_share <= 1, "shared_share", self.shared_share, "in [0, 1]")
        require(self.least_similarity >= 0, "least_similarity", self.least_similarity, "0 or more")
        require_similarities(self.least_similarity, self.most_similarity)

    @property
    def others(self) -> int:
        """Steps on other documents, N - k."""
        return self.steps - self.repeats


class Outcome(NamedTuple):
    """The memorised document's logit at the end, by part of the model, and what the bounds need."""

    shared: float
    """Of the shared neurons alone: sinks dropped"""
    sinks: float
    """Of the sinks alone"""
    c_min: float
    """No probability was below this"""
    c_max: float
    """No probability was above this"""


class Documents(NamedTuple):
    """What training sees, one document a row."""

    shared: Array
    """Features of shared neurons, shape ``(N - k + 1, width)``; the memorised document's is the first"""
    sinks: Array
    """Features of the sinks, the same shape, where they are on"""
    on: npt.NDArray[np.bool_]
    """Whether a document has those sinks on, shape ``(N - k + 1,)``"""


def documents(setup: Accumulation) -> Documents:
    """Random documents for a setting; exactly ``floor(rho (N - k))`` others have the sinks on."""
    rng = np.random.default_rng(setup.seed)
    limits = (setup.others, setup.width, setup.least_similarity, setup.most_similarity)
    shared = math.sqrt(setup.shared_share) * similar_features(rng, *limits)
    sinks = math.sqrt(1 - setup.shared_share) * similar_features(rng, *limits)
    on = np.zeros(setup.others + 1, dtype=bool)
    on[1 + rng.permutation(setup.others)[: math.floor(setup.active * setup.others)]] = True
    on[0] = True
    return Documents(shared, sinks, on)


def order(setup: Accumulation) -> Integers:
    """Row of each step: the memorised document's (0) spread evenly among the others, shape ``(N,)``."""
    rows = np.zeros(setup.steps, dtype=np.int64)
    repeated = (np.arange(setup.repeats) * setup.steps) // setup.repeats
    rows[np.setdiff1d(np.arange(setup.steps), repeated)] = np.arange(1, setup.others + 1)
    return rows


def run(setup: Accumulation) -> Outcome:
    """Train in a setting, from ``W`` = 0."""
    rng = np.random.default_rng(setup.seed + 1)
    tokens = np.concatenate([[MEMORISED], rng.integers(1, setup.vocabulary, setup.others)])
    return outcome(documents(setup), tokens, order(setup), setup.vocabulary, setup.learning_rate)


def outcome(data: Documents, tokens: Integers, rows: Integers, vocabulary: int, learning_rate: float) -> Outcome:
    """Train on the documents in the order of ``rows``, then read the memorised logit of each part of the model."""
    features = np.hstack([data.shared, np.where(data.on[:, None], data.sinks, 0.0)])
    result = train(features[rows], tokens[rows], vocabulary, learning_rate)
    width, logits = data.shared.shape[1], result.weights[-1, MEMORISED] * features[0]
    bounds = probability_bounds(2 * result.largest_norm, vocabulary)
    return Outcome(float(logits[:width].sum()), float(logits[width:].sum()), *bounds)


def shared_bound(setup: Accumulation, c_min: float) -> float:
    """H.3 (1): the shared neurons' logit is at most ``gamma k (1 - c_min) - gamma (N - k) epsilon_shared c_min``."""
    kept = setup.repeats * (1 - c_min)
    forgotten = setup.others * setup.shared_share * setup.least_similarity * c_min
    return setup.learning_rate * (kept - forgotten)


def printed_sink_bound(setup: Accumulation, c_max: float) -> float:
    """H.3 (2): the sinks' logit is at least ``gamma k (1 - c_max) - gamma (N - k) rho epsilon_mem c_max``."""
    kept = setup.repeats * (1 - c_max)
    forgotten = setup.others * setup.active * (1 - setup.shared_share) * setup.least_similarity * c_max
    return setup.learning_rate * (kept - forgotten)


def corrected_shared_bound(setup: Accumulation, c_min: float) -> float:
    """(1) with what a step on the memorised document really adds, ``|z_shared|^2``."""
    kept = setup.repeats * (1 - c_min)
    forgotten = setup.others * setup.least_similarity * c_min
    return setup.learning_rate * setup.shared_share * (kept - forgotten)


def corrected_sink_bound(setup: Accumulation, c_max: float) -> float:
    """(2) with ``|z_mem|^2`` in the first term, and the largest similarity, not the least, in the second one."""
    kept = setup.repeats * (1 - c_max)
    forgotten = setup.others * setup.active * setup.most_similarity * c_max
    return setup.learning_rate * (1 - setup.shared_share) * (kept - forgotten)


def printed_threshold(setup: Accumulation, c_min: float, c_max: float) -> float:
    """The rho below which App. H.3 has the sinks hold more: ``c_min / c_max - k / (N - k) (c_max - c_min)``."""
    return c_min / c_max - setup.repeats / setup.others * (c_max - c_min)


def threshold_of_printed_bounds(setup: Accumulation, similarity: float, c_min: float, c_max: float) -> float:
    """The rho below which the printed bounds part, for equal similarities of shared neurons and sinks.

    ``c_min / c_max - k (c_max - c_min) / ((N - k) similarity c_max)``: the text's threshold lacks ``similarity c_max``.
    """
    return c_min / c_max - setup.repeats * (c_max - c_min) / (setup.others * similarity * c_max)


def corrected_threshold(setup: Accumulation, c_min: float, c_max: float) -> float:
    """The rho below which the corrected bounds part; none if negative. For most_similarity > 0, shared_share < 1."""
    shared, sinks = setup.shared_share, 1 - setup.shared_share
    head_start = setup.repeats * (shared * (1 - c_min) - sinks * (1 - c_max))
    pulled = setup.others * shared * setup.least_similarity * c_min
    return (pulled - head_start) / (setup.others * sinks * setup.most_similarity * c_max)


def verdicts(setup: Accumulation | None = None) -> list[Verdict]:
    """Check both parts of H.3 and the threshold in a setting, and show the counterexamples."""
    setup = setup or Accumulation()
    result, name = run(setup), _name(setup)
    limit = corrected_threshold(setup, result.c_min, result.c_max)
    parted = corrected_sink_bound(setup, result.c_max) - corrected_shared_bound(setup, result.c_min)
    return [
        Verdict(
            *("H.3 (1)", "printed", "shared logit ≤ γk(1 − c_min) − γ(N − k)ε c_min", name),
            *(result.shared, "<=", shared_bound(setup, result.c_min)),
        ),
        Verdict(
            *("H.3 (2)", "printed", "sinks' logit ≥ γk(1 − c_max) − γ(N − k)ρε c_max", name),
            *(result.sinks, ">=", printed_sink_bound(setup, result.c_max)),
        ),
        *counterexamples(),
        Verdict(
            *("H.3 (1)", "corrected", "(1) with γk|z_shared|²(1 − c_min)", name),
            *(result.shared, "<=", corrected_shared_bound(setup, result.c_min)),
        ),
        Verdict(
            *("H.3 (2)", "corrected", "(2) with γk|z_mem|²(1 − c_max) and the largest ε", name),
            *(result.sinks, ">=", corrected_sink_bound(setup, result.c_max)),
        ),
        Verdict(
            *("H.3", "corrected", f"sinks − shared ≥ (2) − (1), above 0 if ρ < {limit:.2f}", name),
            *(result.sinks - result.shared, ">=", parted),
        ),
    ]


def counterexamples() -> list[Verdict]:
    """Where H.3 fails: the length of z_mem, the direction of epsilon_mem, and the threshold, which lacks both."""
    one_step = Accumulation(vocabulary=10, steps=1, repeats=1, learning_rate=0.1)
    graded = Accumulation(
        vocabulary=10, steps=101, repeats=1, active=1, shared_share=0, least_similarity=0, most_similarity=1
    )
    strong = Accumulation(
        vocabulary=10, steps=100, active=0, shared_share=0.9, least_similarity=0.1, most_similarity=0.2
    )
    result, forgotten, behind = run(one_step), run(graded), run(strong)
    limit = printed_threshold(strong, behind.c_min, behind.c_max)
    return [
        Verdict(
            *("H.3 (2)", "printed", "the same; |z_mem|² is missing", "k = N = 1, |z_mem|² = 1/2, γ = 0.1"),
            *(result.sinks, ">=", printed_sink_bound(one_step, result.c_max)),
        ),
        Verdict(
            *(
                "H.3 (2)",
                "printed",
                "the same; ε is the least similarity",
                "N = 101, k = 1, ρ = 1, |z_mem|² = 1, similarity 0 to 1",
            ),
            *(forgotten.sinks, ">=", printed_sink_bound(graded, forgotten.c_max)),
        ),
        Verdict(
            *("H.3", "printed", f"sinks − shared > 0 if ρ < {limit:.2f}, the threshold", _name(strong)),
            *(behind.sinks - behind.shared, ">", 0.0),
        ),
    ]


def _name(setup: Accumulation) -> str:
    return f"N = {setup.steps}, k = {setup.repeats}, ρ = {setup.active:g}, |z_shared|² = {setup.shared_share:g}"
