"""Tables of the comparison, shown as plain text in the terminal and as HTML on the page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evaluate.retrieval import RECALL_AT
from ..inspection.figures import svg
from ..inspection.figures.format import chance, column, count, dig, number, percent, points, ratio
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

_TARGETS = {"text_to_image": "to image", "image_to_text": "to text"}
_TERMINAL = str.maketrans({"→": "to", "−": "-", "–": "-", "×": "x", "\u00a0": " "})
_TEXT_WIDTH = 100


def comparison_table(report: Mapping[str, Any]) -> str:
    """All comparisons and the verdict as ASCII text for the terminal, at most 100 characters wide."""
    parts = [f"Held-out renderings, {heading(report)}", as_text(quality(report)), "", as_text(cost(report))]
    others = splits(report)
    if others.columns:
        parts += ["", "Other splits, R@1 in %", as_text(others)]
    difference = step0(report)
    sentences = [*([difference] if difference else []), *_flat(verdict(report))]
    parts += ["", *(textwrap.fill(sentence, _TEXT_WIDTH) for sentence in sentences)]
    return "\n".join(parts).translate(_TERMINAL).encode("ascii", "replace").decode("ascii")


def heading(report: Mapping[str, Any]) -> str:
    """Gallery size and chance level of the main comparison."""
    images, captions = (count(dig(report, "data", key)) for key in ("test_images", "test_captions"))
    return f"gallery of {images} images and {captions} captions, chance R@1 {chance(dig(report, 'chance_R@1'))}\u00a0%"


def step0(report: Mapping[str, Any]) -> str | None:
    """The sentence about the change made by upcycling before the first step; None without the number."""
    found = number(dig(report, "upcycled_step0", "max_feature_difference"))
    if found is None:
        return None
    return (
        f"Upcycling changed the normalized features by at most {found:.1e} before the first step: "
        "the two models compute the same function there."
        if found <= 1e-4
        else f"Upcycling changed the normalized features by up to {found:.1e} before the first step, "
        "which is more than rounding (1e-4)."
    )


def quality(report: Mapping[str, Any]) -> Table:
    """Recall of every arm on the held-out renderings in percent, with chance above and the difference below."""
    columns = []
    for way, name in WAYS:
        for k in RECALL_AT:
            values = [number(dig(report, arm, f"{way}_R@{k}")) for arm, _ in ARMS]
            above = chance(dig(report, "chance_R@1")) if k == 1 else ""
            cells = (above, *map(percent, values), points(_lead(values)))
            columns.append(Column(f"{name}, %", f"R@{k}", cells))
    rows = ("Chance", *(name for _, name in ARMS), DIFFERENCE)
    return Table(rows, tuple(columns), frozenset({3, 4}), _ROW_CLASSES)


def cost(report: Mapping[str, Any]) -> Table:
    """Cost of every arm: its own steps and seconds, parameters, FLOPs; with the ratio below."""

    def of(key: str, scale: float = 1.0) -> list[float | None]:
        values = [number(dig(report, arm, key)) for arm, _ in ARMS]
        return [None if value is None else value / scale for value in values]

    def one(group: str, label: str, values: list[float | None], write: Callable[[list], list[str]]) -> Column:
        return Column(group, label, (*write(values), ratio(values[3], values[2])))

    def whole(values: list) -> list[str]:
        return [count(value) for value in values]

    return Table(
        (*(name for _, name in ARMS), RATIO),
        (
            one("training", "steps", of("steps"), whole),
            one("training", "seconds", of("seconds"), whole),
            one("parameters, M", "all", of("params", 1e6), column),
            one("parameters, M", "active", of("active_params", 1e6), column),
            one("GFLOPs", "per pair", of("gflops_per_pair"), column),
        ),
        frozenset({2, 3}),
    )


def overview(report: Mapping[str, Any]) -> Table:
    """``quality`` and ``cost`` side by side, for wide pages; the last row has points and ratios."""
    first, second = quality(report), cost(report)
    columns = tuple(Column(one.group, one.label, ("", *one.cells)) for one in second.columns)
    return Table((*first.rows[:-1], VERSUS), first.columns + columns, first.strong, _ROW_CLASSES)


def splits(report: Mapping[str, Any]) -> Table:
    """R@1 of every arm on the other splits; without columns if the report has none."""
    names: dict[str, None] = {}
    for arm, _ in ARMS:
        found = dig(report, arm, "splits")
        names |= dict.fromkeys(found if isinstance(found, Mapping) else ())
    columns = []
    for split in names:
        about: Any = next((found for arm, _ in reversed(ARMS) if (found := dig(report, arm, "splits", split))), {})
        group = f"{svg.shorten(split, 40)}, gallery {count(dig(about, 'gallery'))}"
        for way, _ in WAYS:
            values = [number(dig(report, arm, "splits", split, f"{way}_R@1")) for arm, _ in ARMS]
            cells = (chance(dig(about, "chance_R@1")), *map(percent, values), points(_lead(values)))
            columns.append(Column(group, _TARGETS[way], cells))
    rows = ("Chance", *(name for _, name in ARMS), DIFFERENCE)
    return Table(rows, tuple(columns), frozenset({3, 4}), _ROW_CLASSES)


def _lead(values: Sequence[float | None]) -> float | None:
    """CLIP-UP minus the dense baseline; values in the order of ARMS."""
    continued, clip_up = values[2], values[3]
    return None if continued is None or clip_up is None else clip_up - continued


def _flat(found: Any) -> list[str]:
    return [found.sentence, *found.notes]
