"""Small models with sinks, untrained or with the repeated documents learnt by heart, as checkpoint folders."""

import shutil
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.utils import save_config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.data.scored import pad, read_scored
from litgpt_memsinks.metrics import IGNORED
from litgpt_memsinks.model.model import GPT
from tests.console import TINY_MODEL

MODELS = {
    "llama": {},
    "llama with biases": {"bias": True},
    "gemma": {"mlp_class_name": "GemmaMLP"},
    "gpt-neox": {"mlp_class_name": "GptNeoxMLP", "bias": True, "parallel_residual": True},
}


def build(sinks: SinkArgs, **changes) -> GPT:
    """A model with tied embeddings, large enough weights for each sink to matter, and no zero in the biases."""
    torch.manual_seed(0)
    model = GPT(MemSinksConfig.from_base(Config(**{**TINY_MODEL, **changes}), sinks))
    model.transformer.wte.weight = model.lm_head.weight
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name == "lm_head.bias":
            torch.nn.init.zeros_(parameter)
    return model.eval()


def save(model: GPT, folder: Path, data_path: Path | None = None, raw: bool = True) -> Path:
    """As ``litgpt pretrain`` writes it (raw), or as converted for inference."""
    folder.mkdir(parents=True)
    state = model.state_dict()
    torch.save({"model": state, "iter_num": 3, "optimizer": {}} if raw else state, folder / "lit_model.pth")
    save_config(model.config, folder)
    (folder / "hyperparameters.yaml").write_text("seed: 3\n")
    if data_path is not None:
        for file in (data_path / "tokenizer").iterdir():
            shutil.copy(file, folder)
    return folder


def learn(model: GPT, data_path: Path, steps: int = 60) -> GPT:
    """Train on the repeated documents, each with its own sinks."""
    documents = read_scored(data_path, "repeated")
    inputs, targets = pad(documents.tokens, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        logits = model(inputs, sequence_ids=documents.sequence_ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
