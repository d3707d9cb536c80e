"""Who is held out of the icons, decided by hashing captions: no random numbers, so every machine and every run agrees.

`train`         icons of the training sets.
`validation`    names held out of the training sets; all that may be looked at while something is tuned.
`test_names`    other names held out of the training sets: known styles, words in new combinations.
`test_styles`   whole sets in styles of which nothing is trained on, under any name.

A name is held out in every set at once, in whatever order its words stand ("arrow left", "left arrow").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipup.data import near_duplicates
from clipup.data.captions import same_words
from clipup.data.hashing import place

SPLITS = ("train", "validation", "test_styles", "test_names")
VALIDATION_SHARE = 0.03
TEST_NAMES_SHARE = 0.06
_PURPOSE = "clipup icons"


def split_of(caption: str, test_set: bool, seed: int) -> str:
    """The split of an icon by its caption, and by whether its set is held out."""
    if test_set:
        return "test_styles"
    where = _hash(f"{seed}:split", " ".join(same_words(caption)))
    if where < VALIDATION_SHARE:
        return "validation"
    return "test_names" if where < VALIDATION_SHARE + TEST_NAMES_SHARE else "train"


def without_twins(
    splits: Sequence[str], pictures: np.ndarray, progress: bool = False
) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Leaves out held-out drawings that are trained on as well, and validation's that are in a test.

    It is the held-out drawing that goes: what is trained on does not depend on what is tested.

    Args:
        splits: the split of each drawing. pictures: uint8 [N, SIDE, SIDE], see `near_duplicates`.

    Returns:
        Which are kept (bool [N]), and by split how many were left out: {"same": to the pixel, "near": nearly}.
    """
    split = np.array(splits)
    kept = np.ones(len(split), bool)
    left_out = {}
    for held_out, against in (
        ("test_styles", ("train",)),
        ("test_names", ("train",)),
        ("validation", ("train", "test_styles", "test_names")),
    ):
        rows = np.flatnonzero(split == held_out)
        others = np.flatnonzero(np.isin(split, against))
        same, near = near_duplicates.have_twin(pictures[rows], pictures[others], progress)
        kept[rows[same | near]] = False
        left_out[held_out] = {"same": int(same.sum()), "near": int(near.sum())}
    return kept, left_out


def order(keys: Sequence[str], seed: int) -> list[int]:
    """Indices of the keys in an order that mixes sets and names, the same for the same seed."""
    return sorted(range(len(keys)), key=lambda i: _hash(f"{seed}:order", keys[i]))


def _hash(purpose: str, key: str) -> float:
    return place(_PURPOSE, purpose, key)
