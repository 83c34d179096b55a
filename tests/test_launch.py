"""What `launch.py` chooses and refuses, without starting other processes; test_distributed.py starts them."""

import gc
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import litgpt.pretrain
import pytest
import torch
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from litgpt_memsinks import MemSinksConfig, MemSinksData, MemSinksError, SinkArgs
from litgpt_memsinks.config import LaunchArgs
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.pretrain import launch
from litgpt_memsinks.pretrain.launch import FullyShardedStrategy, check_devices, check_launched
from tests.console import litgpt as litgpt_command
from tests.console import pretrain_arguments

REFUSED = [
    (LaunchArgs("zero"), 1, 1, "launch.strategy is 'zero'. Choose from: litgpt, ddp, fsdp, hsdp."),
    (LaunchArgs("ddp", shard_size=2), 2, 1, "launch.shard_size is 2, but launch.strategy is ddp, which does not read"),
    (LaunchArgs("hsdp", shard_size=1), 4, 1, "launch.shard_size is 1, but it must be at least 2 devices"),
    (LaunchArgs("hsdp", shard_size=3), 8, 1, "launch.shard_size is 3, which does not divide 1 node(s) of 8 devices"),
    (LaunchArgs("hsdp", shard_size=4), 6, 2, "launch.shard_size is 4, which does not divide 2 node(s) of 6 devices"),
    (LaunchArgs("hsdp"), 8, 1, "the same as fsdp. Set launch.strategy to fsdp"),
    (LaunchArgs("hsdp"), 1, 8, "the same as ddp. Set launch.strategy to ddp"),
    (LaunchArgs(), 2, 1, "2 devices without a GPU, for which LitGPT's own strategy, FSDP1, does not work"),
]


