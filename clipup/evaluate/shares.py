"""Distributed evaluation: process i of n takes the batches i, i + n, i + 2n, ... of a data set.

Batches are the same as in a single process, and so are their features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """One process's share of a data set; by default all of it."""

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """A collective: the values of all processes, ordered by index, on every process."""
    in_step: bool = False
    """Whether all processes must run the same number of batches, because none has all weights of the model."""

    def part(self, items: Sequence[Item], batch_size: int) -> list[Item]:
        """The items in this process's batches."""
        starts = range(self.index * batch_size, len(items), self.count * batch_size)
        return [item for start in starts for item in items[start : start + batch_size]]

    def each(self, batches: Iterator[Item], run: Callable[[Item], Result], filler: Callable[[], Item]) -> list[Result]:
        """What ``run`` returns for this process's batches. ``filler`` makes one for a process that has none left while
        others have, where all run in step: they need its weights."""
        if not self.in_step:
            return [run(batch) for batch in batches]
        results: list[Result] = []
        while any(self.gather((batch := next(batches, None)) is not None)):
            result = run(filler() if batch is None else batch)
            results += [] if batch is None else [result]
        return results

    def join(self, batches: list[Item]) -> list[Item]:
        """The batches of all processes in the order of the data set. A collective; `batches` are this process's."""
        rounds = zip_longest(*self.gather(batches), fillvalue=None)
        return [batch for batch in chain.from_iterable(rounds) if batch is not None]
