"""Training batches streamed from WebDataset shards: a pipeline of webdataset's stages and ours.

For shards by URL, and for resampled ones. Order and contents of an epoch depend on seed, epoch, rank, and the numbers
of ranks and workers. What cannot be read is skipped and counted; opening a shard is tried again. Only images and texts
are decoded: webdataset's own decoder unpickles members with certain extensions.
"""

from __future__ import annotations

import math
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import islice
from typing import Any, BinaryIO, cast

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from .images import load_image, preprocessed
from .options import DataOptions
from .processes import worker_init_fn
from .retries import Retries, message_of, raise_lack
from .shard_names import open_shard, shard_weights, sizes_of
from .skips import Notes, Report
from .tars import TarSample, complete, read_samples
from .train_data import CountedBatches, Reader, SharedEpoch, TrainData, mixed_seed

# Buffer sizes: (capacity, samples read before the first one is drawn), as in open_clip
_SHARD_BUFFER = (2000, 500)
_SAMPLE_BUFFER = (5000, 1000)


def webdataset_data(options: DataOptions, shards: list[str], num_samples: int, reader: Reader) -> TrainData:
    """Training data from shards.

    Every worker serves the same number of full batches, so an epoch is rounded up to a multiple of them; a worker that
    runs out of full batches starts over, in another order. `num_samples`: samples per epoch, before rounding.
    """
    workers = max(1, options.workers)
    worker_batches = math.ceil(math.ceil(num_samples / (options.batch_size * reader.world_size)) / workers)
    notes, passes = Notes(), Passes()
    own_shards: list[object]
    if options.dataset_resampled:
        factors = options.train_data_upsampling_factors
        weights = None if factors is None else shard_weights(options.train_data, factors, options.allow_pipe)
        own_shards = [ResampledShards(shards, options.seed, reader.rank, reader.epoch, weights)]
    else:
        own_shards = [
            webdataset.SimpleShardList(shards),
            Shuffle(*_SHARD_BUFFER, options.seed, reader.epoch, passes),
            SplitByRank(reader.rank, reader.world_size),
            webdataset.split_by_worker,
        ]
    dataset = Epoch(
        passes,
        *own_shards,
        ReadShards(notes, sizes_of(shards), max(1, num_samples // len(shards)), options.data_retries),
        Shuffle(*_SAMPLE_BUFFER, options.seed, reader.epoch, passes),
        Decode(notes, options.max_image_pixels, reader, DrawCaption(reader, options.seed, passes)),
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
    return TrainData(
        batches,
        reader.epoch,
        reader.skips,
        accum_freq=options.accum_freq,
        seed=options.seed,
        rank=reader.rank,
        generator=generator,
    )


class Passes:
    """Where a worker is: the pass through its shards in an epoch, and how many epochs it has begun."""

    number = 0
    epochs = 0


class Epoch(webdataset.DataPipeline):
    """The batches of a worker: one pass after the other, until there are enough of them."""

    def __init__(self, passes: Passes, *stages: object) -> None:
        super().__init__(*stages)
        self.passes = passes

    def __iter__(self) -> Iterator[Any]:
        self.passes.number, self.passes.epochs = -1, self.passes.epochs + 1
        return super().__iter__()

    def iterator1(self) -> Iterator[Any]:
        self.passes.number += 1
        return super().iterator1()


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
    """webdataset's shuffle buffer, seeded by seed, epoch and pass (its own is seeded by the clock)."""

    def __init__(self, capacity: int, initial: int, seed: int, epoch: SharedEpoch, passes: Passes) -> None:
        self.capacity, self.initial, self.seed, self.epoch, self.passes = capacity, initial, seed, epoch, passes

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        generator = random.Random(mixed_seed(self.seed, self.epoch(), self.passes.number))
        return webdataset.shuffle(self.capacity, self.initial, rng=generator)(iter(items))


class SplitByRank:
    """The shards of one rank (webdataset's own stage takes the rank from the environment)."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __call__(self, shards: Iterable[dict]) -> Iterator[dict]:
        return islice(iter(shards), self.rank, None, self.world_size)


class ReadShards:
    """Samples of shards, complete or not. Damaged parts are skipped and noted."""

    def __init__(self, notes: Notes, sizes: Mapping[str, int], usual: int, retries: int) -> None:
        """`sizes`: samples per shard, where known; `usual`: where unknown; `retries`: further tries to open one."""
        self.notes, self.sizes, self.usual = notes, sizes, usual
        self.retried = Retries(retries, notes)

    def __call__(self, shards: Iterable[dict]) -> Iterator[TarSample]:
        for shard in shards:
            name = shard["url"]
            try:
                file = self.retried(partial(str, name), partial(opened, name))
            except Exception as error:  # readers of URLs raise their own exceptions
                raise_lack(error, partial(str, name))
                self._skip(name, f"it cannot be opened ({message_of(error)})", self.sizes.get(name, self.usual))
                continue
            try:
                for sample in read_samples(
                    file, name, self._skip, images=True, expected=self.sizes.get(name), usual=self.usual
                ):
                    self.notes.met += 1
                    yield sample
            except (OSError, MemoryError) as error:
                raise_lack(error, partial(str, name))
                raise
            finally:
                _leave(file)

    def _skip(self, name: str, reason: object, samples: int) -> None:
        self.notes.met += samples
        self.notes.add(name, reason, samples)


def opened(shard: str) -> BinaryIO:
    """A shard whose beginning has been read: where a program such as curl delivers it, its failure shows there."""
    file = open_shard(shard)
    try:
        begin = file.read(tarfile.BLOCKSIZE)
    except BaseException:
        _leave(file)
        raise
    if not begin:
        file.close()  # raises OSError if the program has failed
        return BytesIO()
    return cast("BinaryIO", Begun(begin, file))


def _leave(file: BinaryIO) -> None:
    """Closes a shard, read to its end or not. A program that delivers it may be waiting for a server: it is killed."""
    program = getattr(file, "proc", None)
    if program is not None:
        program.kill()
    with suppress(OSError):  # of a program that delivered too little, which is noted
        file.close()


class Begun:
    """A file of which the beginning is read already."""

    def __init__(self, begin: bytes, file: BinaryIO) -> None:
        self._begin, self._file = begin, file
        self.proc = getattr(file, "proc", None)

    def read(self, size: int = -1) -> bytes:
        if not self._begin:
            return self._file.read(size)
        begin, self._begin = (self._begin[:size], self._begin[size:]) if size >= 0 else (self._begin, b"")
        return begin if 0 <= size <= len(begin) else begin + self._file.read(size - len(begin) if size >= 0 else -1)

    def close(self) -> None:
        self._file.close()


class Decode:
    """Preprocessed image and tokens of each sample; incomplete and undecodable samples are skipped and noted."""

    def __init__(self, notes: Notes, max_pixels: int, reader: Reader, draw: DrawCaption) -> None:
        self.notes, self.max_pixels, self.preprocess, self.draw = notes, max_pixels, reader.preprocess, draw

    def __call__(self, samples: Iterable[TarSample]) -> Iterator[tuple[Tensor, Tensor]]:
        for sample in samples:
            try:
                found = complete(sample)
            except ValueError as error:
                self.notes.add(sample.named, error)
                continue
            try:
                image = load_image(sample.content[found.image], self.max_pixels)
            except Exception as error:  # PIL has no common class for what a broken file may raise
                raise_lack(error, lambda: sample.named)  # noqa: B023
                self.notes.add(sample.named, f"{type(error).__name__}: {error}")
                continue
            self.notes.read(found.several_lines)
            tensor = preprocessed(self.preprocess, image, lambda: sample.named)  # noqa: B023
            yield tensor, self.draw(found.captions)


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


class DrawCaption:
    """A tokenizer that draws one of the captions of a sample.

    Draws are the same for the same seed, epoch, rank and worker.
    """

    def __init__(self, reader: Reader, seed: int, passes: Passes) -> None:
        self.tokenizer, self.seed, self.rank, self.epoch = reader.tokenizer, seed, reader.rank, reader.epoch
        self.passes = passes
        self._state: tuple[int, int] | None = None
        self._random = random.Random(0)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokens [L]."""
        state = (self.passes.epochs, self.passes.number)
        if state != self._state:
            self._state = state
            self._random = random.Random(
                mixed_seed(self.seed, self.rank, self.epoch(), worker_id(), self.passes.number)
            )
        return self.tokenizer([self._random.choice(captions)])[0]


def worker_id() -> int:
    """Of the data loader's worker process that calls it; 0 outside of one."""
    worker = get_worker_info()
    return worker.id if worker else 0
