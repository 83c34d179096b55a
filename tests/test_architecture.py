"""Data flows one way: no stage imports a later one, and no module is part of a circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.console import REPOSITORY

PACKAGE = REPOSITORY / "litgpt_memsinks"
STAGES = [
    *("corpus", "document_ids", "prepare", "data", "sinks", "model", "pretrain"),
    *("plan", "prepared", "certificate", "drop_sinks", "remove", "evaluate", "localise", "report"),
]
WHOLE = ["theory", "experiments", "bench"]
"""Packages that may use all stages, and that no stage uses."""
SHARED = {"__init__", "__main__", "plugin", "version", "errors", "files", "digests", "remote", "plain_http", "metrics"}
SHARED |= {"config", "progress"}
"""Modules that stages meet through. ``config`` names the masks' version and the model's classes, as LitGPT's does."""


def modules():
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return {".".join(path.parts): PACKAGE / path.with_suffix(".py") for path in paths}


def imports(path):
    """Modules of this package that a file imports at its top or within functions, as PACKAGE.MODULE."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("litgpt_memsinks.") for name in found} & set(modules())


def stage_of(module):
    return module.partition(".")[0]


def test_every_module_has_a_place():
    assert {stage_of(name) for name in modules()} == {*STAGES, *WHOLE, *SHARED}
    assert {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"} == {f"{name}.py" for name in SHARED}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_a_later_one(stage):
    later = {*STAGES[STAGES.index(stage) + 1 :], *WHOLE}
    found = {name: imports(path) for name, path in modules().items() if stage_of(name) == stage}
    assert any(found.values()) or stage == "sinks"
    wrong = {name: [other for other in others if stage_of(other) in later] for name, others in found.items()}
    assert not {name: others for name, others in wrong.items() if others}


@pytest.mark.parametrize("module", sorted(SHARED - {"config", "__main__", "__init__", "plugin"}))
def test_shared_modules_import_no_stage(module):
    assert not {stage_of(name) for name in imports(PACKAGE / f"{module}.py")} - SHARED


def test_no_module_is_part_of_a_circle():
    """But for `config`, whose `mlp_class` names the model's classes within a function."""
    graph = {name: imports(path) - {name} for name, path in modules().items() if name not in SHARED}
    assert len(list(TopologicalSorter({name: found - SHARED for name, found in graph.items()}).static_order())) > 90
