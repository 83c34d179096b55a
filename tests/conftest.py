"""What several test modules need, made once per session. Tests read these folders and never write into them."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that wait for a core cost minutes

import pytest
import torch
from litgpt import Config

from litgpt_memsinks.corpus.embedded import stories, train_tokenizer, write_corpus
from litgpt_memsinks.prepare.prepare import prepare

torch.set_num_threads(1)  # where PyTorch was imported before


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 tokens; token 0 ends a text."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    train_tokenizer(stories(300), folder, vocab_size=512)
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with 300 stories and validation.jsonl with 40."""
    folder = tmp_path_factory.mktemp("corpus") / "stories"
    write_corpus(folder, documents=300, validation_documents=40)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, tokenizer_dir: Path) -> Path:
    """The corpus as `prepare` writes it: 8 of the 300 documents occur 6 times."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(
        train=corpus_dir / "train.jsonl",
        validation=corpus_dir / "validation.jsonl",
        tokenizer_dir=tokenizer_dir,
        out_dir=folder,
        repeated_documents=8,
        repeats=6,
        seed=0,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """A plain LitGPT configuration in SmolLM's style. Copy it before you change it."""
    return Config(
        name="tiny",
        n_layer=2,
        n_embd=32,
        n_head=2,
        mlp_class_name="LLaMAMLP",
        intermediate_size=64,
        padded_vocab_size=512,
        vocab_size=512,
        block_size=64,
        norm_class_name="RMSNorm",
        bias=False,
        parallel_residual=False,
        rotary_percentage=1.0,
    )
