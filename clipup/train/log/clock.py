"""The time that a run takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from ..checkpoints.position import RunState


@dataclass
class Clock:
    """Measures the time in training and, since the last logged step, the rate and how long steps waited for data."""

    state: RunState
    _mark: float = field(default_factory=time.perf_counter)
    _elapsed: float = 0.0
    _images: int = 0
    _steps: int = 0
    _spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds since the last logged step, waiting for data and computing."""

    @contextmanager
    def timed(self, what: Literal["data", "step"]) -> Iterator[None]:
        """Inside, this rank waits for data, or computes a step."""
        start = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - start

    def restart(self) -> None:
        """Leaves out of the timings what happened since the last step."""
        self._mark = time.perf_counter()

    def step_done(self, images: int) -> None:
        """Counts a step of all ranks."""
        now = time.perf_counter()
        self.state.seconds += now - self._mark
        self._elapsed += now - self._mark
        self._mark = now
        self._images += images
        self._steps += 1

    def logged(self) -> dict[str, float]:
        """The times of a record: images per second of all ranks since the logged step before, the mean seconds of a
        step, those in which it waited for data and those in which it computed, and the seconds in training up to
        now."""
        times = {
            "images_per_second": self._images / self._elapsed,
            "batch_time": self._elapsed / self._steps,
            "data_time": self._spent["data"] / self._steps,
            "step_time": self._spent["step"] / self._steps,
            "seconds": self.state.seconds,
        }
        self._elapsed, self._images, self._steps = 0.0, 0, 0
        self._spent.clear()
        return times
