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
signal.signal(signal.{name}, signal.SIG_IGN)
with signals.StopRequest() as stop:
    signal.raise_signal(signal.{name})
print("received" if stop.received else "went on")
"""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])  # under nohup, and in the background of a script
def test_a_signal_that_is_ignored_stays_ignored(name):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = IGNORED.format(name=name)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "went on\n", done.stderr
