import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from clipup.inspection import data_uri, routing_map
from clipup.inspection.figures.palette import EXPERTS

SVG = "{http://www.w3.org/2000/svg}"


def noise(side, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (side, side, len(mode)), dtype=np.uint8)
    return Image.fromarray(values, mode)


def decoded(uri):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", uri).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_pictures_are_embedded_small_and_stay_untouched_themselves():
    photo = noise(512, "RGBA")
    before = photo.tobytes()
    kind, image = decoded(data_uri(photo))
    assert kind == "jpeg" and image.size == (128, 128) and len(data_uri(photo)) < 22_000
    assert photo.tobytes() == before
    kind, image = decoded(data_uri(noise(32, "RGBA")))
    assert kind == "png" and np.array_equal(np.asarray(image), np.asarray(noise(32, "RGBA")))
    for mode in ("LA", "P", "CMYK", "I;16"):
        assert decoded(data_uri(Image.new(mode, (8, 8))))[1].size == (8, 8)


def test_every_patch_has_the_color_and_the_number_of_its_expert_and_masked_ones_have_none():
    figure = ElementTree.fromstring(routing_map(Image.new("RGB", (64, 32)), torch.tensor([[0, -1], [7, 9]]), width=160))
    cells = [rect for rect in figure.iter(f"{SVG}rect") if rect.get("fill-opacity")]
    assert [cell.get("fill") for cell in cells] == [EXPERTS[0], EXPERTS[7], EXPERTS[1]]
    assert [text.text for text in figure.iter(f"{SVG}text")] == ["0", "7", "9"]
    assert figure.get("viewBox") == "0 0 160 80"
    assert [cells[-1].get(name) for name in ("x", "y", "width", "height")] == ["80", "40", "80", "40"]


def test_the_picture_under_the_colors_is_gray_and_stays_transparent():
    for mode, colors in (("RGB", 3), ("RGBA", 4)):
        figure = routing_map(noise(32, mode), [[0]])
        _, image = decoded(ElementTree.fromstring(figure).find(f"{SVG}image").get("href"))
        pixels = np.asarray(image)
        assert pixels.shape[-1] == colors and np.ptp(pixels[..., :3], axis=-1).max() == 0


@pytest.mark.parametrize("side", [7, 14, 24])
def test_the_numbers_of_the_experts_are_legible_whatever_the_number_of_patches(side):
    figure = ElementTree.fromstring(routing_map(Image.new("RGB", (32, 32)), [[15] * side] * side))
    sizes = [float(text.get("font-size")) for text in figure.iter(f"{SVG}text")]
    assert len(sizes) == side**2 and min(sizes) >= 8
