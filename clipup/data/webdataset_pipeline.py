"""Training batches streamed from WebDataset shards: a pipeline of webdataset's stages and ours.

Order and contents of an epoch depend on seed, epoch, rank and number of workers alone. What cannot be read is skipped
and counted. Only images and texts are decoded: webdataset's own decoder unpickles members with certain extensions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from .images import load_image
from .options import DataOptions
from .processes import worker_init_fn
from .shard_names import open_shard, shard_weights, sizes_of
from .skips import Notes, Report
from .tars import TarSample, complete, read_samples
from .train_data import CountedBatches, DrawCaption, Reader, SharedEpoch, TrainData, mixed_seed, worker_id

# Buffer sizes: (capacity, samples read before the first one is drawn), as in open_clip
_SHARD_BUFFER = (2000, 500)
_SAMPLE_BUFFER = (5000, 1000)


def webdataset_data(options: DataOptions, shards: list[str], num_samples: int, reader: Reader) -> TrainData:
    """Training data from shards.

    Every worker serves the same number of full batches, so an epoch is rounded up to a multiple of them; a worker that
    runs out of samples starts over. `num_samples`: samples per epoch, before rounding.
    """
    workers = max(1, options.workers)
    worker_batches = math.ceil(math.ceil(num_samples / (options.batch_size * reader.world_size)) / workers)
    notes = Notes()
    own_shards: list[object]
    if options.dataset_resampled:
        factors = options.train_data_upsampling_factors
        weights = None if factors is None else shard_weights(options.train_data, factors, options.allow_pipe)
        own_shards = [ResampledShards(shards, options.seed, reader.rank, reader.epoch, weights)]
    else:
        own_shards = [
            webdataset.SimpleShardList(shards),
            Shuffle(*_SHARD_BUFFER, options.seed, reader.epoch),
            SplitByRank(reader.rank, reader.world_size),
            webdataset.split_by_worker,
        ]
    dataset = webdataset.DataPipeline(
        *own_shards,
        ReadShards(notes, sizes_of(shards), usual=max(1, num_samples // len(shards))),
        Shuffle(*_SAMPLE_BUFFER, options.seed, reader.epoch),
        Decode(notes, options.max_image_pixels, reader, DrawCaption(reader, options.seed)),
        webdataset.batched(options.batch_size, collation_fn=default_collate, partial=False),
        ReportedBatches(notes, options.batch_size),
    ).with_epoch(nbatches=worker_batches)
    generator = torch.Generator()
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        worker_init_fn=worker_init_fn(),
        generator=generator,
    )
    num_batches = worker_batches * workers
    batches = CountedBatches(
        loader,
        reader.skips,
        num_samples=num_batches * options.batch_size * reader.world_size,
        num_batches=num_batches,
        total=num_samples,
        world_size=reader.world_size,
    )
    return TrainData(batches, reader.epoch, reader.skips, options.seed, reader.rank, generator)


class ResampledShards:
    """Shards drawn with replacement, without end; each worker of each rank draws its own."""

    def __init__(
        self,
        shards: Sequence[str],
        seed: int,
        rank: int,
        epoch: SharedEpoch,
        weights: Sequence[float] | None = None,
    ) -> None:
        """`weights`: how often each shard is drawn, relative to the others."""
        self.shards, self.seed, self.rank, self.epoch = shards, seed, rank, epoch
        self.weights = weights

    def __call__(self) -> Iterator[dict[str, str]]:
        draws = random.Random(mixed_seed(self.seed, self.epoch(), self.rank, worker_id()))
        while True:
            if self.weights is None:
                yield {"url": draws.choice(self.shards)}
            else:
                yield {"url": draws.choices(self.shards, self.weights)[0]}


class Shuffle:
    """webdataset's shuffle buffer, seeded by seed and epoch (its own is seeded by the clock)."""

    def __init__(self, capacity: int, initial: int, seed: int, epoch: SharedEpoch) -> None:
        self.capacity, self.initial, self.seed, self.epoch = capacity, initial, seed, epoch

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        generator = random.Random(self.seed + self.epoch())
        return webdataset.shuffle(self.capacity, self.initial, rng=generator)(iter(items))


class SplitByRank:
    """The shards of one rank (webdataset's own stage takes the rank from the environment)."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __call__(self, shards: Iterable[dict]) -> Iterator[dict]:
        return islice(iter(shards), self.rank, None, self.world_size)


class ReadShards:
    """Samples of shards, complete or not. Damaged parts are skipped and noted."""

    def __init__(self, notes: Notes, sizes: Mapping[str, int], usual: int) -> None:
        """`sizes`: samples per shard, where known; `usual`: where unknown."""
        self.notes, self.sizes, self.usual = notes, sizes, usual

    def __call__(self, shards: Iterable[dict]) -> Iterator[TarSample]:
        for shard in shards:
            name = shard["url"]
            try:
                file = open_shard(name)
            except Exception as error:  # readers of URLs raise their own exceptions
                self._skip(name, f"it cannot be opened ({error})", self.sizes.get(name, self.usual))
                continue
            try:
                for sample in read_samples(
                    file, name, self._skip, images=True, expected=self.sizes.get(name), usual=self.usual
                ):
                    self.notes.met += 1
                    yield sample
            finally:
                file.close()

    def _skip(self, name: str, reason: object, samples: int) -> None:
        self.notes.met += samples
        self.notes.add(name, reason, samples)


class Decode:
    """Preprocessed image and tokens of each sample; incomplete and undecodable samples are skipped and noted."""

    def __init__(self, notes: Notes, max_pixels: int, reader: Reader, draw: DrawCaption) -> None:
        self.notes, self.max_pixels, self.preprocess, self.draw = notes, max_pixels, reader.preprocess, draw

    def __call__(self, samples: Iterable[TarSample]) -> Iterator[tuple[Tensor, Tensor]]:
        for sample in samples:
            try:
                extension, captions, _ = complete(sample)
            except ValueError as reason:
                self.notes.add(sample.named, reason)
                continue
            try:
                image = load_image(sample.content[extension], self.max_pixels)
            except Exception as error:  # PIL has no common class for what a broken file may raise
                self.notes.add(sample.named, f"{type(error).__name__}: {error}")
                continue
            self.notes.read()
            yield self.preprocess(image), self.draw(["\n".join(captions)])[0]


class ReportedBatches:
    """Batches, each with a report of the samples met since the last one.

    Raises ValueError when a pass through a worker's shards gives no batch: the next pass would not either.
    """

    def __init__(self, notes: Notes, batch_size: int) -> None:
        self.notes, self.batch_size = notes, batch_size

    def __call__(self, batches: Iterable) -> Iterator[tuple[Tensor, Tensor, Report]]:
        empty = True
        for images, texts in batches:
            empty = False
            yield images, texts, self.notes.report()
        if empty:
            raise ValueError(
                f"batch_size: the shards of one worker hold fewer than {self.batch_size} readable samples: "
                f"use a smaller batch, fewer workers, or cache the data{self.notes.first()}"
            )
