"""The demonstration's report: one self-contained HTML page without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ..evaluate.retrieval import RECALL_AT
from ..inspection.figures import charts, images, svg, tables
from ..inspection.figures.charts import Series
from ..inspection.figures.format import MISSING, chance, count, dig, number, percent_tick
from ..inspection.figures.palette import ARMS as COLORS
from ..inspection.figures.palette import DASHES
from ..inspection.page import layer_title, template
from . import comparison_tables
from .verdict import WAYS, verdict

MOST_ROUTING_EXAMPLES = 12
MOST_RETRIEVALS = 10
"""Limits of examples per page, which keep it under 3 MB."""

_CURVES = {"dense": "Dense", "dense_continued": "Dense continued", "clip_up": "CLIP-UP"}
_KNOWN = frozenset({"data", "chance_R@1", "commands", *(arm for arm, _ in comparison_tables.ARMS)})
_KNOWN_OF_ARM = frozenset(
    {"steps", "seconds", "params", "active_params", "gflops_per_pair", "max_feature_difference"}
    | {f"{way}_R@{k}" for way, _ in WAYS for k in RECALL_AT}
    | {"splits", "chance_R@1", "gallery", "captions"}
)
_KNOWN_OF_DATA = frozenset({"name", "train_pairs", "test_images", "test_captions"})
_LONGEST_VALUE = 400
_MOST_POINTS = 300
_MOST_EXTRAS = 60

Records = Sequence[Mapping[str, Any]]


def render_demo(
    report: Mapping[str, Any],
    curves: Mapping[str, Records],
    evaluations: Mapping[str, Records],
    loads: Mapping[str, Mapping[str, Any]],
    routing: Sequence[Mapping[str, Any]],
    retrievals: Mapping[str, Sequence[Mapping[str, Any]]],
    data_notes: Mapping[str, Any],
) -> str:
    """The page as a string, to be written as UTF-8, under 3 MB and with all text escaped.

    Args:
        report: the content of ``report.json``. Unknown keys are listed in the footer; ``commands`` (strings) are shown
            as how to reproduce it.
        curves: {arm: [{"step", "loss", "contrastive"?}]} for ``dense``, ``dense_continued``, ``clip_up``; steps are
            counted from the dense model's first, and continued training starts where it ended.
        evaluations: {arm: [{"step", "text_to_image_R@1", "image_to_text_R@1"}]}, fractions of 1, steps as above.
        loads: {layer: {"steps": [N], "load": [N][E]}}, shares of 1.
        routing: [{"image": PIL image, "caption", "layers": {layer: int [grid_h, grid_w]}}], experts from 0;
            the first 12 are shown.
        retrievals: {"best", "worst"}: [{"caption", "target", "rank" from 1, "retrieved": [PIL image], "model"}];
            the first 10 of each are shown.
        data_notes: {"splits": {name: {"images", "captions", "rule"}}, "licences": [{"name", "licence", "artist",
            "url"?}], "left_out"?: text}.
    """
    page = template("demo.html.j2", "clipup.demo").render(
        done=_what_was_done(report),
        verdict=verdict(report),
        heading=comparison_tables.heading(report),
        step0=comparison_tables.step0(report),
        comparison=Markup(tables.as_html(comparison_tables.overview(report), "Recall and cost of every model")),
        splits=_markup_or_none(comparison_tables.splits(report)),
        curves=[Markup(chart) for chart in _curves(report, curves, evaluations)],
        window=_window(curves),
        loads=[Markup(chart) for chart in _load_charts(loads)],
        legend=Markup(images.expert_legend(_experts(loads, routing))),
        routing=[_routing(example) for example in routing[:MOST_ROUTING_EXAMPLES]],
        retrievals={kind: _retrievals(retrievals.get(kind, ())) for kind in ("best", "worst")},
        data=_data(report, data_notes),
        commands=_commands(report),
        extras=_extras(report),
    )
    return svg.clean(page)


def _what_was_done(report: Mapping[str, Any]) -> str:
    steps, more, other = (count(dig(report, arm, "steps")) for arm in ("dense", "clip_up", "dense_continued"))
    continued = f"for {more} steps each" if more == other else f"for {more} and {other} steps"
    name = dig(report, "data", "name")
    called = f" of the data set “{svg.shorten(name, 60)}”" if name else ""
    pairs = f"{count(dig(report, 'data', 'train_pairs'))} training pairs{called}"
    if _came_trained(report):
        return (
            "A dense CLIP trained on other images was turned into a sparse Mixture-of-Experts CLIP "
            f"(CLIP-UP), and both the sparse and the dense model were trained on {pairs}, {continued}."
        )
    return (
        f"A dense CLIP was trained for {steps} steps on {pairs}, then turned into a sparse Mixture-of-Experts CLIP "
        f"(CLIP-UP), and both the sparse and the dense model continued training {continued}."
    )


def _came_trained(report: Mapping[str, Any]) -> bool:
    """Whether the dense model was trained before the demonstration."""
    return number(dig(report, "dense", "steps")) == 0


def _curves(report: Mapping[str, Any], curves: Mapping[str, Records], evaluations: Mapping[str, Records]) -> list[str]:
    window = _window(curves)
    before = _last_step(curves.get("dense", ()))
    arms = [arm for arm in _CURVES if arm != "dense" or not _came_trained(report)]
    losses = {arm: _loss(arm, curves.get(arm, ()), window) for arm in arms}
    marks = () if before is None else ((before, "upcycled"),)
    continued = [losses[arm] for arm in ("dense_continued", "clip_up")]
    drawn = [charts.line_chart(continued, "Contrastive loss, continued training", "step", "nats")]
    if "dense" in arms:
        drawn.insert(0, charts.line_chart(list(losses.values()), "Contrastive loss", "step", "nats", marks=marks))
    level = number(dig(report, "chance_R@1"))
    levels = () if level is None else ((level, f"chance {chance(level)}%"),)
    for way, name in WAYS:
        series = [_recall(report, arm, evaluations, f"{way}_R@1", before or 0.0) for arm in arms]
        title = f"R@1 {name}, held-out renderings"
        highest = max([y for one in series for _, y in one.pairs() if np.isfinite(y)] + [level or 0.0]) or 1.0
        from_zero = (-0.03 * highest, 1.06 * highest)
        drawn.append(
            charts.line_chart(series, title, "step", "R@1", percent_tick, y_range=from_zero, marks=marks, levels=levels)
        )
    return drawn


def _loss(arm: str, records: Records, window: int) -> Series:
    steps = [_float(record.get("step")) for record in records]
    values = [_float(record.get("contrastive", record.get("loss"))) for record in records]
    smoothed = charts.smooth(values, window)
    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_POINTS)).round().astype(int)).tolist()
    x, y = [steps[index] for index in keep], [smoothed[index] for index in keep]
    return Series(_CURVES[arm], x, y, COLORS[arm], DASHES[arm])


def _recall(report: Mapping[str, Any], arm: str, evaluations: Mapping[str, Records], key: str, branch: float) -> Series:
    """An arm's R@1 over steps; continued training starts at the R@1 of its initial model."""
    found = [(_float(record.get("step")), _float(record.get(key))) for record in evaluations.get(arm, ())]
    start = {"dense_continued": "dense", "clip_up": "upcycled_step0"}.get(arm)
    value = number(dig(report, start, key)) if start else None
    if found and value is not None and found[0][0] > branch:
        found.insert(0, (branch, value))
    x, y = [step for step, _ in found], [recall for _, recall in found]
    return Series(_CURVES[arm], x, y, COLORS[arm], DASHES[arm], points=True)


