"""How large is an experiment? Its texts, streams and models, on two CPU cores or as in the paper."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from litgpt_memsinks.bench.near_duplicate_table import edited
from litgpt_memsinks.corpus.corpus_files import read_texts
from litgpt_memsinks.corpus.embedded import stories, write_corpus
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.subject import ask_prepared, key_of
from litgpt_memsinks.experiments.declared import Arm, Setting, Stream
from litgpt_memsinks.experiments.demo import (
    EMBEDDED_BLOCK,
    EMBEDDED_DOCUMENTS,
    OWN_BLOCK,
    OWN_DOCUMENTS,
    own_tokenizer,
    sample,
)
from litgpt_memsinks.experiments.training_runs import MICRO_BATCH
from litgpt_memsinks.files import atomic_directory, write_text
from litgpt_memsinks.prepare.manifest import MANIFEST
from litgpt_memsinks.prepare.prepare import prepare

ScaleName = Literal["cpu", "gpu"]
TEXTS = "corpus"


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that the declarations leave open."""

    name: str
    """Of the folder"""
    once: int
    """Documents that occur once"""
    repeated: int
    """Documents that repeat"""
    repeats: int
    """How often each"""
    canary_tokens: int
    """Random tokens behind a repeated document of TS-Canary"""
    rare: int
    """Documents of the rare kind of text of Figure 6"""
    rare_repeats: int
    """The base count of their repeats"""
    documents: int
    """Distinct documents of the corpus that is made or sampled, at most; all of them occur once in Figure 7"""
    block_size: int
    """Tokens in a training row"""
    tokens_per_document: int
    """On average: what `list` counts with"""
    minutes_per_million_tokens: dict[str, float] | None
    """Of training on one core, for each size of model, estimated; ``None`` where nothing is known"""
    minutes_per_localisation: dict[str, float]
    """Of each method on one model, estimated, where training's are known"""
    settings: tuple[Setting, ...]
    """What every run changes of its recipe"""
    sink_settings: tuple[Setting, ...]
    """What every run with sinks changes besides, unless its arm does"""
    sizes: dict[str, tuple[Setting, ...]]
    """Name of a model's size to what it changes of the recipe"""
    ids: Literal["hash", "index"] = "hash"
    """How documents get their IDs"""
    paper: bool = False
    """Whether these are the paper's sizes"""
    texts: str = ""
    """Pattern of the training texts, if they are on disk already"""
    validation: str = ""
    """Pattern of the validation texts"""
    validation_documents: int | None = None
    """How many of them; all by default"""
    tokenizer_dir: str = ""
    """The tokenizer, if it is on disk already"""


def _width(n_embd: int) -> tuple[Setting, ...]:
    """The demo's model at another width."""
    values = {
        "name": f"tiny-{n_embd}", "block_size": 512, "vocab_size": 1024, "padding_multiple": 64, "n_layer": 2,
        "n_head": 4, "n_embd": n_embd, "rotary_percentage": 1.0, "parallel_residual": "false", "bias": "false",
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 3 * n_embd,
    }  # fmt: skip
    return tuple((f"model_config.{name}", str(value)) for name, value in values.items())


def _gpt2(n_layer: int, n_embd: int, n_head: int) -> tuple[Setting, ...]:
    """A model like ``GPT2-Medium-MemSinks``, or one of GPT-2's other sizes: a recipe's model cannot be renamed."""
    values = {
        "name": f"gpt2-{n_layer}", "block_size": 1024, "vocab_size": 50257, "padding_multiple": 64, "n_layer": n_layer,
        "n_head": n_head, "n_embd": n_embd, "rotary_percentage": 1.0, "parallel_residual": "false",
        "gelu_approximate": "tanh",
    }  # fmt: skip
    return tuple((f"model_config.{name}", str(value)) for name, value in values.items())


_WATCHED: tuple[Setting, ...] = (("data.watch.documents", "32"), ("data.watch.validation_documents", "64"))
_SIZES = {"small": _width(64), "large": _width(256)}

EMBEDDED = Scale(
    name="cpu-embedded",
    once=EMBEDDED_DOCUMENTS,
    repeated=32,
    repeats=96,
    canary_tokens=32,
    rare=64,
    rare_repeats=24,
    documents=9000,
    block_size=EMBEDDED_BLOCK,
    tokens_per_document=101,
    minutes_per_localisation={"hard_concrete": 2, "integrated_gradients": 1},
    minutes_per_million_tokens={"": 1.3, "small": 0.9, "large": 3.2},
    settings=_WATCHED,
    sink_settings=(),
    sizes=_SIZES,
)
"""The demo's sizes on its embedded stories."""

OWN = replace(
    EMBEDDED,
    name="cpu",
    once=OWN_DOCUMENTS,
    block_size=OWN_BLOCK,
    tokens_per_document=271,
    minutes_per_localisation={"hard_concrete": 5, "integrated_gradients": 4},
)
"""The demo's sizes on a corpus of JSON lines."""

