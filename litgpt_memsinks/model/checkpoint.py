"""Reading LitGPT checkpoint folders, with sinks and without."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.model import GPT

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"


def read_config(checkpoint_dir: Path) -> Config:
    """The model configuration of a checkpoint folder: ``MemSinksConfig`` if it was trained with sinks.

    Raises:
        MemSinksError: If the folder is not a LitGPT checkpoint, or its configuration is of an unknown kind.
    """
    if (checkpoint_dir / WEIGHTS).is_dir():
        raise MemSinksError(
            f"{str(checkpoint_dir / WEIGHTS)!r} is a folder of shards. Make it one file first, by `fabric consolidate "
            f"{checkpoint_dir / WEIGHTS}`, and put {WEIGHTS}.consolidated in the folder's place."
        )
    for name in (CONFIG, WEIGHTS):
        if not (checkpoint_dir / name).is_file():
            raise MemSinksError(
                f"{str(checkpoint_dir)!r} is not a LitGPT checkpoint: it has no {name}. Name one such as OUT_DIR/final."
            )
    try:
        values = yaml.safe_load((checkpoint_dir / CONFIG).read_text(encoding="utf-8"))
        kind = MemSinksConfig if "sink_n_shared" in values else Config
        return kind(**values)
    except MemSinksError:
        raise
    except (TypeError, ValueError, AssertionError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's errors span lines
        problem = f"{str(checkpoint_dir / CONFIG)!r} is not a model configuration: {reason}"
        raise MemSinksError(f"{problem}. Take it from the training run again.") from error


def read_weights(checkpoint_dir: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, memory-mapped, on CPU; of raw checkpoints of ``litgpt pretrain`` and of converted ones.

    Raises:
        MemSinksError: If the file is truncated, not a checkpoint, or holds anything but tensors and plain values.
    """
    path = checkpoint_dir / WEIGHTS
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise MemSinksError(
            f"{str(path)!r} cannot be read as model weights: {str(error).splitlines()[0]} It is truncated, or not a "
            "checkpoint. Copy it again."
        ) from error
    state = state.get("model", state)  # `litgpt pretrain` keeps optimizer and loader beside the model
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise MemSinksError(f"{str(path)!r} holds no model weights. Name a checkpoint folder of a model.")
    return state


def check_fits(checkpoint_dir: Path, weights: Mapping[str, torch.Tensor], config: Config) -> None:
    """Refuse weights of other names or shapes than those of the configuration's model.

    Raises:
        MemSinksError: Naming the first that is different.
    """
    with torch.device("meta"):
        model = GPT(config) if isinstance(config, MemSinksConfig) else BaseGPT(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise MemSinksError(
                f"{str(checkpoint_dir)!r}: {name} has shape {found.get(name, 'none')} in {WEIGHTS}, but "
                f"{expected.get(name, 'none')} by {CONFIG}. They are not of one model: copy the checkpoint again."
            )


def load_model(checkpoint_dir: Path) -> BaseGPT:
    """Build the model of a checkpoint folder in eval mode: ours with sinks, or LitGPT's.

    Raises:
        MemSinksError: If the folder is not a checkpoint, or weights and configuration do not fit.
    """
    config = read_config(checkpoint_dir)
    weights = read_weights(checkpoint_dir)
    with torch.device("meta"):
        model = GPT(config) if isinstance(config, MemSinksConfig) else BaseGPT(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise MemSinksError(f"{str(checkpoint_dir)!r}: weights and configuration do not fit: {problem}") from error
    model.cos, model.sin = model.rope_cache()  # not in the checkpoint, and left undefined on the meta device
    return model.eval()
