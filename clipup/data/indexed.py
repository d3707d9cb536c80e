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
from collections.abc import Callable
from functools import cache, partial
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..progress import Progress
from .epoch_order import RULE, EpochOrder, GlobalBatches
from .images import read_sample
from .options import TrainingDataOptions
from .processes import each
from .samples import Source, check_found, digest_of
from .skips import Notes, Report, Retries
from .train_data import Places, Reader, TrainData, own_choices, read_by_workers, seed_choices

_READ_AT_ONCE = 64
_FILLING = -1
"""Stands for the epoch in the seeds of a cache's augmentations, which no epoch has."""


def indexed_data(options: TrainingDataOptions, source: Source, reader: Reader, progress: bool) -> TrainData:
    """Training data from a source.

    Raises ValueError when there are too few samples for a step, when more are unreadable than may be skipped, or when a
    cache would take more than half of the memory.
    """
    skips = reader.skips
    check_found(len(source), skips, options.source, "train_data")
    read = _Samples(source, options, reader)
    samples: _Samples | _Cached = read
    tokens: Callable[[str], Tensor] = partial(_tokens, reader.tokenizer)
    if options.cache_data:
        samples, tokens = _Cached(read, options, reader, progress), cache(tokens)
        check_found(len(samples), skips, options.source, "train_data")
    size, accum_freq, rows = reader.step.batch_size, reader.step.accum_freq, len(samples)
    batches = GlobalBatches(options.train_num_samples or rows, size, accum_freq, reader.rank, reader.world_size)
    if batches.steps == 0:
        raise ValueError(
            f"batch_size ({size}) * accum_freq ({accum_freq}) * ranks ({reader.world_size}) is {batches.global_size} "
            f"samples a step, more than the {batches.samples} of an epoch of {options.train_data}; lower one of them, "
            "or pass more data"
        )
    known = dict(skips.samples) if batches.samples >= rows else {}  # a part of the data is judged by its own samples
    return read_by_workers(
        IndexedBatches(samples, tokens, EpochOrder(rows, reader.step.seed), batches, options.max_skipped),
        options,
        reader,
        batches.of_rank,
        min(rows, batches.samples) + sum(known.values()),
        workers=0 if options.cache_data else options.workers,
        known=known,
        places=Places(batches.of_rank),
        order={
            "rule": RULE,
            "rows": rows,
            "samples": batches.samples,
            "global_batch": batches.global_size,
            "data": samples.digest,
        },
    )


def _tokens(tokenizer: Callable[[list[str]], Tensor], text: str) -> Tensor:
    return tokenizer([text])[0]


class _Samples:
    """The samples of a source, preprocessed."""

    def __init__(self, source: Source, options: TrainingDataOptions, reader: Reader) -> None:
        self.source, self.preprocess, self.max_pixels = source, reader.preprocess, options.max_image_pixels
        self.digest, self.notes, self.retried = source.digest, Notes(), Retries(options.data_retries)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, row: int, seed: int) -> tuple[Tensor, list[str]] | None:
        """The preprocessed image and the captions; None, with a note, if they cannot be read."""
        seed_choices(seed)
        name = partial(self.source.name, row)
        read = partial(self.retried, name, partial(self.source.read, row))
        return read_sample(read, name, self.preprocess, self.max_pixels, self.notes.add)


class IndexedBatches(Dataset):
    """Batches `(images [B, C, H, W], tokens [B, L], report)` by (epoch, number).

    A sample that cannot be read is replaced by the first readable one of its spares (``GlobalBatches.spares``), so that
    every number of ranks has the same samples. Random choices about a sample depend on its position in the epoch.
    """

    def __init__(
        self,
        samples: _Samples | _Cached,
        tokens: Callable[[str], Tensor],
        order: EpochOrder,
        batches: GlobalBatches,
        max_skipped: float,
    ) -> None:
        self.samples, self.tokens, self.order, self.batches = samples, tokens, order, batches
        # far more than chance requires while no more than the share is unreadable
        size = batches.batch_size
        self.most_tries = batches.samples if max_skipped >= 1 else size + round((size + 64) / (1 - max_skipped))

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, Report]:
        epoch, batch = place
        positions = self.batches.positions(batch)
        rows, seeds = self.order.rows_at(epoch, positions), self.order.seeds(epoch, positions)
        pairs: list[tuple[Tensor, Tensor]] = []
        tries, notes = 0, self.samples.notes
        with own_choices():
            for position, row, seed in zip(positions.tolist(), rows.tolist(), seeds.tolist(), strict=True):
                sample = None
                notes.met += 1  # spares are met at their own places
                spares = (
                    int(self.order.rows_at(epoch, np.array([spare]))[0]) for spare in self.batches.spares(position)
                )
                for candidate in islice(chain([row], spares), self.most_tries - tries):
                    tries += 1
                    sample = self.samples.read(candidate, seed)
                    if sample is not None:
                        break
                if sample is None:
                    raise ValueError(
                        f"train_data: only {len(pairs)} of {tries} samples can be read, too few for a batch of "
                        f"{len(positions)}{notes.first()}"
                    )
                image, captions = sample
                pairs.append((image, self.tokens(captions[seed % len(captions)])))
        return (*default_collate(pairs), notes.report())


class _Cached:
    """The readable samples of a source, in memory. Augmentations depend on the seed and a sample's number alone."""

    def __init__(self, samples: _Samples, options: TrainingDataOptions, reader: Reader, progress: bool) -> None:
        self.notes = Notes()
        self.images: list[Tensor] = []
        self.captions: list[list[str]] = []
        rows: list[int] = []
        numbers = np.arange(len(samples))
        seeds = EpochOrder(len(samples), reader.step.seed).seeds(_FILLING, numbers)
        places = np.array_split(np.stack([numbers.astype(np.uint64), seeds], 1), -(-len(samples) // _READ_AT_ONCE))
        with Progress("reading images into memory", "images", len(samples), show=progress) as bar:
            for images, captions, report in each(partial(_read, samples), places, options.workers):
                reader.skips.add(report.skipped)
                _check_memory(len(samples), images[:1].numel(), reader.world_size)
                self.images += images.clone().unbind()  # workers hand over shared memory, which is scarcer
                self.captions += captions.values()
                rows += captions
                bar.update(len(captions) + len(report.skipped))
        self.digest = digest_of(samples.digest.encode(), np.array(rows))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int, seed: int) -> tuple[Tensor, list[str]]:
        return self.images[row], self.captions[row]


def _read(samples: _Samples, places: np.ndarray) -> tuple[Tensor, dict[int, list[str]], Report]:
    """Reads samples by (row, seed): the readable images [N, C, H, W], their captions by row, and a report."""
    with own_choices():
        readable = {row: sample for row, seed in places.tolist() if (sample := samples.read(row, seed)) is not None}
    # collated into shared memory at once: where that is full, the worker says so, and the queue would wait for ever
    images = default_collate([image for image, _ in readable.values()]) if readable else torch.empty(0)
    return images, {row: captions for row, (_, captions) in readable.items()}, samples.notes.report()


def _check_memory(count: int, numbers: int, world_size: int) -> None:
    """Refuses a cache of ``count`` images of ``numbers`` float32 each that would not fit."""
    here = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))  # set by torchrun
    needed, memory = count * numbers * 4 * here, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise ValueError(
            f"cache_data: {count} images take {needed / 1e9:.1f} GB (ranks of this machine: {here}), more than half of "
            f"its {memory / 1e9:.1f} GB: train without cache_data"
        )
