"""What other programs are given: of the shape that their sources read, and the documents that were trained on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.drop_sinks.export_hf import export_hf
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.export_evals import continuations, export_evals, whole_texts
from litgpt_memsinks.evaluate.subject import ask_prepared
from tests.console import memsinks
from tests.helpers import read_jsonl
from tests.released import save

OPEN_UNLEARNING = {
    "source": "locuslab/open-unlearning d3d7cf9e6b3c125d16687d4232680d8d83548f1a",
    # src/evals/metrics/__init__.py, and the keyword arguments that each function reads from its settings
    "metrics": {
        "exact_memorization": {"datasets", "collators", "batch_size"},
        "extraction_strength": {"datasets", "collators", "batch_size"},
        "rouge": {"datasets", "collators", "batch_size", "rouge_type", "generation_args"},
        "mia_loss": {"datasets", "collators", "batch_size"},
        "mia_zlib": {"datasets", "collators", "batch_size"},
        "mia_min_k": {"datasets", "collators", "batch_size", "k"},
        "mia_min_k_plus_plus": {"datasets", "collators", "batch_size", "k"},
        "mia_reference": {"datasets", "collators", "batch_size", "reference_model_path"},
    },
    # src/evals/metrics/mia/utils.py
    "kinds": {"forget", "holdout"},
    # src/data/pretraining.py, CompletionDataset
    "dataset": {"hf_args", "prefix_key", "text_key", "max_length", "predict_with_generate", "insert_space"},
    # src/data/collators.py
    "collator": {"padding_side", "index"},
    # src/evals/__init__.py, src/evals/base.py
    "evaluator": {"handler", "output_dir", "overwrite", "metrics"},
    # src/model/__init__.py, src/eval.py
    "model": {"model_args", "tokenizer_args", "template_args"},
    # src/evals/metrics/utils.py
    "rouge_types": {"rouge1_recall", "rougeL_f1", "rougeL_recall"},
}
"""What the program accepts, by file"""
MIMIR = {
    "source": "iamgroot42/mimir 1b6fd649eeeecc887275a2336c7da808ee58757d",
    # mimir/config.py, ExperimentConfig and EnvironmentConfig; with drop_extra_fields=False others are refused
    "experiment": {
        *("experiment_name", "base_model", "dataset_member", "dataset_nonmember", "output_name", "pretokenized"),
        *("dataset_nonmember_other_sources", "revision", "presampled_dataset_member", "presampled_dataset_nonmember"),
        *("token_frequency_map", "dataset_key", "specific_source", "full_doc", "max_substrs", "dump_cache"),
        *("load_from_cache", "load_from_hf", "blackbox_attacks", "tokenization_attack", "quantile_attack"),
        *("n_samples", "max_tokens", "max_data", "min_words", "max_words", "max_words_cutoff", "batch_size"),
        *("chunk_size", "scoring_model_name", "top_k", "do_top_k", "top_p", "do_top_p", "pre_perturb_pct"),
        *("pre_perturb_span_length", "tok_by_tok", "fpr_list", "random_seed", "ref_config", "recall_config"),
        *("neighborhood_config", "env_config", "openai_config"),
    },
    "required": {"experiment_name", "base_model", "dataset_member", "dataset_nonmember"},
    "environment": {
        *("cache_dir", "data_source", "device", "device_map", "device_aux", "compile", "int8", "half"),
        *("results", "tmp_results"),
    },
    # mimir/attacks/all_attacks.py
    "attacks": {"loss", "ref", "zlib", "min_k", "min_k++", "ne", "gradnorm", "recall", "dc_pdd"},
}


@pytest.fixture(scope="module")
def models(tokenizer_dir, tmp_path_factory):
    """Two folders for transformers, with the tokenizer of the prepared data."""
    root = tmp_path_factory.mktemp("models")
    for name in ("released", "unseen"):
        save(root / f"{name}-in", block_size=96)
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, root / f"{name}-in")
        export_hf(root / f"{name}-in", root / name)
    return root


@pytest.fixture(scope="module")
def exported(models, prepared, tmp_path_factory):
    """By the console script, with a reference."""
    out = tmp_path_factory.mktemp("exported") / "evals"
    settings = {"hf_dir": models / "released", "data_path": prepared, "out_dir": out, "reference": models / "unseen"}
    settings |= {"device": "cpu", "prefix": 24, "suffix": 16}
    printed = memsinks("export_evals", *(part for name, value in settings.items() for part in (f"--{name}", value)))
    assert "8 repeated and 40 validation documents" in printed.stdout
    assert [path.name for path in out.parent.iterdir()] == ["evals"]
    return out


def configurations(exported):
    folder = exported / "open_unlearning/configs"
    return {
        str(path.relative_to(folder)): (path.read_text(), yaml.safe_load(path.read_text()))
        for path in folder.rglob("*.yaml")
    }


def test_open_unlearning_finds_its_groups_and_packages(exported, models):
    found = configurations(exported)
    assert set(found) == {"model/memsinks.yaml", "eval/memsinks.yaml", "experiment/eval/memsinks.yaml"}
    text, experiment = found["experiment/eval/memsinks.yaml"]
    assert text.startswith("# @package _global_\n")
    assert experiment["defaults"] == [{"override /model": "memsinks"}, {"override /eval": "memsinks"}]
    text, evaluation = found["eval/memsinks.yaml"]
    assert text.startswith("# @package eval.memsinks\n")
    assert set(evaluation) == OPEN_UNLEARNING["evaluator"]
    _, model = found["model/memsinks.yaml"]
    assert set(model) == OPEN_UNLEARNING["model"]
    assert model["model_args"] == {"pretrained_model_name_or_path": str(models / "released"), "device_map": "cpu"}
    assert model["tokenizer_args"] == {"pretrained_model_name_or_path": str(models / "released")}


def test_open_unlearning_knows_every_metric_and_setting(exported, models):
    metrics = configurations(exported)["eval/memsinks.yaml"][1]["metrics"]
    assert {metric["handler"] for metric in metrics.values()} == set(OPEN_UNLEARNING["metrics"])
    for metric in metrics.values():
        assert set(metric) - {"handler"} == OPEN_UNLEARNING["metrics"][metric["handler"]]
        kinds = OPEN_UNLEARNING["kinds"] if metric["handler"].startswith("mia_") else {"forget"}
        assert set(metric["datasets"]) == kinds
        for dataset in metric["datasets"].values():
            assert dataset["handler"] == "CompletionDataset"
            assert set(dataset["args"]) <= OPEN_UNLEARNING["dataset"]
            lines = Path(dataset["args"]["hf_args"]["data_files"]).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            assert rows
            assert all(dataset["args"]["text_key"] in row for row in rows)
        (collator,) = metric["collators"].values()
        assert set(collator["args"]) == OPEN_UNLEARNING["collator"]
    assert metrics["forget_verbmem_ROUGE"]["rouge_type"] in OPEN_UNLEARNING["rouge_types"]
    assert metrics["forget_verbmem_ROUGE"]["collators"]["DataCollatorForSupervisedDataset"]["args"] == {
        "padding_side": "left",
        "index": "index",
    }
    assert metrics["mia_reference"]["reference_model_path"] == str(models / "unseen")


def test_mimir_knows_every_setting(exported, models):
    experiment = json.loads((exported / "mimir/memsinks.json").read_text())
    assert MIMIR["required"] <= set(experiment) <= MIMIR["experiment"]
    assert set(experiment["env_config"]) <= MIMIR["environment"]
    assert set(experiment["blackbox_attacks"]) == {"loss", "zlib", "min_k", "min_k++", "ref"} <= MIMIR["attacks"]
    assert experiment["base_model"] == str(models / "released")
    assert experiment["ref_config"] == {"models": [str(models / "unseen")]}
    members, others = (read_jsonl(exported / f"mimir/{name}.jsonl").copy() for name in ("members", "nonmembers"))
    assert len(members) == len(others) == experiment["n_samples"] == 8  # it compares as many as the fewer
    assert experiment["presampled_dataset_member"] == str(exported / "mimir/members.jsonl")


def test_texts_have_the_tokens_that_were_trained_on(exported, models, prepared):
    asked, tokenizer = ask_prepared(prepared, None), AutoTokenizer.from_pretrained(models / "released")
    texts = read_jsonl(exported / "open_unlearning/data/forget.jsonl")
    assert texts == read_jsonl(exported / "mimir/members.jsonl")
    for text, tokens in zip(texts, asked.repeated.tokens, strict=True):
        found = tokenizer(text).input_ids
        assert found == tokens[: len(found)].tolist()
        assert min(96, len(tokens) - 1) - 8 < len(found) <= min(96, len(tokens) - 1)  # no end of sequence
    lines = (exported / "open_unlearning/data/continuations.jsonl").read_text().splitlines()
    by_prompt = {json.loads(line)["prompt"]: json.loads(line)["gt"] for line in lines}
    assert 0 < len(by_prompt) <= 8
    for prompt, continued in by_prompt.items():
        given, whole = (tokenizer(text).input_ids for text in (prompt, prompt + continued))
        assert whole[: len(given)] == given
        assert 24 <= len(given) < 32
        assert 16 <= len(whole) - len(given) < 24
        assert any(whole == tokens[: len(whole)].tolist() for tokens in asked.repeated.tokens)


def test_commands_of_the_readme_name_what_is_there(exported):
    text = (exported / "README.md").read_text()
    for path in re.findall(r"--config(?:-dir)? (\S+)", text):
        assert (exported / path).exists()  # joining with an absolute path gives that
    for known in (OPEN_UNLEARNING, MIMIR):
        repository, commit = known["source"].split()
        assert f"github.com/{repository} (written for commit {commit[:7]})" in text


def test_copies_are_one_text(prepared):
    asked = ask_prepared(prepared, 3)
    document = asked.repeated.tokens[0]
    assert len(whole_texts(asked, [document, document], 1000)) == 1
    asked.repeated.tokens.append(document)
    assert len(continuations(asked, 8, 8, 1000)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu', but it must be one of: cpu, cuda"),
        ({"prefix": 0}, "prefix is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"suffix": 500}, "No repeated document has prefix + suffix = 32 + 500 tokens"),
        ({"hf_dir": "released-in"}, "is no folder for transformers"),
        ({"hf_dir": "llama"}, "mimir takes a model whose path has 'llama' for one that it knows"),
        ({"hf_dir": "other"}, "is not the one that made"),
        ({"hf_dir": "short"}, "has no max_position_embeddings"),
        ({"reference": "other"}, "is not the one that made"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message, models, prepared, tmp_path):
    for name in ("llama", "other", "short"):
        shutil.copytree(models / "released", tmp_path / name)
    (tmp_path / "other/tokenizer.json").write_text("{}")
    (tmp_path / "short/config.json").write_text("{}")
    places = {name: tmp_path / name for name in ("llama", "other", "short")} | {"released-in": models / "released-in"}
    given = {"hf_dir": models / "released", "data_path": prepared, "out_dir": tmp_path / "out", **changes}
    given |= {key: places[value] for key, value in changes.items() if value in places}
    with pytest.raises(MemSinksError, match=re.escape(message)) as error:
        export_evals(**given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten(exported, models, prepared):
    arguments = ["--hf_dir", models / "released", "--data_path", prepared, "--out_dir", exported, "--prefix", "8"]
    with pytest.raises(SystemExit, match="exists and is not overwritten"):
        main(["export_evals", *map(str, arguments), "--suffix", "8"])
