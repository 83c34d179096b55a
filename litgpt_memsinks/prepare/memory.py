"""Memory of worker processes: what they free serves their next batch, instead of going back to the system.

The C library (glibc) gives a large block back as soon as it is freed, and the system clears every page that it hands
out again. A worker that fills some blocks of the same size over and over pays for that each time: a third of the time
in which a stream was written.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = 1 << 29
"""Bytes that may be free at the heap's end before it shrinks: some chunks of a stream, at their default size"""
_FROM_THE_HEAP = 1 << 27  # bytes of a block; a larger one still comes from the system, each time anew


def keep_freed_memory() -> None:
    """Let this process use again what it frees. Does nothing where the C library is another than glibc."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, KEPT)
        library.mallopt(_MMAP_THRESHOLD, _FROM_THE_HEAP)
