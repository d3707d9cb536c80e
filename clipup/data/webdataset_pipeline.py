"""Training data read while training: open_clip's own WebDataset and CSV loaders, with what they lack put in.

What is changed, and why:
- one of several captions is drawn each time a sample is read (`DrawCaption`);
- what cannot be read is skipped and counted. open_clip only logs it, does not notice the loss of what lies behind a
  damaged tar header, and stops at an unreadable image of a CSV file;
- images and texts are decoded, and nothing else: webdataset unpickles what lies beside them under some names;
- a run with the same seed reads the same batches (webdataset seeds its buffer of samples with the clock);
- a worker whose shards hold less than a batch says so instead of searching for ever.
"""

from __future__ import annotations

import hashlib
import random
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import webdataset
from open_clip_train import data as open_clip_data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, default_collate, get_worker_info

from .csv_rows import CsvFormat, Rows, readable_rows
from .images import load_image
from .processes import worker_init_fn
from .shard_names import open_shard, sizes_of
from .skips import Notes, Report, Skips
from .tars import IMAGE_EXTENSIONS, TarSample, complete, lines, read_samples


@dataclass
class TrainData(open_clip_data.DataInfo):
    """open_clip's DataInfo; knows which samples were skipped, and its batches depend on seed and epoch alone."""

    skips: Skips | None = None
    generator: torch.Generator | None = None
    seed: int = 0

    @property
    def skipped(self) -> int:
        """Samples that could not be read so far, each once."""
        return int(self.skips)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.generator is not None:
            self.generator.manual_seed(mixed_seed(self.seed, epoch))


class CountedBatches:
    """A loader's batches, without the reports that travel with them: what those name is counted in `skips`.

    Stops with ValueError when more than the share that may be skipped cannot be read: of what this process met in a
    pass, or should meet, if that is more.
    """

    def __init__(
        self, loader: Any, skips: Skips, num_samples: int, num_batches: int, total: int, world_size: int
    ) -> None:
        """`total`: samples of a pass of all processes, those that `skips` holds already included."""
        self.loader, self.skips = loader, skips
        self.num_samples, self.num_batches, self.world_size = num_samples, num_batches, world_size
        self._expected, self._left_out = total / world_size, int(skips) / world_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        skipped: dict[str, int] = {}
        met = self._left_out
        for images, texts, report in self.loader:
            met += report.met
            if report.skipped:
                self.skips.add(report.skipped)
                skipped |= {name: samples for name, _, samples in report.skipped}
                count = self._left_out + sum(skipped.values())
                self.skips.check(max(self._expected, met), count, self.world_size)
            yield images, texts


