"""Training runs in processes of their own, to be signalled and killed."""

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.console import REPOSITORY, SCRIPTS, pretrain_arguments

SINKS = {"data__sinks__shared_fraction": 0.5, "data__sinks__active_probability": 0.3}
BATCHES = {"train__micro_batch_size": 32, "train__global_batch_size": 64, "eval__interval": 9, "eval__max_iters": 1}
"""Two micro batches a step; an epoch of the session's data has 47 of them."""


def arguments(out_dir, data_path, iterations=60, **settings):
    """Arguments of a run of ``iterations`` micro batches, as text."""
    values = BATCHES | SINKS | {"iterations": iterations * 8} | settings
    return [str(value) for value in pretrain_arguments(out_dir, data_path, **values)]


TWO_RANKS = {"devices": 2, "data__launch__strategy": "ddp"}


def train_here(settings, output, file_limit=None):
    """What the console script does, in a forked process that has its imports already; leads a process group."""
    from litgpt.__main__ import main

    multiprocessing.set_start_method("fork", force=True)  # as the console script's workers, not from the fork server
    os.setsid()
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["litgpt", *settings]
    main()


class Training:
    """A run that goes on in the background, in a process group of its own."""

    def __init__(self, settings, output: Path, file_limit=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["litgpt_memsinks.pretrain.pretrain"])
        self.output = output
        self.process = context.Process(target=train_here, args=(settings, output, file_limit))
        self.process.start()

    @property
    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    @property
    def last_line(self):
        return self.text.strip().splitlines()[-1]

    def is_running(self):
        return self.process.is_alive()

    def wait_for(self, condition: Callable[[str], object]):
        """Until the condition holds for what was printed."""
        while not condition(self.text):
            assert self.is_running(), self.text[-3000:]
            time.sleep(0.005)

    def signal(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self):
        """Wait for the end; returns the status."""
        self.process.join(240)
        return self.process.exitcode


@contextlib.contextmanager
def training(settings, output, file_limit=None) -> Iterator[Training]:
    """A run that does not outlive the test."""
    run = Training(settings, output, file_limit)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.kill()
        run.process.join()


def finish(settings, output, file_limit=None):
    """Let a run end by itself."""
    with training(settings, output, file_limit) as run:
        run.status = run.end()
    return run


def steps(text):
    """Optimizer steps that were logged, in order."""
    return [int(number) for number in re.findall(r"^Epoch \d+ \| iter \d+ step (\d+) ", text, re.MULTILINE)]


@contextlib.contextmanager
def ddp(settings, output, file_limit=None):
    """The console script's run on two ranks over gloo, in a process group of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [str(SCRIPTS / "litgpt"), *settings]
    with open(output, "w") as file:
        # bash sets the limit: nothing of Python may run between fork and exec in a process with threads
        limit = "unlimited" if file_limit is None else file_limit // 1024
        command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def training_state(out_dir):
    """All that LitGPT keeps of a finished run."""
    return torch.load(out_dir / "final/lit_model.pth", weights_only=True)


def assert_same(ours, expected):
    """Weights, optimizer and loader, bit for bit. Paths may differ."""
    assert ours["iter_num"] == expected["iter_num"]
    flat = [
        torch.utils._pytree.tree_flatten({key: state[key] for key in ("model", "optimizer")})[0]
        for state in (ours, expected)
    ]
    assert len(flat[0]) == len(flat[1]) > 20
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat, strict=True))
