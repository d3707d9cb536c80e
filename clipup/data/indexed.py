"""Training batches of indexed data, the rows of a CSV file or the samples of local shards: read when needed, or cached.

A batch depends on seed, epoch, its number and the files alone, whichever rank and data worker reads it.

The cache is for small data sets of small images, where decoding would take a core away from training (the pictograms,
12,376 images of 32 pixels, take 152 MB). Every sample is read and preprocessed once, then batches are gathered by
index. Images are kept as float32, exactly as `preprocess` returned them, so data with and without a cache have the same
images in the same order; a random augmentation in `preprocess` is drawn only once. Every process holds all images, so
that each can have any batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..progress import Progress
from .epoch_order import RULE, EpochOrder, GlobalBatches
from .images import load_image, preprocessed
from .options import DataOptions
from .processes import reading, unchanged, worker_init_fn
from .samples import Source, check_found, digest_of
from .skips import Notes, Report, Retries, raise_lack
from .train_data import (
    CountedBatches,
    Reader,
    Start,
    TrainData,
    own_choices,
    seed_choices,
)

_READ_AT_ONCE = 64
_AT_ONCE = 4096
"""Texts for the tokenizer."""
_FILLING = -1
"""In place of an epoch in the seeds of augmentations in a cache."""


def indexed_data(options: DataOptions, source: Source, reader: Reader, progress: bool) -> TrainData:
    """Training data from a source."""
    skips, start = reader.skips, Start()
    check_found(len(source), skips, options.train_data, "train_data")
    if options.cache:
        cached = CachedBatches(source, options, reader, start, progress)
        return _train_data(cached, cached.order, cached.batches, cached.digest, options, reader, start)
    batches = _global_batches(options.train_num_samples or len(source), options, reader)
    order = EpochOrder(len(source), options.seed)
    loader = DataLoader(
        IndexedBatches(source, order, batches, options, reader),
        batch_size=None,
        sampler=Places(start, batches.of_rank),
        collate_fn=unchanged,
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
        total=len(source) + int(skips),
        world_size=reader.world_size,
    )
    return _train_data(counted, order, batches, source.digest, options, reader, start)


def _train_data(
    loader: CachedBatches | CountedBatches,
    order: EpochOrder,
    batches: GlobalBatches,
    digest: str,
    options: DataOptions,
    reader: Reader,
    start: Start,
) -> TrainData:
    described = {
        "rule": RULE,
        "rows": order.rows,
        "samples": batches.samples,
        "global_batch": batches.global_size,
        "data": digest,
    }
    return TrainData(loader, reader.epoch, reader.skips, accum_freq=options.accum_freq, start=start, order=described)


def _global_batches(samples: int, options: DataOptions, reader: Reader) -> GlobalBatches:
    """The batches of one rank in an epoch.

    Raises ValueError when there are too few samples for a step.
    """
    batches = GlobalBatches(samples, options.batch_size, options.accum_freq, reader.rank, reader.world_size)
    if batches.steps == 0:
        accumulated = f", and {options.accum_freq} of them per step" if options.accum_freq > 1 else ""
        raise ValueError(
            f"batch_size: got {options.batch_size} for {reader.world_size} processes{accumulated}, but "
            f"{options.train_data} has {samples} readable samples: use a smaller batch"
        )
    return batches


class Places:
    """A sampler: (epoch, number of a batch of this rank), from the start that is set to the end of the epoch."""

    def __init__(self, start: Start, batches: int) -> None:
        self.start, self.batches = start, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.start.epoch
        return ((epoch, batch) for batch in range(self.start.batch, self.batches))


class _Samples:
    """The samples of a source, preprocessed."""

    def __init__(self, source: Source, options: DataOptions, reader: Reader) -> None:
        self.source, self.preprocess, self.max_pixels = source, reader.preprocess, options.max_image_pixels
        self.notes = Notes()
        self.retried = Retries(options.data_retries)

    def read(self, row: int, seed: int) -> tuple[Tensor, list[str]] | None:
        """The preprocessed image and the captions; None, with a note, if they cannot be read."""
        try:
            content, captions = self.retried(lambda: self.source.name(row), lambda: self.source.read(row))
            image = load_image(content, self.max_pixels)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            raise_lack(error)
            self.notes.add(self.source.name(row), f"{type(error).__name__}: {error}")
            return None
        self.notes.read()
        seed_choices(seed)
        return preprocessed(self.preprocess, image, lambda: self.source.name(row)), captions


class IndexedBatches(Dataset):
    """Batches `(images [B, C, H, W], tokens [B, L], report)` by (epoch, number).

    A sample that cannot be read is replaced by the first readable one of its spares (``GlobalBatches.spares``), so that
    every number of ranks has the same samples. Random choices about a sample depend on its position in the epoch.
    """

    def __init__(
        self, source: Source, order: EpochOrder, batches: GlobalBatches, options: DataOptions, reader: Reader
    ) -> None:
        self.order, self.batches, self.tokenizer = order, batches, reader.tokenizer
        self.samples = _Samples(source, options, reader)
        # far more than chance requires while no more than the share is unreadable
        size, share = options.batch_size, options.max_skipped
        self.most_tries = batches.samples if share >= 1 else size + round((size + 64) / (1 - share))

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, Report]:
        epoch, batch = place
        positions = self.batches.positions(batch)
        rows, seeds = self.order.rows_at(epoch, positions), self.order.seeds(epoch, positions)
        found: list[tuple[Tensor, Tensor]] = []
        tries, notes = 0, self.samples.notes
        with own_choices():
            for position, row, seed in zip(positions.tolist(), rows.tolist(), seeds.tolist(), strict=True):
                sample = None
                notes.met += 1  # spares are met at their own places
                for candidate in islice(self._candidates(epoch, position, row), self.most_tries - tries):
                    tries += 1
                    sample = self.samples.read(candidate, seed)
                    if sample is not None:
                        break
                if sample is None:
                    raise ValueError(
                        f"train_data: only {len(found)} of {tries} samples can be read, too few for a batch of "
                        f"{len(positions)}{notes.first()}"
                    )
                image, captions = sample
                found.append((image, self.tokenizer([captions[seed % len(captions)]])[0]))
        return (*default_collate(found), notes.report())

    def _candidates(self, epoch: int, position: int, row: int) -> Iterator[int]:
        """The row at a position, then its spares."""
        yield row
        for spare in self.batches.spares(position):
            yield int(self.order.rows_at(epoch, np.array([spare]))[0])


class CachedBatches:
    """Batches `(images [B, C, H, W] float32, tokens [B, L] int64)`, shuffled, from memory.

    One caption per image is drawn each time. The order is that of indexed data.

    Raises ValueError when there is less than one batch, when more samples are unreadable than may be skipped, or when
    the images would take more than half of the memory.
    """

    def __init__(self, source: Source, options: DataOptions, reader: Reader, start: Start, progress: bool) -> None:
        self.start, skips = start, reader.skips
        self.images, captions, rows = _read_all(source, options, reader, progress)
        skips.check(len(rows) + int(skips))
        self.pass_counts = (len(rows) + int(skips)) / reader.world_size, dict(skips.samples)
        self.order = EpochOrder(len(rows), options.seed)
        self.batches = _global_batches(len(rows), options, reader)
        self.num_batches = self.batches.of_rank
        self.num_samples = self.batches.steps * self.batches.global_size
        self.digest = digest_of(source.digest.encode(), np.array(rows))
        # images with equal captions share their tokens
        distinct = {of_image: number for number, of_image in enumerate(dict.fromkeys(captions))}
        texts = [text for of_image in distinct for text in of_image]
        counts = np.array([len(of_image) for of_image in distinct])
        numbers = np.array([distinct[of_image] for of_image in captions])
        self.tokens = torch.cat([reader.tokenizer(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)])
        self.first_caption = (np.cumsum(counts) - counts)[numbers]
        self.caption_count = counts[numbers].astype(np.uint64)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.start.epoch
        for batch in range(self.start.batch, self.num_batches):
            positions = self.batches.positions(batch)
            rows = self.order.rows_at(epoch, positions)
            draws = self.order.seeds(epoch, positions) % self.caption_count[rows]
            captions = self.first_caption[rows] + draws.astype(np.int64)
            yield self.images[torch.from_numpy(rows)], self.tokens[torch.from_numpy(captions)]


class _Parts(Dataset):
    """All samples of a source, some at once: the readable images, their captions and rows, and a report.

    Augmentations depend on the seed and a sample's number alone.
    """

    def __init__(self, source: Source, options: DataOptions, reader: Reader) -> None:
        self.samples, self.count = _Samples(source, options, reader), len(source)
        self.order = EpochOrder(len(source), options.seed)

    def __len__(self) -> int:
        return -(-self.count // _READ_AT_ONCE)

    def __getitem__(self, part: int) -> tuple[Tensor | None, list[tuple[str, ...]], list[int], Report]:
        numbers = np.arange(part * _READ_AT_ONCE, min((part + 1) * _READ_AT_ONCE, self.count))
        images, captions, rows = [], [], []
        with own_choices():
            for row, seed in zip(numbers.tolist(), self.order.seeds(_FILLING, numbers).tolist(), strict=True):
                sample = self.samples.read(row, seed)
                if sample is not None:
                    images.append(sample[0])
                    captions.append(tuple(sample[1]))
                    rows.append(row)
        # collated into shared memory at once: where that is full, the worker says so, and the queue would wait for ever
        return default_collate(images) if images else None, captions, rows, self.samples.notes.report()


def _read_all(
    source: Source, options: DataOptions, reader: Reader, progress: bool
) -> tuple[Tensor, list[tuple[str, ...]], list[int]]:
    """All readable images, stacked, their captions and their rows."""
    loader = DataLoader(
        _Parts(source, options, reader),
        batch_size=None,
        num_workers=options.workers,
        collate_fn=unchanged,
        worker_init_fn=worker_init_fn(),
        generator=torch.Generator(),
    )
    images: Tensor | None = None
    captions: list[tuple[str, ...]] = []
    rows: list[int] = []
    with Progress("reading images into memory", "images", len(source), show=progress) as bar, reading(loader) as parts:
        for batch, its_captions, its_rows, report in parts:
            reader.skips.add(report.skipped)
            if batch is not None:
                images = _space(len(source), batch[0], reader.world_size) if images is None else images
                images[len(rows) : len(rows) + len(batch)] = batch
                captions += its_captions
                rows += its_rows
            bar.update(min(_READ_AT_ONCE, len(source) - bar.done))
    if images is None:
        raise ValueError(f"train_data: none of the {len(source)} images can be read; {reader.skips.first}")
    return images[: len(rows)], captions, rows


def _space(count: int, image: Tensor, world_size: int) -> Tensor:
    """An empty tensor for all images."""
    here = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))  # set by torchrun
    needed, memory = count * image.numel() * 4 * here, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise ValueError(
            f"cache: {count} images of {tuple(image.shape)} take {needed / 1e9:.1f} GB in {here} processes, more than "
            f"half of the {memory / 1e9:.1f} GB of this machine: train without cache"
        )
    return torch.empty(count, *image.shape)
