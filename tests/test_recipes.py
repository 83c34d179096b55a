"""Every recipe is one that the stock command line parses, its table is the plan's, and arms differ in nothing else."""

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import litgpt.__main__
import pytest
import torch
import yaml
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.pretrain import setup

from litgpt_memsinks import MemSinksData
from litgpt_memsinks.__main__ import build_parser
from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.corpus.mixture import NearDuplicates, Source, ValidationSet
from litgpt_memsinks.experiments.demo import ARMS
from litgpt_memsinks.plan.plan import Throughput, make_plan, parse_pretrain
from litgpt_memsinks.prepare.prepare import prepare

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(path for ending in ("yaml", "yml") for path in RECIPES.rglob(f"*.{ending}"))
"""Every recipe at any depth: a new one is included."""
TRAINING = [path for path in ALL if "model_name" in yaml.safe_load(path.read_text(encoding="utf-8"))]
DATA = [path for path in ALL if "sources" in yaml.safe_load(path.read_text(encoding="utf-8"))]
SIZES = {"smollm360": (1_000_000_000, 5e-4), "smollm1.7b": (2_000_000_000, 5e-5)}
LARGE_ARMS = ("memsinks", "standard", "deduplicated", "memsinks_20repeats", "standard_20repeats")
BASELINES = {
    "mask_exact": {"sinks"},
    "mask_cloud": {"sinks"},
    "mask_sgtm": {"sinks"},
    "goldfish": {"goldfish"},
    "memsinks_goldfish": {"goldfish", "sinks"},
    "dropped_width": {"model_config"},
}
"""Recipes beside the demo's arms, and in what they differ from its standard training."""
LARGE = {f"{size}_{arm}" for size in SIZES for arm in LARGE_ARMS}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(RECIPES)) for path in paths]


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stock ``litgpt pretrain --config RECIPE`` calls its function with."""
    received: dict[str, Any] = {}

    @wraps(setup)
    def record(**settings: Any) -> None:
        received.update(settings)

    monkeypatch.setitem(litgpt.__main__.PARSER_DATA, "pretrain", record)
    monkeypatch.setattr(sys, "argv", ["litgpt", "pretrain", "--config", str(recipe)])
    litgpt.__main__.main()
    return received


def flat(value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {where: value}
    return {key: item for name, part in value.items() for key, item in flat(part, f"{where}.{name}").items()}


def differing(one: Path, other: Path) -> set[str]:
    """Names of the settings in which two recipes differ."""
    first, second = flat(content(one)), flat(content(other))
    keys = first.keys() | second.keys()
    return {key.lstrip(".") for key in keys if first.get(key, "absent") != second.get(key, "absent")}


# ------------------------------------------------------------------------------------------------------------ all files


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == LARGE
    assert {path.stem for path in (RECIPES / "demo").glob("*.yaml")} == {*ARMS, *BASELINES}


def test_every_recipe_is_for_training_or_for_data() -> None:
    settings = [RECIPES / "frontier/settings.yaml"]  # of `litgpt-memsinks frontier`: test_frontier.py
    assert sorted([*TRAINING, *DATA, *settings]) == ALL
    assert len(DATA) == 16


@pytest.mark.parametrize("recipe", TRAINING, ids=names(TRAINING))
def test_recipe_is_parsed_by_litgpt(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(recipe, monkeypatch)
    assert isinstance(settings["data"], MemSinksData)
    config = MemSinksConfig.from_name(settings["model_name"], settings["data"].sinks)
    assert settings["train"].max_seq_length <= config.block_size
    assert settings["optimizer"]["init_args"]["lr"] == settings["train"].min_lr  # constant after warm-up
    assert str(settings["out_dir"]).endswith(recipe.stem)


@pytest.mark.parametrize("recipe", DATA, ids=names(DATA))
def test_recipe_is_parsed_by_prepare(recipe: Path) -> None:
    command = ["prepare", "--config", str(recipe), "--out_dir", "out", "--tokenizer_dir", "tokenizer"]
    parser = build_parser("prepare")
    settings = parser.instantiate_classes(parser.parse_args(command)).prepare
    assert all(isinstance(source, Source) for source in settings.sources.values())


def documented(kind: type) -> set[str]:
    """Fields of a dataclass with a string under them, in its source or its bases'."""
    found = set()
    for base in filter(is_dataclass, kind.__mro__):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                assert isinstance(below.value, ast.Constant)
                found.add(field.target.id)
    return found


def unknown(recipe: dict[str, Any], owners: dict[str, set[str]]) -> set[str]:
    """Settings that no owner knows; a pattern as in ``sources.*`` names all that are below it."""
    found = set()
    for name in flat(recipe):
        where, key = name.lstrip(".").rpartition(".")[::2]
        keys = [known for pattern, known in owners.items() if re.fullmatch(pattern.replace("*", r"[^.]+"), where)]
        if not any(key in known for known in keys):
            found.add(name)
    return found


