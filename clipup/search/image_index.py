"""An index of image features in a directory: made once, brought up to date later, continued after an interruption.

One file, ``index.safetensors``, has the features and, in its header, the names of the images and the model. While an
index is being made, finished parts are kept in ``parts/`` in the same form.

Axis legend: ``N`` images, ``D`` width of the features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic_files import replace_files
from ..data.evaluation import EvalSamples
from ..data.images import resize_of, upright
from ..data.samples import Sample
from ..data.skips import Skips
from ..locks import LOCK_FILE, exclusive
from ..models import model_names, tokenizers
from ..precision import Precision
from ..progress import Progress

INDEX_FILE, PARTS = "index.safetensors", "parts"
PART_IMAGES = 512
"""Images after which what is finished is written."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """The model that computed an index's features, and how. Indexes of different encoders do not mix. The digest
    identifies the model, wherever its files are."""

    model: str = field(compare=False)
    """Model name, or the absolute path of its directory."""
    pretrained: str | None = field(compare=False)
    precision: Precision
    int8: bool
    model_digest: str
    """``digest`` of the model."""
    int8_agreement: dict[str, float] | None = field(default=None, compare=False)
    """``compare_int8`` on images of the index; None if they did not decide whether to encode in int8."""

    def __str__(self) -> str:
        weights = f" with the weights {self.pretrained}" if self.pretrained else ""
        return f"{self.model}{weights} in {self.precision}{' and int8' * self.int8} (checksum {self.model_digest[:8]})"


def digest(model: nn.Module, name: str) -> str:
    """A checksum of what features depend on: a model's weights by their names, types and values, its config, its
    transform of images, and the files of its tokenizer.

    Args:
        name: of the model, for config and tokenizer: as in ``clipup.create_model_and_transforms``.
    """
    checksum = hashlib.blake2b(digest_size=16)
    model_cfg = model_names.get_model_config(name)
    transform = getattr(model.visual, "preprocess_cfg", None)
    checksum.update(json.dumps([model_cfg, transform], sort_keys=True).encode())
    files = tokenizers.files_of(model_cfg["text_cfg"], tokenizers.source_directory(name))
    for file, content in sorted(files.items()):
        checksum.update(f"\n{file} {len(content)}\n".encode() + content)
    for name, value in sorted(model.state_dict().items()):
        checksum.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        checksum.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()


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
    skipped: list[str]
    """Names of the images that could not be read; the log has the reasons."""

    @classmethod
    def load(cls, directory: str | Path) -> ImageIndex:
        """Reads an index: that in the directory, or the one of the images in it (``default_directory``).

        Raises:
            FileNotFoundError: there is none.
            ValueError: its file is not what ``clipup index`` writes.
        """
        places = Path(directory), default_directory(directory)
        path = next((file for place in places if (file := place / INDEX_FILE).is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{directory} is neither an index ({INDEX_FILE}) nor a directory of images with one; make one: "
                "clipup index IMAGES"
            )
        try:
            with safe_open(path, "pt") as file:
                header, features = file.metadata() or {}, file.get_tensor("features")
            content = json.loads(header["index"])
            entries = [Entry(*entry) for entry in content["entries"]]
            return cls(Path(content["images"]), Encoder(**content["encoder"]), entries, features, content["skipped"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a whole index of images ({type(error).__name__}: {error}); make it again: "
                f"clipup index IMAGES {path.parent}"
            ) from error

    def save(self, directory: Path) -> None:
        """Writes the index, replacing an earlier one completely or not at all."""
        content = {
            "encoder": asdict(self.encoder),
            "images": str(self.images),
            "entries": self.entries,
            "skipped": self.skipped,
        }
        header, tensors = {"index": json.dumps(content)}, {"features": self.features.contiguous()}
        replace_files({directory / INDEX_FILE: lambda path: save_file(tensors, path, header)})

    def check_model(self, model_digest: str) -> None:
        """
        Raises:
            ValueError: the model with this ``digest`` is not the one that made the index.
        """
        if model_digest != self.encoder.model_digest:
            raise ValueError(
                f"{self.encoder.model} is not the model that made the index: its weights, config, transform or "
                "tokenizer have changed since; make the index again in another directory"
            )


def default_directory(images: str | Path) -> Path:
    """Where an index is kept if nothing else is said: among the user's data ($XDG_DATA_HOME, or ~/.local/share), by the
    resolved path of the directory of images."""
    images = Path(images).resolve()
    name = f"{images.name}-{hashlib.blake2b(os.fsencode(images), digest_size=8).hexdigest()}"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share", "clipup", "indexes", name)


def earlier_index(directory: Path) -> ImageIndex | None:
    """The index in a directory, or the first part of one that is not finished; None if there is none."""
    return next(_earlier(directory), None)


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
    """Makes an index of images, or brings an earlier one up to date.

    Images that have not changed keep their features; changed ones are encoded again, and missing ones leave the index.
    What is finished is written every ``PART_IMAGES`` images and when the call is interrupted; the next one continues.

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
        ValueError: the directory holds other files than an index, or an index of another encoder, model or other
            images; no image can be read; features that are not finite.
    """
    directory, images = Path(directory), Path(images).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in directory.iterdir() if path.name[0] != "."} - {INDEX_FILE, PARTS}
    if others:
        raise ValueError(f"out: {directory} holds {min(others)}; expected an index, or a new or empty directory")
    with exclusive(directory / LOCK_FILE, directory, "wait until it has ended, or choose another directory"):
        current = {record.key: _entry(record) for record in records}
        features_of = _reusable(directory, images, encoder, {*current.values()})
        outdated = [record for record in records if current[record.key] not in features_of]
        skips = Skips()
        part: dict[Entry, Tensor] = {}

        def write_part() -> None:
            if part:
                target = directory / PARTS / f"{len(_parts(directory)):05d}"
                target.mkdir(parents=True)
                ImageIndex(images, encoder, list(part), torch.stack([*part.values()]), []).save(target)
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
        except BaseException:
            write_part()
            raise
        features_of |= part
        kept = [entry for entry in current.values() if entry in features_of]
        skipped = [record.key for record in outdated if current[record.key] not in features_of]
        if not kept:
            raise ValueError(f"none of the {len(records)} images can be read, the first is {skips.first}")
        index = ImageIndex(images, encoder, kept, torch.stack([features_of[entry] for entry in kept]), skipped)
        index.save(directory)
        shutil.rmtree(directory / PARTS, ignore_errors=True)
    return index


def upright_samples(
    records: Sequence[Sample], preprocess: Callable[[Any], Tensor], skips: Skips, strict: bool = False
) -> EvalSamples:
    """Images as an index reads them: turned as their EXIF orientation says, JPEGs decoded at a smaller scale.

    Args:
        strict: an unreadable one raises ValueError, which names it.
    """
    return EvalSamples(records, partial(_upright, preprocess), skips, strict, resize=resize_of(preprocess))


def _upright(preprocess: Callable[[Any], Tensor], image: Any) -> Tensor:
    return preprocess(upright(image))


def _entry(record: Sample) -> Entry:
    status = Path(record.path).stat()
    return Entry(record.key, status.st_size, status.st_mtime_ns)


def _reusable(directory: Path, images: Path, encoder: Encoder, entries: set[Entry]) -> dict[Entry, Tensor]:
    """Features from a finished index and from the parts of an interrupted call. A moved directory of images is that of
    the index if the index has at least one of its ``entries``."""
    features_of: dict[Entry, Tensor] = {}
    for index in _earlier(directory):
        indexed = index.images if entries.isdisjoint(index.entries) else images
        for name, actual, wanted in (("the model", index.encoder, encoder), ("the images", indexed, images)):
            if actual != wanted:
                raise ValueError(
                    f"{directory} holds an index of {name}: {actual}; asked for: {wanted}; choose another directory, "
                    "or remove this one"
                )
        features_of |= dict(zip(index.entries, index.features, strict=True))
    return features_of


def _earlier(directory: Path) -> Iterator[ImageIndex]:
    """The finished index, and the parts of an interrupted call; damaged ones are logged."""
    sources = [directory] if (directory / INDEX_FILE).exists() else []
    for source in [*sources, *_parts(directory)]:
        try:
            yield ImageIndex.load(source)
        except (FileNotFoundError, ValueError) as error:
            _LOG.warning("%s is encoded again: %s", source, error)


def _parts(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / PARTS).glob("*") if path.name.isdecimal())
