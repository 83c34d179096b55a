"""What is measured: a model of any kind, and the documents that it is asked about."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from litgpt.model import GPT as BaseGPT
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.corpus.corpus_files import read_texts
from litgpt_memsinks.data.scored import Scored, read_scored
from litgpt_memsinks.document_ids.ids import digest, sequence_ids
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.huggingface import HF_CONFIG, is_huggingface, load_huggingface, weight_files
from litgpt_memsinks.model.checkpoint import CONFIG, WEIGHTS, load_model
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.prepare.encoding import Encoder, load_tokenizer, special_tokens
from litgpt_memsinks.prepare.manifest import MANIFEST, TOKENIZER, Manifest, tokenizer_fingerprint

Role = Literal["standard", "left_out"]
RECIPE = "hyperparameters.yaml"


@dataclass
class Asked:
    """The documents, and how their tokens are read.

    Attributes:
        path: Where they are from.
        manifest_sha256: Of the prepared folder's manifest; ``None`` for files of text.
        repeated: Documents that were trained on many times.
        validation: Documents like them that were not trained on.
        tokenizer: What made the tokens.
        tokenizer_sha256: Its fingerprint.
    """

    path: str
    manifest_sha256: str | None
    repeated: Scored
    validation: Scored
    tokenizer: Tokenizer
    tokenizer_sha256: str

    def text(self, tokens: torch.Tensor | list[int]) -> str:
        """Decode tokens, without the special ones."""
        return self.tokenizer.processor.decode(list(map(int, tokens)))

    def fingerprint(self) -> str:
        """SHA-256 of all tokens and IDs: what a measurement of these documents depends on."""
        found = hashlib.sha256()
        for documents in (self.repeated, self.validation):
            found.update(documents.sequence_ids.numpy().tobytes())
            for tokens in documents.tokens:
                found.update(len(tokens).to_bytes(8, "little"))
                found.update(tokens.numpy().tobytes())
        return found.hexdigest()

    @property
    def max_token(self) -> int:
        """The largest token."""
        return max(int(tokens.max()) for part in (self.repeated, self.validation) for tokens in part.tokens)


def ask_prepared(data_path: Path, limit: int | None) -> Asked:
    """The documents of a prepared folder.

    Args:
        data_path: Folder of `litgpt-memsinks prepare`.
        limit: Most documents of each kind, the first ones.

    Raises:
        MemSinksError: If the folder is not whole, or has no documents of a kind.
    """
    manifest = Manifest.read(data_path)
    return Asked(
        path=str(data_path),
        manifest_sha256=hashlib.sha256((data_path / MANIFEST).read_bytes()).hexdigest(),
        repeated=read_scored(data_path, "repeated", limit),
        validation=read_scored(data_path, "val", limit),
        tokenizer=load_tokenizer(data_path / TOKENIZER, manifest.special_tokens),
        tokenizer_sha256=manifest.tokenizer_sha256,
    )


def ask_files(repeated: Path, validation: Path, tokenizer_dir: Path, limit: int | None) -> Asked:
    """The documents of two files of text, for models that were trained on other data than ours.

    Their IDs are those that `prepare` gives by default (``ids: hash``).

    Args:
        repeated: File of the documents that were trained on many times.
        validation: File of documents like them that were not.
        tokenizer_dir: The model's tokenizer.
        limit: Most documents of each kind, the first ones.

    Raises:
        MemSinksError: If a file or the tokenizer cannot be read, or a file has no document.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    return Asked(
        path=f"{repeated}, {validation}",
        manifest_sha256=None,
        repeated=_read(repeated, tokenizer, limit, repeats=True),
        validation=_read(validation, tokenizer, limit, repeats=False),
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer_dir),
    )


def _read(path: Path, tokenizer: Tokenizer, limit: int | None, repeats: bool) -> Scored:
    texts = [text for text, _ in zip(read_texts(path), _up_to(limit), strict=False)]
    if not texts:
        raise MemSinksError(f"{str(path)!r} has no documents. Give one object with a text per line.")
    tokens = Encoder(tokenizer)(texts)
    start = special_tokens(tokenizer)["bos"] is not None
    digests = np.array([digest(document[start:-1]) for document in tokens], dtype=np.uint64)
    return Scored(
        [torch.from_numpy(document.astype(np.int64)) for document in tokens],
        torch.from_numpy(sequence_ids(digests, np.full(len(tokens), repeats)).astype(np.int64)),
        digests.tolist(),
        [path.name] * len(tokens),
    )


