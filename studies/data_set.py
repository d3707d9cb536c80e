"""The directory of a data set: written once, and named by all that it depends on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from clipup.data import shard_writer
from clipup.data.loaders import describe

from . import fixed_texts

SAMPLES_PER_SHARD = 4096


class Sample(NamedTuple):
    """An image with its caption; ``group`` tells images of one maker apart from others."""

    key: str
    png: bytes
    caption: str
    group: str


def build(
    out: str | Path,
    name: str,
    rule: int,
    source: dict,
    options: dict,
    overwrite: bool,
    make: Callable[[Path], dict],
    *others: tuple[str, ...],
) -> dict:
    """Builds a data set in ``out`` unless it is there, and returns the content of its ``dataset.json``.

    Args:
        rule: incremented when the same source and options give a different data set.
        source, options, others: all that the data depend on.
        make: writes the shards into a directory that is put in the place of ``out``, and returns the rest of
            ``dataset.json``, with "splits".

    Raises:
        ValueError: ``out`` holds something else, which is left unchanged.
    """
    out = Path(out)
    fingerprint = hashlib.sha256(json.dumps([rule, source, options, *others]).encode()).hexdigest()
    with shard_writer.only_writer(out):
        if shard_writer.finished(out, fingerprint):
            return describe(out)
        shard_writer.check_target(out, overwrite, (fixed_texts.FILE, "licences"))
        with shard_writer.appearing_whole(out) as directory:
            content = make(directory)
            shards = [shard for split in content["splits"].values() for shard in split["shards"]]
            shard_writer.write_sizes(directory, shards)
            about = {"name": name, "format": rule, "fingerprint": fingerprint, "options": options}
            dataset = {**about, **content, "source": source}
            shard_writer.write_json(directory / shard_writer.DATASET_FILE, dataset)
    return dataset


def write_split(directory: Path, split: str, samples: Iterable[Sample]) -> dict:
    """Writes the shards of a split, and returns their description for ``dataset.json``. Outside of training a sample
    also has a .json, ``{"captions": [...], "group": ...}``."""
    written = (_files(sample, split) for sample in samples)
    shards = shard_writer.write_shards(directory, split, written, SAMPLES_PER_SHARD)
    return {"images": sum(shard["samples"] for shard in shards), "shards": shards}


def _files(sample: Sample, split: str) -> shard_writer.Sample:
    content = {"png": sample.png, "txt": sample.caption.encode()}
    about = json.dumps({"captions": [sample.caption], "group": sample.group}).encode()
    return sample.key, content if split == "train" else content | {"json": about}


def png(picture: Image) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
