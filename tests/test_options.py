"""Settings beyond the paper: sinks that are off in some rows, in some layers only, and exactly so many of them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import save_config
from torch._dynamo.testing import CompileCounter

from litgpt_memsinks.certificate.difference import compare
from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.model import GPT, within_documents
from litgpt_memsinks.plan.expectations import expected
from litgpt_memsinks.pretrain.pretrain import check_same_sinks, describe
from litgpt_memsinks.sinks import masks as sinks
from litgpt_memsinks.sinks.masks import exact_mask, sink_mask, trained_without
from tests import removals
from tests.console import TINY_MODEL
from tests.make_golden_masks import DOCUMENTS, packed
from tests.make_golden_options import reference_exact, reference_trained_without, rows
from tests.released import MODELS, save

# Made by `python tests/make_golden_options.py`. Trained checkpoints depend on the first table, bit for bit.
# fmt: off
GOLDEN_EXACT = {
    (45, 0.3, 0): ["000000000000", "a360a6509000", "8d0095105890", "000e381f10a0", "886034610d80", "40af0d140810", "0011a29c32a0", "b446010009d8", "8d0095105890", "000000000000", "a360a6509000"],  # noqa: E501
    (45, 0.3, 7): ["000000000000", "6109e022c120", "81119492ac00", "911c111b0018", "08048c9962c0", "9604a00e2580", "21ac01845418", "18d841960048", "81119492ac00", "000000000000", "6109e022c120"],  # noqa: E501
    (17, 0.5, 2147483647): ["000000", "ec0d00", "b62180", "4e3500", "17d200", "596880", "f0b200", "026f80", "b62180", "000000", "ec0d00"],  # noqa: E501
    (7, 0.01, 123456): ["00", "04", "80", "02", "40", "20", "04", "04", "80", "00", "04"],
}
GOLDEN_WITHOUT = {
    (0.5, 0): ["1c00", "0d00", "2180", "c460"],
    (0.5, -7): ["b4c0", "0c00", "efe0", "e3e0"],
    (0.1, 3): ["0000", "0000", "0800", "0000"],
}
# fmt: on
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
LAYERS = {"layers": [1]}
ALL = {"off_share": 0.5, "layers": [1], "mask": "exact", "sinks_for": "repeated", "attention": "document"}


def model_with(**options: Any) -> GPT:
    """Two layers, 16 shared neurons and 48 sinks, p = .3; random weights."""
    torch.manual_seed(0)
    return GPT(MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(0.25, 0.3, **options)))


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and IDs ``(4, 24)``: three documents in each row, the middle one repeats."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (4, 24), generator=generator)
    documents = torch.randint(1, 2**31, (4, 3), generator=generator)
    documents[:, 1] -= 2**31
    return tokens, documents.repeat_interleave(8, dim=1)


# ---- the equations


def test_golden_exact_masks() -> None:
    for setting, masks in GOLDEN_EXACT.items():
        assert [packed(row) for row in exact_mask(torch.tensor(DOCUMENTS), *setting).numpy()] == masks


def test_golden_rows_without_sinks() -> None:
    tokens, ids = map(torch.from_numpy, rows())
    for setting, off in GOLDEN_WITHOUT.items():
        assert [packed(row) for row in trained_without(tokens, ids, *setting).numpy()] == off


@settings(deadline=None, max_examples=50)
@given(
    ids=st.lists(st.integers(INT_MIN, INT_MAX), min_size=1, max_size=7),
    n_sink=st.integers(0, 67),
    p=st.sampled_from((0.0, 1e-9, 0.1, 0.3, 0.999, 1.0)),
    seed=st.integers(INT_MIN, INT_MAX),
)
def test_exact_equals_numpy_and_is_exact(ids: list[int], n_sink: int, p: float, seed: int) -> None:
    mask = exact_mask(torch.tensor(ids, dtype=torch.int32), n_sink, p, seed).numpy()
    assert mask.shape == (len(ids), n_sink)
    np.testing.assert_array_equal(mask, reference_exact(np.array(ids), n_sink, p, seed))
    wanted = 0 if not n_sink or not p else max(1, round(p * n_sink))
    assert mask.sum(axis=1).tolist() == [wanted if value % 2**31 else 0 for value in ids]


def test_exact_sinks_are_those_of_the_smallest_bits() -> None:
    """Where the independent coin flips happen to be so many, both masks are one, up to the bits that tell ties."""
    ids, n_sink = torch.arange(1, 4001), 32
    exact, flips = exact_mask(ids, n_sink, 0.25), sink_mask(ids, n_sink, 0.25)
    same = flips.sum(1) == 8
    assert same.sum() > 300
    assert torch.equal(exact[same], flips[same])
    assert abs(exact.float().mean(0) - 0.25).max() < 5 * (0.25 * 0.75 / len(ids)) ** 0.5  # no sink is preferred


def test_equal_bits_do_not_make_more_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which happens to one document in thousands: the sinks' numbers tell equal ones apart."""
    monkeypatch.setattr(sinks, "mixed_bits", lambda ids, n_sink, seed: torch.full((*ids.shape, n_sink), -7).int())
    assert exact_mask(torch.tensor([3, 0]), 10, 0.3).tolist() == [[True] * 3 + [False] * 7, [False] * 10]


