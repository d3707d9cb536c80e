"""How the icon data set is split: by hashing captions, so every machine and every run agrees.

`train`         icons of the training sets.
`validation`    names held out of the training sets, for tuning.
`test_names`    other names held out of the training sets: known styles, new combinations of words.
`test_styles`   whole sets in styles that are not in the training split.
`test_drawings` optional: drawings whose name is in the training split with another set's drawing, and whose set is
                there with other names. It is taken from `train`; the other splits are the same with and without it.

A name is held out of all sets at once, in any order of its words ("arrow left", "left arrow"), except for
`test_drawings`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from clipup.demo.pictograms.captions import place, same_words

SPLITS = ("train", "validation", "test_styles", "test_names")
TEST_DRAWINGS = "test_drawings"
VALIDATION_SHARE = 0.03
TEST_NAMES_SHARE = 0.06
TEST_DRAWINGS_SHARE = 0.08
_PURPOSE = "clipup icons"
# The splits in which a held-out drawing must have no near-duplicate. Drawings of TEST_DRAWINGS count as training
# drawings for the others, which therefore do not depend on whether it exists.
APART_FROM = {
    "test_styles": ("train", TEST_DRAWINGS),
    "test_names": ("train", TEST_DRAWINGS),
    TEST_DRAWINGS: ("train",),
    "validation": ("train", TEST_DRAWINGS, "test_styles", "test_names"),
}


def split_of(caption: str, test_set: bool, seed: int) -> str:
    """The split of an icon, from its caption and whether its set is held out."""
    if test_set:
        return "test_styles"
    where = place(_PURPOSE, f"{seed}:split", " ".join(same_words(caption)))
    if where < VALIDATION_SHARE:
        return "validation"
    return "test_names" if where < VALIDATION_SHARE + TEST_NAMES_SHARE else "train"


def hold_out_drawings(splits: Sequence[str], sets: Sequence[str], captions: Sequence[str], seed: int) -> list[str]:
    """The splits of drawings, with some of ``train`` moved to ``test_drawings``.

    All drawings that a set has for a caption (sizes, outlined and filled) are moved together. One set always keeps the
    caption, so every caption of ``test_drawings`` is in the training split with another set's drawing.

    Args:
        splits, sets, captions: of each drawing: the result of ``split_of``, the set's prefix, and the caption.
    """
    trained = [pair for split, *pair in zip(splits, sets, captions, strict=True) if split == "train"]
    places = {(of, caption): place(_PURPOSE, f"{seed}:drawings", f"{of}/{caption}") for of, caption in trained}
    of_caption: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (of, caption), where in places.items():
        of_caption[caption].append((where, of))
    moved = {
        (of, caption)
        for caption, places_of_sets in of_caption.items()
        for where, of in sorted(places_of_sets)[:-1]
        if where < TEST_DRAWINGS_SHARE
    }
    return [
        TEST_DRAWINGS if split == "train" and (of, caption) in moved else split
        for split, of, caption in zip(splits, sets, captions, strict=True)
    ]


def order(keys: Sequence[str], seed: int) -> list[int]:
    """Indices of the keys in a pseudo-random order that depends on the seed only."""
    return sorted(range(len(keys)), key=lambda i: place(_PURPOSE, f"{seed}:order", keys[i]))
