"""How do others measure the released model? The documents and settings that open-unlearning and mimir run on.

    HF folder + prepared data ─► texts as JSON lines + configurations ─► their programs, unchanged

The texts are the documents that `evaluate` scores, so that both measure the same.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.eval_configs import MIMIR, NAME, OPEN_UNLEARNING, Exported, mimir, open_unlearning
from litgpt_memsinks.evaluate.huggingface import HF_CONFIG, is_huggingface
from litgpt_memsinks.evaluate.subject import Asked, ask_prepared
from litgpt_memsinks.files import atomic_directory, write_json, write_text
from litgpt_memsinks.prepare.encoding import Encoder
from litgpt_memsinks.prepare.manifest import tokenizer_fingerprint

DEVICES = ("cpu", "cuda")


class Continuation(NamedTuple):
    """A document in two, as open-unlearning names them: what is given, and what is to follow."""

    prompt: str
    gt: str


class Texts(NamedTuple):
    """What is asked about."""

    repeated: list[str]
    validation: list[str]
    continued: list[Continuation]


def export_evals(
    hf_dir: Path,
    data_path: Path,
    out_dir: Path,
    reference: Path | None = None,
    limit: int | None = None,
    prefix: int = 32,
    suffix: int = 32,
    device: str = "cuda",
) -> None:
    """Write what open-unlearning and mimir need to measure an exported model: texts and configurations.

    Args:
        hf_dir: Folder for transformers, as `export_hf` writes it.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on.
        out_dir: Folder to write. Must not exist; appears only when it is complete.
        reference: The same kind of folder, of a model that never saw the repeated documents: for the reference attack.
        limit: Most documents of each kind. All by default.
        prefix: Tokens of a document that are given; a few more where words would be cut.
        suffix: Tokens that are to follow; a few more likewise.
        device: Where their programs compute, cuda or cpu.

    Raises:
        MemSinksError: If a folder is no model or has another tokenizer than the data, a setting is out of range, no
            document is long enough, or `out_dir` exists.
    """
    _check(device, limit=limit, prefix=prefix, suffix=suffix)
    asked = ask_prepared(data_path, limit)
    context = min(_context(folder, asked) for folder in (hf_dir, reference) if folder is not None)
    repeated, validation = (whole_texts(asked, part.tokens, context) for part in (asked.repeated, asked.validation))
    texts = Texts(repeated, validation, continuations(asked, prefix, suffix, context))
    of = Exported(
        model=hf_dir.resolve(),
        reference=None if reference is None else reference.resolve(),
        device=device,
        context=context,
        suffix=suffix,
        members=min(len(repeated), len(validation)),
        folder=out_dir.resolve(),
    )
    with atomic_directory(out_dir) as scratch:
        _write_open_unlearning(scratch / OPEN_UNLEARNING, of, texts)
        _write_mimir(scratch / MIMIR, of, texts)
        write_text(scratch / "README.md", _readme(of))
    print(
        f"{len(repeated)} repeated and {len(validation)} validation documents, {len(texts.continued)} to be continued."
        f"\nHow to run the programs on them: {out_dir / 'README.md'}"
    )


def _check(device: str, **numbers: int | None) -> None:
    if device not in DEVICES:
        raise MemSinksError(f"device is {device!r}, but it must be one of: {', '.join(DEVICES)}.")
    for setting, value in numbers.items():
        if value is not None and value < 1:
            raise MemSinksError(f"{setting} is {value}, but it must be at least 1.")


def _context(folder: Path, asked: Asked) -> int:
    """Most tokens that the model of a folder takes, after a look at whether the documents are its own."""
    if not is_huggingface(folder):
        raise MemSinksError(f"{str(folder)!r} is no folder for transformers. Make it: litgpt-memsinks export_hf")
    given = tokenizer_fingerprint(folder)
    if given != asked.tokenizer_sha256:
        raise MemSinksError(
            f"The tokenizer of {str(folder)!r} ({given[:12]}) is not the one that made {asked.path!r} "
            f"({asked.tokenizer_sha256[:12]}). Name the data that the model was trained on."
        )
    try:
        context = json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))["max_position_embeddings"]
    except (ValueError, KeyError, TypeError) as error:
        raise MemSinksError(
            f"{str(folder / HF_CONFIG)!r} has no max_position_embeddings. Export the model again."
        ) from error
    return int(context)


# --------------------------------------------------------------------------------------------------------------- texts


class Cutter:
    """Cuts documents where the text so far has exactly the document's tokens.

    Their programs get text and tokenize it anew: cut inside a word, it would have other tokens than were trained on.

    Args:
        asked: The documents' tokenizer.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked, self._encode = asked, Encoder(asked.tokenizer)

    def body(self, tokens: torch.Tensor) -> torch.Tensor:
        """A document without the end-of-sequence token, which has no text."""
        return tokens[:-1] if tokens[-1] == self._asked.tokenizer.eos_id else tokens

    def place(self, tokens: torch.Tensor, places: Iterable[int]) -> int | None:
        """The first of the places that is one; ``None`` if none is."""
        return next((place for place in places if self._fits(tokens[:place])), None)

    def _fits(self, tokens: torch.Tensor) -> bool:
        (again,) = self._encode([self._asked.text(tokens)])
        return again[:-1].tolist() == tokens.tolist()


