"""Losses of documents, each alone, from its first token, over one block, in every state of the sinks.

States of a model with sinks (Sec. 5) and what they are for:

    dropped       no sinks: the model that is released
    own           the document's own sinks on: what training has memorised
    placebo       the sinks of another document on, which must not help
    shuffled      the same with all IDs dealt out anew
    random_drop   as many neurons dropped as there are sinks, but drawn from all: must not do what dropping sinks does
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from litgpt.model import GPT as BaseGPT
from rich.progress import track

from litgpt_memsinks.data.scored import Scored, pad
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.metrics import document_losses
from litgpt_memsinks.model.model import GPT

State = Literal["dropped", "own", "placebo", "shuffled", "random_drop"]
STATES: tuple[State, ...] = ("dropped", "own", "placebo", "shuffled", "random_drop")
BATCH_SIZE, _LOGITS = 32, 1 << 28  # documents at a time, and logits: 1 GB


@dataclass
class Loss:
    """A loss with the documents behind it."""

    loss: float
    """Mean over all targets, nats per token"""
    targets: int
    """Number of targets"""
    documents: int
    """Number of documents"""
    by_document: dict[str, float]
    """Sequence ID to the document's own mean, nats per token"""


def score(
    model: BaseGPT,
    documents: Scored,
    block_size: int,
    sequence_ids: torch.Tensor | None = None,
    batch_size: int = BATCH_SIZE,
    description: str = "Scoring",
) -> Loss:
    """Loss of a model on documents, with a progress bar.

    Args:
        model: In eval mode; a model with sinks if ``sequence_ids`` are given.
        documents: What to score.
        block_size: Most targets of a document.
        sequence_ids: IDs whose sinks are on, one per document. ``None``: sinks dropped.
        batch_size: Documents at a time.
        description: Shown beside the progress bar.

    Raises:
        MemSinksError: If no document has two tokens.
    """
    nats, counts = document_nats(model, documents, block_size, sequence_ids, batch_size, description)
    ids = documents.sequence_ids.tolist()
    means = (nats / counts.clamp(min=1)).tolist()
    return Loss(
        loss=float(nats.sum() / counts.sum()),
        targets=int(counts.sum()),
        documents=len(ids),
        by_document={str(ids[index]): means[index] for index in range(len(ids)) if counts[index]},
    )