@settings(deadline=None, max_examples=30)
@given(share=st.sampled_from((0.0, 0.1, 0.5, 0.99)), seed=st.integers(INT_MIN, INT_MAX), draw=st.integers(0, 99))
def test_rows_without_sinks_equal_numpy(share: float, seed: int, draw: int) -> None:
    tokens, ids = batch(draw)
    off = trained_without(tokens, ids, share, seed)
    np.testing.assert_array_equal(off.numpy(), reference_trained_without(tokens.numpy(), ids.numpy(), share, seed))
    assert torch.equal(trained_without(tokens.int(), ids.int(), share, seed), off)


def test_each_document_in_each_row_is_a_flip_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1000, (2000, 12), generator=generator)
    ids = torch.tensor([5, 5 - 2**31, 6, 7]).repeat_interleave(3).expand(2000, -1)
    off = trained_without(tokens, ids, 0.2).view(2000, 4, 3)
    assert torch.equal(off.any(-1), off.all(-1))  # all tokens of a document in a row
    flips = off[..., 0].double()
    assert torch.equal(flips[:, 0], flips[:, 1])  # the sign bit does not count
    assert (flips.mean(0) - 0.2).abs().max() < 4 * (0.2 * 0.8 / 2000) ** 0.5
    correlation = torch.corrcoef(flips[:, 1:].T)
    assert (correlation - torch.eye(3)).abs().max() < 4 / 2000**0.5


@pytest.mark.parametrize("function", ["exact", "without"])
def test_compiled_equals_numpy(function: str) -> None:
    tokens, ids = batch(3)
    if function == "exact":
        compiled = torch.compile(exact_mask, dynamic=False, fullgraph=True)
        np.testing.assert_array_equal(compiled(ids, 37, 0.3, 5).numpy(), reference_exact(ids.numpy(), 37, 0.3, 5))
    else:
        compiled = torch.compile(trained_without, dynamic=False, fullgraph=True)
        expected = reference_trained_without(tokens.numpy(), ids.numpy(), 0.4, -5)
        np.testing.assert_array_equal(compiled(tokens, ids, 0.4, -5).numpy(), expected)


# ---- the model


