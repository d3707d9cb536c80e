"""Progress of long tasks, with and without a terminal on stderr."""

from __future__ import annotations

import io
import sys

import pytest

import clipup.progress
from clipup.progress import Progress, progress


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(clipup.progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def times_of_lines(clock, capsys, seconds, **options):
    """When lines are printed, in seconds since the start, for a task with one step per second."""
    found = []
    with Progress("sorting", "letters", seconds, **options) as task:
        for _ in range(seconds):
            clock.now += 1
            task.update()
            if capsys.readouterr().err:
                found.append(clock.now - 1000)
    return found


def test_lines_are_printed_after_growing_pauses_and_then_every_30_seconds(clock, capsys):
    assert times_of_lines(clock, capsys, 130) == [5, 15, 35, 65, 95, 125]


def test_line_at_once_prints_a_line_at_the_first_step(clock, capsys):
    assert times_of_lines(clock, capsys, 40, line_at_once=True) == [1, 6, 16, 36]


def test_last_line_shows_the_final_count_and_a_short_task_prints_nothing(clock, capsys):
    for _ in progress(iter(range(40)), "sorting", "letters"):
        clock.now += 0.25
    assert capsys.readouterr().err.splitlines() == ["sorting: 20 letters", "sorting: 40 letters"]
    assert list(progress("letters", "sorting", "letters")) == list("letters")
    assert capsys.readouterr().err == ""


def test_resumed_task_estimates_the_remaining_time(clock, capsys):
    with Progress("sorting", "letters", total=100, done=90, line_at_once=True) as task:
        clock.now += 10
        task.update(5, detail="at q")
    assert capsys.readouterr().err == "sorting: 95 of 100 letters, at q, 00:10 left\n"


def test_terminal_shows_a_bar_and_other_lines_above_it(monkeypatch):
    terminal = Terminal()
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
