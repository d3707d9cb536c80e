"""Ctrl-C, SIGTERM and the end of the terminal (SIGHUP): finish the step that is computed, save, then stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

REPEAT_SECONDS = 5.0
"""Signals within this many seconds of the first count as the same request: torchrun, and schedulers that signal a whole
process group, send SIGTERM to ranks that already have it. A closed terminal sends SIGHUP, and so does its shell."""


class StopWaiting(BaseException):
    """A request to stop arrived while the run was waiting. Not an Exception, which data readers would skip."""


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
        self._first = 0.0
        """When the first signal came."""

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if self._enabled else ():
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def unless_stopped(self, act: Callable[[], Result]) -> Result | None:
        """The result of a function that a request may interrupt anywhere; None after a request, also an earlier one."""
        self._waits = True
        try:
            return None if self.received else act()
        except StopWaiting:
            return None
        finally:
            self._waits = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT or time.monotonic() - self._first > REPEAT_SECONDS
        if self.received and again:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self._first = self._first or time.monotonic()
        self.received = True
        if self._waits:
            self._waits = False
            raise StopWaiting
