"""Attacks against stock LitGPT's generation, plain formulas, and models whose answer is known."""

import math

import numpy as np
import pytest
import torch
from litgpt.generate.base import generate
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.data.scored import Scored
from litgpt_memsinks.drop_sinks.drop_sinks import without_sinks
from litgpt_memsinks.evaluate import extraction
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.extraction import Attempt, attempts, continue_greedily, long_enough, measure_extraction
from litgpt_memsinks.evaluate.membership import attack_row, compressed_size, measure_tokens, scores, token_statistics
from litgpt_memsinks.evaluate.relearning import (
    first,
    int8_round_trip,
    measure_calibrated,
    measure_quantised,
    measure_relearning,
    train_bias,
    trainable_copy,
)
from tests.trained import plain_model, sink_model


def documents(*lengths, vocabulary=512):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]
    return Scored(tokens, torch.tensor([-(2**31) + 17 + index for index in range(len(lengths))]))


# ----------------------------------------------------------------------------------------------------------- extraction


@torch.inference_mode()
def test_batched_continuation_equals_litgpt_one_at_a_time():
    model = plain_model().eval()
    prompts = torch.stack(documents(12, 12, 12).tokens)
    found = continue_greedily(model, prompts, 9)
    for prompt, continued in zip(prompts, found, strict=True):
        model.set_kv_cache(1, 21)
        expected = generate(model, prompt, 21, temperature=0.0, include_prompt=False)
        assert continued.tolist() == expected.tolist()
    model.clear_kv_cache()


@torch.inference_mode()
def test_continuation_with_sinks_equals_one_without_a_cache():
    model, ids = sink_model().eval(), documents(1, 1).sequence_ids
    prompts = torch.stack(documents(12, 12).tokens)
    expected = prompts
    for _ in range(9):
        logits = model(expected, sequence_ids=ids)
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    assert continue_greedily(model, prompts, 9, ids).tolist() == expected[:, 12:].tolist()
    assert continue_greedily(model, prompts, 9).tolist() != expected[:, 12:].tolist()


def test_continuation_fills_the_context():
    model = plain_model().eval()
    assert continue_greedily(model, documents(32).tokens[0][None], 33).shape == (1, 33)  # the last is never fed back
    attempt = Attempt(32, 33, "dropped", "own")
    assert long_enough(documents(64, 65, 70), attempt, 64) == [1, 2]
    assert long_enough(documents(64, 65, 70), attempt, 63) == []


def test_what_is_tried():
    assert {(one.prefix, one.suffix) for one in attempts(False)} == {(32, 32), (50, 50), (64, 48)}
    assert {one.state for one in attempts(False)} == {"dropped"}
    assert {one.state for one in attempts(True) if one.prompt == "own"} == {"dropped", "own", "placebo"}
    assert {one.state for one in attempts(True) if one.prompt == "wrong"} == {"dropped", "own"}


class Reciter(torch.nn.Module):
    """Knows its documents by heart: says what follows the tokens it is shown."""

    def __init__(self, known):
        super().__init__()
        triples = [tuple(three) for tokens in known for three in tokens.unfold(0, 3, 1).tolist()]
        self.follows = {(a, b): c for a, b, c in triples}
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.max_seq_length, self.seen = 128, None

    def set_kv_cache(self, *args, **kwargs):
        self.seen = None

    def clear_kv_cache(self):
        self.seen = None

    def forward(self, tokens, positions, input_pos_maxp1):
        self.seen = tokens if self.seen is None else torch.cat((self.seen, tokens), 1)
        assert self.seen.size(1) == input_pos_maxp1 == int(positions[-1]) + 1
        logits = torch.zeros(len(tokens), 1, 512)
        for row, shown in enumerate(self.seen.tolist()):
            logits[row, 0, self.follows.get(tuple(shown[-2:]), 0)] = 1.0
        return logits


