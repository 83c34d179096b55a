"""Checkpoints with sinks, for the tests of what is released."""

import torch
from litgpt.config import Config
from litgpt.utils import save_config
from tokenizers import Tokenizer, models

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.model.model import GPT
from tests.console import TINY_MODEL

MODELS = {
    "llama": {},
    "llama with biases": {"bias": True},
    "gemma": {"mlp_class_name": "GemmaMLP"},
    "gpt-neox": {"mlp_class_name": "GptNeoxMLP", "bias": True, "parallel_residual": True},
}


def save(folder, tie=True, raw=True, sinks=None, spread=1.0, **changes):
    """A checkpoint of a model with sinks, as ``litgpt pretrain`` writes it (raw) or as converted for inference.

    ``spread`` multiplies the random weights: above 1, small differences of the function show in the logits.
    """
    config = MemSinksConfig.from_base(Config(**{**TINY_MODEL, **changes}), sinks or SinkArgs(0.25, 0.3))
    torch.manual_seed(0)
    model = GPT(config)
    if tie:
        model.transformer.wte.weight = model.lm_head.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread)
    folder.mkdir(parents=True)
    state = model.state_dict()
    torch.save({"model": state, "iter_num": 3, "optimizer": {}} if raw else state, folder / "lit_model.pth")
    save_config(config, folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    return model.eval()
