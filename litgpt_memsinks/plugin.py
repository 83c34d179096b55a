"""How does ``litgpt`` find us? PyTorch has us wait for two of LitGPT's modules.

LitGPT has no plugin entry points, but PyTorch has: ``import torch`` ends by calling those in the group
``torch.backends``, "Autoloading Out-of-Tree Extension" in its tutorials. Ours is `wait`. It imports nothing until
somebody imports a module named in `EXTENSIONS`, and then what extends it. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches
it off.

Whoever can see our entry point must be able to import this module, or ``import torch`` fails. An editable install
leaves the entry point in the repository's folder, where any environment's Python sees it. So this module and the
package's ``__init__`` need the standard library only.
"""

from __future__ import annotations  # for PyTorch releases that run on Python 3.9

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NamedTuple


class Extension(NamedTuple):
    """What extends a module of LitGPT."""

    module: str
    """Module of ours. Importing it is all"""
    needs: str
    """What it extends. Not there yet while LitGPT's module is still being executed"""


EXTENSIONS = {
    "litgpt.config": Extension("litgpt_memsinks.config", needs="name_to_config"),
    "litgpt.pretrain": Extension("litgpt_memsinks.pretrain.pretrain", needs="main"),
}


class Finder(MetaPathFinder):
    """Finds the modules in `EXTENSIONS` only, where Python itself would, and adds a step to their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``. ``None`` leaves a module to the other finders."""
        if fullname not in EXTENSIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            parent, _, name = fullname.rpartition(".")
            setattr(sys.modules[parent], name, module)  # Python does so a moment later, but we need it already
            extend(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign] # this loader serves this module only
        return spec


FINDER = Finder()


def extend(name: str) -> None:
    """Import what extends a module of LitGPT.

    What does not fit the installed LitGPT must not stop runs that do not need it: it warns instead. Who asks for a name
    of ours gets the error.
    """
    try:
        import_module(EXTENSIONS[name].module)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        # stacklevel 1: the same place and text for both modules, shown once
        warnings.warn(f"LitGPT runs without litgpt-memsinks, which cannot be imported: {error!r}.", stacklevel=1)


def wait() -> None:
    """Extend LitGPT's modules: those that are imported already now, the others when they are. Idempotent."""
    if FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, FINDER)
    for name, extension in EXTENSIONS.items():
        if hasattr(sys.modules.get(name), extension.needs):
            extend(name)
