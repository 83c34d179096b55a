"""Where do neurons meet the rest of the model? At the input of each MLP's down-projection; hooks read and change it.

Shapes: L layers, ``d_ff`` neurons in each (``intermediate_size``); B documents, T positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.config import SUPPORTED_MLPS, MemSinksConfig
from litgpt_memsinks.data.scored import Scored, pad
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.subject import Subject
from litgpt_memsinks.metrics import IGNORED
from litgpt_memsinks.model.model import MARKER, REMOVED

Change = Callable[[int, torch.Tensor], torch.Tensor]
"""Layer and its hidden activations ``(B, T, d_ff)`` to those that the down-projection gets."""


def load_plain(subject: Subject, device: str) -> BaseGPT:
    """The model as LitGPT's own, whose MLPs call their down-projection as a module, frozen and in eval mode.

    Raises:
        MemSinksError: If it has sinks, or MLPs in which a neuron is not defined here.
    """
    model = subject.load(device)
    config = model.config
    if isinstance(config, MemSinksConfig):
        refuse_sinks(subject, config)
        with torch.device("meta"):
            plain = BaseGPT(config.to_base())
        state = {name: value for name, value in model.state_dict().items() if name not in (MARKER, REMOVED)}
        plain.load_state_dict(state, assign=True)
        plain.cos, plain.sin = model.cos, model.sin  # not in the state, and undefined on the meta device
        model = plain.eval()
    if config.mlp_class_name not in SUPPORTED_MLPS or config.n_expert:
        raise MemSinksError(
            f"mlp_class_name is {config.mlp_class_name!r} in {str(subject.checkpoint_dir)!r}, but neurons are "
            f"localised in {', '.join(SUPPORTED_MLPS)} only. Name a dense model."
        )
    return model.requires_grad_(False)


def refuse_sinks(subject: Subject, config: MemSinksConfig) -> None:
    """Refuse a model that has sinks: its neurons are not on for every document.

    Raises:
        MemSinksError: Saying how to get the model without.
    """
    if config.n_sink:
        raise MemSinksError(
            f"{str(subject.checkpoint_dir)!r} has {config.n_sink} sinks in each MLP, but localisation is for models "
            "without. Drop them first: litgpt-memsinks drop_sinks CHECKPOINT_DIR OUT_DIR"
        )


def shape_of(model: BaseGPT) -> tuple[int, int]:
    """Number of layers, and of neurons in each."""
    assert model.config.intermediate_size is not None  # set by Config.__post_init__
    return model.config.n_layer, model.config.intermediate_size


@contextmanager
def changed(model: BaseGPT, change: Change) -> Iterator[None]:
    """Put ``change`` between every MLP's hidden activations and its down-projection."""

    def hook(layer: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, arguments: (change(layer, arguments[0]), *arguments[1:])

    hooks = [block.mlp.proj.register_forward_pre_hook(hook(i)) for i, block in enumerate(model.transformer.h)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def dropped(model: BaseGPT, keep: torch.Tensor) -> Iterator[None]:
    """Zero neurons at every position.

    Args:
        model: Any that is not compiled.
        keep: bool ``(1 or B, L, d_ff)``; one row for all documents, or one for each row of a batch.
    """
    keep = keep.to(next(model.parameters()).device)
    with changed(model, lambda layer, hidden: torch.where(keep[:, layer, None], hidden, 0.0)):
        yield


def kept_neurons(scores: torch.Tensor, ratio: float, first_layer: int = 0) -> torch.Tensor:
    """Which neurons stay when the ``int(ratio * d_ff)`` of largest score in each layer are dropped (App. C).

    Args:
        scores: ``(N, L, d_ff)``.
        ratio: Share to drop, in [0, 1].
        first_layer: Layers before it lose none.

    Returns:
        bool ``(N, L, d_ff)``. Among equal scores the first neurons go.
    """
    number = dropped_number(ratio, scores.size(-1))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., :number], False)
    keep[:, :first_layer] = True
    return keep


def dropped_number(ratio: float, width: int) -> int:
    """``int(ratio * width)`` of the numbers as they are written: .29 of 100 are 29, not the 28 of binary fractions."""
    return int(round(ratio * width, 6))


# ------------------------------------------------------------------------------------------------- documents as batches


@dataclass
class Suffixes:
    """Documents as a batch whose targets are their memorised suffixes.

    Attributes:
        inputs: Whole documents, int64 ``(B, T)``.
        targets: Tokens to predict, ``(B, T)``; ``IGNORED`` in prefix and padding.
        digests: Hash of each document, from which its random numbers are drawn.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    digests: list[int]

    def __getitem__(self, rows: Sequence[int]) -> "Suffixes":
        """Some of the documents."""
        return Suffixes(self.inputs[rows], self.targets[rows], [self.digests[row] for row in rows])

    @property
    def scored(self) -> torch.Tensor:
        """Where there is a target, bool ``(B, T)``."""
        return self.targets != IGNORED

    def __len__(self) -> int:
        return len(self.inputs)


def suffixes(documents: Scored, rows: Sequence[int], prefix_length: int, block_size: int) -> Suffixes:
    """Documents with their prefix left out of the targets.

    Args:
        documents: Where they are.
        rows: Numbers of those wanted.
        prefix_length: Tokens that are given. Of a document with less than twice as many, the first half is.
        block_size: Most targets of a document, prefix and suffix together.
    """
    tokens = [documents.tokens[row] for row in rows]
    inputs, targets = pad(tokens, block_size)
    for row, document in enumerate(tokens):
        length = min(len(document), block_size + 1)
        targets[row, : max(min(prefix_length, length // 2) - 1, 0)] = IGNORED
    return Suffixes(inputs, targets, [documents.digests[row] for row in rows])
