"""Several real processes over gloo, against one process on the same global batches.

The stock ``litgpt pretrain`` starts the second process itself, torchrun starts all of them. Weights must agree to 1e-6:
only the order of sums differs.
"""

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt import Config

from litgpt_memsinks import MemSinksConfig, SinkArgs
from litgpt_memsinks.model.checkpoint import read_weights
from tests.console import REPOSITORY, SCRIPTS, litgpt, logged, memsinks, pretrain_arguments, run
from tests.test_launch import initialized

FIXED = {
    "class_path": "tests.fixed_batches.FixedBatches",
    "data__sinks__shared_fraction": 0.5,
    "data__sinks__learning_rate": 2.0,  # what belongs to sinks lies elsewhere on each process
    "data__sinks__weight_decay": 0.3,
    "train__micro_batch_size": 1,
    "train__global_batch_size": 4,
    "train__save_interval": 5,
    "train__lr_warmup_steps": 0,  # LitGPT's warm-up counts micro batches, of which each process has fewer
    "iterations": 8,
}
"""Two micro batches per process and step, if there are two processes; tied embeddings, see `pretrain_arguments`."""
KIND = {"ddp": {"data__launch__strategy": "ddp"}, "fsdp": {"data__launch__strategy": "fsdp"}}
CHECKPOINTING = {"data__launch__activation_checkpointing": "true"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def script(name: str, arguments: list[str], **environment: str) -> Any:
    """Run a script of ``recipes/launch`` with the arguments of ``litgpt pretrain``."""
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    for _ in range(3):
        settings = {"MASTER_PORT": str(free_port()), "PATH": path} | environment
        result = run([REPOSITORY / "recipes/launch" / name, *arguments], check=False, **settings)
        if "EADDRINUSE" not in result.stdout:  # somebody may take the port before the first process does
            break
    assert result.returncode == 0, result.stdout[-3000:]
    return result


def without_command(arguments: list[str]) -> list[str]:
    """For the scripts, which say ``litgpt pretrain`` themselves."""
    assert arguments[0] == "pretrain"
    return arguments[1:]


def launched(strategy: str, arguments: list[str]) -> Any:
    """FSDP2 by the console script, which starts the second process; DDP by torchrun."""
    if strategy == "fsdp":
        return litgpt(*arguments, imported=())
    return script("torchrun.sh", without_command(arguments), DEVICES="2")


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    out_dir = tmp_path_factory.mktemp("alone") / "out"
    litgpt(*pretrain_arguments(out_dir, prepared, **FIXED))
    return out_dir


@pytest.fixture(scope="module", params=[pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def several(request: Any, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Two processes with activation checkpointing: strategy, folder, output."""
    out_dir = tmp_path_factory.mktemp(request.param) / "out"
    settings = FIXED | KIND[request.param] | CHECKPOINTING
    result = launched(request.param, pretrain_arguments(out_dir, prepared, **settings, devices=2))
    return request.param, out_dir, result.stdout


def assert_close(out_dir: Path, alone: Path, tolerance: float = 1e-6) -> None:
    ours, expected = read_weights(out_dir / "final"), read_weights(alone / "final")
    assert set(ours) == set(expected)
    for name, value in ours.items():
        assert torch.allclose(value.float(), expected[name].float(), rtol=0, atol=tolerance), name
    losses, known = logged(out_dir, "val_loss"), logged(alone, "val_loss")
    assert len(losses) == len(known) > 0
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in known], abs=tolerance)


def test_trains_as_one_process_does(several: tuple[str, Path, str], alone: Path) -> None:
    _, out_dir, output = several
    assert_close(out_dir, alone)
    assert output.count("MemSinks: 32 of 64 neurons") == 1  # said once, not by each process


def test_embeddings_stay_tied(several: tuple[str, Path, str]) -> None:
    weights = read_weights(several[1] / "final")
    assert torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"])


@pytest.mark.long
def test_resume_continues_bit_for_bit(several: tuple[str, Path, str], prepared: Path, tmp_path: Path) -> None:
    strategy, whole, _ = several
    out_dir = tmp_path / "out"
    shutil.copytree(whole / "step-00000005", out_dir / "step-00000005")
    settings = FIXED | KIND[strategy] | CHECKPOINTING
    result = launched(strategy, pretrain_arguments(out_dir, prepared, **settings, devices=2, resume="auto"))
    assert "Resuming training from" in result.stdout
    resumed, expected = read_weights(out_dir / "final"), read_weights(whole / "final")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert logged(out_dir) == logged(whole)[5:]
    assert len(logged(out_dir)) == 3


def test_checkpoint_of_several_processes_drops_to_a_plain_one(several: tuple[str, Path, str], tmp_path: Path) -> None:
    memsinks("drop_sinks", several[1] / "final", tmp_path / "dropped")
    assert yaml.safe_load((tmp_path / "dropped/model_config.yaml").read_text())["intermediate_size"] == 32
    arguments = ["--prompt", "One day", "--max_new_tokens", "3", "--precision", "32-true"]
    assert "One day" in litgpt("generate", tmp_path / "dropped", *arguments).stdout


@pytest.mark.long
def test_hsdp_of_two_copies_trains_as_one_process_does(alone: Path, prepared: Path, tmp_path: Path) -> None:
    settings = FIXED | {"data__launch__strategy": "hsdp", "data__launch__shard_size": 2}
    arguments = pretrain_arguments(tmp_path / "out", prepared, **settings)
    script("torchrun.sh", without_command(arguments), DEVICES="4")
    assert_close(tmp_path / "out", alone)


@pytest.mark.long
def test_two_nodes_of_one_process_train_as_one_process_does(
    alone: Path, prepared: Path, tmp_path: Path, tiny_config: Config
) -> None:
    """From plain weights, which FSDP2 loads in a way of its own: those that `alone` starts from, under another seed."""
    start = initialized(MemSinksConfig.from_base(tiny_config, SinkArgs(shared_fraction=0.5)), None, "cpu")
    (tmp_path / "start").mkdir()
    weights = {name: value for name, value in start.state_dict().items() if name != "n_shared"}
    torch.save(weights, tmp_path / "start/lit_model.pth")
    settings = FIXED | KIND["fsdp"] | {"initial_checkpoint_dir": tmp_path / "start", "seed": 99}
    arguments = without_command(pretrain_arguments(tmp_path / "out", prepared, **settings))
    environment = {"NUM_NODES": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    nodes = [
        subprocess.Popen(
            [REPOSITORY / "recipes/launch/torchrun.sh", *arguments],
            env={**os.environ, **environment, "NODE_RANK": str(rank), "TORCHDYNAMO_DISABLE": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [node.wait(240) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert_close(tmp_path / "out", alone)


@pytest.mark.long
def test_compiled_fsdp_with_activation_checkpointing_trains_as_one_process_does(
    alone: Path, prepared: Path, tmp_path: Path
) -> None:
    settings = FIXED | KIND["fsdp"] | CHECKPOINTING | {"devices": 2}
    litgpt(*pretrain_arguments(tmp_path / "out", prepared, **settings), compiled=True)
    assert_close(tmp_path / "out", alone, 1e-5)


@pytest.mark.long
def test_process_without_validation_data_ends_all_before_training(prepared: Path, tmp_path: Path) -> None:
    """Otherwise the first process would wait for ever for the second one's part."""
    arguments = pretrain_arguments(tmp_path / "out", prepared, **FIXED, **KIND["fsdp"], devices=2)
    result = litgpt(*arguments, check=False, VALIDATION_ROWS="0")
    assert result.returncode == 1
    (error,) = [line for line in result.stdout.splitlines() if line.startswith("Error: ")]
    assert "The validation data gives the 2 processes 3, 0 micro batches of 1 blocks (0 workers each)" in error
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "out/final").exists()
