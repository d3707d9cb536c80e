"""Unreadable samples: each is logged and counted once, and too many of them raise an error.

Worker processes only take notes, which accompany the batches to the main process. So counts do not depend on which
worker met a sample first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MAX_SKIPPED = 0.1
"""Default for the largest share of samples that may be unreadable."""
GIVE_UP_AFTER = 10_000
"""Consecutive unreadable samples after which reading stops, because an endless stream would never end."""

_LOG = logging.getLogger(__name__)


def check_max_skipped(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"max_skipped: got {share}, expected a share from 0 to 1 (0.1: a tenth of the samples)")


class Note(NamedTuple):
    """What cannot be read: a sample, or a part of a shard."""

    name: str
    """In messages."""
    reason: str
    samples: int = 1
    """How many samples it stands for."""
    place: str = ""
    """By which it is counted, where that is not the name: a name that is read with the sample may be unreadable too."""

    @property
    def counted_as(self) -> str:
        return self.place or self.name


class Report(NamedTuple):
    """What a reader met since its last report: the number of samples, those it skipped, and what it read again (its
    name and the error of the time before)."""

    met: int
    skipped: list[Note]
    retried: Sequence[tuple[str, str]] = ()
    several_lines: bool = False
    """Whether a caption was a txt of several lines."""


class Notes:
    """Collects notes for a reader's next report."""

    def __init__(self) -> None:
        self.met = 0
        self._several_lines = False
        self._notes: list[Note] = []
        self._retried: list[tuple[str, str]] = []
        self._in_a_row = 0

    def add(self, name: str, reason: object, samples: int = 1, place: str = "") -> None:
        """The fields of a note. Raises ValueError after too many unreadable samples in a row."""
        self._notes.append(Note(name, str(reason), samples, place))
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP_AFTER:
            raise ValueError(f"{GIVE_UP_AFTER} samples in a row could not be read, the last is {name}: {reason}")

    def retry(self, what: str, error: object) -> None:
        """Call before something is read again after an error."""
        self._retried.append((what, str(error)))

    def read(self, several_lines: bool) -> None:
        """Call when a sample was read, with whether its caption is a txt of several lines."""
        self._in_a_row = 0
        self._several_lines |= several_lines

    def first(self) -> str:
        """The first note as text; "" when there is none."""
        return f"; {self._notes[0].name}: {self._notes[0].reason}" if self._notes else ""

    def report(self) -> Report:
        report = Report(self.met, self._notes, self._retried, self._several_lines)
        self.met, self._notes, self._retried = 0, [], []
        return report


class Skips:
    """Unreadable samples so far. `int(skips)` is their number."""

    def __init__(self, max_skipped: float = 1.0) -> None:
        """Raises ValueError when `max_skipped` is not a share."""
        check_max_skipped(max_skipped)
        self.max_skipped = max_skipped
        self.samples: dict[str, int] = {}
        """How many each note stands for, by what it is counted as."""
        self._count = 0
        self.first = ""
        """The first one and its reason, as text."""
        self.retries = 0
        """How often something was read again after an error that may be temporary."""
        self.mentions_lines = True
        """Whether a txt of several lines is still to be mentioned."""

    def __int__(self) -> int:
        return self._count

    def note(self, name: str, reason: object, samples: int = 1) -> None:
        """Counts and logs skipped samples, unless they are known already."""
        self.add([Note(name, str(reason), samples)])

    def add(self, notes: Iterable[Note]) -> None:
        """Counts and logs what is not known already."""
        for note in notes:
            if note.counted_as in self.samples or note.name in self.samples:  # checkpoints of before hold names
                continue
            self.samples[note.counted_as] = note.samples
            self._count += note.samples
            self.first = self.first or f"{note.name}: {note.reason}"
            more = f" ({note.samples} samples)" if note.samples > 1 else ""
            _LOG.warning("skipped %s: %s%s", note.name, note.reason, more)

    def restore(self, samples: Mapping[str, int]) -> None:
        """Counts samples that were skipped before the run was resumed; they are not logged again."""
        new = {one: count for one, count in samples.items() if one not in self.samples}
        self.samples |= new
        self._count += sum(new.values())

    def retry(self, what: str, error: object) -> None:
        """Call before something is read again after an error."""
        self.retries += 1
        _LOG.warning("reads %s again: %s", what, error)

    def add_retries(self, retried: Iterable[tuple[str, str]]) -> None:
        """Counts and logs them."""
        for what, error in retried:
            self.retry(what, error)

    def mention_lines(self, several_lines: bool) -> None:
        """Logs once, if the caption of a sample is a txt of several lines, that it is one caption."""
        if several_lines and self.mentions_lines:
            self.mentions_lines = False
            _LOG.warning(
                "a .txt of the training data has several lines: in training each .txt is one caption. List several "
                "captions of an image in its .json, as captions"
            )

    def check(self, total: float, count: float | None = None, world_size: int = 1) -> None:
        """Raises ValueError when more than `max_skipped` of `total` samples are unreadable.

        Args:
            count: unreadable samples; None: all so far.
            world_size: with several processes, each checks its own part with a tolerance of three standard deviations,
                because unreadable samples are not spread evenly.
        """
        count = self._count if count is None else count
        chance = 3 * math.sqrt(self.max_skipped * total) if world_size > 1 else 0
        if count > self.max_skipped * total + chance:
            raise ValueError(
                f"max_skipped: {count:.0f} of {total:.0f} samples cannot be read, more than the share of "
                f"{self.max_skipped:g} that may be skipped; the first is {self.first}. Repair the data, or raise "
                "max_skipped"
            )
