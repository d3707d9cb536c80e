"""Work on many drawings, in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_AT_ONCE = 32  # items that a process is given


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


def leave_signals_to_the_parent(worker: int) -> None:
    """For ``worker_init_fn`` of a data loader: Ctrl-C and a scheduler's SIGTERM reach all processes of a group, and the
    run that finishes its step and saves needs its workers until then. They end with their parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
