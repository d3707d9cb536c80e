"""Duplicates and near-duplicates among drawings."""

import numpy
import pytest
from small_icons import drawing

from studies.icon_data import iconify, near_duplicates


def pictures(*bodies):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{}</svg>'
    return numpy.stack([near_duplicates.grey(iconify.render(svg.format(body), 32)) for body in bodies])


def test_unrelated_drawings_are_not_near_duplicates():
    first, second = pictures(*map(drawing, range(60))), pictures(*map(drawing, range(60, 120)))
    assert not numpy.stack(near_duplicates.find_duplicates(first, second)).any()


@pytest.mark.parametrize("contrast", [0.5, 0.1])
def test_contrast_does_not_matter(contrast):
    (picture,) = pictures(drawing(3))
    pale = (255 - contrast * (255.0 - picture)).round().astype(numpy.uint8)
    same, near = near_duplicates.find_duplicates(pale[None], picture[None])
    assert near.all() and not same.any()
