"""Running the real console scripts, each in a process of its own."""

import atexit
import csv
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from litgpt_memsinks.__main__ import COMMANDS
from tests.zygote import Zygote

SCRIPTS = Path(sys.executable).parent
REPOSITORY = Path(__file__).parent.parent

NOT_AUTOLOADED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
"""Environment of a process that knows nothing of us unless it imports us by name."""

TINY_MODEL = {
    "name": "tiny",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "block_size": 64,
    "vocab_size": 512,
    "padded_vocab_size": 512,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 64,
}


LIBRARIES = ("torch", "lightning", "jsonargparse")
"""What LitGPT imports of others, in a process that has seen neither LitGPT nor, unless by ``import torch``, us."""
BOTH = (
    "litgpt.__main__",
    "litgpt_memsinks.__main__",
    *sorted({f"litgpt_memsinks.{command.module}" for command in COMMANDS.values()}),
)
"""What the two console scripts import, with all commands of ours."""


@cache
def zygote(modules, autoload):
    """The process of this session that has these imports and forks for each command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONUNBUFFERED"] = ""  # see `settings`
    if autoload is not None:
        environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    started = Zygote(modules, environment)
    atexit.register(started.close)
    return started


def run(command, compiled=False, check=True, stderr=subprocess.STDOUT, imported=(), **environment):
    """Run a command, stdout and stderr together unless told. Uncompiled unless asked: it takes longer than training.

    ``imported`` names modules that the process may have before it begins, which saves seconds; with none, or if it is
    compiled, a new interpreter starts.
    """
    if imported and not compiled:
        with started(command, imported, stderr, **environment) as process:
            process.wait()
            result = subprocess.CompletedProcess(command, process.returncode, process.output, process.errors)
    else:
        command = [str(part) for part in command]
        values = settings(compiled, environment)
        result = subprocess.run(command, env=values, text=True, stdout=subprocess.PIPE, stderr=stderr, timeout=240)
    assert not check or result.returncode == 0, result.stdout[-3000:]
    return result


def started(command, imported=BOTH, stderr=subprocess.STDOUT, **environment):
    """A command that goes on in the background, in a process that has its imports already."""
    assert "litgpt.__main__" not in imported or not {*NOT_AUTOLOADED} & {*environment}  # it imports us
    forks = zygote(imported, environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
    return forks.start([str(part) for part in command], settings(False, environment), stderr)


def settings(compiled, environment):
    """The environment of a command. The console scripts must find the checkout even if it is not installed.

    Their output is buffered, as it is for most people, whatever the environment of the tests says.
    """
    values = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "", **environment}
    if not compiled:
        values["TORCHDYNAMO_DISABLE"] = "1"
    return {**os.environ, **values}


def litgpt(*arguments, imported=BOTH, **options):
    """The stock ``litgpt`` console script."""
    return run([SCRIPTS / "litgpt", *arguments], imported=imported, **options)


def litgpt_with_package_imported(*arguments, **options):
    """The same command line in a process that has imported our package first."""
    code = "import sys, litgpt_memsinks; from litgpt.__main__ import main; sys.argv[0] = 'litgpt'; main()"
    return run([sys.executable, "-c", code, *arguments], **options)


def memsinks(*arguments, imported=BOTH, **options):
    """Our console script."""
    return run([SCRIPTS / "litgpt-memsinks", *arguments], imported=imported, **options)


def pretrain_arguments(out_dir, data_path, class_path="litgpt_memsinks.MemSinksData", iterations=12, **settings):
    """Arguments of a small ``litgpt pretrain``. Keys of ``settings`` have ``__`` for dots."""
    values = {
        "out_dir": out_dir,
        "precision": "32-true",
        "devices": 1,
        "seed": 3,
        "logger_name": "csv",
        "data": class_path,
        "data.data_path": data_path,
        "data.split_names": "[train,val]",
        "data.num_workers": 0,
        "data.seed": 7,
        "train.save_interval": 1000,
        "train.log_interval": 1,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "train.lr_warmup_steps": 2,
        "train.max_tokens": iterations * 4 * 32,
        "train.max_seq_length": 32,
        "train.max_norm": 1.0,
        "train.min_lr": 1e-3,
        "train.tie_embeddings": "true",
        "eval.interval": 5,
        "eval.max_iters": 3,
        "optimizer": "AdamW",
    }
    if "model_name" not in settings:
        values |= {"model_name": "tiny"} | {f"model_config.{key}": value for key, value in TINY_MODEL.items()}
    if not class_path.endswith("LitData"):  # watching takes longer than training here
        values |= {"data.watch.documents": 0, "data.watch.validation_documents": 0}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    arguments = ["pretrain", values.pop("model_name")]  # positional on the command line
    for key, value in values.items():
        arguments += [f"--{key}", str(value)]
    return arguments


def logged(out_dir, column="loss"):
    """All values of one column of the newest CSV log of a run, as the text that was written."""
    logs = sorted(Path(out_dir).glob("logs/csv/version_*/metrics.csv"))
    with open(logs[-1], newline="", encoding="utf-8") as file:
        return [row[column] for row in csv.DictReader(file) if row.get(column)]
