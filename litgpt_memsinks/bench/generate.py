"""How much faster does the dropped model generate? LitGPT's own generation with its KV cache, in turn.

The model with all neurons of its MLPs is what the dropped one was cut from; LitGPT computes both, so nothing but the
width is different. A second copy of the wide one is the control. Their FLOPs are counted in a run of the same kind.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.model import GPT as BaseGPT
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from litgpt_memsinks.config import MemSinksConfig, SinkArgs

_PROMPT = 16
SHARED = 0.5
"""g of the dropped model"""


@dataclass
class Generating:
    """One contender."""

    model: str
    intermediate_size: int
    """Neurons of each MLP"""
    tokens_per_second: float
    """New tokens of the median round; per second of CPU time of one thread on a CPU, of wall time on a GPU"""
    speed_ratio: float
    """Median over the rounds of its speed divided by the wide model's in the same round"""
    flops_ratio: float
    """FLOPs of the wide model divided by its own, for the same prompt and new tokens"""


def bench_generate(
    rounds: int = 15, new_tokens: int = 48, device: str = "cpu", config: Config | None = None
) -> list[dict[str, Any]]:
    """Measure and print how fast the dropped model and the one with all neurons generate.

    Args:
        rounds: How often each takes its turn.
        new_tokens: Tokens that each turn generates, one row.
        device: cpu, where a turn is the CPU time of the caller's one thread, or cuda, in bfloat16.
        config: Of the wide model; by default some layers of SmolLM-360M with a small vocabulary.

    Returns:
        ``Generating`` of each as plain values.
    """
    wide = config or wide_config()
    models = contenders(wide, device, _PROMPT + new_tokens)
    prompt = torch.arange(_PROMPT, device=device)
    names = list(models)
    flops = {name: _flops(model, prompt, new_tokens) for name, model in models.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(rounds), "generating", transient=True):
        for place in range(len(names)):  # another order in each round
            name = names[(place + turn) % len(names)]
            seconds[name].append(_seconds(models[name], prompt, new_tokens))
    base = names[0]
    measured = [
        Generating(
            model=name,
            intermediate_size=models[name].config.intermediate_size or 0,
            tokens_per_second=new_tokens / statistics.median(seconds[name]),
            speed_ratio=statistics.median(b / own for own, b in zip(seconds[name], seconds[base], strict=True)),
            flops_ratio=flops[base] / flops[name],
        )
        for name in names
    ]
    _print(measured, rounds, new_tokens)
    return list(map(asdict, measured))


def wide_config() -> Config:
    """Four layers of SmolLM-360M; with its 49,152 tokens, the output layer would be half of so few layers."""
    return Config.from_name("SmolLM-360M-MemSinks", n_layer=4, vocab_size=2048, padded_vocab_size=2048)


def contenders(wide: Config, device: str, length: int) -> dict[str, BaseGPT]:
    """The wide model, its copy as control, and the dropped one, with a KV cache of ``length`` tokens."""
    dropped = MemSinksConfig.from_base(wide, SinkArgs(SHARED, 0.3)).to_base()
    configs = {"all neurons": wide, "all neurons again": wide, f"dropped, g = {SHARED}": dropped}
    models = {}
    for name, config in configs.items():
        with torch.device(device):
            model = BaseGPT(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
            model.max_seq_length = length
            model.set_kv_cache(batch_size=1)
        models[name] = model
    return models


def _generate(model: BaseGPT, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    with torch.inference_mode():
        return generate(model, prompt, max_returned_tokens=len(prompt) + new_tokens, temperature=0.0)


def _flops(model: BaseGPT, prompt: torch.Tensor, new_tokens: int) -> int:
    with FlopCounterMode(display=False) as counter:
        _generate(model, prompt, new_tokens)
    return counter.get_total_flops()


def _seconds(model: BaseGPT, prompt: torch.Tensor, new_tokens: int) -> float:
    """Time of one turn, on the clock of the prompt's device."""
    cuda = prompt.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    started = clock()
    _generate(model, prompt, new_tokens)
    if cuda:
        torch.cuda.synchronize()
    return clock() - started


def _print(measured: list[Generating], rounds: int, new_tokens: int) -> None:
    title = f"Generating {new_tokens} tokens with LitGPT's KV cache: median of {rounds} rounds"
    table = Table(title=title, title_justify="left")
    for name in ("model", "neurons", "tokens/s", "speed", "FLOPs saved", "gained of them"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for one in measured:
        gained = (one.speed_ratio - 1) / (one.flops_ratio - 1) if one.flops_ratio > 1 else None
        table.add_row(
            one.model,
            f"{one.intermediate_size:,}",
            f"{one.tokens_per_second:,.1f}",
            f"× {one.speed_ratio:.3f}",
            f"× {one.flops_ratio:.3f}",
            "" if gained is None else f"{gained:.0%}",
        )
    Console(width=120).print(table)
