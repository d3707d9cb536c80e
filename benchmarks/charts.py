"""Charts of benchmark results: the rows of CSV files, matplotlib's style and SVG, and the program that writes it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from harness import parser
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from clipup.inspection.figures import svg

Row = dict[str, str]

INK = "#1c2128"  # becomes the text color of a light or a dark page
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clipup",  # the same chart has the same names of parts
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": INK + "22",
    "legend.frameon": False,
    "lines.markersize": 8,
}


def figure(width: int, height: int) -> Figure:
    """An empty figure of ``width`` x ``height`` points, 72 in an inch."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Makes an axis logarithmic, with these ticks and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{value:g}" for value in ticks])
    axis.set_ticks([], minor=True)


def main(description: str, chart: Callable[[list[Row]], Figure], argv: list[str] | None = None) -> int:
    """The program: writes the chart of the rows of all files as SVG, the same chart for the same rows."""
    options = {
        "csv": {"nargs": "+", "type": Path, "help": "files written with --csv"},
        "--out": {"required": True, "type": Path, "help": "SVG file to write"},
    }
    args = parser(description, options).parse_args(argv)
    rows = [row for path in args.csv for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.StringIO()
    with matplotlib.rc_context(STYLE):
        chart(rows).savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    args.out.write_text(
        drawn.getvalue().replace(INK, "currentColor").replace("<defs>", f"{svg.INK}<defs>", 1), encoding="utf-8"
    )
    return 0
