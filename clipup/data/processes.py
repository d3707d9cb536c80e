"""Work on many drawings, in several processes."""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_AT_ONCE = 32  # items that a process is given
_SECONDS_TO_END = 1


def each(function: Callable[[Any], Any], items: Sequence[Any], processes: int | None = None) -> Iterator[Any]:
    """What the function makes of every item, in their order; ``processes``: how many, None for one a CPU.

    With one, this process itself. Ctrl-C reaches this process alone, which ends the others.
    """
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        yield from map(function, items)
        return
    # Forked, where the system can, so that no process imports the package (and torch) again
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(function, items, chunksize=_AT_ONCE)


def worker_init_fn() -> Callable[[int], None]:
    """``worker_init_fn`` of a data loader whose workers ignore Ctrl-C and SIGTERM.

    Both reach all processes of a group, and the run that finishes its step and saves needs its workers until then. They
    end with their parent. Because they ignore SIGTERM too when the parent sends it at its exit, and the parent then
    waits for them, those that are left are killed there.
    """
    _register_at_exit()
    return _ignore_signals


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _register_at_exit() -> None:
    """``atexit`` runs the last registered function first, so ours comes before that of ``multiprocessing.util``."""
    importlib.import_module("multiprocessing.util")
    atexit.register(_end_daemons)


def _end_daemons() -> None:
    """Ends daemonic children as ``multiprocessing`` would, and kills those that ignore it."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    for child in daemons:
        child.terminate()
    for child in daemons:
        child.join(_SECONDS_TO_END)
        child.kill()
