"""What does the loader yield? Batches ``(B, T + 1, 2)`` of (token, sequence ID) pairs, int32.

The stream on disk is ``t0 id0 t1 id1 ...``. A block of ``2 * (T + 1)`` numbers, viewed as pairs, lets LitGPT's own
training and validation loops run unchanged: their slices along dimension 1 cut tokens and IDs together.

With the Goldfish loss, training batches are ``(B, T + 1, 3)``: the third number is the token, or -100 if it is no
target.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.data.lit_data import LitData
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader

from litgpt_memsinks.config import GoldfishArgs, LaunchArgs, SinkArgs, WatchArgs
from litgpt_memsinks.data.goldfish import left_out
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.metrics import IGNORED
from litgpt_memsinks.prepare.chunks import read_index
from litgpt_memsinks.prepare.manifest import MANIFEST, TOKENIZER, TOKENIZER_FILES, Manifest, tokenizer_fingerprint
from litgpt_memsinks.remote import check_url, copy_files, is_url

INT32_FORMATS = ("no_header_tensor:15", "no_header_tensor:16")
"""How litdata names a headerless stream of int32 (torch.int32 or torch.int). uint16 would cut IDs short silently."""


def deinterleave(rows: torch.Tensor) -> torch.Tensor:
    """View interleaved rows as pairs.

    Args:
        rows: Integer rows ``token, ID, token, ID, ...`` of shape ``(B, 2 * (T + 1))``.

    Returns:
        A view of shape ``(B, T + 1, 2)``: tokens at ``[..., 0]``, sequence IDs at ``[..., 1]``.

    Raises:
        MemSinksError: If the row length is odd.
    """
    if rows.size(1) % 2:
        raise MemSinksError(f"Row length {rows.size(1)} is odd. Was this data written by `litgpt-memsinks prepare`?")
    return rows.unflatten(-1, (-1, 2))


def collate_pairs(rows: list[np.ndarray] | list[torch.Tensor]) -> torch.Tensor:
    """Stack blocks of shape ``(2 * (T + 1),)`` to pairs of shape ``(B, T + 1, 2)``, int32."""
    return deinterleave(torch.stack([torch.as_tensor(row) for row in rows]))


def collate_goldfish(rows: list[np.ndarray] | list[torch.Tensor], goldfish: GoldfishArgs) -> torch.Tensor:
    """Stack blocks as ``collate_pairs`` does, with what each token is as a target: ``(B, T + 1, 3)``, int32."""
    pairs = collate_pairs(rows)
    tokens, ids = pairs.unbind(-1)
    ignored = torch.from_numpy(left_out(tokens.numpy(), ids.numpy(), goldfish))
    return torch.stack((tokens, ids, tokens.masked_fill(ignored, IGNORED)), dim=-1)


@dataclass
class MemSinksData(LitData):
    """Loads a folder that ``litgpt-memsinks prepare`` wrote, and makes ``litgpt pretrain`` train with sinks."""

    data_path: str | Path = Path("data/memsinks")
    """The prepared folder, or the URL of its copy in an object store, such as ``s3://bucket/prefix``"""
    split_names: tuple[str, str] | None = ("train", "val")
    """Names of the subfolders for training and validation"""
    seed: int = 42
    """The random seed for shuffling the blocks"""
    num_workers: int = 8
    """How many DataLoader processes to use for loading"""
    sinks: SinkArgs = field(default_factory=SinkArgs)
    """Hyperparameters of the memorization sinks"""
    goldfish: GoldfishArgs = field(default_factory=GoldfishArgs)
    """Targets to leave out of the training loss, with sinks or as a baseline without them"""
    watch: WatchArgs = field(default_factory=WatchArgs)
    """What is measured at each validation besides ``val_loss``"""
    launch: LaunchArgs = field(default_factory=LaunchArgs)
    """How several devices train together. Here, because LitGPT's command line has no place of its own for it"""
    storage_options: dict[str, Any] | None = field(default=None, repr=False)
    """How to reach the object store, e.g. ``{"endpoint_url": "http://localhost:9000"}``: arguments of boto3's S3
    client, or of the client that litdata uses for another store. LitGPT prints and logs them with the run, so keep
    secrets in the environment or an AWS profile"""

    def __post_init__(self) -> None:
        """Check the settings as LitGPT does."""
        super().__post_init__()
        self._copy: Path | None = None
        self.same_content = False
        """Whether a state of the training loader is known to be of this stream, wherever that lay when it was saved"""

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Take the settings of the run; a block holds ``max_seq_length + 1`` pairs."""
        super().connect(tokenizer, batch_size, max_seq_length)
        self.seq_length *= 2

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer that made the stream, for a URL that of its local copy."""
        return (self._copy or self._folder()) / TOKENIZER

    def _folder(self) -> Path:
        """The prepared folder; for a URL a local copy of its small files as they are now."""
        if not is_url(self.data_path):
            return Path(self.data_path)
        url = str(self.data_path).rstrip("/")
        check_url(url)
        self._copy = copy_files(
            url,
            [MANIFEST, *(f"{name}/index.json" for name in self.split_names or ())],
            [f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES],
            self.storage_options,
        )
        return self._copy

    def check(
        self, padded_vocab_size: int, block_size: int, batch_size: int, tokenizer_dir: Path | None = None
    ) -> Manifest:
        """Refuse a folder that would train on garbage, before any model is built.

        In an object store, the chunks themselves are not looked at, which would be a request for each: one that is
        missing or cut short fails when its turn comes.

        Args:
            padded_vocab_size: Number of tokens that the model can embed.
            block_size: Tokens in a training row, T.
            batch_size: Rows in a micro batch, B.
            tokenizer_dir: The tokenizer that the run was given, if any.

        Returns:
            The folder's manifest.

        Raises:
            MemSinksError: If a setting is out of range, or the data is missing, plain, half-written, not int32, too
                short for one batch, made with another tokenizer, or holds a token beyond the vocabulary; or if the
                object store cannot be read.
        """
        if self.split_names is None:
            raise MemSinksError("data.split_names is null, but training and validation differ. Use [train, val].")
        if self.num_workers < 0:
            raise MemSinksError(f"data.num_workers is {self.num_workers}, but it must be at least 0.")
        self.watch.check()
        self.goldfish.check(block_size)
        folder, remote = self._folder(), is_url(self.data_path)
        named = str(self.data_path).rstrip("/") if remote else str(folder)
        with _naming(folder, named):
            manifest = Manifest.read(folder)
            if remote and tokenizer_fingerprint(folder / TOKENIZER) != manifest.tokenizer_sha256:
                raise MemSinksError(f"{str(folder / TOKENIZER)!r} did not make the data there. Copy the folder again.")
        if manifest.max_token >= padded_vocab_size:
            raise MemSinksError(
                f"The data at {str(self.data_path)!r} holds token {manifest.max_token}, but the model embeds tokens "
                f"below {padded_vocab_size} only. Prepare the data with the model's tokenizer."
            )
        if tokenizer_dir is not None and (given := tokenizer_fingerprint(tokenizer_dir)) != manifest.tokenizer_sha256:
            raise MemSinksError(
                f"The tokenizer at {str(tokenizer_dir)!r} ({given[:12]}) is not the one that made the data "
                f"({manifest.tokenizer_sha256[:12]}). Leave tokenizer_dir out, or use {str(self.tokenizer_dir)!r}."
            )
        with _naming(folder, named):
            for name in self.split_names:
                _check_index(folder / name, block_size, batch_size)
                if not remote:
                    _check_chunks(folder / name)
        return manifest

    def _dataloader(self, input_dir: str, train: bool) -> DataLoader:
        # LitData's own, restated for the sake of the collate function and the storage options; pinned by test_data.py
        # against LitData's rows
        from litdata.streaming import StreamingDataset, TokensLoader

        from litgpt_memsinks.data.resumable_loader import ResumableLoader

        worker_init_fn = self._prepare_process(input_dir)
        goldfish = train and self.goldfish.k
        dataset = StreamingDataset(
            input_dir=input_dir,
            item_loader=TokensLoader(block_size=self.seq_length),
            shuffle=train,
            seed=self.seed,
            storage_options=self.storage_options or {},
        )
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            pin_memory=torch.cuda.is_available(),
            num_workers=self.num_workers,
            drop_last=True,
            collate_fn=partial(collate_goldfish, goldfish=self.goldfish) if goldfish else collate_pairs,
            worker_init_fn=worker_init_fn,
            same_content=self.same_content and train,
        )

    def _prepare_process(self, input_dir: str) -> Callable[[int], None] | None:
        """Get litdata ready to stream from a store in this process; the same for workers, or ``None``."""
        if not input_dir.startswith("s3://"):
            return None
        from litgpt_memsinks.plain_http import is_plain_http, use_boto

        if not is_plain_http(self.storage_options):
            return None
        use_boto()
        return use_boto


