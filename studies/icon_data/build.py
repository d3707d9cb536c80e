"""The icons data set: openly licensed icons of 145 sets with their names as captions (`python -m studies icons OUT`).

    OUT/train-*.tar            SET/NAME.png, .txt (the caption)
    OUT/validation-*.tar       the same and .json; names held out of the training sets, to be looked at while tuning
    OUT/test_names-*.tar       the same; other names held out of them
    OUT/test_styles-*.tar      the same; whole sets that are not trained on
    OUT/test_drawings-*.tar    the same, if asked for; drawings whose name and whose set are trained on
    OUT/captions.json          which words of the names were cut, set by set, and why
    OUT/vocabulary.txt         the words of the training captions, the most frequent first
    OUT/sizes.json             samples a shard, as open_clip reads it
    OUT/dataset.json           options, counts, rules of the splits, what was left out, sets and licences
    OUT/LICENSES.md            who drew the sets, under which licences

The .json is `{"captions": [...], "group": SET}`. The same package, options and image libraries give the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from clipup.clip.word_tokenizer import count_vocabulary
from clipup.data import shard_writer
from clipup.data.processes import each
from clipup.extras import missing
from clipup.progress import progress as shown

from . import captions, iconify, near_duplicates, splits
from .iconify import Icon, IconSet

FORMAT = 1
"""Rises when the same package and options give another data set than before."""
WORDS_AT_LEAST = 5
"""Training captions that a word of the vocabulary occurs in."""

_BLANK = 2  # grey levels out of 255 between the darkest and the lightest pixel of a drawing that shows nothing
_RULES = {
    "train": "icons of the training sets",
    "validation": f"{splits.VALIDATION_SHARE:.0%} of the names of the training sets, held out of all of them; "
    "what may be looked at while something is tuned",
    "test_names": f"other {splits.TEST_NAMES_SHARE:.0%} of these names, held out in the same way",
    "test_styles": "whole sets in styles that are not trained on",
    "twins": "held-out drawings that are trained on as well, to the pixel or nearly, are left out (and those of "
    f"validation that are in a test): near are those whose perceptual hashes have a cosine of {near_duplicates.ALIKE} "
    "or more",
    "left_out": "aliases, icons that their sets hide, drawings that cannot be read or show nothing",
}
_RULE_OF_DRAWINGS = (
    f"{splits.TEST_DRAWINGS_SHARE:.0%} of the captions of each training set, with all drawings that the set has "
    "of them, where another training set keeps the caption; taken out of train, the other splits are as they are "
    "without this one"
)
_CAPTION_RULES = {
    "why": "Many sets say at one end of their names how an icon is drawn (filled, in 24 pixels). That is a property of "
    "the drawing and not of what it shows, other sets have no word for it, and it would split one name into many.",
    "rule": f"A word is cut at an end of the names of a set when at least {captions.CUT_FROM:.0%} of them have it "
    "there and it is one of style_words or a number; a name keeps at least one word.",
}


@dataclass(frozen=True)
class Sets:
    """Prefixes of the sets to train on and of those that are held out whole."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def read(cls) -> Sets:
        """The study's: open licences without NC or GPL, no logos, flags or programming languages, and no training set
        that shares drawings with a test set."""
        listed = json.loads((Path(__file__).parent / "icon_sets.json").read_text("utf-8"))
        return cls(tuple(listed["train"]), tuple(listed["test"]))

    def without(self, left_out: Sequence[str]) -> Sets:
        """
        Raises:
            ValueError: a prefix that is none of these sets'.
        """
        unknown = sorted(set(left_out) - {*self.train, *self.test})
        if unknown:
            raise ValueError(f"leave_out: {', '.join(unknown)}: no set of this data set, expected prefixes such as mdi")
        return Sets(*(tuple(one for one in sets if one not in left_out) for sets in (self.train, self.test)))


