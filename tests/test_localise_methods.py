"""Each method against values by hand, weights edited by hand, and plain loops over whole prefixes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.data.scored import Scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.localise import hard_concrete as localise_hard_concrete
from litgpt_memsinks.localise.activation import activation, written
from litgpt_memsinks.localise.gradients import attribution, integrated_gradients, midpoints
from litgpt_memsinks.localise.hard_concrete import (
    HardConcreteArgs,
    hard_concrete,
    initial_score,
    penalty,
    sampled_mask,
    settled_mask,
)
from litgpt_memsinks.localise.neurons import changed, dropped, kept_neurons, suffixes
from litgpt_memsinks.localise.random import random
from litgpt_memsinks.localise.scores import LocaliseArgs, score_neurons, work
from litgpt_memsinks.localise.zero_out import zero_out
from litgpt_memsinks.metrics import IGNORED

SMALL = dict(
    name="small", n_layer=2, n_embd=16, n_head=2, block_size=32, vocab_size=40, padded_vocab_size=40,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", intermediate_size=12,
)  # fmt: skip
KINDS = {
    "llama": {"mlp_class_name": "LLaMAMLP"},
    "gemma, grouped queries": {"mlp_class_name": "GemmaMLP", "n_query_groups": 1},
    "gpt-neox": {"mlp_class_name": "GptNeoxMLP", "bias": True, "parallel_residual": True},
}


def build(kind="llama"):
    """A model whose MLPs matter, frozen."""
    torch.manual_seed(0)
    model = BaseGPT(Config(**{**SMALL, **KINDS[kind]}))
    for name, parameter in model.named_parameters():
        if "mlp" in name or "wte" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval().requires_grad_(False)


def documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 40, (length,), generator=generator) for length in lengths]
    return Scored(tokens, torch.arange(len(lengths)) + 5, [7 + length for length in lengths], ["a"] * len(lengths))


def batch(*lengths, prefix=4, block=32):
    return suffixes(documents(*lengths), range(len(lengths)), prefix, block)


# ------------------------------------------------------------------------------------------------ suffixes and neurons


def test_targets_are_the_suffix_or_the_second_half_of_short_documents():
    given = documents(8, 5, 3, 20)
    found = suffixes(given, range(4), prefix_length=4, block_size=12)
    for row, (first, last) in enumerate([(4, 8), (2, 5), (1, 3), (4, 13)]):
        wanted = [IGNORED] * (first - 1) + given.tokens[row][first:last].tolist()
        assert found.targets[row].tolist() == wanted + [IGNORED] * (12 - len(wanted))
        assert found.inputs[row, : last - 1].tolist() == given.tokens[row][: last - 1].tolist()


def test_the_largest_scores_of_each_layer_are_dropped():
    scores = torch.tensor([[[0.1, 0.9, 0.5, 0.7], [3.0, 3.0, 3.0, -1.0]]])
    assert kept_neurons(scores, 0.5).tolist() == [[[True, False, True, False], [False, False, True, True]]]
    assert kept_neurons(scores, 0.74).tolist() == kept_neurons(scores, 0.5).tolist()  # int(2.96)
    assert kept_neurons(scores, 0.5, first_layer=1)[0, 0].all()
    assert kept_neurons(scores, 0.0).all()
    assert not kept_neurons(scores, 1.0).any()
    # .29 * 100 is 28.999999999999996 in binary
    assert int((~kept_neurons(torch.rand(1, 1, 100), 0.29)).sum()) == 29


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_is_zeroing_the_weights(kind):
    model, tokens = build(kind), torch.stack(documents(20, 20, 20).tokens)
    keep = torch.rand(3, 2, 12, generator=torch.Generator().manual_seed(2)) > 0.4
    with dropped(model, keep):
        found = model(tokens)
    for row in range(3):
        edited = copy.deepcopy(model)
        for layer, block in enumerate(edited.transformer.h):
            block.mlp.proj.weight[:, ~keep[row, layer]] = 0.0
        torch.testing.assert_close(found[row], edited(tokens)[row], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, model(tokens))  # and the hooks are gone


# -------------------------------------------------------------------------------------------------------- hard concrete


def test_masks_and_penalty_by_hand():
    s = math.log(5)  # q = (.9 + .1) / 1.2 = 5/6
    assert initial_score(0.9) == pytest.approx(s)
    assert settled_mask(torch.tensor(s)).item() == pytest.approx(0.9)
    assert settled_mask(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]  # z = .047, .953
    noise, beta = torch.tensor([0.5, 0.2]), 0.5
    z = [1 / (1 + math.exp(-0.4 / beta)), 1 / (1 + math.exp(-(math.log(0.25) + 0.4) / beta))]
    expected = [max(0.0, 1.2 * value - 0.1) for value in z]
    assert sampled_mask(torch.full((2,), 0.4), noise, beta).tolist() == pytest.approx(expected)
    # -β log(-l/r) = β log 11
    low, high = (1 / (1 + math.exp(-(value + 0.33 * math.log(11)))) for value in (-1.0, 2.0))
    assert penalty(torch.tensor([[[-1.0, 2.0]], [[2.0, 2.0]]]), 0.33).tolist() == pytest.approx(
        [(low + high) / 2, high]
    )


SHORT = HardConcreteArgs(penalty=2.0, iterations=12, learning_rate=0.05)


def test_documents_of_a_batch_are_localised_as_if_alone():
    model, together = build(), batch(20, 11, 15)
    found = hard_concrete(model, together, SHORT, seed=3)[0]
    for row in range(3):
        alone = hard_concrete(model, together[[row]], SHORT, seed=3)[0]
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert not torch.allclose(found, hard_concrete(model, together, SHORT, seed=4)[0], atol=1e-2)


def test_one_step_follows_the_gradient_of_loss_and_penalty():
    """Against autograd through weights that are masked, one document at a time, then Adam's first step: the sign."""
    model, one = build(), batch(14)
    noise = torch.rand(2, 12, generator=localise_hard_concrete.noise_of(one.digests[0], 3)) * (1 - 2e-4) + 1e-4
    scores = torch.full((2, 12), initial_score(0.9), requires_grad=True)
    weights = {
        f"transformer.h.{layer}.mlp.proj.weight": block.mlp.proj.weight * sampled_mask(scores, noise, 0.33)[layer]
        for layer, block in enumerate(model.transformer.h)
    }
    logits = torch.func.functional_call(model, weights, (one.inputs,))
    loss = F.cross_entropy(logits[0, 3:], one.targets[0, 3:]) + 2.0 * penalty(scores[None], 0.33)[0]
    loss.backward()
    expected = torch.sigmoid(initial_score(0.9) - 0.05 * scores.grad.sign())
    found = hard_concrete(model, one, SHORT, seed=3, at=[1])[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert len(set(scores.grad.sign().flatten().tolist())) == 2  # some neurons are needed, some are not


def test_a_longer_training_passes_through_the_shorter_ones():
    model, given = build(), batch(20, 11)
    at = hard_concrete(model, given, SHORT, seed=3, at=[12, 5])
    assert torch.equal(at[0], hard_concrete(model, given, SHORT, seed=3)[0])
    short = HardConcreteArgs(penalty=2.0, iterations=5, learning_rate=0.05)
    assert torch.equal(at[1], hard_concrete(model, given, short, seed=3)[0])


def test_pooled_mask_is_the_same_however_documents_are_batched():
    model, given = build(), batch(20, 11, 15)
    whole = hard_concrete(model, given, SHORT, seed=3, pooled=True)[0]
    assert whole.shape == (1, 2, 12)
    parts = hard_concrete(model, given, SHORT, seed=3, pooled=True, at_once=2)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_frozen_layer_has_no_mask_at_all(monkeypatch):
    """The reference code does not train it, but goes on sampling it."""
    seen = []

    def noted(model, change):
        hidden = torch.ones(1, 3, 12)
        seen.append([torch.equal(change(layer, hidden), hidden) for layer in (0, 1)])
        return changed(model, change)

    monkeypatch.setattr(localise_hard_concrete, "changed", noted)
    found = hard_concrete(build(), batch(14), SHORT, seed=3, first_layer=1)[0]
    assert seen == [[True, False]] * 12
    assert not found[0, 0].any()
    assert found[0, 1].min() > 0


def planted(neuron, layer, token):
    """A model in which one neuron, always on, says `token`, and all others say little."""
    model = build("gpt-neox")
    for block in model.transformer.h:
        block.mlp.proj.weight *= 0.02
    mlp = model.transformer.h[layer].mlp
    mlp.fc.weight[neuron], mlp.fc.bias[neuron] = 0.0, 3.0
    mlp.proj.weight[:, neuron] = 30 * F.normalize(model.lm_head.weight[token], dim=0)
    return model


@pytest.mark.parametrize("mode", ["per_sequence", "pooled"])
@pytest.mark.parametrize("method", ["hard_concrete", "integrated_gradients", "activation", "zero_out"])
def test_a_planted_neuron_is_found(method, mode):
    """It alone carries the suffix, so it has the highest score of its layer by far."""
    model = planted(neuron=7, layer=1, token=3)
    given = documents(6, 6)
    given.tokens = [torch.cat((tokens, torch.full((10,), 3))) for tokens in given.tokens]
    settings = HardConcreteArgs(penalty=20.0, iterations=60, learning_rate=0.1)
    args = LocaliseArgs(method, mode, prefix_length=7, hard_concrete=settings)
    scores = score_neurons(model, suffixes(given, [0, 1], 7, 32), args)
    assert scores.shape == (1 if mode == "pooled" else 2, 2, 12)
    assert (scores[:, 1].argmax(-1) == 7).all()
    highest, second = scores[:, 1].topk(2).values.unbind(-1)
    assert (highest > 2 * second.abs()).all()


# ------------------------------------------------------------------------------------------------- integrated gradients


def test_attribution_by_hand():
    assert midpoints(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    a, w = torch.tensor([[2.0, -3.0]]), torch.tensor([5.0, 0.5])
    # f = w·a: the gradient is w everywhere, and each neuron has what it adds
    assert attribution(a, w.expand(8, 1, 2)).tolist() == [[10.0, -1.5]]
    # f = (w·a)^2 at 2·5 - 3·.5 = 8.5: the gradient at ka is 2k(w·a)w, its mean over midpoints is exactly (w·a)w
    gradients = (2 * midpoints(3)[:, None, None] * 8.5 * w).expand(3, 1, 2)
    found = attribution(a, gradients)
    assert found.tolist()[0] == pytest.approx([10 * 8.5, -1.5 * 8.5])
    assert float(found.sum()) == pytest.approx(8.5**2)


def likelihood(model, prefix, token, layer, factor):
    """p(token) after the prefix, with the last position's activations of one layer times a factor; no cache."""

    def scale(at, hidden):
        if at != layer:
            return hidden
        return torch.cat((hidden[:, :-1], factor * hidden[:, -1:]), 1)

    with changed(model, scale):
        return model(prefix[None])[0, -1].softmax(-1)[token]


def test_attributions_sum_to_what_the_layer_adds():
    model, given = build(), documents(9)
    one = suffixes(given, [0], 4, 32)
    one.targets[:, :-1] = IGNORED
    prefix, token = given.tokens[0][:8], given.tokens[0][8]
    for layer in range(2):
        added = float(likelihood(model, prefix, token, layer, 1.0) - likelihood(model, prefix, token, layer, 0.0))
        errors = [abs(float(integrated_gradients(model, one, steps)[0, layer].sum()) - added) for steps in (4, 16, 64)]
        assert abs(added) > 1e-3
        assert errors[2] < 2e-3 * abs(added)
        # the midpoint rule's error falls by 16 when steps are 4 times as many, that of both ends by 4
        assert errors[1] < errors[0] / 8
        assert errors[2] < errors[1] / 8


@pytest.mark.parametrize("kind", KINDS)
def test_cached_prefixes_change_nothing(kind):
    """Against whole prefixes, one document, position and step at a time: the definition, word for word."""
    model, given, steps = build(kind), documents(9, 7), 3
    found = integrated_gradients(model, suffixes(given, [0, 1], 4, 32), steps)
    for row, tokens in enumerate(given.tokens):
        first = min(4, len(tokens) // 2)
        expected = torch.zeros(2, 12)
        for end in range(first, len(tokens)):
            for layer in range(2):
                for k in range(steps):
                    expected[layer] += gradient(model, tokens[:end], tokens[end], layer, (k + 0.5) / steps) / steps
        torch.testing.assert_close(found[row], expected / (len(tokens) - first), rtol=1e-3, atol=1e-6)
    assert model.mask_cache is None  # the cache is gone


def gradient(model, prefix, token, layer, alpha):
    """a · dp/d(αa) of the last position."""
    scaled = {}

    def scale(at, hidden):
        if at != layer:
            return hidden
        scaled["a"] = hidden[:, -1].clone()
        scaled["x"] = (alpha * scaled["a"]).requires_grad_()
        return torch.cat((hidden[:, :-1], scaled["x"][:, None]), 1)

    with changed(model, scale):
        likely = model(prefix[None])[0, -1].softmax(-1)[token]
    return (torch.autograd.grad(likely, scaled["x"])[0] * scaled["a"])[0]


def test_documents_beyond_a_sliding_window_are_refused():
    model = build()
    model.config = copy.copy(model.config)
    model.config.sliding_window_size = 8
    with pytest.raises(MemSinksError, match="Set --block_size 8"):
        integrated_gradients(model, batch(12), 2)


# ---------------------------------------------------------------------------------- activation, zero-out, random scores


def test_activation_by_hand():
    activations = torch.tensor([[1.0, -4.0], [3.0, 2.0]])  # means 2 and -1
    down = torch.tensor([[3.0, 0.0], [4.0, 2.0]])  # norms 5 and 2
    assert written(activations, down).tolist() == [10.0, 2.0]


def test_activation_is_of_the_suffix_of_each_document():
    model, given = build("gpt-neox"), documents(9, 12)
    outputs = []
    hooks = [
        block.mlp.fc.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in model.transformer.h
    ]
    found = activation(model, suffixes(given, [0, 1], 4, 32))
    for hook in hooks:
        hook.remove()
    for row, length in enumerate((9, 12)):
        for layer, block in enumerate(model.transformer.h):
            means = F.gelu(outputs[layer][row, 3 : length - 1]).mean(0)
            norms = block.mlp.proj.weight.square().sum(0).sqrt()
            torch.testing.assert_close(found[row, layer], means.abs() * norms)


def test_zero_out_is_the_rise_of_the_loss_without_a_neurons_weights():
    model, given = build(), documents(9, 12)
    found = zero_out(model, suffixes(given, [0, 1], 4, 32))
    for row, layer, neuron in ((0, 0, 0), (0, 1, 11), (1, 0, 5), (1, 1, 3)):
        tokens = given.tokens[row]
        edited = copy.deepcopy(model)
        edited.transformer.h[layer].mlp.proj.weight[:, neuron] = 0.0
        whole, without = (F.cross_entropy(one(tokens[None, :-1])[0, 3:], tokens[4:]) for one in (model, edited))
        assert float(found[row, layer, neuron]) == pytest.approx(float(without - whole), abs=2e-6)
        assert abs(float(without - whole)) > 1e-4


def test_random_scores_depend_on_document_and_seed_only():
    model, given = build(), batch(9, 12)
    found = random(model, given, 5)
    assert torch.equal(found[1], random(model, given[[1]], 5)[0])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, random(model, given, 6))


@pytest.mark.parametrize("method", ["hard_concrete", "integrated_gradients", "zero_out", "activation", "random"])
def test_the_work_that_is_told_is_all_of_it(method):
    """Or the time left on the progress bar is wrong."""
    model, given = build(), batch(9, 12, 7)
    done = []
    args = LocaliseArgs(method, "per_sequence", hard_concrete=SHORT, steps=2, documents_at_once=3)
    score_neurons(model, given, args, done.append)
    assert sum(done) == pytest.approx(work(model, given, args))
