"""Data workers that are killed, that hang, or whose parent is killed: they end, and the error is one line."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from picture_samples import load, preprocess
from platforms import linux_only
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from worker_tasks import QUICK, Hangs, Repairable, at_seven

from clipup.cli import reporting_errors
from clipup.data import processes
from clipup.data.loaders import eval_samples
from clipup.data.processes import LostWorker, _prepare_worker, each

MAIN = os.getpid()


@pytest.fixture(autouse=True)
def before_the_first_data_loader(monkeypatch):
    """Torch's handler of ended processes comes with the first data loader of a process."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))  # seconds, in place of 5
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def no_more_children():
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) <= before


def batches(kind, source, transform):
    if kind == "evaluation":
        return eval_samples(source, transform).batches(2, workers=1)
    return load(kind, source, 2, 2, transform=transform).dataloader


def killed(image):
    """A transform that does not survive its fifth picture in a worker."""
    if image.getpixel((0, 0))[0] == 5 and os.getpid() != MAIN:
        os.kill(os.getpid(), signal.SIGKILL)
    return preprocess(image)


@pytest.mark.parametrize("kind", ["cached webdataset", "streamed", "evaluation"])
def test_a_killed_data_worker_is_an_error_in_one_line(pictures, kind, capsys):
    source = pictures.source(kind)
    assert reporting_errors("clipup", lambda: list(batches(kind, source, killed))) == 2
    error = capsys.readouterr().err
    assert "a data worker has ended" in error and error.count("\n") == 1


def test_a_data_worker_that_is_killed_while_a_batch_is_used_is_noticed_when_the_next_one_is_read(pictures):
    read = iter(batches("webdataset", pictures.shards(), preprocess))
    next(read)
    time.sleep(0.3)  # until the workers wait: torch hangs where one dies that holds the lock of an event
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # torch would interrupt this
    with pytest.raises(LostWorker):
        list(read)


SMALL_SHARED_MEMORY = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "sh")
READS = """
import sys, test_data_workers
from clipup.data.processes import LostWorker
for kind, source in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        list(test_data_workers.batches(kind, source, test_data_workers.large))
    except LostWorker as error:
        print(kind, error)
"""


def large(image):
    return torch.zeros(3, 512, 512)


@linux_only
def test_shared_memory_that_is_full_is_an_error_that_names_it(pictures):
    if subprocess.run([*SMALL_SHARED_MEMORY, "true"], check=False).returncode:
        pytest.skip("needs a mount namespace")
    kinds = ("webdataset", "cached webdataset", "streamed", "evaluation")
    read = [word for kind in kinds for word in (kind, pictures.source(kind))]
    program = [*SMALL_SHARED_MEMORY, sys.executable, "-c", READS, *read]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert [line.partition(" shared memory (/dev/shm)")[0] for line in lines] == [*kinds], done.stderr
    assert all("--shm-size" in line for line in lines)


@pytest.mark.parametrize("when", ["at exit", "when an iteration is left"])
def test_workers_that_hang_are_killed_together(monkeypatch, when):
    monkeypatch.setattr(processes, "_SECONDS_TO_END", 0.5)
    iterator = iter(DataLoader(Hangs(), batch_size=QUICK, num_workers=4, worker_init_fn=_prepare_worker))
    next(iterator)
    processes.detect_lost_workers_when_reading()
    time.sleep(0.5)  # until all of them hang
    workers, start = iterator._workers, time.monotonic()
    if when == "at exit":
        processes._kill_daemons()
    else:
        processes._end_workers_of(iterator)
    assert time.monotonic() - start < 2
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


def test_workers_end_with_an_error_and_the_data_can_be_read_again(pictures, no_more_children):
    repaired = pictures.folder / "repaired"
    data = load("csv", pictures.csv(), workers=1, transform=Repairable(repaired)).dataloader
    with pytest.raises(TypeError) as kept:
        list(data)
    assert kept.value and no_more_children()
    repaired.touch()
    assert len(list(data)) == len(data)
    del kept, data  # without waiting for the garbage collector
    assert no_more_children()


def test_workers_of_an_evaluation_end_when_reading_is_left_early(pictures, no_more_children):
    source = pictures.shards(count=4, shards=1)
    left = eval_samples(source, preprocess).batches(1, workers=2)
    next(left)
    left.close()
    assert no_more_children()


STALLS = """
import os, subprocess
from clipup.data.processes import each

def stalls(number):
    print("reads", flush=True)
    subprocess.run(["sleep", "600"])

list(each(stalls, range(4), 2))
"""


def test_workers_that_read_end_silently_with_a_killed_parent():
    run = subprocess.Popen([sys.executable, "-c", STALLS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [run.stdout.readline() for _ in range(2)] == ["reads\n", "reads\n"]
    os.kill(run.pid, signal.SIGKILL)
    assert run.communicate(timeout=30) == ("", "")  # until nobody holds its output any more


LEAVES = """
import sys
sys.path[:0] = {path!r}
from picture_samples import load
batches = iter(load("csv", {source!r}, workers=1).dataloader)
next(batches)
itself = [batches]
itself.append(itself)  # freed by the garbage collector alone, after the program's exit functions
"""


def test_a_program_ends_while_its_data_workers_are_alive(pictures):
    program = LEAVES.format(path=sys.path, source=pictures.csv())
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_over_items_has_their_order_and_raises_their_errors(workers, no_more_children):
    assert list(each(abs, range(-40, 40), workers)) == [abs(number) for number in range(-40, 40)]
    with pytest.raises(KeyError, match="seven"):
        list(each(at_seven, range(20), workers))
    assert no_more_children()


def test_a_request_to_stop_does_not_interrupt_the_start_of_workers():
    started = []

    class Loader:
        def __iter__(self):
            signal.raise_signal(signal.SIGINT)
            started.append(True)
            return iter(())

    with pytest.raises(KeyboardInterrupt), processes.reading(Loader()):
        pass
    assert started
