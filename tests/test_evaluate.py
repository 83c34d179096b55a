"""Losses against a plain loop over stock LitGPT, the states of the sinks, and what is written and printed."""

import hashlib
import json
import math
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import save_config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.data.scored import Scored, pad, read_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate import battery
from litgpt_memsinks.evaluate.battery import Measured
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.evaluate import computing_with, deviation, evaluate, placebo_ids, score
from litgpt_memsinks.evaluate.results import compare, comparison, strict
from litgpt_memsinks.evaluate.subject import Subject, ask_prepared
from litgpt_memsinks.metrics import IGNORED
from litgpt_memsinks.model import losses
from litgpt_memsinks.model.losses import batched, document_nats, in_state, shuffled_ids
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.report.report import report, validation_curve
from tests.console import TINY_MODEL


def documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 512, (length,), generator=generator) for length in lengths]
    return Scored(tokens, torch.tensor([-(2**31) + 17 + index for index in range(len(lengths))]))


def plain_model():
    torch.manual_seed(0)
    return BaseGPT(Config(**TINY_MODEL)).eval()


def sink_model(**sinks):
    torch.manual_seed(0)
    return GPT(MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(0.5, 0.5, **sinks))).eval()


@torch.no_grad()
def reference(model, scored, block_size, ids=None):
    """Sum and number of negative log-likelihoods of each document, one document and one token at a time."""
    sums = []
    for index, document in enumerate(scored.tokens):
        row = document[: block_size + 1]
        on = {} if ids is None else {"sequence_ids": ids[index : index + 1]}
        logits = model(row[None, :-1], **on)[0] if len(row) > 1 else torch.zeros(0, 512)
        terms = [-F.log_softmax(logits[t], -1)[row[t + 1]].item() for t in range(len(row) - 1)]
        sums.append((sum(terms), len(terms)))
    return sums


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_score_equals_one_document_at_a_time(batch_size):
    model, scored = plain_model(), documents(5, 90, 2, 33, 1)
    expected = reference(model, scored, 40)
    loss = score(model, scored, 40, batch_size=batch_size)
    assert loss.targets == sum(count for _, count in expected) == 4 + 40 + 1 + 32
    assert loss.loss == pytest.approx(sum(total for total, _ in expected) / loss.targets, abs=1e-5)
    ids = scored.sequence_ids.tolist()
    means = {str(ids[i]): total / count for i, (total, count) in enumerate(expected) if count}
    assert loss.by_document == pytest.approx(means, abs=1e-5)
    assert str(ids[4]) not in loss.by_document  # a single token predicts nothing


def test_states_switch_the_documents_own_sinks_on():
    model, scored = sink_model(), documents(20, 30)
    for ids in (scored.sequence_ids, placebo_ids(scored.sequence_ids)):
        expected = reference(model, scored, 64, ids)
        loss = score(model, scored, 64, ids)
        assert loss.loss == pytest.approx(sum(total for total, _ in expected) / loss.targets, abs=1e-5)
    losses = [
        score(model, scored, 64, ids).loss for ids in (None, scored.sequence_ids, placebo_ids(scored.sequence_ids))
    ]
    assert len(set(losses)) == 3


def test_threads_are_those_asked_for_and_given_back():
    before = torch.get_num_threads()
    with computing_with(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with computing_with(None):
        assert torch.get_num_threads() == before


def test_placebo_is_another_documents():
    ids = torch.tensor([-5, -6, -7])
    assert placebo_ids(ids).tolist() == [-7, -5, -6]
    single = placebo_ids(ids[:1])
    assert single.tolist() != [-5]
    assert single.item() < 0  # still a repeated one, which has sinks under `sinks_for: repeated` too


def test_nothing_to_predict_is_said():
    with pytest.raises(MemSinksError, match="nothing to predict"):
        score(plain_model(), documents(1, 1), 10)


def test_pad():
    inputs, targets = pad([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])], 2)
    assert inputs.tolist() == [[1, 2], [5, 0]]
    assert targets.tolist() == [[2, 3], [6, IGNORED]]


def test_read_scored(prepared):
    repeated = read_scored(prepared, "repeated")
    table = pq.read_table(prepared / "documents.parquet").to_pylist()
    assert set(repeated.sequence_ids.tolist()) == {row["sequence_id"] for row in table if row["repeats"] > 1}
    assert len(read_scored(prepared, "val", 3).tokens) == 3
    with pytest.raises(MemSinksError, match="There is no prepared data"):
        read_scored(prepared / "nothing", "val")


def checkpoint(folder, model):
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "lit_model.pth")
    save_config(model.config, folder)
    return folder


QUICK = {"block_size": 32, "parts": "losses", "bootstrap": 20}


