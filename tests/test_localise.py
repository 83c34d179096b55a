"""The frontier against `evaluate` and weights edited by hand; files, kills and errors; checkpoints without neurons."""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.evaluate import evaluate
from litgpt_memsinks.evaluate.subject import Subject
from litgpt_memsinks.localise import frontier as localise_frontier
from litgpt_memsinks.localise.drop_neurons import drop_neurons
from litgpt_memsinks.localise.localise import HardConcreteArgs, LocaliseArgs, Point, frontier, localise
from litgpt_memsinks.localise.neurons import dropped, kept_neurons, load_plain
from litgpt_memsinks.localise.tune import tune_localise
from litgpt_memsinks.model.losses import document_nats
from litgpt_memsinks.model.model import GPT
from tests.console import SCRIPTS, TINY_MODEL, started
from tests.helpers import read_jsonl, write_jsonl
from tests.sink_models import MODELS, save
from tests.trained import plain_model, train


@pytest.fixture(scope="module")
def checkpoint(prepared, tmp_path_factory):
    """A plain model that has begun to memorise, with its tokenizer."""
    model = train(plain_model(), read_scored(prepared, "repeated"), read_scored(prepared, "val"), steps=60, lr=1e-2)
    return save(model, tmp_path_factory.mktemp("localise") / "plain", prepared, raw=False)


@pytest.fixture(scope="module")
def standard(tmp_path_factory, prepared):
    """A standard model of ours, without sinks, in each kind of MLP."""

    def of(kind):
        torch.manual_seed(0)
        model = GPT(MemSinksConfig.from_base(Config(**{**TINY_MODEL, **MODELS[kind]}), SinkArgs(1.0)))
        return save(model, tmp_path_factory.mktemp("standard") / "in", prepared)

    return of


def stock(folder):
    """The model of a checkpoint, read by stock LitGPT."""
    model = BaseGPT(Config.from_file(folder / "model_config.yaml"))
    model.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True))
    return model.eval()


def edited(checkpoint, gone):
    """The model with neurons ``(L, d_ff)`` zeroed by hand."""
    model = stock(checkpoint)
    for layer, block in enumerate(model.transformer.h):
        block.mlp.proj.weight.data[:, gone[layer]] = 0.0
    return model


def loss(model, documents, block_size=64):
    nats, counts = document_nats(model, documents, block_size)
    return float(nats.sum() / counts.sum())


def highest(scores, number):
    """The highest of each layer, ``(L, d_ff)``, by NumPy's sort."""
    gone = np.zeros_like(scores, dtype=bool)
    for layer, row in enumerate(scores):
        gone[layer, np.argsort(-row, kind="stable")[:number]] = True
    return torch.from_numpy(gone)


# ------------------------------------------------------------------------------------------------------------- frontier


@pytest.mark.parametrize("mode", ["pooled", "per_sequence"])
def test_without_a_drop_losses_are_those_of_evaluate(mode, checkpoint, prepared, tmp_path):
    evaluate(checkpoint, prepared, out_file=tmp_path / "r.json", parts="losses", bootstrap=0, block_size=40)
    losses = json.loads((tmp_path / "r.json").read_text())["models"][0]["parts"]["losses"]
    settings = LocaliseArgs(block_size=40)
    (point,) = frontier(checkpoint, prepared, "random", mode, [0.0], settings=settings)
    assert point.repeated_loss == pytest.approx(losses["repeated"]["dropped"]["value"], rel=1e-6)
    assert point.validation_loss == pytest.approx(losses["validation"]["dropped"]["value"], rel=1e-6)
    assert (point.n, point.ratio, point.extraction) == (8, 0.0, None)


def test_standard_models_of_ours_are_plain_ones(standard, prepared):
    folder = standard("llama")
    (point,) = frontier(folder, prepared, "random", "pooled", [0.0])
    subject = Subject.at("standard", folder)
    assert point.repeated_loss == pytest.approx(loss(subject.load("cpu"), read_scored(prepared, "repeated")), rel=1e-6)
    assert frontier(subject, prepared, "random", "pooled", [0.0]) == [point]


