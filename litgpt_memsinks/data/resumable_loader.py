"""litdata's loader, made to continue: in the right epoch, from a moved folder, with workers that outlive a signal."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from litdata.streaming import StreamingDataLoader

FOR_THE_RUN = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a training run to stop: to be acted on by its main processes, not by their workers."""


class ResumableLoader(StreamingDataLoader):
    """litdata's loader for one ``StreamingDataset``.

    Args:
        args: As in ``StreamingDataLoader``.
        same_content: Whether a loaded state is known to belong to the same stream, wherever that lay then. Otherwise
            litdata refuses another folder.
        worker_init_fn: As in ``DataLoader``.
        kwargs: As in ``StreamingDataLoader``.
    """

    def __init__(
        self,
        *args: Any,
        same_content: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, worker_init_fn=partial(_begin_worker, worker_init_fn), **kwargs)
        self._same_content = same_content

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if self._same_content:
            here = {
                "input_dir_path": self.dataset.input_dir.path,
                "input_dir_url": self.dataset.input_dir.url,
                "cache_dir_path": self.dataset.cache_dir.path,
            }
            obj = obj | {"dataset": obj["dataset"] | here}
        super().load_state_dict(obj)
        # litdata tells its workers only: the next state_dict would say epoch 1, and the resume after it shuffle for it
        self.dataset.current_epoch = obj["dataset"]["current_epoch"]

    def _get_iterator(self) -> Any:
        with _held():
            return super()._get_iterator()


@contextmanager
def _held() -> Iterator[None]:
    """Hold back the run's signals in this thread; processes that it starts hold them back for good."""
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS: there, PyTorch's workers die of SIGTERM as usual
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(then: Callable[[int], None] | None, worker_id: int) -> None:
    """Let a worker pass over signals to the whole process group: the run needs its batches up to the next step."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RUN)  # not inherited from a fork server
        parent = multiprocessing.parent_process()  # which os.getppid is not with a fork server
        assert parent is not None
        threading.Thread(target=_obey_parent, args=(parent.pid,), daemon=True).start()
    if then is not None:
        then(worker_id)


def _obey_parent(parent: int) -> None:
    """Exit at the parent's SIGTERM, as PyTorch's own handler does: so it ends workers that do not end by themselves."""
    while True:
        received = signal.sigwaitinfo(FOR_THE_RUN)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
