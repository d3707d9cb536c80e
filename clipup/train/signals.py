"""Ctrl-C, SIGTERM and the end of the terminal (SIGHUP): finish the step that is computed, save, then stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


class StopWaiting(BaseException):
    """A request to stop came where a run waits. No Exception: readers skip what raises one."""


class StopRequest:
    """While it is entered, the first SIGINT, SIGTERM or SIGHUP sets ``received``. One that is ignored stays ignored:
    SIGHUP under nohup, SIGINT in the background of a shell script.

    A second SIGINT has the effect that it had before entering, which is to stop at once; so has a SIGTERM or SIGHUP
    that comes more than ``REPEAT_SECONDS`` after the first.
    """

    def __init__(self, enabled: bool = True) -> None:
        """``enabled=False``, or a thread other than the main one, leaves the signals alone."""
        self.received = False
        self._waits = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._terminated = 0.0

    def __enter__(self) -> StopRequest:
        if self._enabled:
            handlers: dict[int, Any] = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate}
            if hasattr(signal, "SIGHUP"):
                handlers[signal.SIGHUP] = self._terminate
            for number, handler in handlers.items():
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: of another language, and could not be restored
                    self._before[number] = before
                    signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends = self.received and _program_ends
        for number, handler in self._before.items():
            if number != signal.SIGINT and ends:
                continue  # _terminate restores it when the time of repeated ones is over
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, where the main thread waits, a request raises StopWaiting, and so does one that came before."""
        self._waits = True
        try:
            if self.received:
                raise StopWaiting
            yield
        finally:
            self._waits = False

    def _receive(self) -> None:
        self.received = True
        if self._waits:
            self._waits = False
            raise StopWaiting

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._before[signal.SIGINT])
        self._receive()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._terminated = self._terminated or now
        if now - self._terminated > REPEAT_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self._receive()
