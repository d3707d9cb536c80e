"""``clipup demo``: data, a dense CLIP, upcycling, both continued, and a report."""

from __future__ import annotations

from pathlib import Path

import tyro

from ..demo import DemoOptions, run
from ..report import comparison_table


def main(argv: list[str]) -> int:
    options = tyro.cli(DemoOptions, args=argv, prog="clipup demo")
    report = run(options)
    print(f"\n{comparison_table(report)}\n\nthe report: {Path(options.out) / 'report.html'}")
    return 0
