"""What do sinks cost? Training steps with sinks against stock LitGPT, side by side in one process.

All contenders take turns, so that whatever else the machine does hits them alike. A second copy of the stock model is
the control: its ratio to the first one says how far from 1.000 a ratio must be to mean anything.

On a CPU, time is the CPU time of one thread, which other processes disturb far less than wall time. On a GPU it is wall
time between synchronisations.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.throughput import get_available_flops, measure_flops
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import chunked_cross_entropy
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from litgpt_memsinks.bench.evaluate import bench_evaluate
from litgpt_memsinks.bench.generate import bench_generate
from litgpt_memsinks.bench.loader import bench_loader
from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.pretrain.pretrain import NO_COMPILER, has_cpp_compiler, pair_cross_entropy
from litgpt_memsinks.sinks.masks import sink_mask

DOCUMENT = 65
"""Tokens of a document in the made-up batches: several share a row, as in a packed stream."""


@dataclass
class Settings:
    """What is measured."""

    device: Literal["cpu", "cuda"]
    """Where"""
    config: Config
    """Of the stock model"""
    micro_batch_size: int
    """Rows in a step"""
    block_size: int
    """Tokens in a row"""
    shared_fractions: Sequence[float]
    """g of the contenders with sinks"""
    rounds: int
    """Turns of each contender"""


@dataclass
class Measurement:
    """One contender."""

    model: str
    compiled: bool
    seconds_per_step: float
    """Median over the rounds; CPU time on a CPU, wall time on a GPU"""
    ratio: float
    """Median over the rounds of this contender's time divided by the stock model's in the same round"""
    tokens_per_second: float
    """Of the median step"""
    peak_memory: int
    """Bytes that PyTorch holds at the worst moment of a step: weights, gradients, AdamW's state and activations"""
    memory_ratio: float
    """The same divided by the stock model's"""
    utilization: float | None
    """Model FLOPs per second as a share of what the GPU can do in bfloat16 (MFU)"""


