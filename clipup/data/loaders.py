"""Training batches and evaluation samples. `train_loader`, `eval_samples` and `describe` are all that others need."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..extras import needed_for
from .csv_rows import CsvFormat, check_columns
from .directories import not_a_source
from .images import MAX_PIXELS, check_max_pixels
from .sample_index import Images, Record, csv_records, tar_records
from .shard_names import describe, expand_shards, is_remote, listed_shards, sizes_of
from .shard_writer import DATASET_FILE, SIZES_FILE
from .skips import MAX_SKIPPED, Skips

if TYPE_CHECKING:
    from .shares import Share
    from .webdataset_pipeline import TrainData

__all__ = ["EvalSamples", "describe", "eval_samples", "train_loader"]

_CSV_EXTENSIONS = (".csv", ".tsv")


def train_loader(
    train_data: str | os.PathLike,
    preprocess: Callable,
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int,
    workers: int = 1,
    seed: int = 0,
    *,
    dataset_type: str = "auto",
    csv_separator: str = "\t",
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
    train_num_samples: int | None = None,
    dataset_resampled: bool = False,
    world_size: int = 1,
    rank: int = 0,
    distributed: bool | None = None,
    cache: bool = False,
    epoch: int = 0,
    progress: bool = True,
    max_skipped: float = MAX_SKIPPED,
    max_image_pixels: int = MAX_PIXELS,
    allow_pipe: bool = False,
) -> TrainData:
    """Training batches `(images [B, C, H, W], tokens [B, L])` by open_clip's own loaders, or from memory.

    A text of several lines holds several captions; one is drawn each time. The same arguments give the same batches.

    Args:
        train_data: shards (a path, DIR/train-*.tar, DIR/train-{000000..000024}.tar, several joined by "::"), a CSV
            file, or a directory that `clipup data` wrote (its training shards).
        preprocess: PIL image to tensor; must pickle where workers are spawned.
        tokenizer: texts to tokens [N, L].
        batch_size: samples a batch and process.
        workers: processes that read (0: this one); with `cache` they only fill the memory.
        dataset_type: "webdataset", "csv", or "auto" (by the file's extension).
        train_num_samples: samples an epoch; needed where shards have no `sizes.json` or `__len__` beside them.
        dataset_resampled: draws shards with replacement.
        distributed: whether several processes share the data; default: world_size > 1.
        cache: keeps preprocessed images and captions in memory; for small data sets (see `clipup.data.in_memory`).
        epoch: where to begin; then `set_epoch` before every epoch, as in open_clip.
        max_skipped: share of the samples that may be unreadable. They are left out, and each is named in the log once.
        max_image_pixels: an image of more is not decoded, and counts as unreadable.
        allow_pipe: lets `pipe:COMMAND` in `train_data` run its command in a shell.

    Returns:
        open_clip's DataInfo: `dataloader` (with `num_batches`, `num_samples`) and `set_epoch`; besides, `skipped`
        counts what could not be read, each sample once.

    Raises:
        ImportError: open_clip's training requirements are missing.
        FileNotFoundError, ValueError: the data or an argument, by name, with what to do. The batches raise ValueError
            too, as soon as more than `max_skipped` turned out to be unreadable.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected 0 (read in this process) or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} for world_size {world_size}, expected 0 to {world_size - 1}")
    check_max_pixels(max_image_pixels)
    skips = Skips(max_skipped)
    webdataset_pipeline = _webdataset_pipeline()
    args = Namespace(
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        train_num_samples=train_num_samples,
        dataset_resampled=dataset_resampled,
        world_size=world_size,
        rank=rank,
        distributed=world_size > 1 if distributed is None else distributed,
        max_image_pixels=max_image_pixels,
    )
    source = os.fspath(train_data)
    form = CsvFormat(csv_separator, csv_img_key, csv_caption_key)
    shards: list[str] = []
    if os.path.isdir(source):
        if not (Path(source) / DATASET_FILE).is_file():
            raise not_a_source("train_data", source, "train-*.tar")
        shards = listed_shards(source, "train", "train_data")
    elif _kind(source, dataset_type, "train_data") == "webdataset":
        shards = expand_shards(source, "train_data", allow_pipe)
    else:
        check_columns(source, form, "train_data")
    if cache:
        data = _cached(webdataset_pipeline, args, source, shards, form, preprocess, tokenizer, skips, epoch, progress)
    elif not shards:
        draw = webdataset_pipeline.DrawCaption(tokenizer, seed, rank)
        data = webdataset_pipeline.csv_data(args, source, form, preprocess, draw, skips, epoch)
    else:
        if not dataset_resampled and len(shards) < max(1, workers) * world_size:
            raise ValueError(
                f"workers: {workers} in each of {world_size} processes, but train_data has {len(shards)} shards and "
                f"every worker needs one: at most {len(shards) // world_size} workers, or cache the data"
            )
        args.train_num_samples = _num_samples(shards, train_num_samples)
        draw = webdataset_pipeline.DrawCaption(tokenizer, seed, rank)
        data = webdataset_pipeline.webdataset_data(args, shards, preprocess, draw, skips, epoch)
    data.set_epoch(epoch)
    return data


