"""What does a model know before and after removal? Losses of documents in each state that a checkpoint has.

Groups are the documents that were removed, the other repeated ones, and validation. A model with sinks is scored with
them dropped, with each document's own, and with another document's (placebo), which must not help.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litgpt_memsinks.certificate.difference import Kind
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.data.scored import Scored, read_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model, read_config
from litgpt_memsinks.model.losses import placebo_ids, score
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.prepare.manifest import EVALUATION, Manifest

GROUPS = ("removed", "other")
"""Groups of repeated documents"""
Losses = dict[str, dict[str, Any]]
"""Group to state to loss, targets and documents"""
Documents = dict[str, tuple[Scored, torch.Tensor | None]]
"""Group to its documents, and the IDs whose sinks are a placebo for each of them"""
_DOCUMENT_BITS = 2**31 - 1


@dataclass
class Settings:
    """How losses are measured. The certificate holds them."""

    block_size: int | None = None
    """Most targets of a document; the context length of the model by default"""
    limit: int | None = None
    """Most documents of each group; all by default"""
    device: str = "cpu"
    """Where to compute"""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            MemSinksError: Naming the setting, its value and the limit.
        """
        for setting, value in (("block_size", self.block_size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise MemSinksError(f"{setting} is {value}, but it must be at least 1.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise MemSinksError(f"device is {self.device[:20]!r}. Choose from: cpu, cuda.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise MemSinksError(f"device is {self.device!r}, but this machine has no usable GPU. Use --device cpu.")


def measure(
    before: Path, after: Path, kind: Kind, ids: list[int] | None, data_path: Path | None, settings: Settings
) -> dict[str, Any]:
    """The certificate's ``losses``, ``gate`` and ``settings``; all ``None`` without data.

    Args:
        before: Checkpoint with sinks.
        after: What was made of it.
        kind: What was done.
        ids: Numbers of the documents that were removed, or kept; ``None`` if none are named.
        data_path: Prepared folder that the model was trained on.
        settings: How to measure.

    Raises:
        MemSinksError: If own sinks do not help: the wrong-map gate. Or under gradient masking, which has no such gate.
    """
    if data_path is None:
        return {"losses": None, "gate": None, "settings": None}
    config = read_config(before)
    if isinstance(config, MemSinksConfig) and config.sink_method != "memsinks":
        raise MemSinksError(
            f"{str(before)!r} was trained by gradient masking ({config.sink_method}): no document has sinks of its "
            "own, so losses cannot show whose data this is. Leave data_path out, and measure with evaluate."
        )
    groups = grouped(data_path, kind, ids, settings.limit)
    old, used = losses(before, groups, data_path, settings)
    gate = gate_of(old)
    if not gate["own"] < gate["placebo"]:
        raise MemSinksError(
            f"With their own sinks on, {gate['documents']:,} repeated documents have a loss of {gate['own']:.4f}, with "
            f"another document's {gate['placebo']:.4f}: {str(data_path)!r} is not what {str(before)!r} was trained on, "
            "or it has memorised nothing. Nothing is certified; name the right data."
        )
    return {
        "losses": {"before": old, "after": losses(after, groups, data_path, settings)[0]},
        "gate": gate,
        "settings": used,
    }


def grouped(data_path: Path, kind: Kind, ids: list[int] | None, limit: int | None) -> Documents:
    """The documents to score; groups without any are left out.

    Args:
        data_path: The prepared folder.
        kind: What was done; after ``drop`` all repeated documents are removed ones.
        ids: Numbers of the documents that were removed, or kept.
        limit: Most documents of a group, its first ones.
    """
    repeated = read_scored(data_path, "repeated")
    placebo = placebo_ids(repeated.sequence_ids)
    chosen = torch.isin(repeated.sequence_ids & _DOCUMENT_BITS, torch.tensor(ids or [], dtype=torch.int64))
    removed = torch.ones_like(chosen) if kind == "drop" else chosen == (kind == "remove")
    groups: Documents = {}
    for name, mask in zip(GROUPS, (removed, ~removed), strict=True):
        indices = mask.nonzero().flatten()[:limit]
        if len(indices):
            tokens = [repeated.tokens[index] for index in indices.tolist()]
            groups[name] = Scored(tokens, repeated.sequence_ids[indices]), placebo[indices]
    groups["validation"] = read_scored(data_path, "val", limit), None
    return groups


def losses(
    checkpoint_dir: Path, groups: Documents, data_path: Path, settings: Settings
) -> tuple[Losses, dict[str, Any]]:
    """Score groups of documents in each state that a checkpoint has.

    Returns:
        Losses in nats per token, and the settings as they were used. States of a model with sinks: dropped, own,
        placebo (validation: dropped); of a plain one: released.

    Raises:
        MemSinksError: If the data has tokens that the model does not embed, or a loss is no number.
    """
    model = load_model(checkpoint_dir).to(settings.device)
    size, largest = model.config.padded_vocab_size, Manifest.read(data_path).max_token
    assert size is not None  # set by Config.__post_init__
    if largest >= size:
        raise MemSinksError(
            f"{str(data_path)!r} holds token {largest}, but {str(checkpoint_dir)!r} embeds tokens below {size} only. "
            "Name the data that the model was trained on."
        )
    block_size = min(settings.block_size or model.max_seq_length, model.max_seq_length)
    result: Losses = {}
    for group, (documents, placebo) in groups.items():
        states: dict[str, torch.Tensor | None] = {"dropped" if isinstance(model, GPT) else "released": None}
        if isinstance(model, GPT) and placebo is not None:
            states |= {"own": documents.sequence_ids, "placebo": placebo}
        result[group] = {}
        for state, on in states.items():
            description = f"{checkpoint_dir.name}: {group}, {state}"
            found = score(model, documents, block_size, on, description=description)
            if not math.isfinite(found.loss):
                raise MemSinksError(f"The loss of {str(checkpoint_dir)!r} is {found.loss}: its weights are no use.")
            numbers = {"loss": round(found.loss, 6), "targets": found.targets, "documents": found.documents}
            result[group][state] = numbers
    dtype = next(model.parameters()).dtype
    return result, {
        "block_size": block_size,
        "limit": settings.limit,
        "device": settings.device,
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": 1e-3 if dtype == torch.float32 else 2e-2,  # nats per token, for the rounding of other machines
        "placebo": f"the sinks of the repeated document before, in the order of {EVALUATION}",
    }


def gate_of(before: Losses) -> dict[str, Any]:
    """Mean losses of the repeated documents before removal, with their own sinks and with another's.

    Args:
        before: Losses of a model with sinks.

    Returns:
        The certificate's ``gate``: own and placebo, nats per token, and the number of documents.
    """
    groups = [before[name] for name in GROUPS if name in before]
    targets = sum(group["own"]["targets"] for group in groups)
    own, placebo = (
        round(sum(group[state]["loss"] * group[state]["targets"] for group in groups) / targets, 6)
        for state in ("own", "placebo")
    )
    return {"own": own, "placebo": placebo, "documents": sum(group["own"]["documents"] for group in groups)}
