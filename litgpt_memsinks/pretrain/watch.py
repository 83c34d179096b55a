"""What does one watch while a run with sinks trains? Whether it memorises into the sinks, and only there.

At each of LitGPT's validations, a fixed sample of repeated and of validation documents is scored as `evaluate.py` does
at the end: each alone, from its first token, over one block. Losses are means over tokens, in nats per token.

    val/SET/dropped            a validation set, sinks dropped
    memorised/dropped, /own    the repeated documents, sinks dropped, and with their own sinks on
    memorised/SOURCE/...       the same for each source, where several repeat
    gap/SET                    val/SET/dropped - memorised/dropped, algebraically: what is remembered without sinks

The passes run eagerly: one more shape would have the training step compiled anew, and compiled otherwise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from litgpt_memsinks.data.scored import Scored, ScoredSplit, count_scored, pad, sample_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.metrics import IGNORED, token_losses
from litgpt_memsinks.prepare.manifest import EVALUATION, Manifest
from litgpt_memsinks.pretrain.launch import together
from litgpt_memsinks.pretrain.run import Run
from litgpt_memsinks.remote import is_url

Validate = Callable[..., torch.Tensor]


@dataclass
class Watched:
    """The documents that are watched, a row each; sets and sources follow one another.

    Attributes:
        inputs: Tokens, int64 ``(N, T)``, padded on the right to the longest document, one block at most.
        targets: Tokens to predict, same shape; ``IGNORED`` where there is none.
        sequence_ids: int64 ``(N,)``.
        sets: Name of each validation set to its rows.
        sources: Name of each source with repeated documents to its rows.
        own: Whether the repeated documents were trained with sinks of their own, so that these are measured, too.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    sets: dict[str, range]
    sources: dict[str, range]
    own: bool

    @classmethod
    def of(cls, drawn: dict[tuple[str, str], Scored], block_size: int, own: bool) -> "Watched":
        """Make rows of documents.

        Args:
            drawn: (split, source) to documents, see ``sample_scored``.
            block_size: Most targets of a document.
            own: As the attribute.
        """
        documents = [tokens for scored in drawn.values() for tokens in scored.tokens]
        ids = [scored.sequence_ids for scored in drawn.values()]
        named: dict[str, dict[str, range]] = {"val": {}, "repeated": {}}
        start = 0
        for (split, source), scored in drawn.items():
            named[split][source] = range(start, start := start + len(scored.tokens))
        return cls(*pad(documents, block_size), torch.cat(ids), named["val"], named["repeated"], own)

    @property
    def repeated(self) -> list[int]:
        """Rows of the repeated documents."""
        return [row for rows in self.sources.values() for row in rows]


def mean_loss(nats: torch.Tensor, counts: torch.Tensor, rows: Sequence[int]) -> float:
    """Nats per token over some documents: the sum of their losses by the number of their targets."""
    chosen = list(rows)
    return float(nats[chosen].sum() / counts[chosen].sum())


def watched_values(
    watched: Watched, counts: torch.Tensor, dropped: torch.Tensor, own: torch.Tensor | None
) -> dict[str, float]:
    """What is logged.

    Args:
        watched: The documents.
        counts: Targets of each row, int64 ``(N,)``.
        dropped: Sum of each row's losses with sinks dropped, nats, float64 ``(N,)``.
        own: The same with the documents' own sinks on; ``None`` where they have none.

    Returns:
        Name to nats per token.
    """
    values = {f"val/{name}/dropped": mean_loss(dropped, counts, rows) for name, rows in watched.sets.items()}
    if not watched.sources:
        return values
    groups: dict[str, Sequence[int]] = {"memorised": watched.repeated}
    if len(watched.sources) > 1:
        groups |= {f"memorised/{name}": rows for name, rows in watched.sources.items()}
    for name, rows in groups.items():
        values[f"{name}/dropped"] = mean_loss(dropped, counts, rows)
        if own is not None:
            values[f"{name}/own"] = mean_loss(own, counts, rows)
    gaps = {f"gap/{name}": values[f"val/{name}/dropped"] - values["memorised/dropped"] for name in watched.sets}
    return values | gaps


def passes(rows: int, batch_size: int, world_size: int) -> int:
    """Forward passes of each rank over so many rows: the same number on all, or FSDP would wait for ever."""
    return math.ceil(math.ceil(rows / batch_size) / world_size)


