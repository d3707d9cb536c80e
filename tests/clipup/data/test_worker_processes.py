"""Worker processes of maps over items: results in order, and no waiting for one that was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from picture_samples import preprocess, tokenizer

from clipup.data import sources
from clipup.data.loaders import train_loader
from clipup.data.processes import each

CALLER = os.getpid()


def squared(number):
    return number * number


def killed_at_seven(number):
    if number == 7 and os.getpid() != CALLER:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def failing_at_seven(number):
    if number == 7:
        raise KeyError("seven")
    return number


def an_hour(number):
    time.sleep(3600 if number else 0)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_results_are_in_the_order_of_the_items(processes):
    assert list(each(squared, range(100), processes, chunk=3)) == [n * n for n in range(100)]


def test_a_killed_process_is_an_error_that_says_so():
    with pytest.raises(ChildProcessError, match="one of 2 worker processes was killed, perhaps for lack of memory"):
        list(each(killed_at_seven, range(20), 2, chunk=1))
    assert not multiprocessing.active_children()


def test_an_error_of_a_process_is_raised_and_ends_the_others():
    with pytest.raises(KeyError, match="seven"):
        list(each(failing_at_seven, range(20), 2, chunk=1))
    assert not multiprocessing.active_children()


def test_processes_end_at_once_when_their_results_are_not_wanted():
    results = each(an_hour, range(20), 2, chunk=1)
    assert next(results) == 0
    results.close()
    assert not multiprocessing.active_children()


def test_a_program_ends_that_has_left_a_loader_half_read(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from torch.utils.data import DataLoader\n"
        "from clipup.data.processes import reading\n"
        "def batches():\n"
        "    with reading(DataLoader(list(range(40)), num_workers=2)) as found:\n"
        "        yield from found\n"
        "left = batches()\n"
        "print(next(left).item())\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "0\n"), ended.stderr


def test_the_end_of_processes_whose_results_are_not_wanted_is_no_traceback(monkeypatch):
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    for _ in range(2):
        results = each(an_hour, range(20), 2, chunk=1)
        next(results)
        results.close()
    assert failures == []


def test_a_killed_indexing_process_is_named(pictures, monkeypatch):
    read = sources.read_index

    def killed(shard, expected):
        if shard.endswith("2.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(shard, expected)

    monkeypatch.setattr(sources, "read_index", killed)
    with pytest.raises(ChildProcessError, match="worker processes was killed"):
        train_loader(pictures.shards(), preprocess, tokenizer, 3, 2, progress=False)


def test_processes_end_with_a_caller_that_is_killed():
    program = """
import os, time
from clipup.data.processes import each

def shown(number):
    print(os.getpid(), flush=True)
    time.sleep(60 * number)

results = each(shown, range(3), 2, chunk=1)
next(results)
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert run.returncode == -9  # their output ended too, or this would have taken a minute
