"""Settings and registered models: hand-listed sizes, LitGPT's own configurations, and errors that name the field."""

import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import litgpt
import litgpt.model
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt import Config
from litgpt.config import configs, name_to_config
from litgpt.utils import save_config

import litgpt_memsinks.config
import litgpt_memsinks.model.model
from litgpt_memsinks import MemSinksConfig, MemSinksError, SinkArgs
from litgpt_memsinks.config import PAPER_SINKS, SINK_DEFAULTS, SUPPORTED_MLPS, register_models, shared_neurons
from litgpt_memsinks.pretrain.pretrain import RECORD
from litgpt_memsinks.sinks.masks import MASK_VERSION

# name -> n_layer, n_embd, intermediate_size, block_size, n_shared at the registered g; from the published
# configurations, and 0.7 * 2560 = 1792, 0.7 * 8192 = 5734.4, 0.7 * 4096 = 2867.2, 0.5 * 384 = 192
REGISTERED = {
    "SmolLM-360M-MemSinks": (32, 960, 2560, 2048, 1792),
    "SmolLM-1.7B-MemSinks": (24, 2048, 8192, 2048, 5760),
    "SmolLM2-360M-MemSinks": (32, 960, 2560, 8192, 1792),
    "SmolLM2-1.7B-MemSinks": (24, 2048, 8192, 8192, 5760),
    "GPT2-Medium-MemSinks": (24, 1024, 4096, 1024, 2880),
    "Tiny-MemSinks": (2, 128, 384, 512, 192),
}

# field of SinkArgs -> a value that is not its default, the field of MemSinksConfig that carries it, the value there
# for an MLP of 40 neurons
CARRIED = {
    "shared_fraction": (0.25, "sink_n_shared", 10),
    "active_probability": (0.6, "sink_active_probability", 0.6),
    "seed": (-7, "sink_seed", -7),
    "sinks_for": ("repeated", "sink_sinks_for", "repeated"),
    "scale": ("inverse", "sink_scale", "inverse"),
    "method": ("mask_cloud", "sink_method", "mask_cloud"),
    "off_share": (0.25, "sink_off_share", 0.25),
    "layers": ([1], "sink_layers", [1]),
    "mask": ("exact", "sink_mask", "exact"),
    "attention": ("document", "sink_attention", "document"),
    "value_shared_fraction": (0.5, "sink_shared_values", 4),
    "learning_rate": (3.0, "sink_learning_rate", 3.0),
    "weight_decay": (0.0, "sink_weight_decay", 0.0),
    "mask_version": (MASK_VERSION + 6, "sink_mask_version", MASK_VERSION + 6),
}

# other fields of MemSinksConfig that a field of SinkArgs changes
IMPLIED = {"method": {"sink_active_probability"}}

# field of SinkArgs -> values that are refused, and how the message writes them
REFUSED = {
    "shared_fraction": [(0.0, "0.0"), (-0.1, "-0.1"), (1.0001, "1.0001"), (math.nan, "nan")],
    "active_probability": [(0.0, "0.0"), (-1, "-1"), (1.5, "1.5"), (math.nan, "nan")],
    "seed": [(2**31, "2147483648"), (-(2**31) - 1, "-2147483649")],
    "sinks_for": [("none", "'none'"), (True, "True")],
    "scale": [("1/p", "'1/p'")],
    "method": [("mask", "'mask'"), (True, "True")],
    "off_share": [(-0.1, "-0.1"), (1.0, "1.0"), (math.nan, "nan")],
    "layers": [([], "[]"), ([0, 0], "[0, 0]"), ([-1], "[-1]"), ([0.5], "[0.5]")],
    "mask": [("top_k", "'top_k'")],
    "attention": [("block", "'block'")],
    "value_shared_fraction": [(0.0, "0.0"), (1.5, "1.5"), (math.nan, "nan")],
    "learning_rate": [(0.0, "0.0"), (-1.0, "-1.0"), (math.inf, "inf"), (math.nan, "nan")],
    "weight_decay": [(-0.1, "-0.1"), (math.inf, "inf"), (math.nan, "nan")],
    "mask_version": [(0, "0"), (2, "2")],
}

