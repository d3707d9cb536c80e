"""Training data in memory: every sample is read and preprocessed once, then batches are gathered by index.

For small data sets of small images, where decoding would take a core away from training (the pictograms, 12,376 images
of 32 pixels, take 152 MB). Images are kept as float32, exactly as `preprocess` returned them, so cached and streamed
runs see the same images; a random augmentation in `preprocess` is drawn only once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..progress import Progress
from .options import DataOptions
from .processes import reading
from .sample_index import Images, Record, check_records, csv_records, tar_records
from .train_data import Reader, TrainData, mixed_seed

_READ_BATCH = 64
_TOKENIZE_BATCH = 4096


def cached_data(options: DataOptions, shards: Sequence[str], reader: Reader, progress: bool) -> TrainData:
    """Training data read into memory, from shards or, without any, from a CSV file."""
    source, skips = options.train_data, reader.skips
    if shards:
        records = tar_records(shards, skips, "train_data")
    else:
        records = csv_records(source, options.csv_format, skips, "train_data", merge_images=False)
    check_records(records, skips, source, "train_data")
    return TrainData(CachedLoader(records, options, reader, progress and reader.rank == 0), reader.epoch, skips)


class CachedLoader:
    """Full batches `(images [B, C, H, W] float32, tokens [B, L] int64)`, shuffled, from memory.

    One caption per image is drawn each time. Order and captions depend on seed, epoch and rank alone. Each process
    holds every `world_size`-th record; all processes serve the same number of batches.

    Raises ValueError when there is less than one batch, when more samples are unreadable than may be skipped, or when
    the images would take more than half of the memory.
    """

    def __init__(self, records: Sequence[Record], options: DataOptions, reader: Reader, progress: bool) -> None:
        batch_size, rank, world_size, skips = options.batch_size, reader.rank, reader.world_size, reader.skips
        self.batch_size, self.seed, self.epoch, self.rank = batch_size, options.seed, reader.epoch, rank
        self.num_batches = len(records) // world_size // batch_size
        if self.num_batches == 0:
            raise ValueError(
                f"batch_size: got {batch_size} for {world_size} processes, but there are {len(records)} samples: "
                "use a smaller batch"
            )
        self.num_samples = self.num_batches * batch_size * world_size
        mine = records[rank::world_size]
        skipped_before = int(skips)
        self.images, readable = _read(mine, options, reader, progress)
        unreadable = skipped_before / world_size + len(mine) - len(self.images)
        skips.check((len(records) + skipped_before) / world_size, unreadable, world_size)
        self.pass_counts = (len(records) + skipped_before) / world_size, dict(skips.samples)
        if len(self.images) < batch_size:
            raise ValueError(
                f"batch_size: got {batch_size}, but only {len(self.images)} images of this process can be read: use a "
                "smaller batch"
            )
        captions = [record.captions for record, good in zip(mine, readable, strict=True) if good]
        # the index of an image's first caption; images with equal captions share them
        start: dict[tuple[str, ...], int] = {}
        texts: list[str] = []
        for of_image in captions:
            if of_image not in start:
                start[of_image] = len(texts)
                texts += of_image
        step = _TOKENIZE_BATCH
        self.tokens = torch.cat([reader.tokenizer(texts[i : i + step]) for i in range(0, len(texts), step)])
        self.first_caption = torch.tensor([start[of_image] for of_image in captions])
        self.caption_count = torch.tensor([len(of_image) for of_image in captions])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch(), self.rank))
        count, wanted = len(self.images), self.num_batches * self.batch_size
        rounds = -(-wanted // count)  # more than one only if other processes could read more samples
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:wanted]
        draw = (torch.rand(wanted, generator=generator, dtype=torch.float64) * self.caption_count[order]).long()
        captions = self.first_caption[order] + draw
        for images, texts in zip(order.split(self.batch_size), captions.split(self.batch_size), strict=True):
            yield self.images[images], self.tokens[texts]


def _read(records: Sequence[Record], options: DataOptions, reader: Reader, progress: bool) -> tuple[Tensor, list[bool]]:
    """All readable images, stacked, and for each record whether it was readable."""
    loader = DataLoader(
        Images(records, reader.preprocess, options.max_image_pixels),
        batch_size=_READ_BATCH,
        num_workers=options.workers,
        collate_fn=_keep_readable,
        generator=torch.Generator(),
    )
    images: Tensor | None = None
    readable: list[bool] = []
    filled = 0
    shown = Progress("reading images into memory", "images", len(records), show=progress)
    with shown as bar, reading(loader) as batches:
        for batch, reasons in batches:
            for reason in reasons:
                if reason:
                    reader.skips.note(records[len(readable)].named, reason)
                readable.append(not reason)
            if batch is not None:
                if images is None:
                    _check_memory(len(records), batch[0])
                    images = torch.empty(len(records), *batch.shape[1:])
                images[filled : filled + len(batch)] = batch
                filled += len(batch)
            bar.update(len(reasons))
    if images is None:
        raise ValueError(f"train_data: none of the {len(records)} images can be read; see the log above")
    return images[:filled], readable


def _keep_readable(items: list[Tensor | str]) -> tuple[Tensor | None, list[str]]:
    good = [item for item in items if isinstance(item, Tensor)]
    return torch.stack(good) if good else None, ["" if isinstance(item, Tensor) else item for item in items]


def _check_memory(count: int, image: Tensor) -> None:
    needed = count * image.numel() * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        shape = " x ".join(map(str, image.shape))
        raise ValueError(
            f"cache: {count} images of {shape} take {needed / 1e9:.1f} GB, more than half of the "
            f"{memory / 1e9:.1f} GB of this machine: train without cache"
        )