class EvalSamples:
    """Images with all their captions, for retrieval, in the order of the files.

    Iterating gives `(image [C, H, W], captions, metadata)` a sample; `batches` gives many at once. `len()` counts the
    samples of the source, `skipped` those of them (and incomplete ones) that could not be read so far; ValueError when
    there are more than `skips` allows. With `strict` an image that cannot be read raises ValueError, naming it: of a
    benchmark nothing may be left out.
    """

    def __init__(
        self,
        records: Sequence[Record],
        preprocess: Callable,
        skips: Skips,
        strict: bool = False,
        max_image_pixels: int = MAX_PIXELS,
    ) -> None:
        self.records, self.preprocess, self.strict = records, preprocess, strict
        self.max_image_pixels = max_image_pixels
        self._skips, self._total = skips, len(records) + int(skips)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def skipped(self) -> int:
        return int(self._skips)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], dict]]:
        for record, image in zip(self.records, self._images(), strict=True):
            if isinstance(image, Tensor):
                yield image, list(record.captions), dict(record.metadata)
            else:
                self._note(record, image)

    def part(self, share: Share, batch_size: int) -> EvalSamples:
        """The samples of one of several processes that evaluate together."""
        mine = share.part(self.records, batch_size)
        return EvalSamples(mine, self.preprocess, self._skips, self.strict, self.max_image_pixels)

    def batches(self, batch_size: int, workers: int = 0) -> Iterator[tuple[Tensor, list[list[str]], list[dict]]]:
        """`(images [B, C, H, W], captions of each, metadata of each)`.

        A batch is smaller where an image is unreadable. Metadata is the sample's json (concept, source, group)
        without its captions, and its `key`.
        """
        loader = DataLoader(
            self._images(),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
        records = iter(self.records)
        for items in loader:
            kept = []
            for item, record in zip(items, records, strict=False):
                if isinstance(item, Tensor):
                    kept.append((item, record))
                else:
                    self._note(record, item)
            if kept:
                images = torch.stack([image for image, _ in kept])
                captions = [list(record.captions) for _, record in kept]
                yield images, captions, [dict(record.metadata) for _, record in kept]

    def _images(self) -> Images:
        return Images(self.records, self.preprocess, self.max_image_pixels)

    def _note(self, record: Record, reason: str) -> None:
        if self.strict:
            raise ValueError(f"cannot read the image {record.named}: {reason}; repair or remove it")
        self._skips.note(record.named, reason)
        self._skips.check(self._total)


def eval_samples(
    source: str | os.PathLike,
    preprocess: Callable,
    *,
    dataset_type: str = "auto",
    csv_separator: str = "\t",
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
    max_skipped: float = MAX_SKIPPED,
    max_image_pixels: int = MAX_PIXELS,
    argument: str = "source",
) -> EvalSamples:
    """Samples for retrieval from evaluation shards or from a CSV file (rows of one image are its captions).

    Args:
        source: shards, as in `train_loader` (on this machine), or a CSV file.
        preprocess: PIL image to tensor.
        max_skipped, max_image_pixels: as in `train_loader`.
        argument: what the source is called in messages.

    Raises FileNotFoundError or ValueError, naming `argument` or the option, when there is nothing to be read.
    """
    if os.path.isdir(source):
        raise not_a_source(argument, source, "test-*.tar")
    check_max_pixels(max_image_pixels)
    skips = Skips(max_skipped)
    kind = _kind(source, dataset_type, argument)
    if kind == "csv":
        form = CsvFormat(csv_separator, csv_img_key, csv_caption_key)
        records = csv_records(os.fspath(source), form, skips, argument, one_an_image=True)
    else:
        records = tar_records(expand_shards(source, argument), skips, argument)
    if not records:
        raise ValueError(f"{argument}: {source} holds no sample with an image and a caption ({int(skips)} skipped)")
    skips.check(len(records) + int(skips))
    return EvalSamples(records, preprocess, skips, max_image_pixels=max_image_pixels)


def _cached(
    webdataset_pipeline: Any, args: Namespace, source: str, shards: list[str], form: CsvFormat, preprocess: Callable,
    tokenizer: Callable, skips: Skips, epoch: int, progress: bool,
) -> TrainData:  # fmt: skip
    from .in_memory import CachedLoader

    if args.dataset_resampled or args.train_num_samples is not None:
        name = "dataset_resampled" if args.dataset_resampled else "train_num_samples"
        raise ValueError(f"{name}: has no meaning with cache, which serves every sample once an epoch: leave one out")
    if shards:
        records = tar_records(shards, skips, "train_data")
    else:
        records = csv_records(source, form, skips, "train_data", one_an_image=False)
    if not records:
        raise ValueError(f"train_data: {source} holds no sample with an image and a caption ({int(skips)} skipped)")
    skips.check(len(records) + int(skips))
    shared_epoch = webdataset_pipeline.open_clip_data.SharedEpoch(epoch)
    loader = CachedLoader(
        records,
        preprocess,
        tokenizer,
        args.batch_size,
        workers=args.workers,
        seed=args.seed,
        epoch=shared_epoch.get_value,
        rank=args.rank,
        world_size=args.world_size,
        skips=skips,
        progress=progress and args.rank == 0,
        max_pixels=args.max_image_pixels,
    )
    return webdataset_pipeline.TrainData(loader, shared_epoch=shared_epoch, skips=skips, seed=args.seed)


def _kind(source: str | os.PathLike, dataset_type: str, argument: str) -> str:
    if dataset_type in ("webdataset", "csv"):
        return dataset_type
    if dataset_type != "auto":
        raise ValueError(f"dataset_type: got {dataset_type!r}, expected 'auto', 'webdataset' or 'csv'")
    name = os.fspath(source)
    if name.endswith(_CSV_EXTENSIONS):
        return "csv"
    if ".tar" in os.path.basename(name):
        return "webdataset"
    raise ValueError(
        f"{argument}: cannot tell from its name what {name!r} is, expected .tar, .csv or .tsv: name the dataset_type"
    )


def _num_samples(shards: list[str], given: int | None) -> int:
    """Samples an epoch: as given, else the sum of `sizes.json` beside the shards, else `__len__` beside the first."""
    total = _from_sizes(shards) if given is None else given
    if total is None:
        raise ValueError(
            f"train_num_samples: not given, and neither {SIZES_FILE} nor __len__ beside {shards[0]} says how many "
            "samples there are: name the number of samples an epoch"
        )
    if total < 1:
        raise ValueError(f"train_data: got {total} samples, the data set is empty")
    return total


def _from_sizes(shards: list[str]) -> int | None:
    sizes = sizes_of(shards)
    missing = [shard for shard in shards if shard not in sizes]
    if not missing:
        return sum(sizes.values())
    if sizes:
        directory, name = os.path.split(missing[0])
        raise ValueError(
            f"train_data: {os.path.join(directory, SIZES_FILE)} does not list {name}: give the number of samples an "
            "epoch as train_num_samples"
        )
    length = Path(shards[0]).parent / "__len__"
    if is_remote(shards[0]) or not length.is_file():
        return None
    try:
        return int(length.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{length} holds no number of samples: {error}") from error


def _webdataset_pipeline() -> Any:
    with needed_for("reading training data", "train"):
        from . import webdataset_pipeline
    return webdataset_pipeline
