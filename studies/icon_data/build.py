"""Builds the icons data set: openly licensed icons of 145 sets, captioned by name (`python -m studies icons OUT`).

    OUT/train-*.tar            SET/NAME.png, .txt (the caption)
    OUT/validation-*.tar       the same and .json; names held out of the training sets, for tuning
    OUT/test_names-*.tar       the same; other names held out of the training sets
    OUT/test_styles-*.tar      the same; whole sets outside the training split
    OUT/test_drawings-*.tar    the same, optional; drawings whose name and set are in the training split
    OUT/captions.json          words removed from names by set, and why
    OUT/vocabulary.txt         the words of the training captions, the most frequent first
    OUT/sizes.json             samples per shard, in open_clip's format
    OUT/dataset.json           options, counts, rules of the splits, skipped icons, sets and licences
    OUT/LICENSES.md            makers and licences of the sets

The .json is `{"captions": [...], "group": SET}`. The same package, options and image libraries give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from clipup.clip.word_tokenizer import count_vocabulary
from clipup.data import shard_writer
from clipup.data.processes import each
from clipup.progress import progress as shown

from .. import data_set
from . import captions, iconify, near_duplicates, splits
from .iconify import Icon, IconSet

FORMAT = 1
"""Incremented when the same package and options give a different data set."""
WORDS_AT_LEAST = 5
"""Minimum number of training captions that contain a word of the vocabulary."""

_BLANK = 2  # a drawing with a smaller range of gray levels, out of 255, shows nothing
_LICENCES = """# Makers and licences of the icons

The drawings were scaled and put on white, and are otherwise unchanged. An icon's key names its set (`SET/NAME`). They
were taken from {package} {version}.

| set | name | made by | licence | images | from |
|---|---|---|---|---|---|
"""
_LICENCE = "| {set} | {gives} | {made_by} | {licence} | {images} | {url} |\n"
_RULES = {
    "train": "icons of the training sets",
    "validation": f"{splits.VALIDATION_SHARE:.0%} of the names of the training sets, held out of all of them, for "
    "tuning",
    "test_names": f"other {splits.TEST_NAMES_SHARE:.0%} of these names, held out in the same way",
    "test_styles": "whole sets in styles that are not in the training split",
    "twins": "held-out drawings with a duplicate or near-duplicate in the training split are left out (validation's "
    "also if it is in a test split); near-duplicates have perceptual hashes with a cosine of at least "
    f"{near_duplicates.ALIKE}",
    "left_out": "aliases, hidden icons, and drawings that cannot be read or show nothing",
}
_RULE_OF_DRAWINGS = (
    f"{splits.TEST_DRAWINGS_SHARE:.0%} of the captions of each training set, with all drawings that the set has "
    "of them, if another training set keeps the caption; taken from train, without changing the other splits"
)
_CAPTION_RULES = {
    "why": "Many sets add the drawing style at one end of their names (filled, in 24 pixels). That is a property of "
    "the drawing, not of its content; other sets have no word for it, and it would split one name into many.",
    "rule": f"A word is removed from an end of a set's names if at least {captions.CUT_FROM:.0%} of them have it "
    "there and it is one of style_words or a number; a name keeps at least one word.",
}


@dataclass(frozen=True)
class Sets:
    """Prefixes of the training sets and of the sets that are held out whole."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def read(cls) -> Sets:
        """The study's sets: open licences without NC or GPL, no logos, flags or programming languages, and no drawings
        shared between training and test sets."""
        listed = json.loads((Path(__file__).parent / "icon_sets.json").read_text("utf-8"))
        return cls(tuple(listed["train"]), tuple(listed["test"]))

    def without(self, left_out: Sequence[str]) -> Sets:
        """
        Raises:
            ValueError: a prefix is not one of these sets'.
        """
        unknown = sorted(set(left_out) - {*self.train, *self.test})
        if unknown:
            raise ValueError(
                f"leave_out: {', '.join(unknown)}: not a set of this data set; expected prefixes such as mdi"
            )
        return Sets(*(tuple(prefix for prefix in sets if prefix not in left_out) for sets in (self.train, self.test)))


@dataclass(frozen=True)
class Sample:
    """A rendered icon with its caption and split."""

    icon: Icon
    caption: str
    split: str
    png: bytes


