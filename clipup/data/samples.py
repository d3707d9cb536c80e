"""Samples of a source in memory: the location and captions of each image, for evaluation.

A source is one of
- WebDataset shards: `KEY.png|jpg|jpeg|webp` with `KEY.json` (`{"captions": [...], ...}`) or `KEY.txt` (one caption a
  line, as in CLIP_benchmark),
- a CSV file with a column of image paths and one of captions: a cell is one caption,
- a directory of images, which have no captions.

Unreadable samples are skipped and counted in `Skips`, never lost silently.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .csv_rows import CsvFormat, readable_rows
from .images import MAX_PIXELS, load_image, preprocessed
from .shard_names import FileState, check_local, check_state, sizes_of, state_of
from .skips import RETRIES, Note, Retries, Skips, raise_lack, read_whole
from .tars import IMAGE_EXTENSIONS, Members, complete, lines, read_samples

if TYPE_CHECKING:
    from PIL.Image import Image

_OTHER_KINDS = ("avif", "bmp", "dng", "gif", "heic", "heif", "jxl", "tif", "tiff")


@dataclass(frozen=True)
class Sample:
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

    @property
    def counted_as(self) -> str:
        """By which it is counted: several samples of a shard can have the same key."""
        return self.named if self.offset is None else f"byte {self.offset} of {self.path}"


def read_image(sample: Sample, max_pixels: int = MAX_PIXELS) -> Image:
    """The image of a sample. Raises as `load_image`, and SourceError when its shard has changed."""
    return load_image(_content(sample), max_pixels)


def _content(sample: Sample) -> bytes:
    with open(sample.path, "rb") as file:
        if sample.state is not None:
            check_state(file.fileno(), sample.state, sample.path)
        file.seek(sample.offset or 0)
        return file.read(-1 if sample.size is None else sample.size)


class Images(Dataset):
    """`[i]` is the preprocessed image of sample i and "", or None and why it cannot be read."""

    def __init__(
        self, samples: Sequence[Sample], preprocess: Callable[[Image], Tensor], max_pixels: int = MAX_PIXELS
    ) -> None:
        self.samples, self.preprocess, self.max_pixels = samples, preprocess, max_pixels
        self.retried = Retries(RETRIES, Skips())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        sample = self.samples[index]
        try:
            image = load_image(self.retried(lambda: sample.named, lambda: _content(sample)), self.max_pixels)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            raise_lack(error)
            return None, f"{type(error).__name__}: {error}"
        return preprocessed(self.preprocess, image, lambda: sample.named), ""


def readable(images: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    """Of a batch of `Images`: the readable ones [B, C, H, W], in shared memory where a worker calls it, and why each of
    all cannot be read ("" for none)."""
    good = [image for image, reason in images if not reason]
    return default_collate(good) if good else None, [reason for _, reason in images]


def tar_samples(shards: Sequence[str], skips: Skips, argument: str) -> list[Sample]:
    """Every complete sample of local shards, in order. Only headers and captions are read, not images.

    Raises OSError, naming the shard, when one cannot be read, also after further tries.
    """
    check_local(shards, argument)
    samples: list[Sample] = []
    sizes = sizes_of(shards)
    found: dict[str, int] = {}
    lost: dict[str, list[Note]] = {}
    retried = Retries(RETRIES, skips)
    for shard in shards:
        of_shard, state, lost[shard] = read_whole(
            lambda: _members_of(shard, sizes.get(shard)),  # noqa: B023
            shard,
            argument,
            retried,
        )
        found[shard] = len(of_shard)
        for members in of_shard:
            try:
                parts = complete(members)
            except ValueError as error:
                skips.note(members.named, error, place=members.counted_as)
                continue
            captions = lines(parts.captions[0]) if parts.text == "txt" else parts.captions
            about = {"key": members.key, **parts.about}
            place = members.place[parts.image]
            samples.append(Sample(members.key, shard, tuple(captions), *place, about, state))
    skips.add(estimated(found, lost))
    return samples


def _members_of(shard: str, expected: int | None) -> tuple[list[Members], FileState, list[Note]]:
    """The samples of a shard, complete or not, its state, and what is damaged."""
    notes: list[Note] = []
    with open(shard, "rb") as file:
        state = state_of(file.fileno())
        lose: Any = lambda *note: notes.append(Note(*note))  # noqa: E731
        return list(read_samples(file, shard, lose, images=False, expected=expected)), state, notes


def estimated(found: dict[str, int], lost: dict[str, list[Note]]) -> list[Note]:
    """What shards lost; where the number is unknown, by how many samples the largest undamaged shard has.

    Args:
        found: samples in each shard.
    """
    usual = max((count for shard, count in found.items() if not lost[shard]), default=0)
    return [
        note._replace(samples=note.samples or max(1, usual - found[shard]))
        for shard, notes in lost.items()
        for note in notes
    ]


def csv_samples(
    path: str, form: CsvFormat, skips: Skips, argument: str, directory: str | os.PathLike | None = None
) -> list[Sample]:
    """The images of a CSV file; the rows of an image are its captions.

    Args:
        directory: which paths are relative to; they may not lead out of it.
    """
    captions: dict[str, list[str]] = {}
    for row in readable_rows(path, form, skips, argument, directory):
        captions.setdefault(row.image, []).append(row.caption)
    return [
        Sample(image, image, tuple(dict.fromkeys(of_image)), metadata={"key": image})
        for image, of_image in captions.items()
    ]


def image_files(source: str | Path) -> list[Sample]:
    """The image files below a directory, by extension, in the order of their names; ``key`` is the path below it.

    Raises:
        FileNotFoundError: no such directory, or no image in it.
    """
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"images: there is no directory {source}; expected one with images")
    named = [path for path in sorted(root.rglob("*")) if path.suffix.lower()[1:] in IMAGE_EXTENSIONS]
    paths = [path for path in named if path.is_file()]  # to open a pipe would be to wait
    if not paths:
        others = passed_over(source) or "no image"
        raise FileNotFoundError(f"images: {source} holds {others}; expected {', '.join(IMAGE_EXTENSIONS)}")
    keys = [path.relative_to(root).as_posix() for path in paths]
    return [Sample(key, str(path), (), metadata={"key": key}) for key, path in zip(keys, paths, strict=True)]


def passed_over(source: str | Path) -> str:
    """How many pictures of which other kinds are below a directory, for a message; empty if none."""
    kinds = Counter(kind for path in Path(source).rglob("*") if (kind := path.suffix.lower()[1:]) in _OTHER_KINDS)
    named = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    return f"pictures of other kinds ({kinds.total()}): {named}" if kinds else ""


def check_found(samples: int, skips: Skips, source: str, argument: str) -> None:
    """Raises ValueError when there is no sample, or when more were skipped than may be."""
    if not samples:
        raise ValueError(
            f"{argument}: {source} holds no sample with an image and a caption ({int(skips)} skipped"
            f"{f', the first is {skips.first}' if skips.first else ''})"
        )
    skips.check(samples + int(skips))
