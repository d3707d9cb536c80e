"""Charts of benchmark results: the rows of CSV files, matplotlib's style and SVG, and the program that writes it."""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from clipup.atomic_files import replace_files
from clipup.inspection.figures import svg

Row = dict[str, str]

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clipup",  # the same chart has the same bytes
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "text.color": "#1c2128",
    "axes.labelcolor": "#1c2128",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": "#dfe2e6",
    "legend.frameon": False,
    "lines.markersize": 8,
}
_POINTS = 72  # in an inch: a chart's pixels are matplotlib's points
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def read(paths: Sequence[str]) -> list[Row]:
    """The rows of all files."""
    return [row for path in paths for row in csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines())]


def groups(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows of every key, in their order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def draw(width: int, height: int, title: str, paint: Callable[[Figure], None]) -> str:
    """The SVG of a figure that ``paint`` draws on, ``width`` x ``height`` pixels on white.

    ``title`` is the name that screen readers give it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / _POINTS, height / _POINTS), layout="constrained")
        paint(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=_NO_METADATA)
    drawn = re.search(r"<svg[^>]*>\n(.*)</svg>", written.getvalue(), re.DOTALL)[1]
    drawn = "\n".join(line.strip() for line in drawn.splitlines())
    return svg.picture(width, height, title, "\n", drawn, **{"xmlns:xlink": "http://www.w3.org/1999/xlink"}) + "\n"


def log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Makes an axis logarithmic, with these ticks and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def main(
    description: str, choose: Callable[[list[Row]], list[Row]], wanted: str, chart: Callable[[list[Row]], str],
    argv: list[str] | None,
) -> int:  # fmt: skip
    """The program: writes the chart of the rows that ``choose`` selects; it is an error if there are none."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", help="files written with --csv")
    parser.add_argument("--out", required=True, help="SVG file to write")
    args = parser.parse_args(argv)
    rows = choose(read(args.csv))
    if not rows:
        parser.error(f"no rows {wanted} in {', '.join(args.csv)}")
    out, drawn = Path(args.out), chart(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_files({out: lambda path: path.write_text(drawn, encoding="utf-8")})
    return 0
