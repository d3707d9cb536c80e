"""Figures of experts: what they show, and that they hold any numbers and any words."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from clipup.inspection import Figure, Piece, load_bars, patch, similarity_heatmap, token_strip
from clipup.inspection.figures.palette import EXPERTS

SVG = "{http://www.w3.org/2000/svg}"


def test_figures_show_themselves_in_a_notebook_and_are_short_in_words():
    figure = load_bars([0.5, 0.5], "t")
    assert isinstance(figure, Figure) and figure._repr_html_() == figure == figure.__html__()
    assert type(figure._repr_html_()) is str and len(repr(figure)) < 40


def test_bars_are_as_long_as_the_shares():
    figure = load_bars([0.5, 0.25, 0.25, 0.0], "<Text tower>", "sure")
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", figure)]
    assert widths == [100, 50, 50, 0] and re.findall(r"background:(#\w+)", figure) == list(EXPERTS[:4])
    words = "|".join(ElementTree.fromstring(figure).itertext())
    for shown in ("50.0%", "25.0%", "unused", "largest share over uniform: 2.00", "sure", "<Text tower>"):
        assert shown in words
    assert figure.count("left:50.0%") == 4, "the uniform share, dashed"


def test_every_cell_of_the_heatmap_has_its_value():
    figure = similarity_heatmap([[1.0, 0.25], [0.25, 1.0]], "t", to_dense=[0.5, 0.75])
    cells = [span for span in ElementTree.fromstring(figure).iter("span") if span.get("title")]
    assert [cell.get("title") for cell in cells] == [
        *("0 and 0: 1.000", "0 and 1: 0.250", "0 and dense: 0.500"),
        *("1 and 0: 0.250", "1 and 1: 1.000", "1 and dense: 0.750"),
    ]
    assert [cell.text for cell in cells] == ["1.00", ".25", ".50", ".25", "1.00", ".75"]
    assert "#174a8b 25.0%" in cells[1].get("style") and "color:#000" in cells[1].get("style")
    assert "color:#fff" in cells[0].get("style")
    assert "mean of all pairs: 0.250 · to dense: 0.625" in "".join(ElementTree.fromstring(figure).itertext())
    assert ">.00<" not in similarity_heatmap(np.eye(16), "t")


def test_shades_of_the_heatmap_fit_cosines_that_are_nearly_equal():
    figure = similarity_heatmap([[1.0, 0.97], [0.94, 1.0]], "t", lightest=0.94)
    shares = re.findall(r"#174a8b ([\d.]+)%", figure)
    assert [float(share) for share in shares] == pytest.approx([100, 50, 0, 100]) and "from 0.94 (light)" in figure


def test_tokens_have_the_colour_the_number_and_the_other_choices_of_their_experts():
    caption = [Piece("⟨start⟩", 0), Piece("<b>", 1), Piece("oon", 1), Piece("", -1)]
    figure = ElementTree.fromstring(token_strip(caption, [[0, 1], [3, 2], [9, 0], [-1, -1]], "block 1"))
    spans = [span for span in figure.iter("span") if span.find("sub") is not None]
    assert [span.text + span.find("sub").text for span in spans] == ["⟨start⟩0", "<b>3", "oon9"]
    assert spans[1].get("title") == "expert 3, then 2"
    for span, look in zip(spans, (f"solid {EXPERTS[0]}", f"solid {EXPERTS[3]}", f"double {EXPERTS[1]}"), strict=True):
        assert look in span.get("style")
    assert "".join(figure.itertext()) == "block 1 ⟨start⟩0 <b>3oon9"


def test_a_patch_is_framed_where_it_lies_among_its_neighbours():
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[10:20, 30:40] = 255
    figure = ElementTree.fromstring(patch(Image.fromarray(pixels), (4, 4), 1, 3, "p", width=40))
    assert figure.get("viewBox") == "0 0 40 40"  # three rows and columns, at the edge too
    frames = [rect for rect in figure.iter(f"{SVG}rect") if rect.get("fill") == "none"]
    assert [(f.get("x"), f.get("y"), f.get("width"), f.get("height")) for f in frames] == [
        ("26.7", "13.3", "13.3", "13.3")
    ] * 2
    assert len({frame.get("stroke") for frame in frames}) == 2
