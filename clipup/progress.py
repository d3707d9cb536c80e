"""Progress of a long task on stderr: a bar on a terminal, elsewhere (pipe, file, notebook) a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_FIRST_PAUSES = (5.0, 10.0, 20.0)
_PAUSE = 30.0
"""Seconds between two lines, after the first, shorter ones."""


class Progress:
    """``update`` after every piece of work, ``close`` at the end (or ``with``).

    Where stderr is no terminal, lines come after 5, 15 and 35 seconds and then every 30 seconds, and once more at the
    end; a task that is over before the first line prints none.
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
            show: False shows nothing at all.
            line_at_once: elsewhere than on a terminal, the first update prints a line already.
        """
        terminal = sys.stderr.isatty()
        self.description, self.unit, self.total, self.done = description, unit, total, done
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=f" {unit}",
            leave=None,  # a bar below another one is removed at its end
            disable=not (show and terminal),
        )
        self._show, self._lines = show, show and not terminal
        self._start, self._done_at_start = time.monotonic(), done
        self._pauses = iter(_FIRST_PAUSES)
        self._due = self._start if line_at_once else self._start + next(self._pauses)
        self._detail = ""
        self._said: int | None = None

    def update(self, count: int = 1, detail: str = "") -> None:
        """Counts work that is done. ``detail`` goes behind the numbers."""
        self.done += count
        self._detail = detail
        if not self._lines:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(count)
        elif time.monotonic() >= self._due:
            self._line()
            self._due = time.monotonic() + next(self._pauses, _PAUSE)

    def write(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._show:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._said not in (None, self.done):
            self._line()
        self._bar.close()

    def _line(self) -> None:
        self._said = self.done
        count = f"{self.done}" if self.total is None else f"{self.done} of {self.total}"
        self.write(", ".join(filter(None, [f"{self.description}: {count} {self.unit}", self._detail, self._left()])))

    def _left(self) -> str:
        """The time left at the speed so far."""
        done = self.done - self._done_at_start
        if self.total is None or not 0 < self.done < self.total or done == 0:
            return ""
        left = (time.monotonic() - self._start) / done * (self.total - self.done)
        return f"{tqdm.format_interval(left)} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def progress(
    items: Iterable[Item], description: str, unit: str, total: int | None = None, show: bool = True
) -> Iterator[Item]:
    """Passes the items on and shows how far it is. ``total``: how many there are; None: their length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, unit, total, show=show) as shown:
        for item in items:
            yield item
            shown.update()