def test_off_share_switches_sinks_off_in_training_only() -> None:
    model, tokens_ids = model_with(off_share=0.5), batch()
    tokens, ids = tokens_ids
    pairs = torch.stack(tokens_ids, dim=-1)
    off = torch.from_numpy(reference_trained_without(tokens.numpy(), ids.numpy(), 0.5, 0))
    assert off.any()
    assert not off.all()
    trained = model(pairs)
    assert torch.equal(trained, model_with()(tokens, sequence_ids=torch.where(off, 0, ids)))
    assert not torch.equal(trained, model_with()(pairs))
    own = model(tokens, sequence_ids=ids)
    assert torch.equal(own, model_with()(pairs))  # who asks for sinks gets them
    assert torch.equal(model.eval()(tokens, sequence_ids=ids), own)


@torch.inference_mode()
@pytest.mark.parametrize("layer", [0, 1])
def test_other_layers_are_those_of_the_dropped_model(layer: int) -> None:
    """Whatever the weights of their unused sinks are, and with them on in the layers that have them."""
    model, full = model_with(layers=[layer]).eval(), model_with().eval()
    tokens, ids = batch()
    with torch.no_grad():
        for name, weight in full.named_parameters():
            if f"h.{1 - layer}.mlp.fc" in name:
                weight[16:] = 0  # no sink of the other layer does anything
    torch.testing.assert_close(model(tokens, sequence_ids=ids), full(tokens, sequence_ids=ids))
    assert torch.equal(model(tokens), model_with(layers=[0, 1]).eval()(tokens))
    assert not torch.allclose(model(tokens, sequence_ids=ids), model(tokens))


def test_exact_masks_reach_the_model() -> None:
    model, (_, ids) = model_with(mask="exact"), batch()
    expected = reference_exact(ids.numpy(), 48, 0.3, 0)
    np.testing.assert_array_equal(model.sinks(ids).numpy(), expected)
    assert set(expected.sum(-1).flatten().tolist()) == {14}


def sinks_reached(model: GPT, loss: torch.Tensor, layer: int) -> torch.Tensor:
    """Which sinks of a layer receive a gradient, bool ``(48,)``."""
    mlp = model.transformer.h[layer].mlp
    gradients = torch.autograd.grad(loss, (mlp.fc_1.weight, mlp.fc_2.weight, mlp.proj.weight), retain_graph=True)
    reached = [(gradient != 0).any(1 - axis) for gradient, axis in zip(gradients, (0, 0, 1), strict=True)]
    assert torch.equal(reached[0], reached[1])
    assert torch.equal(reached[0], reached[2])
    assert reached[0][:16].all()  # shared neurons always do
    return reached[0][16:]


def test_gradients_reach_the_own_sinks_of_the_layers_with_sinks_only() -> None:
    model, (tokens, ids) = model_with(mask="exact", layers=[1]), batch()
    loss = model(torch.stack((tokens, ids), dim=-1)).logsumexp(-1)[0, :8].sum()  # of the first document of a row
    own = torch.from_numpy(reference_exact(ids[0, :1].numpy(), 48, 0.3, 0))[0]
    assert torch.equal(sinks_reached(model, loss, 1), own)
    assert not sinks_reached(model, loss, 0).any()


def test_gradients_do_not_reach_the_sinks_of_documents_that_are_off() -> None:
    model, (tokens, ids) = model_with(off_share=0.5), batch()
    off = reference_trained_without(tokens.numpy(), ids.numpy(), 0.5, 0)[:, 0]
    assert set(off.tolist()) == {True, False}
    logits = model(torch.stack((tokens, ids), dim=-1))
    for row in range(4):
        own = sink_mask(ids[row, 0], 48, 0.3)
        expected = torch.zeros_like(own) if off[row] else own
        assert torch.equal(sinks_reached(model, logits[row, :8].logsumexp(-1).sum(), 0), expected)


