"""Which penalty and how many iterations should Hard Concrete have? Those that cost least validation loss (App. C)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.results import strict
from litgpt_memsinks.evaluate.subject import Asked, Subject
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.localise.file import provenance
from litgpt_memsinks.localise.frontier import first, sweep
from litgpt_memsinks.localise.hard_concrete import HardConcreteArgs, hard_concrete
from litgpt_memsinks.localise.localise import asked_of, loaded
from litgpt_memsinks.localise.neurons import shape_of, suffixes
from litgpt_memsinks.localise.scores import LocaliseArgs, check_ratio, work
from litgpt_memsinks.progress import progress


def tune_localise(
    checkpoint_dir: Path,
    data_path: Path | None = None,
    documents: Path | None = None,
    validation: Path | None = None,
    number: int = 5,
    penalties: list[float] | None = None,
    iterations: list[int] | None = None,
    ratio: float = 0.05,
    out: Path | None = None,
    prefix_length: int = 32,
    block_size: int | None = None,
    validation_limit: int | None = None,
    first_layer: int = 0,
    settings: HardConcreteArgs | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> HardConcreteArgs:
    """Choose Hard Concrete's penalty and iterations on a few documents, by the validation loss after dropping.

    Each document is localised alone and its neurons are dropped; the validation loss is the mean over the documents.

    Args:
        checkpoint_dir: LitGPT checkpoint of a model without sinks.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        documents: Instead of data_path: file of the texts that were trained on many times.
        validation: With `documents`: file of texts like them that were not trained on.
        number: Repeated documents to tune on, the first ones.
        penalties: λ to try. 100, 500 and 1000 by default, the paper's.
        iterations: Optimizer steps to try. 1000, 2000 and 4000 by default, the paper's. They take as long as the most.
        ratio: Share of each layer's neurons that is dropped.
        out: JSON file for the result. Must not exist.
        prefix_length: Tokens of a document that are given; the others are its memorised suffix.
        block_size: Most targets of a document. The model's context length by default.
        validation_limit: Most validation documents. All by default.
        first_layer: Layers before it are left alone.
        settings: The others of Hard Concrete; its penalty and iterations are not read.
        device: Where to compute, cpu or cuda.
        seed: Of the noise.

    Returns:
        The settings with the chosen penalty and iterations.

    Raises:
        MemSinksError: If the model has sinks or experts, for documents of another tokenizer, or settings out of range.
    """
    grid = _grid(settings or HardConcreteArgs(), penalties or [100.0, 500.0, 1000.0], iterations or [1000, 2000, 4000])
    args = LocaliseArgs(
        mode="per_sequence", prefix_length=prefix_length, block_size=block_size, first_layer=first_layer,
        validation_limit=validation_limit, hard_concrete=grid[-1], seed=seed,
    )  # fmt: skip
    args.check()
    if number < 1:
        raise MemSinksError(f"number is {number}, but it must be at least 1 document.")
    if out is not None:
        refuse_to_overwrite(out)
    subject = Subject.at("tuned", checkpoint_dir)
    asked = asked_of(checkpoint_dir, data_path, documents, validation, None)
    asked.repeated = first(asked.repeated, number)
    model = loaded(subject, asked, device)
    args.check_model(model)
    check_ratio(ratio, shape_of(model)[1])
    found = _search(model, asked, args, grid, ratio)
    chosen = min(found, key=lambda row: (math.isnan(row["validation_loss"]), row["validation_loss"]))
    print(_markdown(found, chosen, ratio, len(asked.repeated.tokens)))
    if out is not None:
        content = {**provenance(subject, asked, args, number), "ratio": ratio, "rows": found, "chosen": chosen}
        write_json(out, strict(content))
        print(f"\nResult: {out}")
    return replace(args.hard_concrete, penalty=chosen["penalty"], iterations=chosen["iterations"])


def _grid(settings: HardConcreteArgs, penalties: list[float], iterations: list[int]) -> list[HardConcreteArgs]:
    """All settings to try, each checked; the iterations of one penalty beside each other, ascending."""
    grid = [replace(settings, penalty=one, iterations=steps) for one in penalties for steps in sorted(iterations)]
    for one in grid:
        one.check()
    return grid


def _search(
    model: BaseGPT, asked: Asked, args: LocaliseArgs, grid: Sequence[HardConcreteArgs], ratio: float
) -> list[dict[str, Any]]:
    """Losses for each setting. A longer training passes through the shorter ones, so each penalty is trained once."""
    block = min(args.block_size or model.max_seq_length, model.max_seq_length)
    batch = suffixes(asked.repeated, range(len(asked.repeated.tokens)), args.prefix_length, block)
    validation = first(asked.validation, args.validation_limit)
    steps = sorted({one.iterations for one in grid})
    penalties = list(dict.fromkeys(one.penalty for one in grid))
    each = work(model, batch, replace(args, hard_concrete=replace(grid[0], iterations=1)))
    rows = []
    with progress("Tuning", each * steps[-1] * len(penalties)) as advance:
        for penalty in penalties:
            settings = replace(grid[0], penalty=penalty)
            trained = hard_concrete(
                model, batch, settings, args.seed, first_layer=args.first_layer, at=steps, on_step=lambda: advance(each)
            )
            rows += [
                {
                    "penalty": penalty,
                    "iterations": done,
                    **_scored(model, asked, validation, scores, ratio, block, args),
                }
                for done, scores in zip(steps, trained, strict=True)
            ]
    return rows


def _scored(
    model: BaseGPT, asked: Asked, validation: Any, scores: torch.Tensor, ratio: float, block: int, args: LocaliseArgs
) -> dict[str, float]:
    (drop,) = sweep(model, asked.repeated, validation, scores, [ratio], block, args)
    return {
        "validation_loss": math.fsum(drop["validation"]) / len(drop["validation"]),
        "repeated_loss": math.fsum(drop["nats"]) / sum(drop["counts"]),
    }


def _markdown(rows: list[dict[str, Any]], chosen: dict[str, Any], ratio: float, number: int) -> str:
    lines = [
        f"Losses in nats per token after {ratio:g} of each layer is dropped, mean over {number} documents.\n",
        "| penalty | iterations | validation | repeated | |",
        "|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        mark = "chosen" if row is chosen else ""
        values = f"{row['validation_loss']:.4f} | {row['repeated_loss']:.4f}"
        lines.append(f"| {row['penalty']:g} | {row['iterations']} | {values} | {mark} |")
    return "\n".join(lines)
