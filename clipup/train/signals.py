"""Ctrl-C, SIGTERM and the end of the terminal (SIGHUP): finish the current step, save, then stop."""

from __future__ import annotations

import os
import select
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

REPEAT_SECONDS = 5.0
"""For so long after the first SIGTERM another one is the same request: torchrun, and schedulers that signal a whole
process group, send it to ranks that already have it. A closed terminal sends SIGHUP, and so does its shell."""


_program_ends = False


@contextmanager
def program_ends_with_the_run() -> Iterator[None]:
    """Inside, a repeated SIGTERM or SIGHUP is ignored after a ``StopRequest`` is left, too: the run has been saved, and
    the program is about to exit."""
    global _program_ends
    _program_ends = True
    try:
        yield
    finally:
        _program_ends = False


class StopRequest:
    """While it is entered, the first SIGINT, SIGTERM or SIGHUP sets ``received``. A SIGHUP that is ignored, as under
    nohup, stays ignored.

    A second SIGINT has the effect that it had before entering, which is to stop at once; so has a SIGTERM or SIGHUP
    that comes more than ``REPEAT_SECONDS`` after the first.
    """

    def __init__(self, enabled: bool = True) -> None:
        """``enabled=False``, or a thread other than the main one, leaves the signals alone."""
        self.received = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._terminated = 0.0

    def __enter__(self) -> StopRequest:
        if self._enabled:
            handlers: dict[int, Any] = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate}
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                handlers[signal.SIGHUP] = self._hang_up
            self._before = {number: signal.getsignal(number) for number in handlers}
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if number != signal.SIGINT and self.received and _program_ends:
                continue  # _terminate restores it when the time of repeated ones is over
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._before[signal.SIGINT])

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        now = time.monotonic()
        self._terminated = self._terminated or now
        if now - self._terminated > REPEAT_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self._terminate(number, frame)
        _write_to_nobody()


def _write_to_nobody() -> None:
    """Of stdout and stderr, what nobody reads any more goes nowhere: a terminal that is gone, and a pipe or a socket,
    whose other end gets the same signal, would refuse what is written, in the middle of saving."""
    with suppress(OSError, ValueError):  # no descriptor is free: then output stays where it is
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            with suppress(OSError):  # it was closed
                mode = os.fstat(stream).st_mode
                if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or (stat.S_ISCHR(mode) and _is_gone(stream)):
                    os.dup2(nothing, stream)
        os.close(nothing)


def _is_gone(stream: int) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
