"""The frame of a chart: scales, ticks, grid, title, legend and label placement. ``charts.py`` draws into it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from . import svg

FONT = 12
_CHARACTER = 7.3  # px, average character of a wide sans serif at FONT: the reader's font cannot be measured
_LINE = 18


@dataclass(frozen=True)
class Key:
    """One legend entry: the look of a line, and its label."""

    label: str
    color: str
    dash: str | None = None


@dataclass(frozen=True)
class Frame:
    """The plot area in pixels, and the data range of its edges."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels from the left edge of the figure."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Pixels from the top edge of the figure."""
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """Path data through the points; a point with a coordinate that is not finite interrupts the line."""
        written, pen_down = [], False
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                written.append(f"{'L' if pen_down else 'M'}{self.x(x):.1f} {self.y(y):.1f}")
                pen_down = True
            else:
                pen_down = False
        return "".join(written)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About ``about`` round numbers from low to high, 1, 2, 2.5 or 5 times a power of ten apart."""
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def span(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """The range of the finite values, extended at both ends by ``margin`` of its length; never empty."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def spread(sorted_places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The nearest places between low and high with at least ``gap`` between neighbours, for labels.

    Least squares under ``place[i + 1] - place[i] >= gap``: isotonic regression of ``place[i] - i * gap`` by pooling.
    A gap that leaves no room for all of them is reduced.
    """
    if not sorted_places:
        return []
    gap = min(gap, (high - low) / len(sorted_places))
    pools: list[list[float]] = []
    for index, place in enumerate(sorted_places):
        pools.append([place - index * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            later = pools.pop()
            pools[-1] += later
    last = high - (len(sorted_places) - 1) * gap
    bases = [min(max(fmean(pool), low), last) for pool in pools for _ in pool]
    return [base + index * gap for index, base in enumerate(bases)]


def text_width(label: str) -> float:
    """Estimated width in pixels, at ``FONT``."""
    return _CHARACTER * len(label)


def build(
    *,
    width: float,
    height: float,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
    legend: Sequence[Key] = (),
    subtitle: str = "",
    right: float = 14,
) -> tuple[Frame, str]:
    """The frame, and the markup of everything but the data.

    At least ``right`` pixels stay free at the right, for labels. The plot area takes the height that title and legend
    leave.
    """
    if not y_range[0] < y_range[1]:
        raise ValueError(f"y_range is {y_range[0]} to {y_range[1]}; the lower end must come first")
    head, top = _head(title, subtitle, legend, y_label, width)
    y_ticks = ticks(*y_range, about=5)
    x_ticks = ticks(*x_range, about=5)
    right = max(right, 2 + text_width(x_format(x_ticks[-1])) / 2 if x_ticks else 0)
    y_labels = _same_decimals([y_format(value) for value in y_ticks])
    left = 12 + max(map(text_width, y_labels), default=0.0)
    frame = Frame(left, top, width - right, max(height - 40, top + 60), x_range, y_range)
    return frame, head + _grid(frame, y_ticks, y_labels) + _bottom(frame, x_ticks, x_format, x_label)


def _head(title: str, subtitle: str, legend: Sequence[Key], y_label: str, width: float) -> tuple[str, float]:
    parts, baseline = [], 2.0
    for line in _wrap(title, int(width / (_CHARACTER * 1.2))):
        baseline += _LINE - 2
        parts.append(svg.text(0.0, baseline, line, font_size=14, font_weight=600))
    if subtitle:
        baseline += _LINE
        parts.append(svg.text(0.0, baseline, subtitle, font_size=FONT, fill_opacity=0.7))
    x = 0.0
    for index, key in enumerate(legend):
        taken = 30 + text_width(key.label) + 16
        if index == 0 or x + taken > width:
            x, baseline = 0.0, baseline + _LINE + 2
        y = baseline - 4
        parts.append(svg.line(x, y, x + 22, y, stroke=key.color, stroke_width=2.5, stroke_dasharray=key.dash))
        parts.append(svg.text(x + 28, baseline, key.label, font_size=FONT))
        x += taken
    baseline += _LINE + 2
    parts.append(svg.text(0.0, baseline, y_label, font_size=FONT, fill_opacity=0.7))
    return "".join(parts), baseline + 12


def _same_decimals(labels: Sequence[str]) -> list[str]:
    """The labels, zero-padded to the same number of decimals: 1.7 beside 1.75 becomes 1.70."""
    decimals = [len(found[1]) if (found := re.search(r"\.(\d+)", label)) else 0 for label in labels]
    most = max(decimals, default=0)

    def filled(label: str, has: int) -> str:
        return re.sub(r"\d(?!.*\d)", lambda last: last[0] + ("" if has else ".") + "0" * (most - has), label, count=1)

    return [label if has == most else filled(label, has) for label, has in zip(labels, decimals, strict=True)]


def _grid(frame: Frame, y_ticks: Sequence[float], y_labels: Sequence[str]) -> str:
    parts = []
    for value, label in zip(y_ticks, y_labels, strict=True):
        y = frame.y(value)
        parts.append(svg.line(frame.left, y, frame.right, y, stroke_opacity="0.13"))
        parts.append(svg.text(frame.left - 6, y + 4, label, font_size=FONT, text_anchor="end", fill_opacity=0.7))
    return "".join(parts)


def _bottom(frame: Frame, x_ticks: Sequence[float], x_format: Callable[[float], str], x_label: str) -> str:
    parts, occupied = [svg.line(frame.left, frame.bottom, frame.right, frame.bottom, stroke_opacity="0.5")], -math.inf
    for value in x_ticks:
        x, label = frame.x(value), x_format(value)
        if x - text_width(label) / 2 < occupied + 6:
            continue
        occupied = x + text_width(label) / 2
        parts.append(svg.line(x, frame.bottom, x, frame.bottom + 4, stroke_opacity="0.5"))
        parts.append(svg.text(x, frame.bottom + 17, label, font_size=FONT, text_anchor="middle", fill_opacity=0.7))
    middle = (frame.left + frame.right) / 2
    parts.append(svg.text(middle, frame.bottom + 34, x_label, font_size=FONT, text_anchor="middle", fill_opacity=0.7))
    return "".join(parts)


def _wrap(title: str, length: int) -> list[str]:
    """At most two lines of about ``length`` characters; the second is truncated if it is too long."""
    words, first = svg.clean(title).split(" "), ""
    while words and (not first or len(first) + 1 + len(words[0]) <= length):
        first = f"{first} {words.pop(0)}".strip()
    lines = [first, " ".join(words)] if words else [first]
    return [svg.shorten(line, length + 4) for line in lines]
