"""The demo end to end at a tiny size, through the real `litgpt` script, and what it does with trouble."""

import json
import os
import random
import shutil
import subprocess
import threading

import pytest
from rich.progress import Progress

from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments import demo, training_runs
from tests.console import BOTH, REPOSITORY, zygote
from tests.trained import save, sink_model, train

RECIPES = REPOSITORY / "recipes/demo"
DROPPED = ("memsinks", "memsinks_repeated")


def popen(command, real=subprocess.Popen, **options):
    """One of the five runs is started as ever; the other four have their imports already."""
    if not str(command[0]).endswith("litgpt") or str(RECIPES / "memsinks.yaml") in command:
        return real(command, **options)
    environment = options.pop("env")
    assert options == {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    output, theirs = os.pipe()
    process = zygote(BOTH, None).start(command, environment, out=os.fdopen(theirs, "wb"))
    process.out.close()
    process.stdout = os.fdopen(output)
    return process


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "EMBEDDED_DOCUMENTS", 150)
    monkeypatch.setattr(demo, "REPEATED_DOCUMENTS", 4)
    monkeypatch.setattr(demo, "REPEATS", 5)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these runs
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(subprocess, "Popen", popen)


def test_demo_prints_the_table_and_continues_where_it_was(tiny, tmp_path, capsys):
    demo.demo(out_dir=tmp_path / "demo", recipes=RECIPES)
    first = capsys.readouterr().out
    assert all(arm in first for arm in demo.ARMS)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert [row["arm"] for row in results["comparison"]] == list(demo.ARMS)
    assert results["comparison"][0]["gap_closed"] == [0.0]
    assert results["comparison"][1]["gap_closed"] == [1.0]
    assert results["format"] == 2
    assert results["verdict"]["model"] == demo.JUDGED
    assert [model["role"] for model in results["models"]] == ["standard", "left_out", None, None, None]
    for model in results["models"]:
        assert {"extraction", "membership", "relearning", "calibrated", "quantised"} < set(model["parts"])
        assert bool(model["parts"]["gate"]) == (model["arm"] not in ("standard", "left_out"))
    assert (tmp_path / "demo/report.png").stat().st_size > 10_000
    assert "<!doctype html>" in (tmp_path / "demo/report.html").read_text()
    certificates = [
        json.loads((tmp_path / f"demo/{arm}-seed1/dropped/certificate.json").read_text()) for arm in DROPPED
    ]
    certified = [bool(certificate["losses"]) for certificate in certificates]
    assert certified.count(False) == first.count("has no losses. With their own sinks on, 4 repeated documents have")
    log = (tmp_path / "demo/memsinks-seed1/train.log").read_text()
    assert log.split()[:2] == [training_runs.pretrain_command(*[tmp_path] * 3, 1, 1, 1)[0], "pretrain"]
    finished = (tmp_path / "demo/memsinks-seed1/final/lit_model.pth").stat().st_mtime_ns

    demo.demo(out_dir=tmp_path / "demo", recipes=RECIPES)
    assert "what is finished there is not redone" in capsys.readouterr().out
    assert (tmp_path / "demo/memsinks-seed1/final/lit_model.pth").stat().st_mtime_ns == finished
    assert json.loads((tmp_path / "demo/results.json").read_text())["comparison"] == results["comparison"]

    changed = tmp_path / "recipes"
    shutil.copytree(RECIPES, changed)
    with open(changed / "memsinks.yaml", "a", encoding="utf-8") as file:
        file.write("# edited\n")
    with pytest.raises(MemSinksError, match="its recipes_sha256 differ"):
        demo.demo(out_dir=tmp_path / "demo", recipes=changed)