def test_each_document_is_scored_without_its_own_neurons(checkpoint, prepared, tmp_path):
    out = tmp_path / "x.json"
    points = localise(
        checkpoint, prepared, method="activation", mode="per_sequence", ratios=[0.25], out=out, limit=5,
        validation_limit=4, prefix_length=10, documents_at_once=4,
    )  # fmt: skip
    content = json.loads(out.read_text())
    scores = np.load(tmp_path / "x.json.scores.npy")
    assert scores.shape == (5, 2, 64)
    repeated, validation = (read_scored(prepared, split, limit) for split, limit in (("repeated", 5), ("val", 4)))
    sums, others = [], []
    for row in range(5):
        model = edited(checkpoint, highest(scores[row], 16))
        one = read_scored(prepared, "repeated", 5)
        one.tokens, one.sequence_ids = [one.tokens[row]], one.sequence_ids[row : row + 1]
        nats, counts = document_nats(model, one, 64)
        sums.append((float(nats), int(counts)))
        others.append(loss(model, validation))
        found = content["documents"][row]
        assert found["sequence_id"] == int(repeated.sequence_ids[row])
        assert found["targets"] == sums[-1][1]
        assert found["loss"][1] == pytest.approx(sums[-1][0] / sums[-1][1], rel=1e-5)
        assert found["validation_loss"][1] == pytest.approx(others[-1], rel=1e-5)
    assert points[1].repeated_loss == pytest.approx(sum(a for a, _ in sums) / sum(b for _, b in sums), rel=1e-5)
    assert points[1].validation_loss == pytest.approx(sum(others) / 5, rel=1e-5)
    assert len(set(others)) == 5  # each document has other neurons
    assert content["points"][1]["forgetting"] == pytest.approx(points[1].repeated_loss - points[0].repeated_loss)
    assert content["points"][1]["degradation"] == pytest.approx(points[0].validation_loss - points[1].validation_loss)


def test_pooled_drop_is_of_the_mean_score(checkpoint, prepared, tmp_path):
    own, pooled = tmp_path / "own.json", tmp_path / "pooled.json"
    settings = dict(method="integrated_gradients", steps=2, ratios=[0.5], limit=3, prefix_length=58)
    localise(checkpoint, prepared, mode="per_sequence", out=own, **settings)
    points = localise(checkpoint, prepared, mode="pooled", out=pooled, **settings)
    scores = np.load(tmp_path / "pooled.json.scores.npy")
    np.testing.assert_allclose(scores[0], np.load(tmp_path / "own.json.scores.npy").mean(0), rtol=1e-4, atol=1e-8)
    model = edited(checkpoint, highest(scores[0], 32))
    assert points[1].repeated_loss == pytest.approx(loss(model, read_scored(prepared, "repeated", 3)), rel=1e-5)
    assert points[1].validation_loss == pytest.approx(loss(model, read_scored(prepared, "val", 3)), rel=1e-5)


def test_hard_concrete_forgets_more_than_chance(checkpoint, prepared):
    """On a model that has memorised: at the same ratio the documents lose more, and more than others do."""
    settings = LocaliseArgs(hard_concrete=HardConcreteArgs(penalty=5.0, iterations=60, learning_rate=0.1))
    before, after = frontier(checkpoint, prepared, "hard_concrete", "per_sequence", [0.0, 0.1], settings=settings)
    (chance,) = frontier(checkpoint, prepared, "random", "per_sequence", [0.1], settings=settings)
    assert after.repeated_loss > 2 * (chance.repeated_loss - before.repeated_loss) + before.repeated_loss


def test_extraction_is_tried_after_each_drop(prepared, checkpoint, monkeypatch):
    """Documents that a model repeats word for word, and no longer without its neurons."""
    documents = read_scored(prepared, "repeated")
    continued = {tuple(tokens[:32].tolist()): tokens[32:64] for tokens in documents.tokens}

    def by_heart(model, prompts, suffix):
        whole = sum(float(block.mlp.proj(torch.ones(1, 1, 64)).abs().sum()) for block in model.transformer.h) > 0
        return torch.stack([continued[tuple(prompt.tolist())] + (not whole) for prompt in prompts])

    long = sum(len(tokens) >= 64 for tokens in documents.tokens)
    assert long
    monkeypatch.setattr(localise_frontier, "continue_greedily", by_heart)
    settings = LocaliseArgs(extraction=True)
    points = frontier(checkpoint, prepared, "random", "per_sequence", [0.0, 1.0], settings=settings)
    assert [point.extraction for point in points] == [1.0, 0.0]


