"""The stock ``litgpt pretrain`` in subprocesses: with sinks, without them, and without us.

Where it is part of the test how the package is found, the process has imported neither LitGPT nor us before.
"""

import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from litdata import TokensLoader, optimize

from litgpt_memsinks import MemSinksConfig, SinkArgs
from litgpt_memsinks.model.checkpoint import read_weights
from litgpt_memsinks.model.model import sliced_dimension
from litgpt_memsinks.pretrain import pretrain
from tests.console import (
    LIBRARIES,
    NOT_AUTOLOADED,
    litgpt,
    litgpt_with_package_imported,
    logged,
    memsinks,
    pretrain_arguments,
)
from tests.helpers import read_stream


def identity(row):
    return row


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    """The tokens of the prepared folder as a plain stream, in the same order."""
    folder = tmp_path_factory.mktemp("plain")
    for split in ("train", "val"):
        tokens = torch.from_numpy(read_stream(prepared / split)[0::2].astype(np.int32))
        optimize(
            fn=identity,
            inputs=[tokens],
            output_dir=str(folder / split),
            chunk_bytes="64MB",
            item_loader=TokensLoader(),
            num_workers=1,
            start_method="fork",
            verbose=False,
        )
    return folder


@pytest.fixture(scope="module")
def stock_run(plain, tmp_path_factory):
    """A run of stock LitGPT on the plain stream, in a process that never imports us."""
    out_dir = tmp_path_factory.mktemp("stock") / "out"
    litgpt(*pretrain_arguments(out_dir, plain, "litgpt.data.LitData"), imported=LIBRARIES, **NOT_AUTOLOADED)
    return out_dir


@pytest.fixture(scope="module")
def sink_run(prepared, tmp_path_factory):
    """A run with sinks, with a checkpoint in the middle."""
    out_dir = tmp_path_factory.mktemp("sinks") / "out"
    result = litgpt(*pretrain_arguments(out_dir, prepared, **SINKS, train__save_interval=5), imported=())
    return out_dir, result.stdout


SINKS = {"data__sinks__shared_fraction": 0.5, "data__sinks__active_probability": 0.3}


@pytest.mark.parametrize(
    ("command", "environment"), [(litgpt, {}), (litgpt_with_package_imported, NOT_AUTOLOADED)], ids=["auto", "imported"]
)
def test_stock_recipe_is_untouched_by_the_package(command, environment, plain, stock_run, tmp_path):
    command(*pretrain_arguments(tmp_path / "out", plain, "litgpt.data.LitData"), imported=LIBRARIES, **environment)
    assert len(logged(stock_run)) == 12
    assert logged(tmp_path / "out") == logged(stock_run)
    assert logged(tmp_path / "out", "val_loss") == logged(stock_run, "val_loss")


def test_without_sinks_equals_stock_loss_by_loss(prepared, stock_run, tmp_path):
    litgpt(*pretrain_arguments(tmp_path / "out", prepared, data__sinks__shared_fraction=1.0))
    assert logged(tmp_path / "out") == logged(stock_run)
    assert logged(tmp_path / "out", "val_loss") == logged(stock_run, "val_loss")
    ours, stock = read_weights(tmp_path / "out/final"), read_weights(stock_run / "final")
    assert set(ours) == set(stock) | {"n_shared"}
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_sinks_change_training(sink_run, stock_run):
    out_dir, output = sink_run
    assert "32 of 64 neurons of each MLP are shared (g = 0.500), 32 are sinks" in output
    assert len(logged(out_dir)) == 12
    assert logged(out_dir) != logged(stock_run)


