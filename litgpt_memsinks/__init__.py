"""Memorization Sinks for LitGPT: pretrain on repeated text, then drop what was memorised of it.

Importing the package imports neither LitGPT nor PyTorch. When LitGPT is imported, ``litgpt.config`` learns our models
and a dispatcher is put in front of ``litgpt.pretrain.main`` and of its Fabric (`plugin.py`). Runs whose data is not
``MemSinksData`` are untouched.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.plugin import wait
from litgpt_memsinks.version import __version__

__all__ = ["MemSinksConfig", "MemSinksData", "MemSinksError", "SinkArgs", "__version__"]

if TYPE_CHECKING:
    from litgpt_memsinks.config import MemSinksConfig, SinkArgs
    from litgpt_memsinks.data.data import MemSinksData
else:  # to a type checker, __getattr__ would stand for any name
    LAZY = {"MemSinksConfig": "config", "MemSinksData": "data.data", "SinkArgs": "config"}

    def __getattr__(name):
        """Import a public name at its first use (PEP 562)."""
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module("litgpt_memsinks.pretrain.pretrain")  # or its error, of which `plugin.py` would only warn
        return getattr(import_module(f"litgpt_memsinks.{LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


wait()
