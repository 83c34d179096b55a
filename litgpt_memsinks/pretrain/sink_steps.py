"""A learning rate and a weight decay of the sinks' own, which the paper does not have.

Sinks are slices of whole matrices, for which an optimizer has one learning rate; scaling their gradients would do
nothing under AdamW, which divides by their size. But AdamW treats each number by itself, so what it would have done to
a slice with another rate and decay follows from what it did (`own_step`). So each step of the optimizer is followed by
one of ours, on the numbers of the sinks alone.
"""

from typing import Any

import torch
from lightning.fabric.strategies import FSDPStrategy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.model import sliced_dimension
from litgpt_memsinks.pretrain.run import Run


def own_step(
    before: torch.Tensor, after: torch.Tensor, lr: float, decay: float, factor: float, own_decay: float
) -> torch.Tensor:
    """What a step of AdamW would have made of weights with a learning rate and a weight decay of their own.

    AdamW sets w' = (1 - lr decay) w - lr u, where u depends on no learning rate or decay (arXiv 1711.05101). So
    w'' = (1 - factor lr own_decay) w + factor (w' - (1 - lr decay) w).

    Args:
        before: The weights w, any shape.
        after: The weights w' after the step, same shape.
        lr: Learning rate of the step.
        decay: Weight decay of the step.
        factor: What their learning rate is in units of ``lr``.
        own_decay: Their weight decay.

    Returns:
        The weights w'', same shape and dtype.
    """
    return (1 - factor * lr * own_decay) * before + factor * (after - (1 - lr * decay) * before)


def check_optimizer(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer or a strategy under which `own_step` would not be what it says.

    Raises:
        MemSinksError: Naming it.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        raise MemSinksError(
            "sinks.learning_rate or sinks.weight_decay is given, which work with torch.optim.AdamW only, but the "
            f"optimizer is {type(optimizer).__name__}. Use AdamW, or leave them out."
        )
    if isinstance(run.fabric.strategy, FSDPStrategy):
        raise MemSinksError(
            "sinks.learning_rate or sinks.weight_decay is given, but under launch.strategy litgpt several devices "
            "train with FSDP1, which hides what is a sink. Set launch.strategy to fsdp, hsdp or ddp."
        )


def give_sinks_their_steps(run: Run) -> None:
    """Let each step of the run's optimizer be followed by one of the sinks, if they have anything of their own.

    Raises:
        MemSinksError: If the optimizer or the strategy does not allow it.
    """
    config, optimizer = run.config, run.state["optimizer"].optimizer
    factor, own_decay = config.sink_learning_rate, config.sink_weight_decay
    if not config.n_sink or (factor == 1 and own_decay is None):
        return
    check_optimizer(run, optimizer)
    groups = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    parameters = run.state["model"].named_parameters()
    named = [(name, weight) for name, weight in parameters if sliced_dimension(name) is not None]
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def keep(*_: Any) -> None:
        before[:] = [sink_numbers(name, weight, config.n_shared).clone() for name, weight in named]

    @torch.no_grad()
    def correct(*_: Any) -> None:
        for (name, weight), old in zip(named, before, strict=True):
            if weight.grad is None:  # the optimizer has passed over it
                continue
            new = sink_numbers(name, weight, config.n_shared)
            lr, decay = (float(groups[weight][key]) for key in ("lr", "weight_decay"))
            new.copy_(own_step(old, new, lr, decay, factor, decay if own_decay is None else own_decay))
        before.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(correct)


def sink_numbers(name: str, weight: torch.Tensor, n_shared: int) -> torch.Tensor:
    """The numbers of a parameter that belong to sinks, as far as this device holds them; they share its memory.

    Args:
        name: The parameter's, as of an MLP's layer.
        weight: The parameter, whole or a DTensor.
        n_shared: Neurons before the first sink.
    """
    dimension, offset, held = sliced_dimension(name), 0, weight.detach()
    assert dimension is not None
    if isinstance(held, DTensor):
        _, offsets = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
        offset, held = offsets[dimension], held.to_local()
    start = min(max(n_shared - offset, 0), held.size(dimension))
    return held.narrow(dimension, start, held.size(dimension) - start)
