"""Reading again, with growing pauses, what a file system or a server failed to deliver."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from .skips import Notes, Skips

Result = TypeVar("Result")

RETRIES = 4
"""Default for the number of further tries."""
FIRST_PAUSE = 2.0
"""Seconds before the second try; each further pause is twice as long, up to about a minute."""
_DOUBLINGS = 5
_TEMPORARY = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ENETDOWN),
    *(errno.ENETUNREACH, errno.ENETRESET, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN),
    *(errno.EHOSTUNREACH, errno.EPIPE),
}
_OWN = {errno.EMFILE: "raise the limit (ulimit -n)", errno.ENFILE: "close other programs", errno.ENOMEM: "free memory"}
"""What this process or machine lacks, which says nothing about the data."""


class SourceError(ValueError):
    """What prevents reading is no fault of a sample, so no other one may take its place."""


def lack(error: BaseException) -> str:
    """What this process or machine lacks, and what to do; "" for an error of another kind."""
    if isinstance(error, MemoryError):
        return "memory ran out: free memory, use fewer workers, or lower max_image_pixels"
    if isinstance(error, OSError) and error.errno in _OWN:
        return f"{error.strerror}: {_OWN[error.errno]}"
    return ""


def raise_lack(error: BaseException, name: Callable[[], str]) -> None:
    """Raises SourceError for an error that is one, or says what this process or machine lacks."""
    if isinstance(error, SourceError):
        raise error
    if lack(error):
        raise SourceError(f"cannot read {name()}: {lack(error)}") from error


def message_of(error: BaseException) -> str:
    """What an error says, or of which class it is."""
    return str(error) or type(error).__name__


class Retries:
    """Calls a function that reads until it succeeds, at most ``retries`` times more than once.

    Pauses are 2, 4, 8, ..., 64, 64, ... seconds, each between a half and one and a half of that, so that many processes
    do not return to a server at once. After a read that failed to the end, none is repeated until one succeeds: a lost
    disk ends a run instead of delaying every sample.
    """

    def __init__(self, retries: int, notes: Notes | Skips) -> None:
        """notes: where repetitions are noted."""
        self.retries, self.notes = retries, notes
        self._left = retries

    def __call__(self, name: Callable[[], str], read: Callable[[], Result]) -> Result:
        """What ``read`` returns. Raises its last OSError, or at once one that waiting cannot repair, as
        ``SourceError`` if the fault is not that of the data.

        Args:
            name: gives the name of what is read, for the log.
        """
        number = 0
        while True:
            try:
                result = read()
            except (OSError, MemoryError) as error:
                raise_lack(error, name)
                if not isinstance(error, OSError) or not (error.errno is None or error.errno in _TEMPORARY):
                    raise
                if number >= self._left:
                    self._left = 0
                    raise
                self.notes.retry(name(), error)
                sleep(FIRST_PAUSE * 2 ** min(number, _DOUBLINGS) * random.Random().uniform(0.5, 1.5))
                number += 1
            else:
                self._left = self.retries
                return result


def read_shard(read: Callable[[], Result], shard: str, argument: str, retried: Retries) -> Result:
    """What ``read`` returns of a whole local shard. Raises OSError, naming the shard."""
    try:
        return retried(lambda: shard, read)
    except OSError as error:
        raise OSError(
            f"{argument}: {shard} cannot be read ({error}): repair the disk or the mount, copy the shard again, or "
            "leave it out"
        ) from error


def check_retries(retries: int) -> None:
    if retries < 0:
        raise ValueError(f"data_retries: got {retries}, expected 0 (no further try) or more")