@torch.inference_mode()
def document_nats(
    model: BaseGPT,
    documents: Scored,
    block_size: int,
    sequence_ids: torch.Tensor | None = None,
    batch_size: int = BATCH_SIZE,
    description: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of each document's losses, and the number of its targets.

    Args:
        model: See ``score``.
        documents: See ``score``.
        block_size: See ``score``.
        sequence_ids: See ``score``.
        batch_size: See ``score``.
        description: Shown beside a progress bar; none without.

    Returns:
        Nats, float64 ``(N,)``, and counts, int64 ``(N,)``, on the CPU.

    Raises:
        MemSinksError: If no document has two tokens.
    """
    device = next(model.parameters()).device
    nats = torch.zeros(len(documents.tokens), dtype=torch.float64)
    counts = torch.zeros(len(documents.tokens), dtype=torch.int64)
    batches = list(batched(model, documents, block_size, batch_size))
    for batch in track(batches, description, transient=True, disable=not description):
        inputs, targets = pad([documents.tokens[index] for index in batch], block_size)
        on = {} if sequence_ids is None else {"sequence_ids": sequence_ids[batch].to(device)}
        losses = document_losses(model(inputs.to(device), **on), targets.to(device))
        nats[batch], counts[batch] = losses[0].cpu(), losses[1].cpu()
    if not counts.sum():
        raise MemSinksError(
            "No document has two tokens or more, so there is nothing to predict. Give longer documents."
        )
    return nats, counts


def batched(model: BaseGPT, documents: Scored, block_size: int, batch_size: int = BATCH_SIZE) -> Iterator[list[int]]:
    """Numbers of documents of like length together, so that little is computed on padding and logits fit into 1 GB."""
    order = sorted(range(len(documents.tokens)), key=lambda index: len(documents.tokens[index]))
    vocabulary = model.config.padded_vocab_size
    assert vocabulary is not None  # set by Config.__post_init__
    batch: list[int] = []
    for index in order:
        length = max(min(len(documents.tokens[index]) - 1, block_size), 1)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * length * vocabulary > _LOGITS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def placebo_ids(sequence_ids: torch.Tensor) -> torch.Tensor:
    """Give each document the ID of another one: its predecessor's. A single document gets one that nobody has."""
    if len(sequence_ids) == 1:
        return sequence_ids ^ 1 << 16
    return sequence_ids.roll(1)


def shuffled_ids(sequence_ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Deal the IDs out anew, so that no document keeps its own: one random cycle through all of them."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(sequence_ids)))
    dealt = sequence_ids.clone()
    dealt[order] = placebo_ids(sequence_ids[order])
    return dealt


def has_sinks(model: BaseGPT) -> bool:
    """Whether a model has sinks that could be on."""
    return isinstance(model, GPT) and bool(model.config.n_sink)


def has_own_sinks(model: BaseGPT) -> bool:
    """Whether each document has sinks of its own. Under gradient masking all share them: a placebo is the same."""
    return has_sinks(model) and model.config.sink_method == "memsinks"


@contextmanager
def in_state(model: BaseGPT, state: State, sequence_ids: torch.Tensor, seed: int) -> Iterator[torch.Tensor | None]:
    """Put a model into a state, and yield the IDs to hand it: ``None`` for no sinks.

    Args:
        model: With sinks, unless the state is ``dropped``.
        state: See the head of this file.
        sequence_ids: The documents' own IDs, int64 ``(N,)``.
        seed: Of ``shuffled`` and ``random_drop``.
    """
    if state == "random_drop":
        with _without_random_neurons(model, seed):
            yield sequence_ids
        return
    ids: dict[State, Callable[[], torch.Tensor | None]] = {
        "dropped": lambda: None,
        "own": lambda: sequence_ids,
        "placebo": lambda: placebo_ids(sequence_ids),
        "shuffled": lambda: shuffled_ids(sequence_ids, seed),
    }
    yield ids[state]()


@contextmanager
def _without_random_neurons(model: BaseGPT, seed: int) -> Iterator[None]:
    """Zero ``n_sink`` randomly chosen neurons of each MLP, shared ones and sinks alike."""
    assert isinstance(model, GPT)
    n_sink, width = model.config.n_sink, model.config.intermediate_size
    assert width is not None  # set by Config.__post_init__
    rng = np.random.default_rng(seed)
    hooks = []
    for block in model.transformer.h:
        keep = torch.ones(width, dtype=torch.bool)
        keep[torch.from_numpy(rng.permutation(width)[:n_sink])] = False
        hooks.append(block.mlp.proj.register_forward_pre_hook(_zeroing(keep)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeroing(keep: torch.Tensor) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.where(keep.to(arguments[0].device), arguments[0], 0.0), *arguments[1:])

    return hook


def measure_losses(
    model: BaseGPT, repeated: Scored, validation: Scored, block_size: int, seed: int
) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Losses of the repeated documents in every state, and of the validation documents in two.

    Under gradient masking the validation documents have the state ``own``, too: all neurons on (Fig. 3, "Keepall").

    Returns:
        Split, state, and the documents' ``nats`` and ``counts``. Models without sinks have the state ``dropped`` only.
    """
    with_sinks = has_sinks(model)
    whole: tuple[State, ...] = () if has_own_sinks(model) else ("own",)
    wanted: list[tuple[str, Scored, tuple[State, ...]]] = [
        ("repeated", repeated, STATES if with_sinks else ("dropped",)),
        ("validation", validation, ("dropped", *whole, "random_drop") if with_sinks else ("dropped",)),
    ]
    found: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for split, documents, states in wanted:
        found[split] = {}
        for state in states:
            with in_state(model, state, documents.sequence_ids, seed) as ids:
                nats, counts = document_nats(model, documents, block_size, ids)
            found[split][state] = {"nats": nats.tolist(), "counts": counts.tolist()}
    return found
