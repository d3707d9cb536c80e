"""Ctrl-C and SIGTERM: finish the current step, save, then stop."""

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
process group, send it to ranks that already have it."""


_program_ends = False


@contextmanager
def program_ends_with_the_run() -> Iterator[None]:
    """Inside, a repeated SIGTERM is ignored after a ``StopRequest`` is left, too: the run has been saved, and the
    program is about to exit."""
    global _program_ends
    _program_ends = True
    try:
        yield
    finally:
        _program_ends = False


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets ``received``.

    A second SIGINT has the effect that it had before entering, which is to stop at once; so has a SIGTERM that comes
    more than ``REPEAT_SECONDS`` after the first.
    """

    def __init__(self, enabled: bool = True) -> None:
        """``enabled=False``, or a thread other than the main one, leaves the signals alone."""
        self.received = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}
        self._terminated = 0.0

    def __enter__(self) -> StopRequest:
        if self._enabled:
            handlers = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate}
            self._before = {number: signal.getsignal(number) for number in handlers}
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if number == signal.SIGTERM and self.received and _program_ends:
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
            signal.signal(number, self._before[signal.SIGTERM])
            signal.raise_signal(number)
