"""What does it take to release a large model? Dropping and exporting at full size, against copying the file.

The weights are random, because neither time nor memory depends on them. Each command runs in a process of its own,
whose anonymous memory, all that is not a page of a file, is read from Linux while it works. Then each is killed by
SIGKILL at five moments.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from litgpt.model import GPT as BaseGPT
from litgpt.utils import incremental_save, save_config
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from litgpt_memsinks.bench.bench import processor
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import fsync_tree, refuse_to_overwrite, write_json
from litgpt_memsinks.model.checkpoint import WEIGHTS, check_fits, read_config, read_weights
from litgpt_memsinks.model.model import GPT

MOST_MEMORY, MOST_TIME = 1.2, 3.0
"""What must hold: anonymous memory over the output's size, and time over that of copying the input."""
COMMANDS = ("drop_sinks", "export_hf")
MODULES = {
    "copy_weights": "litgpt_memsinks.bench.release_size",
    **{command: f"litgpt_memsinks.drop_sinks.{command}" for command in COMMANDS},
}
"""Where what is run in a process of its own is"""
OPTIONS = {"drop_sinks": ", certificate=False"}
"""The certificate reads both checkpoints once more; what that costs is in ``docs/certificate.md``"""
MOMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which parts of its time each command is killed."""
_COMMAND = """
import json, sys, time
from pathlib import Path
from {module} import {command}
started = time.perf_counter()
print("started", flush=True)
{command}(Path(sys.argv[1]), Path(sys.argv[2]){options})
print(json.dumps(time.perf_counter() - started))
"""


@dataclass
class Released:
    """What one command took."""

    command: str
    seconds: float
    """From its first line to its last; starting Python and importing PyTorch come before"""
    copy_seconds: float
    """Of copying the checkpoint's file, each time just before"""
    copies: float
    """Seconds divided by those of the copy before; the median"""
    output_bytes: int
    """Of its files"""
    anonymous_bytes: int
    """At the worst moment, PyTorch's own few hundred MB included"""
    memory: float
    """The same divided by the output's"""
    killed: list[str]
    """What was there after SIGKILL at each of the moments: nothing, or the whole"""


def release_size(
    model_name: str = "SmolLM-1.7B-MemSinks", out_dir: Path = Path("runs/release_size"), repeats: int = 3
) -> None:
    """Measure time and memory of `drop_sinks` and `export_hf` on a large checkpoint of random weights in bfloat16.

    SmolLM-1.7B takes 13 GB of disk, all given back but for a file of figures, and some minutes.

    Args:
        model_name: A model of LitGPT's registry that can have sinks.
        out_dir: Folder to work in, and for release_size.json. Must not exist.
        repeats: How often each is timed; the median counts.

    Raises:
        MemSinksError: If `out_dir` exists, this is no Linux, or a figure is beyond what must hold.
    """
    if not Path("/proc/self/status").is_file():
        raise MemSinksError("This system does not say which memory is anonymous: /proc is missing. Use Linux.")
    if repeats < 1:
        raise MemSinksError(f"repeats is {repeats}, but it must be at least 1.")
    refuse_to_overwrite(out_dir)
    checkpoint_dir = out_dir / "checkpoint"
    make_checkpoint(MemSinksConfig.from_name(model_name), checkpoint_dir)
    try:
        size = (checkpoint_dir / WEIGHTS).stat().st_size
        found = [_measure(command, checkpoint_dir, out_dir, repeats) for command in COMMANDS]
    finally:
        shutil.rmtree(checkpoint_dir)
    _print(found, model_name, size)
    where = {"date": date.today().isoformat(), "hardware": processor(), "torch": version("torch"), "model": model_name}
    write_json(
        out_dir / "release_size.json",
        where | {"input_bytes": size, "commands": list(map(asdict, found))},
    )
    for one in found:
        if one.memory > MOST_MEMORY or one.copies > MOST_TIME or "a part" in one.killed:
            raise MemSinksError(
                f"{one.command} took {one.memory:.2f} × its output in memory (at most {MOST_MEMORY}), {one.copies:.1f} "
                f"copies of the input in time (at most {MOST_TIME:.0f}), and left {', '.join(one.killed)} when killed."
            )


def make_checkpoint(config: MemSinksConfig, folder: Path) -> None:
    """Write a checkpoint of random bfloat16 weights with tied embeddings, as ``litgpt pretrain`` names them."""
    with torch.device("meta"):
        shapes: Mapping[str, torch.Tensor] = GPT(config).state_dict()
    folder.mkdir(parents=True)
    with incremental_save(folder / WEIGHTS) as saver:
        stored = {
            name: saver.store_early(
                torch.randn(one.shape).mul_(0.02).bfloat16() if one.dim() else torch.tensor(config.n_shared)
            )
            for name, one in shapes.items()
            if name != "transformer.wte.weight"
        }
        saver.save({"model": stored | {"transformer.wte.weight": stored["lm_head.weight"]}})
    save_config(config, folder)


