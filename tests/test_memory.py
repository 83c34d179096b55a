"""Does a worker use again what it frees? Counted in page faults: the system clears a page for each."""

import platform
import resource
import subprocess
import sys

import pytest

from tests.console import REPOSITORY

CODE = """
import resource, sys
from litgpt_memsinks.prepare.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
block = b"x" * (16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    copies = [bytes(bytearray(block)) for _ in range(4)]
    del copies
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", CODE, argument], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another than glibc")
def test_freed_memory_is_used_again() -> None:
    """80 blocks of 16 MiB; at most five of them are there at once."""
    pages = (16 << 20) // resource.getpagesize()
    assert faults("keep") < 10 * pages
    assert faults("") > 20 * pages  # what it is for