# values that are just still accepted
ACCEPTED = {
    "shared_fraction": [None, 1e-9, 1.0],
    "active_probability": [None, 1e-9, 1.0],
    "seed": [2**31 - 1, -(2**31)],
    "sinks_for": ["all", "repeated"],
    "scale": ["none", "inverse"],
    "method": ["memsinks", "mask_exact", "mask_cloud", "mask_sgtm"],
    "off_share": [0.0, 0.999],
    "layers": [None, [0], [1, 0]],
    "mask": ["bernoulli", "exact"],
    "attention": ["row", "document"],
    "value_shared_fraction": [1e-9, 1.0],
    "learning_rate": [1e-9, 1.0, 1e9],
    "weight_decay": [None, 0.0, 1e9],
    "mask_version": [MASK_VERSION],
}


def tiny(**changes: Any) -> Config:
    values = dict(name="tiny", n_layer=2, n_embd=16, n_head=2, vocab_size=64, padding_multiple=64, block_size=16)
    return Config(**{**values, "intermediate_size": 40, **changes})


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value}") for name, values in table.items() for value in values]


# ---- registered models


def test_registry_has_exactly_our_names() -> None:
    upstream = {config["name"] for config in configs}
    assert {name for name in name_to_config if name not in upstream} == set(REGISTERED)
    assert set(SINK_DEFAULTS) == set(REGISTERED)


def test_registering_again_changes_nothing() -> None:
    before = {name: dict(config) for name, config in name_to_config.items()}
    register_models()
    assert name_to_config == before


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_sizes(name: str) -> None:
    config = MemSinksConfig.from_name(name)
    sizes = (config.n_layer, config.n_embd, config.intermediate_size, config.block_size, config.n_shared)
    assert sizes == REGISTERED[name]
    assert config.name == name
    assert config.n_sink == config.intermediate_size - config.n_shared
    assert config.sink_active_probability == 0.3


@pytest.mark.parametrize("name", REGISTERED)
def test_stock_lookup_finds_the_plain_model(name: str) -> None:
    config = Config.from_name(name)
    assert type(config) is Config
    assert (config.n_layer, config.n_embd, config.intermediate_size, config.block_size) == REGISTERED[name][:4]


