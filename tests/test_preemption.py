"""Runs of `litgpt pretrain` that are signalled or killed end as if nothing had happened."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import litgpt.utils
import pytest

from litgpt_memsinks.pretrain import preemption, resuming
from tests.console import BOTH, logged
from tests.console import run as run_command
from tests.training_process import TWO_RANKS, arguments, assert_same, ddp, finish, steps, training, training_state

ITERATIONS = 60
"""Of 47 in an epoch"""
KILLS = 5
"""How often a run is killed before it may end"""


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """Where a run with two workers went that nobody disturbed."""
    out_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    run = finish(arguments(out_dir, prepared, ITERATIONS, data__num_workers=2), out_dir.parent / "log")
    assert run.status == 0, run.text[-3000:]
    return out_dir


def stopped_step(text):
    return int(re.search(r"stopped after step (\d+), saved as '[^']*step-\d+'\. Go on with --resume auto\.", text)[1])


def test_signals_end_a_run_saved_and_it_continues_bit_for_bit(undisturbed, prepared, tmp_path):
    """SIGTERM to the whole group with its workers in the first epoch, SIGUSR1 to the process alone in the second."""
    out_dir = tmp_path / "out"
    settings = arguments(out_dir, prepared, ITERATIONS, data__num_workers=2, resume="auto")
    losses = []
    for number, after, group in ((signal.SIGTERM, 3, True), (signal.SIGUSR1, 25, False)):
        with training(settings, tmp_path / number.name) as run:
            run.wait_for(lambda text, after=after: max(steps(text), default=0) >= after)
            run.signal(number, group)
            assert run.end() == 0, run.text[-3000:]
            text = run.text
        assert text.strip().splitlines()[-1].startswith(f"{number.name}: stopped after step ")
        step = stopped_step(text)
        assert after <= step == steps(text)[-1] < ITERATIONS // 2
        assert resuming.flaw(out_dir / f"step-{step:08d}/lit_model.pth") is None
        losses += logged(out_dir)
        assert f"Epoch {1 if after == 3 else 2} | iter {2 * step} " in text
    run = finish(settings, tmp_path / "last")
    assert run.status == 0, run.text[-3000:]
    assert losses + logged(out_dir) == logged(undisturbed)
    assert_same(training_state(out_dir), training_state(undisturbed))


@pytest.mark.long
def test_killed_at_any_moment_it_ends_the_same(undisturbed, prepared, tmp_path):
    out_dir = tmp_path / "out"
    settings = arguments(out_dir, prepared, ITERATIONS, data__num_workers=2, resume="auto", train__save_interval=3)
    moments = random.Random(5)
    for number in range(KILLS):
        more = moments.randrange(1, 9)
        with training(settings, tmp_path / f"log{number}") as run:
            run.wait_for(lambda text, more=more: len(steps(text)) >= more)
            time.sleep(moments.uniform(0, 0.05))
            run.signal(signal.SIGKILL)  # the main process alone: its workers see it and go
            assert run.end() == -signal.SIGKILL
        found = litgpt.utils.find_resume_path("auto", out_dir)
        assert found is None or resuming.flaw(found) is None
    assert found is not None
    run = finish(settings, tmp_path / "last")
    assert run.status == 0, run.text[-3000:]
    assert "Resuming training from" in run.text
    assert "passed over" not in run.text
    assert_same(training_state(out_dir), training_state(undisturbed))
    assert not [path for path in out_dir.iterdir() if path.name.startswith(".")]


def test_before_training_a_signal_does_what_it_did(prepared, tmp_path):
    with training(arguments(tmp_path / "out", prepared), tmp_path / "log") as run:
        run.wait_for(lambda text: "MemSinks: " in text)
        run.signal(signal.SIGTERM)
        assert run.end() == -signal.SIGTERM
    assert "stopped after" not in run.text


@pytest.mark.long
def test_two_ranks_stop_together_and_one_killed_takes_the_other_with_it(prepared, tmp_path):
    more = TWO_RANKS | {"data__num_workers": 1, "train__save_interval": 3}
    whole = tmp_path / "whole"
    with ddp(arguments(whole, prepared, 48, **more), tmp_path / "log") as process:
        assert process.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    out_dir = tmp_path / "out"
    settings = arguments(out_dir, prepared, 48, **more, resume="auto")

    with ddp(settings, tmp_path / "stopped") as process:
        wait_for_steps(process, tmp_path / "stopped", 3)
        rank1 = child(process.pid)
        os.kill(process.pid, signal.SIGTERM)  # the launching process alone
        assert process.wait(240) == 0, (tmp_path / "stopped").read_text()[-3000:]
        wait_until_gone(rank1)
        assert not running_in_session(process.pid)
    text = (tmp_path / "stopped").read_text()
    assert text.count("stopped after step") == 1
    assert stopped_step(text) == steps(text)[-1]

    moments = random.Random(3)
    for number in range(KILLS):
        log = tmp_path / f"killed{number}"
        with ddp(settings, log) as process:
            wait_for_steps(process, log, moments.randrange(1, 5))
            time.sleep(moments.uniform(0, 0.05))
            os.kill(process.pid if number % 2 else child(process.pid), signal.SIGKILL)
            assert process.wait(240) != 0
        assert "passed over" not in log.read_text()

    with ddp(settings, tmp_path / "last") as process:
        assert process.wait(240) == 0, (tmp_path / "last").read_text()[-3000:]
    assert "Resuming training from" in (tmp_path / "last").read_text()
    assert_same(training_state(out_dir), training_state(whole))


def wait_for_steps(process, output, number):
    """Until so many steps of this process were logged."""
    while len(steps(output.read_text())) < number:
        assert process.poll() is None, output.read_text()[-3000:]
        time.sleep(0.005)


def child(process):
    """The other rank, among the children."""
    output = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in output.splitlines()]
    return next(int(pid) for pid, parent, text in lines if int(parent) == process and "bin/litgpt " in text)


def running_in_session(session):
    output = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in output.splitlines()]
    return [text for sid, stat, text in lines if int(sid) == session and not stat.startswith("Z")]


def wait_until_gone(process):
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------ handlers


@pytest.fixture
def run():
    return SimpleNamespace(state={"step_count": 0}, stop_signal=0, saved_step=None)


def test_handlers_are_there_while_it_listens_only(run):
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.listening(run):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes on: not a second one
        assert run.stop_signal == signal.SIGUSR1
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_handlers_are_put_back_after_an_error(run):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), preemption.listening(run):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_is_changed(run):
    def listen():
        with preemption.listening(run):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(("wait", "status"), [(0.0, 0), (1.2, -signal.SIGTERM)])
def test_second_sigterm_is_not_caught_unless_it_is_the_first_one_passed_on(wait, status):
    code = f"""
import os, signal, time
from types import SimpleNamespace
from litgpt_memsinks.pretrain.preemption import listening
with listening(SimpleNamespace(state={{1: 1}}, stop_signal=0)):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({wait})
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert run_command([sys.executable, "-c", code], check=False, imported=BOTH).returncode == status
