"""A chart of ratio_to_dense_k from the CSV files of moe_forward.py and moe_training.py.

    python benchmarks/plot.py benchmarks/results/moe_*_cpu.csv --out benchmarks/results/moe_cpu.svg

A line for every case, a panel for every dtype, a mark for every implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import charts
from charts import LogScale, Row

from clipup.inspection.figures import svg
from clipup.inspection.figures.palette import EXPERTS

IMPLEMENTATIONS = (
    "clipup_prepared", "clipup", "dense_k_prepared", "hf_grouped_mm", "grouped_mm", "loop_unbind", "loop",
    "dense_k_engine", "dense_1", "loop_sorted", "scattermoe", "megablocks", "sonicmoe",
)  # fmt: skip
OURS = {"clipup_prepared": "#e0660a", "clipup": "#f2b27a"}
OTHERS = ("#7a6ff0", *EXPERTS, "#49505a", "#949da8")
COLORS = OURS | dict(zip(IMPLEMENTATIONS[len(OURS) :], OTHERS, strict=True))
PASSES = {"fwd": "forward", "fwd_bwd": "forward and backward"}
LABELS, PANEL, GAP, LINE, HEAD = 260, 300, 24, 22, 44  # px: widths of labels and panels, heights of lines and headings
TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


def choose(rows: Sequence[Row]) -> list[Row]:
    """The rows of layers, without the baseline's own."""
    return [row for row in rows if "ratio_to_dense_k" in row and row["impl"] in COLORS]


def section_of(row: Row) -> str:
    threads = f", threads: {row['threads']}" if row["threads"] else ""
    return f"{PASSES[row['pass']]} — {row['device']}{threads}"


def case_of(row: Row) -> str:
    skewed = ", skewed" if row.get("routing") == "skewed" else ""
    return f"T={row['tokens']}, {row['d_model']}/{row['d_hidden']}, E={row['experts']}, K={row['top_k']}{skewed}"


def scale_of(ratios: Sequence[float]) -> LogScale:
    """An axis that holds all ratios and 1."""
    return LogScale(min(0.9, *ratios) / 1.08, max(1.1, *ratios) * 1.08, PANEL, TICKS)


def legend(y: float, impls: Sequence[str]) -> str:
    parts, x = [], 0.0
    for impl in impls:
        parts.append(mark(x + 6, y - 4, impl, impl))
        parts.append(svg.text(x + 16, y, impl, font_size=12))
        x += 34 + 7.3 * len(impl)
    return "".join(parts)


def mark(x: float, y: float, impl: str, tooltip: str) -> str:
    """A dot; this project's is a larger diamond, dense ones are rings."""
    if impl in OURS:
        path = f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"
        return svg.element("path", svg.title(tooltip), d=path, fill=COLORS[impl])
    ring = {"fill": "none", "stroke": COLORS[impl], "stroke_width": 2} if impl.startswith("dense") else {}
    return svg.element("circle", svg.title(tooltip), **({"cx": x, "cy": y, "r": 4.5, "fill": COLORS[impl]} | ring))


def grid(left: float, top: float, bottom: float, scale: LogScale) -> str:
    parts = []
    for tick in scale.ticks:
        x = left + scale(tick)
        strong = {"stroke_opacity": "0.8", "stroke_width": 1.5} if tick == 1 else {"stroke_opacity": "0.15"}
        parts.append(svg.line(x, top, x, bottom, **strong))
        parts.append(svg.text(x, bottom + 14, f"{tick:g}", font_size=11, text_anchor="middle"))
    return "".join(parts)


def section(title: str, rows: Sequence[Row], dtypes: Sequence[str], top: float, scale: LogScale) -> tuple[str, float]:
    """A heading and a line for every case; also where the next section begins."""
    cases = list(dict.fromkeys(map(case_of, rows)))
    first = top + HEAD
    bottom = first + LINE * len(cases)
    parts = [svg.text(0.0, top + 16, title, font_size=13, font_weight=600)]
    parts += [svg.text(0.0, first + LINE * (i + 0.5) + 4, case, font_size=12) for i, case in enumerate(cases)]
    lefts = {dtype: LABELS + i * (PANEL + GAP) for i, dtype in enumerate(dtypes)}
    for dtype, left in lefts.items():
        parts.append(svg.text(left + PANEL / 2, top + 36, dtype, font_size=12, text_anchor="middle"))
        parts.append(grid(left, first, bottom, scale))
    for row in sorted(rows, key=lambda row: -IMPLEMENTATIONS.index(row["impl"])):  # clipup on top
        ratio = float(row["ratio_to_dense_k"])
        y = first + LINE * (cases.index(case_of(row)) + 0.5)
        parts.append(mark(lefts[row["dtype"]] + scale(ratio), y, row["impl"], f"{row['impl']}: {ratio:.2f}"))
    return "".join(parts), bottom + 28


def chart(rows: Sequence[Row]) -> str:
    """A section for every pass, device and number of threads."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    scale = scale_of([float(row["ratio_to_dense_k"]) for row in rows])
    found = {row["impl"] for row in rows}
    title = "Time over that of a dense MLP on K·T rows; left of 1 is faster"
    parts = [
        svg.text(0.0, 16.0, title, font_size=15, font_weight=600),
        legend(40, [impl for impl in IMPLEMENTATIONS if impl in found]),
    ]
    y = 58.0
    for name in dict.fromkeys(map(section_of, rows)):
        drawn, y = section(name, [row for row in rows if section_of(row) == name], dtypes, y, scale)
        parts.append(drawn)
    return charts.page(title, LABELS + len(dtypes) * (PANEL + GAP), y, parts)


def main(argv: list[str] | None = None) -> int:
    return charts.main(__doc__, choose, "with a ratio_to_dense_k", chart, argv)


if __name__ == "__main__":
    raise SystemExit(main())
