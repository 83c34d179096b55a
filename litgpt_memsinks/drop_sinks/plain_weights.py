"""Which weights has the plain model of some hidden neurons? Slices of those of the model with sinks, made on demand.

A sink that is always on is an ordinary hidden neuron, and the mask is the same in every layer. So the shared neurons
alone, and the shared neurons with any fixed choice of sinks, are plain models: rows of ``fc_1``, ``fc_2`` (``fc`` in
ungated MLPs) and columns of ``proj`` are left out, and all else is copied (Sec. 5: "removal of memorization can be
achieved by simply deleting the memorization sinks"). Value channels of sinks in attention are zeros instead.
"""

from collections.abc import Iterator, Mapping

import torch
from litgpt.config import Config

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.model import (
    MARKER,
    REMOVED,
    check_removed,
    removed_mask,
    sink_scale,
    sliced_dimension,
    value_columns,
    value_rows,
)
from litgpt_memsinks.sinks.masks import only_repeated

EMBEDDINGS = ("lm_head.weight", "transformer.wte.weight")
"""The two weights that are one if embeddings are tied."""


def sinks_of(config: MemSinksConfig, sequence_ids: torch.Tensor) -> torch.Tensor:
    """The sinks that are on for at least one of some documents; removed ones never are.

    Args:
        config: Of the model with sinks. Under ``sinks_for: repeated`` only IDs with the sign bit have sinks.
        sequence_ids: Integer IDs ``(documents,)``.

    Returns:
        Indices of sinks, int64 ``(kept,)``, ascending, in [0, n_sink).
    """
    if config.sink_sinks_for == "repeated":
        sequence_ids = only_repeated(sequence_ids)
    on = torch.zeros(config.n_sink, dtype=torch.bool)
    for ids in sequence_ids.split(1024):  # a source may have millions of documents
        on |= config.mask(ids).any(dim=0)
    return (on & ~removed_mask(config)).nonzero().squeeze(-1)


def plain_config(config: MemSinksConfig, sinks: torch.Tensor | None = None) -> Config:
    """LitGPT's configuration of the plain model of the shared neurons and the given ``sinks`` ``(kept,)``."""
    plain = config.to_base()
    plain.intermediate_size = config.n_shared + (0 if sinks is None else len(sinks))
    return plain


def without_sinks(
    weights: Mapping[str, torch.Tensor], config: MemSinksConfig, sinks: torch.Tensor | None = None
) -> "PlainWeights":
    """Slice all sinks away but those to keep.

    Args:
        weights: State dict of a model with sinks.
        config: Its configuration.
        sinks: Indices of sinks to keep, int64 ``(kept,)``; none by default.

    Returns:
        State dict of the plain model of ``plain_config(config, sinks)``.

    Raises:
        MemSinksError: If a weight that must be sliced is missing or has another shape than the configuration says.
    """
    if MARKER not in weights or int(weights[MARKER]) != config.n_shared:
        raise MemSinksError("The weights and model_config.yaml are not of one model. Copy the checkpoint again.")
    check_removed(config, weights.get(REMOVED))
    neuron_dimensions(weights, config)
    return PlainWeights(weights, config, sinks)


def neuron_dimensions(weights: Mapping[str, torch.Tensor], config: Config) -> dict[str, int]:
    """Which weights and biases have one entry per hidden neuron, and along which dimension.

    Args:
        weights: State dict of a model with sinks.
        config: Its configuration.

    Returns:
        Name of each to the dimension of size ``intermediate_size``.

    Raises:
        MemSinksError: If one is missing or has another shape than the configuration says.
    """
    found = {name: place for name in weights if (place := sliced_dimension(name)) is not None}
    for name, dimension in found.items():
        if weights[name].size(dimension) != config.intermediate_size:
            raise MemSinksError(
                f"{name} has shape {tuple(weights[name].shape)}, but intermediate_size is {config.intermediate_size}. "
                "The weights and model_config.yaml are not of one model."
            )
    matrices = sum(weights[name].dim() == 2 for name in found)
    expected = config.n_layer * (2 if config.mlp_class_name == "GptNeoxMLP" else 3)
    if matrices != expected:
        raise MemSinksError(f"{matrices} MLP weights were found, but the model has {expected}. The file is not of it.")
    return found


class PlainWeights(Mapping[str, torch.Tensor]):
    """A state dict whose slices are made when they are asked for, so that one at a time is in memory.

    What is not sliced is the tensor of ``weights`` itself, memory-mapped if that is; so tied embeddings stay tied.

    Args:
        weights: State dict of a model with sinks, of the shapes that its configuration says.
        config: Its configuration.
        sinks: Indices of sinks to keep, int64 ``(kept,)``; none by default.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], config: MemSinksConfig, sinks: torch.Tensor | None = None
    ) -> None:
        self._weights = weights
        self._names = [name for name in weights if name not in (MARKER, REMOVED)]
        self._n_shared, self._scale, self._config = config.n_shared, sink_scale(config), config
        self._sinks = sinks if sinks is not None and len(sinks) else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in (MARKER, REMOVED):
            raise KeyError(name)
        weight = self._weights[name]
        dimension = sliced_dimension(name)
        if dimension is None:
            return self._attention(name, weight)
        shared = weight.narrow(dimension, 0, self._n_shared)
        if self._sinks is None:
            return alone(shared)  # the sinks' numbers are not saved along with the storage of the slice
        kept = weight.index_select(dimension, self._n_shared + self._sinks)
        if not self._config.has_sinks(layer_of(name)):
            kept = torch.zeros_like(kept)  # never on there: what the weights hold is their initial noise
        elif dimension == 1 and self._scale != 1.0:
            kept = kept * self._scale  # what `switch_sinks` does to the activations
        return torch.cat((shared, kept), dim=dimension)

    def _attention(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight of attention without the value channels of sinks: a plain model has all heads of one size."""
        config = self._config
        if not config.n_value_sink or (".attn.qkv." not in name and not name.endswith(".attn.proj.weight")):
            return weight
        on = torch.zeros(config.n_value_sink, dtype=torch.bool)
        if self._sinks is not None and config.has_sinks(layer_of(name)):
            on[self._sinks[self._sinks < config.n_value_sink]] = True
        weight = weight.clone()
        if ".attn.qkv." in name:
            weight[value_rows(config)[~on]] = 0
        else:
            columns = value_columns(config)
            weight[:, columns[~on].flatten()] = 0
            weight[:, columns[on].flatten()] *= self._scale
        return weight


def alone(weight: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and the only one in its storage, which files hold whole.

    Numbers that lie together, such as the first rows of a memory-mapped weight, are not copied: the same memory gets a
    storage that ends with them. Fresh memory costs more time than writing the numbers.
    """
    if weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes:
        return weight
    if not weight.is_contiguous() or weight.dim() == 0 or weight.device.type != "cpu":
        return weight.clone(memory_format=torch.contiguous_format)
    numbers = weight.detach().view(torch.uint8).numpy()  # NumPy has no bfloat16
    return torch.frombuffer(numbers, dtype=weight.dtype).view(weight.shape)


def tied(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether input and output embeddings are one weight, in one storage or, as some writers leave them, in two."""
    if any(name not in weights for name in EMBEDDINGS):
        return False
    head, embedding = (weights[name] for name in EMBEDDINGS)
    return head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)


def layer_of(name: str) -> int:
    """The layer that a parameter of a block belongs to, from its name, such as ``transformer.h.3.mlp.proj.weight``."""
    return int(name.partition("transformer.h.")[2].partition(".")[0])
