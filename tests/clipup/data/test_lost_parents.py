"""Data workers whose parent is killed end without a word."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, socket, sys, time
from multiprocessing import resource_sharer
from clipup.data.processes import worker_init_fn

if sys.argv[1] == "worker":
    worker_init_fn()(0)
shared = resource_sharer.DupFd(os.open(os.devnull, os.O_RDONLY))  # what a worker does with a tensor
address, _ = shared._id
with socket.socket(socket.AF_UNIX) as parent:  # which dies while it takes it
    parent.connect(address)
time.sleep(1)
raise SystemError("an error of the worker itself")
"""


@pytest.mark.parametrize("role", ["worker", "other process"])
def test_a_connection_that_breaks_is_no_traceback_of_a_worker(role):
    run = subprocess.run([sys.executable, "-c", PROGRAM, role], capture_output=True, text=True)
    assert "SystemError: an error of the worker itself" in run.stderr
    assert ("resource_sharer" in run.stderr) == (role == "other process"), run.stderr
