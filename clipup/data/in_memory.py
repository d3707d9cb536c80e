"""Training data in memory: every sample is read and preprocessed once, then batches are gathered by index.

For small data sets of small images, where decoding would take a core away from training (the pictograms, 12,376 images
of 32 pixels, take 152 MB). Images are kept as float32, exactly as `preprocess` returned them, so data with and without
a cache have the same images in the same order; a random augmentation in `preprocess` is drawn only once. Every process
holds all images, so that each can have any batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..progress import Progress
from .epoch_order import EpochOrder
from .options import DataOptions
from .processes import reading, worker_init_fn
from .random_choices import own_choices, seed_choices
from .retries import Retries
from .sample_index import Images, Record, check_found, csv_records, readable, tar_records
from .skips import Notes
from .train_data import Reader, Start, TrainData, described, global_batches

_READ_BATCH = 64
_TOKENIZE_BATCH = 4096
_BATCHES_AT_ONCE = 64
"""Whose samples are chosen together."""
_FILLING = -1
"""In place of an epoch in the seeds of augmentations."""


def cached_data(options: DataOptions, shards: Sequence[str], reader: Reader, progress: bool) -> TrainData:
    """Training data read into memory, from shards or, without any, from a CSV file."""
    source, skips = options.train_data, reader.skips
    if shards:
        records = tar_records(shards, skips, "train_data", options.data_retries, training=True)
    else:
        records = csv_records(
            source, options.csv_format, skips, "train_data", merge_images=False, retries=options.data_retries
        )
    check_found(len(records), skips, source, "train_data")
    global_batches(len(records), options, reader)  # before the images are read
    loader = CachedLoader(records, options, reader, progress and reader.rank == 0)
    order = described(loader.order, loader.batches, loader.digest)
    return TrainData(loader, reader.epoch, skips, accum_freq=options.accum_freq, start=loader.start, order=order)


class CachedLoader:
    """Batches `(images [B, C, H, W] float32, tokens [B, L] int64)`, shuffled, from memory.

    One caption per image is drawn each time. The order is that of indexed data.

    Raises ValueError when there is less than one batch, when more samples are unreadable than may be skipped, or when
    the images would take more than half of the memory.
    """

    def __init__(self, records: Sequence[Record], options: DataOptions, reader: Reader, progress: bool) -> None:
        self.start = Start()
        self.images, good = _read(records, options, reader, progress)
        reader.skips.check(len(self.images) + int(reader.skips))
        self.pass_counts = (len(self.images) + int(reader.skips)) / reader.world_size, dict(reader.skips.samples)
        self.order = EpochOrder(len(self.images), options.seed)
        self.batches = global_batches(len(self.images), options, reader)
        self.num_batches = self.batches.of_rank
        self.num_samples = self.batches.steps * self.batches.global_size
        kept = [record for record, is_good in zip(records, good, strict=True) if is_good]
        self.digest = _digest(kept)
        # the index of an image's first caption; images with equal captions share them
        start: dict[tuple[str, ...], int] = {}
        texts: list[str] = []
        for record in kept:
            if record.captions not in start:
                start[record.captions] = len(texts)
                texts += record.captions
        step = _TOKENIZE_BATCH
        self.tokens = torch.cat([reader.tokenizer(texts[i : i + step]) for i in range(0, len(texts), step)])
        self.first_caption = np.array([start[record.captions] for record in kept])
        self.caption_count = np.array([len(record.captions) for record in kept], np.uint64)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, numbers = self.start.epoch, range(self.start.batch, self.num_batches)
        for first in numbers[::_BATCHES_AT_ONCE]:
            some = numbers[first - numbers.start : first - numbers.start + _BATCHES_AT_ONCE]
            positions = np.concatenate([self.batches.positions(batch) for batch in some])
            rows = self.order.rows_at(epoch, positions)
            draws = self.order.seeds(epoch, positions) % self.caption_count[rows]
            captions = torch.from_numpy(self.first_caption[rows] + draws.astype(np.int64))
            size = self.batches.batch_size
            for images, texts in zip(torch.from_numpy(rows).split(size), captions.split(size), strict=True):
                yield self.images[images], self.tokens[texts]


_Item = tuple[Tensor | str, Sequence[tuple[str, str]]]
"""An image, or why it cannot be read, and what was read again."""


class _SeededImages(Dataset):
    """Images whose augmentations depend on the seed and their number alone."""

    def __init__(self, records: Sequence[Record], options: DataOptions, reader: Reader) -> None:
        self.notes = Notes()
        retried = Retries(options.data_retries, self.notes)
        self.images = Images(records, reader.preprocess, options.max_image_pixels, retried)
        self.order = EpochOrder(len(records), options.seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Item:
        with own_choices():
            seed_choices(int(self.order.seeds(_FILLING, np.array([index]))[0]))
            return self.images[index], self.notes.report().retried


def _digest(records: Sequence[Record]) -> str:
    """Of which sample has which number; equal after the files have moved."""
    found = hashlib.sha256()
    for record in records:
        place = os.path.basename(record.path) if record.offset is not None else None
        found.update(repr((place, record.offset, record.captions)).encode())
    return found.hexdigest()[:16]


def _read(records: Sequence[Record], options: DataOptions, reader: Reader, progress: bool) -> tuple[Tensor, list[bool]]:
    """All readable images, stacked, and for each record whether it was readable."""
    loader = DataLoader(
        _SeededImages(records, options, reader),
        batch_size=_READ_BATCH,
        num_workers=options.workers,
        collate_fn=_keep_readable,
        worker_init_fn=worker_init_fn(),
        generator=torch.Generator(),
    )
    images: Tensor | None = None
    good: list[bool] = []
    filled = 0
    shown = Progress("reading images into memory", "images", len(records), show=progress)
    with shown as bar, reading(loader) as batches:
        for batch, reasons, retried in batches:
            reader.skips.add_retries(retried)
            for reason in reasons:
                if reason:
                    reader.skips.note(records[len(good)].named, reason)
                good.append(not reason)
            if batch is not None:
                if images is None:
                    _check_memory(len(records), batch[0], reader.world_size)
                    images = torch.empty(len(records), *batch.shape[1:])
                images[filled : filled + len(batch)] = batch
                filled += len(batch)
            bar.update(len(reasons))
    if images is None:
        raise ValueError(f"train_data: none of the {len(records)} images can be read; {reader.skips.first}")
    return images[:filled], good


def _keep_readable(items: list[_Item]) -> tuple[Tensor | None, list[str], list[tuple[str, str]]]:
    """Of a batch: the readable images, why each of the others cannot be read ("" for none), and what was read again."""
    return *readable([image for image, _ in items]), [one for _, retried in items for one in retried]


def _check_memory(count: int, image: Tensor, world_size: int) -> None:
    here = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))  # set by torchrun
    needed = count * image.numel() * 4 * here
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        shape = " x ".join(map(str, image.shape))
        raise ValueError(
            f"cache: {count} images of {shape} take {needed / 1e9:.1f} GB{f' in {here} processes' * (here > 1)}, more "
            f"than half of the {memory / 1e9:.1f} GB of this machine: train without cache"
        )
