"""Unreadable samples: tried again, then skipped, logged and counted once. Too many of them raise an error.

Worker processes only take notes, which accompany the batches to the main process. So counts do not depend on which
worker read a sample first.
"""

from __future__ import annotations

import errno
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from time import sleep
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")

MAX_SKIPPED = 0.1
"""Default for the largest share of samples that may be unreadable."""
RETRIES = 4
"""Default for the number of further tries."""
FIRST_PAUSE = 2.0
"""Seconds before the second try; each further pause is twice as long, up to about a minute."""
_DOUBLINGS = 5
_LACK = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of this process or machine, not of the data."""
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, *_LACK}
"""Errors that waiting does not repair."""

_NAMED = 3
"""Samples that are named for each reason; others are counted."""

_LOG = logging.getLogger(__name__)


class SourceError(ValueError):
    """Reading failed for a reason other than the sample itself, so no other sample may take its place."""


def raise_lack(error: BaseException) -> None:
    """Raises errors that no sample causes: those of the source, and lack of memory or of file descriptors."""
    if isinstance(error, SourceError | MemoryError) or getattr(error, "errno", None) in _LACK:
        raise error


class Note(NamedTuple):
    """A sample, or a part of a shard, that cannot be read."""

    name: str
    """In messages; and by which it is counted, once."""
    reason: str
    samples: int = 1
    """How many samples it stands for."""


class Report(NamedTuple):
    """The number of samples that a reader met since its last report, and those that it skipped."""

    met: int
    skipped: list[Note]


class Notes:
    """Collects notes for a reader's next report."""

    def __init__(self) -> None:
        self.met = 0
        self._notes: list[Note] = []

    def add(self, name: str, reason: str, samples: int = 1) -> None:
        """The fields of a note."""
        self._notes.append(Note(name, reason, samples))

    def first(self) -> str:
        """The first note as text; "" when there is none."""
        return next((f"; {note.name}: {note.reason}" for note in self._notes), "")

    def report(self) -> Report:
        report = Report(self.met, self._notes)
        self.met, self._notes = 0, []
        return report


class Retries:
    """Calls a function that reads until it succeeds, at most ``retries`` times more than once.

    Pauses are 2, 4, 8, ..., 64, 64, ... seconds, each between a half and one and a half of that, so that many processes
    do not return to a server at once. After a read that failed to the end, none is repeated until one succeeds: a lost
    disk ends a run instead of delaying every sample.
    """

    def __init__(self, retries: int = RETRIES) -> None:
        self.retries = self._left = retries

    def __call__(self, name: Callable[[], str], read: Callable[[], Result]) -> Result:
        """The result of ``read``. Raises its last OSError; an error that waiting cannot repair is raised at once.

        Args:
            name: gives the name of the file or sample, for the log.
        """
        number = 0
        while True:
            try:
                result = read()
                self._left = self.retries
                return result
            except OSError as error:
                if error.errno in _LASTING:
                    raise
                if number >= self._left:
                    self._left = 0
                    raise
                _LOG.warning("reads %s again: %s", name(), error)
            sleep(FIRST_PAUSE * 2 ** min(number, _DOUBLINGS) * random.Random().uniform(0.5, 1.5))
            number += 1


def read_whole(read: Callable[[], Result], path: str, argument: str, retried: Retries) -> Result:
    """Reads a whole shard or CSV file. Raises OSError, naming it: samples of an unreadable file are not skipped."""
    try:
        return retried(lambda: path, read)
    except OSError as error:
        raise OSError(
            f"{argument}: {path} cannot be read ({error}): repair the disk or the mount, copy the file again, or leave "
            "it out"
        ) from error


def union(of_processes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The samples that processes skipped, each once."""
    return {name: count for skipped in of_processes for name, count in skipped.items()}


class Skips:
    """Unreadable samples so far. `int(skips)` is their number."""

    def __init__(self, max_skipped: float = 1.0) -> None:
        self.max_skipped = max_skipped
        self.samples: dict[str, int] = {}
        """The number of samples that each note stands for, by its name."""
        self.reasons: dict[str, str] = {}
        """Why this process skipped them, by the names of the notes."""
        self.first = ""
        """The name of the first skipped sample and the reason, as text."""

    def __int__(self) -> int:
        return sum(self.samples.values())

    def add(self, notes: Iterable[Note]) -> None:
        """Counts new notes and logs them: the first few of each reason, and the number of the others."""
        times, others = Counter[str](), Counter[str]()
        for note in notes:
            if note.name in self.samples:
                continue
            self.samples[note.name], self.reasons[note.name] = note.samples, note.reason
            self.first = self.first or f"{note.name}: {note.reason}"
            times[note.reason] += 1
            if times[note.reason] <= _NAMED:
                _LOG.warning("skipped %s: %s (samples: %d)", note.name, note.reason, note.samples)
            else:
                others[note.reason] += note.samples
        for reason, samples in others.items():
            _LOG.warning("skipped others as well: %s (samples: %d)", reason, samples)

    def restore(self, samples: Mapping[str, int]) -> None:
        """Counts samples that were skipped before the run was resumed; they are not logged again."""
        self.samples = {**samples, **self.samples}

    def check_together(self, total: float, samples: Mapping[str, int], gather: Callable[[object], list]) -> None:
        """Raises ValueError, as `check`, for what several processes skipped, each sample counted once.

        Args:
            total: samples of all processes.
            samples: those that this process skipped, as the attribute of this name.
            gather: returns every process's value on every process.
        """
        skipped, firsts = zip(*gather((samples, self.first)), strict=True)
        self.first = next(filter(None, (self.first, *firsts)), "")
        self.check(total, sum(union(skipped).values()))

    def check(self, total: float, count: float | None = None, world_size: int = 1) -> None:
        """Raises ValueError when more than `max_skipped` of `total` samples are unreadable.

        Args:
            count: unreadable samples; None: all so far.
            world_size: with several processes, each checks its own part with a tolerance of three standard deviations,
                because unreadable samples are not spread evenly.
        """
        count = int(self) if count is None else count
        chance = 3 * math.sqrt(self.max_skipped * total) if world_size > 1 else 0
        if count > self.max_skipped * total + chance:
            raise ValueError(
                f"max_skipped: {count:.0f} of {total:.0f} samples cannot be read, more than the share of "
                f"{self.max_skipped:g} that may be skipped; the first is {self.first}. Repair the data, or raise "
                "max_skipped"
            )
