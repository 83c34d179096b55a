"""As which Hugging Face model can a plain LitGPT model be written? Its ``config.json``, or a line that says why not.

Three architectures of transformers compute exactly what LitGPT computes for models that sinks are supported in: Llama
(SmolLM, SmolLM2, Llama, TinyLlama ...), GPT-NeoX (Pythia, and the paper's GPT-2-Medium-like model, whose positions are
rotary) and Gemma. Whatever these have no setting for is refused, because it would be another function.
"""

from collections.abc import Callable
from typing import Any

import torch
from litgpt.config import Config
from litgpt.scripts.convert_lit_checkpoint import copy_weights_gpt_neox, copy_weights_llama

from litgpt_memsinks.errors import MemSinksError

_EVERYWHERE: dict[str, Any] = {
    "norm_1": True,
    "norm_2": True,
    "norm_qk": False,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "shared_attention_norm": False,
    "sliding_window_size": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "lm_head_bias": False,
    "latent_attention": None,
    "n_expert": 0,
    "rope_condense_ratio": 1,
    "rope_interleave": False,
    "rope_local_base_freq": None,
}
"""Fields of ``litgpt.Config`` that none of the architectures can express at another value."""
_LLAMA = _EVERYWHERE | {
    "norm_class_name": "RMSNorm",
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "bias": False,  # transformers can; LitGPT's converter has no names for them
    "attn_bias": False,
}
_GEMMA = _LLAMA | {"mlp_class_name": "GemmaMLP", "scale_embeddings": True, "rope_adjustments": None}
_NEOX = _EVERYWHERE | {
    "norm_class_name": "LayerNorm",
    "bias": True,
    "scale_embeddings": False,
    "rope_adjustments": None,
}
_LLAMA3_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
"""LitGPT's names of Llama 3's RoPE settings to transformers'."""

Renamed = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def hf_config(config: Config, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` with which transformers, 4.51 or newer, computes the same function.

    Args:
        config: Of a plain LitGPT model.
        tied: Whether input and output embeddings are one weight.
        dtype: Of the weights.

    Raises:
        MemSinksError: Naming the model and the setting that transformers' architecture does not have.
    """
    common = {
        "attention_dropout": 0.0,
        "hidden_size": config.n_embd,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": config.padded_vocab_size,
    }
    return common | (_neox(config) if config.mlp_class_name == "GptNeoxMLP" else _llama(config))


def renamed(config: Config, tied: bool) -> Renamed:
    """LitGPT's converter of a state dict, or of a part of one, for a configuration that ``hf_config`` accepts."""

    def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if tied:
            weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
        copy = copy_weights_gpt_neox if config.mlp_class_name == "GptNeoxMLP" else copy_weights_llama
        found: dict[str, torch.Tensor] = {}
        copy(config, found, weights)
        return found

    return convert


def _llama(config: Config) -> dict[str, Any]:
    gemma = "Gemma" in config.name  # LitGPT's norm goes by the name
    architecture = "GemmaForCausalLM" if gemma else "LlamaForCausalLM"
    _require(config, architecture, _GEMMA if gemma else _LLAMA | {"scale_embeddings": False})
    activation = "silu" if config.mlp_class_name == "LLaMAMLP" else _gelu(config)
    values = {
        "architectures": [architecture],
        "model_type": "gemma" if gemma else "llama",
        "attention_bias": False,
        "head_dim": config.head_size,
        "hidden_act": activation,
        "num_key_value_heads": config.n_query_groups,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _rope_scaling(config),
        "rope_theta": float(config.rope_base),
    }
    # transformers before 4.56 reads Gemma's activation from another name
    return values | ({"hidden_activation": activation} if gemma else {"mlp_bias": False})


def _neox(config: Config) -> dict[str, Any]:
    architecture = "GPTNeoXForCausalLM"
    plain_heads = {"n_query_groups": config.n_head, "head_size": config.n_embd // config.n_head}
    _require(config, architecture, _NEOX | plain_heads)
    return {
        "architectures": [architecture],
        "model_type": "gpt_neox",
        "attention_bias": True,
        "hidden_act": _gelu(config),
        "hidden_dropout": 0.0,
        "layer_norm_eps": config.norm_eps,
        "rotary_emb_base": config.rope_base,
        "rotary_pct": config.rotary_percentage,
        "use_parallel_residual": config.parallel_residual,
    }


def _require(config: Config, architecture: str, needed: dict[str, Any]) -> None:
    allowed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in needed.items()}
    allowed["attention_scores_scalar"] = (None, config.head_size)
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            raise MemSinksError(
                f"{config.name!r} cannot be written as a {architecture} of transformers: its {name} is {value!r}, but "
                f"that architecture has {values[-1]!r}. Use drop_sinks, whose result the litgpt commands run."
            )


def _gelu(config: Config) -> str:
    return "gelu_pytorch_tanh" if config.gelu_approximate == "tanh" else "gelu"


def _rope_scaling(config: Config) -> dict[str, Any] | None:
    if config.rope_adjustments is None:
        return None
    if set(config.rope_adjustments) != set(_LLAMA3_ROPE):
        raise MemSinksError(
            f"{config.name!r} cannot be written for transformers: its rope_adjustments are "
            f"{config.rope_adjustments!r}, but only Llama 3's ({', '.join(_LLAMA3_ROPE)}) are known. Use drop_sinks, "
            "whose result the litgpt commands run."
        )
    return {"rope_type": "llama3", **{theirs: config.rope_adjustments[ours] for ours, theirs in _LLAMA3_ROPE.items()}}
