"""Training batches and evaluation samples from files: the interface of this package to the others."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Value
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..extras import needed_for
from .csv_files import CsvSource, csv_samples
from .images import MAX_PIXELS
from .indexed import indexed_data
from .options import DataOptions, SourceOptions, StepOptions
from .processes import reading, worker_init_fn
from .samples import Images, Sample, Source, check_found, readable
from .shard_names import describe, expand_shards, is_remote, listed_shards, names_digest, not_a_source, sizes_of
from .shard_writer import DATASET_FILE, SIZES_FILE
from .shards import ShardSource, tar_samples
from .skips import Skips
from .train_data import Reader, TrainData

if TYPE_CHECKING:
    from torchvision.transforms import Resize

__all__ = [
    "DataOptions",
    "EvalSamples",
    "SourceOptions",
    "describe",
    "eval_samples",
    "load_eval_samples",
    "load_train_data",
    "train_loader",
]


def train_loader(
    train_data: str | os.PathLike,
    preprocess: Callable,
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int,
    workers: int = 1,
    seed: int = StepOptions.seed,
    *,
    cache: bool = False,
    world_size: int = 1,
    rank: int = 0,
    epoch: int = 0,
    progress: bool = True,
    **options: Any,
) -> TrainData:
    """Training batches `(images [B, C, H, W], tokens [B, L])`: indexed, from memory, or streamed.

    A CSV cell is one caption, whatever it holds, and so is the .txt, .caption or .text of a shard, as in open_clip.
    `captions` in the json of a shard's sample come before these, and one is drawn each time; `caption` comes after
    them. The same arguments give the same batches.
    CSV files and local shards are indexed: the samples of step s of an epoch, their order, captions and augmentations
    are the same for every `workers` and for all `batch_size`, `accum_freq` and `world_size` with the same product. Rank
    r has batches r * accum_freq to (r + 1) * accum_freq - 1 of every step. The images of a cache are augmented once.
    Shards by URL, and all with `dataset_resampled`, are streamed: their order also depends on `workers` and
    `world_size`.

    Args:
        train_data, batch_size, workers, seed, options: fields of `clipup.data.options.DataOptions`, which describes
            them.
        cache: its `cache_data`.
        preprocess: PIL image to tensor; must be picklable where workers are spawned.
        tokenizer: texts to tokens [N, L].
        world_size, rank: how many processes share the data, and which of them this is.
        epoch: the first epoch. Call `set_epoch` before each epoch.
        progress: shows a progress bar while shards are indexed or samples are read into memory.

    Returns:
        `dataloader` (with `num_batches`, `num_samples`), `set_epoch`, which can start an epoch of indexed data at any
        step, and `skipped`, the number of samples that could not be read, each counted once.

    Raises:
        ImportError: a package that training needs is missing.
        FileNotFoundError, ValueError: the data or an argument, by name, with how to fix it. Iterating raises ValueError
            as soon as more than `max_skipped` turned out to be unreadable.
    """
    own: dict[str, Any] = {
        "train_data": os.fspath(train_data),
        "batch_size": batch_size,
        "workers": workers,
        "seed": seed,
    }
    data = DataOptions(**own, cache_data=cache, **options)
    return load_train_data(
        data, preprocess, tokenizer, world_size=world_size, rank=rank, epoch=epoch, progress=progress
    )


def load_train_data(
    options: DataOptions,
    preprocess: Callable,
    tokenizer: Callable[[list[str]], Tensor],
    *,
    world_size: int = 1,
    rank: int = 0,
    epoch: int = 0,
    progress: bool = True,
) -> TrainData:
    """`train_loader` with its options as one object."""
    options.check()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} for world_size {world_size}, expected 0 to {world_size - 1}")
    progress = progress and rank == 0
    reader = Reader(preprocess, tokenizer, rank, world_size, Value("q", epoch), Skips(options.max_skipped))
    shards = _train_shards(options)
    if not options.cache_data and (options.dataset_resampled or any(map(is_remote, shards))):
        data = _streamed(options, shards, reader)
    else:
        data = indexed_data(options, _source(options, shards, reader, progress), reader, progress)
    data.options = options
    data.set_epoch(epoch)
    return data


def _train_shards(options: DataOptions) -> list[str]:
    """The shards of the training data; none for another format."""
    path = options.source
    if os.path.isdir(path):
        if not (Path(path) / DATASET_FILE).is_file():
            raise not_a_source("train_data", path, "train-*.tar")
        return listed_shards(path, "train", "train_data")
    is_tar = options.format_of(path, "train_data") == "webdataset"
    return expand_shards(path, "train_data", options.allow_pipe) if is_tar else []


def _source(options: DataOptions, shards: list[str], reader: Reader, progress: bool) -> Source:
    """The samples of the files, by number."""
    retries, skips = options.data_retries, reader.skips
    if not shards:
        return CsvSource(options.source, options, skips, retries)
    first = reader.rank * len(shards) // reader.world_size  # a rank finds in the cache what others have read
    return ShardSource(shards, skips, max(1, options.workers), first, retries, progress)


def _streamed(options: DataOptions, shards: list[str], reader: Reader) -> TrainData:
    with needed_for("streaming shards", "train"):
        from .streamed import streamed_data
    if not options.dataset_resampled and len(shards) < max(1, options.workers) * reader.world_size:
        raise ValueError(
            f"workers: {options.workers} in each of {reader.world_size} processes, but train_data has {len(shards)} "
            f"shards and every worker needs one: at most {len(shards) // reader.world_size} workers"
        )
    data = streamed_data(options, shards, _num_samples(shards, options.train_num_samples), reader)
    if not options.dataset_resampled:  # then every rank draws shards of its own
        data.shards = names_digest(shards)
    return data


def _num_samples(shards: list[str], given: int | None) -> int:
    """Samples per epoch: as given, else the sum of `sizes.json` beside the shards."""
    sizes = sizes_of(shards)
    if given is None and not sizes.keys() >= set(shards):
        raise ValueError(
            f"train_num_samples: not given, and no {SIZES_FILE} beside {shards[0]} gives the number of samples of "
            "these shards: pass the number of samples per epoch"
        )
    return sum(sizes[shard] for shard in shards) if given is None else given


class EvalSamples:
    """Images with all their captions, for retrieval, in the order of the files.

    Iterating gives `(image [C, H, W], captions, metadata)` per sample; `batches` gives batches. `len()` is the number
    of samples in the source, `skipped` the number of samples that were incomplete or unreadable so far; more than
    `skips` allows raise ValueError. With `strict`, for benchmarks, every unreadable image raises ValueError, naming it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Callable | None,
        skips: Skips,
        strict: bool = False,
        max_image_pixels: int = MAX_PIXELS,
        resize: Resize | None = None,
    ) -> None:
        """
        Args:
            preprocess: PIL image to tensor; None where no image is read, or the attribute is set before.
            resize: for `load_image`, which decodes and resizes faster with it, with almost the same pixels.
        """
        self.samples, self.preprocess, self.strict = samples, preprocess, strict
        self.max_image_pixels, self.resize = max_image_pixels, resize
        self.skips, self._total = skips, len(samples) + int(skips)
        self.read_at_once, self.workers = 1, 0
        """How iterating reads: images in a batch, and processes that read them."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def skipped(self) -> int:
        return int(self.skips)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], dict]]:
        for batch in self.batches(self.read_at_once, self.workers):
            yield from zip(*batch, strict=True)

    def only(self, samples: Sequence[Sample]) -> EvalSamples:
        """Some of the samples, such as those of one process of a distributed evaluation. What is skipped counts against
        all of them."""
        part = copy.copy(self)
        part.samples = samples
        return part

    def check_all(self, gather: Callable[[Any], list[Any]]) -> None:
        """Raises ValueError when all processes together skipped more than may be. Arguments as in `check_together`."""
        self.skips.check_together(self._total, self.skips.samples, gather)

    def batches(self, batch_size: int, workers: int = 0) -> Iterator[tuple[Tensor, list[list[str]], list[dict]]]:
        """Batches `(images [B, C, H, W], captions per image, metadata per image)`.

        A batch with unreadable images is smaller. Metadata is the sample's json (concept, source, group) without its
        captions, and its `key`.
        """
        assert self.preprocess is not None  # set before images are read
        loader = DataLoader(
            Images(self.samples, self.preprocess, self.max_image_pixels, self.resize),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=readable,
            worker_init_fn=worker_init_fn(),
            generator=torch.Generator(),
        )
        samples = iter(self.samples)
        with reading(loader) as batches:
            for images, reasons in batches:
                kept = []
                for reason, sample in zip(reasons, samples, strict=False):
                    if reason:
                        self._note(sample, reason)
                    else:
                        kept.append(sample)
                if kept:
                    captions = [list(sample.captions) for sample in kept]
                    yield images, captions, [dict(sample.metadata) for sample in kept]

    def _note(self, sample: Sample, reason: str) -> None:
        if self.strict:
            raise ValueError(f"cannot read the image {sample.named}: {reason}; repair or remove it")
        self.skips.note(sample.named, reason)
        self.skips.check(self._total)


def eval_samples(
    source: str | os.PathLike, preprocess: Callable | None, *, argument: str = "source", **options: Any
) -> EvalSamples:
    """Samples for retrieval, from evaluation shards or from a CSV file (rows of one image are its captions).

    Args:
        source: shards, as in `train_loader` (local files), whose .txt has a caption a line, or a CSV file.
        preprocess: PIL image to tensor; None to read no image, or to set it later as an attribute.
        argument: what messages call the source.
        options: fields of `clipup.data.options.SourceOptions`, which describes them.

    Raises FileNotFoundError or ValueError, naming `argument` or the option, when there is nothing to read.
    """
    return load_eval_samples(source, preprocess, SourceOptions(**options), argument)


def load_eval_samples(
    source: str | os.PathLike, preprocess: Callable | None, options: SourceOptions, argument: str = "source"
) -> EvalSamples:
    """`eval_samples` with its options as one object."""
    options.check()
    source = os.fspath(source)
    if os.path.isdir(source):
        raise not_a_source(argument, source, "test-*.tar")
    skips = Skips(options.max_skipped)
    if options.format_of(source, argument) == "csv":
        samples = csv_samples(source, options, skips, argument)
    else:
        samples = tar_samples(expand_shards(source, argument), skips, argument)
    check_found(len(samples), skips, source, argument)
    return EvalSamples(samples, preprocess, skips, max_image_pixels=options.max_image_pixels)
