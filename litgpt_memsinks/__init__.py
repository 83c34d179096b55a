"""Memorization Sinks for LitGPT: pretrain on repeated text, then drop what was memorised of it.

Importing the package registers its models with LitGPT and puts a dispatcher in front of ``litgpt.pretrain.main``
(`pretrain.py`). Runs whose data is not ``MemSinksData`` are untouched.
"""

from litgpt_memsinks.config import MemSinksConfig, SinkArgs, register_models
from litgpt_memsinks.data import MemSinksData
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.pretrain import install
from litgpt_memsinks.version import __version__

__all__ = ["MemSinksConfig", "MemSinksData", "MemSinksError", "SinkArgs", "__version__"]

register_models()
install()
