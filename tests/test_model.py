"""The model against stock LitGPT, and the gradients that each kind of neuron may receive."""

import re
from collections.abc import Callable
from typing import Any

import lightning
import litgpt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.throughput import measure_flops
from litgpt.pretrain import initialize_weights
from litgpt.utils import chunked_cross_entropy
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from litgpt_memsinks import MemSinksConfig, MemSinksError, SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import without_sinks
from litgpt_memsinks.model.model import GPT, Block, switch_sinks
from litgpt_memsinks.sinks.masks import sink_mask
from tests.make_golden_masks import reference_mask

GATED = dict(parallel_residual=False, norm_class_name="RMSNorm", bias=False, rotary_percentage=1.0, n_query_groups=2)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": dict(mlp_class_name="LLaMAMLP", **GATED),
    "gemma": dict(
        name="Gemma-tiny",
        mlp_class_name="GemmaMLP",
        gelu_approximate="tanh",
        scale_embeddings=True,
        post_attention_norm=True,
        post_mlp_norm=True,
        final_logit_softcapping=3.0,
        norm_qk=True,
        rope_local_base_freq=10.0,
        rope_indices=[0, 1],
        **GATED,
    ),
    "sliding window": dict(
        mlp_class_name="LLaMAMLP", sliding_window_size=8, sliding_window_indices=[1, 0], attn_bias=True, **GATED
    ),
    "norms after": dict(
        mlp_class_name="LLaMAMLP",
        norm_1=False,
        norm_2=False,
        post_attention_norm=True,
        post_mlp_norm=True,
        norm_qk=True,
        norm_qk_type="olmo2",
        **GATED,
    ),
    "neox": dict(lm_head_bias=True),
    "neox with one norm": dict(shared_attention_norm=True, gelu_approximate="tanh"),
    "gpt": dict(parallel_residual=False, rope_adjustments=dict(factor=2.0)),
}
MLPS = {
    f"{name}{' with bias' if bias else ''}": dict(mlp_class_name=name, bias=bias)
    for name in ("LLaMAMLP", "GemmaMLP", "GptNeoxMLP")
    for bias in (False, True)
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
mlps = pytest.mark.parametrize("mlp", MLPS.values(), ids=MLPS)

P, SEED = 0.4, 11


def plain(**changes: Any) -> litgpt.Config:
    values = dict(name="tiny", n_layer=2, n_embd=16, n_head=4, vocab_size=61, padded_vocab_size=64, block_size=16)
    return litgpt.Config(**{**values, "intermediate_size": 23, **changes})


def with_sinks(base: litgpt.Config, **sinks: Any) -> GPT:
    """A model with 12 shared neurons and 11 sinks, whose biases and norms, too, are random numbers."""
    settings = dict(shared_fraction=0.5, active_probability=P, seed=SEED)
    model = GPT(MemSinksConfig.from_base(base, SinkArgs(**{**settings, **sinks})))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "n_shared"}


