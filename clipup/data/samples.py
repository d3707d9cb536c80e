"""Samples: the location and captions of images. The formats of data (`shards`, `csv_files`) make them.

For evaluation they are a list in memory, with an entry for each image. For training they are a `Source`. A directory of
images is a format too; its images have no captions. Unreadable samples are skipped and counted in `Skips`, never lost
silently.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .images import MAX_PIXELS, load_image, preprocessed
from .skips import Retries, Skips, SourceError, raise_lack
from .tars import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms import Resize

_RAW = ("arw", "cr2", "cr3", "crw", "dng", "nef", "nrw", "orf", "pef", "raf", "raw", "rw2", "srw", "x3f")
_OTHER_KINDS = (*_RAW, "avif", "bmp", "gif", "heic", "heif", "jxl", "tif", "tiff")

FileState = tuple[int, int]
"""The size of a file and its time of modification in nanoseconds."""


class Source(Protocol):
    """Training samples by number, in arrays that data workers share with the process that starts them."""

    digest: str
    """Of what the numbers mean: which sample has which. Equal after the files have moved."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Of a sample, for messages; and by which it is counted, so no other's."""

    def read(self, row: int) -> tuple[bytes, list[str]]:
        """The content of the image's file, and the captions.

        Raises OSError or ValueError if they cannot be read, SourceError if the source is at fault and not the sample.
        """


@dataclass(frozen=True)
class Sample:
    """One image and its captions. `offset` and `size` locate the image in the file `path`; None is the whole file."""

    key: str
    path: str
    captions: tuple[str, ...]
    offset: int | None = None
    size: int | None = None
    metadata: dict = field(default_factory=dict)

    @property
    def named(self) -> str:
        """Its name in messages."""
        return self.key if self.path in self.key else f"{self.key} in {self.path}"


def state_of(descriptor: int) -> FileState:
    """The state of an open file."""
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns


def check_state(descriptor: int, expected: FileState, shard: str) -> None:
    """Raises SourceError when an open shard is not in the state in which its samples were found."""
    if state_of(descriptor) != expected:
        raise SourceError(
            f"{shard} was replaced or changed after its samples were indexed: do not write into data that are in use. "
            "Start again, so that it is indexed again"
        )


def read_image(sample: Sample, max_pixels: int = MAX_PIXELS) -> Image:
    """The image of a sample. Raises as `load_image`."""
    return load_image(_content(sample), max_pixels)


def _content(sample: Sample) -> bytes:
    with open(sample.path, "rb") as file:
        file.seek(sample.offset or 0)
        return file.read(-1 if sample.size is None else sample.size)


class Images(Dataset):
    """`[i]` is the preprocessed image of sample i and "", or None and why it cannot be read."""

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Callable[[Image], Tensor],
        max_pixels: int = MAX_PIXELS,
        resize: Resize | None = None,
    ) -> None:
        self.samples, self.preprocess, self.max_pixels, self.resize = samples, preprocess, max_pixels, resize
        self.retried = Retries()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        sample = self.samples[index]
        try:
            content = self.retried(lambda: sample.named, lambda: _content(sample))
            image = load_image(content, self.max_pixels, self.resize)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            raise_lack(error)
            return None, f"{type(error).__name__}: {error}"
        return preprocessed(self.preprocess, image, lambda: sample.named), ""


def readable(images: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    """Of a batch of `Images`: the readable ones [B, C, H, W], in shared memory where a worker calls it, and why each of
    all cannot be read ("" for none)."""
    good = [image for image, reason in images if not reason]
    return default_collate(good) if good else None, [reason for _, reason in images]


class PackedTexts:
    """Texts by index. A list would be copied into every data worker: reading an object changes its reference count, and
    so the memory page that it shares with the parent process."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.content, self.ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self.content += text.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.content))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.content[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")


def digest_of(*arrays: Any) -> str:
    """Of the contents of arrays, each with its length."""
    found = hashlib.sha256()
    for one in arrays:
        found.update(len(one).to_bytes(8, "little"))
        found.update(memoryview(one))
    return found.hexdigest()[:16]


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
