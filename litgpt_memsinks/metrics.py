"""Equations of the measurements, one pure function each. Losses are in nats per token.

What is about one document takes its tokens; what is about several takes a row or a value for each, so that every
aggregate is the mean of values that can be looked at. Docs: docs/measuring.md.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

IGNORED = -100
"""Target of positions that are not scored, such as padding."""


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, float32 ``(B, T)``; 0 where nothing is scored.

    Args:
        logits: ``(B, T, vocabulary)``.
        targets: Token to predict at each position, ``(B, T)``; ``IGNORED`` is not scored.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view_as(targets)


def document_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of each row's negative log-likelihoods, and the number of its targets.

    Args:
        logits: ``(B, T, vocabulary)``.
        targets: Token to predict at each position, ``(B, T)``; ``IGNORED`` is not scored.

    Returns:
        Nats, float64 ``(B,)``, and counts, int64 ``(B,)``. A row without targets has both 0.
    """
    return token_losses(logits, targets).double().sum(1), (targets != IGNORED).sum(1)


def gap_closed(repeated: float, repeated_standard: float, repeated_left_out: float) -> float:
    """How far dropping the sinks brings the loss on repeated documents to that of a model that never saw them.

    (L_rep - L_rep,standard) / (L_rep,left out - L_rep,standard): 0 if nothing is forgotten, 1 if as much as possible.

    Args:
        repeated: Loss of the evaluated model, sinks dropped, on the repeated documents.
        repeated_standard: Loss of a standard model of the same stream.
        repeated_left_out: Loss of a standard model trained without the repeated documents.

    Returns:
        A fraction; above 1 if the model is worse on them than one that never saw them. NaN if the references agree.
    """
    gap = repeated_left_out - repeated_standard
    return (repeated - repeated_standard) / gap if gap else float("nan")


def memorisation_gap(validation: float, repeated: float) -> float:
    """L_val - L_rep, in one domain: how much better a model knows the repeated documents than others like them."""
    return validation - repeated


def memorisation_gap_closed(gap: float, gap_standard: float) -> float:
    """1 - gap(method, dropped) / gap(standard), the paper's Fig. 6. NaN if standard training leaves no gap."""
    return 1 - gap / gap_standard if gap_standard else math.nan


def sequence_forgetting(repeated_after: float, repeated_before: float) -> float:
    """L_rep(after) - L_rep(before): higher is better (Sec. 3)."""
    return repeated_after - repeated_before


def degradation(validation_before: float, validation_after: float) -> float:
    """L_val(before) - L_val(after): higher is better, negative if the model has become worse (Sec. 3)."""
    return validation_before - validation_after


def relative_change(value: float, reference: float) -> float:
    """(value - reference) / reference."""
    return (value - reference) / reference


# -------------------------------------------------------------------------------------------------- predicted or not


def exact_match(correct: npt.NDArray[np.bool_]) -> float:
    """Share of a document's targets that are the most likely token under the true prefix; NaN without targets.

    Args:
        correct: Whether each target is predicted, ``(T,)``.
    """
    return float(correct.mean()) if len(correct) else math.nan


def extraction_strength(correct: npt.NDArray[np.bool_]) -> float:
    """1 - k / n, with k the shortest prefix after which all n targets are predicted (Carlini et al. 2021).

    0 if the last target is not predicted, 1 if all are; NaN without targets.

    Args:
        correct: Whether each target is the most likely token under the true prefix, ``(T,)``.
    """
    if not len(correct):
        return math.nan
    wrong = np.flatnonzero(~correct)
    return 1 - (int(wrong[-1]) + 1 if len(wrong) else 0) / len(correct)


# ------------------------------------------------------------------------------------------------- continued or not


def common_prefix(generated: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Tokens from the start that agree, ``(B,)``.

    Args:
        generated: ``(B, S)``.
        truth: Same shape.
    """
    return np.cumprod(generated == truth, axis=1).sum(1)


def common_subsequence(generated: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Length of the longest common subsequence of each pair, ``(B,)``, for ``(B, S)`` and ``(B, R)``."""
    row = np.zeros((truth.shape[1] + 1, len(truth)), dtype=np.int64)
    for token in generated.T:
        above, row = row, np.zeros_like(row)
        for place, other in enumerate(truth.T, 1):
            row[place] = np.where(token == other, above[place - 1] + 1, np.maximum(above[place], row[place - 1]))
    return row[-1]


def rouge_l(generated: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """ROUGE-L (Lin 2004) over tokens: F1 of the longest common subsequence, ``(B,)`` in [0, 1]; 0 without a match."""
    lengths = generated.shape[1] + truth.shape[1]
    return 2 * common_subsequence(generated, truth) / lengths if lengths else np.zeros(len(truth))


def levenshtein(generated: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Token edits that turn one into the other, by the length of the longer, ``(B,)``: 0 is equal, 1 nothing in common.

    Args:
        generated: ``(B, S)``.
        truth: ``(B, R)``.
    """
    row = np.tile(np.arange(truth.shape[1] + 1)[:, None], len(truth))
    for number, token in enumerate(generated.T, 1):
        above, row = row, np.full_like(row, number)
        for place, other in enumerate(truth.T, 1):
            changed = above[place - 1] + (token != other)
            row[place] = np.minimum(changed, 1 + np.minimum(above[place], row[place - 1]))
    return row[-1] / max(generated.shape[1], truth.shape[1], 1)


# ------------------------------------------------------------------------------------------------------ seen or not


def lowest_mean(values: npt.NDArray[np.float64], share: float) -> float:
    """Mean of the lowest ``share`` of a document's values, one at least; NaN without values.

    Of log-likelihoods this is Min-K% (Shi et al. 2024), of standardised ones Min-K%++ (Zhang et al. 2025).

    Args:
        values: One per target, ``(T,)``.
        share: In (0, 1].
    """
    if not len(values):
        return math.nan
    return float(np.sort(values)[: max(1, int(share * len(values)))].mean())


def standardised(
    log_likelihoods: npt.NDArray[np.float64], means: npt.NDArray[np.float64], deviations: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Log-likelihood of each target against its distribution under the model's own prediction (Min-K%++, eq. 3)."""
    return (log_likelihoods - means) / np.maximum(deviations, 1e-6)


def auc(members: npt.NDArray[np.float64], non_members: npt.NDArray[np.float64]) -> float:
    """Area under the ROC curve: chance that a member's score is higher than a non-member's, ties by half.

    0.5 is a guess; near 0 tells them apart as well as near 1 does. NaN without one of the two.
    """
    m, n = len(members), len(non_members)
    if not m or not n:
        return math.nan
    _, places, counts = np.unique(np.concatenate((members, non_members)), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal scores
    return float((ranks[places[:m]].sum() - m * (m + 1) / 2) / (m * n))


def roc(
    members: npt.NDArray[np.float64], non_members: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """False and true positive rates, from no document called a member to all; both ``(thresholds + 1,)``."""
    scores = np.unique(np.concatenate((members, non_members)))[::-1]
    rates = [
        np.concatenate(([0.0], 1 - np.searchsorted(np.sort(group), scores, side="left") / max(len(group), 1)))
        for group in (non_members, members)
    ]
    return rates[0], rates[1]


def tpr_at_fpr(members: npt.NDArray[np.float64], non_members: npt.NDArray[np.float64], fpr: float) -> float:
    """Highest share of members found while at most ``fpr`` of the non-members are called members; NaN without any."""
    if not len(members) or not len(non_members):
        return math.nan
    false, true = roc(members, non_members)
    return float(true[false <= fpr].max())
