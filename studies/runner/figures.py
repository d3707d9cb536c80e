"""The figures of a study's results, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from clipup.inspection.figures import svg
from clipup.inspection.figures.charts import Series, line_chart

from .results import TESTS, Result, half_width

_WIDTH, _HEIGHT = 400, 330  # px, whose text is legible on a phone


def models(lines: Mapping[str, Sequence[Sequence[Result]]], title: str, splits: Sequence[str] = TESTS) -> str:
    """R@1 over the logarithm of the FLOPs of a pair in inference. A point is the mean over seeds, with its 95 %
    interval.

    Args:
        lines: the runs of each point of a line, in ascending FLOPs, by the line's name.
    """
    series = []
    for name, points in lines.items():
        x = [1000 * runs[0].cost["gflops_per_pair"] for runs in points]
        recalls = [[run.mean("R@1", splits) for run in runs] for runs in points]
        errors = [half_width(of_seeds) or 0.0 for of_seeds in recalls]
        series.append(Series(name, x, list(map(fmean, recalls)), points=True, errors=errors))
    ticks = [float(f"{x:.2g}") for x in series[0].x]
    chart = line_chart(
        series, title, "MFLOP of inference", "R@1", percent=True, log_ticks=ticks, width=_WIDTH, height=_HEIGHT
    )
    return svg.on_white(chart, _WIDTH, _HEIGHT)
