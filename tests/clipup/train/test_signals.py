"""Requests to stop, in processes of their own: what is not handled kills them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


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
