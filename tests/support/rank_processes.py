"""Starts the ranks of a run as processes: forked from one that has imported everything, or by torchrun."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["clipup.train.run", "clipup.data.indexed", "clipup.data.streamed", "torch.distributed"])


class RankProcess:
    """A process that writes its stderr to a file."""

    def __init__(self, process: Any, pid: int, stderr: Path, poll: Callable[[], int | None]) -> None:
        self._process, self.pid, self._stderr, self.poll = process, pid, stderr, poll

    @property
    def error(self) -> str:
        return self._stderr.read_text("utf-8")

    def ended(self, timeout: float = 120) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.error}"
            time.sleep(0.02)
        return self.poll(), self.error

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


@contextlib.contextmanager
def ranks(
    directory: Path, program: Callable[..., Any], *arguments: Any, count: int = 2, world_size: int = 2
) -> Iterator[list[RankProcess]]:
    """The first ``count`` of ``world_size`` ranks, each of which calls the program; killed at the end, frozen or not.

    Args:
        directory: for what they write to stderr.
        program: a function of a module; what it returns is the exit code.
    """
    port = _free_port()
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    try:
        for rank in range(count):
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            stderr = directory / f"stderr-{rank}"
            process = _FORKS.Process(target=_rank, args=(stderr, variables, program, arguments))
            process.start()
            started.append(RankProcess(process, process.pid, stderr, lambda process=process: process.exitcode))
        yield started
    finally:
        for one in started:
            one._process.kill()
            one._process.join()


def _rank(stderr: Path, variables: dict[str, str], program: Callable[..., Any], arguments: Sequence[Any]) -> None:
    import torch

    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        sys.exit(program(*arguments))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


@contextlib.contextmanager
def torchrun(directory: Path, *program: object, nodes: int = 1) -> Iterator[list[RankProcess]]:
    """The launchers of two ranks, on one node or on two."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    options = [f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", "--rdzv-backend=c10d", "--shutdown-timeout=10"]
    options += [f"--rdzv-endpoint=127.0.0.1:{_free_port()}", "--rdzv-id=run"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, program)]
    started = []
    try:
        for node in range(nodes):
            path = directory / f"stderr-{node}"
            with open(path, "wb") as stderr:
                process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
            started.append(RankProcess(process, process.pid, path, process.poll))
        yield started
    finally:
        for each in started:
            each._process.terminate()
            each._process.wait()


def children(processes: Sequence[RankProcess]) -> list[int]:
    """The processes that launchers have started."""
    lists = [Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() for process in processes]
    return [int(child) for of_launcher in lists for child in of_launcher]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_lines(path: Path, lines: int, processes: Sequence[RankProcess] = (), timeout: float = 120) -> None:
    """Until a file has so many lines."""
    deadline = time.monotonic() + timeout
    while not (path.is_file() and path.read_text().count("\n") >= lines):
        for process in processes:
            assert process.poll() is None, process.error
        assert time.monotonic() < deadline, f"{path} has not got {lines} lines"
        time.sleep(0.02)
