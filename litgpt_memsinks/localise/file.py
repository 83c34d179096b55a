"""The result of a localisation: a JSON file with what was found, and the scores beside it. docs/localisation.md."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt_memsinks.digests import file_sha256
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.results import strict
from litgpt_memsinks.evaluate.subject import Asked, Subject
from litgpt_memsinks.files import clear_stale, incomplete_path, write_json
from litgpt_memsinks.localise.frontier import Localised, Point
from litgpt_memsinks.localise.scores import LocaliseArgs
from litgpt_memsinks.metrics import degradation, sequence_forgetting

FORMAT = 1
KIND = "litgpt-memsinks localise"
_PACKAGES = ("litgpt-memsinks", "litgpt", "litdata", "lightning", "torch")


def scores_file(out: Path) -> Path:
    """Where the scores are: float32 ``(N, L, d_ff)`` in NumPy's format. Without the result they are a killed run's."""
    return out.with_name(f"{out.name}.scores.npy")


def provenance(subject: Subject, asked: Asked, args: Any, limit: int | None) -> dict[str, Any]:
    """What makes the numbers reproducible."""
    return {
        "kind": KIND,
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": {name: version(name) for name in _PACKAGES},
        "unit": "nats per token",
        "checkpoint": {"dir": str(subject.checkpoint_dir), "sha256": subject.sha256, "seed": subject.seed},
        "data": {
            "path": asked.path,
            "manifest_sha256": asked.manifest_sha256,
            "documents_sha256": asked.fingerprint(),
            "repeated": len(asked.repeated.tokens),
            "validation": len(asked.validation.tokens),
        },
        "settings": {**asdict(args), "limit": limit},
    }


def write_localised(
    out: Path, subject: Subject, asked: Asked, args: LocaliseArgs, limit: int | None, found: Localised, seconds: float
) -> None:
    """Write both files; the one that names the other appears last. Points are against the first, of ratio 0."""
    scores = scores_file(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_scores(scores, found.scores)
    _, layers, width = found.scores.shape
    content = {
        **provenance(subject, asked, args, limit),
        "seconds": round(seconds, 3),
        "neurons": {"layers": layers, "per_layer": width, "first_layer": args.first_layer},
        "scores": {"file": scores.name, "sha256": file_sha256(scores), "shape": list(found.scores.shape)},
        "points": rows(found.points),
        "documents": _documents(asked, found),
    }
    write_json(out, strict(content))


def _write_scores(path: Path, scores: torch.Tensor) -> None:
    clear_stale(path)
    scratch = incomplete_path(path)
    with open(scratch, "wb") as file:
        np.save(file, scores.numpy())
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _documents(asked: Asked, found: Localised) -> list[dict[str, Any]]:
    """One for each repeated document; lists have a value for each ratio."""
    pooled = len(found.scores) == 1
    return [
        {
            "sequence_id": int(asked.repeated.sequence_ids[row]),
            "targets": found.counts[row],
            "loss": [losses[row] for losses in found.losses],
            "validation_loss": [losses[0 if pooled else row] for losses in found.validation_losses],
        }
        for row in range(len(asked.repeated.tokens))
    ]


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points with their forgetting and degradation against the first one."""
    before = points[0]
    return [
        {
            **asdict(point),
            "forgetting": sequence_forgetting(point.repeated_loss, before.repeated_loss),
            "degradation": degradation(before.validation_loss, point.validation_loss),
        }
        for point in points
    ]


def markdown(points: Sequence[Point]) -> str:
    """The frontier as a Markdown table."""
    lines = [
        "| dropped of each layer | repeated | forgetting | validation | degradation | extracted |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows(points):
        extracted = "–" if row["extraction"] is None else f"{row['extraction']:.0%}"
        lines.append(
            f"| {row['ratio']:.3g} | {row['repeated_loss']:.3f} | {row['forgetting']:+.3f} "
            f"| {row['validation_loss']:.3f} | {row['degradation']:+.3f} | {extracted} |"
        )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Scores:
    """What a result file says of neurons.

    Attributes:
        values: ``(N, L, d_ff)``, float32.
        sequence_ids: Of the documents of the rows; empty if there is one row for all.
        content: The whole file.
    """

    values: torch.Tensor
    sequence_ids: list[int]
    content: dict[str, Any]

    @property
    def checkpoint_sha256(self) -> str:
        """Of the weights that were localised in."""
        return self.content["checkpoint"]["sha256"]

    @property
    def first_layer(self) -> int:
        """Layers before it lose no neuron."""
        return self.content["neurons"]["first_layer"]


def read_scores(path: Path) -> Scores:
    """Read a result file of `localise` and its scores.

    Raises:
        MemSinksError: If it is none, or the scores are not those it was written with.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemSinksError(f"{str(path)!r} cannot be read ({error}). Name the file that `localise` wrote.") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise MemSinksError(f"{str(path)!r} is not a result of `litgpt-memsinks localise`. Name the file of --out.")
    if content["format"] != FORMAT:
        raise MemSinksError(f"{str(path)!r} has format {content['format']}, but this release reads {FORMAT} only.")
    scores = path.parent / content["scores"]["file"]
    if not scores.is_file() or file_sha256(scores) != content["scores"]["sha256"]:
        raise MemSinksError(f"{str(scores)!r} is missing or not what {path.name} was written with. Copy both again.")
    values = torch.from_numpy(np.load(scores))
    pooled = content["settings"]["mode"] == "pooled"
    return Scores(values, [] if pooled else [one["sequence_id"] for one in content["documents"]], content)
