"""Which neurons write most into the residual stream? The mean activation, times the norm of the outgoing weights."""

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.localise.neurons import Suffixes, changed


def written(activations: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """|mean a| times the norm of the neuron's column of W_down, ``(d_ff,)`` (Chang et al. 2024, "largest activation").

    Args:
        activations: At the positions of the suffix, ``(positions, d_ff)``.
        down: W_down, ``(n_embd, d_ff)``.
    """
    return activations.mean(0).abs() * down.norm(dim=0)


@torch.inference_mode()
def activation(model: BaseGPT, documents: Suffixes) -> torch.Tensor:
    """Score of each neuron for each document, float32 ``(B, L, d_ff)`` on the CPU; 0 for one without a suffix."""
    device = next(model.parameters()).device
    found: list[torch.Tensor] = []

    def noted(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        down = model.transformer.h[layer].mlp.proj.weight
        rows = [written(values[where], down) for values, where in zip(hidden, documents.scored.to(device), strict=True)]
        found.append(torch.stack(rows).nan_to_num().float().cpu())
        return hidden

    with changed(model, noted):
        model(documents.inputs.to(device))
    return torch.stack(found, 1)
