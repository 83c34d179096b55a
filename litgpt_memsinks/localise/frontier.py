"""When the highest scored neurons are dropped, what is lost? The repeated documents, or everything."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.data.scored import Scored, pad
from litgpt_memsinks.evaluate.battery import Kept
from litgpt_memsinks.evaluate.extraction import GEOMETRIES, Attempt, continue_greedily, long_enough
from litgpt_memsinks.evaluate.subject import Asked, Subject, key_of
from litgpt_memsinks.localise.neurons import dropped, dropped_number, kept_neurons, suffixes
from litgpt_memsinks.localise.scores import LocaliseArgs, score_neurons, work
from litgpt_memsinks.metrics import document_losses
from litgpt_memsinks.model.losses import BATCH_SIZE, batched, document_nats
from litgpt_memsinks.version import __version__


@dataclass(frozen=True)
class Point:
    """What is left when a share of each layer's neurons is dropped. Losses in nats per token, as `evaluate` has."""

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


@dataclass
class Localised:
    """All that is found of one model.

    Attributes:
        scores: ``(N, L, d_ff)``, float32: a row for each document, or one if pooled.
        points: One for each ratio.
        counts: Targets of each document.
        losses: For each ratio, each repeated document's own loss; NaN without targets.
        validation_losses: For each ratio, the validation loss after each document's own drop; one if pooled.
    """

    scores: torch.Tensor
    points: list[Point]
    counts: list[int]
    losses: list[list[float]]
    validation_losses: list[list[float]]


Drops = list[dict[str, list[Any]]]
"""For each ratio: ``nats`` and ``counts`` of documents, ``validation`` losses, and whether each is ``extracted``."""


def measure(
    model: BaseGPT,
    subject: Subject,
    asked: Asked,
    args: LocaliseArgs,
    ratios: Sequence[float],
    kept: Kept,
    advance: Callable[[float], object] = lambda tokens: None,
) -> Localised:
    """Localise, drop and score.

    Args:
        model: Of ``neurons.load_plain``.
        subject: Where it is from.
        asked: The documents.
        args: The method and its settings.
        ratios: Shares of each layer's neurons to drop.
        kept: What is finished already.
        advance: Called with the work that is done, in tokens (see ``total_work``).
    """
    validation = first(asked.validation, args.validation_limit)
    block = min(args.block_size or model.max_seq_length, model.max_seq_length)
    found, drops = [], []
    for rows in _parts(asked, args):
        batch = suffixes(asked.repeated, rows, args.prefix_length, block)
        about = dict(
            model=subject.fingerprint(), data=asked.fingerprint(), rows=rows, args=asdict(args), block=block,
            package=__version__, device=str(next(model.parameters()).device),
        )  # fmt: skip
        scoring = _later(lambda *given: score_neurons(*given).tolist(), model, batch, args, advance)
        scores = torch.tensor(kept.get(key_of(unit="scores", **about), scoring)[0])
        own = _rows(asked.repeated, rows)
        sweeping = _later(sweep, model, own, validation, scores, ratios, block, args, advance)
        drops.append(kept.get(key_of(unit="drops", ratios=list(ratios), **about), sweeping)[0])
        found.append(scores)
    return _localised(torch.cat(found), drops, ratios)


def _parts(asked: Asked, args: LocaliseArgs) -> list[list[int]]:
    """Documents that are finished, and kept, together."""
    rows = torch.arange(len(asked.repeated.tokens))
    return [part.tolist() for part in rows.split(len(rows) if args.mode == "pooled" else args.documents_at_once)]