def test_known_documents_are_extracted_and_others_are_not():
    scored = documents(64, 80, 120, 40)
    found = measure_extraction(Reciter(scored.tokens[:2]), scored, seed=0)
    assert [(one["prefix"], one["prompt"], one["rows"]) for one in found] == [
        (32, "own", [0, 1, 2]),
        (50, "own", [2]),
        (64, "own", [2]),
        (32, "wrong", [0, 1, 2]),
    ]
    own, *_, wrong = found
    assert own["exact"] == [1.0, 1.0, 0.0]
    assert own["levenshtein"][:2] == [0.0, 0.0]
    assert own["common_prefix"][:2] == [32.0, 32.0]
    assert own["generated"][0] == scored.tokens[0][32:64].tolist()
    assert wrong["exact"] == [0.0, 0.0, 0.0]
    assert wrong["generated"][1] == own["generated"][0]  # prompted with its predecessor's beginning


def test_batches_keep_documents_and_sinks_together(monkeypatch):
    model, scored = sink_model().eval(), documents(64, 64, 64)
    whole = measure_extraction(model, scored, seed=0)
    monkeypatch.setattr(extraction, "BATCH_SIZE", 2)
    assert measure_extraction(model, scored, seed=0) == whole


# ----------------------------------------------------------------------------------------------------------- membership


def test_statistics_equal_plain_formulas():
    model, scored = plain_model().eval(), documents(30, 9, 1)
    found = token_statistics(model, scored, 20, None)
    assert found["counts"] == [20, 8, 0]
    assert math.isnan(found["min_k"][2])
    for row, tokens in enumerate(scored.tokens[:2]):
        tokens = tokens[:21]
        distribution = torch.distributions.Categorical(logits=model(tokens[None, :-1])[0].detach())
        chosen = distribution.log_prob(tokens[1:])
        probabilities = distribution.probs
        means = -distribution.entropy()
        deviations = (probabilities * (probabilities.log() - means[:, None]) ** 2).sum(-1).sqrt()
        k = max(1, int(0.2 * len(chosen)))
        assert found["nats"][row] == pytest.approx(-chosen.sum().item(), abs=1e-4)
        assert found["min_k"][row] == pytest.approx(chosen.sort()[0][:k].mean().item(), abs=1e-5)
        relative = ((chosen - means) / deviations).sort()[0][:k].mean().item()
        assert found["min_k_plus_plus"][row] == pytest.approx(relative, abs=1e-3)
        correct = (distribution.probs.argmax(-1) == tokens[1:]).float().mean().item()
        assert found["exact_match"][row] == pytest.approx(correct)


def test_statistics_in_every_state():
    plain = measure_tokens(plain_model().eval(), documents(9), documents(8), 20, 0)
    assert {split: set(states) for split, states in plain.items()} == {
        "repeated": {"dropped"},
        "validation": {"dropped"},
    }
    sinks = measure_tokens(sink_model().eval(), documents(9), documents(8), 20, 0)
    assert sinks["repeated"]["dropped"] != sinks["repeated"]["own"]


def test_scores_by_hand():
    statistics = {"nats": [4.0, 9.0], "counts": [2, 3], "min_k": [-3.0, -4.0], "min_k_plus_plus": [0.5, 0.25]}
    found = scores(statistics, [8, 18], {"nats": [6.0, 9.0], "counts": [2, 3]})
    assert {name: values.tolist() for name, values in found.items()} == {
        "loss": [-2.0, -3.0],
        "zlib": [-0.5, -0.5],
        "reference": [1.0, 0.0],
        "min_k": [-3.0, -4.0],
        "min_k_plus_plus": [0.5, 0.25],
    }
    assert "reference" not in scores(statistics, [8, 18], None)
    assert compressed_size("a" * 100) < compressed_size("the quick brown fox jumps") < 100


def test_attack_on_members_that_are_known():
    members, others = np.array([3.0, 4.0, math.nan]), np.array([1.0, 2.0, 0.0, 1.5])
    found = attack_row("loss", "dropped", members, others, Bootstrap(20))
    assert (found["members"], found["non_members"], found["auc"]["n"]) == (2, 4, 6)
    assert found["auc"]["value"] == found["tpr"]["0.001"]["value"] == found["tpr"]["0.01"]["value"] == 1.0
    assert found["roc"]["fpr"][0] == 0.0
    assert found["roc"]["tpr"][-1] == found["roc"]["fpr"][-1] == 1.0
    forgotten = attack_row("loss", "dropped", -members, -others, Bootstrap(20))
    assert forgotten["auc"]["value"] == 0.0  # tells them apart as well, the other way round


