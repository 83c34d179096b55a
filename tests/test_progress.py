"""Progress of long work: a bar where somebody looks, lines in a log file."""

import io

import pytest
from rich.console import Console

from litgpt_memsinks import progress as module
from litgpt_memsinks.progress import progress


def test_log_file_has_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 130.0, 131.0, 190.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("Measuring", 200) as advance:
        advance(20)  # 10 s
        advance(30, "losses")  # 30 s
        advance(10)  # 31 s
        advance(20)  # 90 s
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "losses: 25% after 0:00:30, 0:01:30 left",
        "losses: 40% after 0:01:30, 0:02:15 left",
    ]
    assert output.out == ""


def test_short_work_prints_nothing(capsys):
    with progress("Measuring", 2) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("total", "done", "line"), [(0, 5, "0%"), (10, 0, "0%"), (10, 20, "100%")])
def test_work_that_was_not_foreseen(total, done, line, monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0)
    with progress("Measuring", total) as advance:
        advance(done)
    assert capsys.readouterr().err == f"Measuring: {line} after 0:00:00, time left unknown\n"


def test_terminal_has_a_bar_and_no_lines(monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0)
    with progress("Measuring", 4) as advance:
        advance(1, "losses")
    assert "losses" in screen.getvalue()
    assert "25%" in screen.getvalue()
    assert capsys.readouterr() == ("", "")


def test_work_that_fails_is_not_hidden(capsys):
    with pytest.raises(ValueError, match="this"), progress("Measuring", 4):
        raise ValueError("this")
