"""Progress of long tasks on stderr: a bar on a terminal, otherwise (pipe, file, notebook) an occasional line; and texts
of strangers that may be printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_FIRST_PAUSES = (5.0, 10.0, 20.0)
_PAUSE = 30.0
"""Seconds between lines, after the shorter first pauses."""


def printable(text: str) -> str:
    """The text of a stranger, such as a file's name, for a message: what would control the terminal is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Progress(AbstractContextManager["Progress"]):
    """Call ``update`` after each piece of work and ``close`` at the end, or use it as a context manager.

    If stderr is not a terminal, a line is printed after 5, 15 and 35 seconds, then every 30 seconds, and at the end. A
    task that ends before the first line prints nothing. Once stderr refuses what is written, nothing more is shown, and
    the task goes on.
    """

    def __init__(
        self,
        description: str,
        unit: str,
        total: int | None = None,
        done: int = 0,
        show: bool = True,
        line_at_once: bool = False,
    ) -> None:
        """
        Args:
            unit: what is counted, in the plural.
            show: False prints nothing.
            line_at_once: if stderr is not a terminal, print a line at the first update.
        """
        show = show and sys.stderr is not None  # None if it was closed
        terminal = show and sys.stderr.isatty()
        self.description, self.unit, self.total, self.done = description, unit, total, done
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=f" {unit}",
            leave=None,  # a nested bar is removed at its end
            disable=not (show and terminal),
        )
        self._show, self._lines = show, show and not terminal
        self._start, self._done_at_start = time.monotonic(), done
        self._pauses = iter(_FIRST_PAUSES)
        self._due = self._start if line_at_once else self._start + next(self._pauses)
        self._detail = ""
        self._last_printed: int | None = None

    def update(self, count: int = 1, detail: str = "") -> None:
        """Adds ``count`` finished items. ``detail`` is shown after the numbers."""
        self.done += count
        self._detail = detail
        if not self._lines:
            with self._unless_refused():
                self._bar.set_postfix_str(detail, refresh=False)
                self._bar.update(count)
        elif time.monotonic() >= self._due:
            self._line()
            self._due = time.monotonic() + next(self._pauses, _PAUSE)

    def write(self, text: str) -> None:
        """Prints a separate line, above the bar if there is one."""
        if self._show:
            with self._unless_refused():
                tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._last_printed not in (None, self.done):
            self._line()
        with self._unless_refused():
            self._bar.close()

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Inside, output that cannot be written is the end of showing: its reader may be gone."""
        try:
            yield
        except OSError:
            self._show, self._bar.disable = False, True

    def _line(self) -> None:
        self._last_printed = self.done
        count = f"{self.done}" if self.total is None else f"{self.done} of {self.total}"
        self.write(", ".join([f"{self.description}: {count} {self.unit}", *self._details()]))

    def _details(self) -> Iterator[str]:
        """The detail, or the average speed so far, and the remaining time at this speed."""
        done, seconds = self.done - self._done_at_start, time.monotonic() - self._start
        if self._detail:
            yield self._detail
        elif done and seconds:
            yield f"{done / seconds:.3g} {self.unit}/s"
        if done and self.total is not None and self.done < self.total:
            yield f"{tqdm.format_interval(seconds / done * (self.total - self.done))} left"

    def __exit__(self, *error: object) -> None:
        self.close()


def progress(
    items: Iterable[Item], description: str, unit: str, total: int | None = None, show: bool = True
) -> Iterator[Item]:
    """Yields the items and shows progress. ``total`` is their number; None means ``len(items)``."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, unit, total, show=show) as shown:
        for item in items:
            yield item
            shown.update()
