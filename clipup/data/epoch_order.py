"""The order of samples in an epoch, and the seeds of their random choices: functions of seed, epoch and position.

Position p of an epoch is the p-th sample of the whole run's epoch, whatever number of ranks and workers share it.
Global batch s has the positions [s * G, (s + 1) * G), with G = batch_size * accum_freq * world_size samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

RULE = 1
"""Version of the order; a checkpoint from within an epoch continues only under the same one."""

_ROUNDS = 8
_FEW = 1024
"""Up to this number of rows, they are sorted by hashes: networks over a few bits favour some orders measurably."""


@dataclass(frozen=True)
class EpochOrder:
    """Which of a source's rows is at which position of an epoch.

    The order is a permutation that is computed, not stored: a Feistel network over the smallest power of two that
    holds all rows, applied until the result is a row (cycle walking; Black and Rogaway, 2002). So any position costs
    the same, no process holds a list of all rows, and no version of a library changes the order. Where an epoch has
    more positions than there are rows, the rows come again in another order.
    """

    rows: int
    seed: int

    def rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Rows [N] int64 at positions [N] int64."""
        passes, places = np.divmod(positions, self.rows)
        rows = np.empty_like(positions)
        for number in np.unique(passes):
            chosen = passes == number
            rows[chosen] = self._permuted(places[chosen], _keys(self.seed, epoch, int(number), "rows"))
        return rows

    def seeds(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Seeds [N] uint64 for the random choices about the samples at positions [N]: caption and augmentation."""
        return _mixed(positions.astype(np.uint64) + _keys(self.seed, epoch, 0, "choices")[0])

    def _permuted(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        if self.rows <= _FEW:
            return np.argsort(_mixed(np.arange(self.rows, dtype=np.uint64) + keys[0]), kind="stable")[places]
        bits = (self.rows - 1).bit_length()
        result = _feistel(places.astype(np.uint64), bits, keys)
        while len(outside := np.flatnonzero(result >= self.rows)):
            result[outside] = _feistel(result[outside], bits, keys)
        return result.astype(np.int64)


@dataclass(frozen=True)
class GlobalBatches:
    """The positions of an epoch in the batches of one rank.

    The micro-batches of a global batch are numbered through all ranks: rank r has the numbers r * accum_freq to
    (r + 1) * accum_freq - 1. So four ranks, or a rank that accumulates four batches, have the same batches of the same
    size, and features gathered from all ranks are in the order of the epoch.
    """

    samples: int
    """Positions of an epoch; those after the last whole global batch are not used, except as spares."""
    batch_size: int
    accum_freq: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def global_size(self) -> int:
        return self.batch_size * self.accum_freq * self.world_size

    @property
    def steps(self) -> int:
        return self.samples // self.global_size

    @property
    def of_rank(self) -> int:
        """Batches of this rank in an epoch."""
        return self.steps * self.accum_freq

    def positions(self, batch: int) -> np.ndarray:
        """Of this rank's batch of that number, int64."""
        step, index = divmod(batch, self.accum_freq)
        start = step * self.global_size + (self.rank * self.accum_freq + index) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def spares(self, position: int) -> Iterator[int]:
        """Positions of the samples that may replace an unreadable one, best first.

        First those at the same place of the following global batches, around the epoch: no two samples of a global
        batch share one of them. Then, if none of these can be read, those of the next places.
        """
        size = min(self.global_size, self.samples)
        batch, place = divmod(position, size)
        for offset in range(size):
            column = range((place + offset) % size, self.samples, size)
            ahead = batch + 1 if offset == 0 else batch
            yield from (other for other in chain(column[ahead:], column[:ahead]) if other // size != batch)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2^bits)."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << bits // 2) - 1)
    high_mask = np.uint64((1 << bits - bits // 2) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys[:_ROUNDS]):
        if number % 2:
            low = low ^ (_mixed(high + key) & low_mask)
        else:
            high = high ^ (_mixed(low + key) & high_mask)
    return high << low_bits | low


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., 2014) of uint64 values."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _keys(seed: int, epoch: int, turn: int, what: str) -> np.ndarray:
    """uint64 [8]."""
    return np.frombuffer(hashlib.sha512(repr((what, seed, epoch, turn)).encode()).digest(), "<u8")
