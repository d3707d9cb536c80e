"""Who is held out of the icons, decided by hashing captions: no random numbers, so every machine and every run agrees.

`train`         icons of the training sets.
`validation`    names held out of the training sets; all that may be looked at while something is tuned.
`test_names`    other names held out of the training sets: known styles, words in new combinations.
`test_styles`   whole sets in styles of which nothing is trained on, under any name.
`test_drawings` only where it is asked for: drawings whose name other sets are trained on, and whose set is trained on
                under other names. It is taken out of `train`; the other splits are the same with and without it.

A name is held out in every set at once, in whatever order its words stand ("arrow left", "left arrow"), but for
`test_drawings`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from clipup.data.captions import place, same_words

from . import near_duplicates

SPLITS = ("train", "validation", "test_styles", "test_names")
TEST_DRAWINGS = "test_drawings"
VALIDATION_SHARE = 0.03
TEST_NAMES_SHARE = 0.06
TEST_DRAWINGS_SHARE = 0.08
_PURPOSE = "clipup icons"
# Which splits a held-out drawing must have no near-duplicate in. Drawings of TEST_DRAWINGS count as trained on for the
# others, so that these do not depend on whether it is there.
_NO_TWIN_IN = {
    "test_styles": ("train", TEST_DRAWINGS),
    "test_names": ("train", TEST_DRAWINGS),
    TEST_DRAWINGS: ("train",),
    "validation": ("train", TEST_DRAWINGS, "test_styles", "test_names"),
}


def split_of(caption: str, test_set: bool, seed: int) -> str:
    """The split of an icon by its caption, and by whether its set is held out."""
    if test_set:
        return "test_styles"
    where = _hash(f"{seed}:split", " ".join(same_words(caption)))
    if where < VALIDATION_SHARE:
        return "validation"
    return "test_names" if where < VALIDATION_SHARE + TEST_NAMES_SHARE else "train"


def hold_out_drawings(splits: Sequence[str], sets: Sequence[str], captions: Sequence[str], seed: int) -> list[str]:
    """The splits of drawings, some of ``train`` moved to ``test_drawings``.

    All drawings of a caption that a set has (sizes, outlined and filled) are moved together. One set always keeps a
    caption, so every caption of ``test_drawings`` is trained on with another set's drawing.

    Args:
        splits, sets, captions: of each drawing, as ``split_of`` decided, the set's prefix, and the whole caption.
    """
    trained = [pair for split, *pair in zip(splits, sets, captions, strict=True) if split == "train"]
    places = {(of, caption): _hash(f"{seed}:drawings", f"{of}/{caption}") for of, caption in trained}
    of_caption: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (of, caption), where in places.items():
        of_caption[caption].append((where, of))
    moved = {
        (of, caption)
        for caption, found in of_caption.items()
        for where, of in sorted(found)[:-1]
        if where < TEST_DRAWINGS_SHARE
    }
    return [
        TEST_DRAWINGS if split == "train" and (of, caption) in moved else split
        for split, of, caption in zip(splits, sets, captions, strict=True)
    ]


def without_twins(
    splits: Sequence[str], pictures: np.ndarray, names: Sequence[str] = SPLITS, progress: bool = False
) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Leaves out held-out drawings that are trained on as well, and validation's that are in a test.

    It is the held-out drawing that goes: what is trained on does not depend on what is tested.

    Args:
        splits: the split of each drawing. pictures: uint8 [N, SIDE, SIDE], see `near_duplicates`.
        names: the splits of the data set.

    Returns:
        Which are kept (bool [N]), and by split how many were left out: {"same": to the pixel, "near": nearly}.
    """
    split = np.array(splits)
    kept = np.ones(len(split), bool)
    left_out = {}
    for held_out in (name for name in _NO_TWIN_IN if name in names):
        rows = np.flatnonzero(split == held_out)
        others = np.flatnonzero(np.isin(split, _NO_TWIN_IN[held_out]))
        same, near = near_duplicates.have_twin(pictures[rows], pictures[others], progress)
        kept[rows[same | near]] = False
        left_out[held_out] = {"same": int(same.sum()), "near": int(near.sum())}
    return kept, left_out


def order(keys: Sequence[str], seed: int) -> list[int]:
    """Indices of the keys in an order that mixes sets and names, the same for the same seed."""
    return sorted(range(len(keys)), key=lambda i: _hash(f"{seed}:order", keys[i]))


def _hash(purpose: str, key: str) -> float:
    return place(_PURPOSE, purpose, key)
