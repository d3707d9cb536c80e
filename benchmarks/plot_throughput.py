"""A chart of measured time against counted FLOPs, from a CSV file of clip_throughput.py.

    python benchmarks/plot_throughput.py benchmarks/results/clip_throughput_cpu.csv --out clip_throughput_cpu.svg

One panel below the other for each pass and dtype; both axes are relative to dense B/16. On the diagonal, time grows as
the FLOPs do; above it, a model takes longer than its FLOPs predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import charts
from charts import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, PANEL, HEAD = 450, 320, 75  # pt
LABEL_GAP = 13  # pt between neighbouring labels
TICKS = (0.25, 0.5, 1, 2, 4, 8)
COLORS = {"accelerated": "#2f81f7", "CLIP-UP": "#e0660a", "": "#7d8590"}
"""By a part of a model's name, the first that it has."""
PASSES = {"fwd": "inference", "fwd_bwd": "training step"}
BASELINE = "ViT-B-16"
TITLE = "Measured time against counted FLOPs, relative to dense B-16"

Point = tuple[str, float, float]
"""Model, FLOPs and time, both over the baseline's."""


def relative(rows: Sequence[Row]) -> list[Point]:
    base = next(float(row["gflops_per_pair"]) for row in rows if row["model"] == BASELINE)
    return [(row["model"], float(row["gflops_per_pair"]) / base, 1 / float(row["speed_to_b16"])) for row in rows]


def panel(axes: Axes, points: Sequence[Point], limits: tuple[float, float]) -> None:
    """One panel; dots are labelled on the side that is away from the diagonal: above it left, below it right."""
    for axis in (axes.xaxis, axes.yaxis):
        charts.log_ticks(axis, TICKS)
    axes.set(
        xlim=(limits[0], 4 * limits[1]),
        ylim=limits,
        xlabel="FLOPs over those of dense B-16",
        ylabel="time over that of dense B-16",
    )
    axes.grid()
    axes.plot(limits, limits, color="#7d8590", linewidth=1, dashes=(4, 4))
    low, high = map(math.log, limits)
    for left in (True, False):
        of_side = sorted((point for point in points if (point[2] >= point[1]) == left), key=lambda point: point[2])
        heights = [PANEL * (math.log(time) - low) / (high - low) for _, _, time in of_side]
        shifts = [place - height for place, height in zip(spread(heights, LABEL_GAP, 0, PANEL), heights, strict=True)]
        for (model, flops, time), shift in zip(of_side, shifts, strict=True):
            ink = next(color for part, color in COLORS.items() if part in model)
            axes.plot(flops, time, "o", color=ink, gid=f"{axes.get_title(loc='left')}: {model}")
            axes.annotate(
                f"{model.removeprefix('ViT-')} {time:.2f}",
                (flops, time),
                (-9 if left else 9, shift + (4 if left else -4)),
                textcoords="offset points",
                color=ink,
                ha="right" if left else "left",
                va="center",
            )


def spread(sorted_places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The nearest places between low and high with at least ``gap`` between neighbours, for labels.

    Least squares under ``place[i + 1] - place[i] >= gap``: isotonic regression of ``place[i] - i * gap`` by pooling.
    A gap that leaves no room for all of them is reduced.
    """
    gap = min(gap, (high - low) / max(1, len(sorted_places)))
    pools: list[list[float]] = []
    for index, place in enumerate(sorted_places):
        pools.append([place - index * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            later = pools.pop()
            pools[-1] += later
    last = high - (len(sorted_places) - 1) * gap
    bases = [min(max(fmean(pool), low), last) for pool in pools for _ in pool]
    return [base + index * gap for index, base in enumerate(bases)]


def chart(rows: Sequence[Row]) -> Figure:
    """The panels, one below the other."""
    panels_of = dict.fromkeys((row["pass"], row["dtype"]) for row in rows)
    groups = {key: [row for row in rows if (row["pass"], row["dtype"]) == key] for key in panels_of}
    points = {key: relative(group) for key, group in groups.items()}
    values = [1.0, *(value for group in points.values() for _, *pair in group for value in pair)]
    limits = min(values) / 2, max(values) * 1.4  # room for labels
    first = rows[0]
    where = f"{first['device']}, threads: {first['threads']}" if first["threads"] else first["device"]
    figure = charts.figure(WIDTH, HEAD + (PANEL + 60) * len(points))
    note = f"{where}\nBelow the dashed line: less time than the FLOPs predict"
    figure.suptitle(f"{TITLE}\n{note}", x=0.01, ha="left")
    panels = figure.subplots(len(points), 1, squeeze=False)[:, 0]
    for axes, ((pass_, dtype), group) in zip(panels, points.items(), strict=True):
        batch = groups[pass_, dtype][0]["batch_size"]
        axes.set_title(f"{PASSES[pass_]}, {dtype}, batch {batch}", loc="left", weight="bold")
        panel(axes, group, limits)
    return figure


main = partial(charts.main, __doc__, chart)

if __name__ == "__main__":
    raise SystemExit(main())