def copy_weights(checkpoint_dir: Path, target: Path) -> None:
    """Copy a checkpoint's file into a new folder, until it is on disk."""
    target.mkdir()
    shutil.copyfile(checkpoint_dir / WEIGHTS, target / WEIGHTS)
    fsync_tree(target)


def _start(command: str, checkpoint_dir: Path, target: Path) -> subprocess.Popen[str]:
    """Start a command and wait until it begins its work."""
    code = _COMMAND.format(command=command, module=MODULES[command], options=OPTIONS.get(command, ""))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint_dir), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None  # asked for
    if process.stdout.readline() != "started\n":
        raise MemSinksError(f"{command} could not start; see above.")
    return process


def _measure(command: str, checkpoint_dir: Path, out_dir: Path, repeats: int) -> Released:
    copies, times, peaks = [], [], []
    for _ in range(repeats):
        copies.append(_timed("copy_weights", checkpoint_dir, out_dir / "copy")[0])
        own, peak, size = _timed(command, checkpoint_dir, out_dir / command)
        times.append(own)
        peaks.append(peak)
    seconds = statistics.median(times)
    return Released(
        command=command,
        seconds=seconds,
        copy_seconds=statistics.median(copies),
        copies=statistics.median(own / copy for own, copy in zip(times, copies, strict=True)),
        output_bytes=size,
        anonymous_bytes=max(peaks),
        memory=max(peaks) / size,
        killed=[_kill(command, checkpoint_dir, out_dir, seconds * moment) for moment in MOMENTS],
    )


def _timed(command: str, checkpoint_dir: Path, target: Path) -> tuple[float, int, int]:
    """Run a command in a process of its own, and remove what it writes.

    Copying, too: a virtual machine's memory is slow to write to until it was used a moment ago, as it was by whatever
    has just been removed. Starting Python takes longer than that lasts, for all alike.

    Returns:
        Seconds, its anonymous memory at the worst moment in bytes, and the size of its files in bytes.
    """
    process = _start(command, checkpoint_dir, target)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.005)
    assert process.stdout is not None  # asked for
    lines = process.stdout.read().splitlines()
    if process.returncode:
        raise MemSinksError(f"{command} failed with status {process.returncode}; see above.")
    size = sum(path.stat().st_size for path in target.iterdir())
    shutil.rmtree(target)
    return json.loads(lines[-1]), peak, size


def _anonymous(process: int) -> int:
    """Anonymous resident memory of a process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _kill(command: str, checkpoint_dir: Path, out_dir: Path, delay: float) -> str:
    """Kill a command by SIGKILL after a delay, and say what it has left under the name asked for."""
    target = out_dir / command
    process = _start(command, checkpoint_dir, target)
    time.sleep(delay)
    process.kill()
    process.wait()
    found = (
        "nothing" if not target.exists() else "the whole" if _is_whole(command, target, checkpoint_dir) else "a part"
    )
    for path in [target, *out_dir.glob(".*.incomplete")]:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _is_whole(command: str, target: Path, checkpoint_dir: Path) -> bool:
    """Whether all weights are there in their shapes."""
    try:
        if command == "drop_sinks":
            check_fits(target, read_weights(target), read_config(target))
            return True
        found = 0
        for path in target.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a dict
    except (MemSinksError, SafetensorError):
        return False
    config = read_config(checkpoint_dir)
    assert isinstance(config, MemSinksConfig)  # made above
    with torch.device("meta"):
        expected = sum(one.numel() for one in BaseGPT(config.to_base()).parameters())
    return found + config.n_embd * (config.padded_vocab_size or 0) == expected  # tied


def _print(found: list[Released], model_name: str, size: int) -> None:
    title = f"{model_name}, {size / 1e9:.2f} GB"
    table = Table(title=title, title_justify="left")
    for name in (
        "command",
        "seconds",
        "copying",
        "copies",
        "output GB",
        "anonymous GB",
        "of the output",
        "after kill -9",
    ):
        table.add_column(name, justify="left" if name in ("command", "after kill -9") else "right")
    for one in found:
        table.add_row(
            one.command,
            f"{one.seconds:.1f}",
            f"{one.copy_seconds:.1f}",
            f"{one.copies:.2f}",
            f"{one.output_bytes / 1e9:.2f}",
            f"{one.anonymous_bytes / 1e9:.2f}",
            f"{one.memory:.2f}",
            ", ".join(one.killed),
        )
    Console(width=140).print(table)
    print(f"{os.cpu_count()} cores of {processor()}, PyTorch {version('torch')}, {date.today().isoformat()}")
