"""Small models trained in the process, for tests of what is measured of them: in seconds."""

from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import save_config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.data.scored import pad
from litgpt_memsinks.metrics import IGNORED, token_losses
from litgpt_memsinks.model.model import GPT
from tests.console import TINY_MODEL

BLOCK = 64


def train(model, repeated, others, steps=120, lr=3e-3, seed=0):
    """Teach a model all repeated documents in each step, each with its own sinks, and 12 of the others."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        drawn = torch.randperm(len(others.tokens), generator=generator)[:12].tolist()
        tokens = repeated.tokens + [others.tokens[index] for index in drawn]
        inputs, targets = pad(tokens, BLOCK)
        on = {}
        if isinstance(model, GPT):
            on["sequence_ids"] = torch.cat((repeated.sequence_ids, others.sequence_ids[drawn]))
        loss = token_losses(model(inputs, **on), targets).sum() / (targets != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def plain_model(**changes):
    torch.manual_seed(1)
    return BaseGPT(Config(**{**TINY_MODEL, **changes}))


def sink_model(seed=0):
    torch.manual_seed(1)
    sinks = SinkArgs(0.5, 0.5, sinks_for="repeated", seed=seed)
    return GPT(MemSinksConfig.from_base(Config(**{**TINY_MODEL, "intermediate_size": 128}), sinks))


def save(folder: Path, model) -> Path:
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "lit_model.pth")
    save_config(model.config, folder)
    return folder
