import dataclasses
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from clipup.inspection import Series, line_chart, load_chart, smooth

SVG = "{http://www.w3.org/2000/svg}"
TWO = [Series("dense", [0, 10], [1.57, 1.8]), Series("sparse", [0, 10], [1.6, 1.81], points=True)]


def texts(figure):
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(figure).iter(f"{SVG}text")]


def strokes(figure, color):
    """(path data, style) of the lines in a color."""
    paths = ElementTree.fromstring(figure).iter(f"{SVG}path")
    styles = [(path.get("d"), path.get("style") or "") for path in paths if path.get("d")]
    return [(line, style) for line, style in styles if f"stroke: {color}" in style]


def test_a_chart_takes_the_pages_color_and_font_and_is_the_same_every_time():
    figure = line_chart(TWO, "A <title>", "step", "nats", levels=[(1.7, "chance")])
    assert {"A <title>", "dense", "sparse", "step", "nats", "chance", "1.60", "1.65"} <= set(texts(figure))
    assert figure.count("<title>A &lt;title&gt;</title>") == 1 and 'role="img"' in figure
    assert "currentColor" in figure and "font-family" not in figure and "<style" not in figure
    assert figure == line_chart(TWO, "A <title>", "step", "nats", levels=[(1.7, "chance")])
    assert "dense" not in texts(line_chart(TWO[:1], "t", "x", "y"))


def test_a_line_runs_where_its_values_say_and_has_a_gap_where_there_is_none():
    x, y = [0, 5, 10, 15, 20, 25], [0, 1, 2, math.nan, 4, 5]
    ((path, _),) = strokes(line_chart([Series("a", x, y, color="#ff0000")], "t", "x", "y"), "#ff0000")
    assert path.count("M") == 2 and path.count("L") == 3
    points = [tuple(map(float, xy)) for xy in re.findall(r"[ML] (\S+) (\S+)", path)]
    step = np.subtract(points[1], points[0])
    assert step[0] > 0 > step[1]  # y runs downwards
    assert np.subtract(points, points[0]) == pytest.approx(np.outer([0, 1, 2, 4, 5], step), abs=0.3)


@pytest.mark.parametrize("experts", [1, 16])
def test_the_load_is_a_band_from_the_least_to_the_most_used_expert(experts):
    loads = [[0.7, *[0.3 / experts] * (experts - 1)]] * 150
    figure = load_chart(range(150), loads, "Image tower, block 1", y_max=1)
    largest = f"{0.7 * experts:.2f}"
    assert f"largest share over uniform: {largest} at the end, {largest} at most" in " ".join(texts(figure))
    assert {"least to most used expert", f"uniform, 1/{experts}", "100%"} <= set(texts(figure))
    paths = [path.get("d") for path in ElementTree.fromstring(figure).iter(f"{SVG}path")]
    band = next(path for path in paths if path.count("L") > 99)
    grid = [line for line, style in strokes(figure, "currentColor") if "stroke-opacity: 0.133" in style]  # 0 to 100 %
    whole, high = (np.ptp([float(y) for y in re.findall(r"[ML] \S+ (\S+)", lines)]) for lines in ("".join(grid), band))
    assert high / whole == pytest.approx(0.7 - 0.3 / experts if experts > 1 else 0, abs=0.01)
    assert band.count("L") <= 2 * 100 + 3


def test_smoothing_is_a_centered_mean_that_leaves_out_what_is_not_finite():
    assert smooth([1, 2, 3, 4, 9], 3) == pytest.approx([1.5, 2, 3, 16 / 3, 6.5])
    assert smooth([1, math.nan, 3], 3) == [1, 2, 3] and smooth([5.0, 7.0], 1) == [5.0, 7.0]


@pytest.mark.parametrize("highest", [0.09, 0.448, 3.01])
def test_the_highest_value_lies_below_the_top_line_of_the_grid(highest):
    series = [Series("a", range(3), [0, highest, 0], color="#ff0000")]
    drawn = [line_chart(series, "t", "step", "nats"), line_chart(series, "t", "x", "y", y_range=(0, highest))]
    for figure in drawn:
        ((line, _),) = strokes(figure, "#ff0000")
        lines = "".join(line for line, style in strokes(figure, "currentColor") if "stroke-opacity: 0.133" in style)
        top = min(float(y) for y in re.findall(r"M \S+ (\S+)", lines))
        assert min(float(y) for y in re.findall(r"[ML] \S+ (\S+)", line)) >= top


def test_the_label_of_the_y_axis_stands_by_itself():
    assert {"step", "share of choices", "largest share over uniform: 1.20 at the end, 1.20 at most"} <= set(
        texts(load_chart([0, 1], [[0.4, 0.6]] * 2, "t"))
    )


def test_every_point_of_a_line_can_have_a_note_and_lines_differ_in_more_than_color():
    notes = {"above": ["10.2", "13.7"], "below": ["10.8", "14.0"]}
    series = [Series(name, [3, 12], [1, 2 + (name == "above")], points=True, notes=of) for name, of in notes.items()]
    figure = line_chart([dataclasses.replace(line, above=line.label == "above") for line in series], "t", "x", "y")
    assert {*notes["above"], *notes["below"]} <= set(texts(figure))
    at = {text.text.strip(): text for text in ElementTree.fromstring(figure).iter(f"{SVG}text")}
    assert "text-anchor: end" in at["13.7"].get("style") and "text-anchor: end" not in at["14.0"].get("style")
    shapes = [shape.get("d") for shape in ElementTree.fromstring(figure).findall(f".//{SVG}defs/{SVG}path")]
    assert len({shape for shape in shapes if "C" in shape or "z" in shape}) == 2, "two markers"
