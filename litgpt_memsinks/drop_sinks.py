"""What does the released model hold? The shared neurons only, as a plain LitGPT checkpoint.

Of each MLP the first ``n_shared`` rows of ``fc_1``, ``fc_2`` (``fc`` in ungated ones) and columns of ``proj`` stay
(Sec. 5: "removal of memorization can be achieved by simply deleting the memorization sinks"). All else is copied.
The result loads with stock LitGPT, without this package, and is smaller and faster.
"""

import json
from pathlib import Path

import torch
from litgpt.utils import copy_config_files, save_config
from rich.console import Console

from litgpt_memsinks.checkpoint import WEIGHTS, read_config, read_weights
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory
from litgpt_memsinks.model import MARKER, REMOVED

ROWS = ("mlp.fc.", "mlp.fc_1.", "mlp.fc_2.")
"""Layers of an MLP whose output neurons are hidden neurons: weights ``(intermediate_size, n_embd)`` and biases."""
COLUMNS = "mlp.proj.weight"
"""Weights whose inputs are hidden neurons: ``(n_embd, intermediate_size)``. Its bias belongs to the residual stream."""


def drop_sinks(checkpoint_dir: Path, out_dir: Path) -> None:
    """Write the plain, smaller LitGPT checkpoint that is left when the memorization sinks are dropped.

    Args:
        checkpoint_dir: Checkpoint of a model trained with sinks, such as OUT_DIR/final or OUT_DIR/step-00001000.
        out_dir: Folder to write. Must not exist; appears only when it is complete.

    Raises:
        MemSinksError: If there is no checkpoint with sinks, it is damaged, or `out_dir` exists.
    """
    config = read_config(checkpoint_dir)
    if not isinstance(config, MemSinksConfig):
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} is a plain checkpoint: it has no sinks to drop. Use it as it is, or name the "
            "checkpoint of a run with litgpt_memsinks.MemSinksData."
        )
    with Console(stderr=True).status("Dropping the sinks"), atomic_directory(out_dir) as scratch:
        weights = without_sinks(read_weights(checkpoint_dir), config)
        torch.save(weights, scratch / WEIGHTS)
        copy_config_files(checkpoint_dir, scratch)  # tokenizer, and Hugging Face's files if there are any
        save_config(config.to_base(), scratch)
        _correct_hf_config(scratch / "config.json", config.n_shared)
    size = (out_dir / WEIGHTS).stat().st_size
    print(
        f"Dropped {config.n_sink:,} of {config.intermediate_size:,} neurons of each MLP: {str(out_dir)!r} is a plain "
        f"LitGPT checkpoint ({size / 1e6:,.1f} MB).\nTry it: litgpt generate {out_dir} --prompt 'Once upon a time'"
    )


def without_sinks(weights: dict[str, torch.Tensor], config: MemSinksConfig) -> dict[str, torch.Tensor]:
    """Slice the sinks away.

    Args:
        weights: State dict of a model with sinks.
        config: Its configuration.

    Returns:
        State dict of the plain model of ``config.to_base()``. What is not sliced shares memory with ``weights``, so
        that tied embeddings stay tied.

    Raises:
        MemSinksError: If a weight that must be sliced is missing or has another shape than the configuration says.
    """
    if MARKER not in weights or int(weights[MARKER]) != config.n_shared:
        raise MemSinksError("The weights and model_config.yaml are not of one model. Copy the checkpoint again.")
    kept = {}
    sliced = 0
    for name, weight in weights.items():
        if name in (MARKER, REMOVED):
            continue
        dimension = _sliced_dimension(name)
        if dimension is None:
            kept[name] = weight
            continue
        if weight.size(dimension) != config.intermediate_size:
            raise MemSinksError(
                f"{name} has shape {tuple(weight.shape)}, but intermediate_size is {config.intermediate_size}. The "
                "weights and model_config.yaml are not of one model."
            )
        # a copy, so that the sinks' numbers are not saved along with the storage of the slice
        kept[name] = weight.narrow(dimension, 0, config.n_shared).clone(memory_format=torch.contiguous_format)
        sliced += weight.dim() == 2
    expected = config.n_layer * (2 if config.mlp_class_name == "GptNeoxMLP" else 3)
    if sliced != expected:
        raise MemSinksError(f"{sliced} MLP weights were found, but the model has {expected}. The file is not of it.")
    return kept


def _sliced_dimension(name: str) -> int | None:
    """Along which dimension a parameter has one entry per hidden neuron of an MLP, if any."""
    if any(part in name for part in ROWS):
        return 0
    return 1 if name.endswith(COLUMNS) else None


def _correct_hf_config(path: Path, n_shared: int) -> None:
    """Put the new width into a copied Hugging Face ``config.json``."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("intermediate_size", "n_inner"):
        if name in content:
            content[name] = n_shared
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
