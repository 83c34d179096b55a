"""The one exception that means "you can fix this": its text names the value, the limit and the next step."""


class MemSinksError(ValueError):
    """A mistake in the input that its user can fix.

    The console script, and the stock ``litgpt pretrain`` once it trains a MemSinks model, print it as one line and
    exit with a non-zero status. Library callers can catch it as a ``ValueError``.
    """
