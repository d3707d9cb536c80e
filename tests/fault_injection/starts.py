"""Starts ``clipup``, finds and signals its processes, and classifies how it ended. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from workload import ROOT

from clipup import cli

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1", "--shutdown-timeout", "20")
MARK = "CLIPUP_FAULT_INJECTION"
"""Environment variable that marks the processes of a start, so that orphans are found too."""

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_TRACEBACK = "Traceback (most recent call last)"
_CTRL_C = re.compile(rf"{re.escape(_TRACEBACK)}(?:(?!Traceback).)*?\nKeyboardInterrupt\n", re.S)
_WORKER = re.compile(rf"{re.escape(_TRACEBACK)}:\n  File [^\n]*/multiprocessing/resource_sharer.py")
"""A data worker that is ended while it hands over a batch may print this; Python's thread does, not the run."""
_FROM_STEP = re.compile(r"from step (\d+) to step \d+")
_MESSAGE = re.compile(r"^clipup train: .*$", re.M)
_CLOSING = re.compile(r"^\d+ steps in .*; see ", re.M)
"""The last line of a run, whose files are then complete."""
ENDINGS = {
    "stopped": ("stopped after step", (130,)),
    "interrupted": ("interrupted", (1, 130, -signal.SIGINT)),
    "refused": ("", (1, 2)),
}
"""What one of the messages says, and the exit codes of one process; torchrun has its own."""


class Start:
    """One start of ``clipup`` with its data workers, and with its ranks under torchrun."""

    _numbers = itertools.count(1)

    def __init__(self, arguments: list[str], processes: int, logs: Path, fork: bool = False) -> None:
        """
        Args:
            fork: the process is a fork of this one, which has imported everything, so that it trains seconds earlier.
        """
        number = next(self._numbers)
        self.logs, self.several, self.mark = logs / f"start-{number}", processes > 1, f"{os.getpid()}-{number}"
        self.logs.mkdir(parents=True)
        self.signals: set[int] = set()
        """The signals that it was sent."""
        self._killed = False
        command = [sys.executable]
        if self.several:
            command += [*TORCHRUN, f"--nproc-per-node={processes}", f"--log-dir={self.logs / 'ranks'}", "--redirects=3"]
        command += ["-m", "clipup", *(["--"] if self.several else []), *arguments]
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until the fork has its own handlers
        program = (lambda: cli.main(arguments)) if fork else (lambda: os.execv(command[0], command))
        self._process = multiprocessing.get_context("fork").Process(target=self._become, args=(program,))
        self._process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        self.pid: int = self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def describe(self) -> str:
        return f"{'torchrun' if self.several else 'the process'} {self.pid} ({self.logs})"

    def alive(self) -> list[int]:
        """Every process of this start that is not a zombie, including orphans."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and self._is_ours(int(name))]

    def ranks(self) -> list[int]:
        """The processes that train."""
        if not self.several:
            return [self.pid] if self.code is None else []
        return [pid for pid in self.alive() if _leads_session(pid) and "\0RANK=" in _proc(pid, "environ")]

    def data_workers(self) -> list[int]:
        """Processes that a training process forked."""
        return [pid for pid in self.alive() if not _leads_session(pid) and "tracker" not in _proc(pid, "cmdline")]

    def send(self, number: int, *pids: int) -> None:
        self.signals.add(number)
        self._killed = self._killed or (number == signal.SIGKILL and set(pids) >= set(self.ranks()))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> bool:
        """Waits until it has ended, including ranks that torchrun left behind. Returns whether it ended in time."""
        until = time.monotonic() + seconds
        while self.code is None or (self.several and self.ranks()):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def clear(self, seconds: float) -> list[int]:
        """Kills remaining processes, and returns those that had not ended within ``seconds``."""
        until = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        self.send(signal.SIGKILL, *left)
        self._process.join()
        return left

    def said(self) -> str:
        """The output of ``clipup``, without torchrun's own."""
        files = sorted((self.logs / "ranks").rglob("std*.log") if self.several else self.logs.glob("std*"))
        return "".join(map(_read, files))

    def resumed_at(self) -> int | None:
        """The step after which it began to train; None if it never did."""
        found = _FROM_STEP.search(self.said())
        return int(found[1]) if found else None

    def ending(self) -> str:
        """finished, stopped (with a checkpoint), interrupted, refused (with a readable message), killed, or crashed (a
        traceback or an unknown exit code). Ranks that lose another one may print a traceback beside its message."""
        code, said = self.code, self.said()
        if self._killed and code != 0:  # no process is left that could print a message
            return "killed"
        if self.resumed_at() is None:  # Python itself reports a Ctrl-C during imports
            said = _CTRL_C.sub("clipup train: interrupted\n", said)
        messages = _MESSAGE.findall(said)
        if _TRACEBACK in _WORKER.sub("", said) and not (self.several and messages):
            return "crashed"
        if code == 0:
            return "finished"
        for ending, (words, codes) in ENDINGS.items():
            if any(words in message for message in messages):
                return ending if self.several or code in codes else "crashed"
        if self.several and _CLOSING.search(said):  # another rank was killed while it was about to exit
            return "finished"
        return "killed" if self.several or -code in self.signals else "crashed"

    def _become(self, program: Callable[[], int]) -> None:
        """What the new process does: ``clipup`` in this fork, without the imports, or another program in its place."""
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.logs / name, os.O_WRONLY | os.O_CREAT), number)
        os.environ |= {"PYTHONPATH": str(ROOT), MARK: self.mark}
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        sys.exit(program())

    def _is_ours(self, pid: int) -> bool:
        if _stat(pid)[:1] in ([], ["Z"], ["X"]):
            return False
        return f"{MARK}={self.mark}\0" in _proc(pid, "environ") if self.several else _stat(pid)[3:4] == [str(self.pid)]


def _leads_session(pid: int) -> bool:
    """Started processes and torchrun's ranks lead a session; data workers belong to the session of their parent."""
    return _stat(pid)[3:4] == [str(pid)]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _proc(pid: int, name: str) -> str:
    return _read(Path(f"/proc/{pid}/{name}"))


def _stat(pid: int) -> list[str]:
    """The fields behind the program's name: state, parent, process group, session."""
    return _proc(pid, "stat").rpartition(")")[2].split()
