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
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import webdataset
from open_clip_train import data as open_clip_data
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, get_worker_info
from webdataset.gopen import gopen

from clipup.data.samples import IMAGE_EXTENSIONS, Skips, lines, load_image


@dataclass
class TrainData(open_clip_data.DataInfo):
    """open_clip's DataInfo; knows how many samples were skipped, and its batches depend on seed and epoch alone."""

    skips: Skips | None = None
    generator: torch.Generator | None = None
    seed: int = 0

    @property
    def skipped(self) -> int:
        """Samples that could not be read so far; what is unreadable in every epoch counts in every epoch."""
        return int(self.skips)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.generator is not None:
            self.generator.manual_seed(mixed_seed(self.seed, epoch))


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
        return self._random.choice(lines(text) or [""])


def webdataset_data(
    args: Namespace, shards: list[str], preprocess: Callable, draw: DrawCaption, skips: Skips, epoch: int
) -> TrainData:
    """open_clip's `get_wds_dataset` for training on `shards`, its stages replaced where the module says so."""
    args = Namespace(**vars(args), train_data=shards, train_data_upsampling_factors=None)
    info = open_clip_data.get_wds_dataset(args, preprocess, is_train=True, epoch=epoch, tokenizer=draw)
    draw.epoch = info.shared_epoch
    loader = info.dataloader.pipeline[0]
    loader.generator = torch.Generator()
    replaced = {
        webdataset.split_by_node: SplitByRank(args.rank, args.world_size),
        open_clip_data.tarfile_to_samples_nothrow: ReadShards(skips),
        webdataset.shuffle: open_clip_data.detshuffle2(
            bufsize=open_clip_data._SAMPLE_SHUFFLE_SIZE,
            initial=open_clip_data._SAMPLE_SHUFFLE_INITIAL,
            seed=args.seed,
            epoch=info.shared_epoch,
        ),
        webdataset.select: webdataset.select(Complete(skips)),
        webdataset.decode: webdataset.decode("pilrgb", handler=SkipSample(skips), only=[*IMAGE_EXTENSIONS, "txt"]),
    }
    if args.dataset_resampled:
        del replaced[webdataset.split_by_node]  # every worker draws from all shards
    stages = loader.dataset.pipeline
    for old, new in replaced.items():
        stages[_position(stages, old)] = new
    stages.insert(_position(stages, webdataset.rename), CountRead(skips))
    stages.append(NeedsBatch(args.batch_size))
    return TrainData(
        info.dataloader, shared_epoch=info.shared_epoch, skips=skips, generator=loader.generator, seed=args.seed
    )


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
    """Samples of shards.

    Goes on behind a damaged header (the sample that it belonged to is then incomplete, and counted as that), and with
    the next shard when one breaks off.
    """

    def __init__(self, skips: Skips) -> None:
        self.skips = skips

    def __call__(self, shards: Iterable[dict]) -> Iterator[dict]:
        return open_clip_data.group_by_keys_nothrow(self._members(shards))

    def _members(self, shards: Iterable[dict]) -> Iterator[dict]:
        for shard in shards:
            url = shard["url"]
            try:
                stream = gopen(url)
                try:
                    tar = tarfile.open(fileobj=stream, mode="r|*", ignore_zeros=True)
                    for member in tar:
                        if member.isreg():
                            yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
                        tar.members = []
                finally:
                    stream.close()
            except Exception as error:  # whatever the opener of this kind of URL raises
                self.skips.note(f"the rest of {url}", error)


class Complete:
    """Whether a sample has an image and a caption; notes it when not."""

    def __init__(self, skips: Skips) -> None:
        self.skips = skips

    def __call__(self, sample: dict) -> bool:
        image = any(extension in sample for extension in IMAGE_EXTENSIONS)
        caption = bool(sample.get("txt", b"").strip())
        if not (image and caption):
            self.skips.note(
                f"{sample['__key__']} in {sample['__url__']}", f"it has no {'caption' if image else 'image'}"
            )
        return image and caption


class SkipSample:
    """webdataset's handler of exceptions: notes the sample and goes on."""

    def __init__(self, skips: Skips) -> None:
        self.skips = skips

    def __call__(self, error: Exception) -> bool:
        self.skips.note("a sample that cannot be decoded", repr(error))
        return True


class CountRead:
    """Passes samples on, and tells `skips` that there was something to be read."""

    def __init__(self, skips: Skips) -> None:
        self.skips = skips

    def __call__(self, samples: Iterable[dict]) -> Iterator[dict]:
        for sample in samples:
            self.skips.read()
            yield sample


class NeedsBatch:
    """Passes batches on; ValueError when a pass through a worker's shards gives none: the next would not either."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, batches: Iterable) -> Iterator:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                f"batch_size: the shards of one worker hold fewer than {self.batch_size} readable samples: "
                "use a smaller batch, fewer workers, or cache the data"
            )


class SkippingCsv(open_clip_data.CsvDataset):
    """open_clip's CSV data set; in the place of a row that cannot be read comes the next one that can."""

    def __init__(self, *args: object, skips: Skips, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.skips = skips

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        for row in (*range(index, len(self)), *range(index)):
            caption, path = self.captions[row], str(self.images[row])
            try:
                if not isinstance(caption, str) and caption != caption:
                    raise ValueError("it has no caption")
                image = load_image(path)
            except Exception as error:  # PIL has no common class for what a broken file may raise
                self.skips.note(path, repr(error))
                continue
            self.skips.read()
            return self.transforms(image), self.tokenize([str(caption)])[0]
        raise ValueError(f"train_data: none of the {len(self)} rows can be read, the last error is logged above")


def csv_data(
    args: Namespace, path: str, preprocess: Callable, draw: DrawCaption, skips: Skips, epoch: int
) -> TrainData:
    """What open_clip's `get_csv_dataset` gives for training, over `SkippingCsv`."""
    dataset = SkippingCsv(
        path,
        preprocess,
        img_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        sep=args.csv_separator,
        tokenizer=draw,
        skips=skips,
    )
    if len(dataset) == 0:
        raise ValueError(f"train_data: {path} has no rows, the data set is empty")
    draw.epoch = open_clip_data.SharedEpoch(epoch)
    sampler = None
    if args.distributed:
        sampler = DistributedSampler(dataset, num_replicas=args.world_size, rank=args.rank, seed=args.seed)
    generator = torch.Generator()
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        generator=generator,
    )
    if len(loader) == 0:
        raise ValueError(
            f"batch_size: got {args.batch_size}, but {path} has {len(dataset)} rows a process: use a smaller batch"
        )
    loader.num_samples, loader.num_batches = len(dataset), len(loader)
    return TrainData(loader, sampler, draw.epoch, skips=skips, generator=generator, seed=args.seed)
