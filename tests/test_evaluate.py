"""Losses against a plain loop over stock LitGPT, the states of the sinks, and what is written and printed."""

import json
import math
import shutil

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import save_config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate import (
    Loss,
    Result,
    Scored,
    compare,
    deviation,
    evaluate,
    evaluate_checkpoint,
    pad,
    placebo_ids,
    read_scored,
    score,
    write_results,
)
from litgpt_memsinks.metrics import IGNORED
from litgpt_memsinks.model import GPT
from litgpt_memsinks.report import report, validation_curve
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


def test_evaluate_checkpoint_measures_every_state(prepared, tmp_path):
    result = evaluate_checkpoint(checkpoint(tmp_path / "arm/final", sink_model()), prepared, 32)
    assert set(result.repeated) == {"dropped", "own", "placebo"}
    assert result.has_sinks
    assert result.validation.documents == len(result.validation.by_document) == 40
    assert result.repeated["own"].documents == 8
    plain = evaluate_checkpoint(checkpoint(tmp_path / "plain/final", plain_model()), prepared, 32)
    assert set(plain.repeated) == {"dropped"}


def test_evaluate_prints_a_table_and_writes_results(prepared, tmp_path, capsys):
    for arm, model in (("a", sink_model()), ("b", plain_model())):
        checkpoint(tmp_path / arm, model)
    out_file = tmp_path / "results.json"
    evaluate(tmp_path / "a", prepared, tmp_path / "b", tmp_path / "b", out_file, block_size=32, limit=4)
    printed = capsys.readouterr().out
    assert "gap closed" in printed
    assert "evaluated" in printed
    content = json.loads(out_file.read_text(), parse_constant=pytest.fail)  # strict JSON, no NaN
    assert set(content["seeds"][0]) == {"standard", "left_out", "evaluated"}
    assert len(content["seeds"][0]["evaluated"]["repeated"]["own"]["by_document"]) == 4
    assert content["comparison"][0]["own"] == [None]
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or content["versions"]["torch"]
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        evaluate(tmp_path / "a", prepared, out_file=out_file)


def loss(value):
    return Loss(value, 10, 1, {"1": value})


def result(validation, repeated, own=None):
    states = {"dropped": loss(repeated)} | ({} if own is None else {"own": loss(own), "placebo": loss(own)})
    return Result("out/final", own is not None, loss(validation), states)


SEED = {"standard": result(2.0, 0.5), "left_out": result(2.2, 2.5), "ours": result(1.9, 2.0, 0.4)}


def test_compare_by_hand():
    rows = {row.arm: row for row in compare([SEED, SEED])}
    assert rows["ours"].gap_closed == pytest.approx([0.75, 0.75])  # (2.0 - .5) / (2.5 - .5)
    assert rows["ours"].validation_change == pytest.approx([-0.05, -0.05])
    assert rows["ours"].repeated_ratio == pytest.approx([0.8, 0.8])
    assert rows["ours"].own == [0.4, 0.4]
    assert rows["standard"].gap_closed == [0.0, 0.0]
    assert math.isnan(rows["standard"].own[0])
    alone = compare([{"ours": SEED["ours"]}])[0]
    assert math.isnan(alone.gap_closed[0])


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
    seed = {**SEED, "ours": Result(str(run / "final"), True, loss(1.9), SEED["ours"].repeated)}
    write_results(tmp_path / "results.json", [seed], tmp_path)
    report(tmp_path / "results.json", tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        report(tmp_path / "results.json", tmp_path / "report.png")


@pytest.mark.parametrize("content", ["", "[]", '{"seeds": []}', '{"seeds": [{}], "comparison": []}'])
def test_report_refuses_other_files(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(MemSinksError, match="is not a result file"):
        report(tmp_path / "other.json", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"block_size": -5}, "block_size is -5"),
        ({"block_size": 0}, "block_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"device": "cuda"}, "has no usable GPU"),
    ],
)
def test_bad_settings_are_refused(setting, message, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MemSinksError, match=message):
        evaluate_checkpoint(checkpoint(tmp_path / "a", plain_model()), prepared, **setting)


def test_data_of_another_tokenizer_is_refused(prepared, tmp_path):
    folder = checkpoint(tmp_path / "a", plain_model())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(MemSinksError, match="is not the one that made"):
        evaluate_checkpoint(folder, prepared)


def test_tokens_beyond_the_vocabulary_are_refused(prepared, tmp_path):
    small = BaseGPT(Config(**{**TINY_MODEL, "vocab_size": 64, "padded_vocab_size": 64}))
    with pytest.raises(MemSinksError, match="embeds tokens below 64 only"):
        evaluate_checkpoint(checkpoint(tmp_path / "a", small), prepared)


def test_half_copied_folder_is_refused(prepared, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    (folder / "evaluation.parquet").unlink()
    with pytest.raises(MemSinksError, match=r"evaluation\.parquet' is missing"):
        read_scored(folder, "val")