GPU = Scale(
    name="gpu",
    once=20_000,
    repeated=100,
    repeats=128,
    canary_tokens=64,
    rare=5000,
    rare_repeats=10,
    documents=20_000,
    block_size=512,
    tokens_per_document=210,
    minutes_per_million_tokens=None,
    minutes_per_localisation={},
    settings=(
        *_gpt2(24, 1024, 16),
        ("precision", "bf16-mixed"),
        ("data.num_workers", "4"),
        ("optimizer.init_args.lr", "6e-4"),
        ("train.min_lr", "6e-4"),
        ("train.lr_warmup_steps", "100"),
        *_WATCHED,
    ),
    sink_settings=(("data.sinks.shared_fraction", "0.7"),),
    sizes={"small": _gpt2(12, 768, 12), "large": _gpt2(36, 1280, 20)},
    ids="index",
    paper=True,
    texts="corpora/tinystories/train-00000-*.parquet",
    validation="corpora/tinystories/validation-*.parquet",
    validation_documents=5000,
    tokenizer_dir="checkpoints/openai-community/gpt2",
)
"""The paper's: GPT-2 Medium on TinyStories (Sec. 3 to 5.1), and the recipes of its SmolLM runs (Sec. 5.2)."""


def scale_of(name: ScaleName, corpus: Path | None) -> Scale:
    """The sizes for a scale and a corpus."""
    if name == "gpu":
        return GPU
    return EMBEDDED if corpus is None else OWN


# ---------------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Texts:
    """Where the texts of a workplace are: patterns of files."""

    train: str
    """The corpus"""
    validation: str
    """Texts like it that are not trained on"""
    rare: str
    """The rare kind of text of Figure 6"""
    rare_validation: str
    """Texts like that"""
    bulk: str
    """The kind that there is much of"""
    tokenizer_dir: Path
    """Of all of them"""


def make_texts(scale: Scale, corpus: Path | None, folder: Path) -> Texts:
    """Make or sample the texts and their tokenizer; finished ones are kept.

    Args:
        scale: The sizes.
        corpus: JSON lines with a text each; the embedded stories, or what the scale names, without.
        folder: Where to.

    Raises:
        MemSinksError: If the corpus is too small or cannot be read.
    """
    if scale.texts:
        train, validation = (scale.texts, scale.validation) if corpus is None else (str(corpus), scale.validation)
        return Texts(train, validation, train, validation, train, Path(scale.tokenizer_dir))
    texts, others = folder / TEXTS, folder / "others"
    if not texts.is_dir():
        if corpus is None:
            write_corpus(texts, scale.documents, 256)
        else:
            sample(corpus, texts, documents=scale.documents)
            _require(texts / "train.jsonl", scale, corpus)
    if not others.is_dir():
        with atomic_directory(others) as scratch:
            _write(scratch / "bulk.jsonl", stories(_bulk(scale), seed=1))
            for split in ("train", "validation"):
                _write(scratch / f"{split}.jsonl", map(backwards, read_texts(texts / f"{split}.jsonl")))
    rare = others if corpus is None else texts
    return Texts(
        train=str(texts / "train.jsonl"),
        validation=str(texts / "validation.jsonl"),
        rare=str(rare / "train.jsonl"),
        rare_validation=str(rare / "validation.jsonl"),
        bulk=str(others / "bulk.jsonl"),
        tokenizer_dir=own_tokenizer(texts / "train.jsonl", folder),
    )


def _require(sampled: Path, scale: Scale, corpus: Path) -> None:
    """Refuse a corpus that is smaller than the main stream."""
    there, wanted = sum(1 for _ in read_texts(sampled)), scale.once + scale.repeated
    if there < wanted:
        shutil.rmtree(sampled.parent)
        raise MemSinksError(
            f"{str(corpus)!r} has {there:,} distinct documents to train on, but the experiments take {wanted:,}. Give "
            "a larger corpus, or leave it out for the embedded stories."
        )


def backwards(text: str) -> str:
    """The words in reverse order: another kind of text, as far as a model of the forward one is concerned."""
    return " ".join(reversed(text.split()))


def make_edited(prepared: Path, share: float, copies: int, folder: Path) -> Path:
    """Write edited copies of the repeated documents of a prepared stream, unless they are there.

    Args:
        prepared: The stream's folder.
        share: Of the words of a document that are edited in each copy.
        copies: Of each document.
        folder: Where to.

    Returns:
        JSON lines, named by what decides them.
    """
    asked, rng = ask_prepared(prepared, None), Random(0)
    path = folder / f"edited-{key_of(asked=asked.fingerprint(), share=share, copies=copies)[:8]}.jsonl"
    if not path.is_file():
        texts = [edited(asked.text(tokens), share, rng) for tokens in asked.repeated.tokens for _ in range(copies)]
        write_text(path, "".join(f"{json.dumps({'text': text}, ensure_ascii=False)}\n" for text in texts))
    return path


def _write(path: Path, texts: Iterable[str]) -> None:
    lines: Iterator[str] = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- streams


