"""Each baseline's recipe through the real `litgpt pretrain`, then dropped where it has sinks, and evaluated."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.model.checkpoint import read_config, read_weights
from tests.console import REPOSITORY, litgpt, logged, memsinks

RECIPES = REPOSITORY / "recipes" / "demo"
SHORT = {
    "train.max_seq_length": 32,
    "train.max_tokens": 3 * 8 * 32,
    "train.lr_warmup_steps": 1,
    "train.log_interval": 1,
    "eval.max_iters": 2,
    "eval.initial_validation": "true",
}
WITH_SINKS = ("mask_exact", "mask_cloud", "mask_sgtm", "memsinks_goldfish")
PLAIN = ("dropped_width", "goldfish")
SAID = {
    "mask_exact": "Gradient masking (mask_exact): repeated documents train 192 of 384 neurons of each MLP, all others",
    "mask_cloud": "Gradient masking (mask_cloud): repeated documents train 192 of 384 neurons of each MLP, all others",
    "mask_sgtm": "Gradient masking (mask_sgtm): repeated documents train 192 of 384 neurons of each MLP, all others",
    "goldfish": "Goldfish loss: one in 4 targets is left out of the training loss, by the 13 tokens before",
    "memsinks_goldfish": "Goldfish loss: one in 4 targets is left out of the training loss",
    "dropped_width": "MemSinks: no sinks (shared_fraction 1.0), all 192 neurons of each MLP are shared.",
}


def train(name, prepared, out_dir, compiled=False, **settings):
    """Three steps by a recipe; its output."""
    values = {"data.data_path": prepared, "out_dir": out_dir, **SHORT, **settings}
    arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return litgpt("pretrain", "--config", RECIPES / f"{name}.yaml", *arguments, compiled=compiled).stdout


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Folder of the runs, and what each printed."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {name: train(name, prepared, folder / name) for name in ("standard", *WITH_SINKS, *PLAIN)}


@pytest.mark.parametrize("name", [*WITH_SINKS, *PLAIN])
def test_recipe_trains(runs, name):
    folder, said = runs
    assert SAID[name] in said[name]
    assert len(logged(folder / name)) == 3
    losses = {tuple(logged(folder / other)) for other in said}
    assert len(losses) == len(said)  # each trains another model


def test_goldfish_changes_the_loss_and_not_the_validation_of_the_same_weights(runs):
    """Before the first step all plain models of one seed are the same."""
    _, said = runs
    before = {name: re.findall(r"iter 1 step 1 .* loss train: ([\d.]+), val: ([\d.]+)", said[name]) for name in said}
    ((standard, validation),), ((goldfish, also),) = before["standard"], before["goldfish"]
    assert also == validation
    assert goldfish != standard


def test_dropped_width_is_what_is_left_of_the_model_with_sinks(runs):
    folder, _ = runs
    narrow, whole = (read_config(folder / name / "final") for name in ("dropped_width", "memsinks_goldfish"))
    assert isinstance(whole, MemSinksConfig)
    assert isinstance(narrow, MemSinksConfig)
    assert narrow.n_sink == 0
    assert narrow.to_base() == whole.to_base()


@pytest.fixture(scope="module")
def dropped(runs):
    folder, _ = runs
    for name in WITH_SINKS:
        main(["drop_sinks", str(folder / name / "final"), str(folder / name / "dropped")])
    return folder


@pytest.mark.parametrize("name", WITH_SINKS)
def test_dropping_leaves_the_plain_model_of_the_shared_neurons(dropped, name):
    config = yaml.safe_load((dropped / name / "dropped" / "model_config.yaml").read_text(encoding="utf-8"))
    assert config["intermediate_size"] == 192
    assert not [key for key in config if key.startswith("sink_")]
    whole, left = (read_weights(dropped / name / part) for part in ("final", "dropped"))
    weight = "transformer.h.1.mlp.proj.weight"
    assert torch.equal(left[weight], whole[weight][:, :192])


def test_all_are_evaluated_and_only_memsinks_has_sinks_of_single_documents(dropped, prepared, tmp_path):
    out_file = tmp_path / "results.json"
    models = {name: dropped / name / "final" for name in (*WITH_SINKS, *PLAIN)}
    models |= {f"{name}_dropped": dropped / name / "dropped" for name in WITH_SINKS}
    command = ["evaluate", "--checkpoint_dir", dropped / "standard/final", "--data_path", prepared]
    command += ["--block_size", 64, "--parts", "losses", "--limit", 4, "--bootstrap", 0, "--out_file", out_file]
    command += [part for name, folder in models.items() for part in ("--models+", f"{name}={folder}")]
    memsinks(*command, "--allow_wrong_map", "true")  # of the one with sinks of single documents, after three steps
    found = {model["arm"]: model["parts"] for model in json.loads(out_file.read_text(encoding="utf-8"))["models"]}
    assert set(models) < set(found)
    for name in WITH_SINKS:
        masked = name.startswith("mask_")
        repeated, validation = (found[name]["losses"][split] for split in ("repeated", "validation"))
        released = found[f"{name}_dropped"]["losses"]["repeated"]["dropped"]["value"]
        assert repeated["dropped"]["value"] == pytest.approx(released, abs=1e-5)
        assert repeated["own"]["value"] != repeated["dropped"]["value"]
        assert (found[name]["gate"] is None) == masked
        assert (repeated["own"]["value"] == repeated["placebo"]["value"]) == masked
        assert ("own" in validation) == masked


def test_losses_certify_no_data_where_documents_have_no_sinks_of_their_own(runs, prepared, tmp_path):
    folder, _ = runs
    command = ["drop_sinks", folder / "mask_sgtm/final", tmp_path / "out", "--data_path", prepared]
    with pytest.raises(
        SystemExit, match=r"by gradient masking \(mask_sgtm\): no document has sinks of its own"
    ) as ended:
        main([str(part) for part in command])
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", [*WITH_SINKS, "goldfish"])
def test_recipe_trains_compiled(runs, prepared, tmp_path, name):
    """With the same losses, to rounding."""
    folder, _ = runs
    train(name, prepared, tmp_path / "out", compiled=True)
    expected, found = (list(map(float, logged(where))) for where in (folder / name, tmp_path / "out"))
    assert found == pytest.approx(expected, rel=1e-4)