def mixed_seed(*parts: int) -> int:
    """One seed out of several numbers; other numbers give an unrelated one."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class DrawCaption:
    """A tokenizer that draws one line of a text that holds several captions.

    Draws are the same for the same seed, epoch, rank and worker. `epoch` is open_clip's SharedEpoch.
    """

    def __init__(self, tokenizer: Callable, seed: int, rank: int) -> None:
        self.tokenizer, self.seed, self.rank = tokenizer, seed, rank
        self.epoch: open_clip_data.SharedEpoch | None = None
        self._state: tuple[int, int] | None = None
        self._random = random.Random(0)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens [N, L] of one caption of each text."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.tokenizer([self._draw(text) for text in texts])

    def _draw(self, text: str) -> str:
        worker = get_worker_info()
        state = (self.epoch.get_value() if self.epoch else 0, worker.id if worker else 0)
        if state != self._state:
            self._state = state
            self._random = random.Random(mixed_seed(self.seed, self.rank, *state))
        return self._random.choice(lines(text))


def webdataset_data(
    args: Namespace, shards: list[str], preprocess: Callable, draw: DrawCaption, skips: Skips, epoch: int
) -> TrainData:
    """open_clip's `get_wds_dataset` for training on `shards`, its stages replaced where the module says so."""
    args = Namespace(**vars(args), train_data=shards, train_data_upsampling_factors=None)
    info = open_clip_data.get_wds_dataset(args, preprocess, is_train=True, epoch=epoch, tokenizer=draw)
    draw.epoch = info.shared_epoch
    loader = info.dataloader.pipeline[0]
    loader.generator = torch.Generator()
    loader.worker_init_fn = worker_init_fn()
    notes = Notes()
    usual = max(1, args.train_num_samples // len(shards))
    replaced = {
        webdataset.split_by_node: SplitByRank(args.rank, args.world_size),
        open_clip_data.tarfile_to_samples_nothrow: ReadShards(notes, sizes_of(shards), usual),
        webdataset.shuffle: open_clip_data.detshuffle2(
            bufsize=open_clip_data._SAMPLE_SHUFFLE_SIZE,
            initial=open_clip_data._SAMPLE_SHUFFLE_INITIAL,
            seed=args.seed,
            epoch=info.shared_epoch,
        ),
        webdataset.select: Complete(notes),
        webdataset.decode: Decode(notes, args.max_image_pixels),
    }
    if args.dataset_resampled:
        del replaced[webdataset.split_by_node]  # every worker draws from all shards
    stages = loader.dataset.pipeline
    for old, new in replaced.items():
        stages[_position(stages, old)] = new
    stages.append(Batches(notes, args.batch_size))
    batches = CountedBatches(
        info.dataloader,
        skips,
        info.dataloader.num_samples,
        info.dataloader.num_batches,
        total=args.train_num_samples,
        world_size=args.world_size,
    )
    return TrainData(batches, shared_epoch=info.shared_epoch, skips=skips, generator=loader.generator, seed=args.seed)


def _position(stages: list, wanted: object) -> int:
    """Where a stage stands in a pipeline: a function itself, or the filter made by one of webdataset's functions."""
    function = getattr(wanted, "f", wanted)
    found = [i for i, stage in enumerate(stages) if stage is function or getattr(stage, "f", None) is function]
    if len(found) != 1:
        name = getattr(function, "__name__", function)
        raise RuntimeError(
            f"open_clip's training pipeline has {len(found)} stages {name}, expected 1: install open_clip_torch 3.3"
        )
    return found[0]


class SplitByRank:
    """The shards of one process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __call__(self, shards: Iterable[dict]) -> Iterator[dict]:
        return islice(iter(shards), self.rank, None, self.world_size)


class ReadShards:
    """Samples of shards, complete or not. What is damaged is passed over and noted."""

    def __init__(self, notes: Notes, sizes: Mapping[str, int], usual: int) -> None:
        """`sizes`: samples a shard, where that is known; `usual`: where it is not."""
        self.notes, self.sizes, self.usual = notes, sizes, usual

    def __call__(self, shards: Iterable[dict]) -> Iterator[TarSample]:
        for shard in shards:
            name = shard["url"]
            try:
                file = open_shard(name)
            except Exception as error:  # whatever the opener of this kind of URL raises
                self._lose(name, f"it cannot be opened ({error})", self.sizes.get(name, self.usual))
                continue
            try:
                for sample in read_samples(
                    file, name, self._lose, images=True, expected=self.sizes.get(name), usual=self.usual
                ):
                    self.notes.met += 1
                    yield sample
            finally:
                file.close()

    def _lose(self, name: str, reason: object, samples: int) -> None:
        self.notes.met += samples
        self.notes.add(name, reason, samples)


class Complete:
    """The samples that have an image and a caption, as webdataset's dictionaries; the others are noted."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def __call__(self, samples: Iterable[TarSample]) -> Iterator[dict]:
        for sample in samples:
            try:
                captions, _ = complete(sample)
            except ValueError as reason:
                self.notes.add(sample.named, reason)
                continue
            content = {sample.image: sample.content[sample.image], "txt": "\n".join(captions)}
            yield {"__key__": sample.key, "__url__": sample.shard, **content}


class Decode:
    """Samples with their image decoded; what cannot be decoded is noted."""

    def __init__(self, notes: Notes, max_pixels: int) -> None:
        self.notes, self.max_pixels = notes, max_pixels

    def __call__(self, samples: Iterable[dict]) -> Iterator[dict]:
        for sample in samples:
            extension = next(key for key in sample if key in IMAGE_EXTENSIONS)
            try:
                image = load_image(sample[extension], self.max_pixels)
            except Exception as error:  # PIL has no common class for what a broken file may raise
                self.notes.add(f"{sample['__key__']} in {sample['__url__']}", f"{type(error).__name__}: {error}")
                continue
            self.notes.read()
            yield {**sample, extension: image}


class Batches:
    """Batches with a report of what was met on the way to them.

    ValueError when a pass through a worker's shards gives none: the next would not either.
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


class BatchRows(NamedTuple):
    """The rows of one batch of a CSV file, and those that take the place of what cannot be read, in their order."""

    first: list[int]
    spare: list[int]


class RowsInTurn:
    """Batches of a sampler's rows, each with the rows behind it as spare ones.

    What a batch holds follows from the order and the files alone: neither from what was met before nor from which
    worker met it. So a resumed run has the batches of the uninterrupted one, and no batch has a row twice.
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


class CsvRows(Dataset):
    """Batches of a CSV file's rows."""

    def __init__(self, rows: Rows, preprocess: Callable, draw: DrawCaption, max_pixels: int) -> None:
        self.rows, self.preprocess, self.draw, self.max_pixels = rows, preprocess, draw, max_pixels

    def __len__(self) -> int:
        return len(self.rows.images)

    def __getitems__(self, of_batch: BatchRows) -> tuple[Tensor, Tensor, Report]:
        notes = Notes()
        batch = []
        for row in (*of_batch.first, *of_batch.spare):
            notes.met += 1
            try:
                image = load_image(self.rows.images[row], self.max_pixels)
            except Exception as error:  # PIL has no common class for what a broken file may raise
                notes.add(self.rows.names[row], f"{type(error).__name__}: {error}")
                continue
            batch.append((self.preprocess(image), self.draw(self.rows.captions[row])[0]))
            if len(batch) == len(of_batch.first):
                return (*default_collate(batch), notes.report())
        tried = len(of_batch.first) + len(of_batch.spare)
        raise ValueError(
            f"train_data: only {len(batch)} of {tried} rows can be read, too few for a batch of {len(of_batch.first)}"
            f"{notes.first()}"
        )


def csv_data(
    args: Namespace, path: str, form: CsvFormat, preprocess: Callable, draw: DrawCaption, skips: Skips, epoch: int
) -> TrainData:
    """What open_clip's `get_csv_dataset` gives for training, over `CsvRows`."""
    readable = readable_rows(path, form, skips, "train_data")
    total = len(readable.images) + int(skips)
    skips.check(total)
    if not readable.images:
        raise ValueError(f"train_data: {path} has no rows that can be read ({int(skips)} skipped)")
    dataset = CsvRows(readable, preprocess, draw, args.max_image_pixels)
    draw.epoch = open_clip_data.SharedEpoch(epoch)
    generator = torch.Generator()
    sampler = None
    if args.distributed:
        sampler = DistributedSampler(dataset, num_replicas=args.world_size, rank=args.rank, seed=args.seed)
    rows = sampler or RandomSampler(dataset, generator=generator)
    batch_rows = RowsInTurn(rows, args.batch_size, _spare(args.batch_size, skips.max_skipped, len(rows)))
    if len(batch_rows) == 0:
        raise ValueError(
            f"batch_size: got {args.batch_size}, but {path} has {len(dataset)} readable rows, {len(rows)} a process: "
            "use a smaller batch"
        )
    loader = DataLoader(
        dataset,
        batch_sampler=batch_rows,
        collate_fn=_as_it_is,
        num_workers=args.workers,
        worker_init_fn=worker_init_fn(),
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )
    batches = CountedBatches(loader, skips, len(dataset), len(batch_rows), total, args.world_size)
    return TrainData(batches, sampler, draw.epoch, skips=skips, generator=generator, seed=args.seed)


def _spare(batch_size: int, max_skipped: float, rows: int) -> int:
    """Spare rows of a batch: many times what bad luck needs while no more than the share is unreadable."""
    return rows if max_skipped >= 1 else min(rows, round((batch_size + 64) / (1 - max_skipped)))


def _as_it_is(batch: Any) -> Any:
    return batch