@dataclass(frozen=True)
class Sample:
    """A drawing in a split: what is written, and what splits are decided by."""

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
    samples_per_shard: int = 4096,
    processes: int | None = None,
    progress: bool = True,
    sets: Sets | None = None,
    test_drawings: bool = False,
) -> dict:
    """Builds the data set in `out`, or reuses it when it is there, and returns what its `dataset.json` says.

    Args:
        out: a directory that does not exist, is empty, or holds this data set.
        package: the unpacked npm package @iconify/json (see `studies.icon_data.iconify`).
        size: side of the images in pixels, 8 to 512.
        seed: another one holds out other names, and orders the training shards differently.
        overwrite: replaces another data set in `out`.
        samples_per_shard: samples in a shard; a training run needs at least as many shards as workers.
        processes: how many render; default: one a CPU.
        sets: other sets than the study's.
        test_drawings: a third test split, of drawings whose names and sets are trained on. It is taken out of the
            training split, and the other held-out splits stay the same to the byte.

    Raises:
        FileNotFoundError: the package or a set is missing.
        ImportError: resvg-py is not installed.
        ValueError: an argument is out of range, or `out` holds something else (which stays as it is).
    """
    if not isinstance(size, int) or not 8 <= size <= 512:
        raise ValueError(f"size: got {size!r}, expected a number of pixels from 8 to 512")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: got {samples_per_shard}, expected at least 1")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected 0 or more")
    out, sets = Path(out), sets or Sets.read()
    package = iconify.find_package(package)
    source = {"package": iconify.PACKAGE, "version": iconify.version(package), "resvg_py": _renderer_version()}
    options = {"size": size, "seed": seed, "samples_per_shard": samples_per_shard}
    if test_drawings:
        options["test_drawings"] = True
    fingerprint = _fingerprint(FORMAT, source, options, sets.train, sets.test)
    if shard_writer.finished(out, fingerprint) and not shard_writer.left_behind(out):
        return json.loads((out / shard_writer.DATASET_FILE).read_text("utf-8"))
    with shard_writer.only_writer(out):
        if shard_writer.finished(out, fingerprint):
            return json.loads((out / shard_writer.DATASET_FILE).read_text("utf-8"))
        shard_writer.check_target(out, overwrite)
        return _build(out, package, source, options, sets, fingerprint, processes, progress)


