"""An index of image features in a directory: made once, brought up to date later, continued after an interruption.

``index.json`` names the model and the images, ``features.safetensors`` has a row per image. While an index is being
made, finished parts are kept in ``parts/``.

Axis legend: ``N`` images, ``D`` width of the features.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import checks
from ..atomic_files import replace_files
from ..data.loaders import EvalSamples
from ..data.sample_index import Record
from ..data.skips import Skips
from ..precision import Precision

INDEX_FILE, FEATURES_FILE, PARTS = "index.json", "features.safetensors", "parts"
PART_IMAGES = 4096
"""Images after which what is finished is written."""
_VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """What the features of an index were computed with; indexes of different encoders do not mix."""

    model: str
    """Model name or directory."""
    pretrained: str | None
    precision: Precision
    int8: bool


class Entry(NamedTuple):
    """An image file as it was when it was encoded."""

    name: str
    """Its path below the directory of images."""
    size: int
    changed: int
    """Time of its last change, in nanoseconds."""


@dataclass(frozen=True)
class ImageIndex:
    """Features of images, as ``load`` read them."""

    images: Path
    """The directory of images."""
    encoder: Encoder
    entries: list[Entry]
    features: Tensor
    """[N, D] float32, of length 1."""
    skipped: dict[str, str]
    """Images that could not be read, with the reason."""

    @classmethod
    def load(cls, directory: str | Path) -> ImageIndex:
        """Reads an index.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its files are not what ``clipup index`` writes, or do not fit together.
        """
        path = Path(directory) / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no index in {directory} ({INDEX_FILE}); make one: clipup index IMAGES OUT"
            )
        found = checks.read_json(path)
        try:
            if found["version"] != _VERSION:
                raise ValueError(f"{path} has version {found['version']!r}, this clipup reads {_VERSION}")
            encoder = Encoder(**found["encoder"])
            entries = [Entry(str(name), int(size), int(changed)) for name, size, changed in found["entries"]]
            skipped = {str(name): str(reason) for name, reason in found["skipped"].items()}
            images = Path(found["images"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an index of images ({type(error).__name__}: {error})") from error
        features = _read_features(path.with_name(FEATURES_FILE))
        if features.dim() != 2 or len(features) != len(entries):
            raise ValueError(
                f"{path.with_name(FEATURES_FILE)} has features of shape {list(features.shape)} for {len(entries)} "
                "images; make the index again"
            )
        return cls(images, encoder, entries, features, skipped)

    def save(self, directory: Path) -> None:
        """Writes the index, replacing an earlier one completely or not at all."""
        content = {
            "version": _VERSION,
            "encoder": asdict(self.encoder),
            "images": str(self.images),
            "entries": self.entries,
            "skipped": self.skipped,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        replace_files(
            {
                directory / FEATURES_FILE: lambda path: save_file({"features": self.features.contiguous()}, path),
                directory / INDEX_FILE: lambda path: path.write_text(text, encoding="utf-8"),
            }
        )


def _read_features(path: Path) -> Tensor:
    try:
        return load_file(path)["features"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no features of an index ({error}); make the index again") from error


def update_index(
    directory: str | Path,
    images: str | Path,
    records: Sequence[Record],
    encoder: Encoder,
    encode: Callable[[Tensor], Tensor],
    preprocess: Callable[[Any], Tensor],
    *,
    batch_size: int = 64,
    workers: int = 0,
    show: Callable[[Iterable], Iterable] = iter,
) -> ImageIndex:
    """Makes an index of images, or brings an earlier one up to date.

    Images that have not changed keep their features; changed ones are encoded again, and missing ones leave the index.
    What is finished is written every ``PART_IMAGES`` images, so that an interrupted call is continued by the next one.

    Args:
        directory: of the index; created if needed.
        images: directory of the images, below which ``records`` lie.
        records: the images, by their paths below ``images``.
        encode: images [B, 3, H, W] -> features [B, D] of length 1.
        preprocess: PIL image -> tensor [3, H, W].
        show: wraps the batches, to show progress.

    Raises:
        ValueError: the directory holds an index of another encoder or of other images; no image can be read.
    """
    directory, images = Path(directory), Path(images).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    known = _known(directory, images, encoder)
    now = {entry.name: entry for entry in map(_entry, records)}
    todo = [record for record in records if now[record.key] not in known]
    skips = Skips()
    skipped: dict[str, str] = {}
    part: dict[Entry, Tensor] = {}
    samples = EvalSamples(todo, preprocess, skips)
    for batch, _, metadata in show(samples.batches(batch_size, workers)):
        for one, features in zip(metadata, encode(batch), strict=True):
            part[now[one["key"]]] = features
        if len(part) >= PART_IMAGES:
            _write_part(directory, part, encoder, images)
            known |= part
            part = {}
    known |= part
    kept = [entry for entry in now.values() if entry in known]
    for record in todo:
        if now[record.key] not in known:
            skipped[record.key] = "it cannot be read (the log has the reason)"
    if not kept:
        raise ValueError(f"none of the {len(records)} images can be read, such as {skips.first}")
    found = ImageIndex(images, encoder, kept, torch.stack([known[entry] for entry in kept]), skipped)
    found.save(directory)
    shutil.rmtree(directory / PARTS, ignore_errors=True)
    return found


def _entry(record: Record) -> Entry:
    status = Path(record.path).stat()
    return Entry(record.key, status.st_size, status.st_mtime_ns)


def _known(directory: Path, images: Path, encoder: Encoder) -> dict[Entry, Tensor]:
    """Features that are there already, of a finished index and of the parts of an interrupted call."""
    known: dict[Entry, Tensor] = {}
    sources = [directory] if (directory / INDEX_FILE).exists() else []
    sources += sorted((directory / PARTS).glob("[0-9]*"))
    for source in sources:
        try:
            found = ImageIndex.load(source)
        except (OSError, ValueError) as error:
            if source == directory:
                raise
            _LOG.warning("%s is encoded again: %s", source, error)
            continue
        for what, have, wanted in (("encoder", found.encoder, encoder), ("images", found.images, images)):
            if have != wanted:
                raise ValueError(
                    f"{directory} holds an index with {what} {have}, and {wanted} was asked for; choose another "
                    "directory, or remove this one"
                )
        known |= dict(zip(found.entries, found.features, strict=True))
    return known


def _write_part(directory: Path, part: dict[Entry, Tensor], encoder: Encoder, images: Path) -> None:
    parts = directory / PARTS
    number = 1 + max((int(path.name) for path in parts.glob("[0-9]*")), default=-1)
    target = parts / f"{number:05d}"
    target.mkdir(parents=True)
    ImageIndex(images, encoder, list(part), torch.stack(list(part.values())), {}).save(target)