def test_certificates_of_the_demo_have_losses(prepared, tmp_path, capsys):
    """Of a model that knows the repeated documents by their sinks; of one that does not, the reason is printed."""
    repeated, others = read_scored(prepared, "repeated"), read_scored(prepared, "val")
    save(tmp_path / "memsinks-seed1/final", train(sink_model(), repeated, others, steps=40))
    empty = sink_model()
    for block in empty.transformer.h:
        block.mlp.proj.weight.data[:, empty.config.n_shared :] = 0
    save(tmp_path / "memsinks_repeated-seed1/final", empty)
    demo.drop_all(tmp_path, 1, prepared)
    found = [json.loads((tmp_path / f"{arm}-seed1/dropped/certificate.json").read_text())["losses"] for arm in DROPPED]
    assert found[0]["before"]["removed"]["own"]["loss"] < found[0]["before"]["removed"]["dropped"]["loss"]
    assert found[0]["after"]["removed"]
    assert found[1] is None
    assert "memsinks_repeated-seed1/dropped has no losses. With their own sinks on, 8" in capsys.readouterr().out


def test_mistyped_corpus_claims_no_folder(tmp_path):
    with pytest.raises(MemSinksError, match="There is no file"):
        demo.demo(tmp_path / "mistyped.jsonl", out_dir=tmp_path / "demo", recipes=RECIPES)
    assert not (tmp_path / "demo").exists()


def test_failed_run_shows_the_end_of_its_log(tmp_path):
    with Progress(disable=True) as progress:
        task = progress.add_task("run", total=1)
        command = ["sh", "-c", "echo out of luck; exit 3"]
        with pytest.raises(MemSinksError, match="status 3") as error:
            training_runs.train_run(command, tmp_path / "run", 1, progress, task, threading.Event())
    assert "out of luck" in str(error.value)
    assert "out of luck" in (tmp_path / "run/train.log").read_text()


def corpus(path, number, words=20):
    texts = [f"{index} " + "word " * words for index in range(number)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:5]]))
    return path


def test_sample_cuts_splits_and_drops_copies(tmp_path):
    demo.sample(corpus(tmp_path / "corpus.jsonl", 700, words=1000), tmp_path / "out")
    splits = [
        [json.loads(line)["text"] for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    ]
    assert [len(texts) for texts in splits] == [644, 56]
    assert len({*splits[0], *splits[1]}) == 700
    assert all(len(text) <= demo.OWN_CHARACTERS and text.endswith("word") for text in splits[0])
    demo.sample(tmp_path / "corpus.jsonl", tmp_path / "again")
    assert (tmp_path / "again/train.jsonl").read_bytes() == (tmp_path / "out/train.jsonl").read_bytes()


def test_text_of_spaces_is_passed_over(tmp_path):
    path = corpus(tmp_path / "corpus.jsonl", 600)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": " " * 2000 + "late"}) + "\n")
    demo.sample(path, tmp_path / "out")
    assert "late" not in (tmp_path / "out/train.jsonl").read_text()


def test_small_corpus_is_refused(tmp_path):
    with pytest.raises(MemSinksError, match="has 599 distinct documents, but the demo needs 600"):
        demo.sample(corpus(tmp_path / "corpus.jsonl", 599), tmp_path / "out")


def test_reservoir_is_uniform():
    rng = random.Random(0)
    counts = [0] * 10
    for _ in range(3000):
        for text in demo._reservoir((str(digit) for digit in range(10)), 3, rng):
            counts[int(text)] += 1
    assert all(abs(count - 900) < 4 * (3000 * 0.3 * 0.7) ** 0.5 for count in counts)


@pytest.mark.parametrize(("setting", "message"), [({"seeds": 0}, "seeds is 0"), ({"jobs": 0}, "jobs is 0")])
def test_bad_settings(setting, message, tmp_path):
    with pytest.raises(MemSinksError, match=message):
        demo.demo(out_dir=tmp_path / "demo", recipes=RECIPES, **setting)


def test_missing_recipes_say_what_to_do(tmp_path):
    with pytest.raises(MemSinksError, match="Run the demo in the repository"):
        demo.demo(out_dir=tmp_path / "demo", recipes=tmp_path)