def test_documents_may_be_files_of_text(checkpoint, prepared, corpus_dir, tmp_path):
    texts = read_jsonl(corpus_dir / "train.jsonl")[:3]
    write_jsonl(tmp_path / "documents.jsonl", texts)
    validation = write_jsonl(tmp_path / "validation.jsonl", read_jsonl(corpus_dir / "validation.jsonl")[:2])
    points = localise(
        checkpoint, documents=tmp_path / "documents.jsonl", validation=validation, method="random", ratios=None
    )
    assert [point.n for point in points] == [3] * 7
    assert [point.ratio for point in points] == [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]  # .01 of 64 neurons is none


# ---------------------------------------------------------------------------------------------------------------- files


def test_result_file_and_table(checkpoint, prepared, tmp_path, capsys):
    out = tmp_path / "new" / "x.json"
    points = localise(checkpoint, prepared, method="random", ratios=[0.1, 0.5], out=out, seed=4, limit=3)
    content = json.loads(out.read_text())
    assert (content["kind"], content["format"]) == ("litgpt-memsinks localise", 1)
    assert content["checkpoint"]["sha256"] == Subject.at("x", checkpoint).sha256
    assert content["settings"]["seed"] == 4
    assert {"torch", "litgpt", "litgpt-memsinks"} <= {*content["versions"]}
    assert [Point(**{k: row[k] for k in ("ratio", "repeated_loss", "validation_loss", "n", "extraction")})
            for row in content["points"]] == points  # fmt: skip
    assert [row["n"] for row in content["points"]] == [3, 3, 3]
    printed = capsys.readouterr().out
    assert f"| 0.5 | {points[2].repeated_loss:.3f} |" in printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.json", "x.json.scores.npy"]


def test_kill_9_leaves_nothing_that_looks_whole_and_finished_documents_are_not_done_again(
    checkpoint, prepared, tmp_path, monkeypatch
):
    arguments = ["localise", checkpoint, "--data_path", prepared, "--mode", "per_sequence", "--documents_at_once", 1]
    arguments += ["--hard_concrete.iterations", 20, "--ratios", "[0.1]", "--validation_limit", 2]
    with started([SCRIPTS / "litgpt-memsinks", *arguments, "--out", tmp_path / "x.json"]) as process:
        while len(list(tmp_path.glob(".x.json.parts/*.json"))) < 3:
            assert process.poll() is None, process.output
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [".x.json.parts"]
    calls = []
    score = localise_frontier.score_neurons
    monkeypatch.setattr(localise_frontier, "score_neurons", lambda *given: calls.append(1) or score(*given))
    settings = dict(mode="per_sequence", documents_at_once=1, ratios=[0.1], validation_limit=2)
    settings["hard_concrete"] = HardConcreteArgs(iterations=20)
    localise(checkpoint, prepared, out=tmp_path / "x.json", **settings)
    assert 0 < len(calls) < 8
    localise(checkpoint, prepared, out=tmp_path / "whole.json", **settings)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("x.json", "whole.json"))
    assert first["documents"] == second["documents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}{end}" for name in ("x.json", "whole.json") for end in ("", ".scores.npy")
    )


