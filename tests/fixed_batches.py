"""Data of which several processes together get what one process gets alone: litdata's order depends on their number."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from litgpt_memsinks import MemSinksData
from tests.helpers import read_stream


class Rows(IterableDataset):
    """Rows of a split in stored order; of the training split those of this process, of validation all."""

    def __init__(self, folder: Path, row: int, step: slice) -> None:
        stream = torch.from_numpy(read_stream(folder).copy())
        self.rows = stream[: len(stream) // row * row].view(-1, row // 2, 2)[step]
        self.start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.rows[self.start :])

    def __len__(self) -> int:
        return len(self.rows)


class Loader(DataLoader):
    """Carries on where a checkpoint was saved."""

    seen = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            self.seen += len(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = self.dataset.start = state["seen"]


class FixedBatches(MemSinksData):
    """Micro batch i of process r of n holds the rows i * n + r of the stream, if a micro batch is one row.

    The environment variable ``VALIDATION_ROWS`` leaves so many rows of validation data to the last process.
    """

    def _dataloader(self, input_dir: str, train: bool) -> Any:
        from torch import distributed as dist

        several = dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        rows = Rows(Path(input_dir), self.seq_length, slice(rank, None, world) if train else slice(None))
        if not train and rank == world - 1 and "VALIDATION_ROWS" in os.environ:
            rows.rows = rows.rows[: int(os.environ["VALIDATION_ROWS"])]
        return Loader(rows, batch_size=self.batch_size, drop_last=True)