def checked_out() -> str | None:
    """The commit of this checkout, if it is one."""
    repository = Path(__file__).parent.parent
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_evaluate_prints_a_table_and_writes_results(prepared, tmp_path, capsys):
    for arm, model in (("a", sink_model()), ("b", plain_model())):
        checkpoint(tmp_path / arm, model)
    out_file = tmp_path / "results.json"
    more = {**QUICK, "models": [f"third={tmp_path / 'b'}"], "limit": 4, "allow_wrong_map": True}
    evaluate(tmp_path / "a", prepared, tmp_path / "b", tmp_path / "b", out_file, **more)
    printed = capsys.readouterr()
    assert "gap closed" in printed.out
    assert "does not know the repeated documents better" in printed.err  # untrained
    content = json.loads(out_file.read_text(), parse_constant=pytest.fail)  # strict JSON, no NaN
    assert [model["arm"] for model in content["models"]] == ["standard", "left_out", "third", "evaluated"]
    assert [model["role"] for model in content["models"]] == ["standard", "left_out", None, None]
    standard, _, _, evaluated = content["models"]
    assert (standard["kind"], evaluated["kind"]) == ("litgpt", "memsinks")
    assert standard["checkpoint_sha256"] == hashlib.sha256((tmp_path / "b/lit_model.pth").read_bytes()).hexdigest()
    assert standard["parameters"] == sum(parameter.numel() for parameter in plain_model().parameters())
    assert (standard["sinks"], evaluated["sinks"]["n_sink"]) == (None, 32)
    assert (standard["parts"]["gate"], evaluated["parts"]["gate"]["pass"]) == (None, False)
    losses = evaluated["parts"]["losses"]
    assert set(losses["repeated"]) == {"dropped", "own", "placebo", "shuffled", "random_drop"}
    assert set(losses["validation"]) == {"dropped", "random_drop"}
    assert set(standard["parts"]["losses"]["repeated"]) == {"dropped"}
    own = losses["repeated"]["own"]
    assert own["n"] == 4
    assert own["targets"] == 4 * 32
    assert own["low"] <= own["value"] <= own["high"]
    assert content["comparison"][0]["own"] == [None]
    assert content["versions"]["torch"] == version("torch")
    assert content["commit"] == checked_out()
    assert content["data"]["manifest_sha256"] == hashlib.sha256((prepared / "memsinks.json").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (tmp_path / "results.documents.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * (4 + 4)
    shown = [row for row in rows if row["arm"] == "evaluated" and row["split"] == "repeated"]
    assert sum(row["loss"]["own"] for row in shown) / 4 == pytest.approx(own["value"])
    table = {row["digest"]: row for row in pq.read_table(prepared / "documents.parquet").to_pylist()}
    assert {table[int(row["digest"], 16)]["sequence_id"] for row in shown} == {row["sequence_id"] for row in shown}
    assert all(row["text"] for row in rows)
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        evaluate(tmp_path / "a", prepared, out_file=out_file)


def test_what_is_finished_outlives_a_kill(prepared, tmp_path, monkeypatch):
    checkpoint(tmp_path / "a", plain_model())
    out_file = tmp_path / "results.json"
    kept = tmp_path / ".results.json.parts"
    settings = {**QUICK, "limit": 2, "parts": "losses,quantised"}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(battery, "measure_quantised", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path / "a", prepared, out_file=out_file, **settings)
    assert not out_file.exists()
    assert len(list(kept.glob("*.json"))) == 1
    (kept / ".half.json.1.incomplete").write_text("{")  # what a kill in the middle of writing leaves
    counted = []
    monkeypatch.setattr(battery, "measure_losses", lambda *_: counted.append(1))
    evaluate(tmp_path / "a", prepared, out_file=out_file, **settings)
    assert not counted
    losses = json.loads(out_file.read_text())["models"][0]["parts"]["losses"]
    expected = score(plain_model(), read_scored(prepared, "repeated", 2), 32)
    assert losses["repeated"]["dropped"]["value"] == pytest.approx(expected.loss)
    assert not kept.exists()


def test_models_with_other_contexts_are_not_compared(prepared, tmp_path):
    torch.manual_seed(0)
    short = BaseGPT(Config(**{**TINY_MODEL, "block_size": 40}))
    folders = {
        "standard": checkpoint(tmp_path / "short", short),
        "checkpoint_dir": checkpoint(tmp_path / "a", plain_model()),
    }
    with pytest.raises(MemSinksError, match=r"standard 40, evaluated 64.*Set --block_size 40"):
        evaluate(**folders, data_path=prepared, parts="losses")
    evaluate(**folders, data_path=prepared, parts="losses", block_size=40, bootstrap=0)


@pytest.mark.parametrize("changed", [{"block_size": 16}, {"limit": 3}, {"seed": 1}])
def test_other_settings_are_measured_anew(changed, prepared, tmp_path):
    subject = Subject.at("a", checkpoint(tmp_path / "a", plain_model()))
    kept = battery.Kept(tmp_path / "kept")
    for settings in ({}, changed, {}):
        plan = {"block_size": 32, "seed": 0, **settings}
        limit = plan.pop("limit", 2)
        battery.measure(subject, ask_prepared(prepared, limit), battery.Plan(("losses",), **plan), "cpu", kept, False)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_other_masks_on_the_same_weights_are_measured_anew(prepared, tmp_path):
    kept, asked, losses = battery.Kept(tmp_path / "kept"), ask_prepared(prepared, 2), []
    for seed in (0, 1):
        subject = Subject.at("a", checkpoint(tmp_path / str(seed), sink_model(seed=seed)))
        measured = battery.measure(subject, asked, battery.Plan(("losses",), 32), "cpu", kept, True)
        losses.append(measured.found["losses"]["repeated"]["own"]["nats"])
    assert losses[0] != losses[1]


def test_curve_has_a_point_for_each_checkpoint(prepared, tmp_path):
    for step, seed in ((10, 0), (2, 1)):
        folder = checkpoint(tmp_path / f"run/step-{step:08d}", sink_model(seed=seed))
        (folder / "hyperparameters.yaml").write_text("train: {global_batch_size: 4, max_seq_length: 32}\nseed: 5\n")
    settings = {**QUICK, "limit": 2, "allow_wrong_map": True}
    evaluate(data_path=prepared, curve=tmp_path / "run", out_file=tmp_path / "results.json", **settings)
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert model["checkpoint_dir"].endswith("step-00000010")
    assert model["seed"] == 5
    first, last = model["parts"]["curve"]
    assert (first["step"], first["tokens"], last["tokens"]) == (2, 256, 1280)
    losses = model["parts"]["losses"]
    assert last["validation"] == pytest.approx(losses["validation"]["dropped"]["value"])
    assert last["repeated_own"] == pytest.approx(losses["repeated"]["own"]["value"])
    with pytest.raises(MemSinksError, match="has no step-"):
        evaluate(data_path=prepared, curve=tmp_path)


def measured(arm, validation, repeated, own=None, role=None, folder="out/final"):
    states = {"dropped": repeated} | ({} if own is None else {"own": own, "placebo": own})
    losses = {
        "validation": {"dropped": {"nats": [10 * validation], "counts": [10]}},
        "repeated": {state: {"nats": [10 * value], "counts": [10]} for state, value in states.items()},
    }
    subject = Subject(arm, role, Path(folder), arm, "memsinks", 1)
    return Measured(subject, {"arm": arm, "checkpoint_dir": str(folder)}, {"losses": losses})


SEED = {
    "standard": measured("standard", 2.0, 0.5, role="standard"),
    "left_out": measured("left_out", 2.2, 2.5, role="left_out"),
    "ours": measured("ours", 1.9, 2.0, 0.4),
}


def test_compare_by_hand():
    rows = {row.arm: row for row in compare([SEED, SEED])}
    assert rows["ours"].gap_closed == pytest.approx([0.75, 0.75])  # (2.0 - .5) / (2.5 - .5)
    assert rows["ours"].validation_change == pytest.approx([-0.05, -0.05])
    assert rows["ours"].repeated_ratio == pytest.approx([0.8, 0.8])
    assert rows["ours"].own == pytest.approx([0.4, 0.4])
    assert rows["ours"].forgetting == pytest.approx([1.5, 1.5])  # 2.0 - .5
    assert rows["ours"].degradation == pytest.approx([0.1, 0.1])  # 2.0 - 1.9: better
    assert rows["ours"].memorisation_gap == pytest.approx([-0.1, -0.1])  # 1.9 - 2.0
    assert rows["ours"].memorisation_gap_closed == pytest.approx([1 + 0.1 / 1.5] * 2)  # standard's gap: 2.0 - .5
    assert math.isnan(rows["ours"].extraction[0])
    assert rows["standard"].gap_closed == [0.0, 0.0]
    assert math.isnan(rows["standard"].own[0])
    alone = compare([{"ours": SEED["ours"]}])[0]
    assert all(math.isnan(value[0]) for value in (alone.gap_closed, alone.forgetting, alone.degradation))


def test_deviation():
    assert deviation([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert deviation([5.0]) == 0.0


PNG = b"\x89PNG\r\n\x1a\n"


def test_report_draws_a_png(tmp_path):
    run = tmp_path / "ours"
    log = run / "logs/csv/version_0/metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("loss,step,val_loss\n5.0,0,\n4.0,49,4.5\n3.0,99,3.5\n")
    assert validation_curve(run / "final") == ([50, 100], [4.5, 3.5])
    seed = {**SEED, "ours": measured("ours", 1.9, 2.0, 0.4, folder=run / "final")}
    models = [{"arm": arm, "checkpoint_dir": one.described["checkpoint_dir"]} for arm, one in seed.items()]
    content = {"format": 2, "models": models, "comparison": comparison([seed], Bootstrap(0))}
    (tmp_path / "results.json").write_text(json.dumps(strict(content)))
    report(tmp_path / "results.json", tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        report(tmp_path / "results.json", tmp_path / "report.png")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2, "models": []}', '{"format": 1, "models": [1], "comparison": [1]}']
)
def test_report_refuses_other_files(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(MemSinksError, match=r"is not a result file|holds no models"):
        report(tmp_path / "other.json", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"block_size": -5}, "block_size is -5"),
        ({"block_size": 0}, "block_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"device": "cuda"}, "has no usable GPU"),
        ({"parts": "losses,spells"}, "parts has 'spells'"),
        ({"models": ["nameless"]}, "models has 'nameless'"),
        ({"models": ["evaluated=x"]}, "models has 'evaluated=x'"),
        ({"bootstrap": -1}, "bootstrap is -1"),
        ({"level": 1.0}, "level is 1.0"),
        ({"relearn_steps": 0}, "relearn_steps is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"relearn_documents": [0]}, "relearn_documents is 0"),
        ({"repeated": Path("x")}, "Give the one or all three"),
        ({"data_path": None, "repeated": Path("x")}, "Give the one or all three"),
        ({"checkpoint_dir": None}, "There is no model to measure"),
    ],
)
def test_bad_settings_are_refused(setting, message, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"checkpoint_dir": checkpoint(tmp_path / "a", plain_model()), "data_path": prepared, **setting}
    with pytest.raises(MemSinksError, match=message):
        evaluate(**given)


def test_data_of_another_tokenizer_is_refused(prepared, tmp_path):
    folder = checkpoint(tmp_path / "a", plain_model())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(MemSinksError, match="is not the one that made"):
        evaluate(folder, prepared)


def test_tokens_beyond_the_vocabulary_are_refused(prepared, tmp_path):
    small = BaseGPT(Config(**{**TINY_MODEL, "vocab_size": 64, "padded_vocab_size": 64}))
    with pytest.raises(MemSinksError, match="embeds tokens below 64 only"):
        evaluate(checkpoint(tmp_path / "a", small), prepared)


def test_half_copied_folder_is_refused(prepared, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    (folder / "evaluation.parquet").unlink()
    with pytest.raises(MemSinksError, match=r"evaluation\.parquet' is missing"):
        read_scored(folder, "val")


def test_shuffled_ids_are_dealt_to_others():
    ids = torch.arange(-20, 0)
    dealt = shuffled_ids(ids, 0)
    assert sorted(dealt.tolist()) == ids.tolist()
    assert not (dealt == ids).any()
    assert shuffled_ids(ids, 0).tolist() == dealt.tolist() != shuffled_ids(ids, 1).tolist()


@torch.no_grad()
def test_random_drop_zeroes_as_many_neurons_as_there_are_sinks():
    model, scored = sink_model(), documents(20, 30)
    seen = []
    hooks = [
        block.mlp.proj.register_forward_hook(lambda _, arguments, output: seen.append(arguments[0]))
        for block in model.transformer.h
    ]
    with in_state(model, "random_drop", scored.sequence_ids, seed=3) as ids:
        dropped, _ = document_nats(model, scored, 64, ids)
    whole, _ = document_nats(model, scored, 64, scored.sequence_ids)
    assert not torch.equal(dropped, whole)
    always = [(hidden.flatten(0, 1) == 0).all(0) for hidden in seen]
    own = [set(zeros.nonzero()[:, 0].tolist()) for zeros in always[2:]]  # sinks off for both documents
    drawn = [set(zeros.nonzero()[:, 0].tolist()) for zeros in always[:2]]
    assert all(here - there for here, there in zip(drawn, own, strict=True))
    shared = [len([neuron for neuron in here if neuron < 32]) for here in drawn]
    assert all(8 <= number <= 24 for number in shared)  # of 32 drawn from 64, about half are shared neurons
    for hook in hooks:
        hook.remove()


def test_batches_bound_the_logits(monkeypatch):
    model, scored = plain_model(), documents(3, 11, 11, 11)
    monkeypatch.setattr(losses, "_LOGITS", 512 * 20)
    assert list(batched(model, scored, 64)) == [[0, 1], [2, 3]]
    assert list(batched(model, scored, 64, batch_size=1)) == [[0], [1], [2], [3]]
    monkeypatch.setattr(losses, "_LOGITS", 1)
    assert list(batched(model, scored, 64)) == [[0], [1], [2], [3]]
