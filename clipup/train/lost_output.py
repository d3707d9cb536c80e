"""stdout and stderr that nobody reads any more must not end a run: a closed terminal, a pipe whose reader has ended."""

from __future__ import annotations

import os
import select
import stat
import threading
from contextlib import suppress

from .recorder import LOG

_NAMES = {1: "stdout", 2: "stderr"}


class LostOutput:
    """Between ``start`` and ``stop``, stdout and stderr go nowhere as soon as nobody reads them, where they would
    refuse what is written, in mid-epoch or while a checkpoint is being saved."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._pipe: tuple[int, int] = (-1, -1)
        """Both ends are closed here: writing to a pipe that nobody can read could end the process (SIGPIPE)."""

    def start(self) -> None:
        read = [stream for stream in _NAMES if _may_lose_its_reader(stream)]
        with suppress(OSError):  # no descriptor is free: then output stays where it is
            self._pipe = os.pipe()
            arguments = read, self._pipe[0]
            self._thread = threading.Thread(target=_redirect_lost, args=arguments, name="clipup output", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread is free
                self._thread = None
                self._close()

    def stop(self) -> None:
        if self._thread is not None:
            os.write(self._pipe[1], b".")  # forked processes hold this end too: closing it alone says nothing
            self._thread.join()
            self._thread = None
            self._close()

    def _close(self) -> None:
        for end in self._pipe:
            os.close(end)

    def wait(self, seconds: float) -> None:
        """Gives readers so long to end. Without a watch, output that may lose its reader goes nowhere from now on."""
        if self._thread is not None:
            self._thread.join(seconds)
            return
        with suppress(OSError):
            for stream in filter(_may_lose_its_reader, _NAMES):
                _silence(stream)


def _may_lose_its_reader(stream: int) -> bool:
    try:
        mode = os.fstat(stream).st_mode
    except OSError:  # it was closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


def _redirect_lost(read: list[int], until: int) -> None:
    """Redirects each of the streams when it loses its reader, until there is something to read from the pipe ``until``
    or none is left."""
    events = select.poll()
    events.register(until, select.POLLIN)
    for stream in read:
        events.register(stream, 0)  # errors and hang-ups are always reported
    while read:
        found = dict(events.poll())
        if until in found:
            return
        lost = [stream for stream, event in found.items() if event & (select.POLLERR | select.POLLHUP)]
        for stream in found:
            events.unregister(stream)
            read.remove(stream)
        for stream in lost:  # all of them before a line is written: the log may be one
            with suppress(OSError):
                _silence(stream)
        for stream in lost:
            LOG.warning("nobody reads %s any more; the run continues without it", _NAMES[stream])


def _silence(stream: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream)
    os.close(nothing)
