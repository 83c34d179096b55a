"""Which neurons of a trained model hold its repeated documents? Score them after the fact, drop them, look what is lost.

Post-hoc localisation, the paper's baseline (Sec. 3, App. C; Chang et al. 2024): docs/localisation.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt_memsinks.subject import Subject

Method = Literal["hard_concrete", "integrated_gradients", "activation", "zero_out", "random"]
Mode = Literal["per_sequence", "pooled"]


@dataclass(frozen=True)
class Point:
    """What is left when a share of each layer's neurons is dropped. Losses in nats per token, as `evaluate` has them."""

    ratio: float
    """Share of each layer's neurons that is dropped"""
    repeated_loss: float
    """Mean over all targets of the repeated documents; each with its own neurons dropped if scored per sequence"""
    validation_loss: float
    """The same of the validation documents; the mean over the repeated documents' own drops if scored per sequence"""
    n: int
    """Repeated documents"""
    extraction: float | None = None
    """Share of them that is continued word for word, if it was asked for and one is long enough"""


def frontier(
    checkpoint: Path | Subject,
    data_path: Path,
    method: Method,
    mode: Mode,
    ratios: Sequence[float],
    limit: int | None = None,
    seed: int = 0,
) -> list[Point]:
    """Localise, drop and score: forgetting against degradation.

    Args:
        checkpoint: A LitGPT checkpoint without sinks.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        method: How neurons are scored.
        mode: ``per_sequence``: localise, drop, score the document itself, average. ``pooled``: once for all documents.
        ratios: Shares of each layer's neurons to drop.
        limit: Most documents of each kind, the first ones.
        seed: Of the sampled masks and the random scores.

    Returns:
        A point for each ratio, in their order.

    Raises:
        MemSinksError: If the model has sinks or experts, or for settings out of range.
    """
    raise NotImplementedError
