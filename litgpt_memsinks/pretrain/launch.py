"""How do several devices train together? The strategy that the recipe names, in front of LitGPT's hard-coded one.

``litgpt pretrain`` makes its Fabric with FSDP1 and HYBRID_SHARD, whatever the recipe says. It reaches Fabric through a
global name, ``L``, in ``litgpt.pretrain``; `LIGHTNING` takes that name's place. It hands out ``lightning`` itself, but
for ``Fabric`` it looks at the caller's data first, as LitGPT's ``capture_hparams`` looks at its caller's variables.

Two processes or more must never part ways: what one refuses, all refuse (`together`), before anything is trained.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.rank_zero import _get_rank
from litgpt.args import TrainArgs
from litgpt.pretrain import initialize_weights as base_initialize_weights
from litgpt.utils import reset_parameters
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from litgpt_memsinks.config import LaunchArgs
from litgpt_memsinks.data.data import MemSinksData
from litgpt_memsinks.errors import MemSinksError, end, flush_output
from litgpt_memsinks.model.model import GPT, MARKER, REMOVED, check_removed
from litgpt_memsinks.pretrain.run import Run


class Lightning:
    """What ``litgpt.pretrain`` sees as ``lightning``: the same, except that ``Fabric`` is `fabric`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lightning, name)

    @staticmethod
    def Fabric(*args: Any, **kwargs: Any) -> lightning.Fabric:  # noqa: N802 # its name in lightning
        """Lightning's Fabric; for ``MemSinksData``, with the strategy of ``data.launch``."""
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        data = frame.f_back.f_locals.get("data")
        if isinstance(data, MemSinksData):
            devices, num_nodes = kwargs["devices"], kwargs["num_nodes"]
            try:
                check_devices(data.launch, devices, num_nodes)
            except MemSinksError as error:  # in front of LitGPT's `main`, so nobody else turns it into one line
                end(error) if _get_rank() in (None, 0) else sys.exit(1)
            chosen = strategy(data.launch, devices, num_nodes, kwargs["precision"])
            kwargs["strategy"] = chosen or kwargs["strategy"]
        return lightning.Fabric(*args, **kwargs)


LIGHTNING = Lightning()


def check_devices(launch: LaunchArgs, devices: int, num_nodes: int, gpu: bool | None = None) -> None:
    """Refuse a launch that would fail with a traceback, or train wrongly without a word.

    Args:
        launch: Settings of the run.
        devices: Devices per node.
        num_nodes: Nodes.
        gpu: Whether the devices are GPUs; as on this machine by default.

    Raises:
        MemSinksError: Naming the setting, the devices and what to set instead.
    """
    launch.check()
    world_size = devices * num_nodes
    if world_size == 1:
        return
    if launch.strategy == "litgpt":
        _check_litgpt(devices, num_nodes, torch.cuda.is_available() if gpu is None else gpu)
    if launch.strategy == "hsdp":
        shards = launch.shard_size or devices
        if world_size % shards or (devices % shards and shards % devices):
            raise MemSinksError(
                f"launch.shard_size is {shards}, which does not divide {num_nodes} node(s) of {devices} devices into "
                f"equal groups. Use a divisor of {devices}, or a multiple of it that divides {world_size}."
            )
        if shards == 1 or shards == world_size:
            other = "ddp" if shards == 1 else "fsdp"
            raise MemSinksError(
                f"launch.strategy is hsdp with groups of {shards} on {num_nodes} node(s) of {devices} device(s), which "
                f"is the same as {other}. Set launch.strategy to {other}, or launch.shard_size to a number between."
            )


def _check_litgpt(devices: int, num_nodes: int, gpu: bool) -> None:
    """Refuse what LitGPT's FSDP1 with HYBRID_SHARD cannot do."""
    if not gpu:
        raise MemSinksError(
            f"{devices * num_nodes} devices without a GPU, for which LitGPT's own strategy, FSDP1, does not work. Set "
            "--data.launch.strategy to ddp, fsdp or hsdp, or use one device."
        )
    if devices == 1:
        raise MemSinksError(
            f"num_nodes is {num_nodes} with 1 device each, for which LitGPT's HYBRID_SHARD does not synchronise "
            "gradients. Set --data.launch.strategy to ddp or fsdp."
        )


