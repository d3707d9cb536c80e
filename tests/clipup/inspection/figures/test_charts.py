import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipup.inspection import Series, line_chart, load_chart, smooth
from clipup.inspection.figures import axes

SVG = "{http://www.w3.org/2000/svg}"


def texts(figure):
    return [element.text for element in ElementTree.fromstring(figure).iter(f"{SVG}text")]


def paths(figure):
    return [element.get("d") for element in ElementTree.fromstring(figure).iter(f"{SVG}path")]


anything = st.floats(width=32)


@given(st.lists(st.tuples(anything, anything), max_size=8), st.text(), st.text())
def test_any_values_and_any_words_give_well_formed_svg(pairs, label, title):
    x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    figure = line_chart([Series(label, x, y, points=True), Series("b", [], [])], title, label, title)
    ElementTree.fromstring(figure)
    assert "nan" not in " ".join(paths(figure)) and "inf" not in " ".join(paths(figure))


def test_a_chart_without_values_says_so():
    for series in ([], [Series("a", [], [])], [Series("a", [1, 2], [math.nan, math.inf])]):
        assert "nothing recorded" in texts(line_chart(series, "t", "x", "y"))
    assert "nothing recorded" in texts(load_chart([], [], "t"))


def test_a_value_that_is_not_finite_leaves_a_gap():
    figure = line_chart([Series("a", [0, 1, 2, 3, 4], [0, 1, math.nan, 3, 4])], "t", "x", "y")
    assert paths(figure)[0].count("M") == 2 and paths(figure)[0].count("L") == 2


def test_a_line_runs_where_its_values_say():
    figure = line_chart([Series("a", [0, 5, 10], [0, 1, 2])], "t", "x", "y")
    (x0, y0), (x1, y1), (x2, y2) = [
        tuple(map(float, xy)) for xy in re.findall(r"[ML](\S+) (\d+\.\d)", paths(figure)[0])
    ]
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 > y1 > y2 and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_marks_and_levels_are_labelled_and_several_lines_have_a_legend():
    both = [Series("dense", [0, 10], [0, 1]), Series("sparse", [0, 10], [0, 2])]
    shown = texts(line_chart(both, "t", "x", "y", marks=[(5, "upcycled")], levels=[(0.5, "chance")]))
    assert {"upcycled", "chance", "dense", "sparse"} <= set(shown)
    assert "dense" not in texts(line_chart(both[:1], "t", "x", "y"))


def test_series_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="'dense' has 2 x and 1 y"):
        line_chart([Series("dense", [1, 2], [1])], "t", "x", "y")


def test_an_axis_that_runs_backwards_is_refused():
    with pytest.raises(ValueError, match="y_range is 1 to 1; the lower end must come first"):
        line_chart([Series("dense", [1, 2], [1, 2])], "t", "x", "y", y_range=(1, 1))


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_evenly_spaced_and_inside(low, width):
    found = axes.ticks(low, low + width)
    assert 2 <= len(found) <= 9
    assert low - 1e-6 * width <= found[0] and found[-1] <= low + width * (1 + 1e-6)


def test_labels_of_an_axis_have_the_same_decimals():
    shown = texts(line_chart([Series("a", [0, 1], [1.57, 1.81])], "t", "x", "y"))
    assert {"1.60", "1.65", "1.70"} <= set(shown)


@pytest.mark.parametrize("experts", [1, 2, 8, 16])
def test_every_expert_has_a_line_and_a_number_that_overlaps_no_other(experts):
    figure = load_chart([1, 2], [[1 / experts] * experts] * 2, "Image tower, block 1")
    numbers = [e for e in ElementTree.fromstring(figure).iter(f"{SVG}text") if e.get("font-size") == "11"]
    assert [int(e.text) for e in sorted(numbers, key=lambda e: int(e.text))] == list(range(experts))
    heights = sorted(float(e.get("y")) for e in numbers)
    assert all(b - a >= 9 for a, b in zip(heights, heights[1:], strict=False))
    assert len(paths(figure)) == 2 * experts  # a line and a leader each


def test_the_uniform_share_and_the_imbalance_are_stated():
    shown = texts(load_chart([1, 2, 3], [[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]], "t"))
    assert "largest share over uniform: 1.20 at the end, 2.80 at most" in shown
    assert "share of load; dashed: uniform, 1/4" in shown


def test_long_runs_are_thinned_to_means():
    figure = load_chart(range(5000), [[0.25 + 0.1 * (-1) ** step, 0.75] for step in range(5000)], "t")
    line = paths(figure)[0]
    heights = {xy for xy in re.findall(r"[ML]\S+ (\d+\.\d)", line)}
    assert line.count("L") == 99 and len(heights) == 1


def test_loads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="loads has 1 rows for 2 steps"):
        load_chart([1, 2], [[1.0]], "t")
    with pytest.raises(ValueError, match="each of the 2 experts"):
        load_chart([1, 2], [[0.5, 0.5], [1.0]], "t")


def test_smoothing_is_a_centred_mean_that_leaves_out_what_is_not_finite():
    assert smooth([1, 2, 3, 4, 9], 3) == [1.5, 2, 3, 16 / 3, 6.5]
    assert smooth([1, math.nan, 3], 3) == [1, 2, 3]
    assert smooth([5.0, 7.0], 1) == [5.0, 7.0]
    assert math.isnan(smooth([math.nan], 3)[0])
    with pytest.raises(ValueError, match="window is 0"):
        smooth([1.0], 0)


def test_lines_are_dashed_where_the_colours_begin_again():
    chart = line_chart([Series(f"run {row}", [0, 1], [row, row + 1]) for row in range(9)], "Loss", "step", "nats")
    lines = [line for line in ElementTree.fromstring(chart).iter() if line.tag.endswith("path") and line.get("stroke")]

    assert lines[0].get("stroke") == lines[8].get("stroke") and len({line.get("stroke") for line in lines[:8]}) == 8
    assert [line.get("stroke-dasharray") for line in lines] == [None] * 8 + ["5 3"]


def test_an_interval_is_a_bar_from_end_to_end_of_it_within_the_axis():
    line = Series("a", [0, 10, 20], [0.0, 1.0, 2.0], half_intervals=[3.0, None, 1.0])
    drawn = paths(line_chart([line], "t", "x", "y"))
    bars = [re.fullmatch(r"M\S+ (\S+)h8m-4 0V(\S+)m-4 0h8", path) for path in drawn]
    lengths = [float(bar[1]) - float(bar[2]) for bar in bars if bar]
    assert len(lengths) == 2 and lengths[0] == pytest.approx(3 * lengths[1], abs=0.5)
    frame = [float(y) for bar in bars if bar for y in bar.groups()]
    assert 0 < min(frame) and max(frame) < 290, "the axis covers the intervals"


def test_intervals_of_two_series_are_side_by_side():
    both = [Series(name, [0, 10], [1, 1], half_intervals=[1, 1]) for name in "ab"]
    moved = re.findall(r"translate\((\S+) 0\)", line_chart([*both, Series("plain", [0, 10], [0, 1])], "t", "x", "y"))
    assert [float(one) for one in moved] == [-4, 4]


def test_intervals_that_are_not_one_per_point_are_refused():
    with pytest.raises(ValueError, match="'a' has 1 half_intervals for 2 points"):
        line_chart([Series("a", [0, 1], [0, 1], half_intervals=[1])], "t", "x", "y")
