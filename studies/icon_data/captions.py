"""Captions of icons: the words of an icon's name, without those that describe its set's drawing style.

A set that draws everything both as an outline and filled, or in four sizes, says so at the start or end of its names
("access-time-20-filled"). Such a word is removed if at least CUT_FROM of a set's names have it and it is in
`STYLE_WORDS` or a number: "outline" is a style in a set where every fourth name ends in it, and part of the content
where only one name does. What was removed is recorded per set, with the number of names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from clipup.demo.pictograms.captions import words

from .iconify import Icon

CUT_FROM = 0.02
"""A style word at one end of at least this share of a set's names describes the set's style, not the icon."""
STYLE_WORDS = frozenset(
    "outline outlined outlines line linear lined stroke filled fill solid bold light thin regular medium thick duo "
    "duotone twotone rounded round sharp baseline broken bulk color colour colored flat mono monochrome remix sc alt "
    "variant expressive mirrored loop transition f o s r l d sm lg xs xl mini micro small large tiny big duocolor "
    "freeform ios md one two three four".split()
)
_TONES = re.compile(r"\b(two|duo) tone$")  # written as one word elsewhere; an emoji's "skin tone" is not a style


def captions(names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The captions of a set's names, in order, and what was removed: {"end": {word: names}, "start": {word: names}}.

    A name keeps at least one word.
    """
    parts = [_TONES.sub(r"\1tone", words(name)).split() for name in names]
    cut: dict[str, Counter] = {"end": Counter(), "start": Counter()}
    while True:
        style = {end: _style_of(parts, place) for end, place in (("end", -1), ("start", 0))}
        if not any(style.values()):
            break
        for row, part in enumerate(parts):
            for end, place in (("end", -1), ("start", 0)):
                if len(part) > 1 and part[place] in style[end]:
                    cut[end][part[place]] += 1
                    part = part[:-1] if place == -1 else part[1:]
            parts[row] = part
    removed = {end: dict(sorted(counts.items())) for end, counts in cut.items() if counts}
    return [" ".join(part) for part in parts], removed


def of_icons(icons: Sequence[Icon]) -> tuple[list[str], dict[str, dict]]:
    """One caption per icon of several sets, one after the other, and the words removed by set."""
    texts, cut = [], {}
    for prefix, of_set in groupby(icons, key=lambda icon: icon.set):
        of_names, cut_here = captions([icon.name for icon in of_set])
        texts += of_names
        if cut_here:
            cut[prefix] = {"names": len(of_names), **cut_here}
    return texts, cut


def _style_of(parts: Sequence[Sequence[str]], place: int) -> set[str]:
    """Style words and numbers at one end of enough names of two or more words."""
    counts = Counter(part[place] for part in parts if len(part) > 1)
    enough = CUT_FROM * len(parts)
    return {word for word, count in counts.items() if count >= enough and (word in STYLE_WORDS or word.isdigit())}
