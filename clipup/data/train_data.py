"""What all training loaders share: the epoch, seeds, the choice of captions, and batches whose skips are counted."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, get_worker_info

from .processes import reading
from .skips import Skips
from .tars import lines


class Reader(NamedTuple):
    """How the samples of one process are read: its transforms and its place among the processes."""

    preprocess: Callable[[Any], Tensor]
    """PIL image to tensor."""
    tokenizer: Callable[[list[str]], Tensor]
    """Texts to tokens [N, L]."""
    rank: int
    world_size: int
    epoch: SharedEpoch
    skips: Skips


class SharedEpoch:
    """The current epoch, visible to worker processes that were started in an earlier one."""

    def __init__(self, epoch: int = 0) -> None:
        self._value = multiprocessing.Value("q", epoch)

    def __call__(self) -> int:
        return self._value.value

    def set(self, epoch: int) -> None:
        self._value.value = epoch


@dataclass
class TrainData:
    """Training batches of one process. Call `set_epoch` before each epoch: order depends on seed and epoch alone."""

    dataloader: Any
    """Batches `(images [B, C, H, W], tokens [B, L])`; has `num_batches` and `num_samples`."""
    epoch: SharedEpoch
    skips: Skips
    seed: int = 0
    rank: int = 0
    generator: torch.Generator | None = None
    """The data loader's, which seeds its workers; re-seeded every epoch."""
    sampler: DistributedSampler | None = None

    @property
    def skipped(self) -> int:
        """Number of samples that could not be read so far, each counted once."""
        return int(self.skips)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.set(epoch)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        if self.generator is not None:
            own = (self.rank,) if self.rank else ()  # so that ranks do not augment alike
            self.generator.manual_seed(mixed_seed(self.seed, epoch, *own))


class CountedBatches:
    """A data loader's batches without the reports that accompany them; reported skips are added to `skips`.

    Raises ValueError when the skipped share exceeds the limit: of the samples this process met in a pass, or of those
    it is expected to meet if that is more.
    """

    def __init__(
        self, loader: Any, skips: Skips, num_samples: int, num_batches: int, total: int, world_size: int
    ) -> None:
        """`total`: samples per pass over all processes, including those already in `skips`."""
        self.loader, self.skips = loader, skips
        self.num_samples, self.num_batches, self.world_size = num_samples, num_batches, world_size
        self._expected, self._skipped_before = total / world_size, int(skips) / world_size
        self._names_before = dict(skips.samples)
        self._met = self._skipped_before
        self._skipped: dict[str, int] = {}

    @property
    def pass_counts(self) -> tuple[float, dict[str, int]]:
        """This process's share of the samples of the last pass, and the unreadable samples of that pass by name."""
        return max(self._expected, self._met), self._names_before | self._skipped

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._met, self._skipped = self._skipped_before, {}
        with reading(self.loader) as batches:
            for images, texts, report in batches:
                self._met += report.met
                if report.skipped:
                    self.skips.add(report.skipped)
                    self._skipped |= {name: samples for name, _, samples in report.skipped}
                    count = self._skipped_before + sum(self._skipped.values())
                    self.skips.check(max(self._expected, self._met), count, self.world_size)
                yield images, texts


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers; different numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class DrawCaption:
    """A tokenizer that draws one of the captions of a text, one per line.

    Draws are the same for the same seed, epoch, rank and worker.
    """

    def __init__(self, reader: Reader, seed: int) -> None:
        self.tokenizer, self.seed, self.rank, self.epoch = reader.tokenizer, seed, reader.rank, reader.epoch
        self._state: tuple[int, int] | None = None
        self._random = random.Random(0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens [N, L], of one caption per text."""
        return self.tokenizer([self._draw(text) for text in texts])

    def _draw(self, text: str) -> str:
        state = (self.epoch(), worker_id())
        if state != self._state:
            self._state = state
            self._random = random.Random(mixed_seed(self.seed, self.rank, *state))
        return self._random.choice(lines(text))


def worker_id() -> int:
    """Of the data loader's worker process that calls it; 0 outside of one."""
    worker = get_worker_info()
    return worker.id if worker else 0
