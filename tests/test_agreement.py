"""The same inputs through other people's implementations: what we call AUC, TPR, ROUGE-L, a loss and an extraction."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from litgpt.generate.base import generate
from rouge_score import rouge_scorer, tokenizers
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import AutoModelForCausalLM

from litgpt_memsinks.data.scored import Scored, read_scored
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.drop_sinks.export_hf import export_hf
from litgpt_memsinks.evaluate.battery import Kept, Plan, measure
from litgpt_memsinks.evaluate.extraction import measure_extraction
from litgpt_memsinks.evaluate.subject import Subject, ask_prepared
from litgpt_memsinks.metrics import auc, roc, rouge_l, tpr_at_fpr
from litgpt_memsinks.model.checkpoint import load_model
from tests.trained import save, sink_model, train

# ------------------------------------------------------------------------------------------------------ membership


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("members", "others"), [(1, 1), (1, 50), (32, 256), (300, 7)])
def test_attacks_are_judged_as_scikit_learn_judges_them(members, others, ties):
    rng = np.random.default_rng(members)
    scores = [rng.normal(shift, 1, size) for shift, size in ((0.7, members), (0.0, others))]
    if ties:
        scores = [np.round(one) for one in scores]
    truth, together = np.repeat([1, 0], [members, others]), np.concatenate(scores)
    assert auc(*scores) == pytest.approx(roc_auc_score(truth, together), abs=1e-12)
    false, true, _ = roc_curve(truth, together, drop_intermediate=False)
    ours = roc(*scores)
    np.testing.assert_allclose(ours[0], false, atol=1e-12)
    np.testing.assert_allclose(ours[1], true, atol=1e-12)
    for level in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
        assert tpr_at_fpr(*scores, level) == pytest.approx(true[false <= level].max(), abs=1e-12)


# --------------------------------------------------------------------------------------------------------- ROUGE-L


class Numbers(tokenizers.Tokenizer):
    """Words are tokens' numbers."""

    def tokenize(self, text):
        return text.split()


@pytest.mark.parametrize("vocabulary", [2, 12, 500])
def test_rouge_l_is_googles(vocabulary):
    generator = np.random.default_rng(vocabulary)
    generated, truth = generator.integers(0, vocabulary, (2, 20, 32))
    truth[:5] = generated[:5]
    truth[5:9, :16] = generated[5:9, :16]
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Numbers())
    expected = [
        scorer.score(" ".join(map(str, right)), " ".join(map(str, made)))["rougeL"].fmeasure
        for made, right in zip(generated, truth, strict=True)
    ]
    np.testing.assert_allclose(rouge_l(generated, truth), expected, atol=1e-12)


# ------------------------------------------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def released(prepared, tokenizer_dir, tmp_path_factory):
    """A model that knows some documents by heart, with sinks; the same dropped; and that for transformers."""
    root = tmp_path_factory.mktemp("released")
    model = sink_model()
    train(model, read_scored(prepared, "repeated"), read_scored(prepared, "val"), steps=60)
    save(root / "sinks", model)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, root / "sinks")
    drop_sinks(root / "sinks", root / "plain", certificate=False)
    export_hf(root / "sinks", root / "hf")
    return SimpleNamespace(sinks=root / "sinks", plain=root / "plain", hf=root / "hf")


def test_losses_of_evaluate_are_those_of_transformers(released, prepared):
    """Of every document by itself, whichever of the three folders is evaluated; transformers computes its own loss."""
    asked = ask_prepared(prepared, None)
    theirs = AutoModelForCausalLM.from_pretrained(released.hf).eval()
    assert theirs.dtype == torch.float32
    for arm, folder in vars(released).items():
        plan = Plan(parts=("losses",))
        found = measure(Subject.at(arm, folder), asked, plan, "cpu", Kept(None), True).found["losses"]
        for split, documents in (("repeated", asked.repeated), ("validation", asked.validation)):
            values = found[split]["dropped"]
            for tokens, nats, count in zip(documents.tokens, values["nats"], values["counts"], strict=True):
                row = tokens[None, : count + 1]  # the model's context holds so many targets
                with torch.inference_mode():
                    loss = theirs(input_ids=row, labels=row).loss.item()
                assert nats / count == pytest.approx(loss, abs=1e-5)


@torch.inference_mode()
def naive_extraction(model, documents, prefix, suffix):
    """Which documents come out, by LitGPT's own generation, one document and one token at a time."""
    said = []
    for tokens in documents:
        model.set_kv_cache(batch_size=1)
        whole = generate(model, tokens[:prefix], prefix + suffix, temperature=0.0)
        model.clear_kv_cache()
        same = [bool(a == b) for a, b in zip(whole[prefix:], tokens[prefix : prefix + suffix], strict=True)]
        said.append((whole[prefix:].tolist(), all(same), same.index(False) if False in same else suffix))
    return said


def test_extraction_is_what_a_plain_loop_finds(released, prepared):
    """A window that the dropped model knows by heart is among the documents: of what it says itself."""
    model, repeated = load_model(released.plain), read_scored(prepared, "repeated")
    model.set_kv_cache(batch_size=1)
    known = generate(model, repeated.tokens[0][:32], 64, temperature=0.0)
    model.clear_kv_cache()
    half = torch.cat((known[:40], repeated.tokens[1][40:64]))
    documents = Scored([known, half, *repeated.tokens], torch.cat((repeated.sequence_ids[:2], repeated.sequence_ids)))
    long_enough = [index for index, tokens in enumerate(documents.tokens) if len(tokens) >= 64]
    expected = naive_extraction(model, [documents.tokens[index] for index in long_enough], 32, 32)
    found = next(one for one in measure_extraction(model, documents, seed=0) if one["prompt"] == "own")
    assert (found["prefix"], found["suffix"], found["rows"]) == (32, 32, long_enough)
    assert found["generated"] == [said for said, _, _ in expected]
    assert found["exact"] == [float(exact) for _, exact, _ in expected]
    assert found["common_prefix"] == [float(length) for _, _, length in expected]
    assert found["exact"][0] == 1.0
    assert 8 <= found["common_prefix"][1] < 32
