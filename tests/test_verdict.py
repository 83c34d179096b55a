"""A removal that worked passes, and three planted leaks are found. The models are trained here, in seconds."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.data.scored import Scored
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.evaluate.battery import Measured
from litgpt_memsinks.evaluate.evaluate import evaluate
from litgpt_memsinks.evaluate.subject import Subject, ask_files, ask_prepared
from litgpt_memsinks.evaluate.verdict import Thresholds, verdict
from litgpt_memsinks.model.checkpoint import load_model
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
    assert checks["extraction"]["value"] > 0.5
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


# ------------------------------------------------------------------------------------------------- each check by hand


def told(nats):
    return {"nats": [10 * nats, 10 * nats], "counts": [10, 10]}


def made(
    arm, repeated, role=None, validation=2.0, extracted=0.0, members=(2.0, 2.0), falls=0.1, sha256=None, gate=None
):
    """What was measured of a model, for two repeated and two validation documents."""
    repeated = {"dropped": repeated} if isinstance(repeated, float) else repeated
    validation = {"dropped": validation} if isinstance(validation, float) else validation
    losses = {
        "repeated": {state: told(value) for state, value in repeated.items()},
        "validation": {state: told(value) for state, value in validation.items()},
    }
    tokens = {
        split: {"dropped": {"nats": list(nats), "counts": [1, 1], "min_k": [0.0] * 2, "min_k_plus_plus": [0.0] * 2}}
        for split, nats in (("repeated", members), ("validation", (2.0, 2.0)))
    }
    found = {
        "losses": losses,
        "tokens": tokens,
        "extraction": [{"state": "dropped", "prompt": "own", "exact": [extracted, extracted], "rows": [0, 1]}],
        "relearning": {"runs": [{"n": 1, "other": [2.0, 2.0 - falls]}]},
    }
    subject = Subject(arm, role, Path(arm), sha256 or arm, "memsinks", None)
    return Measured(subject, {}, found, gate=gate)


GOOD = {
    "repeated": {"dropped": 2.0, "own": 0.1, "placebo": 2.1, "random_drop": 4.0},
    "validation": {"dropped": 2.0, "random_drop": 3.0},
    "gate": {"own": 0.1, "placebo": 2.1, "pass": True},
}


def checks_of(without=(), thresholds=None, **changes):
    seed = {
        "standard": made("standard", 0.5, "standard", extracted=1.0),
        "left_out": made("left_out", 2.5, "left_out"),
        "ours": made("ours", **{**GOOD, **changes}),
    }
    for arm in without:
        del seed[arm]
    found = verdict(seed, "ours", thresholds or Thresholds())
    return found["pass"], {check["name"]: check for check in found["checks"]}


def test_good_model_passes_every_check():
    passed, checks = checks_of()
    assert passed is True
    assert {check["pass"] for check in checks.values()} == {True}
    assert checks["gap_closed"]["value"] == pytest.approx(0.75)  # (2.0 - .5) / (2.5 - .5)


@pytest.mark.parametrize(
    ("name", "changes", "value"),
    [
        ("gate", {"gate": {"own": 2.1, "placebo": 2.1, "pass": False}}, 0.0),
        ("not_standard", {"sha256": "standard"}, 0.0),
        ("gap_closed", {"repeated": {**GOOD["repeated"], "dropped": 1.4}}, 0.45),
        ("validation_change", {"validation": {"dropped": 2.2, "random_drop": 3.0}}, 0.1),
        ("extraction", {"extracted": 0.5}, 0.5),
        ("membership", {"members": (1.0, 1.0)}, 0.5),
        ("membership", {"members": (3.0, 3.0)}, 0.5),  # made to hate them: told apart as well
        ("relearning", {"falls": 0.25}, 0.15),
        ("random_drop", {"validation": {"dropped": 2.0, "random_drop": 2.02}}, 0.01),
        ("placebo", {"repeated": {**GOOD["repeated"], "placebo": 1.0}}, 1 / 1.9),
    ],
)
def test_each_check_fails_for_its_own_reason(name, changes, value):
    passed, checks = checks_of(**changes)
    assert passed is False
    assert {other for other, check in checks.items() if check["pass"] is False} == {name}
    assert checks[name]["value"] == pytest.approx(value)


def test_what_was_not_measured_fails_nothing():
    passed, checks = checks_of(without=("standard", "left_out"), repeated=2.0, validation=2.0, gate=None)
    assert passed is None
    assert {name for name, check in checks.items() if check["pass"] is not None} == {"extraction"}
    assert all(check["why"].startswith("Not measured") for check in checks.values() if check["pass"] is None)
    passed, checks = checks_of(without=("left_out",))
    assert passed is None  # a part of a verdict is none


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
