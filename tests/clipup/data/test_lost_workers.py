"""Data workers that are killed: one error that says so, wherever data are read, and nothing else is interrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from picture_samples import preprocess, tokenizer

from clipup.cli import reporting_errors
from clipup.data.loaders import eval_samples, train_loader

MAIN = os.getpid()
MESSAGE = r"a data worker has ended \(.*\), perhaps killed for lack of memory: use fewer workers, or free memory"


@pytest.fixture(autouse=True)
def before_the_first_data_loader(monkeypatch):
    """Torch's handler of ended processes comes with the first data loader of a process."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def killed(image):
    """A transform that does not survive its fifth picture in a worker."""
    if image.getpixel((0, 0))[0] == 5 and os.getpid() != MAIN:
        os.kill(os.getpid(), signal.SIGKILL)
    return preprocess(image)


def batches(kind, pictures, transform):
    if kind == "evaluation":
        return eval_samples(pictures.shards(), transform).batches(2, workers=1)
    source = pictures.shards()
    if kind == "streamed":
        source = f"file:{source}"
    options = {"train_num_samples": 24} if kind == "streamed" else {}
    return train_loader(
        source, transform, tokenizer, 2, 1, cache=kind == "cached", progress=False, **options
    ).dataloader


@pytest.mark.parametrize("kind", ["indexed", "cached", "streamed", "evaluation"])
def test_a_killed_data_worker_is_an_error_in_one_line(pictures, kind, capsys):
    def read():
        list(batches(kind, pictures, killed))

    with pytest.raises(ChildProcessError, match=MESSAGE):
        read()
    assert reporting_errors("clipup", read) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_bus_error_of_a_data_worker_names_shared_memory(pictures):
    def unbacked(image):
        os.kill(os.getpid(), signal.SIGBUS)

    with pytest.raises(ChildProcessError, match="/dev/shm.*--shm-size.*--ipc=host"):
        list(batches("evaluation", pictures, unbacked))


def large(image):
    return torch.zeros(3, 512, 512)


SMALL_SHARED_MEMORY = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "sh")
READS = """
import sys, test_lost_workers
from clipup.data.processes import LostWorker
try:
    list(test_lost_workers.batches(sys.argv[1], test_lost_workers.Source(sys.argv[2]), test_lost_workers.large))
except LostWorker as error:
    print(error)
"""


class Source:
    def __init__(self, shards):
        self.shards = lambda: shards


def _small_shared_memory_is_allowed():
    return sys.platform == "linux" and subprocess.run([*SMALL_SHARED_MEMORY, "true"], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["indexed", "cached", "streamed", "evaluation"])
def test_shared_memory_that_is_full_is_an_error_that_names_it(pictures, kind):
    if not _small_shared_memory_is_allowed():
        pytest.skip("needs a mount namespace")
    program = [*SMALL_SHARED_MEMORY, sys.executable, "-c", READS, kind, pictures.shards()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "/dev/shm" in done.stdout and "--shm-size" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["indexed", "evaluation"])
def test_a_data_worker_that_is_killed_while_a_batch_is_used_is_noticed_when_the_next_one_is_read(pictures, kind):
    reading = iter(batches(kind, pictures, preprocess))
    next(reading)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # torch would interrupt this
    with pytest.raises(ChildProcessError, match=MESSAGE):
        list(reading)


def test_memory_that_runs_out_in_a_data_worker_is_said_in_one_line(pictures):
    def exhausted(image):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match=r"^no room \(preprocess of .*\)$"):
        list(batches("indexed", pictures, exhausted))
