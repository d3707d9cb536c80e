"""Starts ``clipup``, finds and signals its processes, and classifies how it ended. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import time
import traceback
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


class Start:
    """One start of ``clipup`` with its data workers, and with its ranks under torchrun."""

    _count = 0

    def __init__(self, arguments: list[str], processes: int, logs: Path, run: Path, fork: bool = False) -> None:
        """
        Args:
            run: the run's directory, whose log tells what this start added to it.
            fork: the process is a fork of this one, which has imported everything, so that it trains seconds earlier.
        """
        Start._count += 1
        self.logs = logs / f"start-{Start._count}"
        self.logs.mkdir(parents=True)
        self.several = processes > 1
        self.mark = f"{os.getpid()}-{Start._count}"
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
        with open(self.logs / "stdout", "wb") as out, open(self.logs / "stderr", "wb") as err:
            if fork:
                self._process: subprocess.Popen | _Fork = _Fork(arguments, out.fileno(), err.fileno())
            else:
                environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark}
                self._process = subprocess.Popen(
                    command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
                )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def describe(self) -> str:
        return f"{'torchrun' if self.several else 'the process'} {self.pid} ({self.logs})"

    def alive(self) -> list[int]:
        """Every process of this start that is not a zombie, including orphans."""
        return [pid for pid in _pids() if self._is_ours(pid)]

    def ranks(self) -> list[int]:
        """The processes that train."""
        if not self.several:
            return [self.pid] if self.running else []
        return [pid for pid in self.alive() if _leads_session(pid) and "RANK" in _environment(pid)]

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
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.running:
            time.sleep(0.01)
        return left

    def said(self) -> str:
        """The output of ``clipup``, without torchrun's own."""
        files = [self.logs / "stdout", self.logs / "stderr"]
        if self.several:
            files = sorted((self.logs / "ranks").rglob("std*.log"))
        return "".join(file.read_text(errors="replace") for file in files if file.is_file())

    def messages(self) -> list[str]:
        return _MESSAGE.findall(self.said())

    def logged(self) -> str:
        """What it added to the run's log."""
        try:
            with open(self._log, errors="replace") as file:
                file.seek(self._log_offset)
                return file.read()
        except OSError:
            return ""

    def resumed_at(self) -> int | None:
        """The step after which it began to train; None if it never did."""
        found = _FROM_STEP.search(self.logged()) or _FROM_STEP.search(self.said())
        return int(found[1]) if found else None

    def ending(self) -> str:
        """finished, stopped (with a checkpoint), interrupted, refused (with a readable message), killed or crashed."""
        if self._killed and self.code != 0:  # no process is left that could print a message
            return "killed"
        said = self.said()
        if self.resumed_at() is None:  # Python itself reports a Ctrl-C during imports
            said = _CTRL_C.sub("clipup train: interrupted\n", said)
        messages = _MESSAGE.findall(said)
        if _TRACEBACK in said:
            return "crashed"
        if self.code == 0:
            return "finished"
        if any("stopped after step" in message and "--resume latest" in message for message in messages):
            return self._ended_with("stopped", 130)
        if any("clipup train: interrupted" in message for message in messages):
            return self._ended_with("interrupted", 130, -signal.SIGINT)
        if messages:
            return self._ended_with("refused", 1, 2)
        if self.several and _CLOSING.search(said):  # another rank was killed while it was about to exit
            return "finished"
        return self._ended_with("killed", *(-number for number in self.signals))

    def _ended_with(self, ending: str, *codes: int) -> str:
        """torchrun has its own exit codes."""
        return ending if self.several or self.code in codes else "crashed"

    def _is_ours(self, pid: int) -> bool:
        if _stat(pid)[:1] in ([], ["Z"], ["X"]):
            return False
        return _environment(pid).get(MARK) == self.mark if self.several else _stat(pid)[3:4] == [str(self.pid)]


class _Fork:
    """Does in a fork what a new process would do, without the imports; has ``pid`` and ``poll`` like Popen."""

    def __init__(self, arguments: list[str], out: int, err: int) -> None:
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("this process has threads, which a fork does not inherit; set OMP_NUM_THREADS=1")
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until the fork has its own handlers
        self.pid = os.fork()
        if self.pid == 0:
            _become_clipup(arguments, out, err)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _become_clipup(arguments: list[str], out: int, err: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 256)
        code = cli.main(arguments)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leads_session(pid: int) -> bool:
    """Started processes and torchrun's ranks lead a session; data workers belong to the session of their parent."""
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
