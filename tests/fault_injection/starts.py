"""Starts ``clipup``, finds and signals its processes, and classifies how it ended. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from workload import ROOT

from clipup import cli

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1", "--shutdown-timeout", "20")
MARK = "CLIPUP_FAULT_INJECTION"
"""Environment variable that marks the processes of a start, so that orphans are found too."""

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_TRACEBACK = "Traceback (most recent call last)"
_CTRL_C = re.compile(rf"{re.escape(_TRACEBACK)}(?:(?!Traceback).)*?\nKeyboardInterrupt\n", re.S)
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

    def __init__(self, arguments: list[str], processes: int, logs: Path, run: Path, fork: bool = False) -> None:
        """
        Args:
            run: the run's directory, whose log tells what this start added to it.
            fork: the process is a fork of this one, which has imported everything, so that it trains seconds earlier.
        """
        number = next(self._numbers)
        self.logs, self.several, self.mark = logs / f"start-{number}", processes > 1, f"{os.getpid()}-{number}"
        self.logs.mkdir(parents=True)
        self.signals: set[int] = set()
        """The signals that it was sent."""
        self._killed = False
        self._log = run / "out.log"
        self._log_offset = self._log.stat().st_size if self._log.is_file() else 0
        command = [sys.executable]
        if self.several:
            command += [*TORCHRUN, f"--nproc-per-node={processes}", f"--log-dir={self.logs / 'ranks'}", "--redirects=3"]
        command += ["-m", "clipup", *(["--"] if self.several else []), *arguments]
        (self.logs / "command").write_text(" ".join(command) + "\n")
        self._forked = self._started = None
        with open(self.logs / "stdout", "wb") as out, open(self.logs / "stderr", "wb") as err:
            if fork:
                signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until the fork has its own handlers
                context = multiprocessing.get_context("fork")
                self._forked = context.Process(target=_become_clipup, args=(arguments, out.fileno(), err.fileno()))
                self._forked.start()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
            else:
                environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark}
                self._started = subprocess.Popen(
                    command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
                )
        self.pid: int = (self._forked or self._started).pid

    @property
    def code(self) -> int | None:
        return self._started.poll() if self._forked is None else self._forked.exitcode

    @property
    def running(self) -> bool:
        return self.code is None

    def describe(self) -> str:
        return f"{'torchrun' if self.several else 'the process'} {self.pid} ({self.logs})"

    def alive(self) -> list[int]:
        """Every process of this start that is not a zombie, including orphans."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and self._is_ours(int(name))]

    def ranks(self) -> list[int]:
        """The processes that train."""
        if not self.several:
            return [self.pid] if self.running else []
        return [pid for pid in self.alive() if _leads_session(pid) and "\0RANK=" in _read(pid, "environ")]

    def data_workers(self) -> list[int]:
        """Processes that a training process forked."""
        return [pid for pid in self.alive() if not _leads_session(pid) and "tracker" not in _read(pid, "cmdline")]

    def send(self, number: int, *pids: int) -> None:
        self.signals.add(number)
        self._killed = self._killed or (number == signal.SIGKILL and set(pids) >= set(self.ranks()))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> bool:
        """Waits until it has ended, including ranks that torchrun left behind. Returns whether it ended in time."""
        until = time.monotonic() + seconds
        while self.running or (self.several and self.ranks()):
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
        while self.running:
            time.sleep(0.01)
        return left

    def said(self) -> str:
        """The output of ``clipup``, without torchrun's own."""
        files = [self.logs / "stdout", self.logs / "stderr"]
        if self.several:
            files = sorted((self.logs / "ranks").rglob("std*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def logged(self) -> str:
        """What it added to the run's log."""
        try:
            return self._log.read_bytes()[self._log_offset :].decode(errors="replace")
        except OSError:
            return ""

    def resumed_at(self) -> int | None:
        """The step after which it began to train; None if it never did."""
        found = _FROM_STEP.search(self.logged()) or _FROM_STEP.search(self.said())
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
        if _TRACEBACK in said and not (self.several and messages):
            return "crashed"
        if code == 0:
            return "finished"
        for ending, (words, codes) in ENDINGS.items():
            if any(words in message for message in messages):
                return ending if self.several or code in codes else "crashed"
        if self.several and _CLOSING.search(said):  # another rank was killed while it was about to exit
            return "finished"
        return "killed" if self.several or -code in self.signals else "crashed"

    def _is_ours(self, pid: int) -> bool:
        if _stat(pid)[:1] in ([], ["Z"], ["X"]):
            return False
        return f"{MARK}={self.mark}\0" in _read(pid, "environ") if self.several else _stat(pid)[3:4] == [str(self.pid)]


def _become_clipup(arguments: list[str], out: int, err: int) -> None:
    """Does in a fork what a new process would do, without the imports."""
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    sys.exit(cli.main(arguments))


def _leads_session(pid: int) -> bool:
    """Started processes and torchrun's ranks lead a session; data workers belong to the session of their parent."""
    return _stat(pid)[3:4] == [str(pid)]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """The fields behind the program's name: state, parent, process group, session."""
    return _read(pid, "stat").rpartition(")")[2].split()
