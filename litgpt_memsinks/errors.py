"""The one exception that means "you can fix this": its text names the value, the limit and the next step."""

import sys
from contextlib import suppress
from typing import NoReturn


class MemSinksError(ValueError):
    """A mistake in the input that its user can fix.

    The console script, and the stock ``litgpt pretrain`` once it trains a MemSinks model, print it as one line and
    exit with a non-zero status. Library callers can catch it as a ``ValueError``.
    """


def flush_output() -> None:
    """Print what still waits in a buffer, which would come behind an error where both streams go to one log."""
    with suppress(OSError):  # nobody reads it any more, or its disk is full: the error is what counts
        sys.stdout.flush()


def end(error: object) -> NoReturn:
    """End the process with one line on stderr, behind all that was printed before, and status 1."""
    flush_output()
    sys.exit(f"Error: {error}")
