"""How do other evaluations of memorisation read a model and its documents? Their settings, as plain values.

Facts of two programs, read in their sources. open-unlearning (github.com/locuslab/open-unlearning, commit d3d7cf9)
takes Hydra groups of YAML files and data sets of JSON lines; mimir (github.com/iamgroot42/mimir, commit 1b6fd64) takes
one JSON file and presampled JSON lines.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_memsinks.errors import MemSinksError

OPEN_UNLEARNING, MIMIR = "open_unlearning", "mimir"
NAME = "memsinks"
"""Of the model, the evaluation and the experiment in their configurations"""
K = 0.2
"""Share of the tokens that Min-K% looks at; mimir's own, and `evaluate`'s"""
BATCH = 8

MIMIR_NAMES = (
    *("llama", "alpaca", "silo", "balanced", "datablations", "pubmedgpt", "gpt-j", "neox", "facebook/opt-", ":"),
    *("olmo", "stablelm"),
)
"""What mimir looks for in the path of a model, to treat it as one that it knows: with another tokenizer, in half
precision, with remote code, or on a second GPU; the last two in any case of letters"""


@dataclass(frozen=True)
class Exported:
    """What a configuration names.

    Attributes:
        model: Absolute path of the Hugging Face folder.
        reference: The same of a model that never saw the repeated documents, if there is one.
        device: ``cuda`` or ``cpu``.
        context: Most tokens that the model takes.
        suffix: Tokens that are to be continued.
        members: Documents of each kind that mimir compares: it needs as many of the one as of the other.
        folder: Absolute path of the folder with the configurations and texts.
    """

    model: Path
    reference: Path | None
    device: str
    context: int
    suffix: int
    members: int
    folder: Path

    def __post_init__(self) -> None:
        """Refuse paths by which mimir would take the model for another one."""
        for path in (self.model, self.reference):
            text = str(path)
            known = [name for name in MIMIR_NAMES if name in (text.lower() if name in MIMIR_NAMES[-2:] else text)]
            if known:
                raise MemSinksError(
                    f"mimir takes a model whose path has {known[0]!r} for one that it knows, and {str(path)!r} has. "
                    "Move or link the folder to a path without it."
                )


# ----------------------------------------------------------------------------------------------------- open-unlearning


def open_unlearning(of: Exported) -> dict[str, tuple[str, dict[str, Any]]]:
    """Path below the folder of its configurations to the first line, Hydra's package, and the settings."""
    return {
        f"model/{NAME}.yaml": ("", _hydra_model(of)),
        f"eval/{NAME}.yaml": (f"# @package eval.{NAME}", _hydra_eval(of)),
        f"experiment/eval/{NAME}.yaml": (
            "# @package _global_",
            {"defaults": [{"override /model": NAME}, {"override /eval": NAME}], "task_name": NAME},
        ),
    }


def _hydra_model(of: Exported) -> dict[str, Any]:
    path = {"pretrained_model_name_or_path": str(of.model)}
    return {
        "model_args": {**path, "device_map": of.device},
        "tokenizer_args": dict(path),
        "template_args": {"apply_chat_template": False},  # read by metrics of questions and answers only
    }


def _hydra_eval(of: Exported) -> dict[str, Any]:
    return {
        "handler": "MUSEEvaluator",  # runs whatever metrics it is given
        "output_dir": "${paths.output_dir}",
        "overwrite": False,
        "metrics": {**_memorised(of), **_told_apart(of)},
    }


def _memorised(of: Exported) -> dict[str, Any]:
    generation = {"do_sample": False, "top_p": None, "temperature": None, "use_cache": True}
    continued = _dataset(of, "continuations", of.suffix, "gt")
    prompted = {**continued, "args": {**continued["args"], "predict_with_generate": True}}
    return {
        **{name: _metric(name, {"forget": continued}) for name in ("exact_memorization", "extraction_strength")},
        "forget_verbmem_ROUGE": {
            **_metric("rouge", {"forget": prompted}, padding="left"),
            "rouge_type": "rougeL_f1",
            "generation_args": {**generation, "max_new_tokens": of.suffix},
        },
    }


def _told_apart(of: Exported) -> dict[str, Any]:
    both = {name: _dataset(of, name, of.context, "text") for name in ("forget", "holdout")}
    lowest = {**_metric("mia_min_k", both), "k": K}
    found = {
        "mia_loss": _metric("mia_loss", both),
        "mia_zlib": _metric("mia_zlib", both),
        "mia_min_k": lowest,
        "mia_min_k_plus_plus": {**_metric("mia_min_k_plus_plus", both), "k": K},
    }
    if of.reference is not None:
        found["mia_reference"] = {
            **_metric("mia_reference", both),
            "reference_model_path": str(of.reference),
        }
    return found


def _dataset(of: Exported, name: str, length: int, text_key: str) -> dict[str, Any]:
    file = of.folder / OPEN_UNLEARNING / "data" / f"{name}.jsonl"
    return {
        "handler": "CompletionDataset",
        "args": {
            "hf_args": {"path": "json", "data_files": str(file), "split": "train"},
            "prefix_key": "prompt",
            "text_key": text_key,
            "max_length": length,
            "insert_space": False,
        },
    }


def _metric(handler: str, datasets: dict[str, Any], padding: str = "right") -> dict[str, Any]:
    collator = "DataCollatorForSupervisedDataset"
    return {
        "handler": handler,
        "batch_size": BATCH,
        "datasets": datasets,
        "collators": {collator: {"handler": collator, "args": {"padding_side": padding, "index": "index"}}},
    }


# --------------------------------------------------------------------------------------------------------------- mimir


def mimir(of: Exported) -> dict[str, Any]:
    """Its experiment: as many repeated documents as validation ones, whole, under every attack that needs no other
    model, and the reference attack if there is one.
    """
    folder = of.folder / MIMIR
    device = "cuda:0" if of.device == "cuda" else of.device
    return {
        "experiment_name": NAME,
        "output_name": NAME,
        "base_model": str(of.model),
        "dataset_member": "repeated",
        "dataset_nonmember": "validation",
        "dataset_key": "text",
        "presampled_dataset_member": str(folder / "members.jsonl"),
        "presampled_dataset_nonmember": str(folder / "nonmembers.jsonl"),
        "load_from_cache": False,
        "load_from_hf": False,
        "min_words": 1,
        "max_words": 1_000_000,  # texts are cut to the model's context already
        "max_data": max(of.members, 1),
        "n_samples": of.members,
        "blackbox_attacks": ["loss", "zlib", "min_k", "min_k++", *(["ref"] if of.reference else [])],
        **({"ref_config": {"models": [str(of.reference)]}} if of.reference else {}),
        "fpr_list": [0.001, 0.01],
        "random_seed": 0,
        "env_config": {
            "cache_dir": str(folder / "cache"),
            "data_source": str(folder),
            "results": str(folder / "results"),
            "tmp_results": str(folder / "tmp_results"),
            "device": device,
            "device_aux": device,
            "compile": False,
        },
    }