def stock_of(model: GPT, base: litgpt.Config) -> litgpt.GPT:
    """Stock LitGPT with all neurons of a model with sinks."""
    stock = litgpt.GPT(base)
    stock.load_state_dict(weights(model), strict=True)
    return stock


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def random_ids(*shape: int, seed: int = 2) -> torch.Tensor:
    """Documents of 5 tokens packed into each row, of which some repeat. One token in about eight has no document."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(-(2**31), 2**31, shape, generator=generator)
    ids = documents[..., torch.arange(shape[-1]) // 5]
    return torch.where(torch.rand(shape, generator=generator) < 0.125, 0, ids)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_all_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# ---- equality with stock LitGPT


@architectures
@pytest.mark.parametrize("lm_head_chunk_size", [0, 5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_restated_forward_equals_litgpt(architecture: dict[str, Any], lm_head_chunk_size: int, training: bool) -> None:
    base = plain(**architecture)
    model = with_sinks(base, active_probability=1.0)
    stock = stock_of(model, base)
    model.train(training)
    stock.train(training)
    tokens = random_tokens(3, 13)
    expected = stock(tokens, lm_head_chunk_size=lm_head_chunk_size)
    actual = model(tokens, lm_head_chunk_size=lm_head_chunk_size, sequence_ids=torch.tensor([1, -2, 3]))
    assert type(actual) is type(expected)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    if training and not lm_head_chunk_size:
        assert_all_equal(
            gradients(model, next_token_loss(actual, tokens)), gradients(stock, next_token_loss(expected, tokens))
        )


@architectures
@pytest.mark.parametrize("with_end", [False, True], ids=["whole cache", "input_pos_maxp1"])
@pytest.mark.parametrize("first", [[0], [0, 2]], ids=["positions 1-D", "positions 2-D"])
@torch.inference_mode()
def test_restated_forward_equals_litgpt_with_kv_cache(
    architecture: dict[str, Any], with_end: bool, first: list[int]
) -> None:
    base = plain(**architecture)
    model = with_sinks(base, active_probability=1.0).eval()
    stock = stock_of(model, base).eval()
    for network in (model, stock):
        network.set_kv_cache(batch_size=2)
    tokens = random_tokens(2, 9)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 9)):
        positions = torch.tensor(first).unsqueeze(-1) + torch.arange(start, stop)  # (1 or B, T)
        positions = positions if len(first) > 1 else positions[0]
        arguments = dict(input_pos=positions, input_pos_maxp1=int(positions.max()) + 1 if with_end else None)
        expected = stock(tokens[:, start:stop], **arguments)
        assert torch.equal(model(tokens[:, start:stop], **arguments, sequence_ids=torch.tensor([1, 2])), expected)


BAD_CALLS = {
    "too long": dict(idx=torch.zeros(1, 17, dtype=torch.long)),
    "three dimensions": dict(idx=torch.zeros(1, 4, dtype=torch.long), input_pos=torch.zeros(1, 1, 4, dtype=torch.long)),
    "wrong length": dict(idx=torch.zeros(1, 4, dtype=torch.long), input_pos=torch.arange(3)),
    "end": dict(idx=torch.zeros(1, 4, dtype=torch.long), input_pos=torch.arange(4), input_pos_maxp1=17),
    "no cache": dict(idx=torch.zeros(1, 4, dtype=torch.long), input_pos=torch.arange(4)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_restated_forward_fails_as_litgpt_does(case: str) -> None:
    base = plain()
    model = with_sinks(base)
    stock = stock_of(model, base)
    if case != "no cache":
        model.set_kv_cache(batch_size=1)
        stock.set_kv_cache(batch_size=1)
    with pytest.raises((ValueError, TypeError)) as expected:
        stock(**BAD_CALLS[case])
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        model(**BAD_CALLS[case], sequence_ids=torch.tensor([1]))


@architectures
def test_without_sinks_training_equals_litgpt(architecture: dict[str, Any]) -> None:
    base = plain(**architecture)
    model = with_sinks(base, shared_fraction=1.0)
    stock = stock_of(model, base)
    tokens = random_tokens(2, 13)
    actual, expected = model(torch.stack((tokens, random_ids(2, 13)), dim=-1)), stock(tokens)
    assert torch.equal(actual, expected)
    assert_all_equal(
        gradients(model, next_token_loss(actual, tokens)), gradients(stock, next_token_loss(expected, tokens))
    )


@mlps
def test_initial_weights_equal_litgpts(mlp: dict[str, Any]) -> None:
    """LitGPT finds our layers, and they draw the same random numbers: runs are comparable from the first step on."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    base = plain(**mlp)
    model, stock = with_sinks(base), litgpt.GPT(base)
    for network in (model, stock):
        torch.manual_seed(0)
        initialize_weights(fabric, network, n_layer=base.n_layer, n_embd=base.n_embd)
    assert_all_equal(weights(model), weights(stock))


def test_flop_count_of_litgpt_works_without_ids() -> None:
    """`litgpt pretrain` counts FLOPs of a model on the meta device with tokens only."""

    def flops(build: Callable[[], torch.nn.Module]) -> int:
        with torch.device("meta"):
            model = build()
            tokens = torch.randint(0, 1, (2, 8))
            return measure_flops(model, lambda: model(tokens), lambda y: chunked_cross_entropy(y, tokens, chunk_size=0))

    for sinks_for in ("all", "repeated"):
        config = MemSinksConfig.from_base(plain(), SinkArgs(sinks_for=sinks_for))
        assert flops(lambda config=config: GPT(config)) == flops(lambda: litgpt.GPT(plain()))


# ---- which neurons fire


def gated_stock(model: GPT, base: litgpt.Config, mask: np.ndarray, factor: float) -> litgpt.GPT:
    """Stock LitGPT whose hidden activations are multiplied by (1, ..., 1, factor * mask) in every layer."""
    sinks = torch.from_numpy(mask) * factor
    gate = torch.cat((torch.ones(*mask.shape[:-1], model.config.n_shared), sinks.float()), dim=-1)
    stock = stock_of(model, base)
    for block in stock.transformer.h:
        block.mlp.proj.register_forward_pre_hook(lambda module, inputs: inputs[0] * gate)
    return stock


