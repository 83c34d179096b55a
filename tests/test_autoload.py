"""How the stock ``litgpt`` gets to know us: the entry point that ``import torch`` calls, as installed."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import litgpt_memsinks
from litgpt_memsinks.plugin import Finder
from tests.console import LIBRARIES, NOT_AUTOLOADED, REPOSITORY, run

REGISTERED = """
import litgpt.config, litgpt.pretrain
dispatcher = litgpt.pretrain.main.__code__.co_filename != litgpt.pretrain.setup.__code__.co_filename
print("Tiny-MemSinks" in litgpt.config.name_to_config, dispatcher)
"""

OURS = {"litgpt_memsinks", "litgpt_memsinks.errors", "litgpt_memsinks.plugin", "litgpt_memsinks.version"}
"""What ``import litgpt_memsinks`` imports of the package."""


def python(code, **settings):
    """What a process prints, stdout and stderr together, that has imported the libraries, but not LitGPT."""
    return run([sys.executable, "-c", f"import sys\n{code}"], imported=LIBRARIES, **settings).stdout


def new_python(code, *options, **settings):
    """What a new process prints, stdout and stderr together."""
    return run([sys.executable, *options, "-c", f"import sys\n{code}"], **settings).stdout


ENDS = ["print(1)", "sys.exit(3)", "sys.exit('no')", "1 / 0", "os.kill(os.getpid(), 9)", "os._exit(4)"]
ENDS += ["import atexit; atexit.register(print, 'end')", "print(sys.argv, os.environ['MINE'], os.getcwd())"]


@pytest.mark.parametrize("code", ENDS)
def test_process_with_its_imports_does_what_a_new_one_does(code):
    """Else the tests that use one would say little."""
    command = [sys.executable, "-c", f"import os, sys\n{code}", "argument"]
    ours, new = (
        run(command, check=False, stderr=subprocess.PIPE, imported=imported, MINE="is there")
        for imported in (LIBRARIES, ())
    )
    assert (ours.returncode, ours.stdout) == (new.returncode, new.stdout)
    assert ours.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_import_of_torch_imports_nothing_else():
    code = """
import torch
packages = {"litgpt", "litgpt_memsinks", "lightning", "litdata", "pyarrow", "xxhash"}
print([name for name in sorted(sys.modules) if name.partition(".")[0] in packages])
"""
    assert new_python(code) == f"{sorted(OURS)}\n"
    assert new_python(code, **NOT_AUTOLOADED) == "[]\n"


def test_import_of_the_package_needs_the_standard_library_only():
    code = """
import litgpt_memsinks
others = [name for name in sorted(sys.modules) if name.partition(".")[0] not in {*sys.stdlib_module_names, "__main__"}]
print(others, litgpt_memsinks.__version__, litgpt_memsinks.MemSinksError.__name__)
"""
    expected = f"{sorted(OURS)} {litgpt_memsinks.__version__} MemSinksError\n"
    assert new_python(code, "-S") == expected  # no site-packages, and nothing that they import at the start


def test_import_of_torch_works_where_the_entry_point_can_be_seen_but_litgpt_is_missing(tmp_path):
    """As for any Python started in the repository's folder after an editable install into another environment."""
    (entry_point,) = entry_points(group="torch.backends", name="litgpt_memsinks")
    seen = tmp_path / "seen-1.dist-info"
    seen.mkdir()
    (seen / "METADATA").write_text("Metadata-Version: 2.1\nName: seen\nVersion: 1\n")
    (seen / "entry_points.txt").write_text(f"[torch.backends]\nseen = {entry_point.value}\n")
    path = os.pathsep.join(map(str, [REPOSITORY, tmp_path, Path(torch.__file__).parent.parent]))
    code = "sys.modules.update(dict.fromkeys(['litgpt', 'lightning', 'jsonargparse', 'litdata']))\nimport torch"
    assert new_python(code, "-S", PYTHONPATH=path) == ""  # -S: what the installation adds to sys.path is missing, too
    assert new_python(f"{code}\nprint('litgpt_memsinks' in sys.modules)", "-S", PYTHONPATH=path) == "True\n"


@pytest.mark.parametrize("environment", [{}, NOT_AUTOLOADED], ids=["auto", "off"])
def test_importing_litgpt_pretrain_registers_models_and_dispatcher_unless_switched_off(environment):
    registered = environment != NOT_AUTOLOADED
    assert python(REGISTERED, **environment) == f"{registered} {registered}\n"


@pytest.mark.parametrize(
    ("imports", "environment"),
    [
        ("import litgpt_memsinks.config", {}),
        ("import litgpt_memsinks.config", NOT_AUTOLOADED),
        ("import litgpt_memsinks.pretrain.pretrain", NOT_AUTOLOADED),
        ("import litgpt_memsinks", NOT_AUTOLOADED),
        ("import litgpt.pretrain, litgpt_memsinks", NOT_AUTOLOADED),
    ],
)
def test_package_registers_both_whatever_is_imported_first(imports, environment):
    assert python(f"{imports}{REGISTERED}", **environment) == "True True\n"


