"""Figures of experts: what they show, and that they hold any numbers and any words."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from clipup.inspection import Figure, Piece, load_bars, patch, routing_map, similarity_heatmap, token_strip
from clipup.inspection.figures.expert_cards import patch_cards, word_cards
from clipup.inspection.figures.heatmaps import _LIGHT
from clipup.inspection.figures.images import expert_mark
from clipup.inspection.figures.palette import EXPERTS
from clipup.inspection.token_words import WordShare

SVG = "{http://www.w3.org/2000/svg}"


def texts(figure):
    return [element.text for element in ElementTree.fromstring(figure).iter(f"{SVG}text")]


def rects(figure):
    return list(ElementTree.fromstring(figure).iter(f"{SVG}rect"))


def channels(color):
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def luminance(color):
    encoded = np.array(channels(color)) / 255
    return float(
        np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    )


def test_figures_show_themselves_in_a_notebook_and_are_short_in_words():
    figure = load_bars([0.5, 0.5], "t")
    assert isinstance(figure, Figure) and figure._repr_html_() == figure == figure.__html__()
    assert type(figure._repr_html_()) is str and len(repr(figure)) < 40


def test_bars_are_as_long_as_the_shares():
    figure = load_bars([0.5, 0.25, 0.25, 0.0], "Text tower, block 1", "sure")
    widths = [float(rect.get("width")) for rect in rects(figure)]
    assert widths[1] == widths[2] == pytest.approx(widths[0] / 2, abs=0.1) and widths[3] == 0
    assert [rect.get("fill") for rect in rects(figure)] == list(EXPERTS[:4])
    assert {"50.0%", "25.0%", "unused", "largest share over uniform: 2.00", "sure", "Text tower, block 1"} <= set(
        texts(figure)
    )
    (even,) = ElementTree.fromstring(figure).iter(f"{SVG}line")
    assert float(even.get("x1")) == pytest.approx(float(rects(figure)[1].get("x")) + widths[1], abs=0.1)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.text(), st.text())
def test_bars_of_any_numbers_are_well_formed(load, title, subtitle):
    ElementTree.fromstring(load_bars(load, title, subtitle))


def test_bars_without_experts_are_refused():
    with pytest.raises(ValueError, match="load is empty"):
        load_bars([], "t")


def test_every_cell_of_the_heatmap_has_its_value():
    cosines = np.array([[1.0, 0.25], [0.25, 1.0]])
    figure = similarity_heatmap(cosines, "t", to_dense=[0.5, 0.75])
    titles = [rect.find(f"{SVG}title").text for rect in rects(figure)]
    assert titles == ["0 and 0: 1.000", "0 and 1: 0.250", "0 and the dense MLP: 0.500"] + [
        "1 and 0: 0.250",
        "1 and 1: 1.000",
        "1 and the dense MLP: 0.750",
    ]
    assert {"mean of all pairs: 0.250 · to dense: 0.625", "dense", ".25", ".75", "1.00"} <= set(texts(figure))


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 0.6, 0.7, 0.72, 0.74, 0.8, 1.0])
def test_values_stand_out_from_their_shade(value):
    figure = ElementTree.fromstring(similarity_heatmap([[value]], "t"))
    (rect,), label = figure.iter(f"{SVG}rect"), list(figure.iter(f"{SVG}text"))[-1]
    ink = {"#fff": "#ffffff", "#000": "#000000"}[label.get("fill")]
    low, high = sorted((luminance(rect.get("fill")), luminance(ink)))
    assert (high + 0.05) / (low + 0.05) >= 4.5
    if value <= 0:
        assert channels(rect.get("fill")) == list(_LIGHT)


def test_many_experts_have_tooltips_in_place_of_numbers():
    figure = similarity_heatmap(np.eye(16), "t")
    assert len(rects(figure)) == 256 and ".00" not in texts(figure)


@given(st.floats(width=32), st.text())
def test_heatmaps_of_any_numbers_are_well_formed(value, title):
    ElementTree.fromstring(similarity_heatmap([[1, value], [value, 1]], title, [value, value]))


def test_the_mean_of_shards_is_over_pairs_of_the_same_shard():
    cosines = np.array([[1, 0.1, 0.5, 0.1], [0.1, 1, 0.1, 0.7], [0.5, 0.1, 1, 0.1], [0.1, 0.7, 0.1, 1]])
    assert "mean of pairs of the same shard: 0.600" in texts(similarity_heatmap(cosines, "t", granularity=2))
    assert "no two experts were initialized equal" in texts(similarity_heatmap(np.eye(2), "t", granularity=2))


@pytest.mark.parametrize("wrong, dense", [(np.ones(3), None), (np.ones((2, 3)), None), (np.ones((0, 0)), None)])
def test_cosines_that_are_no_square_are_refused(wrong, dense):
    with pytest.raises(ValueError, match=r"it must be \[E, E\]"):
        similarity_heatmap(wrong, "t", dense)


def test_cosines_to_dense_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"it must be \[2\]"):
        similarity_heatmap(np.ones((2, 2)), "t", [1.0])


def spans(figure):
    return [span for span in ElementTree.fromstring(figure).iter("span") if span.find("sub") is not None]


def test_tokens_have_the_colour_the_number_and_the_other_choices_of_their_experts():
    caption = [Piece("⟨start⟩", 0), Piece("ball", 1), Piece("oon", 1), Piece("", -1)]
    figure = token_strip(caption, [[0, 1], [3, 2], [9, 0], [-1, -1]], "block 1")
    assert [(span.text, span.find("sub").text) for span in spans(figure)] == [
        ("⟨start⟩", "0"),
        ("ball", "3"),
        ("oon", "9"),
    ]
    assert [span.get("title") for span in spans(figure)][1] == "expert 3, then 2"
    for span, color, line in zip(spans(figure), EXPERTS[:1] + EXPERTS[3:4] + EXPERTS[1:2], "ssd", strict=True):
        assert f"{'solid' if line == 's' else 'double'} {color}" in span.get("style")
    assert "".join(ElementTree.fromstring(figure).itertext()) == "block 1 ⟨start⟩0 ball3oon9"


@given(st.lists(st.text(), max_size=5))
@example(["<b>", "&", "\x00"])
def test_any_words_give_well_formed_captions(names):
    caption = [Piece(name, place) for place, name in enumerate(names)]
    ElementTree.fromstring(token_strip(caption, np.zeros(len(names), dtype=int)))


@pytest.mark.parametrize("wrong", [[0], [0.5, 1.5]])
def test_experts_that_do_not_fit_the_caption_are_refused(wrong):
    with pytest.raises(ValueError, match="one or more for each of 2 tokens"):
        token_strip([Piece("a", 0), Piece("b", 1)], wrong)


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


def test_fine_maps_have_numbers_too_when_they_are_wide_enough():
    image = Image.new("RGB", (32, 32), "red")
    assert len(texts(routing_map(image, np.zeros((14, 14), dtype=int), width=14 * 14))) == 196
    assert texts(routing_map(image, np.zeros((14, 14), dtype=int))) == []


def test_the_mark_of_an_expert_has_its_number():
    assert texts(expert_mark(11)) == ["11"]


def test_cards_say_what_an_expert_takes_and_when_that_is_nothing():
    words = ElementTree.fromstring(word_cards([0.75, 0.25], [[WordShare("<b>", 3, 4), WordShare("cat", 1, 1)], []]))
    first, second = ["".join(card.itertext()) for card in words]
    assert "expert 0, first choice of 75.0%" in first and "<b> 3/4cat 1/1" in first
    assert "expert 1, first choice of 25.0%" in second and "no word more often than its share" in second
    shown = patch_cards([1.0, math.nan], [["<i/>", "<i/>"], []])
    assert shown.count("<i/>") == 2 and "first choice of no patch" in shown
