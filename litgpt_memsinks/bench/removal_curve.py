"""What does removing 1, 2, 4, ... documents do to them, and to the others? A measurement, as JSON and as a picture.

For each number of documents some are drawn, their sinks are switched off for good as `remove` does, and every repeated
document is scored with what is left of its own sinks. Beside it as many sinks are switched off at random: what is due
to whose sinks they are, and not to their number.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import pyarrow as pa
import torch

from litgpt_memsinks.data.scored import Scored, read_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.evaluate import score
from litgpt_memsinks.files import incomplete_path, refuse_to_overwrite, write_json
from litgpt_memsinks.model.checkpoint import load_model
from litgpt_memsinks.model.model import GPT, REMOVED, removed_mask
from litgpt_memsinks.remove.pool import expected_coverage, least_shared, masks, union, weights_of_sinks
from litgpt_memsinks.remove.remove import require_sinks
from litgpt_memsinks.sinks.masks import pack_neurons

Kind = Literal["documents", "random", "least_shared"]
REMOVED_COLOUR, OTHERS_COLOUR = "#d55e00", "#0072b2"  # distinguishable for colour-blind readers


@dataclass
class Point:
    """One removal. Losses are means over documents, in nats per token, with each document's own sinks on."""

    kind: Kind
    """Whether all sinks of documents went, or as many at random, or those of them that others use least"""
    documents: int
    """Documents that were removed"""
    draw: int
    """Number of the draw"""
    sinks: int
    """Sinks that were removed, of one MLP"""
    coverage: float
    """Share of all sinks that they are"""
    expected_coverage: float
    """1 - (1 - p)^k"""
    others_lose: float
    """Mean share of their sinks that the other documents lose"""
    removed_own: float
    """Loss of the removed documents"""
    others_own: float
    """Loss of the others"""
    removed_way: float
    """How far the removed documents' loss has come from its own level before (0) to sinks dropped (1)"""
    others_rise: float
    """Rise of the others' loss, over the rise of the removed documents' up to the dropped level"""


def removal_curve(
    checkpoint_dir: Path,
    data_path: Path,
    out_file: Path,
    documents: tuple[int, ...] = (1, 2, 4, 8, 16),
    draws: int = 5,
    seed: int = 0,
    block_size: int | None = None,
    limit: int | None = None,
    max_collateral: float | None = None,
) -> list[Point]:
    """Measure what the removal of single documents does to them and to the others, on the repeated documents.

    Args:
        checkpoint_dir: Checkpoint of a model with sinks.
        data_path: Folder that `prepare` wrote and that the model was trained on.
        out_file: JSON file to write; the picture is beside it, with the ending .png. Neither may exist.
        documents: How many documents to remove at once.
        draws: How often to draw them, for each number.
        seed: Of the draws.
        block_size: Most tokens of a document that are scored. The model's context length by default.
        limit: At most so many repeated documents. All by default.
        max_collateral: If given, `remove --choice least_shared` with this limit is measured as well.

    Returns:
        A point for each number, draw and kind.

    Raises:
        MemSinksError: If the checkpoint has no sinks, there are too few documents, or for bad input.
    """
    picture = out_file.with_suffix(".png")
    if out_file == picture:
        raise MemSinksError(f"out_file is {str(out_file)!r}, but that is the picture's name. Let it end in .json.")
    refuse_to_overwrite(out_file)
    refuse_to_overwrite(picture)
    require_sinks(checkpoint_dir)
    model = load_model(checkpoint_dir)
    assert isinstance(model, GPT)  # it has sinks
    scored = read_scored(data_path, "repeated", limit)
    _check(documents, draws, len(scored.tokens))
    curve = _Curve(model, scored, min(block_size or model.max_seq_length, model.max_seq_length))
    points = list(curve.points(documents, draws, torch.Generator().manual_seed(seed), max_collateral))
    write_json(out_file, {**_header(checkpoint_dir, data_path, curve, seed), "points": [asdict(p) for p in points]})
    _draw(points, picture, len(scored.tokens))
    print(f"Numbers: {out_file}   Picture: {picture}")
    return points


def _check(documents: tuple[int, ...], draws: int, there: int) -> None:
    if draws < 1:
        raise MemSinksError(f"draws is {draws}, but it must be at least 1.")
    for number in documents or (0,):
        if not 1 <= number < there:
            raise MemSinksError(
                f"documents has {number}, but of {there} repeated documents at most {there - 1} can be removed, "
                "so that others stay. Name other numbers."
            )


