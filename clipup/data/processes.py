"""Worker processes: a map over items, and data loader workers that survive signals to the process group."""

from __future__ import annotations

import atexit
import errno
import functools
import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

_CHUNK = 32
_SECONDS_TO_END = 1
"""For all workers together, from when they are told to end until they are killed."""


def each(
    function: Callable[[Any], Any], items: Sequence[Any], processes: int | None = None, chunk: int = _CHUNK
) -> Iterator[Any]:
    """The function's results for all items, in order.

    Args:
        processes: None for one per CPU; with 1, the calling process does the work.
        chunk: items sent to a process at once.

    Workers ignore Ctrl-C; the calling process receives it and ends them. They end with it, too, if it is killed.

    Raises ChildProcessError when a worker was killed.
    """
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        yield from map(function, items)
        return
    # Forked where possible, so that workers need not import the package (and torch) again
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    end, ends = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _prepare_for_map, (end,))
    try:
        parts = [pool.submit(_all, function, items[i : i + chunk]) for i in range(0, len(items), chunk)]
        parts.reverse()
        while parts:
            yield from parts.pop().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {processes} worker processes was killed, perhaps for lack of memory: use fewer of them"
        ) from error
    finally:
        # To all workers, since none receives it: those that are busy would finish their items. No part is cancelled:
        # the pool, which then counts as broken, would fail to say so to one.
        ends.send(None)
        pool.shutdown()
        end.close()
        ends.close()


