"""What is asked of a localisation, and what each method gives: one score for each neuron; the largest are dropped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.localise.activation import activation
from litgpt_memsinks.localise.gradients import integrated_gradients
from litgpt_memsinks.localise.hard_concrete import HardConcreteArgs, hard_concrete
from litgpt_memsinks.localise.neurons import Suffixes, dropped_number, shape_of
from litgpt_memsinks.localise.random import random
from litgpt_memsinks.localise.zero_out import zero_out

Method = Literal["hard_concrete", "integrated_gradients", "activation", "zero_out", "random"]
Mode = Literal["per_sequence", "pooled"]


@dataclass(frozen=True)
class LocaliseArgs:
    """What a localisation depends on, besides the model, the documents and the ratios."""

    method: Method = "hard_concrete"
    """How neurons are scored"""
    mode: Mode = "pooled"
    """``per_sequence``: each document has scores of its own and is scored without its own neurons. ``pooled``: one set
    of scores for all documents"""
    prefix_length: int = 32
    """Tokens of a document that are given; the others are its memorised suffix. Of a document with less than twice as
    many, the first half is given"""
    block_size: int | None = None
    """Most targets of a document; the model's context length by default"""
    first_layer: int = 0
    """Layers before it are neither masked nor lose neurons. Chang et al.'s code has 1"""
    documents_at_once: int = 16
    """Documents that pass through the model together while neurons are scored"""
    steps: int = 16
    """Points of the integral of integrated gradients"""
    hard_concrete: HardConcreteArgs = field(default_factory=HardConcreteArgs)
    """How Hard Concrete trains its masks"""
    validation_limit: int | None = None
    """Validation documents that are scored after a drop, the first ones. All by default"""
    extraction: bool = False
    """Whether extraction is tried after each drop, too"""
    seed: int = 0
    """Of Hard Concrete's noise and of random scores"""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            MemSinksError: Naming the field, its value and the limit.
        """
        for name, values in (("method", get_args(Method)), ("mode", get_args(Mode))):
            if (given := getattr(self, name)) not in values:
                raise MemSinksError(f"{name} is {given!r}. Choose from: {', '.join(values)}.")
        for name, least in (("documents_at_once", 1), ("steps", 1), ("prefix_length", 1), ("first_layer", 0)):
            if getattr(self, name) < least:
                raise MemSinksError(f"{name} is {getattr(self, name)}, but it must be at least {least}.")
        for name in ("block_size", "validation_limit"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise MemSinksError(f"{name} is {limit}, but it must be at least 1.")
        self.hard_concrete.check()

    def check_model(self, model: BaseGPT) -> None:
        """Refuse to leave out all layers.

        Raises:
            MemSinksError: Naming both numbers.
        """
        if self.first_layer >= (layers := shape_of(model)[0]):
            raise MemSinksError(
                f"first_layer is {self.first_layer}, but the model has layers 0 to {layers - 1}. Lower it."
            )


def check_ratio(ratio: float, width: int) -> None:
    """Refuse a share that is none, or that drops nothing though it is above 0.

    Raises:
        MemSinksError: Naming it and the limits.
    """
    if not 0 <= ratio <= 1:
        raise MemSinksError(f"ratio is {ratio}, but it must lie in [0, 1]: the share of each layer's neurons to drop.")
    if ratio and not dropped_number(ratio, width):
        raise MemSinksError(
            f"ratio {ratio} of {width} neurons in a layer is less than one neuron. Make it {1 / width:.2g} or more."
        )


def score_neurons(
    model: BaseGPT, documents: Suffixes, args: LocaliseArgs, advance: Callable[[float], object] = lambda tokens: None
) -> torch.Tensor:
    """Scores of each neuron for a batch of documents; what should be dropped has the largest.

    Pooled, they are the mean over the documents' own scores, but Hard Concrete trains one mask for all of them.

    Args:
        model: Frozen.
        documents: The batch.
        args: The method and its settings.
        advance: Called with the work that is done, in tokens (see ``work``).

    Returns:
        float32 ``(B, L, d_ff)`` on the CPU, pooled ``(1, L, d_ff)``.
    """
    pooled = args.mode == "pooled"
    if args.method == "hard_concrete":
        step = work(model, documents, args) / args.hard_concrete.iterations
        settings = (args.hard_concrete, args.seed, pooled, args.first_layer, (), args.documents_at_once)
        return hard_concrete(model, documents, *settings, on_step=lambda: advance(step))[0]
    parts = [documents[rows.tolist()] for rows in torch.arange(len(documents)).split(args.documents_at_once)]
    scores = torch.cat([_score(model, part, args, advance) for part in parts])
    return scores.mean(0, keepdim=True) if pooled else scores


def _score(model: BaseGPT, documents: Suffixes, args: LocaliseArgs, advance: Callable[[float], object]) -> torch.Tensor:
    if args.method == "integrated_gradients":
        return integrated_gradients(model, documents, args.steps, lambda done: advance(3 * args.steps * done))
    if args.method == "zero_out":
        length = documents.inputs.size(1)
        return zero_out(model, documents, lambda neurons: advance(neurons * length))
    advance(work(model, documents, args))
    return activation(model, documents) if args.method == "activation" else random(model, documents, args.seed)


def work(model: BaseGPT, documents: Suffixes, args: LocaliseArgs) -> float:
    """Tokens that pass through the model, a backward pass as two forward ones: what the time left is told from."""
    layers, width = shape_of(model)
    tokens, targets = documents.inputs.numel(), int(documents.scored.sum())
    return {
        "hard_concrete": 3.0 * tokens * args.hard_concrete.iterations,
        "integrated_gradients": 3.0 * targets * layers * args.steps,
        "zero_out": float(tokens) * layers * width,
        "activation": float(tokens),
        "random": 0.0,
    }[args.method]
