"""Every recipe is one that the stock command line parses, and the demo's arms differ in nothing they need not."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from litgpt.pretrain import setup

from litgpt_memsinks import MemSinksData
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.demo import ARMS

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(path for path in RECIPES.rglob("*.yaml") if "data" not in path.relative_to(RECIPES).parts[:-1])
"""The training recipes; those of `recipes/data` are covered by test_data_recipes.py."""


def parse(recipe):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(setup)
    return parser.instantiate_classes(parser.parse_args(["--config", str(recipe)]))


def test_there_are_recipes():
    assert {path.name for path in RECIPES.glob("*.yaml")} == {"smollm360_memsinks.yaml"}
    assert {path.stem for path in (RECIPES / "demo").glob("*.yaml")} == set(ARMS)


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_is_parsed_by_litgpt(recipe):
    settings = parse(recipe)
    assert isinstance(settings.data, MemSinksData)
    config = MemSinksConfig.from_name(settings.model_name, settings.data.sinks)
    assert settings.train.max_seq_length <= config.block_size
    assert settings.optimizer["init_args"]["lr"] == settings.train.min_lr  # constant after warm-up, as in the paper


def test_full_size_recipe_is_the_papers():
    settings = parse(RECIPES / "smollm360_memsinks.yaml")
    assert settings.train.global_batch_size == 1024
    assert settings.train.max_tokens == 1_000_000_000
    assert settings.optimizer["init_args"]["lr"] == 5e-4
    assert settings.optimizer["init_args"]["weight_decay"] == 0.1
    assert settings.train.tie_embeddings is True


ARM_DIFFERENCES = {"data.init_args.data_path", "data.init_args.sinks", "out_dir"}


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_arms_differ_only_in_what_they_must(arm):
    standard, other = (yaml.safe_load((RECIPES / f"demo/{name}.yaml").read_text()) for name in ("standard", arm))
    init_args = [recipe["data"].pop("init_args") for recipe in (standard, other)]
    different = {key for key in standard.keys() | other.keys() if standard.get(key) != other.get(key)}
    different |= {
        f"data.init_args.{key}" for key in init_args[0] | init_args[1] if init_args[0].get(key) != init_args[1].get(key)
    }
    assert different <= ARM_DIFFERENCES
    assert init_args[1]["data_path"].rsplit("/", 1)[1] == ARMS[arm]