def _all(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [function(item) for item in items]


def _prepare_for_map(end: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked, they have the handlers of the calling process
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_map, args=(parent.sentinel, end), daemon=True).start()


def _end_map(parent: int, end: Connection) -> None:
    """Ends a worker with its parent, and a second after there is something to receive: a result that is being sent
    arrives as a whole."""
    if parent not in wait([parent, end]):
        time.sleep(_SECONDS_TO_END)
    os._exit(1)


def worker_init_fn() -> Callable[[int], None]:
    """``worker_init_fn`` for a data loader whose workers ignore Ctrl-C, SIGTERM and SIGHUP.

    These signals reach all processes of a job, and the parent decides when its workers end. Each leads a process group:
    when it is killed, or its parent ends, even while its source stalls, the programs that it started end too. At exit
    the parent sends SIGTERM, which workers ignore, and would wait forever, so remaining workers are killed at exit.
    """
    _register_at_exit()
    return _prepare_worker


class LostWorker(ChildProcessError):
    """A data worker was killed, or has ended otherwise."""


SHARED_MEMORY_FULL = (
    "shared memory (/dev/shm), in which data workers hand over their batches, is full: give the container more of it "
    "(docker run --shm-size=8g, or --ipc=host), use fewer workers, or a smaller batch"
)


def _fills_shared_memory(error: BaseException) -> bool:
    """Whether torch could not get shared memory, in a worker or here, or multiprocessing a semaphore."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and error.filename is None
    text = str(error)
    return ("</torch_" in text and os.strerror(errno.ENOSPC) in text) or "killed by signal: Bus error" in text


@contextmanager
def lost_workers_named(iterator: Any = None) -> Iterator[None]:
    """Inside, while data are read, LostWorker takes the place of torch's error and of that of a broken connection. An
    error that a worker raised has that worker's message alone, without its traceback.

    Args:
        iterator: a data loader's, whose workers tell of what they died.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError, EOFError, MemoryError) as error:
        killed_by = {worker.exitcode for worker in getattr(iterator, "_workers", ())}
        if -signal.SIGBUS in killed_by or _fills_shared_memory(error):
            raise LostWorker(SHARED_MEMORY_FULL) from error
        message = str(error)
        if message.startswith("Caught "):  # by torch, which appends the worker's traceback
            message = re.split(rf"\n[\w.]*\b{type(error).__name__}: ?", message)[-1]
            raise type(error)(message.strip()) from error
        if isinstance(error, ConnectionError | EOFError) or message.startswith("DataLoader worker"):
            reason = next(iter(message.splitlines()), type(error).__name__).removesuffix(".")
            raise LostWorker(
                f"a data worker has ended ({reason}), perhaps killed for lack of memory: use fewer workers, or free "
                "memory"
            ) from error
        raise


def detect_lost_workers_when_reading() -> None:
    """Removes torch's SIGCHLD handler, which raises wherever the process is when a data worker dies: while a checkpoint
    is written, or while the run ends. The data loader detects it within seconds when it waits for data."""
    handler = signal.getsignal(signal.SIGCHLD)
    of_torch = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
    if of_torch and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def reading(loader: Any) -> Iterator[Iterator[Any]]:
    """An iterator over a data loader, whose workers end if the block is left before the last batch, with errors as in
    ``lost_workers_named``; the rest of the block is not interrupted.

    Without it they end when the iterator is garbage-collected. The traceback of an error keeps the iterator, and when
    both are collected at once, the queues may be gone first: the workers are not told to end, and the process waits
    five seconds for each. Persistent workers stay for the next iteration unless an error ends this one.
    """
    with lost_workers_named():
        iterator = iter(loader)
    detect_lost_workers_when_reading()
    persistent = getattr(loader, "persistent_workers", False)
    try:
        yield _with_errors_named(iterator)
    except BaseException as error:
        if not (persistent and isinstance(error, GeneratorExit)):
            if persistent:
                loader._iterator = None  # or the next iteration would use the same workers
            if hasattr(iterator, "_shutdown_workers"):
                _end_workers_of(iterator)
                # torch's frames hold the error of a worker, whose traceback holds them: a cycle that would keep the
                # loader. They are of this process; the worker's own traceback is text in the error's message.
                traceback.clear_frames(error.__traceback__)
        raise


def _with_errors_named(iterator: Iterator[Any]) -> Iterator[Any]:
    with lost_workers_named(iterator):
        yield from iterator


def end_workers(loader: Any) -> None:
    """Ends the persistent workers of a data loader. Those that hang are killed after a second, or by Ctrl-C, which is
    done with then: left to the garbage collector, it would be a traceback of an ignored exception."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is None:
        return
    loader._iterator = None
    with suppress(KeyboardInterrupt):
        _end_workers_of(iterator)


def _end_workers_of(iterator: Any) -> None:
    """Tells them to end, and kills those that hang: torch waits for one after the other, and terminates them, which
    they ignore."""
    if sys.is_finalizing():  # no thread can be started, and torch does nothing
        _kill(iterator._workers)
        return
    deadline = threading.Timer(_SECONDS_TO_END, _kill, [iterator._workers])
    deadline.daemon = True
    deadline.start()
    try:
        iterator._shutdown_workers()  # torch has no public name for it
    finally:
        deadline.cancel()
        _kill(iterator._workers)


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        process.kill()
        with suppress(OSError):  # what a data worker has started, such as curl: it may wait for a server
            os.killpg(process.pid, signal.SIGKILL)


def _prepare_worker(worker: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        os.setpgid(0, 0)
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = functools.partial(_report, sys.excepthook)


def _end_with(parent: int) -> None:
    """torch's workers notice that their parent has ended only where they wait for it, not while they read."""
    wait([parent])
    os.killpg(os.getpid(), signal.SIGKILL)


def _report(
    report: Callable[..., object], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A thread of ``multiprocessing`` hands over a worker's tensors. When the parent stops waiting meanwhile, or is
    killed, a connection breaks in that thread, and its traceback would be the last that one reads of a run."""
    if not isinstance(error, ConnectionError | EOFError):
        report(kind, error, trace)


@functools.cache
def _register_at_exit() -> None:
    """``atexit`` runs functions in reverse order, so ours runs before that of ``multiprocessing.util``."""
    importlib.import_module("multiprocessing.util")
    atexit.register(_kill_daemons)


def _kill_daemons() -> None:
    """Kills daemonic children, which ``multiprocessing`` would terminate: data workers ignore that."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed, here too
    _kill([child for child in multiprocessing.active_children() if child.daemon])
