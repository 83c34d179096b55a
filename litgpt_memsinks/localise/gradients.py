"""By how much does each neuron raise the next token's probability? Integrated gradients (Sundararajan et al. 2017).

For a layer and a position i of the suffix, the activations a of that position alone are scaled from 0 to what they are,
under the true tokens up to i: ``IG = a * mean over k of dp(next) / d(alpha_k a)``. The sum over neurons is then what
the layer's MLP adds at this position to the probability: p(a) - p(0).

Earlier positions do not depend on a later one. So they are computed once, as keys and values in LitGPT's own cache, and
each scaled activation costs one token, not the whole prefix.
"""

from collections.abc import Callable

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.localise.neurons import Suffixes, changed, shape_of

Cache = list[tuple[torch.Tensor, torch.Tensor]]


def midpoints(steps: int) -> torch.Tensor:
    """(k + 1/2) / steps, k = 0 ... steps - 1: the midpoint rule. float32 ``(steps,)``."""
    return (torch.arange(steps) + 0.5) / steps


def attribution(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """``a`` times the mean gradient: ``(R, d_ff)`` and ``(steps, R, d_ff)`` to ``(R, d_ff)``."""
    return activations * gradients.mean(0)


def integrated_gradients(
    model: BaseGPT, documents: Suffixes, steps: int = 16, on_step: Callable[[int], object] = lambda tokens: None
) -> torch.Tensor:
    """Mean attribution over the suffix of each document.

    Args:
        model: Frozen.
        documents: The batch.
        steps: Points of the integral.
        on_step: Called with the number of targets that one layer is done with.

    Returns:
        float32 ``(B, L, d_ff)`` on the CPU.

    Raises:
        MemSinksError: If a document is longer than a sliding window of the model, whose cache forgets.
    """
    _check_window(model, documents)
    layers, width = shape_of(model)
    total = torch.zeros(len(documents), layers, width)
    targets, scored = documents.targets, documents.scored
    try:
        hidden, cache = _prefilled(model, documents.inputs)
        for position in scored.any(0).nonzero().flatten().tolist():
            rows = scored[:, position].nonzero().flatten()
            for layer in range(layers):
                ends = (documents.inputs[rows, position], targets[rows, position])
                total[rows, layer] += _at(
                    model, hidden[layer][rows, position], cache, rows, position, layer, ends, steps
                )
                on_step(len(rows))
    finally:
        model.clear_kv_cache()
    return total / scored.sum(1).clamp(min=1)[:, None, None]


def _at(
    model: BaseGPT,
    activations: torch.Tensor,
    cache: Cache,
    rows: torch.Tensor,
    position: int,
    layer: int,
    ends: tuple[torch.Tensor, torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Attribution of one layer at one position of some documents, ``(R, d_ff)`` on the CPU.

    ``activations`` ``(R, d_ff)`` are those at the position, ``ends`` the tokens there and the true next ones, ``(R,)``.
    """
    device = activations.device
    scaled = (midpoints(steps).to(activations)[:, None, None] * activations).requires_grad_()
    _refill(model, cache, rows.to(device), position, steps)

    def replaced(at: int, hidden: torch.Tensor) -> torch.Tensor:
        return scaled.flatten(0, 1).unsqueeze(1) if at == layer else hidden

    tokens, following = (end.to(device).repeat(steps).unsqueeze(1) for end in ends)
    with changed(model, replaced):
        logits = model(tokens, torch.tensor([position], device=device), input_pos_maxp1=position + 1)
    likely = logits[:, -1].float().softmax(-1).gather(1, following)
    (gradients,) = torch.autograd.grad(likely.sum(), scaled)
    return attribution(activations, gradients).float().cpu()


@torch.no_grad()
def _prefilled(model: BaseGPT, inputs: torch.Tensor) -> tuple[list[torch.Tensor], Cache]:
    """Hidden activations of each layer ``(B, T, d_ff)``, and keys and values of every position."""
    parameter = next(model.parameters())
    hidden: list[torch.Tensor] = []

    def noted(layer: int, values: torch.Tensor) -> torch.Tensor:
        hidden.append(values)
        return values

    length = inputs.size(1)
    model.set_kv_cache(len(inputs), length, device=parameter.device, dtype=parameter.dtype)
    with changed(model, noted):
        model(inputs.to(parameter.device), torch.arange(length, device=parameter.device), input_pos_maxp1=length)
    return hidden, [(block.attn.kv_cache.k, block.attn.kv_cache.v) for block in model.transformer.h]


def _refill(model: BaseGPT, cache: Cache, rows: torch.Tensor, position: int, steps: int) -> None:
    """Give the model the true keys and values of the positions before. New tensors: it writes into them in place."""
    for block, (k, v) in zip(model.transformer.h, cache, strict=True):
        block.attn.kv_cache.k, block.attn.kv_cache.v = (
            held[rows, :, : position + 1].repeat(steps, 1, 1, 1) for held in (k, v)
        )


def _check_window(model: BaseGPT, documents: Suffixes) -> None:
    window = model.config.sliding_window_size
    if window is not None and documents.inputs.size(1) > window:
        raise MemSinksError(
            f"The model attends to {window} tokens back in some layers, but a document has {documents.inputs.size(1)}. "
            f"Set --block_size {window}, or use another method."
        )
