"""The comparison as tables: one description, written as plain text for the terminal and as HTML for the page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from . import svg
from .numbers import chance, column, count, dig, number, percent, points, ratio
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
_RECALLS = (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"))
_TARGETS = {"t2i": "to image", "i2t": "to text"}
_TERMINAL = str.maketrans({"→": "to", "−": "-", "–": "-", "×": "x", "\u00a0": " "})
_TEXT_WIDTH = 100


@dataclass(frozen=True)
class Column:
    """Columns with the same ``group`` stand under one heading."""

    group: str
    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows by their names, columns by their groups; ``strong`` are the rows that the comparison is about."""

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    strong: frozenset[int] = frozenset()

    def groups(self) -> list[tuple[str, int]]:
        """Headings in order, each with the number of columns that it spans."""
        spans: list[tuple[str, int]] = []
        for one in self.columns:
            if spans and spans[-1][0] == one.group:
                spans[-1] = (one.group, spans[-1][1] + 1)
            else:
                spans.append((one.group, 1))
        return spans


def comparison_table(report: Mapping[str, Any]) -> str:
    """Everything that was compared, and the verdict, as plain ASCII for the terminal, at most 100 characters wide."""
    parts = [f"Held-out renderings, {heading(report)}", as_text(quality(report)), "", as_text(cost(report))]
    others = splits(report)
    if others.columns:
        parts += ["", "Other splits, R@1 in %", as_text(others)]
    difference = step0(report)
    sentences = [*([difference] if difference else []), *_flat(verdict(report))]
    parts += ["", *(textwrap.fill(sentence, _TEXT_WIDTH) for sentence in sentences)]
    return "\n".join(parts).translate(_TERMINAL).encode("ascii", "replace").decode("ascii")


def heading(report: Mapping[str, Any]) -> str:
    """Gallery size and chance of the main comparison."""
    images, captions = (count(dig(report, "data", key)) for key in ("test_images", "test_captions"))
    return f"gallery of {images} images and {captions} captions, chance R@1 {chance(dig(report, 'chance_r1'))}\u00a0%"


def step0(report: Mapping[str, Any]) -> str | None:
    """The sentence about the difference that upcycling made before the first step; None without the number."""
    found = number(dig(report, "upcycled_step0", "max_feature_difference"))
    if found is None:
        return None
    return (
        f"Upcycling changed the normalised features by at most {found:.1e} before the first step: "
        "the two models compute the same function there."
        if found <= 1e-4
        else f"Upcycling changed the normalised features by up to {found:.1e} before the first step, "
        "which is more than rounding (1e-4)."
    )


def quality(report: Mapping[str, Any]) -> Table:
    """Recall of every arm on the held-out renderings in per cent, chance above, the difference in points below."""
    columns = []
    for way, name in WAYS:
        for recall, label in _RECALLS:
            values = [number(dig(report, arm, way, recall)) for arm, _ in ARMS]
            above = chance(dig(report, "chance_r1")) if recall == "r1" else ""
            cells = (above, *map(percent, values), points(_lead(values)))
            columns.append(Column(f"{name}, %", label, cells))
    rows = ("Chance", *(name for _, name in ARMS), DIFFERENCE)
    return Table(rows, tuple(columns), frozenset({3, 4}))


def cost(report: Mapping[str, Any]) -> Table:
    """What every arm takes: steps and seconds of that row alone, parameters, FLOPs; the ratio below."""

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
            one("GFLOPs", "a pair", of("gflops_per_pair"), column),
        ),
        frozenset({2, 3}),
    )


def overview(report: Mapping[str, Any]) -> Table:
    """``quality`` and ``cost`` side by side, for where there is room; the last row has points and ratios."""
    first, second = quality(report), cost(report)
    columns = tuple(Column(one.group, one.label, ("", *one.cells)) for one in second.columns)
    return Table((*first.rows[:-1], VERSUS), first.columns + columns, first.strong)


def splits(report: Mapping[str, Any]) -> Table:
    """R@1 of every arm on the other splits; no columns when the report has none."""
    names: dict[str, None] = {}
    for arm, _ in ARMS:
        found = dig(report, arm, "splits")
        names |= dict.fromkeys(found if isinstance(found, Mapping) else ())
    columns = []
    for split in names:
        about = next((found for arm, _ in reversed(ARMS) if (found := dig(report, arm, "splits", split))), {})
        group = f"{svg.shorten(split, 40)}, gallery {count(dig(about, 'gallery'))}"
        for way, _ in WAYS:
            values = [number(dig(report, arm, "splits", split, way, "r1")) for arm, _ in ARMS]
            cells = (chance(dig(about, "chance_r1")), *map(percent, values), points(_lead(values)))
            columns.append(Column(group, _TARGETS[way], cells))
    rows = ("Chance", *(name for _, name in ARMS), DIFFERENCE)
    return Table(rows, tuple(columns), frozenset({3, 4}))


def as_text(table: Table) -> str:
    """The table with numbers flush right, groups above their columns."""
    first = max(map(len, table.rows))
    groups = table.groups()
    widths = [max(len(one.label), *map(len, one.cells)) for one in table.columns]
    position = 0
    for group, size in groups:  # a heading wider than its columns widens the first of them
        taken = sum(widths[position : position + size]) + 2 * (size - 1)
        widths[position] += max(0, len(group) - taken)
        position += size
    tops, position = [], 0
    for group, size in groups:
        tops.append(group.rjust(sum(widths[position : position + size]) + 2 * (size - 1)))
        position += size
    lines = [" " * first + "  " + "  ".join(tops), _text_row("", [one.label for one in table.columns], first, widths)]
    lines.append("-" * len(lines[-1]))
    lines += [
        _text_row(name, [one.cells[index] for one in table.columns], first, widths)
        for index, name in enumerate(table.rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_html(table: Table, label: str) -> str:
    """The table as HTML; ``label`` names it for those who do not see it. It scrolls sideways where it is too wide."""
    heads = svg.element("td", "") + "".join(
        svg.element("th", escape(group), colspan=size, scope="colgroup") for group, size in table.groups()
    )
    firsts = _first_of_group(table)
    labels = svg.element("td", "") + "".join(
        svg.element("th", escape(one.label), scope="col", class_="first" if index in firsts else None)
        for index, one in enumerate(table.columns)
    )
    head = svg.element("thead", svg.element("tr", heads, class_="groups"), svg.element("tr", labels))
    body = svg.element("tbody", *(_html_row(table, index, name, firsts) for index, name in enumerate(table.rows)))
    whole = svg.element("table", head, body, aria_label=label)
    return svg.element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def _html_row(table: Table, index: int, name: str, firsts: set[int]) -> str:
    cells = "".join(
        svg.element("td", escape(one.cells[index]), class_="first" if place in firsts else None)
        for place, one in enumerate(table.columns)
    )
    kind = "strong" if index in table.strong else _ROW_CLASSES.get(name)
    return svg.element("tr", svg.element("th", escape(name), scope="row"), cells, class_=kind)


def _first_of_group(table: Table) -> set[int]:
    places, position = set(), 0
    for _, size in table.groups():
        places.add(position)
        position += size
    return places


def _text_row(name: str, cells: Iterable[str], first: int, widths: Sequence[int]) -> str:
    return name.ljust(first) + "  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _lead(values: Sequence[float | None]) -> float | None:
    """CLIP-UP minus the dense model continued; values in the order of ARMS."""
    continued, clip_up = values[2], values[3]
    return None if continued is None or clip_up is None else clip_up - continued


def _flat(found: Any) -> list[str]:
    return [found.sentence, *found.notes]
