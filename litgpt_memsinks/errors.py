"""The one exception that means "you can fix this": its text names the value, the limit and the next step."""

import sys
from contextlib import suppress
from typing import NoReturn


class MemSinksError(ValueError):
    """A mistake in the input that its user can fix.

    The console script, and the stock ``litgpt pretrain`` once it trains a MemSinks model, print it as one line and
    exit with a non-zero status. Library callers can catch it as a ``ValueError``.
    """


def end(error: object) -> NoReturn:
    """End the process with one line on stderr and status 1.

    What was printed before may still wait in a buffer, and would come behind the error where both go to one log.
    """
    with suppress(OSError):  # nobody reads it, or its disk is full: the error is what counts
        sys.stdout.flush()
    sys.exit(f"Error: {error}")
