"""Training batches streamed from WebDataset shards, with webdataset's readers of URLs and shuffle buffer.

For shards by URL, and for resampled shards. Order and contents of an epoch depend on seed, epoch, rank, and the numbers
of ranks and workers. Unreadable samples are skipped and counted; opening a shard is tried again. Only images and texts
are decoded: webdataset's own decoder unpickles members with certain extensions.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count, islice
from typing import Any, BinaryIO

import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .images import read_sample
from .options import TrainingDataOptions
from .shard_names import names_digest, open_shard, shard_weights, sizes_of
from .shard_writer import SIZES_FILE
from .skips import Notes, Report, Retries, raise_lack
from .tars import Members, complete, read_samples
from .train_data import Reader, TrainData, mixed_seed, read_by_workers, seed_choices

# Capacity of the shuffle buffer, and samples read before the first is drawn, as in open_clip
_SAMPLE_BUFFER = (5000, 1000)
_DRAWN = 1000
"""Draws with replacement in a pass. If none of these shards can be read, the next pass is not begun."""


def streamed_data(options: TrainingDataOptions, shards: list[str], reader: Reader) -> TrainData:
    """Training data from shards.

    Every worker serves the same number of full batches, so an epoch is rounded up to a multiple of them. A worker that
    runs out of full batches starts over, in another order.

    Raises ValueError when there are fewer shards than workers, or the number of samples is unknown.
    """
    workers, sizes, num_samples = max(1, options.workers), sizes_of(shards), options.train_num_samples
    if not options.dataset_resampled and len(shards) < workers * reader.world_size:
        raise ValueError(
            f"workers: got {options.workers} (ranks: {reader.world_size}), but every worker needs a shard of "
            f"train_data, which has {len(shards)}: use at most {len(shards) // reader.world_size}"
        )
    if num_samples is None and not sizes.keys() >= set(shards):
        raise ValueError(
            f"train_num_samples: not given, and no {SIZES_FILE} beside {shards[0]} gives the number of samples of "
            "these shards: pass the number of samples per epoch"
        )
    if num_samples is None:
        num_samples = sum(sizes[shard] for shard in shards)
    worker_batches = math.ceil(math.ceil(num_samples / (reader.step.batch_size * reader.world_size)) / workers)
    return read_by_workers(
        StreamedBatches(options, shards, max(1, num_samples // len(shards)), worker_batches, reader),
        options,
        reader,
        worker_batches * workers,
        num_samples,
        workers=options.workers,
        shards="" if options.dataset_resampled else names_digest(shards),  # each rank draws from its own shards
    )


class StreamedBatches(IterableDataset):
    """A worker's batches `(images [B, C, H, W], tokens [B, L], report)`: pass after pass through its shards.

    Iterating raises ValueError when a pass gives no batch, because later passes would not either.
    """

    def __init__(
        self, options: TrainingDataOptions, shards: list[str], usual: int, batches: int, reader: Reader
    ) -> None:
        """
        Args:
            usual: samples of a shard whose number is unknown.
            batches: a worker's batches in an epoch.
        """
        self.options, self.shards, self.usual, self.batches, self.reader = options, shards, usual, batches, reader
        factors = options.train_data_upsampling_factors
        self.weights = None if factors is None else shard_weights(options.source, factors, options.allow_pipe)
        self.sizes = sizes_of(shards)
        self.notes, self.retried = Notes(), Retries(options.data_retries)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Report]]:
        served, size = 0, self.reader.step.batch_size
        for number in count():
            before = served
            samples = self._decoded(number)
            while len(batch := list(islice(samples, size))) == size:
                yield (*default_collate(batch), self.notes.report())
                served += 1
                if served == self.batches:
                    return
            if served == before:
                raise ValueError(
                    f"batch_size: the shards of one worker hold fewer than {size} readable samples: "
                    f"use a smaller batch or fewer workers{self.notes.first()}"
                )

    def _decoded(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Image and tokens of each sample of a pass; incomplete and undecodable samples are skipped and noted."""
        place = number, self.reader.rank, _worker()[0]
        draws = self._random(*place)
        if get_worker_info() is not None:  # for augmentations; the calling process is seeded at every step
            seed_choices(self._random(*place, 0).getrandbits(64))
        shuffled = webdataset.shuffle(*_SAMPLE_BUFFER, rng=self._random(number))
        for members in shuffled(self._members(number)):
            name, limit = partial(str, members.named), self.options.max_image_pixels
            sample = read_sample(partial(_content, members), name, self.reader.preprocess, limit, self.notes.add)
            if sample is not None:
                yield sample[0], self.reader.tokenizer([draws.choice(sample[1])])[0]

    def _members(self, number: int) -> Iterator[Members]:
        """The samples of a pass, complete or not. Damaged parts are skipped and noted."""
        for shard in self._shards(number):
            expected = self.sizes.get(shard)
            try:
                file = self.retried(partial(str, shard), partial(opened, shard))
            except Exception as error:  # readers of URLs raise their own exceptions
                raise_lack(error)
                lost = self.usual if expected is None else expected
                self._lose(shard, f"it cannot be opened ({error or type(error).__name__})", lost)
                continue
            try:
                for members in read_samples(file, shard, self._lose, images=True, expected=expected, usual=self.usual):
                    self.notes.met += 1
                    yield members
            finally:
                _leave(file)

    def _shards(self, number: int) -> Iterator[str]:
        """This worker's shards for one pass. With replacement: a fixed number of draws."""
        worker, workers = _worker()
        if self.options.dataset_resampled:
            yield from self._random(number, self.reader.rank, worker).choices(self.shards, self.weights, k=_DRAWN)
            return
        shards = list(self.shards)
        self._random(number).shuffle(shards)
        yield from shards[self.reader.rank :: self.reader.world_size][worker::workers]

    def _lose(self, name: str, reason: str, samples: int) -> None:
        self.notes.met += samples
        self.notes.add(name, reason, samples)

    def _random(self, *parts: int) -> random.Random:
        return random.Random(mixed_seed(self.reader.step.seed, self.reader.epoch.value, *parts))


def _content(members: Members) -> tuple[bytes, list[str]]:
    parts = complete(members)
    return members.content[parts.image], parts.captions


def _worker() -> tuple[int, int]:
    """The calling data worker's number, and the number of workers."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def opened(shard: str) -> BinaryIO:
    """Opens a shard and reads its beginning, where the failure of a program that delivers it, such as curl, shows."""
    file: Any = open_shard(shard)
    stream = getattr(file, "stream", file)
    if hasattr(stream, "peek") and not stream.peek():
        file.close()  # raises OSError if the program has failed
        return io.BytesIO()
    return file


def _leave(file: Any) -> None:
    """Closes a shard, read to its end or not. A program that delivers it may be waiting for a server: it is killed."""
    if hasattr(file, "proc"):
        file.proc.kill()
    with suppress(OSError):  # of a program that delivered too little, which is noted
        file.close()
