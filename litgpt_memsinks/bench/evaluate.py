"""How fast is measuring? Batched extraction against LitGPT's own generation, and losses against bare forward passes.

Contenders take turns on the same documents, so that whatever else the machine does hits them alike. Time is the CPU
time of the process. A second turn of the base is the control.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.model import GPT as BaseGPT
from rich.console import Console
from rich.progress import track
from rich.table import Table

from litgpt_memsinks.data.scored import Scored, pad
from litgpt_memsinks.evaluate.extraction import continue_greedily
from litgpt_memsinks.model.losses import batched, document_nats

_DOCUMENTS, _PREFIX, _SUFFIX, _BATCH, _LENGTH = 32, 32, 32, 32, 129


@dataclass
class Speed:
    """One contender at one task."""

    task: str
    """extraction or losses"""
    contender: str
    """What does it"""
    tokens_per_second: float
    """Generated, or scored; median over the rounds, per second of CPU time"""
    ratio: float
    """Median over the rounds of its tokens per second divided by the base's"""


def bench_evaluate(config: Config, rounds: int = 5) -> list[dict[str, Any]]:
    """Measure and print the speed of extraction and of losses.

    Args:
        config: Of a plain model, with random weights.
        rounds: How often each contender takes its turn.

    Returns:
        ``Speed`` of each as plain values.
    """
    torch.manual_seed(0)
    model = BaseGPT(config).eval()
    length = min(_LENGTH, config.block_size + 1)
    tokens = list(torch.randint(0, config.vocab_size, (_DOCUMENTS, length)))
    documents = Scored(tokens, torch.arange(1, _DOCUMENTS + 1))
    found = _measure("extraction", extractors(model, documents), _DOCUMENTS * _SUFFIX, rounds)
    found += _measure("losses", scorers(model, documents, config.block_size), _DOCUMENTS * (length - 1), rounds)
    _print(found, rounds)
    return list(map(asdict, found))


def extractors(model: BaseGPT, documents: Scored) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to continue every document's prefix greedily; each gives the continuations, ``(N, suffix)``."""
    prompts = torch.stack([tokens[:_PREFIX] for tokens in documents.tokens])

    def one_by_one() -> torch.Tensor:
        rows = []
        with torch.inference_mode():
            model.set_kv_cache(1, _PREFIX + _SUFFIX)
            for prompt in prompts:
                rows.append(generate(model, prompt, _PREFIX + _SUFFIX, temperature=0.0, include_prompt=False))
            model.clear_kv_cache()
        return torch.stack(rows)

    def together() -> torch.Tensor:
        return torch.cat([continue_greedily(model, batch, _SUFFIX) for batch in prompts.split(_BATCH)])

    name = "litgpt generate, one document at a time"
    return {name: one_by_one, f"{name}, again": one_by_one, f"ours, {_BATCH} at a time": together}


def scorers(model: BaseGPT, documents: Scored, block_size: int) -> dict[str, Callable[[], Any]]:
    """A bare forward pass over the documents, and their losses."""

    @torch.inference_mode()
    def bare() -> None:
        for batch in batched(model, documents, block_size):
            model(pad([documents.tokens[index] for index in batch], block_size)[0])

    return {
        "bare forward pass": bare,
        "bare forward pass, again": bare,
        "ours": lambda: document_nats(model, documents, block_size),
    }


def _measure(task: str, contenders: dict[str, Callable[[], Any]], tokens: int, rounds: int) -> list[Speed]:
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:  # the first turn of each pays for what is made once
        contenders[name]()
    for turn in track(range(rounds), task, transient=True):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            started = time.process_time()
            contenders[name]()
            speeds[name].append(tokens / (time.process_time() - started))
    base = speeds[names[0]]
    return [
        Speed(
            task=task,
            contender=name,
            tokens_per_second=statistics.median(own),
            ratio=statistics.median(mine / theirs for mine, theirs in zip(own, base, strict=True)),
        )
        for name, own in speeds.items()
    ]


def _print(measured: list[Speed], rounds: int) -> None:
    title = f"Measuring {_DOCUMENTS} documents: median of {rounds} rounds, CPU time of one thread"
    table = Table(title=title, title_justify="left")
    for name in ("task", "contender", "tokens/s", "ratio to the first"):
        table.add_column(name, justify="right" if "/" in name or "ratio" in name else "left")
    for one in measured:
        table.add_row(one.task, one.contender, f"{one.tokens_per_second:,.0f}", f"{one.ratio:.2f}")
    Console(width=120).print(table)
