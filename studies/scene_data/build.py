"""Builds the scenes data set: drawings for training, and whole scenes for evaluation (`python -m studies scenes OUT`).

    OUT/drawings.npz           masks and counts of the training drawings (``scenes.Drawings``)
    OUT/validation-*.tar       scenes of drawings from sets that are not trained on, for tuning
    OUT/test-*.tar             scenes of drawings from other sets that are not trained on
    OUT/test_seen-*.tar        scenes of training drawings
    OUT/sizes.json             samples per shard, in open_clip's format
    OUT/dataset.json           options, concepts, counts, rules of the splits, sets and licences
    OUT/LICENSES.md            makers and licences of the sets

A sample is .png, .txt (the caption) and .json, `{"captions": [...], "group": NUMBER}`. The same package, options and
image libraries give the same bytes.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from clipup.clip.word_tokenizer import vocabulary_text
from clipup.data import shard_writer
from clipup.data.processes import each
from clipup.progress import progress as shown
from studies.icon_data import captions, data_set, iconify, near_duplicates
from studies.icon_data.build import Sets

from . import concepts
from .scenes import COLOURS, GROUP, ICON_SIDE, RELATIONS, SIDE, Drawings, pictures, sample
from .scenes import captions as captions_of
from .stream import DRAWINGS_FILE

FORMAT = 1
"""Incremented when the same package and options give a different data set."""
VOCABULARY = "words:icons"
"""Concepts have its words only, so that models of the icons read every caption."""

_GROUPS = {"validation": 256, "test": 1024, "test_seen": 1024}
_DRAWN_FROM = {"test_seen": "train"}
_EVALUATION = 2  # the last word of seeds; training has another
_FAINT = 64  # a drawing that nowhere covers more than this, of 255, cannot be seen
_SPARE = 1.3  # candidates per concept: some lose their held-out drawings
_RULES = {
    "train": "drawings of the training sets; a run draws its scenes from them",
    "validation": f"scenes of drawings of {concepts.VALIDATION_SETS} sets that are not trained on, for tuning",
    "test": "scenes of drawings of other sets that are not trained on",
    "test_seen": "other scenes than any run draws, of the training drawings",
    "concepts": "captions of one or two words of the icons' vocabulary, without words of colours and places, that "
    "have a test drawing; those that most training sets draw",
    "twins": "held-out drawings with a duplicate or near-duplicate in the training split (validation's also in the "
    "test split) are left out",
}


def build(
    out: str | Path,
    package: str | Path,
    number: int = 1500,
    seed: int = 0,
    overwrite: bool = False,
    processes: int | None = None,
    progress: bool = True,
    sets: Sets | None = None,
    groups: dict[str, int] | None = None,
) -> dict:
    """Builds the data set in `out`, or reuses it if it exists, and returns the content of its `dataset.json`.

    Args:
        out: a directory that does not exist, is empty, or holds this data set.
        package: the unpacked npm package @iconify/json (see `studies.icon_data.iconify`).
        number: of concepts.
        seed: of the validation sets and of the scenes for evaluation.
        overwrite: replaces another data set in `out`.
        processes: rendering processes; default: one per CPU.
        sets: default: those of the icons data set.
        groups: groups of scenes by split; default: 256 for validation and 1,024 for each test.

    Raises:
        FileNotFoundError, ImportError, ValueError: as of `data_set.build`; or there are too few concepts.
    """
    sets = sets or Sets.read()
    options = {"concepts": number, "seed": seed, "groups": groups or _GROUPS}
    make = partial(_make, package=Path(package), options=options, sets=sets, processes=processes, progress=progress)
    return data_set.build(out, package, "scenes", FORMAT, options, (sets.train, sets.test), overwrite, make)


def _make(
    directory: Path, package: Path, options: dict, sets: Sets, processes: int | None, progress: bool
) -> data_set.Made:
    number, seed, groups = options["concepts"], options["seed"], options["groups"]
    described, used, drawings, left_out = _drawings(package, sets, number, seed, processes, progress)
    train = drawings["train"]
    np.savez(directory / DRAWINGS_FILE, masks=train.masks, counts=train.counts)
    path = directory / DRAWINGS_FILE  # described as the shards are, so that it is looked after like these
    about = {"file": path.name, "samples": 0, "bytes": path.stat().st_size, "sha256": shard_writer.sha256(path)}
    written = {"train": [about]}
    for place, (split, count) in enumerate(groups.items()):
        draw = np.random.default_rng([seed, place, _EVALUATION])
        files = list(_scenes(drawings[_DRAWN_FROM.get(split, split)], count, draw))
        written[split] = shard_writer.write_shards(directory, split, files, 4096)
    counts = {
        split: {
            "images": GROUP * groups.get(split, 0),
            "drawings": len(of_split.masks),
            "concepts": len(of_split.names),
            "shards": written[split],
        }
        for split, of_split in ((name, drawings[_DRAWN_FROM.get(name, name)]) for name in written)
    }
    content = {
        "splits": counts,
        "rules": _RULES,
        "colours": list(COLOURS),
        "relations": list(RELATIONS),
        "size": SIDE,
        "group_size": GROUP,
        "concepts": list(train.names),
        "left_out_twins": left_out,
    }
    return data_set.Made(content, described, used)


def _drawings(
    package: Path, sets: Sets, number: int, seed: int, processes: int | None, progress: bool
) -> tuple[list[iconify.IconSet], list[str], dict[str, Drawings], dict[str, dict[str, int]]]:
    """The sets, the set of every drawing, the drawings by split, and how many twins were left out."""
    train_sets, test_sets = (
        [prefix for prefix in listed if iconify.is_monochrome(package, prefix)] for listed in (sets.train, sets.test)
    )
    of_set = concepts.split_of_sets(train_sets, test_sets, seed)
    described, icons = iconify.read_sets(package, tuple(of_set), progress)
    splits = [of_set[icon.set] for icon in icons]
    words = set(vocabulary_text(VOCABULARY).split())
    texts = [text if set(text.split()) <= words else "" for text in captions.of_icons(icons)[0]]
    wanted = concepts.candidates(texts, [icon.set for icon in icons], splits, int(_SPARE * number))
    rows = [row for row, text in enumerate(texts) if text in set(wanted)]

    drawn = each(_draw, [icons[row].svg for row in rows], processes)
    bar = shown(drawn, "drawing icons", "icons", total=len(rows), show=progress)
    seen = [(row, *drawing) for row, drawing in zip(rows, bar, strict=True) if drawing is not None]
    pictures_seen = np.stack([picture for *_, picture in seen])
    kept, left_out = near_duplicates.keep_apart([splits[row] for row, *_ in seen], pictures_seen, concepts.APART_FROM)
    masks = {row: mask for (row, mask, _), keep in zip(seen, kept, strict=True) if keep}

    by_split: dict[str, dict[str, list[int]]] = {split: defaultdict(list) for split in concepts.SPLITS}
    for row in masks:
        by_split[splits[row]][texts[row]].append(row)
    names = [name for name in wanted if name in by_split["train"] and name in by_split["test"]][:number]
    if len(names) < number:
        raise ValueError(f"number: got {number} concepts, but there are drawings for {len(names)} only")
    used, drawings = [], {}
    for split, of_name in by_split.items():
        here = [name for name in names if name in of_name]
        ordered = [row for name in here for row in of_name[name]]
        used += [icons[row].set for row in ordered]
        stacked = np.stack([masks[row] for row in ordered])
        drawings[split] = Drawings(stacked, np.array([len(of_name[name]) for name in here]), here)
    return described, used, drawings, left_out


def _draw(svg: str) -> tuple[np.ndarray, np.ndarray] | None:
    """An icon's mask and its picture for comparison; None if it cannot be read or seen."""
    try:
        mask = 255 - np.asarray(iconify.render(svg, ICON_SIDE).convert("L"))
        picture = near_duplicates.grey(iconify.render(svg, near_duplicates.SIDE))
    except (OSError, ValueError):
        return None
    return (mask, picture) if int(mask.max()) > _FAINT else None


def _scenes(drawings: Drawings, groups: int, draw: np.random.Generator) -> Iterator[shard_writer.Sample]:
    scenes = sample(draw, drawings, groups)
    shown_and_said = zip(pictures(scenes, drawings.masks), captions_of(scenes, drawings.names), strict=True)
    for number, (picture, caption) in enumerate(shown_and_said):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        about = json.dumps({"captions": [caption], "group": number // GROUP}).encode()
        yield f"{number:05d}", {"png": file.getvalue(), "txt": caption.encode(), "json": about}
