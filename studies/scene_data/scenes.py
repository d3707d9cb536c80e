"""Scenes: two icons in two colours, one beside or above the other, and the caption that says so.

Scenes come in groups of four, whose captions are made of nearly the same words:

    red heart left of blue house     the scene that the others differ from
    blue heart left of red house     the colours exchanged
    red heart right of blue house    the other way round
    red heart left of blue tree      one concept exchanged, the first or the second

All four are drawn afresh: another drawing of each concept, at another place. N: scenes, a multiple of GROUP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SIDE = 32
"""Side of a scene in pixels."""
ICON_SIDE = 15
"""Side of an icon in pixels."""
GROUP = 4
"""Scenes that differ in one thing."""
COLOURS = {
    "red": (220, 20, 40),
    "blue": (30, 70, 230),
    "green": (20, 150, 50),
    "yellow": (235, 200, 0),
    "orange": (245, 120, 0),
    "purple": (140, 40, 190),
    "brown": (120, 70, 30),
    "black": (0, 0, 0),
}
RELATIONS = ("left of", "right of", "above", "below")
RESERVED = frozenset(" ".join((*COLOURS, *RELATIONS)).split())
"""Words that a concept must not contain."""

_OPPOSITE = np.array([1, 0, 3, 2])  # of RELATIONS
_ALONG = 2  # places of an icon in its half
_ACROSS = SIDE - ICON_SIDE + 1  # places of an icon on the other axis
_SHIFT = 4  # pixels, at most, between the places of the two on the other axis: otherwise a scene has two relations
_COLOURS = np.array(list(COLOURS.values()), np.uint16)


class Drawings(NamedTuple):
    """The drawings of one split, ordered by concept."""

    masks: np.ndarray
    """uint8 [drawings, ICON_SIDE, ICON_SIDE], 255 where an icon covers the ground."""
    counts: np.ndarray
    """int64 [concepts]: the number of drawings of each, at least 1."""
    names: Sequence[str]
    """The concepts."""


class Scenes(NamedTuple):
    """Scenes as indices; columns are the first and the second icon."""

    concepts: np.ndarray
    """int64 [N, 2] into ``names``."""
    colours: np.ndarray
    """int64 [N, 2] into COLOURS."""
    relations: np.ndarray
    """int64 [N] into RELATIONS."""
    drawings: np.ndarray
    """int64 [N, 2] into ``masks``."""
    places: np.ndarray
    """int64 [N, 2, 2]: row and column of an icon's first pixel."""


def sample(draw: np.random.Generator, drawings: Drawings, groups: int) -> Scenes:
    """Random groups, [GROUP * groups] scenes, of three concepts or more."""
    first, second, other = _distinct(draw, len(drawings.counts), 3, groups)
    colours = np.stack(_distinct(draw, len(COLOURS), 2, groups), 1)
    relation = draw.integers(len(RELATIONS), size=groups)
    concepts = np.stack([first, second], 1)
    replaced = concepts.copy()
    replaced[np.arange(groups), draw.integers(2, size=groups)] = other

    concepts = np.stack([concepts, concepts, concepts, replaced], 1).reshape(-1, 2)
    colours = np.stack([colours, colours[:, ::-1], colours, colours], 1).reshape(-1, 2)
    relations = np.stack([relation, relation, _OPPOSITE[relation], relation], 1).reshape(-1)

    starts = np.cumsum(drawings.counts) - drawings.counts
    chosen = starts[concepts] + draw.integers(drawings.counts[concepts])
    return Scenes(concepts, colours, relations, chosen, _places(draw, relations))


def captions(scenes: Scenes, names: Sequence[str]) -> list[str]:
    """[N] captions such as "red heart left of blue house"."""
    colours = list(COLOURS)
    return [
        f"{colours[k]} {names[a]} {RELATIONS[relation]} {colours[m]} {names[b]}"
        for (a, b), (k, m), relation in zip(scenes.concepts, scenes.colours, scenes.relations, strict=True)
    ]


def pictures(scenes: Scenes, masks: np.ndarray) -> np.ndarray:
    """uint8 [N, SIDE, SIDE, 3], on white."""
    drawn = np.full((len(scenes.relations), SIDE, SIDE, 3), 255, np.uint8)
    cover = masks[scenes.drawings].astype(np.uint16)[..., None]  # [N, 2, ICON_SIDE, ICON_SIDE, 1]
    lack = (255 - _COLOURS[scenes.colours])[:, :, None, None]
    icons = (255 - (cover * lack + 127) // 255).astype(np.uint8)
    for picture, pair, places in zip(drawn, icons, scenes.places.tolist(), strict=True):
        for icon, (row, column) in zip(pair, places, strict=True):
            picture[row : row + ICON_SIDE, column : column + ICON_SIDE] = icon
    return drawn


def _distinct(draw: np.random.Generator, below: int, count: int, size: int) -> list[np.ndarray]:
    """``count`` arrays [size] of numbers below ``below`` that differ in every place."""
    columns: list[np.ndarray] = []
    for number in range(count):
        value = draw.integers(below - number, size=size)
        for before in np.sort(np.stack(columns), 0) if columns else ():
            value = value + (value >= before)
        columns.append(value)
    return columns


def _places(draw: np.random.Generator, relations: np.ndarray) -> np.ndarray:
    number = len(relations)
    near, far = draw.integers(_ALONG, size=(2, number))
    far += SIDE // 2
    across = draw.integers(_ACROSS, size=number)
    other = np.clip(across + draw.integers(-_SHIFT, _SHIFT + 1, size=number), 0, _ACROSS - 1)
    before = np.isin(relations, (0, 2))  # the first icon is left or above
    along = np.stack([np.where(before, near, far), np.where(before, far, near)], 1)
    across = np.stack([across, other], 1)
    beside = (relations < 2)[:, None]
    return np.stack([np.where(beside, across, along), np.where(beside, along, across)], 2)
