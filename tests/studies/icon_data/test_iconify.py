"""Reading and rendering icons in Iconify's format."""

import numpy
import pytest
from PIL import Image

from studies.icon_data import iconify


@pytest.mark.parametrize(
    "transform, turned",
    [
        ({"rotate": 1}, Image.Transpose.ROTATE_270),  # Iconify turns clockwise
        ({"rotate": 2}, Image.Transpose.ROTATE_180),
        ({"rotate": 3}, Image.Transpose.ROTATE_90),
        ({"hFlip": True}, Image.Transpose.FLIP_LEFT_RIGHT),
        ({"vFlip": True}, Image.Transpose.FLIP_TOP_BOTTOM),
        ({"hFlip": True, "rotate": 1}, Image.Transpose.TRANSVERSE),
    ],
)
@pytest.mark.parametrize("frame", [{"width": 24, "height": 24}, {"left": -4, "top": 2, "width": 16, "height": 24}])
def test_icons_are_turned_and_flipped_as_their_format_says(make_package, frame, transform, turned):
    def add(sets):
        body = '<path d="M0 4h12v6h-6v12h-6z"/>'
        sets["mdi"]["icons"] = {"plain": {"body": body, **frame}, "turned": {"body": body, **frame, **transform}}

    package = make_package(add)
    _, drawn = iconify.read_set(package, "mdi")
    plain, other = (iconify.render(icon.svg, 48).convert("L") for icon in drawn)

    difference = numpy.abs(numpy.asarray(plain.transpose(turned), float) - numpy.asarray(other, float))
    assert difference.mean() < 2 and difference.mean() < numpy.abs(numpy.asarray(plain, float) - 255).mean() / 10
