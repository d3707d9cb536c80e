"""``clipup demo``: trains a dense CLIP, upcycles it, continues training both, and writes a report."""

from __future__ import annotations

from pathlib import Path

from ..demo.options import DemoOptions
from .flags import NoEffect, parse
from .outputs import check_directory

RULES = [NoEffect(("lr",), lambda options: options.steps_before == 0, "without --dense-steps; see --continue-lr")]


def main(argv: list[str]) -> int:
    options = parse(DemoOptions, argv, "clipup demo", RULES)
    check_directory("out", options.out)
    from ..demo.comparison_tables import comparison_table
    from ..demo.run import run

    report = run(options)
    print(f"\n{comparison_table(report)}\n\nreport: {Path(options.out) / 'report.html'}")
    return 0