@pytest.mark.parametrize("size", ["360M", "1.7B"])
def test_smollm_differs_from_litgpts_own_in_nothing_else(size: str) -> None:
    own = Config.from_name(f"SmolLM2-{size}")
    assert Config.from_name(f"SmolLM2-{size}-MemSinks") == replace(own, name=f"SmolLM2-{size}-MemSinks")
    assert Config.from_name(f"SmolLM-{size}-MemSinks") == replace(
        own,
        name=f"SmolLM-{size}-MemSinks",
        hf_config={"org": "HuggingFaceTB", "name": f"SmolLM-{size}"},
        block_size=2048,  # of its published config.json, as is the RoPE base
        rope_base=10000,
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    # as Hugging Face counts the published models, whose embeddings are tied
    [("SmolLM-360M-MemSinks", 361_821_120), ("SmolLM-1.7B-MemSinks", 1_711_376_384)],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = litgpt_memsinks.model.model.GPT.from_name(name)
    model.lm_head.weight = model.transformer.wte.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# ---- SinkArgs


def test_tables_cover_every_sink_setting() -> None:
    names = {field.name for field in fields(SinkArgs)}
    assert set(CARRIED) == set(REFUSED) == set(ACCEPTED) == names
    ours = {field.name for field in fields(MemSinksConfig)} - {field.name for field in fields(Config)}
    assert {carrier for _, carrier, _ in CARRIED.values()} == ours - set(RECORD)  # which no setting gives
    assert all(name.startswith("sink_") for name in ours)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_bad_setting_is_refused_by_name_and_value(name: str, value: tuple[Any, str]) -> None:
    with pytest.raises(MemSinksError, match=re.escape(f"sinks.{name} is {value[1]}")):
        SinkArgs(**{name: value[0]}).check()


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_limits_are_accepted(name: str, value: Any) -> None:
    assert getattr(SinkArgs(**{name: value}), name) == value


@pytest.mark.parametrize("name", CARRIED)
def test_setting_reaches_the_model_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, carrier, carried = CARRIED[name]
    default = asdict(MemSinksConfig.from_base(tiny(), SinkArgs()))
    if name == "mask_version":
        monkeypatch.setattr(litgpt_memsinks.config, "MASK_VERSION", value)  # as in a later release
    values = asdict(MemSinksConfig.from_base(tiny(), SinkArgs(**{name: value})))
    assert values[carrier] == carried
    assert {key for key in values if values[key] != default[key]} == {carrier} | IMPLIED.get(name, set())


@pytest.mark.parametrize("method", ["mask_exact", "mask_cloud", "mask_sgtm"])
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(off_share=0.1), "sinks.off_share is 0.1, but under method "),
        (dict(layers=[0]), "sinks.layers is [0], but under method "),
        (dict(mask="exact"), "sinks.mask is 'exact', but under method "),
        (dict(active_probability=0.3), "sinks.active_probability is 0.3, but under method "),
        (dict(sinks_for="repeated"), "sinks.sinks_for is 'repeated', but under method "),
        (dict(scale="inverse"), "sinks.scale is 'inverse', but under method "),
        (dict(shared_fraction=1.0), "sinks.shared_fraction is 1.0, but method "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_gradient_masking_refuses_settings_of_single_documents_sinks(
    method: Any, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(MemSinksError, match=re.escape(problem + method)):
        MemSinksConfig.from_base(tiny(), SinkArgs(method=method, **changes))
    SinkArgs(method=method, active_probability=1.0).check()


def test_paper_setting() -> None:
    """Sec. 5: 70% of the neurons are shared, and a sink is on for 30% of the documents."""
    expected = SinkArgs(0.7, 0.3, seed=0, sinks_for="all", scale="none", mask_version=1)
    assert expected == PAPER_SINKS


@pytest.mark.parametrize(
    ("name", "sinks", "expected"),
    [
        ("SmolLM-360M-MemSinks", SinkArgs(), SinkArgs(0.7, 0.3)),
        ("Tiny-MemSinks", SinkArgs(), SinkArgs(0.5, 0.3)),
        ("no registered name", SinkArgs(), SinkArgs(0.7, 0.3)),
        ("Tiny-MemSinks", SinkArgs(shared_fraction=1.0), SinkArgs(1.0, 0.3)),
        ("Tiny-MemSinks", SinkArgs(active_probability=0.1), SinkArgs(0.5, 0.1)),
        ("Tiny-MemSinks", SinkArgs(method="mask_exact"), SinkArgs(0.5, 1.0, method="mask_exact")),
        (
            "Tiny-MemSinks",
            SinkArgs(seed=3, sinks_for="repeated", scale="inverse"),
            SinkArgs(0.5, 0.3, 3, "repeated", "inverse"),
        ),
    ],
)
def test_resolved(name: str, sinks: SinkArgs, expected: SinkArgs) -> None:
    before = replace(sinks)
    assert sinks.resolved(name) == expected
    assert sinks == before


# ---- shared_neurons


@pytest.mark.parametrize(
    ("intermediate_size", "shared_fraction", "n_shared"),
    [
        (8192, 0.7, 5760),  # 5734.4
        (2560, 0.7, 1792),  # exact
        (4096, 0.7, 2880),  # 2867.2
        (1024, 0.7, 704),  # 716.8 lies nearer to 704 than to 768
        (1023, 0.7, 716),  # 716.1: too narrow to be rounded to 64
        (384, 0.5, 192),
        (10, 0.25, 2),
        (10, 0.1, 1),
        (8192, 1.0, 8192),
        (1100, 1.0, 1100),  # all of them, although that is no multiple of 64
        (1100, 0.99, 1088),  # 1089
        (1024, 0.99, 1014),  # rounding to 64 would leave no sink
        (1024, 0.01, 10),  # rounding to 64 would leave no shared neuron
        (1024, 1 / 1024, 1),
    ],
)
def test_shared_neurons(intermediate_size: int, shared_fraction: float, n_shared: int) -> None:
    assert shared_neurons(intermediate_size, shared_fraction) == n_shared


@pytest.mark.parametrize(
    ("intermediate_size", "shared_fraction", "problem"),
    [
        (10, 0.09, "0.9 neurons, but at least 1 must be shared"),
        (8192, 1e-9, "8.19e-06 neurons, but at least 1 must be shared"),
        (10, 0.96, "leaves no sink"),
        (1024, 0.9999, "leaves no sink"),
    ],
)
def test_impossible_fractions_are_refused(intermediate_size: int, shared_fraction: float, problem: str) -> None:
    message = f"sinks.shared_fraction {shared_fraction} of intermediate_size {intermediate_size} "
    with pytest.raises(MemSinksError, match=re.escape(message) + ".*" + re.escape(problem)):
        shared_neurons(intermediate_size, shared_fraction)


@settings(deadline=None)
@given(intermediate_size=st.integers(2, 20_000), shared_fraction=st.floats(0.01, 0.99) | st.just(1.0))
def test_shared_neurons_leave_both_kinds(intermediate_size: int, shared_fraction: float) -> None:
    if shared_fraction == 1:
        assert shared_neurons(intermediate_size, shared_fraction) == intermediate_size
        return
    exact = shared_fraction * intermediate_size
    if exact < 1 or round(exact) == intermediate_size:
        with pytest.raises(MemSinksError, match="shared_fraction"):
            shared_neurons(intermediate_size, shared_fraction)
        return
    n_shared = shared_neurons(intermediate_size, shared_fraction)
    assert 1 <= n_shared < intermediate_size
    if n_shared % 64 == 0 and intermediate_size >= 1024:
        assert abs(n_shared - exact) <= 32
    else:
        assert n_shared == round(exact)
        # only narrow MLPs, and where the multiple of 64 would leave no neuron of one kind
        assert intermediate_size < 1024 or exact < 33 or exact > intermediate_size - 33


# ---- MemSinksConfig

VARIED = {
    "neox": {},
    "gated": dict(mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, parallel_residual=False),
    "gemma": dict(mlp_class_name="GemmaMLP", rope_local_base_freq=1e4, rope_indices=[0, 1], sliding_window_size=4),
    "adjusted": dict(rope_adjustments=dict(factor=2.0), n_query_groups=1, padded_vocab_size=128, name="Gemma-like"),
}


@pytest.mark.parametrize("changes", VARIED.values(), ids=VARIED)
def test_configuration_survives_a_checkpoint(changes: dict[str, Any], tmp_path: Path) -> None:
    config = MemSinksConfig.from_base(tiny(**changes), SinkArgs(0.4, 0.6, 5, "repeated", "inverse"))
    assert MemSinksConfig(**yaml.safe_load(yaml.safe_dump(asdict(config)))) == config
    save_config(config, tmp_path)  # as `litgpt pretrain` does
    assert MemSinksConfig.from_checkpoint(tmp_path) == config
    with pytest.raises(TypeError, match="sink_"):  # stock commands stop at it
        Config.from_checkpoint(tmp_path)


@pytest.mark.parametrize("changes", VARIED.values(), ids=VARIED)
def test_to_base_is_the_stock_configuration_of_the_smaller_model(changes: dict[str, Any]) -> None:
    base = MemSinksConfig.from_base(tiny(**changes), SinkArgs(shared_fraction=0.4)).to_base()
    assert type(base) is Config
    assert base == tiny(**changes, intermediate_size=16)


@pytest.mark.parametrize("name", REGISTERED)
def test_to_base_of_registered_models(name: str) -> None:
    assert MemSinksConfig.from_name(name).to_base() == Config.from_name(name, intermediate_size=REGISTERED[name][4])


def test_from_name_takes_sinks_and_changes() -> None:
    config = MemSinksConfig.from_name("pythia-14m", SinkArgs(shared_fraction=0.5, seed=9), n_layer=1)
    assert config == MemSinksConfig.from_base(Config.from_name("pythia-14m", n_layer=1), SinkArgs(0.5, seed=9))
    assert (config.n_layer, config.sink_seed, config.n_shared) == (1, 9, 256)


def test_from_base_copies() -> None:
    base = tiny(**VARIED["gemma"])
    config = MemSinksConfig.from_base(base, SinkArgs())
    config.rope_indices.append(7)
    config.to_base().rope_indices.append(8)
    assert base == tiny(**VARIED["gemma"])
    assert config.rope_indices == [0, 1, 7]


def test_without_sinks_all_neurons_are_shared() -> None:
    for config in (MemSinksConfig(**asdict(tiny())), MemSinksConfig.from_base(tiny(), SinkArgs(shared_fraction=1.0))):
        assert (config.n_shared, config.n_sink) == (40, 0)
        assert config.to_base() == tiny()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(sink_n_shared=0), "sink_n_shared is 0, but it must lie in [1, intermediate_size = 40]"),
        (dict(sink_n_shared=41), "sink_n_shared is 41, but it must lie in [1, intermediate_size = 40]"),
        (dict(sink_active_probability=0.0), "active_probability is 0.0"),
        (dict(sink_seed=2**31), "seed is 2147483648"),
        (dict(sink_sinks_for="some"), "sinks_for is 'some'"),
        (dict(sink_scale="half"), "scale is 'half'"),
        (dict(sink_method="exact"), "method is 'exact'"),
        (dict(sink_method="mask_exact"), "active_probability is 0.3, but under method mask_exact"),
        (
            dict(sink_method="mask_sgtm", sink_active_probability=1.0, sink_n_shared=32, sink_removed="01"),
            "sink_removed lists removed sinks, but under sink_method mask_sgtm no document has sinks of its own",
        ),
        (dict(sink_mask_version=99), "mask_version is 99"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_saved_values_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(MemSinksError, match=re.escape(problem)):
        MemSinksConfig(**{**asdict(tiny()), **changes})


LATENT_ATTENTION = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
UNSUPPORTED = {
    "mlp_class_name": (dict(mlp_class_name="LLaMAMoE", n_expert=2, n_expert_per_token=1), "'LLaMAMoE'"),
    "latent_attention": (dict(latent_attention=LATENT_ATTENTION), "{'q_lora_rank': 8"),
    "first_k_dense_replace": (dict(first_k_dense_replace=1), "1"),
    "n_expert_groups": (dict(n_expert=4, n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=1), "2"),
    "n_expert": (dict(n_expert=4), "4"),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_architecture_is_refused_by_name_and_value(field: str) -> None:
    changes, value = UNSUPPORTED[field]
    with pytest.raises(MemSinksError, match=re.escape(f"{field} is {value}")):
        MemSinksConfig(**{**asdict(tiny()), **changes})


@pytest.mark.parametrize("field", ["mlp_class_name", "latent_attention", "n_expert_groups", "n_expert"])
def test_unsupported_plain_configuration_is_refused(field: str) -> None:
    changes, value = UNSUPPORTED[field]
    with pytest.raises(MemSinksError, match=re.escape(f"{field} is {value}")):
        MemSinksConfig.from_base(tiny(**changes), SinkArgs())


def test_mixture_of_experts_of_the_registry_is_refused() -> None:
    with pytest.raises(MemSinksError, match=r"mlp_class_name is 'LLaMAMoE'.*'Mixtral-8x7B-v0\.1'"):
        MemSinksConfig.from_name("Mixtral-8x7B-v0.1")


# LitGPT's initialisation of weights finds gated MLPs by their class
FAMILIES = {"LLaMAMLP": litgpt.model.LLaMAMLP, "GemmaMLP": litgpt.model.LLaMAMLP, "GptNeoxMLP": litgpt.model.GptNeoxMLP}


@pytest.mark.parametrize("mlp_class_name", FAMILIES)
def test_mlp_class_is_ours_of_the_same_name(mlp_class_name: str) -> None:
    plain = tiny(mlp_class_name=mlp_class_name)
    mlp_class = MemSinksConfig.from_base(plain, SinkArgs()).mlp_class
    assert mlp_class is getattr(litgpt_memsinks.model.model, mlp_class_name)
    assert issubclass(mlp_class, FAMILIES[mlp_class_name])
    assert type(litgpt.GPT(plain).transformer.h[0].mlp) is getattr(litgpt.model, mlp_class_name)


def test_mlp_classes_are_all_that_are_supported() -> None:
    assert set(FAMILIES) == set(SUPPORTED_MLPS)
