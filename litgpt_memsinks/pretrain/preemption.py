"""What does a signal do to a training run? It ends it at the next optimizer step, saved, with status 0.

A cluster that wants its machine back sends SIGTERM, or SIGUSR1 where it is asked to, some time before it kills. Between
two optimizer steps there are no gradients to lose, so that is where a run stops: LitGPT asks for the next batch there.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from litgpt.utils import CycleIterator as BaseCycleIterator

from litgpt_memsinks.pretrain.run import Run

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_SECONDS = 1.0
"""Signals that come so shortly after each other are one: launchers pass on what the whole group got already."""


@contextmanager
def listening(run: Run) -> Iterator[None]:
    """Note in the run the signals that ask it to stop, from when it trains until the end of the block.

    Before it trains they do what they did. A second SIGTERM does, too. Outside the main thread, where Python has no
    handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal began
        is_new = time.monotonic() - began > SAME_SECONDS
        if not run.state or (run.stop_signal and number == signal.SIGTERM and is_new):
            signal.signal(number, before[signal.Signals(number)])
            os.kill(os.getpid(), number)
        elif not run.stop_signal:
            run.stop_signal, began = number, time.monotonic()

    # None is a handler that was not set from Python and cannot be put back
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StoppableIterator(BaseCycleIterator):
    """LitGPT's iterator over micro batches, which ends the run between two optimizer steps if it was asked to stop."""

    def __init__(self, run: Run, iterable: Iterable) -> None:
        # not above: importing litdata settles how this process starts others, which is its user's to say
        from litgpt_memsinks.data.resumable_loader import ResumableLoader

        super().__init__(iterable)
        loader: Any = getattr(iterable, "_dataloader", iterable)  # without Fabric's wrapper, a copy from before loading
        if isinstance(loader, ResumableLoader):
            self.epoch = loader.current_epoch - loader.restore  # LitGPT's own counts from 0 after each resume
        self._run = run
        self._step = run.state["step_count"]

    def __next__(self) -> Any:
        """The next micro batch.

        Raises:
            SystemExit: With status 0, if the run was asked to stop and has just taken an optimizer step. A state loaded
                at the start is not saved again before the first one: litdata's would not stay the same.
        """
        if self._run.state["step_count"] != self._step:
            self._step = self._run.state["step_count"]
            if number := agreed_signal(self._run):
                leave(self._run, signal.Signals(number).name)
        return super().__next__()


def agreed_signal(run: Run) -> int:
    """The signal that any rank has got, or 0; the same on all ranks, which must all ask."""
    if run.fabric.world_size == 1:
        return run.stop_signal
    number = torch.tensor(run.stop_signal, device=run.fabric.device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)  # Fabric's own adds a barrier
    return int(number)


def leave(run: Run, name: str) -> None:
    """Save unless that is done, say so, and exit with status 0.

    Raises:
        SystemExit: Always.
        MemSinksError: If the checkpoint cannot be written.
    """
    step = run.state["step_count"]
    folder = run.out_dir / f"step-{step:08d}"
    if run.saved_step != step:
        import litgpt.pretrain  # here, because its import imports us

        litgpt.pretrain.save_checkpoint(run.fabric, run.state, run.tokenizer_dir, folder / "lit_model.pth")
    run.fabric.barrier()
    run.fabric.print(f"{name}: stopped after step {step}, saved as {str(folder)!r}. Go on with --resume auto.")
    sys.exit(0)
