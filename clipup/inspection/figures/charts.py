"""Charts as inline SVG: lines over steps, and the load of each expert over steps.

Text, grid and axes inherit the page's text color, so a figure is legible on light and dark pages. A value that is not
finite leaves a gap; a chart without values says so instead of failing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

from . import axes, svg
from .axes import FONT, Frame, Key
from .format import percent_tick, short
from .palette import expert_color, is_second_eight

_MOST_POINTS = 100
_BESIDE = 8  # between series with intervals, in pixels


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, of equal length. ``points`` marks every point, with its value as a tooltip.
    ``half_intervals`` draws y ± that at every point, as a bar; None is a point without one."""

    label: str
    x: Sequence[SupportsFloat]
    y: Sequence[SupportsFloat]
    color: str | None = None
    dash: str | None = None
    points: bool = False
    half_intervals: Sequence[SupportsFloat | None] = ()

    def pairs(self) -> list[tuple[float, float]]:
        if len(self.x) != len(self.y):
            raise ValueError(
                f"series {self.label!r} has {len(self.x)} x and {len(self.y)} y; they must be equally long"
            )
        return [(float(x), float(y)) for x, y in zip(self.x, self.y, strict=True)]

    def bars(self) -> list[tuple[float, float, float]]:
        """x and both ends of every interval that is finite."""
        if not self.half_intervals:
            return []
        if len(self.half_intervals) != len(self.y):
            raise ValueError(
                f"series {self.label!r} has {len(self.half_intervals)} half_intervals for {len(self.y)} points; "
                "give one for every point, or None"
            )
        known = [
            (x, y - float(half), y + float(half))
            for (x, y), half in zip(self.pairs(), self.half_intervals, strict=True)
            if half is not None
        ]
        return [bar for bar in known if all(map(math.isfinite, bar))]