def stream_settings(stream: Stream, scale: Scale, texts: Texts, recipes: Path, copies: str = "") -> dict[str, Any]:
    """What `prepare` is asked for, as plain values: they decide the stream.

    Args:
        stream: Which.
        scale: Its sizes.
        texts: The texts.
        recipes: Folder ``recipes`` of the repository.
        copies: File of ``make_edited``, for a stream with edited copies.

    Raises:
        MemSinksError: If a data recipe is missing.
    """
    if scale.paper and stream.recipe:
        path = recipes / "data" / f"{stream.recipe}.yaml"
        if not path.is_file():
            raise MemSinksError(f"There is no data recipe {str(path)!r}. Run in the repository, or give --recipes DIR.")
        return {"config": path.read_text(encoding="utf-8"), "tokenizer_dir": stream.tokenizer_dir}
    if stream.rare_repeats is not None:
        return {
            "sources": {
                "rare": {
                    "path": texts.rare,
                    "documents": scale.rare,
                    "repeats": max(1, round(stream.rare_repeats * scale.rare_repeats)),
                },
                "bulk": {"path": texts.bulk, "choose": "first", "fill_to": _budget(scale)},
            },
            "validation": {"rare_validation": {"path": texts.rare_validation}},
        }
    repeated: dict[str, Any] = {"path": texts.train, "documents": scale.repeated, "repeats": scale.repeats}
    once: dict[str, Any] = {"path": texts.train, "documents": scale.once}
    if stream.every_steps is not None:
        repeated |= {"documents": 1, "repeats": max(2, _steps(scale, texts) // stream.every_steps)}
        once["documents"] = scale.documents if scale.texts else None
    if stream.canary:
        repeated["canary_tokens"] = scale.canary_tokens
    sources = {"repeated": repeated, "once": once}
    if stream.edited:
        sources = {"repeated": repeated | {"repeats": 1}, "edited": {"path": copies}, "once": once}
    found: dict[str, Any] = {
        "sources": {name: source | {"ids": stream.ids or scale.ids} for name, source in sources.items()},
        "validation": {"validation": {"path": texts.validation}},
    }
    if scale.paper:
        found["validation"]["validation"]["documents"] = scale.validation_documents
        found["near_duplicates"] = {"drop_validation": True}  # TinyStories holds edited copies of one story
    if stream.left_out:
        found["leave_out_repeated"] = True
    if stream.id_noise:
        found["id_noise"] = stream.id_noise
    return found


def _budget(scale: Scale) -> int:
    """Tokens of the streams of Figure 6: as many as the main stream has."""
    return (scale.once + scale.repeated * scale.repeats) * scale.tokens_per_document


def _bulk(scale: Scale) -> int:
    """Stories that are enough to fill the streams of Figure 6. Another tokenizer than their own makes more of them."""
    return max(scale.documents, _budget(scale) // EMBEDDED.tokens_per_document)


def _steps(scale: Scale, texts: Texts) -> int:
    """Steps of one pass over all documents once, for which rows are counted without their padding: there is none."""
    documents = scale.documents if scale.texts else sum(1 for _ in read_texts(Path(texts.train)))
    return documents * scale.tokens_per_document // (MICRO_BATCH * scale.block_size)


def stream_folder(stream: Stream, scale: Scale) -> str:
    """Name of the folder of a stream."""
    return stream.recipe if scale.paper and stream.recipe else stream.name


def prepare_stream(settings: dict[str, Any], texts: Texts, out_dir: Path) -> None:
    """Prepare a stream, unless it is there.

    Raises:
        MemSinksError: For bad input, see ``prepare``.
    """
    if (out_dir / MANIFEST).is_file():
        return
    if "config" in settings:
        prepare(**_recipe(settings["config"]), tokenizer_dir=Path(settings["tokenizer_dir"]), out_dir=out_dir)
        return
    given = dict(settings)
    given["sources"] = {name: Source(**values) for name, values in given["sources"].items()}
    given["validation"] = {name: ValidationSet(**values) for name, values in given["validation"].items()}
    if "near_duplicates" in given:
        given["near_duplicates"] = _recipe(yaml.safe_dump({"near_duplicates": given["near_duplicates"]}))[
            "near_duplicates"
        ]
    prepare(**given, tokenizer_dir=texts.tokenizer_dir, out_dir=out_dir)


def _recipe(text: str) -> dict[str, Any]:
    """A data recipe as the command line reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(prepare, as_group=False, skip={"out_dir", "tokenizer_dir"})
    return parser.instantiate_classes(parser.parse_string(text)).as_dict()


def tokens_of(arm: Arm, scale: Scale) -> int | None:
    """About how many tokens an arm trains on; ``None`` where its recipe says so."""
    if scale.paper and arm.paper_recipe:
        return None
    stream = arm.stream
    if stream.rare_repeats is not None:
        return _budget(scale)
    if stream.every_steps is not None:
        return scale.documents * scale.tokens_per_document
    documents = scale.once + scale.repeated * scale.repeats * (not stream.left_out)
    return documents * scale.tokens_per_document
