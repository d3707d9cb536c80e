"""Samples: the location and captions of images, as the formats of data (``formats``) make them.

For evaluation they are a list in memory, with an entry for each image. For training they are a `Source`. Unreadable
samples are skipped and counted in `Skips`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, SupportsInt

from .skips import Skips


class Source(Protocol):
    """Training samples by number, in arrays that data workers share with the process that starts them."""

    digest: str
    """A digest of which sample has which number. Equal after the files have moved."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """A sample's name in messages. Skipped samples are counted by it, so each has its own."""

    def read(self, row: int) -> tuple[bytes, list[str]]:
        """The content of the image's file, and the captions.

        Raises OSError or ValueError for a sample that cannot be read, SourceError for a source that cannot.
        """


@dataclass(frozen=True)
class Sample:
    """One image and its captions. `offset` and `size` locate the image in the file `path`; -1 is the rest of it."""

    key: str
    path: str
    captions: tuple[str, ...]
    offset: int = 0
    size: int = -1
    metadata: dict = field(default_factory=dict)

    @property
    def named(self) -> str:
        """Its name in messages."""
        return self.key if self.path in self.key else f"{self.key} in {self.path}"


def content_at(file: BinaryIO, offset: SupportsInt, size: SupportsInt) -> bytes:
    """A part of an open file."""
    file.seek(int(offset))
    return file.read(int(size))


class PackedTexts:
    """Texts by index, in arrays that data workers share with their parent. A list would be copied into every worker:
    reading an object writes its reference count, and so copies its memory page."""

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
    """A digest of the contents of arrays, each with its length."""
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(memoryview(values))
    return digest.hexdigest()[:16]


def check_found(samples: int, skips: Skips, source: str, argument: str) -> None:
    """Raises ValueError without a sample, and when more were skipped than may be."""
    if not samples:
        raise ValueError(
            f"{argument}: {source} holds no sample with an image and a caption ({int(skips)} skipped"
            f"{f', the first is {skips.first}' if skips.first else ''})"
        )
    skips.check(samples + int(skips))
