"""Starting ``clipup``, finding and signalling its processes, and telling how it ended. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from workload import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1", "--shutdown-timeout", "20")
MARK = "CLIPUP_FAULT_INJECTION"
"""Environment variable by which the processes of a start are found, orphans too."""

_TRACEBACK = "Traceback (most recent call last)"
_CTRL_C_IN_IMPORTS = re.compile(r"Traceback \(most recent call last\)(?:(?!Traceback).)*?\nKeyboardInterrupt\n", re.S)
_FROM_STEP = re.compile(r"from step (\d+) to step \d+")
_MESSAGE = re.compile(r"^clipup train: .*$", re.M)


class Start:
    """One start of ``clipup`` with its data workers, under torchrun its ranks too."""

    _count = 0

    def __init__(self, arguments: list[str], processes: int, logs: Path) -> None:
        Start._count += 1
        self.logs = logs / f"start-{Start._count}"
        self.logs.mkdir(parents=True)
        self.several = processes > 1
        self.mark = f"{os.getpid()}-{Start._count}"
        self.signals: set[int] = set()
        """What we sent it."""
        command = [sys.executable]
        if self.several:
            command += [*TORCHRUN, f"--nproc-per-node={processes}", f"--log-dir={self.logs / 'ranks'}", "--redirects=3"]
        command += ["-m", "clipup", *(["--"] if self.several else []), *arguments]
        (self.logs / "command").write_text(" ".join(command) + "\n")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: self.mark}
        environment |= {"PYTHONUNBUFFERED": "1", "TMPDIR": str(logs)}
        with open(self.logs / "stdout", "wb") as out, open(self.logs / "stderr", "wb") as err:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        self.pid = self._process.pid

    def watch(self, run: Path) -> None:
        """Remembers where the log of a run directory ends before this start writes to it."""
        log = run / "out.log"
        self._log_offset = log.stat().st_size if log.is_file() else 0

    def logged(self, run: Path) -> str:
        """What was added to the run's log."""
        try:
            with open(run / "out.log", errors="replace") as file:
                file.seek(self._log_offset)
                return file.read()
        except OSError:
            return ""

    def resumed_at(self, run: Path) -> int | None:
        """The step after which this start went on, None where it never said so."""
        found = _FROM_STEP.search(self.logged(run))
        return int(found[1]) if found else None

    def describe(self) -> str:
        return f"{'torchrun' if self.several else 'the process'} {self.pid} ({self.logs})"

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def alive(self) -> list[int]:
        """Every process of this start that is no zombie, whoever its parent is by now."""
        return [pid for pid in _pids() if self._is_ours(pid)]

    def ranks(self) -> list[int]:
        """The processes that train."""
        if not self.several:
            return [self.pid] if self.pid in self.alive() else []
        return [pid for pid in self.alive() if "RANK" in _environment(pid) and _leads_session(pid)]

    def data_workers(self) -> list[int]:
        """Processes that were forked by one that trains."""
        return [pid for pid in self.alive() if not _leads_session(pid) and "clipup" in _read(pid, "cmdline")]

    def send(self, number: int, *pids: int) -> None:
        self.signals.add(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> bool:
        """Until it has ended, and its ranks too where torchrun left them behind; whether it did in time."""
        until = time.monotonic() + seconds
        while self.running or (self.several and self.ranks()):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def clear(self, seconds: float = 15) -> list[int]:
        """Ends what is left; returns the processes that did not end by themselves within ``seconds``."""
        until = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return left

    def said(self) -> str:
        """What ``clipup`` printed, without torchrun's own words."""
        files = [self.logs / "stdout", self.logs / "stderr"]
        if self.several:
            files = sorted((self.logs / "ranks").rglob("std*.log"))
        return "".join(file.read_text(errors="replace") for file in files if file.is_file())

    def messages(self) -> list[str]:
        return _MESSAGE.findall(self.said())

    def ending(self) -> str:
        """finished, stopped (with a checkpoint), interrupted, refused (one readable message), killed, or crashed."""
        said = _CTRL_C_IN_IMPORTS.sub("clipup train: interrupted\n", self.said())
        messages = _MESSAGE.findall(said)
        if _TRACEBACK in said:
            return "crashed"
        if self.code == 0:
            return "finished"
        expected = {1, 2, 130, *(-number for number in self.signals)}
        if not self.several and self.code not in expected:
            return "crashed"
        if any("stopped after step" in message and "--resume latest" in message for message in messages):
            return "stopped" if self.several or self.code == 130 else "crashed"
        if any("clipup train: interrupted" in message for message in messages):
            return "interrupted" if self.several or self.code in (130, -signal.SIGINT) else "crashed"
        if messages and (self.several or self.code in (1, 2)):
            return "refused"
        if self.signals & {signal.SIGKILL, signal.SIGTERM, signal.SIGINT} and (self.several or self.code < 0):
            return "killed"
        return "crashed"

    def _is_ours(self, pid: int) -> bool:
        return _state(pid) not in ("Z", "X", "") and _environment(pid).get(MARK) == self.mark


def _leads_session(pid: int) -> bool:
    """So do we start a process, and torchrun a rank; data workers belong to the session of theirs."""
    return _stat(pid)[3:4] == [str(pid)]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in _read(pid, "environ").split("\0") if "=" in entry)


def _stat(pid: int) -> list[str]:
    """The fields behind the program's name: state, parent, process group, session."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _state(pid: int) -> str:
    return (_stat(pid) or [""])[0]
