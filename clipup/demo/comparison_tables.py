"""Tables of the comparison, shown as plain text in the terminal and as HTML on the page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluate.retrieval import RECALL_AT
from ..inspection.figures import svg
from ..inspection.figures.format import chance, column, count, percent, points
from ..inspection.figures.tables import Column, Table, as_text
from .verdict import WAYS, verdict

ARMS = (
    ("dense", "Dense"),
    ("upcycled_step0", "Upcycled, step 0"),
    ("dense_continued", "Dense continued"),
    ("clip_up", "CLIP-UP"),
)
DIFFERENCE = "CLIP-UP − dense continued"
RATIO = "CLIP-UP / dense continued"
VERSUS = "CLIP-UP vs. continued"
_ROW_CLASSES = {"Chance": "chance", DIFFERENCE: "difference", VERSUS: "difference"}

_COSTS = (
    ("training", "steps", "steps", 1),
    ("training", "seconds", "seconds", 1),
    ("parameters, M", "all", "params", 1e6),
    ("parameters, M", "active", "active_params", 1e6),
    ("GFLOP", "per pair", "gflops_per_pair", 1),
)
_TARGETS = {"text_to_image": "to image", "image_to_text": "to text"}
_TERMINAL = str.maketrans({"→": "to", "−": "-", "–": "-", "×": "x", "\u00a0": " "})
_TEXT_WIDTH = 100


def comparison_table(report: Mapping[str, Any]) -> str:
    """All comparisons and the verdict as ASCII text for the terminal, at most 100 characters wide."""
    result = verdict(report)
    parts = [
        *(f"Held-out renderings, {heading(report)}", as_text(quality(report)), "", as_text(cost(report)), ""),
        *("Other splits, R@1 in %", as_text(splits(report)), ""),
        *(
            textwrap.fill(sentence.translate(_TERMINAL), _TEXT_WIDTH)
            for sentence in (step0(report), result.sentence, *result.notes)
        ),
    ]
    return "\n".join(parts).translate(_TERMINAL).encode("ascii", "replace").decode("ascii")


def heading(report: Mapping[str, Any]) -> str:
    """Gallery size and chance level of the main comparison."""
    images, captions = (count(report["data"][key]) for key in ("test_images", "test_captions"))
    return f"gallery of {images} images and {captions} captions, chance R@1 {chance(report['chance_R@1'])}\u00a0%"


def step0(report: Mapping[str, Any]) -> str:
    """The sentence about the change made by upcycling before the first step."""
    difference = report["upcycled_step0"]["max_feature_difference"]
    changed = f"Upcycling changed the normalized features by at most {difference:.1e} before the first step"
    if difference <= 1e-4:
        return f"{changed}: the two models compute the same function there."
    return f"{changed}, which is more than rounding (1e-4)."


def quality(report: Mapping[str, Any]) -> Table:
    """Recall of every arm on the held-out renderings in percent, with chance above and the difference below."""
    arms, level = [report[arm] for arm, _ in ARMS], chance(report["chance_R@1"])
    columns = [
        _recalls(f"{name}, %", f"R@{k}", arms, f"{way}_R@{k}", level if k == 1 else "")
        for way, name in WAYS
        for k in RECALL_AT
    ]
    return Table(("Chance", *(name for _, name in ARMS), DIFFERENCE), tuple(columns), frozenset({3, 4}), _ROW_CLASSES)


def cost(report: Mapping[str, Any]) -> Table:
    """Cost of every arm: its own steps and seconds, parameters, FLOPs; with the ratio below."""
    columns = []
    for group, label, key, scale in _COSTS:
        values = [report[arm][key] / scale for arm, _ in ARMS]
        written = list(map(count, values)) if group == "training" else column(values)
        columns.append(Column(group, label, (*written, f"×{values[3] / values[2]:.2f}")))
    return Table((*(name for _, name in ARMS), RATIO), tuple(columns), frozenset({2, 3}))


def overview(report: Mapping[str, Any]) -> Table:
    """``quality`` and ``cost`` side by side, for wide pages; the last row has points and ratios."""
    first, second = quality(report), cost(report)
    columns = tuple(Column(column.group, column.label, ("", *column.cells)) for column in second.columns)
    return Table((*first.rows[:-1], VERSUS), first.columns + columns, first.strong, _ROW_CLASSES)


def splits(report: Mapping[str, Any]) -> Table:
    """R@1 of every arm on the other splits."""
    columns = []
    for split, about in report["clip_up"]["splits"].items():
        group = f"{svg.shorten(split, 40)}, gallery {count(about['gallery'])}"
        arms = [report[arm]["splits"][split] for arm, _ in ARMS]
        for way, label in _TARGETS.items():
            columns.append(_recalls(group, label, arms, f"{way}_R@1", chance(about["chance_R@1"])))
    return Table(("Chance", *(name for _, name in ARMS), DIFFERENCE), tuple(columns), frozenset({3, 4}), _ROW_CLASSES)


def _recalls(group: str, label: str, arms: Sequence[Mapping[str, Any]], key: str, above: str) -> Column:
    values = [arm[key] for arm in arms]
    return Column(group, label, (above, *map(percent, values), points(values[3] - values[2])))