def whole_texts(asked: Asked, documents: Sequence[torch.Tensor], context: int) -> list[str]:
    """Each document as text, as much of it as the model takes at once; of copies the first.

    Args:
        asked: The tokenizer.
        documents: Tokens of each, ``(n_tokens,)``.
        context: Most tokens of a text.
    """
    cutter, texts = Cutter(asked), []
    for tokens in map(cutter.body, documents):
        longest = min(context, len(tokens))
        end = longest if longest == len(tokens) else cutter.place(tokens, range(longest, 0, -1)) or longest
        texts.append(asked.text(tokens[:end]))
    return list(dict.fromkeys(text for text in texts if text.strip()))


def continuations(asked: Asked, prefix: int, suffix: int, context: int) -> list[Continuation]:
    """The repeated documents that are long enough, in two, different ones only.

    Raises:
        MemSinksError: If there is none.
    """
    cutter, found = Cutter(asked), []
    for tokens in map(cutter.body, asked.repeated.tokens):
        last = min(context, len(tokens))
        given = cutter.place(tokens, range(prefix, last - suffix + 1))
        end = given and cutter.place(tokens, range(given + suffix, last + 1))
        if given and end:
            prompt = asked.text(tokens[:given])
            found.append(Continuation(prompt, asked.text(tokens[:end])[len(prompt) :]))
    if not found:
        longest = max(map(len, asked.repeated.tokens))
        raise MemSinksError(
            f"No repeated document has prefix + suffix = {prefix} + {suffix} tokens within the model's context of "
            f"{context}; the longest has {longest}. Set --prefix and --suffix lower."
        )
    return list(dict.fromkeys(found))


# --------------------------------------------------------------------------------------------------------------- files


def _write_open_unlearning(folder: Path, of: Exported, texts: Texts) -> None:
    data = {
        "forget": [{"text": text} for text in texts.repeated],
        "holdout": [{"text": text} for text in texts.validation],
        "continuations": [one._asdict() for one in texts.continued],
    }
    for name, rows in data.items():
        _write_lines(folder / "data" / f"{name}.jsonl", rows)
    for name, (package, values) in open_unlearning(of).items():
        content = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_text(folder / "configs" / name, f"{package}\n{content}".lstrip())


def _write_mimir(folder: Path, of: Exported, texts: Texts) -> None:
    for name, kind in (("members", texts.repeated), ("nonmembers", texts.validation)):
        _write_lines(folder / f"{name}.jsonl", [{"text": text} for text in kind[: of.members]])
    write_json(folder / f"{NAME}.json", mimir(of))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _readme(of: Exported) -> str:
    configs, experiment = of.folder / OPEN_UNLEARNING / "configs", of.folder / MIMIR / f"{NAME}.json"
    return f"""# Measuring {of.model.name} with other programs

The paths in the configurations are absolute: make the folder anew if it moves.

## open-unlearning

In a checkout of github.com/locuslab/open-unlearning (written for commit d3d7cf9):

    python src/eval.py --config-dir {configs} experiment=eval/{NAME}

Results: `saves/eval/{NAME}/MUSE_SUMMARY.json`. Attacks: 1 is a document that is recognised, 0.5 a guess.

## mimir

In a checkout of github.com/iamgroot42/mimir (written for commit 1b6fd64):

    python run.py --config {experiment}

Results: under `{of.folder / MIMIR / "results"}`.
"""