@mlps
@pytest.mark.parametrize("scale", ["none", "inverse"])
@pytest.mark.parametrize("sinks_for", ["all", "repeated"])
def test_sinks_gate_hidden_neurons_token_by_token(mlp: dict[str, Any], scale: str, sinks_for: str) -> None:
    base = plain(**mlp)
    model = with_sinks(base, scale=scale, sinks_for=sinks_for)
    tokens, ids = random_tokens(3, 15), random_ids(3, 15)
    mask = reference_mask(ids.numpy(), model.config.n_sink, P, SEED)
    if sinks_for == "repeated":
        assert (ids > 0).any()
        assert (ids < 0).any()
        mask &= (ids < 0).numpy()[..., None]
    stock = gated_stock(model, base, mask, factor=1 / P if scale == "inverse" else 1)
    actual, expected = model(torch.stack((tokens, ids), dim=-1)), stock(tokens)
    torch.testing.assert_close(actual, expected)
    ours, theirs = (
        gradients(network, next_token_loss(logits, tokens)) for network, logits in ((model, actual), (stock, expected))
    )
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ids", [torch.tensor([[4, -4, 0], [9, 1, -7]]), torch.tensor([4, -9])], ids=["B T", "B"])
def test_mask_follows_the_configuration(ids: torch.Tensor) -> None:
    model = with_sinks(plain())
    expected = reference_mask(ids.numpy(), 11, P, SEED)
    np.testing.assert_array_equal(model.sinks(ids).numpy(), expected if ids.dim() == 2 else expected[:, None])
    model = with_sinks(plain(), sinks_for="repeated")
    assert torch.equal(model.sinks(ids).any(dim=-1).flatten(), ids.flatten() < 0)


# 100 and its multiples pass SiLU and GELU unchanged in float32. Neurons are 2 shared ones, a sink that is on, one off.
HAND_COMPUTED = {
    ("LLaMAMLP", "none"): [100.0, 400.0, 900.0, 0.0],
    ("LLaMAMLP", "inverse"): [100.0, 400.0, 3600.0, 0.0],
    ("GemmaMLP", "none"): [100.0, 400.0, 900.0, 0.0],
    ("GemmaMLP", "inverse"): [100.0, 400.0, 3600.0, 0.0],
    ("GptNeoxMLP", "none"): [100.0, 200.0, 300.0, 0.0],
    ("GptNeoxMLP", "inverse"): [100.0, 200.0, 1200.0, 0.0],
}


@pytest.mark.parametrize(("name", "scale"), HAND_COMPUTED)
def test_one_mlp_by_hand(name: str, scale: str) -> None:
    base = plain(n_embd=4, intermediate_size=4, mlp_class_name=name, bias=False)
    mlp = with_sinks(base, active_probability=0.25, scale=scale).transformer.h[0].mlp
    factors = {"fc": 100.0, "fc_1": 100.0, "fc_2": 1.0, "proj": 1.0}
    for layer, linear in mlp.named_children():
        linear.weight.data.copy_(factors[layer] * torch.eye(4))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    expected = HAND_COMPUTED[name, scale]
    assert mlp(x, torch.tensor([[[True, False]]])).flatten().tolist() == expected
    assert mlp(x).flatten().tolist() == [*expected[:2], 0.0, 0.0]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switch_sinks(scale: float, dtype: torch.dtype) -> None:
    hidden = torch.tensor([[[1.0, -2.0, 3.0, torch.inf], [5.0, torch.inf, -torch.inf, torch.nan]]], dtype=dtype)
    switched = switch_sinks(hidden, torch.tensor([[[True, False], [False, False]]]), scale)
    assert switched.dtype == dtype
    assert switched.tolist() == [[[1.0, -2.0, 3.0 * scale, 0.0], [5.0, torch.inf, 0.0, 0.0]]]


@mlps
@pytest.mark.parametrize("scale", ["none", "inverse"])
def test_bfloat16_stays_bfloat16(mlp: dict[str, Any], scale: str) -> None:
    model = with_sinks(plain(**mlp), scale=scale).bfloat16()
    pairs = torch.stack((random_tokens(2, 7), random_ids(2, 7)), dim=-1)
    seen = []
    for block in model.transformer.h:
        block.mlp.proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    assert model(pairs).dtype == torch.bfloat16
    assert seen == [torch.bfloat16] * 2


