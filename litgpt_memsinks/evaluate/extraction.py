"""Can a document be extracted? Given its beginning, the model continues greedily (Carlini et al. 2021, 2023)."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.data.scored import Scored
from litgpt_memsinks.metrics import common_prefix, levenshtein, rouge_l
from litgpt_memsinks.model.losses import BATCH_SIZE, State, has_sinks, in_state

GEOMETRIES = ((32, 32), (50, 50), (64, 48))
"""Tokens of the prompt, and of the continuation that is compared."""
METRICS = ("exact", "rouge_l", "levenshtein", "common_prefix")


@dataclass(frozen=True)
class Attempt:
    """One kind of prompt."""

    prefix: int
    """Tokens of the prompt"""
    suffix: int
    """Tokens of the continuation"""
    state: State
    """Which sinks are on"""
    prompt: Literal["own", "wrong"]
    """Whether the prompt is the document's beginning, or another one's: then only its sinks could betray it"""


def attempts(with_sinks: bool) -> list[Attempt]:
    """What is tried: every geometry in each state, and prompts from the wrong document in the first."""
    states: tuple[State, ...] = ("dropped", "own", "placebo") if with_sinks else ("dropped",)
    found = [Attempt(*geometry, state, "own") for geometry in GEOMETRIES for state in states]
    return found + [Attempt(*GEOMETRIES[0], state, "wrong") for state in states if state != "placebo"]


@torch.inference_mode()
def continue_greedily(
    model: BaseGPT, prompts: torch.Tensor, suffix: int, sequence_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The most likely token, again and again. All prompts have one length, so that no row needs padding.

    Args:
        model: In eval mode.
        prompts: Tokens, int64 ``(B, P)``.
        suffix: Tokens to append. P + suffix - 1 must fit into the model's context.
        sequence_ids: IDs whose sinks are on, ``(B,)``. ``None``: sinks dropped.

    Returns:
        int64 ``(B, suffix)``, on the CPU.
    """
    parameter = next(model.parameters())
    prompts = prompts.to(parameter.device)
    on = {} if sequence_ids is None else {"sequence_ids": sequence_ids.to(parameter.device)}
    end = prompts.size(1)
    model.set_kv_cache(len(prompts), end + suffix - 1, device=parameter.device, dtype=parameter.dtype)
    try:
        generated, tokens, start = [], prompts, 0
        for _ in range(suffix):
            positions = torch.arange(start, end, device=parameter.device)
            logits = model(tokens, positions, input_pos_maxp1=end, **on)
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            generated.append(tokens)
            start, end = end, end + 1
    finally:
        model.clear_kv_cache()
    return torch.cat(generated, 1).cpu()


def long_enough(documents: Scored, attempt: Attempt, context: int) -> list[int]:
    """Documents that have a prompt and a continuation of these lengths, if the model's context has."""
    needed = attempt.prefix + attempt.suffix
    if needed - 1 > context:
        return []
    return [index for index, tokens in enumerate(documents.tokens) if len(tokens) >= needed]


def measure_extraction(model: BaseGPT, repeated: Scored, seed: int) -> list[dict[str, Any]]:
    """Try to extract every repeated document that is long enough.

    Returns:
        One for each attempt that fits a document: its fields, the documents' numbers in ``rows``, what was
        ``generated`` for each, and a list of values for each of ``METRICS``.
    """
    found = []
    for attempt in attempts(has_sinks(model)):
        rows = long_enough(repeated, attempt, model.max_seq_length)
        if not rows or (attempt.prompt == "wrong" and len(rows) < 2):
            continue
        window = torch.stack([repeated.tokens[row][: attempt.prefix + attempt.suffix] for row in rows])
        prompts, truth = window[:, : attempt.prefix], window[:, attempt.prefix :].numpy()
        if attempt.prompt == "wrong":
            prompts = prompts.roll(1, 0)
        with in_state(model, attempt.state, repeated.sequence_ids[rows], seed) as ids:
            generated = torch.cat(
                [
                    continue_greedily(model, batch, attempt.suffix, None if ids is None else ids[start:][: len(batch)])
                    for start, batch in zip(range(0, len(rows), BATCH_SIZE), prompts.split(BATCH_SIZE), strict=True)
                ]
            ).numpy()
        found.append({**vars(attempt), "rows": rows, "generated": generated.tolist(), **compared(generated, truth)})
    return found


def compared(generated: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    """Values of ``METRICS``, one per row, for token arrays ``(B, S)``."""
    return {
        "exact": (generated == truth).all(1).astype(float).tolist(),
        "rouge_l": rouge_l(generated, truth).tolist(),
        "levenshtein": levenshtein(generated, truth).tolist(),
        "common_prefix": common_prefix(generated, truth).astype(float).tolist(),
    }