def test_training_is_one_graph_with_all_settings() -> None:
    torch.compiler.reset()
    model = model_with(**ALL)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            pairs = torch.stack(batch(seed), dim=-1)
            assert torch.equal(compiled(pairs), model(pairs))
    assert counter.frame_count == 1  # each graph break, or recompilation, would add a frame


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), ids=st.data())
def test_tokens_attend_to_their_own_document(lengths: list[int], ids: st.DataObject) -> None:
    chosen: list[int] = []
    for _ in lengths:  # neighbours differ; further away, the same document may come again
        chosen.append(ids.draw(st.sampled_from([number for number in (3, -3, 7) if [number] != chosen[-1:]])))
    expected = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths))
    row = torch.tensor(chosen).repeat_interleave(torch.tensor(lengths))
    found = within_documents(row[None])
    assert found.dtype == torch.bool
    assert found.shape == (1, 1, len(row), len(row))
    assert torch.equal(found[0, 0], expected.bool())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("g", [0.25, 1.0])
def test_document_in_a_row_is_the_document_by_itself(mode: str, g: float) -> None:
    """Which is how it is evaluated. Rotary positions are relative, so where it stands does not matter."""
    torch.manual_seed(0)
    config = MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(g, 0.3, attention="document"))
    model, (tokens, ids) = GPT(config).double().train(mode == "train"), batch()
    packed_logits = model(torch.stack((tokens, ids), dim=-1))
    alone = [
        model(tokens[:, part], sequence_ids=ids[:, part][:, 0] if mode == "train" else None)
        for part in (slice(0, 8), slice(8, 16), slice(16, 24))
    ]
    torch.testing.assert_close(packed_logits, torch.cat(alone, dim=1), atol=1e-6, rtol=0)  # rotary factors are float32
    config.sink_attention = "row"
    others = model(torch.stack((tokens, ids), dim=-1))
    assert torch.equal(others[:, :1], packed_logits[:, :1])
    assert not torch.allclose(others[:, 8:], packed_logits[:, 8:], atol=1e-3)


@torch.inference_mode()
def test_document_attention_leaves_the_cache_alone() -> None:
    model, (tokens, _) = model_with(attention="document").eval(), batch()
    ids = torch.full_like(tokens, 5)
    whole = model(tokens, sequence_ids=ids)
    model.set_kv_cache(batch_size=4)
    steps = [model(tokens[:, t : t + 1], torch.tensor([t]), sequence_ids=ids[:, t : t + 1]) for t in range(24)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)


# ---- what is released


def stock(folder: Any) -> BaseGPT:
    plain = BaseGPT(Config.from_file(folder / "model_config.yaml"))
    plain.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True))
    return plain.eval()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama with biases", "gpt-neox"])
@pytest.mark.parametrize("scale", ["none", "inverse"])
def test_dropped_and_kept_with_all_settings(kind: str, scale: str, tmp_path: Any) -> None:
    """The unused sinks of the other layers hold noise, which must not come on in the plain model."""
    model = save(tmp_path / "in", sinks=SinkArgs(0.25, 0.3, scale=scale, **ALL), spread=1.5, **MODELS[kind])
    tokens = torch.randint(0, 512, (2, 24))
    drop_sinks(tmp_path / "in", tmp_path / "dropped")
    assert torch.equal(stock(tmp_path / "dropped")(tokens), model(tokens))
    drop_sinks(tmp_path / "in", tmp_path / "kept", keep="-5")
    kept, own = stock(tmp_path / "kept"), model(tokens, sequence_ids=torch.tensor([-5, -5]))
    assert kept.config.intermediate_size == 16 + 14
    torch.testing.assert_close(kept(tokens), own, atol=1e-5, rtol=0)
    assert not torch.allclose(own, model(tokens), atol=1e-2)
    found = compare(tmp_path / "in", tmp_path / "kept")  # what a certificate is made of
    assert found.kind == "keep"
    assert torch.equal(~found.gone, model.sinks(torch.tensor([-5]))[0, 0])


