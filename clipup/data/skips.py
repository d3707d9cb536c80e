"""Samples that cannot be read: each is named once and counted once, and too many of them end the run.

Where worker processes read, they only take notes; the notes travel with the batches to the process that asked for them,
so that counts do not depend on which worker met a sample first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import NamedTuple

Note = tuple[str, str, int]
"""A sample, or a part of a shard, by name; why it cannot be read; and how many samples it stands for."""

MAX_SKIPPED = 0.1
"""Share of the samples that may be unreadable before reading stops."""
GIVE_UP_AFTER = 10_000
"""Unreadable samples in a row after which reading stops: there is nothing to be read any more."""

_LOG = logging.getLogger(__name__)


def check_max_skipped(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"max_skipped: got {share}, expected a share from 0 to 1 (0.1: a tenth of the samples)")


class Report(NamedTuple):
    """What a reader met since its last report: how many samples, and those that it skipped."""

    met: int
    skipped: list[Note]


class Notes:
    """Takes the notes for a reader's next report."""

    def __init__(self) -> None:
        self.met = 0
        self._notes: list[Note] = []
        self._in_a_row = 0

    def add(self, name: str, reason: object, samples: int = 1) -> None:
        """Raises ValueError when nothing else has come for a long time."""
        self._notes.append((name, str(reason), samples))
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP_AFTER:
            raise ValueError(f"{GIVE_UP_AFTER} samples in a row could not be read, the last is {name}: {reason}")

    def read(self) -> None:
        """A sample could be read."""
        self._in_a_row = 0

    def first(self) -> str:
        """The first note in words; "" when there is none."""
        return f"; {self._notes[0][0]}: {self._notes[0][1]}" if self._notes else ""

    def report(self) -> Report:
        report = Report(self.met, self._notes)
        self.met, self._notes = 0, []
        return report


class Skips:
    """Samples that could not be read so far, by name. `int(skips)` is their number."""

    def __init__(self, max_skipped: float = 1.0) -> None:
        """Raises ValueError when `max_skipped` is no share."""
        check_max_skipped(max_skipped)
        self.max_skipped = max_skipped
        self.samples: dict[str, int] = {}
        """How many samples each name stands for."""
        self._count = 0
        self.first = ""
        """The first of them and why, in words."""

    def __int__(self) -> int:
        return self._count

    def note(self, name: str, reason: object, samples: int = 1) -> None:
        """Counts and logs what was skipped, unless it is known."""
        if name in self.samples:
            return
        self.samples[name] = samples
        self._count += samples
        self.first = self.first or f"{name}: {reason}"
        _LOG.warning("skipped %s: %s%s", name, reason, f" ({samples} samples)" if samples > 1 else "")

    def add(self, notes: Iterable[Note]) -> None:
        for note in notes:
            self.note(*note)

    def check(self, total: float, count: float | None = None, world_size: int = 1) -> None:
        """ValueError when more than `max_skipped` of `total` samples cannot be read: `count` of them, or all so far.

        Of several processes each judges by its own part, and allows for chance, which may have dealt it more than the
        others: three standard deviations.
        """
        count = self._count if count is None else count
        chance = 3 * math.sqrt(self.max_skipped * total) if world_size > 1 else 0
        if count > self.max_skipped * total + chance:
            raise ValueError(
                f"max_skipped: {count:.0f} of {total:.0f} samples cannot be read, more than the share of "
                f"{self.max_skipped:g} that may be skipped; the first is {self.first}. Repair the data, or raise "
                "max_skipped"
            )
