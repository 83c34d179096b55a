"""Measured result: what a checkpoint still knows of the repeated documents, and what that cost in validation loss.

Each document is scored alone, from its first token, over one block. States of a model with sinks (Sec. 5):
``dropped``: no sinks, the model that is released; ``own``: the document's own sinks on, what training has memorised;
``placebo``: the sinks of another document on, which must not help.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from litgpt.model import GPT as BaseGPT
from rich.console import Console
from rich.progress import track
from rich.table import Table

from litgpt_memsinks.checkpoint import load_model
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.manifest import Manifest, tokenizer_fingerprint
from litgpt_memsinks.metrics import document_losses, gap_closed, relative_change
from litgpt_memsinks.model import GPT
from litgpt_memsinks.scored import Scored, pad, read_scored

State = Literal["dropped", "own", "placebo"]


@dataclass
class Loss:
    """A loss with the documents behind it."""

    loss: float
    """Mean over all targets, nats per token"""
    targets: int
    """Number of targets"""
    documents: int
    """Number of documents"""
    by_document: dict[str, float]
    """Sequence ID to the document's own mean, nats per token"""


@dataclass
class Result:
    """Measurements of one checkpoint."""

    checkpoint_dir: str
    """What was evaluated"""
    has_sinks: bool
    """Whether the model has sinks"""
    validation: Loss
    """Validation documents, sinks dropped"""
    repeated: dict[State, Loss]
    """Repeated documents in each state; only ``dropped`` for a model without sinks"""


@torch.inference_mode()
def score(
    model: BaseGPT,
    documents: Scored,
    block_size: int,
    sequence_ids: torch.Tensor | None = None,
    batch_size: int = 32,
    description: str = "Scoring",
) -> Loss:
    """Loss of a model on documents.

    Args:
        model: In eval mode; a model with sinks if ``sequence_ids`` are given.
        documents: What to score.
        block_size: Most targets of a document.
        sequence_ids: IDs whose sinks are on, one per document. ``None``: sinks dropped.
        batch_size: Documents at a time.
        description: Shown beside the progress bar.
    """
    device = next(model.parameters()).device
    # documents of like length together, so that little is computed on padding
    order = sorted(range(len(documents.tokens)), key=lambda index: len(documents.tokens[index]))
    nats = torch.zeros(len(order), dtype=torch.float64)
    counts = torch.zeros(len(order), dtype=torch.int64)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in track(batches, description, transient=True):
        inputs, targets = pad([documents.tokens[index] for index in batch], block_size)
        on = {} if sequence_ids is None else {"sequence_ids": sequence_ids[batch].to(device)}
        losses = document_losses(model(inputs.to(device), **on), targets.to(device))
        nats[batch], counts[batch] = losses[0].cpu(), losses[1].cpu()
    if not counts.sum():
        raise MemSinksError(
            "No document has two tokens or more, so there is nothing to predict. Give longer documents."
        )
    ids = documents.sequence_ids.tolist()
    means = (nats / counts.clamp(min=1)).tolist()
    return Loss(
        loss=float(nats.sum() / counts.sum()),
        targets=int(counts.sum()),
        documents=len(ids),
        by_document={str(ids[index]): means[index] for index in range(len(ids)) if counts[index]},
    )


def placebo_ids(sequence_ids: torch.Tensor) -> torch.Tensor:
    """Give each document the ID of another one: its predecessor's. A single document gets one that nobody has."""
    if len(sequence_ids) == 1:
        return sequence_ids ^ 1 << 16
    return sequence_ids.roll(1)