class Contender:
    """A model that can train for a step, as ``litgpt.pretrain.fit`` does.

    Args:
        model: On its device.
        batch: Tokens ``(B, T + 1)`` or pairs ``(B, T + 1, 2)``.
        loss: Of logits and targets.
        compiled: Whether to compile the model.
    """

    def __init__(
        self, model: torch.nn.Module, batch: torch.Tensor, loss: Callable[..., torch.Tensor], compiled: bool
    ) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.cuda = batch.device.type == "cuda"
        self.forward = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=self.cuda)

    def step(self) -> None:
        """Train for one step; in bfloat16 where activations go on a GPU, as the recipes do."""
        inputs, targets = self.batch[:, :-1].contiguous(), self.batch[:, 1:].contiguous()
        precision: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16) if self.cuda else nullcontext()
        with precision:
            loss = self.loss(self.forward(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Time of one step."""
        clock = time.perf_counter if self.cuda else time.process_time
        if self.cuda:
            torch.cuda.synchronize()
        started = clock()
        self.step()
        if self.cuda:
            torch.cuda.synchronize()
        return clock() - started

    def peak_memory(self) -> int:
        """Bytes of weights and optimizer state, and what a step takes beyond them at its worst moment."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, states)]
        resident = sum(tensor.nbytes for tensor in tensors)
        return resident + (self._cuda_peak() if self.cuda else self._cpu_peak())

    def _cuda_peak(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _cpu_peak(self) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()
        assert profiled.profiler is not None  # it ran
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()  # negative when memory is given back
            peak = max(peak, held)
        return peak


def bench(
    rounds: int = 20,
    compiled: bool = True,
    device: Literal["cpu", "cuda"] = "cpu",
    model_name: str | None = None,
    micro_batch_size: int | None = None,
    shared_fractions: list[float] | None = None,
    loader: bool = True,
    generation: bool = True,
    evaluation: bool = True,
    out_file: Path | None = None,
) -> None:
    """Time training steps, data loading, generation and evaluation against stock LitGPT, side by side.

    Args:
        rounds: How often each contender takes its turn.
        compiled: Whether to measure with torch.compile too, which takes a minute to compile.
        device: cpu (one thread, a small model) or cuda (bfloat16, SmolLM-360M).
        model_name: A model of LitGPT's registry instead.
        micro_batch_size: Rows in a step; 4 on a CPU, on a GPU the largest power of two that fits.
        shared_fractions: g of the models with sinks; 0.5, 0.7 and 0.95 by default. All contenders are in memory at
            once, so name one for a large model.
        loader: Whether to measure the loader too.
        generation: Whether to measure how fast the dropped model generates too.
        evaluation: Whether to measure evaluation too, on a CPU.
        out_file: JSON file for the figures. Must not exist.

    Raises:
        MemSinksError: If `rounds` is below 3, there is no such device, or `out_file` exists.
    """
    if rounds < 3:
        raise MemSinksError(f"rounds is {rounds}, but a median needs at least 3.")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise MemSinksError(f"micro_batch_size is {micro_batch_size}, but it must be at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise MemSinksError("device is 'cuda', but PyTorch finds no GPU here. Use --device cpu.")
    if out_file is not None:
        refuse_to_overwrite(out_file)
    settings = _settings(device, model_name, micro_batch_size, shared_fractions or [0.5, 0.7, 0.95], rounds)
    can_compile = device == "cuda" or has_cpp_compiler()
    if compiled and not can_compile:
        print(NO_COMPILER)
    measurements = [
        one for mode in ([False, True] if compiled and can_compile else [False]) for one in measure(settings, mode)
    ]
    print_steps(measurements, settings)
    if device == "cuda":
        print(f"Masks on the GPU are bit for bit those on the CPU: {masks_agree()}")
    figures = {
        "steps": list(map(asdict, measurements)),
        "loader": bench_loader() if loader else [],
        "generation": bench_generate(device=device) if generation else [],
        "evaluation": bench_evaluate(small_config()) if evaluation and device == "cpu" else [],
    }
    if out_file is not None:
        write_json(out_file, _where(settings) | figures)


def _settings(
    device: Literal["cpu", "cuda"],
    model_name: str | None,
    micro_batch_size: int | None,
    shared_fractions: Sequence[float],
    rounds: int,
) -> Settings:
    """Settings with what was left open filled in."""
    if device == "cpu":
        torch.set_num_threads(1)  # CPU time of one thread is steady to about 2%
    if model_name is None and device == "cuda":
        model_name = "SmolLM-360M-MemSinks"
    config = small_config() if model_name is None else Config.from_name(model_name)
    block_size = min(config.block_size, 2048) if device == "cuda" else min(config.block_size, 256)
    settings = Settings(device, config, micro_batch_size or 4, block_size, shared_fractions, rounds)
    if micro_batch_size is None and device == "cuda":
        settings.micro_batch_size = largest_batch(settings)
    return settings


def small_config() -> Config:
    """A model that a CPU trains for a step in half a second."""
    return Config(
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


def contenders(settings: Settings, compiled: bool) -> dict[str, Contender]:
    """The stock model, its copy as control, and one with sinks per shared fraction."""
    torch.manual_seed(0)
    shape = (settings.micro_batch_size, settings.block_size + 1)
    tokens = torch.randint(0, settings.config.vocab_size, shape, device=settings.device)
    documents = -(-shape[1] // DOCUMENT)
    ids = torch.randint(1, 2**31, (shape[0], documents), device=settings.device)
    pairs = torch.stack((tokens, ids.repeat_interleave(DOCUMENT, dim=1)[:, : shape[1]]), dim=-1)

    def built(model: Callable[[], BaseGPT]) -> BaseGPT:
        with torch.device(settings.device):
            made = model()
        made.max_seq_length = settings.block_size
        return made

    found = {
        name: Contender(built(partial(BaseGPT, settings.config)), tokens, chunked_cross_entropy, compiled)
        for name in ("stock", "stock again")
    }
    for fraction in settings.shared_fractions:
        config = MemSinksConfig.from_base(settings.config, SinkArgs(fraction, active_probability=0.3))
        own = built(partial(GPT, config))
        found[f"sinks, g = {fraction}"] = Contender(own, pairs, pair_cross_entropy, compiled)
    return found


def largest_batch(settings: Settings) -> int:
    """The largest power of two of rows that a compiled step of the stock model takes with all contenders in memory."""
    rows, fits = 1, 0
    while True:
        settings.micro_batch_size = rows
        try:
            made = contenders(settings, compiled=True)
            for contender in made.values():  # optimizer states of all, activations of one at a time
                contender.step()
            made.clear()
            fits, rows = rows, 2 * rows
        except torch.cuda.OutOfMemoryError as error:
            if not fits:
                problem = f"{settings.config.name!r} does not fit into the GPU with one row"
                raise MemSinksError(f"{problem}. Name fewer shared_fractions, or a smaller model.") from error
            return fits
        finally:
            torch.cuda.empty_cache()


def measure(settings: Settings, compiled: bool) -> list[Measurement]:
    """Time all contenders in turn."""
    made = contenders(settings, compiled)
    names = list(made)
    for contender in made.values():  # compiles, and fills caches
        contender.step()
        contender.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(settings.rounds), "compiled" if compiled else "eager", transient=True):
        for place in range(len(names)):  # another order in each round
            name = names[(place + turn) % len(names)]
            times[name].append(made[name].seconds())
    memory = {name: contender.peak_memory() for name, contender in made.items()}
    stock, tokens, flops = names[0], settings.micro_batch_size * settings.block_size, _flops(settings)
    return [
        Measurement(
            model=name,
            compiled=compiled,
            seconds_per_step=(median := statistics.median(times[name])),
            ratio=statistics.median(own / base for own, base in zip(times[name], times[stock], strict=True)),
            tokens_per_second=tokens / median,
            peak_memory=memory[name],
            memory_ratio=memory[name] / memory[stock],
            utilization=flops / median if flops else None,
        )
        for name in names
    ]


def _flops(settings: Settings) -> float | None:
    """FLOPs of a step of the stock model as a share of what the GPU does in a second; ``None`` on a CPU."""
    if settings.device == "cpu":
        return None
    available = get_available_flops(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    if not available:
        return None
    with torch.device("meta"):
        model = BaseGPT(settings.config)
        tokens = torch.zeros((settings.micro_batch_size, settings.block_size), dtype=torch.int64)
    done = measure_flops(
        model, lambda: model(tokens), lambda logits: chunked_cross_entropy(logits, tokens, chunk_size=0)
    )
    return done / available


def masks_agree() -> bool:
    """Whether the GPU computes the CPU's masks, eagerly and compiled, at odd sizes."""
    ids = torch.randint(-(2**31), 2**31, (4097,), dtype=torch.int64).to(torch.int32)
    compiled = torch.compile(sink_mask)
    return all(
        torch.equal(sink_mask(ids, n, 0.3, 5), function(ids.cuda(), n, 0.3, 5).cpu())
        for n in (1, 77, 768, 2457)
        for function in (sink_mask, compiled)
    )


def _where(settings: Settings) -> dict[str, Any]:
    """What a reader needs to compare figures."""
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    return {
        "date": date.today().isoformat(),
        "hardware": gpu or f"{processor()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "litgpt", "litdata", "litgpt-memsinks")},
        "model": settings.config.name,
        "micro_batch_size": settings.micro_batch_size,
        "block_size": settings.block_size,
        "rounds": settings.rounds,
    }


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def print_steps(measurements: Sequence[Measurement], settings: Settings) -> None:
    """Draw the table of training steps."""
    kind = "wall time, bfloat16" if settings.device == "cuda" else "CPU time of one thread"
    rows = f"{settings.micro_batch_size} rows of {settings.block_size} tokens"
    title = f"Training step of {settings.config.name}, {rows}: {kind}, median of {settings.rounds} rounds"
    table = Table(title=title, title_justify="left")
    columns = ["mode", "model", "ms per step", "ratio to stock", "tokens/s", "peak MB", "memory ratio"]
    for name in [*columns, *(["MFU"] if settings.device == "cuda" else [])]:
        table.add_column(name, justify="left" if name in ("mode", "model") else "right")
    for one in measurements:
        cells = [
            "compiled" if one.compiled else "eager",
            one.model,
            f"{1000 * one.seconds_per_step:.1f}",
            f"{one.ratio:.3f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.peak_memory / 1e6:,.1f}",
            f"{one.memory_ratio:.3f}",
        ]
        if settings.device == "cuda":
            cells.append("unknown" if one.utilization is None else f"{one.utilization:.1%}")
        table.add_row(*cells)
    Console(width=120).print(table)
    print('"stock again" is the control: differences smaller than its own from 1.000 are noise.')