def smooth(values: Sequence[SupportsFloat], window: int) -> list[float]:
    """Centered moving mean over ``window`` values (fewer at the ends); values that are not finite are ignored."""
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    floats = [float(value) for value in values]
    before, after = (window - 1) // 2, window // 2
    return [_mean(floats[max(0, index - before) : index + after + 1]) for index in range(len(floats))]


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = short,
    *,
    x_format: Callable[[float], str] = short,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    width: float = 440,
    height: float = 290,
) -> str:
    """Lines over a shared x axis, as SVG.

    ``y_range``: ends of the y axis; by default those of the values. ``marks``: (x, label) of dotted vertical lines;
    ``levels``: (y, label) of dashed horizontal lines. Series without a color cycle through the palette, dashed from the
    second cycle on. Series with intervals are drawn side by side, so that their bars do not hide one another.
    """
    drawn = [(_key(one, row), one.pairs(), one) for row, one in enumerate(series)]
    finite = [(x, y) for _, pairs, _ in drawn for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    if y_range is None:
        ends = [end for one in series for _, low, high in one.bars() for end in (low, high)]
        y_range = axes.span([y for _, y in finite] + ends + [level for level, _ in levels if finite], margin=0.06)
    frame, around = axes.build(
        width=width,
        height=height,
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_range=axes.span([x for x, _ in finite]),
        y_range=y_range,
        x_format=x_format,
        y_format=y_format,
        legend=[key for key, _, _ in drawn] if len(drawn) > 1 else (),
    )
    parts = [around, *(_mark(frame, x, label) for x, label in marks), *(_level(frame, y, label) for y, label in levels)]
    aside = -_BESIDE * (sum(bool(one.half_intervals) for one in series) - 1) / 2
    for key, pairs, one in drawn:
        line = [_line(frame, pairs, key.color, key.dash)]
        if one.points:
            line += _points(frame, key.label, pairs, key.color, x_format, x_label, y_format)
        if one.half_intervals:
            line += _bars(frame, one.bars(), key.color)
            parts.append(svg.element("g", *line, transform=f"translate({aside:g} 0)"))
            aside += _BESIDE
        else:
            parts += line
    if not finite:
        parts.append(_no_data(frame))
    return svg.picture(width, height, title, *parts)


def load_chart(
    steps: Sequence[SupportsFloat],
    loads: Sequence[Sequence[SupportsFloat]],
    title: str,
    *,
    y_max: float | None = None,
    width: float = 440,
    height: float = 290,
) -> str:
    """Each expert's share of all routed (token, expert) pairs over training, one line per expert, as SVG.

    steps [N], loads [N, E] fractions of 1. The dashed line is the uniform share 1/E; more than 100 steps are drawn as
    100 means of adjacent steps. ``y_max`` gives several charts the same axis.
    """
    if len(steps) != len(loads):
        raise ValueError(f"loads has {len(loads)} rows for {len(steps)} steps; expected one row per step")
    experts = len(loads[0]) if len(loads) else 0
    if any(len(row) != experts for row in loads):
        raise ValueError(f"loads must have one share for each of the {experts} experts in every row")
    lines = [_thin([float(step) for step in steps], [float(row[expert]) for row in loads]) for expert in range(experts)]
    finite = [(x, y) for line in lines for x, y in line if math.isfinite(x) and math.isfinite(y)]
    top = y_max if y_max is not None else max([y for _, y in finite] + [1.5 / experts if experts else 1.0]) * 1.06
    y_label = f"share of load; dashed: uniform, 1/{experts}" if experts else "share of load"
    frame, around = axes.build(
        width=width,
        height=height,
        title=title,
        subtitle=_imbalances(loads),
        x_label="step",
        y_label=y_label,
        x_range=axes.span([x for x, _ in finite]),
        y_range=(0.0, top),
        x_format=short,
        y_format=percent_tick,
        right=40,
    )
    parts = [around]
    if experts:
        parts.append(_level(frame, 1 / experts, ""))
    parts += [_line(frame, line, expert_color(e), _expert_dash(e), 1.6) for e, line in enumerate(lines)]
    parts.append(_end_labels(frame, lines) if finite else _no_data(frame))
    return svg.picture(width, height, title, *parts)


def imbalance(load: Iterable[SupportsFloat]) -> float:
    """Largest share over the uniform share: 1 if the load is balanced; NaN if a share is not finite."""
    shares = [float(share) for share in load]
    if not shares or not all(math.isfinite(share) for share in shares):
        return math.nan
    return max(shares) * len(shares)


def _imbalances(loads: Sequence[Sequence[SupportsFloat]]) -> str:
    known = [value for value in map(imbalance, loads) if math.isfinite(value)]
    return f"largest share over uniform: {known[-1]:.2f} at the end, {max(known):.2f} at most" if known else ""


def _thin(x: list[float], y: list[float]) -> list[tuple[float, float]]:
    """At most ``_MOST_POINTS`` points, each the mean of adjacent ones; the first and last x are kept."""
    size = math.ceil(len(x) / _MOST_POINTS)
    if size <= 1:
        return list(zip(x, y, strict=True))
    points = [(_mean(x[start : start + size]), _mean(y[start : start + size])) for start in range(0, len(x), size)]
    return [(x[0], points[0][1]), *points[1:-1], (x[-1], points[-1][1])]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _line(
    frame: Frame, pairs: Sequence[tuple[float, float]], color: str, dash: str | None, stroke_width: float = 2
) -> str:
    return svg.element(
        "path",
        d=frame.path(pairs),
        fill="none",
        stroke=color,
        stroke_width=stroke_width,
        stroke_dasharray=dash,
        stroke_linejoin="round",
        stroke_linecap="round" if dash is None else None,
    )


def _points(
    frame: Frame,
    label: str,
    pairs: Sequence[tuple[float, float]],
    color: str,
    x_format: Callable[[float], str],
    x_label: str,
    y_format: Callable[[float], str],
) -> list[str]:
    return [
        svg.element(
            "circle",
            svg.title(f"{label}, {x_label} {x_format(x)}: {y_format(y)}"),
            cx=frame.x(x),
            cy=frame.y(y),
            r=3.5,
            fill=color,
        )
        for x, y in pairs
        if math.isfinite(x) and math.isfinite(y)
    ]


def _bars(frame: Frame, bars: Sequence[tuple[float, float, float]], color: str) -> list[str]:
    return [
        svg.element(
            "path",
            d=f"M{frame.x(x) - 4:.1f} {frame.y(low):.1f}h8m-4 0V{frame.y(high):.1f}m-4 0h8",
            fill="none",
            stroke=color,
            stroke_width=1.5,
        )
        for x, low, high in bars
    ]


def _mark(frame: Frame, x: float, label: str) -> str:
    low, high = frame.x_range
    if not low <= x <= high:
        return ""
    at = frame.x(x)
    leftwards = at + 6 + axes.text_width(label) > frame.right
    line = svg.line(at, frame.top - 6, at, frame.bottom, stroke_opacity="0.5", stroke_dasharray="2 3")
    side = {"text_anchor": "end"} if leftwards else {}
    return line + svg.text(
        at - 6 if leftwards else at + 6, frame.top + 2, label, font_size=FONT, fill_opacity=0.7, **side
    )


def _level(frame: Frame, y: float, label: str) -> str:
    low, high = frame.y_range
    if not low <= y <= high:
        return ""
    at = frame.y(y)
    line = svg.line(frame.left, at, frame.right, at, stroke_opacity="0.75", stroke_dasharray="4 4")
    words = svg.text(frame.right - 2, at - 5, label, font_size=FONT - 1, fill_opacity=0.75, text_anchor="end")
    return line + words if label else line


def _no_data(frame: Frame) -> str:
    middle = (frame.left + frame.right) / 2
    return svg.text(middle, (frame.top + frame.bottom) / 2, "nothing recorded", font_size=FONT, text_anchor="middle")


def _key(series: Series, row: int) -> Key:
    if series.color is not None:
        return Key(series.label, series.color, series.dash)
    return Key(series.label, expert_color(row), series.dash or _expert_dash(row))


def _expert_dash(expert: int) -> str | None:
    return "5 3" if is_second_eight(expert) else None


def _end_labels(frame: Frame, lines: Sequence[Sequence[tuple[float, float]]]) -> str:
    """The experts' numbers at the ends of their lines, spread so that they do not overlap, each with a leader line."""
    ends = []
    for expert, line in enumerate(lines):
        known = [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        if known:
            ends.append((frame.y(known[-1][1]), frame.x(known[-1][0]), expert))
    ends.sort()
    places = axes.spread([y for y, _, _ in ends], gap=12, low=frame.top, high=frame.bottom)
    parts = []
    for (y, x, expert), place in zip(ends, places, strict=True):
        leader = svg.element(
            "path",
            d=f"M{x + 1:.1f} {y:.1f}L{frame.right + 14:.1f} {place:.1f}",
            stroke=expert_color(expert),
            stroke_width=1,
            stroke_opacity=0.8,
            fill="none",
            stroke_dasharray=_expert_dash(expert),
        )
        parts += [leader, svg.text(frame.right + 18, place + 4, expert, font_size=FONT - 1)]
    return "".join(parts)