@contextmanager
def _naming(folder: Path, name: str) -> Iterator[None]:
    """Let errors speak of what the user named, not of its local copy."""
    try:
        yield
    except MemSinksError as error:
        raise MemSinksError(str(error).replace(str(folder), name)) from error


def _check_index(folder: Path, block_size: int, batch_size: int) -> None:
    """Refuse a split whose chunks are by their index not int32 or too few for one batch."""
    index = read_index(folder)
    data_format = ", ".join(index["config"]["data_format"])
    if data_format not in INT32_FORMATS:
        raise MemSinksError(f"{str(folder)!r} holds {data_format}, not int32, which cuts IDs short. Prepare it again.")
    blocks = sum(chunk["dim"] // (2 * (block_size + 1)) for chunk in index["chunks"])
    if blocks < batch_size:
        raise MemSinksError(
            f"{str(folder)!r} holds {blocks} blocks of {block_size + 1} tokens, but a micro batch takes {batch_size}. "
            "Prepare more text, or lower train.max_seq_length or train.micro_batch_size."
        )


def _check_chunks(folder: Path) -> None:
    """Refuse a split on disk whose chunks are missing or cut short."""
    for chunk in read_index(folder)["chunks"]:
        if not os.path.isfile(folder / chunk["filename"]):
            raise MemSinksError(f"{str(folder / chunk['filename'])!r} is missing. Copy the folder again.")
        # 32 bit each: the number of documents, where each begins and the last ends, and the stream
        if (folder / chunk["filename"]).stat().st_size != 4 * (2 + chunk["chunk_size"] + chunk["dim"]):
            raise MemSinksError(f"{str(folder / chunk['filename'])!r} is not whole. Copy the folder again.")