def test_checkpoint_carries_its_configuration_and_tokenizer(sink_run, prepared):
    final = sink_run[0] / "final"
    config = yaml.safe_load((final / "model_config.yaml").read_text())
    assert {key: value for key, value in config.items() if key.startswith("sink_")} == {
        "sink_n_shared": 32,
        "sink_active_probability": 0.3,
        "sink_seed": 0,
        "sink_sinks_for": "all",
        "sink_scale": "none",
        "sink_method": "memsinks",
        "sink_off_share": 0.0,
        "sink_layers": None,
        "sink_mask": "bernoulli",
        "sink_attention": "row",
        "sink_shared_values": None,
        "sink_learning_rate": 1.0,
        "sink_weight_decay": None,
        "sink_mask_version": 1,
        "sink_removed": "",
        "sink_removed_documents": 0,
    }
    assert (final / "tokenizer.json").read_bytes() == (prepared / "tokenizer/tokenizer.json").read_bytes()


def test_sinks_for_repeated_trains_another_model_on_the_same_stream(sink_run, prepared, tmp_path):
    litgpt(*pretrain_arguments(tmp_path / "out", prepared, **SINKS, data__sinks__sinks_for="repeated"))
    assert logged(tmp_path / "out") != logged(sink_run[0])


@pytest.mark.long  # test_sink_steps.py has it exactly, and test_distributed.py in a real run
def test_sinks_with_a_learning_rate_of_their_own(prepared, tmp_path):
    """Of a millionth: sinks hardly move while the shared neurons learn."""
    own = {"data__sinks__learning_rate": 1e-6, "data__sinks__weight_decay": 0.0}
    saves = {"iterations": 4, "train__save_interval": 2}
    result = litgpt(*pretrain_arguments(tmp_path / "out", prepared, **SINKS, **own, **saves))
    assert "at 1e-06 times the learning rate, with a weight decay of 0)." in result.stdout
    first, last = (read_weights(tmp_path / "out" / name) for name in ("step-00000002", "final"))
    moved = {}
    for name in [name for name in first if sliced_dimension(name) is not None]:
        change = (last[name] - first[name]).abs().movedim(sliced_dimension(name), 0)
        moved |= {(name, "shared"): float(change[:32].mean()), (name, "sinks"): float(change[32:].mean())}
    assert len(moved) == 2 * 2 * 3
    assert {part for part, change in moved.items() if change < 1e-7} == {part for part in moved if part[1] == "sinks"}
    assert all(change > 1e-4 for part, change in moved.items() if part[1] == "shared")