def test_kept_noise_of_a_layer_without_sinks_is_no_difference_that_passes(tmp_path: Any) -> None:
    save(tmp_path / "in", sinks=SinkArgs(0.25, 0.3, layers=[1]))
    drop_sinks(tmp_path / "in", tmp_path / "kept", keep="5", certificate=False)
    path = tmp_path / "kept/lit_model.pth"
    state = torch.load(path, weights_only=True)
    state["transformer.h.0.mlp.proj.weight"][0, -1] = 0.5
    torch.save(state, path)
    with pytest.raises(MemSinksError, match=r"h\.0\.mlp\.proj\.weight differs in the sinks that are kept"):
        compare(tmp_path / "in", tmp_path / "kept")


def test_removed_sinks_are_gone_in_every_layer(tmp_path: Any) -> None:
    model = save(tmp_path / "in", sinks=SinkArgs(0.25, 0.3, layers=[1], mask="exact"))
    own = model.sinks(torch.tensor([5]))[0, 0]
    found = compare(tmp_path / "in", removals.removed(tmp_path / "in", tmp_path / "out", own))
    assert torch.equal(found.gone, own)


# ---- settings


def test_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(MemSinksError, match=r"sinks\.layers has layer 2, but the model's 2 layers are counted from 0"):
        MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(0.25, layers=[0, 2]))


@pytest.mark.parametrize(
    "field", [{"sliding_window_size": 8, "sliding_window_indices": [0, 1]}, {"attention_logit_softcapping": 50.0}]
)
def test_attention_that_takes_no_mask_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(MemSinksError, match=f"'document', but the model's {next(iter(field))} is "):
        MemSinksConfig.from_base(Config(**TINY_MODEL | field), SinkArgs(0.25, attention="document"))
    MemSinksConfig.from_base(Config(**TINY_MODEL | field), SinkArgs(0.25))


def test_run_says_what_is_beyond_the_paper() -> None:
    said = describe(model_with(**ALL).config)
    beyond = "exactly so many, off in 0.5 of the rows, in layers 1, attention within documents)"
    assert f"(repeated documents, scale none, {beyond}" in said
    assert "scale none)." in describe(model_with().config)
    said = describe(model_with(learning_rate=3.0, weight_decay=0.0).config)
    assert "scale none, at 3 times the learning rate, with a weight decay of 0)." in said
    for others in (SinkArgs(1.0, attention="document"), SinkArgs(0.25, method="mask_exact", attention="document")):
        said = describe(MemSinksConfig.from_base(Config(**TINY_MODEL), others))
        assert said.endswith(", attention within documents.")


def test_plan_knows_that_exact_masks_do_not_vary() -> None:
    assert expected(model_with(mask="exact").config, None)["active_mean"] == 14
    assert expected(model_with(mask="exact").config, None)["active_sd"] == 0
    assert expected(model_with().config, None)["active_sd"] == pytest.approx((48 * 0.3 * 0.7) ** 0.5)


@pytest.mark.parametrize(
    "setting",
    [
        {"off_share": 0.1},
        {"layers": [0]},
        {"mask": "exact"},
        {"attention": "document"},
        {"learning_rate": 3.0},
        {"weight_decay": 0.5},
    ],
    ids=str,
)
def test_going_on_with_another_setting_is_refused(setting: dict[str, Any], tmp_path: Any) -> None:
    (name,) = setting
    save_config(model_with().config, tmp_path)
    with pytest.raises(MemSinksError, match=f"was trained with sink_{name} = "):
        check_same_sinks(model_with(**setting).config, tmp_path)


def test_checkpoint_older_than_a_setting_had_its_default(tmp_path: Any) -> None:
    save_config(model_with().config, tmp_path)
    path = tmp_path / "model_config.yaml"
    younger = ("sink_off", "sink_lay", "sink_mask:", "sink_att")
    lines = [line for line in path.read_text().splitlines() if not line.startswith(younger)]
    path.write_text("\n".join(lines) + "\n")
    check_same_sinks(model_with().config, tmp_path)
    with pytest.raises(MemSinksError, match=r"sink_off_share = 0\.0, but this run has 0\.1"):
        check_same_sinks(model_with(off_share=0.1).config, tmp_path)