# ---- which state: dropped or own


@mlps
@torch.inference_mode()
def test_eval_on_pairs_is_the_dropped_model(mlp: dict[str, Any]) -> None:
    model = with_sinks(plain(**mlp)).eval()
    dropped = litgpt.GPT(model.config.to_base()).eval()
    dropped.load_state_dict(without_sinks(model.state_dict(), model.config), strict=True)
    assert dropped.transformer.h[0].mlp.proj.weight.shape == (16, 12)
    tokens, ids = random_tokens(3, 13), random_ids(3, 13)
    expected = dropped(tokens)
    assert torch.equal(model(torch.stack((tokens, ids), dim=-1)), expected)
    assert torch.equal(model(tokens), expected)
    torch.testing.assert_close(model(tokens, sequence_ids=torch.zeros(3, dtype=torch.int32)), expected)
    assert not torch.allclose(model(tokens, sequence_ids=ids), expected)
    for network in (model, dropped):
        network.set_kv_cache(batch_size=3)
    for positions in torch.arange(13).split([6, 1, 1, 5]):
        assert torch.equal(model(tokens[:, positions], positions), dropped(tokens[:, positions], positions))


def test_own_state_is_the_training_state() -> None:
    model = with_sinks(plain())
    tokens, documents = random_tokens(3, 13), torch.tensor([5, -6, 0])
    ids = documents.unsqueeze(-1).expand(-1, 13)
    expected = model(torch.stack((tokens, ids), dim=-1))
    model.eval()
    assert torch.equal(model(tokens, sequence_ids=ids), expected)
    assert torch.equal(model(tokens, sequence_ids=documents), expected)
    assert torch.equal(model(tokens, sequence_ids=documents.int()), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_given_ids_override_those_of_the_pairs(training: bool) -> None:
    model = with_sinks(plain()).train(training)
    tokens, ids = random_tokens(2, 13), random_ids(2, 13)
    pairs = torch.stack((tokens, torch.ones_like(tokens)), dim=-1)
    assert torch.equal(model(pairs, sequence_ids=ids), model(tokens, sequence_ids=ids))
    assert not torch.allclose(model(pairs, sequence_ids=ids), model(pairs))


@architectures
@torch.inference_mode()
def test_own_state_token_by_token_equals_the_whole_text(architecture: dict[str, Any]) -> None:
    model = with_sinks(plain(**architecture)).eval()
    tokens, ids = random_tokens(2, 11), random_ids(2, 11)
    whole = model(tokens, sequence_ids=ids)
    model.set_kv_cache(batch_size=2)
    steps = [model(tokens[:, [t]], torch.tensor([t]), sequence_ids=ids[:, [t]]) for t in range(11)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_training_without_ids_is_refused() -> None:
    model = with_sinks(plain())
    with pytest.raises(MemSinksError, match="without sequence IDs"):
        model(random_tokens(2, 5))
    model.eval()(random_tokens(2, 5))


# ---- gradients: parameter slice -> gradient that it must receive from a document's loss

PER_NEURON = {
    "LLaMAMLP": ("fc_1.weight", "fc_1.bias", "fc_2.weight", "fc_2.bias", "proj.weight"),
    "GemmaMLP": ("fc_1.weight", "fc_1.bias", "fc_2.weight", "fc_2.bias", "proj.weight"),
    "GptNeoxMLP": ("fc.weight", "fc.bias", "proj.weight"),
}
RESIDUAL = {("proj.bias", "all"): "non_zero"}
GRADIENT_CONTRACT = {"shared": "non_zero", "own_sinks": "non_zero", "other_sinks": "zero"}
UNREPEATED_CONTRACT = {"shared": "non_zero", "own_sinks": "zero", "other_sinks": "zero"}
"""Of documents that occur once, under ``sinks_for: repeated``."""

DOCUMENT_A, DOCUMENT_B = -5, 9  # A repeats, B does not


def contract(mlp_class_name: str, parts: dict[str, str]) -> dict[tuple[str, str], str]:
    names = PER_NEURON[mlp_class_name]
    return {(name, part): gradient for name in names for part, gradient in parts.items()} | RESIDUAL


def own_sinks(*documents: int) -> torch.Tensor:
    """bool (11,): the sinks of any of these documents."""
    return torch.from_numpy(reference_mask(np.array(documents), 11, P, SEED)).any(dim=0)


def verdict(gradient: torch.Tensor) -> str:
    """Of gradients (neurons, anything): whether all or none of the neurons receive any."""
    assert len(gradient)
    reached = (gradient != 0).any(dim=-1)
    return "non_zero" if reached.all() else "mixed" if reached.any() else "zero"


def gradients_by_slice(model: GPT, loss: torch.Tensor, own: torch.Tensor) -> dict[tuple[str, str], str]:
    """Names come from the model, so that a renamed or new parameter of an MLP breaks the contract."""
    size, n_shared = model.config.intermediate_size, model.config.n_shared
    assert size not in (model.config.n_embd, model.config.padded_vocab_size)
    neurons = torch.arange(size)
    is_own = torch.cat((torch.zeros(n_shared, dtype=torch.bool), own))
    parts = {"shared": neurons < n_shared, "own_sinks": is_own, "other_sinks": (neurons >= n_shared) & ~is_own}
    found: dict[tuple[str, str], set[str]] = {}
    for name, gradient in gradients(model, loss).items():
        _, mlp, parameter = name.partition(".mlp.")
        if not mlp:
            continue
        if size not in gradient.shape:
            found.setdefault((parameter, "all"), set()).add(verdict(gradient.unsqueeze(-1)))
            continue
        by_neuron = gradient.movedim(gradient.shape.index(size), 0).reshape(size, -1)
        for part, members in parts.items():
            found.setdefault((parameter, part), set()).add(verdict(by_neuron[members]))
    return {key: "/".join(sorted(verdicts)) for key, verdicts in found.items()}


def packed_losses(model: GPT) -> torch.Tensor:
    """Loss of each token (13,) of a row in which 7 tokens of document A come before 6 of B."""
    tokens = random_tokens(1, 14)
    ids = torch.tensor([[DOCUMENT_A] * 7 + [DOCUMENT_B] * 6])
    logits = model(torch.stack((tokens[:, :-1], ids), dim=-1))
    return F.cross_entropy(logits[0], tokens[0, 1:], reduction="none")


@pytest.mark.parametrize("name", PER_NEURON)
@pytest.mark.parametrize("scale", ["none", "inverse"])
def test_loss_of_one_document_trains_shared_neurons_and_its_own_sinks(name: str, scale: str) -> None:
    model = with_sinks(plain(mlp_class_name=name, bias=True), scale=scale)
    assert (own_sinks(DOCUMENT_B) & ~own_sinks(DOCUMENT_A)).any()  # B, in the same row, has sinks that A has not
    loss = packed_losses(model)[:7].mean()
    assert gradients_by_slice(model, loss, own_sinks(DOCUMENT_A)) == contract(name, GRADIENT_CONTRACT)


@pytest.mark.parametrize("name", PER_NEURON)
def test_loss_of_two_documents_trains_the_sinks_of_neither_other(name: str) -> None:
    model = with_sinks(plain(mlp_class_name=name, bias=True))
    own = own_sinks(DOCUMENT_A, DOCUMENT_B)
    assert gradients_by_slice(model, packed_losses(model).mean(), own) == contract(name, GRADIENT_CONTRACT)


@pytest.mark.parametrize("name", PER_NEURON)
@pytest.mark.parametrize(
    ("document", "parts"),
    [(5, UNREPEATED_CONTRACT), (-5, GRADIENT_CONTRACT)],
    ids=["occurs once", "repeats"],
)
def test_sinks_for_repeated_documents_only(name: str, document: int, parts: dict[str, str]) -> None:
    model = with_sinks(plain(mlp_class_name=name, bias=True), sinks_for="repeated")
    tokens = random_tokens(2, 9)
    logits = model(torch.stack((tokens, torch.full_like(tokens, document)), dim=-1))
    loss = next_token_loss(logits, tokens)
    assert gradients_by_slice(model, loss, own_sinks(document)) == contract(name, parts)


# ---- the marker in checkpoints


def test_state_is_that_of_litgpt_and_the_marker() -> None:
    model = with_sinks(plain())
    assert set(model.state_dict()) == set(litgpt.GPT(plain()).state_dict()) | {"n_shared"}
    assert model.state_dict()["n_shared"].tolist() == 12


def test_stock_model_refuses_undropped_weights() -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "n_shared"'):
        litgpt.GPT(plain()).load_state_dict(with_sinks(plain()).state_dict(), strict=True)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.nn.ModuleList([model])], ids=["", "wrapped"])
