"""Directory locks: one writer per directory. A lock is released when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

LOCK_FILE = ".lock"

_LOG = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()


class DirectoryInUse(BlockingIOError):
    """Another process, or another thread of this process, holds the lock."""


@contextlib.contextmanager
def exclusive(path: Path, directory: Path, advice: str) -> Iterator[None]:
    """Holds a lock file while the block runs, and removes it at the end.

    The operating system releases the lock when its process ends for any reason, so a lock file left by a killed process
    is reused. Locks work between processes of one machine, and between machines if their file system supports ``flock``
    (NFS 4 does). On a file system without locks, only a warning is logged.

    Args:
        path: the lock file. Missing parent directories are created, and removed again if they are still empty.
        directory: the locked directory, for the error message.
        advice: what to do if the directory is in use, for the error message.

    Raises:
        DirectoryInUse: the lock is held. Names the process and machine that hold it.
    """
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = None
    try:
        file = _acquire(path, directory, advice)
        yield
    finally:
        if file is not None:
            _release(file, path)
        for parent in created:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


def _acquire(path: Path, directory: Path, advice: str) -> int | None:
    """The locked file, or None if the file system has no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DirectoryInUse(f"{directory} is in use by {holder}; {advice}") from None
            if error.errno not in _UNSUPPORTED:
                raise
            _LOG.warning("%s is on a file system without locks: make sure that nothing else writes there", directory)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                break
        os.close(file)  # the previous holder removed the file after it was opened here
    _held.add(file)
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
    os.truncate(file, 0)
    os.pwrite(file, holder.encode(), 0)
    return file


def _release(file: int, path: Path) -> None:
    if file not in _held:  # a forked child does not hold the lock
        return
    with contextlib.suppress(OSError):  # a remaining file does not lock anything
        path.unlink(missing_ok=True)
    _held.remove(file)
    os.close(file)


def _close_in_child() -> None:
    """Closes the lock files in a forked child, such as a data worker, which could outlive its parent."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
