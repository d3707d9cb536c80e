"""An index of the samples of a source: the location and captions of each image, for evaluation and for the cache.

A source is one of
- WebDataset shards: `KEY.png|jpg|jpeg|webp` with `KEY.json` (`{"captions": [...], ...}`) or `KEY.txt`: one caption in
  training, as in open_clip, and one a line in evaluation, as in CLIP_benchmark,
- a CSV file with a column of image paths and one of captions: a cell is one caption.

Unreadable samples are skipped and counted in `Skips`, never lost silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .csv_rows import CsvFormat, readable_rows, row_name
from .images import MAX_PIXELS, load_image, preprocessed
from .retries import RETRIES, Retries, raise_lack, read_shard
from .shard_names import FileState, check_state, is_remote, sizes_of, state_of
from .skips import Note, Skips
from .tars import IMAGE_EXTENSIONS, TarSample, complete, lines, read_samples

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_EXTENSIONS", "Images", "Record", "csv_records", "read_image", "tar_records"]


@dataclass(frozen=True)
class Record:
    """One image and its captions. `offset` and `size` locate the image in the file `path`; None is the whole file."""

    key: str
    path: str
    captions: tuple[str, ...]
    offset: int | None = None
    size: int | None = None
    metadata: dict = field(default_factory=dict)
    state: FileState | None = None
    """Of a shard, when its samples were found."""

    @property
    def named(self) -> str:
        """Its name in messages."""
        return self.key if self.path in self.key else f"{self.key} in {self.path}"


def read_image(record: Record, max_pixels: int = MAX_PIXELS) -> Image:
    """The image of a record. Raises as `load_image`, and SourceError when its shard has changed."""
    return load_image(_content(record), max_pixels)


def _content(record: Record) -> bytes:
    with open(record.path, "rb") as file:
        if record.state is not None:
            check_state(file.fileno(), record.state, record.path)
        file.seek(record.offset or 0)
        return file.read(-1 if record.size is None else record.size)


class Images(Dataset):
    """`[i]` is the preprocessed image of record i, or the reason (str) why it cannot be read."""

    def __init__(
        self,
        records: Sequence[Record],
        preprocess: Callable[[Image], Tensor],
        max_pixels: int = MAX_PIXELS,
        retried: Retries | None = None,
    ) -> None:
        """retried: repeats reading; None for the default, which logs."""
        self.records, self.preprocess, self.max_pixels = records, preprocess, max_pixels
        self.retried = Retries(RETRIES, Skips()) if retried is None else retried

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Tensor | str:
        record = self.records[index]
        try:
            content = self.retried(lambda: record.named, lambda: _content(record))
            image = load_image(content, self.max_pixels)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            raise_lack(error, lambda: record.named)
            return f"{type(error).__name__}: {error}"
        tensor = preprocessed(self.preprocess, image, lambda: record.named)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"preprocess: returned {type(tensor).__name__} for {record.named}, expected a tensor "
                "[C, H, W]: end it with torchvision.transforms.ToTensor()"
            )
        return tensor


def readable(images: list[Tensor | str]) -> tuple[Tensor | None, list[str]]:
    """Of a batch of `Images`: the readable ones [B, C, H, W], in shared memory where a worker calls it, and why each of
    all cannot be read ("" for none)."""
    good = [image for image in images if isinstance(image, Tensor)]
    return default_collate(good) if good else None, ["" if isinstance(image, Tensor) else image for image in images]


def tar_records(
    shards: Sequence[str], skips: Skips, argument: str, retries: int = RETRIES, *, training: bool = False
) -> list[Record]:
    """Every complete sample of local shards, in order. Only headers and captions are read, not images.

    Args:
        training: a txt is one caption; else it has one a line.

    Raises OSError, naming the shard, when one cannot be read, also after `retries` further tries.
    """
    records: list[Record] = []
    sizes = sizes_of(shards)
    found = dict.fromkeys(shards, 0)
    lost: list[tuple[str, Note]] = []
    retried = Retries(retries, skips)
    for shard in shards:
        if is_remote(shard):
            raise ValueError(f"{argument}: {shard} is not a local file, which is required here: copy it first")
        read = partial(_samples_of, shard, sizes.get(shard))
        samples, state, notes = read_shard(read, shard, argument, retried)
        found[shard] += len(samples)
        lost += [(shard, note) for note in notes]
        for sample in samples:
            try:
                whole = complete(sample)
            except ValueError as error:
                skips.note(sample.named, error)
                continue
            skips.mention_lines(training and whole.several_lines)
            apart = not training and whole.text == "txt"
            captions = tuple(lines(whole.captions[0]) if apart else whole.captions)
            metadata = {"key": sample.key, **whole.about}
            records.append(Record(sample.numbered, shard, captions, *sample.place[whole.image], metadata, state))
    damaged = {shard for shard, _ in lost}
    usual = max((count for shard, count in found.items() if shard not in damaged), default=0)
    skips.add(note._replace(samples=note.samples or max(1, usual - found[shard])) for shard, note in lost)
    return records


def _samples_of(shard: str, expected: int | None) -> tuple[list[TarSample], FileState, list[Note]]:
    """Its samples, complete or not, its state, and what is damaged."""
    notes: list[Note] = []

    def lose(name: str, reason: object, samples: int) -> None:
        notes.append(Note(name, str(reason), samples))

    with open(shard, "rb") as file:
        state = state_of(file.fileno())
        return list(read_samples(file, shard, lose, images=False, expected=expected)), state, notes


def csv_records(
    path: str,
    form: CsvFormat,
    skips: Skips,
    argument: str,
    merge_images: bool,
    directory: str | os.PathLike | None = None,
    retries: int = RETRIES,
) -> list[Record]:
    """The usable rows of a CSV file.

    Args:
        merge_images: makes the rows of one image a record with several captions.
        directory: which paths are relative to; they may not lead out of it.
    """
    captions_of: dict[str, list[str]] = {}
    path_of: dict[str, str] = {}
    for line, image, caption in readable_rows(path, form, skips, argument, directory, retries):
        key = image if merge_images else row_name(path, line, image)
        path_of[key] = image
        captions_of.setdefault(key, []).append(caption)
    return [
        Record(key, path_of[key], tuple(dict.fromkeys(captions)), metadata={"key": key})
        for key, captions in captions_of.items()
    ]


def check_found(samples: int, skips: Skips, source: str, argument: str) -> None:
    """Raises ValueError when there is no sample, or when more were skipped than may be."""
    if not samples:
        raise ValueError(
            f"{argument}: {source} holds no sample with an image and a caption ({int(skips)} skipped"
            f"{f', the first is {skips.first}' if skips.first else ''})"
        )
    skips.check(samples + int(skips))
