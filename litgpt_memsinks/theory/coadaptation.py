"""Does dropping the neurons that memorised undo what they did? Theorems 4.1 and F.1, on gradient masking.

Notation, as in App. F: only the second layer ``[W_gen, W_mem]`` is trained, by half the squared error, one document a
step. Features of document j are ``s_j``, of length 1, in both halves, as the paper's proof has it. The memorised
document trains ``W_mem`` alone, once; every other document trains ``W_gen`` alone. ``f_d`` is that model without
``W_mem``, ``f_hat`` one that never saw the memorised document. N counts the steps on other documents after it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.theory.verdict import Verdict, require

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coadaptation:
    """The setting of App. F, with random documents that all resemble each other."""

    dimension: int = 8
    """Dimension of the features"""
    outputs: int = 4
    """Dimension of the targets"""
    earlier: int = 20
    """T: steps before the memorised document"""
    steps: int = 400
    """The largest N"""
    learning_rate: float = 0.02
    """gamma, in (0, 1)"""
    similarity: float = 0.4
    """No two documents have an inner product below this; in (0, 1)"""
    seed: int = 0
    """Seed of features and targets"""

    def __post_init__(self) -> None:
        require(self.dimension >= 2, "dimension", self.dimension, "2 or more")
        require(self.outputs >= 1, "outputs", self.outputs, "1 or more")
        require(self.earlier >= 0, "earlier", self.earlier, "0 or more")
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "above 0 and below 1")
        require(0 < self.similarity < 1, "similarity", self.similarity, "above 0 and below 1")


class Stream(NamedTuple):
    """Documents in the order of training; features in rows of length 1, targets in rows."""

    earlier: Array
    """Shape ``(T, dimension)``"""
    earlier_targets: Array
    """Shape ``(T, outputs)``"""
    memorised: Array
    """Shape ``(dimension,)``"""
    target: Array
    """Shape ``(outputs,)``"""
    later: Array
    """Shape ``(N, dimension)``"""
    later_targets: Array
    """Shape ``(N, outputs)``"""


class Routed(NamedTuple):
    """What gradient masking leaves behind."""

    distances: Array
    """``|f_d(x) - f_hat(x)|`` after 0, 1, ..., N later steps"""
    memory: Array
    """``W_mem``, shape ``(outputs, dimension)``"""


def stream(setup: Coadaptation) -> tuple[Stream, Array]:
    """Random documents and ``x``, a further one that is not trained on, for the setting."""
    rng, count = np.random.default_rng(setup.seed), setup.earlier + setup.steps
    own = np.abs(rng.normal(size=(count + 2, setup.dimension - 1)))  # no negative entry: no negative inner product
    own *= math.sqrt(1 - setup.similarity) / np.linalg.norm(own, axis=1, keepdims=True)
    features = np.column_stack([np.full(count + 2, math.sqrt(setup.similarity)), own])
    targets = rng.normal(size=(count + 1, setup.outputs)) / math.sqrt(setup.outputs)
    x, memorised, once = features[0], features[1], features[2:]
    T = setup.earlier
    return Stream(once[:T], targets[1 : T + 1], memorised, targets[0], once[T:], targets[T + 1 :]), x


def train(data: Stream, x: Array, learning_rate: float) -> Routed:
    """Train with gradient masking, and a second model without the memorised document; compare them at ``x``."""
    routed = np.zeros((len(data.target), len(data.memorised)))  # W_gen
    memory = np.zeros_like(routed)  # W_mem
    for s, y in zip(data.earlier, data.earlier_targets, strict=True):
        routed = routed + learning_rate * np.outer(y - (routed + memory) @ s, s)
    unseen = routed.copy()
    memory = memory + learning_rate * np.outer(data.target - (routed + memory) @ data.memorised, data.memorised)
    distances = [0.0]
    for s, y in zip(data.later, data.later_targets, strict=True):
        routed = routed + learning_rate * np.outer(y - (routed + memory) @ s, s)
        unseen = unseen + learning_rate * np.outer(y - unseen @ s, s)
        distances.append(float(np.linalg.norm((routed - unseen) @ x)))
    return Routed(np.array(distances), memory)


def exact_distance(later: Array, memory: Array, x: Array, learning_rate: float) -> float:
    """``|W_mem (I - P) x|`` with ``P = (I - gamma s_1 s_1^T) ... (I - gamma s_N s_N^T)``: the corrected statement.

    Both models take the same steps but for ``W_mem``, which the general neurons learn to cancel on later documents.
    """
    product = np.eye(len(x))
    for s in later:
        product = product @ (np.eye(len(x)) - learning_rate * np.outer(s, s))
    return float(np.linalg.norm(memory @ (x - product @ x)))


def printed_bound(steps: int, learning_rate: float, similarity: float, length: float) -> float:
    """Theorem F.1's lower bound, ``N gamma (1 - gamma)^N c^2 |x|``. Its proof ends with N - 1 for N."""
    return steps * learning_rate * (1 - learning_rate) ** steps * similarity**2 * length


