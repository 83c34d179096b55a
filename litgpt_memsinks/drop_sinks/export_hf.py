"""How do users of transformers get the released model? A folder that ``AutoModelForCausalLM.from_pretrained`` loads.

Names of the weights are those of LitGPT's own converter. Nothing in the folder needs this package or LitGPT.
"""

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.tokenizer import Tokenizer
from safetensors.torch import save_file

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.digests import file_sha256
from litgpt_memsinks.drop_sinks.drop_sinks import Dropped, progress, summary
from litgpt_memsinks.drop_sinks.hf_config import Renamed, hf_config, renamed
from litgpt_memsinks.drop_sinks.kept import KeepArgs, kept
from litgpt_memsinks.drop_sinks.plain_weights import alone, plain_config, tied, without_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, write_json
from litgpt_memsinks.model.checkpoint import WEIGHTS, check_fits, read_config, read_weights
from litgpt_memsinks.prepared.chosen import Missing
from litgpt_memsinks.version import __version__

SHARD_BYTES = 5 * 10**9
"""Most bytes of weights in a file, as on the Hugging Face hub; a single larger weight has a file of its own."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclass
class _Export:
    """A plain model on its way out."""

    config: Config
    weights: Mapping[str, torch.Tensor]
    tied: bool
    said: str
    """What was dropped and kept"""
    source: str
    """Path of the checkpoint"""


def export_hf(
    checkpoint_dir: Path,
    out_dir: Path,
    keep: str = "",
    keep_source: str = "",
    keep_documents: Path | None = None,
    data_path: Path | None = None,
    missing: Missing = "stop",
) -> None:
    """Write the model without sinks, or with those of chosen documents, as transformers loads it.

    Args:
        checkpoint_dir: Checkpoint of a model trained with sinks, such as OUT_DIR/final; or a plain one of LitGPT.
        out_dir: Folder to write. Must not exist; appears only when it is complete.
        keep: Sequence IDs of documents whose sinks stay, with commas between them; or @ and the path of a file of them.
        keep_source: Name of a source: the sinks of all its documents stay.
        keep_documents: A corpus: the sinks of the documents with its texts stay.
        data_path: Folder that `prepare` wrote and that the model was trained on, to find documents in.
        missing: What is to be kept, but is not in the data: stop, or pass over it.

    Raises:
        MemSinksError: If there is no checkpoint, it is damaged, what to keep is not there, transformers has no such
            architecture, or `out_dir` exists.
    """
    started = time.perf_counter()
    config = read_config(checkpoint_dir)
    # hashed while the weights are written: it reads ahead of them, too
    with atomic_directory(out_dir) as scratch, ThreadPoolExecutor(1) as hashing:
        export = _export(checkpoint_dir, config, KeepArgs(keep, keep_source, keep_documents, data_path, missing))
        dtype = next(iter(export.weights.values())).dtype
        values = hf_config(export.config, export.tied, dtype)
        special = copy_tokenizer(checkpoint_dir, scratch)
        write_json(scratch / "config.json", values | special)
        _generation_config(checkpoint_dir, scratch, special)
        digest = hashing.submit(file_sha256, checkpoint_dir / WEIGHTS)
        size = write_shards(export.weights, export.config, renamed(export.config, export.tied), scratch)
        (scratch / "README.md").write_text(_model_card(export, values, digest.result()), encoding="utf-8")
    print(
        f"{export.said}: {str(out_dir)!r} is a folder for transformers ({size / 1e6:,.1f} MB, "
        f"{time.perf_counter() - started:.1f} s).\nTry it: AutoModelForCausalLM.from_pretrained({str(out_dir)!r})"
    )


def _export(checkpoint_dir: Path, config: Config, keep: KeepArgs) -> _Export:
    stored = read_weights(checkpoint_dir)
    weights: Mapping[str, torch.Tensor] = stored
    plain, said = config, "Dropped nothing"
    if isinstance(config, MemSinksConfig):
        stay = kept(config, keep)
        plain = plain_config(config, stay.sinks)
        said = summary(Dropped(stay, config.n_sink - len(stay.sinks), plain), config)
        weights = without_sinks(stored, config, stay.sinks)
    elif keep.given:
        raise MemSinksError(f"{str(checkpoint_dir)!r} is a plain checkpoint: it has no sinks to keep. Leave that out.")
    check_fits(checkpoint_dir, stored, config)
    hf_config(plain, False, torch.float32)  # refuses before the large file is read
    return _Export(plain, weights, tied(weights), said, str(checkpoint_dir))


# ------------------------------------------------------------------------------------------------------------- weights


def write_shards(weights: Mapping[str, torch.Tensor], config: Config, convert: Renamed, folder: Path) -> int:
    """Write ``model.safetensors``, or numbered shards with an index above ``SHARD_BYTES``.

    Slices of one shard are in memory at a time; what is not sliced stays memory-mapped.

    Args:
        weights: Of the plain model, as LitGPT names them.
        config: Of the plain model.
        convert: To transformers' names and shapes, whole or in parts.
        folder: To write into.

    Returns:
        Bytes of the files.
    """
    dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):  # what becomes of each weight is found out without its numbers
        shapes = BaseGPT(config).to(dtype).state_dict()
    parts = {name: convert({name: weight}) for name, weight in shapes.items()}
    origin = {new: name for name, found in parts.items() for new in found}
    sizes = {new: one for found in parts.values() for new, one in found.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        wanted = set(names)
        shard = {
            new: alone(one)
            for name in progress(dict.fromkeys(origin[new] for new in names), f"Writing {file}")
            for new, one in convert({name: weights[name]}).items()
            if new in wanted
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets the owner alone read it
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return sum((folder / file).stat().st_size for file in plan.filename_to_tensors)


# ----------------------------------------------------------------------------------------------- tokenizer, text files


def copy_tokenizer(source: Path, folder: Path) -> dict[str, int]:
    """Copy the tokenizer's files so that ``AutoTokenizer`` loads what LitGPT loads.

    Returns:
        ``bos_token_id`` and ``eos_token_id``, those that the tokenizer has.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    vocabulary, path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not vocabulary.is_file():
        return {}
    if not _read_json(vocabulary).get("model"):
        raise MemSinksError(f"{str(source / vocabulary.name)!r} holds no tokenizer. Copy the checkpoint again.")
    settings = _read_json(path) if path.is_file() else {}
    # without a class, transformers guesses one from the model's type and may split other than tokenizer.json says
    write_json(path, {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    tokenizer = Tokenizer(folder)
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {name: number for name, number in found.items() if number is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MemSinksError(f"{path.name} of the checkpoint is not JSON ({error}). Copy it again.") from error
    return content if isinstance(content, dict) else {}


def _generation_config(source: Path, folder: Path, special: dict[str, int]) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", folder)
    else:
        write_json(folder / "generation_config.json", special)


def _model_card(export: _Export, values: dict[str, Any], digest: str) -> str:
    config = export.config
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {config.name or "A model"} after memorization sinks

A {values["architectures"][0]} with MLPs of {config.intermediate_size:,} neurons. It was trained with memorization sinks
([arXiv 2507.09937](https://arxiv.org/abs/2507.09937)) by LitGPT and written by litgpt-memsinks {__version__}.

- {export.said}.
- Written from `{WEIGHTS}` of `{Path(export.source).name}`, SHA-256 `{digest}`.
- This says how the weights were made. It does not say that a text cannot be extracted from them: that is measured by
  `litgpt-memsinks evaluate`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # where this file lies
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
