"""A chart of measured time against counted FLOPs, from a CSV file of clip_throughput.py.

    python benchmarks/plot_throughput.py benchmarks/results/clip_throughput_cpu.csv --out clip_throughput_cpu.svg

A panel for every pass and type; both axes are relative to dense B/16. On the diagonal a model takes the time that its
FLOPs promise; above it, it takes more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import charts
from charts import LogScale, Row

from clipup.inspection.figures import svg

PANEL, GAP, HEAD, FOOT, LEFT = 260, 56, 76, 40, 44  # px
TICKS = (0.25, 0.5, 1, 2, 4, 8)
DENSE, SPARSE, ACCELERATED = "#57606a", "#e0660a", "#0969da"
PASSES = {"fwd": "inference", "fwd_bwd": "training step"}
BASELINE = "ViT-B-16"


def panel_of(row: Row) -> tuple[str, str]:
    return row["pass"], row["dtype"]


def choose(rows: Sequence[Row]) -> list[Row]:
    """The rows of whole models; none where a pass or type lacks the baseline."""
    models = [row for row in rows if {"pass", "model", "speed_to_b16"} <= row.keys()]
    compared = {panel_of(row) for row in models if row["model"] == BASELINE}
    return models if compared == set(map(panel_of, models)) else []


def color(model: str) -> str:
    if "accelerated" in model:
        return ACCELERATED
    return SPARSE if "CLIP-UP" in model else DENSE


def relative(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Model, FLOPs and time, both over the baseline's."""
    base = next(float(row["gflops_per_pair"]) for row in rows if row["model"] == BASELINE)
    return [(row["model"], float(row["gflops_per_pair"]) / base, 1 / float(row["speed_to_b16"])) for row in rows]


def scale_of(values: Sequence[float]) -> LogScale:
    """An axis that holds all values and 1, with room for labels."""
    return LogScale(min(1.0, *values) / 2, max(1.0, *values) * 1.4, PANEL, TICKS)


def apart(places: Sequence[float], least: float) -> list[float]:
    """The places, moved down where needed until neighbours (in sorted order) are ``least`` apart."""
    moved = list(places)
    lowest = -math.inf
    for index in sorted(range(len(moved)), key=moved.__getitem__):
        moved[index] = lowest = max(moved[index], lowest + least)
    return moved


def panel(title: str, points: Sequence[tuple[str, float, float]], left: float, scale: LogScale) -> str:
    """One panel; dense models have their labels at the left, sparse ones at the right."""
    top, bottom = float(HEAD), float(HEAD + PANEL)
    parts = [svg.text(left, top - 10, title, font_size=13, font_weight=600)]
    for tick in scale.ticks:
        at, label = scale(tick), f"{tick:g}"
        parts += [
            svg.line(left + at, top, left + at, bottom, stroke_opacity="0.13"),
            svg.line(left, bottom - at, left + PANEL, bottom - at, stroke_opacity="0.13"),
            svg.text(left + at, bottom + 15, label, font_size=11, text_anchor="middle"),
            svg.text(left - 6, bottom - at + 4, label, font_size=11, text_anchor="end"),
        ]
    parts.append(svg.line(left, bottom, left + PANEL, top, stroke_opacity="0.6", stroke_dasharray="4 4"))
    parts.append(svg.text(left + PANEL / 2, bottom + 32, "FLOPs", font_size=11, text_anchor="middle"))
    for side in (True, False):
        group = [point for point in points if ("CLIP-UP" not in point[0]) == side]
        heights = apart([bottom - scale(time) for _, _, time in group], 13)
        for (model, flops, time), height in zip(group, heights, strict=True):
            x, y, ink = left + scale(flops), bottom - scale(time), color(model)
            label = f"{'accelerated' if ink == ACCELERATED else model.removeprefix('ViT-')} {time:.2f}"
            place = {"x": x - 9, "text_anchor": "end"} if side else {"x": x + 9}
            tooltip = svg.title(f"{model}: FLOPs {flops:.2f}, time {time:.2f} of {BASELINE}")
            parts.append(svg.element("circle", tooltip, cx=x, cy=y, r=4.5, fill=ink))
            parts.append(svg.text(**({"y": height + 4, "content": label, "font_size": 11, "fill": ink} | place)))
    return "".join(parts)


def chart(rows: Sequence[Row]) -> str:
    """The panels side by side."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(panel_of(row), []).append(row)
    points = {key: relative(group) for key, group in groups.items()}
    scale = scale_of([value for group in points.values() for _, *pair in group for value in pair])
    title = "Measured time against counted FLOPs, both over dense ViT-B-16's"
    first = rows[0]
    where = f"{first['device']}, threads: {first['threads']}" if first["threads"] else first["device"]
    parts = [
        svg.text(0.0, 16.0, title, font_size=15, font_weight=600),
        svg.text(0.0, 36.0, f"{where}; below the dashed line: less time than FLOPs promise", font_size=12),
    ]
    for index, ((pass_, dtype), group) in enumerate(points.items()):
        batch = groups[pass_, dtype][0]["batch_size"]
        name = f"{PASSES[pass_]}, {dtype}, batch {batch}"
        parts.append(panel(name, group, LEFT + index * (PANEL + GAP), scale))
    return charts.page(title, LEFT + len(points) * (PANEL + GAP), HEAD + PANEL + FOOT, parts)


def main(argv: list[str] | None = None) -> int:
    return charts.main(__doc__, choose, f"of clip_throughput.py with a {BASELINE} in every pass and type", chart, argv)


if __name__ == "__main__":
    raise SystemExit(main())
