"""Data workers whose parent is killed end with the programs that they started, even while they read, without a word."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import subprocess, time
from torch.utils.data import DataLoader
from clipup.data.processes import worker_init_fn

class Stalls:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        print("reads", flush=True)
        subprocess.run(["sleep", "600"])

next(iter(DataLoader(Stalls(), num_workers=2, worker_init_fn=worker_init_fn())))
"""


def test_workers_that_read_end_with_a_killed_parent_and_without_a_word():
    run = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [run.stdout.readline() for _ in range(2)] == ["reads\n", "reads\n"]
    os.kill(run.pid, signal.SIGKILL)
    assert run.communicate(timeout=30) == ("", "")  # until nobody holds its output any more


BREAKS = """
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
    run = subprocess.run([sys.executable, "-c", BREAKS, role], capture_output=True, text=True)
    assert "SystemError: an error of the worker itself" in run.stderr
    assert ("resource_sharer" in run.stderr) == (role == "other process"), run.stderr
