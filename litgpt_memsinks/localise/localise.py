"""Which neurons of a trained model hold its repeated documents? Score them, drop them, look what is lost.

Post-hoc localisation, the paper's baseline (Sec. 3, App. C; Chang et al. 2024): docs/localisation.md.

    documents ─► scores of neurons ─► drop the highest ─► losses of the documents, and of others ─► frontier
        scores.py (a module for each method)             frontier.py                          file.py
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.battery import Kept
from litgpt_memsinks.evaluate.subject import Asked, Subject, ask_files, ask_prepared
from litgpt_memsinks.files import refuse_to_overwrite
from litgpt_memsinks.localise.file import markdown, scores_file, write_localised
from litgpt_memsinks.localise.frontier import Localised, Point, measure, total_work
from litgpt_memsinks.localise.hard_concrete import HardConcreteArgs
from litgpt_memsinks.localise.neurons import dropped_number, load_plain, shape_of
from litgpt_memsinks.localise.scores import LocaliseArgs, Method, Mode, check_ratio
from litgpt_memsinks.progress import progress

__all__ = ["HardConcreteArgs", "LocaliseArgs", "Method", "Mode", "Point", "frontier", "localise"]

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def localise(
    checkpoint_dir: Path,
    data_path: Path | None = None,
    documents: Path | None = None,
    validation: Path | None = None,
    method: Method = "hard_concrete",
    mode: Mode = "pooled",
    ratios: list[float] | None = None,
    out: Path | None = None,
    prefix_length: int = 32,
    block_size: int | None = None,
    limit: int | None = None,
    validation_limit: int | None = None,
    extraction: bool = False,
    first_layer: int = 0,
    steps: int = 16,
    hard_concrete: HardConcreteArgs | None = None,
    documents_at_once: int = 16,
    device: str = "cpu",
    seed: int = 0,
) -> list[Point]:
    """Find the neurons that hold repeated documents in any LitGPT checkpoint, drop them, and measure what is lost.

    With `out`, what is finished outlives a kill: the same command goes on.

    Args:
        checkpoint_dir: LitGPT checkpoint of a model without sinks.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        documents: Instead of data_path: file of the texts that were trained on many times. The tokenizer is the
            checkpoint's.
        validation: With `documents`: file of texts like them that were not trained on.
        method: How neurons are scored.
        mode: per_sequence scores each document without its own neurons; pooled has one set of neurons for all.
        ratios: Shares of each layer's neurons to drop. 0.01, 0.02, 0.05, 0.1, 0.2, 0.3 and 0.5 by default, where that
            is a neuron at least; 0 is added.
        out: JSON file for the result; the scores go beside it. Must not exist.
        prefix_length: Tokens of a document that are given; the others are its memorised suffix.
        block_size: Most targets of a document. The model's context length by default.
        limit: Most documents of each kind. All by default.
        validation_limit: Most validation documents; what per_sequence takes longest for. All by default.
        extraction: Try to extract the documents after each drop, too.
        first_layer: Layers before it are left alone. Chang et al.'s code has 1.
        steps: Points of the integral of integrated_gradients.
        hard_concrete: How its masks are trained.
        documents_at_once: Documents that pass through the model together.
        device: Where to compute, cpu or cuda.
        seed: Of the noise of hard_concrete, and of random scores.

    Returns:
        A point for each ratio, the first without a drop.

    Raises:
        MemSinksError: If the model has sinks or experts, for documents of another tokenizer, or settings out of range.
    """
    started = time.monotonic()
    args = LocaliseArgs(
        method, mode, prefix_length, block_size, first_layer, documents_at_once, steps,
        hard_concrete or HardConcreteArgs(), validation_limit, extraction, seed,
    )  # fmt: skip
    args.check()
    if out is not None:
        refuse_to_overwrite(out)
    subject = Subject.at("localised", checkpoint_dir)
    asked = asked_of(checkpoint_dir, data_path, documents, validation, limit)
    kept = Kept(None if out is None else out.with_name(f".{out.name}.parts"))
    with_zero = None if ratios is None else [0.0, *(ratio for ratio in ratios if ratio)]
    found = run(subject, asked, args, with_zero, device, kept)
    print(f"{method}, {mode}, {len(asked.repeated.tokens)} repeated documents; losses in nats per token.\n")
    print(markdown(found.points))
    if out is not None:
        write_localised(out, subject, asked, args, limit, found, time.monotonic() - started)
        kept.clear()
        print(f"\nResult: {out}   Scores: {scores_file(out)}")
    return found.points


def frontier(
    checkpoint: Path | Subject,
    data_path: Path,
    method: Method,
    mode: Mode,
    ratios: Sequence[float],
    limit: int | None = None,
    seed: int = 0,
    settings: LocaliseArgs | None = None,
    device: str = "cpu",
    parts: Path | None = None,
) -> list[Point]:
    """Localise, drop and score: forgetting against degradation.

    Args:
        checkpoint: A LitGPT checkpoint without sinks.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        method: How neurons are scored.
        mode: ``per_sequence``: localise, drop, score the document itself, average. ``pooled``: once for all documents.
        ratios: Shares of each layer's neurons to drop; 0 is the model as it is.
        limit: Most documents of each kind, the first ones.
        seed: Of the sampled masks and the random scores.
        settings: All others; its method, mode and seed are not read.
        device: Where to compute.
        parts: Folder for what is finished, so that it outlives a kill. The caller removes it.

    Returns:
        A point for each ratio, in their order.

    Raises:
        MemSinksError: If the model has sinks or experts, or for settings out of range.
    """
    args = replace(settings or LocaliseArgs(), method=method, mode=mode, seed=seed)
    args.check()
    subject = checkpoint if isinstance(checkpoint, Subject) else Subject.at("localised", checkpoint)
    return run(subject, ask_prepared(data_path, check_limit(limit)), args, ratios, device, Kept(parts)).points


def run(
    subject: Subject, asked: Asked, args: LocaliseArgs, ratios: Sequence[float] | None, device: str, kept: Kept
) -> Localised:
    """Load the model, see that all fits, and measure, with a progress bar on stderr.

    Without ``ratios``: 0, and those of ``RATIOS`` that drop a neuron at all.

    Raises:
        MemSinksError: See ``localise``.
    """
    model = loaded(subject, asked, device)
    args.check_model(model)
    width = shape_of(model)[1]
    if ratios is None:
        ratios = [0.0, *(ratio for ratio in RATIOS if dropped_number(ratio, width))]
    for ratio in ratios:
        check_ratio(ratio, width)
    with progress("Localising", total_work(model, asked, args, ratios)) as advance:
        return measure(model, subject, asked, args, ratios, kept, advance)


def loaded(subject: Subject, asked: Asked, device: str) -> BaseGPT:
    """The model, if it is one to localise in, and the documents are its own.

    Raises:
        MemSinksError: Naming what does not fit.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MemSinksError(f"device is {device!r}, but this machine has no usable GPU. Use --device cpu.")
    model = load_plain(subject, device)
    subject.check(model, asked)
    return model


def asked_of(
    checkpoint_dir: Path, data_path: Path | None, documents: Path | None, validation: Path | None, limit: int | None
) -> Asked:
    """The documents: of a prepared folder, or of two files of text in the checkpoint's tokens.

    Raises:
        MemSinksError: If there are both or neither, or they cannot be read.
    """
    check_limit(limit)
    if data_path is not None and documents is None and validation is None:
        return ask_prepared(data_path, limit)
    if data_path is None and documents is not None and validation is not None:
        return ask_files(documents, validation, checkpoint_dir, limit)
    raise MemSinksError(
        "The documents are those of --data_path DIR, or else of --documents FILE --validation FILE. Give the one or "
        "both of the others."
    )


def check_limit(limit: int | None) -> int | None:
    """Refuse to look at nothing.

    Raises:
        MemSinksError: If the number is below 1.
    """
    if limit is not None and limit < 1:
        raise MemSinksError(f"limit is {limit}, but it must be at least 1.")
    return limit