LITGPTS = {"train": TrainArgs, "eval": EvalArgs, "log": LogArgs}
TRAINING_OWNERS = {
    "": set(inspect.signature(setup).parameters),
    "model_config": {field.name for field in fields(Config)},
    **{name: {field.name for field in fields(kind)} for name, kind in LITGPTS.items()},
    "optimizer": {"class_path", "init_args"},
    "optimizer.init_args": set(inspect.signature(torch.optim.AdamW).parameters),
    "data": {"class_path", "init_args"},
    "data.init_args": documented(MemSinksData),
    "data.init_args.sinks": documented(SinkArgs),
    **{  # a setting of ours that is a dataclass itself, such as data.init_args.launch
        f"data.init_args.{field.name}": documented(field.default_factory)
        for field in fields(MemSinksData)
        if isinstance(field.default_factory, type) and is_dataclass(field.default_factory)
    },
}
DATA_OWNERS = {
    "": set(inspect.signature(prepare).parameters),
    r"sources\.*": documented(Source),
    r"sources\.*\.(include|exclude)": {"redpajama_set_name"},
    r"validation\.*": documented(ValidationSet),
    "near_duplicates": documented(NearDuplicates),
}


@pytest.mark.parametrize("recipe", TRAINING, ids=names(TRAINING))
def test_every_setting_is_litgpts_or_documented(recipe: Path) -> None:
    assert content(recipe)["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert unknown(content(recipe), TRAINING_OWNERS) == set()


@pytest.mark.parametrize("recipe", DATA, ids=names(DATA))
def test_every_setting_of_data_is_documented(recipe: Path) -> None:
    settings = content(recipe)
    for reading in [*settings["sources"].values(), *settings["validation"].values()]:
        for name in ("include", "exclude"):
            if name in reading:
                reading[name] = "fields of the corpus"
    assert unknown(settings, DATA_OWNERS) == set()


def test_a_setting_that_nobody_knows_is_found() -> None:
    recipe = content(RECIPES / "smollm360_memsinks.yaml")
    recipe["data"]["init_args"]["sinks"]["shared_fracton"] = 0.7
    recipe["train"]["no_such"] = 1
    assert unknown(recipe, TRAINING_OWNERS) == {".data.init_args.sinks.shared_fracton", ".train.no_such"}


# ------------------------------------------------------------------------------------------------------- the large runs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", LARGE_ARMS)
def test_large_recipe_is_the_papers(size: str, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(RECIPES / f"{size}_{arm}.yaml", monkeypatch)
    tokens, rate = SIZES[size]
    train, optimizer, sinks = settings["train"], settings["optimizer"]["init_args"], settings["data"].sinks
    assert settings["model_name"] == {"smollm360": "SmolLM-360M", "smollm1.7b": "SmolLM-1.7B"}[size] + "-MemSinks"
    assert (train.max_tokens, train.global_batch_size, train.max_seq_length) == (tokens, 1024, 2048)
    assert (optimizer["lr"], train.min_lr, optimizer["weight_decay"]) == (rate, rate, 0.1)
    assert train.tie_embeddings is True
    assert sinks.shared_fraction == (0.7 if arm.startswith("memsinks") else 1.0)
    assert sinks.active_probability == (0.3 if arm.startswith("memsinks") else None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", LARGE_ARMS)
def test_large_recipe_reads_what_its_data_recipe_writes(size: str, arm: str) -> None:
    text = (RECIPES / f"{size}_{arm}.yaml").read_text(encoding="utf-8")
    (mixture,) = re.findall(r"prepare --config (\S+)", text)
    suffix = "_deduplicated" if arm == "deduplicated" else arm.removeprefix("memsinks").removeprefix("standard")
    assert mixture == f"recipes/data/{size}_slimpajama_tinystories{suffix}.yaml"
    data_path = yaml.safe_load(text)["data"]["init_args"]["data_path"]
    written = (RECIPES.parent / mixture).read_text(encoding="utf-8")
    assert f"--out_dir {data_path}\n" in written
    assert f"--out_dir {data_path}\n" in text
    budget = content(RECIPES.parent / mixture)["sources"]["slimpajama_train"]["fill_to"]
    assert budget == yaml.safe_load(text)["train"]["max_tokens"]
    for command in re.findall(r"pretrain --config (\S+)", text):
        assert command == f"recipes/{size}_{arm}.yaml"


SINKS = {"data.init_args.sinks." + name for name in ("shared_fraction", "active_probability", "sinks_for", "scale")}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("one", "other", "may_differ"),
    [
        ("memsinks", "standard", {"out_dir", *SINKS}),
        ("standard", "deduplicated", {"out_dir", "data.init_args.data_path"}),
        ("memsinks_20repeats", "standard_20repeats", {"out_dir", *SINKS}),
        ("memsinks", "memsinks_20repeats", {"out_dir", "data.init_args.data_path"}),
        ("standard", "standard_20repeats", {"out_dir", "data.init_args.data_path"}),
    ],
)
def test_large_arms_differ_only_in_what_they_compare(size: str, one: str, other: str, may_differ: set[str]) -> None:
    assert differing(RECIPES / f"{size}_{one}.yaml", RECIPES / f"{size}_{other}.yaml") == may_differ


@pytest.mark.parametrize("arm", LARGE_ARMS)
def test_sizes_differ_only_in_the_papers_settings_and_in_devices(arm: str) -> None:
    assert differing(*(RECIPES / f"{size}_{arm}.yaml" for size in SIZES)) == {
        *("model_name", "out_dir", "data.init_args.data_path", "devices", "data.init_args.launch.strategy"),
        *("train.max_tokens", "train.min_lr", "train.lr_warmup_steps", "train.save_interval", "optimizer.init_args.lr"),
    }


HEADER = (
    "| recipe | data recipe | tokens | steps | parameters | of them sinks | memory of a device | "
    "GPU-hours, estimated | GPU-hours, measured | a checkpoint | dropped |"
)


def row(name: str) -> str:
    """A recipe's row of the table in recipes/README.md, by the plan."""
    recipe = RECIPES / f"{name}.yaml"
    result = make_plan(parse_pretrain(["--config", str(recipe)]), Throughput(mfu=0.4, peak_tflops=989))
    (memory,) = (
        one["total"]
        for one in result["memory"]
        if (one["strategy"], one["precision"]) == (result["strategy"], result["precision"])
        and one["compiled"]
        and not one["checkpointing"]
    )
    (mixture,) = re.findall(r"prepare --config recipes/(\S+)", recipe.read_text(encoding="utf-8"))
    devices, parameters, disk = result["schedule"]["devices"], result["parameters"], result["disk"]
    cells = [
        f"[{name}]({name}.yaml)",
        f"[{mixture.removeprefix('data/').removesuffix('.yaml')}]({mixture})",
        f"{result['schedule']['tokens'] / 1e9:.2f}B",
        f"{result['schedule']['steps']:,}",
        f"{parameters['total'] / 1e6:,.1f}M",
        f"{parameters['sinks'] / 1e6:,.1f}M" if parameters["sinks"] else "–",
        f"{memory / 1e9:.1f} GB × {devices}",
        f"{result['compute']['device_hours']:.1f}",
        "",
        f"{disk['step_checkpoint'] / 1e9:.1f} GB",
        f"{disk['dropped_float32'] / 1e9:.1f} GB" if parameters["sinks"] else "–",
    ]
    return "| " + " | ".join(cells).replace(" |  | ", " | | ") + " |"


def test_table_of_the_readme_is_the_plans() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = [row(f"{size}_{arm}") for size in SIZES for arm in LARGE_ARMS]
    assert "\n".join([HEADER, "|" + "---|" * HEADER.count(" | ") + "---|", *rows]) in text


# ------------------------------------------------------------------------------------------------------ the demo's arms

ARM_DIFFERENCES = {"data.init_args.data_path", "data.init_args.sinks", "out_dir"}


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_arms_differ_only_in_what_they_must(arm: str) -> None:
    standard, other = (RECIPES / f"demo/{name}.yaml" for name in ("standard", arm))
    different = {re.sub(r"(sinks)\..*", r"\1", name) for name in differing(standard, other)}
    assert different <= ARM_DIFFERENCES
    assert content(other)["data"]["init_args"]["data_path"].rsplit("/", 1)[1] == ARMS[arm]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_only_in_what_they_must(name: str) -> None:
    standard, other = (RECIPES / f"demo/{recipe}.yaml" for recipe in ("standard", name))
    parts = {setting.removeprefix("data.init_args.").split(".")[0] for setting in differing(standard, other)}
    assert parts == {"out_dir", *BASELINES[name]}
    assert f"[{name}](demo/{name}.yaml)" in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_kinds_of_gradient_masking_have_the_sinks_of_memsinks() -> None:
    memsinks = content(RECIPES / "demo/memsinks.yaml")["data"]["init_args"]["sinks"]
    for method in ("mask_exact", "mask_cloud", "mask_sgtm"):
        sinks = content(RECIPES / f"demo/{method}.yaml")["data"]["init_args"]["sinks"]
        assert sinks == {"shared_fraction": memsinks["shared_fraction"], "method": method}
    goldfish = content(RECIPES / "demo/memsinks_goldfish.yaml")["data"]["init_args"]
    assert goldfish["sinks"] == memsinks
    assert goldfish["goldfish"] == content(RECIPES / "demo/goldfish.yaml")["data"]["init_args"]["goldfish"]


def test_dropped_width_is_the_plain_model_that_memsinks_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parse(RECIPES / "demo/dropped_width.yaml", monkeypatch)
    whole = parse(RECIPES / "demo/memsinks.yaml", monkeypatch)
    assert plain["model_config"] == MemSinksConfig.from_name(whole["model_name"], whole["data"].sinks).to_base()
