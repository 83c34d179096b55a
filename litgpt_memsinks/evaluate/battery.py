"""Which parts are measured of a model, in which order, and what is kept of them when the process is killed."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.extraction import attempts, measure_extraction
from litgpt_memsinks.evaluate.membership import measure_tokens
from litgpt_memsinks.evaluate.relearning import MEASURED, measure_calibrated, measure_quantised, measure_relearning
from litgpt_memsinks.evaluate.subject import Asked, Subject, key_of
from litgpt_memsinks.files import write_json
from litgpt_memsinks.model.losses import STATES, has_own_sinks, has_sinks, measure_losses
from litgpt_memsinks.version import __version__

PARTS = ("losses", "extraction", "teacher_forced", "membership", "relearning", "calibrated", "quantised")
GATE_LEVEL = 0.99


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long one looks at it."""

    parts: tuple[str, ...] = PARTS
    """Of ``PARTS``"""
    block_size: int | None = None
    """Most targets of a document; the model's context length by default"""
    seed: int = 0
    """Of the shuffled IDs and the random neurons"""
    relearn_documents: tuple[int, ...] = (1, 4, 16)
    """Documents to relearn from, one run each"""
    relearn_steps: int = 40
    """Optimizer steps of a run"""

    def block(self, model: BaseGPT) -> int:
        """Most targets of a document that this model is asked for."""
        return min(self.block_size or model.max_seq_length, model.max_seq_length)


@dataclass
class Measured:
    """One model with what was found, as lists over documents.

    Attributes:
        subject: The model.
        described: Facts about it.
        found: Part to what its function returned; ``tokens`` serves both ``teacher_forced`` and ``membership``.
        seconds: Part to the time it took.
        skipped: Part to why there is nothing.
        gate: Own and placebo loss and whether they are apart; ``None`` where documents have no sinks of their own.
        curve: Losses at the run's checkpoints.
    """

    subject: Subject
    described: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    curve: list[dict[str, Any]] | None = None


class Kept:
    """Finished measurements in a folder, each in a file that appears only when it is whole.

    Args:
        folder: Where they are; ``None`` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        """What was found before under this key, or what ``compute`` finds now; and the seconds it took then."""
        path = None if self.folder is None else self.folder / f"{key}.json"
        if path is not None and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["found"], content["seconds"]
        started = time.monotonic()
        found = compute()
        seconds = round(time.monotonic() - started, 3)
        if path is not None:
            write_json(path, {"found": found, "seconds": seconds})
        return found, seconds

    def clear(self) -> None:
        """Remove them: the result is written."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


def units(plan: Plan) -> list[str]:
    """What is computed for the parts asked for; losses always come first: the gate reads them."""
    wanted = ["losses"] + ["extraction"] * ("extraction" in plan.parts)
    wanted += ["tokens"] * bool({"teacher_forced", "membership"} & set(plan.parts))
    return wanted + [part for part in ("relearning", "calibrated", "quantised") if part in plan.parts]


def cost(unit: str, asked: Asked, plan: Plan, with_sinks: bool) -> float:
    """Tokens that pass through the model, a backward pass as two forward ones: what the time left is told from."""
    repeated, validation = (sum(map(len, part.tokens)) for part in (asked.repeated, asked.validation))
    bounded = (
        (repeated + validation) * MEASURED / max(len(asked.repeated.tokens), len(asked.validation.tokens), MEASURED)
    )
    if unit == "losses":
        return (len(STATES) * repeated + 2 * validation) if with_sinks else repeated + validation
    if unit == "extraction":
        # a token at a time costs several times as much as many together
        return sum(8 * (one.prefix + one.suffix) * len(asked.repeated.tokens) for one in attempts(with_sinks))
    if unit == "tokens":
        return 2 * (repeated + validation) * (1 + with_sinks)
    if unit == "relearning":
        length = repeated / len(asked.repeated.tokens)
        taught = sum(3 * min(16, n) * length * plan.relearn_steps for n in plan.relearn_documents)
        return taught + len(plan.relearn_documents) * bounded * (plan.relearn_steps / 5 + 1)
    return 2 * bounded if unit == "calibrated" else repeated + validation


