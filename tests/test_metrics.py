"""Each equation against a value worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_roc
from torchmetrics.functional.text import edit_distance, rouge_score

from litgpt_memsinks.metrics import (
    IGNORED,
    auc,
    common_prefix,
    common_subsequence,
    degradation,
    document_losses,
    exact_match,
    extraction_strength,
    gap_closed,
    levenshtein,
    lowest_mean,
    memorisation_gap,
    memorisation_gap_closed,
    relative_change,
    roc,
    rouge_l,
    sequence_forgetting,
    standardised,
    tpr_at_fpr,
)


def test_document_losses():
    # two tokens with odds 3:1, so -log(3/4) and -log(1/4)
    logits = torch.log(torch.tensor([[[3.0, 1.0], [1.0, 3.0]], [[1.0, 3.0], [3.0, 1.0]]]))
    targets = torch.tensor([[0, 0], [0, IGNORED]])
    nats, counts = document_losses(logits, targets)
    torch.testing.assert_close(
        nats, torch.tensor([math.log(4 / 3) + math.log(4), math.log(4)], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    assert counts.tolist() == [2, 1]


def test_document_without_targets_has_no_loss():
    nats, counts = document_losses(torch.zeros(1, 2, 3), torch.full((1, 2), IGNORED))
    assert nats.tolist() == [0.0]
    assert counts.tolist() == [0]


@pytest.mark.parametrize(("repeated", "closed"), [(0.2, 0.0), (1.2, 1.0), (0.7, 0.5), (1.7, 1.5), (0.1, -0.1)])
def test_gap_closed(repeated, closed):
    assert gap_closed(repeated, repeated_standard=0.2, repeated_left_out=1.2) == pytest.approx(closed)


def test_gap_closed_without_a_gap_is_nan():
    assert math.isnan(gap_closed(1.0, 0.5, 0.5))


def test_relative_change():
    assert relative_change(1.1, 1.0) == pytest.approx(0.1)
    assert relative_change(0.9, 1.0) == pytest.approx(-0.1)


def test_gaps_and_what_removal_changes():
    assert memorisation_gap(validation=3.0, repeated=0.5) == 2.5
    assert memorisation_gap_closed(0.5, 2.5) == pytest.approx(0.8)
    assert math.isnan(memorisation_gap_closed(0.5, 0.0))
    assert sequence_forgetting(repeated_after=2.0, repeated_before=0.5) == 1.5
    assert degradation(validation_before=2.0, validation_after=2.25) == -0.25


@pytest.mark.parametrize(
    ("correct", "matched", "strength"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 0, 1, 0], 0.5, 0.0),  # the last is not predicted after any prefix
        ([1, 1, 0, 1], 0.75, 0.25),
    ],
)
def test_teacher_forced(correct, matched, strength):
    correct = np.array(correct, dtype=bool)
    assert exact_match(correct) == matched
    assert extraction_strength(correct) == strength


@pytest.mark.parametrize("metric", [exact_match, extraction_strength, lambda empty: lowest_mean(empty, 0.2)])
def test_document_without_targets_has_no_value(metric):
    assert math.isnan(metric(np.array([], dtype=bool)))


GENERATED = np.array([[1, 2, 3, 4], [1, 2, 9, 4], [5, 6, 7, 8], [2, 3, 4, 1]])
TRUTH = np.array([[1, 2, 3, 4]] * 4)


def test_continuations_by_hand():
    assert common_prefix(GENERATED, TRUTH).tolist() == [4, 2, 0, 0]
    assert common_subsequence(GENERATED, TRUTH).tolist() == [4, 3, 0, 3]
    assert rouge_l(GENERATED, TRUTH).tolist() == [1.0, 0.75, 0.0, 0.75]
    assert levenshtein(GENERATED, TRUTH).tolist() == [0.0, 0.25, 1.0, 0.5]


def test_continuations_of_nothing():
    empty, none = np.zeros((2, 0), dtype=np.int64), np.zeros((0, 4), dtype=np.int64)
    assert common_prefix(empty, empty).tolist() == rouge_l(empty, empty).tolist() == [0, 0]
    assert levenshtein(empty, empty).tolist() == [0, 0]
    assert levenshtein(empty, TRUTH[:2]).tolist() == [1, 1]
    assert rouge_l(none, none).tolist() == levenshtein(none, none).tolist() == []


def test_continuations_equal_torchmetrics():
    rng = np.random.default_rng(0)
    generated, truth = rng.integers(0, 4, (20, 9)), rng.integers(0, 4, (20, 7))
    edits, scores = levenshtein(generated, truth) * 9, rouge_l(generated, truth)
    for row in range(20):
        words = [" ".join(map(str, tokens)) for tokens in (generated[row], truth[row])]
        expected = edit_distance(*[[text.replace(" ", "")] for text in words], reduction="sum")
        assert edits[row] == pytest.approx(expected.item())
        expected = rouge_score(*words, rouge_keys="rougeL", tokenizer=str.split)["rougeL_fmeasure"]
        assert scores[row] == pytest.approx(expected.item())


def test_lowest_mean():
    values = np.array([-1.0, -5.0, -3.0, -2.0, -4.0])
    assert lowest_mean(values, 0.4) == -4.5
    assert lowest_mean(values, 0.1) == -5.0  # one at least
    assert lowest_mean(values, 1.0) == -3.0


def test_standardised():
    found = standardised(np.array([-1.0, -2.0]), np.array([-3.0, -2.0]), np.array([0.5, 0.0]))
    assert found.tolist() == [4.0, 0.0]


def test_auc_by_hand():
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert auc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == 0.375  # of 4 pairs: 1 won, 1 tied
    assert math.isnan(auc(np.array([]), np.array([1.0])))
    assert tpr_at_fpr(np.array([1.0, 3.0, 5.0]), np.array([0.0, 2.0, 4.0]), 0.4) == pytest.approx(2 / 3)
    assert tpr_at_fpr(np.array([1.0]), np.array([1.0]), 0.001) == 0.0
    assert math.isnan(tpr_at_fpr(np.array([1.0]), np.array([]), 0.5))


def test_roc_equals_torchmetrics():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 70).round(1)
    scores = torch.tensor(np.concatenate((members, others)))
    scores = scores.sub(scores.min()).div(10)  # torchmetrics takes what is outside of [0, 1] for logits
    labels = torch.tensor([1] * 30 + [0] * 70)
    assert auc(members, others) == pytest.approx(binary_auroc(scores, labels).item(), abs=1e-6)
    false, true = roc(members, others)
    expected_false, expected_true, _ = binary_roc(scores, labels)
    assert np.allclose(false, expected_false)
    assert np.allclose(true, expected_true)
    for level in (0.001, 0.01, 0.2):
        assert tpr_at_fpr(members, others, level) == pytest.approx(expected_true[expected_false <= level].max().item())
