"""What do sinks cost? Training steps with sinks against stock LitGPT, side by side in one process.

All contenders take turns, so that whatever else the machine does hits them alike. A second copy of the stock model is
the control: its ratio to the first one says how far from 1.000 a ratio must be to mean anything.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import chunked_cross_entropy
from rich.console import Console
from rich.progress import track
from rich.table import Table

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.model import GPT
from litgpt_memsinks.pretrain import NO_COMPILER, has_cpp_compiler, pair_cross_entropy

SHARED_FRACTIONS = (0.5, 0.7, 0.95)


@dataclass
class Measurement:
    """One contender. Times are CPU seconds of all threads, which other processes disturb far less than wall time."""

    model: str
    compiled: bool
    seconds_per_step: float
    """Median over the rounds"""
    ratio: float
    """Median over the rounds of this contender's time divided by the stock model's in the same round"""


def bench(rounds: int = 20, compiled: bool = True, out_file: Path | None = None) -> None:
    """Time training steps with sinks against stock LitGPT on the CPU, eager and compiled.

    Args:
        rounds: How often each contender takes its turn.
        compiled: Whether to measure with torch.compile too, which takes a minute to compile.
        out_file: JSON file for the figures. Must not exist.

    Raises:
        MemSinksError: If `rounds` is below 3 or `out_file` exists.
    """
    if rounds < 3:
        raise MemSinksError(f"rounds is {rounds}, but a median needs at least 3.")
    if out_file is not None:
        refuse_to_overwrite(out_file)
    torch.set_num_threads(1)  # CPU time of one thread is steady to about 2%
    modes = [False, True] if compiled and has_cpp_compiler() else [False]
    if compiled and not has_cpp_compiler():
        print(NO_COMPILER)
    measurements = [measurement for mode in modes for measurement in measure(mode, rounds)]
    _print(measurements, rounds)
    if out_file is not None:
        packages = ("torch", "litgpt", "litgpt-memsinks")
        machine = {"processor": platform.processor() or platform.machine(), "threads": 1}
        versions = {name: version(name) for name in packages}
        write_json(out_file, {**machine, "versions": versions, "measurements": [asdict(one) for one in measurements]})


def measure(compiled: bool, rounds: int) -> list[Measurement]:
    """Time all contenders in turn."""
    steps = contenders(compiled)
    names = list(steps)
    for step in steps.values():  # compiles, and fills caches
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(rounds), "compiled" if compiled else "eager", transient=True):
        for place in range(len(names)):  # another order in each round
            name = names[(place + turn) % len(names)]
            started = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - started)
    stock = times[names[0]]
    return [
        Measurement(
            model=name,
            compiled=compiled,
            seconds_per_step=statistics.median(times[name]),
            ratio=statistics.median(own / base for own, base in zip(times[name], stock, strict=True)),
        )
        for name in names
    ]


def contenders(compiled: bool) -> dict[str, Callable[[], None]]:
    """A training step of each: the stock model, its copy as control, and one with sinks per shared fraction."""
    config = Config(
        name="bench",
        n_layer=6,
        n_embd=256,
        n_head=4,
        block_size=256,
        padded_vocab_size=2048,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=1024,
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 2048, (4, 257))
    # four documents in each row, as in a packed stream
    ids = torch.randint(1, 2**31, (4, 4)).repeat_interleave(65, dim=1)[:, :257]
    pairs = torch.stack((tokens, ids), dim=-1)
    steps = {name: _step(BaseGPT(config), tokens, chunked_cross_entropy, compiled) for name in ("stock", "stock again")}
    for fraction in SHARED_FRACTIONS:
        sinks = SinkArgs(shared_fraction=fraction, active_probability=0.3)
        model = GPT(MemSinksConfig.from_base(config, sinks))
        steps[f"sinks, g = {fraction}"] = _step(model, pairs, pair_cross_entropy, compiled)
    return steps


def _step(
    model: torch.nn.Module, batch: torch.Tensor, loss: Callable[..., torch.Tensor], compiled: bool
) -> Callable[[], None]:
    """A function that trains for one step, as ``litgpt.pretrain.fit`` does."""
    optimizer = torch.optim.AdamW(model.parameters())
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        loss(forward(batch[:, :-1].contiguous()), batch[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _print(measurements: list[Measurement], rounds: int) -> None:
    table = Table(title=f"Training step: CPU time of one thread, median of {rounds} rounds", title_justify="left")
    for name in ("mode", "model", "ms per step", "ratio to stock"):
        table.add_column(name, justify="left" if name in ("mode", "model") else "right")
    for one in measurements:
        mode = "compiled" if one.compiled else "eager"
        table.add_row(mode, one.model, f"{1000 * one.seconds_per_step:.1f}", f"{one.ratio:.3f}")
    Console(width=100).print(table)
    print('"stock again" is the control: differences smaller than its own from 1.000 are noise.')