# ----------------------------------------------------------------------------------------------------------- relearning


def test_relearning_teaches_some_and_measures_others():
    model, repeated, validation = plain_model().eval(), documents(20, 20, 20, 20, 20, 20), documents(25, 25)
    before = [parameter.clone() for parameter in model.parameters()]
    found = measure_relearning(model, repeated, validation, 64, [1, 2, 16], 7)
    assert found["steps"] == [0, 5, 7]
    assert [run["n"] for run in found["runs"]] == [1, 2, 3]  # of six documents, half are left to be measured
    assert len({run["other"][0] for run in found["runs"]}) == 1
    assert all(len(run["other"]) == len(run["validation"]) == 3 for run in found["runs"])
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    # the same by hand: AdamW on the first document
    trained = trainable_copy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-5, weight_decay=0.0)
    for _ in range(7):
        document = repeated.tokens[0][None]
        loss = torch.nn.functional.cross_entropy(trained(document[:, :-1])[0], document[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = [
        torch.nn.functional.cross_entropy(trained(tokens[None, :-1])[0], tokens[1:]).item()
        for tokens in repeated.tokens[3:]
    ]
    assert found["runs"][0]["other"][-1] == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_relearning_is_that_of_the_released_model():
    model, repeated, validation = sink_model().eval(), documents(20, 20, 20, 20), documents(25)
    dropped = BaseGPT(model.config.to_base())
    dropped.load_state_dict(without_sinks(model.state_dict(), model.config))
    found, expected = (measure_relearning(one.eval(), repeated, validation, 64, [2], 3) for one in (model, dropped))
    assert found["runs"][0]["other"] == pytest.approx(expected["runs"][0]["other"], abs=1e-5)


def test_one_document_cannot_be_relearned():
    assert measure_relearning(plain_model().eval(), documents(20), documents(20), 64, [1], 5)["runs"] == []


def test_tied_embeddings_are_one_parameter_again():
    model = plain_model()
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach())  # as `load_state_dict` assigns
    trained = trainable_copy(model)
    assert trained.lm_head.weight is trained.transformer.wte.weight
    untied = trainable_copy(plain_model().bfloat16())
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.lm_head.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------- calibrated and quantised


def test_bias_learns_the_frequencies_of_tokens():
    model = plain_model().eval()
    model.lm_head.weight.data.zero_()
    scored = Scored([torch.tensor([0] + [3] * 30 + [7] * 10)], torch.tensor([-5]))
    bias = train_bias(model, scored, 64)
    assert bias.argsort(descending=True)[:2].tolist() == [3, 7]
    assert set(bias.round(decimals=2).tolist()[8:]) == {bias[8].round(decimals=2).item()}


def test_calibration_is_taught_by_other_documents():
    model = plain_model().eval()
    model.lm_head.weight.data.zero_()
    same = Scored([torch.full((20,), 3), torch.full((20,), 3)], torch.tensor([-5, -6]))
    different = Scored([torch.full((20,), 3), torch.full((20,), 7)], torch.tensor([-5, -6]))
    found = measure_calibrated(model, same, different, 64)
    untrained = 19 * math.log(512)
    assert all(nats < untrained - 5 for nats in found["repeated"]["nats"])
    assert all(nats > untrained for nats in found["validation"]["nats"])
    assert found["repeated"]["counts"] == [19, 19]
    again = measure_calibrated(model, first(same, 0, 1), different, 64)
    assert len(again["repeated"]["nats"]) == 1


def test_int8_round_trip_equals_pytorchs():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(5, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
    torch.testing.assert_close(int8_round_trip(weight), expected)
    assert int8_round_trip(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_quantised_losses_are_near_but_not_the_same():
    model, scored = plain_model().eval(), documents(30, 30)
    before = [parameter.clone() for parameter in model.parameters()]
    found = measure_quantised(model, scored, scored, 64)["repeated"]["nats"]
    exact = token_statistics(model, scored, 64, None)["nats"]
    assert found == pytest.approx(exact, rel=1e-2)
    assert found != pytest.approx(exact, rel=1e-7)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
