"""A chart of ratio_to_dense_k from the CSV files of moe_forward.py and moe_training.py.

    python benchmarks/plot.py benchmarks/results/moe_{forward,training}_cpu.csv --out benchmarks/results/moe_cpu.svg

One row for each case, one panel below the other for each dtype, one marker for each implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import charts
from charts import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from peers import PEERS

OURS = {"clipup_int8": "#8c3a00", "clipup_prepared": "#e0660a", "clipup": "#f2b27a"}
OTHERS = (
    "#5599aa", "#bbaaff", "#2266aa", "#7a6ff0", "#ff9911", "#aa7700", "#9966ff", "#49505a", "#55cc99", "#8f3f71",
    "#3b6ea8", "#bb2266", "#949da8", "#b3a000", "#1f5c57",
)  # fmt: skip
"""In the order of ``PEERS``, so that a peer added at its end changes no other color."""
COLORS = OURS | dict(zip([name for name in PEERS if name not in ("dense_k", *OURS)], OTHERS * 2, strict=False))
"""Of all but the baseline, the line at 1."""
PASSES = {"fwd": "forward", "fwd_bwd": "forward and backward"}
TITLE = "Time over that of a dense MLP on K·T rows; left of 1 is faster"
LABELS, PANEL, LINE, HEAD, TICK_LABELS = 215, 320, 22, 130, 60  # pt: widths; heights
BOLD = {"weight": "bold", "size": 12}
LEGEND_COLUMNS = 3
TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


def section_of(row: Row) -> str:
    threads = f", threads: {row['threads']}" if row["threads"] else ""
    return f"{PASSES[row['pass']]} — {row['device']}{threads}"


def case_of(row: Row) -> str:
    skewed = ", skewed" if row.get("routing") == "skewed" else ""
    return f"T={row['tokens']}, {row['d_model']}/{row['d_hidden']}, E={row['experts']}, K={row['top_k']}{skewed}"


def marker(impl: str) -> dict[str, str | float]:
    """A dot; this project's is a larger diamond, dense ones are rings."""
    color = COLORS[impl]
    if impl in OURS:
        return {"marker": "D", "color": color, "markersize": 9}
    return {"marker": "o", "color": color, "markerfacecolor": "none" if impl.startswith("dense") else color}


def panel(axes: Axes, rows: Sequence[Row], cases: Sequence[str], name: str, limits: tuple[float, float]) -> None:
    """One dtype of one section; ``name`` makes the ids of its markers unique, ``limits`` are the ends of its axis."""
    charts.log_ticks(axes.xaxis, TICKS)
    axes.grid(axis="x")
    axes.axvline(1, color=charts.INK, linewidth=1.2)
    axes.set_yticks(range(len(cases)), cases)
    axes.set(xlim=limits, ylim=(len(cases) - 0.5, -0.5))
    axes.spines[["left", "bottom"]].set_visible(False)
    for impl in reversed(COLORS):  # clipup on top
        of_impl = [row for row in rows if row["impl"] == impl]
        ratios = [float(row["ratio_to_dense_k"]) for row in of_impl]
        places = [cases.index(case_of(row)) for row in of_impl]
        axes.plot(ratios, places, linestyle="none", gid=f"{impl}:{name}", **marker(impl))


def chart(rows: Sequence[Row]) -> Figure:
    """A section for every pass, device and number of threads."""
    rows = [row for row in rows if row["impl"] in COLORS]  # without those of the baseline
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    titles = dict.fromkeys(map(section_of, rows))
    sections = {title: [row for row in rows if section_of(row) == title] for title in titles}
    cases = {title: list(dict.fromkeys(map(case_of, of))) for title, of in sections.items()}
    impls = [impl for impl in COLORS if any(row["impl"] == impl for row in rows)]
    ratios = [float(row["ratio_to_dense_k"]) for row in rows]
    limits = min(0.9, *ratios) / 1.08, max(1.1, *ratios) * 1.08
    heights = [len(dtypes) * (TICK_LABELS + LINE * len(names)) for names in cases.values()]
    figure = charts.figure(LABELS + PANEL, HEAD + sum(heights))
    keys = [Line2D([], [], linestyle="none", label=impl, **marker(impl)) for impl in impls]
    above, *parts = figure.subfigures(1 + len(sections), 1, height_ratios=[HEAD, *heights])
    above.legend(handles=keys, loc="center left", ncols=LEGEND_COLUMNS, title=TITLE, title_fontproperties=BOLD)
    for part, (title, of) in zip(parts, sections.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", weight="bold")
        panels = part.subplots(len(dtypes), 1, squeeze=False)[:, 0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            panel(axes, [row for row in of if row["dtype"] == dtype], cases[title], f"{title}, {dtype}", limits)
            axes.set_title(dtype)
    return figure


main = partial(charts.main, __doc__, chart)

if __name__ == "__main__":
    raise SystemExit(main())