def test_a_result_that_is_there_is_not_overwritten(checkpoint, prepared, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(MemSinksError, match="is not overwritten"):
        localise(checkpoint, prepared, method="random", out=tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_dropped_checkpoint_is_the_model_without_the_neurons(kind, standard, prepared, tmp_path, capsys):
    folder, out = standard(kind), tmp_path / "x.json"
    localise(folder, prepared, method="random", ratios=[0.25], out=out, first_layer=1, limit=2, validation_limit=2)
    done = drop_neurons(folder, out, 0.25, tmp_path / "dropped")
    assert done.per_layer == [0, 16]
    scores = torch.from_numpy(np.load(tmp_path / "x.json.scores.npy"))
    keep = kept_neurons(scores, 0.25, first_layer=1)
    model, found = load_plain(Subject.at("x", folder), "cpu"), stock(tmp_path / "dropped")
    tokens = torch.randint(0, 512, (3, 40))
    with dropped(model, keep):
        assert torch.equal(found(tokens), model(tokens))
    assert not torch.equal(found(tokens), model(tokens))
    gone = ~keep[0, 1]
    for name, dimension in (("fc", 0), ("fc_1", 0), ("fc_2", 0), ("proj", 1)):
        if hasattr(found.transformer.h[1].mlp, name):
            weight = getattr(found.transformer.h[1].mlp, name).weight
            assert not weight.index_select(dimension, gone.nonzero().flatten()).any()  # nothing of them is left
    assert found.config.intermediate_size == 64
    assert "same width" in capsys.readouterr().out
    note = json.loads((tmp_path / "dropped/dropped_neurons.json").read_text())
    assert (note["ratio"], note["method"], note["per_layer"]) == (0.25, "random", [0, 16])
    assert (tmp_path / "dropped/tokenizer.json").is_file()
    assert kind != "llama" or (tmp_path / "dropped/config.json").is_file()  # which `litgpt evaluate` needs


def test_checkpoint_without_one_documents_neurons(checkpoint, prepared, tmp_path):
    out = tmp_path / "x.json"
    localise(checkpoint, prepared, method="activation", mode="per_sequence", ratios=[0.25], out=out, validation_limit=2)
    document = json.loads(out.read_text())["documents"][3]
    drop_neurons(checkpoint, out, 0.25, tmp_path / "dropped", document["sequence_id"])
    one = read_scored(prepared, "repeated")
    one.tokens, one.sequence_ids = [one.tokens[3]], one.sequence_ids[3:4]
    assert loss(stock(tmp_path / "dropped"), one) == pytest.approx(document["loss"][1], rel=1e-5)
    for wrong, message in ((None, "Say whose neurons: --document="), (12, "no scores for document 12")):
        with pytest.raises(MemSinksError, match=message):
            drop_neurons(checkpoint, out, 0.25, tmp_path / "other", wrong)


def test_scores_of_another_checkpoint_are_refused(checkpoint, standard, prepared, tmp_path):
    out = tmp_path / "x.json"
    localise(checkpoint, prepared, method="random", ratios=[0.25], out=out, limit=2)
    with pytest.raises(MemSinksError, match="Name the checkpoint that was localised in"):
        drop_neurons(standard("llama"), out, 0.25, tmp_path / "dropped")
    with pytest.raises(MemSinksError, match="one set of scores"):
        drop_neurons(checkpoint, out, 0.25, tmp_path / "dropped", document=3)
    scores = tmp_path / "x.json.scores.npy"
    scores.write_bytes(scores.read_bytes()[:-4] + b"0000")
    with pytest.raises(MemSinksError, match=r"not what x\.json was written with"):
        drop_neurons(checkpoint, out, 0.25, tmp_path / "dropped")
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.json.scores.npy"]


# --------------------------------------------------------------------------------------------------------------- tuning


def test_tuning_takes_the_lowest_validation_loss(checkpoint, prepared, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    chosen = tune_localise(
        checkpoint, prepared, number=2, penalties=[1.0, 50.0], iterations=[2, 4], ratio=0.25, out=out,
        validation_limit=4, settings=HardConcreteArgs(learning_rate=0.3),
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [(row["penalty"], row["iterations"]) for row in rows] == [(1, 2), (1, 4), (50, 2), (50, 4)]
    lowest = min(rows, key=lambda row: row["validation_loss"])
    assert (chosen.penalty, chosen.iterations) == (lowest["penalty"], lowest["iterations"])
    assert chosen.learning_rate == 0.3
    assert capsys.readouterr().out.count("chosen") == 1
    for row in rows:  # each as if it had been trained alone
        settings = HardConcreteArgs(row["penalty"], row["iterations"], 0.3)
        args = LocaliseArgs(hard_concrete=settings, validation_limit=4)
        (point,) = frontier(checkpoint, prepared, "hard_concrete", "per_sequence", [0.25], limit=2, settings=args)
        # `limit` is for both kinds of documents here
        assert row["repeated_loss"] == pytest.approx(point.repeated_loss, rel=1e-4)
    assert len({row["validation_loss"] for row in rows}) == 4


# --------------------------------------------------------------------------------------------------------------- errors

BAD = {
    "no documents": ({"data_path": None}, "The documents are those of --data_path DIR"),
    "both": ({"documents": Path("x.jsonl")}, "Give the one or both"),
    "method": ({"method": "magic"}, "method is 'magic'. Choose from: hard_concrete, "),
    "ratio": ({"ratios": [0.1, 1.5]}, "ratio is 1.5, but it must lie in"),
    "ratio of nothing": ({"ratios": [0.01]}, "ratio 0.01 of 64 neurons"),
    "limit": ({"limit": 0}, "limit is 0"),
    "prefix": ({"prefix_length": 0}, "prefix_length is 0"),
    "validation": ({"validation_limit": 0}, "validation_limit is 0"),
    "layer": ({"first_layer": 2}, "first_layer is 2, but the model has layers 0 to 1"),
    "device": ({"device": "cuda:9"}, "no usable GPU"),
    "penalty": ({"hard_concrete": HardConcreteArgs(penalty=0)}, "hard_concrete.penalty is 0"),
    "mask": ({"hard_concrete": HardConcreteArgs(initial_mask=1.1)}, "below 1.1"),
    "iterations": ({"hard_concrete": HardConcreteArgs(iterations=0)}, "hard_concrete.iterations is 0"),
    "data": ({"data_path": Path("nowhere")}, "nowhere"),
}


def one_line(call, *arguments, **settings):
    with pytest.raises(MemSinksError) as stopped:
        call(*arguments, **settings)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line(name, checkpoint, prepared):
    given, message = BAD[name]
    settings = {"data_path": prepared, "method": "random", **given}
    assert message in one_line(localise, checkpoint, **settings)


def test_an_error_is_all_that_the_command_says(prepared, tmp_path, capsys):
    torch.manual_seed(0)
    model = GPT(MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(0.5)))
    folder = save(model, tmp_path / "in", prepared)
    with pytest.raises(SystemExit) as stopped:
        main(["localise", str(folder), "--data_path", str(prepared), "--hard_concrete.iterations", "2"])
    message = str(stopped.value.code)
    assert message.startswith("Error: ")
    assert "has 32 sinks in each MLP" in message
    assert message.count("\n") == 0
    assert capsys.readouterr().out == ""
    drop_sinks(folder, tmp_path / "dropped", certificate=False)  # what it advises
    points = frontier(tmp_path / "dropped", prepared, "random", "pooled", [0.0, 0.5])
    assert not math.isclose(points[0].repeated_loss, points[1].repeated_loss)


def test_mixtures_of_experts_are_refused(prepared, tmp_path):
    changes = {"mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 1}
    folder = save(BaseGPT(Config(**{**TINY_MODEL, **changes})), tmp_path / "in", prepared)
    assert "Name a dense model" in one_line(localise, folder, prepared, method="random")


def test_bad_input_of_the_other_commands_ends_in_one_line(checkpoint, prepared, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "number is 0" in one_line(tune_localise, checkpoint, prepared, number=0)
    assert "ratio is -1" in one_line(tune_localise, checkpoint, prepared, ratio=-1.0)
    assert "hard_concrete.iterations is 0" in one_line(tune_localise, checkpoint, prepared, iterations=[0])
    out = (0.25, tmp_path / "out")
    assert "is not a result of `litgpt-memsinks localise`" in one_line(drop_neurons, checkpoint, other, *out)
    assert "cannot be read" in one_line(drop_neurons, checkpoint, tmp_path / "nothing.json", *out)
    assert "Give both --ratio" in one_line(drop_neurons, checkpoint, other)
    assert os.listdir(tmp_path) == ["other.json"]
