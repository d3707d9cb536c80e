"""Evaluation shared by several processes: process i of n takes the batches i, i + n, i + 2n, ... of a data set.

Batches stay whole, so that every one gives the features that it gives in a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


class Share(NamedTuple):
    """The part of one process; by default all of it."""

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Every process's value in the order of their indices, on every process. All processes call it alike."""

    def part(self, items: Sequence[Item], batch_size: int) -> list[Item]:
        """The items of this process's batches."""
        starts = range(self.index * batch_size, len(items), self.count * batch_size)
        return [item for start in starts for item in items[start : start + batch_size]]

    def join(self, batches: list[Item]) -> list[Item]:
        """The batches of all processes in the order of the data set, from this process's own."""
        rounds = zip_longest(*self.gather(batches), fillvalue=None)
        return [batch for batch in chain.from_iterable(rounds) if batch is not None]
