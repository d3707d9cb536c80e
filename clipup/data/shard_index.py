"""Where the samples of local shards are: one row of numbers per sample, from the headers of the tar files.

An index of a large shard is kept in the user's cache directory, and read again while the shard has the same size and
time of modification.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipup_kernels.user_cache import user_cache

from ..atomic_files import replace_files
from ..progress import Progress
from .processes import each
from .retries import RETRIES, Retries, read_shard
from .shard_names import FileState, is_remote, sizes_of, state_of
from .skips import Note, Notes, Skips
from .tars import complete, read_samples

PLACE = np.dtype([("image", "<i8"), ("image_size", "<i8"), ("text", "<i8"), ("text_size", "<i4"), ("json", "?")])
"""A sample: the offsets and sizes in bytes of its image and of the member with its captions, and whether that is a
json."""

_VERSION = 3
_KEPT_FROM_SECONDS = 0.5
"""An index that took longer to read is kept."""


@dataclass
class ShardIndex:
    """The complete samples of one shard, and what is wrong with the others."""

    places: np.ndarray
    """[samples] of `PLACE`."""
    incomplete: list[Note] = field(default_factory=list)
    lost: list[Note] = field(default_factory=list)
    """Damaged parts; 0 samples where their number is unknown."""
    state: FileState = (0, 0)
    """Of the file that was read."""
    repeated: bool = False
    """Whether several samples have the same key."""
    retried: Sequence[tuple[str, str]] = ()
    """What was read again, and the error of the time before."""

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
    for shard in shards:
        if is_remote(shard):
            raise ValueError(f"{argument}: {shard} is not a local file, which is required here: copy it first")
    sizes = sizes_of(shards)
    turned = [*shards[first:], *shards[:first]]
    found: dict[str, ShardIndex] = {}
    shown = Progress("indexing shards", "shards", len(shards), show=progress)
    with shown as bar, _killed_processes_explained(argument):
        read = functools.partial(_index_of, sizes=sizes, argument=argument, retries=retries)
        for shard, index in zip(turned, each(read, turned, min(processes, len(shards)), chunk=1), strict=True):
            found[shard] = index
            skips.add_retries(index.retried)
            bar.update()
    usual = max((index.found for index in found.values() if not index.lost), default=0)
    for shard in shards:
        index = found[shard]
        skips.add(index.incomplete)
        skips.add(note._replace(samples=note.samples or max(1, usual - index.found)) for note in index.lost)
    return [found[shard] for shard in shards]


@contextmanager
def _killed_processes_explained(argument: str) -> Iterator[None]:
    try:
        yield
    except ChildProcessError as error:
        raise ChildProcessError(f"{argument}: the shards were not indexed, {error} (workers)") from error


def _index_of(shard: str, sizes: dict[str, int], argument: str, retries: int) -> ShardIndex:
    """The index of a shard, from the cache if it is there."""
    notes = Notes()
    index = read_shard(lambda: _kept_or_read(shard, sizes.get(shard)), shard, argument, Retries(retries, notes))
    index.retried = notes.report().retried
    return index


def _kept_or_read(shard: str, expected: int | None) -> ShardIndex:
    state = os.stat(shard)
    where = os.path.realpath(shard)
    about = {"version": _VERSION, "shard": where, "expected": expected}
    about |= {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
    path = user_cache("shard_index", f"{hashlib.sha256(os.fsencode(where)).hexdigest()[:32]}.npz")
    kept = None if path is None else _kept(path, about, shard)
    if kept is not None:
        return kept
    start = time.perf_counter()
    index = read_index(shard, expected)
    if path is not None and time.perf_counter() - start > _KEPT_FROM_SECONDS:
        _keep(path, about, shard, index)
    return index


def read_index(shard: str, expected: int | None) -> ShardIndex:
    """Reads the headers and captions of a shard.

    Args:
        expected: how many samples it should have, where known.

    Raises OSError where it cannot be read: the index of a part would be one of a damaged shard.
    """
    rows: list[tuple[int, int, int, int, bool]] = []
    index = ShardIndex(np.empty(0, PLACE))

    def lose(name: str, reason: object, samples: int) -> None:
        index.lost.append(Note(name, str(reason), samples))

    with open(shard, "rb") as file:
        index.state = state_of(file.fileno())
        for sample in read_samples(file, shard, lose, images=False, expected=expected):
            index.repeated |= sample.earlier > 0
            try:
                image, text, _, _ = complete(sample)
            except ValueError as error:
                index.incomplete.append(Note(sample.named, str(error)))
                continue
            rows.append((*sample.place[image], *sample.place[text], text == "json"))
    index.places = np.array(rows, PLACE)
    return index


def _kept(path: Path, about: dict[str, Any], shard: str) -> ShardIndex | None:
    """The index in a file of the cache, if it is of this state of the shard."""
    try:
        with np.load(path, allow_pickle=False) as content:
            noted = json.loads(str(content["about"]))
            places = content["places"]
        incomplete, lost = ([Note(*note) for note in noted.pop(kind)] for kind in ("incomplete", "lost"))
        named, repeated = noted.pop("named"), bool(noted.pop("repeated"))
    except Exception:  # no such file, or a damaged one, for which numpy and zipfile have no common class
        return None
    if noted != about or named != shard or places.dtype != PLACE:
        return None
    return ShardIndex(places, incomplete, lost, (noted["size"], noted["mtime_ns"]), repeated)


def _keep(path: Path, about: dict[str, Any], shard: str, index: ShardIndex) -> None:
    found = {"incomplete": index.incomplete, "lost": index.lost, "repeated": index.repeated}
    noted = json.dumps({**about, "named": shard, **found})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_files({path: lambda file: _write(file, noted, index.places)})
    except OSError:  # without a cache directory that can be written to, the shard is read again next time
        pass


def _write(path: Path, noted: str, places: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, about=np.array(noted), places=places)
