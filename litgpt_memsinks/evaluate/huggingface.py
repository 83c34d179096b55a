"""Reading a Hugging Face model folder into LitGPT's GPT, in memory, by LitGPT's own tables of weight names.

LitGPT's `convert_to_litgpt` knows registered models by their name only. Here the shape comes from ``config.json``, so
that any width can be read, such as a model that sinks were dropped from.
"""

import json
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox, copy_weights_hf_llama
from safetensors import SafetensorError
from safetensors.torch import load_file

from litgpt_memsinks.errors import MemSinksError

HF_CONFIG = "config.json"


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return (folder / HF_CONFIG).is_file() and bool(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def load_huggingface(folder: Path) -> BaseGPT:
    """Build the model of a Hugging Face folder, in eval mode.

    Raises:
        MemSinksError: If it is of an architecture, or has a setting, that is not read here; or is damaged.
    """
    try:
        values = json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))
        config = litgpt_config(values, folder.name)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, MemSinksError):
            raise
        raise MemSinksError(f"{str(folder / HF_CONFIG)!r} is not a model configuration: {error!r}.") from error
    weights: dict[str, torch.Tensor] = {}
    try:
        for path in weight_files(folder):
            weights |= load_file(path)
        state = _renamed(config, weights)
        with torch.device("meta"):
            model = BaseGPT(config)
        model.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemSinksError(f"{str(folder)!r}: the weights cannot be read: {reason}. Copy them again.") from error
    model.cos, model.sin = model.rope_cache()  # not in the checkpoint, and left undefined on the meta device
    return model.eval()


def _renamed(config: Config, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    if config.mlp_class_name == "LLaMAMLP":
        copy_weights_hf_llama(config, {}, state, weights)
    else:
        copy_weights_gpt_neox(config, state, weights)
    return state


def litgpt_config(values: dict[str, Any], name: str) -> Config:
    """LitGPT's configuration of the model that a ``config.json`` describes.

    Args:
        values: Its content, as transformers writes it: of Llama's or GPT-NeoX's architecture.
        name: For messages.

    Raises:
        MemSinksError: If the architecture, or a setting, is not one of those.
    """
    kind = values["model_type"]
    if kind not in (readers := {"llama": _llama, "gpt_neox": _gpt_neox}):
        raise MemSinksError(
            f"{name!r} is a Hugging Face model of type {kind!r}, but only {', '.join(readers)} are read here. Convert "
            "it: litgpt convert_to_litgpt FOLDER"
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise MemSinksError(f"{name!r} scales its rotary positions, which is not read here. Convert it: "
                            "litgpt convert_to_litgpt FOLDER")  # fmt: skip
    theta = rope.get("rope_theta") or values.get("rope_theta") or values.get("rotary_emb_base") or 10000
    common = {
        "name": name,
        "block_size": values["max_position_embeddings"],
        "vocab_size": values["vocab_size"],
        "padded_vocab_size": values["vocab_size"],
        "n_layer": values["num_hidden_layers"],
        "n_head": values["num_attention_heads"],
        "n_embd": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "rope_base": int(theta),
    }
    return Config(**common, **readers[kind](values))


def _llama(values: dict[str, Any]) -> dict[str, Any]:
    for setting, expected in (("hidden_act", "silu"), ("mlp_bias", False)):
        _check(values, setting, expected)
    heads = values["num_attention_heads"]
    return {
        "n_query_groups": values.get("num_key_value_heads") or heads,
        "head_size": values.get("head_dim") or values["hidden_size"] // heads,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "attn_bias": bool(values.get("attention_bias", False)),
        "norm_class_name": "RMSNorm",
        "norm_eps": values["rms_norm_eps"],
        "mlp_class_name": "LLaMAMLP",
    }


def _gpt_neox(values: dict[str, Any]) -> dict[str, Any]:
    for setting, expected in (("hidden_act", "gelu"), ("attention_bias", True)):
        _check(values, setting, expected)
    rope = values.get("rope_parameters") or {}
    return {
        "rotary_percentage": rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25)),
        "parallel_residual": values.get("use_parallel_residual", True),
        "bias": True,
        "norm_class_name": "LayerNorm",
        "norm_eps": values["layer_norm_eps"],
        "mlp_class_name": "GptNeoxMLP",
    }


def _check(values: dict[str, Any], setting: str, expected: Any) -> None:
    if values.get(setting, expected) != expected:
        raise MemSinksError(
            f"{HF_CONFIG} has {setting} {values[setting]!r}, but only {expected!r} is read here. Convert the model: "
            "litgpt convert_to_litgpt FOLDER"
        )
