"""The parts of all training loaders: the epoch, seeds, and batches whose skips are counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..checks import check
from .options import StepOptions, TrainingDataOptions
from .processes import reading, worker_init_fn
from .skips import Skips


class Reader(NamedTuple):
    """How the samples of one process are read: its transforms, its place among the processes, and their steps."""

    preprocess: Callable[[Any], Tensor]
    """PIL image to tensor."""
    tokenizer: Callable[[list[str]], Tensor]
    """Texts to tokens [N, L]."""
    rank: int
    world_size: int
    epoch: Synchronized[int]
    """The current epoch. Worker processes that were started in an earlier epoch see it change."""
    skips: Skips
    step: StepOptions


@dataclass
class Places:
    """A sampler of indexed data: (epoch, number of a batch of this rank), from where it starts to the epoch's end."""

    batches: int
    epoch: int = 0
    first: int = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, batch) for batch in range(self.first, self.batches))


@dataclass
class TrainData:
    """Training batches of one process. Call `set_epoch` before each epoch: order depends on seed and epoch alone."""

    dataloader: Any
    """Batches `(images [B, C, H, W], tokens [B, L])`; has `num_batches` and `num_samples`."""
    options: TrainingDataOptions
    reader: Reader
    generator: torch.Generator
    """The data loader's, which seeds its workers; re-seeded every epoch."""
    places: Places | None = None
    """Where an epoch of indexed data can start; None for streamed data, which start at its beginning."""
    order: dict[str, Any] | None = None
    """What the order of samples depends on besides the epoch, as plain values. None for streamed data,
    whose order also depends on the numbers of ranks and workers."""
    shards: str = ""
    """Of streamed data: a digest of which shards there are."""

    def of_all_ranks(self) -> dict[str, Any]:
        """The options that must be the same on all ranks, by name."""
        groups = self.options, self.reader.step
        return {
            each.name: getattr(group, each.name)
            for group in groups
            for each in fields(group)
            if not each.metadata["own_rank"]
        }

    @property
    def skips(self) -> Skips:
        return self.reader.skips

    @property
    def skipped(self) -> int:
        """Number of samples that could not be read so far, each counted once."""
        return int(self.skips)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """
        Args:
            first_step: the step of the epoch, of `accum_freq` batches, to start with; for indexed data only.
        """
        self.reader.epoch.value = epoch
        if self.places is not None:
            self.places.epoch, self.places.first = epoch, first_step * self.reader.step.accum_freq
        else:
            check("first_step", first_step, first_step == 0, "0 for streamed data, which start at an epoch's beginning")
        own = (self.reader.rank,) if self.reader.rank else ()  # so that ranks do not augment alike
        self.generator.manual_seed(mixed_seed(self.reader.step.seed, epoch, *own))


class CountedBatches:
    """A data loader's batches without the reports that accompany them; reported skips are added to `skips`.

    Raises ValueError when the skipped share exceeds the limit: of the samples this process met in a pass, or of those
    it is expected to meet if that is more.
    """

    def __init__(
        self,
        loader: Any,
        reader: Reader,
        num_batches: int,
        total: int,
        known: dict[str, int],
    ) -> None:
        """`total`: samples per pass over all processes, including those `known` to be unreadable before."""
        self.loader, self.skips, self.world_size = loader, reader.skips, reader.world_size
        self.num_samples, self.num_batches = num_batches * reader.step.batch_size * reader.world_size, num_batches
        self._known, self._expected = known, total / reader.world_size
        self.pass_counts = self._expected, self._known
        """This process's share of the samples of the last pass, and the unreadable samples of that pass."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        before = sum(self._known.values()) / self.world_size
        met, skipped = before, dict[str, int]()
        with reading(self.loader) as batches:
            for images, texts, report in batches:
                met += report.met
                self.skips.add(report.skipped)
                skipped |= {note.name: note.samples for note in report.skipped}
                self.pass_counts = max(self._expected, met), self._known | skipped
                if report.skipped:
                    self.skips.check(self.pass_counts[0], before + sum(skipped.values()), self.world_size)
                yield images, texts


def read_by_workers(
    dataset: Dataset,
    options: TrainingDataOptions,
    reader: Reader,
    num_batches: int,
    total: int,
    *,
    workers: int,
    known: dict[str, int] | None = None,
    places: Places | None = None,
    **described: Any,
) -> TrainData:
    """Training data whose workers read the batches of ``dataset``.

    Args:
        num_batches: of this process in an epoch.
        total, known: as in ``CountedBatches``.
        places, described: fields of ``TrainData``.
    """
    generator = torch.Generator()
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=worker_init_fn(),
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )
    batches = CountedBatches(loader, reader, num_batches, total, known or {})
    return TrainData(batches, options, reader, generator, places, **described)


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers; different numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def seed_choices(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch (CPU), which transforms draw from, below 2^64.

    It takes 7 us, where ``torch.manual_seed`` alone takes 100 us.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


@contextmanager
def own_choices() -> Iterator[None]:
    """Outside of a data worker, restores the global generators at the end: they are the caller's."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        if get_worker_info() is None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
