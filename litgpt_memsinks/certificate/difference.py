"""What is one checkpoint with respect to another? The same weights, but for hidden neurons that are gone.

Nothing that is claimed is believed: all weights are compared bit by bit, and which sinks are gone is read off them. So
the names of the sliced weights are stated here again, apart from `drop_sinks.py`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch
import xxhash
from litgpt.config import Config

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import read_config, read_weights
from litgpt_memsinks.model.model import removed_mask

Kind = Literal["drop", "keep", "remove"]
ROWS = ("mlp.fc.weight", "mlp.fc_1.weight", "mlp.fc_2.weight", "mlp.fc.bias", "mlp.fc_1.bias", "mlp.fc_2.bias")
COLUMNS = "mlp.proj.weight"
Weights = dict[str, torch.Tensor]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_value_sinks(config: MemSinksConfig) -> None:
    """Raise if a model has sinks that a certificate would pass over.

    Raises:
        MemSinksError: If it has sinks in attention.
    """
    if config.n_value_sink:
        raise MemSinksError(
            "The model has sinks in its attention (sinks.value_shared_fraction), of which certificates know nothing. "
            "Drop them without one: --certificate false."
        )


@dataclass
class Difference:
    """What became of a checkpoint with sinks."""

    kind: Kind
    """drop: a plain model without any sink. keep: a plain model with some of them. remove: some sinks are zero"""
    config: MemSinksConfig
    """Of the checkpoint with sinks. All layers were compared, and all shared neurons are bit-identical"""
    gone: torch.Tensor
    """Sinks that are not there any more, bool ``(n_sink,)``; the same in every layer"""
    empty_before: torch.Tensor
    """Sinks that were zero before, bool ``(n_sink,)``: removed earlier"""
    tensors_identical: int
    """Tensors that are bit-identical as a whole"""
    tensors_sliced: int
    """Tensors of MLPs whose neurons that are still there are bit-identical, up to `projection_factor`"""
    projection_factor: float
    """Factor on the columns of kept sinks in ``mlp.proj``: 1/p after training with ``scale: inverse``, else 1"""


def compare(before: Path, after: Path) -> Difference:
    """Compare two checkpoints.

    Args:
        before: A checkpoint with sinks.
        after: What was made of it.

    Raises:
        MemSinksError: If a folder is no checkpoint, `before` has no sinks, or any weight or setting differs other than
            by neurons that are gone.
    """
    old, new = read_config(before), read_config(after)
    if not isinstance(old, MemSinksConfig):
        raise MemSinksError(f"{str(before)!r} is a plain checkpoint, without sinks. Name the one before removal.")
    kind: Kind = "remove" if isinstance(new, MemSinksConfig) else "keep"
    if kind == "keep" and new.intermediate_size == old.n_shared:
        kind = "drop"
    pair = _Pair(before, after, old, new)
    pair.check_settings()
    pair.check_shapes()
    identical = pair.compare_others()
    if kind == "remove":
        gone, empty = pair.zeroed()
    else:
        gone, empty = ~pair.kept(), pair.empty(pair.old_weights)
    return Difference(
        kind=kind,
        config=old,
        gone=gone,
        empty_before=empty,
        tensors_identical=identical,
        tensors_sliced=len(pair.sliced),
        projection_factor=pair.factor if kind == "keep" else 1.0,
    )


class _Sliced(NamedTuple):
    """A weight or bias that has one entry per hidden neuron."""

    name: str
    dimension: int


class _Pair:
    """Two checkpoints side by side; weights are memory-mapped.

    Args:
        before: A checkpoint with sinks.
        after: What was made of it.
        old: Configuration of `before`.
        new: Configuration of `after`.
    """

    def __init__(self, before: Path, after: Path, old: MemSinksConfig, new: Config) -> None:
        refuse_value_sinks(old)
        self.before, self.after, self.old, self.new = before, after, old, new
        # names without a dot are buffers of ours that say what the weights are, such as the marker
        self.old_weights: Weights = {name: value for name, value in read_weights(before).items() if "." in name}
        self.new_weights: Weights = {name: value for name, value in read_weights(after).items() if "." in name}
        self.sliced = [_Sliced(name, 0) for name in self.old_weights if name.endswith(ROWS)]
        self.sliced += [_Sliced(name, 1) for name in self.old_weights if name.endswith(COLUMNS)]
        self.first = min(old.sink_layers or [0])
        self.factor = 1.0 / old.sink_active_probability if old.sink_scale == "inverse" else 1.0

    def refuse(self, reason: str) -> NoReturn:
        """Say that one is not made of the other."""
        raise MemSinksError(
            f"{str(self.after)!r} is not {str(self.before)!r} with sinks removed: {reason}. Name the checkpoint that "
            "it was made from."
        )

    def check_settings(self) -> None:
        """Everything but the width, and the record of what was removed, must be equal."""
        old = asdict(self.old if isinstance(self.new, MemSinksConfig) else self.old.to_base())
        new = asdict(self.new)
        if isinstance(self.new, MemSinksConfig):
            names = [name for name in old if not name.startswith("sink_removed")]
        else:
            names = [name for name in old if name != "intermediate_size"]
        if different := [name for name in names if old[name] != new.get(name)]:
            name = different[0]
            self.refuse(f"{name} was {old[name]!r} and is {new.get(name)!r}")

    def check_shapes(self) -> None:
        """The same tensors, of the same shapes but for the width, and of the same precision."""
        if set(self.old_weights) != set(self.new_weights):
            self.refuse(f"{min(set(self.old_weights) ^ set(self.new_weights))} is in one of them only")
        width = self.new.intermediate_size
        assert width is not None  # set by Config.__post_init__
        if not self.old.n_shared <= width <= self.old.n_shared + self.old.n_sink:
            self.refuse(f"its intermediate_size is {width}, but {self.old.n_shared} neurons are shared")
        expected = self.old.n_layer * (2 if self.old.mlp_class_name == "GptNeoxMLP" else 3)
        if (found := sum(self.old_weights[part.name].dim() == 2 for part in self.sliced)) != expected:
            self.refuse(f"{found} MLP weights were found, but the configuration has {expected}")
        for part in self.sliced:
            if (size := self.old_weights[part.name].size(part.dimension)) != self.old.intermediate_size:
                self.refuse(f"{part.name} has {size} neurons, but intermediate_size is {self.old.intermediate_size}")
        sliced = dict(self.sliced)
        for name, old in self.old_weights.items():
            new, shape = self.new_weights[name], list(old.shape)
            if name in sliced:
                shape[sliced[name]] = width
            if list(new.shape) != shape or new.dtype != old.dtype:
                self.refuse(f"{name} is {new.dtype} {tuple(new.shape)}, not {old.dtype} {tuple(shape)}")

    def compare_others(self) -> int:
        """Compare what has no hidden neurons, and the shared neurons; returns the number of whole tensors."""
        sliced = dict(self.sliced)
        for name, old in self.old_weights.items():
            new = self.new_weights[name]
            if name in sliced:
                old, new = (tensor.narrow(sliced[name], 0, self.old.n_shared) for tensor in (old, new))
            if not torch.equal(_bits(old), _bits(new)):
                self.refuse(f"{name} differs" + (" in the shared neurons" if name in sliced else ""))
        return len(self.old_weights) - len(sliced)

    def sinks(self, weights: Weights) -> Iterator[tuple[_Sliced, torch.Tensor]]:
        """The sinks' part of each tensor that has one, ``(n_sink, ...)``: neurons first."""
        for part in self.sliced:
            tensor = weights[part.name]
            n = tensor.size(part.dimension) - self.old.n_shared
            rows = tensor.narrow(part.dimension, self.old.n_shared, n)
            yield part, rows.t() if part.dimension else rows

    def empty(self, weights: Weights) -> torch.Tensor:
        """Which sinks are zero in every tensor, bool ``(n_sink,)``."""
        empty = torch.ones(self.old.n_sink, dtype=torch.bool)
        for _, rows in self.sinks(weights):
            empty &= _by_neuron(rows == 0).all(1)
        return empty

    def zeroed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which sinks are zero now and were not, and which were zero before; all others must be bit-identical."""
        same = torch.ones(self.old.n_sink, dtype=torch.bool)
        for (_, old), (_, new) in zip(self.sinks(self.old_weights), self.sinks(self.new_weights), strict=True):
            same &= _by_neuron(_bits(old) == _bits(new)).all(1)
        before, now = self.empty(self.old_weights), self.empty(self.new_weights)
        if not bool((same | now).all()):
            neuron = int((~(same | now)).nonzero()[0])
            self.refuse(f"sink {neuron} is neither unchanged nor zero")
        gone = now & ~before
        if isinstance(self.new, MemSinksConfig) and bool((gone & ~removed_mask(self.new)).any()):
            neuron = int((gone & ~removed_mask(self.new)).nonzero()[0])
            self.refuse(f"sink {neuron} is zero, but its configuration does not record that it was removed")
        return gone, before

    def kept(self) -> torch.Tensor:
        """Which sinks are in a plain model, bool ``(n_sink,)``: matched in their order by the first layer's rows."""
        kept = torch.zeros(self.old.n_sink, dtype=torch.bool)
        indices = torch.tensor(self._matched(), dtype=torch.int64)
        kept[indices] = True
        for (part, old), (_, new) in zip(self.sinks(self.old_weights), self.sinks(self.new_weights), strict=True):
            expected = old.index_select(0, indices)
            if not self.old.has_sinks(_layer(part.name)):
                expected = torch.zeros_like(expected)  # never on there, whatever the weights hold
            factor = self.factor if part.dimension else 1.0
            if not _equal_up_to(expected, new, factor):
                self.refuse(f"{part.name} differs in the sinks that are kept")
        return kept

    def _matched(self) -> list[int]:
        """For each neuron of `after` behind the shared ones, the sink of `before` with the same rows in the first layer
        that has sinks."""
        positions: dict[bytes, list[int]] = defaultdict(list)
        for index, key in enumerate(self._keys(self.old_weights)):
            positions[key].append(index)
        found: list[int] = []
        for number, key in enumerate(self._keys(self.new_weights)):
            later = [index for index in positions.get(key, []) if index > (found[-1] if found else -1)]
            if not later:
                neuron = self.old.n_shared + number
                self.refuse(f"neuron {neuron} of layer {self.first} is none of its sinks, or not in their order")
            found.append(later[0])
        return found

    def _keys(self, weights: Weights) -> list[bytes]:
        sinks = self.sinks(weights)
        first = [rows for part, rows in sinks if _layer(part.name) == self.first and part.name.endswith(ROWS)]
        first = [rows for rows in first if rows.dim() == 2]
        bytes_of = [rows.contiguous().view(torch.uint8).numpy() for rows in first]
        return [
            b"".join(xxhash.xxh3_128_digest(rows[index].data) for rows in bytes_of) for index in range(len(first[0]))
        ]


def _layer(name: str) -> int:
    """The layer of an MLP's tensor, ``transformer.h.LAYER.mlp...``."""
    return int(name.split(".")[2])


def _by_neuron(values: torch.Tensor) -> torch.Tensor:
    """A row per neuron, of weights or biases; also if there is none."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers: 0.0 is not -0.0, and NaN is itself."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def _equal_up_to(old: torch.Tensor, new: torch.Tensor, factor: float) -> bool:
    """Whether ``new`` is ``old`` times a factor, rounded once or twice to its precision; bit for bit if that is 1."""
    if factor == 1.0:
        return torch.equal(_bits(old), _bits(new))
    exact = old.double() * factor
    return bool(((new.double() - exact).abs() <= 2 * torch.finfo(old.dtype).eps * exact.abs()).all())
