"""The checkpoint without chosen neurons: their weights are zero, all shapes stay, and stock LitGPT loads it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.utils import copy_config_files, save_config

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.drop_sinks.drop_sinks import save_weights, write_hf_config
from litgpt_memsinks.drop_sinks.plain_weights import neuron_dimensions, plain_config, without_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.subject import Subject
from litgpt_memsinks.files import atomic_directory, refuse_to_overwrite, write_json
from litgpt_memsinks.localise.file import Scores, read_scores
from litgpt_memsinks.localise.neurons import dropped_number, kept_neurons, refuse_sinks
from litgpt_memsinks.localise.scores import check_ratio
from litgpt_memsinks.model.checkpoint import WEIGHTS, check_fits, read_config, read_weights

NOTE = "dropped_neurons.json"


@dataclass
class DroppedNeurons:
    """What was done."""

    ratio: float
    """Share of each layer's neurons"""
    per_layer: list[int]
    """Neurons of each layer that are zero now"""
    document: int | None
    """Sequence ID of the document whose neurons they were; ``None``: of all together"""


def drop_neurons(
    checkpoint_dir: Path,
    scores: Path,
    ratio: float | None = None,
    out: Path | None = None,
    document: int | None = None,
) -> DroppedNeurons:
    """Write the LitGPT checkpoint whose highest scored neurons are zero. It is as wide as before, and no faster.

    Args:
        checkpoint_dir: LitGPT checkpoint that `localise` has looked at.
        scores: Result file of `localise`; the scores lie beside it.
        ratio: Share of each layer's neurons to drop.
        out: Folder to write. Must not exist; appears only when it is complete.
        document: Sequence ID of the document whose neurons to drop, if they were scored per sequence.

    Returns:
        What was done; also in ``dropped_neurons.json`` of the folder.

    Raises:
        MemSinksError: If the scores are of another checkpoint, or `out` exists; or for settings out of range.
    """
    if ratio is None or out is None:
        raise MemSinksError("How many neurons, and where to? Give both --ratio, such as 0.05, and --out OUT_DIR.")
    refuse_to_overwrite(out)
    found = read_scores(scores)
    keep = _kept(found, scores, ratio, document)
    subject = Subject.at("localised", checkpoint_dir)
    if subject.sha256 != found.checkpoint_sha256:
        raise MemSinksError(
            f"{str(scores)!r} is of weights {found.checkpoint_sha256[:12]}, but those of {str(checkpoint_dir)!r} are "
            f"{subject.sha256[:12]}. Name the checkpoint that was localised in."
        )
    done = DroppedNeurons(ratio, (~keep).sum(1).tolist(), document)
    with atomic_directory(out) as scratch:
        plain, weights = plain_weights(subject)
        zeroed = Zeroed(weights, neuron_dimensions(weights, plain), keep)
        save_weights(zeroed, scratch / WEIGHTS)
        copy_config_files(checkpoint_dir, scratch)  # tokenizer, and Hugging Face's files if there are any
        save_config(plain, scratch)
        write_hf_config(scratch, plain, zeroed)
        write_json(scratch / NOTE, _note(done, found, scores))
    print(
        f"Zeroed {dropped_number(ratio, keep.size(1)):,} of {keep.size(1):,} neurons of each MLP from layer "
        f"{found.first_layer} on: {str(out)!r} is a plain LitGPT checkpoint of the same width.\n"
        f"Try it: litgpt generate {out} --prompt 'Once upon a time'"
    )
    return done


def _kept(found: Scores, path: Path, ratio: float, document: int | None) -> torch.Tensor:
    """Neurons that stay, bool ``(L, d_ff)``."""
    check_ratio(ratio, found.values.size(-1))
    if bool(found.sequence_ids) != (document is not None):
        raise MemSinksError(
            f"{str(path)!r} has scores for each document. Say whose neurons: --document={found.sequence_ids[0]}"
            if found.sequence_ids
            else f"{str(path)!r} has one set of scores for all documents. Leave out --document, or use per_sequence."
        )
    if document is not None and document not in found.sequence_ids:
        raise MemSinksError(
            f"{str(path)!r} has no scores for document {document}. Choose one of its "
            f"{len(found.sequence_ids)} sequence IDs, such as {found.sequence_ids[0]}."
        )
    row = 0 if document is None else found.sequence_ids.index(document)
    return kept_neurons(found.values[row][None], ratio, found.first_layer)[0]


def plain_weights(subject: Subject) -> tuple[Config, Mapping[str, torch.Tensor]]:
    """LitGPT's own configuration and weights of a model without sinks, memory-mapped.

    Raises:
        MemSinksError: If it has sinks, or the checkpoint is damaged.
    """
    config = read_config(subject.checkpoint_dir)
    weights: Mapping[str, torch.Tensor] = read_weights(subject.checkpoint_dir)
    check_fits(subject.checkpoint_dir, weights, config)
    if not isinstance(config, MemSinksConfig):
        return config, weights
    refuse_sinks(subject, config)
    return plain_config(config), without_sinks(weights, config)


class Zeroed(Mapping[str, torch.Tensor]):
    """A state dict without some neurons, made a weight at a time: rows of what leads to them, columns of what follows.

    Args:
        weights: Of a plain model.
        dimensions: Names of the weights with an entry for each neuron, and along which dimension.
        keep: Neurons that stay, bool ``(L, d_ff)``.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], dimensions: dict[str, int], keep: torch.Tensor) -> None:
        self._weights, self._dimensions, self._keep = weights, dimensions, keep

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        if name not in self._dimensions:
            return weight
        layer = int(name.split(".")[2])  # transformer.h.LAYER.mlp...
        gone = (~self._keep[layer]).nonzero().flatten()
        return weight.index_fill(self._dimensions[name], gone, 0)


def _note(done: DroppedNeurons, found: Scores, scores: Path) -> dict[str, object]:
    settings = found.content["settings"]
    return {
        **vars(done),
        "method": settings["method"],
        "mode": settings["mode"],
        "scores": str(scores),
        "scores_sha256": found.content["scores"]["sha256"],
        "checkpoint_sha256": found.checkpoint_sha256,
    }
