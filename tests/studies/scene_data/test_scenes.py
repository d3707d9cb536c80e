"""What a scene shows and what its caption says, and how the four of a group differ."""

import numpy as np

from studies.scene_data.scenes import (
    COLOURS,
    GROUP,
    ICON_SIDE,
    SIDE,
    Drawings,
    captions,
    pictures,
    sample,
)

NAMES = [f"thing{number}" for number in range(6)]
COUNTS = np.array([3, 1, 4, 2, 5, 1])


def drawings() -> Drawings:
    """Full squares, so that every pixel of an icon has its colour."""
    return Drawings(np.full((COUNTS.sum(), ICON_SIDE, ICON_SIDE), 255, np.uint8), COUNTS, NAMES)


def scenes(seed=0, groups=200):
    return sample(np.random.default_rng(seed), drawings(), groups)


def parts(caption: str) -> tuple[str, str, str, str, str]:
    first_colour, first, *relation, second_colour, second = caption.split()
    return first_colour, first, " ".join(relation), second_colour, second


def test_the_four_of_a_group_differ_in_colours_relation_or_one_concept_only():
    said = [parts(caption) for caption in captions(scenes(), NAMES)]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    replaced = set()
    for start in range(0, len(said), GROUP):
        base, colours, relation, concept = said[start : start + GROUP]
        k, a, rel, m, b = base
        assert a != b and k != m
        assert colours == (m, a, rel, k, b)
        assert relation == (k, a, opposite[rel], m, b)
        differ = [one != other for one, other in zip(base, concept, strict=True)]
        assert sum(differ) == 1 and (differ[1] or differ[4]) and concept[1] != concept[4]
        replaced.add(differ[1])
    assert replaced == {True, False}


def test_a_picture_shows_what_its_caption_says():
    drawn = scenes()
    for caption, picture in zip(captions(drawn, NAMES), pictures(drawn, drawings().masks), strict=True):
        first_colour, _, relation, second_colour, _ = parts(caption)
        first, second = (np.argwhere((picture == COLOURS[name]).all(-1)) for name in (first_colour, second_colour))
        assert len(first) == len(second) == ICON_SIDE**2
        (row, column), (other_row, other_column) = first.mean(0), second.mean(0)
        down, right = row - other_row, column - other_column
        along, across = (right, down) if relation in ("left of", "right of") else (down, right)
        assert (along < 0) == (relation in ("left of", "above")) and abs(along) >= ICON_SIDE and abs(across) <= 4
        nothing = (picture == 255).all(-1).sum()
        assert nothing == SIDE**2 - 2 * ICON_SIDE**2


def test_a_concept_is_drawn_by_all_of_its_own_drawings_and_no_other():
    drawn = scenes()
    owner = np.repeat(np.arange(len(NAMES)), COUNTS)
    assert (owner[drawn.drawings] == drawn.concepts).all()
    assert len(np.unique(drawn.drawings)) == COUNTS.sum()


def test_half_covered_pixels_are_between_the_colour_and_white():
    half = drawings()._replace(masks=np.full((COUNTS.sum(), ICON_SIDE, ICON_SIDE), 128, np.uint8))
    drawn = scenes(groups=1)
    picture = pictures(drawn, half.masks)[0]
    row, column = drawn.places[0, 0]
    colour = np.array(list(COLOURS.values()))[drawn.colours[0, 0]]
    assert np.abs(picture[row, column] - (255 - (255 - colour) * 128 / 255)).max() <= 0.5
