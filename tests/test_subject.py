"""Models of every kind and documents from every place: the same losses, the same tokens and IDs."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.scripts.convert_lit_checkpoint import copy_weights_gpt_neox, copy_weights_llama
from safetensors.torch import save_file

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.evaluate import evaluate
from litgpt_memsinks.evaluate.huggingface import litgpt_config, load_huggingface
from litgpt_memsinks.evaluate.subject import Subject, ask_files, ask_prepared
from tests.console import TINY_MODEL
from tests.helpers import read_jsonl, write_jsonl
from tests.trained import plain_model, save, sink_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,  # of no registered model
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
}
TINY = {key: value for key, value in TINY_MODEL.items() if key not in ("intermediate_size", "mlp_class_name", "n_head")}
SAME = {
    "llama": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 40, "mlp_class_name": "LLaMAMLP",
              "rope_base": 50000, "norm_eps": 1e-5},
    "gpt_neox": {"n_head": 4, "intermediate_size": 72, "mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm",
                 "bias": True, "parallel_residual": True, "rotary_percentage": 0.5},
}  # fmt: skip
"""LitGPT's configuration of the same models, written down by hand."""


def hf_folder(folder, values):
    """A model folder as transformers writes it, by LitGPT's own converter; and the LitGPT model."""
    torch.manual_seed(0)
    model = BaseGPT(Config(**{**TINY, **SAME[values["model_type"]]})).eval()
    weights = {}
    if values["model_type"] == "llama":
        copy_weights_llama(model.config, weights, dict(model.state_dict()))
    else:
        copy_weights_gpt_neox(model.config, weights, dict(model.state_dict()))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    named = sorted(weights.items())
    save_file({name: tensor.contiguous() for name, tensor in named[::2]}, folder / "model-1.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in named[1::2]}, folder / "model-2.safetensors")
    return model


@pytest.mark.parametrize("values", [LLAMA, NEOX], ids=["llama", "gpt_neox"])
def test_huggingface_folder_computes_what_litgpt_does(values, tmp_path):
    model = hf_folder(tmp_path / "hf", values)
    loaded = load_huggingface(tmp_path / "hf")
    tokens = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), model(tokens))
    subject = Subject.at("hf", tmp_path / "hf")
    assert subject.kind == "huggingface"
    assert subject.described(loaded)["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_older_configurations_name_theta_otherwise():
    old = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    assert litgpt_config({**old, "rope_theta": 50000.0}, "x") == litgpt_config(LLAMA, "x")
    assert litgpt_config(old, "x").rope_base == 10000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**LLAMA, "model_type": "gpt2"}, "of type 'gpt2'"),
        ({**LLAMA, "rope_parameters": {"rope_type": "llama3"}}, "scales its rotary positions"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({**NEOX, "attention_bias": False}, "attention_bias False"),
        ({"model_type": "llama"}, "is not a model configuration"),
        ([], "is not a model configuration"),
        ({**LLAMA, "intermediate_size": 44}, "the weights cannot be read"),
    ],
)
def test_what_is_not_read_is_refused(values, message, tmp_path):
    hf_folder(tmp_path / "hf", LLAMA)
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    with pytest.raises(MemSinksError, match=message) as error:
        load_huggingface(tmp_path / "hf")
    assert "\n" not in str(error.value)


def test_truncated_weights_are_refused(tmp_path):
    hf_folder(tmp_path / "hf", LLAMA)
    path = tmp_path / "hf/model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MemSinksError, match="cannot be read"):
        load_huggingface(tmp_path / "hf")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(MemSinksError, match=r"is not a LitGPT checkpoint: it has no lit_model\.pth"):
        Subject.at("x", tmp_path)


def test_facts_about_a_model_with_sinks(tmp_path):
    folder = save(tmp_path / "a", sink_model(seed=3))
    subject = Subject.at("a", folder, "standard")
    assert (subject.kind, subject.seed, subject.role) == ("memsinks", None, "standard")
    sinks = subject.described(subject.load("cpu"))["sinks"]
    assert sinks == {
        "n_shared": 64,
        "n_sink": 64,
        "active_probability": 0.5,
        "seed": 3,
        "sinks_for": "repeated",
        "scale": "none",
        "method": "memsinks",
        "off_share": 0.0,
        "layers": None,
        "mask": "bernoulli",
        "attention": "row",
        "shared_values": None,
        "learning_rate": 1.0,
        "weight_decay": None,
    }
    other = Subject.at("b", save(tmp_path / "b", sink_model(seed=4)))
    assert other.sha256 == subject.sha256  # the same weights
    assert other.fingerprint() != subject.fingerprint()


def test_texts_have_the_tokens_and_ids_that_prepare_gives_them(prepared, corpus_dir, tokenizer_dir, tmp_path):
    expected = ask_prepared(prepared, None)
    table = pq.read_table(prepared / "documents.parquet").to_pylist()
    texts = read_jsonl(corpus_dir / "train.jsonl")
    lines = {row["digest"]: row["line"] for row in table if row["repeats"] > 1}
    repeated = write_jsonl(
        tmp_path / "repeated.jsonl", [texts[lines[digest] - 1] for digest in expected.repeated.digests]
    )
    asked = ask_files(repeated, corpus_dir / "validation.jsonl", tokenizer_dir, None)
    for found, wanted in ((asked.repeated, expected.repeated), (asked.validation, expected.validation)):
        assert sorted(map(torch.Tensor.tolist, found.tokens)) == sorted(map(torch.Tensor.tolist, wanted.tokens))
        assert sorted(found.sequence_ids.tolist()) == sorted(wanted.sequence_ids.tolist())
    assert asked.text(asked.repeated.tokens[0]) == json.loads(repeated.read_text().splitlines()[0])["text"]
    assert len(ask_files(repeated, corpus_dir / "validation.jsonl", tokenizer_dir, 3).validation.tokens) == 3
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MemSinksError, match="has no documents"):
        ask_files(tmp_path / "empty.jsonl", repeated, tokenizer_dir, None)


def test_huggingface_model_on_files_of_text(corpus_dir, tokenizer_dir, tmp_path, capsys):
    hf_folder(tmp_path / "hf", LLAMA)
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path / "hf")
    out_file = tmp_path / "results.json"
    files = {"repeated": corpus_dir / "validation.jsonl", "validation": corpus_dir / "train.jsonl"}
    settings = {**files, "tokenizer_dir": tokenizer_dir, "limit": 4, "bootstrap": 10, "parts": "losses,membership"}
    evaluate(
        tmp_path / "hf", models=[f"plain={save(tmp_path / 'plain', plain_model())}"], out_file=out_file, **settings
    )
    plain, model = json.loads(out_file.read_text())["models"]
    assert (plain["kind"], model["kind"]) == ("litgpt", "huggingface")
    assert [row["attack"] for row in model["parts"]["membership"]] == ["loss", "zlib", "min_k", "min_k_plus_plus"]
    assert "No verdict" in capsys.readouterr().out
