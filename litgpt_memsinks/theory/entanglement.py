"""Does gradient flow keep what it memorises apart? Theorems 3.1 and D.3, with definitions D.1, D.2 and Theorem D.5.

Notation, as in App. D: documents have features in a semantic subspace and in a noise subspace. ``W*`` fits the
documents seen once with the least norm; ``delta`` is what its output for the memorised document lacks; ``n`` is that
document's noise feature, orthogonal to all others. Ours: ``q`` is the part of the memorised document's features outside
the span of those of the documents seen once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.theory.verdict import Verdict, require

Array = npt.NDArray[np.float64]
Velocity = Callable[[Array, Array], tuple[Array, Array]]

_SPARE_NOISE = 2
"""Directions of the noise subspace that no document uses, so that there is more than one disentangled solution"""
_CONVERGED = 1e-11
_MOST_STEPS = 200_000


@dataclass(frozen=True)
class Entanglement:
    """The setting of App. D. Every assumption that the paper states holds in every setting accepted here."""

    rank: int = 4
    """k = rank(W*), above 2"""
    known: float = 0.9
    """Length of the memorised document's semantic feature within the span of the documents seen once"""
    novelty: float = 0.5
    """Length of its semantic feature outside that span"""
    once_noise: float = 0.3
    """Length of the noise feature of the documents seen once; they come in pairs with opposite ones"""
    change: float = 1.5
    """Length of delta, above 1"""
    repeats: int = 4
    """Times that the memorised document is in the data"""
    gamma: float = 0.5
    """Scale of the orthogonal feature initialization: W_fc = sqrt(2 gamma) P"""
    seed: int = 0
    """Seed of the rotations"""

    def __post_init__(self) -> None:
        require(self.rank > 2, "rank", self.rank, "an integer above 2")
        require(self.known >= 0, "known", self.known, "0 or more")
        require(self.novelty >= 0, "novelty", self.novelty, "0 or more")
        require(self.once_noise >= 0, "once_noise", self.once_noise, "0 or more")
        require(self.change > 1, "change", self.change, "above 1")
        require(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        require(self.gamma > 0, "gamma", self.gamma, "above 0")


class Documents(NamedTuple):
    """Features and targets, one document a column."""

    once: Array
    """Features of the documents seen once, shape ``(d, n)``"""
    once_targets: Array
    """Shape ``(outputs, n)``"""
    memorised: Array
    """Features of the repeated document, shape ``(d,)``"""
    target: Array
    """Its target, shape ``(outputs,)``"""
    semantic: int
    """How many of the ``d`` dimensions are semantic; the others are noise"""


class Flow(NamedTuple):
    """A trajectory of gradient flow."""

    times: Array
    """Shape ``(S,)``"""
    weights: Array
    """``W_proj W_fc`` at those times, shape ``(S, outputs, d)``"""
    projection: Array
    """``W_proj`` at the end, shape ``(outputs, hidden)``"""
    features: Array
    """``W_fc`` at the end, shape ``(hidden, d)``"""


def documents(setup: Entanglement) -> Documents:
    """Data that meet the assumptions of App. D. W*'s rows are semantic because noise cancels in each pair."""
    k, rng = setup.rank, np.random.default_rng(setup.seed)
    semantic_basis, noise_basis = _rotation(rng, k + 1), _rotation(rng, k + 1 + _SPARE_NOISE)
    output_basis = _rotation(rng, k + 1)
    directions = np.eye(k) + 0.3 * np.roll(np.eye(k), 1, axis=0)  # not orthogonal to each other
    semantic = semantic_basis[:, :k] @ (directions / np.linalg.norm(directions, axis=0))
    noise = setup.once_noise * noise_basis[:, :k]
    once = np.block([[semantic, semantic], [noise, -noise]])
    singular_values = np.linspace(0.5, 0.95, k) / (2 * k)  # below 1 / (2 k)
    generalising = (output_basis[:, :k] * singular_values) @ _rotation(rng, k) @ semantic_basis[:, :k].T
    inside = semantic_basis[:, :k] @ _unit(rng.normal(size=k))
    feature = setup.known * inside + setup.novelty * semantic_basis[:, k]
    memorised = np.concatenate([feature, noise_basis[:, k]])
    target = generalising @ feature + setup.change * output_basis[:, k]  # delta is orthogonal to W*'s columns
    return Documents(once, np.tile(generalising @ semantic, 2), memorised, target, k + 1)


def gradient_flow(data: Documents, repeats: int, gamma: float, seed: int = 0) -> Flow:
    """Train ``W_proj W_fc`` on half the squared error by gradient flow (Runge-Kutta of fourth order) to the end.

    Args:
        data: The documents.
        repeats: Weight of the repeated one.
        gamma: Scale of Definition D.4's initialization: W_fc = sqrt(2 gamma) P, orthonormal columns, and W_proj = 0.
        seed: Seed of P.

    Returns:
        The trajectory; at its end the gradient is below 1e-11.

    Raises:
        MemSinksError: If that takes more than 200,000 steps.
    """
    inputs, targets = _all(data)
    counts = np.array([1.0] * data.once.shape[1] + [float(repeats)])
    gram, cross = (inputs * counts) @ inputs.T, (targets * counts) @ inputs.T
    projection = np.zeros((targets.shape[0], inputs.shape[0]))
    features = math.sqrt(2 * gamma) * _rotation(np.random.default_rng(seed), inputs.shape[0])

    def velocity(projection: Array, features: Array) -> tuple[Array, Array]:
        gradient = projection @ features @ gram - cross
        return -gradient @ features.T, -projection.T @ gradient

    largest = float(np.linalg.norm(least_norm_solution(data), 2))
    step = 0.5 / (np.linalg.norm(gram, 2) * 2 * math.hypot(gamma, 2 * largest))  # stable up to 5 times this
    trajectory = [projection @ features]
    while np.linalg.norm(trajectory[-1] @ gram - cross) > _CONVERGED:
        if len(trajectory) > _MOST_STEPS:
            raise MemSinksError(f"Gradient flow is not at its end after {_MOST_STEPS:,} steps. Raise gamma.")
        projection, features = _runge_kutta(velocity, projection, features, step)
        trajectory.append(projection @ features)
    return Flow(step * np.arange(len(trajectory)), np.array(trajectory), projection, features)


def generalising_solution(data: Documents) -> Array:
    """W*: the least-norm fit of the documents seen once, shape ``(outputs, d)``."""
    return data.once_targets @ np.linalg.pinv(data.once)


def least_norm_solution(data: Documents) -> Array:
    """The least-norm fit of all documents, the repeated one included, by the pseudoinverse; ``(outputs, d)``."""
    inputs, targets = _all(data)
    return targets @ np.linalg.pinv(inputs)


def change_needed(data: Documents) -> Array:
    """delta: what W* lacks on the repeated document, shape ``(outputs,)``."""
    return data.target - generalising_solution(data) @ data.memorised


def new_part(data: Documents) -> Array:
    """q: the repeated document's features less their part in the span of the others', shape ``(d,)``."""
    return data.memorised - data.once @ (np.linalg.pinv(data.once) @ data.memorised)


def limit_of_flow(data: Documents) -> Array:
    """Where gradient flow ends, in closed form: ``W* + delta q^T / |q|^2``, shape ``(outputs, d)``.

    It is the least-norm fit of all documents (Theorem D.5): q is orthogonal to the documents seen once.
    """
    q = new_part(data)
    return generalising_solution(data) + np.outer(change_needed(data), q) / (q @ q)


def time_of_one_mode(weight: float, target: float, gamma: float) -> float:
    """When gradient flow on one document with one unit feature reaches ``weight``, in closed form.

    From dw/dt = 2 (target - w) sqrt(w^2 + gamma^2), which holds because ``W_fc^2 - W_proj^2 = 2 gamma`` throughout.

    Args:
        weight: In [0, target).
        target: Above 0.
        gamma: Scale of the initialization.
    """
    rate = math.hypot(target, gamma)
    now = math.asinh((target * weight + gamma**2) / (gamma * (target - weight)))
    return (now - math.asinh(gamma / target)) / (2 * rate)


def distance_to_disentangled(weights: Array, data: Documents) -> float:
    """Frobenius distance of ``weights`` to the nearest disentangled solution.

    Those are ``W* + c u v^T`` with v in the noise subspace (Definition D.1, whose text asks for that; its formula names
    the other subspace) and no training loss. So ``c u v^T = delta (n + r)^T`` with r orthogonal to all noise features.
    """
    noise = data.memorised[data.semantic :]
    n = np.concatenate([np.zeros(data.semantic), noise / (noise @ noise)])
    used = np.column_stack([data.once[data.semantic :], noise])
    free = np.eye(len(noise)) - used @ np.linalg.pinv(used)
    delta = change_needed(data)
    rest = weights - generalising_solution(data) - np.outer(delta, n)
    r = np.concatenate([np.zeros(data.semantic), free @ (rest.T @ delta)[data.semantic :] / (delta @ delta)])
    return float(np.linalg.norm(rest - np.outer(delta, r)))


def corrected_distance(change: float, new_length: float) -> float:
    """How far gradient flow ends from every disentangled solution: ``|delta| sqrt(1 - 1 / |q|^2)``.

    By Pythagoras, as the limit has the least norm. Zero exactly if ``|q|`` is 1, that is if the repeated document's
    semantic feature is in the span of the others'.

    Args:
        change: ``|delta|``.
        new_length: ``|q|``, at least 1 because noise features have length 1.
    """
    return change * math.sqrt(max(0.0, 1 - 1 / new_length**2))


def largest_new_singular_value(change: float, rank: int) -> float:
    """What Definition D.2 allows the singular value that memorising adds: ``|delta| / (k + 1)``.

    Its solutions differ from W* by ``w v^T`` with ``w v^T s = 0`` for every document s seen once. So ``v . q <= |q|``
    is all there is to reach delta with: they add ``|delta| / |q|`` or more, and there are none for ``|q| < k + 1``.
    """
    return change / (rank + 1)


def run(setup: Entanglement) -> tuple[Documents, Flow]:
    """The documents of a setting and gradient flow on them."""
    data = documents(setup)
    return data, gradient_flow(data, setup.repeats, setup.gamma, setup.seed)


def verdicts(setup: Entanglement | None = None) -> list[Verdict]:
    """Check D.5, D.3, D.2 and what does hold, with a new semantic feature and, the counterexample, without.

    Args:
        setup: The setting; ``novelty`` must be above 0. The counterexample is the same with ``novelty`` 0.
    """
    setup = setup or Entanglement()
    require(setup.novelty > 0, "novelty", setup.novelty, "above 0 here: 0 is the counterexample")
    familiar = replace(setup, novelty=0.0)
    return [
        *check(setup, f"gradient flow, new semantic part {setup.novelty:g}"),
        *check(familiar, "gradient flow, no new semantic part"),
        *check_definition(setup, f"gradient flow, new semantic part {setup.novelty:g}"),
    ]


def check(setup: Entanglement, name: str) -> list[Verdict]:
    """D.5, D.3 and the corrected D.3 in one setting, which the table calls ``name``."""
    data, flow = run(setup)
    end = flow.weights[-1]
    away, distance = float(np.linalg.norm(end - least_norm_solution(data))), distance_to_disentangled(end, data)
    exact = corrected_distance(setup.change, float(np.linalg.norm(new_part(data))))
    return [
        Verdict("D.5", "printed", "ends at the least-norm solution: distance 0", name, away, "=", 0.0),
        Verdict("D.3", "printed", "ends away from every disentangled solution", name, distance, ">", 0.0),
        Verdict("D.3", "corrected", "distance to them is |Δ| √(1 − 1/|q|²)", name, distance, "=", exact),
    ]


def check_definition(setup: Entanglement, name: str) -> list[Verdict]:
    """What memorising adds to W*, against the entangled solution of Definition D.2 that the proof compares with."""
    data, flow = run(setup)
    added = float(np.linalg.norm(flow.weights[-1] - generalising_solution(data), 2))
    allowed = largest_new_singular_value(setup.change, setup.rank)
    exact = setup.change / float(np.linalg.norm(new_part(data)))
    return [
        Verdict("D.2", "printed", "memorising adds a singular value ≤ |Δ|/(k + 1)", name, added, "<=", allowed),
        Verdict("D.2", "corrected", "it adds |Δ|/|q|, the least possible", name, added, "=", exact),
    ]


def _all(data: Documents) -> tuple[Array, Array]:
    """Features and targets of all documents, each once."""
    return np.column_stack([data.once, data.memorised]), np.column_stack([data.once_targets, data.target])


def _runge_kutta(velocity: Velocity, first: Array, second: Array, step: float) -> tuple[Array, Array]:
    a = velocity(first, second)
    b = velocity(first + step / 2 * a[0], second + step / 2 * a[1])
    c = velocity(first + step / 2 * b[0], second + step / 2 * b[1])
    d = velocity(first + step * c[0], second + step * c[1])
    moved = [start + step / 6 * (a[i] + 2 * b[i] + 2 * c[i] + d[i]) for i, start in enumerate((first, second))]
    return moved[0], moved[1]


def _rotation(rng: np.random.Generator, size: int) -> Array:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def _unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)
