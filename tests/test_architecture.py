"""Data flows one way: no stage imports a later one."""

import ast

import pytest

from tests.console import REPOSITORY

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
    "goldfish",
    "data",
    "sinks",
    "model",
    "gradient_masking",
    "run",
    "launch",
    "watch",
    "saving",
    "resuming",
    "preemption",
    "pretrain",
    "losses",
    *("difference", "affected", "before_after", "certificate_page", "certificate"),
    *("plain_weights", "kept", "hf_config", "drop_sinks", "export_hf"),
    *("pool", "remove", "generate"),
    *("certificate_file", "verify_removal"),
    *("huggingface", "subject", "extraction", "membership", "relearning", "battery", "curve", "results", "verdict"),
    "evaluate",
    *("eval_configs", "export_evals"),
    *("report_schema", "report_results", "report_table", "report_charts", "report_svg", "report_figures"),
    *("localise_neurons", "localise_hard_concrete", "localise_gradients", "localise_activation", "localise_zero_out"),
    *("localise_random", "localise_scores", "localise_frontier", "localise_file", "localise", "localise_tune"),
    "drop_neurons",
    *("report_results", "report_table", "report_charts", "report_svg", "report_figures"),
    *("report_verdict", "report_examples", "report_page"),
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
    "bootstrap",
    "remote",
    "plain_http",
    "resumable_loader",
    "chunks",
    "digests",
}
"""Modules that stages meet through. ``config`` names ``sinks``' version and ``model``'s classes, as LitGPT's does."""
TOOLS = {"chosen", "document_table", "document_walk", "inspect_data", "lookup", "similar", "verify"}
"""Modules that look at a prepared folder: what `prepare` wrote, before any model. Stages behind training use them."""
WHOLE = {
    *("__init__", "__main__", "plugin", "demo", "frontier"),
    *("bench", "bench_loader", "bench_generate", "bench_evaluate", "bench_data"),
    *("near_duplicate_table", "id_changes", "removal_curve", "release_size"),
    *("plan", "schedule", "sizing", "expectations", "full_size"),
    *("theory", "theory_entanglement", "theory_coadaptation", "theory_forgetting", "theory_accumulation"),
    *("theory_verdict", "theory_figures"),
    *("training_runs", "experiment", "experiments", "experiment_scales", "experiment_runs", "experiment_found"),
    *("experiment_measures", "experiment_verdict", "experiment_results", "experiment_figures", "experiment_report"),
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
    tools = TOOLS if STAGES.index(stage) <= STAGES.index("pretrain") else set()
    assert not imports(stage) & (later | tools | WHOLE)


@pytest.mark.parametrize("module", sorted(SHARED - {"config", "checkpoint"}))
def test_shared_modules_import_no_stage(module):
    assert not imports(module) & {*STAGES, *TOOLS, *WHOLE}


@pytest.mark.parametrize("module", sorted(TOOLS))
def test_tools_import_no_stage_behind_data(module):
    later = set(STAGES[STAGES.index("data") + 1 :])
    assert imports(module)
    assert not imports(module) & (later | WHOLE)
