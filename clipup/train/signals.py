"""Ctrl-C and SIGTERM: finish the step that is under way, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets ``received``; the second does what it did before."""

    def __init__(self, enabled: bool = True) -> None:
        """``enabled=False``, or a thread other than the main one, leaves the signals alone."""
        self.received = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if self._enabled:
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._before[signal.Signals(number)])


def notice_lost_workers_when_data_are_read() -> None:
    """Takes torch's handler of SIGCHLD away, which raises in whatever the process is doing when a data worker dies: in
    a checkpoint, or while the run ends. The data loader notices by itself, within seconds, when it waits for data."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if (
        getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
