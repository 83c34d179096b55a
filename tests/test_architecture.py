"""Data flows one way: no stage imports a later one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.console import NOT_AUTOLOADED, REPOSITORY, run

PACKAGE = REPOSITORY / "litgpt_memsinks"
STAGES = [
    "corpus",
    "document_ids",
    "encoding",
    "near_duplicates",
    "tokenizing",
    "planning",
    "writing",
    "tables",
    "prepare",
    "scored",
    "data",
    "sinks",
    "model",
    "run",
    "launch",
    "watch",
    "saving",
    "resuming",
    "preemption",
    "pretrain",
    "drop_sinks",
    "evaluate",
    "report_results",
    "report_table",
    "report_charts",
    "report_svg",
    "report_figures",
    "report_verdict",
    "report_examples",
    "report_page",
    "report",
]
SHARED = {
    "errors",
    "files",
    "version",
    "mixture",
    "corpus_files",
    "find_files",
    "file_formats",
    "manifest",
    "config",
    "checkpoint",
    "metrics",
    "remote",
    "plain_http",
    "resumable_loader",
    "chunks",
}
"""Modules that stages meet through. ``config`` names ``sinks``' version and ``model``'s classes, as LitGPT's does."""
TOOLS = {"document_table", "document_walk", "inspect_data", "lookup", "verify"}
"""Modules that look at a prepared folder: what `prepare` wrote, before any model."""
WHOLE = {
    *("__init__", "__main__", "plugin", "demo", "bench", "bench_loader", "bench_data", "near_duplicate_table"),
    *("plan", "schedule", "sizing", "expectations", "full_size"),
}
"""Modules that see all stages."""


def imports(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found = {name.split(".")[1] for name in names if name.startswith("litgpt_memsinks.")}
    direct = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "litgpt_memsinks"]
    return found | {
        alias.name for node in direct for alias in node.names if alias.name in {*STAGES, *SHARED, *TOOLS, *WHOLE}
    }


def test_every_module_has_a_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*STAGES, *SHARED, *TOOLS, *WHOLE}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_a_later_one(stage):
    later = set(STAGES[STAGES.index(stage) + 1 :])
    assert not imports(stage) & (later | TOOLS | WHOLE)


@pytest.mark.parametrize("module", sorted(SHARED - {"config", "checkpoint"}))
def test_shared_modules_import_no_stage(module):
    assert not imports(module) & {*STAGES, *TOOLS, *WHOLE}


@pytest.mark.parametrize("module", sorted(TOOLS))
def test_tools_import_no_stage_behind_data(module):
    later = set(STAGES[STAGES.index("data") + 1 :])
    assert imports(module)
    assert not imports(module) & (later | WHOLE)


def test_importing_the_package_does_not_import_litdata():
    """That settles how the process starts others, before its user could say it."""
    code = "import sys, litgpt_memsinks.pretrain; litgpt_memsinks.MemSinksData; print('litdata' in sys.modules)"
    assert run([sys.executable, "-c", code]).stdout.split()[-1] == "False"


def test_importing_the_package_replaces_two_attributes_of_litgpt():
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
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": str(Path(sys.executable).parent), **NOT_AUTOLOADED}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.strip().splitlines()[-1] == "[('litgpt.pretrain', 'L'), ('litgpt.pretrain', 'main')] []"


def test_autoloading_the_package_replaces_the_same_attributes():
    code = """
import inspect, litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data
for module in [litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data]:
    for key, value in vars(module).items():
        code = getattr(value, "__code__", value if inspect.isclass(value) else type(value))
        print("attribute", module.__name__, key, getattr(code, "co_filename", code))
"""
    with_us, without = (run([sys.executable, "-c", code], **env).stdout.splitlines() for env in ({}, NOT_AUTOLOADED))
    assert len(without) > 200
    changed = {tuple(line.split()[1:3]) for line in set(with_us) ^ set(without)}
    assert changed == {("litgpt.pretrain", "L"), ("litgpt.pretrain", "main")}
