"""Progress of long tasks, with and without a terminal on stderr."""

import io
import sys
from types import SimpleNamespace

import pytest

import clipup.progress
from clipup.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(clipup.progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "options", "times"),
    [(130, {}, [5, 15, 35, 65, 95, 125]), (40, {"line_at_once": True}, [1, 6, 16, 36])],
)
def test_lines_are_printed_after_growing_pauses_and_then_every_30_seconds(clock, capsys, seconds, options, times):
    found = []
    with Progress("sorting", "letters", seconds, **options) as task:
        for second in range(1, seconds + 1):
            clock.now += 1
            task.update()
            found += [second] if capsys.readouterr().err else []
    assert found == times


def test_terminal_shows_a_bar_and_other_lines_above_it(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("sorting", "letters", 2) as task:
        task.update(1)
        task.write("half of it")
        task.update(1)

    assert "sorting:   0%|" in terminal.getvalue() and "half of it\n" in terminal.getvalue()
    assert "1 of 2" not in terminal.getvalue()


def test_without_stderr_nothing_is_shown(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # as after 2>&-
    with Progress("steps", "steps", 2, line_at_once=True) as shown:
        shown.update()
        shown.write("text")
