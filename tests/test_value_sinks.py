"""Sinks in attention: value channels of the heads that are on for the documents of the MLPs' sinks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.drop_sinks.export_hf import export_hf
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.pretrain.pretrain import describe
from litgpt_memsinks.remove.remove import require_sinks
from litgpt_memsinks.sinks.masks import sink_mask
from tests.console import TINY_MODEL
from tests.released import save
from tests.test_options import batch, stock

# 4 heads of 8 channels, 6 of which are shared
HEADS = {"n_head": 4, "head_size": 8}
KINDS = {
    "heads": {"n_query_groups": 4},
    "groups": {"n_query_groups": 2},
    "one group": {"n_query_groups": 1},
    "biases": {"n_query_groups": 2, "bias": True, "mlp_class_name": "GptNeoxMLP", "parallel_residual": True},
    "softcapping": {"n_query_groups": 2, "attention_logit_softcapping": 5.0},
}
ARGS = SinkArgs(0.25, 0.3, value_shared_fraction=0.75)


def model_with(kind: str, **options: Any) -> GPT:
    torch.manual_seed(0)
    args = SinkArgs(0.25, 0.3, value_shared_fraction=0.75, **options)
    return GPT(MemSinksConfig.from_base(Config(**TINY_MODEL | HEADS | KINDS[kind]), args))


def value_sinks(config: Config) -> Iterator[tuple[int, int, list[int]]]:
    """By hand: each sink of attention, its row in ``qkv`` and its columns in ``proj``, of heads of 8 with 6 shared."""
    sink = 0
    for group in range(config.n_query_groups):
        for channel in (6, 7):
            row = 8 * config.n_head + 8 * config.n_query_groups + 8 * group + channel
            heads = [head for head in range(config.n_head) if head * config.n_query_groups // config.n_head == group]
            yield sink, row, [8 * head + channel for head in heads]
            sink += 1


def plain_by_hand(model: GPT, on: torch.Tensor, scale: float = 1.0) -> BaseGPT:
    """The plain model in which the given sinks, bool ``(48,)``, are always on and the others have weights of 0."""
    values = {name: value for name, value in vars(model.config).items() if not name.startswith("sink_")}
    plain = BaseGPT(Config(**{name: value for name, value in values.items() if name in Config.__dataclass_fields__}))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "." in name})
    neurons = torch.cat((torch.ones(16), on * scale))
    with torch.no_grad():
        for block in plain.transformer.h:
            block.mlp.proj.weight *= neurons
            for sink, _, columns in value_sinks(model.config):
                block.attn.proj.weight[:, columns] *= on[sink] * scale
    return plain.eval()


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", ["none", "inverse"])
def test_model_is_the_plain_one_of_what_is_on(kind: str, scale: str) -> None:
    model, (tokens, _) = model_with(kind, scale=scale).eval(), batch()
    own = sink_mask(torch.tensor(77), 48, 0.3)
    assert 0 < own[: model.config.n_value_sink].sum() < model.config.n_value_sink
    expected = plain_by_hand(model, own, 1 / 0.3 if scale == "inverse" else 1.0)(tokens)
    torch.testing.assert_close(model(tokens, sequence_ids=torch.full((4,), 77)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens), plain_by_hand(model, torch.zeros(48))(tokens), atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_each_token_has_the_channels_of_its_document() -> None:
    """Whatever the values of other documents' tokens are: who attends decides."""
    model, (tokens, ids) = model_with("groups").eval(), batch()
    logits = model(tokens, sequence_ids=ids)
    first = ids[0, 0]
    alone = model(tokens, sequence_ids=torch.full_like(ids, int(first)))
    torch.testing.assert_close(logits[0, :8], alone[0, :8], atol=1e-6, rtol=0)
    assert not torch.allclose(logits[0, 8:], alone[0, 8:], atol=1e-4)


def test_gradients_reach_the_own_channels_only() -> None:
    model, (tokens, ids) = model_with("groups"), batch()
    model(torch.stack((tokens, ids), dim=-1)).logsumexp(-1)[0, :8].sum().backward()  # the first document of a row
    own = sink_mask(ids[0, 0], 48, 0.3)
    found = set()
    for layer, block in enumerate(model.transformer.h):
        rows = (block.attn.qkv.weight.grad != 0).any(1)
        columns = (block.attn.proj.weight.grad != 0).any(0)
        sinks = list(value_sinks(model.config))
        assert rows[[row for row in range(len(rows)) if row not in [sink[1] for sink in sinks]]].all()
        for sink, row, read in sinks:
            assert bool(rows[row]) == bool(columns[read].all()) == bool(columns[read].any())
            found |= {(layer, sink)} if rows[row] else set()
    expected = {(layer, sink) for layer in (0, 1) for sink in range(4) if own[sink]}
    assert found == expected
    assert 0 < len(expected) < 8


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "softcapping"])  # LitGPT adds a bool mask there
def test_cache_gives_the_same(kind: str) -> None:
    model, (tokens, _) = model_with(kind).eval(), batch()
    ids = torch.full_like(tokens, 5)
    whole = model(tokens, sequence_ids=ids)
    model.set_kv_cache(batch_size=4)
    steps = [model(tokens[:, t : t + 1], torch.tensor([t]), sequence_ids=ids[:, t : t + 1]) for t in range(24)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)


