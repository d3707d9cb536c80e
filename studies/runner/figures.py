"""The figures of a study's results, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from clipup.inspection.figures import svg
from clipup.inspection.figures.charts import Series, line_chart

from .results import TESTS, Result, half_width

_WIDTH, _HEIGHT = 400, 330  # px, whose text is legible on a phone


def models(
    lines: Mapping[str, Sequence[Sequence[Result]]],
    title: str,
    splits: Sequence[str] = TESTS,
    above: Sequence[str] = (),
) -> str:
    """R@1 over the logarithm of the FLOPs of a pair in inference. A point is the mean over seeds, with its 95 %
    interval; its value stands beside it.

    Args:
        lines: the runs of each point of a line, in ascending FLOPs, by the line's name.
        above: names of lines whose values stand above them; dense ones among them are dashed.
    """
    series = []
    for name, points in lines.items():
        recalls = [[run.mean("R@1", splits) for run in runs] for runs in points]
        means = list(map(fmean, recalls))
        series.append(
            Series(
                name,
                [1000 * runs[0].cost["gflops_per_pair"] for runs in points],
                means,
                dash="6 3" if name in above and "dense" in name else None,
                points=True,
                errors=[half_width(of_seeds) or 0.0 for of_seeds in recalls],
                notes=[f"{100 * mean:.1f}" for mean in means],
                above=name in above,
            )
        )
    flops = [float(x) for line in series for x in line.x]
    ticks = [2.0**power for power in range(-4, 12) if 0.8 * min(flops) <= 2.0**power <= 1.2 * max(flops)]
    chart = line_chart(
        series, title, "MFLOP of inference", "R@1", percent=True, log_ticks=ticks, width=_WIDTH, height=_HEIGHT
    )
    return svg.for_file(chart, _WIDTH, _HEIGHT)
