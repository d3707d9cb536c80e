"""Samples on disk as an index: where each image lies and what its captions are. Evaluation and the cache read by it.

A source is one of
- WebDataset shards: `KEY.png|jpg|jpeg|webp` with `KEY.txt` (captions, one a line) or `KEY.json`
  (`{"captions": [...], ...}`),
- a CSV file with a column of image paths and one of captions.

What cannot be read is skipped and counted in `Skips`, never silently lost.
"""

from __future__ import annotations

import glob
import json
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from clipup.extras import needed_for

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
GIVE_UP_AFTER = 10_000
"""Unreadable samples in a row after which reading stops: there is nothing to be read any more."""

_LOG = logging.getLogger(__name__)


class Skips:
    """Counts samples that could not be read, in this process and in the workers of its loaders."""

    def __init__(self) -> None:
        self._count = multiprocessing.Value("q", 0)
        self._in_a_row = 0

    def __int__(self) -> int:
        return self._count.value

    def note(self, name: str, reason: object) -> None:
        """One sample, or the rest of one shard, is skipped. ValueError when nothing else has come for a long time."""
        with self._count.get_lock():
            self._count.value += 1
        _LOG.warning("skipped %s: %s", name, reason)
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP_AFTER:
            raise ValueError(f"{GIVE_UP_AFTER} samples in a row could not be read, the last is {name}: {reason}")

    def read(self) -> None:
        """A sample could be read."""
        self._in_a_row = 0


@dataclass(frozen=True)
class Record:
    """One image and its captions; `offset` and `size` say which bytes of `path`, None means all of it."""

    key: str
    path: str
    captions: tuple[str, ...]
    offset: int | None = None
    size: int | None = None
    metadata: dict = field(default_factory=dict)