def test_loading(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    source = with_sinks(plain())
    expected = {name: value.clone() for name, value in source.state_dict().items()}
    for given in (source, stock_of(source, plain())):  # with sinks, or plain weights to start from
        model = GPT(source.config)
        wrap(model).load_state_dict(wrap(given).state_dict(), strict=True)
        assert_all_equal(model.state_dict(), expected)


def test_weights_with_other_sinks_are_refused() -> None:
    model = with_sinks(plain(), shared_fraction=0.25)
    with pytest.raises(MemSinksError, match="has 12 shared neurons in each MLP, but this model 6"):
        model.load_state_dict(with_sinks(plain()).state_dict())
    with pytest.raises(MemSinksError, match="has 12 shared neurons in each MLP, but this model 23"):
        with_sinks(plain(), shared_fraction=1.0).load_state_dict(with_sinks(plain()).state_dict())


def test_initialisation_on_the_meta_device_recovers_marker_and_positions() -> None:
    with torch.device("meta"):
        model = GPT(with_sinks(plain()).config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(-1)
    model.reset_parameters()
    expected = dict(with_sinks(plain()).named_buffers())
    assert set(expected) == {"cos", "sin", "n_shared"}
    assert_all_equal(dict(model.named_buffers()), expected)


def test_from_name() -> None:
    sinks = SinkArgs(shared_fraction=0.25, seed=5)
    with torch.device("meta"):
        model = GPT.from_name("Tiny-MemSinks", sinks=sinks, n_layer=1)
    assert model.config == MemSinksConfig.from_name("Tiny-MemSinks", sinks, n_layer=1)
    assert len(model.transformer.h) == 1
    assert type(model) is GPT
    assert {type(block) for block in model.transformer.h} == {Block}


# ---- compilation and activation checkpointing


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("architecture", [ARCHITECTURES["llama"], ARCHITECTURES["neox"]], ids=["llama", "neox"])
def test_training_is_one_graph_for_all_ids(architecture: dict[str, Any]) -> None:
    model = with_sinks(plain(**architecture))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            pairs = torch.stack((random_tokens(2, 13, seed=seed), random_ids(2, 13, seed=seed)), dim=-1)
            assert torch.equal(compiled(pairs), model(pairs))
    assert counter.frame_count == 1  # each graph break, or recompilation, would add a frame


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_gradients_equal_eager() -> None:
    model = with_sinks(plain(n_layer=1, **ARCHITECTURES["llama"]), scale="inverse")
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(2):
        tokens = random_tokens(2, 13, seed=seed)
        pairs = torch.stack((tokens, random_ids(2, 13, seed=seed)), dim=-1)
        expected = gradients(model, next_token_loss(model(pairs), tokens))
        actual = gradients(model, next_token_loss(compiled(pairs), tokens))
        assert set(actual) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("implementation", CheckpointImpl, ids=lambda value: value.name)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_activation_checkpointing_keeps_gradients(implementation: CheckpointImpl, compiled: bool) -> None:
    """Two forwards before a backward: the recomputation of the first must not see the second one's documents."""
    model, checkpointed = with_sinks(plain()), with_sinks(plain())
    apply_activation_checkpointing(  # as Lightning's FSDP strategy does
        checkpointed,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, Block),
    )

    def accumulated_gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
        forward = torch.compile(network, backend="aot_eager") if compiled and network is checkpointed else network
        losses = []
        for seed in range(2):
            tokens = random_tokens(2, 13, seed=seed)
            pairs = torch.stack((tokens, random_ids(2, 13, seed=seed)), dim=-1)
            losses.append(next_token_loss(forward(pairs), tokens))
        sum(losses).backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    expected, actual = accumulated_gradients(model), accumulated_gradients(checkpointed)
    actual = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in actual.items()}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@pytest.mark.parametrize(("n_shared", "n_sink"), [(35, 61), (64, 63), (1, 97)])
def test_compiled_mask_is_the_same_where_it_is_fused(n_shared: int, n_sink: int) -> None:
    """In training the mask is never stored: it is computed inside the kernel that zeroes the sinks."""

    def gated(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return switch_sinks(hidden, sink_mask(ids, n_sink, 0.4, 3), 1.0)

    hidden = torch.rand(3, 7, n_shared + n_sink) + 1
    ids = torch.randint(-(2**31), 2**31, (3, 7))
    compiled = torch.compile(gated, dynamic=False, fullgraph=True)
    assert torch.equal(compiled(hidden, ids), gated(hidden, ids))
