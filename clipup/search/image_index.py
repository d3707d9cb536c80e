"""An index of image features in a directory: made once, brought up to date later, continued after an interruption.

One file, ``index.safetensors``, has the features and, in its header, the names of the images and the model. While an
index is being made, finished parts are kept in ``parts/`` in the same form.

Axis legend: ``N`` images, ``D`` width of the features.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_files import replace_files
from ..data.image_files import image_files
from ..data.samples import Sample
from ..data.skips import Skips
from ..locks import LOCK_FILE, exclusive
from ..precision import Precision
from ..progress import Progress
from .encoder import Encoder, load_encoder, upright_samples

INDEX_FILE, PARTS = "index.safetensors", "parts"
PART_IMAGES = 512
"""Images after which what is finished is written."""


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
    """Why images could not be read, by their names."""

    @classmethod
    def load(cls, directory: str | Path) -> ImageIndex:
        """Reads an index: that in the directory, or that of the images in it (``default_directory``).

        Raises:
            FileNotFoundError: there is none, or it is not finished.
            ValueError: its file is not what ``clipup index`` writes.
        """
        places = Path(directory), default_directory(directory)
        path = next((file for place in places if (file := place / INDEX_FILE).is_file()), None)
        if path is None:
            unfinished = next((place for place in places if any(_parts(place))), None)
            raise FileNotFoundError(
                f"{directory} is neither an index (a directory with {INDEX_FILE}) nor a directory of images that was "
                "indexed; make one: clipup index IMAGES"
                if unfinished is None
                else f"the index in {unfinished} is not finished; call clipup index again as before, and it continues"
            )
        try:
            with safe_open(path, "pt") as file:
                header, features = file.metadata() or {}, file.get_tensor("features")
            content = json.loads(header["index"])
            entries = [Entry(*entry) for entry in content["entries"]]
            return cls(Path(content["images"]), Encoder(**content["encoder"]), entries, features, content["skipped"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a whole index of images ({type(error).__name__}: {error}); remove this file, and call "
                "clipup index again, with the model that you chose, if any"
            ) from error

    def check_encoder(self, encoder: Encoder) -> None:
        """
        Raises:
            ValueError: the index was made by another encoder.
        """
        if encoder != self.encoder:
            raise ValueError(
                f"the index of {self.images} was made with {self.encoder}, not with {encoder}: weights, config, "
                "transform, tokenizer or precision differ; make an index in another directory, or remove this one"
            )

    def save(self, directory: Path) -> None:
        """Writes the index, replacing an earlier index completely or not at all."""
        content = {
            "encoder": asdict(self.encoder),
            "images": str(self.images),
            "entries": self.entries,
            "skipped": self.skipped,
        }
        header, tensors = {"index": json.dumps(content)}, {"features": self.features.contiguous()}
        replace_files({directory / INDEX_FILE: lambda path: save_file(tensors, path, header)})


def default_directory(images: str | Path) -> Path:
    """Where an index is kept if nothing else is said: among the user's data ($XDG_DATA_HOME, or ~/.local/share), by the
    resolved path of the directory of images."""
    images = Path(images).resolve()
    name = f"{images.name}-{hashlib.blake2b(os.fsencode(images), digest_size=8).hexdigest()}"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share", "clipup", "indexes", name)


def index_images(
    images: str | Path,
    directory: str | Path | None = None,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    precision: Precision | Literal["int8"] | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], object] = print,
) -> ImageIndex:
    """Makes the index of a directory of images, or brings it up to date, with a progress bar. Options as those of
    ``clipup index``.

    Args:
        images: directory of images, searched with its subdirectories.
        directory: of the index; None: ``default_directory``.
        say: called with what to know about the model, and with the number of images that are gone.

    Raises:
        DirectoryInUse: another process writes the index.
        FileNotFoundError: no image, or the files of the model are not in their place any more.
        ValueError: as ``update_index``; a model without weights, or an unknown model.
    """
    records, out = image_files(images), Path(directory or default_directory(images))
    # also refuses the directory before a model is loaded or downloaded
    earlier = next(_earlier(out, Path(images).resolve(), {*map(_entry, records)}), None)
    loaded = load_encoder(
        earlier.encoder if earlier else None, records, model, pretrained, precision, device, batch_size, workers, say
    )
    index = update_index(
        out,
        images,
        records,
        loaded.encoder,
        lambda batch: loaded.images(batch, batch_size),
        loaded.preprocess,
        batch_size=batch_size,
        workers=workers,
        show_progress=True,
    )
    if earlier and (gone := {entry.name for entry in earlier.entries} - {record.key for record in records}):
        say(f"images that are not there any more, and have left the index: {len(gone)}")
    return index


def update_index(
    directory: str | Path,
    images: str | Path,
    records: Sequence[Sample],
    encoder: Encoder,
    encode: Callable[[Tensor], Tensor],
    preprocess: Callable[[Any], Tensor],
    *,
    batch_size: int = 64,
    workers: int = 0,
    show_progress: bool = False,
) -> ImageIndex:
    """Makes an index of images, or brings an earlier index up to date.

    Images that have not changed keep their features; changed images are encoded again, and missing images leave the
    index. What is finished is written every ``PART_IMAGES`` images and when the call is interrupted; the next
    call continues.

    Args:
        directory: of the index; created if needed.
        images: directory of the images, below which ``records`` lie.
        records: the images, by their paths below ``images``.
        encode: images [B, 3, H, W] -> features [B, D] of length 1.
        preprocess: PIL image -> tensor [3, H, W]. If it begins with torchvision's ``Resize``, images are decoded at a
            smaller scale and resized by ``load_image``, with almost the same pixels.
        show_progress: a progress bar.

    Raises:
        DirectoryInUse: another process writes the index.
        ValueError: the directory holds other files than an index, a damaged index, or an index of another encoder,
            model or other images; no image can be read; features that are not finite.
    """
    directory, images = Path(directory), Path(images).resolve()
    with exclusive(directory / LOCK_FILE, directory, "wait until it has ended, or choose another directory"):
        current = {record.key: _entry(record) for record in records}
        features_of: dict[Entry, Tensor] = {}
        for index in _earlier(directory, images, {*current.values()}):
            index.check_encoder(encoder)
            features_of |= dict(zip(index.entries, index.features, strict=True))
        outdated = [record for record in records if current[record.key] not in features_of]
        skips = Skips()
        part: dict[Entry, Tensor] = {}

        def write_part() -> None:
            if part:
                target = directory / PARTS / str(time.time_ns())
                target.mkdir(parents=True)
                ImageIndex(images, encoder, list(part), torch.stack([*part.values()]), {}).save(target)
                features_of.update(part)
                part.clear()

        try:
            samples = upright_samples(outdated, preprocess, skips)
            with Progress("encoding", "images", len(outdated), show=show_progress) as shown:
                for batch, _, metadata in samples.batches(batch_size, workers):
                    features = encode(batch)
                    if not features.isfinite().all():
                        raise ValueError(f"the model gives features that are not finite, from {metadata[0]['key']} on")
                    part |= {current[about["key"]]: feature for about, feature in zip(metadata, features, strict=True)}
                    shown.update(len(batch))
                    if len(part) >= PART_IMAGES:
                        write_part()
        finally:
            write_part()
        kept = [entry for entry in current.values() if entry in features_of]
        skipped = {record.key: skips.reasons[record.named] for record in outdated if record.named in skips.reasons}
        if not kept:
            raise ValueError(f"none of the {len(records)} images can be read, the first is {skips.first}")
        index = ImageIndex(images, encoder, kept, torch.stack([features_of[entry] for entry in kept]), skipped)
        index.save(directory)
        shutil.rmtree(directory / PARTS, ignore_errors=True)
    return index


def _entry(record: Sample) -> Entry:
    path = Path(record.path)
    status = path.stat() if path.exists() else path.lstat()  # of a link to nowhere
    return Entry(record.key, status.st_size, status.st_mtime_ns)


def _earlier(directory: Path, images: Path, entries: Set[Entry]) -> Iterator[ImageIndex]:
    """The finished index, and the parts of an interrupted call, as ``update_index`` continues them. They are of
    ``images`` if those have at least one of their entries and the directory that was indexed has none any more: it has
    moved.

    Raises:
        ValueError: the directory holds anything else, also a damaged file.
    """
    if others := {path.name for path in directory.glob("[!.]*")} - {INDEX_FILE, PARTS}:
        raise ValueError(f"out: {directory} holds {min(others)}; expected an index, or a new or empty directory")
    for source in [*[directory] * (directory / INDEX_FILE).exists(), *_parts(directory)]:
        index = ImageIndex.load(source)
        remains = any((index.images / entry.name).exists() for entry in index.entries)
        if index.images != images and (remains or entries.isdisjoint(index.entries)):
            raise ValueError(
                f"{directory} holds an index of the images in {index.images}, not of those in {images}; choose another "
                "directory, or remove this one"
            )
        yield index


def _parts(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"{PARTS}/[0-9]*/{INDEX_FILE}"))
