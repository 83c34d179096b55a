"""The folder for transformers: loaded by transformers in a process that can import neither us nor LitGPT."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
import yaml
from litgpt.config import Config
from litgpt.config import configs as litgpt_configs
from litgpt.generate.base import generate
from litgpt.tokenizer import Tokenizer
from safetensors import safe_open

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.config import SUPPORTED_MLPS, MemSinksConfig, SinkArgs
from litgpt_memsinks.drop_sinks import export_hf as module
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.drop_sinks.export_hf import export_hf, file_sha256
from litgpt_memsinks.drop_sinks.hf_config import hf_config
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model
from tests.console import NOT_AUTOLOADED, memsinks, run
from tests.released import save

GPT2 = {"mlp_class_name": "GptNeoxMLP", "bias": True, "norm_class_name": "LayerNorm", "gelu_approximate": "tanh"}
PYTHIA = {**GPT2, "gelu_approximate": "none", "parallel_residual": True, "rotary_percentage": 0.25, "n_embd": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
GEMMA = {"name": "Gemma-x", "mlp_class_name": "GemmaMLP", "scale_embeddings": True, "gelu_approximate": "tanh"}
CASES = {
    "smollm": {"n_head": 4, "n_query_groups": 2},
    "untied": {"tie": False},
    "keep": {"keep": "5,17", "sinks": SinkArgs(0.25, 0.1, scale="inverse")},
    "llama3": {"rope_base": 500000, "rope_adjustments": LLAMA3},
    "gelu": {"mlp_class_name": "GemmaMLP"},
    "gemma": {**GEMMA, "head_size": 32},
    "pythia": {**PYTHIA, "tie": False},
    "gpt2": {**GPT2, "keep": "5"},
    "shards": {},
}
TEXTS = ["Once upon a time", " Two  spaces, a line\nend, ünïcode.", "The end.<|endoftext|>Another"]

IN_TRANSFORMERS = """
import sys, torch
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("litgpt", "litgpt_memsinks", "lightning", "litdata"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sorted(Path(sys.argv[1]).glob("*/hf")):
    expected = torch.load(folder.parent / "expected.pt", weights_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    with torch.inference_mode():
        difference = (model(expected["tokens"]).logits - expected["logits"]).abs().max().item()
        generated = model.generate(expected["tokens"][:1, :8], max_new_tokens=24, do_sample=False, eos_token_id=None)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    print(folder.parent.name, type(model).__name__, difference, tied, torch.equal(generated[0], expected["generated"]))
tokenizer = AutoTokenizer.from_pretrained(folder)
print([tokenizer(text).input_ids for text in eval(sys.argv[2])], tokenizer.eos_token_id)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("litgpt", "litgpt_memsinks")))
"""


@pytest.fixture(scope="module")
def exported(tokenizer_dir, tmp_path_factory):
    """A folder per case: the checkpoint, what is exported of it, and what LitGPT computes with what is dropped."""
    root = tmp_path_factory.mktemp("exported")
    for case, changes in CASES.items():
        folder = root / case
        keep = changes.get("keep", "")
        save(folder / "in", spread=1.5, **{name: value for name, value in changes.items() if name != "keep"})
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, folder / "in")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SHARD_BYTES", 40_000 if case == "shards" else module.SHARD_BYTES)
            export_hf(folder / "in", folder / "hf", keep=keep)
        drop_sinks(folder / "in", folder / "plain", keep=keep)
        torch.save(computed(folder / "plain"), folder / "expected.pt")
    return root


@torch.inference_mode()
def computed(folder):
    """Logits and greedy continuation by LitGPT."""
    model = load_model(folder)
    tokens = torch.randint(0, 512, (3, 64), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    model.set_kv_cache(batch_size=1)
    return {
        "tokens": tokens,
        "logits": logits,
        "generated": generate(model, tokens[0, :8], max_returned_tokens=32, temperature=0.0),
    }


def test_transformers_without_us_computes_the_same(exported, tokenizer_dir):
    command = [sys.executable, "-I", "-c", IN_TRANSFORMERS, exported, repr(TEXTS)]
    lines = run(command, **NOT_AUTOLOADED).stdout.splitlines()
    found = {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] and line.split()[0] in CASES}
    architectures = {"gemma": "GemmaForCausalLM", "pythia": "GPTNeoXForCausalLM", "gpt2": "GPTNeoXForCausalLM"}
    for case, changes in CASES.items():
        architecture, difference, tied, same = found[case]
        assert architecture == architectures.get(case, "LlamaForCausalLM")
        assert float(difference) < 1e-5, case
        assert tied == str(changes.get("tie", True)), case
        assert same == "True", case
    ours = Tokenizer(tokenizer_dir)
    assert lines[-2] == f"{[ours.encode(text).tolist() for text in TEXTS]} {ours.eos_id}"
    assert lines[-1] == "[]"


def test_files(exported, tokenizer_dir):
    folder = exported / "keep/hf"
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*names, *(path.name for path in tokenizer_dir.iterdir())}
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 0}
    card = (folder / "README.md").read_text()
    assert file_sha256(exported / "keep/in/lit_model.pth") in card
    width = yaml.safe_load((exported / "keep/plain/model_config.yaml").read_text())["intermediate_size"]
    assert f"Dropped {64 - width} of 64 neurons" in card
    assert f"kept {width - 16} of 48 sinks, those of the documents with the IDs 5, 17." in card


def test_tied_embeddings_are_in_the_file_once(exported):
    for case, head in (("smollm", False), ("untied", True)):
        with safe_open(exported / case / "hf/model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == head  # noqa: SIM118 - not a dict
            assert file.metadata() == {"format": "pt"}


def test_shards_and_their_index(exported):
    folder = exported / "shards/hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert not (folder / "model.safetensors").exists()
    for file in files:
        with safe_open(folder / file, "pt") as content:
            assert set(content.keys()) == {name for name, where in index["weight_map"].items() if where == file}


def test_generation_config_of_the_checkpoint_is_carried_over(tmp_path):
    save(tmp_path / "in")
    (tmp_path / "in/generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    export_hf(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 7, "temperature": 0.6}


def test_a_plain_checkpoint_is_written_too(exported, tmp_path):
    export_hf(exported / "smollm/plain", tmp_path / "out")
    ours, again = exported / "smollm/hf/model.safetensors", tmp_path / "out/model.safetensors"
    assert ours.read_bytes() == again.read_bytes()


NOT_THERE = {
    "bias": ({"bias": True}, "its bias is True, but that architecture has False"),
    "layer norm": ({"norm_class_name": "LayerNorm"}, "its norm_class_name is 'LayerNorm'"),
    "partial rotary": ({"rotary_percentage": 0.5}, "its rotary_percentage is 0.5"),
    "window": ({"sliding_window_size": 8}, "its sliding_window_size is 8"),
    "gemma without its name": ({**GEMMA, "name": "other"}, "its scale_embeddings is True"),
    "name of gemma": ({"name": "Gemma-x"}, "GemmaForCausalLM of transformers: its mlp_class_name is 'LLaMAMLP'"),
    "gpt-neox with groups": ({**GPT2, "n_query_groups": 1}, "its n_query_groups is 1, but that architecture has 2"),
    "gpt-neox without biases": ({**GPT2, "bias": False}, "its bias is False, but that architecture has True"),
    "attention scale": ({"attention_scores_scalar": 8}, "its attention_scores_scalar is 8"),
    "yarn": ({"rope_adjustments": {"factor": 2.0}}, "its rope_adjustments are {'factor': 2.0}"),
}


@pytest.mark.parametrize("case", sorted(NOT_THERE))
def test_what_transformers_does_not_have_is_refused_in_one_line(case, tmp_path):
    changes, message = NOT_THERE[case]
    save(tmp_path / "in", **changes)
    with pytest.raises(MemSinksError) as error:
        export_hf(tmp_path / "in", tmp_path / "out")
    assert message in str(error.value)
    assert repr(changes.get("name", "tiny")) in str(error.value)
    assert "Use drop_sinks" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        *(("SmolLM-360M-MemSinks", "llama"), ("SmolLM2-1.7B-MemSinks", "llama"), ("Tiny-MemSinks", "llama")),
        *(("GPT2-Medium-MemSinks", "gpt_neox"), ("pythia-160m", "gpt_neox"), ("Gemma-2b", "gemma")),
    ],
)
def test_registered_models_have_an_architecture(name, model_type):
    config = MemSinksConfig.from_name(name).to_base()
    assert hf_config(config, True, torch.bfloat16)["model_type"] == model_type


def test_every_model_of_litgpt_is_written_or_refused():
    """By what it computes, and not by its name; none ends in a traceback."""
    written = set()
    for values in litgpt_configs:
        config = Config(**values)
        if config.mlp_class_name in SUPPORTED_MLPS and not config.n_expert:
            with contextlib.suppress(MemSinksError):
                hf_config(config, False, torch.float32)
                written.add(config.name)
    assert {"pythia-14m", "Llama-2-7b-hf", "Llama-3.2-1B", "SmolLM2-135M", "Gemma-7b", "tiny-llama-1.1b"} <= written
    others = ("Gemma-2-", "Gemma-3", "Qwen", "phi-1", "phi-2", "falcon", "OLMo", "stablelm-3b", "stablelm-zephyr")
    assert not [name for name in written if name.startswith(others)]


def junk_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version"')


def empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def truncated(folder):
    weights = folder / "lit_model.pth"
    weights.write_bytes(weights.read_bytes()[:1000])


def wrong_shape(folder):
    path = folder / "model_config.yaml"
    path.write_text(path.read_text().replace("padded_vocab_size: 512", "padded_vocab_size: 576"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (junk_tokenizer, "tokenizer.json of the checkpoint is not JSON"),
        (empty_tokenizer, "holds no tokenizer"),
        (truncated, "cannot be read as model weights"),
        (wrong_shape, "has shape (512, 32) in lit_model.pth, but (576, 32)"),
    ],
)
def test_damage_is_refused_in_one_line_and_nothing_written(spoil, message, tmp_path):
    save(tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(SystemExit) as error:
        main(["export_hf", str(tmp_path / "in"), str(tmp_path / "out")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_command(tmp_path):
    save(tmp_path / "in")
    output = memsinks("export_hf", tmp_path / "in", tmp_path / "out", "--keep", "5").stdout
    assert "is a folder for transformers" in output
    files = [tmp_path / "out" / name for name in ("model.safetensors", "config.json")]
    assert len({file.stat().st_mode for file in files}) == 1  # who may read one may read the other
    assert f"({files[0].stat().st_size / 1e6:,.1f} MB" in output
    again = memsinks("export_hf", tmp_path / "in", tmp_path / "out", check=False)
    assert again.returncode == 1
    assert again.stdout.startswith("Error: ")
    assert "exists and is not overwritten" in again.stdout