@pytest.mark.parametrize(("settings", "devices", "num_nodes", "message"), REFUSED, ids=str)
def test_launch_that_cannot_work_is_refused(
    settings: LaunchArgs, devices: int, num_nodes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MemSinksError) as caught:
        check_devices(settings, devices, num_nodes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_litgpts_strategy_with_one_gpu_per_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(MemSinksError, match="HYBRID_SHARD does not synchronise gradients"):
        check_devices(LaunchArgs(), 1, 2)
    check_devices(LaunchArgs(), 2, 2)
    check_devices(LaunchArgs("fsdp"), 1, 2)
    check_devices(LaunchArgs("ddp"), 1, 2)


def setup(data: Any, **arguments: Any) -> lightning.Fabric:
    """Asks for a Fabric as ``litgpt.pretrain.setup`` does: with its data in a local variable."""
    return litgpt.pretrain.L.Fabric(**arguments)


def fabric_arguments(devices: int, num_nodes: int = 1, precision: str = "32-true") -> dict[str, Any]:
    return {"devices": devices, "num_nodes": num_nodes, "strategy": "auto", "precision": precision, "loggers": []}


def test_litgpt_asks_for_its_fabric_as_the_factory_expects() -> None:
    """Red if a LitGPT makes its Fabric elsewhere, or calls its data otherwise."""
    code = litgpt.pretrain.setup.__code__
    assert "data" in code.co_varnames
    source = inspect.getsource(litgpt.pretrain.setup)
    assert source.count("L.Fabric(") == 1
    assert "L.Fabric(devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision, loggers" in source


def test_fabric_has_the_strategy_of_the_recipe() -> None:
    ddp = setup(MemSinksData(launch=LaunchArgs("ddp")), **fabric_arguments(2)).strategy
    assert type(ddp) is DDPStrategy
    assert ddp._ddp_kwargs == {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    fsdp = setup(MemSinksData(launch=LaunchArgs("fsdp")), **fabric_arguments(4, 2, "bf16-mixed")).strategy
    assert type(fsdp) is FullyShardedStrategy
    assert (fsdp._data_parallel_size, fsdp._tensor_parallel_size, fsdp._save_distributed_checkpoint) == (1, 8, False)
    policy = fsdp._parallelize_fn.keywords["policy"]
    assert (policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) == (
        torch.bfloat16,
        torch.float32,
        False,
    )


@pytest.mark.parametrize(("shard_size", "mesh"), [(None, (2, 8)), (4, (4, 4)), (2, (8, 2))])
def test_hsdp_shards_within_a_node_and_replicates_across(shard_size: int | None, mesh: tuple[int, int]) -> None:
    made = launch.strategy(LaunchArgs("hsdp", shard_size), 8, 2, "32-true")
    assert isinstance(made, FullyShardedStrategy)
    assert (made._data_parallel_size, made._tensor_parallel_size) == mesh


def test_other_data_and_one_device_get_what_litgpt_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(lightning, "Fabric", lambda **arguments: given.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = fabric_arguments(2) | {"strategy": object()}
    setup(object(), **asked)
    setup(MemSinksData(), **asked)
    setup(MemSinksData(launch=LaunchArgs("ddp")), **(asked | {"devices": 1}))
    assert given == [asked, asked, asked | {"devices": 1}]
    assert litgpt.pretrain.L.seed_everything is lightning.seed_everything


def test_fabric_without_the_strategy_asked_for_is_refused() -> None:
    fabric = SimpleNamespace(strategy=DDPStrategy())
    train = SimpleNamespace(global_batch_size=4, micro_batch_size=2)
    check_launched(fabric, LaunchArgs("ddp"), train, 2, 1)
    with pytest.raises(MemSinksError, match=r"^launch.strategy is fsdp, but Fabric came with DDPStrategy"):
        check_launched(fabric, LaunchArgs("fsdp"), train, 2, 1)
    with pytest.raises(
        MemSinksError, match=r"global_batch_size is 4, but 4 device\(s\) with a micro batch of 2 take 8"
    ):
        check_launched(fabric, LaunchArgs("ddp"), train, 4, 1)


def test_setting_is_refused_in_one_line_before_any_process_starts(prepared, tmp_path) -> None:
    settings = {"devices": 3, "data__launch__strategy": "hsdp", "data__launch__shard_size": 2}
    result = litgpt_command(*pretrain_arguments(tmp_path / "out", prepared, **settings), check=False)
    assert result.returncode == 1
    errors = [line for line in result.stdout.splitlines() if line.startswith("Error: ")]
    assert errors == [result.stdout.strip().splitlines()[-1]]
    assert "launch.shard_size is 2, which does not divide 1 node(s) of 3 devices" in errors[0]


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (9, 0), (40, 0), (9, 2)])
def test_loaders_know_how_many_batches_litdata_gives_each_process(
    batch_size: int, workers: int, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check_batches` compares their lengths: equal on all processes, and as many as come."""
    data = MemSinksData(data_path=prepared, num_workers=workers)
    data.connect(batch_size=batch_size, max_seq_length=32)
    monkeypatch.setenv("WORLD_SIZE", "3")  # where litdata looks in a process without a process group
    lengths = []
    for rank in range(3):
        monkeypatch.setenv("GLOBAL_RANK", str(rank))
        loader = data.val_dataloader()
        lengths.append(len(loader))
        assert sum(1 for _ in loader) == len(loader)
    blocks = 6007 // 33
    assert lengths == [blocks // batch_size // 3] * 3


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ([4, 3], [9, 9], None),  # who has fewer training batches begins the next epoch sooner
        ([4, 3], [9, 5], None),  # only three are used
        ([4, 0], [9, 9], "The training data gives the 2 processes 4, 0 micro batches of 2 blocks (8 workers each)"),
        ([4, 3], [3, 2], "The validation data gives the 2 processes 3, 2 micro batches of 2 blocks (8 workers each)"),
        ([4, 3], [0, 0], "The validation data gives the 2 processes 0, 0 micro batches of 2 blocks (8 workers each)"),
    ],
)
def test_processes_without_a_batch_are_refused(
    training: list[int],
    validation: list[int],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All processes are asked, here those of the lists; that they end is tested with real ones."""
    run = SimpleNamespace(
        fabric=SimpleNamespace(world_size=2, global_rank=0),
        data=MemSinksData(),
        train=SimpleNamespace(micro_batch_size=2),
        eval=SimpleNamespace(max_iters=3),
    )
    both = [(length, min(most, 3)) for length, most in zip(training, validation, strict=True)]

    def gather(fabric: Any, value: Any) -> list[Any]:
        assert value in (both[0], None) or isinstance(value, str)
        return both if isinstance(value, tuple) else [value, value]

    monkeypatch.setattr(launch, "gather", gather)
    arguments = run, range(training[0]), range(validation[0])
    if message is None:
        launch.check_batches(*arguments)
        return
    with pytest.raises(SystemExit) as caught:
        launch.check_batches(*arguments)
    assert caught.value.code == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"Error: {message}")


# --------------------------------------------------------------------------------- weights before they are distributed


def initialized(config: MemSinksConfig, strategy: Any, device: str) -> GPT:
    """As ``litgpt.pretrain.main`` makes its model: seed, empty model, weights, tied embeddings."""
    fabric = SimpleNamespace(strategy=strategy, device=torch.device("cpu"))
    run = SimpleNamespace(data=MemSinksData(launch=LaunchArgs(activation_checkpointing=True)))
    torch.manual_seed(3)
    with torch.device(device):
        model = GPT(config)
    torch.manual_seed(3)
    launch.initialize_weights(run, fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    model.transformer.wte.weight = model.lm_head.weight
    return model


@pytest.fixture
def config(tiny_config: Any) -> MemSinksConfig:
    return MemSinksConfig.from_base(tiny_config, SinkArgs(shared_fraction=0.5))


@pytest.mark.parametrize("strategy", [FSDPStrategy(), FullyShardedStrategy(1, 2, None)], ids=["fsdp1", "fsdp2"])
def test_weights_are_those_of_one_device(config: MemSinksConfig, strategy: Any) -> None:
    alone = initialized(config, None, "cpu").state_dict()
    sharded = initialized(config, strategy, "meta")
    assert all(block.checkpointing for block in sharded.transformer.h)
    assert all(torch.equal(value, alone[name]) for name, value in sharded.state_dict().items())
    assert torch.equal(sharded.cos, GPT(config).cos)


def wrapped_by_litgpt(config: MemSinksConfig) -> tuple[int, bool]:
    """Parameters of a model that FSDP1 has wrapped, and whether its embeddings are tied."""
    model = initialized(config, FSDPStrategy(), "meta")
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(block) for block in model.transformer.h}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    tied = wrapped.module.transformer.wte.weight is wrapped.module.lm_head.weight
    return sum(parameter.numel() for parameter in wrapped.parameters()), tied


def test_fsdp1_keeps_embeddings_tied(config: MemSinksConfig) -> None:
    """LitGPT's own strategy needs GPUs; its wrapping does not. Untied it would count 512 * 32 weights twice."""
    expected = sum(parameter.numel() for parameter in initialized(config, None, "cpu").parameters())
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        assert wrapped_by_litgpt(config) == (expected, True)
    finally:
        destroy_process_group()
        gc.collect()  # a worker process that is forked later would abort on freeing a process group of this one


# ------------------------------------------------------------------------------------------- activation checkpointing


def gradients(model: GPT, pairs: torch.Tensor, checkpointing: bool, compiled: bool) -> dict[str, torch.Tensor]:
    for block in model.transformer.h:
        block.checkpointing = checkpointing
    model.zero_grad()
    run = torch.compile(model) if compiled else model
    litgpt.pretrain.chunked_cross_entropy(run(pairs), pairs[..., 0].long()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shared_fraction", [0.5, 1.0])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(tiny_config: Any, shared_fraction: float) -> None:
    config = MemSinksConfig.from_base(tiny_config, SinkArgs(shared_fraction=shared_fraction))
    model = initialized(config, None, "cpu")
    pairs = torch.randint(1, 500, (2, 32, 2))
    kept: dict[bool, int] = {}
    found = {}
    for checkpointing in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):
            found[checkpointing] = gradients(model, pairs, checkpointing, compiled=False)
        kept[checkpointing] = sum(sizes)
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[False])
    assert kept[True] < 0.7 * kept[False]