def test_litgpt_config_alone_knows_our_models():
    code = "from litgpt.config import Config; print(Config.from_name('Tiny-MemSinks').n_embd)"
    assert python(f"{code}; print('litgpt.pretrain' in sys.modules)") == "128\nFalse\n"


def test_module_that_is_still_being_executed_is_left_alone():
    code = "from types import ModuleType; sys.modules['litgpt.config'] = ModuleType('litgpt.config')"
    assert python(f"{code}; import litgpt_memsinks") == ""


def test_public_names_are_imported_at_first_use():
    for name in litgpt_memsinks.__all__:
        assert name in dir(litgpt_memsinks)
        assert getattr(litgpt_memsinks, name).__class__ in (type, str)
    with pytest.raises(AttributeError, match="module 'litgpt_memsinks' has no attribute 'MemSinkData'"):
        litgpt_memsinks.MemSinkData  # noqa: B018


NO_MODULE = "sys.modules['litgpt_memsinks.config'] = None"
NO_MODEL = "import litgpt.config; del litgpt.config.name_to_config['SmolLM2-360M']"


@pytest.mark.parametrize(
    ("misfit", "message", "environment"),
    [(NO_MODULE, "ModuleNotFoundError(", {}), (NO_MODEL, "KeyError('SmolLM2-360M')", NOT_AUTOLOADED)],
)
def test_package_that_does_not_fit_litgpt_warns_and_leaves_it_alone(misfit, message, environment):
    code = f"{misfit}\nimport litgpt_memsinks{REGISTERED}litgpt_memsinks.SinkArgs"
    output = python(code, check=False, **environment)
    assert f"LitGPT runs without litgpt-memsinks, which cannot be imported: {message}" in output
    assert "\nFalse False\n" in output  # nothing is done, but who asks for a name of ours gets the error
    assert re.search(rf"^Traceback[^\0]*^{message.partition('(')[0]}: ", output, re.MULTILINE)


def test_data_module_is_not_to_be_had_without_the_dispatcher():
    code = "import litgpt.pretrain; del litgpt.pretrain.main\nfrom litgpt_memsinks import MemSinksData"
    error = python(code, check=False, **NOT_AUTOLOADED).strip().splitlines()[-1]
    assert error.startswith("ImportError: cannot import name 'main' from 'litgpt.pretrain'")


def test_finder_leaves_other_modules_to_others():
    assert Finder().find_spec("litgpt.model", importlib.util.find_spec("litgpt").submodule_search_locations) is None
    assert Finder().find_spec("litgpt.pretrain", []) is None


# --------------------------------------------------------------------------------------------- what an import changes


def test_importing_the_package_does_not_import_litdata():
    """That settles how the process starts others, before its user could say it."""
    code = "import litgpt_memsinks.pretrain.pretrain; litgpt_memsinks.MemSinksData; print('litdata' in sys.modules)"
    assert python(code, **NOT_AUTOLOADED).split()[-1] == "False"


def test_importing_the_package_replaces_two_attributes_of_litgpt():
    code = """
import litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data
modules = [litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data]
before = [dict(vars(module)) for module in modules]
names = set(litgpt.config.name_to_config)
import litgpt_memsinks.__main__
litgpt_memsinks.__main__.build_parser()  # imports all commands
changed = {
    (module.__name__, key)
    for module, old in zip(modules, before)
    for key in old
    if not key.startswith("__") and vars(module).get(key) is not old[key]
}
print(sorted(changed), sorted(name for name in set(litgpt.config.name_to_config) - names if "MemSinks" not in name))
"""
    assert (
        python(code, **NOT_AUTOLOADED).strip().splitlines()[-1]
        == "[('litgpt.pretrain', 'L'), ('litgpt.pretrain', 'main')] []"
    )


def test_autoloading_the_package_replaces_the_same_attributes():
    code = """
import inspect, litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data
for module in [litgpt.pretrain, litgpt.model, litgpt.config, litgpt.utils, litgpt.data]:
    for key, value in vars(module).items():
        code = getattr(value, "__code__", value if inspect.isclass(value) else type(value))
        print("attribute", module.__name__, key, getattr(code, "co_filename", code))
"""
    with_us, without = (python(code, **env).splitlines() for env in ({}, NOT_AUTOLOADED))
    assert len(without) > 200
    changed = {tuple(line.split()[1:3]) for line in set(with_us) ^ set(without)}
    assert changed == {("litgpt.pretrain", "L"), ("litgpt.pretrain", "main")}