def _up_to(limit: int | None) -> Iterator[int]:
    return iter(range(limit)) if limit is not None else iter(int, 1)


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class Subject:
    """One model.

    Attributes:
        arm: Its name in tables.
        role: Whether it is a reference.
        checkpoint_dir: Its folder.
        sha256: Of the file of its weights, or of all files one after another.
        kind: ``memsinks``, ``litgpt`` or ``huggingface``.
        seed: Seed of its training; ``None`` if its folder does not say.
    """

    arm: str
    role: Role | None
    checkpoint_dir: Path
    sha256: str
    kind: Literal["memsinks", "litgpt", "huggingface"]
    seed: int | None

    @classmethod
    def at(cls, arm: str, checkpoint_dir: Path, role: Role | None = None) -> "Subject":
        """Look at a folder, without loading the model.

        Raises:
            MemSinksError: If there is no model.
        """
        files = [checkpoint_dir / WEIGHTS]
        kind: Literal["memsinks", "litgpt", "huggingface"] = "litgpt"
        if not files[0].is_file() and is_huggingface(checkpoint_dir):
            kind, files = "huggingface", weight_files(checkpoint_dir)
        elif not files[0].is_file():
            raise MemSinksError(
                f"{str(checkpoint_dir)!r} is not a LitGPT checkpoint: it has no {WEIGHTS}. Name one such as "
                "OUT_DIR/final, or a Hugging Face folder with config.json and *.safetensors."
            )
        elif "sink_n_shared:" in (checkpoint_dir / CONFIG).read_text(encoding="utf-8", errors="replace"):
            kind = "memsinks"
        return cls(arm, role, checkpoint_dir, sha256_of(files), kind, _seed(checkpoint_dir))

    def fingerprint(self) -> str:
        """SHA-256 of weights and configuration: the seed of the masks, for one, is in no weight."""
        configs = [self.checkpoint_dir / name for name in (CONFIG, HF_CONFIG)]
        return self.sha256 + sha256_of([path for path in configs if path.is_file()])

    def load(self, device: str) -> BaseGPT:
        """The model in eval mode, on a device.

        Raises:
            MemSinksError: If it cannot be read.
        """
        if self.kind == "huggingface":
            return load_huggingface(self.checkpoint_dir).to(device)
        return load_model(self.checkpoint_dir).to(device)

    def check(self, model: BaseGPT, asked: Asked) -> None:
        """Refuse documents of another tokenizer, whose tokens mean nothing to the model.

        Raises:
            MemSinksError: If their tokens are not the model's.
        """
        size = model.config.padded_vocab_size
        assert size is not None  # set by Config.__post_init__
        if asked.max_token >= size:
            raise MemSinksError(
                f"{asked.path!r} holds token {asked.max_token}, but {str(self.checkpoint_dir)!r} embeds tokens below "
                f"{size} only. Name the data that the model was trained on."
            )
        if any((self.checkpoint_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            given = tokenizer_fingerprint(self.checkpoint_dir)
            if given != asked.tokenizer_sha256:
                raise MemSinksError(
                    f"The tokenizer of {str(self.checkpoint_dir)!r} ({given[:12]}) is not the one that made "
                    f"{asked.path!r} ({asked.tokenizer_sha256[:12]}). Name the data that the model was trained on."
                )

    def described(self, model: BaseGPT) -> dict[str, Any]:
        """The facts about it that the result file has."""
        recipe = self.checkpoint_dir / RECIPE
        return {
            "arm": self.arm,
            "seed": self.seed,
            "role": self.role,
            "checkpoint_dir": str(self.checkpoint_dir),
            "checkpoint_sha256": self.sha256,
            "kind": self.kind,
            "parameters": sum({p.data_ptr(): p.numel() for p in model.parameters()}.values()),
            "sinks": _sinks(model),
            "recipe": str(recipe) if recipe.is_file() else None,
        }


def _sinks(model: BaseGPT) -> dict[str, Any] | None:
    if not isinstance(model, GPT) or not model.config.n_sink:
        return None
    config: MemSinksConfig = model.config
    return {
        "n_shared": config.n_shared,
        "n_sink": config.n_sink,
        "active_probability": config.sink_active_probability,
        "seed": config.sink_seed,
        "sinks_for": config.sink_sinks_for,
        "scale": config.sink_scale,
        "method": config.sink_method,
        "off_share": config.sink_off_share,
        "layers": config.sink_layers,
        "mask": config.sink_mask,
        "attention": config.sink_attention,
        "shared_values": config.sink_shared_values,
        "learning_rate": config.sink_learning_rate,
        "weight_decay": config.sink_weight_decay,
    }


def _seed(checkpoint_dir: Path) -> int | None:
    """What LitGPT has written down of the run."""
    try:
        content = yaml.safe_load((checkpoint_dir / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    seed = content.get("seed") if isinstance(content, dict) else None
    return seed if isinstance(seed, int) else None


def sha256_of(files: list[Path]) -> str:
    """SHA-256 of files one after another, a block at a time."""
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def key_of(**values: Any) -> str:
    """A short name for what a measurement depends on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]
