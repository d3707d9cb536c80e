"""What the charts share: rows of CSV files, a logarithmic axis, the page, and the program that writes it."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from clipup.inspection.figures import svg

Row = dict[str, str]
MARGIN = 16  # px


def read(paths: Sequence[str]) -> list[Row]:
    """The rows of all files."""
    return [row for path in paths for row in csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines())]


class LogScale:
    """A logarithmic axis from ``low`` to ``high``, ``length`` pixels long."""

    def __init__(self, low: float, high: float, length: float, ticks: Sequence[float]) -> None:
        self.low, self.range, self.length = math.log(low), math.log(high / low), length
        self.ticks = [tick for tick in ticks if low <= tick <= high]

    def __call__(self, value: float) -> float:
        """Pixels from the axis' lower end."""
        return (math.log(value) - self.low) / self.range * self.length


def page(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """The whole figure as SVG, on white so that it reads on any page."""
    whole = width + 2 * MARGIN, height + 2 * MARGIN
    paper = svg.element("rect", width=whole[0], height=whole[1], fill="#fff")
    content = svg.element("g", *parts, transform=f"translate({MARGIN} {MARGIN})", font_family="sans-serif")
    return svg.picture(*whole, title, paper, content, color="#1c2128")


def main(
    description: str, choose: Callable[[list[Row]], list[Row]], wanted: str, chart: Callable[[list[Row]], str],
    argv: list[str] | None,
) -> int:  # fmt: skip
    """The program: writes the chart of the rows that ``choose`` takes from the files, of which there must be some."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", help="files written with --csv")
    parser.add_argument("--out", required=True, help="SVG file to write")
    args = parser.parse_args(argv)
    rows = choose(read(args.csv))
    if not rows:
        parser.error(f"no rows {wanted} in {', '.join(args.csv)}")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(chart(rows) + "\n", encoding="utf-8")
    return 0
