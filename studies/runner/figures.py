"""The figures of a study's results, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from clipup.inspection.figures import svg
from clipup.inspection.figures.charts import Series, line_chart
from clipup.inspection.figures.format import short

from . import results
from .results import Result
from .tables import Tables, label

_WIDTH, _HEIGHT = 640, 340
_DENSE = ("dense_continued", "dense_equal_flops")


def figures(tables: Tables) -> dict[str, str]:
    """As SVG: ``recall`` at the end over FLOPs, of the arms that have several lengths if any do; the training
    ``loss`` of their longest runs; and the ``similarity`` of the experts of every sparse group. Loss and similarity
    are those of each group's first seed.

    If there are several starts, these are of the longest, and ``starts`` are the leads of CLIP-UP by the steps of
    the start.
    """
    if len(tables.starts) < 2:
        return _over_training(tables)
    return _over_training(tables.of_start(tables.starts[-1])) | {"starts": _over_starts(tables)}


def _over_training(tables: Tables) -> dict[str, str]:
    lengths: dict[str, list[list[Result]]] = {}
    for group, runs in tables.groups:
        lengths.setdefault(group.arm, []).append(runs)
    several = {arm: groups for arm, groups in lengths.items() if len(groups) > 1} or lengths
    recall = [_over_flops(tables, arm, groups) for arm, groups in several.items()]
    longest = [groups[-1][0] for groups in several.values()]
    starts = {run.config["start"] for run in tables.results.values()}
    longest = [run for run in longest if run.name not in starts] or longest  # whose losses differ by little
    loss = [_over_steps(run, run.training, "contrastive") for run in longest]
    alike = [_over_steps(run, run.validations, "similarity") for _, (run, *_) in tables.groups if run.layers]
    figures = {
        "recall": (
            recall,
            "R@1 on styles and names at the end of a run",
            "PFLOP of training, start included",
            "R@1",
        ),
        "loss": (loss, "Contrastive loss in training", "step of the run", "nats"),
        "similarity": (alike, "Mean cosine between two experts of a layer", "step of the run", "cosine"),
    }
    return {name: _chart(*content, percent=name == "recall") for name, content in figures.items()}


def _over_starts(tables: Tables, arm: str = "clip_up") -> str:
    leads: dict[str, list[results.Lead]] = {}
    starts, seeds = tables.comparable_starts(arm, _DENSE)
    for steps in starts:
        pairs = tables.of_start(steps).shortest_pairs(arm)
        for other in _DENSE:
            of_seeds = [pair for pair in pairs[other] if pair[0].config["seed"] in seeds]
            leads.setdefault(other, []).append(results.lead(of_seeds))
    series = [
        Series(
            f"over {label(other)}",
            starts,
            [100 * lead.mean for lead in found],
            points=True,
            half_intervals=[None if lead.half_width is None else 100 * lead.half_width for lead in found],
        )
        for other, found in leads.items()
    ]
    title = f"Lead of {label(arm)} in R@1, styles and names, with 95 % intervals over seeds"
    return _chart(series, title, "steps of the start", "points", levels=[(0, "no lead")])


def _over_flops(tables: Tables, arm: str, groups: Sequence[Sequence[Result]]) -> Series:
    """The means over seeds, one point per length, with the start of the shortest runs as the first point."""
    starts = tables.starts_of(groups[0])
    runs = [*([starts] if starts else []), *groups]
    x = [results.total_gflops(of[0], tables.results) / 1e6 for of in runs]
    return Series(label(arm), x, [fmean(run.mean("R@1") for run in of) for of in runs], points=True)


def _chart(
    series: Sequence[Series],
    title: str,
    x: str,
    y: str,
    percent: bool = False,
    levels: Sequence[tuple[float, str]] = (),
) -> str:
    drawn = line_chart(series, title, x, y, percent=percent, levels=levels, width=_WIDTH, height=_HEIGHT)
    return svg.on_white(drawn, _WIDTH, _HEIGHT)


def _over_steps(run: Result, lines: Sequence[dict], field: str) -> Series:
    legend = f"{label(run.config['arm'])}, {short(run.config['steps'])}"
    return Series(legend, [line["step"] for line in lines], [line[field] for line in lines])
