"""Starts ``clipup``, finds and signals its processes, and classifies how it ended. Linux only."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
from workload import ROOT

from clipup import cli

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1", "--shutdown-timeout", "20")
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_TRACEBACK = "Traceback (most recent call last)"
_CTRL_C = re.compile(rf"{re.escape(_TRACEBACK)}(?:(?!Traceback).)*?\nKeyboardInterrupt\n", re.S)
_AT_EXIT = re.compile(
    rf"Exception ignored in [^\n]*\n{re.escape(_TRACEBACK)}(?:(?!Traceback).)*?\nKeyboardInterrupt", re.S
)
"""A Ctrl-C while Python ends, after the run."""
_WORKER = re.compile(rf"{re.escape(_TRACEBACK)}:\n  File [^\n]*/multiprocessing/resource_sharer.py")
"""A data worker that is ended while it hands over a batch may print this; Python's thread does, not the run."""
_ENDINGS = (("stopped after step", "stopped"), ("clipup train: interrupted", "interrupted"), ("", "refused"))
"""Words of the last message, and how the run then ended."""


class Start:
    """One start of ``clipup`` with its data workers: a fork of this process, which has imported everything, so that it
    trains seconds earlier; or two ranks under torchrun."""

    def __init__(self, arguments: list[str], processes: int, logs: Path) -> None:
        self.several, self.logs = processes > 1, Path(tempfile.mkdtemp(dir=logs))
        self.signals: set[int] = set()
        """The signals that it was sent."""
        self.killed = False
        """Whether all of its processes were."""
        self._others = {process.pid for process in psutil.Process().children(recursive=True)}
        command = [sys.executable, *TORCHRUN, f"--nproc-per-node={processes}", f"--log-dir={self.logs}"]
        command += ["--redirects=3", "-m", "clipup", "--", *arguments]
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until the fork has its own handlers
        self._process = multiprocessing.get_context("fork").Process(target=self._become, args=(arguments, command))
        self._process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)

    def _become(self, arguments: list[str], command: list[str]) -> None:
        """What the new process does."""
        os.setsid()
        for number, name in ((1, "stdout.log"), (2, "stderr.log")):
            os.dup2(os.open(self.logs / name, os.O_WRONLY | os.O_CREAT), number)
        os.environ["PYTHONPATH"] = str(ROOT)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        sys.exit(os.execv(command[0], command) if self.several else cli.main(arguments))

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def processes(self) -> dict[str, list[int]]:
        """Every process of this start by what it is, orphans included: this process inherits them. Started processes
        and torchrun's ranks lead a session; data workers belong to the session of their parent."""
        found: dict[str, list[int]] = {"the process": [], "a rank": [], "a data worker": [], "all processes": []}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                pid = process.pid
                if pid in self._others or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                found["all processes"].append(pid)
                if os.getsid(pid) == pid:
                    found["the process" if pid == self._process.pid else "a rank"].append(pid)
                elif "tracker" not in " ".join(process.cmdline()):
                    found["a data worker"].append(pid)
        return found if self.several else {**found, "a rank": found["the process"]}

    def send(self, number: int, *pids: int) -> None:
        self.signals.add(number)
        self.killed |= number == signal.SIGKILL and set(pids) >= set(self.processes()["a rank"])
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float, everything: bool = False) -> list[int]:
        """Waits until it has ended, with ranks that torchrun left behind, or with everything. Returns the processes
        that had not ended in time."""
        until = time.monotonic() + seconds
        while (left := self.processes()["all processes" if everything else "a rank"]) or self.code is None:
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return left

    def said(self) -> str:
        """The output of ``clipup``, without torchrun's own."""
        files = sorted(self.logs.glob("*/**/std*.log" if self.several else "std*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def resumed_at(self) -> int | None:
        """The step after which it began to train; None if it never did."""
        found = re.search(r"from step (\d+) to step \d+", self.said())
        return int(found[1]) if found else None

    def ending(self) -> str:
        """finished, stopped (with a checkpoint), interrupted, refused (with a readable message), killed, or crashed (a
        traceback or an unknown exit code). Ranks that lose another one may print a traceback beside its message."""
        said = _AT_EXIT.sub("", self.said())
        if self.resumed_at() is None:  # Python itself reports a Ctrl-C during imports
            said = _CTRL_C.sub("clipup train: interrupted\n", said)
        messages = re.findall(r"^clipup train: .*$", said, re.M)
        if self.code == 0 or self.killed:  # no process is left that could print a message
            return "killed" if self.code else "crashed" if _TRACEBACK in _WORKER.sub("", said) else "finished"
        if _TRACEBACK in _WORKER.sub("", said) and not (self.several and messages):
            return "crashed"
        if messages and (self.several or self.code in (1, 2, 130, -signal.SIGINT)):
            return next(ending for words, ending in _ENDINGS if any(words in message for message in messages))
        return "killed" if self.several or -self.code in self.signals else "crashed"
