"""Builds shards from the user's image-text pairs (`clipup data pairs CSV|FOLDER OUT`).

OUT/train-*.tar   KEY.jpg (or .png, .jpeg, .webp) and KEY.txt; of a CSV file also KEY.json with all captions
OUT/sizes.json    samples per shard, in open_clip's format
OUT/dataset.json  where the pairs came from, and their number
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from ..progress import progress as shown
from . import shard_writer
from .csv_files import CsvOptions, csv_samples
from .image_files import image_files
from .images import load_image
from .processes import each
from .samples import Sample, check_found
from .skips import Note, Skips, raise_lack
from .tars import IMAGE_EXTENSIONS

_SILENT = "it has no caption in a .txt of the same name"


def build(
    source: str | Path,
    out: str | Path,
    form: CsvOptions | None = None,
    samples_per_shard: int = 1000,
    processes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Builds the data set in `out` and returns the content of its `dataset.json`.

    Args:
        source: a CSV file, the rows of an image being its captions, or a folder of images that each have a caption in
            a `.txt` of the same name; subfolders are searched too.
        out: a directory that does not exist, or is empty.
        form: the columns of the CSV file.
        processes: processes that read and decode images; None: one per CPU.
        overwrite: replaces another data set in `out`.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no image.
        ValueError: no pair can be read, an argument is out of range, or `out` holds something else, which stays.
    """
    out, name, skips = Path(out), os.fspath(source), Skips()
    with shard_writer.only_writer(out):
        shard_writer.check_target(out, overwrite)
        is_folder = os.path.isdir(name)
        samples = image_files(name, "source") if is_folder else csv_samples(name, form or CsvOptions(), skips, "source")
        read = shown(each(_pair, samples, processes), "reading pairs", "pairs", total=len(samples), show=progress)
        with shard_writer.appearing_whole(out) as directory:
            # keys, because names may have dots, or be those of files in several folders
            numbered = ((f"{number:09d}", pair) for number, pair in enumerate(_readable(read, skips)))
            shards = shard_writer.write_shards(directory, "train", numbered, samples_per_shard)
            images = sum(shard["samples"] for shard in shards)
            check_found(images, skips, name, "source")
            shard_writer.write_sizes(directory, shards)
            counts = {"images": images, "skipped": int(skips)}
            dataset = {"name": "pairs", "source": name, **counts, "splits": {"train": {"shards": shards}}}
            shard_writer.write_json(directory / shard_writer.DATASET_FILE, dataset)
    return dataset


def _readable(read: Iterable[dict[str, bytes] | Note], skips: Skips) -> Iterator[dict[str, bytes]]:
    notes = []
    for pair in read:
        if isinstance(pair, Note):
            notes.append(pair)
        else:
            yield pair
    skips.add(notes)  # together: it names the first of each reason, and counts the others


def _pair(sample: Sample) -> dict[str, bytes] | Note:
    """The members of a pair by extension. Images of formats that shards do not have become PNG."""
    path = Path(sample.path)
    try:
        content, extension = path.read_bytes(), path.suffix.lower()[1:]
        image = load_image(content)
        if extension not in IMAGE_EXTENSIONS:
            image.save(file := BytesIO(), extension := "png")
            content = file.getvalue()
        if sample.captions:
            captions = json.dumps({"captions": sample.captions}).encode()
            return {extension: content, "txt": sample.captions[0].encode(), "json": captions}
        text = path.with_suffix(".txt")
        caption = text.read_text("utf-8-sig").strip() if text.is_file() else ""
        return {extension: content, "txt": caption.encode()} if caption else Note(sample.key, _SILENT)
    except Exception as error:  # PIL has no common class for what a broken file may raise
        raise_lack(error)
        return Note(sample.key, f"{type(error).__name__}: {error}")