def evaluate_checkpoint(
    checkpoint_dir: Path, data_path: Path, block_size: int | None = None, limit: int | None = None, device: str = "cpu"
) -> Result:
    """Measure one checkpoint on the repeated and the validation documents of a prepared folder.

    Args:
        checkpoint_dir: A LitGPT checkpoint, with sinks or plain.
        data_path: The prepared folder that names the repeated documents.
        block_size: Most targets of a document; the model's context length by default.
        limit: Most documents of each kind.
        device: Where to compute.
    """
    for setting, value in (("block_size", block_size), ("limit", limit)):
        if value is not None and value < 1:
            raise MemSinksError(f"{setting} is {value}, but it must be at least 1.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MemSinksError(f"device is {device!r}, but this machine has no usable GPU. Use --device cpu.")
    model = load_model(checkpoint_dir).to(device)
    _check_same_tokenizer(checkpoint_dir, data_path, model)
    block_size = min(block_size or model.max_seq_length, model.max_seq_length)
    repeated = read_scored(data_path, "repeated", limit)
    validation = read_scored(data_path, "val", limit)
    has_sinks = isinstance(model, GPT) and model.config.n_sink > 0
    states: dict[State, torch.Tensor | None] = {"dropped": None}
    if has_sinks:
        states |= {"own": repeated.sequence_ids, "placebo": placebo_ids(repeated.sequence_ids)}
    name = checkpoint_dir.parent.name if checkpoint_dir.name == "final" else checkpoint_dir.name
    return Result(
        checkpoint_dir=str(checkpoint_dir),
        has_sinks=has_sinks,
        validation=score(model, validation, block_size, description=f"{name}: validation"),
        repeated={
            state: score(model, repeated, block_size, ids, description=f"{name}: repeated, {state}")
            for state, ids in states.items()
        },
    )


def _check_same_tokenizer(checkpoint_dir: Path, data_path: Path, model: BaseGPT) -> None:
    """Refuse data of another tokenizer, whose tokens mean nothing to the model."""
    manifest = Manifest.read(data_path)
    size = model.config.padded_vocab_size
    assert size is not None  # set by Config.__post_init__
    if manifest.max_token >= size:
        raise MemSinksError(
            f"{str(data_path)!r} holds token {manifest.max_token}, but {str(checkpoint_dir)!r} embeds tokens below "
            f"{size} only. Name the data that the model was trained on."
        )
    if any((checkpoint_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        given = tokenizer_fingerprint(checkpoint_dir)
        if given != manifest.tokenizer_sha256:
            raise MemSinksError(
                f"The tokenizer of {str(checkpoint_dir)!r} ({given[:12]}) is not the one that made {str(data_path)!r} "
                f"({manifest.tokenizer_sha256[:12]}). Name the data that the model was trained on."
            )


def evaluate(
    checkpoint_dir: Path,
    data_path: Path,
    standard: Path | None = None,
    left_out: Path | None = None,
    out_file: Path | None = None,
    block_size: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> None:
    """Measure what a checkpoint remembers of the repeated documents, and print a table.

    Args:
        checkpoint_dir: Checkpoint to measure, with sinks or plain.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        standard: Checkpoint of standard training on the same stream: 0% of the gap closed.
        left_out: Checkpoint of training without the repeated documents: 100% of the gap closed.
        out_file: JSON file for the result, with per-document losses. Must not exist.
        block_size: Most tokens of a document that are scored. The model's context length by default.
        limit: Most documents of each kind. All by default.
        device: Where to compute, cpu or cuda.
    """
    if out_file is not None:
        refuse_to_overwrite(out_file)
    given = {"standard": standard, "left_out": left_out, "evaluated": checkpoint_dir}
    results = {
        arm: evaluate_checkpoint(path, data_path, block_size, limit, device)
        for arm, path in given.items()
        if path is not None
    }
    print_results([results])
    if out_file is not None:
        write_results(out_file, [results], data_path)
        print(f"Per-document losses: {out_file}")


def write_results(out_file: Path, seeds: list[dict[str, Result]], data_path: Path) -> None:
    """Write results, one mapping from arm to result per seed, as JSON."""
    packages = ("litgpt-memsinks", "litgpt", "litdata", "lightning", "torch")
    write_json(
        out_file,
        {
            "versions": {name: version(name) for name in packages},
            "data_path": str(data_path),
            "unit": "nats per token",
            "comparison": _strict([asdict(row) for row in compare(seeds)]),
            "seeds": _strict([{arm: asdict(result) for arm, result in results.items()} for results in seeds]),
        },
    )


def _strict(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have: what does not apply, or a run that diverged."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass
class Row:
    """One arm of a comparison, one value per seed in each list; NaN (in JSON null) where it does not apply.

    Losses in nats per token. ``validation_change`` is relative to the standard arm of the same seed.
    ``repeated_ratio`` is the paper's figure: the loss on repeated documents over that of a model that never saw them
    (Fig. 4b: about 0.66).
    """

    arm: str
    validation: list[float]
    validation_change: list[float]
    repeated: list[float]
    repeated_ratio: list[float]
    own: list[float]
    placebo: list[float]
    gap_closed: list[float]


def compare(seeds: list[dict[str, Result]]) -> list[Row]:
    """Set each arm against the ``standard`` and ``left_out`` arms of its seed.

    Args:
        seeds: One mapping from arm to result per seed.
    """
    return [
        Row(
            arm=arm,
            validation=[results[arm].validation.loss for results in seeds],
            validation_change=[_change(results, arm) for results in seeds],
            repeated=[results[arm].repeated["dropped"].loss for results in seeds],
            repeated_ratio=[_ratio(results, arm) for results in seeds],
            own=[_state(results[arm], "own") for results in seeds],
            placebo=[_state(results[arm], "placebo") for results in seeds],
            gap_closed=[_gap(results, arm) for results in seeds],
        )
        for arm in seeds[0]
    ]


def _state(result: Result, state: State) -> float:
    return result.repeated[state].loss if state in result.repeated else math.nan


def _change(results: dict[str, Result], arm: str) -> float:
    if "standard" not in results:
        return math.nan
    return relative_change(results[arm].validation.loss, results["standard"].validation.loss)


def _ratio(results: dict[str, Result], arm: str) -> float:
    if "left_out" not in results:
        return math.nan
    return results[arm].repeated["dropped"].loss / results["left_out"].repeated["dropped"].loss


def _gap(results: dict[str, Result], arm: str) -> float:
    if not {"standard", "left_out"} <= set(results):
        return math.nan
    losses = [results[name].repeated["dropped"].loss for name in (arm, "standard", "left_out")]
    return gap_closed(*losses)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / max(len(values) - 1, 1))


def print_results(seeds: list[dict[str, Result]]) -> None:
    """Print the comparison, with what each column means."""
    rows = compare(seeds)
    terminal = Console()
    # a log file or a pipe has no width: do not squeeze the table into rich's 80 columns there
    console = terminal if terminal.is_terminal else Console(width=150)
    table = Table(
        title=f"Loss in nats per token, sinks dropped unless said ({len(seeds)} seed(s))", title_justify="left"
    )
    table.add_column("arm")
    for name in ("validation", "vs standard", "repeated", "of unseen", "own sinks", "placebo", "gap closed"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.arm,
            _cell(row.validation, ".3f"),
            _cell(row.validation_change, "+.1%"),
            _cell(row.repeated, ".3f"),
            _cell(row.repeated_ratio, ".0%"),
            _cell(row.own, ".3f"),
            _cell(row.placebo, ".3f"),
            _cell(row.gap_closed, ".0%"),
        )
    console.print(table)
    print(
        "repeated:    documents that were trained on many times; higher is more forgotten\n"
        "of unseen:   that loss, as a share of the loss of a model that never saw them\n"
        "own sinks:   the same with their own sinks on: what training memorised\n"
        "placebo:     the same with another document's sinks on\n"
        "gap closed:  how far the loss on repeated documents is from standard training's (0%)\n"
        "             to that of a model that never saw them (100%)"
    )


def _cell(values: list[float], spec: str) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    spread = f" ± {format(deviation(values), spec.lstrip('+'))}" if len(values) > 1 else ""
    return format(mean(values), spec) + spread