def _window(curves: Mapping[str, Records]) -> int:
    """Number of steps to average the loss over: a twentieth of the shortest run, odd, at most 51."""
    shortest = min((len(records) for records in curves.values() if len(records)), default=1)
    return min(51, shortest // 20 | 1)


def _last_step(records: Records) -> float | None:
    return number(records[-1].get("step")) if len(records) else None


def _load_charts(loads: Mapping[str, Mapping[str, Any]]) -> list[str]:
    shares = [_float(share) for layer in loads.values() for row in layer["load"] for share in row]
    finite = [share for share in shares if np.isfinite(share)]
    experts = max((len(layer["load"][0]) for layer in loads.values() if len(layer["load"])), default=1)
    top = 1.06 * max([*finite, 1.5 / experts])
    return [
        charts.load_chart(layer["steps"], layer["load"], layer_title(name), y_max=top) for name, layer in loads.items()
    ]


def _experts(loads: Mapping[str, Mapping[str, Any]], routing: Sequence[Mapping[str, Any]]) -> int:
    """The largest number of experts in any figure."""
    of_loads = [len(layer["load"][0]) for layer in loads.values() if len(layer["load"])]
    grids = [np.asarray(grid) for example in routing for grid in example["layers"].values()]
    return max([*of_loads, *(int(grid.max()) + 1 for grid in grids if grid.size)], default=0)


def _routing(example: Mapping[str, Any]) -> dict[str, Any]:
    caption, image = svg.shorten(example["caption"], images.MOST_CAPTION_CHARACTERS), example["image"]
    maps = [
        (layer_title(name).removeprefix("Image tower, "), Markup(images.routing_map(image, grid, layer_title(name))))
        for name, grid in example["layers"].items()
    ]
    return {"caption": caption, "maps": [("picture", Markup(images.picture(image, caption, 144))), *maps]}


def _retrievals(found: Sequence[Mapping[str, Any]]) -> list[Markup]:
    names = dict(comparison_tables.ARMS)
    return [
        Markup(
            images.retrieval_row(
                one["caption"], one["target"], one["retrieved"], one["rank"], names.get(one["model"], one["model"])
            )
        )
        for one in found[:MOST_RETRIEVALS]
    ]


def _data(report: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    licences = [
        {**licence, "url": url if str(url := licence.get("url") or "").startswith(("https://", "http://")) else None}
        for licence in notes.get("licences", ())
    ]
    name = svg.shorten(dig(report, "data", "name") or MISSING, 60)
    return {"name": name, "splits": notes.get("splits", {}), "licences": licences, "left_out": notes.get("left_out")}


def _markup_or_none(table: tables.Table) -> Markup | None:
    return Markup(tables.as_html(table, "R@1 on the other splits")) if table.columns else None


def _commands(report: Mapping[str, Any]) -> list[str]:
    given = report.get("commands") or ["make demo"]
    values = [given] if isinstance(given, str) else given.values() if isinstance(given, Mapping) else given
    return [svg.shorten(command, _LONGEST_VALUE) for command in values]


def _extras(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the report holds beyond the tables, in groups: versions, machine, options."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in report.items():
        if key not in _KNOWN:
            group = key if isinstance(value, Mapping) else "run"
            groups.setdefault(group, []).extend(_flatten("" if isinstance(value, Mapping) else key, value))
    parts = [("data", "data", _KNOWN_OF_DATA), *((arm, name, _KNOWN_OF_ARM) for arm, name in comparison_tables.ARMS)]
    for part, name, known in parts:
        entry = report.get(part)
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if key not in known:
                groups.setdefault(name, []).extend(_flatten(key, value))
    return [(name, _cut(rows)) for name, rows in groups.items()]


def _cut(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(rows) <= _MOST_EXTRAS:
        return rows
    return [*rows[:_MOST_EXTRAS], ("…", f"{len(rows) - _MOST_EXTRAS} more in report.json")]


def _flatten(path: str, value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        listed = ", ".join(map(str, value)) if isinstance(value, list | tuple) else MISSING if value is None else value
        return [(svg.shorten(path, _LONGEST_VALUE), svg.shorten(listed, _LONGEST_VALUE))]
    return [row for key, inner in value.items() for row in _flatten(f"{path}.{key}" if path else str(key), inner)]


def _float(value: Any) -> float:
    found = number(value)
    return float("nan") if found is None else found