def build(
    out: str | Path,
    package: str | Path,
    size: int = 32,
    seed: int = 0,
    overwrite: bool = False,
    processes: int | None = None,
    progress: bool = True,
    sets: Sets | None = None,
    test_drawings: bool = False,
) -> dict:
    """Builds the data set in `out`, or reuses it if it exists, and returns the content of its `dataset.json`.

    Args:
        out: a directory that does not exist, is empty, or holds this data set.
        package: the unpacked npm package @iconify/json (see `studies.icon_data.iconify`).
        size: side of the images in pixels.
        seed: of the splits and of the order in the training shards.
        overwrite: replaces another data set in `out`.
        processes: rendering processes; default: one per CPU.
        sets: default: the study's.
        test_drawings: adds a third test split, of drawings whose names and sets are in the training split. It is taken
            from the training split; the other held-out splits stay bitwise the same.

    Raises:
        FileNotFoundError: the package is missing.
        ImportError: resvg-py is not installed.
        ValueError: as of `data_set.build`.
    """
    sets = sets or Sets.read()
    options = {"size": size, "seed": seed, "samples_per_shard": data_set.SAMPLES_PER_SHARD}
    options |= {"test_drawings": True} if test_drawings else {}
    source = {
        "package": iconify.PACKAGE,
        "version": iconify.version(Path(package)),
        "resvg_py": iconify.renderer_version(),
    }

    def make(directory: Path) -> dict:
        content, described, used = _make(directory, Path(package), options, sets, processes, progress)
        images = Counter(used)
        makers = [{**asdict(of), "images": images[of.set]} for of in described if images[of.set]]
        rows = "".join(_LICENCE.format(**maker) for maker in makers)
        (directory / "LICENSES.md").write_text(_LICENCES.format(**source) + rows, "utf-8")
        return {**content, "sources": makers}

    return data_set.build(out, "icons", FORMAT, source, options, overwrite, make, sets.train, sets.test)


def _make(
    directory: Path, package: Path, options: dict[str, int], sets: Sets, processes: int | None, progress: bool
) -> tuple[dict, list[IconSet], list[str]]:
    """The content of ``dataset.json``, all sets, and the set of every drawing."""
    seed, test_drawings = options["seed"], "test_drawings" in options
    described, icons = iconify.read_sets(package, (*sets.train, *sets.test), progress)
    texts, cut = captions.of_icons(icons)
    assigned = [
        splits.split_of(caption, icon.set in sets.test, seed) for icon, caption in zip(icons, texts, strict=True)
    ]
    samples, pictures, skipped = _render(icons, texts, assigned, options["size"], processes, progress)
    if test_drawings:  # an icon that cannot be drawn does not count as a set's training drawing of a caption
        columns = zip(*((sample.split, sample.icon.set, sample.caption) for sample in samples), strict=True)
        moved = splits.hold_out_drawings(*columns, seed)
        samples = [replace(sample, split=split) for sample, split in zip(samples, moved, strict=True)]
    names = (*splits.SPLITS, splits.TEST_DRAWINGS) if test_drawings else splits.SPLITS
    apart_from = {name: others for name, others in splits.APART_FROM.items() if name in names}
    kept, duplicates = near_duplicates.keep_apart([sample.split for sample in samples], pictures, apart_from, progress)
    samples = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
    samples = [samples[i] for i in splits.order([sample.icon.key for sample in samples], seed)]
    by_split = {split: [sample for sample in samples if sample.split == split] for split in names}
    counted = {
        split: _counts(members) | data_set.write_split(directory, split, map(_file, members))
        for split, members in by_split.items()
    }
    vocabulary = count_vocabulary((sample.caption for sample in by_split["train"]), WORDS_AT_LEAST)
    (directory / "vocabulary.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    said = {**_CAPTION_RULES, "style_words": sorted(captions.STYLE_WORDS), "cut": cut}
    shard_writer.write_json(directory / "captions.json", said)
    content = {
        "splits": counted,
        "rules": _RULES | ({splits.TEST_DRAWINGS: _RULE_OF_DRAWINGS} if test_drawings else {}),
        "vocabulary": {"words": len(vocabulary), "captions_a_word_at_least": WORDS_AT_LEAST},
        "skipped": skipped,
        "left_out_twins": duplicates,
    }
    return content, described, [sample.icon.set for sample in samples]


def _render(
    icons: Sequence[Icon],
    captions: Sequence[str],
    splits: Sequence[str],
    size: int,
    processes: int | None,
    progress: bool,
) -> tuple[list[Sample], np.ndarray, dict[str, int]]:
    """The icons that can be drawn, their small gray images, and the number of the others by reason."""
    samples, pictures, skipped = [], [], Counter()
    images = each(partial(_draw, size=size), [icon.svg for icon in icons], processes)
    bar = shown(images, "drawing icons", "icons", total=len(icons), show=progress)
    for icon, caption, split, (png, picture) in zip(icons, captions, splits, bar, strict=True):
        if png is None:
            skipped["cannot be read"] += 1
        elif np.ptp(picture) <= _BLANK:
            skipped["shows nothing"] += 1
        elif not caption:
            skipped["has no name"] += 1
        else:
            samples.append(Sample(icon, caption, split, png))
            pictures.append(picture)
    return samples, np.stack(pictures), dict(sorted(skipped.items()))


def _draw(svg: str, size: int) -> tuple[bytes | None, np.ndarray | None]:
    try:
        picture = iconify.render(svg, size)
    except (OSError, ValueError):
        return None, None
    return data_set.png(picture), near_duplicates.grey(picture)


def _file(sample: Sample) -> data_set.Sample:
    return data_set.Sample(sample.icon.key, sample.png, sample.caption, sample.icon.set)


def _counts(members: Sequence[Sample]) -> dict:
    return {
        "images": len(members),
        "distinct_captions": len({sample.caption for sample in members}),
        "images_by_set": dict(sorted(Counter(sample.icon.set for sample in members).items())),
    }
