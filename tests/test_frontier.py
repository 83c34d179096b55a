"""The scan of settings: what it reads, what it refuses, and (long) a whole one beside a tiny demo."""

import hashlib
import json
import subprocess
from dataclasses import replace

import pytest
import yaml

import litgpt_memsinks.experiments.frontier
from litgpt_memsinks.__main__ import main
from litgpt_memsinks.config import SinkArgs
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments import demo
from litgpt_memsinks.experiments.frontier import Found, Setting, add, frontier, over_seeds, read_settings, table, train
from litgpt_memsinks.prepare.manifest import MANIFEST
from tests.console import REPOSITORY

SETTINGS = REPOSITORY / "recipes/frontier/settings.yaml"


def test_the_settings_of_the_project_are_good():
    settings = read_settings(SETTINGS)
    assert len(settings) > 5
    for setting in settings:
        SinkArgs(**setting.sinks).check()
        assert 0 <= setting.id_noise <= 1


def test_settings_are_chosen_by_name(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        yaml.safe_dump([{"name": "a"}, {"name": "b", "sinks": {"seed": 1}}, {"name": "c", "id_noise": 0.5}])
    )
    assert [setting.name for setting in read_settings(path, "c,a")] == ["a", "c"]
    assert read_settings(path)[1].sinks == {"seed": 1}