def test_resume_continues_bit_for_bit(sink_run, prepared, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(sink_run[0] / "step-00000005", out_dir / "step-00000005")
    result = litgpt(*pretrain_arguments(out_dir, prepared, **SINKS, resume="auto"))
    assert "Resuming training from" in result.stdout
    assert logged(out_dir) == logged(sink_run[0])[5:]
    resumed, whole = read_weights(out_dir / "final"), read_weights(sink_run[0] / "final")
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_resume_with_other_sinks_is_refused(sink_run, prepared, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(sink_run[0] / "step-00000005", out_dir / "step-00000005")
    changed = SINKS | {"data__sinks__active_probability": 0.4}
    error = failure(litgpt(*pretrain_arguments(out_dir, prepared, **changed, resume="auto"), check=False))
    assert "sink_active_probability = 0.3, but this run has 0.4" in error


def test_compiled_training_works(prepared, tmp_path):
    settings = SINKS | {"model_config__n_layer": 1}  # a second one takes a fifth longer to compile
    result = litgpt(*pretrain_arguments(tmp_path / "out", prepared, **settings, iterations=3), compiled=True)
    assert pretrain.NO_COMPILER not in result.stdout
    assert len(logged(tmp_path / "out")) == 3


@pytest.mark.long
def test_without_a_compiler_training_falls_back_to_eager(prepared, tmp_path):
    # an empty PATH has no g++, and CXX names none
    hidden = {"PATH": str(tmp_path), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = litgpt(*pretrain_arguments(tmp_path / "out", prepared, **SINKS, iterations=3), compiled=True, **hidden)
    assert pretrain.NO_COMPILER in result.stdout
    assert len(logged(tmp_path / "out")) == 3


def failure(result):
    """The one line with which a command failed."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stdout, result.stdout[-3000:]
    return result.stdout.strip().splitlines()[-1]


BAD_RUNS = {
    "missing data": (
        lambda where: {"data__data_path": where["empty"] / "nothing"},
        "Make it with: litgpt-memsinks prepare",
    ),
    "plain stream": (lambda where: {"data__data_path": where["plain"]}, "it holds a plain or half-written stream"),
    "other tokenizer": (lambda where: {"tokenizer_dir": where["other_tokenizer"]}, "is not the one that made the data"),
    "mixture of experts": (
        lambda where: {"model_config__mlp_class_name": "LLaMAMoE", "model_config__n_expert": 2},
        "mlp_class_name is 'LLaMAMoE'",
    ),
    "token beyond the vocabulary": (
        lambda where: {"model_config__padded_vocab_size": 64, "model_config__vocab_size": 64},
        "the model embeds tokens below 64 only",
    ),
    "no neuron shared": (lambda where: {"data__sinks__shared_fraction": 0.001}, "at least 1 must be shared"),
    "too little data": (lambda where: {"train__micro_batch_size": 4000, "train__global_batch_size": 4000}, "blocks of"),
}


@pytest.mark.parametrize("case", sorted(BAD_RUNS))
def test_bad_run_ends_in_one_clear_line(case, prepared, plain, tmp_path):
    other_tokenizer = tmp_path / "tokenizer"
    shutil.copytree(prepared / "tokenizer", other_tokenizer)
    with open(other_tokenizer / "tokenizer.json", "a", encoding="utf-8") as file:
        file.write("\n")
    settings, message = BAD_RUNS[case]
    where = {"empty": tmp_path, "plain": plain, "other_tokenizer": other_tokenizer}
    arguments = pretrain_arguments(tmp_path / "out", prepared, **settings(where))
    error = failure(litgpt(*arguments, check=False))
    assert error.startswith("Error: ")
    assert message in error
    assert not (tmp_path / "out/final").exists()


@pytest.mark.parametrize("name", ["shared_fraction", "active_probability"])
def test_fractions_out_of_range_are_refused_while_parsing(name, prepared, tmp_path):
    arguments = pretrain_arguments(tmp_path / "out", prepared, **{f"data__sinks__{name}": 1.5})
    result = litgpt(*arguments, check=False)
    assert result.returncode != 0
    assert "Traceback" not in result.stdout
    assert f"sinks.{name} is 1.5, but it must be above 0 and at most 1" in result.stdout


def test_memsinks_model_with_other_data_is_refused_in_one_line(tmp_path):
    """The recipe does not name us, so LitGPT knows the model only because the package is found by itself."""
    arguments = ["--out_dir", tmp_path / "out", "--precision", "32-true", "--logger_name", "csv", "--devices", 1]
    command = ["pretrain", "SmolLM-360M-MemSinks", "--data", "LitData", *arguments]
    result = litgpt(*command, check=False, stderr=subprocess.PIPE, imported=LIBRARIES)
    assert result.returncode != 0
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: 'SmolLM-360M-MemSinks' trains with sinks only on data with sequence IDs, but data")


def test_recipe_without_our_package_name_trains_with_sinks(prepared, tmp_path):
    """Short class name, registered model: neither would be known to a LitGPT that has not imported us."""
    settings = {"model_name": "Tiny-MemSinks", "class_path": "MemSinksData", "iterations": 2}
    result = litgpt(*pretrain_arguments(tmp_path / "out", prepared, **settings), imported=LIBRARIES)
    assert "192 of 384 neurons of each MLP are shared (g = 0.500)" in result.stdout
    assert len(logged(tmp_path / "out")) == 2


@pytest.fixture(scope="module")
def undropped(sink_run, tmp_path_factory):
    """A run with sinks, converted as for inference but not dropped."""
    folder = tmp_path_factory.mktemp("undropped") / "converted"
    litgpt("convert_pretrained_checkpoint", sink_run[0] / "final", folder)
    return folder


def test_stock_initial_checkpoint_refuses_undropped_weights(undropped, plain, tmp_path):
    arguments = pretrain_arguments(tmp_path / "out", plain, "litgpt.data.LitData", initial_checkpoint_dir=undropped)
    result = litgpt(*arguments, check=False)
    assert result.returncode != 0
    assert 'Unexpected key(s) in state_dict: "n_shared"' in result.stdout


def test_continued_pretraining_with_sinks(undropped, stock_run, prepared, tmp_path):
    """Both a checkpoint with the same sinks and plain weights are a start; other sinks are not."""
    plain_weights = tmp_path / "plain"
    litgpt("convert_pretrained_checkpoint", stock_run / "final", plain_weights)
    for number, start in enumerate((undropped, plain_weights)):
        out_dir = tmp_path / f"out{number}"
        litgpt(*pretrain_arguments(out_dir, prepared, **SINKS, iterations=2, initial_checkpoint_dir=start))
        assert len(logged(out_dir)) == 2
    changed = SINKS | {"data__sinks__shared_fraction": 0.25}
    arguments = pretrain_arguments(tmp_path / "out2", prepared, **changed, initial_checkpoint_dir=undropped)
    assert "sink_n_shared = 32, but this run has 16" in failure(litgpt(*arguments, check=False))


def test_generate_fails_on_an_undropped_checkpoint(undropped):
    result = litgpt("generate", undropped, "--prompt", "One day", check=False)
    assert result.returncode != 0
    assert "unexpected keyword argument 'sink_" in result.stdout


def test_dropped_checkpoint_generates_and_converts_with_stock_commands(sink_run, tmp_path):
    dropped = tmp_path / "dropped"
    output = memsinks("drop_sinks", sink_run[0] / "final", dropped).stdout
    assert "Dropped 32 of 64 neurons" in output
    output = litgpt(
        "generate", dropped, "--prompt", "One day", "--max_new_tokens", "5", "--precision", "32-true"
    ).stdout
    assert "One day" in output
    assert "Memory used" in output or "tokens/sec" in output
    litgpt("convert_from_litgpt", dropped, tmp_path / "hf")
    converted = torch.load(tmp_path / "hf/model.pth", weights_only=True)
    assert converted["model.layers.0.mlp.gate_proj.weight"].shape == (32, 32)


@pytest.mark.parametrize("content", [None, "", "name: tiny"])
def test_checkpoint_that_says_nothing_of_sinks_is_a_start_for_any(content, tmp_path, tiny_config):
    if content is not None:
        (tmp_path / "model_config.yaml").write_text(content)
    pretrain.check_same_sinks(MemSinksConfig.from_base(tiny_config, SinkArgs()), tmp_path)


def test_checkpoint_from_before_there_were_methods_is_one_of_memsinks(tmp_path, tiny_config):
    saved = asdict(MemSinksConfig.from_base(tiny_config, SinkArgs(0.5, 1.0)))
    del saved["sink_method"]
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(saved))
    pretrain.check_same_sinks(MemSinksConfig.from_base(tiny_config, SinkArgs(0.5, 1.0)), tmp_path)
    masked = MemSinksConfig.from_base(tiny_config, SinkArgs(0.5, method="mask_exact"))
    with pytest.raises(pretrain.MemSinksError, match="with sink_method = memsinks, but this run has mask_exact"):
        pretrain.check_same_sinks(masked, tmp_path)


def test_litgpt_without_a_name_we_replace_is_refused(monkeypatch):
    monkeypatch.delattr("litgpt.pretrain.chunked_cross_entropy")
    with pytest.raises(pretrain.MemSinksError, match="has no chunked_cross_entropy"):
        pretrain.replacements(None)
