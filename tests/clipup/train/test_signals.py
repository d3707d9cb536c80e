"""Requests to stop, in processes of their own: what is not handled kills them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import signal, time
from clipup.train import signals
signals.REPEAT_SECONDS = 1.0
with signals.program_ends_with_the_run():
    with signals.StopRequest() as stop:
        signal.raise_signal(signal.{first})
assert stop.received
time.sleep({pause})
signal.raise_signal(signal.SIGTERM)
print("alive")
"""


@pytest.mark.parametrize(
    ("first", "pause", "code", "output"),
    [
        ("SIGTERM", 0, 0, "alive\n"),
        ("SIGHUP", 0, 0, "alive\n"),
        pytest.param("SIGINT", 0, 0, "alive\n", marks=pytest.mark.slow),
        pytest.param("SIGTERM", 1.1, -signal.SIGTERM, "", marks=pytest.mark.slow),
    ],
)
def test_a_sigterm_that_repeats_the_first_does_not_kill_a_run_that_has_stopped(first, pause, code, output):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM.format(first=first, pause=pause)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, output), done.stderr


IGNORED = """
import signal
from clipup.train import signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.StopRequest() as stop:
    signal.raise_signal(signal.SIGHUP)
print("received" if stop.received else "went on")
"""


def test_a_run_that_ignores_the_end_of_its_terminal_goes_on():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IGNORED], env=environment, capture_output=True, text=True)
    assert done.stdout == "went on\n", done.stderr
