"""What does ``litgpt pretrain`` make of a token budget? Rows, micro batches, optimizer steps.

Restates the arithmetic of ``litgpt.pretrain.fit`` and ``litgpt.args.TrainArgs``; pinned by tests/test_plan.py against a
run of the stock command.
"""

import math
from dataclasses import dataclass

from litgpt.args import EvalArgs, TrainArgs

from litgpt_memsinks.errors import MemSinksError


@dataclass(frozen=True)
class Schedule:
    """What a run does."""

    devices: int
    """All of them, over all nodes"""
    block_size: int
    """Tokens of a row, T"""
    accumulation: int
    """Micro batches of each device between two optimizer steps"""
    rows_per_step: int
    """Rows of all devices in an optimizer step"""
    tokens_per_step: int
    iterations: int
    """Micro batches of each device"""
    steps: int
    """Optimizer steps"""
    idle: int
    """Micro batches of each device behind the last optimizer step, whose gradients nothing uses"""
    rows: int
    """Rows of all devices that are read"""
    tokens: int
    """Tokens of all devices that are read"""
    warmup: int | None
    """Micro batches of linear warm-up; ``None``: a fraction of an epoch of unknown length"""
    checkpoints: int
    """Checkpoints that are written on the way; the final one comes on top"""
    epochs: float | None
    """Passes over the prepared rows; ``None``: not known"""


def make_schedule(
    train: TrainArgs, block_size: int, devices: int, num_nodes: int, rows_in_epoch: int | None = None
) -> Schedule:
    """Work out a run.

    Args:
        train: LitGPT's training settings.
        block_size: Tokens of a row, T.
        devices: Devices of a node.
        num_nodes: Nodes.
        rows_in_epoch: Rows that the prepared data holds, if known.

    Raises:
        MemSinksError: If ``litgpt pretrain`` would stop at these settings.
    """
    world = devices * num_nodes
    for name in ("max_tokens", "max_norm"):
        if getattr(train, name) is None:
            raise MemSinksError(f"train.{name} is null, but litgpt pretrain needs it. Set it.")
    if train.epochs is not None:
        raise MemSinksError(f"train.epochs is {train.epochs}, which litgpt pretrain refuses. Use train.max_tokens.")
    if train.micro_batch_size < 1 or train.global_batch_size // world < train.micro_batch_size:
        raise MemSinksError(
            f"train.micro_batch_size is {train.micro_batch_size}, but each of {world} devices takes "
            f"{train.global_batch_size // world} rows of train.global_batch_size {train.global_batch_size}. "
            "Choose 1 up to that."
        )
    assert train.max_tokens is not None  # checked above
    accumulation = train.gradient_accumulation_iters(devices, num_nodes)
    iterations = train.max_tokens // world // (train.micro_batch_size * block_size)
    steps = iterations // accumulation
    rows_per_step = accumulation * train.micro_batch_size * world
    rows = iterations * train.micro_batch_size * world
    return Schedule(
        devices=world,
        block_size=block_size,
        accumulation=accumulation,
        rows_per_step=rows_per_step,
        tokens_per_step=rows_per_step * block_size,
        iterations=iterations,
        steps=steps,
        idle=iterations - steps * accumulation,
        rows=rows,
        tokens=rows * block_size,
        warmup=_warmup(train, devices, num_nodes, iterations, rows_in_epoch),
        checkpoints=steps // train.save_interval if train.save_interval else 0,
        epochs=rows / rows_in_epoch if rows_in_epoch else None,
    )


def _warmup(train: TrainArgs, devices: int, num_nodes: int, iterations: int, rows_in_epoch: int | None) -> int | None:
    if not train.lr_warmup_fraction:
        return train.warmup_iters(devices, num_nodes, iterations, None)
    if rows_in_epoch is None:
        return None
    batches = rows_in_epoch // (devices * num_nodes) // train.micro_batch_size
    return min(iterations, math.ceil(train.lr_warmup_fraction * batches))


def schedule_warnings(train: TrainArgs, evaluation: EvalArgs, schedule: Schedule) -> list[str]:
    """Where LitGPT's arithmetic does otherwise than the settings read; one sentence each."""
    found = []
    asked = train.global_batch_size
    if schedule.rows_per_step != asked:
        found.append(
            f"train.global_batch_size is {asked}, but litgpt steps every {schedule.rows_per_step} rows: it must be a "
            f"multiple of train.micro_batch_size {train.micro_batch_size} times {schedule.devices} devices."
        )
    if schedule.steps == 0:
        found.append(
            f"train.max_tokens is {train.max_tokens}, less than the {schedule.tokens_per_step:,} tokens of one "
            "optimizer step: no step is made."
        )
    elif schedule.idle:
        found.append(
            f"The last {schedule.idle} of {schedule.iterations:,} micro batches of each device come behind the last "
            "optimizer step and teach nothing: train.max_tokens is no multiple of the "
            f"{schedule.tokens_per_step:,} tokens of a step."
        )
    for name in ("max_steps", "max_time"):
        if getattr(train, name) is not None:
            found.append(f"train.{name} is set, but litgpt pretrain 0.5.13 reads train.max_tokens only.")
    if schedule.warmup is not None and schedule.steps and schedule.warmup >= schedule.iterations:
        found.append(f"The warm-up takes all {schedule.iterations:,} micro batches: the learning rate is not reached.")
    if schedule.steps < evaluation.interval:
        found.append(f"eval.interval is {evaluation.interval}, but {schedule.steps} steps are made: none is validated.")
    if schedule.epochs is not None and schedule.epochs > 1.01:  # a row more or less is no second pass
        found.append(
            f"The run reads the prepared data {schedule.epochs:.2f} times: every document then repeats, those that "
            "count as occurring once too. Prepare more text, or lower train.max_tokens."
        )
    return found
