"""How did it come to be? Losses at every checkpoint that a run has kept."""

import re
from pathlib import Path
from typing import Any

import yaml

from litgpt_memsinks.data.scored import Scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.battery import Kept, Plan
from litgpt_memsinks.evaluate.subject import RECIPE, Asked, Subject, key_of
from litgpt_memsinks.model.losses import document_nats, has_sinks

_STEP = re.compile(r"step-(\d+)")


def step_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Optimizer step and folder of the checkpoints of a run, in order.

    Raises:
        MemSinksError: If there are none.
    """
    found = [(int(match[1]), path) for path in run_dir.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    if not found:
        raise MemSinksError(
            f"{str(run_dir)!r} has no step-* checkpoints to draw a curve of. Train with --train.save_interval STEPS."
        )
    return sorted(found)


def measure_curve(run_dir: Path, asked: Asked, plan: Plan, device: str, kept: Kept) -> list[dict[str, Any]]:
    """Validation and repeated loss at each ``step-*`` checkpoint, sinks dropped, and with their own on.

    Raises:
        MemSinksError: If there are none, or one cannot be read.
    """
    points = []
    for step, path in step_checkpoints(run_dir):
        subject = Subject.at(path.name, path)
        key = key_of(unit="curve", model=subject.fingerprint(), data=asked.fingerprint(), block=plan.block_size)
        point, _ = kept.get(key, lambda subject=subject: _point(subject, asked, plan, device))  # type: ignore[misc]
        per_step = _tokens_per_step(path)
        points.append({"step": step, "tokens": None if per_step is None else step * per_step, **point})
    return points


def _point(subject: Subject, asked: Asked, plan: Plan, device: str) -> dict[str, Any]:
    model = subject.load(device)
    subject.check(model, asked)

    def loss(documents: Scored, own: bool) -> float:
        ids = documents.sequence_ids if own else None
        nats, counts = document_nats(model, documents, plan.block(model), ids)
        return float(nats.sum() / counts.sum())

    return {
        "validation": loss(asked.validation, own=False),
        "repeated_dropped": loss(asked.repeated, own=False),
        "repeated_own": loss(asked.repeated, own=True) if has_sinks(model) else None,
    }


def _tokens_per_step(checkpoint_dir: Path) -> int | None:
    """From what LitGPT has written down of the run; ``None`` if it does not say."""
    try:
        train = yaml.safe_load((checkpoint_dir / RECIPE).read_text(encoding="utf-8"))["train"]
        return int(train["global_batch_size"]) * int(train["max_seq_length"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