BAD = {
    "no such file": (None, "", "is no list of settings"),
    "not a list": ("name: a", "", "is no list of settings"),
    "mistyped": ("- {name: a, sink: {}}", "", "unexpected keyword argument 'sink'"),
    "no name": ("- {sinks: {}}", "", "missing 1 required positional argument: 'name'"),
    "twice": ("[{name: a}, {name: a}]", "", "has 'a' more than once"),
    "not there": ("[{name: a}, {name: b}]", "a,d", "has no setting 'd'. It has: a, b."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_in_one_line(case, tmp_path, capsys):
    content, only, problem = BAD[case]
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["frontier", "--settings", str(path), "--only", only, "--out_dir", str(tmp_path / "out")])
    assert problem in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_a_demo_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(MemSinksError, match=r"has no finished run standard of seed 1\. Run .* --seeds 2 first"):
        frontier(tmp_path, SETTINGS, tmp_path / "out", seeds=2)
    with pytest.raises(MemSinksError, match="seeds is 0"):
        frontier(tmp_path, SETTINGS, tmp_path / "out", seeds=0)


def test_table():
    row = Found("a", 2, 3.0, -0.021, 2.5, 0.1, 4.2, 0.876, 0.0, 0.02, 0.713)
    line = "| a | 2 | 3.000 | -2.1% | 2.500 | 0.100 | 4.200 | 87.6% | 0% | 0.020 | 0.71 |"
    assert table([row]).splitlines()[-1] == line
    assert table([]).splitlines()[0].count("|") == table([row]).splitlines()[-1].count("|")
    again = Found("a", 3, 3.2, -0.001, 2.5, 0.1, 4.2, 0.896, 0.0, 0.02, 0.733)
    other = replace(again, name="b")
    line = "| a | 3.100 ± 0.141 | -1.1 ± 1.4% | 2.500 ± 0.000 | 0.100 ± 0.000 | 4.200 ± 0.000 | 88.6 ± 1.4% | 0 ± 0% | "
    lines = over_seeds([row, other, again]).splitlines()
    assert lines[2] == line + "0.020 ± 0.000 | 0.72 ± 0.01 |"
    assert lines[3].startswith("| b | 3.200 ± 0.000 | -0.1 ± 0.0% |")
    assert lines[0].count("|") == lines[2].count("|")


def test_rows_of_earlier_commands_are_kept(tmp_path):
    path = tmp_path / "found.json"
    numbers = (-0.021, 2.5, 0.1, 4.2, 0.876, 0.0, 0.02, 0.713)
    for name, seed, validation in (("a", 1, 3.0), ("a", 2, 3.1), ("b", 1, 3.2), ("a", 1, 3.3)):
        add(path, Found(name, seed, validation, *numbers))
    rows = [(row["name"], row["seed"], row["validation"]) for row in json.loads(path.read_text())]
    assert rows == [("a", 2, 3.1), ("b", 1, 3.2), ("a", 1, 3.3)]
    for other in ("[1]", "{", '[{"name": "a"}]'):
        path.write_text(other)
        with pytest.raises(MemSinksError, match="is no list of rows"):
            add(path, Found("a", 1, 3.0, *numbers))
        assert path.read_text() == other


def test_run_of_other_settings_is_not_taken_for_this_one(tmp_path, prepared):
    recipe = REPOSITORY / "recipes/demo/memsinks.yaml"
    folder = tmp_path / "a-seed1"
    (folder / "final").mkdir(parents=True)
    (folder / "final/model_config.yaml").touch()
    setting, stream = Setting("a", {"shared_fraction": 0.3}), prepared
    note = {"name": "a", "sinks": {"shared_fraction": 0.3}, "id_noise": 0.0, "left_out": False, "block_size": 128}
    note["recipe_sha256"] = hashlib.sha256(recipe.read_bytes()).hexdigest()
    note["stream"] = json.loads((stream / MANIFEST).read_text())["splits"]["train"]["digest"]
    (folder / "setting.json").write_text(json.dumps(note))
    train(setting, stream, tmp_path, recipe, 1, 128)
    for changed, named in (
        (replace(setting, sinks={"shared_fraction": 0.5}), "sinks"),
        (replace(setting, sinks={}, id_noise=0.1), "sinks and id_noise"),
    ):
        with pytest.raises(MemSinksError, match=f"was trained with another {named}. Give the setting another name"):
            train(changed, stream, tmp_path, recipe, 1, 128)
    with pytest.raises(MemSinksError, match="was trained with another block_size"):
        train(setting, stream, tmp_path, recipe, 1, 64)
    (folder / "setting.json").write_text(json.dumps(note | {"stream": "another"}))
    with pytest.raises(MemSinksError, match="was trained with another stream"):
        train(setting, stream, tmp_path, recipe, 1, 128)
    for wrong in ("{", None):
        (folder / "setting.json").write_text(wrong) if wrong else (folder / "setting.json").unlink()
        with pytest.raises(MemSinksError, match=r"has no setting\.json that says what it was trained with"):
            train(setting, stream, tmp_path, recipe, 1, 128)


@pytest.mark.parametrize("corpus", ["embedded", "tinystories"])
def test_committed_table_is_of_the_committed_rows(corpus):
    docs = REPOSITORY / "docs"
    rows = [Found(**row) for row in json.loads((docs / f"frontier/{corpus}.json").read_text())]
    assert sorted({row.seed for row in rows}) == [1, 2, 3]
    written = (docs / "frontier.md").read_text(encoding="utf-8").splitlines()
    assert set(over_seeds(rows).splitlines()) <= set(written)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_settings_are_set_against_the_demos_references(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EMBEDDED_DOCUMENTS", 150)
    for module in (demo, litgpt_memsinks.experiments.frontier):
        monkeypatch.setattr(module, "REPEATED_DOCUMENTS", 4)
        monkeypatch.setattr(module, "REPEATS", 5)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these runs
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    recipes = REPOSITORY / "recipes/demo"
    streams = demo.prepare_streams(None, tmp_path / "demo")
    demo._remember(tmp_path / "demo", demo._settings(None, recipes))
    for arm in ("standard", "left_out"):
        folder = demo.run_dir(tmp_path / "demo", arm, 1)
        command = demo.pretrain_command(recipes / f"{arm}.yaml", streams[demo.ARMS[arm]], folder, 1, 128, 8192)
        subprocess.run(command, check=True, capture_output=True)
    path = tmp_path / "settings.yaml"
    sinks = {"shared_fraction": 0.3, "off_share": 0.1, "layers": [1], "mask": "exact", "sinks_for": "repeated"}
    sinks |= {"attention": "document", "learning_rate": 2.0, "weight_decay": 0.0}
    noise = {"name": "noise", "id_noise": 0.5, "sinks": {"value_shared_fraction": 0.75}}
    without = {"name": "without", "left_out": True, "sinks": {"shared_fraction": 1.0}}
    path.write_text(yaml.safe_dump([{"name": "all", "sinks": sinks}, noise, without]))
    capsys.readouterr()
    frontier(tmp_path / "demo", path, tmp_path / "out", recipes)
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "out/found.json").read_text())
    assert [row["name"] for row in rows] == ["all", "noise", "without"]
    command = (tmp_path / "out/without-seed1/train.log").read_text().splitlines()[0].split()
    assert command[command.index("--data.data_path") + 1] == str(tmp_path / "demo/data/left_out")
    assert all(2 < row["validation"] < 7 and row["extracted"] == 0 for row in rows)
    saved = yaml.safe_load((tmp_path / "out/all-seed1/final/model_config.yaml").read_text())
    assert (saved["sink_n_shared"], saved["sink_off_share"], saved["sink_layers"]) == (115, 0.1, [1])
    assert (saved["sink_mask"], saved["sink_sinks_for"]) == ("exact", "repeated")
    assert saved["sink_attention"] == "document"
    assert (saved["sink_learning_rate"], saved["sink_weight_decay"]) == (2.0, 0.0)
    saved = yaml.safe_load((tmp_path / "out/noise-seed1/final/model_config.yaml").read_text())
    assert saved["sink_shared_values"] == 24
    noisy = json.loads((tmp_path / "out/data/id_noise_0.5" / MANIFEST).read_text())
    assert noisy["recipe"]["id_noise"] == 0.5
    written = (tmp_path / "out/all-seed1/final/lit_model.pth").stat().st_mtime_ns
    frontier(tmp_path / "demo", path, tmp_path / "out", recipes)
    assert capsys.readouterr().out.splitlines()[-4:] == said.splitlines()[-4:]  # `prepare` has said its part before
    assert (tmp_path / "out/all-seed1/final/lit_model.pth").stat().st_mtime_ns == written
