"""Was the memory removed, or only hidden? Three attempts to bring it back, on the model with its sinks dropped.

Relearning: fine-tune on a few repeated documents and look at the *other* ones. If these come back faster than in a
model that never saw them, they were hidden. Calibration: train the output bias only, which undoes a mere shift of token
frequencies (superficial forgetting). Quantisation: round the weights to 8 bits, which can bring back what a small
change of the weights had suppressed (Zhang et al. 2025).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.data.scored import Scored, pad
from litgpt_memsinks.metrics import IGNORED, token_losses
from litgpt_memsinks.model.losses import document_nats

LEARNING_RATE, ROWS, EVERY = 5e-5, 16, 5  # AdamW's; documents in a step at most; steps between two measurements
MEASURED = 64
"""Documents of each kind that relearning and calibration look at, at most: they cost many passes over each."""
_BIAS_STEPS, _BIAS_TARGETS, _BIAS_RATE = 100, 512, 0.01


def first(documents: Scored, start: int, stop: int) -> Scored:
    """Some of the documents, by their numbers."""
    return Scored(documents.tokens[start:stop], documents.sequence_ids[start:stop])


def trainable_copy(model: BaseGPT) -> BaseGPT:
    """A float32 copy to train, in eval mode: sinks stay dropped. Tied embeddings are one parameter again.

    In bfloat16 steps this small would be lost to rounding.
    """
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    trained = copy.deepcopy(model).float()
    if tied:
        trained.lm_head.weight = trained.transformer.wte.weight
    return trained.requires_grad_(True).eval()


def measure_relearning(
    model: BaseGPT, repeated: Scored, validation: Scored, block_size: int, numbers: Sequence[int], steps: int
) -> dict[str, Any]:
    """Fine-tune on the first n repeated documents, and score others and validation documents on the way.

    AdamW, learning rate 5e-5, no weight decay; each step takes the next 16 documents, all if there are fewer. The other
    documents are the same for every n: those behind the first ``max(numbers)``, or half of the repeated documents if
    that leaves fewer.

    Args:
        model: In eval mode. Not changed.
        repeated: All repeated documents.
        validation: Validation documents.
        block_size: Most targets of a document.
        numbers: How many to relearn from, one run each; more than half of the documents become half.
        steps: Optimizer steps of a run.

    Returns:
        ``steps`` at which was measured, and ``runs`` with ``n``, and ``other`` and ``validation``: nats per token.
    """
    half = len(repeated.tokens) // 2
    numbers = sorted({min(number, half) for number in numbers if half})
    measured = sorted({*range(0, steps + 1, EVERY), steps})
    if not numbers:
        return {"steps": measured, "runs": []}
    others = first(repeated, numbers[-1], numbers[-1] + MEASURED)
    held_out = first(validation, 0, MEASURED)
    runs = [_relearn(model, first(repeated, 0, n), others, held_out, block_size, measured) for n in numbers]
    return {"steps": measured, "runs": runs}


def _relearn(
    model: BaseGPT, taught: Scored, others: Scored, held_out: Scored, block_size: int, measured: list[int]
) -> dict[str, Any]:
    trained = trainable_copy(model)
    device = next(trained.parameters()).device
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    run: dict[str, Any] = {"n": len(taught.tokens), "other": [], "validation": []}
    for step in range(measured[-1] + 1):
        if step in measured:
            run["other"].append(_mean(trained, others, block_size))
            run["validation"].append(_mean(trained, held_out, block_size))
        rows = [taught.tokens[(step * ROWS + row) % len(taught.tokens)] for row in range(min(ROWS, len(taught.tokens)))]
        inputs, targets = (part.to(device) for part in pad(rows, block_size))
        loss = token_losses(trained(inputs), targets).sum() / (targets != IGNORED).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def _mean(model: BaseGPT, documents: Scored, block_size: int) -> float:
    nats, counts = document_nats(model, documents, block_size)
    return float(nats.sum() / counts.sum())


# ----------------------------------------------------------------------------------------------------------- calibrated


def measure_calibrated(model: BaseGPT, repeated: Scored, validation: Scored, block_size: int) -> dict[str, Any]:
    """Losses with an output bias trained on the other half of the same kind of documents.

    Returns:
        Split to ``nats`` and ``counts`` of the documents.
    """
    found = {}
    for split, documents in (("repeated", repeated), ("validation", validation)):
        known = first(documents, 0, MEASURED)
        halves = [first(known, start, stop) for start, stop in _halves(len(known.tokens))]
        nats, counts = [], []
        for taught, scored in zip(reversed(halves), halves, strict=True):
            with _output_bias(model, train_bias(model, taught, block_size)):
                part = document_nats(model, scored, block_size)
            nats += part[0].tolist()
            counts += part[1].tolist()
        found[split] = {"nats": nats, "counts": counts}
    return found


def _halves(number: int) -> list[tuple[int, int]]:
    """One document alone is both halves."""
    return [(0, number // 2), (number // 2, number)] if number > 1 else [(0, number)]


def train_bias(model: BaseGPT, documents: Scored, block_size: int) -> torch.Tensor:
    """A bias of the output layer that lowers the loss on documents, ``(padded_vocab_size,)``; all else stays.

    Adam, learning rate 0.01, 100 steps over 512 targets each.
    """
    hidden, targets = _hidden(model, documents, block_size)
    bias = torch.zeros(model.lm_head.out_features, device=hidden.device, requires_grad=True)
    optimizer = torch.optim.Adam([bias], lr=_BIAS_RATE)
    for step in range(_BIAS_STEPS):
        rows = torch.arange(step * _BIAS_TARGETS, (step + 1) * _BIAS_TARGETS) % len(targets)
        rows = rows[: len(targets)]
        with torch.no_grad():
            logits = model.lm_head(hidden[rows]).float()
        loss = F.cross_entropy(logits + bias, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bias.detach()


@torch.no_grad()
def _hidden(model: BaseGPT, documents: Scored, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output layer is given at every target ``(n_targets, n_embd)``, and the targets."""
    device = next(model.parameters()).device
    seen: list[torch.Tensor] = []
    wanted = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        for document in documents.tokens:
            if len(document) < 2:
                continue
            inputs, targets = pad([document], block_size)
            model(inputs.to(device))
            wanted.append(targets[0].to(device))
    finally:
        hook.remove()
    return torch.cat([hidden[0] for hidden in seen]), torch.cat(wanted)


@contextmanager
def _output_bias(model: BaseGPT, bias: torch.Tensor) -> Iterator[None]:
    hook = model.lm_head.register_forward_hook(lambda module, arguments, logits: logits + bias.to(logits.dtype))
    try:
        yield
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------------------ quantised


def measure_quantised(model: BaseGPT, repeated: Scored, validation: Scored, block_size: int) -> dict[str, Any]:
    """Losses with every linear layer rounded to 8 bits and back.

    Returns:
        Split to ``nats`` and ``counts`` of the documents.
    """
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(int8_round_trip(module.weight.data), requires_grad=False)
    found = {}
    for split, documents in (("repeated", repeated), ("validation", validation)):
        nats, counts = document_nats(rounded, documents, block_size)
        found[split] = {"nats": nats.tolist(), "counts": counts.tolist()}
    return found


def int8_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Round to 255 levels, as many on both sides of 0, of each row's largest magnitude; same shape and dtype."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((weight.float() / scale).round().clamp(-127, 127) * scale).to(weight.dtype)