def corrected_bound(steps: int, learning_rate: float, similarity: float, length: float, memory_norm: float) -> float:
    """A lower bound that holds: ``gamma N c (c - gamma (N - 1) / 2) |W_mem| |x|`` while gamma (N - 1) <= c, else 0.

    In the proof's sum, ``s_k . P_k x >= (c - gamma (N - k)) |x|``, as no factor of ``P_k`` lengthens a vector.

    Args:
        steps: N.
        learning_rate: gamma, in (0, 1).
        similarity: c >= 0, at most ``s_mem . s_k`` and ``x . s_k / |x|`` for every later document k.
        length: ``|x|``.
        memory_norm: ``|W_mem| = gamma |y_mem - f(s_mem)|``, the factor that the printed bound lacks.
    """
    if learning_rate * (steps - 1) > similarity:
        return 0.0
    inner = similarity - learning_rate * (steps - 1) / 2
    return learning_rate * steps * similarity * inner * length * memory_norm


def ceiling(steps: int, learning_rate: float, length: float, memory_norm: float) -> float:
    """An upper bound for every stream: ``min(gamma N, 2) |W_mem| |x|``. So no bound c N can hold for every N.

    No factor of P lengthens a vector, so ``|I - P| <= 2``; and each of the N adds at most gamma to it.
    """
    return min(learning_rate * steps, 2.0) * memory_norm * length


def least_similarity(data: Stream, x: Array) -> float:
    """c: the least inner product of any two of the documents and of ``x / |x|``."""
    rows = np.vstack([data.earlier, data.memorised, data.later, x / np.linalg.norm(x)])
    return float((rows @ rows.T).min())


def from_gram(gram: Array) -> Array:
    """Vectors, one a row, with the given inner products."""
    values, vectors = np.linalg.eigh(gram)
    require(bool(values.min() > -1e-12), "gram's least eigenvalue", float(values.min()), "0 or more")
    return vectors * np.sqrt(np.maximum(values, 0))


def alike(steps: int) -> tuple[Stream, Array]:
    """All documents are the number 1, with target 1: every inner product is 1."""
    ones = np.ones((steps, 1))
    return Stream(np.ones((0, 1)), np.ones((0, 1)), np.ones(1), np.ones(1), ones, ones), np.ones(1)


def orthogonal_question() -> tuple[Stream, Array]:
    """One later document, and an x in the span of the documents that is orthogonal to it: Lemma F.2 fails."""
    s_mem, s_1 = np.array([0.6, 0.8]), np.array([1.0, 0.0])
    empty = np.ones((0, 2))
    return Stream(empty, np.ones((0, 1)), s_mem, np.ones(1), s_1[None], np.zeros((1, 1))), np.array([0.0, 1.0])


