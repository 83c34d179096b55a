"""Is `plan` right at full size? A step of a full-size recipe by the stock command on a CPU, measured while it runs.

The command runs in this process, so that PyTorch's own hooks see what it holds: an optimizer hook sums weights,
gradients and AdamW's state, a hook on saved tensors the activations. Nothing of the training is replaced.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import litgpt.__main__
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.corpus.embedded import train_tokenizer_on, write_corpus
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.model.checkpoint import WEIGHTS
from litgpt_memsinks.plan.plan import Throughput, make_plan, parse_pretrain
from litgpt_memsinks.prepare.prepare import prepare

TOLERANCE = 0.02


def full_size(
    recipe: Path = Path("recipes/smollm360_memsinks.yaml"),
    out_dir: Path = Path("runs/full_size"),
    block_size: int = 256,
    steps: int = 2,
) -> None:
    """Train some steps of a full-size recipe on this CPU, and compare what it takes with what `plan` says.

    Two steps of SmolLM-360M take 9 GB of memory, 6 GB of disk and some minutes. The batch is one short row, in float32
    and eager; all else is the recipe's. The text is made up. Then the sinks are dropped, and stock LitGPT generates.

    Args:
        recipe: A training recipe.
        out_dir: Folder to write. Must not exist.
        block_size: Tokens in a row, T.
        steps: Optimizer steps.

    Raises:
        MemSinksError: If `out_dir` exists, or if a figure is further than 2% from the plan's.
    """
    refuse_to_overwrite(out_dir)
    _prepare(out_dir)
    arguments = [
        *("--config", str(recipe), "--out_dir", str(out_dir / "run"), "--precision", "32-true", "--devices", "1"),
        *("--data.data_path", str(out_dir / "data"), "--data.num_workers", "0", "--eval.max_iters", "1"),
        *("--train.micro_batch_size", "1", "--train.global_batch_size", "1", "--train.lr_warmup_steps", "1"),
        *("--train.max_seq_length", str(block_size), "--train.max_tokens", str(steps * block_size)),
    ]
    settings = parse_pretrain(arguments)
    planned = make_plan(settings, Throughput())
    config = MemSinksConfig.from_name(settings["model_name"], settings["data"].sinks)
    assert config.padded_vocab_size is not None  # set by Config.__post_init__
    measured = _train(arguments, config.padded_vocab_size)
    final, dropped = out_dir / "run" / "final", out_dir / "dropped"
    measured["checkpoint file"] = (final / WEIGHTS).stat().st_size
    if config.n_sink:
        drop_sinks(final, dropped)
        measured["dropped file"] = (dropped / WEIGHTS).stat().st_size
        _generate(dropped)
    rows = compare(planned, measured)
    _print(rows)
    write_json(out_dir / "full_size.json", {"rows": rows, "peak_resident_bytes": _peak_resident()})
    if wrong := [name for name, one in rows.items() if abs(one["ratio"] - 1) > TOLERANCE]:
        raise MemSinksError(f"The plan is more than {TOLERANCE:.0%} off for {', '.join(wrong)}; see the table above.")


def _prepare(out_dir: Path) -> None:
    corpus, tokenizer = out_dir / "corpus", out_dir / "tokenizer"
    write_corpus(corpus, documents=300, validation_documents=40)
    train_tokenizer_on(corpus / "train.jsonl", tokenizer, vocab_size=2048)
    prepare(
        train=corpus / "train.jsonl",
        validation=corpus / "validation.jsonl",
        tokenizer_dir=tokenizer,
        out_dir=out_dir / "data",
        repeated_documents=8,
        repeats=6,
    )


def _train(arguments: list[str], padded_vocab_size: int) -> dict[str, int]:
    """Run ``litgpt pretrain`` uncompiled and measure it, in bytes (``parameters`` in numbers)."""
    argv = mock.patch.object(sys, "argv", ["litgpt", "pretrain", *arguments])
    with argv, torch.compiler.set_stance("force_eager"), measuring(padded_vocab_size) as measured:
        litgpt.__main__.main()
    return measured


@contextmanager
def measuring(padded_vocab_size: int) -> Iterator[dict[str, int]]:
    """Measure the training steps in a block. What was measured last stands in the yielded dictionary.

    ``activations`` is what the last forward pass saved for its backward pass, each storage once, without weights and
    without the loss's ``(..., padded_vocab_size)``, which `sizing.logits` counts.
    """
    measured: dict[str, int] = {}
    saved: dict[int, torch.Tensor] = {}

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        measured["parameters"] = sum(parameter.numel() for parameter in parameters)
        measured["weights"] = _bytes(parameters)
        measured["gradients"] = _bytes([one.grad for one in parameters if one.grad is not None])
        measured["activations"] = sum(
            one.untyped_storage().nbytes()
            for key, one in saved.items()
            if key not in known and not _is_of_loss(one, padded_vocab_size)
        )
        saved.clear()

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        state = [value for values in optimizer.state.values() for value in values.values()]
        measured["optimizer"] = _bytes([value for value in state if isinstance(value, torch.Tensor)])

    hooks = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]
    try:
        with saved_tensors_hooks(lambda one: _note(one, saved), lambda one: one):
            yield measured
    finally:
        for hook in hooks:
            hook.remove()


def _note(one: torch.Tensor, saved: dict[int, torch.Tensor]) -> torch.Tensor:
    """Note what is saved, by its storage. LitGPT's FLOP count on the meta device saves nothing real."""
    if one.device.type != "meta":
        saved[one.untyped_storage().data_ptr()] = one.detach()
    return one


def _is_of_loss(one: torch.Tensor, padded_vocab_size: int) -> bool:
    """Whether this is a log-softmax ``(tokens, padded_vocab_size)``. The output layer's weight is kept transposed."""
    return one.shape[-1:] == (padded_vocab_size,) and one.is_contiguous()


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _generate(checkpoint_dir: Path) -> None:
    """Let stock LitGPT, without us, generate from the dropped model: it must load."""
    command = [sys.executable, "-m", "litgpt", "generate", str(checkpoint_dir), "--prompt", "One day"]
    subprocess.run(
        [*command, "--max_new_tokens", "8"], check=True, env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    )


def compare(planned: dict[str, Any], measured: dict[str, int]) -> dict[str, dict[str, float]]:
    """Name of each figure to what the plan says, what was measured, and measured divided by planned."""
    (memory,) = (
        one
        for one in planned["memory"]
        if one["precision"] == planned["precision"] and not one["compiled"] and not one["checkpointing"]
    )
    says = {
        "parameters": planned["parameters"]["total"],
        **{name: memory[name] for name in ("weights", "gradients", "optimizer", "activations")},
        "checkpoint file": planned["disk"]["final_checkpoint"],
        "dropped file": planned["disk"]["dropped_float32"],
    }
    return {
        name: {"planned": says[name], "measured": value, "ratio": value / says[name]}
        for name, value in measured.items()
    }


def _peak_resident() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _print(rows: dict[str, dict[str, float]]) -> None:
    table = Table(title="The plan against what was measured; bytes but for parameters", title_justify="left", box=None)
    for name in ("figure", "planned", "measured", "measured / planned"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, one in rows.items():
        table.add_row(name, f"{one['planned']:,.0f}", f"{one['measured']:,.0f}", f"{one['ratio']:.4f}")
    Console(width=100).print(table)
    print(f"Peak resident memory of the process: {_peak_resident() / 1e9:.2f} GB")
