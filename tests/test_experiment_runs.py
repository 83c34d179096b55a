"""Experiments end to end at a tiny size: kill -9, failed arms, runs that are shared, and the paper's scale in small."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.progress import Progress

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments import experiment
from litgpt_memsinks.experiments import found as experiment_found
from litgpt_memsinks.experiments import scales as experiment_scales
from litgpt_memsinks.experiments.declared import EXPERIMENTS, LEFT_OUT_ARM, MEMSINKS, STANDARD, Arm, Check, Experiment
from litgpt_memsinks.experiments.experiment import open_workplace, run_experiment
from litgpt_memsinks.experiments.grids import GRIDS, grid
from litgpt_memsinks.experiments.measures import read_readings
from litgpt_memsinks.experiments.runs import Workplace
from litgpt_memsinks.experiments.scales import EMBEDDED, GPU, Texts, make_edited
from litgpt_memsinks.experiments.training_runs import train_run
from litgpt_memsinks.files import write_text
from tests.console import BOTH, REPOSITORY, zygote
from tests.helpers import read_written

RECIPES = REPOSITORY / "recipes"
QUICK = (("train.log_interval", "1"), ("eval.max_iters", "1"), ("data.watch.documents", "2"),
         ("data.watch.validation_documents", "2"))  # fmt: skip
WIDE = (*EMBEDDED.sizes["large"], ("model_config.intermediate_size", "48"))
NARROW = tuple((name, value.replace("256", "16")) for name, value in WIDE)
TINY = replace(
    EMBEDDED,
    once=40,
    repeated=3,
    repeats=4,
    documents=60,
    block_size=64,
    settings=(*NARROW, *QUICK),
    sizes={"small": (("model_config.n_embd", "8"),)},
)
SMALL = Arm("small", "standard", STANDARD.stream, size="small", standard="small")
FAILING = Arm("failing", "memsinks", STANDARD.stream, (("data.sinks.active_probability", "7"),))
LOST = Arm("lost", "no_such_recipe", STANDARD.stream)
TRIED = Experiment(
    name="fig4",
    where="Figure 4",
    statement="",
    comment="",
    arms=(STANDARD, LEFT_OUT_ARM, FAILING, LOST),
    checks=(
        Check("holds", "repeated", "left_out", "above", 0.0),
        Check("no arm", "repeated", "failing", "above", 0.0),
    ),
)


def popen(command, real=subprocess.Popen, **options):
    """`litgpt` in a process that has its imports already."""
    if not str(command[0]).endswith("litgpt"):
        return real(command, **options)
    ours, theirs = os.pipe()
    process = zygote(BOTH, None).start(command, options["env"], out=os.fdopen(theirs, "wb"))
    process.out.close()
    process.stdout = os.fdopen(ours)
    return process


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", TINY)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these runs
    monkeypatch.setattr(subprocess, "Popen", popen)
    zygote(BOTH, None)  # before a fork, which must not have one of its own


def run(experiment, out_dir):
    return run_experiment(experiment, open_workplace("cpu", None, out_dir, RECIPES), 1, 1, "cpu")


def weights(out_dir):
    return {path.parts[-4]: path.stat().st_mtime_ns for path in out_dir.glob("*/runs/*/seed1/final/lit_model.pth")}


def test_killed_experiment_goes_on_and_failed_arms_leave_the_others(tiny, tmp_path, capsys):
    process = multiprocessing.get_context("fork").Process(target=run, args=(TRIED, tmp_path))
    process.start()
    logs = tmp_path / "cpu-embedded/runs"
    while not any(log.read_text().count("\n") > 1 for log in logs.glob("left_out*/seed1/train.log")):  # the second arm
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = weights(tmp_path)
    assert any(name.startswith("standard-stream-") for name in before)
    assert not (tmp_path / "cpu-embedded/fig4").exists()

    failed = run(TRIED, tmp_path)
    after = weights(tmp_path)
    assert before.items() <= after.items()
    assert sorted(name.split("-")[0] for name in after) == ["left_out", "standard"]
    assert len(failed) == 2
    assert "\n" not in "".join(failed)
    assert "fig4: lost: There is no recipe" in failed[0]
    assert "fig4: failing seed 1: it ended with status 1: " in failed[1]
    assert "active_probability is 7" in failed[1]

    folder = tmp_path / "cpu-embedded/fig4"
    result = json.loads((folder / "experiment.json").read_text())
    assert [check["outcome"] for check in result["checks"]] == ["holds", "not measured"]
    assert result["verdict"] == "not measured"
    arms = {row["arm"]: row for row in json.loads((folder / "results.json").read_text())["comparison"]}
    assert list(arms) == ["standard", "left_out"]
    for name, row in arms.items():  # two ways to the same numbers
        assert result["values"]["repeated"][name]["per_seed"] == pytest.approx(row["repeated"])
        assert result["values"]["validation"][name]["per_seed"] == pytest.approx(row["validation"])
    assert result["arms"][0]["minutes"][0] > 0
    assert (folder / "fig4.svg").is_file()
    assert (folder / "fig4.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("Numbers:") == 1


@pytest.mark.long  # six runs
def test_experiments_share_runs_whatever_they_call_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_found, "RATIOS", (0.0, 0.1, 0.5))  # there are 48 neurons
    found = EXPERIMENTS["fig4"].localised
    one = replace(TRIED, arms=(STANDARD, LEFT_OUT_ARM, MEMSINKS, SMALL), checks=(), localised=found,
                  pictures=("frontier",))  # fmt: skip
    assert run(one, tmp_path) == []
    result = json.loads((tmp_path / "cpu-embedded/fig4/experiment.json").read_text())
    assert result["notes"] == []
    (frontiers,) = result["frontiers"]
    assert set(frontiers) == {"price", "hard_concrete", "integrated_gradients"}
    assert frontiers["hard_concrete"][0] == [0.0, 0.0]  # nothing dropped
    assert len(frontiers["hard_concrete"]) == 3
    before = weights(tmp_path)
    assert len(before) == 4
    other = replace(MEMSINKS, name="again", settings=(("data.sinks.active_probability", "0.9"),))
    shared = Experiment("fig5a", "Figure 5a", "", "", (replace(MEMSINKS, name="the_same"), other), asked="the_same")
    assert run(shared, tmp_path) == []
    after = weights(tmp_path)
    assert before.items() <= after.items()
    assert len(after) == 5
    result = json.loads((tmp_path / "cpu-embedded/fig5a/experiment.json").read_text())
    assert result["arms"][0]["folders"][0].split("/")[-2] in before
    assert result["values"]["repeated"]["again"]["mean"] != result["values"]["repeated"]["the_same"]["mean"]


def test_other_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", TINY)
    open_workplace("cpu", None, tmp_path, RECIPES)
    open_workplace("cpu", None, tmp_path, RECIPES)
    monkeypatch.setattr(experiment_scales, "EMBEDDED", replace(TINY, once=41))
    with pytest.raises(MemSinksError, match="holds experiments on other texts: their once differ"):
        open_workplace("cpu", None, tmp_path, RECIPES)


def test_changed_recipe_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", TINY)
    workplace = open_workplace("cpu", None, tmp_path / "one", RECIPES)
    workplace.stream(STANDARD)
    changed = tmp_path / "recipes/demo"
    changed.mkdir(parents=True)
    for line in ("", "# edited\n"):
        (changed / "standard.yaml").write_text((RECIPES / "demo/standard.yaml").read_text() + line)
        folder = replace(workplace, recipes=changed.parent).planned(STANDARD, 1).run.out_dir
        assert (folder == workplace.planned(STANDARD, 1).run.out_dir) == (not line)


def test_small_corpus_is_refused(tmp_path):
    corpus = tmp_path / "few.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{index} words"}) + "\n" for index in range(700)))
    with pytest.raises(MemSinksError, match="has 644 distinct documents to train on, but the experiments take 3,032"):
        open_workplace("cpu", corpus, tmp_path / "out", RECIPES)


def test_small_corpus_may_grow_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_scales, "OWN", replace(TINY, name="cpu", documents=700))
    corpus = tmp_path / "mine.jsonl"
    for number in (20, 900):
        corpus.write_text("".join(json.dumps({"text": f"{index} words"}) + "\n" for index in range(number)))
        with nullcontext() if number > 100 else pytest.raises(MemSinksError):
            open_workplace("cpu", corpus, tmp_path / "out", RECIPES)
    corpus.write_text(corpus.read_text() * 2)
    with pytest.raises(MemSinksError, match="holds experiments on other texts: their corpus_sha256 differ"):
        open_workplace("cpu", corpus, tmp_path / "out", RECIPES)


def test_unfinished_stream_may_get_other_settings_and_a_finished_one_not(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", replace(TINY, repeated=100))  # of 60 documents
    workplace = open_workplace("cpu", None, tmp_path, RECIPES)
    with pytest.raises(MemSinksError, match="100"):
        workplace.stream(STANDARD)
    replace(workplace, scale=TINY).stream(STANDARD)
    with pytest.raises(MemSinksError, match="was prepared with other settings"):
        workplace.stream(STANDARD)


def test_stream_that_cannot_be_prepared_fails_its_arms_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", TINY)
    asked = Arm("asked", "standard", replace(STANDARD.stream, name="asked", id_noise=7.0))
    one = replace(TRIED, arms=(asked,), asked="asked", checks=TRIED.checks[1:])
    (failed,) = run(one, tmp_path)
    assert "fig4: asked: " in failed
    assert "id_noise" in failed
    assert json.loads((tmp_path / "cpu-embedded/fig4/experiment.json").read_text())["verdict"] == "not measured"


def test_two_commands_train_a_run_once(tmp_path):
    """The second waits for the first, and finds the run finished."""
    folder = tmp_path / "runs/seed1"
    folder.mkdir(parents=True)
    with Progress(disable=True) as progress, ThreadPoolExecutor(1) as pool:
        task = progress.add_task("run", total=3, loss="waiting")
        with open(folder.with_name(".seed1.lock"), "w") as lock:  # as the first has it
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "half").touch()
            second = pool.submit(train_run, ["false"], folder, 1, progress, task, threading.Event())
            while progress.tasks[0].fields["loss"] != "another command trains it":
                assert not second.done()
                time.sleep(0.01)
            assert (folder / "half").exists()
            (folder / "final").mkdir()
            (folder / "final/model_config.yaml").touch()
        second.result(30)
    assert progress.tasks[0].fields["loss"] == "done before"
    assert (folder / "half").exists()


def test_corpus_that_was_being_sampled_when_killed_may_be_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_scales, "OWN", replace(TINY, name="cpu", documents=700))
    (tmp_path / "out/cpu-mine").mkdir(parents=True)
    (tmp_path / "out/cpu-mine/workplace.json").write_text('{"corpus_sha256": "that of the small one"}')
    corpus = tmp_path / "mine.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{index} words"}) + "\n" for index in range(900)))
    workplace = open_workplace("cpu", corpus, tmp_path / "out", RECIPES)
    assert (
        json.loads((tmp_path / "out/cpu-mine/workplace.json").read_text())["corpus_sha256"] == workplace.corpus_sha256
    )


def test_texts_are_made_by_one_command_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", TINY)
    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_TRIES", 0.1)
    (tmp_path / "cpu-embedded").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with open(tmp_path / "cpu-embedded/.lock", "w") as lock:  # as the first has it
            fcntl.flock(lock, fcntl.LOCK_EX)
            second = pool.submit(open_workplace, "cpu", None, tmp_path, RECIPES)
            time.sleep(0.3)
            assert [path.name for path in (tmp_path / "cpu-embedded").iterdir()] == [".lock"]
        assert Path(second.result(30).texts.train).is_file()
    assert "Waiting for another command" in capsys.readouterr().out


def test_edited_copies_are_named_by_what_decides_them(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_scales, "EMBEDDED", TINY)
    exact = open_workplace("cpu", None, tmp_path, RECIPES).stream(STANDARD)
    paths = [
        make_edited(exact, share, copies, tmp_path) for share, copies in ((0.05, 3), (0.05, 3), (0.1, 3), (0.05, 2))
    ]
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3
    assert [len(set(path.read_text().splitlines())) for path in paths] == [9, 9, 9, 6]  # 3 documents
    assert paths[0].read_text() != paths[2].read_text()


def test_wait_for_another_command_can_be_stopped(tmp_path):
    stop = threading.Event()
    with (
        open(tmp_path / ".seed1.lock", "w") as lock,
        Progress(disable=True) as progress,
        ThreadPoolExecutor(1) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        task = progress.add_task("run", total=3, loss="waiting")
        waiting = pool.submit(train_run, ["false"], tmp_path / "seed1", 1, progress, task, stop)
        while progress.tasks[0].fields["loss"] != "another command trains it":
            assert not waiting.done()
            time.sleep(0.01)
        stop.set()
        waiting.result(30)
    assert not (tmp_path / "seed1").exists()


@pytest.mark.long  # the scale's large runs are tested below
def test_papers_scale_takes_its_first_steps(tiny, corpus_dir, tokenizer_dir, tmp_path):
    """The same code and the same flags; only sizes, and what needs a GPU to be fast, are smaller."""
    scale = replace(
        GPU,
        **{"once": 40, "repeated": 3, "repeats": 3, "documents": 60, "block_size": 64, "validation_documents": 20},
        settings=(*GPU.settings, *NARROW, *QUICK, ("data.num_workers", "0"), ("precision", "32-true")),
    )
    texts = Texts(*(str(corpus_dir / f"{name}.jsonl") for name in ("train", "validation", "train", "validation")),
                  str(corpus_dir / "train.jsonl"), tokenizer_dir)  # fmt: skip
    workplace = Workplace(scale, texts, tmp_path, RECIPES, "")
    one = replace(EXPERIMENTS["fig2c"], arms=(MEMSINKS,), checks=(), asked="memsinks")
    assert run_experiment(one, workplace, 1, 1, "cpu") == []
    result = json.loads((tmp_path / "fig2c/experiment.json").read_text())
    assert result["scale"] == "gpu"
    changes = {arm["name"]: " ".join(arm["changes"]) for arm in result["arms"]}
    assert all("--model_config.n_embd 1024" in one and "--precision bf16-mixed" in one for one in changes.values())
    assert "--data.sinks.shared_fraction 0.7" in changes["memsinks"]
    recipe = yaml.safe_load((RECIPES / "demo/standard.yaml").read_text())
    assert not any("shared_fraction" in name for name, _ in workplace.changes(STANDARD, recipe))
    assert result["values"]["validation"]["memsinks"]["mean"] > 0
    used = yaml.safe_load(next(tmp_path.glob("runs/memsinks-*/seed1/final/hyperparameters.yaml")).read_text())
    assert used["optimizer"]["init_args"]["lr"] == 6e-4  # which a flag after --config would not change
    assert used["train"]["min_lr"] == 6e-4
    (reading,) = read_readings(next(tmp_path.glob("runs/memsinks-*/seed1")))
    assert reading.own > 0


def test_large_run_takes_its_first_steps(tiny, corpus_dir, tokenizer_dir, tmp_path, monkeypatch):
    """Figure 6a from its recipes for training and data, with other sizes and texts in them."""
    recipe = yaml.safe_load((RECIPES / "smollm360_memsinks.yaml").read_text())
    sizes = {name.removeprefix("model_config."): yaml.safe_load(value) for name, value in NARROW}
    recipe |= {"model_name": "Tiny-MemSinks", "model_config": sizes, "precision": "32-true"}
    recipe["data"]["init_args"] |= {"num_workers": 0, "watch": {"documents": 2, "validation_documents": 2}}
    recipe["train"] |= {"global_batch_size": 8, "max_seq_length": 64, "max_tokens": 8 * 64 * 3, "tie_embeddings": False}
    recipe["eval"] |= {"interval": 2, "max_iters": 1}
    data = yaml.safe_load((RECIPES / "data/smollm360_slimpajama_tinystories.yaml").read_text())
    data["sources"]["tinystories_train"] |= {"path": str(corpus_dir / "validation.jsonl"), "documents": 3}
    data["sources"]["slimpajama_train"] |= {"path": str(corpus_dir / "train.jsonl"), "fill_to": 6000}
    for source in data["validation"].values():
        source |= {"path": str(corpus_dir / "validation.jsonl"), "documents": 4}
    write_text(tmp_path / "recipes/smollm360_memsinks.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write_text(tmp_path / "recipes/data/smollm360_slimpajama_tinystories.yaml", yaml.safe_dump(data, sort_keys=False))
    (tmp_path / "checkpoints/HuggingFaceTB").mkdir(parents=True)
    (tmp_path / "checkpoints/HuggingFaceTB/SmolLM-360M").symlink_to(tokenizer_dir)
    monkeypatch.chdir(tmp_path)
    workplace = Workplace(GPU, Texts("", "", "", "", "", tmp_path), tmp_path / "gpu", tmp_path / "recipes", "")
    (arm,) = (arm for arm in EXPERIMENTS["fig6a"].arms if arm.name == "memsinks")
    one = replace(EXPERIMENTS["fig6a"], arms=(arm,), checks=(), asked="memsinks", asked_of=())
    assert run_experiment(one, workplace, 1, 1, "cpu") == []
    result = json.loads((tmp_path / "gpu/fig6a/experiment.json").read_text())
    assert result["arms"][0]["changes"] == []
    assert 0 < result["values"]["repeated"]["memsinks"]["mean"] < 8
    used = yaml.safe_load(next(tmp_path.glob("gpu/runs/*/seed1/final/hyperparameters.yaml")).read_text())
    assert [used["train"][name] for name in ("max_tokens", "max_seq_length", "min_lr")] == [8 * 64 * 3, 64, 5e-4]
    assert used["data"]["init_args"]["sinks"]["shared_fraction"] == 0.7
    planned = workplace.planned(arm, 1)
    assert planned.run.iterations == 3
    assert planned.block_size == 64


def test_large_runs_are_the_papers_recipes_as_they_are(tmp_path):
    workplace = Workplace(GPU, Texts("", "", "", "", "", tmp_path), tmp_path, RECIPES, "")
    for one in (EXPERIMENTS["fig6a"], EXPERIMENTS["fig6b"]):
        for arm in one.arms:
            assert workplace.recipe(arm) == RECIPES / f"{arm.paper_recipe}.yaml"
            assert workplace.changes(arm, {}) == []
    for arm in GRIDS["table6a"].arms:
        assert workplace.recipe(arm) == RECIPES / "smollm360_memsinks.yaml"
        assert [name for name, _ in workplace.changes(arm, {})] == [
            "data.sinks.shared_fraction", "data.sinks.active_probability"
        ]  # fmt: skip


@pytest.mark.long  # what selects, and what a flag of the optimizer does, is tested without it
def test_grid_trains_what_it_names_and_selects(tiny, tmp_path, capsys):
    arms = grid(Arm("", "memsinks", STANDARD.stream), ("lr", (6e-3, 6e-5), ("optimizer.init_args.lr", "train.min_lr")),
                ("g", (0.25,), ("data.sinks.shared_fraction",)))  # fmt: skip
    one = replace(GRIDS["table3"], arms=arms, asked=arms[0].name)
    assert run(one, tmp_path) == []
    result = json.loads((tmp_path / "cpu-embedded/table3/experiment.json").read_text())
    losses = {name: numbers["mean"] for name, numbers in result["values"]["validation"].items()}
    assert list(losses) == ["lr=0.006 g=0.25", "lr=6e-05 g=0.25"]
    assert losses["lr=0.006 g=0.25"] < losses["lr=6e-05 g=0.25"]  # which hardly learns
    assert result["selected"] == {"by": "validation", "arm": "lr=0.006 g=0.25", "arms": 2,
                                  "of": 2, "value": losses["lr=0.006 g=0.25"]}  # fmt: skip
    assert result["verdict"] == "selected"
    assert "table3: lowest validation loss of 2: lr=0.006 g=0.25, " in capsys.readouterr().out
    assert (tmp_path / "cpu-embedded/table3/table3.svg").is_file()
    used = [yaml.safe_load((Path(one["folders"][0]) / "final/hyperparameters.yaml").read_text())
            for one in result["arms"]]  # fmt: skip
    assert [(one["optimizer"]["init_args"]["lr"], one["train"]["min_lr"]) for one in used] == [(6e-3,) * 2, (6e-5,) * 2]
    assert [one["data"]["init_args"]["sinks"]["shared_fraction"] for one in used] == [0.25, 0.25]


def test_every_stream_is_what_it_is_called(tmp_path, monkeypatch):
    sizes = replace(TINY, once=20, repeats=3, rare=2, rare_repeats=3, documents=40, canary_tokens=32)
    monkeypatch.setattr(experiment_scales, "EMBEDDED", sizes)
    workplace = open_workplace("cpu", None, tmp_path, RECIPES)
    streams = {arm.stream.name: arm for one in EXPERIMENTS.values() for arm in one.arms}
    written = {name: read_written(workplace.stream(arm) / "train", eos=0) for name, arm in streams.items()}
    times = {name: Counter(document.tokens for document in documents) for name, documents in written.items()}
    of = {name: Counter(found.values()) for name, found in times.items()}
    noises = ["id_noise_0.05", "id_noise_0.1", "id_noise_0.25", "id_noise_0.5", "id_noise_1"]
    for name in ("stream", "canary", *noises):
        assert of[name] == {3: 3, 1: 20}
    assert of["left_out"] == {1: 20}
    assert times["left_out"].keys() < times["stream"].keys()
    assert of["single"] == {2: 1, 1: 39}

    def repeated(name):
        return {tokens for tokens, number in times[name].items() if number > 1}

    stories = {tokens[:-1] for tokens in repeated("stream")}  # without the end of the text
    assert {tokens[:-33] for tokens in repeated("canary")} == stories
    for name, ids in (("edited", 9), ("edited_clusters", 3)):  # three documents, and two edited copies of each
        there = [document for document in written[name] if document.tokens not in times["left_out"]]
        assert of[name] == {1: 20 + 3 + 3 * 2}
        assert repeated("stream") <= times[name].keys()
        assert len({document.sequence_id for document in there}) == ids
    ids = {document.sequence_id for document in written["id_noise_1"] if document.tokens in repeated("stream")}
    assert len(ids) == 9
    assert {of[name][repeats] for name, repeats in (("rare_base", 3), ("rare_twice", 6))} == {2}
    assert repeated("rare_base") == repeated("rare_twice") < times["rare_once"].keys()
    lengths = [sum(len(document.tokens) for document in written[name]) for name in streams if name.startswith("rare")]
    assert max(lengths) - min(lengths) < 200  # to a document
