"""Training samples by number: of the rows of a CSV file, or of local shards."""

from __future__ import annotations

import hashlib
import os
import resource
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np

from .csv_rows import CsvFormat, readable_rows, row_name
from .packed_texts import PackedTexts
from .retries import RETRIES
from .shard_index import index_shards
from .shard_names import check_state
from .skips import Skips
from .tars import HEADER_BYTES, TarSample, complete, key_of, name_before_content

OPEN_FILES = 256
"""Shards that a process keeps open at most; fewer where it may open few files."""


class Source(Protocol):
    """Samples by number, in arrays that data workers share with the process that starts them."""

    digest: str
    """Of what the numbers mean: which sample has which. Equal after the files have moved."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Of a sample, for messages."""

    def place(self, row: int) -> str:
        """By which a sample is counted: always the same, and no other's."""

    def read(self, row: int) -> tuple[bytes, list[str], bool]:
        """The content of the image's file, the captions, and whether that is a txt of several lines.

        Raises OSError or ValueError where they cannot be read, SourceError where that is no fault of the sample.
        """


class CsvSource:
    """The usable rows of a CSV file."""

    def __init__(self, path: str, form: CsvFormat, skips: Skips, retries: int = RETRIES) -> None:
        self.path = path
        self.lines, self.images, self.captions = array("q"), PackedTexts(), PackedTexts()
        for row in readable_rows(path, form, skips, "train_data", retries=retries):
            self.lines.append(row.line)
            self.images.append(row.image)
            self.captions.append(row.caption)
        self.digest = _digest(np.array(self.lines), *self.captions.arrays)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return row_name(self.path, self.lines[row], self.images[row])

    def place(self, row: int) -> str:
        return self.name(row)

    def read(self, row: int) -> tuple[bytes, list[str], bool]:
        with open(self.images[row], "rb") as file:
            return file.read(), [self.captions[row]], False


class ShardSource:
    """The complete samples of local shards."""

    def __init__(
        self,
        shards: Sequence[str],
        skips: Skips,
        *,
        processes: int = 1,
        first: int = 0,
        retries: int = RETRIES,
        progress: bool = False,
    ) -> None:
        """As `index_shards`."""
        indexes = index_shards(
            shards, skips, "train_data", processes=processes, first=first, retries=retries, progress=progress
        )
        self.shards = PackedTexts(shards)
        self.places = np.concatenate([index.places for index in indexes])
        self.ends = np.cumsum([len(index.places) for index in indexes])
        self.states = np.array([index.state for index in indexes])
        self.repeated = np.array([index.repeated for index in indexes])
        names = PackedTexts(os.path.basename(shard) for shard in shards)
        self.digest = _digest(*names.arrays, self.ends, self.places)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for shard in list(getattr(self, "_files", ())):
            self._close(shard)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> str:
        image, shard = int(self.places[row]["image"]), self._shard_of(row)
        begin = max(0, image - HEADER_BYTES)
        try:
            member = name_before_content(self._content(shard, begin, image - begin))
        except (OSError, ValueError):
            member = ""
        at = f"at byte {image - tarfile.BLOCKSIZE}"
        key = key_of(member) if member else f"the image {at}"
        if member and self.repeated[shard]:
            key = f"{key} ({at})"
        return f"{key} in {self.shards[shard]}"

    def place(self, row: int) -> str:
        return f"byte {self.places[row]['image']} of {self.shards[self._shard_of(row)]}"

    def read(self, row: int) -> tuple[bytes, list[str], bool]:
        place, shard = self.places[row], self._shard_of(row)
        image = self._content(shard, int(place["image"]), int(place["image_size"]))
        text = self._content(shard, int(place["text"]), int(place["text_size"]))
        extension = "json" if place["json"] else "txt"
        found = complete(TarSample("", "", {extension: text}, {"jpg": (0, 0)}))  # only its captions are used
        return image, found.captions, found.several_lines

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))

    def _content(self, shard: int, offset: int, size: int) -> bytes:
        try:
            content = os.pread(self._opened(shard), size, offset)
            while len(content) < size:  # a read gives 2 GiB at most
                more = os.pread(self._opened(shard), size - len(content), offset + len(content))
                if not more:
                    raise ValueError(f"unexpected end of data in {self.shards[shard]}")
                content += more
        except OSError:
            self._close(shard)  # a handle that was lost (ESTALE, ENOTCONN) stays lost until the file is opened again
            raise
        return content

    def _opened(self, shard: int) -> int:
        """A file descriptor. The least recently used one is closed where there are too many."""
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            while len(self._files) >= _most_open_files():
                self._close(next(iter(self._files)))
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        size, modified = self.states[shard].tolist()
        check_state(self._files[shard], (size, modified), self.shards[shard])
        return self._files[shard]

    def _close(self, shard: int) -> None:
        if shard in self._files:
            with suppress(OSError):  # it was only read
                os.close(self._files.pop(shard))


def _most_open_files() -> int:
    """A quarter of what the process may open: it has other files, and several sources."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_FILES if limit == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, limit // 4))


def _digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for one in arrays:
        found.update(len(one).to_bytes(8, "little"))
        found.update(np.ascontiguousarray(one).data)
    return found.hexdigest()[:16]