def strategy(
    launch: LaunchArgs, devices: int, num_nodes: int, precision: str | None
) -> DDPStrategy | ModelParallelStrategy | None:
    """Fabric's strategy for checked settings; ``None`` leaves LitGPT's own.

    Args:
        launch: Settings of the run.
        devices: Devices per node.
        num_nodes: Nodes.
        precision: Fabric's name of it, such as ``bf16-mixed``.
    """
    world_size = devices * num_nodes
    if world_size == 1 or launch.strategy == "litgpt":
        return None
    if launch.strategy == "ddp":
        # the buffers are the rotary factors and a constant: equal everywhere, so nothing to broadcast at every step
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    shards = world_size if launch.strategy == "fsdp" else launch.shard_size or devices
    return FullyShardedStrategy(world_size // shards, shards, precision)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 in Fabric: ``replicas`` copies of the model, each cut over ``shards`` devices that are neighbours."""

    def __init__(self, replicas: int, shards: int, precision: str | None) -> None:
        super().__init__(
            parallelize_fn=partial(shard, policy=mixed_precision(precision)),
            data_parallel_size=replicas,  # Fabric's names of the mesh's two dimensions; `shard` uses both for data
            tensor_parallel_size=shards,
            save_distributed_checkpoint=False,  # one file, as all other tools read it
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every device reads data of its own, also those that share a copy of the model."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def load_checkpoint(self, path: str | Path, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Fabric's, but plain weights, which have no marker, are a start for a model with sinks here as well."""
        if not isinstance(state, GPT):
            return super().load_checkpoint(path, state, *args, **kwargs)
        weights = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        weights.setdefault(MARKER, torch.tensor(state.config.n_shared))
        check_removed(state.config, weights.get(REMOVED))  # a key that the model lacks would be passed over
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(state, weights, options=options)
        return {}


def mixed_precision(precision: str | None) -> MixedPrecisionPolicy:
    """How blocks are gathered and their gradients summed.

    Under ``bf16-mixed``, weights stay fp32 on their device, travel and compute in bf16, and gradients are summed in
    fp32. What autocast leaves in fp32 on one device, the residual stream and the rotary factors, stays so.
    """
    if precision != "bf16-mixed":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard(model: GPT, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> GPT:
    """Cut each block by itself, then the rest: embedding, last norm and head, which may be tied, stay together.

    Args:
        model: Materialised on every process with the same weights.
        mesh: Fabric's, ``(replicas, shards)``.
        policy: Of the blocks. The rest computes in the precision it is kept in.
    """
    if mesh.size(0) == 1:
        mesh = mesh["tensor_parallel"]
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    return model


def initialize_weights(run: Run, fabric: lightning.Fabric, model: GPT, **kwargs: Any) -> None:
    """LitGPT's ``initialize_weights``, after which no tensor is on the meta device.

    Sharded strategies would materialise module by module later, after LitGPT has tied the embeddings, which unties
    them; and FSDP2 would draw the weights of each shard by itself. So every process makes the whole model here, once,
    from the same seed: the weights are those of a run on one device, bit for bit.
    """
    base_initialize_weights(fabric, model, **kwargs)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        model.to_empty(device=fabric.device)
        reset_parameters(model)
    for block in model.transformer.h:
        block.checkpointing = run.data.launch.activation_checkpointing


@contextmanager
def together(fabric: lightning.Fabric) -> Iterator[None]:
    """Checks that all processes pass, or all fail: the first process says why, then all end.

    Raises:
        MemSinksError: As the block does, if there is one process.
        SystemExit: With status 1, on all processes.
    """
    error: str | None = None
    try:
        yield
    except MemSinksError as caught:
        if fabric.world_size == 1:
            raise
        error = str(caught)
    errors = gather(fabric, error)
    failed = [rank for rank, message in enumerate(errors) if message is not None]
    if failed:
        if fabric.global_rank == 0:
            where = f"Process {failed[0]}: " if failed[0] else ""
            flush_output()
            print(f"Error: {where}{errors[failed[0]]}", file=sys.stderr, flush=True)
        gather(fabric, None)  # wait: launchers kill the others as soon as one has ended
        sys.exit(1)


def gather(fabric: lightning.Fabric, value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def check_launched(
    fabric: lightning.Fabric, launch: LaunchArgs, train: TrainArgs, devices: int, num_nodes: int
) -> None:
    """Refuse a Fabric without the strategy asked for: a LitGPT that makes it in another way, or a caller of ``main``.

    Raises:
        MemSinksError: Naming both; or if the global batch is smaller than a micro batch on each device.
    """
    check_devices(launch, devices, num_nodes)
    if train.global_batch_size < (least := train.micro_batch_size * devices * num_nodes):
        raise MemSinksError(
            f"train.global_batch_size is {train.global_batch_size}, but {devices * num_nodes} device(s) with a micro "
            f"batch of {train.micro_batch_size} take {least}. Raise it, or lower train.micro_batch_size."
        )
    wanted = strategy(launch, devices, num_nodes, None)
    if wanted is not None and not isinstance(fabric.strategy, type(wanted)):
        raise MemSinksError(
            f"launch.strategy is {launch.strategy}, but Fabric came with {type(fabric.strategy).__name__}: this litgpt "
            "makes it in a way that litgpt-memsinks does not know. Install a release that it supports (0.5.13 does)."
        )


def check_batches(run: Run, train_dataloader: DataLoader, val_dataloader: DataLoader) -> None:
    """Refuse data of which a process gets no batch, or fewer validation batches than another: others would wait for it.

    The numbers are what litdata assigns to each process and its workers: the lengths of the run's own loaders.

    Args:
        run: Its validation settings say how many batches are used at most.
        train_dataloader: This process's.
        val_dataloader: This process's.

    Raises:
        MemSinksError: Naming the split, the batches of each process, and what they come from.
    """
    fabric, most = run.fabric, max(run.eval.max_iters, 2)  # LitGPT verifies its settings with two
    own = (len(train_dataloader), min(len(val_dataloader), most))
    with together(fabric):
        for split, counts in zip(("training", "validation"), zip(*gather(fabric, own), strict=True), strict=True):
            if min(counts) and (split == "training" or len(set(counts)) == 1):
                continue
            raise MemSinksError(
                f"The {split} data gives the {fabric.world_size} processes {', '.join(map(str, counts))} micro batches "
                f"of {run.train.micro_batch_size} blocks ({run.data.num_workers} workers each), and a process without "
                "one stops the others. Use more data, fewer devices, a smaller train.micro_batch_size or fewer "
                "data.num_workers."
            )