def _build(
    out: Path,
    package: Path,
    source: dict[str, str],
    options: dict[str, int],
    sets: Sets,
    fingerprint: str,
    processes: int | None,
    progress: bool,
) -> dict:
    seed = options["seed"]
    names, rules = splits.SPLITS, _RULES
    if options.get("test_drawings"):
        names, rules = (*names, splits.TEST_DRAWINGS), rules | {splits.TEST_DRAWINGS: _RULE_OF_DRAWINGS}
    described, icons = iconify.read_sets(package, (*sets.train, *sets.test), progress)
    texts, cut = _captions(icons)
    assigned = [
        splits.split_of(caption, icon.set in sets.test, seed) for icon, caption in zip(icons, texts, strict=True)
    ]
    samples, pictures, skipped = _render(icons, texts, assigned, options["size"], processes, progress)
    if options.get("test_drawings"):
        samples = _with_test_drawings(samples, seed)
    kept, twins = splits.without_twins([sample.split for sample in samples], pictures, names, progress)
    samples = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
    samples = [samples[i] for i in splits.order([sample.icon.key for sample in samples], seed)]
    by_split = {split: [sample for sample in samples if sample.split == split] for split in names}
    if not by_split["train"]:
        raise ValueError("the training split is empty: no drawing of the training sets could be read")

    with shard_writer.appearing_whole(out) as directory:
        written = {
            split: shard_writer.write_shards(directory, split, _files(split, members), options["samples_per_shard"])
            for split, members in by_split.items()
        }
        shard_writer.write_sizes(directory, [shard for split in written.values() for shard in split])
        vocabulary = count_vocabulary((sample.caption for sample in by_split["train"]), WORDS_AT_LEAST)
        (directory / "vocabulary.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
        style_words = sorted(captions.STYLE_WORDS)
        shard_writer.write_json(directory / "captions.json", {**_CAPTION_RULES, "style_words": style_words, "cut": cut})
        credits = _credits(described, samples)
        dataset = {
            "name": "icons",
            "format": FORMAT,
            "fingerprint": fingerprint,
            "options": options,
            "splits": {split: _counts(members) | {"shards": written[split]} for split, members in by_split.items()},
            "rules": rules,
            "vocabulary": {"words": len(vocabulary), "captions_a_word_at_least": WORDS_AT_LEAST},
            "source": source,
            "sources": credits,
            "skipped": skipped,
            "left_out_twins": twins,
        }
        (directory / "LICENSES.md").write_text(_licences(credits, source), "utf-8")
        shard_writer.write_json(directory / shard_writer.DATASET_FILE, dataset)
    return dataset


def _captions(icons: Sequence[Icon]) -> tuple[list[str], dict[str, dict]]:
    """A caption an icon, and what was cut a set."""
    names: dict[str, list[str]] = {}
    for icon in icons:
        names.setdefault(icon.set, []).append(icon.name)
    texts, cut = [], {}
    for prefix, of_set in names.items():
        found, cut_here = captions.captions(of_set)
        texts += found
        if cut_here:
            cut[prefix] = {"names": len(of_set), **cut_here}
    return texts, cut


def _render(
    icons: Sequence[Icon],
    captions: Sequence[str],
    splits: Sequence[str],
    size: int,
    processes: int | None,
    progress: bool,
) -> tuple[list[Sample], np.ndarray, dict[str, int]]:
    """What can be drawn, the same as small grey pictures, and how many of the rest there are, by reason."""
    samples, pictures, skipped = [], [], Counter()
    images = each(partial(_draw, size=size), [icon.svg for icon in icons], processes)
    bar = shown(images, "drawing icons", "icons", total=len(icons), show=progress)
    for icon, caption, split, (png, picture) in zip(icons, captions, splits, bar, strict=True):
        if png is None:
            skipped["cannot be read"] += 1
        elif int(picture.max()) - int(picture.min()) <= _BLANK:
            skipped["shows nothing"] += 1
        elif not caption:
            skipped["has no name"] += 1
        else:
            samples.append(Sample(icon, caption, split, png))
            pictures.append(picture)
    stacked = np.stack(pictures) if pictures else np.empty((0, near_duplicates.SIDE, near_duplicates.SIDE), np.uint8)
    return samples, stacked, dict(sorted(skipped.items()))


def _with_test_drawings(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """After drawing, so that what cannot be drawn is no set's training drawing of a caption."""
    columns = [(sample.split, sample.icon.set, sample.caption) for sample in samples]
    assigned = splits.hold_out_drawings(*zip(*columns, strict=True), seed) if columns else []
    return [replace(sample, split=split) for sample, split in zip(samples, assigned, strict=True)]


def _draw(svg: str, size: int) -> tuple[bytes | None, np.ndarray | None]:
    try:
        picture = iconify.render(svg, size)
    except (OSError, ValueError):
        return None, None
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue(), near_duplicates.grey(picture)


def _files(split: str, members: Iterable[Sample]) -> list[shard_writer.Sample]:
    files = []
    for sample in members:
        content = {"png": sample.png, "txt": sample.caption.encode()}
        if split != "train":
            content["json"] = json.dumps({"captions": [sample.caption], "group": sample.icon.set}).encode()
        files.append((sample.icon.key, content))
    return files


def _counts(members: Sequence[Sample]) -> dict:
    return {
        "images": len(members),
        "distinct_captions": len({sample.caption for sample in members}),
        "images_by_set": dict(sorted(Counter(sample.icon.set for sample in members).items())),
    }


def _credits(sets: Sequence[IconSet], samples: Sequence[Sample]) -> list[dict]:
    images = Counter(sample.icon.set for sample in samples)
    return [
        {
            "set": described.prefix,
            "gives": described.name,
            "made_by": described.author,
            "licence": described.licence,
            "url": described.url,
            "images": images[described.prefix],
        }
        for described in sets
    ]


def _licences(credits: list[dict], source: dict[str, str]) -> str:
    rows = "\n".join(
        "| {set} | {gives} | {made_by} | {licence} | {images} | {url} |".format(**credit) for credit in credits
    )
    return f"""# Who drew these icons

The drawings were scaled and put on white; apart from that they are as their makers drew them. The set that an icon is
of is in its key (`SET/NAME`). They were taken from {source["package"]} {source["version"]}.

| set | name | made by | licence | images | from |
|---|---|---|---|---|---|
{rows}
"""


def _renderer_version() -> str:
    try:
        return importlib.metadata.version("resvg-py")
    except importlib.metadata.PackageNotFoundError:
        raise missing("drawing icons", "resvg-py", "demo") from None


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
