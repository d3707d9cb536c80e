"""The figures of a study's results, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from clipup.inspection.figures import svg
from clipup.inspection.figures.charts import Series, line_chart

from .results import Result, half_width
from .tables import Tables, label

_WIDTH, _HEIGHT = 400, 330  # px, whose text is legible on a phone


def recall(tables: Tables) -> str:
    """R@1 at the end of the runs over their FLOPs, of the arms that have several lengths if any do."""
    lengths: dict[str, list[list[Result]]] = {}
    for group, runs in tables.groups:
        lengths.setdefault(group.arm, []).append(runs)
    several = {arm: groups for arm, groups in lengths.items() if len(groups) > 1} or lengths
    series = []
    for arm, groups in several.items():  # the first point is the start of the shortest runs
        groups = [starts, *groups] if (starts := tables.starts_of(groups[0])) else groups
        x = [tables.pflop(runs[0]) for runs in groups]
        series.append(Series(label(arm), x, [fmean(run.mean("R@1") for run in runs) for runs in groups], points=True))
    return _drawn(series, "R@1 on styles and names at the end of a run", "PFLOP of training, start included")


def models(studies: Sequence[Tables], arms: Mapping[str, str]) -> str:
    """R@1 over the FLOPs of a pair in inference, as a percentage of those of the last study's first arm: one line per
    arm, one point per study (a width) that has the arm, each at its smallest budget: the mean over its seeds and the
    95 % interval of that.

    Args:
        arms: the name of each line, by arm.
    """
    series, whole = [], studies[-1].shortest(next(iter(arms)))[0].cost["gflops_per_pair"]
    for arm, name in arms.items():
        groups = [runs for of in studies if (runs := of.shortest(arm))]
        groups.sort(key=lambda runs: runs[0].cost["gflops_per_pair"])
        x = [100 * runs[0].cost["gflops_per_pair"] / whole for runs in groups]
        recalls = [[run.mean("R@1") for run in runs] for runs in groups]
        errors = [half_width(of_seeds) or 0.0 for of_seeds in recalls]
        series.append(Series(name, x, list(map(fmean, recalls)), points=True, errors=errors))
    return _drawn(series, "How often the right icon comes first", "FLOPs of inference, % of the wider dense model")


def _drawn(series: Sequence[Series], title: str, x: str) -> str:
    chart = line_chart(series, title, x, "R@1", percent=True, width=_WIDTH, height=_HEIGHT)
    return svg.on_white(chart, _WIDTH, _HEIGHT)
