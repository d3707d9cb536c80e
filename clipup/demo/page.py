"""The demonstration's report: one self-contained HTML page without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..inspection.figures import charts, images, svg, tables
from ..inspection.figures.charts import Series
from ..inspection.figures.format import chance
from ..inspection.figures.palette import ARMS as COLORS
from ..inspection.figures.palette import DASHES
from ..inspection.figures.svg import Figure
from ..inspection.page import layer_title, template
from . import comparison_tables
from .verdict import WAYS, verdict

_CURVES = {"dense_continued": "Dense continued", "clip_up": "CLIP-UP"}
_START_OF = {"dense_continued": "dense", "clip_up": "upcycled_step0"}
_MOST_POINTS = 300

Records = Sequence[Mapping[str, Any]]


def render_demo(
    report: Mapping[str, Any],
    curves: Mapping[str, Records],
    evaluations: Mapping[str, Records],
    routing: Sequence[Mapping[str, Any]],
    retrievals: Mapping[str, Sequence[Mapping[str, Any]]],
    dataset: Mapping[str, Any],
) -> str:
    """The page as a string, to be written as UTF-8, under 3 MB and with all text escaped.

    Args:
        report: the content of ``report.json``.
        curves: {arm: [{"step", "contrastive"}]} for ``dense_continued`` and ``clip_up``. ``clip_up`` also has
            "layers": {layer: {"load": [E]}}, shares of 1.
        evaluations: {arm: [{"step", "text_to_image_R@1", "image_to_text_R@1"}]}, fractions of 1.
        routing: [{"image": PIL image, "caption", "layers": {layer: int [grid_h, grid_w]}}], experts from 0.
        retrievals: {"best", "worst"}: [{"caption", "target", "rank" from 1, "retrieved": [PIL image]}], CLIP-UP's.
        dataset: the content of the data set's ``dataset.json``.
    """
    window = min(51, min(map(len, curves.values())) // 20 | 1)  # steps to average over: a twentieth of the shortest run
    page = template("demo.html.j2", "clipup.demo").render(
        report=report,
        verdict=verdict(report),
        heading=comparison_tables.heading(report),
        step0=comparison_tables.step0(report),
        comparison=tables.as_html(comparison_tables.overview(report), "Recall and cost of every model"),
        splits=tables.as_html(comparison_tables.splits(report), "R@1 on the other splits"),
        curves=_charts(report, curves, evaluations, window),
        window=window,
        loads=_load_charts(curves["clip_up"]),
        legend=images.expert_legend(report["moe_cfg"]["num_experts"]),
        routing=[_routing(example) for example in routing],
        retrievals={kind: [_retrieval(example) for example in examples] for kind, examples in retrievals.items()},
        data=dataset,
    )
    return svg.clean(page)


def _charts(
    report: Mapping[str, Any], curves: Mapping[str, Records], evaluations: Mapping[str, Records], window: int
) -> list[Figure]:
    ahead = [
        {"step": sparse["step"], "contrastive": sparse["contrastive"] - dense["contrastive"]}
        for sparse, dense in zip(curves["clip_up"], curves["dense_continued"], strict=True)
    ]
    drawn = [
        charts.line_chart([_loss(arm, curves[arm], window) for arm in _CURVES], "Contrastive loss", "step", "nats"),
        charts.line_chart(
            [_loss("clip_up", ahead, window)],
            "Contrastive loss, CLIP-UP − dense continued",
            "step",
            "nats",
            levels=[(0, "")],
        ),
    ]
    level = report["chance_R@1"]
    for way, name in WAYS:
        series = [_recall(report, arm, evaluations[arm], f"{way}_R@1") for arm in _CURVES]
        highest = max([level, *(float(y) for line in series for y in line.y)])
        drawn.append(
            charts.line_chart(
                series,
                f"R@1 {name}, held-out renderings",
                "step",
                "R@1",
                percent=True,
                y_range=(-0.03 * highest, highest),
                levels=[(level, f"chance {chance(level)}%")],
            )
        )
    return drawn


def _loss(arm: str, records: Records, window: int) -> Series:
    smoothed = charts.smooth([record["contrastive"] for record in records], window)
    shown = np.unique(np.linspace(0, len(records) - 1, min(len(records), _MOST_POINTS)).round().astype(int)).tolist()
    x, y = [records[index]["step"] for index in shown], [smoothed[index] for index in shown]
    return Series(_CURVES[arm], x, y, COLORS[arm], DASHES[arm])


def _recall(report: Mapping[str, Any], arm: str, records: Records, key: str) -> Series:
    """An arm's R@1 over steps, from that of its initial model."""
    evaluations = [{"step": 0, key: report[_START_OF[arm]][key]}, *records]
    x, y = [record["step"] for record in evaluations], [record[key] for record in evaluations]
    return Series(_CURVES[arm], x, y, COLORS[arm], DASHES[arm], points=True)


def _load_charts(history: Records) -> list[Figure]:
    layers = {layer: [record["layers"][layer]["load"] for record in history] for layer in history[0]["layers"]}
    largest = max(max(share, 1.5 / len(row)) for rows in layers.values() for row in rows for share in row)
    steps = [record["step"] for record in history]
    return [charts.load_chart(steps, rows, layer_title(layer), y_max=largest) for layer, rows in layers.items()]


def _routing(example: Mapping[str, Any]) -> dict[str, Any]:
    caption, image = svg.shorten(example["caption"], images.MOST_CAPTION_CHARACTERS), example["image"]
    maps = [
        (layer_title(name).removeprefix("Image tower, "), images.routing_map(image, grid, layer_title(name)))
        for name, grid in example["layers"].items()
    ]
    return {"caption": caption, "maps": [("picture", images.picture(image, caption, 144)), *maps]}


def _retrieval(example: Mapping[str, Any]) -> Figure:
    return images.retrieval_row(
        example["caption"], example["target"], example["retrieved"], example["rank"], _CURVES["clip_up"]
    )
