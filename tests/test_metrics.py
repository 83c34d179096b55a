"""Each equation against a value worked out by hand."""

import math

import pytest
import torch

from litgpt_memsinks.metrics import IGNORED, document_losses, gap_closed, relative_change


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