def lines(text: str) -> list[str]:
    """The captions of a text that holds one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def load_image(content: str | bytes) -> Image:
    """An image, decoded whole, RGB, from a path or from its bytes. Raises what PIL raises when it is unreadable."""
    from PIL import Image

    with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
        return image.convert("RGB")


def read_image(record: Record) -> Image:
    """The image of a record, as `load_image`."""
    if record.offset is None:
        return load_image(record.path)
    with open(record.path, "rb") as file:
        file.seek(record.offset)
        return load_image(file.read(record.size))


class Images(Dataset):
    """`[i]` is the preprocessed image of record i, or the reason (a str) why it cannot be read."""

    def __init__(self, records: Sequence[Record], preprocess: Callable[[Image], Tensor]) -> None:
        self.records, self.preprocess = records, preprocess

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Tensor | str:
        record = self.records[index]
        try:
            image = read_image(record)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            return f"{type(error).__name__}: {error}"
        tensor = self.preprocess(image)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"preprocess: made {type(tensor).__name__} of {record.key} in {record.path}, expected a tensor "
                "[C, H, W]: end it with torchvision.transforms.ToTensor()"
            )
        return tensor


def expand_shards(source: str | os.PathLike | Sequence[str], argument: str) -> list[str]:
    """The shards that a source names: a path, braces, a wildcard, several of them joined by "::", or a list of them.

    Raises FileNotFoundError when there is none or when one of them is missing, naming `argument`.
    """
    patterns = (
        os.fspath(source).split("::") if isinstance(source, (str, os.PathLike)) else [os.fspath(s) for s in source]
    )
    shards: list[str] = []
    for pattern in patterns:
        if pattern and not is_remote(pattern):
            shards += _local_shards(pattern, argument)
        elif pattern:
            shards += _braces(pattern)
    if not shards:
        raise FileNotFoundError(f"{argument}: {source!r} names no shard, expected a path such as DIR/train-*.tar")
    return shards


def is_remote(url: str) -> bool:
    """Whether a shard is reached by something else than opening a file (http:, s3:, pipe:, ...)."""
    scheme, separator, _ = url.partition(":")
    return bool(separator) and scheme.isalnum() and len(scheme) > 1 and not os.path.exists(url)


def _local_shards(pattern: str, argument: str) -> list[str]:
    shards = [pattern] if os.path.exists(pattern) else []
    for path in [] if shards else _braces(pattern):
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not matches or not os.path.isfile(matches[0]):
            raise FileNotFoundError(
                f"{argument}: no shard {path} (from {pattern!r}): build the data first, or mend the path"
            )
        shards += matches
    return shards


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


def tar_records(shards: Sequence[str], skips: Skips, argument: str) -> list[Record]:
    """Every complete sample of local shards, in their order. Only headers and captions are read, no image."""
    records = []
    for shard in shards:
        if is_remote(shard):
            raise ValueError(f"{argument}: {shard} is not a file of this machine, which is needed here: copy it first")
        for key, (members, text, about) in _tar_samples(shard, skips).items():
            listed = about.pop("captions", None)
            captions = [str(c) for c in listed] if isinstance(listed, list) and listed else lines(text)
            image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
            if image is None or not captions:
                skips.note(f"{key} in {shard}", "it has no image" if image is None else "it has no caption")
                continue
            records.append(Record(key, shard, tuple(captions), *image, {"key": key, **about}))
    return records


def _tar_samples(shard: str, skips: Skips) -> dict[str, tuple[dict[str, tuple[int, int]], str, dict]]:
    """By key: where its members lie (offset, size, by extension), its text, and its json.

    A shard that breaks off gives what lies before, and counts as one that is skipped.
    """
    samples: dict[str, tuple[dict[str, tuple[int, int]], str, dict]] = {}
    try:
        with tarfile.open(shard, "r:", ignore_zeros=True) as tar:  # ignore_zeros: goes on behind a damaged header
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, dot, extension = name.partition(".")
                if not member.isreg() or not dot:
                    continue
                key = os.path.join(folder, stem)
                members, text, about = samples.get(key, ({}, "", {}))
                if extension in ("txt", "json"):
                    text, about = _words(extension, tar.extractfile(member).read(), text, about)
                members[extension.lower()] = (member.offset_data, member.size)
                samples[key] = (members, text, about)
    except (OSError, tarfile.TarError) as error:
        skips.note(f"the rest of {shard}", f"not readable as an uncompressed tar file ({error})")
    return samples


def _words(extension: str, content: bytes, text: str, about: dict) -> tuple[str, dict]:
    """Text and json of a sample, one of them replaced by `content`, or by nothing where it cannot be decoded."""
    try:
        return (content.decode(), about) if extension == "txt" else (text, dict(json.loads(content)))
    except (ValueError, TypeError):
        return text, about


def csv_rows(path: str, separator: str, img_key: str, caption_key: str, argument: str) -> Iterator[tuple[str, str]]:
    """Image path and caption of every row, read as open_clip reads them; "" where a cell is empty.

    Raises FileNotFoundError for a missing file, ValueError for a missing column, each naming the argument.
    """
    pandas = _pandas()
    check_csv(path, separator, img_key, caption_key, argument)
    table = pandas.read_csv(path, sep=separator, usecols=[img_key, caption_key])
    for image, caption in zip(table[img_key], table[caption_key], strict=True):
        yield ("" if pandas.isna(image) else str(image)), ("" if pandas.isna(caption) else str(caption))


def check_csv(path: str, separator: str, img_key: str, caption_key: str, argument: str) -> None:
    """Raises what `csv_rows` raises, having read no more than the header."""
    pandas = _pandas()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    try:
        columns = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
    except pandas.errors.EmptyDataError:
        raise ValueError(f"{argument}: {path} is empty, expected a header and rows") from None
    for option, column in (("csv_img_key", img_key), ("csv_caption_key", caption_key)):
        if column not in columns:
            raise ValueError(
                f"{option}: {path} has no column {column!r}, its columns are {columns}: name the right one, "
                f"or the right csv_separator (now {separator!r})"
            )


def _pandas() -> ModuleType:
    with needed_for("reading CSV files", "eval"):
        import pandas
    return pandas


def csv_records(
    path: str, separator: str, img_key: str, caption_key: str, skips: Skips, argument: str, one_an_image: bool
) -> list[Record]:
    """The rows of a CSV file; with `one_an_image` rows of the same image are one record with several captions."""
    captions_of: dict[object, tuple[str, list[str]]] = {}
    for row, (image, text) in enumerate(csv_rows(path, separator, img_key, caption_key, argument)):
        captions = lines(text)
        if not image or not captions:
            skips.note(f"row {row + 1} of {path}", "it has no image" if not image else "it has no caption")
            continue
        captions_of.setdefault(image if one_an_image else row, (image, []))[1].extend(captions)
    return [
        Record(image, image, tuple(dict.fromkeys(captions)), metadata={"key": image})
        for image, captions in captions_of.values()
    ]
