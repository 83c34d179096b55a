"""Which neurons does a sequence need? A mask over them is trained, and as many as possible are masked (Hard Concrete).

Louizos, Welling, Kingma 2018 (arXiv 1712.01312), as Chang et al. 2024 use it. Of the model nothing is trained. Each
document of a batch has a mask of its own, so that many are localised at once, each exactly as if alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.document_ids.ids import mix
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.localise.neurons import Suffixes, changed, shape_of
from litgpt_memsinks.metrics import IGNORED, token_losses

LOW, HIGH = -0.1, 1.1
"""l and r: the interval that the mask is stretched to before it is cut to [0, 1], so that it can be exactly 0 and 1."""
NOISE = 1e-4
"""Uniform noise stays so far away from 0 and 1."""


@dataclass(frozen=True)
class HardConcreteArgs:
    """How the mask is trained. The defaults are the paper's smallest grid values and Chang et al.'s for Pythia."""

    penalty: float = 100.0
    """λ: weight of the share of neurons that is not masked, against nats per token"""
    iterations: int = 1000
    """Optimizer steps"""
    learning_rate: float = 1e-3
    """Of Adam, constant"""
    initial_mask: float = 0.9
    """The mask that training begins with"""
    temperature: float = 0.33
    """β: near 0 the mask is 0 or 1, at 1 anything between"""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            MemSinksError: Naming the field, its value and the limit.
        """
        for name, low, high in (("initial_mask", LOW, HIGH), ("temperature", 0.0, math.inf)):
            if not low < getattr(self, name) < high:
                raise MemSinksError(
                    f"hard_concrete.{name} is {getattr(self, name)}, but it must be above {low:g} and below {high:g}."
                )
        for name in ("penalty", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise MemSinksError(f"hard_concrete.{name} is {getattr(self, name)}, but it must be above 0.")
        if self.iterations < 1:
            raise MemSinksError(f"hard_concrete.iterations is {self.iterations}, but it must be at least 1.")


def initial_score(mask: float) -> float:
    """The score s at which the settled mask has this value: log(q / (1 - q)), q = (mask - l) / (r - l)."""
    q = (mask - LOW) / (HIGH - LOW)
    return math.log(q / (1 - q))


def stretched(z: torch.Tensor) -> torch.Tensor:
    """clamp(z (r - l) + l, 0, 1)."""
    return (z * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def sampled_mask(scores: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mask in training: z = σ((log u - log(1 - u) + s) / β), stretched. Shapes are equal."""
    return stretched(torch.sigmoid((noise.log() - (1 - noise).log() + scores) / temperature))


def settled_mask(scores: torch.Tensor) -> torch.Tensor:
    """The mask without noise: z = σ(s), stretched."""
    return stretched(torch.sigmoid(scores))


def penalty(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """R = mean of σ(s - β log(-l / r)): the probability that a neuron is not masked. ``(N, L, d_ff)`` to ``(N,)``."""
    return torch.sigmoid(scores - temperature * math.log(-LOW / HIGH)).mean((-2, -1))


def noise_of(digest: int, seed: int) -> torch.Generator:
    """Random numbers of one document: the same whichever documents are beside it."""
    (state,) = mix(np.array([digest], dtype=np.uint64), seed, "hard_concrete").tolist()
    return torch.Generator().manual_seed(state % 2**63)


def hard_concrete(
    model: BaseGPT,
    documents: Suffixes,
    settings: HardConcreteArgs,
    seed: int,
    pooled: bool = False,
    first_layer: int = 0,
    at: Sequence[int] = (),
    at_once: int | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> list[torch.Tensor]:
    """Train masks, and take σ(s) of each neuron: the neurons that are kept are those that the sequence needs.

    Args:
        model: Frozen.
        documents: The batch.
        settings: See there.
        seed: Of the noise.
        pooled: One mask for all documents, which minimises the mean of their losses.
        first_layer: Layers before it have no mask, which is a mask of exactly 1, and their scores are 0.
        at: Steps after which the scores are wanted; after the last one by default.
        at_once: Documents that pass through the model together, if pooled; all by default.
        on_step: Called after each step.

    Returns:
        σ(s), float32 ``(B or 1, L, d_ff)`` on the CPU, for each of ``at``.
    """
    layers, width = shape_of(model)
    device = next(model.parameters()).device
    digests = documents.digests[:1] if pooled else documents.digests
    generators = [noise_of(digest, seed) for digest in digests]
    shape = (layers - first_layer, width)
    scores = torch.full((len(digests), *shape), initial_score(settings.initial_mask), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=settings.learning_rate)
    batches = _batches(documents, at_once if pooled else None)
    share = 1 / len(documents) if pooled else 1.0
    wanted = sorted(at) or [settings.iterations]
    found = {}
    for step in range(1, wanted[-1] + 1):
        uniform = torch.stack([torch.rand(shape, generator=one) for one in generators]).to(device)
        mask = sampled_mask(scores, NOISE + (1 - 2 * NOISE) * uniform, settings.temperature)
        pull = share * torch.stack([_mask_gradient(model, one, mask.detach(), first_layer) for one in batches]).sum(0)
        kept = settings.penalty * penalty(scores, settings.temperature).sum()
        (scores.grad,) = torch.autograd.grad([mask, kept], [scores], [pull, torch.ones_like(kept)])
        optimizer.step()
        on_step()
        if step in wanted:
            found[step] = _padded(scores.detach().sigmoid(), first_layer)
    return [found[step] for step in at or wanted]


def _batches(documents: Suffixes, at_once: int | None) -> list[Suffixes]:
    rows = torch.arange(len(documents)).split(at_once or len(documents))
    return [documents[part.tolist()] for part in rows]


def _mask_gradient(model: BaseGPT, documents: Suffixes, mask: torch.Tensor, first_layer: int) -> torch.Tensor:
    """Gradient of the sum of the documents' losses by ``mask`` ``(B or 1, L - first_layer, d_ff)``."""
    mask.requires_grad_()

    def masked(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if layer < first_layer else hidden * mask[:, layer - first_layer, None].to(hidden.dtype)

    targets = documents.targets.to(mask.device)
    with changed(model, masked):
        losses = token_losses(model(documents.inputs.to(mask.device)), targets)
    means = losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)
    return torch.autograd.grad(means.sum(), mask)[0]


def _padded(scores: torch.Tensor, first_layer: int) -> torch.Tensor:
    return torch.nn.functional.pad(scores.float().cpu(), (0, 0, first_layer, 0))
