"""How does ``litgpt pretrain`` train with sinks? A dispatcher in front of ``litgpt.pretrain.main``.

This module is imported right after ``litgpt.pretrain`` (`plugin.py`), or with the first use of one of our names, as in
``data.class_path: litgpt_memsinks.MemSinksData``. That replaces two attributes for good: ``litgpt.pretrain.main``, and
``litgpt.pretrain.L``, through which Fabric is made (`launch.py`). A run whose data is ``MemSinksData`` gets LitGPT's
own ``main`` with some of the names it uses swapped while it runs; any other run gets LitGPT's own, untouched.
"""

import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from functools import partial, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import lightning as L
import litgpt.pretrain
import torch
import yaml
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import fit as base_fit
from litgpt.pretrain import main as base_main
from litgpt.pretrain import save_checkpoint as base_save_checkpoint
from litgpt.pretrain import validate as base_validate
from litgpt.utils import chunked_cross_entropy

from litgpt_memsinks.config import SINK_DEFAULTS, MemSinksConfig
from litgpt_memsinks.data.data import MemSinksData
from litgpt_memsinks.data.goldfish import describe as describe_goldfish
from litgpt_memsinks.errors import MemSinksError, end
from litgpt_memsinks.model.model import GPT, removed_mask
from litgpt_memsinks.pretrain.launch import LIGHTNING, check_batches, check_launched, initialize_weights, together
from litgpt_memsinks.pretrain.preemption import StoppableIterator, listening
from litgpt_memsinks.pretrain.resuming import check_same_run
from litgpt_memsinks.pretrain.resuming import find as find_checkpoint
from litgpt_memsinks.pretrain.run import Run
from litgpt_memsinks.pretrain.saving import save_checkpoint
from litgpt_memsinks.pretrain.sink_steps import give_sinks_their_steps
from litgpt_memsinks.pretrain.watch import Watch

NO_COMPILER = (
    "No C++ compiler was found (install g++, or set CXX): torch.compile is skipped and training runs eagerly, which is "
    "slower."
)


RECORD = ("sink_removed", "sink_removed_documents")
"""Fields of the configuration that no setting gives: what `remove` did to the checkpoint that a run begins with."""