class Watch:
    """Measures and logs what is watched, after each of LitGPT's validations.

    Args:
        run: The run.
        validate: LitGPT's own function.
    """

    def __init__(self, run: Run, validate: Validate) -> None:
        self.run, self.base_validate = run, validate
        self.watched: Watched | None = None
        self.values: dict[str, float] = {}
        self._measured_at: int | None = None  # iter_num of `values`, or with which training began

    def validate(
        self, fabric: L.Fabric, model: nn.Module, val_dataloader: DataLoader, max_iters: int, verbose: bool = True
    ) -> torch.Tensor:
        """LitGPT's ``validate`` and its value; what is watched is logged by the way.

        Not in LitGPT's sanity check, which has ``verbose=False``.
        """
        if self._measured_at is None:
            self.start()
        val_loss = self.base_validate(fabric, model, val_dataloader, max_iters=max_iters, verbose=verbose)
        iter_num = self.run.state["iter_num"]
        if verbose and self.watched is not None:
            step = iter_num if self._is_final(iter_num) else max(iter_num - 1, 0)
            if iter_num != self._measured_at or not self.values:  # else nothing was trained in between
                self.values = self.measure(self.watched, model)
            fabric.log_dict(self.values, step=step)
            shown = " | ".join(f"{name} {value:.3f}" for name, value in self.values.items())
            fabric.print(f"iter {iter_num}: {shown}")
        self._measured_at = iter_num
        return val_loss

    def _is_final(self, iter_num: int) -> bool:
        """Whether this is the validation behind LitGPT's loop, which it logs one step later than those within."""
        if self._measured_at is None:
            return False  # before the loop
        accumulation = self.run.train.gradient_accumulation_iters(self.run.devices, self.run.num_nodes)
        due = iter_num % accumulation == 0 and self.run.state["step_count"] % self.run.eval.interval == 0
        return not due or iter_num == self._measured_at

    # ------------------------------------------------------------------------------------------------------- reading

    def start(self) -> None:
        """Read the documents, on rank 0 for all, and say what watching them costs.

        Raises:
            MemSinksError: On all ranks, if they cannot be read.
        """
        fabric = self.run.fabric
        found: Watched | str | MemSinksError = ""
        if fabric.global_rank == 0:
            try:
                found = self._read()
            except MemSinksError as error:
                found = error
        found = fabric.broadcast(found)
        if isinstance(found, MemSinksError):
            with together(fabric):
                raise found
        if isinstance(found, str):
            fabric.print(f"Watching nothing: {found}")
        else:
            self.watched = found
            fabric.print(self.cost(found))

    def _read(self) -> Watched | str:
        """The documents, or why there are none."""
        run, args = self.run, self.run.data.watch
        if not args.documents and not args.validation_documents:
            return "data.watch.documents and data.watch.validation_documents are 0."
        path = args.evaluation_file
        if path is None:
            if is_url(run.data.data_path):
                return (
                    f"{EVALUATION} is not read from an object store. Copy it to this machine, such as: aws s3 cp "
                    f"{str(run.data.data_path).rstrip('/')}/{EVALUATION} . and set data.watch.evaluation_file."
                )
            path = Path(run.data.data_path) / EVALUATION
        if not path.is_file():
            if args.evaluation_file is not None:
                raise MemSinksError(
                    f"data.watch.evaluation_file is {str(path)!r}, which is no file. Copy the prepared data's "
                    f"{EVALUATION} there, or leave the setting out."
                )
            return f"{str(path)!r} is missing. Copy it from where the data was prepared, or prepare the data again."
        block_size = run.train.max_seq_length or run.config.block_size
        numbers: dict[ScoredSplit, int] = {"repeated": args.documents, "val": args.validation_documents}
        drawn = sample_scored(path, numbers, args.seed, block_size + 1)
        manifest = Manifest.read(run.data.tokenizer_dir.parent)
        self._check(path, drawn, manifest)
        if not drawn:
            return f"{str(path)!r} holds no documents of the kinds that data.watch asks for."
        own = run.config.n_sink > 0 and not manifest.recipe["leave_out_repeated"]
        return Watched.of(drawn, block_size, own)

    def _check(self, path: Path, drawn: dict[tuple[str, str], Scored], manifest: Manifest) -> None:
        """Refuse documents of other data than the run's."""
        size = self.run.config.padded_vocab_size
        assert size is not None  # set by Config.__post_init__
        there, promised = count_scored(path, "val"), manifest.splits["val"].documents
        if there != promised:
            raise MemSinksError(
                f"{str(path)!r} holds {there:,} validation documents, but the data at {str(self.run.data.data_path)!r} "
                f"{promised:,}. Take the file from there."
            )
        largest = max((int(tokens.max()) for scored in drawn.values() for tokens in scored.tokens), default=0)
        if largest >= size:
            raise MemSinksError(
                f"{str(path)!r} holds token {largest}, but the model embeds tokens below {size} only. Take the file "
                f"from {str(self.run.data.data_path)!r}."
            )

    def cost(self, watched: Watched) -> str:
        """One line: how many forward passes each validation takes on each rank, besides LitGPT's own."""
        run, world_size = self.run, self.run.fabric.world_size
        batch_size, width = run.train.micro_batch_size, watched.inputs.size(1)
        repeated = len(watched.repeated)
        n_passes = passes(len(watched.inputs), batch_size, world_size)
        n_passes += passes(repeated, batch_size, world_size) if watched.own else 0
        block_size = run.train.max_seq_length or run.config.block_size
        share = n_passes * width / (run.eval.max_iters * block_size)
        return (
            f"Watching {repeated} repeated and {len(watched.inputs) - repeated} validation documents: each validation "
            f"takes {n_passes} more forward passes of {batch_size} x {width} tokens on each device, {share:.0%} of the "
            f"tokens of LitGPT's own (eval.max_iters {run.eval.max_iters} x {batch_size} x {block_size})."
        )

    # ----------------------------------------------------------------------------------------------------- measuring

    def measure(self, watched: Watched, model: nn.Module) -> dict[str, float]:
        """Score the documents, each rank its share of them, and give every rank all values.

        Args:
            watched: The documents.
            model: As LitGPT's ``validate`` gets it. In training mode afterwards, as after that.
        """
        counts = (watched.targets != IGNORED).sum(1)
        own = None
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            dropped = self._score(watched, list(range(len(counts))), model, own=False)
            if watched.own and watched.sources:
                own = self._score(watched, watched.repeated, model, own=True)
        model.train()
        return watched_values(watched, counts, dropped, own)

    def _score(self, watched: Watched, rows: list[int], model: nn.Module, own: bool) -> torch.Tensor:
        """Sum of each row's losses, nats, float64 ``(N,)`` on the CPU; 0 for rows that are not asked for."""
        fabric = self.run.fabric
        nats = torch.zeros(len(watched.inputs), dtype=torch.float64)
        for batch in self._batches(rows):
            inputs, targets, ids = _filled(watched, batch, self.run.train.micro_batch_size)
            on = {"sequence_ids": ids.to(fabric.device)} if own else {}
            logits = model(inputs.to(fabric.device), **on)
            targets = targets.to(fabric.device)
            # a row at a time: cross entropy copies the logits
            losses = [token_losses(*row) for row in zip(logits.split(1), targets.split(1), strict=True)]
            nats[batch] = torch.cat(losses).cpu().double().sum(1)[: len(batch)]
        if fabric.world_size > 1:
            summed = fabric.all_reduce(nats.to(fabric.device), reduce_op="sum")
            assert isinstance(summed, torch.Tensor)  # as what it was given
            nats = summed.cpu()
        return nats

    def _batches(self, rows: list[int]) -> Iterator[list[int]]:
        """The batches of this rank. They are the same whatever the number of ranks; the last one may be empty."""
        size, world_size = self.run.train.micro_batch_size, self.run.fabric.world_size
        for turn in range(passes(len(rows), size, world_size)):
            start = (turn * world_size + self.run.fabric.global_rank) * size
            yield rows[start : start + size]


def _filled(watched: Watched, batch: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a batch, and rows without targets behind them up to its size."""
    width = watched.inputs.size(1)
    inputs = torch.zeros(size, width, dtype=torch.int64)
    targets = torch.full((size, width), IGNORED)
    ids = torch.zeros(size, dtype=torch.int64)
    inputs[: len(batch)], targets[: len(batch)] = watched.inputs[batch], watched.targets[batch]
    ids[: len(batch)] = watched.sequence_ids[batch]
    return inputs, targets, ids