class _Curve:
    """The measurement.

    Args:
        model: With sinks.
        scored: The repeated documents.
        block_size: Most targets of each.
    """

    def __init__(self, model: GPT, scored: Scored, block_size: int) -> None:
        self.model, self.scored, self.block_size = model, scored, block_size
        self.config = model.config
        self.masks = torch.cat(list(masks(self.config, scored.sequence_ids)))
        self.own = self._losses(torch.zeros(self.config.n_sink, dtype=torch.bool))
        self.dropped = self._scored(model, None)
        if not self.own.mean() < self.dropped.mean():
            raise MemSinksError(
                f"With their own sinks the repeated documents have a loss of {self.own.mean():.3f}, and without "
                f"{self.dropped.mean():.3f}: nothing is in the sinks that could be removed. Check --data_path."
            )

    def points(
        self, numbers: tuple[int, ...], draws: int, generator: torch.Generator, most: float | None = None
    ) -> Iterator[Point]:
        """Remove some documents, then as many random sinks, for each number and draw; with `most`, then a part of them.

        The part are the sinks that others use least, with `most` as the limit of ``pool.least_shared``.
        """
        for number in numbers:
            for draw in range(draws):
                chosen = torch.randperm(len(self.own), generator=generator)[:number]
                gone = union(self.config, self.scored.sequence_ids[chosen].tolist())
                alive = (~removed_mask(self.config)).nonzero().flatten()
                random = torch.zeros_like(gone)
                random[alive[torch.randperm(len(alive), generator=generator)[: int(gone.sum())]]] = True
                point = self._point("documents", chosen, draw, gone)
                print(
                    f"{number} removed, draw {draw + 1} of {draws}: own loss {point.removed_way:.0%} of the way to "
                    f"dropped, the others' rise is {point.others_rise:.1%} of that",
                    flush=True,
                )
                yield point
                yield self._point("random", chosen, draw, random)
                if most is not None:
                    weights = weights_of_sinks(self.config, [self._others(chosen)])
                    yield self._point("least_shared", chosen, draw, least_shared(gone, weights, most))

    def _others(self, chosen: torch.Tensor) -> pa.Table:
        stay = torch.ones(len(self.own), dtype=torch.bool)
        stay[chosen] = False
        return pa.table({"sequence_id": self.scored.sequence_ids[stay].numpy()})

    def _point(self, kind: Kind, chosen: torch.Tensor, draw: int, gone: torch.Tensor) -> Point:
        removed = torch.zeros(len(self.own), dtype=torch.bool)
        removed[chosen] = True
        after = self._losses(gone)
        way = float(self.dropped[removed].mean() - self.own[removed].mean())
        lose = (self.masks & gone).sum(1) / self.masks.sum(1).clamp(min=1)
        return Point(
            kind=kind,
            documents=len(chosen),
            draw=draw,
            sinks=int(gone.sum()),
            coverage=float(gone.double().mean()),
            expected_coverage=expected_coverage(self.config.sink_active_probability, len(chosen)),
            others_lose=float(lose[~removed].mean()),
            removed_own=float(after[removed].mean()),
            others_own=float(after[~removed].mean()),
            removed_way=float(after[removed].mean() - self.own[removed].mean()) / way,
            others_rise=float(after[~removed].mean() - self.own[~removed].mean()) / way,
        )

    def _losses(self, gone: torch.Tensor) -> torch.Tensor:
        """Loss of each document with its own sinks on, but those that are gone; float64 ``(n_documents,)``."""
        model = self.model
        if gone.any():
            model = copy(model)  # the same weights
            model._buffers = dict(model._buffers)
            both = gone | removed_mask(self.config)
            model.config = replace(self.config, sink_removed=pack_neurons(both), sink_removed_documents=1)
            model.register_buffer(REMOVED, both.to(torch.uint8))
        return self._scored(model, self.scored.sequence_ids)

    def _scored(self, model: GPT, sequence_ids: torch.Tensor | None) -> torch.Tensor:
        # numbered, because losses are told by ID, which documents may share
        numbered = Scored(self.scored.tokens, torch.arange(len(self.scored.tokens)))
        found = score(model, numbered, self.block_size, sequence_ids).by_document
        return torch.tensor([found[str(index)] for index in range(len(numbered.tokens))], dtype=torch.float64)


def _header(checkpoint_dir: Path, data_path: Path, curve: _Curve, seed: int) -> dict[str, Any]:
    config = curve.config
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("litgpt-memsinks", "litgpt", "torch")},
        "unit": "nats per token",
        "checkpoint_dir": str(checkpoint_dir),
        "data_path": str(data_path),
        "seed": seed,
        "block_size": curve.block_size,
        "documents": len(curve.own),
        "n_sink": config.n_sink,
        "active_probability": config.sink_active_probability,
        "own": float(curve.own.mean()),
        "dropped": float(curve.dropped.mean()),
    }


def _draw(points: list[Point], path: Path, documents: int) -> None:
    """Both groups against the number of removed documents, mean and range over the draws."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lines = (
        ("documents", "removed_way", "removed documents", REMOVED_COLOUR, "o-"),
        ("documents", "others_rise", "the others", OTHERS_COLOUR, "o-"),
        ("random", "removed_way", "the same documents, random sinks removed instead", REMOVED_COLOUR, "x--"),
        ("random", "others_rise", "the others, random sinks removed instead", OTHERS_COLOUR, "x--"),
        ("least_shared", "removed_way", "removed documents, least shared sinks only", REMOVED_COLOUR, "^:"),
        ("least_shared", "others_rise", "the others, least shared sinks only", OTHERS_COLOUR, "^:"),
    )
    kinds = {point.kind for point in points}
    numbers = sorted({point.documents for point in points})
    for kind, name, label, colour, style in (line for line in lines if line[0] in kinds):
        values = [
            [100 * getattr(p, name) for p in points if p.kind == kind and p.documents == number] for number in numbers
        ]
        axes.plot(numbers, [sum(some) / len(some) for some in values], style, color=colour, label=label)
        axes.fill_between(numbers, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12)
    axes.axhline(10, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set(
        title=f"Removing documents, of {documents} repeated ones",
        xlabel="documents removed at once",
        ylabel="own-sinks loss: % of the way to sinks dropped",
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = incomplete_path(path)
    figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
    scratch.replace(path)
