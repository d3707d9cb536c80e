"""Training batches and evaluation samples from files: the interface of this package to the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import Value
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import check
from ..extras import needed_for
from .csv_files import CsvSource, csv_samples
from .evaluation import EvalSamples
from .formats import FORMATS
from .indexed import indexed_data
from .options import SourceOptions, StepOptions, TrainingDataOptions
from .samples import Sample, Source, check_found
from .shard_names import describe, expand_shards, is_remote, listed_shards, not_a_source
from .shard_writer import DATASET_FILE
from .shards import ShardSource, tar_samples
from .skips import Skips
from .train_data import Reader, TrainData

__all__ = [
    "EvalSamples",
    "SourceOptions",
    "describe",
    "eval_samples",
    "load_eval_samples",
    "load_train_data",
    "train_loader",
]


class Reading(NamedTuple):
    """How a format is read."""

    shards: Callable[[TrainingDataOptions], list[str]]
    """The shards of the training data, which may be streamed; none for a format without shards."""
    source: Callable[[TrainingDataOptions, list[str], Reader, bool], Source]
    """Training samples, from the options, the shards and the reader; with True a progress bar is shown."""
    samples: Callable[[str, SourceOptions, Skips, str], list[Sample]]
    """Evaluation samples of the data with this name; the last argument: the option's name in messages."""


_READINGS = {
    "csv": Reading(
        lambda options: [],
        lambda options, shards, reader, progress: CsvSource(
            options.source, options, reader.skips, options.data_retries
        ),
        csv_samples,
    ),
    "webdataset": Reading(
        lambda options: expand_shards(options.source, "train_data", options.allow_pipe),
        lambda options, shards, reader, progress: ShardSource(
            shards,
            reader.skips,
            options.workers,
            reader.rank * len(shards) // reader.world_size,  # a rank finds in the cache what others have read
            options.data_retries,
            progress,
        ),
        lambda source, options, skips, argument: tar_samples(expand_shards(source, argument), skips, argument),
    ),
}
"""By the names in ``FORMATS``."""


def train_loader(
    train_data: str | os.PathLike,
    preprocess: Callable,
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int,
    workers: int = 1,
    seed: int = StepOptions.seed,
    *,
    accum_freq: int = StepOptions.accum_freq,
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
        train_data, workers, options: fields of `clipup.data.options.TrainingDataOptions`, which describes them.
        batch_size, seed, accum_freq: those of its `StepOptions`.
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
    data = TrainingDataOptions(train_data=os.fspath(train_data), workers=workers, cache_data=cache, **options)
    step = StepOptions(batch_size=batch_size, accum_freq=accum_freq, seed=seed)
    return load_train_data(
        data, step, preprocess, tokenizer, world_size=world_size, rank=rank, epoch=epoch, progress=progress
    )


def load_train_data(
    options: TrainingDataOptions,
    step: StepOptions,
    preprocess: Callable,
    tokenizer: Callable[[list[str]], Tensor],
    *,
    world_size: int = 1,
    rank: int = 0,
    epoch: int = 0,
    progress: bool = True,
) -> TrainData:
    """`train_loader` with its options in groups."""
    options.check()
    step.check()
    check("rank", rank, 0 <= rank < world_size, f"0 to {world_size - 1} for world_size {world_size}")
    progress = progress and rank == 0
    reader = Reader(preprocess, tokenizer, rank, world_size, Value("q", epoch), Skips(options.max_skipped), step)
    form, shards = _format_and_shards(options)
    if not options.cache_data and (options.dataset_resampled or any(map(is_remote, shards))):
        check("dataset_resampled", True, bool(shards), f"False on {FORMATS[form].noun}")
        with needed_for("streaming shards", "train"):
            from .streamed import streamed_data
        data = streamed_data(options, shards, reader)
    else:
        data = indexed_data(options, _READINGS[form].source(options, shards, reader, progress), reader, progress)
    data.set_epoch(epoch)
    return data


def _format_and_shards(options: TrainingDataOptions) -> tuple[str, list[str]]:
    """Format name of the training data, and its shards (empty for a format without shards)."""
    if not os.path.isdir(options.source):
        form = options.format_of(options.source, "train_data")
        return form, _READINGS[form].shards(options)
    if not (Path(options.source) / DATASET_FILE).is_file():
        raise not_a_source("train_data", options.source, "train-*.tar")
    return "webdataset", listed_shards(options.source, "train", "train_data")


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
    samples = _READINGS[options.format_of(source, argument)].samples(source, options, skips, argument)
    check_found(len(samples), skips, source, argument)
    return EvalSamples(samples, preprocess, skips, max_image_pixels=options.max_image_pixels)
