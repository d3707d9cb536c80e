"""Training samples by number: of the rows of a CSV file, or of local shards.

Of shards there is an index, one row of numbers a sample, from the headers of the tar files. That of a large shard is
kept in the user's cache directory, and read again while the shard has the same size and time of modification.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ..atomic_files import replace_files
from ..progress import Progress
from .csv_rows import CsvFormat, readable_rows, row_name
from .processes import each
from .samples import estimated
from .shard_names import FileState, check_local, check_state, sizes_of, state_of
from .skips import RETRIES, Note, Notes, Report, Retries, Skips, read_whole
from .tars import captions_in, complete, key_of, lines, read_samples

PLACE = np.dtype([
    ("sample", "<i8"), ("image", "<i8"), ("image_size", "<u4"), ("text", "<i8"), ("text_size", "<u4"), ("json", "?"),
])  # fmt: skip
"""A sample: the offset of its image's header, the offsets and sizes in bytes of its image and of the member with its
captions, and whether that is a json."""

_VERSION = 4
_KEPT_FROM_SECONDS = 0.5
"""An index that took longer to read is kept."""


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


class CsvSource:
    """The usable rows of a CSV file."""

    def __init__(self, path: str, form: CsvFormat, skips: Skips, retries: int = RETRIES) -> None:
        self.path = path
        self.lines, self.images, self.captions = array("q"), PackedTexts(), PackedTexts()
        for row in readable_rows(path, form, skips, "train_data", retries=retries):
            self.lines.append(row.line)
            self.images.append(row.image)
            self.captions.append(row.caption)
        self.digest = digest_of(self.lines, self.captions.content, self.captions.ends)

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
        names = PackedTexts(os.path.basename(shard) for shard in shards)
        self.digest = digest_of(names.content, names.ends, self.ends, self.places)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> str:
        shard, offset = self._shard_of(row), int(self.places[row]["sample"])
        key = f"the sample at byte {offset}"
        with suppress(Exception), open(self.shards[shard], "rb") as file:  # the header may be what is damaged
            key = key_of(file, offset)
        return f"{key} in {self.shards[shard]}"

    def place(self, row: int) -> str:
        return f"byte {self.places[row]['sample']} of {self.shards[self._shard_of(row)]}"

    def read(self, row: int) -> tuple[bytes, list[str], bool]:
        place, shard = self.places[row], self._shard_of(row)
        with open(self.shards[shard], "rb") as file:
            size, modified = self.states[shard].tolist()
            check_state(file.fileno(), (size, modified), self.shards[shard])
            image = _content(file, place["image"], place["image_size"])
            text = _content(file, place["text"], place["text_size"])
        if place["json"]:
            return image, captions_in(text)[0], False
        caption = text.decode()
        return image, [caption], len(lines(caption)) > 1

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))


def _content(file: BinaryIO, offset: np.integer, size: np.integer) -> bytes:
    file.seek(int(offset))
    return file.read(int(size))


@dataclass
class ShardIndex:
    """The complete samples of one shard, and what is wrong with the others."""

    places: np.ndarray
    """[samples] of `PLACE`."""
    state: FileState
    """Of the file that was read."""
    incomplete: list[Note] = field(default_factory=list)
    lost: list[Note] = field(default_factory=list)
    """Damaged parts; 0 samples where their number is unknown."""

    @property
    def found(self) -> int:
        return len(self.places) + len(self.incomplete)


def index_shards(
    shards: Sequence[str],
    skips: Skips,
    argument: str,
    *,
    processes: int = 1,
    first: int = 0,
    retries: int = RETRIES,
    progress: bool = False,
) -> list[ShardIndex]:
    """The indexes of local shards. Samples that are not complete are noted in `skips`.

    Args:
        processes: that read shards at the same time.
        first: the shard to start with. If the ranks of a machine start with different ones, each finds in the cache
            what the others have read.
        retries: further tries after an error that may be temporary.

    Raises:
        OSError: a shard cannot be read. It is not skipped: ranks that read it would have other samples.
        ChildProcessError: a process was killed.
    """
    check_local(shards, argument)
    turned = [*shards[first:], *shards[:first]]
    found: dict[str, ShardIndex] = {}
    read = partial(_index_of, sizes=sizes_of(shards), argument=argument, retries=retries)
    with Progress("indexing shards", "shards", len(shards), show=progress) as bar:
        indexes = each(read, turned, min(processes, len(shards)), chunk=1)
        for shard, (index, report) in zip(turned, indexes, strict=True):
            found[shard] = index
            skips.add_report(report)
            bar.update()
    for shard in shards:
        skips.add(found[shard].incomplete)
    counts = {shard: index.found for shard, index in found.items()}
    skips.add(estimated(counts, {shard: found[shard].lost for shard in shards}))
    return [found[shard] for shard in shards]


def _index_of(shard: str, sizes: dict[str, int], argument: str, retries: int) -> tuple[ShardIndex, Report]:
    """The index of a shard, from the cache if it is there, and what was read again."""
    notes = Notes()
    index = read_whole(lambda: _kept_or_read(shard, sizes.get(shard)), shard, argument, Retries(retries, notes))
    return index, notes.report()


def _kept_or_read(shard: str, expected: int | None) -> ShardIndex:
    stat = os.stat(shard)
    about = [_VERSION, shard, os.path.realpath(shard), expected, stat.st_size, stat.st_mtime_ns]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clipup", "shard_index")
    path = cache / f"{hashlib.sha256(repr(about[1:3]).encode()).hexdigest()[:32]}.npz"
    with suppress(Exception):  # no such file, or a damaged one, for which numpy and zipfile have no common class
        with np.load(path, allow_pickle=False) as content:
            described, *notes = json.loads(str(content["about"]))
            if described == about and content["places"].dtype == PLACE:
                incomplete, lost = ([Note(*note) for note in kind] for kind in notes)
                return ShardIndex(content["places"], (stat.st_size, stat.st_mtime_ns), incomplete, lost)
    start = time.perf_counter()
    index = read_index(shard, expected)
    if time.perf_counter() - start > _KEPT_FROM_SECONDS:
        noted = np.array(json.dumps([about, index.incomplete, index.lost]))
        with suppress(OSError):  # without a cache directory that can be written to, the shard is read again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_files({path: lambda file: _write(file, about=noted, places=index.places)})
    return index


def read_index(shard: str, expected: int | None) -> ShardIndex:
    """Reads the headers and captions of a shard.

    Args:
        expected: how many samples it should have, where known.

    Raises OSError where it cannot be read: the index of a part would be one of a damaged shard.
    """
    rows: list[tuple[int, int, int, int, int, bool]] = []
    with open(shard, "rb") as file:
        index = ShardIndex(np.empty(0, PLACE), state_of(file.fileno()))
        lose: Any = lambda *note: index.lost.append(Note(*note))  # noqa: E731
        for sample in read_samples(file, shard, lose, images=False, expected=expected):
            try:
                parts = complete(sample)
            except ValueError as error:
                index.incomplete.append(Note(sample.named, str(error), place=sample.counted_as))
                continue
            image, text = sample.place[parts.image], sample.place[parts.text]
            rows.append((sample.offset, *image, *text, parts.text == "json"))
    index.places = np.array(rows, PLACE)
    return index


def _write(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def digest_of(*arrays: Any) -> str:
    """Of the contents of arrays, each with its length."""
    found = hashlib.sha256()
    for one in arrays:
        found.update(len(one).to_bytes(8, "little"))
        found.update(memoryview(one))
    return found.hexdigest()[:16]
