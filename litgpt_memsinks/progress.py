"""How far is it, and how long will it take? A bar on a terminal; in a log file, which has none, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_PER_LINE = 30.0
"""In a log file; what is done sooner prints nothing."""


@contextmanager
def progress(doing: str, total: float) -> Iterator[Callable[..., None]]:
    """Show on stderr how much of a piece of work is done, and the time left.

    Args:
        doing: What is done, in a word or two.
        total: All of the work, in any unit.

    Yields:
        What is called with the work that was done since, and with what is done now, if that has changed.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    start = last = time.monotonic()
    with Progress(*columns, console=console, transient=True, speed_estimate_period=300, disable=hidden) as bars:
        task = bars.add_task(doing, total=total)

        def advance(done: float, doing: str = "") -> None:
            nonlocal last
            bars.update(task, advance=done, description=doing or None)
            now = time.monotonic()
            if hidden and now - last >= SECONDS_PER_LINE:
                last = now
                share = bars.tasks[0].completed / total if total else 0
                print(_line(bars.tasks[0].description, share, now - start), file=sys.stderr, flush=True)

        yield advance


def _line(doing: str, share: float, seconds: float) -> str:
    left = f"{timedelta(seconds=round(seconds * (1 / share - 1)))} left" if 0 < share <= 1 else "time left unknown"
    return f"{doing}: {min(share, 1):.0%} after {timedelta(seconds=round(seconds))}, {left}"
