"""Equations of the measurements, one pure function each. Losses are in nats per token."""

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


def relative_change(value: float, reference: float) -> float:
    """(value - reference) / reference."""
    return (value - reference) / reference