def measure(
    subject: Subject,
    asked: Asked,
    plan: Plan,
    device: str,
    kept: Kept,
    allow_wrong_map: bool,
    on_unit: Callable[[str, float], None] = lambda unit, done: None,
) -> Measured:
    """Measure one model.

    Args:
        subject: The model.
        asked: The documents.
        plan: What to measure.
        device: Where to compute.
        kept: What is finished already.
        allow_wrong_map: Go on where the gate says that the IDs are not the model's.
        on_unit: Called with the name of what is computed next, and with the cost of what is done.

    Raises:
        MemSinksError: If the documents are not the model's, or the gate fails.
    """
    model = subject.load(device)
    subject.check(model, asked)
    measured = Measured(subject, subject.described(model))
    block = plan.block(model)
    compute: dict[str, Callable[[], Any]] = {
        "losses": lambda: measure_losses(model, asked.repeated, asked.validation, block, plan.seed),
        "extraction": lambda: measure_extraction(model, asked.repeated, plan.seed),
        "tokens": lambda: measure_tokens(model, asked.repeated, asked.validation, block, plan.seed),
        "relearning": lambda: measure_relearning(
            model, asked.repeated, asked.validation, block, plan.relearn_documents, plan.relearn_steps
        ),
        "calibrated": lambda: measure_calibrated(model, asked.repeated, asked.validation, block),
        "quantised": lambda: measure_quantised(model, asked.repeated, asked.validation, block),
    }
    done = 0.0
    for unit in units(plan):
        on_unit(f"{subject.arm}: {unit}", done)
        key = key_of(
            unit=unit, model=subject.fingerprint(), data=asked.fingerprint(), block=block, seed=plan.seed,
            relearn=[plan.relearn_documents, plan.relearn_steps] * (unit == "relearning"), package=__version__,
            device=device,
        )  # fmt: skip
        measured.found[unit], measured.seconds[unit] = kept.get(key, compute[unit])
        done = cost(unit, asked, plan, has_sinks(model))
        if unit == "losses" and has_own_sinks(model):
            measured.gate = gate(measured.found["losses"]["repeated"])
            if not measured.gate["pass"] and not allow_wrong_map:
                raise MemSinksError(wrong_map(subject, measured.gate))
    on_unit("", done)
    _note_what_is_missing(measured, asked)
    return measured


def _note_what_is_missing(measured: Measured, asked: Asked) -> None:
    """Say why a part that was asked for is empty."""
    found = measured.found
    if found.get("extraction") == []:
        longest = max(len(tokens) for tokens in asked.repeated.tokens)
        measured.skipped["extraction"] = (
            f"No repeated document has 64 tokens, or the model's context is shorter; the longest has {longest}."
        )
    if "relearning" in found and not found["relearning"]["runs"]:
        measured.skipped["relearning"] = "There are fewer than two repeated documents."


def gate(repeated: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Do the IDs fit the checkpoint? With its own sinks on, a repeated document must be known better than with others'.

    Better means: the difference over documents has an interval at 99% that does not hold zero. IDs of another seed, or
    of other data, switch on sinks that have nothing to do with the document, and then the difference is chance.

    Args:
        repeated: State to ``nats`` and ``counts`` of the repeated documents.
    """
    own, placebo = repeated["own"], repeated["placebo"]
    counts = own["counts"]
    difference = [b - a for a, b in zip(own["nats"], placebo["nats"], strict=True)]
    apart = Bootstrap(draws=2000, level=GATE_LEVEL).loss(difference, counts)
    low = apart["value"] if apart["low"] is None else apart["low"]
    total = sum(counts)
    return {
        "own": math.fsum(own["nats"]) / total,
        "placebo": math.fsum(placebo["nats"]) / total,
        "pass": bool(low is not None and low > 0),
    }


def wrong_map(subject: Subject, gate: dict[str, Any]) -> str:
    """What the gate says when it fails."""
    return (
        f"{str(subject.checkpoint_dir)!r} does not know the repeated documents better with their own sinks on "
        f"({gate['own']:.4f} nats per token) than with those of others ({gate['placebo']:.4f}): these documents' IDs, "
        "or the seed of the masks, are not those it was trained with. Name the data of that run, or write the failing "
        "result with --allow_wrong_map true."
    )
