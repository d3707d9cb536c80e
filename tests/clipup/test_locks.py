"""Directory locks: one writer per directory, also after the previous writer was killed."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipup.locks import DirectoryInUse, exclusive

FORK = multiprocessing.get_context("fork")


def lock(directory):
    return exclusive(directory / ".lock", directory, "wait for it")


def hold(directory, ready, child=False):
    with lock(directory):
        if not child or os.fork() == 0:  # a data worker that outlives its parent
            ready.set()
        time.sleep(60)
        os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold the lock of a directory, and kills their process groups at the end."""
    processes = []

    def start(**options):
        ready = FORK.Event()

        def run():
            os.setpgid(0, 0)
            hold(tmp_path, ready, **options)

        processes.append(FORK.Process(target=run, daemon=True))
        processes[-1].start()
        assert ready.wait(20)
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_error_names_the_process_and_machine_that_hold_the_lock(holder, tmp_path):
    process = holder()

    with (
        pytest.raises(
            DirectoryInUse, match=rf"in use by process {process.pid} on {socket.gethostname()}, since 20.*; wait for it"
        ),
        lock(tmp_path),
    ):
        pass


@pytest.mark.parametrize("child", [False, True], ids=["alone", "outlived by a data worker"])
def test_lock_of_a_killed_process_is_released(holder, tmp_path, child):
    process = holder(child=child)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / ".lock").exists()

    with lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert not (tmp_path / ".lock").exists()


def test_only_one_of_many_concurrent_threads_holds_the_lock(tmp_path):
    """Lock files are acquired, removed and reused concurrently."""
    inside, counts = [], []

    def acquire(_):
        try:
            with lock(tmp_path):
                inside.append(1)
                counts.append(len(inside))
                time.sleep(0.0005)
                inside.pop()
        except DirectoryInUse:
            counts.append(0)
            time.sleep(0.0002)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(acquire, range(120)))
    assert set(counts) == {0, 1}
