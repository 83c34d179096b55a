"""A removal that worked passes, and three planted leaks are found. The models are trained here, in seconds."""

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.checkpoint import load_model
from litgpt_memsinks.drop_sinks import drop_sinks
from litgpt_memsinks.evaluate import evaluate
from litgpt_memsinks.scored import Scored
from litgpt_memsinks.subject import ask_files, ask_prepared
from litgpt_memsinks.verdict import Thresholds
from tests import trained
from tests.console import REPOSITORY, memsinks

QUICK = {"bootstrap": 50, "relearn_documents": [2], "relearn_steps": 5}


@pytest.fixture(scope="module")
def arms(prepared, corpus_dir, tokenizer_dir, tmp_path_factory):
    """Folders of a standard model, one that never saw the repeated documents, one with sinks, and that one dropped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("arms")
    repeated = ask_prepared(prepared, None).repeated
    train, validation = corpus_dir / "train.jsonl", corpus_dir / "validation.jsonl"
    others = ask_files(validation, train, tokenizer_dir, None).validation
    unseen = set(repeated.digests)
    kept = [index for index, digest in enumerate(others.digests) if digest not in unseen]
    others = Scored([others.tokens[index] for index in kept], others.sequence_ids[kept])
    nothing = Scored([], torch.zeros(0, dtype=torch.int64))
    models = {
        "standard": trained.train(trained.plain_model(), repeated, others),
        "left_out": trained.train(trained.plain_model(), nothing, others),
        "memsinks": trained.train(trained.sink_model(), repeated, others),
    }
    found = {name: trained.save(folder / name, model) for name, model in models.items()}
    found["dropped"] = folder / "dropped"
    drop_sinks(found["memsinks"], found["dropped"])
    relearned = trained.train(load_model(found["dropped"]), repeated, others, steps=60)
    found["relearned"] = trained.save(folder / "relearned", relearned)
    found["wrong_seed"] = folder / "wrong_seed"
    wrong = copy.deepcopy(models["memsinks"])
    wrong.config.sink_seed = 7
    trained.save(found["wrong_seed"], wrong)
    torch.set_num_threads(threads)
    return found


def judged(arms, name, prepared, tmp_path, **settings):
    out_file = tmp_path / "results.json"
    evaluate(arms[name], prepared, arms["standard"], arms["left_out"], out_file, **{**QUICK, **settings})
    content = json.loads(out_file.read_text(), parse_constant=pytest.fail)
    return content, {check["name"]: check for check in content["verdict"]["checks"]}


def test_a_removal_that_worked_passes(arms, prepared, tmp_path, capsys):
    lenient = Thresholds(membership=0.8)  # a model this small remembers in its attention and embeddings, too
    content, checks = judged(arms, "memsinks", prepared, tmp_path, thresholds=lenient)
    assert content["verdict"] == {"pass": True, "model": "evaluated", "checks": list(checks.values())}
    assert {name for name, check in checks.items() if check["pass"] is None} == set()
    assert checks["gap_closed"]["value"] > 0.5
    assert "Every check that could be made holds." in capsys.readouterr().out


def test_wrong_ids_stop_the_evaluation(arms, prepared, tmp_path):
    """Planted: the masks' seed was changed."""
    with pytest.raises(SystemExit, match="does not know the repeated documents better with their own sinks on") as exit:
        main(["evaluate", f"--checkpoint_dir={arms['wrong_seed']}", f"--data_path={prepared}", "--parts=losses"])
    assert "\n" not in str(exit.value)
    content, checks = judged(arms, "wrong_seed", prepared, tmp_path, allow_wrong_map=True, parts="losses")
    assert content["verdict"]["pass"] is False
    assert checks["gate"]["pass"] is False
    assert "seed of the masks" in checks["gate"]["why"]


def test_documents_taught_again_are_found(arms, prepared, tmp_path):
    """Planted: the dropped model was fine-tuned on the repeated documents."""
    content, checks = judged(arms, "relearned", prepared, tmp_path, parts="losses,extraction,membership")
    assert content["verdict"]["pass"] is False
    assert checks["gap_closed"]["pass"] is False
    assert checks["membership"]["pass"] is False
    assert checks["gate"]["pass"] is None


def test_a_standard_model_passed_off_as_dropped_is_found(arms, prepared, tmp_path):
    content, checks = judged(arms, "standard", prepared, tmp_path, parts="losses")
    assert content["verdict"]["pass"] is False
    assert checks["gap_closed"]["value"] == 0.0
    assert checks["not_standard"]["pass"] is False
    assert "file for file" in checks["not_standard"]["why"]


def test_dropped_model_is_judged_alike(arms, prepared, tmp_path):
    """The released folder has the losses that the model with sinks has in the state `dropped`."""
    dropped, _ = judged(arms, "dropped", prepared, tmp_path, parts="losses")
    (tmp_path / "results.json").unlink()
    (tmp_path / "results.documents.jsonl").unlink()
    whole, _ = judged(arms, "memsinks", prepared, tmp_path, parts="losses")
    for split in ("repeated", "validation"):
        losses = [content["models"][-1]["parts"]["losses"][split]["dropped"]["value"] for content in (dropped, whole)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_thresholds_decide(arms, prepared, tmp_path):
    strict = Thresholds(gap_closed=1.5, validation_change=-0.9)
    _, checks = judged(arms, "memsinks", prepared, tmp_path, parts="losses", thresholds=strict)
    assert checks["gap_closed"]["pass"] is False
    assert checks["validation_change"]["pass"] is False
    with pytest.raises(SystemExit, match="does not pass"):
        main(
            [
                *("evaluate", f"--checkpoint_dir={arms['memsinks']}", f"--data_path={prepared}", "--parts=losses"),
                *(f"--standard={arms['standard']}", f"--left_out={arms['left_out']}", "--bootstrap=10"),
                *("--thresholds.gap_closed=1.5", "--require_pass=true"),
            ]
        )


def test_without_references_there_is_no_verdict(arms, prepared, capsys):
    evaluate(arms["memsinks"], prepared, parts="losses", bootstrap=0)
    assert "No verdict: give --standard and --left_out" in capsys.readouterr().out


@pytest.mark.long
def test_killed_evaluation_goes_on(arms, prepared, tmp_path):
    """`kill -9` of the real command as soon as a part is finished; the second run does not redo it."""
    expected, again = tmp_path / "expected.json", tmp_path / "again.json"
    command = [sys.executable, "-m", "litgpt_memsinks", "evaluate", f"--data_path={prepared}"]
    command += [f"--checkpoint_dir={arms['memsinks']}", f"--standard={arms['standard']}", "--bootstrap=20"]
    memsinks(*command[3:], f"--out_file={expected}")
    kept = tmp_path / ".again.json.parts"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([*command, f"--out_file={again}"], env=environment, stdout=subprocess.DEVNULL) as process:
        while not list(kept.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not again.exists()
    finished = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    memsinks(*command[3:], f"--out_file={again}", "--parts=losses")  # of fewer parts: those kept are read
    assert finished
    assert not kept.exists()
    found = [json.loads(path.read_text())["models"] for path in (expected, again)]
    for whole, part in zip(*found, strict=True):
        assert part["parts"]["losses"] == whole["parts"]["losses"]
