"""Training batches of indexed data: the rows of a CSV file, or the samples of local shards.

A batch depends on seed, epoch, its number and the files alone, whichever rank and data worker reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .epoch_order import EpochOrder, GlobalBatches
from .images import load_image, preprocessed
from .options import DataOptions
from .processes import worker_init_fn
from .random_choices import own_choices, seed_choices
from .retries import Retries, raise_lack
from .sample_index import check_found
from .skips import Notes, Report
from .sources import CsvSource, ShardSource, Source
from .train_data import CountedBatches, Reader, Start, TrainData, described, global_batches


def indexed_data(options: DataOptions, shards: list[str], reader: Reader, progress: bool) -> TrainData:
    """Training data from local shards or, without any, from a CSV file."""
    path, skips = options.train_data, reader.skips
    source: Source
    if shards:
        processes, first = max(1, options.workers), reader.rank * len(shards) // reader.world_size
        shown = progress and reader.rank == 0
        source = ShardSource(
            shards, skips, processes=processes, first=first, retries=options.data_retries, progress=shown
        )
    else:
        source = CsvSource(path, options.csv_format, skips, options.data_retries)
    rows = len(source)
    check_found(rows, skips, path, "train_data")
    samples = options.train_num_samples or rows
    batches = global_batches(samples, options, reader)
    order = EpochOrder(rows, options.seed)
    start = Start()
    loader = DataLoader(
        IndexedBatches(source, order, batches, options, reader),
        batch_size=None,
        sampler=Places(start, batches.of_rank),
        collate_fn=_unchanged,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        worker_init_fn=worker_init_fn(),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    counted = CountedBatches(
        loader,
        skips,
        num_samples=batches.steps * batches.global_size,
        num_batches=batches.of_rank,
        total=rows + int(skips),
        world_size=reader.world_size,
    )
    return TrainData(
        counted,
        reader.epoch,
        skips,
        accum_freq=options.accum_freq,
        start=start,
        order=described(order, batches, source.digest),
    )


class Places:
    """A sampler: (epoch, number of a batch of this rank), from the start that is set to the end of the epoch."""

    def __init__(self, start: Start, batches: int) -> None:
        self.start, self.batches = start, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.start.epoch
        return ((epoch, batch) for batch in range(self.start.batch, self.batches))


class IndexedBatches(Dataset):
    """Batches `(images [B, C, H, W], tokens [B, L], report)` by (epoch, number).

    A sample that cannot be read is replaced by the first readable one of its spares (``GlobalBatches.spares``), so that
    every number of ranks has the same samples. Random choices about a sample depend on its position in the epoch.
    """

    def __init__(
        self, source: Source, order: EpochOrder, batches: GlobalBatches, options: DataOptions, reader: Reader
    ) -> None:
        self.source, self.order, self.batches = source, order, batches
        self.preprocess, self.tokenizer = reader.preprocess, reader.tokenizer
        self.max_pixels = options.max_image_pixels
        self.notes = Notes()
        self.retried = Retries(options.data_retries, self.notes)
        # far more than chance requires while no more than the share is unreadable
        size, share = options.batch_size, options.max_skipped
        self.most_tries = batches.samples if share >= 1 else size + round((size + 64) / (1 - share))

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, Report]:
        epoch, batch = place
        positions = self.batches.positions(batch)
        rows, seeds = self.order.rows_at(epoch, positions), self.order.seeds(epoch, positions)
        samples: list[tuple[Tensor, Tensor]] = []
        tries = 0
        with own_choices():
            for position, row, seed in zip(positions.tolist(), rows.tolist(), seeds.tolist(), strict=True):
                sample = None
                self.notes.met += 1  # spares are met at their own places
                for candidate in islice(self._candidates(epoch, position, row), self.most_tries - tries):
                    tries += 1
                    sample = self._sample(candidate, seed)
                    if sample is not None:
                        break
                if sample is None:
                    raise ValueError(
                        f"train_data: only {len(samples)} of {tries} samples can be read, too few for a batch of "
                        f"{len(positions)}{self.notes.first()}"
                    )
                samples.append(sample)
        return (*default_collate(samples), self.notes.report())

    def _candidates(self, epoch: int, position: int, row: int) -> Iterator[int]:
        """The row at a position, then its spares."""
        yield row
        for spare in self.batches.spares(position):
            yield int(self.order.rows_at(epoch, np.array([spare]))[0])

    def _sample(self, row: int, seed: int) -> tuple[Tensor, Tensor] | None:
        """The preprocessed image and the tokens of one of its captions; None, with a note, if it cannot be read."""
        try:
            content, captions, several_lines = self.retried(
                lambda: self.source.name(row), lambda: self.source.read(row)
            )
            image = load_image(content, self.max_pixels)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            raise_lack(error, lambda: self.source.name(row))
            reason = f"{type(error).__name__}: {error}"
            self.notes.add(self.source.name(row), reason, place=self.source.place(row))
            return None
        self.notes.read(several_lines)
        seed_choices(seed)
        caption = captions[seed % len(captions)]
        return preprocessed(self.preprocess, image, lambda: self.source.name(row)), self.tokenizer([caption])[0]


def _unchanged(batch: Any) -> Any:
    return batch
