"""Which neurons does a sequence miss most? Each is zeroed alone, and the loss looked at."""

from collections.abc import Callable

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.localise.neurons import Suffixes, changed, shape_of
from litgpt_memsinks.metrics import document_losses

ROWS = 64
"""Neurons of one document that are tried at a time"""


def rise(without: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Loss without the neuron less the loss with all of them, nats per token."""
    return without - whole


@torch.inference_mode()
def zero_out(model: BaseGPT, documents: Suffixes, on_step: Callable[[int], object] = lambda rows: None) -> torch.Tensor:
    """Score of each neuron for each document: L d_ff forward passes each.

    Args:
        model: Frozen.
        documents: The batch.
        on_step: Called with the number of neurons that were tried.

    Returns:
        float32 ``(B, L, d_ff)`` on the CPU.
    """
    layers, width = shape_of(model)
    found = torch.zeros(len(documents), layers, width)
    for row in range(len(documents)):
        alone = documents[[row]]
        whole = _loss(model, alone, 1)
        for layer in range(layers):
            for neurons in torch.arange(width).split(ROWS):
                with changed(model, _without(layer, neurons)):
                    found[row, layer, neurons] = rise(_loss(model, alone, len(neurons)), whole)
                on_step(len(neurons))
    return found


def _without(layer: int, neurons: torch.Tensor) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Zero the first of ``neurons`` in the first row of a batch, the second in the second, and so on."""

    def change(at: int, hidden: torch.Tensor) -> torch.Tensor:
        if at != layer:
            return hidden
        hidden = hidden.clone()
        hidden[torch.arange(len(neurons)), :, neurons] = 0.0
        return hidden

    return change


def _loss(model: BaseGPT, alone: Suffixes, rows: int) -> torch.Tensor:
    """Mean over the suffix of one document, computed in so many equal rows; float32 ``(rows,)``."""
    device = next(model.parameters()).device
    nats, counts = document_losses(
        model(alone.inputs.to(device).expand(rows, -1)), alone.targets.to(device).expand(rows, -1)
    )
    return (nats / counts.clamp(min=1)).float().cpu()
