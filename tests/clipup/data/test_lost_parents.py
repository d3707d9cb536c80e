"""Data workers whose parent is killed end with the programs that they started, even while they read, without a word."""

import os
import signal
import subprocess
import sys

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
