"""A process that has its imports already, and forks for each command.

Importing PyTorch, Lightning and LitGPT takes five seconds of CPU, most of what a small command takes. Here a command is
still a process of its own, with its own arguments, environment, output and exit, and executes the same script; only the
modules that it was started with are there before. What an import reads from the environment is as it was then:
`console.py` starts a new interpreter where that matters.

    python -m tests.zygote DESCRIPTOR MODULE...

The descriptor is a socket. Each byte on it comes with four descriptors: the command as a JSON file, its stdout, its
stderr, and a socket for the answer, which is the process's ID and later its status. The end of the socket is the end.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from typing import IO, NamedTuple, NoReturn

ANSWER = struct.Struct("<i")
"""An ID or a status, which is negative after a signal, as subprocess says it"""


class Zygote:
    """The client's side. Threads may share it."""

    def __init__(self, modules: tuple[str, ...], environment: dict[str, str]) -> None:
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *modules]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=null, stdout=null, start_new_session=True
        )
        theirs.close()
        self.lock = threading.Lock()

    def start(
        self,
        command: list[str],
        environment: dict[str, str],
        stderr: int = subprocess.STDOUT,
        out: IO[bytes] | None = None,
    ) -> "Forked":
        """Start ``[python, "-m", module, ...]``, ``[python, "-c", code, ...]`` or ``[script, ...]``.

        ``out`` gets what it prints; a temporary file by default.
        """
        request = {"command": command, "environment": environment, "folder": os.getcwd()}
        out = out or tempfile.TemporaryFile()  # noqa: SIM115 # Forked closes it
        err = out if stderr == subprocess.STDOUT else tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile("w") as asked:
            json.dump(request, asked)
            asked.flush()
            with self.lock:
                socket.send_fds(self.control, [b"."], [asked.fileno(), out.fileno(), err.fileno(), theirs.fileno()])
        return Forked(command, ours, out, err)

    def close(self) -> None:
        self.control.close()
        self.process.wait(60)


class Forked:
    """A command that runs, with what is needed of ``subprocess.Popen``."""

    def __init__(self, command: list[str], answers: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
        self.command, self.answers, self.out, self.err = command, answers, out, err
        self.returncode: int | None = None
        self.pid = self._receive()

    def _receive(self) -> int:
        answer = self.answers.recv(ANSWER.size, socket.MSG_WAITALL)
        assert answer, "the process that should have forked has ended"
        return ANSWER.unpack(answer)[0]

    def wait(self, timeout: float = 240) -> int:
        """Until it has ended; kills it when the time is up."""
        if self.returncode is None:
            self.answers.settimeout(timeout)
            try:
                self.returncode = self._receive()
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.command, timeout) from None
        return self.returncode

    def poll(self) -> int | None:
        """Its status if it has ended."""
        ended = select.select([self.answers], [], [], 0)[0]
        return self.wait() if ended else self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has printed."""
        return os.pread(self.out.fileno(), os.fstat(self.out.fileno()).st_size, 0).decode()

    @property
    def errors(self) -> str | None:
        return None if self.err is self.out else os.pread(self.err.fileno(), 1 << 24, 0).decode()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """As of ``subprocess.Popen``, wait. What failed or was interrupted leaves nothing running."""
        if error is not None:
            self.send_signal(signal.SIGKILL)
        self.wait()
        self.answers.close()
        for file in {self.out, self.err}:
            file.close()


class Descriptors(NamedTuple):
    """What comes with a byte."""

    request: int
    stdout: int
    stderr: int
    answers: int


def serve(control: socket.socket) -> Descriptors:
    """Fork for each request. Returns in the process that executes one; the others never do."""
    while True:
        byte, descriptors, _, _ = socket.recv_fds(control, 1, len(Descriptors._fields))
        while reap():
            pass
        if not byte:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            asked = Descriptors(*descriptors)
            process = os.fork()
            if process == 0:
                return asked
            answers = socket.socket(fileno=asked.answers)
            answers.send(ANSWER.pack(process))
            answers.send(ANSWER.pack(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def reap() -> bool:
    """Let a child that has ended go; whether there was one."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def become(asked: Descriptors) -> None:
    """Execute the command as Python would."""
    with open(asked.request) as file:
        request = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    os.dup2(asked.stdout, 1)
    os.dup2(asked.stderr, 2)
    for descriptor in asked[1:]:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    command = request["command"]
    if command[0] != sys.executable:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    elif command[1] == "-m":
        sys.argv = command[2:]
        sys.modules.pop(f"{command[2]}.__main__", None)
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        assert command[1] == "-c"
        sys.argv = command[1:2] + command[3:]
        exec(compile(command[2], "<string>", "exec"), {"__name__": "__main__"})


def execute(asked: Descriptors) -> NoReturn:
    """Execute the command and end as Python does, without looking through all modules: that takes a second."""
    status: object = None
    try:
        become(asked)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # or each process soon copies what it looks through
    execute(serve(socket.socket(fileno=int(sys.argv[1]))))
