"""A tiny model that has memorised its repeated documents, and what removal makes of it, cut by hand."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.utils import save_config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.data.scored import pad, read_scored
from litgpt_memsinks.metrics import document_losses
from litgpt_memsinks.model.model import GPT, removed_mask
from litgpt_memsinks.sinks.masks import pack_neurons, sink_mask
from tests.console import TINY_MODEL

SHARED = 16  # of 64 neurons
INVERSE = {"scale": "inverse"}


def trained(folder: Path, data: Path, raw=True, **sinks) -> Path:
    """A checkpoint as ``litgpt pretrain`` writes it, after some steps on the repeated documents only."""
    torch.manual_seed(0)
    config = MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(SHARED / 64, 0.3, **sinks))
    model = GPT(config)
    documents = read_scored(data, "repeated")
    inputs, targets = pad(documents.tokens, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        nats, counts = document_losses(model(inputs, sequence_ids=documents.sequence_ids), targets)
        optimizer.zero_grad()
        (nats.sum() / counts.sum()).backward()
        optimizer.step()
    state = model.state_dict()
    save(folder, {"model": state, "iter_num": 25} if raw else state, config)
    shutil.copy(data / "tokenizer/tokenizer.json", folder)
    return folder


def save(folder: Path, state, config) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "lit_model.pth")
    save_config(config, folder)
    return folder


def numbers_of(data: Path) -> list[int]:
    """The repeated documents' numbers, in the order of the folder."""
    return [value % 2**31 for value in read_scored(data, "repeated").sequence_ids.tolist()]


def mask_of(numbers) -> torch.Tensor:
    """Sinks of some documents, of seed 0 and p = .3."""
    return sink_mask(torch.tensor(list(numbers)), 64 - SHARED, 0.3).any(0)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "lit_model.pth", weights_only=True)["model"]


def config_of(folder: Path) -> MemSinksConfig:
    return MemSinksConfig.from_file(folder / "model_config.yaml")


def kept(before: Path, folder: Path, sinks: torch.Tensor, factor=1.0) -> Path:
    """A plain checkpoint of the shared neurons and some sinks."""
    columns = torch.cat((torch.arange(SHARED), SHARED + sinks.nonzero().flatten()))
    state = {name: value for name, value in state_of(before).items() if name != "n_shared"}
    for name, value in state.items():
        if "mlp.fc" in name:
            state[name] = value[columns].clone()
        elif "mlp.proj.weight" in name:
            state[name] = value[:, columns].clone()
            state[name][:, SHARED:] *= factor
    return save(folder, state, Config(**{**TINY_MODEL, "intermediate_size": len(columns)}))


def removed(before: Path, folder: Path, sinks: torch.Tensor) -> Path:
    """The checkpoint with some sinks zeroed in every layer, and recorded."""
    rows = SHARED + sinks.nonzero().flatten()
    state = {name: value.clone() for name, value in state_of(before).items()}
    for name, value in state.items():
        if "mlp.fc" in name:
            value[rows] = 0
        elif "mlp.proj.weight" in name:
            value[:, rows] = 0
    config = config_of(before)
    recorded = removed_mask(config) | sinks
    if recorded.any():
        config = replace(config, sink_removed=pack_neurons(recorded), sink_removed_documents=1)
        state["sink_removed"] = recorded.to(torch.uint8)
    return save(folder, {"model": state}, config)


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder
