"""Assigns icons to the concepts of the scenes and to splits.

A concept is a caption of one or two words. Drawings of whole sets are held out: the data set's test sets, and
VALIDATION_SETS of its training sets. Sets in colours of their own are not used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from clipup.demo.pictograms.captions import place, same_words

from .scenes import RESERVED

SPLITS = ("train", "validation", "test")
APART_FROM = {"test": ("train",), "validation": ("train", "test")}
"""The splits in which a held-out drawing must have no near-duplicate."""
VALIDATION_SETS = 12
_PURPOSE = "clipup scenes"


def split_of_sets(train: Sequence[str], test: Sequence[str], seed: int) -> dict[str, str]:
    """The split of every set: VALIDATION_SETS of the training sets are held out for tuning."""
    held_out = sorted(train, key=lambda prefix: place(_PURPOSE, f"{seed}:validation", prefix))[:VALIDATION_SETS]
    return dict.fromkeys(train, "train") | dict.fromkeys(held_out, "validation") | dict.fromkeys(test, "test")


def candidates(captions: Sequence[str], sets: Sequence[str], splits: Sequence[str], number: int) -> list[str]:
    """At most ``number`` captions that may be concepts, those that most training sets draw first.

    Each has a drawing in the test split and none of the words of colours and places; of the same words in two orders
    only the first is taken.

    Args:
        captions, sets, splits: of every icon.
    """
    drawn_by: dict[str, set[str]] = defaultdict(set)
    tested = set()
    for caption, of, split in zip(captions, sets, splits, strict=True):
        words = caption.split()
        if not 1 <= len(words) <= 2 or RESERVED & set(words):
            continue
        if split == "train":
            drawn_by[caption].add(of)
        elif split == "test":
            tested.add(caption)
    ranked = sorted(tested & drawn_by.keys(), key=lambda caption: (-len(drawn_by[caption]), caption))
    first = {same_words(caption): caption for caption in reversed(ranked)}
    return [caption for caption in ranked if first[same_words(caption)] == caption][:number]
