import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from clipup.inspection import data_uri, retrieval_row, routing_map
from clipup.inspection.figures.palette import EXPERTS

SVG = "{http://www.w3.org/2000/svg}"
RED = Image.new("RGB", (32, 32), "red")


def noise(side, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (side, side, len(mode)), dtype=np.uint8)
    return Image.fromarray(values, mode)


def decoded(uri):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", uri).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def cells(figure):
    return [rect for rect in ElementTree.fromstring(figure).iter(f"{SVG}rect") if rect.get("fill-opacity")]


def test_small_drawings_are_embedded_without_loss():
    kind, image = decoded(data_uri(noise(32, "RGBA")))
    assert kind == "png" and np.array_equal(np.asarray(image), np.asarray(noise(32, "RGBA")))


def test_large_photographs_are_shrunk_and_stay_small_and_untouched_themselves():
    photo = noise(512, "RGBA")
    before = photo.tobytes()
    kind, image = decoded(data_uri(photo))
    assert kind == "jpeg" and image.size == (128, 128) and len(data_uri(photo)) < 22_000
    assert photo.tobytes() == before


@pytest.mark.parametrize("mode", ["LA", "P", "CMYK", "I;16"])
def test_every_kind_of_picture_is_taken(mode):
    assert decoded(data_uri(Image.new(mode, (8, 8))))[1].size == (8, 8)


def test_every_patch_has_the_color_and_the_number_of_its_expert():
    figure = routing_map(RED, torch.tensor([[0, 1], [7, 9]]))
    assert [cell.get("fill") for cell in cells(figure)] == [EXPERTS[0], EXPERTS[1], EXPERTS[7], EXPERTS[1]]
    assert [e.text for e in ElementTree.fromstring(figure).iter(f"{SVG}text")] == ["0", "1", "7", "9"]


def test_patches_that_took_no_part_stay_uncoloured():
    assert len(cells(routing_map(RED, [[-1, 2], [3, -1]]))) == 2


def test_patches_cover_a_picture_that_is_not_square():
    figure = ElementTree.fromstring(routing_map(Image.new("RGB", (64, 32)), np.zeros((2, 4), dtype=int), width=160))
    assert figure.get("viewBox") == "0 0 160 80"
    last = [rect for rect in figure.iter(f"{SVG}rect") if rect.get("fill-opacity")][-1]
    right, bottom = (float(last.get(a)) + float(last.get(b)) for a, b in (("x", "width"), ("y", "height")))
    assert (right, bottom) == (160, 80)


@pytest.mark.parametrize("rank, framed", [(5, 1), (6, 0)])
def test_the_right_picture_is_framed_where_it_was_retrieved(rank, framed):
    row = ElementTree.fromstring(retrieval_row("a cat", RED, [RED] * 5, rank, "CLIP-UP"))
    labels = [image.get("alt") for image in row.iter("img")]
    assert labels[0] == "belongs to the caption" and len(labels) == 6
    assert [tile[0].get("alt") for tile in row.iter("div") if "solid" in tile.get("style")] == (
        [f"retrieved at rank {rank}, the correct one"] * framed
    )
    assert f"rank {rank} · CLIP-UP" in "".join(row.itertext())