def pair_cross_entropy(
    logits: torch.Tensor | list[torch.Tensor], targets: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """LitGPT's loss on (token, sequence ID) pairs, or on the third number of each token if there is one.

    Args:
        logits: ``(B, T, padded_vocab_size)``.
        targets: Pairs ``(B, T, 2)``, triples ``(B, T, 3)`` (`data.collate_goldfish`), or plain tokens ``(B, T)`` as
            LitGPT's FLOP count passes them.
        args: As in ``litgpt.utils.chunked_cross_entropy``.
        kwargs: As in ``litgpt.utils.chunked_cross_entropy``.

    Returns:
        Mean negative log-likelihood in nats per token, 0-dim.
    """
    if targets.dim() == 3:
        targets = targets[..., 2 if targets.size(-1) == 3 else 0]
    return chunked_cross_entropy(logits, targets, *args, **kwargs)


@wraps(base_main)
def main(*args: Any, config: Config, data: DataModule, **kwargs: Any) -> None:
    """LitGPT's ``main``, or the same with sinks if ``data`` is ``MemSinksData``."""
    try:
        if isinstance(data, MemSinksData):
            _main_with_sinks(*args, config=config, data=data, **kwargs)
        elif config.name in SINK_DEFAULTS:
            raise MemSinksError(
                f"{config.name!r} trains with sinks only on data with sequence IDs, but data is "
                f"{type(data).__name__}. Use data.class_path: litgpt_memsinks.MemSinksData, or a plain model's name."
            )
        else:
            base_main(*args, config=config, data=data, **kwargs)
    except MemSinksError as error:
        end(error)  # where LitGPT's command line would show a traceback


def _main_with_sinks(
    fabric: L.Fabric,
    *,
    config: Config,
    data: MemSinksData,
    train: Any,
    out_dir: Path,
    resume: bool | Literal["auto"] | Path,
    tokenizer_dir: Path | None,
    initial_checkpoint_dir: Path | None,
    **kwargs: Any,
) -> None:
    """Check everything that can be checked, then run LitGPT's ``main`` on a model with sinks."""
    with together(fabric):
        sink_config = MemSinksConfig.from_base(config, data.sinks)
        block_size = train.max_seq_length or sink_config.block_size
        assert sink_config.padded_vocab_size is not None  # set by Config.__post_init__
        manifest = data.check(sink_config.padded_vocab_size, block_size, train.micro_batch_size, tokenizer_dir)
        assert data.split_names is not None  # checked
        check_launched(fabric, data.launch, train, kwargs["devices"], kwargs["num_nodes"])
        if initial_checkpoint_dir is not None:
            if resume:
                raise MemSinksError(
                    f"Both resume ({resume}) and initial_checkpoint_dir ({str(initial_checkpoint_dir)!r}) are given. "
                    "Give one: a checkpoint of this run, or one that it begins with."
                )
            check_same_sinks(sink_config, initial_checkpoint_dir)
            sink_config = with_removed(sink_config, initial_checkpoint_dir)
    fabric.print(describe(sink_config))
    if data.goldfish.k:
        fabric.print(describe_goldfish(data.goldfish))
    run = Run(
        fabric,
        sink_config,
        data,
        train,
        kwargs["eval"],
        out_dir,
        devices=kwargs["devices"],
        num_nodes=kwargs["num_nodes"],
        tokenizer_dir=tokenizer_dir or data.tokenizer_dir,  # so that checkpoints carry their tokenizer
        data_digest=manifest.splits[data.split_names[0]].digest if data.split_names[0] in manifest.splits else None,
    )
    with together(fabric):
        if checkpoint := find_checkpoint(run, resume):
            check_same_sinks(sink_config, checkpoint.parent)
            run.config = sink_config = with_removed(sink_config, checkpoint.parent)
            data.same_content = check_same_run(run, checkpoint.parent)
    with ExitStack() as stack:
        stack.enter_context(compilation(fabric))
        stack.enter_context(listening(run))
        stack.enter_context(mock.patch.multiple(litgpt.pretrain, **replacements(run)))
        base_main(
            fabric,
            config=sink_config,
            data=data,
            train=train,
            out_dir=out_dir,
            resume=checkpoint or False,
            initial_checkpoint_dir=initial_checkpoint_dir,
            tokenizer_dir=run.tokenizer_dir,
            **kwargs,
        )


def replacements(run: Run) -> dict[str, Any]:
    """The names in ``litgpt.pretrain`` that a run with sinks replaces.

    Raises:
        MemSinksError: If the installed LitGPT does not have one of them.
    """
    names = {
        "GPT": GPT,
        "chunked_cross_entropy": pair_cross_entropy,
        "initialize_weights": partial(initialize_weights, run),
        "fit": partial(fit, run),
        "validate": Watch(run, base_validate).validate,
        "save_checkpoint": partial(save_checkpoint, run, base_save_checkpoint),
        "CycleIterator": partial(StoppableIterator, run),
    }
    if missing := [name for name in names if not hasattr(litgpt.pretrain, name)]:
        raise MemSinksError(
            f"litgpt {version('litgpt')} has no {', '.join(missing)} in litgpt.pretrain, which training with sinks "
            "replaces. Install a release that litgpt-memsinks supports (0.5.13 does)."
        )
    return names


def fit(run: Run, *args: Any, state: dict[str, Any], **kwargs: Any) -> None:
    """LitGPT's ``fit``, whose state the run keeps in sight."""
    run.state = state
    with together(run.fabric):
        give_sinks_their_steps(run)
    check_batches(run, kwargs["train_dataloader"], kwargs["val_dataloader"])
    base_fit(*args, state=state, **kwargs)


def describe(config: MemSinksConfig) -> str:
    """One line that says which neurons are sinks, with g as realised."""
    size = config.intermediate_size
    assert size is not None  # set by Config.__post_init__
    within = ", attention within documents" * (config.sink_attention == "document")
    if not config.n_sink:
        return f"MemSinks: no sinks (shared_fraction 1.0), all {size} neurons of each MLP are shared{within}."
    if config.sink_method != "memsinks":
        return (
            f"Gradient masking ({config.sink_method}): repeated documents train {config.n_sink} of {size} neurons of "
            f"each MLP{_beyond_the_paper(config)}, all others the other {config.n_shared} (g = "
            f"{config.n_shared / size:.3f}){within}."
        )
    return (
        f"MemSinks: {config.n_shared} of {size} neurons of each MLP are shared (g = {config.n_shared / size:.3f}), "
        f"{config.n_sink} are sinks, each on for a document with p = {config.sink_active_probability:g} "
        f"({config.sink_sinks_for} documents, scale {config.sink_scale}{_beyond_the_paper(config)}{within})."
        + (f" {int(removed_mask(config).sum())} of them were removed and stay off." if config.sink_removed else "")
    )


def _beyond_the_paper(config: MemSinksConfig) -> str:
    """What `describe` says of settings that the paper does not have, where they are not left at their defaults."""
    said = ", exactly so many" * (config.sink_mask == "exact")
    said += f", off in {config.sink_off_share:g} of the rows" * bool(config.sink_off_share)
    if config.sink_shared_values is not None:
        said += f", and with {config.head_size - config.sink_shared_values} of {config.head_size} values of each head"
    said += f", at {config.sink_learning_rate:g} times the learning rate" * (config.sink_learning_rate != 1)
    if config.sink_weight_decay is not None:
        said += f", with a weight decay of {config.sink_weight_decay:g}"
    return said + (f", in layers {', '.join(map(str, config.sink_layers))}" if config.sink_layers is not None else "")


def check_same_sinks(config: MemSinksConfig, checkpoint_dir: Path) -> None:
    """Refuse to go on with other masks than the checkpoint was trained with, which would scramble its sinks.

    A checkpoint without sinks is a start for any.

    Raises:
        MemSinksError: Naming the setting and both values.
    """
    saved = _saved_sinks(checkpoint_dir)
    for name, value in vars(config).items():
        before = saved.get(name, getattr(MemSinksConfig, name, None))  # older than a setting: it had its default
        if saved and name.startswith("sink_") and name not in RECORD and before != value:
            raise MemSinksError(
                f"{str(checkpoint_dir)!r} was trained with {name} = {before}, but this run has {value}. "
                "Go on with the same data.sinks, or start anew in another out_dir."
            )


def with_removed(config: MemSinksConfig, checkpoint_dir: Path) -> MemSinksConfig:
    """The same configuration with the checkpoint's record of removed sinks: they stay off in what is trained from it.

    Raises:
        MemSinksError: If the record is not of such a model.
    """
    saved = _saved_sinks(checkpoint_dir)
    return replace(config, **{name: saved[name] for name in RECORD if name in saved})


def _saved_sinks(checkpoint_dir: Path) -> dict[str, Any]:
    """The configuration of a checkpoint with sinks, else nothing."""
    path = checkpoint_dir / "model_config.yaml"
    if not path.is_file():
        return {}  # LitGPT writes it after the weights: a run killed in between says nothing about its sinks
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or "sink_n_shared" not in saved:
        return {}
    # a checkpoint from before a setting was there has its default
    return {field.name: field.default for field in fields(MemSinksConfig) if field.name.startswith("sink_")} | saved


def compilation(fabric: L.Fabric) -> AbstractContextManager:
    """Let ``torch.compile`` be skipped where it cannot work: on a CPU without a C++ compiler."""
    if fabric.device.type != "cpu" or has_cpp_compiler():
        return nullcontext()
    fabric.print(NO_COMPILER)
    return torch.compiler.set_stance("force_eager")


def has_cpp_compiler() -> bool:
    """Whether ``torch.compile`` finds a C++ compiler for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False


def install() -> None:
    """Put the dispatcher in front of ``litgpt.pretrain.main``, and `launch.py` in front of Fabric. Idempotent."""
    litgpt.pretrain.main = main
    litgpt.pretrain.L = LIGHTNING


install()
