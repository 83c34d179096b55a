"""Data flows one way: no stage imports a later one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.console import REPOSITORY

PACKAGE = REPOSITORY / "litgpt_memsinks"
STAGES = [
    "corpus",
    "document_ids",
    "prepare",
    "data",
    "sinks",
    "model",
    "pretrain",
    "drop_sinks",
    "evaluate",
    "report",
]
SHARED = {"errors", "files", "version", "corpus_files", "manifest", "config", "checkpoint", "metrics"}
"""Modules that stages meet through. ``config`` names ``sinks``' version and ``model``'s classes, as LitGPT's does."""
WHOLE = {"__init__", "__main__", "demo", "bench"}
"""Modules that see all stages."""


def imports(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found = {name.split(".")[1] for name in names if name.startswith("litgpt_memsinks.")}
    direct = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "litgpt_memsinks"]
    return found | {alias.name for node in direct for alias in node.names if alias.name in {*STAGES, *SHARED, *WHOLE}}


def test_every_module_has_a_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*STAGES, *SHARED, *WHOLE}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_a_later_one(stage):
    later = set(STAGES[STAGES.index(stage) + 1 :])
    assert not imports(stage) & (later | WHOLE)


@pytest.mark.parametrize("module", sorted(SHARED - {"config", "checkpoint"}))
def test_shared_modules_import_no_stage(module):
    assert not imports(module) & {*STAGES, *WHOLE}


def test_importing_the_package_replaces_one_attribute_of_litgpt():
    code = """
import litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data
modules = [litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data]
before = [dict(vars(module)) for module in modules]
names = set(litgpt.config.name_to_config)
import litgpt_memsinks, litgpt_memsinks.__main__
changed = {
    (module.__name__, key)
    for module, old in zip(modules, before)
    for key in old
    if not key.startswith("__") and vars(module).get(key) is not old[key]
}
print(sorted(changed), sorted(name for name in set(litgpt.config.name_to_config) - names if "MemSinks" not in name))
"""
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": str(Path(sys.executable).parent)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.strip().splitlines()[-1] == "[('litgpt.pretrain', 'main')] []"
