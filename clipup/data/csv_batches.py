"""Training batches read from the rows of a CSV file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, default_collate

from .csv_rows import Rows, readable_rows
from .images import load_image
from .options import DataOptions
from .processes import worker_init_fn
from .skips import Notes, Report
from .train_data import CountedBatches, DrawCaption, Reader, TrainData


def csv_data(options: DataOptions, reader: Reader) -> TrainData:
    """Training data from a CSV file."""
    path, skips, rank, world_size = options.train_data, reader.skips, reader.rank, reader.world_size
    readable = readable_rows(path, options.csv_format, skips, "train_data")
    total = len(readable.images) + int(skips)
    skips.check(total)
    if not readable.images:
        raise ValueError(f"train_data: {path} has no rows that can be read ({int(skips)} skipped)")
    dataset = CsvBatches(readable, reader.preprocess, DrawCaption(reader, options.seed), options.max_image_pixels)
    generator = torch.Generator()
    sampler: DistributedSampler | None = None
    if world_size > 1:
        sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=options.seed)
    rows = sampler or RandomSampler(dataset, generator=generator)
    spare = _spare(options.batch_size, options.max_skipped, len(rows))
    batch_rows = BatchesWithSpares(rows, options.batch_size, spare)
    if len(batch_rows) == 0:
        raise ValueError(
            f"batch_size: got {options.batch_size}, but {path} has {len(dataset)} readable rows, {len(rows)} per "
            "process: use a smaller batch"
        )
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=batch_rows,
        collate_fn=_unchanged,
        num_workers=options.workers,
        worker_init_fn=worker_init_fn(),
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )
    batches = CountedBatches(loader, skips, len(dataset), len(batch_rows), total, world_size)
    return TrainData(batches, reader.epoch, skips, options.seed, rank, generator, sampler)


class BatchRows(NamedTuple):
    """Indices of a batch's rows, and of spare rows that replace unreadable ones, in order."""

    first: list[int]
    spare: list[int]


class BatchesWithSpares:
    """A sampler's rows in batches, each with the rows behind it as spares.

    A batch depends on the order and the files alone, not on what was met before or on the worker that reads it. So a
    resumed run has the same batches as an uninterrupted one, and no batch has a row twice.
    """

    def __init__(self, rows: Any, batch_size: int, spare: int) -> None:
        self.rows, self.batch_size, self.spare = rows, batch_size, spare

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def __iter__(self) -> Iterator[BatchRows]:
        order = list(self.rows)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            end = start + self.batch_size
            spare = order[end : end + self.spare]
            yield BatchRows(order[start:end], spare + order[: min(start, self.spare - len(spare))])


class CsvBatches(Dataset):
    """Batches of a CSV file's rows, by their indices."""

    def __init__(self, rows: Rows, preprocess: Callable, draw: DrawCaption, max_pixels: int) -> None:
        self.rows, self.preprocess, self.draw, self.max_pixels = rows, preprocess, draw, max_pixels

    def __len__(self) -> int:
        return len(self.rows.images)

    def __getitem__(self, of_batch: BatchRows) -> tuple[Tensor, Tensor, Report]:
        notes = Notes()
        batch = []
        for row in (*of_batch.first, *of_batch.spare):
            notes.met += 1
            try:
                image = load_image(self.rows.images[row], self.max_pixels)
            except Exception as error:  # PIL has no common class for what a broken file may raise
                notes.add(self.rows.names[row], f"{type(error).__name__}: {error}")
                continue
            batch.append((self.preprocess(image), self.draw([self.rows.captions[row]])[0]))
            if len(batch) == len(of_batch.first):
                return (*default_collate(batch), notes.report())
        tried = len(of_batch.first) + len(of_batch.spare)
        raise ValueError(
            f"train_data: only {len(batch)} of {tried} rows can be read, too few for a batch of {len(of_batch.first)}"
            f"{notes.first()}"
        )


def _spare(batch_size: int, max_skipped: float, rows: int) -> int:
    """Number of spare rows per batch, far more than chance requires while no more than the share is unreadable."""
    return rows if max_skipped >= 1 else min(rows, round((batch_size + 64) / (1 - max_skipped)))


def _unchanged(batch: Any) -> Any:
    return batch
