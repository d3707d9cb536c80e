"""``clipup demo``: upcycles a dense CLIP, continues training both, and writes a report."""

from __future__ import annotations

from pathlib import Path

from ..demo.options import DemoOptions
from .flags import parse
from .outputs import check_directory


def main(argv: list[str]) -> int:
    options = parse(DemoOptions, argv, "clipup demo")
    check_directory("out", options.out)
    from ..demo.comparison_tables import comparison_table
    from ..demo.run import run

    report = run(options)
    print(f"\n{comparison_table(report)}\n\nreport: {Path(options.out) / 'report.html'}")
    return 0