def cancelling() -> tuple[Stream, Array]:
    """Two later documents whose effects on x cancel at gamma = 1/2, though all inner products are at least 0.09."""
    gram = np.array([[1, 0.6, 0.6, 0.09], [0.6, 1, 0.09, 0.6], [0.6, 0.09, 1, 0.3], [0.09, 0.6, 0.3, 1]])
    first, second, s_mem, x = from_gram(gram)
    empty = np.ones((0, 4))
    return Stream(empty, np.ones((0, 1)), s_mem, np.ones(1), np.array([first, second]), np.zeros((2, 1))), x


def verdicts(setup: Coadaptation | None = None) -> list[Verdict]:
    """Check F.1 and the corrected statements in a setting, and show the counterexamples."""
    setup = setup or Coadaptation()
    data, x = stream(setup)
    rate, c = setup.learning_rate, least_similarity(data, x)
    result, length = train(data, x, rate), float(np.linalg.norm(x))
    memory_norm = float(np.linalg.norm(result.memory))
    early = min(setup.steps, math.floor(c / rate) + 1)
    end, at_early = float(result.distances[-1]), float(result.distances[early])
    exact = exact_distance(data.later, result.memory, x, rate)
    early_bound, top = (
        corrected_bound(early, rate, c, length, memory_norm),
        ceiling(setup.steps, rate, length, memory_norm),
    )
    name = f"{setup.earlier} + 1 + {{}} steps, γ = {rate:g}, c = {c:.2f}"
    at, after = name.format(early), name.format(setup.steps)
    printed, most = printed_bound(early, rate, c, length), float(result.distances.max())
    return [
        Verdict("F.1", "printed", "distance ≥ Nγ(1 − γ)^N c²|x|", at, at_early, ">=", printed),
        *counterexamples(),
        Verdict("F.1", "corrected", "distance = |W_mem (I − Π(I − γss^T)) x|", after, end, "=", exact),
        Verdict("F.1", "corrected", "≥ γNc(c − γ(N − 1)/2)|W_mem||x| if γ(N − 1) ≤ c", at, at_early, ">=", early_bound),
        Verdict("4.1", "corrected", "never above 2|W_mem||x|: growth ends", after, most, "<=", top),
    ]


def counterexamples() -> list[Verdict]:
    """Where F.1 fails: without the factor, for the other reading of N, for some x, and for large gamma N."""
    data, x = alike(1)
    unchanged, missing = train(data, x, 0.1).distances
    orthogonal, y = orthogonal_question()
    blind = train(orthogonal, y, 0.1)
    cancelled, z = cancelling()
    zero = train(cancelled, z, 0.5)
    with_factor = "the same, times |W_mem|"
    return [
        Verdict(
            *("F.1", "printed", "the same; |W_mem| is missing", "all documents 1, N = 1, γ = 0.1"),
            *(float(missing), ">=", printed_bound(1, 0.1, 1.0, 1.0)),
        ),
        Verdict(
            *("F.1", "printed", "the same; its proof says N − 1", "the same, N counts the memorised step"),
            *(float(unchanged), ">=", printed_bound(1, 0.1, 1.0, 1.0)),
        ),
        Verdict(
            *("F.2", "printed", f"{with_factor}; any x in the span", "N = 1, γ = 0.1, x orthogonal to s_1"),
            *(float(blind.distances[1]), ">=", _with_factor(blind, 1, 0.1, 0.6)),
        ),
        Verdict(
            *("F.1", "printed", f"{with_factor}; x · s ≥ c|x|", "N = 2, γ = 0.5, effects on x cancel"),
            *(float(zero.distances[2]), ">=", _with_factor(zero, 2, 0.5, least_similarity(cancelled, z))),
        ),
    ]


def _with_factor(result: Routed, steps: int, learning_rate: float, similarity: float) -> float:
    """The printed bound times ``|W_mem|``, for x of length 1."""
    return printed_bound(steps, learning_rate, similarity, 1.0) * float(np.linalg.norm(result.memory))
