"""The paper's theorems: each simulation against its closed form, PyTorch or values by hand; counterexamples pinned."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.theory import accumulation, coadaptation, entanglement, forgetting
from litgpt_memsinks.theory.theory import COLUMNS, PARTS, cells
from litgpt_memsinks.theory.verdict import Verdict
from tests.console import REPOSITORY

few = settings(max_examples=12, deadline=None, derandomize=True)
some = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 1000)

entangled = st.builds(
    entanglement.Entanglement,
    rank=st.integers(3, 5),
    known=st.floats(0, 1.2),
    novelty=st.sampled_from([0.0, 0.3, 1.0]),
    once_noise=st.sampled_from([0.0, 0.5]),
    change=st.floats(1.1, 3),
    repeats=st.integers(1, 3),
    gamma=st.floats(0.5, 1),
    seed=seeds,
)
routed = st.builds(
    coadaptation.Coadaptation,
    dimension=st.integers(2, 6),
    outputs=st.integers(1, 3),
    earlier=st.integers(0, 5),
    steps=st.integers(1, 30),
    learning_rate=st.floats(0.01, 0.9),
    similarity=st.floats(0.05, 0.95),
    seed=seeds,
)
limits = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
signed_limits = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)
forgetful = st.builds(
    lambda similarities, **rest: forgetting.Forgetting(
        least_similarity=similarities[0], most_similarity=similarities[1], **rest
    ),
    signed_limits,
    vocabulary=st.integers(2, 12),
    width=st.integers(2, 8),
    memorising=st.integers(0, 10),
    steps=st.integers(1, 40),
    learning_rate=st.floats(0.01, 0.5),
    seed=seeds,
)
sunk = st.builds(
    lambda similarities, repeats, **rest: accumulation.Accumulation(
        least_similarity=similarities[0], most_similarity=similarities[1], repeats=repeats, **rest
    ),
    limits,
    st.integers(1, 10),
    vocabulary=st.integers(2, 12),
    width=st.integers(2, 8),
    steps=st.integers(10, 60),
    learning_rate=st.floats(0.01, 0.3),
    active=st.floats(0, 1),
    shared_share=st.floats(0, 1),
    seed=seeds,
)


# Theorems 3.1 and D.3


@given(setup=entangled)
@some
def test_documents_meet_every_assumption_of_the_paper(setup):
    data = entanglement.documents(setup)
    once, k = data.once_targets @ np.linalg.pinv(data.once), setup.rank
    singular_values = np.linalg.svd(once, compute_uv=False)
    assert np.linalg.matrix_rank(once, tol=1e-9) == k > 2
    assert singular_values.max() < 1 / (2 * k)
    np.testing.assert_allclose(once @ data.once, data.once_targets, atol=1e-12)
    np.testing.assert_allclose(once[:, data.semantic :], 0, atol=1e-12)  # span(V*) is semantic
    np.testing.assert_allclose(data.memorised[data.semantic :] @ data.once[data.semantic :], 0, atol=1e-12)
    assert np.linalg.norm(data.memorised[data.semantic :]) == pytest.approx(1)
    lacking = data.target - once @ data.memorised
    assert np.linalg.norm(lacking) == pytest.approx(setup.change)
    np.testing.assert_allclose(once.T @ lacking, 0, atol=1e-12)


@given(setup=entangled)
@few
def test_gradient_flow_ends_at_the_least_norm_fit(setup):
    data, flow = entanglement.run(setup)
    inputs, targets = np.column_stack([data.once, data.memorised]), np.column_stack([data.once_targets, data.target])
    least_norm = np.linalg.lstsq(inputs.T, targets.T, rcond=1e-10)[0].T
    np.testing.assert_allclose(flow.weights[-1], least_norm, atol=1e-8)
    np.testing.assert_allclose(entanglement.limit_of_flow(data), least_norm, atol=1e-10)
    distance = entanglement.distance_to_disentangled(flow.weights[-1], data)
    # definition D.1's formula, with a semantic v, never describes the end: it uses the noise feature
    noise_part = (flow.weights[-1] - entanglement.generalising_solution(data))[:, data.semantic :]
    assert np.linalg.norm(noise_part) == pytest.approx(setup.change / (1 + setup.novelty**2))
    # |q|^2 = 1 + novelty^2: no document seen once reaches the new semantic direction, nor the noise feature
    assert distance == pytest.approx(setup.change * setup.novelty / math.hypot(1, setup.novelty), abs=1e-7)
    assert distance == pytest.approx(
        entanglement.corrected_distance(setup.change, math.hypot(1, setup.novelty)), abs=1e-7
    )


def one_mode(target):
    return entanglement.Documents(np.zeros((1, 1)), np.zeros((1, 1)), np.ones(1), np.array([target]), 0)


@pytest.mark.parametrize(("target", "gamma"), [(1.0, 0.1), (2.0, 0.01), (0.5, 1.0)])
def test_gradient_flow_of_one_mode_takes_the_time_of_the_closed_form(target, gamma):
    flow = entanglement.gradient_flow(one_mode(target), repeats=1, gamma=gamma)
    middle = flow.weights[:, 0, 0] < 0.99 * target
    predicted = [entanglement.time_of_one_mode(w, target, gamma) for w in flow.weights[middle, 0, 0]]
    assert len(predicted) > 10
    np.testing.assert_allclose(flow.times[middle], predicted, rtol=1e-3, atol=1e-6)


def test_time_of_one_mode_by_hand():
    # target and gamma 1: dw/dt = 2 (1 - w) sqrt(1 + w^2); at w = 0 the speed is 2
    assert entanglement.time_of_one_mode(0.0, 1.0, 1.0) == 0
    assert entanglement.time_of_one_mode(1e-6, 1.0, 1.0) == pytest.approx(5e-7, rel=1e-4)


def test_gradient_flow_with_large_features_is_a_matrix_exponential():
    """Features of scale sqrt(2 gamma) hardly move, so W(t) = W (I - exp(-2 gamma t X X^T))."""
    data = entanglement.documents(entanglement.Entanglement())
    gamma, repeats = 3e3, 4
    flow = entanglement.gradient_flow(data, repeats, gamma)
    weighted = np.column_stack([data.once, math.sqrt(repeats) * data.memorised])
    for step in (3, 30, 300):
        decay = torch.linalg.matrix_exp(torch.tensor(-2 * gamma * flow.times[step] * weighted @ weighted.T)).numpy()
        expected = entanglement.limit_of_flow(data) @ (np.eye(len(decay)) - decay)
        np.testing.assert_allclose(flow.weights[step], expected, atol=1e-3)


def test_gradient_flow_keeps_the_balance_of_its_layers():
    _, flow = entanglement.run(setup := entanglement.Entanglement())
    balance = flow.features @ flow.features.T - flow.projection.T @ flow.projection
    np.testing.assert_allclose(balance, 2 * setup.gamma * np.eye(len(balance)), atol=1e-3)


def test_disentangled_solutions_have_distance_0_and_no_loss():
    data = entanglement.documents(entanglement.Entanglement())
    rng, noise = np.random.default_rng(1), data.memorised[data.semantic :]
    used = np.column_stack([data.once[data.semantic :], noise])
    free = rng.normal(size=len(noise))
    free -= used @ np.linalg.pinv(used) @ free
    assert np.linalg.norm(free) > 0.1
    v = np.concatenate([np.zeros(data.semantic), noise + free])
    delta = entanglement.change_needed(data)
    solution = entanglement.generalising_solution(data) + np.outer(delta, v)
    np.testing.assert_allclose(solution @ data.memorised, data.target)
    np.testing.assert_allclose(solution @ data.once, data.once_targets, atol=1e-12)
    assert entanglement.distance_to_disentangled(solution, data) == pytest.approx(0, abs=1e-12)
    moved = solution + 0.3 * np.outer(delta, np.eye(len(v))[0]) / np.linalg.norm(delta)  # a semantic direction
    assert entanglement.distance_to_disentangled(moved, data) == pytest.approx(0.3)


def test_counterexample_to_d3():
    """A memorised document whose semantic feature others have: gradient flow ends disentangled."""
    data, flow = entanglement.run(entanglement.Entanglement(novelty=0.0))
    disentangled = entanglement.generalising_solution(data)
    disentangled[:, data.semantic :] += np.outer(entanglement.change_needed(data), data.memorised[data.semantic :])
    np.testing.assert_allclose(flow.weights[-1], disentangled, atol=1e-9)


def test_flow_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(entanglement, "_MOST_STEPS", 5)
    with pytest.raises(MemSinksError, match="not at its end after 5 steps"):
        entanglement.run(entanglement.Entanglement())


# Theorems 4.1 and F.1


@given(setup=routed)
@some
def test_coadaptation_is_its_closed_form_and_within_the_corrected_bounds(setup):
    data, x = coadaptation.stream(setup)
    c, rate = coadaptation.least_similarity(data, x), setup.learning_rate
    assert c >= setup.similarity - 1e-12
    result = coadaptation.train(data, x, rate)
    memory = float(np.linalg.norm(result.memory))
    for steps, distance in enumerate(result.distances):
        exact = coadaptation.exact_distance(data.later[:steps], result.memory, x, rate)
        assert distance == pytest.approx(exact, abs=1e-12)
        lower = coadaptation.corrected_bound(steps, rate, c, float(np.linalg.norm(x)), memory)
        assert lower - 1e-12 <= distance <= coadaptation.ceiling(steps, rate, 1.0, memory) + 1e-12


def test_coadaptation_of_equal_documents_by_hand():
    # W_mem = gamma, and the general neuron cancels it: gamma (1 - (1 - gamma)^N)
    data, x = coadaptation.alike(30)
    result = coadaptation.train(data, x, 0.1)
    assert result.memory.item() == pytest.approx(0.1)
    np.testing.assert_allclose(result.distances, 0.1 * (1 - 0.9 ** np.arange(31)))
    # both corrected bounds are met exactly after one step
    assert coadaptation.corrected_bound(1, 0.1, 1.0, 1.0, 0.1) == pytest.approx(result.distances[1])
    assert coadaptation.ceiling(1, 0.1, 1.0, 0.1) == pytest.approx(result.distances[1])


def test_memory_is_the_error_at_the_memorised_document():
    """Two steps by hand: W_gen = gamma y s^T first, then W_mem = gamma (y_mem - W_gen s_mem) s_mem^T."""
    s, s_mem = np.array([1.0, 0.0]), np.array([0.6, 0.8])
    data = coadaptation.Stream(
        s[None], np.array([[2.0]]), s_mem, np.array([3.0]), np.array([[0.0, 1.0]]), np.array([[5.0]])
    )
    result = coadaptation.train(data, np.array([0.0, 1.0]), 0.5)
    error = 3 - 0.5 * 2 * 0.6
    np.testing.assert_allclose(result.memory, [[0.5 * error * 0.6, 0.5 * error * 0.8]])
    assert result.distances[1] == pytest.approx(0.5 * 0.5 * error * 0.8)  # gamma W_mem s s^T x


def test_printed_and_corrected_bound_of_f1_by_hand():
    assert coadaptation.printed_bound(3, 0.5, 0.2, 2.0) == pytest.approx(3 * 0.5 * 0.125 * 0.04 * 2)
    assert coadaptation.corrected_bound(3, 0.1, 0.5, 2.0, 0.3) == pytest.approx(3 * 0.1 * 0.5 * (0.5 - 0.1) * 2 * 0.3)
    assert coadaptation.corrected_bound(7, 0.1, 0.5, 2.0, 0.3) == 0  # gamma (N - 1) > c


def test_counterexamples_to_f1():
    missing, index, orthogonal, cancelled = coadaptation.counterexamples()
    assert (missing.measured, missing.bound) == (pytest.approx(0.01), pytest.approx(0.09))
    assert (index.measured, index.bound) == (0, pytest.approx(0.09))
    assert (orthogonal.measured, orthogonal.bound) == (0, pytest.approx(0.1 * 0.9 * 0.36 * 0.1))
    assert cancelled.measured == pytest.approx(0, abs=1e-15)
    assert cancelled.bound == pytest.approx(2 * 0.5 * 0.25 * 0.09**2 * 0.5)
    assert not any(verdict.holds for verdict in (missing, index, orthogonal, cancelled))
    data, x = coadaptation.cancelling()
    rows = np.vstack([data.later, data.memorised, x])
    gram = rows @ rows.T
    np.testing.assert_allclose(np.diag(gram), 1)
    assert gram.min() == pytest.approx(0.09)


def test_gram_matrix_of_no_vectors():
    with pytest.raises(MemSinksError, match="least eigenvalue"):
        coadaptation.from_gram(np.array([[1.0, 2.0], [2.0, 1.0]]))


# Theorems H.1 and H.2


@given(logits=st.lists(st.floats(-3, 3), min_size=2, max_size=12))
@some
def test_probabilities_of_bounded_logits(logits):
    C = 2 * max(abs(value) for value in logits)
    c_min, c_max = forgetting.probability_bounds(C, len(logits))
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    np.testing.assert_allclose(forgetting.softmax(np.array(logits)), probabilities.numpy())
    assert c_min - 1e-12 <= probabilities.min()
    assert probabilities.max() <= c_max + 1e-12


def sgd(features, tokens, vocabulary, rate):
    """The same by PyTorch: its cross entropy, its gradients, its optimizer."""
    layer = torch.nn.Linear(features.shape[1], vocabulary, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    for z, token in zip(features, tokens, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(torch.tensor(z)), torch.tensor(token)).backward()
        optimizer.step()
    return layer.weight.detach().numpy()


def test_training_is_sgd_on_the_cross_entropy():
    rng = np.random.default_rng(0)
    features, tokens = rng.normal(size=(20, 5)), rng.integers(0, 4, 20)
    result = forgetting.train(features, tokens, 4, 0.3)
    np.testing.assert_allclose(result.weights[-1], sgd(features, tokens, 4, 0.3), atol=1e-12)
    assert result.largest_norm == pytest.approx(max(np.linalg.svd(w)[1][0] for w in result.weights))


@given(count=st.integers(2, 9), width=st.integers(2, 9), similarities=signed_limits, seed=seeds)
@some
def test_features_have_the_similarities_asked_for(count, width, similarities, seed):
    rows = forgetting.similar_features(np.random.default_rng(seed), count, width, *similarities)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    products = rows[1:] @ rows[0]
    assert (products.min(), products.max()) == (pytest.approx(similarities[0]), pytest.approx(similarities[1]))


@given(setup=forgetful)
@some
def test_forgetting_is_within_its_bounds(setup):
    logits, C = forgetting.run(setup)
    c_min, c_max = forgetting.probability_bounds(C, setup.vocabulary)
    start, rate, epsilon = logits[0], setup.learning_rate, setup.least_similarity
    for steps, logit in enumerate(logits):
        corrected = forgetting.corrected_bound(start, rate, steps, epsilon, c_min, c_max)
        assert logit <= corrected + 1e-12
        if epsilon >= 0:
            assert corrected == forgetting.printed_bound(start, rate, steps, epsilon, c_min)
            assert logit >= forgetting.fastest(start, rate, steps, setup.most_similarity, c_max) - 1e-12


def test_forgetting_starts_after_memorising():
    logits, _ = forgetting.run(forgetting.Forgetting(memorising=1, steps=5, vocabulary=4, learning_rate=0.1))
    assert len(logits) == 6
    assert logits[0] == pytest.approx(0.1 * 3 / 4)


def test_counterexample_to_h2():
    """Opposite features, two tokens, one step from 0: the memorised logit rises by gamma / 2, not by gamma c_min."""
    setup = forgetting.Forgetting(
        vocabulary=2, width=2, memorising=0, steps=1, learning_rate=0.1, least_similarity=-1, most_similarity=-1
    )
    (start, end), C = forgetting.run(setup)
    assert (start, end) == (0, pytest.approx(0.05))
    assert pytest.approx(0.1 * math.sqrt(2)) == C  # twice the norm of 0.1 (-1/2, 1/2)
    c_min, _ = forgetting.probability_bounds(C, 2)
    assert end > forgetting.printed_bound(0, 0.1, 1, -1, c_min) == pytest.approx(0.1 * math.exp(-C) / 2)


# Theorem H.3


@given(setup=sunk)
@some
def test_accumulation_is_within_the_corrected_bounds(setup):
    result = accumulation.run(setup)
    assert result.shared <= accumulation.corrected_shared_bound(setup, result.c_min) + 1e-12
    assert result.shared <= accumulation.shared_bound(setup, result.c_min) + 1e-12
    assert result.sinks >= accumulation.corrected_sink_bound(setup, result.c_max) - 1e-12


@given(
    steps=st.integers(500, 5000),
    repeats=st.integers(1, 5),
    shared_share=st.floats(0.3, 0.6),
    least=st.floats(0.5, 0.8),
    most=st.floats(0.8, 1),
)
@some
def test_corrected_threshold_is_where_the_corrected_bounds_meet(steps, repeats, shared_share, least, most):
    setup = accumulation.Accumulation(
        steps=steps, repeats=repeats, shared_share=shared_share, least_similarity=least, most_similarity=most
    )
    limit = accumulation.corrected_threshold(setup, c_min=0.04, c_max=0.11)
    there = replace(setup, active=limit)  # in [0, 1], or it would be refused
    meeting = accumulation.corrected_shared_bound(there, c_min=0.04)
    assert accumulation.corrected_sink_bound(there, c_max=0.11) == pytest.approx(meeting, abs=1e-12)


def test_accumulation_is_sgd_with_sinks_switched_off():
    setup = accumulation.Accumulation(steps=40, repeats=4, active=0.5, vocabulary=5, width=3, learning_rate=0.2)
    data, rows = accumulation.documents(setup), accumulation.order(setup)
    assert data.on.sum() == 1 + 18
    assert np.bincount(rows).tolist() == [4] + [1] * 36
    assert np.flatnonzero(rows == 0).tolist() == [0, 10, 20, 30]
    tokens = np.concatenate([[0], np.random.default_rng(5).integers(1, 5, 36)])
    result = accumulation.outcome(data, tokens, rows, 5, 0.2)
    masked = np.hstack([data.shared, data.sinks * data.on[:, None]])
    weights = sgd(masked[rows], tokens[rows], 5, 0.2)
    assert result.shared == pytest.approx(weights[0, :3] @ data.shared[0])
    assert result.sinks == pytest.approx(weights[0, 3:] @ data.sinks[0])


def test_counterexamples_to_h3():
    length, direction, threshold = accumulation.counterexamples()
    # one step from 0: each half of the features gives 0.1 (1 - 1/10) / 2; |W| = 0.1 sqrt(9/10)
    assert length.measured == pytest.approx(0.045)
    assert length.bound == pytest.approx(0.1 * (1 - math.exp(0.2 * math.sqrt(0.9)) / 9))
    # one step up by 0.009, then 100 steps down by about 0.01 / 10 times similarities of mean 1/2
    assert direction.measured == pytest.approx(0.009 - 100 * 0.01 / 10 / 2, rel=0.1)
    assert direction.bound == pytest.approx(0.01 * 0.87, rel=0.01)
    # with no other document in the sinks, ten steps each: shared is nine times as strong
    assert threshold.measured < -0.05
    assert not any(verdict.holds for verdict in (length, direction, threshold))


def test_printed_threshold_does_not_follow_from_the_printed_bounds():
    """Length 1 of both parts aside: with c in [.09, .12], similarity .5 and rho = .72 the bounds do not part."""
    setup = accumulation.Accumulation(
        steps=100, repeats=10, learning_rate=1, active=0.72, shared_share=0.5, least_similarity=1, most_similarity=1
    )
    assert accumulation.printed_threshold(setup, 0.09, 0.12) == pytest.approx(0.75 - 0.03 / 9)
    assert accumulation.shared_bound(setup, 0.09) == pytest.approx(9.1 - 4.05)
    assert accumulation.printed_sink_bound(setup, 0.12) == pytest.approx(8.8 - 3.888)
    assert accumulation.threshold_of_printed_bounds(setup, 0.5, 0.09, 0.12) == pytest.approx(0.75 - 1 / 18)


# The command


@pytest.fixture(scope="module")
def all_verdicts():
    return {name: part.verdicts(part.setup) for name, part in PARTS.items()}


def test_documentation_has_the_table_that_the_command_prints(all_verdicts):
    page = (REPOSITORY / "docs/theory.md").read_text(encoding="utf-8")
    for verdicts in all_verdicts.values():
        for verdict in verdicts:
            assert "| " + " | ".join(cell.replace("|", "\\|") for cell in cells(verdict)) + " |" in page


@pytest.mark.parametrize("name", sorted(PARTS))
def test_documentation_shows_every_figure(name):
    assert f"(figures/theory_{name}.svg)" in (REPOSITORY / "docs/theory.md").read_text(encoding="utf-8")
    assert 1_000 < (REPOSITORY / f"docs/figures/theory_{name}.svg").stat().st_size < 60_000


def test_what_is_corrected_holds_and_every_theorem_is_there(all_verdicts):
    verdicts = [verdict for part in all_verdicts.values() for verdict in part]
    assert all(verdict.holds for verdict in verdicts if verdict.version == "corrected")
    assert {verdict.theorem for verdict in verdicts} >= {"D.3", "D.5", "F.1", "4.1", "H.2", "H.3 (1)", "H.3 (2)"}


def test_command_writes_numbers_and_figures(tmp_path, capsys, all_verdicts):
    out_dir = tmp_path / "theory"
    main(["theory", "--out_dir", str(out_dir)])
    output = capsys.readouterr().out
    assert all(column in output for column in COLUMNS)
    content = json.loads((out_dir / "theory.json").read_text(encoding="utf-8"))
    assert {name: part["verdicts"] for name, part in content.items()} == {
        name: [
            {
                **verdict.row(),
                "measured": pytest.approx(verdict.measured, abs=1e-9),
                "bound": pytest.approx(verdict.bound),
            }
            for verdict in verdicts
        ]
        for name, verdicts in all_verdicts.items()
    }
    assert content["forgetting"]["setup"]["learning_rate"] == 0.05
    assert sorted(path.name for path in out_dir.iterdir()) == sorted(
        [*(f"{name}.svg" for name in PARTS), "theory.json"]
    )
    for name in PARTS:
        svg = (out_dir / f"{name}.svg").read_text(encoding="utf-8")
        committed = (REPOSITORY / f"docs/figures/theory_{name}.svg").read_text(encoding="utf-8")
        assert written_in(svg) == written_in(committed)
    assert output.count("NO") == sum(not verdict.holds for part in all_verdicts.values() for verdict in part) == 12


def written_in(svg):
    """Titles, labels and legends; not the ticks, which differ between releases of matplotlib."""
    return {text for text in re.findall("<text[^>]*>([^<]*)</text>", svg) if re.search("[a-zγρN]", text)}


def test_command_takes_one_theorem(tmp_path, capsys):
    main(["theory", "--theorem", "forgetting", "--out_dir", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["forgetting.svg", "theory.json"]
    assert list(json.loads((tmp_path / "out" / "theory.json").read_text(encoding="utf-8"))) == ["forgetting"]
    assert capsys.readouterr().out.count("NO") == 1


def test_command_does_not_overwrite(tmp_path):
    (tmp_path / "theory.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"exists and is not overwritten"):
        main(["theory", "--out_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (entanglement.Entanglement, "rank", [2]),
        (entanglement.Entanglement, "known", [-0.1]),
        (entanglement.Entanglement, "novelty", [-0.1]),
        (entanglement.Entanglement, "once_noise", [-0.1]),
        (entanglement.Entanglement, "change", [1.0]),
        (entanglement.Entanglement, "repeats", [0]),
        (entanglement.Entanglement, "gamma", [0.0]),
        (coadaptation.Coadaptation, "dimension", [1]),
        (coadaptation.Coadaptation, "outputs", [0]),
        (coadaptation.Coadaptation, "earlier", [-1]),
        (coadaptation.Coadaptation, "steps", [0]),
        (coadaptation.Coadaptation, "learning_rate", [0.0, 1.0]),
        (coadaptation.Coadaptation, "similarity", [0.0, 1.0]),
        (forgetting.Forgetting, "vocabulary", [1]),
        (forgetting.Forgetting, "width", [1]),
        (forgetting.Forgetting, "memorising", [-1]),
        (forgetting.Forgetting, "steps", [0]),
        (forgetting.Forgetting, "learning_rate", [0.0]),
        (forgetting.Forgetting, "least_similarity", [-1.1, 1.1]),
        (forgetting.Forgetting, "most_similarity", [0.1, 1.1]),
        (accumulation.Accumulation, "vocabulary", [1]),
        (accumulation.Accumulation, "width", [1]),
        (accumulation.Accumulation, "repeats", [0, 1001]),
        (accumulation.Accumulation, "learning_rate", [0.0]),
        (accumulation.Accumulation, "active", [-0.1, 1.1]),
        (accumulation.Accumulation, "shared_share", [-0.1, 1.1]),
        (accumulation.Accumulation, "least_similarity", [-0.1, 1.1]),
        (accumulation.Accumulation, "most_similarity", [0.1, 1.1]),
    ],
)
def test_setting_outside_its_limits_is_refused(kind, name, values):
    for value in values:
        with pytest.raises(MemSinksError, match=rf"{name} is {value}, but it must be .*") as caught:
            kind(**{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("relation", "holds"), [("<=", [True, True, False]), (">=", [False, True, True]), ("=", [False, True, False])]
)
def test_verdict_compares(relation, holds):
    measured = [0.9, 1 + 1e-8, 1.1]
    assert [Verdict("T", "printed", "", "", value, relation, 1.0).holds for value in measured] == holds
    assert [Verdict("T", "printed", "", "", value, ">", 1.0).holds for value in measured] == [False, False, True]