def _later(compute: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    return lambda: compute(*given)


def sweep(
    model: BaseGPT,
    documents: Scored,
    validation: Scored,
    scores: torch.Tensor,
    ratios: Sequence[float],
    block_size: int,
    args: LocaliseArgs,
    advance: Callable[[float], object] = lambda tokens: None,
) -> Drops:
    """Drop each share of the neurons, and score the documents, each without its own, and the validation documents.

    Args:
        model: Of ``neurons.load_plain``.
        documents: Repeated documents.
        validation: Validation documents.
        scores: ``(B, L, d_ff)``, or ``(1, L, d_ff)`` for all.
        ratios: Shares to drop.
        block_size: Most targets of a document.
        args: For ``first_layer`` and ``extraction``.
        advance: Called with the tokens that were scored.
    """
    drops = []
    for ratio in ratios:
        keep = kept_neurons(scores, ratio, args.first_layer)
        nats, counts = own_nats(model, documents, keep, block_size)
        advance(_tokens(documents))
        # without a drop all rows are the same
        masks = keep[:1] if not dropped_number(ratio, scores.size(-1)) else keep
        losses = []
        for mask in masks:
            with dropped(model, mask[None]):
                losses.append(_mean(*document_nats(model, validation, block_size)))
            advance(_tokens(validation) * len(keep) / len(masks))
        extracted = own_extracted(model, documents, keep) if args.extraction else []
        drops.append(
            {
                "nats": nats.tolist(),
                "counts": counts.tolist(),
                "validation": losses * (len(keep) // len(losses)),
                "extracted": extracted,
            }
        )
    return drops


@torch.inference_mode()
def own_nats(
    model: BaseGPT, documents: Scored, keep: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``losses.document_nats``, each document with the neurons of its own row of ``keep`` ``(B or 1, L, d_ff)``."""
    device = next(model.parameters()).device
    nats = torch.zeros(len(documents.tokens), dtype=torch.float64)
    counts = torch.zeros(len(documents.tokens), dtype=torch.int64)
    for batch in batched(model, documents, block_size):
        inputs, targets = pad([documents.tokens[row] for row in batch], block_size)
        with dropped(model, keep if len(keep) == 1 else keep[batch]):
            losses = document_losses(model(inputs.to(device)), targets.to(device))
        nats[batch], counts[batch] = losses[0].cpu(), losses[1].cpu()
    return nats, counts


def own_extracted(model: BaseGPT, documents: Scored, keep: torch.Tensor) -> list[bool]:
    """Whether each document that is long enough is continued word for word, without the neurons of its own row."""
    attempt = Attempt(*GEOMETRIES[0], "dropped", "own")
    found: list[bool] = []
    for rows in torch.tensor(long_enough(documents, attempt, model.max_seq_length), dtype=torch.int64).split(
        BATCH_SIZE
    ):
        if not len(rows):
            continue
        window = torch.stack([documents.tokens[row][: attempt.prefix + attempt.suffix] for row in rows.tolist()])
        with dropped(model, keep if len(keep) == 1 else keep[rows]):
            generated = continue_greedily(model, window[:, : attempt.prefix], attempt.suffix)
        found += (generated == window[:, attempt.prefix :]).all(1).tolist()
    return found


def _localised(scores: torch.Tensor, drops: list[Drops], ratios: Sequence[float]) -> Localised:
    """Put the parts together."""

    def joined(name: str) -> list[list[Any]]:
        return [[value for part in drops for value in part[index][name]] for index in range(len(ratios))]

    nats, counts, validation, extracted = map(joined, ("nats", "counts", "validation", "extracted"))
    points = [
        Point(
            ratio=ratio,
            repeated_loss=math.fsum(nats[index]) / sum(counts[index]),
            validation_loss=math.fsum(validation[index]) / len(validation[index]),
            n=len(nats[index]),
            extraction=sum(extracted[index]) / len(extracted[index]) if extracted[index] else None,
        )
        for index, ratio in enumerate(ratios)
    ]
    losses = [
        [a / b if b else math.nan for a, b in zip(one, count, strict=True)]
        for one, count in zip(nats, counts, strict=True)
    ]
    return Localised(scores, points, counts[0], losses, validation)


def total_work(model: BaseGPT, asked: Asked, args: LocaliseArgs, ratios: Sequence[float]) -> float:
    """Tokens that will pass through the model, a backward pass as two forward ones."""
    block = min(args.block_size or model.max_seq_length, model.max_seq_length)
    batches = [suffixes(asked.repeated, rows, args.prefix_length, block) for rows in _parts(asked, args)]
    times = 1 if args.mode == "pooled" else len(asked.repeated.tokens)
    each = _tokens(asked.repeated) + times * _tokens(first(asked.validation, args.validation_limit))
    return sum(work(model, batch, args) for batch in batches) + len(ratios) * each


def first(documents: Scored, limit: int | None) -> Scored:
    """The first documents."""
    return _rows(documents, list(range(min(limit or len(documents.tokens), len(documents.tokens)))))


def _rows(documents: Scored, rows: list[int]) -> Scored:
    return replace(
        documents,
        tokens=[documents.tokens[row] for row in rows],
        sequence_ids=documents.sequence_ids[rows],
        digests=[documents.digests[row] for row in rows],
        sources=[documents.sources[row] for row in rows],
    )


def _tokens(documents: Scored) -> int:
    return sum(map(len, documents.tokens))


def _mean(nats: torch.Tensor, counts: torch.Tensor) -> float:
    return float(nats.sum() / counts.sum())
