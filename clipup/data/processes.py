"""Data workers that survive signals to the process group and end with their parent, and a map over items by them."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

from ..precision import cores

_SECONDS_TO_END = 1
"""Time for all workers together to end before they are killed."""


def each(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int | None = None
) -> Generator[Any, None, None]:
    """The function's results for all items, in order.

    Args:
        workers: data workers, with 0 the calling process. None: one per CPU, with one CPU the calling process.

    Raises LostWorker when a worker was killed.
    """
    import torch  # here, because commands know the formats of data before they need torch
    from torch.utils.data import DataLoader

    loader: DataLoader = DataLoader(
        items,  # type: ignore[arg-type]  # torch reads any sequence
        batch_size=None,
        num_workers=cores() * (cores() > 1) if workers is None else workers,
        collate_fn=function,
        worker_init_fn=worker_init_fn(),
        generator=torch.Generator(),
    )
    with reading(loader) as results:
        yield from results


def worker_init_fn() -> Callable[[int], None]:
    """``worker_init_fn`` for a data loader whose workers ignore Ctrl-C, SIGTERM and SIGHUP.

    These signals reach all processes of a job, and the parent decides when its workers end. Each worker leads a process
    group. When it is killed or its parent ends, even while its source stalls, the programs that it started end too.
    Workers that remain at exit are killed: they ignore the SIGTERM that the parent sends, and it would wait forever.
    """
    atexit.unregister(_kill_daemons)  # an earlier registration
    atexit.register(_kill_daemons)  # runs before the function of multiprocessing.util, which was registered earlier
    return _prepare_worker


class LostWorker(ChildProcessError):
    """A data worker was killed, or has ended otherwise."""


SHARED_MEMORY_FULL = (
    "shared memory (/dev/shm), in which data workers hand over their batches, is full: give the container more of it "
    "(docker run --shm-size=8g, or --ipc=host), use fewer workers, or a smaller batch"
)


@contextmanager
def lost_workers_named(iterator: Any = None) -> Iterator[None]:
    """Replaces torch's error about a lost worker, and that of a broken connection, by LostWorker. Of an error that a
    worker raised, the message is kept, without the worker's traceback.

    Args:
        iterator: a data loader's. The exit codes of its workers say why they ended.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError, EOFError, MemoryError) as error:
        message, full = str(error), os.strerror(errno.ENOSPC)
        killed_by = {worker.exitcode for worker in getattr(iterator, "_workers", ())}
        # torch without shared memory, in a worker or here, or multiprocessing without a semaphore
        no_memory = full in message and ("</torch_" in message or getattr(error, "filename", "") is None)
        if no_memory or -signal.SIGBUS in killed_by or "killed by signal: Bus error" in message:
            raise LostWorker(SHARED_MEMORY_FULL) from error
        if message.startswith("Caught "):  # by torch, which appends the worker's traceback
            message = re.split(rf"\n[\w.]*\b{type(error).__name__}: ?", message)[-1]
            raise type(error)(message.strip()) from error
        if isinstance(error, ConnectionError | EOFError) or message.startswith("DataLoader worker"):
            reason = message.partition("\n")[0] or type(error).__name__
            raise LostWorker(
                f"a data worker has ended ({reason.removesuffix('.')}), perhaps killed for lack of memory: use fewer "
                "workers, or free memory"
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
def _uninterrupted() -> Iterator[None]:
    """Postpones requests to stop. An exception of their handler would leave a data worker that nobody tells to end, and
    for which the process would wait at its exit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def reading(loader: Any) -> Iterator[Iterator[Any]]:
    """An iterator over a data loader, whose workers end if the block is left before the last batch, with errors as in
    ``lost_workers_named``; the rest of the block is not interrupted.

    Without it they end when the iterator is garbage-collected. The traceback of an error keeps the iterator. If both
    are collected at once and the queues go first, no worker is told to end, and the process waits five seconds for
    each. Persistent workers stay for the next iteration unless an error ends this one.
    """
    with _uninterrupted(), lost_workers_named():
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
    """Ends the persistent workers of a data loader. Those that hang are killed after a second, or by Ctrl-C, which has
    no other effect: in the garbage collector it would print the traceback of an ignored exception."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is None:
        return
    loader._iterator = None
    with suppress(KeyboardInterrupt):
        _end_workers_of(iterator)


def _end_workers_of(iterator: Any) -> None:
    """Tells workers to end, and kills hanging workers. torch waits for each in turn and then sends SIGTERM,
    which they ignore."""
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


def _end_with(parent: int) -> None:
    """Ends a worker with its parent. torch's workers notice that only while they wait for it, not while they read."""
    wait([parent])
    os.killpg(os.getpid(), signal.SIGKILL)


def _kill_daemons() -> None:
    """Kills daemonic children, which ``multiprocessing`` would terminate: data workers ignore that."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed, here too
    _kill([child for child in multiprocessing.active_children() if child.daemon])