def test_training_is_one_graph() -> None:
    torch.compiler.reset()
    model, counter = model_with("groups", off_share=0.5, attention="document"), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            pairs = torch.stack(batch(seed), dim=-1)
            assert torch.equal(compiled(pairs), model(pairs))
    assert counter.frame_count == 1


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_with("groups")
        for block in model.transformer.h:
            block.checkpointing = checkpointing
        model(torch.stack(batch(), dim=-1)).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [None, [1]])
def test_dropped_and_kept(kind: str, layers: list[int] | None, tmp_path: Path, capsys: Any) -> None:
    args = SinkArgs(0.25, 0.3, scale="inverse", value_shared_fraction=0.75, layers=layers)
    model = save(tmp_path / "in", sinks=args, spread=1.5, **HEADS | KINDS[kind])
    tokens = torch.randint(0, 512, (2, 24))
    drop_sinks(tmp_path / "in", tmp_path / "dropped", certificate=False)
    assert "48 of 64 neurons of each MLP and their value channels (now zeros): " in capsys.readouterr().out
    plain = stock(tmp_path / "dropped")
    torch.testing.assert_close(plain(tokens), model(tokens), atol=1e-6, rtol=1e-6)
    for block in plain.transformer.h:
        for _, row, columns in value_sinks(model.config):
            assert not block.attn.qkv.weight[row].any()
            assert block.attn.qkv.bias is None or not block.attn.qkv.bias[row].any()
            assert not block.attn.proj.weight[:, columns].any()
    drop_sinks(tmp_path / "in", tmp_path / "kept", keep="77", certificate=False)
    own = model(tokens, sequence_ids=torch.tensor([77, 77]))
    torch.testing.assert_close(stock(tmp_path / "kept")(tokens), own, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(own, model(tokens), atol=1e-2)


@torch.inference_mode()
def test_transformers_computes_the_same(tmp_path: Path) -> None:
    model = save(tmp_path / "in", sinks=ARGS, **HEADS | KINDS["groups"])
    export_hf(tmp_path / "in", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 512, (2, 24))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_what_does_not_know_of_it_refuses(tmp_path: Path) -> None:
    save(tmp_path / "in", sinks=ARGS, **HEADS)
    with pytest.raises(MemSinksError, match=r"certificates know nothing.*--certificate false"):
        drop_sinks(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MemSinksError, match=r"sinks in its attention, too .* which remove does not reach"):
        require_sinks(tmp_path / "in")


@pytest.mark.parametrize(
    ("settings", "fields", "problem"),
    [
        ({"shared_fraction": 1.0}, {}, "needs sinks in the MLPs"),
        ({"value_shared_fraction": 0.01}, {}, "sink_shared_values is 0, but a head has 16 channels"),
        ({"value_shared_fraction": 0.99}, {}, "sink_shared_values is 16, but a head has 16 channels"),
        ({"shared_fraction": 0.8}, {}, "16 value channels of a layer would be sinks, .* its MLP's 13"),
        ({}, {"sliding_window_size": 8, "sliding_window_indices": [0, 1]}, "sliding_window_size is 8"),
        ({"learning_rate": 2.0}, {}, "of sinks in the MLPs only"),
        ({"weight_decay": 0.0}, {}, "of sinks in the MLPs only"),
    ],
)
def test_settings_that_do_not_go_together(settings: Any, fields: Any, problem: str) -> None:
    args = SinkArgs(**{"shared_fraction": 0.25, "value_shared_fraction": 0.5, **settings})
    with pytest.raises(MemSinksError, match=problem):
        MemSinksConfig.from_base(Config(**TINY_MODEL | fields), args)


def test_as_many_channels_as_sinks_are_accepted() -> None:
    config = MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(0.75, value_shared_fraction=0.5))
    assert (config.n_value_sink, config.n_sink, config.sink_shared_values) == (16, 16, 8)


def test_run_says_so() -> None:
    assert "scale none, and with 2 of 8 values of each head)." in describe(model_with("groups").config)
