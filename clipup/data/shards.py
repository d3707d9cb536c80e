"""WebDataset shards on a local disk: their samples by number for training, in memory for evaluation.

Both come from one pass over the headers and captions of a shard. For training it is an index, one row of numbers a
sample. That of a large shard is kept in the user's cache directory, and read again while the shard has the same size
and time of modification.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..atomic_files import replace_files
from ..progress import Progress
from .processes import each
from .samples import PackedTexts, Sample, content_at, digest_of
from .shard_names import check_local, sizes_of
from .skips import RETRIES, Note, Retries, Skips, SourceError, read_whole
from .tars import Members, Parts, caption_of, captions_in, complete, key_of, lines, read_samples

PLACE = np.dtype([
    ("sample", "<i8"), ("image", "<i8"), ("image_size", "<u4"), ("text", "<i8"), ("text_size", "<u4"), ("json", "?"),
])  # fmt: skip
"""A sample: the offset of its first header, the offsets and sizes in bytes of its image and of the member with its
captions, and whether that is a json."""

_VERSION = 7
_KEPT_FROM_SECONDS = 0.5
"""An index that took longer to read is kept."""
FileState = tuple[int, int]
"""The size of a file and its time of modification in nanoseconds."""


class ShardSource:
    """The complete samples of local shards, for training."""

    def __init__(
        self,
        shards: Sequence[str],
        skips: Skips,
        workers: int = 0,
        first: int = 0,
        retries: int = RETRIES,
        progress: bool = False,
    ) -> None:
        """
        Args:
            skips: where samples that are not complete are noted.
            workers: processes that read shards at the same time; 0 is the calling one.
            first: the shard to start with.
            retries: further tries after an error that may be temporary.

        Raises:
            OSError: a shard cannot be read. It is not skipped: ranks that read it would have other samples.
            LostWorker: a process was killed.
        """
        check_local(shards, "train_data")
        turned = [*shards[first:], *shards[:first]]
        read = partial(_index_of, sizes=sizes_of(shards), retries=retries)
        index_of: dict[str, Contents] = {}
        with Progress("indexing shards", "shards", len(shards), show=progress) as bar:
            for shard, index in zip(turned, each(read, turned, min(workers, len(shards))), strict=True):
                index_of[shard] = index
                bar.update()
        indexes = [index_of[shard] for shard in shards]
        _note_losses(indexes, skips)
        self.shards = PackedTexts(shards)
        self.places = np.concatenate([index.complete for index in indexes])
        self.ends = np.cumsum([len(index.complete) for index in indexes])
        self.states = [index.state for index in indexes]
        names = PackedTexts(map(os.path.basename, shards))
        self.digest = digest_of(names.content, names.ends, self.ends, self.places)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> str:
        shard, offset = self.shards[self._shard_of(row)], int(self.places[row]["sample"])
        key = f"the sample at byte {offset}"
        with suppress(Exception), open(shard, "rb") as file:  # the header may be what is damaged
            key = key_of(file, offset)
        return f"{key} in {shard}"

    def read(self, row: int) -> tuple[bytes, list[str]]:
        place, number = self.places[row], self._shard_of(row)
        with open(self.shards[number], "rb") as file:
            if _state_of(file) != self.states[number]:
                raise SourceError(
                    f"{self.shards[number]} was replaced or changed after its samples were indexed: do not write into "
                    "data that are in use. Start again, so that it is indexed again"
                )
            image = content_at(file, place["image"], place["image_size"])
            text = content_at(file, place["text"], place["text_size"])
        if not place["json"]:
            return image, [caption_of(text)]
        captions, about = captions_in(text)
        return image, captions or [about["caption"]]

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))


def _state_of(file: BinaryIO) -> FileState:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def tar_samples(shards: Sequence[str], skips: Skips, argument: str) -> list[Sample]:
    """Every complete sample of local shards, in order, for evaluation. Only headers and captions are read, not images.

    Raises OSError, naming the shard, if a shard cannot be read, also after further tries.
    """
    check_local(shards, argument)
    samples: list[Sample] = []
    contents: list[Contents] = []
    sizes, retried = sizes_of(shards), Retries()
    for shard in shards:
        read = read_whole(partial(_read, shard, sizes.get(shard)), shard, argument, retried)
        contents.append(read._replace(complete=[]))
        for members, parts in read.complete:
            captions = lines(parts.captions[0]) if parts.text != "json" else parts.captions
            about = {"key": members.key, **parts.about}
            offset, size = members.place[parts.image]
            samples.append(Sample(members.key, shard, tuple(captions), offset, size, about))
    _note_losses(contents, skips)
    return samples


class Contents(NamedTuple):
    """The samples of one shard."""

    state: FileState
    """Of the file that was read."""
    samples: int
    """The number of all samples, complete or not."""
    notes: list[Note]
    """Incomplete samples and damaged parts; 0 samples where their number is unknown."""
    complete: Any
    """The complete samples: pairs of ``Members`` and ``Parts``; in an index their places, [samples] of `PLACE`."""


def _read(shard: str, expected: int | None) -> Contents:
    """Reads the headers and captions of a shard.

    Raises OSError if the shard cannot be read: an index of a part of it would look like that of a damaged shard.
    """
    notes: list[Note] = []
    pairs: list[tuple[Members, Parts]] = []
    samples = 0
    with open(shard, "rb") as file:
        state = _state_of(file)
        lose = lambda *lost: notes.append(Note(*lost))  # noqa: E731
        for members in read_samples(file, shard, lose, images=False, expected=expected):
            samples += 1
            try:
                pairs.append((members, complete(members)))
            except ValueError as error:
                notes.append(Note(members.named, str(error)))
    return Contents(state, samples, notes, pairs)


def _note_losses(shards: Sequence[Contents], skips: Skips) -> None:
    """Notes the lost samples of shards. Where their number is unknown, the largest undamaged shard tells how many a
    shard has."""
    usual = max((shard.samples for shard in shards if all(note.samples for note in shard.notes)), default=0)
    skips.add(
        note._replace(samples=note.samples or max(1, usual - shard.samples)) for shard in shards for note in shard.notes
    )


def _index_of(shard: str, sizes: dict[str, int], retries: int) -> Contents:
    """The index of a shard, from the cache if it is there."""
    return read_whole(partial(_kept_or_read, shard, sizes.get(shard)), shard, "train_data", Retries(retries))


def _kept_or_read(shard: str, expected: int | None) -> Contents:
    stat = os.stat(shard)
    about = [_VERSION, shard, os.path.realpath(shard), expected, stat.st_size, stat.st_mtime_ns]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clipup", "shard_index")
    path = cache / f"{hashlib.sha256(repr(about[1:3]).encode()).hexdigest()[:32]}.npz"
    with suppress(Exception):  # no such file, or a damaged one, for which numpy and zipfile have no common class
        with np.load(path, allow_pickle=False) as content:
            described, samples, notes = json.loads(str(content["about"]))
            if described == about:
                state = stat.st_size, stat.st_mtime_ns
                return Contents(state, samples, [Note(*note) for note in notes], content["places"])
    start = time.perf_counter()
    index = _read(shard, expected)
    rows = [
        (members.offset, *members.place[parts.image], *members.place[parts.text], parts.text == "json")
        for members, parts in index.complete
    ]
    index = index._replace(complete=np.array(rows, PLACE))
    if time.perf_counter() - start > _KEPT_FROM_SECONDS:
        noted = np.array(json.dumps([about, index.samples, index.notes]))
        with suppress(OSError):  # without a cache directory that can be written to, the shard is read again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_files({path: partial(np.savez_compressed, about=noted, places=index.complete)})
    return index
