"""Intervals against their known width, and what cannot have one."""

import math

import numpy as np
import pytest

from litgpt_memsinks.evaluate.bootstrap import Bootstrap


def test_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = Bootstrap(draws=2000).mean(values)
    error = values.std() / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["n"] == 400
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    narrow = Bootstrap(draws=2000, level=0.5).mean(values)
    assert narrow["high"] - narrow["low"] == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_documents_are_drawn_whole():
    """Two kinds of documents: tokens drawn one by one would have an interval ten times as narrow."""
    found = Bootstrap().loss([100.0] * 10 + [300.0] * 10, [100] * 20)
    assert found["value"] == 2.0
    assert found["targets"] == 2000
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / math.sqrt(20), rel=0.25)


def test_loss_is_a_mean_over_targets():
    found = Bootstrap(draws=10).loss([4.0, 1.0, 0.0], [1, 4, 0])
    assert found["value"] == 1.0
    assert found["n"] == 2  # the third has nothing to predict


def test_what_is_compared_is_drawn_together():
    base = np.random.default_rng(0).normal(0, 10, 50)
    pair = np.stack([base, base + 1])
    found = Bootstrap().value(lambda drawn: float((pair[1, drawn] - pair[0, drawn]).mean()), (50,))
    assert (found["low"], found["high"]) == pytest.approx((1, 1))


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_no_documents(values):
    assert Bootstrap().mean(values) == {"value": None, "low": None, "high": None, "n": 0}


def test_one_document_has_no_interval():
    assert Bootstrap().mean([2.0]) == {"value": 2.0, "low": None, "high": None, "n": 1}


def test_no_draws_no_interval():
    assert Bootstrap(draws=0).mean([2.0, 3.0])["low"] is None


def test_several_seeds_widen_the_interval():
    values = np.array([[1.0] * 30, [2.0] * 30])
    found = Bootstrap().value(lambda seeds, drawn: float(values[np.ix_(seeds, drawn)].mean()), (2, 30), n=30)
    assert (found["low"], found["high"], found["n"]) == (1.0, 2.0, 30)
