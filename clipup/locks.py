"""One writer a directory: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
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
    """Another process, or another thread of this one, writes there."""


@contextlib.contextmanager
def exclusive(path: Path, directory: Path, otherwise: str) -> Iterator[None]:
    """Holds a lock file while the block runs, and removes it at the end.

    The system frees the lock when its process ends, however it ends, so a file that a killed process left behind is
    taken over. Locks work between processes of one machine, and between machines where their file system passes
    ``flock`` on (NFS 4 does). A file system without locks is used without one, with a warning.

    Args:
        path: of the lock file. Directories above it are made, and removed again when they stay empty.
        directory: what is locked, and ``otherwise`` what to do when it is in use; both for the message.

    Raises:
        DirectoryInUse: the lock is held; names its process and machine.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = None
    try:
        file = _acquire(path, directory, otherwise)
        yield
    finally:
        if file is not None:
            _release(file, path)
        for parent in made:
            with contextlib.suppress(OSError):  # it holds something by now
                parent.rmdir()


def _acquire(path: Path, directory: Path, otherwise: str) -> int | None:
    """The locked file; None where the file system has no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0)
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DirectoryInUse(f"{directory} is in use by {_named(holder)}; {otherwise}") from None
            if error.errno not in _UNSUPPORTED:
                raise
            _LOG.warning("%s is on a file system without locks: see to it that nothing else writes there", directory)
            return None
        if _is_at(path, file):
            break
        os.close(file)  # the holder before has removed the file since it was opened
    _held.add(file)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    os.truncate(file, 0)
    os.pwrite(file, json.dumps(about).encode(), 0)
    return file


def _release(file: int, path: Path) -> None:
    if file not in _held:  # in a forked child, which does not hold it
        return
    with contextlib.suppress(OSError):  # a file that stays is no lock
        path.unlink(missing_ok=True)
    _held.remove(file)
    os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _named(holder: bytes) -> str:
    try:
        about = json.loads(holder)
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _close_in_child() -> None:
    """A forked child, such as a data worker, would hold the lock for longer than its parent lives."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
