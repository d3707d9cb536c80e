"""Starts the ranks of a run as processes: forked from one that has imported everything."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["clipup.train.run", "clipup.data.indexed", "clipup.data.streamed", "torch.distributed"])


@dataclass
class RankProcess:
    """A process that writes its stderr to a file."""

    process: Any
    stderr: Path

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def error(self) -> str:
        return self.stderr.read_text("utf-8")

    def ended(self, timeout: float = 120) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr, once it has ended."""
        self.process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout} s:\n{self.error}"
        return self.poll(), self.error

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextlib.contextmanager
def ranks(directory: Path, program: Callable[..., Any], *arguments: Any, count: int = 2) -> Iterator[list[RankProcess]]:
    """So many ranks, each of which calls the program; killed at the end, frozen or not.

    Args:
        directory: for what they write to stderr.
        program: a function of a module; what it returns is the exit code.
    """
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    started = []
    for rank in range(count):
        variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        stderr = directory / f"stderr-{rank}"
        process = _FORKS.Process(target=_rank, args=(stderr, variables, program, arguments))
        process.start()
        started.append(RankProcess(process, stderr))
    try:
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.join()


def on_ranks(directory: Path, count: int, program: Callable[..., Any], *arguments: Any, timeout: float = 400) -> None:
    """The ranks call the program, and all end well."""
    with ranks(directory, program, *arguments, count=count) as processes:
        for process in processes:
            code, error = process.ended(timeout)
            assert code == 0, error


def _rank(stderr: Path, variables: dict[str, str], program: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        sys.exit(program(*arguments))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def wait_for_lines(path: Path, lines: int, processes: Sequence[RankProcess] = (), timeout: float = 120) -> None:
    """Until a file has so many lines."""
    deadline = time.monotonic() + timeout
    while not (path.is_file() and path.read_text().count("\n") >= lines):
        for process in processes:
            assert process.poll() is None, process.error
        assert time.monotonic() < deadline, f"{path} has not got {lines} lines"
        time.sleep(0.02)
