"""Can one tell that a document was trained on? Scores of each document, for membership inference.

Members are the repeated documents, non-members held-out documents of the same kind: the validation documents. Every
score is higher for what looks like a member; whether that can tell them apart is read in both directions.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.data.scored import Scored, pad
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.metrics import (
    IGNORED,
    auc,
    exact_match,
    extraction_strength,
    lowest_mean,
    roc,
    standardised,
    tpr_at_fpr,
)
from litgpt_memsinks.model.losses import State, batched, has_sinks, in_state

K = 0.2
"""Share of a document's targets that Min-K% and Min-K%++ look at, their authors' usual one."""
TPR_AT = (0.001, 0.01)
ATTACKS = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus")
_ROC_POINTS = 200

Statistics = dict[str, list[float]]
"""Name to one value per document: nats, counts, exact_match, extraction_strength, min_k, min_k_plus_plus."""


@torch.inference_mode()
def token_statistics(
    model: BaseGPT, documents: Scored, block_size: int, sequence_ids: torch.Tensor | None
) -> Statistics:
    """What one forward pass says of each document.

    Args:
        model: In eval mode.
        documents: Those to look at.
        block_size: Most targets of a document.
        sequence_ids: IDs whose sinks are on. ``None``: sinks dropped.
    """
    device = next(model.parameters()).device
    rows: list[dict[str, float]] = [{} for _ in documents.tokens]
    for batch in batched(model, documents, block_size):
        inputs, targets = pad([documents.tokens[index] for index in batch], block_size)
        on = {} if sequence_ids is None else {"sequence_ids": sequence_ids[batch].to(device)}
        logits = model(inputs.to(device), **on)
        for index, one, target in zip(batch, logits, targets, strict=True):  # a row at a time: each copies the logits
            scored = target != IGNORED
            rows[index] = _statistics(one[scored.to(device)].float(), target[scored].to(device))
    return {name: [row[name] for row in rows] for name in rows[0]}


def _statistics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Of one document: logits ``(T, vocabulary)``, targets ``(T,)``."""
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    means = (probabilities * log_probabilities).sum(-1)
    deviations = ((probabilities * log_probabilities.square()).sum(-1) - means.square()).clamp(min=0).sqrt()
    chosen = log_probabilities.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
    correct = (logits.argmax(-1) == targets).cpu().numpy()
    relative = standardised(chosen, means.double().cpu().numpy(), deviations.double().cpu().numpy())
    return {
        "nats": float(-chosen.sum()),
        "counts": len(chosen),
        "exact_match": exact_match(correct),
        "extraction_strength": extraction_strength(correct),
        "min_k": lowest_mean(chosen, K),
        "min_k_plus_plus": lowest_mean(relative, K),
    }


def measure_tokens(
    model: BaseGPT, repeated: Scored, validation: Scored, block_size: int, seed: int
) -> dict[str, dict[str, Statistics]]:
    """Statistics of both kinds of documents, sinks dropped and, where there are any, with their own on.

    Returns:
        Split, state, name of the statistic.
    """
    states: tuple[State, ...] = ("dropped", "own") if has_sinks(model) else ("dropped",)
    found: dict[str, dict[str, Statistics]] = {}
    for split, documents in (("repeated", repeated), ("validation", validation)):
        found[split] = {}
        for state in states:
            with in_state(model, state, documents.sequence_ids, seed) as ids:
                found[split][state] = token_statistics(model, documents, block_size, ids)
    return found


def compressed_size(text: str) -> int:
    """Bytes of a text under zlib, the attack's measure of how surprising it is without any model."""
    return len(zlib.compress(text.encode()))


Scores = npt.NDArray[np.float64]


def scores(
    statistics: Mapping[str, list[float]], zlib_bytes: list[int], reference: Mapping[str, list[float]] | None
) -> dict[str, Scores]:
    """Attack to one score per document, higher for members; documents without targets are NaN.

    Args:
        statistics: See ``token_statistics``.
        zlib_bytes: ``compressed_size`` of each document.
        reference: ``nats`` and ``counts`` under a model that never saw the repeated documents; ``None`` if there is
            none, and then no reference attack.
    """
    nats, counts = np.array(statistics["nats"]), np.array(statistics["counts"], dtype=float)
    counts[counts == 0] = math.nan
    found = {
        "loss": -nats / counts,
        "zlib": -nats / np.array(zlib_bytes) + 0 * counts,
        "min_k": np.array(statistics["min_k"]),
        "min_k_plus_plus": np.array(statistics["min_k_plus_plus"]),
    }
    if reference is not None:
        expected = np.array(reference["counts"], dtype=float)
        expected[expected == 0] = math.nan
        found["reference"] = np.array(reference["nats"]) / expected - nats / counts
    return {attack: found[attack] for attack in ATTACKS if attack in found}


def attack_row(attack: str, state: str, members: Scores, non_members: Scores, boot: Bootstrap) -> dict[str, Any]:
    """How well one attack tells members from non-members, as the result file has it."""
    members, non_members = members[~np.isnan(members)], non_members[~np.isnan(non_members)]
    sizes = (len(members), len(non_members))

    def value(metric: Callable[[Scores, Scores], float]) -> dict[str, Any]:
        return boot.value(lambda seen, unseen: metric(members[seen], non_members[unseen]), sizes)

    false, true = roc(members, non_members)
    shown = np.unique(np.linspace(0, len(false) - 1, _ROC_POINTS).round().astype(int))
    return {
        "attack": attack,
        "state": state,
        "members": sizes[0],
        "non_members": sizes[1],
        "auc": value(auc),
        "tpr": {f"{level:g}": value(lambda a, b, level=level: tpr_at_fpr(a, b, level)) for level in TPR_AT},  # type: ignore[misc]
        "roc": {"fpr": false[shown].tolist(), "tpr": true[shown].tolist()},
    }
