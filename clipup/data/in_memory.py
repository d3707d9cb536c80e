"""Training data in memory: every sample is read and preprocessed once, then batches are gathered by index.

For small data sets and small images, where decoding would take a core away from training (the pictograms: 12,376
images of 32 pixels are 152 MB). Images are kept as float32, exactly as `preprocess` made them, so a cached run sees
what a streamed run sees; a random augmentation in `preprocess` is drawn once and stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..progress import Progress
from .images import MAX_PIXELS
from .sample_index import Images, Record
from .skips import Skips
from .webdataset_pipeline import mixed_seed

_READ_BATCH = 64
_AT_ONCE = 4096  # texts to tokenize


class CachedLoader:
    """Full batches `(images [B, C, H, W] float32, tokens [B, L] int64)`, shuffled, from memory.

    A caption of each image is drawn each time. Order and captions depend on seed, epoch and rank alone. Each process
    holds every `world_size`-th record; all serve the same number of batches. `num_samples` and `num_batches` are as
    in open_clip's loaders.

    Raises ValueError when there is less than one batch, when more cannot be read than may be skipped, or when the
    images would take more than half of the memory.
    """

    def __init__(
        self,
        records: Sequence[Record],
        preprocess: Callable,
        tokenizer: Callable[[list[str]], Tensor],
        batch_size: int,
        *,
        workers: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int,
        world_size: int,
        skips: Skips,
        progress: bool,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.batch_size, self.seed, self.epoch, self.rank = batch_size, seed, epoch, rank
        self.num_batches = len(records) // world_size // batch_size
        if self.num_batches == 0:
            raise ValueError(
                f"batch_size: got {batch_size} for {world_size} processes, but there are {len(records)} samples: "
                "use a smaller batch"
            )
        self.num_samples = self.num_batches * batch_size * world_size
        mine = records[rank::world_size]
        left_out = int(skips)
        self.images, readable = _read(mine, preprocess, workers, skips, progress, max_pixels)
        unreadable = left_out / world_size + len(mine) - len(self.images)
        skips.check((len(records) + left_out) / world_size, unreadable, world_size)
        if len(self.images) < batch_size:
            raise ValueError(
                f"batch_size: got {batch_size}, but only {len(self.images)} images of this process can be read: use a "
                "smaller batch"
            )
        captions = [record.captions for record, good in zip(mine, readable, strict=True) if good]
        start: dict[tuple[str, ...], int] = {}  # where an image's captions begin; renderings of a concept share them
        texts: list[str] = []
        for of_image in captions:
            if of_image not in start:
                start[of_image] = len(texts)
                texts += of_image
        self.tokens = torch.cat([tokenizer(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)])
        self.first_caption = torch.tensor([start[of_image] for of_image in captions])
        self.caption_count = torch.tensor([len(of_image) for of_image in captions])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch(), self.rank))
        count, wanted = len(self.images), self.num_batches * self.batch_size
        rounds = -(-wanted // count)  # more than one only where this process could read fewer samples than the others
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:wanted]
        draw = (torch.rand(wanted, generator=generator, dtype=torch.float64) * self.caption_count[order]).long()
        captions = self.first_caption[order] + draw
        for images, texts in zip(order.split(self.batch_size), captions.split(self.batch_size), strict=True):
            yield self.images[images], self.tokens[texts]


def _read(
    records: Sequence[Record], preprocess: Callable, workers: int, skips: Skips, progress: bool, max_pixels: int
) -> tuple[Tensor, list[bool]]:
    """All readable images, stacked, and which records they are of."""
    dataset = Images(records, preprocess, max_pixels)
    loader = DataLoader(
        dataset, batch_size=_READ_BATCH, num_workers=workers, collate_fn=_keep_readable, generator=torch.Generator()
    )
    images: Tensor | None = None
    readable: list[bool] = []
    filled = 0
    with Progress("reading images into memory", "images", len(records), show=progress) as bar:
        for batch, reasons in loader:
            for reason in reasons:
                if reason:
                    skips.note(records[len(readable)].named, reason)
                readable.append(not reason)
            if batch is not None:
                if images is None:
                    _check_memory(len(records), batch[0])
                    images = torch.empty(len(records), *batch.shape[1:])
                images[filled : filled + len(batch)] = batch
                filled += len(batch)
            bar.update(len(reasons))
    if images is None:
        raise ValueError(f"train_data: none of the {len(records)} images can be read, the reasons are logged above")
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
            f"{memory / 1e9:.1f} GB of this machine: read them while training (without cache)"
        )
